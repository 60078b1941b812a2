"""GPT-2's weights in Hugging Face's layout, their way into a checkpoint and back."""

import copy
import hashlib
import json
import tracemalloc
from pathlib import Path

import pytest
import rlhf
import torch
from conftest import gpt, scalar, write_vocabulary
from data import gpt2
from data.files import UserError, fingerprint, get_tokenizer
from data.gpt2 import load_gpt2, read_safetensors, save_gpt2
from model import GPT

SHAPE = dict(vocab_size=261, block_size=32, n_layer=2, n_head=3, n_embd=24)
MERGES = [("t", "h"), ("th", "e"), ("Ġ", "the"), ("i", "n")]
VISIBLE = [*range(33, 127), *range(161, 173), *range(174, 256)]  # bytes, as GPT-2 orders them
HIDDEN = sorted(set(range(256)) - set(VISIBLE))
NAMES = {torch.float32: "F32", torch.float16: "F16", torch.bfloat16: "BF16", torch.bool: "BOOL"}
TWO = {"a": torch.arange(6.0).view(2, 3), "b": torch.arange(4.0)}

@pytest.fixture
def model() -> GPT:
    return gpt(**SHAPE)

def theirs(model: GPT, prefix: str = "", **more) -> dict[str, torch.Tensor]:
    """The tensors as `transformers` has them: Conv1D computes x W + b, with W of (in, out)."""
    weights = {}
    for name, tensor in model.state_dict().items():
        linear = name.startswith("h.") and tensor.dim() == 2
        weights[prefix + name] = tensor.T.contiguous() if linear else tensor
    return weights | more

def safetensors(weights: dict, **header) -> bytes:
    """The format by its description: 8 bytes of length, JSON, data. `header` replaces entries."""
    entries = {"__metadata__": {"format": "pt"}}
    data = b""
    for name, tensor in weights.items():
        content = tensor.contiguous().view(torch.uint8).numpy().tobytes()
        entries[name] = {"dtype": NAMES[tensor.dtype], "shape": list(tensor.shape),
                         "data_offsets": [len(data), len(data) + len(content)]}
        data += content
    text = json.dumps(entries | header).encode()
    return len(text).to_bytes(8, "little") + text + data

def write_folder(folder: Path, model, weights=None, **config) -> Path:
    folder.mkdir(exist_ok=True, parents=True)
    shape = model.config
    fields = {"activation_function": "gelu_new", "layer_norm_epsilon": 1e-05, "resid_pdrop": 0.1,
              "n_embd": shape.n_embd, "n_head": shape.n_head, "n_layer": shape.n_layer,
              "n_positions": shape.block_size, "vocab_size": shape.vocab_size}
    (folder / "config.json").write_text(json.dumps(fields | config))
    weights = theirs(model) if weights is None else weights
    (folder / "model.safetensors").write_bytes(safetensors(weights))
    return folder

def same(one: torch.nn.Module, other: torch.nn.Module) -> bool:
    a, b = one.state_dict(), other.state_dict()
    return a.keys() == b.keys() and all(torch.equal(a[name], b[name]) for name in a)

def refused(sentence: str, name_or_folder, data: str = "") -> None:
    with pytest.raises(UserError, match=sentence):
        load_gpt2(name_or_folder, data)

@pytest.mark.parametrize("prefix, dtype", [
    ("", torch.float32), ("transformer.", torch.float16), ("_orig_mod.", torch.bfloat16),
    ("transformer.module.", torch.float16), ("_orig_mod.module.transformer.", torch.float32)])
def test_prefixes_and_dtypes(tmp_path, model, prefix, dtype):
    weights = {name: tensor.to(dtype) for name, tensor in theirs(model, prefix).items()}
    loaded = load_gpt2(write_folder(tmp_path, model, weights))
    assert type(loaded) is GPT and same(loaded, model.to(dtype).float()) and not loaded.training
    assert loaded.config == model.config
    assert all(x.requires_grad and x.dtype == torch.float32 for x in loaded.parameters())

def test_masks_of_old_versions_and_the_tied_unembedding(tmp_path, model):
    more = {"h.0.attn.bias": torch.ones(1, 1, 32, 32, dtype=torch.bool),
            "h.1.attn.masked_bias": torch.full((1,), -1e4), "lm_head.weight": model.wte.weight.data}
    assert same(load_gpt2(write_folder(tmp_path, model, theirs(model, **more))), model)
    more["lm_head.weight"] = model.wte.weight + 1
    with pytest.raises(UserError, match="model.safetensors .*lm_head.weight differs from wte.wei"):
        load_gpt2(write_folder(tmp_path, model, theirs(model, **more)))

@pytest.mark.parametrize("name, shape", [
    ("h.1.ln_2.bias", None), ("wte.weight", None), ("h.2.ln_1.bias", 24), ("wpe.weight", (31, 24)),
    ("h.0.attn.c_attn.weight", (72, 24)), ("score.weight", (1, 24))])
def test_weights_that_do_not_fit_are_named(tmp_path, model, name, shape):
    weights = theirs(model)
    weights.pop(name, None)
    if shape:
        weights[name] = torch.ones(shape)
    folder = write_folder(tmp_path, model, weights)
    refused(f"model.safetensors cannot.*{name}.*: use another", folder)

@pytest.mark.parametrize("field, value", [
    ("n_layer", None), ("n_layer", 3), ("n_head", 0), ("n_embd", 24.0), ("n_positions", "32"),
    ("n_head", 5), ("n_embd", 48), ("activation_function", "gelu"), ("activation_function", None),
    ("layer_norm_epsilon", 1e-6), ("scale_attn_weights", False), ("model_type", "gpt_neo"),
    ("scale_attn_by_inverse_layer_idx", True), ("add_cross_attention", True),
    ("tie_word_embeddings", False)])
def test_a_config_of_another_model_is_refused(tmp_path, model, field, value):
    assert same(load_gpt2(write_folder(tmp_path, model, n_inner=96)), model)
    refused("cannot be used", write_folder(tmp_path, model, **{field: value}))

def test_broken_folders_are_one_sentence(tmp_path, model):
    refused("config.json cannot be used .*No such file.* one of gpt2", tmp_path / "nowhere")
    write_folder(tmp_path, model)
    for content in (b"[]", b"{", b"[" * 100_000, b"\xff"):
        (tmp_path / "config.json").write_bytes(content)
        refused("config.json cannot be used", tmp_path)
    (tmp_path / "broken.pt").write_bytes(b"broken")
    for line in ("load nowhere", "save nothing.pt a", f"save {tmp_path}/broken.pt a"):
        with pytest.raises(SystemExit, match=f"gpt2: .*{line.split()[1]}"):
            gpt2.main(line.split())

B = {"dtype": "F32", "shape": [4], "data_offsets": [24, 40]}
DAMAGED = [
    b"", b"\x00" * 7, (10**18).to_bytes(8, "little") + b"{", (2).to_bytes(8, "little") + b"[]",
    (2).to_bytes(8, "little") + b"{]", safetensors(TWO)[:-1],
    *(safetensors(TWO, b=B | {"data_offsets": offsets}) for offsets in (
        [20, 36], [20, 40], [28, 44], [0, 16], [24, 44], [-16, 0], [24], ["24", "40"])),
    *(safetensors(TWO, b=B | {"shape": shape}) for shape in (
        [2**40, 2**40], [-2, -2], [4.0], [5], [2, 2, 2], 4, None)),
    *(safetensors(TWO, b=B | {"dtype": dtype}) for dtype in ("F8_E4M3", "I32", "F64", [])),
    safetensors(TWO, b=7), safetensors(TWO, b={"dtype": "F32"}),
    safetensors(TWO, a=B | {"shape": [10**12], "data_offsets": [0, 4 * 10**12]},
                b=B | {"shape": [10 - 10**12], "data_offsets": [4 * 10**12, 40]})]

def test_damaged_safetensors_files_are_one_sentence(tmp_path):
    path = tmp_path / "model.safetensors"
    path.write_bytes(safetensors(TWO))
    assert all(torch.equal(tensor, TWO[name]) for name, tensor in read_safetensors(path).items())
    tracemalloc.start()
    for content in DAMAGED:
        path.write_bytes(content)
        with pytest.raises(UserError, match="model.safetensors cannot be used .*: use ano"):
            with gpt2.explained(path):
                read_safetensors(path)
    assert tracemalloc.get_traced_memory()[1] < 10**7
    tracemalloc.stop()

def write_data(folder: Path) -> str:
    tokens = [bytes([byte]) for byte in VISIBLE + HIDDEN] + [b"th", b"the", b" the", b"in"]
    return str(write_vocabulary(folder, tokens))

def write_bpe(folder: Path, merges=MERGES, order=None) -> None:
    characters = [chr(byte) for byte in VISIBLE] + [chr(256 + i) for i in range(68)]
    tokens = [*characters, *map("".join, merges), "<|endoftext|>"]
    ids = {token: i for i, token in enumerate(tokens)}
    (folder / "vocab.json").write_text(json.dumps(ids), encoding="utf-8")
    text = "".join(f"{a} {b}\n" for a, b in order or merges)
    (folder / "merges.txt").write_text("#version: 0.2\n" + text, encoding="utf-8")

def test_the_bpe_beside_the_weights_has_to_be_the_tokenizers(tmp_path, model):
    folder, data = write_folder(tmp_path / "a", model), write_data(tmp_path / "data")
    write_bpe(folder)
    assert load_gpt2(folder, data).config.vocabulary == fingerprint(get_tokenizer(data))
    refused("another vocabulary than GPT-2: pass its --data", folder)
    write_bpe(folder, [*MERGES[:3], ("o", "n")])  # as many tokens
    refused(f"another vocabulary than {data}: pass its --data", folder, data)
    for order in (MERGES[::-1], MERGES[:3], [*MERGES[:3], ("o", "n")]):
        write_bpe(folder, order=order)
        refused("merges.txt cannot be used", folder, data)
    for content in ("", "[]", '{"a": "b"}', '{"\u4e2d": 0}', '{"a": 5}'):
        (folder / "vocab.json").write_text(content)
        refused("vocab.json or .* cannot be used", folder, data)

def test_padded_vocabularies_are_cut_and_it_says_so(tmp_path, capsys):
    data = write_data(tmp_path / "data")
    for size, own, folder in ((50304, 50257, ""), (320, 261, data), (262, 261, data)):
        model = gpt(**SHAPE | {"vocab_size": size})
        weights = theirs(model, **{"lm_head.weight": model.wte.weight.data})
        loaded = load_gpt2(write_folder(tmp_path / "a", model, weights), folder)
        assert f"the vocabulary of {size:,} is cut to" in capsys.readouterr().out
        assert loaded.config.vocab_size == own and loaded.wte.weight.shape == (own, 24)
        tokens = torch.randint(own, (2, 9))
        torch.testing.assert_close(loaded(tokens), model(tokens)[..., :own])
    for size in (250, 3000):
        with pytest.raises(UserError, match=f"{size} tokens, where .*data has 261"):
            load_gpt2(write_folder(tmp_path / "a", gpt(**SHAPE | {"vocab_size": size})), data)
    refused("no folder .*nowhere", tmp_path / "a", str(tmp_path / "nowhere"))

def test_a_name_is_downloaded_once_from_the_mirror(tmp_path, monkeypatch):
    model = gpt(**SHAPE)
    place = tmp_path / "hub" / "openai-community" / "gpt2-xl" / "resolve" / "0123"
    monkeypatch.setenv("HF_ENDPOINT", f"file://{tmp_path}/hub")
    monkeypatch.setenv("HOME", str(tmp_path))
    monkeypatch.setitem(gpt2.HUB, "gpt2-xl", ("0123", "0" * 24))
    cached = tmp_path / ".cache/rlhf/gpt2-xl"
    refused(f"hub/.*config.json could.*: try again, .*{cached}/conf", "gpt2-xl")
    write_folder(place, model)
    refused("invalid hash value.*save it as .*model.safetensors", "gpt2-xl")
    assert [file.name for file in cached.iterdir()] == ["config.json"]
    right = hashlib.sha256((place / "model.safetensors").read_bytes()).hexdigest()
    monkeypatch.setitem(gpt2.HUB, "gpt2-xl", ("0123", right[:24]))
    assert same(load_gpt2("gpt2-xl"), model)
    (place / "model.safetensors").unlink()
    again = load_gpt2("gpt2-xl")
    assert same(again, model) and again.config.vocabulary == gpt2.GPT2_VOCABULARY
    refused("another vocabulary than", "gpt2-xl", write_data(tmp_path / "data"))

def test_a_reward_model_keeps_its_scores_bias_and_all(tmp_path):
    model, tokens = scalar(**SHAPE), torch.randint(261, (4, 20))
    before = copy.deepcopy(model)
    save_gpt2(model, tmp_path)
    assert same(model, before)
    config = json.loads((tmp_path / "config.json").read_text())
    assert config["pad_token_id"] != config["eos_token_id"]
    weights = read_safetensors(tmp_path / "model.safetensors")
    score = weights.pop("score.weight")
    gpt = load_gpt2(write_folder(tmp_path, model.gpt, weights))
    scores = (gpt.hidden(tokens) @ score.T).squeeze(-1)
    torch.testing.assert_close(scores, model(tokens), atol=1e-5, rtol=1e-5)

def test_transformers_gives_the_same_logits_and_scores(tmp_path, model):
    transformers = pytest.importorskip("transformers")
    tokens, reward_model = torch.randint(180, (3, 17)), scalar(**SHAPE)
    save_gpt2(model, tmp_path / "a")
    save_gpt2(reward_model, tmp_path / "rm")
    lm = transformers.GPT2LMHeadModel.from_pretrained(tmp_path / "a")
    classifier = transformers.AutoModelForSequenceClassification.from_pretrained(tmp_path / "rm")
    torch.testing.assert_close(lm(tokens).logits, model(tokens), atol=1e-4, rtol=0)
    scores = reward_model(tokens)[:, 10]
    tokens[:, 11:] = classifier.config.pad_token_id
    torch.testing.assert_close(classifier(tokens).logits[:, 0], scores, atol=1e-4, rtol=0)
    lm.save_pretrained(tmp_path / "b")
    assert same(load_gpt2(tmp_path / "b"), model)

def test_load_and_save_on_the_command_line(tmp_path, model, capsys):
    out = ["--out", str(tmp_path)]
    gpt2.main(["load", str(write_folder(tmp_path / "a", model)), *out])
    gpt2.main(["save", "gpt", str(tmp_path / "b"), *out])
    path = tmp_path / "b/model.safetensors"
    assert int.from_bytes(path.read_bytes()[:8], "little") % 8 == 0  # aligned
    expected = theirs(model, "transformer.")
    for name, tensor in read_safetensors(path).items():
        assert torch.equal(tensor, expected.pop(name))
    assert not expected and same(load_gpt2(tmp_path / "b"), model)
    rlhf.save(tmp_path / "rm.pt", scalar(**SHAPE))
    gpt2.main(["save", f"{tmp_path}/rm.pt", str(tmp_path / "c")])
    said = capsys.readouterr().out
    assert "GPT with 261 tokens" in said and "ScalarModel with 261 tokens" in said
    with pytest.raises(SystemExit, match="model.safetensors cannot be written"):
        gpt2.main(["save", "gpt", str(tmp_path / "rm.pt"), *out])

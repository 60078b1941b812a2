"""Downloads, GPT-2's weights in Hugging Face's layout, and their way into a checkpoint and back."""

import hashlib
import json
import socket
import threading
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer

import pytest
import tiktoken
import torch
from conftest import gpt, scalar
from data import formats, gpt2
from data.download import fetch
from data.formats import UserError
from data.gpt2 import load_gpt2, read_safetensors, save_gpt2, write_safetensors
from model import GPT, ScalarModel

import cli
import rlhf

CONTENT = bytes(range(256)) * 5000  # more than one block of a download
SHA256 = hashlib.sha256(CONTENT).hexdigest()


# ---- downloads -----------------------------------------------------------------------------------

class Server(ThreadingHTTPServer):
    """Files and redirects by path; remembers which ranges it was asked for."""

    def __init__(self):
        super().__init__(("127.0.0.1", 0), Handler)
        self.files, self.redirects, self.ranges = {"/file": CONTENT}, {}, []
        self.cut, self.resumes = None, True  # breaks off after so many bytes; knows of ranges
        self.url = f"http://127.0.0.1:{self.server_port}"


class Handler(BaseHTTPRequestHandler):
    def do_GET(self):
        asked = self.headers.get("Range")
        self.server.ranges.append(asked)
        start = int(asked.removeprefix("bytes=")[:-1]) if asked and self.server.resumes else 0
        if self.path in self.server.redirects:
            return self.answer(302, b"", **self.server.redirects[self.path])
        if self.path not in self.server.files:
            return self.send_error(404)
        content = self.server.files[self.path]
        if start >= len(content):
            return self.send_error(416)
        self.answer(206 if start else 200, content[start:])

    def answer(self, status, content, **headers):
        self.send_response(status)
        for name, value in {"Content-Length": str(len(content)), **headers}.items():
            self.send_header(name.replace("_", "-"), value)
        self.end_headers()
        self.wfile.write(content[: self.server.cut])

    def log_message(self, *arguments):
        """Nothing."""


@pytest.fixture
def server():
    with Server() as running:
        threading.Thread(target=running.serve_forever, args=(0.01,), daemon=True).start()
        yield running
        running.shutdown()


@pytest.fixture
def path(tmp_path):
    return tmp_path / "folder" / "file"


def partial_of(path):
    return path.with_name("file.partial")


def test_fetch_downloads_once(server, path):
    assert fetch(f"{server.url}/file", path, SHA256, len(CONTENT)) == path
    assert path.read_bytes() == CONTENT
    assert [file.name for file in path.parent.iterdir()] == ["file"]
    fetch(f"{server.url}/file", path, SHA256)
    assert server.ranges == [None]


def test_an_interrupted_download_goes_on_where_it_stopped(server, path):
    server.cut = 600_000
    with pytest.raises(UserError, match="stopped at 600,000 of 1,280,000 bytes.*run this again"):
        fetch(f"{server.url}/file", path, SHA256)
    assert not path.exists() and partial_of(path).read_bytes() == CONTENT[:600_000]
    server.cut = None
    fetch(f"{server.url}/file", path, SHA256)
    assert path.read_bytes() == CONTENT
    assert server.ranges == [None, "bytes=599999-"]


def test_a_server_that_cannot_resume_sends_all_of_it(server, path):
    server.resumes = False
    path.parent.mkdir()
    partial_of(path).write_bytes(CONTENT[:1000])
    fetch(f"{server.url}/file", path, SHA256)
    assert path.read_bytes() == CONTENT


@pytest.mark.parametrize("extra", [0, 10])
def test_a_partial_file_that_is_complete_or_too_long(server, path, extra):
    """Stopped before it got its name: only a byte is asked for. Too long: all of it once more."""
    path.parent.mkdir()
    partial_of(path).write_bytes(CONTENT + bytes(extra))
    fetch(f"{server.url}/file", path, SHA256)
    assert path.read_bytes() == CONTENT
    assert server.ranges[1:] == ([None] if extra else [])


def test_a_wrong_checksum_or_size_is_refused(server, path):
    server.files["/file"] = CONTENT[:-1] + b"?"
    with pytest.raises(UserError, match=f"SHA-256 .*, not {SHA256}.*not kept"):
        fetch(f"{server.url}/file", path, SHA256)
    with pytest.raises(UserError, match="1,280,000 bytes, not 7"):
        fetch(f"{server.url}/file", path, size=7)
    assert list(path.parent.iterdir()) == []


def test_the_hubs_checksum_is_taken_from_its_redirect(server, path):
    linked = dict(Location="/file", X_Linked_ETag=f'"{SHA256}"')
    server.redirects["/hub"] = linked
    fetch(f"{server.url}/hub", path)
    path.unlink()
    server.files["/file"] = CONTENT[::-1]
    with pytest.raises(UserError, match=f"not {SHA256}"):
        fetch(f"{server.url}/hub", path)
    linked["X_Linked_ETag"] = '"607a30d783dfa663caf39e06633721c8d4cfcd7e"'  # git's, of small files
    assert fetch(f"{server.url}/hub", path).read_bytes() == CONTENT[::-1]


def test_a_missing_file_or_server_is_one_sentence(server, path):
    with pytest.raises(UserError, match=f"nothing.*404.*put the file at {path} by hand"):
        fetch(f"{server.url}/nothing", path)
    with socket.create_server(("127.0.0.1", 0)) as closed:
        port = closed.getsockname()[1]
    with pytest.raises(UserError, match=f"refused.*put the file at {path} by hand"):
        fetch(f"http://127.0.0.1:{port}/file", path)
    with pytest.raises(UserError, match="by hand"):
        fetch("no address", path)


# ---- their layout, written by hand ---------------------------------------------------------------

def theirs(model: GPT, prefix: str = "", **more) -> dict[str, torch.Tensor]:
    """The tensors as `transformers` has them: Conv1D computes x W + b, with W of (in, out)."""
    weights = {}
    for name, tensor in model.state_dict().items():
        layer = name.split(".")[-2]
        conv1d = layer in ("c_attn", "c_proj", "c_fc") and name.endswith("weight")
        weights[prefix + name] = tensor.T.contiguous() if conv1d else tensor
    return weights | more


def config_of(model, **more) -> dict:
    """The fields of the hub's own config.json that matter."""
    config = model.config
    return {
        "activation_function": "gelu_new", "architectures": ["GPT2LMHeadModel"],
        "layer_norm_epsilon": 1e-05, "model_type": "gpt2", "n_ctx": config.block_size,
        "n_embd": config.n_embd, "n_head": config.n_head, "n_layer": config.n_layer,
        "n_positions": config.block_size, "resid_pdrop": 0.1, "vocab_size": config.vocab_size,
    } | more


def write_folder(folder, model, weights=None, binary=False, **config):
    folder.mkdir(exist_ok=True)
    (folder / "config.json").write_text(json.dumps(config_of(model, **config)))
    weights = theirs(model) if weights is None else weights
    if binary:
        torch.save(weights, folder / "pytorch_model.bin")
    else:
        (folder / "model.safetensors").write_bytes(safetensors(weights))
    return folder


NAMES = {torch.float32: "F32", torch.float16: "F16", torch.bfloat16: "BF16", torch.bool: "BOOL"}


def safetensors(weights: dict, **header) -> bytes:
    """The format by its description: 8 bytes of length, JSON, data; `header` replaces entries."""
    entries, data = {"__metadata__": {"format": "pt"}}, b""
    for name, tensor in weights.items():
        content = tensor.contiguous().view(torch.uint8).numpy().tobytes()
        offsets = [len(data), len(data) + len(content)]
        entries[name] = {"dtype": NAMES[tensor.dtype], "shape": list(tensor.shape),
                         "data_offsets": offsets}
        data += content
    text = json.dumps(entries | header).encode()
    return len(text).to_bytes(8, "little") + text + data


def same(one: torch.nn.Module, other: torch.nn.Module) -> bool:
    a, b = one.state_dict(), other.state_dict()
    return a.keys() == b.keys() and all(torch.equal(a[name], b[name]) for name in a)


@pytest.fixture
def model() -> GPT:
    return gpt(vocab_size=300, n_embd=24, n_layer=2, n_head=3)


@pytest.mark.parametrize("binary", [False, True], ids=["safetensors", "bin"])
@pytest.mark.parametrize("prefix", ["", "transformer."])
def test_load_gpt2_reads_both_formats_with_and_without_prefix(tmp_path, model, prefix, binary):
    folder = write_folder(tmp_path / "a", model, theirs(model, prefix), binary)
    loaded = load_gpt2(folder)
    assert type(loaded) is GPT and same(loaded, model) and not loaded.training
    assert loaded.config == model.config
    assert all(p.requires_grad and p.is_contiguous() for p in loaded.parameters())


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_load_gpt2_gives_float32(tmp_path, model, dtype):
    folder = write_folder(tmp_path / "a", model, {k: v.to(dtype) for k, v in theirs(model).items()})
    loaded = load_gpt2(str(folder))
    assert loaded.wte.weight.dtype == torch.float32
    assert torch.equal(loaded.h[1].mlp.c_fc.weight, model.h[1].mlp.c_fc.weight.to(dtype).float())


def test_masks_of_old_versions_and_the_tied_unembedding_are_known(tmp_path, model):
    more = {"h.0.attn.bias": torch.ones(1, 1, 32, 32, dtype=torch.bool).tril(),
            "h.1.attn.masked_bias": torch.full((1,), -1e4), "lm_head.weight": model.wte.weight.data}
    assert same(load_gpt2(write_folder(tmp_path / "a", model, theirs(model, **more))), model)
    untied = theirs(model, **{"lm_head.weight": model.wte.weight.data + 1})
    with pytest.raises(UserError, match="model.safetensors: lm_head.weight is not wte.weight"):
        load_gpt2(write_folder(tmp_path / "a", model, untied))


@pytest.mark.parametrize("change, message", [
    (lambda w: w.pop("h.1.ln_2.bias"), "h.1.ln_2.bias is missing$"),
    (lambda w: [w.pop("wpe.weight"), w.pop("wte.weight")], r"wpe.weight is missing \(and 1 more\)"),
    (lambda w: w.update({"h.2.ln_1.bias": torch.ones(24)}), "h.2.ln_1.bias is not a weight of GPT"),
    (lambda w: w.update({"transformer.wte.weight": w["wte.weight"]}), "both with and without"),
    (lambda w: w.update({"wpe.weight": torch.ones(31, 24)}), r"wpe.weight should .*\(32, 24\)"),
    (lambda w: w.update({"h.0.attn.c_attn.weight": torch.ones(72, 24)}),  # nn.Linear's way round
     r"h.0.attn.c_attn.weight should have the shape \(24, 72\) .*, not \(72, 24\)"),
    (lambda w: w.update({"ln_f.bias": torch.ones(24, dtype=torch.bool)}), "ln_f.bias .*torch.bool"),
])
@pytest.mark.parametrize("binary", [False, True], ids=["safetensors", "bin"])
def test_weights_that_do_not_fit_are_named(tmp_path, model, change, message, binary):
    weights = theirs(model)
    change(weights)
    folder = write_folder(tmp_path / "a", model, weights, binary)
    with pytest.raises(UserError, match=f"{tmp_path}.*{message}"):
        load_gpt2(folder)


@pytest.mark.parametrize("field, value", [
    ("n_layer", None), ("n_head", 0), ("n_embd", 24.0), ("vocab_size", True), ("n_positions", "32"),
    ("n_head", 5), ("activation_function", "gelu"), ("layer_norm_epsilon", 1e-6),
    ("scale_attn_weights", False), ("scale_attn_by_inverse_layer_idx", True), ("n_inner", 90),
    ("add_cross_attention", True), ("tie_word_embeddings", False), ("model_type", "gpt_neo"),
])
def test_a_config_of_another_model_is_refused(tmp_path, model, field, value):
    assert same(load_gpt2(write_folder(tmp_path / "a", model, n_inner=4 * 24)), model)
    with pytest.raises(UserError, match=f"config.json: .*{field}"):
        load_gpt2(write_folder(tmp_path / "a", model, **{field: value}))


def test_broken_folders_are_one_sentence(tmp_path, model):
    with pytest.raises(UserError, match="neither a folder nor one of gpt2, gpt2-medium"):
        load_gpt2(tmp_path / "nowhere")
    folder = write_folder(tmp_path / "a", model)
    (folder / "model.safetensors").unlink()
    with pytest.raises(UserError, match="no model.safetensors or pytorch_model.bin"):
        load_gpt2(folder)
    for content in (b"", b"nonsense", b"PK\x03\x04 cut off"):
        (folder / "pytorch_model.bin").write_bytes(content)
        with pytest.raises(UserError, match="pytorch_model.bin is not a file of tensors"):
            load_gpt2(folder)
    for content in ([1, 2], {"wte.weight": 3}, {4: torch.ones(2)}, cli.Common):
        torch.save(content, folder / "pytorch_model.bin")  # the last: no plain data, not unpickled
        with pytest.raises(UserError, match="pytorch_model.bin is not a file of tensors"):
            load_gpt2(folder)
    for content in (b"", b"[]", b"{", b"[" * 100_000, b"\xff"):
        (folder / "config.json").write_bytes(content)
        with pytest.raises(UserError, match="config.json is not a config.json of GPT-2"):
            load_gpt2(folder)


# ---- safetensors ---------------------------------------------------------------------------------

def test_safetensors_come_back_as_they_were_written(tmp_path):
    tensors = {"b": torch.randn(3, 5), "a": torch.randn(4, 2).T, "long name": torch.randn(7)}
    write_safetensors(tmp_path / "x", tensors)
    content = (tmp_path / "x").read_bytes()
    assert int.from_bytes(content[:8], "little") % 8 == 0
    read = read_safetensors(tmp_path / "x")
    assert read.keys() == tensors.keys() and all(torch.equal(read[k], tensors[k]) for k in tensors)
    assert [file.name for file in tmp_path.iterdir()] == ["x"]


TWO = {"a": torch.arange(6.0).view(2, 3), "b": torch.arange(4.0)}


def entry(dtype="F32", shape=(4,), offsets=(24, 40)) -> dict:
    return {"dtype": dtype, "shape": list(shape), "data_offsets": list(offsets)}


@pytest.mark.parametrize("content, message", [
    (b"", "cut off"),
    (b"\x00" * 7, "cut off"),
    ((10**18).to_bytes(8, "little") + b"{}", "1000000000000000000 bytes of header in a file of 10"),
    ((2).to_bytes(8, "little") + b"[]", "not a JSON object"),
    ((2).to_bytes(8, "little") + b"{]", "Expecting"),
    ((2).to_bytes(8, "little") + b"\xff\xfe", "utf-8"),
    (safetensors(TWO)[:-1], "39 bytes of tensors, not 40"),
    (safetensors(TWO) + b"x", "41 bytes of tensors, not 40"),
    (safetensors(TWO, b=entry(offsets=(20, 36))), "b begins at 20, .* before it ends at 24"),
    (safetensors(TWO, b=entry(offsets=(28, 44))), "b begins at 28"),
    (safetensors(TWO, b=entry(offsets=(0, 16))), "begins at 0, .* before it ends at 16"),
    (safetensors(TWO, b=entry(offsets=(24, 44))), "b has 20 bytes, its shape .4. needs 16"),
    (safetensors(TWO, b=entry(shape=(2**40, 2**40))), "b has 16 bytes"),
    (safetensors(TWO, b=entry(offsets=(-16, 0))), "b begins at -16"),
    (safetensors(TWO, b=entry("F8_E4M3")), "b is described as .*F8_E4M3"),
    (safetensors(TWO, b=entry(shape=(-2, -2))), "b is described as"),
    (safetensors(TWO, b=entry(shape=(4.0,))), "b is described as"),
    (safetensors(TWO, b=entry(shape=(4, 0), offsets=(24, 24))), "b is described as"),
    (safetensors(TWO, b=entry(offsets=(24,))), "b is described as"),
    (safetensors(TWO, b=entry(offsets=("24", "40"))), "b is described as"),
    (safetensors(TWO, b={"dtype": "F32"}), "b is described as"),
    (safetensors({"a\n": TWO["b"]}), r'name "a.n"'),
    (safetensors(TWO, b=7), "b is described as 7"),
    (safetensors(TWO, b=entry(dtype=[])), "b is described as"),
])
def test_a_damaged_safetensors_file_is_one_sentence(tmp_path, content, message):
    (tmp_path / "x").write_bytes(content)
    with pytest.raises(UserError, match=f"x cannot be read as safetensors: .*{message}"):
        read_safetensors(tmp_path / "x")


# ---- ours, saved ---------------------------------------------------------------------------------

def test_save_gpt2_writes_their_layout(tmp_path, model):
    save_gpt2(model, tmp_path / "a")
    weights = read_safetensors(tmp_path / "a" / "model.safetensors")
    expected = theirs(model, "transformer.")
    assert weights.keys() == expected.keys()
    assert all(torch.equal(weights[name], expected[name]) for name in expected)
    config = json.loads((tmp_path / "a" / "config.json").read_text())
    assert config["eos_token_id"] == 299 and "pad_token_id" not in config
    assert config | config_of(model) == config | {"n_ctx": 32, "resid_pdrop": 0.1}
    assert same(load_gpt2(tmp_path / "a"), model)


def their_scores(folder, rows: list[list[int]]) -> torch.Tensor:
    """As GPT2ForSequenceClassification has them: w . state, no bias, at the last token that is not
    padding, of rows padded with the pad_token_id of config.json."""
    config = json.loads((folder / "config.json").read_text())
    weights = read_safetensors(folder / "model.safetensors")
    trunk = gpt(vocab_size=300, n_embd=24, n_layer=2, n_head=3)
    plain = {name.removeprefix("transformer."): x for name, x in weights.items()}
    score, names = plain.pop("score.weight"), theirs(trunk).keys()
    assert plain.keys() == names and score.shape == (1, 24)
    linear = gpt2.TRANSPOSED
    trunk.load_state_dict({k: x.T if k.endswith(linear) else x for k, x in plain.items()})
    pad, width = config["pad_token_id"], max(map(len, rows))
    tokens = torch.tensor([row + [pad] * (width - len(row)) for row in rows])
    last = (torch.arange(width) * (tokens != pad)).argmax(1)
    return (trunk.hidden(tokens) @ score[0])[torch.arange(len(rows)), last]


def test_a_reward_model_keeps_its_scores_bias_and_all(tmp_path):
    model, eos = scalar(vocab_size=300, n_embd=24, n_layer=2, n_head=3), 299
    model.head.bias.data.fill_(2.5)
    rows = [[3, 4, eos], [7, eos, 8, 5, 5, eos], [eos]]  # scores are read at EOS
    scores = torch.stack([model(torch.tensor([row]))[0, -1] for row in rows])
    save_gpt2(model, tmp_path / "rm")
    torch.testing.assert_close(their_scores(tmp_path / "rm", rows), scores, atol=1e-5, rtol=1e-5)
    config = json.loads((tmp_path / "rm" / "config.json").read_text())
    assert config["architectures"] == ["GPT2ForSequenceClassification"]
    assert len(config["id2label"]) == 1 and config["pad_token_id"] != config["eos_token_id"] == eos
    back, tokens = load_gpt2(tmp_path / "rm"), torch.randint(300, (4, 20))
    assert type(back) is ScalarModel and not back.training
    torch.testing.assert_close(back(tokens), model(tokens), atol=1e-5, rtol=1e-5)


def test_padding_of_a_reward_model_is_a_byte_that_no_text_has():
    own = [bytes([b]) for b in range(256)]
    encoding = tiktoken.Encoding("x", pat_str=formats.GPT2_SPLIT, special_tokens={},
                                 mergeable_ranks={token: i for i, token in enumerate(own)})
    printable = [b for b in range(256) if chr(b).isprintable() and chr(b) != " "]
    assert encoding.n_vocab == 256 and printable[gpt2.PAD] == 0xff  # GPT-2's first ids: its bytes
    with pytest.raises(UnicodeDecodeError):
        bytes([printable[gpt2.PAD]]).decode()


def test_a_folder_that_cannot_be_written_is_one_sentence(tmp_path, model):
    (tmp_path / "file").write_text("")
    with pytest.raises(UserError, match="model.safetensors cannot be written: Not a dir"):
        save_gpt2(model, tmp_path / "file")


# ---- the hub, the command line -------------------------------------------------------------------

def test_a_name_is_downloaded_once_into_the_cache(tmp_path, model, server, monkeypatch):
    write_folder(tmp_path / "a", model)
    revision, sha256 = "0123", None
    monkeypatch.setitem(gpt2.HUB, "gpt2-large", (revision, sha256))
    monkeypatch.setenv("HF_ENDPOINT", server.url)
    monkeypatch.setenv("RLHF_CACHE", str(tmp_path / "cache"))
    with pytest.raises(UserError, match=f"404.*{tmp_path}/cache/gpt2-large/config.json by hand"):
        load_gpt2("gpt2-large")
    for name in ("config.json", "model.safetensors"):
        content = (tmp_path / "a" / name).read_bytes()
        server.files[f"/openai-community/gpt2-large/resolve/0123/{name}"] = content
    assert same(load_gpt2("gpt2-large"), model)
    count = len(server.ranges)
    assert same(load_gpt2("gpt2-large"), model) and len(server.ranges) == count


def test_the_hubs_revisions_and_checksums_are_such():
    for revision, sha256 in gpt2.HUB.values():
        assert len(bytes.fromhex(revision)) == 20
        assert sha256 is None or len(bytes.fromhex(sha256)) == 32
    assert gpt2.HUB.keys() == {name for name in rlhf.PRESETS if name.startswith("gpt2")}


def test_load_and_save_on_the_command_line(tmp_path, model, capsys):
    folder, out = write_folder(tmp_path / "a", model), str(tmp_path / "out")
    gpt2.main(["load", str(folder), "--out", out])
    cfg = rlhf.SFT(data="", out=out, device="cpu")
    assert same(rlhf.load(cfg, cfg.init), model)
    gpt2.main(["save", f"{out}/gpt.pt", str(tmp_path / "b")])
    assert "GPT2LMHeadModel" in capsys.readouterr().out
    assert same(load_gpt2(tmp_path / "b"), model)


def test_a_reward_model_on_the_command_line(tmp_path, capsys):
    model, out = scalar(), str(tmp_path)
    rlhf.save(rlhf.RM(out=out), model)
    gpt2.main(["save", "rm", str(tmp_path / "a"), "--out", out])
    assert "GPT2ForSequenceClassification" in capsys.readouterr().out
    gpt2.main(["load", str(tmp_path / "a"), "--out", str(tmp_path / "new")])
    cfg = rlhf.RM(data="", out=str(tmp_path / "new"), device="cpu")
    loaded = rlhf.load(cfg, "rm", ScalarModel)
    tokens = torch.randint(11, (2, 9))
    torch.testing.assert_close(loaded(tokens), model(tokens), atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize("arguments, message", [
    (["load", "nowhere"], "gpt2: nowhere is neither a folder nor one of"),
    (["save", "nothing.pt", "a"], "gpt2: nothing.pt is not there"),
    (["save", "broken.pt", "a"], "gpt2: broken.pt is not a whole checkpoint"),
])
def test_errors_on_the_command_line_are_one_sentence(
    tmp_path, monkeypatch, arguments, message
):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "broken.pt").write_bytes(b"broken")
    with pytest.raises(SystemExit, match=message):
        gpt2.main(arguments)


# ---- the vocabulary ------------------------------------------------------------------------------

@pytest.mark.parametrize("error", [OSError("no network"), ValueError("hash mismatch")])
def test_without_network_the_vocabularys_place_is_named(tmp_path, monkeypatch, error):
    def fails(name):
        assert name == "gpt2"
        raise error

    monkeypatch.setattr(tiktoken, "get_encoding", fails)
    place = f"put https://.*/r50k_base.tiktoken at {tmp_path}/tokenizer.tiktoken by hand"
    with pytest.raises(UserError, match=place):
        formats.get_tokenizer(str(tmp_path))


@pytest.mark.parametrize("content", [
    b"YQ== 0\nYg==\n", b"YQ== one\n", b"a 0\n", b"YQ== 0\nYg== 2\n", b"YQ== 0\nYQ== 1\n",
    b"YQ== 0 0\n", b"\n", b"\xff 0\n",
])
def test_a_damaged_vocabulary_is_one_sentence(tmp_path, content):
    (tmp_path / "tokenizer.tiktoken").write_bytes(content)
    with pytest.raises(UserError, match="tokenizer.tiktoken"):
        formats.get_tokenizer(str(tmp_path))


# ---- transformers itself, where it is installed --------------------------------------------------

def test_transformers_gives_the_same_logits_and_scores(tmp_path, model):
    transformers = pytest.importorskip("transformers")
    tokens, reward_model = torch.randint(300, (3, 17)), scalar(vocab_size=300, n_embd=24, n_head=3)
    save_gpt2(model, tmp_path / "a")
    save_gpt2(reward_model, tmp_path / "rm")
    lm = transformers.GPT2LMHeadModel.from_pretrained(tmp_path / "a")
    classifier = transformers.GPT2ForSequenceClassification.from_pretrained(tmp_path / "rm")
    close = dict(atol=1e-4, rtol=1e-4)
    with torch.no_grad():
        torch.testing.assert_close(lm(tokens).logits, model(tokens), **close)
        scores = classifier(tokens).logits[:, 0]
        torch.testing.assert_close(scores, reward_model(tokens)[:, -1], **close)
    lm.save_pretrained(tmp_path / "b")
    assert same(load_gpt2(tmp_path / "b"), model)

"""GPT-2's weights as a checkpoint, and checkpoints as folders that `transformers` reads.

    python data/gpt2.py load gpt2                    the hub's weights -> out/gpt.pt, for SFT
    python data/gpt2.py load FOLDER --data out/mine  a folder's, for that data's tokenizer
    python data/gpt2.py save out/ppo_ptx.pt FOLDER   a policy or a reward model -> a folder
"""

import argparse
import json
import re
import sys
from contextlib import contextmanager
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import torch

sys.path.insert(0, str(Path(__file__).parent.parent))
import rlhf  # noqa: E402
from data import prepare  # noqa: E402
from data.files import UserError, fingerprint, get_tokenizer, replacing  # noqa: E402
from model import GPT, GPTConfig, ScalarModel  # noqa: E402

HUB = {  # revision, how the SHA-256 of model.safetensors begins ("": unknown)
    "gpt2": ("607a30d783dfa663caf39e06633721c8d4cfcd7e", "248dfc3911869ec493c76e65"),
    "gpt2-medium": ("6dcaa7a952f72f9298047fd5137cd6e4f05f41da", "fc5a354a19255ad494f3d715"),
    "gpt2-large": ("32b71b12589c2f8d625668d2335a01cac3249519", ""),
    "gpt2-xl": ("15ea56dee5df4983c59b2538573817e1667135e2", "0f8b28eb05a8075f48b61b6f"),
}
GPT2_VOCABULARY = "af0cef9ba46f5448"  # fingerprint of GPT-2's tokenizer
SIZES = {"vocab_size": "vocab_size", "n_positions": "block_size", "n_layer": "n_layer",
         "n_head": "n_head", "n_embd": "n_embd"}  # config.json's name -> ours
FIXED = {  # how our model computes, in config.json's words and with its defaults
    "model_type": "gpt2", "activation_function": "gelu_new", "layer_norm_epsilon": 1e-5,
    "scale_attn_weights": True, "scale_attn_by_inverse_layer_idx": False,
    "add_cross_attention": False, "tie_word_embeddings": True,
}
TRANSPOSED = ("c_attn.weight", "c_proj.weight", "c_fc.weight")  # in `transformers`
PREFIXES = re.compile(r"(transformer\.|module\.|_orig_mod\.)*")  # also of torch's wrappers
MASK = re.compile(r"h\.\d+\.attn\.(masked_)?bias")  # causal masks, saved by old versions
DTYPES = {"F32": torch.float32, "F16": torch.float16, "BF16": torch.bfloat16,
          "BOOL": torch.bool, "U8": torch.uint8}  # the last two are for masks
PADDING = 1024  # vocabularies are padded to a multiple of at most this
PAD_TOKEN = 187  # the byte 0xff in GPT-2's vocabulary, which no UTF-8 text contains

@contextmanager
def explained(source):
    """Turn whatever a damaged or foreign file raises, in a dozen ways, into a UserError."""
    try:
        yield
    except Exception as error:
        reason = " ".join(f"{error or type(error).__name__}".split())
        todo = f"use another folder, or one of {', '.join(HUB)}"
        raise UserError(f"{source} cannot be used ({reason:.200}): {todo}") from None

def read_config(path: Path) -> GPTConfig:
    """Read the shape from a config.json. ValueError if our model computes something else."""
    found = json.loads(path.read_text(encoding="utf-8"))
    sizes = {ours: found[theirs] for theirs, ours in SIZES.items()}
    if sizes["n_embd"] % sizes["n_head"]:
        raise ValueError("n_embd should be a multiple of n_head")
    for field, value in FIXED.items():
        if found.get(field, value) != value:
            raise ValueError(f"{field} is {found[field]!a:.60}, our model only has {value!a}")
    return GPTConfig(**sizes)

def read_safetensors(path: Path) -> dict[str, torch.Tensor]:
    """The header's length in 8 bytes, the header in JSON, then the tensors."""
    content = np.memmap(path, dtype=np.uint8, mode="r")  # nothing is in memory yet
    begin = 8 + int.from_bytes(content[:8].tobytes(), "little")
    header = json.loads(content[8:begin].tobytes())
    header.pop("__metadata__", None)
    data = content[begin:]
    tensors = {}
    end = 0
    for name in sorted(header, key=lambda name: header[name]["data_offsets"]):
        dtype = DTYPES[header[name]["dtype"]]
        start = end
        end += dtype.itemsize * torch.Size(header[name]["shape"]).numel()
        if header[name]["data_offsets"] != [start, end] or not start < end <= len(data):
            raise ValueError(f"{name!a:.80} should be bytes {start} to {end} of {len(data)}")
        tensor = torch.frombuffer(bytearray(data[start:end]), dtype=dtype)
        tensors[name] = tensor.view(header[name]["shape"])
    return tensors

def write_safetensors(path: Path, tensors: dict[str, torch.Tensor]) -> None:
    """Write float32 tensors."""
    header = {"__metadata__": {"format": "pt"}}  # transformers requires this entry
    end = 0
    for name, tensor in tensors.items():
        start = end
        end += 4 * tensor.numel()
        header[name] = dict(dtype="F32", shape=list(tensor.shape), data_offsets=[start, end])
    text = json.dumps(header).encode()
    text += b" " * (-len(text) % 8)  # the tensors start at a multiple of 8 bytes
    with replacing(path) as file:
        file.write(len(text).to_bytes(8, "little") + text)
        for tensor in tensors.values():
            file.write(tensor.detach().cpu().float().contiguous().numpy())

def read_weights(path: Path, n_vocab: int) -> dict[str, torch.Tensor]:
    """A float32 state dict for GPT, without masks, tied unembedding and padded rows."""
    weights = {}
    for full_name, tensor in read_safetensors(path).items():
        name = PREFIXES.sub("", full_name, count=1)
        if not MASK.fullmatch(name):
            tensor = tensor.t() if name.endswith(TRANSPOSED) else tensor
            weights[name] = tensor.float().contiguous()
    wte = weights["wte.weight"]
    if not torch.equal(weights.pop("lm_head.weight", wte), wte):
        raise ValueError("lm_head.weight differs from wte.weight, to which GPT-2 ties it")
    if n_vocab < len(wte) < n_vocab + PADDING:
        print(f"{path}: the vocabulary of {len(wte):,} is cut to the tokenizer's {n_vocab:,}")
        weights["wte.weight"] = wte[:n_vocab].clone()
    return weights

def read_vocabulary(folder: Path) -> str:
    """The fingerprint of the BPE that lies beside the weights; "" if there is none."""
    if not (folder / "vocab.json").exists():
        return ""
    # Visible bytes are written as themselves, the others as the characters from 256 on.
    visible = [byte for byte in range(256) if chr(byte).isprintable() and byte != 32]
    byte_of = {chr(byte): byte for byte in visible}
    for i, byte in enumerate(sorted(set(range(256)) - set(visible))):
        byte_of[chr(256 + i)] = byte
    with explained(f"{folder}: vocab.json or merges.txt"):
        ids = json.loads((folder / "vocab.json").read_text(encoding="utf-8"))
        tokens = {i: bytes(byte_of[c] for c in token) for token, i in ids.items()}
        lines = (folder / "merges.txt").read_text(encoding="utf-8").splitlines()
        merges = [ids[line.replace(" ", "")] for line in lines if line[:8] != "#version"]
        if merges != sorted(merges) or len(merges) != len(ids) - 257:
            raise ValueError("the merges should be the tokens, in the same order")
        return fingerprint(SimpleNamespace(n_vocab=len(ids), decode_single_token_bytes=tokens.get))

def download(name: str) -> Path:
    """Download a model of the HUB once, into ~/.cache/rlhf."""
    revision, sha256 = HUB[name]
    folder = Path.home() / ".cache/rlhf" / name
    url = f"{prepare.HUB}/openai-community/{name}/resolve/{revision}"
    prepare.fetch(f"{url}/config.json", folder / "config.json")
    prepare.fetch(f"{url}/model.safetensors", folder / "model.safetensors", sha256)
    return folder

def load_gpt2(name_or_folder: str | Path, data: str = "") -> GPT:
    """A model of the HUB or a folder, float32, on the CPU; UserError if it is not GPT-2's."""
    n_vocab = GPTConfig.vocab_size
    expected = GPT2_VOCABULARY
    if data:
        tokenizer = get_tokenizer(data)
        n_vocab = tokenizer.n_vocab
        expected = fingerprint(tokenizer)
    if name_or_folder in HUB:
        folder = download(name_or_folder)
        vocabulary = GPT2_VOCABULARY
    else:
        folder = Path(name_or_folder)
        vocabulary = read_vocabulary(folder)
    if vocabulary not in ("", expected):
        raise UserError(f"{folder} has another vocabulary than {data or 'GPT-2'}: pass its --data")
    with explained(folder / "config.json"):
        config = read_config(folder / "config.json")
    with explained(folder / "model.safetensors"):
        weights = read_weights(folder / "model.safetensors", n_vocab)
        config.vocab_size = len(weights["wte.weight"])  # without padding
        config.vocabulary = vocabulary
        if data and config.vocab_size != n_vocab:
            raise ValueError(f"{config.vocab_size} tokens, where {data} has {n_vocab}")
        with torch.device("meta"):  # shapes only
            model = GPT(config)
        model.load_state_dict(weights, assign=True)
    return model.eval()

def save_gpt2(model: GPT | ScalarModel, folder: str | Path) -> None:
    """Write config.json and model.safetensors, which `transformers` loads as GPT2LMHeadModel.

    A ScalarModel becomes a GPT2ForSequenceClassification, which has no bias: ours, b, goes into
    the last LayerNorm as b w / |w|^2. Pad with config.json's pad_token_id: it reads the score at
    the last other token, and we read it at EOS.
    """
    eos = model.config.vocab_size - 1  # the last id, as in GPT-2's vocabulary
    config = FIXED | {theirs: getattr(model.config, ours) for theirs, ours in SIZES.items()}
    config |= {"architectures": ["GPT2LMHeadModel"], "eos_token_id": eos, "bos_token_id": eos}
    weights = {}
    for name, tensor in model.state_dict().items():
        name = "transformer." + name.removeprefix("gpt.")
        weights[name] = tensor.t() if name.endswith(TRANSPOSED) else tensor
    if isinstance(model, ScalarModel):
        config["architectures"] = ["GPT2ForSequenceClassification"]
        config["id2label"] = {"0": "score"}
        config["pad_token_id"] = min(PAD_TOKEN, max(0, eos - 1))
        w = weights["score.weight"] = weights.pop("transformer.head.weight")
        b = weights.pop("transformer.head.bias")
        final = "transformer.ln_f.bias"
        weights[final] = weights[final] + b * w[0] / w.square().sum()
    write_safetensors(Path(folder) / "model.safetensors", weights)
    with replacing(Path(folder) / "config.json") as file:
        file.write(json.dumps(config, indent=2).encode())

def gpt2(cfg) -> None:
    if cfg.command == "load":
        model = load_gpt2(cfg.source, cfg.data)
        target = rlhf.checkpoint(cfg, "gpt")
        rlhf.save(target, model)
    else:
        target = cfg.folder
        try:
            model = rlhf.load(cfg, cfg.source, GPT)
        except UserError:  # missing, damaged, or a reward model
            model = rlhf.load(cfg, cfg.source, ScalarModel)
        save_gpt2(model, target)
    print(f"{target}: {type(model).__name__} with {model.config.vocab_size:,} tokens")

def main(argv: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0], allow_abbrev=False)
    parser.add_argument("command", choices=["load", "save"])
    parser.add_argument("source", help="load: gpt2 or a folder; save: a checkpoint")
    parser.add_argument("folder", nargs="?", default="exported", help="of save [exported]")
    parser.add_argument("--data", default="", help="load: folder of its tokenizer [GPT-2's]")
    parser.add_argument("--out", default="out", help="folder of checkpoints [out]")
    cfg = rlhf.Settings(data="", device="cpu")
    vars(cfg).update(vars(parser.parse_args(argv)))
    rlhf.run_stage(gpt2, cfg)

if __name__ == "__main__":
    sys.stdout.reconfigure(errors="replace")  # a name that it cannot show is no reason to stop
    main()

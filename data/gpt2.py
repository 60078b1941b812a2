"""GPT-2's weights as our checkpoint, and our models as folders that `transformers` reads.

    python data/gpt2.py load gpt2                 the hub's weights -> out/gpt.pt, where sft begins
    python data/gpt2.py load folder --out out2    the same from a local folder
    python data/gpt2.py save out/ppo_ptx.pt folder    and back; a reward model as well

Hugging Face's layout is a folder with config.json and model.safetensors, or pytorch_model.bin in
older ones. Its names are ours; its four matrices of a block, written for x W, are our transposed.
"""

import argparse
import json
import math
import os
import re
import sys
from pathlib import Path
from pickle import UnpicklingError

import torch
from torch import Tensor

sys.path.insert(0, str(Path(__file__).parent.parent))  # so that `python data/gpt2.py` finds rlhf.py
import cli  # noqa: E402
import rlhf  # noqa: E402
from data.download import fetch  # noqa: E402
from data.formats import UserError, printable, replacing  # noqa: E402
from data.rows import brief  # noqa: E402
from model import GPT, GPTConfig, ScalarModel  # noqa: E402

# openai-community/NAME on the hub: the revision, and the SHA-256 of its model.safetensors (None:
# the one that the hub names is taken)
HUB = {
    "gpt2": ("607a30d783dfa663caf39e06633721c8d4cfcd7e",
             "248dfc3911869ec493c76e65bf2fcf7f615828b0254c12b473182f0f81d3a707"),
    "gpt2-medium": ("6dcaa7a952f72f9298047fd5137cd6e4f05f41da",
                    "fc5a354a19255ad494f3d71549390baca1ccf61d1d822b9408971705c687c9cd"),
    "gpt2-large": ("32b71b12589c2f8d625668d2335a01cac3249519", None),
    "gpt2-xl": ("15ea56dee5df4983c59b2538573817e1667135e2",
                "0f8b28eb05a8075f48b61b6f35332978c74fc7763fa9fb4051a1c30511736a6a"),
}
SIZES = {"vocab_size": "vocab_size", "block_size": "n_positions", "n_layer": "n_layer",
         "n_head": "n_head", "n_embd": "n_embd"}  # our name -> config.json's
FIXED = {  # what our model does, in config.json's words; the values are also its defaults
    "model_type": "gpt2", "activation_function": "gelu_new", "layer_norm_epsilon": 1e-5,
    "n_inner": None, "scale_attn_weights": True, "scale_attn_by_inverse_layer_idx": False,
    "add_cross_attention": False, "tie_word_embeddings": True,
}
TRANSPOSED = ("c_attn.weight", "c_proj.weight", "c_fc.weight")
BUFFERS = re.compile(r"h\.\d+\.attn\.(masked_)?bias")  # causal masks, saved by old versions
NAME = re.compile(r"[ -~]{1,200}")  # ASCII that can be seen, as it is printed
DTYPES = {
    "F64": torch.float64, "F32": torch.float32, "F16": torch.float16, "BF16": torch.bfloat16,
    "I64": torch.int64, "I32": torch.int32, "I16": torch.int16, "I8": torch.int8,
    "U8": torch.uint8, "BOOL": torch.bool,
}
PAD = 187  # in GPT-2's vocabulary the byte 0xff, which no text in UTF-8 has
LONGEST_HEADER = 100_000_000  # bytes, as in the format's own reader


# ---------------------------------------------------------------- the safetensors format

def read_entry(name: str, entry: dict) -> tuple[int, int, str, torch.dtype, list[int]]:
    """start, end, name, dtype, shape of a tensor; ValueError unless all are as the format has them
    and the bytes are as many as the shape needs."""
    if not NAME.fullmatch(name):
        raise ValueError(f"a tensor cannot have the name {brief(name)}")
    try:
        dtype, shape, (start, end) = DTYPES[entry["dtype"]], entry["shape"], entry["data_offsets"]
        whole = all(type(n) is int and abs(n) < 2**63 for n in (*shape, start, end))
        whole = whole and len(shape) <= 8 and min([1, *shape]) > 0
    except (LookupError, TypeError, ValueError):
        whole = False
    if not whole:
        raise ValueError(f"{name} is described as {brief(entry)}, where a known dtype, a shape and "
                         "two data_offsets are expected")
    if end - start != math.prod(shape) * dtype.itemsize:
        raise ValueError(f"{name} has {end - start} bytes, its shape {shape} needs "
                         f"{math.prod(shape) * dtype.itemsize}")
    return start, end, name, dtype, shape


def read_header(file, size: int) -> list[tuple]:
    """The checked entries of a safetensors file of `size` bytes, in the order of their data.

    8 bytes with the length of the header, the header (JSON: name -> dtype, shape, data_offsets),
    the data. Raises ValueError unless each tensor begins where the one before it ends, and the last
    ends with the file: then there is no gap, no overlap and nothing out of range.
    """
    length = int.from_bytes(file.read(8), "little")
    if size < 8 or length > min(size - 8, LONGEST_HEADER):
        raise ValueError(f"{length} bytes of header in a file of {size}: cut off, or another kind")
    header = json.loads(file.read(length).decode())
    if not isinstance(header, dict):
        raise ValueError("its header is not a JSON object")
    header.pop("__metadata__", None)
    entries, position = sorted(read_entry(*item) for item in header.items()), 0
    for start, end, name, *_ in entries:
        if start != position:
            raise ValueError(f"{name} begins at {start}, the tensor before it ends at {position}")
        position = end
    if position != size - 8 - length:
        raise ValueError(f"it holds {size - 8 - length} bytes of tensors, not {position}")
    return entries


def read_safetensors(path: Path) -> dict[str, Tensor]:
    """All tensors of a file, as stored; the header is checked before anything is allocated.
    Raises UserError with the file and what is wrong in it."""
    try:
        with open(path, "rb") as file:
            entries, tensors = read_header(file, path.stat().st_size), {}
            for start, end, name, dtype, shape in entries:  # they follow the header and each other
                data = bytearray(end - start)
                file.readinto(data)
                tensors[name] = torch.frombuffer(data, dtype=dtype).view(shape)
            return tensors
    except (OSError, ValueError, RecursionError) as error:
        raise UserError(f"{path} cannot be read as safetensors: {error}") from None


def write_safetensors(path: Path, tensors: dict[str, Tensor]) -> None:
    """float32 tensors, contiguous or not."""
    header, position = {"__metadata__": {"format": "pt"}}, 0  # transformers asks for this entry
    for name, tensor in tensors.items():
        end = position + 4 * tensor.numel()
        offsets, shape = [position, end], list(tensor.shape)
        header[name], position = {"dtype": "F32", "shape": shape, "data_offsets": offsets}, end
    text = json.dumps(header).encode()
    text += b" " * (-len(text) % 8)  # the data begins at a multiple of 8, as the format wants
    with replacing(path) as file:
        file.write(len(text).to_bytes(8, "little") + text)
        for tensor in tensors.values():
            file.write(tensor.detach().cpu().float().contiguous().numpy())


# ---------------------------------------------------------------- their layout -> ours

def read_config(path: Path) -> GPTConfig:
    """The shape that a config.json describes; UserError if our model is not of its kind."""
    try:
        found = {**FIXED, **json.loads(path.read_text(encoding="utf-8"))}
    except (OSError, ValueError, TypeError, RecursionError) as error:
        raise UserError(f"{path} is not a config.json of GPT-2: {error}") from None
    sizes = {ours: found.get(theirs) for ours, theirs in SIZES.items()}
    for ours, theirs in SIZES.items():
        if type(sizes[ours]) is not int or not 0 < sizes[ours] <= 10**6:
            value = brief(sizes[ours])
            raise UserError(f"{path}: {theirs} should be a whole number above 0, not {value}")
    width, heads = sizes["n_embd"], sizes["n_head"]
    if width % heads:
        raise UserError(f"{path}: {heads} heads (n_head) cannot share a width (n_embd) of {width}")
    if found["n_inner"] == 4 * width:
        found["n_inner"] = None
    for field, value in FIXED.items():
        if found[field] != value:
            other, own = brief(found[field]), brief(value)
            raise UserError(f"{path}: {field} is {other}, our model has {own} alone")
    return GPTConfig(**sizes)


def read_weights(folder: Path) -> tuple[Path, dict[str, Tensor]]:
    """The file with a folder's weights, and its tensors by their names in that file."""
    path, older = folder / "model.safetensors", folder / "pytorch_model.bin"
    if path.exists():
        return path, read_safetensors(path)
    if not older.exists():
        raise UserError(f"{folder} has no model.safetensors or pytorch_model.bin in one piece")
    try:
        tensors = torch.load(older, map_location="cpu", weights_only=True)
        if not all(isinstance(x, Tensor) and type(name) is str for name, x in tensors.items()):
            raise TypeError("not a dictionary of tensors")
    except (OSError, EOFError, RuntimeError, LookupError, TypeError, ValueError, AttributeError,
            UnpicklingError) as error:
        kind = type(error).__name__
        raise UserError(f"{older} is not a file of tensors and nothing else ({kind})") from None
    return older, tensors


def plain_names(path: Path, tensors: dict[str, Tensor]) -> dict[str, Tensor]:
    """Without the prefix `transformer.`, the masks, and the unembedding, which must be wte's."""
    plain = {name.removeprefix("transformer."): tensor for name, tensor in tensors.items()}
    if len(plain) < len(tensors):
        raise UserError(f"{path} has tensors both with and without the prefix transformer.")
    head = plain.pop("lm_head.weight", None)
    if head is not None and not ("wte.weight" in plain and torch.equal(head, plain["wte.weight"])):
        raise UserError(f"{path}: lm_head.weight is not wte.weight, to which GPT-2 ties it")
    return {name: tensor for name, tensor in plain.items() if not BUFFERS.fullmatch(name)}


def to_ours(path: Path, tensors: dict[str, Tensor], expected: dict[str, Tensor]) -> dict:
    """A state dict with the names and shapes of `expected`, float32. UserError names what differs.

    `tensors`, under plain names, are used up, so that hardly more than one copy is ever in memory.
    """
    for problem, names in (("is missing", expected.keys() - tensors.keys()),
                           ("is not a weight of GPT-2", tensors.keys() - expected.keys())):
        if names:
            others = f" (and {len(names) - 1} more)" if len(names) > 1 else ""
            raise UserError(f"{path}: {min(names)} {problem}{others}")
    ours = {}
    for name, like in expected.items():
        tensor = tensors.pop(name)
        shape = tuple(like.shape[::-1] if name.endswith(TRANSPOSED) else like.shape)
        if tensor.shape != shape or not tensor.is_floating_point():
            found = f"{tuple(tensor.shape)}, {tensor.dtype}"
            raise UserError(f"{path}: {name} should have the shape {shape} and floats, not {found}")
        tensor = tensor.t() if name.endswith(TRANSPOSED) else tensor
        ours[name] = tensor.to(torch.float32, copy=True, memory_format=torch.contiguous_format)
    return ours


def load_gpt2(name_or_folder: str | Path) -> GPT | ScalarModel:
    """gpt2, gpt2-medium, gpt2-large, gpt2-xl, or a folder in Hugging Face's layout; in eval mode.

    A name means the hub's files (its mirror's, if $HF_ENDPOINT names one), downloaded once into
    $RLHF_CACHE/NAME, without it ~/.cache/rlhf/NAME; a folder of that name is ./NAME. A folder whose
    weights end in a `score` of one label gives a ScalarModel, its head's bias 0. Float32, on the
    CPU. Raises UserError for whatever is missing, left over, of the wrong shape or not GPT-2's.
    """
    folder = download(name_or_folder) if name_or_folder in HUB else Path(name_or_folder)
    if not folder.is_dir():
        raise UserError(f"{folder} is neither a folder nor one of {', '.join(HUB)}")
    config = read_config(folder / "config.json")
    path, tensors = read_weights(folder)
    tensors = plain_names(path, tensors)
    scalar = "score.weight" in tensors
    with torch.device("meta"):  # names and shapes alone
        model = ScalarModel(config) if scalar else GPT(config)
    trunk = model.gpt if scalar else model
    expected = trunk.state_dict() | ({"score.weight": model.head.weight} if scalar else {})
    ours = to_ours(path, tensors, expected)
    if scalar:
        model.head.load_state_dict(
            {"weight": ours.pop("score.weight"), "bias": torch.zeros(1)}, assign=True
        )
        model.score_range = torch.tensor([-torch.inf, torch.inf])  # not known
    trunk.load_state_dict(ours, assign=True)
    return model.eval()


def download(name: str) -> Path:
    """The folder of one of the HUB's models, fetched unless it is there."""
    revision, sha256 = HUB[name]
    hub = os.environ.get("HF_ENDPOINT", "https://huggingface.co")
    folder = Path(os.environ.get("RLHF_CACHE", "~/.cache/rlhf")).expanduser() / name
    url = f"{hub}/openai-community/{name}/resolve/{revision}"
    fetch(f"{url}/config.json", folder / "config.json")
    fetch(f"{url}/model.safetensors", folder / "model.safetensors", sha256)
    return folder


# ---------------------------------------------------------------- ours -> their layout

def hub_config(model: GPT | ScalarModel) -> dict:
    """config.json. EOS is the last id, as in GPT-2's vocabulary and in every data set's own."""
    eos = model.config.vocab_size - 1
    config = {
        "architectures": ["GPT2LMHeadModel"], **FIXED,
        **{theirs: getattr(model.config, ours) for ours, theirs in SIZES.items()},
        "bos_token_id": eos, "eos_token_id": eos, "torch_dtype": "float32",
    }
    if isinstance(model, ScalarModel):
        config["architectures"] = ["GPT2ForSequenceClassification"]
        config |= {"id2label": {"0": "score"}, "label2id": {"score": 0}}
        config["pad_token_id"] = min(PAD, max(0, eos - 1))
    return config


def hub_weights(model: GPT | ScalarModel) -> dict[str, Tensor]:
    """The tensors under their names, none of them copied."""
    trunk = model.gpt if isinstance(model, ScalarModel) else model
    weights = {
        f"transformer.{name}": tensor.t() if name.endswith(TRANSPOSED) else tensor
        for name, tensor in trunk.state_dict().items()
    }
    if trunk is not model:
        w, b = model.head.weight.detach(), model.head.bias.detach()
        weights["score.weight"] = w
        weights["transformer.ln_f.bias"] = trunk.ln_f.bias.detach() + b * w[0] / w[0].dot(w[0])
    return weights


def save_gpt2(model: GPT | ScalarModel, folder: str | Path) -> None:
    """Write config.json and model.safetensors, which `transformers` loads as GPT2LMHeadModel.

    A ScalarModel becomes a GPT2ForSequenceClassification with one label. Its `score` layer w has no
    bias: ours, b, goes into the final LayerNorm's as b w / |w|^2, whose product with w is b, so the
    scores are the same. `transformers` reads a row's score at its last token that is not
    pad_token_id, we at EOS: whoever pads must not do it with EOS, usual as that is with GPT-2, but
    with the pad_token_id of config.json. Raises UserError if the folder cannot be written.
    """
    folder = Path(folder)
    write_safetensors(folder / "model.safetensors", hub_weights(model))
    with replacing(folder / "config.json") as file:
        file.write(f"{json.dumps(hub_config(model), indent=2)}\n".encode())


# ---------------------------------------------------------------- command line

def load_command(args) -> None:
    """A name or folder -> out/NAME.pt."""
    model = load_gpt2(args.source)
    name = args.name or ("rm" if isinstance(model, ScalarModel) else "gpt")
    cfg = rlhf.Pretrain(out=args.out, name=name, device="cpu")  # whose place it takes
    rlhf.save(cfg, model)
    print(f"{rlhf.checkpoint(cfg, name)}: {describe(model)}")


def save_command(args) -> None:
    """A checkpoint, of a policy or of a reward model -> a folder."""
    cfg = cli.Common(data="", out=args.out, device="cpu")  # whatever its vocabulary
    try:
        model = rlhf.load(cfg, args.checkpoint, GPT)
    except UserError as error:
        try:
            model = rlhf.load(cfg, args.checkpoint, ScalarModel)
        except UserError:
            raise error from None
    save_gpt2(model, args.folder)
    print(f"{args.folder}: {hub_config(model)['architectures'][0]}, {describe(model)}")


def describe(model: GPT | ScalarModel) -> str:
    count, config = sum(p.numel() for p in model.parameters()), model.config
    return (f"{count:,} parameters, vocabulary of {config.vocab_size:,}, "
            f"context of {config.block_size:,}")


def main(argv: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0], allow_abbrev=False)
    commands = parser.add_subparsers(dest="command", required=True)
    load = commands.add_parser("load", help=load_command.__doc__, allow_abbrev=False)
    load.add_argument("source", help=f"{', '.join(HUB)}, or a folder")
    load.add_argument("--name", help="of the checkpoint [gpt; rm for a reward model]")
    save = commands.add_parser("save", help=save_command.__doc__, allow_abbrev=False)
    save.add_argument("checkpoint", help="a file that ends in .pt, or the name of one in --out")
    save.add_argument("folder", help="where config.json and model.safetensors go")
    for command in (load, save):
        command.add_argument("--out", default="out", help="folder of checkpoints [out]")
    args = parser.parse_args(argv)
    try:
        {"load": load_command, "save": save_command}[args.command](args)
    except UserError as error:
        sys.exit(f"gpt2: {printable(str(error))}")
    except KeyboardInterrupt:
        sys.exit("\ngpt2: stopped")


if __name__ == "__main__":
    main()

"""The command line: flags, device, memory, and what a person can mend in one sentence.

Nothing here knows of text or of losses; the file can be left unread.
"""

import argparse
import ctypes
import difflib
import inspect
import re
import sys
from contextlib import contextmanager
from dataclasses import dataclass, fields
from functools import cache
from pathlib import Path

import torch
from torch import Tensor, nn

from data.formats import UserError
from model import GPT, PRESETS
from parallel import RANK, joined, stop

CPUINFO = Path("/proc/cpuinfo")  # on Linux
DEVICES, DTYPES = ("auto", "cpu", "cuda", "mps"), ("auto", "bfloat16", "float32")
RANGES = {  # of what should not be any number from 1 on, or with a decimal point from 0 on
    "seed": (0, 2**62), "dropout": (0, 0.99), "pretrain_fraction": (0, 0.99), "gamma": (0, 1),
    "lam": (0, 1), "ema_decay": (0, 1), "missing_eos_score": (-1e9, 1e9),
}


@dataclass
class Common:
    """What every stage can be told: each field is a flag, and the comment beside it its help."""
    data: str = "out/data"  # folder of the data set
    out: str = "out"  # folder of checkpoints and logs
    seed: int = 1  # of everything random
    device: str = "auto"  # cpu, cuda or mps
    dtype: str = "auto"  # bfloat16 (autocast) or float32; weights and softmax are always float32
    microbatch_size: int = 32  # rows of a forward pass: bounds the memory, changes nothing else
    max_new_tokens: int = 48  # longest response (paper: 1,000)
    gold: str = "data/fable.py"  # has gold(row, completion), for prompts with "wants"; only shown

    def __post_init__(self) -> None:
        """UserError for a value that nobody can mean."""
        own = vars(self)
        for name, kind in [(field.name, field.type) for field in fields(self)]:
            least, most = RANGES.get(name, (1 if kind is int else 0, 1e9))
            if kind in (int, float) and not least <= own[name] <= most:
                raise UserError(f"--{name} {own[name]}: should be from {least:g} to {most:g}")
        if own.get("minibatch_size", 0) > own.get("rollout_size", 0):
            sizes = f"--minibatch_size {own['minibatch_size']} --rollout_size {own['rollout_size']}"
            raise UserError(f"{sizes}: a minibatch should not be larger than the rollout")
        if "name" in own and own["name"] in (own.get("init"), own.get("reward_model")):
            raise UserError(f"--name {own['name']}: should not be that of a model it starts from")


@dataclass
class Training(Common):
    """And what the stages that train can be told."""
    resume: bool = False  # go on where the run of this name was stopped, to the same bits
    save_minutes: float = 5.0  # between two states kept for --resume; they change no result


# ---- Flags ---------------------------------------------------------------------------------------

source_of = cache(inspect.getsource)  # which reads and parses the file each time


def add_flags(parser: argparse.ArgumentParser, settings: type) -> None:
    """A flag for every field of a settings class, the comment beside the field as its help."""
    source = "".join(map(source_of, settings.__mro__[:-1]))
    comments = dict(re.findall(r"^    (\w+): .*?  # (.*)$", source, re.M))
    choices = {"preset": PRESETS, "device": DEVICES, "dtype": DTYPES}
    for field in fields(settings):
        text = f"{comments[field.name]} [{field.default}]".replace("%", "%%")
        typed = {"type": field.type, "choices": choices.get(field.name)}
        more = {"action": "store_true"} if field.type is bool else typed
        parser.add_argument(f"--{field.name}", default=field.default, help=text, **more)


def parse(parser: argparse.ArgumentParser, argv: list[str] | None) -> dict:
    """The flags; one that does not exist is refused, with the name nearest to it."""
    found, unknown = parser.parse_known_args(argv)
    if unknown:
        flag, names = unknown[0].split("=")[0], [f"--{name}" for name in vars(found)]
        parser.error(f"no flag {nearest(flag, names)}")
    return vars(found)


def nearest(word: str, known) -> str:
    """What may have been meant by a word that is not known."""
    return f"{word}: did you mean {difflib.get_close_matches(word, known, 1, cutoff=0)[0]}?"


# ---- Running a stage -----------------------------------------------------------------------------

def run_one(stages: dict, doc: str, argv: list[str] | None) -> None:
    """STAGE --flag value: the one that is named, of {name: function}, with its flags."""
    parser = argparse.ArgumentParser(description=doc.split("\n")[0])
    commands = parser.add_subparsers(dest="stage", required=True)
    for name, stage in stages.items():
        command = commands.add_parser(name, help=stage.__doc__.split("\n")[0], allow_abbrev=False)
        add_flags(command, stage.__annotations__["cfg"])
    argv = sys.argv[1:] if argv is None else argv
    if argv and not argv[0].startswith("-") and argv[0] not in stages:
        parser.error(f"no stage {nearest(argv[0], stages)}")
    flags = parse(parser, argv)
    stage = stages[flags.pop("stage")]
    run(stage, stage.__annotations__["cfg"], flags)


def run(stage, settings: type, flags: dict) -> None:
    """Seed and run the stage; what a person can mend ends in one sentence."""
    trains = issubclass(settings, Training)
    if RANK > 0 and not trains:  # the rest is work for one process
        return
    try:
        settle(cfg := settings(**flags))
        torch.manual_seed(cfg.seed + 100_003 * RANK)  # samples and dropout of its own
        Path(cfg.out).mkdir(parents=True, exist_ok=True)
        joining, half = joined(cfg.device, trains), cfg.dtype == "bfloat16"
        # no cache of weights in bfloat16, as they change
        with joining, torch.autocast(cfg.device, torch.bfloat16, half, cache_enabled=False):
            stage(cfg)
    except UserError as error:
        stop(f"{stage.__name__}: {error}")
    except OSError as error:
        stop(f"{stage.__name__}: {error.filename or cfg.out}: {error.strerror or error}")
    except (MemoryError, RuntimeError) as error:
        if not (isinstance(error, MemoryError) or "memory" in str(error)):
            raise
        lower = f"--microbatch_size, now {cfg.microbatch_size}, or --max_new_tokens"
        stop(f"{stage.__name__}: out of memory: lower {lower}")
    except EOFError:  # the end of what a person types
        print()
    except KeyboardInterrupt as error:
        sys.exit(f"\n{stage.__name__}: stopped {error}")


def settle(cfg) -> None:
    """What "auto" means on this machine."""
    found = {"cuda": torch.cuda.is_available(), "mps": torch.backends.mps.is_available()}
    if cfg.device == "auto":
        cfg.device = next(filter(found.get, found), "cpu")
    if not found.get(cfg.device, True):
        raise UserError(f"--device {cfg.device}: there is none that torch {torch.__version__} sees")
    if cfg.dtype == "auto":  # bfloat16 where the hardware multiplies it faster than float32
        fast = cfg.device == "cuda" or getattr(torch.cpu, "_is_avx512_bf16_supported", bool)()
        cfg.dtype = "bfloat16" if fast else "float32"
    if cfg.device == "cpu":
        tune_cpu()


def finite(x: Tensor, name: str, rows) -> Tensor:
    """x (N, ...), or UserError naming those of the N rows in which something is NaN or infinite."""
    fine = x.detach().isfinite().reshape(len(x), -1).all(1).tolist()
    if not all(fine):
        bad = ", ".join(str(row) for row, good in zip(rows, fine) if not good)
        raise UserError(f"not finite: {name} {bad}; the step is not taken")
    return x


def room(policy: GPT, cfg: Common) -> int:
    """The longest prompt that leaves room for a response, in tokens; UserError if none does."""
    context = policy.config.block_size
    if cfg.max_new_tokens >= context:
        sentence = f"should leave room for a prompt in the model's context of {context} tokens"
        raise UserError(f"--max_new_tokens {cfg.max_new_tokens}: {sentence}")
    return context - cfg.max_new_tokens


def tune_cpu() -> None:
    """Have glibc keep freed tensors, which it hands back to the system, so that the next one costs
    its page faults anew; and on AMD's processors have oneDNN, not MKL, multiply float32, twice as
    fast: "medium" does, and is as exact there (README: what each gains)."""
    libc = ctypes.CDLL(None) if sys.platform == "linux" else None
    if hasattr(libc, "mallopt"):
        libc.mallopt(-4, 0)  # M_MMAP_MAX: large blocks lie on the heap like small ones
        libc.mallopt(-1, 2**31 - 1)  # M_TRIM_THRESHOLD: whose free end is kept
    if CPUINFO.exists() and "AuthenticAMD" in CPUINFO.read_text():
        torch.set_float32_matmul_precision("medium")


@contextmanager
def constant_weights(model: GPT):
    """While it lasts the weights do not change: each is cast once, not at every step, and on a CPU
    laid out once as oneDNN's products read it, which otherwise takes as long as the product itself
    where a row is one token. The same bits, where F.linear goes to oneDNN as well, but for GELU,
    which a product applies to its sums before they are rounded."""
    torch.set_autocast_cache_enabled(True)
    try:
        if model.wte.weight.is_cpu and lays_out():
            model.unembed = product(model.wte.weight)
            for name, layer in model.named_modules():
                if isinstance(layer, nn.Linear):
                    then = "gelu" if name.endswith("c_fc") else "none"
                    layer.forward = product(layer.weight, layer.bias, then)
                elif isinstance(layer, nn.GELU):
                    layer.forward = lambda x: x  # the product before it has done it
        yield
    finally:
        for module in model.modules():
            vars(module).pop("forward", None)
        vars(model).pop("unembed", None)
        torch.set_autocast_cache_enabled(False)
        torch.clear_autocast_cache()


def lays_out() -> bool:
    """Whether there is oneDNN, and, under autocast, one that takes bfloat16 on this processor."""
    there, half = torch.backends.mkldnn.is_available(), torch.is_autocast_enabled("cpu")
    return there and (not half or torch.ops.mkldnn._is_mkldnn_bf16_supported())


def product(weight: Tensor, bias: Tensor | None = None, then: str = "none"):
    """x -> F.linear(x, weight, bias), and `then` tanh GELU, with a weight that is laid out already
    and in the type that autocast would choose, by the operators of torch's own compiler."""
    dtype = torch.get_autocast_dtype("cpu") if torch.is_autocast_enabled("cpu") else weight.dtype
    weight, bias = (None if x is None else x.detach().to(dtype) for x in (weight, bias))
    weight = torch.ops.mkldnn._reorder_linear_weight(weight)
    return lambda x: torch.ops.mkldnn._linear_pointwise(x.to(dtype), weight, bias, then, [], "tanh")


def memory_needed(trained: list, frozen: list, cfg) -> float:
    """An estimate in GiB. A trained parameter takes 16 bytes (itself, gradient, Adam's averages), a
    frozen one 4; a microbatch of rows as long as the context, s b h (34 + 5 a s / h) bytes a layer
    in 16 bits (Korthikanti et al. 2022, section 4.1), and its logits, float32 and thrice."""
    shape = trained[0].config
    sizes = [sum(p.numel() for m in models for p in m.parameters()) for models in (trained, frozen)]
    tokens, half = cfg.microbatch_size * shape.block_size, 1 if cfg.dtype == "bfloat16" else 2
    width = 34 * shape.n_embd + 5 * shape.n_head * shape.block_size
    activations = tokens * (shape.n_layer * width * half + 12 * shape.vocab_size)
    return (16 * sizes[0] + 4 * sizes[1] + activations) / 2**30

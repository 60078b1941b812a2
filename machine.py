"""What the machine is: its device, the type it multiplies fastest, how much memory a run takes.

Nothing here knows of text or of training; the file can be left unread.
"""

import ctypes
import sys
from pathlib import Path

import torch

from data.formats import UserError

CPUINFO = Path("/proc/cpuinfo")  # on Linux
DEVICES, DTYPES = ("auto", "cpu", "cuda", "mps"), ("auto", "bfloat16", "float32")


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

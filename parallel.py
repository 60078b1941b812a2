"""torchrun --nproc_per_node=N rlhf.py STAGE ...: N processes that do the work of one.

All processes start from the same weights and choose the same batches; each works on every Nth
example. Sums are divided by the count of the whole batch, so losses and gradients add up to those
of one process; dropout and sampling draw other random numbers. Without torchrun, each function
acts for a single process.
"""

import os
import sys
from contextlib import contextmanager

import torch
import torch.distributed as dist

STARTED = "TORCHELASTIC_RUN_ID" in os.environ  # by torchrun, which sets RANK and LOCAL_RANK, too
RANK = int(os.environ["RANK"]) if STARTED else 0

@contextmanager
def joined(device: str, shared: bool):
    """Inside, if work is shared, this process is one of torchrun's, with a GPU of its own."""
    if not STARTED or not shared:
        yield
        return
    if device == "cuda":
        torch.cuda.set_device(int(os.environ["LOCAL_RANK"]))
    dist.init_process_group("nccl" if device == "cuda" else "gloo")
    if RANK > 0:
        sys.stdout = open(os.devnull, "w")
    yield
    dist.barrier()  # gloo may abort the others if one process leaves early
    dist.destroy_process_group()

def share(items):
    """This process's part of a list: every Nth item, perhaps none."""
    if dist.is_initialized():
        return items[dist.get_rank() :: dist.get_world_size()]
    return items

def gather(x) -> list:
    """The x of every process, in the order of their ranks."""
    if not dist.is_initialized():
        return [x]
    everyone = [None] * dist.get_world_size()
    dist.all_gather_object(everyone, x)
    return everyone

def together(own: list) -> list:
    """The inverse of share: the results of all processes, in the order of the items."""
    parts = gather(own)
    results = [None] * sum(len(part) for part in parts)
    for rank, part in enumerate(parts):
        results[rank :: len(parts)] = part
    return results

def all_sum(*tensors: torch.Tensor) -> None:
    """Replace each tensor by its sum over the processes."""
    if dist.is_initialized():
        for x in tensors:
            dist.all_reduce(x)

def sum_gradients(model: torch.nn.Module) -> None:
    """Replace the gradients by their sums over the processes."""
    if dist.is_initialized():
        for parameter in model.parameters():
            if parameter.grad is None:  # this process had no example
                parameter.grad = torch.zeros_like(parameter)
            all_sum(parameter.grad)

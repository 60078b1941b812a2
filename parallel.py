"""`torchrun --nproc_per_node=N rlhf.py STAGE ...`: N processes that do the work of one.

Plain data parallelism. Every process reads all data and draws the same batches, which are lists of
ids and so small, but works on every Nth row. The count that a mean is divided by is the whole
batch's; losses and gradients of the processes therefore add up, exactly, to those of one process,
even if a share is empty. All start from rank 0's weights, add up the same gradients and stay equal
to the bit; only rank 0 writes. Without torchrun every function here is the identity.
"""

import os
import sys
from contextlib import contextmanager

import torch
import torch.distributed as dist
from torch import Tensor, nn

from data.formats import UserError

RANK = int(os.environ.get("RANK", 0))  # from torchrun


@contextmanager
def joined(device: str, wanted: bool = True):
    """Inside, if it is wanted, this process is one of torchrun's, on CUDA with a GPU of its own."""
    if "RANK" not in os.environ or not wanted:
        yield
        return
    local, gpus = int(os.environ["LOCAL_WORLD_SIZE"]), torch.cuda.device_count()
    if device != "cpu" and local > gpus:
        raise UserError(f"{local} processes need a GPU each and find {gpus}; or take --device cpu")
    if device == "cuda":
        torch.cuda.set_device(int(os.environ["LOCAL_RANK"]))
    dist.init_process_group("nccl" if device == "cuda" else "gloo")
    if RANK > 0:
        sys.stdout = open(os.devnull, "w")
    yield
    dist.barrier()  # gloo may abort in a process that leaves while another is still at work
    dist.destroy_process_group()


def stop(sentence: str) -> None:
    """Exit with the sentence, once: mostly all processes come to it, and the first one says it."""
    if "RANK" in os.environ:
        address = os.environ["MASTER_ADDR"], int(os.environ["MASTER_PORT"])
        if dist.TCPStore(*address, wait_for_workers=False).add("stopped", 1) > 1:
            sys.exit(1)
    sys.exit(sentence)


def share(rows):
    """This process's rows, every Nth of a list or a tensor; perhaps none."""
    return rows[dist.get_rank() :: dist.get_world_size()] if dist.is_initialized() else rows


def gather(x) -> list:
    """Every process's x, in the order of ranks; x is anything that can be pickled, on the CPU."""
    if not dist.is_initialized():
        return [x]
    everyones = [None] * dist.get_world_size()
    dist.all_gather_object(everyones, x)
    return everyones


def unshare(rows: list) -> list:
    """The inverse of `share`: the rows of all processes, in their order."""
    parts = gather(rows)
    whole = [None] * sum(map(len, parts))
    for rank, part in enumerate(parts):
        whole[rank :: len(parts)] = part
    return whole


def all_sum(*tensors: Tensor) -> None:
    """Each becomes, in place, its sum over the processes."""
    for x in tensors if dist.is_initialized() else ():
        dist.all_reduce(x)


def sum_gradients(model: nn.Module) -> None:
    """The gradient of the whole batch, to every process: one flat tensor, one message."""
    if not dist.is_initialized():
        return
    parameters = list(model.parameters())
    parts = [torch.zeros_like(p) if p.grad is None else p.grad for p in parameters]
    flat = torch.cat([grad.flatten() for grad in parts])
    all_sum(flat)
    for p, grad in zip(parameters, flat.split([p.numel() for p in parameters])):
        p.grad = grad.view_as(p)


def broadcast(model: nn.Module) -> None:
    """Rank 0's weights, to every process."""
    for p in model.parameters() if dist.is_initialized() else ():
        dist.broadcast(p.data, 0)

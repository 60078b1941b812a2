"""What a GPU would refuse or do otherwise, as far as that shows without one.

Everything is computed on the CPU, but a tensor that was made for "cuda", or out of such tensors,
says that it is there, so that the code goes the ways that it goes on a GPU; where two devices
would meet, it raises. A graph is the operators that were called while it was recorded, on the very
tensors that they were called with. Kernels, and how streams wait for each other, are not tried.
"""

import copy
import dataclasses
import functools
import json
import shutil
from contextlib import nullcontext

import pytest
import rlhf
import torch
from conftest import gpt
from data import label
from model import captured, generate
from torch import Tensor
from torch.overrides import TorchFunctionMode
from torch.utils._python_dispatch import TorchDispatchMode, _get_current_dispatch_mode
from torch.utils._pytree import tree_leaves, tree_map_only

aten = torch.ops.aten
SAYS = {"device": (torch.device("cpu"), torch.device("cuda")), "is_cuda": (False, True),
        "is_cpu": (True, False)}
RUNS = [
    (rlhf.pretrain, rlhf.Pretrain(preset="tiny", steps=3, batch_size=4)),
    (rlhf.sft, rlhf.SFT(epochs=1, batch_size=4, dropout=0.0)),
    (rlhf.rm, rlhf.RM(batch_size=4)),
    (rlhf.dpo, rlhf.DPO(init="sft", batch_size=4)),
    (rlhf.sft, rlhf.SFT(name="best", epochs=1, reward_model="rm", pretrain_fraction=0.1)),
    (rlhf.ppo, rlhf.PPO(name="ppo", init="sft", iterations=2, rollout_size=6, minibatch_size=3,
                        epochs=2)),
    (rlhf.evaluate, rlhf.Evaluate(models="gpt+fewshot,ppo,dpo", reference="sft", baseline="dpo")),
]


# ---- the pretended device ----------------------------------------------------------------------

class Cuda(Tensor):
    """A tensor that is on the GPU; in a file there is no difference."""
    def __deepcopy__(self, memo):
        with torch._C.DisableTorchFunction():
            return self.detach().clone().as_subclass(Cuda).requires_grad_(self.requires_grad)

    def __reduce_ex__(self, protocol):
        with torch._C.DisableTorchFunction():
            return self.detach().as_subclass(Tensor).__reduce_ex__(protocol)


class PretendedGPU(TorchFunctionMode):
    """Follows tensors through every function of torch."""
    def __torch_function__(self, function, types, args=(), kwargs=None):
        kwargs, name = dict(kwargs or {}), function.__name__
        tensors = [x for x in tree_leaves((args, kwargs)) if isinstance(x, Tensor)]
        there = any(isinstance(x, Cuda) for x in tensors)
        if name == "__get__" and function.__self__.__name__ in SAYS:
            return SAYS[function.__self__.__name__][there]
        if name == "_has_compatible_shallow_copy_type":  # in Module.to: one device's to another's
            return False
        refuse_two_devices(name, args, tensors)
        to = args[1] if name == "to" and len(args) > 1 else kwargs.get("device")
        if isinstance(to, (str, torch.device)):
            there = torch.device(to).type == "cuda"
            args = [torch.device("cpu") if there and x is to else x for x in args]
            kwargs |= {"device": "cpu"} if there and "device" in kwargs else {}
        with torch._C.DisableTorchFunctionSubclass():
            result = function(*args, **kwargs)
            return tree_map_only(Tensor, functools.partial(marked, there), result)


def refuse_two_devices(name: str, args, tensors: list) -> None:
    """A tensor without a dimension goes with any other, an index on the CPU with all, save where
    a graph is recorded."""
    recorded = isinstance(_get_current_dispatch_mode(), Graph)
    if name in ("__getitem__", "__setitem__") and isinstance(args[0], Cuda) and not recorded:
        tensors = [x for x in (args[0], *args[2:]) if isinstance(x, Tensor)]
    kinds = {isinstance(x, Cuda) for x in tensors if x.dim() or isinstance(x, Cuda)}
    if len(kinds) > 1 and name != "copy_":
        raise RuntimeError(f"{name}: tensors on two devices")
    if name == "numpy" and True in kinds:
        raise TypeError("numpy reads no tensor on a GPU")


def marked(there: bool, x: Tensor) -> Tensor:
    if there == isinstance(x, Cuda):
        return x
    return x.as_subclass(Cuda if there else Tensor)


class Graph(TorchDispatchMode):
    """Records inside `with`; what waits for the GPU, or depends on what it computes, raises."""
    def __init__(self):
        super().__init__()
        self.calls = []

    def __torch_dispatch__(self, operator, types, args=(), kwargs=None):
        chosen = "index" in str(operator) and any(x.dtype == torch.bool for x in tree_leaves(args)
                                                  if isinstance(x, Tensor))
        if chosen or operator in (aten._local_scalar_dense.default, aten.nonzero.default):
            raise RuntimeError(f"{operator} cannot be recorded")
        result = operator(*args, **(kwargs or {}))
        self.calls.append((operator, args, kwargs or {}, result))
        return result

    @torch.no_grad()
    def replay(self):
        with torch._C.DisableTorchFunction():
            for operator, args, kwargs, result in self.calls:
                again = operator(*args, **kwargs)
                for old, new in zip(tree_leaves(result), tree_leaves(again)):
                    if old.data_ptr() != new.data_ptr():  # neither a view nor in place
                        old.copy_(new)


@pytest.fixture
def gpu(monkeypatch):
    """With `gpu:` there is one; gpu.waits counts how often a stream has waited for another."""
    class Stream:
        def wait_stream(self, other):
            device.waits += 1

    device = PretendedGPU()
    device.waits = 0
    for name, fake in {"CUDAGraph": Graph, "graph": lambda graph: graph, "Stream": Stream,
                       "current_stream": Stream, "stream": nullcontext}.items():
        monkeypatch.setattr(torch.cuda, name, fake)
    return device


def test_what_a_gpu_refuses(gpu):
    with gpu:
        there, here = torch.arange(3.0, device="cuda"), torch.arange(3.0)
        assert there.is_cuda and (there + 1).is_cuda and (2 * there)[0].device.type == "cuda"
        assert not here.is_cuda and not there.to("cpu").is_cuda and here.to("cuda").is_cuda
        assert (there + here.sum()).is_cuda and there[here.long()].is_cuda
        for action in (lambda: there + here, lambda: torch.stack([here, there]),
                       lambda: torch.where(there > 0, here, 0), lambda: here[there.long()]):
            with pytest.raises(RuntimeError, match="two devices"):
                action()
        with pytest.raises(TypeError):
            there.numpy()


# ---- decoding ----------------------------------------------------------------------------------

def test_captured_step_reads_its_argument_and_is_warmed_up_first(gpu):
    """On another stream, between two waits; a replay takes the token it is given and runs no
    Python."""
    seen = []

    def step(token):
        seen.append(gpu.waits)
        return 2.0 * token

    replay = captured(step, torch.tensor([1.0, 2.0]))
    assert replay(torch.tensor([3.0, 4.0])).tolist() == [6, 8]
    assert replay(torch.tensor([5.0, 0.0])).tolist() == [10, 0]
    assert seen == [1, 2]


def test_what_cannot_be_captured(gpu):
    for step in (lambda token: token * token.sum().item(), lambda token: token[token > 0]):
        with pytest.raises(RuntimeError, match="cannot be recorded"):
            captured(step, torch.ones(2))


@pytest.mark.parametrize("temperature, eos", [(0, 4), (0, 6), (0, -1), (1.0, -1)])
def test_a_recorded_step_decodes_what_the_step_does(gpu, prompts, temperature, eos):
    """Rows that end stay, but nothing is added to them."""
    policy = gpt()
    torch.manual_seed(1)
    here = generate(policy, prompts, 12, eos, temperature)
    torch.manual_seed(1)
    with gpu:
        there = generate(copy.deepcopy(policy).to("cuda"), prompts, 12, eos, temperature)
        assert all(x.is_cuda for x in there)
    assert [x.tolist() for x in here] == [x.tolist() for x in there]
    assert eos < 0 or len((here[2] - here[1]).unique()) > 1


# ---- every stage -------------------------------------------------------------------------------

def run_all(device: str, folder) -> dict[str, list]:
    """A few steps of each: {run: its log}."""
    common = dict(data=str(folder), out=str(folder / device), device=device, dtype="float32",
                  microbatch_size=3, max_new_tokens=8)
    for stage, cfg in RUNS:
        torch.manual_seed(0)
        stage(dataclasses.replace(cfg, **common))
    logs = {path.parent.name: path.read_text().splitlines()
            for path in (folder / device).glob("*/metrics.jsonl")}
    return {name: [json.loads(line) for line in lines] for name, lines in logs.items()}


def test_every_stage_keeps_to_its_device(gpu, tiny_data, tmp_path, monkeypatch):
    """And does what it does on the CPU, up to where they draw random numbers in another order."""
    monkeypatch.setitem(rlhf.PRESETS, "tiny", dict(block_size=128, n_layer=2, n_head=2, n_embd=16))
    data = shutil.copytree(tiny_data, tmp_path / "data")
    for split in ("", "_valid"):
        texts = [" Yes.", " No, I will not.", " I do not know."]
        prompts = (data / f"rm_prompts{split}.jsonl").read_text().splitlines()[:12]
        rows = [json.loads(line) | {"completions": texts, "ranks": [0, 2, 1]} for line in prompts]
        label.write_jsonl(data / f"comparisons{split}.jsonl", rows)
    here = run_all("cpu", data)
    with gpu:
        there = run_all("cuda", data)
    assert here.keys() == there.keys() == {"gpt", "sft", "rm", "dpo", "best", "ppo"}
    for name in ("gpt", "sft", "rm", "dpo"):
        for one, other in zip(here[name], there[name], strict=True):
            assert one | {"seconds": 0} == pytest.approx(other | {"seconds": 0}, rel=1e-3, abs=1e-4)

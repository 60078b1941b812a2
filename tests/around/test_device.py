"""What a GPU would refuse or do otherwise: all is computed on the CPU, but a tensor that was made
for "cuda", or out of such tensors, says that it is there; where two devices would meet, it raises.
Kernels and streams are not tried."""

import copy
import functools
from contextlib import nullcontext
from unittest.mock import Mock

import pytest
import rlhf
import torch
from conftest import SMALL, gpt, read_log, stage_settings
from model import generate
from torch import Tensor
from torch.overrides import TorchFunctionMode
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves, tree_map_only

WAITS = torch.ops.aten._local_scalar_dense.default, torch.ops.aten.nonzero.default  # for the GPU
SAYS = {"device": (torch.device("cpu"), torch.device("cuda")), "is_cuda": (False, True),
        "is_cpu": (True, False)}
EVALUATE = {"evaluate": dict(models="gpt+fewshot,ppo_ptx,dpo", baseline="dpo")}

class Cuda(Tensor):
    """A tensor that is on the GPU; in a file there is no difference."""
    def __reduce_ex__(self, protocol):
        with torch._C.DisableTorchFunction():
            return self.detach().as_subclass(Tensor).__reduce_ex__(protocol)

class PretendedGPU(TorchFunctionMode):
    """Follows tensors through every function of torch."""
    def __torch_function__(self, function, types, args=(), kwargs=None):
        kwargs = dict(kwargs or {})
        name = function.__name__
        tensors = [x for x in tree_leaves((args, kwargs)) if isinstance(x, Tensor)]
        there = any(isinstance(x, Cuda) for x in tensors)
        if name == "__get__" and function.__self__.__name__ in SAYS:
            return SAYS[function.__self__.__name__][there]
        if name == "_has_compatible_shallow_copy_type":  # in Module.to: one device's to another's
            return False
        if name in ("__getitem__", "__setitem__") and isinstance(args[0], Cuda):
            tensors = [x for x in (args[0], *args[2:]) if isinstance(x, Tensor)]
        kinds = {isinstance(x, Cuda) for x in tensors if x.dim() or isinstance(x, Cuda)}
        if len(kinds) > 1 and name != "copy_":
            raise RuntimeError(f"{name}: tensors on two devices")
        to = args[1] if name == "to" and len(args) > 1 else kwargs.get("device")
        if isinstance(to, (str, torch.device)) and str(to) != "meta":
            there = torch.device(to).type == "cuda"
            args = [torch.device("cpu") if there and x is to else x for x in args]
            kwargs |= {"device": "cpu"} if there and "device" in kwargs else {}
        with torch._C.DisableTorchFunctionSubclass():
            result = function(*args, **kwargs)
            return tree_map_only(Tensor, functools.partial(placed, there), result)

def placed(there: bool, x: Tensor) -> Tensor:
    kind = Cuda if there else Tensor
    return x if there == isinstance(x, Cuda) else x.as_subclass(kind)

class Recording(TorchDispatchMode):
    """Keeps what is called inside `with`; what waits for the GPU cannot be recorded."""
    def __torch_dispatch__(self, operator, types, args=(), kwargs=None):
        masks = [x for x in tree_leaves(args) if isinstance(x, Tensor) and x.dtype == torch.bool]
        if operator in WAITS or ("index.Tensor" in str(operator) and masks):
            raise RuntimeError(f"{operator} cannot be recorded")
        result = operator(*args, **(kwargs or {}))
        self.calls.append((operator, args, kwargs or {}, result))
        return result

def make_graphed_callables(step, arguments):
    """As torch.cuda's: three calls to warm up, one that is recorded; a replay runs no Python."""
    (static,) = arguments
    for _ in range(3):
        step(static)
    with Recording() as recording:
        recording.calls = []
        result = step(static)

    @torch.no_grad()
    def replay(token):
        with torch._C.DisableTorchFunction():
            static.copy_(token)
            for operator, args, kwargs, old in recording.calls:
                for one, other in zip(tree_leaves(old), tree_leaves(operator(*args, **kwargs))):
                    if one.data_ptr() != other.data_ptr():  # neither a view nor in place
                        one.copy_(other)
        return result

    return replay

needs_gpu = pytest.mark.skipif(not torch.cuda.is_available(), reason="there is no GPU")

@pytest.fixture(params=["pretended", pytest.param("real", marks=needs_gpu)])
def gpu(request, monkeypatch):
    if request.param == "real":
        return nullcontext()
    monkeypatch.setattr(torch.cuda, "make_graphed_callables", make_graphed_callables)
    return PretendedGPU()

@pytest.mark.parametrize("temperature, eos", [(0, 4), (0, 6), (0, -1), (1.0, -1)])
def test_a_recorded_step_decodes_what_the_step_does(gpu, prompts, capsys, temperature, eos):
    """Rows that end stay, but nothing is added to them."""
    if temperature and isinstance(gpu, nullcontext):
        pytest.skip("a real GPU has other random numbers")
    policy = gpt()
    torch.manual_seed(1)
    here = generate(policy, prompts, 12, eos, temperature)
    torch.manual_seed(1)
    with gpu:
        there = generate(copy.deepcopy(policy).to("cuda"), prompts, 12, eos, temperature)
        assert all(x.is_cuda for x in there)
    assert [x.tolist() for x in here] == [x.tolist() for x in there]
    assert capsys.readouterr().out == ""  # it was recorded

def test_a_step_that_cannot_be_recorded_is_made_as_it_is(gpu, prompts, monkeypatch, capsys):
    refusal = Mock(side_effect=RuntimeError("not permitted when capturing"))
    monkeypatch.setattr(torch.cuda, "make_graphed_callables", refusal)
    with gpu:
        generate(gpt().to("cuda"), prompts, 12, -1, 0)
    assert "not permitted when capturing" in capsys.readouterr().out

def stage_logs(project, device: str) -> list[dict]:
    """What the stages log whose random numbers do not depend on the device."""
    logs = []
    for stage, fields in (SMALL | EVALUATE).items():
        cfg = stage_settings(stage, project, device=device, **fields)
        torch.manual_seed(0)
        rlhf.STAGES[stage](cfg)
        if stage in ("pretrain", "rm", "dpo"):
            logs += read_log(cfg)
    return logs

def test_every_stage_keeps_to_its_device(gpu, project):
    """And does what it does on the CPU, up to where random numbers are drawn in another order."""
    here = stage_logs(project, "cpu")
    with gpu:
        there = stage_logs(project, "cuda")
    for one, other in zip(here, there):
        assert one == pytest.approx(other, rel=1e-3, abs=1e-4)
    assert max(line["sampler_gap"] for line in read_log(stage_settings("ppo", project))) < 1e-4

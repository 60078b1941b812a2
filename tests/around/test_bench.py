"""The benchmark counts what torch counts, runs what the program runs, and prints what it found."""

import json
from functools import partial
from unittest.mock import Mock

import bench
import pytest
import rlhf
import torch
from data.files import Example
from model import GPT, GPTConfig
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils.flop_counter import FlopCounterMode

SMALL = GPTConfig(vocab_size=300, block_size=96, n_layer=3, n_head=2, n_embd=16)
ROWS = 5

def counted(work) -> tuple[int, int]:
    """FLOPs of `work` as torch counts them: of linear layers, and of attention, masked or not."""
    with FlopCounterMode(display=False) as counter, sdpa_kernel(SDPBackend.MATH):
        work()
    counts = counter.get_flop_counts()["Global"]
    attention = sum(flops for operator, flops in counts.items() if "bmm" in str(operator))
    return sum(counts.values()) - attention, attention

def linear_flops(length: int, predicted: int) -> float:
    attention = 4 * SMALL.n_layer * SMALL.n_embd * sum(range(1, length + 1))
    return bench.forward_flops(SMALL, ROWS, length, predicted) - ROWS * attention

def test_flops_are_those_that_torch_counts():
    """Of attention to 16 columns, the mask leaves 1 + 2 + ... + 16 of 16 x 16. A backward pass
    costs two forward passes, and a cached step what its column costs in a pass over all."""
    model = GPT(SMALL)
    linear, attention = counted(partial(model, torch.zeros(ROWS, 16, dtype=torch.long)))
    expected = linear + attention * (16 * 17 / 2) / 16**2
    assert bench.forward_flops(SMALL, ROWS, 16, 16) == pytest.approx(expected, rel=1e-12)
    cfg = rlhf.Settings(device="cpu", dtype="float32", max_new_tokens=5)
    linear, _ = counted(partial(rlhf.lm_pass, model, [Example([1] * 24, 1)] * ROWS, cfg, 1.0))
    assert linear == 3 * linear_flops(23, 23)
    linear, _ = counted(partial(rlhf.complete, model, [[1] * 8] * ROWS, -1, cfg))
    assert linear == linear_flops(12, 5)

def test_table_and_json(monkeypatch, capsys):
    sizes = dict(rollout_size=4, minibatch_size=2, epochs=2, batch_size=2, length=9)
    monkeypatch.setitem(bench.SHAPES, "fable", SMALL)
    monkeypatch.setitem(bench.SIZES, "fable", sizes)
    monkeypatch.setitem(bench.PRODUCT, "cpu", 64)
    monkeypatch.setattr(bench, "find_spec", lambda name: None)  # no transformers
    sampled = Mock(side_effect=rlhf.sample_responses)
    monkeypatch.setattr(rlhf, "sample_responses", sampled)
    bench.main("all --repeats 1 --device cpu --dtype float32".split())
    lines = capsys.readouterr().out.splitlines()
    rows = json.loads(lines[-1])["rows"]
    assert list(rows) == ["decode", "train", "ppo", "float32", "bfloat16", "copy"]
    for line, name in zip(lines[-7:-1], rows):
        assert line.startswith(f"| {name} | {rows[name]['seconds']:.3f} |")
    assert rows["decode"]["per second"] * rows["decode"]["seconds"] == pytest.approx(4 * 64)
    lengths = [list(map(len, call.args[1])) for call in sampled.call_args_list]
    assert lengths == [[32] * 4] * (2 + 2 * 3)  # decode and ppo, after a warm-up turn each

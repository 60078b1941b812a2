"""The benchmark counts what torch counts, runs what the program runs, and prints what it found."""

import json
from functools import partial

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
    linear, attention = 0, 0
    for operator, flops in counter.get_flop_counts()["Global"].items():
        if "bmm" in str(operator):
            attention += flops
        else:
            linear += flops
    return linear, attention

def test_flops_of_a_forward_pass():
    """Of attention to 16 columns, the mask leaves 1 + 2 + ... + 16 of 16 x 16."""
    tokens = torch.zeros(ROWS, 16, dtype=torch.long)
    linear, attention = counted(partial(GPT(SMALL), tokens))
    expected = linear + attention * (16 * 17 / 2) / 16**2
    assert bench.forward_flops(SMALL, ROWS, 16, 16) == pytest.approx(expected, rel=1e-12)

def attention_flops(length: int) -> float:
    width = SMALL.n_layer * SMALL.n_embd
    return ROWS * 4 * width * sum(range(1, length + 1))

def test_flops_of_training():
    cfg = rlhf.Settings(device="cpu", dtype="float32")
    examples = [Example([1] * 24, 1)] * ROWS  # a length that is not padded
    linear, _ = counted(partial(rlhf.lm_pass, GPT(SMALL), examples, cfg, 1.0))
    linear_forward = bench.forward_flops(SMALL, ROWS, 23, 23) - attention_flops(23)
    assert linear == 3 * linear_forward

def test_flops_of_decoding():
    """A cached step costs what its column costs in a forward pass over all."""
    linear, _ = counted(partial(rlhf.complete, GPT(SMALL), [[1] * 8] * ROWS, -1, 5))
    assert linear == bench.forward_flops(SMALL, ROWS, 12, 5) - attention_flops(12)

def test_table_and_json(monkeypatch, capsys):
    sizes = dict(rollout_size=4, minibatch_size=2, epochs=2, batch_size=2, length=9)
    monkeypatch.setitem(bench.SHAPES, "fable", SMALL)
    monkeypatch.setitem(bench.SIZES, "fable", sizes)
    monkeypatch.setitem(bench.PRODUCT, "cpu", 64)
    monkeypatch.setattr(bench, "find_spec", lambda name: None)  # no transformers
    seen = []
    original = rlhf.sample_responses

    def sample_responses(policy, prompts, *rest):
        seen.append([len(prompt) for prompt in prompts])
        return original(policy, prompts, *rest)

    monkeypatch.setattr(rlhf, "sample_responses", sample_responses)
    bench.main("all --repeats 1 --device cpu --dtype float32".split())
    lines = capsys.readouterr().out.splitlines()
    rows = json.loads(lines[-1])["rows"]
    assert list(rows) == ["decode", "train", "ppo", "float32", "bfloat16", "copy"]
    for line, name in zip(lines[-7:-1], rows):
        assert line.startswith(f"| {name} | {rows[name]['seconds']:.3f} |")
    assert rows["decode"]["per second"] * rows["decode"]["seconds"] == pytest.approx(4 * 64)
    assert seen == [[32] * 4] * (2 + 2 * 3)  # decode and ppo, after a warm-up turn each

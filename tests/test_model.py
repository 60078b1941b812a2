"""The networks: what they are, what they may see, and that sampling is from what is scored."""

import itertools
from unittest.mock import Mock

import numpy as np
import pytest
import rlhf
import torch
from conftest import gpt
from model import GPT, PRESETS, GPTConfig, ScalarModel, generate, respond, sample
from torch import tensor

NEVER = -1  # an EOS that no token equals

def close(a, b):
    torch.testing.assert_close(a, b, atol=1e-5, rtol=0)

@pytest.mark.parametrize("preset, count", [
    ("gpt2", 124_439_808), ("gpt2-medium", 354_823_168), ("gpt2-xl", 1_557_611_200)])
def test_presets_have_the_parameters_of_gpt2(preset, count):
    with torch.device("meta"):  # shapes without memory
        model = GPT(GPTConfig(**PRESETS[preset]))
    assert sum(p.numel() for p in model.parameters()) == count

def test_initialisation_is_gpt2s():
    config = GPTConfig(vocab_size=900, block_size=300, n_layer=3, n_head=4, n_embd=64)
    for name, parameter in GPT(config).named_parameters():
        std = 0.01 if "wpe" in name else 0.02 / 6**0.5 if "c_proj" in name else 0.02
        if name.endswith("bias"):
            assert not parameter.any(), name
        elif "ln_" in name:
            assert (parameter == 1).all(), name
        else:
            assert parameter.std().item() == pytest.approx(std, rel=0.03), name

def test_scalar_head_starts_from_one_over_c_plus_one():
    heads = [ScalarModel(GPTConfig(8, 8, 1, 1, 255)).head for _ in range(8)]
    std = torch.cat([head.weight.detach().flatten() for head in heads]).std().item()
    assert std == pytest.approx(256**-0.5, rel=0.05)
    assert not any(head.bias.any() for head in heads)

def reference(weights: dict, ids: list[int], heads: int) -> np.ndarray:
    """Logits (T, V) of GPT-2 as its paper and GPT's describe it, a token and a head at a time."""
    w = {name: x.double().numpy() for name, x in weights.items()}

    def norm(x, name):
        x = (x - x.mean(-1, keepdims=True)) / np.sqrt(x.var(-1, keepdims=True) + 1e-5)
        return x * w[f"{name}.weight"] + w[f"{name}.bias"]

    def linear(x, name):
        return x @ w[f"{name}.weight"].T + w[f"{name}.bias"]

    x = w["wte.weight"][ids] + w["wpe.weight"][: len(ids)]
    for block in ("h.0", "h.1"):
        q, k, v = np.split(linear(norm(x, f"{block}.ln_1"), f"{block}.attn.c_attn"), 3, axis=-1)
        y, size = np.zeros_like(x), x.shape[1] // heads
        for t, head in itertools.product(range(len(ids)), range(heads)):
            own = slice(head * size, (head + 1) * size)
            p = np.exp(k[: t + 1, own] @ q[t, own] / size**0.5)
            y[t, own] = p / p.sum() @ v[: t + 1, own]
        x = x + linear(y, f"{block}.attn.c_proj")
        u = linear(norm(x, f"{block}.ln_2"), f"{block}.mlp.c_fc")
        u = u / 2 * (1 + np.tanh((2 / np.pi) ** 0.5 * (u + 0.044715 * u**3)))
        x = x + linear(u, f"{block}.mlp.c_proj")
    return norm(x, "ln_f") @ w["wte.weight"].T

def test_forward_is_gpt2s():
    """With dropout in train mode alone."""
    policy, tokens = gpt(dropout=0.5), torch.randint(11, (3, 9))
    for row, logits in zip(tokens.tolist(), policy(tokens)):
        close(logits.double(), torch.from_numpy(reference(policy.state_dict(), row, heads=2)))
    policy.train()
    assert not torch.equal(policy(tokens), policy(tokens))

def test_logits_are_not_rounded_to_bfloat16(policy):
    states = torch.randn(3, 16, dtype=torch.bfloat16)
    expected = states.double() @ policy.wte.weight.double().T
    with torch.autocast("cpu", torch.bfloat16):
        torch.testing.assert_close(policy.unembed(states), expected.float())

def test_cached_steps_equal_the_full_forward_pass(policy, prompts, monkeypatch):
    """The logits of every step are those of a whole forward pass over the row so far."""
    sampled = Mock(side_effect=sample)
    monkeypatch.setattr("model.sample", sampled)
    tokens, prompt_lens, _ = generate(policy, prompts, 12, NEVER)
    assert sampled.call_count == 12
    for i, n in enumerate(prompt_lens):
        full = policy(tokens[i : i + 1, : n + 12])[0]
        for step, call in enumerate(sampled.call_args_list):
            close(call.args[0][i], full[n - 1 + step])

def test_rows_end_at_their_eos_and_leave_the_others_alone(policy, prompts):
    """Greedy: a row with an EOS is the row without, cut after the first, whoever else has ended."""
    prompts, ends = prompts * 3, []
    endless, prompt_lens, _ = generate(policy, prompts, 12, NEVER, temperature=0)
    for eos in range(11):
        tokens, _, total_lens = generate(policy, prompts, 12, eos, temperature=0)
        for i, start in enumerate(prompt_lens.tolist()):
            response = endless[i, start : start + 12].tolist()
            if eos in response:
                response = response[: response.index(eos) + 1]
            assert total_lens[i] == start + len(response)
            assert tokens[i, : total_lens[i]].tolist() == prompts[i] + response
        assert tokens.size(1) == total_lens.max()
        ends.append(len(set((total_lens - prompt_lens).tolist())))
    assert max(ends) >= 3  # different steps, else it would show nothing

def test_a_row_may_fill_the_context_and_no_more(policy):
    tokens, _, total_lens = generate(policy, [[1] * 29, [2]], 3, NEVER)
    assert total_lens.tolist() == [32, 4] and tokens.shape == (2, 32)
    for prompts, new in (([[1] * 30], 3), ([[1], [1] * 33], 1), ([[1], []], 4)):
        with pytest.raises(ValueError, match="prompts need 1 to"):
            generate(policy, prompts, new, 0)

class Doubled(torch.nn.Linear):
    def forward(self, x):
        return 2 * super().forward(x)

@pytest.mark.parametrize("change", ["nothing", "linear", "activation"])
def test_a_changed_network_samples_what_it_trains(prompts, monkeypatch, change):
    """Nothing that samples knows better: its log-probabilities are those that are scored."""
    plain = gpt()
    if change == "linear":
        monkeypatch.setattr("model.nn.Linear", Doubled)
    changed = gpt()
    changed.load_state_dict(plain.state_dict())
    if change == "activation":
        for block in changed.h:
            block.mlp.gelu = torch.nn.Tanh()
    tokens = torch.randint(11, (2, 8))
    same = torch.allclose(changed(tokens), plain(tokens), atol=0.01)
    assert same == (change == "nothing")
    for eos in (NEVER, 2):
        sampled = respond(changed, prompts * 4, 12, eos)
        for prompt, (response, logprobs) in zip(prompts * 4, sampled, strict=True):
            row = tensor([prompt + response])
            mask = rlhf.action_mask(tensor([len(prompt)]), tensor([row.size(1)]), row.size(1))
            scored = rlhf.token_logprobs(changed, row, mask)[mask > 0]
            close(tensor(logprobs), scored.detach())

@pytest.mark.parametrize("temperature", [1.0, 0.7])
def test_sampled_frequencies_are_the_softmax(temperature):
    """Of pairs of draws, to five standard deviations; at a temperature of 0, the likeliest."""
    logits, n = tensor([0.5, -1.0, 2.0, 0.0, -2.5, 1.0]), 50_000
    tokens, logprobs = sample(logits.expand(n, 6), temperature)
    later, _ = sample(logits.expand(n, 6), temperature)
    p = (logits / temperature).softmax(0)
    close(logprobs.exp(), p[tokens])
    pairs = torch.outer(p, p).flatten()
    difference = (6 * tokens + later).bincount(minlength=36) / n - pairs
    assert (difference.abs() <= 5 * (pairs * (1 - pairs) / n).sqrt()).all()
    assert torch.equal(sample(torch.eye(4), 0)[0], torch.arange(4))

def test_impossible_tokens_are_never_sampled(monkeypatch):
    """Not even at the ends of the range of the uniform number."""
    logits = tensor([-torch.inf, 1.0, -torch.inf, 2.0, -torch.inf, -torch.inf])
    assert set(sample(logits.expand(20_000, 6))[0].tolist()) == {1, 3}
    for extreme, expected in ((0.0, 1), (1 - 2**-24, 3)):
        monkeypatch.setattr(torch, "rand_like", lambda x: torch.full_like(x, extreme))
        assert sample(logits[None])[0].item() == expected

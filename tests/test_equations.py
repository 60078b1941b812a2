"""Each equation against its definition: loops, enumeration, autograd. Never against itself."""

import itertools
import math

import numpy as np
import pytest
import rlhf
import torch
from rlhf import gae, implicit_rewards, kl_rewards, lm_loss, pairwise_loss, policy_loss
from rlhf import value_loss, whiten
from torch import Tensor, tensor
from torch.testing import assert_close

NAN = float("nan")
MASK = tensor([[0, 0, 1, 1, 1, 0, 0], [1, 1, 1, 1, 1, 1, 1], [0, 1, 0, 0, 0, 0, 0.0]])
COLUMNS = [(i, t) for i, t in itertools.product(range(3), range(7)) if MASK[i, t]]

def randn(count: int) -> list[Tensor]:
    return list(torch.randn(count, *MASK.shape).unbind())

def spoiled(x: Tensor, garbage: float) -> Tensor:
    """Something else in every column that the mask leaves out."""
    return torch.where(MASK > 0, x, garbage)

@pytest.mark.parametrize("garbage", [5.0, NAN])
def test_lm_loss_is_the_mean_over_response_tokens(garbage):
    """(1) -E[log pi(token)]; prompt and padding have no part in it, and no gradient."""
    logprobs = spoiled(*randn(1), garbage).requires_grad_()
    loss = lm_loss(logprobs, MASK)
    loss.backward()
    expected = -sum(logprobs[i, t].item() for i, t in COLUMNS) / len(COLUMNS)
    assert loss.item() == pytest.approx(expected, abs=1e-6)
    assert_close(logprobs.grad, -MASK / len(COLUMNS))

def untied_pairs(ranks: list[int]) -> list[tuple[int, int]]:
    """(winner, loser) of every pair that is not tied."""
    every = itertools.permutations(range(len(ranks)), 2)
    return [(i, j) for i, j in every if ranks[i] < ranks[j]]

def pairwise_by_loop(rankings) -> Tensor:
    """(2) of (scores, ranks) by prompt: the mean over untied pairs, then over prompts with any."""
    means = []
    for scores, ranks in rankings:
        losses = []
        for i, j in untied_pairs(ranks):
            losses.append(torch.log1p(torch.exp(scores[j] - scores[i])))
        if losses:
            means.append(sum(losses) / len(losses))
    return sum(means) / len(means)

def assert_pairwise(*ranks: list[int]) -> None:
    """Loss and gradient are those of the loop, for prompts whose rows stand in any order."""
    groups = torch.cat([torch.full((len(own),), i) for i, own in enumerate(ranks)])
    scores = torch.randn(len(groups), requires_grad=True)
    expected = pairwise_by_loop([(scores[groups == i], own) for i, own in enumerate(ranks)])
    order = torch.randperm(len(groups))
    loss = pairwise_loss(scores[order], tensor(sum(ranks, []))[order], groups[order])
    assert_close(loss, expected)
    assert_close(torch.autograd.grad(loss, scores), torch.autograd.grad(expected, scores))

@pytest.mark.parametrize("k", range(2, 10))
def test_pairwise_loss_is_the_mean_over_pairs(k):
    """(2) -1/C(K,2) sum over pairs of log sigmoid(r_w - r_l); two prompts weigh the same."""
    assert_pairwise(torch.randperm(k).tolist())
    assert_pairwise(torch.randperm(k).tolist(), torch.randperm(4).tolist())

def test_tied_pairs_are_dropped():
    """(2) over the pairs that are left. A prompt that has none counts for nothing; never NaN."""
    assert_pairwise([1, 1, 2])
    assert_pairwise([2, 2, 2], [1, 0])
    tied, zeros = torch.randn(3, requires_grad=True), torch.zeros(3, dtype=torch.long)
    loss = pairwise_loss(tied, zeros, zeros)
    loss.backward()
    assert loss.item() == 0 and tied.grad.tolist() == [0, 0, 0]

def test_pairwise_loss_is_ln_2_when_it_knows_nothing_and_finite_when_it_is_certain():
    """(2) log sigmoid, not the log of a sigmoid, which underflows."""
    zeros = torch.zeros(4, dtype=torch.long)
    ignorant = pairwise_loss(torch.zeros(4), torch.arange(4), zeros)
    assert ignorant.item() == pytest.approx(math.log(2))
    for sign, expected in ((1, 0), (-1, 2e4)):
        scores = tensor([sign * 1e4, -sign * 1e4], requires_grad=True)
        loss = pairwise_loss(scores, tensor([0, 1]), zeros[:2])
        loss.backward()
        assert loss.item() == pytest.approx(expected) and scores.grad.isfinite().all()

@pytest.mark.parametrize("garbage", [0.0, 7.0, NAN])
def test_score_lands_on_the_last_response_token(garbage):
    """(3) with and without padding after it, and nowhere else; 0 at prompt and padding."""
    logprobs, ref = randn(2)
    scores = tensor([10.0, 20.0, 30.0])
    rewards = kl_rewards(scores, spoiled(logprobs, garbage), spoiled(ref, garbage), MASK, 0.5)
    assert not rewards[MASK == 0].any()
    for i, last in enumerate((4, 6, 1)):  # by eye, from MASK
        for t in range(7):
            expected = -0.5 * (logprobs[i, t] - ref[i, t]) * MASK[i, t]
            expected += scores[i] * (t == last)
            assert rewards[i, t].item() == pytest.approx(expected.item(), abs=1e-5)

EOS, LENGTH = 0, 3
TREE = [y for n in range(1, LENGTH + 1) for y in itertools.product(range(3), repeat=n)
        if EOS not in y[:-1] and (n == LENGTH or y[-1] == EOS)]

def tree_logprobs(logits: Tensor) -> tuple[Tensor, Tensor]:
    """log pi of every token of every response there is over three tokens, and the mask. The logits
    (LENGTH, 3, 3) depend on the column and on the token before it."""
    table, rows = logits.log_softmax(-1), []
    for y in TREE:
        rows.append(torch.stack([table[t, y[t - 1] if t else 0, y[t]] for t in range(len(y))]))
    mask = [[float(t < len(y)) for t in range(LENGTH)] for y in TREE]
    return torch.nn.utils.rnn.pad_sequence(rows, batch_first=True), tensor(mask, dtype=logits.dtype)

def test_expected_penalty_is_the_kl():
    """(3) E_pi[sum of rewards] = E[score] - beta KL(pi || ref), over every response there is."""
    policy, ref = torch.randn(2, LENGTH, 3, 3, dtype=torch.float64)
    (logprobs, mask), (ref_logprobs, _) = tree_logprobs(policy), tree_logprobs(ref)
    p, q = logprobs.sum(1).exp(), ref_logprobs.sum(1).exp()
    assert_close(p.sum().item(), 1.0)
    scores = torch.randn(len(TREE), dtype=torch.float64)
    kl = sum(a * math.log(a / b) for a, b in zip(p.tolist(), q.tolist()))
    rewards = kl_rewards(scores, logprobs, ref_logprobs, mask, 0.3)
    expected = (p * scores).sum().item() - 0.3 * kl
    assert kl > 0.1 and (p * rewards.sum(1)).sum().item() == pytest.approx(expected, abs=1e-10)

def test_k1_as_a_reward_has_the_gradient_of_the_kl():
    """(3) E[R grad log pi(y)] = -beta grad KL(pi || ref), R the sum of detached rewards."""
    policy = torch.randn(LENGTH, 3, 3, dtype=torch.float64, requires_grad=True)
    ref_logprobs, mask = tree_logprobs(torch.randn(LENGTH, 3, 3, dtype=torch.float64))
    logprobs, _ = tree_logprobs(policy)
    p, zero = logprobs.sum(1).exp(), torch.zeros(len(TREE), dtype=torch.float64)
    kl = (p * (p.log() - ref_logprobs.sum(1))).sum()
    (expected,) = torch.autograd.grad(-0.3 * kl, policy, retain_graph=True)
    rewards = kl_rewards(zero, logprobs.detach(), ref_logprobs, mask, 0.3).sum(1)
    surrogate = (p.detach() * rewards * logprobs.sum(1)).sum()
    (gradient,) = torch.autograd.grad(surrogate, policy)
    assert_close(gradient, expected, atol=1e-10, rtol=0)

def gae_by_double_sum(rewards: list, values: list, gamma: float, lam: float) -> list[float]:
    """One row without padding; V after the last token is 0."""
    n, values = len(rewards), [*values, 0]
    deltas = [rewards[t] + gamma * values[t + 1] - values[t] for t in range(n)]
    return [sum((gamma * lam) ** m * deltas[t + m] for m in range(n - t)) for t in range(n)]

@pytest.mark.parametrize("gamma, lam", [(1, 0.95), (0.9, 0.8), (1, 0), (1, 1), (0.7, 1)])
@pytest.mark.parametrize("garbage", [0.0, 100.0, NAN])
def test_gae_is_the_double_sum(gamma, lam, garbage):
    """(4) A_t = sum_l (gamma lam)^l delta_{t+l}; a row is the row alone, whatever pads it."""
    rewards, values = randn(2)
    advantages, returns = gae(spoiled(rewards, garbage), spoiled(values, garbage), MASK, gamma, lam)
    for i in range(3):
        own = MASK[i] > 0
        expected = gae_by_double_sum(rewards[i, own].tolist(), values[i, own].tolist(), gamma, lam)
        assert_close(advantages[i, own], tensor(expected))
        assert_close(returns[i, own], tensor(expected) + values[i, own])
        assert not advantages[i, ~own].any() and not returns[i, ~own].any()

def test_gae_vectors():
    """(4) lam 0.95; lam 1 is the reward to go less V; lam 0 the error of one step."""
    rewards, values = tensor([[-0.01, 0.02, 1.0]]), tensor([[0.5, 0.4, 0.7]])
    cases = {0.95: [0.46475, 0.605, 0.3], 1: [0.51, 0.62, 0.3], 0: [-0.11, 0.32, 0.3]}
    for lam, expected in cases.items():
        advantages, returns = gae(rewards, values, torch.ones(1, 3), 1.0, lam)
        assert_close(advantages, tensor([expected]))
        assert_close(returns, tensor([expected]) + values)

def test_whiten_vector():
    """Mean 0 and population variance 1 over the valid tokens of the whole batch."""
    x, mask = tensor([[1, 2, 3, NAN], [4, 5, 99.0, -99]]), tensor([[1, 1, 1, 0], [1, 1, 0, 0.0]])
    expected = [[-math.sqrt(2), -math.sqrt(0.5), 0, 0], [math.sqrt(0.5), math.sqrt(2), 0, 0]]
    assert_close(whiten(x, mask), tensor(expected))

def policy_by_loop(new, old, advantages, eps):
    """(5) and its statistics, a token at a time."""
    losses, ratios, clips, squares = [], [], [], []
    for log_pi, log_old, advantage in zip(new, old, advantages, strict=True):
        ratio = (log_pi - log_old).exp()
        plain = ratio * advantage
        clipped = ratio.clamp(1 - eps, 1 + eps) * advantage
        losses.append(-min(plain, clipped))
        ratios.append(ratio.item())
        clips.append(float(clipped < plain))
        squares.append((log_pi - log_old).item() ** 2 / 2)
    return sum(losses) / len(losses), {
        "val/ratio": np.mean(ratios), "policy/clipfrac": np.mean(clips),
        "policy/approxkl": np.mean(squares)}

@pytest.mark.parametrize("ratio, advantage, value, gradient, clips", [
    (1.5, 2.0, -2.4, 0.0, 1), (0.5, 2.0, -1.0, -1.0, 0), (1.1, 2.0, -2.2, -2.2, 0),
    (1.5, -2.0, 3.0, 3.0, 0), (0.5, -2.0, 1.6, 0.0, 1), (0.9, -2.0, 1.8, 1.8, 0),
    (1.0, 2.0, -2.0, -2.0, 0)])  # before the first update: the policy gradient
def test_policy_loss_four_quadrants(ratio, advantage, value, gradient, clips):
    """(5) -min(ratio A, clip(ratio) A): to go further than eps gains nothing and has no gradient,
    the way back is never clipped. d/d log pi = -ratio A where it is not."""
    logprobs = tensor([[math.log(ratio)]], requires_grad=True)
    loss, stats = policy_loss(logprobs, torch.zeros(1, 1), tensor([[advantage]]), torch.ones(1, 1))
    loss.backward()
    assert loss.item() == pytest.approx(value) and logprobs.grad.item() == pytest.approx(gradient)
    assert stats["policy/clipfrac"].item() == clips

def test_approxkl_estimates_the_kl_from_the_old_policy():
    """(5) E_old[(log pi - log old)^2 / 2] = KL(old || pi) to second order."""
    old, drift = torch.randn(2, 6, dtype=torch.float64)
    old = old.log_softmax(0)
    new = (old + 0.03 * drift).log_softmax(0)
    kl = (old.exp() * (old - new)).sum().item()
    estimate, one = 0.0, torch.ones(1, 1)
    for o, n in zip(old, new):
        _, stats = policy_loss(n.view(1, 1), o.view(1, 1), one, one)
        estimate += o.exp().item() * stats["policy/approxkl"].item()
    assert estimate == pytest.approx(kl, rel=0.1)

def value_by_loop(values, old, returns, eps):
    """(6) and its statistics, a token at a time."""
    losses, clips, errors = [], [], []
    for value, before, target in zip(values, old, returns, strict=True):
        plain = (value - target) ** 2
        clipped = (value.clamp(before - eps, before + eps) - target) ** 2
        losses.append(max(plain, clipped) / 2)
        clips.append(float(clipped > plain))
        errors.append(plain.item())
    return sum(losses) / len(losses), {
        "val/clipfrac": np.mean(clips), "val/error": np.mean(errors)}

@pytest.mark.parametrize("v, old, target, value, gradient", [
    (1.0, 0.5, 1.2, 0.125, 0.0),  # moved up by more than eps, still below the target: clipped
    (0.0, 0.5, 1.2, 0.72, -1.2),  # moved away from it: the unclipped error is larger
    (1.0, 0.5, 0.2, 0.32, 0.8), (0.0, 0.5, -0.2, 0.125, 0.0),  # the same two, mirrored
    (0.6, 0.5, 1.2, 0.18, -0.6)])  # within eps
def test_value_loss_four_quadrants(v, old, target, value, gradient):
    """(6) 1/2 max((V - R)^2, (V_old + clip(V - V_old) - R)^2): max, not min, and its gradient."""
    values = tensor([[v]], requires_grad=True)
    loss, stats = value_loss(values, tensor([[old]]), tensor([[target]]), torch.ones(1, 1))
    loss.backward()
    assert loss.item() == pytest.approx(value)
    assert values.grad.item() == pytest.approx(gradient, abs=1e-6)
    assert stats["val/clipfrac"].item() == (gradient == 0)

def test_dpo_vector():
    """(8) log-probs -10 and -12 against -11 and -11.5: h = 1.5, and (2) at beta 0.1 is 0.620957,
    with -0.046257 for its derivative by h."""
    logprobs = tensor([[-4.0, -6], [-5, -7]], requires_grad=True)
    rewards = implicit_rewards(logprobs, tensor([[-5.0, -6], [-6, -5.5]]), torch.ones(2, 2), 0.1)
    loss = pairwise_loss(rewards, tensor([0, 1]), tensor([0, 0]))
    loss.backward()
    assert loss.item() == pytest.approx(0.620957, abs=1e-6)
    assert_close(logprobs.grad, tensor([[-0.046257] * 2, [0.046257] * 2]))

@pytest.mark.parametrize("garbage", [0.0, 100.0, NAN])
def test_implicit_rewards_by_loop(garbage):
    """(8) the sum over response tokens, be they many or few, whatever stands elsewhere."""
    logprobs, ref = randn(2)
    rewards = implicit_rewards(spoiled(logprobs, garbage), spoiled(ref, garbage), MASK, 0.3)
    for i in range(3):
        expected = sum(0.3 * (logprobs[i, t] - ref[i, t]).item() for j, t in COLUMNS if j == i)
        assert rewards[i].item() == pytest.approx(expected, abs=1e-5)

@pytest.mark.parametrize("garbage", [5.0, NAN])
@pytest.mark.parametrize("loss, by_loop", [
    (policy_loss, policy_by_loop), (value_loss, value_by_loop)])
def test_losses_and_statistics_ignore_padding(loss, by_loop, garbage):
    """Response tokens alone count: in (5), in (6), in all that is logged, and in the gradient."""
    new, old, target = (spoiled(x, garbage) for x in randn(3))
    new.requires_grad_()
    own = MASK > 0
    for eps in (0.2, 0.4):
        value, stats = loss(new, old, target, MASK, eps)
        expected, known = by_loop(new[own], old[own], target[own], eps)
        assert_close(value, expected)
        assert_close(torch.autograd.grad(value, new), torch.autograd.grad(expected, new))
        assert not any(x.requires_grad for x in stats.values())
        assert {key: x.item() for key, x in stats.items()} == pytest.approx(known, rel=1e-5)

def test_arguments_are_left_alone():
    """Tensors in, tensors out: no equation writes into what it is given."""
    floats, groups, ranks = randn(3), tensor([0, 0, 1]), tensor([0, 1, 0])
    calls = [
        (lm_loss, floats[0], MASK), (whiten, floats[0], MASK),
        (pairwise_loss, floats[0][:, 0], ranks, groups), (gae, *floats[:2], MASK),
        (kl_rewards, floats[0][:, 0], *floats[1:], MASK, 0.1),
        (implicit_rewards, *floats[:2], MASK, 0.1),
        (policy_loss, *floats, MASK), (value_loss, *floats, MASK),
        (rlhf.action_mask, tensor([1, 2, 3]), tensor([4, 5, 6]), 7)]
    for f, *arguments in calls:
        before = [x.clone() if isinstance(x, Tensor) else x for x in arguments]
        f(*arguments)
        assert all(torch.equal(a, b) for a, b in zip(arguments, before) if isinstance(a, Tensor))

def test_action_mask_by_hand():
    """p0 p1 p2 r0 r1 EOS pad pad, as in the docstring; a prompt of one token; a full row."""
    mask = rlhf.action_mask(tensor([3, 1, 2]), tensor([6, 2, 8]), 8)
    assert mask.tolist() == [[0, 0, 1, 1, 1, 0, 0],
                             [1, 0, 0, 0, 0, 0, 0],
                             [0, 1, 1, 1, 1, 1, 1]]

def test_schedule():
    """A cosine from 1 to a tenth, halfway at half of the steps; a linear warmup if there is one."""
    assert rlhf.schedule(0, 100) == pytest.approx(1)
    assert rlhf.schedule(50, 100) == pytest.approx(0.55)
    assert rlhf.schedule(100, 100) == pytest.approx(0.1)
    warm = [rlhf.schedule(step, 100, warmup=0.05) for step in range(6)]
    assert warm[:4] == pytest.approx([0.2, 0.4, 0.6, 0.8])
    assert warm[5] == pytest.approx(rlhf.schedule(5, 100)) and warm[4] < 1
    assert rlhf.schedule(0, 2, warmup=0.1) == pytest.approx(1)

def test_win_rate_is_antisymmetric_and_ties_count_half():
    """Every sample is compared with every other of its prompt; the interval is over prompts."""
    own, other = np.random.default_rng(0).integers(0, 4, (2, 3, 50))
    shares = []
    for i in range(50):
        wins = [(x > y) + (x == y) / 2 for x, y in itertools.product(own[:, i], other[:, i])]
        shares.append(np.mean(wins))
    rate, margin = rlhf.win_rate(own, other)
    assert rate == pytest.approx(np.mean(shares)) != 0.5
    assert margin == pytest.approx(1.96 * np.std(shares, ddof=1) / 50 ** 0.5)
    assert rate + rlhf.win_rate(other, own)[0] == pytest.approx(1)
    assert rlhf.win_rate(own[:1], own[:1]) == (0.5, 0.0)
    assert rlhf.win_rate(own[:, :1], other[:, :1])[1] == 0  # nothing is known from one prompt

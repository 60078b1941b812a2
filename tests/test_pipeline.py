"""From files to optimizer steps: the stages do with the equations what the paper says."""

import argparse
import copy
import functools
import json
import math
import os
import pickle
import shutil
import subprocess
import sys
from collections import Counter
from zipfile import ZipFile

import numpy as np
import pytest
import torch
from conftest import ROOT, STAGES, gpt, gradients, replace_stages, scalar, settings, weights
from torch import tensor

import cli
import rlhf
from data import label
from data.formats import EOT, fingerprint, read_comparisons
from data.label import Label
from model import pad_right
from rlhf import UserError, action_mask, ppo_backward, read_rows, token_logprobs

PRESET = dict(block_size=128, n_layer=1, n_head=2, n_embd=16)


def flat_close(a, b, tolerance=1e-6):
    torch.testing.assert_close(a, b, atol=tolerance, rtol=0)
    assert a.abs().max() > 0


# ---- models on tokens --------------------------------------------------------------------------

def test_action_mask_by_hand():
    """p0 p1 p2 r0 r1 EOS pad pad, as in the docstring; a prompt of one token; a full row."""
    mask = action_mask(tensor([3, 1, 2]), tensor([6, 2, 8]), 8)
    assert mask.tolist() == [
        [0, 0, 1, 1, 1, 0, 0],
        [1, 0, 0, 0, 0, 0, 0],
        [0, 1, 1, 1, 1, 1, 1],
    ]


def test_token_logprobs_are_those_of_the_softmax(policy):
    """(B, T-1): column t has log pi of token t + 1 after tokens up to t; 0 off the mask."""
    tokens = torch.randint(11, (3, 8))
    mask = action_mask(tensor([3, 1, 2]), tensor([6, 2, 8]), 8)
    logprobs = token_logprobs(policy, tokens, mask)
    for i in range(3):
        for t in range(7):
            logits = policy(tokens[i : i + 1, : t + 1])[0, -1].double()
            expected = (logits[tokens[i, t + 1]] - logits.exp().sum().log()) * mask[i, t]
            assert logprobs[i, t].item() == pytest.approx(expected.item(), abs=1e-5)
    assert not logprobs[mask == 0].any()


def test_eos_is_an_action_like_any_other(policy):
    """It is in the mask, has a log-probability and a gradient; the padding has the same id here."""
    tokens, lens = pad_right([[5, 6, 0], [5, 6, 7, 8, 0]])
    mask = action_mask(tensor([2, 2]), lens, tokens.size(1))
    assert mask[0].tolist() == [0, 1, 0, 0, 0, 0, 0]
    logprobs = token_logprobs(policy, tokens, mask)
    assert logprobs[0, 1].exp().item() == pytest.approx(policy(tokens)[0, 1].softmax(0)[0].item())
    rlhf.lm_loss(logprobs[:1], mask[:1]).backward()
    assert gradients(policy).abs().max() > 0


def test_scores_and_responses(policy, reward_model, prompts, cfg):
    tokens, mask, lens = rlhf.complete(policy, prompts, 0, 5)
    rows = [row[:n].tolist() for row, n in zip(tokens, lens)]
    assert [p + r for p, r in zip(prompts, rlhf.responses(tokens, mask))] == rows
    expected = torch.stack([reward_model(tensor([row]))[0, -1] for row in rows])
    flat_close(rlhf.score_rows(reward_model, rows, cfg), expected.detach(), 1e-5)


# ---- rollouts ----------------------------------------------------------------------------------

def test_rollouts_are_constants(episodes):
    batch, statistics = episodes
    assert not any(x.requires_grad for x in [*batch, *statistics.values()])


def test_rollout_is_made_of_its_definitions(models, prompts, cfg, episodes):
    """Row by row, alone: log-probs, values, rewards, and what is logged of them."""
    batch, statistics = episodes
    assert len(batch.mask.sum(1).unique()) > 1
    rewards, values = [], []
    for i, prompt in enumerate(prompts):
        start, n = len(prompt), len(prompt) + int(batch.mask[i].sum())
        row = batch.tokens[i : i + 1, :n]
        logprobs, ref = (
            net(row)[0, :-1].log_softmax(-1).gather(1, row[0, 1:, None])[start - 1 :, 0].detach()
            for net in (models.policy, models.ref)
        )
        ended = row[0, -1].item() == 0
        score = models.reward(row)[0, -1].item() if ended else cfg.missing_eos_score
        values.append(models.value(row)[0, start - 1 : -1].tolist())
        rewards.append((-cfg.kl_coef * (logprobs - ref)).tolist())
        rewards[-1][-1] += score
        flat_close(batch.logprobs[i, start - 1 : n - 1], logprobs, 1e-5)
        flat_close(batch.values[i, start - 1 : n - 1], tensor(values[-1]), 1e-5)
        kl = (logprobs - ref).sum().item()
        expected = {
            "objective/scores": score, "objective/kl": kl, "eos_fraction": float(ended),
            "objective/rlhf_reward": score - cfg.kl_coef * kl,
            "objective/entropy": -logprobs.sum().item(), "response_length": n - start,
        }
        for key, x in expected.items():
            assert statistics[key][i].item() == pytest.approx(x, abs=1e-4), key
        to_come = sum(rewards[-1])  # lam 0.95 mixes; at the last token the return is the reward
        assert batch.returns[i, n - 2].item() == pytest.approx(rewards[-1][-1], abs=1e-4)
        assert statistics["objective/rlhf_reward"][i].item() == pytest.approx(to_come, abs=1e-4)
    own = batch.mask > 0
    assert batch.advantages[own].mean().abs() < 1e-5 and not batch.advantages[~own].any()
    assert batch.advantages[own].var(correction=0).item() == pytest.approx(1, abs=1e-4)


def test_rollout_returns_are_gae_of_its_rewards(models, prompts, cfg):
    """With lam 1 and no discount a return is the reward still to come, of a reward (3)."""
    cfg.lam, cfg.kl_coef = 1.0, 0.0
    batch, statistics = rlhf.rollout(models, prompts, 0, cfg)
    expected = statistics["objective/scores"][:, None] * batch.mask
    torch.testing.assert_close(batch.returns, expected, atol=1e-4, rtol=0)


def test_rollouts_are_sampled_from_what_is_scored(models, cfg):
    """No temperature, no truncation: first tokens come as often as their log-probs say."""
    cfg.max_new_tokens, cfg.microbatch_size, n = 1, 10_000, 10_000
    batch, _ = rlhf.rollout(models, [[3, 1]] * n, 0, cfg)
    tokens, logprobs = batch.tokens[:, 2], batch.logprobs[:, 1]
    for token in range(11):
        p = models.policy(tensor([[3, 1]]))[0, -1].softmax(0)[token].item()
        own = tokens == token
        assert own.sum().item() / n == pytest.approx(p, abs=5 * (p * (1 - p) / n) ** 0.5)
        torch.testing.assert_close(logprobs[own].exp(), torch.full((int(own.sum()),), p))


def test_kl_is_zero_at_first_and_positive_later(policy, models, prompts, cfg):
    at_first = models._replace(ref=copy.deepcopy(policy))
    assert not rlhf.rollout(at_first, prompts, 0, cfg)[1]["objective/kl"].any()
    cfg.microbatch_size = 100
    _, statistics = rlhf.rollout(models, prompts * 50, 0, cfg)
    assert statistics["objective/kl"].mean() > 0.1


def test_missing_eos_replaces_the_score(models, prompts, cfg):
    cfg.missing_eos_score, cfg.kl_coef = -7.0, 0.0
    batch, statistics = rlhf.rollout(models, prompts * 20, 0, cfg)
    lens = tensor([len(prompt) for prompt in prompts * 20]) + batch.mask.sum(1).long()
    ended = batch.tokens[torch.arange(len(lens)), lens - 1] == 0
    assert 0 < ended.sum() < len(ended)
    assert (statistics["objective/scores"][~ended] == -7).all()
    scores = rlhf.sequence_scores(models.reward, batch.tokens, lens)
    flat_close(statistics["objective/scores"][ended], scores[ended].detach(), 1e-5)
    assert torch.equal(statistics["eos_fraction"], ended.float())


def test_entropy_of_a_uniform_policy(models, prompts, cfg):
    """log V a token, summed over the response."""
    torch.nn.init.zeros_(models.policy.wte.weight)
    _, statistics = rlhf.rollout(models, prompts, 0, cfg)
    expected = statistics["response_length"] * math.log(11)
    torch.testing.assert_close(statistics["objective/entropy"], expected)


# ---- the update --------------------------------------------------------------------------------

@pytest.mark.parametrize("microbatch_size", [1, 2, 4, 6])
def test_ratio_is_exactly_one_before_the_first_update(
    models, prompts, cfg, monkeypatch, microbatch_size
):
    """(5) log pi of the first minibatch is log pi_old, to the bit."""
    same, policy_loss = [], rlhf.policy_loss

    def compare(new, old, advantages, mask, *rest):
        same.append(torch.equal(new * mask, old * mask))
        return policy_loss(new, old, advantages, mask, *rest)

    monkeypatch.setattr(rlhf, "policy_loss", compare)
    cfg.microbatch_size, cfg.minibatch_size = microbatch_size, 4
    batch, _ = rlhf.rollout(models, prompts, 0, cfg)
    stats = ppo_backward(models, batch, rlhf.minibatches(torch.arange(6), cfg)[0], cfg)
    assert same == [True] * math.ceil(4 / microbatch_size)
    assert stats["val/ratio"] == pytest.approx(1, abs=1e-6)
    assert stats["policy/approxkl"] == stats["policy/clipfrac"] == 0


def test_ratio_that_is_not_one_stops_the_run(models, episodes, text, cfg):
    batch, _ = episodes
    wrong = batch._replace(logprobs=batch.logprobs - 0.01 * batch.mask)
    with pytest.raises(UserError, match="ratio 1.01.* before the first update"):
        update_once(models, wrong, text, cfg)


def update_once(models, batch, text, cfg, factor=1.0):
    optimizers = rlhf.adam(models.policy), rlhf.adam(models.value)
    rng = np.random.default_rng(7)
    return rlhf.ppo_update(models, optimizers, batch, text, factor, rng, cfg)


@pytest.fixture
def steps(monkeypatch) -> list:
    """Every call of `update`, as (model, gradient, learning rate); the calls go through."""
    calls, update = [], rlhf.update

    def record(model, optimizer, learning_rate):
        grads = [p.grad.flatten() for p in model.parameters() if p.grad is not None]
        calls.append((model, torch.cat(grads), learning_rate))
        return update(model, optimizer, learning_rate)

    monkeypatch.setattr(rlhf, "update", record)
    return calls


def ppo_gradients(models, batch, cfg):
    ppo_backward(models, batch, rlhf.minibatches(torch.arange(len(batch.tokens)), cfg)[0], cfg)
    return gradients(models.policy), gradients(models.value)


def test_ppo_ptx_gradient_is_the_sum_of_the_two(models, episodes, text, cfg, steps):
    """(7) grad (5) + ptx_coef grad (1), in one step; the value network's is that of (6) alone."""
    batch, _ = episodes
    cfg.ptx_coef, cfg.ptx_ratio = 3.0, 2.0
    ppo, value = ppo_gradients(models, batch, cfg)
    rows = rlhf.passages(text, 12, cfg.window, np.random.default_rng(7))
    rows = [tensor(ids.astype(np.int64)) for ids, _ in rows]
    logprobs = [models.policy(ids[None])[0, :-1].log_softmax(-1) for ids in rows]
    taken = [x.gather(1, ids[1:, None]) for x, ids in zip(logprobs, rows)]
    (-torch.cat(taken).mean()).backward()  # of all tokens but the first of each document
    ptx = gradients(models.policy)
    update_once(models, batch, text, cfg)
    (policy_model, both, _), (value_model, own, _) = steps
    assert policy_model is models.policy and value_model is models.value
    flat_close(both, ppo + 3.0 * ptx, 1e-5)
    flat_close(own, value)
    assert ptx.abs().max() > 1e-3 and ppo.abs().max() > 1e-3


def test_without_ptx_the_text_is_not_touched(models, episodes, cfg, steps):
    """(7) ptx_coef 0 is plain PPO, to the bit."""
    batch, _ = episodes
    cfg.ptx_coef = 0.0
    ppo, _ = ppo_gradients(models, batch, cfg)
    stats = update_once(models, batch, None, cfg)
    assert torch.equal(steps[0][1], ppo) and "loss/ptx" not in stats


def test_ptx_text_moves_on(models, episodes, text, cfg, monkeypatch):
    """(7) each step has rows of its own, ptx_ratio of them an episode."""
    seen, passages = [], rlhf.passages
    monkeypatch.setattr(rlhf, "passages", lambda *a: seen.append(passages(*a)) or seen[-1])
    cfg.minibatch_size, cfg.ptx_ratio, cfg.epochs = 2, 4.0, 2
    batch, _ = episodes
    update_once(models, batch, text, cfg)
    assert [len(rows) for rows in seen] == [8] * 6
    assert len({str(rows) for rows in seen}) == 6


@pytest.mark.parametrize("microbatch_size", [1, 4, 5])
def test_microbatches_change_nothing_in_ppo(models, episodes, cfg, microbatch_size):
    """(5), (6) gradients and statistics of ragged rows; memory alone differs."""
    batch, _ = episodes
    drift, move = torch.randn(2, *batch.mask.shape)
    drifted = batch._replace(logprobs=batch.logprobs + 0.3 * batch.mask * drift,
                             values=batch.values + 0.5 * move)
    results = []
    for size in (6, microbatch_size):
        cfg.microbatch_size = size
        rows = rlhf.minibatches(torch.arange(6), cfg)[0]
        assert len(rows) == math.ceil(6 / size)
        stats = ppo_backward(models, drifted, rows, cfg)
        stats = tensor([*stats.values()])
        results.append((gradients(models.policy), gradients(models.value), stats))
    for whole, parts in zip(*results):
        flat_close(parts, whole, 2e-6)
    assert results[0][2].abs().min() > 0  # every statistic, clipfrac too, has something to show


@pytest.mark.parametrize("microbatch_size", [1, 3])
def test_microbatches_change_nothing_in_lm(policy, prompts, cfg, microbatch_size):
    """(1) gradient and value, by the number of tokens and not of rows."""
    rows, results = [(prompt + [1, 2, 0], len(prompt)) for prompt in prompts], []
    rows.append(([5, 0], 1))
    for cfg.microbatch_size in (100, microbatch_size):
        loss = rlhf.lm_pass(policy, rows, cfg, 2.0)
        results.append((gradients(policy), tensor(loss)))
    for whole, parts in zip(*results):
        flat_close(parts, whole, 2e-6)


def comparisons(prompts) -> list[dict]:
    """K from 2 to 7, ties among them, and one prompt with nothing else."""
    rows = [{"ids": [[3, 4], [5, 6]], "ranks": [0, 0]}]
    for k, prompt in enumerate(prompts, 2):
        ranks = [j // (1 + k % 2) for j in range(k)]
        rows.append({"ids": [prompt + [j, 0] for j in range(k)], "ranks": ranks})
    return rows


@pytest.mark.parametrize("microbatch_size", [1, 27])
def test_microbatches_change_nothing_in_rm(reward_model, prompts, tmp_path, microbatch_size):
    """(2) gradient and value: prompts weigh the same whoever they share a pass with."""
    cfg, results = settings(rlhf.RM, tmp_path), []
    for cfg.microbatch_size in (1000, microbatch_size):
        loss = rlhf.rm_backward(reward_model, comparisons(prompts), cfg)
        results.append((gradients(reward_model), tensor(loss)))
    for whole, parts in zip(*results):
        flat_close(parts, whole, 2e-6)


def test_rm_scores_each_completion_once(reward_model, prompts, tmp_path, monkeypatch):
    """(2) K forward passes of a row for C(K,2) pairs."""
    rows, batch = [], comparisons(prompts)
    reward_model.register_forward_hook(lambda module, args, out: rows.append(len(args[0])))
    rlhf.rm_backward(reward_model, batch, settings(rlhf.RM, tmp_path))
    assert sum(rows) == sum(len(row["ids"]) for row in batch)


@pytest.mark.parametrize("microbatch_size", [1, 27])
def test_microbatches_change_nothing_in_dpo(models, prompts, tmp_path, microbatch_size):
    """(8) gradient and value, against (2) of the sums of log-ratios taken row by row, alone."""
    cfg, batch = settings(rlhf.DPO, tmp_path, microbatch_size=microbatch_size), []
    for row, prompt in zip(comparisons(prompts), [[3], *prompts]):
        batch.append({**row, "ids": [(ids, len(prompt)) for ids in row["ids"]]})
    rewards, ranks, groups = [], [], []
    for i, row in enumerate(batch):
        for ids, start in row["ids"]:
            logs = [net(tensor([ids]))[0, :-1].log_softmax(-1).gather(1, tensor(ids)[1:, None])
                    for net in (models.policy, models.ref)]
            rewards.append(cfg.beta * (logs[0] - logs[1].detach())[start - 1 :].sum())
            groups.append(i)
        ranks += row["ranks"]
    loss = rlhf.pairwise_loss(torch.stack(rewards), tensor(ranks), tensor(groups))
    loss.backward()
    expected = gradients(models.policy), loss.detach()
    models.ref.requires_grad_(False)
    score = functools.partial(rlhf.implicit_scores, models.ref)
    loss = rlhf.rm_backward(models.policy, batch, cfg, score)
    for own, other in zip((gradients(models.policy), tensor(loss)), expected):
        flat_close(own, other, 2e-6)


@pytest.mark.parametrize("epochs, size, count", [(1, 6, 1), (1, 2, 3), (3, 2, 9), (2, 4, 4)])
def test_optimizer_steps_of_an_iteration(models, episodes, text, cfg, steps, epochs, size, count):
    """epochs x minibatches, each of both networks."""
    cfg.epochs, cfg.minibatch_size = epochs, size
    batch, _ = episodes
    update_once(models, batch, text, cfg)
    assert [model for model, _, _ in steps] == [models.policy, models.value] * count


def test_every_row_once_an_epoch(cfg):
    """In the order given, cut into steps and these into microbatches."""
    cfg.minibatch_size, cfg.microbatch_size = 4, 2
    a, b, c, d, e, f = order = torch.randperm(6).tolist()
    assert rlhf.minibatches(tensor(order), cfg) == [[[a, b], [c, d]], [[e, f]]]


def test_epochs_take_every_row_in_a_new_order(models, episodes, cfg, monkeypatch):
    seen, backward = [], rlhf.ppo_backward

    def record(models, batch, microbatches, cfg):
        seen.append(sum(microbatches, []))
        return backward(models, batch, microbatches, cfg)

    monkeypatch.setattr(rlhf, "ppo_backward", record)
    cfg.epochs, cfg.minibatch_size, cfg.ptx_coef = 4, 2, 0.0
    update_once(models, episodes[0], None, cfg)
    epochs = [seen[i : i + 3] for i in range(0, 12, 3)]
    assert all(sorted(sum(epoch, [])) == list(range(6)) for epoch in epochs)
    assert len({str(sorted(map(sorted, epoch))) for epoch in epochs}) > 1


def test_who_is_trained_and_who_is_not(models, episodes, text, cfg):
    """Reference and reward model stay, bit by bit; policy, value network and average move."""
    before = [weights(model) for model in models]
    update_once(models, episodes[0], text, cfg)
    after = [weights(model) for model in models]
    same = {name: torch.equal(a, b) for name, a, b in zip(models._fields, before, after)}
    assert same == {"policy": False, "ref": True, "reward": True, "value": False, "ema": False}
    left = [p.grad for model in models for p in model.parameters() if p.grad is not None]
    assert not any(grad.any() for grad in left)


def test_ppo_update_keeps_the_average(models, episodes, text, cfg):
    cfg.ema_decay = 0.75
    before = weights(models.ema)
    update_once(models, episodes[0], text, cfg)
    torch.testing.assert_close(weights(models.ema), 0.75 * before + 0.25 * weights(models.policy))


def test_clip_takes_effect_once_the_policy_has_moved(models, episodes, text, cfg):
    """With several steps a rollout, ratios leave 1 and the clip works; approxkl is positive."""
    cfg.minibatch_size, cfg.epochs, cfg.ptx_coef, cfg.learning_rate = 2, 4, 0.0, 0.02
    cfg.max_kl = 1e9
    stats = update_once(models, episodes[0], None, cfg)
    assert stats["policy/clipfrac"] > 0 and stats["policy/approxkl"] > 0 and stats["val/ratio"] != 1


def test_update_improves_what_it_is_to_improve(models, episodes, cfg):
    """(5), (6) a small step raises the probability of good tokens and lowers the values' error."""
    batch, _ = episodes
    cfg.ptx_coef, cfg.learning_rate, cfg.value_learning_rate = 0.0, 1e-3, 1e-3
    update_once(models, batch, None, cfg)
    new = token_logprobs(models.policy, batch.tokens, batch.mask)
    assert (batch.advantages * (new - batch.logprobs)).sum() > 0
    error = [((v - batch.returns)[batch.mask > 0] ** 2).mean() for v in
             (models.value(batch.tokens[:, :-1]), batch.values)]
    assert error[0] < error[1]


def test_explained_variance(models, episodes, cfg):
    """1 - mean (V - R)^2 / var R, over response tokens, of the values before the step."""
    batch, _ = episodes
    cfg.ptx_coef = 0.0
    stats = update_once(models, batch, None, cfg)
    own = batch.mask > 0
    r, v = batch.returns[own], batch.values[own]
    expected = 1 - ((v - r) ** 2).mean() / r.var(correction=0)
    assert stats["val/var_explained"] == pytest.approx(expected.item(), abs=1e-4)


# ---- plumbing ----------------------------------------------------------------------------------

def test_ema_closed_form():
    """From 0 towards a constant 1: 1 - 0.992^n, after 125 updates 0.6336; it has no gradient."""
    ema, new = torch.nn.Linear(1, 1), torch.nn.Linear(1, 1)
    for model, value in ((ema, 0.0), (new, 1.0)):
        for parameter in model.parameters():
            torch.nn.init.constant_(parameter, value)
    for _ in range(125):
        rlhf.ema_update(ema, new, 0.992)
    assert ema.weight.item() == pytest.approx(1 - 0.992**125, abs=1e-5)
    assert ema.bias.item() == pytest.approx(0.6336, abs=1e-4)
    assert ema.weight.grad is None and (new.weight == 1).all()


def test_update_clips_steps_and_forgets(policy):
    """The norm that the optimizer meets is at most 1, the norm that is reported is the true one."""
    optimizer, norms = rlhf.adam(policy), []
    optimizer.register_step_pre_hook(lambda *_: norms.append(
        torch.cat([p.grad.flatten() for p in policy.parameters()]).norm().item()))
    for scale in (1e4, 1e-3):
        loss = scale * policy(tensor([[1, 2, 3]])).pow(2).mean()
        loss.backward()
        true = torch.cat([p.grad.flatten() for p in policy.parameters()]).norm().item()
        assert rlhf.update(policy, optimizer, 0.123) == pytest.approx(true, rel=1e-4)
        assert norms[-1] == pytest.approx(min(true, 1), rel=1e-3)
        assert not any(p.grad is not None and p.grad.any() for p in policy.parameters())
    assert optimizer.param_groups[0]["lr"] == 0.123 and norms[-1] < 1 < true * 1e6


@pytest.mark.parametrize("bad", [math.nan, math.inf])
def test_update_refuses_a_loss_that_is_not_finite(policy, bad):
    before, optimizer = weights(policy), rlhf.adam(policy)
    (bad * policy(tensor([[1, 2]])).sum()).backward()
    with pytest.raises(UserError, match="not finite"):
        rlhf.update(policy, optimizer, 0.1)
    assert torch.equal(weights(policy), before)


def test_adam_is_the_papers(policy):
    group = rlhf.adam(policy).param_groups[0]
    assert group["betas"] == (0.9, 0.95) and group["eps"] == 1e-8 and group["weight_decay"] == 0
    assert sum(p.numel() for p in group["params"]) == weights(policy).numel()


@pytest.mark.parametrize("progress, factor", [(0, 1), (0.5, 0.55), (1, 0.1)])
def test_cosine(progress, factor):
    assert rlhf.cosine(progress) == pytest.approx(factor)


@pytest.mark.parametrize("warmup", [0, 0.25])
def test_fit_warms_up_and_cools_down(policy, prompts, tmp_path, steps, warmup):
    """A step a batch; the rate of the settings times warmup, then the cosine to a tenth."""
    cfg = settings(rlhf.SFT, tmp_path, learning_rate=0.01)
    batches = [[(prompts[1], 1)]] * 20
    rlhf.fit(policy, batches, rlhf.lm_pass, cfg, np.random.default_rng(0), warmup)
    rates = [rate for _, _, rate in steps]
    for step, rate in enumerate(rates):
        cosine = 0.1 + 0.45 * (1 + math.cos(math.pi * step / 20))
        expected = min(cosine, (step + 1) / 5) if warmup else cosine
        assert rate == pytest.approx(0.01 * expected, rel=1e-6)
    assert len(rates) == 20
    lines = (tmp_path / "out/sft/metrics.jsonl").read_text().splitlines()
    assert [json.loads(line)["step"] for line in lines] == list(range(1, 21))
    assert json.loads((tmp_path / "out/sft/settings.json").read_text())["learning_rate"] == 0.01


def test_epochs_are_permutations():
    batches = rlhf.epochs(list(range(10)), 3, 4, np.random.default_rng(0))
    assert [len(batch) for batch in batches] == [4, 4, 2] * 3
    orders = [sum(batches[i : i + 3], []) for i in (0, 3, 6)]
    assert all(sorted(order) == list(range(10)) for order in orders) and orders[0] != orders[1]


@pytest.mark.parametrize("network", [gpt, scalar])
def test_checkpoint_round_trip(network, tmp_path):
    """Plain types and tensors in one file; comes back in eval mode, bit by bit."""
    cfg, model = settings(rlhf.SFT, tmp_path, data="", out=str(tmp_path), name="m"), network()
    rlhf.save(cfg, model)
    again = rlhf.load(cfg, "m", type(model))
    assert vars(again.config) == vars(model.config) and not again.training
    assert torch.equal(weights(model), weights(again))
    assert rlhf.load(cfg, str(tmp_path / "m.pt"), type(model), dropout=0.25).config.dropout == 0.25
    assert [path.name for path in tmp_path.iterdir()] == ["m.pt"]
    content = torch.load(tmp_path / "m.pt", weights_only=True)
    assert content["kind"] == type(model).__name__ and type(content["config"]) is dict


BROKEN = {  # of the file's bytes, or of its content
    "empty": lambda whole, content: b"", "text": lambda whole, content: b"hello, no checkpoint\n",
    "half": lambda whole, content: whole[: len(whole) // 2],
    "other": lambda whole, content: {"a": 1},
    "list": lambda whole, content: [1, 2], "tensor": lambda whole, content: torch.ones(3),
    "shape": lambda whole, content: {**content, "config": {**content["config"], "n_embd": 32}},
    "code": lambda whole, content: {**content, "kind": argparse.Namespace()},
    "field": lambda whole, content: {**content, "config": {"width": 3}},
    "weights": lambda whole, content: {**content, "model": None},
}


@pytest.mark.parametrize("name", BROKEN)
def test_broken_checkpoint(tmp_path, policy, name):
    """One sentence with the path in it, for each way to be broken; code in it is not run."""
    cfg = settings(rlhf.SFT, tmp_path, data="", out=str(tmp_path), name="good")
    rlhf.save(cfg, policy)
    content = torch.load(tmp_path / "good.pt", weights_only=True)
    data, path = BROKEN[name]((tmp_path / "good.pt").read_bytes(), content), tmp_path / f"{name}.pt"
    path.write_bytes(data) if isinstance(data, bytes) else torch.save(data, path)
    sentence = "is not a (whole )?checkpoint|holds more than tensors"
    with pytest.raises(UserError, match=f"{name}.pt ({sentence})"):
        rlhf.load(cfg, name)


def test_checkpoint_of_another_kind_or_none(tmp_path, policy):
    cfg = settings(rlhf.SFT, tmp_path, data="", out=str(tmp_path), name="good")
    rlhf.save(cfg, policy)
    with pytest.raises(UserError, match="good.pt holds a GPT, where a ScalarModel is needed"):
        rlhf.load(cfg, "good", rlhf.ScalarModel)
    with pytest.raises(UserError, match="missing.pt is not there"):
        rlhf.load(cfg, "missing")


def test_a_checkpoint_that_would_run_code_does_not(tmp_path, policy):
    class Evil:
        def __reduce__(self):
            return os.mkdir, (str(tmp_path / "ran"),)

    cfg = settings(rlhf.SFT, tmp_path, data="", out=str(tmp_path), name="good")
    rlhf.save(cfg, policy)
    content = torch.load(tmp_path / "good.pt", weights_only=True)
    torch.save(content | {"config": Evil()}, tmp_path / "evil.pt")
    (tmp_path / "evil2.pt").write_bytes(pickle.dumps(Evil()))
    for name in ("evil", "evil2"):
        with pytest.raises(UserError, match=f"{name}.pt (holds more than tensors|is not a whole)"):
            rlhf.load(cfg, name)
    assert not (tmp_path / "ran").exists()


@pytest.mark.parametrize("step", [1009, pytest.param(11, marks=pytest.mark.slow)])
def test_a_garbled_checkpoint_is_refused_or_whole(tmp_path, policy, step):
    """Bits turned or the end cut off, all over the file: no other weights, no other exception."""
    cfg = settings(rlhf.SFT, tmp_path, data="", out=str(tmp_path), name="good")
    rlhf.save(cfg, policy)
    whole, refused = (tmp_path / "good.pt").read_bytes(), 0
    directory = ZipFile(tmp_path / "good.pt").start_dir  # of it every bit, in the slow test
    places = [*range(0, 8 * directory, step), *range(8 * directory, 8 * len(whole), step // 11)]
    for number, place in enumerate(places):
        content = bytearray(whole)
        content[place // 8] ^= 1 << place % 8
        (tmp_path / "bad.pt").write_bytes(content if number % 10 else whole[: place // 8])
        try:
            assert torch.equal(weights(rlhf.load(cfg, "bad")), weights(policy)), place
        except UserError as error:
            assert "bad.pt" in str(error) and "\n" not in str(error)
            refused += 1
    assert refused > 0.6 * len(places)


@pytest.mark.parametrize("field, place, bit", [
    ("how it is packed", 10, 3), ("attributes: a folder", 38, 4), ("name: that of another", -1, 0)])
def test_a_garbled_directory_is_refused(tmp_path, policy, field, place, bit):
    """A bit in the entry of the first tensor, which torch would read without a word."""
    cfg = settings(rlhf.SFT, tmp_path, data="", out=str(tmp_path), name="good")
    rlhf.save(cfg, policy)
    content = bytearray((tmp_path / "good.pt").read_bytes())
    name = content.rindex(b"archive/data/0")
    start = content.rindex(b"PK\1\2", 0, name)  # APPNOTE.TXT 4.3.12: its signature, then fields
    content[name + len(b"archive/data/0") - 1 if place < 0 else start + place] ^= 1 << bit
    (tmp_path / "bad.pt").write_bytes(content)
    with pytest.raises(UserError, match="bad.pt is not a whole checkpoint"):
        rlhf.load(cfg, "bad")


def test_shapes_are_checked_before_memory_is_taken(tmp_path, policy):
    """A config of a trillion parameters is a sentence, at once."""
    cfg = settings(rlhf.SFT, tmp_path, data="", out=str(tmp_path), name="good")
    rlhf.save(cfg, policy)
    content = torch.load(tmp_path / "good.pt", weights_only=True)
    for field in ("vocab_size", "block_size", "n_embd"):
        config = content["config"] | {field: 2**32}
        torch.save(content | {"config": config}, tmp_path / "huge.pt")
        with pytest.raises(UserError, match="huge.pt is not a checkpoint of this program: .*size"):
            rlhf.load(cfg, "huge")
    torch.save(content | {"config": content["config"] | {"n_layer": 2**32}}, tmp_path / "huge.pt")
    with pytest.raises(UserError, match="huge.pt is not a checkpoint .*: no 4294967296 layers"):
        rlhf.load(cfg, "huge")


def test_a_model_is_not_fed_the_tokens_of_another_vocabulary(tmp_path, tiny_data, tokenizer):
    """Neither of another size nor of the same one; where only the size is known, that counts."""
    other = tmp_path / "other"
    other.mkdir()
    lines = (tiny_data / "tokenizer.tiktoken").read_text().splitlines()
    (a, rank_a), (b, rank_b) = (line.split() for line in lines[-2:])
    lines[-2:] = [f"{a} {rank_b}", f"{b} {rank_a}"]
    (other / "tokenizer.tiktoken").write_text("\n".join(lines))
    cfg = settings(rlhf.SFT, tmp_path, data=str(tiny_data), out=str(tmp_path), name="own")
    for known in (fingerprint(tokenizer), ""):
        model = gpt(vocab_size=tokenizer.n_vocab, vocabulary=known)
        rlhf.save(cfg, model)
        assert torch.equal(weights(rlhf.load(cfg, "own")), weights(model))
        cfg.data = str(other)
        if known:
            with pytest.raises(UserError, match="own.pt was trained on another vocabulary than"):
                rlhf.load(cfg, "own")
        cfg.data = str(tiny_data)
    rlhf.save(cfg, gpt(vocab_size=tokenizer.n_vocab - 1))
    with pytest.raises(UserError, match="own.pt was trained on another vocabulary than"):
        rlhf.load(cfg, "own")


# ---- data --------------------------------------------------------------------------------------

def write_lines(path, *rows):
    lines = [row if isinstance(row, str) else json.dumps(row, ensure_ascii=False) for row in rows]
    path.write_text("\n".join(lines) + "\n", encoding="utf-8")
    return path


MESSAGES = [{"role": "user", "content": "Hi."}, {"role": "assistant", "content": "Yes?"},
            {"role": "user", "content": "Go on."}]


def test_every_way_to_write_a_row(tmp_path, tokenizer):
    path = write_lines(
        tmp_path / "rows.jsonl",
        {"prompt": "A", "completions": ["b", "c"], "ranks": [1, 1]},
        {"prompt": "A", "completions": ["b", "c", "d"]},
        {"prompt": "A", "chosen": "b", "rejected": "c"},
        {"messages": MESSAGES, "chosen": "b", "rejected": "c"},
    )
    rows = read_rows(path, tokenizer, 100, "prompt", "completions", "ranks")
    assert [row["ranks"] for row in rows] == [[1, 1], [0, 1, 2], [0, 1], [0, 1]]
    assert rows[3]["prompt"] == "\n\nHuman: Hi.\n\nAssistant: Yes?\n\nHuman: Go on.\n\nAssistant:"
    for row in rows:
        for ids, completion in zip(row["ids"], row["completions"], strict=True):
            n = len(row["prompt_ids"])
            assert ids[:n] == row["prompt_ids"] == tokenizer.encode_ordinary(row["prompt"])
            assert ids[n:] == tokenizer.encode_ordinary(completion) + [tokenizer.eot_token]


def test_prompt_is_a_prefix_of_every_row(tiny_data, tokenizer):
    """Tokens are joined, not text: no merge crosses from the prompt into the completion."""
    for ids, n in rlhf.read_demonstrations(tiny_data / "sft.jsonl", tokenizer, 256):
        assert tokenizer.decode(ids[:n]).endswith("Assistant:") and ids[-1] == tokenizer.eot_token


def test_joined_text_would_have_merged(tmp_path, tokenizer):
    path = write_lines(tmp_path / "rows.jsonl", {"prompt": "The go", "completion": "at eats."})
    (row,) = read_rows(path, tokenizer, 100, "prompt", "completion")
    assert len(tokenizer.encode_ordinary(" goat")) == 1
    assert row["ids"][0][:-1] != tokenizer.encode_ordinary("The goat eats.")
    assert tokenizer.decode(row["ids"][0][:-1]) == "The goat eats."


GOOD = {"prompt": "A", "chosen": "b", "rejected": "c"}
BAD = [
    ('{"prompt": "A", ', "line 2"), ({"completions": ["a", "b"]}, "prompt"),
    ({"prompt": 5, "completions": ["a", "b"]}, "prompt"),
    ({"prompt": "A", "completions": "a"}, "completions"),
    ({"prompt": "A", "chosen": "b"}, "rejected"),
    ({"messages": "Hi", "chosen": "b", "rejected": "c"}, "line 2"),
    ({"messages": [{"role": "robot", "content": "x"}], "chosen": "b", "rejected": "c"}, "robot"),
    ({"messages": [{"role": "user"}], "chosen": "b", "rejected": "c"}, "content"),
    ({"prompt": "A", "completions": ["a", "b"], "ranks": 1}, "ranks"),
    ({"prompt": None, "completions": ["a", "b"]}, "prompt"), ("5", "line 2"),
    ("null", "line 2"),
    ("[1, 2]", "line 2"), ('"text"', "line 2"),
    ({"prompt": "A", "completions": ["a", 5]}, "completions"),
    ({**GOOD, "ranks": [0, 1, 2]}, "ranks"),
    ({**GOOD, "ranks": ["1", "2"]}, "ranks"),
]


@pytest.mark.parametrize("row, names", BAD)
def test_bad_rows_are_named(tmp_path, tokenizer, row, names):
    """File, line and field, in one sentence."""
    path = write_lines(tmp_path / "rows.jsonl", GOOD, row)
    with pytest.raises(UserError) as error:
        read_rows(path, tokenizer, 100, "prompt", "completions", "ranks")
    assert all(part in str(error.value) for part in (str(path), "line 2", names))


def test_files_that_cannot_be_read(tmp_path, tokenizer):
    (tmp_path / "latin.jsonl").write_bytes(b'{"prompt": "caf\xe9"}\n')
    (tmp_path / "empty.jsonl").write_text("")
    for name in ("missing.jsonl", "latin.jsonl", "empty.jsonl"):
        with pytest.raises(UserError, match=name):
            read_rows(tmp_path / name, tokenizer, 100, "prompt")


def test_line_separators_inside_a_string_part_no_rows(tmp_path, tokenizer):
    """A JSON string may hold U+2028 and its like; only a newline ends a line."""
    path = write_lines(tmp_path / "rows.jsonl", {"prompt": "a\u2028b\u0085c"}, {"prompt": "d"})
    rows = read_rows(path, tokenizer, 100, "prompt")
    assert [row["prompt"] for row in rows] == ["a\u2028b\u0085c", "d"]


def test_rows_that_are_too_long_are_left_out(tmp_path, tokenizer, capsys):
    path = write_lines(tmp_path / "rows.jsonl", {"prompt": "a " * 200}, {"prompt": "b"})
    assert [row["prompt"] for row in read_rows(path, tokenizer, 50, "prompt")] == ["b"]
    assert "1 of 2 rows" in capsys.readouterr().out
    with pytest.raises(UserError, match="rows.jsonl has no row"):
        read_rows(path, tokenizer, 0, "prompt")


def test_text_cannot_forge_a_control_token(tmp_path, tokenizer):
    path = write_lines(tmp_path / "rows.jsonl", {"prompt": f"a{EOT}b", "completion": f"{EOT} c"})
    (row,) = read_rows(path, tokenizer, 100, "prompt", "completion")
    *ids, last = row["ids"][0]
    assert last == tokenizer.eot_token and last not in ids and last not in row["prompt_ids"]
    assert tokenizer.decode(ids) == f"a{EOT}b{EOT} c"


def test_pretraining_text(tmp_path, tokenizer):
    """Documents end in EOS, where the text has the mark; ids are kept beside it, and renewed."""
    path = tmp_path / "pretrain.txt"
    for text in (f"The goat.{EOT}The hen.{EOT}", f"Moo.{EOT}"):
        path.write_text(text)
        os.utime(path, (2e9 + len(text), 2e9 - len(text)))
        (tmp_path / "pretrain.npy").unlink(missing_ok=True)
        assert documents(path, tokenizer) == [f"{part}{EOT}" for part in text.split(EOT) if part]
    path.write_text(f"Baa.{EOT}")
    os.utime(path, (4e9, 4e9))
    assert documents(path, tokenizer) == [f"Baa.{EOT}"] == documents(path, tokenizer)


def documents(path, tokenizer) -> list[str]:
    return [tokenizer.decode(ids.tolist()) for ids in rlhf.read_pretraining(path, tokenizer)]


def test_passages_are_documents_or_stretches_of_them(text):
    rows = rlhf.passages(text, 2000, 6, np.random.default_rng(0))
    every = {ids[i : i + 6].tobytes() for ids in text for i in range(max(1, len(ids) - 5))}
    assert {ids.tobytes() for ids, _ in rows} == every
    assert {prompt_len for _, prompt_len in rows} == {1} and len(rows) == 2000


# ---- the stages, on a fable of a few rows ------------------------------------------------------

@pytest.fixture(scope="session")
def chain(tiny_data, tmp_path_factory):
    """(out, settings of a stage): one stage after the other, a few steps of each."""
    rlhf.PRESETS["test"] = PRESET
    folder = tmp_path_factory.mktemp("chain")

    def of(kind, **fields):
        fields = {"data": str(tiny_data), "out": str(folder), "max_new_tokens": 8, **fields}
        return settings(kind, folder, **fields)

    torch.manual_seed(0)
    rlhf.pretrain(of(rlhf.Pretrain, preset="test", steps=4, batch_size=4))
    rlhf.sft(of(rlhf.SFT, epochs=2, batch_size=4))
    rlhf.sft(of(rlhf.SFT, name="ppo_init", epochs=1, batch_size=4, pretrain_fraction=0.1))
    label.label(of(Label))
    for path in tiny_data.glob("comparisons*.jsonl"):  # what such a model writes may all be tied
        rows = [json.loads(line) for line in path.read_text().splitlines()]
        rows[0]["ranks"] = [*range(len(rows[0]["ranks"]))]
        path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    rlhf.rm(of(rlhf.RM, batch_size=4))
    for name, ptx_coef in (("ppo", 0.0), ("ppo_ptx", 0.5)):
        rlhf.ppo(of(rlhf.PPO, name=name, iterations=2, rollout_size=4, minibatch_size=2,
                    ptx_coef=ptx_coef))
    rlhf.evaluate(of(rlhf.Evaluate))
    return folder, of


def test_the_whole_chain(chain, tokenizer):
    """Defaults fit together: each stage finds what the one before has written."""
    folder, of = chain
    made = {path.name for path in folder.glob("*.pt")}
    assert made == {f"{name}.pt" for name in ("gpt", "sft", "ppo_init", "rm", "ppo", "ppo_ptx")}
    table = json.loads((folder / "evaluate.json").read_text())["table"]
    assert list(table) == ["gpt", "gpt+fewshot", "sft", "ppo", "ppo_ptx"]
    assert table["sft"]["win rate"] == 0.5 and len({tuple(row) for row in table.values()}) == 1
    assert all(math.isfinite(x) for row in table.values() for x in row.values())
    assert (folder / "evaluate.md").read_text().count("\n") == 7
    for name in made:
        config = torch.load(folder / name, weights_only=True)["config"]
        assert config["vocabulary"] == fingerprint(tokenizer), "each knows whose tokens it reads"


def test_a_later_round_adds_its_rankings_to_those_before(chain, tiny_data, tmp_path):
    """Once: done again, a round takes its own place, and the first starts anew."""
    out, of = chain
    data = tmp_path / "data"
    shutil.copytree(tiny_data, data)

    def rounds(number, models):
        torch.manual_seed(0)
        label.label(of(Label, data=str(data), round=number, models=models))
        rows = map(json.loads, (data / "comparisons.jsonl").read_text().splitlines())
        return [(row["round"], row["completions"]) for row in rows]

    first = rounds(1, "sft,gpt")
    for models in ("ppo_ptx", "ppo"):
        both = rounds(2, models)
        assert both[: len(first)] == first and len(both) == 2 * len(first)
        assert {number for number, _ in both[len(first) :]} == {2}
    assert rounds(1, "sft,gpt") == first


def test_every_step_of_ppo_is_logged_in_full(chain):
    folder, _ = chain
    lines = (folder / "ppo_ptx/metrics.jsonl").read_text().splitlines()
    lines = [json.loads(line) for line in lines]
    keys = """objective/kl objective/scores objective/rlhf_reward objective/entropy objective/gold
        policy/approxkl policy/clipfrac val/ratio val/clipfrac val/error val/var_explained
        loss/policy loss/value loss/ptx eos_fraction response_length heldout/loss step
        seconds""".split()
    assert [line["step"] for line in lines] == [1, 2] and set(keys) <= set(lines[0])
    assert lines[0]["objective/kl"] == 0 != lines[1]["objective/kl"]


def test_rm_starts_from_the_trunk_and_its_demonstrations_score_zero(chain, tiny_data, tokenizer):
    """C.2: the bias is set so that they do on average; the rest is as trained, here not at all."""
    folder, of = chain
    cfg = of(rlhf.RM, name="untrained", learning_rate=0.0)
    rlhf.rm(cfg)
    for name in ("rm", "untrained"):
        model = rlhf.load(cfg, name, rlhf.ScalarModel)
        rows = [ids for ids, _ in rlhf.read_demonstrations(tiny_data / "sft.jsonl", tokenizer, 128)]
        assert rlhf.score_rows(model, rows, cfg).mean().abs() < 1e-5
        rows = read_comparisons(tiny_data / "comparisons.jsonl", tokenizer, 128)[:512]
        scores = rlhf.score_rows(model, [ids for row in rows for ids in row["ids"]], cfg)
        assert torch.equal(model.score_range, torch.stack([scores.min(), scores.max()]))
    assert torch.equal(weights(model.gpt), weights(rlhf.load(cfg, "sft")))
    (folder / "untrained.pt").unlink()


def test_ppo_begins_with_copies(chain, monkeypatch):
    """Value network = reward model, reference = average = policy = --init; nothing in common."""
    _, of = chain
    cfg = of(rlhf.PPO, name="start", iterations=1, rollout_size=4, minibatch_size=4, ptx_coef=0.0)
    seen = []

    def look(models, *rest):
        seen.append((models, [weights(model) for model in models]))
        raise UserError("seen enough")

    monkeypatch.setattr(rlhf, "ppo_update", look)
    with pytest.raises(UserError, match="seen enough"):
        rlhf.ppo(cfg)
    models, (policy, ref, reward, value, ema) = seen[0]
    assert torch.equal(value, reward)
    assert torch.equal(value, weights(rlhf.load(cfg, "rm", rlhf.ScalarModel)))
    assert torch.equal(policy, ref) and torch.equal(policy, ema)
    assert torch.equal(policy, weights(rlhf.load(cfg, "ppo_init")))
    places = Counter(p.data_ptr() for model in models for p in model.parameters())
    assert max(places.values()) == 1 and not any(model.training for model in models)


def test_ppo_warms_up_over_ten_iterations_and_keeps_the_average(chain, monkeypatch):
    """C.4: from a tenth of the rate to all of it; what is saved is the average, not the policy."""
    folder, of = chain
    cfg = of(rlhf.PPO, name="warm", iterations=12, rollout_size=2, minibatch_size=2, ptx_coef=0.0)
    seen, ppo_update = [], rlhf.ppo_update

    def record(models, optimizers, batch, text, factor, rng, cfg):
        metrics = ppo_update(models, optimizers, batch, text, factor, rng, cfg)
        rates = [optimizer.param_groups[0]["lr"] for optimizer in optimizers]
        seen.append((models, factor, *rates))
        return metrics

    monkeypatch.setattr(rlhf, "ppo_update", record)
    rlhf.ppo(cfg)
    expected = [0.1 + 0.09 * i for i in range(10)] + [1, 1]
    for (models, factor, own, value), wanted in zip(seen, expected, strict=True):
        assert factor == pytest.approx(wanted)
        assert own == pytest.approx(wanted * 3e-4) and value == pytest.approx(wanted * 5e-4)
    kept = weights(rlhf.load(cfg, "warm"))
    assert torch.equal(kept, weights(models.ema))
    assert not torch.equal(kept, weights(models.policy))
    (folder / "warm.pt").unlink()


def test_value_network_may_start_elsewhere(chain, monkeypatch):
    """`value_init`: another scalar model than the one that gives the rewards."""
    folder, of = chain
    cfg = of(rlhf.PPO, name="start", iterations=1, rollout_size=4, minibatch_size=4, ptx_coef=0.0,
             value_init="other")
    trunk = rlhf.load(cfg, "rm", rlhf.ScalarModel)
    rlhf.save(of(rlhf.RM, name="other"), rlhf.ScalarModel(trunk.config))
    seen = []

    def look(models, *rest):
        seen.extend(weights(model) for model in (models.reward, models.value))
        raise UserError("seen enough")

    monkeypatch.setattr(rlhf, "ppo_update", look)
    with pytest.raises(UserError, match="seen enough"):
        rlhf.ppo(cfg)
    for own, name in zip(seen, ("rm", "other")):
        assert torch.equal(own, weights(rlhf.load(cfg, name, rlhf.ScalarModel)))
    (folder / "other.pt").unlink()


def test_dpo_begins_at_its_reference_and_leaves_it(chain, tiny_data, tokenizer, monkeypatch):
    """(8) the first loss of a batch that is not all ties is ln 2; the policy is trained and saved,
    the reference left alone; rows are whole, with the length of their prompt."""
    folder, of = chain
    cfg, seen, implicit_scores = of(rlhf.DPO, batch_size=4), [], rlhf.implicit_scores
    own = {tuple(row["prompt_ids"]) for row in
           read_comparisons(tiny_data / "comparisons.jsonl", tokenizer, 128)}

    def look(ref, policy, rows, cfg):
        seen.append((ref, policy))
        assert all(tuple(ids[:n]) in own and ids[-1] == tokenizer.eot_token for ids, n in rows)
        return implicit_scores(ref, policy, rows, cfg)

    monkeypatch.setattr(rlhf, "implicit_scores", look)
    rlhf.dpo(cfg)
    ref, policy = seen[-1]
    assert torch.equal(weights(ref), weights(rlhf.load(cfg, "ppo_init")))
    assert torch.equal(weights(policy), weights(rlhf.load(cfg, "dpo")))
    lines = [json.loads(line) for line in (folder / "dpo/metrics.jsonl").read_text().splitlines()]
    losses = [line["loss"] for line in lines if line["loss"]]
    assert losses[0] == pytest.approx(math.log(2), abs=1e-6)
    assert not torch.equal(weights(rlhf.load(cfg, "dpo")), weights(rlhf.load(cfg, "ppo_init")))
    (folder / "dpo.pt").unlink()


def test_nothing_a_policy_writes_moves_the_cursor(chain, monkeypatch, capsys):
    folder, of = chain
    monkeypatch.setattr(rlhf, "decode", lambda *_: "\x1b]0;title\x07\x1b[2Jhello\r\x9b1A")
    rlhf.ppo(of(rlhf.PPO, name="rude", iterations=1, rollout_size=4, minibatch_size=4))
    (folder / "rude.pt").unlink()
    shown = capsys.readouterr().out
    assert "hello" in shown and all(char.isprintable() or char == "\n" for char in shown)


def test_ppo_stops_when_the_first_kl_is_not_zero(chain, monkeypatch):
    _, of = chain
    rollout = rlhf.rollout

    def drifted(models, *rest):
        models.policy.wte.weight.data.mul_(1.5)
        return rollout(models, *rest)

    monkeypatch.setattr(rlhf, "rollout", drifted)
    with pytest.raises(UserError, match="KL .* it must be 0"):
        rlhf.ppo(of(rlhf.PPO, name="drifted", iterations=1, rollout_size=4, minibatch_size=4))


@pytest.mark.parametrize("scores, kept", [(None, 2), ([1.0, 3.0, 2.0], 1), ([3.0, 2.0, 1.0], 0)])
def test_sft_keeps_the_epoch_that_the_reward_model_likes(chain, monkeypatch, scores, kept):
    """C.1: the best by its score, be the loss as it may; without a reward model the last."""
    folder, of = chain
    after, update, plan = [], rlhf.update, iter(scores or [])

    def record(model, *rest):
        norm = update(model, *rest)
        after.append(weights(model))
        return norm

    monkeypatch.setattr(rlhf, "update", record)
    monkeypatch.setattr(rlhf, "sequence_scores", lambda *_: tensor([next(plan)]))
    cfg = of(rlhf.SFT, name="chosen", epochs=3, batch_size=4, reward_model="rm" if scores else "")
    rlhf.sft(cfg)
    last = after[(kept + 1) * len(after) // 3 - 1]  # of the steps of that epoch
    assert torch.equal(weights(rlhf.load(cfg, "chosen")), last)
    (folder / "chosen.pt").unlink()


def test_sft_scores_samples_when_it_has_a_reward_model(chain):
    folder, of = chain
    rlhf.sft(of(rlhf.SFT, name="scored", epochs=1, batch_size=4, reward_model="rm"))
    lines = (folder / "scored/metrics.jsonl").read_text().splitlines()
    assert {"valid/loss", "valid/score"} <= set(json.loads(lines[-1]))
    (folder / "scored.pt").unlink()


def test_sft_scores_the_prompts_that_leave_room(chain, tiny_data, tokenizer):
    """The longest prompt alone leaves none for so many tokens; then none of them does."""
    folder, of = chain
    valid = rlhf.read_demonstrations(tiny_data / "sft_valid.jsonl", tokenizer, 128)
    lens = [prompt_len for _, prompt_len in valid]
    for longest, fits in ((max(lens) - 1, True), (min(lens) - 1, False)):
        cfg = of(rlhf.SFT, name="roomy", reward_model="rm", epochs=1, max_new_tokens=128 - longest)
        if fits:
            rlhf.sft(cfg)
            (folder / "roomy.pt").unlink()
        else:
            with pytest.raises(UserError, match="no prompt leaves so much room"):
                rlhf.sft(cfg)


def test_stages_repeat_to_the_bit(chain):
    folder, of = chain
    for name in ("one", "two"):
        cfg = of(rlhf.PPO, name=name, iterations=2, rollout_size=4, minibatch_size=2)
        torch.manual_seed(5)
        rlhf.ppo(cfg)
    assert torch.equal(weights(rlhf.load(cfg, "one")), weights(rlhf.load(cfg, "two")))
    for name in ("one", "two"):
        (folder / f"{name}.pt").unlink()


def test_rm_report_by_loop(reward_model, tmp_path):
    """Accuracy over untied pairs, by whether the labeler was seen in training."""
    cfg = settings(rlhf.RM, tmp_path)
    valid = []
    for ranks, who in (([0, 1, 1, 2], "a"), ([3, 0, 1, 2], "a"), ([1, 0, 0, 0], "b")):
        ids = [[1, j, 0] for j in range(2, 6)]
        valid.append({"prompt_ids": [1], "ids": ids, "ranks": ranks, "labeler": who})
    valid[0]["ids"][0].append(0)
    report = rlhf.rm_report(reward_model, {"a"}, valid, cfg)
    right, pairs = Counter(), Counter()
    for row in valid:
        scores = [reward_model(tensor([ids]))[0, -1].item() for ids in row["ids"]]
        for i in range(4):
            for j in range(4):
                if row["ranks"][i] < row["ranks"][j]:
                    pairs[row["labeler"]] += 1
                    right[row["labeler"]] += scores[i] > scores[j]
    assert report["eval/accuracy"] == pytest.approx(right["a"] / pairs["a"])
    assert report["eval_heldout_labelers/accuracy"] == pytest.approx(right["b"] / pairs["b"])


# ---- evaluation --------------------------------------------------------------------------------

def test_win_rate_is_antisymmetric_and_ties_count_half():
    own, other = np.array([3.0, 1, 2, 2, 5]), np.array([1.0, 3, 2, 2, 4])
    assert rlhf.win_rate(own, other)[0] == pytest.approx((2 + 0.5 * 2) / 5)
    assert rlhf.win_rate(own, other)[0] + rlhf.win_rate(other, own)[0] == pytest.approx(1)
    assert rlhf.win_rate(own, own) == (0.5, 0.0)
    rate, margin = rlhf.win_rate(np.ones(400), np.arange(400) % 2 * 2.0)
    assert (rate, margin) == (0.5, pytest.approx(1.96 * 0.5 / 20))


def test_few_shot_takes_as_many_examples_as_fit():
    examples = [[1] * 4, [2] * 3, [3] * 2]
    for room, expected in ((20, 4 + 3 + 2), (10, 3 + 2), (4, 2), (3, 0)):
        assert len(rlhf.few_shot(examples, [9, 9], room)) == 2 + expected
    assert rlhf.few_shot(examples, [9], 6) == [2, 2, 2, 3, 3, 9]
    assert rlhf.few_shot([], [9], 6) == [9] and len(examples) == 3


def test_markdown():
    rows = {"sft": {"KL": "1.000", "length": "2.500"}, "ppo": {"KL": "12.346", "length": "0.000"}}
    assert rlhf.markdown(rows, "model") == "\n".join([
        "| model | KL     | length |",
        "| ----- | ------ | ------ |",
        "| sft   | 1.000  | 2.500  |",
        "| ppo   | 12.346 | 0.000  |",
    ])


def test_measured_kl_is_that_of_whole_responses(models, prompts, cfg):
    """The mean over prompts of log pi(y|x) - log ref(y|x), by a loop over the very samples."""
    rows = [{"prompt_ids": prompt} for prompt in prompts]

    class Bytes:
        eot_token = 0

    policy, ref, reward, *_ = models
    torch.manual_seed(3)
    result, totals = rlhf.measure(policy, prompts, rows, ref, reward, None, Bytes, cfg)
    torch.manual_seed(3)
    tokens, mask, lens = rlhf.complete(policy, prompts, 0, cfg.max_new_tokens)
    logs = [token_logprobs(net, tokens, mask).sum(1) for net in (policy, ref)]
    assert result["KL"] == pytest.approx((logs[0] - logs[1]).mean().item(), abs=1e-3)
    scores = rlhf.sequence_scores(reward, tokens, lens)
    assert result["RM score"] == pytest.approx(scores.mean().item(), abs=1e-4)
    assert result["length"] == pytest.approx(np.mean(lens.numpy() - [len(p) for p in prompts]))
    assert totals is None


def test_chat_reply_is_text(policy, tokenizer, tmp_path):
    """Whole characters, without EOS, whatever bytes are sampled."""
    cfg = settings(rlhf.Chat, tmp_path, max_new_tokens=20, temperature=1.0)
    net = gpt(vocab_size=tokenizer.n_vocab)
    for _ in range(5):
        reply = "".join(rlhf.speak(net, [1, 2], tokenizer, cfg))
        assert EOT not in reply and all(char.isprintable() or char == "\n" for char in reply)


def test_a_long_conversation_drops_its_oldest_turns_and_says_so(
    tiny_data, tokenizer, tmp_path, monkeypatch, capsys
):
    """It goes on whatever is typed, odd bytes too; the end of the input is a good end."""
    flags = {"data": str(tiny_data), "out": str(tmp_path), "device": "cpu", "max_new_tokens": 8}
    rlhf.save(rlhf.PPO(**flags), gpt(vocab_size=tokenizer.n_vocab, block_size=64))
    typed, seen = iter(["hello", "tell me more " * 3, "x " * 200, "\udcff\x1b[2J", "end"]), []
    generate = rlhf.stream

    def said(prompt):
        return next(typed, "")

    def watched(policy, prompts, *rest):
        seen.append(prompts[0])
        return generate(policy, prompts, *rest)

    monkeypatch.setattr("builtins.input", said)
    monkeypatch.setattr(rlhf, "stream", watched)
    cli.run(rlhf.chat, rlhf.Chat, flags)
    shown = capsys.readouterr().out
    assert len(seen) == 5 and max(map(len, seen)) <= 64 - 8
    assert "the oldest question and answer are forgotten" in shown and "only the end" in shown
    assert all(char.isprintable() or char == "\n" for char in shown)
    assert tokenizer.decode(seen[0]) == "\n\nHuman: hello\n\nAssistant:"


@pytest.mark.parametrize("end", [EOFError, KeyboardInterrupt])
def test_chat_ends_cleanly(tiny_data, tokenizer, tmp_path, monkeypatch, end):
    flags = {"data": str(tiny_data), "out": str(tmp_path), "device": "cpu"}
    rlhf.save(rlhf.PPO(**flags), gpt(vocab_size=tokenizer.n_vocab, block_size=64))

    def ended(_):
        raise end

    monkeypatch.setattr("builtins.input", ended)
    if end is EOFError:
        cli.run(rlhf.chat, rlhf.Chat, flags)
    else:
        with pytest.raises(SystemExit, match="chat: stopped"):
            cli.run(rlhf.chat, rlhf.Chat, flags)


# ---- the command line --------------------------------------------------------------------------

@pytest.fixture
def called(monkeypatch, tmp_path):
    """Settings that a stage would have run with."""
    seen = []
    replace_stages(monkeypatch, seen.append)
    monkeypatch.chdir(tmp_path)
    return seen


def test_flags_have_the_type_of_their_field(called):
    rlhf.main(["sft", "--learning_rate", "1", "--epochs", "3", "--init", "7"])
    assert (called[0].learning_rate, called[0].epochs, called[0].init) == (1.0, 3, "7")
    assert type(called[0].learning_rate) is float
    assert called[0].device in ("cpu", "cuda", "mps") and called[0].dtype in ("float32", "bfloat16")


@pytest.mark.parametrize("stage", STAGES)
def test_stages_run_without_flags(called, stage):
    rlhf.main([stage])
    assert type(called[0]) is STAGES[stage]


@pytest.mark.parametrize("line", ["", "dream", "sft --lr 1", "sft --learning 1", "rm --epochs 1.5",
                                  "ppo --kl_coef much", "sft --epochs"])
def test_what_is_not_understood_is_refused(called, line, capsys):
    with pytest.raises(SystemExit) as end:
        rlhf.main(line.split())
    assert end.value.code == 2 and not called and "usage" in capsys.readouterr().err


@pytest.mark.parametrize("line, sentence", [
    ("pertrain", "no stage pertrain: did you mean pretrain?"),
    ("sft --learning-rate 1", "no flag --learning-rate: did you mean --learning_rate?"),
    ("ppo --kl_coeff=0.1", "no flag --kl_coeff: did you mean --kl_coef?"),
    ("rm --learning_rate -1", "--learning_rate -1.0: should be from 0 to"),
    ("rm --learning_rate nan", "--learning_rate nan: should be from 0 to"),
    ("rm --learning_rate inf", "--learning_rate inf: should be from 0 to"),
    ("sft --epochs 0", "--epochs 0: should be from 1 to"),
    ("sft --dropout 1", "--dropout 1.0: should be from 0 to 0.99"),
    ("sft --pretrain_fraction 1", "--pretrain_fraction 1.0: should be from 0 to 0.99"),
    ("ppo --gamma 1.01", "--gamma 1.01: should be from 0 to 1"),
    ("ppo --ema_decay 2", "--ema_decay 2.0: should be from 0 to 1"),
    ("ppo --seed -1", "--seed -1: should be from 0 to"),
    ("ppo --rollout_size 8", "--minibatch_size 32 --rollout_size 8: a minibatch should not be"),
    ("ppo --missing_eos_score nan", "--missing_eos_score nan: should be from -1e+09"),
    ("sft --init sft", "--name sft: should not be that of a model it starts from"),
    ("ppo --name rm", "--name rm: should not be that of a model it starts from"),
    ("chat --temperature -0.1", "--temperature -0.1: should be from 0 to"),
    ("pretrain --preset gpt3", "invalid choice: 'gpt3'"),
])
def test_impossible_flags_are_refused_before_any_work(called, line, sentence, capsys):
    with pytest.raises(SystemExit) as end:
        rlhf.main(line.split())
    assert sentence in capsys.readouterr().err + str(end.value) and not called


@pytest.mark.parametrize("line", ["--sed 3", "--k_min 0"])
def test_label_refuses_in_the_same_words(line, capsys):
    with pytest.raises(SystemExit) as end:
        label.main(line.split())
    said = capsys.readouterr().err + str(end.value)
    assert end.value.code and ("did you mean --seed?" in said or "should be from 1" in said)


def test_a_device_that_is_not_there(called, capsys):
    if not torch.cuda.is_available():
        with pytest.raises(SystemExit, match="rm: --device cuda: there is none that torch .* sees"):
            rlhf.main(["rm", "--device", "cuda"])


def test_a_context_without_room_for_a_prompt(chain):
    _, of = chain
    for stage in (rlhf.ppo, rlhf.evaluate, rlhf.chat, label.label):
        kind = stage.__annotations__["cfg"]
        with pytest.raises(UserError, match="--max_new_tokens 128: should leave room for a prompt"):
            stage(of(kind, max_new_tokens=128))


@pytest.mark.parametrize("kind", [*STAGES.values(), Label])
def test_every_setting_is_explained_and_used(kind):
    """The comment beside a field is its help; a field that nothing reads would be a lie."""
    parser = argparse.ArgumentParser()
    cli.add_flags(parser, kind)
    texts = {action.dest: action.help for action in parser._actions if action.dest != "help"}
    files = "rlhf.py", "checkpoint.py", "data/label.py", "data/people.py"
    source = "".join((ROOT / file).read_text() for file in files)
    for name in kind.__dataclass_fields__:
        assert len(texts[name].split(" [")[0]) > 8, name
        assert f"cfg.{name}" in source, name
    assert parser.format_help()


def test_a_users_mistake_is_one_sentence(monkeypatch, tmp_path, tiny_data):
    monkeypatch.chdir(tmp_path)  # where there is no checkpoint
    with pytest.raises(SystemExit, match="rm: .*sft.pt is not there: run the stage that writes it"):
        rlhf.main(["rm", "--data", str(tiny_data)])


def test_importing_does_nothing(tmp_path):
    """No output, no files, no threads or seeds touched: every function is there for a notebook."""
    code = """import torch; state = torch.get_rng_state(), torch.get_num_threads(); import rlhf
assert (state[0] == torch.get_rng_state()).all() and state[1] == torch.get_num_threads()"""
    env = {**os.environ, "PYTHONPATH": str(ROOT), "PYTHONDONTWRITEBYTECODE": "1"}
    done = subprocess.run([sys.executable, "-c", code], cwd=tmp_path, env=env, capture_output=True)
    assert (done.returncode, done.stdout, done.stderr) == (0, b"", b"")
    assert not list(tmp_path.iterdir())

"""Each stage that trains, done a second time by hand: a row at a time, with sums in loops, and by
none of the equations of rlhf.py. Then come the properties that such a comparison could miss."""

import gc
import json
import math
from collections import Counter
from types import SimpleNamespace
from unittest.mock import Mock

import numpy as np
import pytest
import rlhf
import torch
from conftest import EOS, gpt, lively, read_log, scalar, settings, weights
from data.files import Example, Ranking, UserError, decode, encode, get_tokenizer
from data.files import read_comparisons, read_demonstrations, read_documents, read_jsonl
from data.files import read_prompts, write_jsonl
from model import GPT, ScalarModel
from test_equations import gae_by_double_sum, pairwise_by_loop, policy_by_loop
from test_equations import untied_pairs, value_by_loop
from torch import tensor

def row_logprobs(policy, ids, start):
    """log pi of the tokens from `start` on, by a forward pass over this row alone."""
    logprobs = policy(tensor([ids]))[0, :-1].log_softmax(-1)
    return logprobs.gather(1, tensor(ids).long()[1:, None])[start - 1 :, 0]

def test_responses_come_in_the_order_of_the_prompts(policy, prompts, monkeypatch):
    """However many there are: 8 times --microbatch_size are sampled at a time."""
    cfg = rlhf.Settings(max_new_tokens=6, microbatch_size=3)
    respond = Mock(side_effect=rlhf.respond)
    monkeypatch.setattr(rlhf, "respond", respond)
    few = rlhf.complete(policy, prompts, 2, cfg, temperature=0)
    assert rlhf.complete(policy, prompts * 50, 2, cfg, temperature=0) == few * 50
    assert len(set(map(tuple, few))) > 2
    assert max(len(call.args[1]) for call in respond.call_args_list) == 8 * 3

@pytest.mark.parametrize("lengths, size, device, expected", [
    ([10, 10, 11, 12, 300, 900], 4, "cuda", [[4, 5], [0, 1, 2, 3]]),
    ([10, 10, 11, 12, 300, 900], 4, "cpu", [[5], [4], [0, 1, 2, 3]]),  # 4 with 5: 600 more
    ([3, 2, 1], 1, "cpu", [[0], [1], [2]]), ([20, 20, 83, 83], 4, "cpu", [[0, 1, 2, 3]]),
    ([20, 20, 84, 84], 4, "cpu", [[2, 3], [0, 1]])])  # saves 128 columns of padding
def test_passes_have_rows_of_like_length(lengths, size, device, expected):
    cfg = rlhf.Settings(microbatch_size=size, device=device)
    examples = [Example([0] * length, 0) for length in lengths]
    passes = rlhf.by_length(range(len(lengths)), examples, cfg)
    assert sorted(map(sorted, passes)) == sorted(expected)

@pytest.mark.parametrize("completions, size, prompts", [
    ([2] * 8, 8, [4, 4]), ([2, 2, 4], 8, [2, 1]), ([9, 3], 4, [1, 1])])
def test_a_pass_has_whole_prompts_and_seldom_more_rows_than_asked_for(completions, size, prompts):
    rankings = [Ranking([Example([0], 0)] * k, list(range(k)), "") for k in completions]
    passes = list(rlhf.ranked_passes(rankings, rlhf.Settings(microbatch_size=size, device="cpu")))
    assert [len(set(ranked.groups.tolist())) for ranked in passes] == prompts
    assert sum(len(ranked.examples) for ranked in passes) == sum(completions)

def test_what_is_not_finite_stops_the_run(policy, project):
    before = weights(policy)
    (math.inf * policy(tensor([[1, 2]])).sum()).backward()
    with pytest.raises(UserError, match="not finite"):
        rlhf.update(policy, rlhf.adam(policy), 0.1)
    assert torch.equal(weights(policy), before)
    with pytest.raises(UserError, match="heldout/loss: not finite"):
        rlhf.pretrain(settings(rlhf.Pretrain, project, preset="test", steps=1, learning_rate=1e9))

def test_every_item_once_an_epoch_in_a_new_order():
    batches = [rlhf.batch_at(list(range(10)), 4, step, seed=3) for step in range(9)]
    assert [len(batch) for batch in batches] == [4, 4, 2] * 3
    epochs = [sum(batches[i : i + 3], []) for i in (0, 3, 6)]
    assert all(sorted(epoch) == list(range(10)) for epoch in epochs)
    assert len(set(map(tuple, epochs))) == 3
    assert batches[5] != rlhf.batch_at(list(range(10)), 4, 5, seed=4)

def test_documents_are_whole_or_a_window():
    rng = np.random.default_rng(0)
    documents = [rng.integers(0, 11, length) for length in (2, 3, 6, 7, 12)]
    examples = rlhf.random_documents(documents, 2000, 6, rng)
    every = {tuple(ids[i : i + 6]) for ids in documents for i in range(max(1, len(ids) - 5))}
    found = Counter(tuple(ids) for ids, _ in examples)
    assert set(found) == every and len(examples) == 2000
    assert {start for _, start in examples} == {1}
    assert all(300 < found[tuple(ids)] < 500 for ids in documents[:3])  # each is as likely

class ByHand:
    """Adam as the paper has it, on a gradient of norm 1 at most; the metrics of each step."""
    def __init__(self, model):
        self.model = model
        self.optimizer = torch.optim.Adam(model.parameters(), 1.0, (0.9, 0.95), 1e-8)

    def step(self, loss, learning_rate):
        loss.backward()
        norm = sum(p.grad.square().sum() for p in self.model.parameters()).sqrt()
        for parameter in self.model.parameters():
            parameter.grad /= max(1, norm + 1e-6)
        self.optimizer.param_groups[0]["lr"] = learning_rate
        self.optimizer.step()
        self.optimizer.zero_grad()
        return norm.item()

def lm_by_loop(model, examples):
    """(1): every token weighs the same."""
    return -torch.cat([row_logprobs(model, list(ids), start) for ids, start in examples]).mean()

def scored(rankings, score):
    """(scores, ranks) of each prompt, by score(ids, prompt_len)."""
    return [([score(*example) for example in x.examples], x.ranks) for x in rankings]

def close_weights(a, b, tolerance):
    """All but a few: the keys' biases have no gradient but rounding, which Adam makes a step of."""
    assert (weights(a) - weights(b)).abs().quantile(0.99) < tolerance

def assert_trained(cfg, model, total, loss_of_step, warmup=0.0, after=None):
    """What a stage logged and saved is what is found by hand; returns its log."""
    hand, log = ByHand(model), read_log(cfg)
    for step in range(total):
        loss = loss_of_step(step)
        rate = 0.55 + 0.45 * math.cos(math.pi * step / total)
        if warmup:
            rate = min(rate, (step + 1) / (warmup * total))
        norm = hand.step(loss, cfg.learning_rate * rate)
        line = log[step]
        assert line["step"] == step + 1 and line["loss"] == pytest.approx(loss.item(), abs=1e-3)
        assert line["grad_norm"] == pytest.approx(norm, rel=1e-2)
        for key, value in (after(step) if after else {}).items():
            assert line.get(key) == pytest.approx(value, abs=1e-3), (key, step)
    close_weights(rlhf.load(cfg, cfg.name, type(model)), model, 1e-3)
    return log

def test_pretraining_by_hand(project, tokenizer, monkeypatch):
    """(1) over random documents, of all tokens but the first; a warmup, then a cosine."""
    monkeypatch.setitem(rlhf.PRESETS, "tiny", dict(block_size=16, n_layer=1, n_head=1, n_embd=8))
    cfg = settings(rlhf.Pretrain, project, preset="tiny", steps=101, batch_size=3)
    torch.manual_seed(4)
    model = GPT(rlhf.GPTConfig(257, 16, 1, 1, 8))
    torch.manual_seed(4)
    rlhf.pretrain(cfg)
    documents = read_documents(project / "data/pretrain.txt", tokenizer)
    valid = read_documents(project / "data/pretrain_valid.txt", tokenizer)

    def loss(step):
        rng = np.random.default_rng([cfg.seed, step])
        return lm_by_loop(model, rlhf.random_documents(documents, 3, 16, rng))

    def heldout(step):
        if step not in (99, 100):
            return {"heldout/loss": None}
        return {"heldout/loss": lm_by_loop(model, [(ids[:16], 1) for ids in valid]).item()}

    assert_trained(cfg, model, 101, loss, warmup=0.05, after=heldout)

@pytest.mark.parametrize("microbatch_size", [1, 3, 100])
def test_sft_by_hand(project, tokenizer, microbatch_size):
    """(1) of completions and two texts, by token however rows are passed; validation."""
    cfg = settings(rlhf.SFT, project, epochs=2, batch_size=4, dropout=0.0, learning_rate=1e-2,
                   microbatch_size=microbatch_size, pretrain_fraction=0.17)
    rlhf.sft(cfg)
    model = rlhf.load(cfg, "gpt")
    train = read_demonstrations(project / "data/sft.jsonl", tokenizer, 24)
    valid = read_demonstrations(project / "data/sft_valid.jsonl", tokenizer, 24)
    documents = read_documents(project / "data/pretrain.txt", tokenizer)
    rng = np.random.default_rng(cfg.seed)
    train += rlhf.random_documents(documents, 2, cfg.window, rng)

    def validation(step):
        return {"valid/loss": lm_by_loop(model, valid).item() if step in (2, 5) else None}

    assert_trained(cfg, model, 6, lambda step: lm_by_loop(
        model, rlhf.batch_at(train, 4, step, cfg.seed)), after=validation)

@pytest.mark.parametrize("microbatch_size", [1, 18, 100])
def test_rm_by_hand(project, tokenizer, microbatch_size):
    """(2) of the score at EOS; in the end, demonstrations score 0 on average."""
    cfg = settings(rlhf.RM, project, batch_size=4, learning_rate=1e-2,
                   microbatch_size=microbatch_size)
    torch.manual_seed(4)
    model = rlhf.scalar_model(rlhf.load(cfg, "sft"))
    torch.manual_seed(4)
    rlhf.rm(cfg)
    train = read_comparisons(project / "data/comparisons.jsonl", tokenizer, 24)

    def loss(step):
        batch = rlhf.batch_at(train, 4, step, cfg.seed)
        return pairwise_by_loop(scored(batch, lambda ids, _: model(tensor([ids]))[0, -1]))

    log = assert_trained(cfg, model, 6, loss)
    for step, line in enumerate(log):  # after each epoch
        assert ("eval_heldout_labelers/accuracy" in line) == (step in (2, 5))
    valid = read_comparisons(project / "data/comparisons_valid.jsonl", tokenizer, 24)
    report = rlhf.accuracy_report(model, valid, {ranking.labeler for ranking in train}, cfg)
    assert {key: log[-1][key] for key in report} == pytest.approx(report, abs=1e-3)
    trained = rlhf.load(cfg, "rm", ScalarModel)
    demonstrations = read_demonstrations(project / "data/sft.jsonl", tokenizer, 24)
    scores = [trained(tensor([example.ids]))[0, -1].item() for example in demonstrations]
    assert np.mean(scores) == pytest.approx(0, abs=1e-5) and np.std(scores) > 1e-3

@pytest.mark.parametrize("microbatch_size", [1, 100])
def test_dpo_by_hand(project, tokenizer, microbatch_size):
    """(2) of beta log(pi / ref) of whole responses; a warmup of a tenth, then a cosine."""
    cfg = settings(rlhf.DPO, project, batch_size=4, epochs=7, learning_rate=5e-3, beta=0.7,
                   microbatch_size=microbatch_size)
    rlhf.dpo(cfg)
    model, ref = rlhf.load(cfg, "ppo_init"), rlhf.load(cfg, "ppo_init")
    train = read_comparisons(project / "data/comparisons.jsonl", tokenizer, 24)
    valid = read_comparisons(project / "data/comparisons_valid.jsonl", tokenizer, 24)
    before = []

    def implicit(ids, start):
        logs = [row_logprobs(net, ids, start).sum() for net in (model, ref)]
        return cfg.beta * (logs[0] - logs[1].detach())

    def statistics(rankings, prefix=""):
        margins, chosen = [], []
        for examples, ranks, _ in rankings:
            rewards = [implicit(*example).item() for example in examples]
            logs = [row_logprobs(model, *example).sum().item() for example in examples]
            for i, j in untied_pairs(ranks):
                margins.append(rewards[i] - rewards[j])
                chosen.append(logs[i])
        return {f"{prefix}accuracy": np.mean(np.array(margins) > 0),
                f"{prefix}margin": np.mean(margins), f"{prefix}chosen_logprob": np.mean(chosen)}

    def loss(step):
        batch = rlhf.batch_at(train, 4, step, cfg.seed)
        before.append(statistics(batch))
        return pairwise_by_loop(scored(batch, implicit))

    def after(step):
        if step % 3 < 2:
            return before[step] | {"valid/loss": None}
        held_out = {"valid/loss": pairwise_by_loop(scored(valid, implicit)).item()}
        return before[step] | held_out | statistics(valid, "valid/")

    assert_trained(cfg, model, 21, loss, warmup=0.1, after=after)

# ---- PPO by hand -------------------------------------------------------------------------------

def ppo_settings(project, **fields):
    small = dict(iterations=2, rollout_size=6, minibatch_size=4, microbatch_size=3, ema_decay=0.7)
    return settings(rlhf.PPO, project, **small | fields)

@pytest.fixture
def calls(monkeypatch):
    """calls(name): (arguments, result) of every call of this function; the calls go through."""
    def watch(name: str) -> list:
        def record(*arguments, **more):
            result = function(*arguments, **more)
            seen.append((arguments, result))
            return result

        seen, function = [], getattr(rlhf, name)
        monkeypatch.setattr(rlhf, name, record)
        return seen

    return watch

def episode_by_hand(nets, record, response, cfg):
    """One episode: (3), then (4) as a double sum."""
    ids, start = record["prompt_ids"] + response, len(record["prompt_ids"])
    with torch.no_grad():
        old = row_logprobs(nets.policy, ids, start)
        log_ratios = old - row_logprobs(nets.ref, ids, start)
        values = nets.value(tensor([ids]))[0, start - 1 : -1]
        score = nets.reward(tensor([ids]))[0, -1].item()
    ended = response[-1] == EOS
    raw_score = score
    if not ended:
        score = min(score, cfg.missing_eos_score)
    rewards = [-cfg.kl_coef * x.item() for x in log_ratios]
    rewards[-1] += score
    advantages = gae_by_double_sum(rewards, values.tolist(), cfg.gamma, cfg.lam)
    return SimpleNamespace(ids=ids, start=start, old=old, values=values, advantages=advantages,
                           returns=tensor(advantages) + values, n=len(response), score=score,
                           raw_score=raw_score, kl=log_ratios.sum().item(), ended=float(ended))

def losses_by_hand(nets, episodes, cfg):
    """(5), (6) and their statistics, token by token."""
    new = torch.cat([row_logprobs(nets.policy, e.ids, e.start) for e in episodes])
    now = torch.cat([nets.value(tensor([e.ids]))[0, e.start - 1 : -1] for e in episodes])
    old = torch.cat([e.old for e in episodes])
    white = torch.cat([e.white for e in episodes])
    loss, stats = policy_by_loop(new, old, white, cfg.cliprange)
    values = torch.cat([e.values for e in episodes])
    returns = torch.cat([e.returns for e in episodes])
    error, more = value_by_loop(now, values, returns, cfg.cliprange_value)
    return stats | more | {"loss/policy": loss, "loss/value": error}

def ppo_by_hand(cfg, sampled, records, documents):
    """The metrics of each iteration, and the average that is saved."""
    tokenizer, gold = get_tokenizer(cfg.data), rlhf.gold_function(records, cfg.gold)
    policy, ref, ema = (rlhf.load(cfg, "ppo_init") for _ in range(3))
    value, reward = (rlhf.load(cfg, "rm", ScalarModel) for _ in range(2))
    nets = SimpleNamespace(policy=policy, ref=ref, value=value, reward=reward)
    policy_hand, value_hand, log = ByHand(policy), ByHand(value), []
    for iteration, (_, responses) in enumerate(sampled):
        rng = np.random.default_rng([cfg.seed, iteration])
        batch = rlhf.batch_at(records, cfg.rollout_size, iteration, cfg.seed)
        episodes = [episode_by_hand(nets, record, response, cfg)
                    for record, (response, _) in zip(batch, responses, strict=True)]
        pooled = np.concatenate([e.advantages for e in episodes])
        for e in episodes:
            e.white = tensor([(a - pooled.mean()) / pooled.std() for a in e.advantages])
        size = cfg.minibatch_size
        minibatches = rlhf.chunks(list(range(len(batch))), size)
        for _ in range(cfg.epochs - 1):
            minibatches += rlhf.chunks(rng.permutation(len(batch)).tolist(), size)
        warmup, steps = min(1, 0.1 + 0.09 * iteration), []
        for minibatch in minibatches:
            stats = losses_by_hand(nets, [episodes[i] for i in minibatch], cfg)
            loss = stats["loss/policy"]
            if cfg.ptx_coef:
                count = math.ceil(cfg.ptx_ratio * len(minibatch))
                text = rlhf.random_documents(documents, count, cfg.window, rng)
                stats["loss/ptx"] = lm_by_loop(policy, text)
                loss = loss + cfg.ptx_coef * stats["loss/ptx"]
            rates = cfg.learning_rate * warmup, cfg.value_learning_rate * warmup
            stats["policy/grad_norm"] = policy_hand.step(loss, rates[0])
            stats["val/grad_norm"] = value_hand.step(stats["loss/value"], rates[1])
            for average, new in zip(ema.parameters(), policy.parameters()):
                average.data = cfg.ema_decay * average.data + (1 - cfg.ema_decay) * new.data
            steps.append({key: torch.as_tensor(x).item() for key, x in stats.items()})
        metrics = {key: np.mean([step[key] for step in steps]) for key in steps[0]}
        kl = [e.kl for e in episodes]
        returns = torch.cat([e.returns for e in episodes])
        metrics |= {
            "step": iteration + 1, "learning_rate": cfg.learning_rate * warmup,
            "value_learning_rate": cfg.value_learning_rate * warmup,
            "objective/scores": np.mean([e.score for e in episodes]), "objective/kl": np.mean(kl),
            "objective/raw_scores": np.mean([e.raw_score for e in episodes]),
            "objective/rlhf_reward": np.mean([e.score - cfg.kl_coef * e.kl for e in episodes]),
            "objective/entropy": -np.mean([e.old.sum().item() for e in episodes]),
            "objective/gold": np.mean([sum(gold(record, decode(tokenizer, response)).values())
                                       for record, (response, _) in zip(batch, responses)]),
            "eos_fraction": np.mean([e.ended for e in episodes]),
            "response_length": np.mean([e.n for e in episodes]),
            "val/var_explained": 1 - metrics["val/error"] / returns.var(correction=0).item(),
        }
        log.append(metrics)
    return log, ema, policy

@pytest.mark.parametrize("fields", [
    dict(ptx_coef=3.0, ptx_ratio=1.1, iterations=3, learning_rate=0.02, value_learning_rate=0.05),
    dict(microbatch_size=1, missing_eos_score=0.5),
    dict(microbatch_size=100, ptx_coef=0.0, epochs=3, gamma=0.9, lam=0.6, minibatch_size=2,
         cliprange=0.02, cliprange_value=0.03, learning_rate=0.02, value_learning_rate=0.05,
         kl_coef=0.5, missing_eos_score=-2.5, max_kl=1e9)])
def test_ppo_by_hand(project, tokenizer, calls, fields):
    """(3) to (7): every number of every iteration, and the weights that are saved."""
    cfg, sampled = ppo_settings(project, **fields), calls("sample_responses")
    rlhf.ppo(cfg)
    records = read_prompts(project / "data/prompts.jsonl", tokenizer, 24 - 5)
    records *= math.ceil(cfg.iterations * cfg.rollout_size / len(records))
    documents = read_documents(project / "data/pretrain.txt", tokenizer)
    expected, ema, policy = ppo_by_hand(cfg, sampled, records, documents)
    log = read_log(cfg)
    for line, metrics in zip(log, expected, strict=True):
        for key, x in metrics.items():
            assert line[key] == pytest.approx(x, abs=2e-4, rel=2e-3), key
    assert set(log[0]) == set(expected[0]) | {"sampler_gap", "heldout/loss"}
    assert 0 < log[0]["eos_fraction"] < 1 and log[0]["objective/kl"] == 0 != log[1]["objective/kl"]
    close_weights(rlhf.load(cfg, cfg.name), ema, 1e-3)
    close_weights(rlhf.load(cfg, f"{cfg.name}_raw"), policy, 1e-3)

# ---- PPO in particular -------------------------------------------------------------------------

def test_twelve_iterations(project, tokenizer, calls):
    """Both rates warm up over ten, from a tenth (C.4). What is sampled is what is scored, and the
    first ratio is 1, to the bit. Held-out loss is logged at first, at last, and every ten."""
    cfg, updates = ppo_settings(project, iterations=12, learning_rate=1e-9), calls("update")
    losses = calls("policy_loss")
    rlhf.ppo(cfg)  # two updates an iteration, by passes of 3, 1 and 2 rows
    for (new, old, _, mask, *_), _ in losses[::3] + losses[1::3]:
        assert torch.equal(new, old * mask)
    log, factors = read_log(cfg), np.repeat([0.1 + 0.09 * i for i in range(10)] + [1, 1], 2)
    assert [rate for (_, _, rate), _ in updates[::2]] == pytest.approx(1e-9 * factors, rel=1e-6)
    assert [rate for (_, _, rate), _ in updates[1::2]] == pytest.approx(5e-4 * factors)
    assert all(line["sampler_gap"] < 1e-5 for line in log)
    valid = read_documents(project / "data/pretrain_valid.txt", tokenizer)
    loss = lm_by_loop(rlhf.load(cfg, "ppo_init"), [(ids[:24], 1) for ids in valid]).item()
    heldout = {line["step"]: line["heldout/loss"] for line in log if "heldout/loss" in line}
    assert heldout == pytest.approx({1: loss, 11: loss, 12: loss}, abs=1e-4)

def test_a_ratio_that_is_not_one_stops_the_run(project, monkeypatch):
    logprobs = rlhf.token_logprobs
    monkeypatch.setattr(rlhf, "token_logprobs", lambda policy, tokens, mask: (
        logprobs(policy, tokens, mask) + 0.01 * torch.is_grad_enabled() * mask))
    with pytest.raises(UserError, match="ratio .* 1.01"):
        rlhf.ppo(ppo_settings(project))

def test_five_networks_are_alive(project, monkeypatch):
    """Policy, reference and average; reward model and value network. No copy more."""
    cfg, alive, update = ppo_settings(project, iterations=1, minibatch_size=6), [], rlhf.update
    policy, reward = rlhf.load(cfg, "ppo_init"), rlhf.load(cfg, "rm", ScalarModel)
    expected = 3 * weights(policy).numel() + 2 * weights(reward).numel()

    def count():
        gc.collect()
        return sum(p.numel() for p in gc.get_objects() if type(p) is torch.nn.Parameter)

    def look(*arguments):
        alive.append(count() - before)
        return update(*arguments)

    before = count()
    monkeypatch.setattr(rlhf, "update", look)
    rlhf.ppo(cfg)
    assert alive == [expected, expected]

def test_a_rule_in_place_of_the_reward_model(project, tokenizer, monkeypatch):
    """The class Reward is all that changes: no checkpoint; the values start from the policy."""
    def rule(prompts, texts, tokens, total_lens):
        for prompt, text, row, n in zip(prompts, texts, tokens.tolist(), total_lens):
            assert decode(tokenizer, row[:n]) == prompt + text
            lengths.append(len(text))
        return tensor([float(len(text)) for text in texts])

    lengths = []
    (project / "out/rm.pt").unlink()
    monkeypatch.setattr(rlhf, "Reward", lambda cfg: rule)
    cfg = ppo_settings(project, iterations=1)
    rlhf.ppo(cfg)
    (line,) = read_log(cfg)
    assert line["objective/raw_scores"] == pytest.approx(np.mean(lengths))

def test_an_episode_is_shown_token_by_token(tokenizer):
    """Its first line is of the column where the first token of the response was chosen."""
    columns = {"log pi": tensor([[1, 2, 3], [0, 0, 0]]), "value": tensor([[9, 7, 5], [0, 0, 0]])}
    table = rlhf.episode_table(tokenizer, Example([97, 98, 99, EOS], 2), columns)
    title, first, last = [line.split() for line in table.splitlines()]
    assert title == ["token", "log", "pi", "value"]
    assert first == ["'c'", "2.00", "7.00"] and last[1:] == ["3.00", "5.00"]

def test_where_the_value_network_begins(project):
    cfg, policy = ppo_settings(project), rlhf.load(ppo_settings(project), "ppo_init")
    rlhf.save(project / "out/other.pt", lively(rlhf.load(cfg, "rm", ScalarModel)))
    for cfg.value_init, name in (("", "rm"), ("other", "other")):
        value = rlhf.value_network(policy, cfg)
        assert torch.equal(weights(value), weights(rlhf.load(cfg, name, ScalarModel)))
    cfg.value_init, cfg.reward_model = "", "missing"
    assert torch.equal(weights(rlhf.value_network(policy, cfg).gpt), weights(policy))

@pytest.mark.parametrize("rollout_size", [1, 4])
def test_a_policy_that_ends_at_once(project, rollout_size):
    """Responses of EOS alone, and one episode: nothing is NaN."""
    cfg = ppo_settings(project, rollout_size=rollout_size, minibatch_size=1, ptx_coef=0.0)
    policy = rlhf.load(cfg, "ppo_init")
    torch.nn.init.constant_(policy.wte.weight[EOS], 9.0)
    rlhf.save(project / "out/ppo_init.pt", policy)
    rlhf.ppo(cfg)
    for line in read_log(cfg):
        assert line["response_length"] == line["eos_fraction"] == 1
        assert ("val/var_explained" in line) == (rollout_size > 1)
    assert weights(rlhf.load(cfg, cfg.name)).isfinite().all()

def test_max_kl_ends_the_updates_of_an_iteration(project, calls):
    """The minibatch that goes too far is no step, and leaves no gradient for the next one."""
    cfg = ppo_settings(project, minibatch_size=1, learning_rate=0.1, max_kl=1e-3, ptx_coef=0.0)
    updates = calls("update")
    rlhf.ppo(cfg)
    assert 2 <= len(updates) // 2 < 12 and len(read_log(cfg)) == 2
    assert all(p.grad is None for (model, *_), _ in updates for p in model.parameters())
    assert all(line["policy/approxkl"] <= 1e-3 for line in read_log(cfg))

@pytest.mark.parametrize("scores, kept", [(None, 5), ([1.0, 3.0, 2.0], 3), ([3.0, 2.0, 1.0], 1)])
def test_sft_keeps_the_epoch_that_the_reward_model_likes(
    project, tokenizer, monkeypatch, scores, kept
):
    """C.1: the best by its score, or else the last. Dropout in training, none in validation."""
    plan = iter(scores or [])
    monkeypatch.setattr(rlhf, "score", lambda *_: tensor([next(plan)]))
    cfg = settings(rlhf.SFT, project, epochs=3, batch_size=5, reward_model="rm" if scores else "")
    rlhf.sft(cfg)
    valid = read_demonstrations(project / "data/sft_valid.jsonl", tokenizer, 24)
    loss, log = lm_by_loop(rlhf.load(cfg, "sft"), valid).item(), read_log(cfg)
    assert loss == pytest.approx(log[kept]["valid/loss"], abs=1e-5)
    train = read_demonstrations(project / "data/sft.jsonl", tokenizer, 24)
    first = rlhf.batch_at(train, 5, 0, cfg.seed)
    assert abs(log[0]["loss"] - lm_by_loop(rlhf.load(cfg, "gpt"), first).item()) > 1e-3
    assert [line.get("valid/score") for line in log[1::2]] == (scores or [None] * 3)

def test_accuracy_report_by_loop(tmp_path):
    """Over untied pairs, by whether the labeler was seen in training; nothing is NaN."""
    cfg, reward_model, valid = settings(rlhf.RM, tmp_path), scalar(), []
    for ranks, who in (([0, 1, 1, 2], "a"), ([3, 0, 1, 2], "a"), ([1, 0, 0, 0], "b")):
        examples = [Example([1] * (who == "b") * (j % 2) + [1, j, 0], 1) for j in range(2, 6)]
        valid.append(Ranking(examples, ranks, who))
    report, margins = rlhf.accuracy_report(reward_model, valid, {"a"}, cfg), {"a": [], "b": []}
    every, lengths = [], []
    for ranking in valid:
        scores = [reward_model(tensor([x.ids]))[0, -1].item() for x in ranking.examples]
        every += [x - np.mean(scores) for x in scores]
        own_lengths = [len(x.ids) for x in ranking.examples]
        lengths += [n - np.mean(own_lengths) for n in own_lengths]
        for i, j in untied_pairs(ranking.ranks):
            margins[ranking.labeler].append(scores[i] - scores[j])
    expected = {"eval/score_std": np.std(every)}
    expected["eval/length_correlation"] = np.corrcoef(every, lengths)[0, 1]
    for name, who in (("eval", "a"), ("eval_heldout_labelers", "b")):
        own = np.array(margins[who])
        expected[f"{name}/accuracy"] = np.mean(own > 0)
        expected[f"{name}/margin"] = np.mean(own)
        expected[f"{name}/confidence"] = np.mean(1 / (1 + np.exp(-abs(own))))
    assert report == pytest.approx(expected, abs=1e-4)
    report = rlhf.accuracy_report(reward_model, valid[:2], {"a"}, cfg)
    assert set(report) == {"eval/score_std", "eval/accuracy", "eval/confidence", "eval/margin"}
    torch.nn.init.zeros_(reward_model.head.weight)
    report = rlhf.accuracy_report(reward_model, valid, {"a"}, cfg)
    assert "eval/length_correlation" not in report and report["eval/accuracy"] == 0

@pytest.mark.parametrize("temperature", [1.0, 1.5])
def test_the_table_by_hand(project, tokenizer, calls, monkeypatch, temperature):
    """Every column of `evaluate` from the responses that were sampled; the KL is the policy's, so
    only at temperature 1. Gold and reward model judge the same part of a response."""
    cfg = settings(rlhf.Evaluate, project, models="gpt+fewshot, sft,nothing", samples=3,
                   temperature=temperature, max_new_tokens=12)
    probes = read_jsonl(project / "data/probes.jsonl")
    for probe, task in zip(probes, ("copying", "adding", "copying"), strict=True):
        probe["task"] = task
    write_jsonl(project / "data/probes.jsonl", probes)
    completed = calls("complete")
    monkeypatch.setattr(rlhf, "own_turn", lambda text: text[:2])
    rlhf.evaluate(cfg)
    assert [arguments[4] for arguments, _ in completed[::3]] == [temperature] * 2
    responses = [result for _, result in completed]
    found = json.loads((project / "out/evaluate.json").read_text())
    table, gold = found["table"], rlhf.gold_function([{"wants": 1}], cfg.gold)
    records = read_prompts(project / "data/prompts_valid.jsonl", tokenizer, 12) * 3
    shots = sum((x.ids[:-1] for x in read_demonstrations(
        project / "data/fewshot.jsonl", tokenizer, 12)), [])
    reward, ref = rlhf.load(cfg, "rm", ScalarModel), rlhf.load(cfg, "ppo_init")
    for title, (own, *probed) in zip(table, (responses[:3], responses[3:]), strict=True):
        row, policy = table[title], rlhf.load(cfg, title.split("+")[0])
        expected = {key: [] for key in ("helpful", "harmless", "RM score", "length", "KL", "EOS")}
        for record, response in zip(records, own, strict=True):
            ids = record["prompt_ids"]
            shown = (shots + ids)[-12:] if title == "gpt+fewshot" else ids
            logs = [row_logprobs(net, given + response, len(given)).sum().item()
                    for net, given in ((policy, shown), (ref, ids))]
            expected["KL"].append(logs[0] - logs[1])
            turn = decode(tokenizer, response)[:2]
            judged = ids + encode(tokenizer, turn) + [EOS]
            expected["RM score"].append(reward(tensor([judged]))[0, -1].item())
            expected["length"].append(len(response))
            expected["EOS"].append(response[-1] == EOS)
            for axis, x in gold(record, turn).items():
                expected[axis].append(x)
        totals = np.add(expected["helpful"], expected["harmless"]).reshape(3, -1)
        assert np.array(found["gold"][title]) == pytest.approx(totals)
        assert np.ravel(found["RM score"][title]) == pytest.approx(expected["RM score"], abs=1e-4)
        assert found["responses"][title] == [decode(tokenizer, x)[:2] for x in own]
        documents = read_documents(project / "data/pretrain_valid.txt", tokenizer)
        expected["held-out loss"] = [lm_by_loop(policy, [(x[:24], 1) for x in documents]).item()]
        right = [decode(tokenizer, x).startswith(probe["completion"]) for probe, x in zip(
            (probes[0], probes[2], probes[1]), probed[0] + probed[1], strict=True)]
        expected |= {"copying": right[:2], "adding": right[2:]}
        if temperature != 1:
            expected.pop("KL")
        rate, margin = rlhf.win_rate(totals, np.array(found["gold"]["sft"]))
        expected |= {"win rate": [rate], "±": [margin]}
        assert row == pytest.approx({key: np.mean(x) for key, x in expected.items()}, abs=1e-4)
    lines = (project / "out/evaluate.md").read_text().splitlines()
    assert lines[-1].startswith("| sft | 0.500 | 0.000 | ")
    assert {line.count("|") for line in lines} == {len(row) + 2}

def test_the_same_step_is_the_same_whoever_starts_it(project, monkeypatch):
    """Whatever was drawn before; and killed after any step, --resume goes on to the same bits."""
    def run(**fields):
        cfg = ppo_settings(project, iterations=3, **fields)
        rlhf.ppo(cfg)
        return weights(rlhf.load(cfg, cfg.name)), read_log(cfg)

    def killed(self, metrics, *shown):
        write(self, metrics, *shown)
        if self.step + 1 == 2:  # the log is ahead of what has been saved
            raise MemoryError

    expected, log = run()
    torch.manual_seed(99)
    assert torch.equal(run()[0], expected)
    with monkeypatch.context() as patch, pytest.raises(MemoryError):
        write = rlhf.Run.log
        patch.setattr(rlhf.Run, "log", killed)
        run(save_minutes=0.0)
    again, lines = run(resume=True, save_minutes=0.0)
    assert torch.equal(again, expected) and lines == log

@pytest.mark.parametrize("network, other", [(gpt, ScalarModel), (scalar, GPT)])
def test_checkpoint_round_trip(network, other, tmp_path):
    """Comes back in eval mode, bit by bit; a name may be a path."""
    cfg, model = settings(rlhf.SFT, tmp_path, data=""), network()
    rlhf.save(tmp_path / "out/m.pt", model)
    again = rlhf.load(cfg, "m", type(model))
    assert vars(again.config) == vars(model.config) and not again.training
    assert torch.equal(weights(model), weights(again))
    assert rlhf.load(cfg, f"{tmp_path}/out/m.pt", type(model), 0.25).config.dropout == 0.25
    with pytest.raises(UserError, match=f"m.pt holds a .*, but a {other.__name__} is needed"):
        rlhf.load(cfg, "m", other)

@pytest.mark.parametrize("stage, fields", [
    (rlhf.PPO, dict(gamma=1.01)), (rlhf.PPO, dict(lam=-0.1)), (rlhf.PPO, dict(name="")),
    (rlhf.PPO, dict(ptx_ratio=0.0)), (rlhf.SFT, dict(window=1)), (rlhf.RM, dict(device="cuda")),
    (rlhf.PPO, dict(missing_eos_score=-math.inf)), (rlhf.RM, dict(learning_rate=math.nan)),
    (rlhf.RM, dict(learning_rate=math.inf)), (rlhf.SFT, dict(epochs=0)),
    (rlhf.SFT, dict(dropout=1.0)), (rlhf.SFT, dict(pretrain_fraction=1.0))])
def test_impossible_settings_are_refused(tmp_path, monkeypatch, stage, fields):
    for there, expected in ((True, ("cuda", "bfloat16")), (False, ("cpu", "float32"))):
        monkeypatch.setattr(torch.cuda, "is_available", Mock(return_value=there))
        cfg = settings(rlhf.PPO, tmp_path, gamma=1, lam=0, device="auto", dtype="auto")
        rlhf.settle(cfg)
        assert (cfg.device, cfg.dtype) == expected
    ((flag, value),) = fields.items()
    with pytest.raises(UserError, match=f"--{flag} {value}"):
        rlhf.settle(settings(stage, tmp_path, **fields))

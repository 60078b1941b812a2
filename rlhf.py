"""InstructGPT (Ouyang et al. 2022, arXiv 2203.02155), from random weights to an aligned model.

    pretrain -> sft (step 1) -> rm (step 2) -> ppo (step 3), or dpo -> evaluate, chat

Symbols, the paper's and ours (it uses r and gamma for two things each):

    pi^RL, pi^SFT   policy, ref       eq. 2     gamma      ptx_coef      eq. 2
    r_theta(x, y)   scores (B,)       eq. 1     discount   gamma = 1     C.4
    beta            kl_coef           eq. 2     lambda     lam           not stated
    pi / pi_old     ratio (B, T-1)    PPO       epsilon    cliprange     C.4

One layout of tensors everywhere. A row is prompt, response, padding. What belongs to a token is
aligned to the action that chose it: column t is the state after reading tokens[:, :t+1], and its
action is tokens[:, t+1].

    tokens   (B, T)    p0   p1   p2   r0   r1   EOS  pad  pad
    column t           0    1    2    3    4    5    6
    action             p1   p2   r0   r1   EOS  pad  pad
    mask     (B, T-1)  0    0    1    1    1    0    0
    rewards            .    .   -b k -b k -b k + score       b = kl_coef, k = log pi - log ref

A value is thus that of the state before the action, and the one mask, made from lengths and never
from token ids, serves SFT and PPO alike. Dropout is on in sft alone.
"""

import codecs
import copy
import json
import math
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import NamedTuple

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor
from tqdm import tqdm

from checkpoint import Log, checkpoint, load, save
from cli import Common, Training, constant_weights, finite, memory_needed, room, run_one
from data.formats import (
    UserError, decode, describe, encode, fingerprint, get_tokenizer, gold_function, markdown,
    own_turn, passages, printable, read_comparisons, read_demonstrations, read_pretraining,
    read_rows, render, replacing
)
from model import GPT, PRESETS, GPTConfig, ScalarModel, generate, pad_right, stream
from parallel import all_sum, broadcast, gather, share, sum_gradients, unshare

# ---- The equations: tensors and floats in, tensors out -------------------------------------------
# `count` is what a mean is divided by, given when the tensors are only a part of an optimizer step:
# the parts then add up to the step, exactly. Nothing outside the mask matters, not even NaN.

def masked_mean(x: Tensor, mask: Tensor, count=None) -> Tensor:
    """The mean of x over the columns where mask is 1: (B, T-1), (B, T-1) -> ()."""
    return torch.where(mask > 0, x, 0).sum() / (mask.sum().clamp(min=1) if count is None else count)

def lm_loss(logprobs: Tensor, mask: Tensor, count=None) -> Tensor:
    """(1) -E[log pi(token)], nats a token: (B, T-1), (B, T-1) -> (). SFT's loss, and the ptx term.
    SFT's mask leaves the prompt out: our choice, the paper does not say."""
    return -masked_mean(logprobs, mask, count)

def pairwise_loss(scores: Tensor, ranks: Tensor, groups: Tensor, count=None) -> Tensor:
    """(2) -1/C(K,2) E[log sigmoid(r(x, y_w) - r(x, y_l))], nats a pair (paper, eq. 1).

    scores (N,), ranks (N,) 0 = best and ties equal, groups (N,) the index of the prompt -> (). Each
    completion is scored once and meets all others of its prompt. Tied pairs are dropped (C.2); the
    mean is over a prompt's remaining pairs, then over the prompts that have any (our choice).
    """
    better = (groups[:, None] == groups) & (ranks[:, None] < ranks)
    winner, loser = better.nonzero(as_tuple=True)
    losses = -F.logsigmoid(scores[winner] - scores[loser])
    pairs = torch.bincount(groups[winner], minlength=1)
    prompts = (pairs > 0).sum().clamp(min=1) if count is None else count
    return (losses / pairs[groups[winner]]).sum() / prompts

def kl_rewards(
    scores: Tensor, logprobs: Tensor, ref_logprobs: Tensor, mask: Tensor, kl_coef: float
) -> Tensor:
    """(3) r(x, y) - beta log(pi / ref), token by token (paper, eq. 2): -> (B, T-1).

    scores (B,), the rest (B, T-1). The plain log-ratio (k1) is the one estimator of the KL whose
    expected gradient, as a reward, is the KL's. The score lands on the last response token, always.
    """
    rewards = torch.where(mask > 0, -kl_coef * (logprobs - ref_logprobs), 0)
    last = mask.cumsum(1).argmax(1)
    rewards[torch.arange(len(rewards)), last] += scores
    return rewards

def gae(rewards: Tensor, values: Tensor, mask: Tensor, gamma: float = 1.0, lam: float = 0.95):
    """(4) A_t = sum_l (gamma lam)^l delta_{t+l}, delta_t = r_t + gamma V_{t+1} - V_t: all (B, T-1).

    Generalized advantage estimation (Schulman et al. 2016, eq. 16); after the last response token
    the episode is over and V is 0. Returns advantages, and returns A + V, the values' targets.
    """
    rewards, values = torch.where(mask > 0, rewards, 0), torch.where(mask > 0, values, 0)
    deltas = rewards + gamma * F.pad(values[:, 1:], (0, 1)) - values
    advantages, running = torch.zeros_like(deltas), torch.zeros_like(deltas[:, 0])
    for t in reversed(range(deltas.size(1))):
        running = deltas[:, t] + gamma * lam * running
        advantages[:, t] = running
    advantages = advantages * mask
    return advantages, advantages + values

def whiten(x: Tensor, mask: Tensor) -> Tensor:
    """Mean 0, population variance 1 over the whole batch's valid tokens, else 0: -> (B, T-1)."""
    mean = masked_mean(x, mask)
    variance = masked_mean((x - mean) ** 2, mask)
    return torch.where(mask > 0, (x - mean) * torch.rsqrt(variance + 1e-8), 0)

def policy_loss(
    logprobs: Tensor, old_logprobs: Tensor, advantages: Tensor, mask: Tensor,
    cliprange: float = 0.2, count=None,
) -> tuple[Tensor, dict[str, Tensor]]:
    """(5) -E[min(ratio A, clip(ratio, 1 - eps, 1 + eps) A)], ratio = pi / pi_old (PPO, eq. 7).

    All (B, T-1) -> (), and means over response tokens: the ratio, how often the clip takes effect,
    and half the squared log-ratio, an estimate of KL(pi_old || pi) in nats a token.
    """
    log_ratio = torch.where(mask > 0, logprobs - old_logprobs, 0)
    ratio = log_ratio.exp()
    unclipped = -advantages * ratio
    clipped = -advantages * ratio.clamp(1 - cliprange, 1 + cliprange)
    return masked_mean(torch.maximum(unclipped, clipped), mask, count), {
        "val/ratio": masked_mean(ratio.detach(), mask, count),
        "policy/clipfrac": masked_mean((clipped > unclipped).float(), mask, count),
        "policy/approxkl": masked_mean(log_ratio.detach() ** 2 / 2, mask, count),
    }

def value_loss(
    values: Tensor, old_values: Tensor, returns: Tensor, mask: Tensor,
    cliprange_value: float = 0.2, count=None,
) -> tuple[Tensor, dict[str, Tensor]]:
    """(6) 1/2 E[max((V - R)^2, (V_old + clip(V - V_old, -eps, eps) - R)^2)].

    All (B, T-1) -> (), and statistics. Clip and 1/2 are OpenAI's of 2019 (the paper has neither).
    """
    inputs = torch.stack([values, old_values, returns])
    values, old_values, returns = torch.where(mask > 0, inputs, 0)
    near = old_values + (values - old_values).clamp(-cliprange_value, cliprange_value)
    unclipped, clipped = (values - returns) ** 2, (near - returns) ** 2
    return 0.5 * masked_mean(torch.maximum(unclipped, clipped), mask, count), {
        "val/clipfrac": masked_mean((clipped > unclipped).float(), mask, count),
        "val/error": masked_mean(unclipped.detach(), mask, count),
    }

def implicit_rewards(logprobs: Tensor, ref_logprobs: Tensor, mask: Tensor, beta: float) -> Tensor:
    """(8) beta log(pi(y|x) / ref(y|x)), a sum over the response, EOS included: (B, T-1) -> (B,).

    The reward that pi is already the best answer to under (3), up to a term that completions of a
    prompt share (Rafailov et al. 2023, eq. 5): (2) of it is the loss of DPO (their eq. 7).
    """
    return beta * torch.where(mask > 0, logprobs - ref_logprobs, 0).sum(1)

# ---- Models on tokens ----------------------------------------------------------------------------

def action_mask(prompt_lens: Tensor, total_lens: Tensor, width: int) -> Tensor:
    """1.0 where the action is a response token, EOS included: (B,), (B,), T -> (B, T-1)."""
    action = torch.arange(1, width, device=total_lens.device)
    return ((prompt_lens[:, None] <= action) & (action < total_lens[:, None])).float()

def token_logprobs(policy: GPT, tokens: Tensor, mask: Tensor) -> Tensor:
    """log pi(tokens[:, t+1] | tokens[:, :t+1]) where mask is 1, else 0: -> (B, T-1), float32.

    The one way to a log-probability: SFT, ptx, old, new and reference ones come from here, so the
    ratio before the first update is exactly 1. Only the columns asked for meet the unembedding,
    which with a large vocabulary is most of the memory.
    """
    states, actions = policy.hidden(tokens[:, :-1], mask > 0), tokens[:, 1:][mask > 0]
    actions = F.pad(actions, (0, len(states) - len(actions)))
    logprobs = -F.cross_entropy(policy.unembed(states).float(), actions, reduction="none")
    return torch.zeros_like(mask).masked_scatter(mask > 0, logprobs)

def sequence_scores(reward_model: ScalarModel, tokens: Tensor, total_lens: Tensor) -> Tensor:
    """r(x, y), read at each row's last token, EOS: (B, T), (B,) -> (B,)."""
    last = torch.arange(tokens.size(1), device=tokens.device) == total_lens[:, None] - 1
    return reward_model(tokens, last).sum(1)

def chunks(rows, size: int) -> list:
    """Consecutive parts of at most `size`."""
    return [rows[i : i + size] for i in range(0, len(rows), size)]

def microbatches(rows: list[tuple], numbers, cfg: "Common"):
    """Those rows (ids, prompt_len), padded: yields their numbers, tokens (B, T), mask (B, T-1)."""
    for part in chunks(numbers, cfg.microbatch_size):
        tokens, total_lens = pad_right([rows[i][0] for i in part], cfg.device)
        prompt_lens = torch.tensor([rows[i][1] for i in part], device=cfg.device)
        yield part, tokens, action_mask(prompt_lens, total_lens, tokens.size(1))

def lm_pass(policy: GPT, rows: list[tuple], cfg: "Common", coef: float = 1.0) -> float:
    """(1) over rows of (ids, prompt_len), in microbatches; raw text has a prompt of one token.

    Adds the gradient of coef * (1) to what has been accumulated; under no_grad it only measures.
    """
    count = sum(len(ids) - prompt_len for ids, prompt_len in rows)
    total = 0.0
    for part, tokens, mask in microbatches(rows, share(range(len(rows))), cfg):
        logprobs = finite(token_logprobs(policy, tokens, mask), "log-probabilities of rows", part)
        loss = lm_loss(logprobs, mask, count)
        if torch.is_grad_enabled():
            (coef * loss).backward()
        total += loss.item()
    return sum(gather(total))

def score_rows(model: ScalarModel, rows: list[list[int]], cfg: "Common") -> Tensor:
    """The score of each list of ids: (N,)."""
    parts = [pad_right(part, cfg.device) for part in chunks(rows, cfg.microbatch_size)]
    return torch.cat([sequence_scores(model, tokens, lens) for tokens, lens in parts])

@torch.no_grad()
def complete(policy: GPT, prompts: list[list[int]], eos: int, max_new_tokens: int, temperature=1.0):
    """`generate` for any number of prompts: tokens (B, T), mask (B, T-1), total_lens (B,)."""
    own = []
    with constant_weights(policy):
        for part in chunks(share(prompts), 256):
            tokens, _, lens = generate(policy, part, max_new_tokens, eos, temperature)
            own += [ids[:n] for ids, n in zip(tokens.tolist(), lens.tolist())]
    tokens, total_lens = pad_right(unshare(own), policy.wte.weight.device)
    prompt_lens = torch.tensor([len(prompt) for prompt in prompts], device=tokens.device)
    return tokens, action_mask(prompt_lens, total_lens, tokens.size(1)), total_lens

def responses(tokens: Tensor, mask: Tensor) -> list[list[int]]:
    """The ids of each row's response, EOS included."""
    return [row[own > 0].tolist() for row, own in zip(tokens[:, 1:], mask)]

# ---- Plumbing ------------------------------------------------------------------------------------

def adam(model: torch.nn.Module) -> torch.optim.Adam:
    """Betas from C; epsilon from GPT-3, as the paper gives none; no weight decay (our choice)."""
    broadcast(model)
    return torch.optim.Adam(model.parameters(), betas=(0.9, 0.95), eps=1e-8, fused=True)

def cosine(progress: float) -> float:
    """The learning rate's factor as progress goes from 0 to 1: from 1 to a tenth (C.1, C.2)."""
    return 0.1 + 0.45 * (1 + math.cos(math.pi * progress))

def update(model: torch.nn.Module, optimizer: torch.optim.Adam, learning_rate: float) -> float:
    """One step on the accumulated gradient, clipped to a norm of 1 (our choice); returns the norm,
    and raises UserError, before the step, if any of it is not finite."""
    sum_gradients(model)
    norms = {name: p.grad.norm() for name, p in model.named_parameters() if p.grad is not None}
    norm = finite(torch.stack([*norms.values()]), "the gradient of", norms).norm()
    if norm > 1:
        torch.nn.utils.clip_grads_with_norm_(model.parameters(), 1.0, norm)
    optimizer.param_groups[0]["lr"] = learning_rate
    optimizer.step()
    optimizer.zero_grad()
    return norm.item()

@torch.no_grad()
def ema_update(ema: torch.nn.Module, model: torch.nn.Module, decay: float) -> None:
    """ema <- decay ema + (1 - decay) model."""
    for average, new in zip(ema.parameters(), model.parameters()):
        average.lerp_(new, 1 - decay)

# ---- Settings: every field is a flag, its comment the help; defaults are the fable's -------------

@dataclass
class Pretrain(Training):
    """The base model. The paper began with GPT-3: all of this is our choice."""
    name: str = "gpt"  # of this run: its checkpoint and log
    preset: str = "fable"  # shape of the model: fable, fable-10x, gpt2, gpt2-medium, -large or -xl
    steps: int = 1400  # optimizer steps
    batch_size: int = 96  # documents a step
    microbatch_size: int = 96  # rows of a forward pass: bounds the memory, changes nothing else
    learning_rate: float = 2e-3  # peak, after a warmup of 5 % of the steps; cosine to 10 %

@dataclass
class SFT(Training):
    """Step 1 (C.1)."""
    name: str = "sft"  # of this run: its checkpoint and log
    init: str = "gpt"  # the model to start from
    epochs: int = 6  # passes over the demonstrations (paper: 16; for the start of PPO 2)
    batch_size: int = 32  # demonstrations a step (paper: 32; 175B: 8)
    learning_rate: float = 5e-4  # peak, no warmup, cosine to 10 % (paper: 9.65e-6; 175B: 5.03e-6)
    dropout: float = 0.2  # on the residual branches (paper: 0.2)
    pretrain_fraction: float = 0.0  # of the rows are pretraining text (paper, to start PPO: 0.1)
    window: int = 256  # longest such row, in tokens (paper: not stated)
    reward_model: str = ""  # keep the epoch whose samples it scores highest (paper); else the last

@dataclass
class RM(Training):
    """Step 2 (C.2)."""
    name: str = "rm"  # of this run: its checkpoint and log
    init: str = "sft"  # the policy whose trunk it starts from
    epochs: int = 2  # passes over the comparisons (paper: 1 over five times as many)
    batch_size: int = 8  # prompts a step, with all their pairs (paper: 64)
    microbatch_size: int = 72  # rows of a forward pass, 9 a prompt: bounds the memory alone
    learning_rate: float = 3e-4  # peak, cosine to 10 % (paper: 9e-6)

@dataclass
class PPO(Training):
    """Step 3 (C.3, C.4)."""
    name: str = "ppo_ptx"  # of this run: its checkpoint and log
    init: str = "ppo_init"  # where the policy starts, and the reference it is held to
    reward_model: str = "rm"  # what scores a response; frozen
    value_init: str = ""  # where the value network starts; else as the reward model's copy (paper)
    iterations: int = 100  # rollouts, each followed by its updates (paper: 500)
    rollout_size: int = 128  # episodes an iteration (paper: 512)
    minibatch_size: int = 32  # episodes an optimizer step (paper: 64)
    epochs: int = 1  # passes over a rollout (paper: 1)
    learning_rate: float = 3e-4  # a tenth at first, in full after 10 iterations (paper: swept)
    value_learning_rate: float = 5e-4  # of the value network, likewise (paper: 9e-6)
    kl_coef: float = 0.04  # beta (paper: 0.02)
    ptx_coef: float = 0.5  # gamma; 0 is plain PPO (paper: 27.8, its losses' scale is not stated)
    ptx_ratio: float = 1.0  # rows of pretraining text an episode (paper: 8)
    window: int = 256  # longest such row, in tokens (paper: not stated)
    gamma: float = 1.0  # discount (paper: none)
    lam: float = 0.95  # of GAE (paper: not stated; 0.95 in its predecessors)
    cliprange: float = 0.2  # of the ratio (paper: 0.2)
    cliprange_value: float = 0.2  # of the value's change (not stated; 0.2 in OpenAI's code of 2019)
    max_kl: float = 0.1  # nats a token: updates end when the rollout's policy is left that far
    missing_eos_score: float = -1.0  # replaces the score of a response without EOS (likewise)
    ema_decay: float = 0.992  # a step, of the weights that are kept (paper: 0.992)

@dataclass
class DPO(Training):
    """In place of steps 2 and 3 (Rafailov et al. 2023, appendix B)."""
    name: str = "dpo"  # of this run: its checkpoint and log
    init: str = "ppo_init"  # where the policy starts, and the reference it is held to
    epochs: int = 1  # passes over the comparisons (DPO paper: not stated)
    batch_size: int = 8  # prompts a step, with all their pairs (DPO paper: 64 pairs)
    microbatch_size: int = 72  # rows of a forward pass, 9 a prompt: bounds the memory alone
    learning_rate: float = 1e-4  # peak, after a warmup of 10 %; cosine to 10 % (DPO paper: 1e-6)
    beta: float = 1.0  # more holds the policy closer to the reference (DPO paper: 0.1 and 0.5)

@dataclass
class Evaluate(Common):
    """The table of what each stage did."""
    name: str = "evaluate"  # of the table: out/<name>.md and .json
    models: str = "gpt,gpt+fewshot,sft,ppo,ppo_ptx"  # rows of the table, those that exist
    baseline: str = "sft"  # the row that win rates are against
    reference: str = "ppo_init"  # what the KL is measured from
    reward_model: str = "rm"  # whose score is shown

@dataclass
class Chat(Common):
    """A conversation in the terminal."""
    model: str = "ppo_ptx"  # whom to talk to
    temperature: float = 0.7  # 0 takes the likeliest token every time

# ---- Pretraining, and step 1 ---------------------------------------------------------------------

def epochs(rows: list, count: int, batch_size: int, rng: np.random.Generator) -> list[list]:
    """The batches of `count` passes over the rows, each pass in an order of its own."""
    orders = [rng.permutation(len(rows)) for _ in range(count)]
    return [[rows[i] for i in part] for order in orders for part in chunks(order, batch_size)]

def fit(model, batches: list, backward, cfg, rng, warmup=0.0, validate=None, frozen=()) -> Log:
    """An optimizer step a batch, at a rate that warms up, then falls to a tenth along a cosine.

    backward(model, batch, cfg) accumulates the gradient and returns the loss; validate(step, rows)
    returns further metrics, if that step has any; rows are those of the steps before.
    """
    optimizer, total = adam(model), len(batches)
    with Log(cfg, total, memory_needed([model], frozen, cfg), rng, [model, optimizer]) as log:
        for step in range(len(log.rows) + 1, total + 1):
            metrics = {"loss": backward(model, batches[step - 1], cfg)}
            factor = min(cosine((step - 1) / total), step / max(1, warmup * total))
            metrics["grad_norm"] = update(model, optimizer, cfg.learning_rate * factor)
            log.step(metrics | (validate(step, log.rows) if validate else {}), "loss")
    return log

def pretrain(cfg: Pretrain) -> None:
    """GPT: next-token prediction on raw text, the ability that all the rest only steers."""
    tokenizer, rng = get_tokenizer(cfg.data), np.random.default_rng(cfg.seed)
    text = read_pretraining(Path(cfg.data) / "pretrain.txt", tokenizer)
    vocabulary = dict(vocab_size=tokenizer.n_vocab, vocabulary=fingerprint(tokenizer))
    model = GPT(GPTConfig(**vocabulary, **PRESETS[cfg.preset])).to(cfg.device)

    def validate(step: int, _) -> dict[str, float]:
        due = step % 100 == 0 or step == cfg.steps
        return {"heldout/loss": heldout_loss(model, tokenizer, cfg)} if due else {}

    rows = passages(text, cfg.steps * cfg.batch_size, model.config.block_size, rng)
    fit(model, chunks(rows, cfg.batch_size), lm_pass, cfg, rng, 0.05, validate).finish(model)

@torch.no_grad()
def heldout_loss(policy: GPT, tokenizer, cfg: Common) -> float:
    """(1) on held-out pretraining text, nats a token: where the alignment tax shows."""
    text = read_pretraining(Path(cfg.data) / "pretrain_valid.txt", tokenizer)
    return lm_pass(policy, [(ids[: policy.config.block_size], 1) for ids in text[:512]], cfg)

def sft(cfg: SFT) -> None:
    """Step 1: imitate the demonstrations, by (1) on each completion and its EOS.

    The paper kept the epoch of the best reward-model score on held-out prompts, which rises on
    after the loss is lowest (C.1). Without a reward model the last epoch is kept.
    """
    tokenizer, data, rng = get_tokenizer(cfg.data), Path(cfg.data), np.random.default_rng(cfg.seed)
    model = load(cfg, cfg.init, GPT, cfg.dropout).train()
    reward_model = load(cfg, cfg.reward_model, ScalarModel) if cfg.reward_model else None
    rows = read_demonstrations(data / "sft.jsonl", tokenizer, model.config.block_size)
    valid = read_demonstrations(data / "sft_valid.jsonl", tokenizer, model.config.block_size)
    if mixed := round(len(rows) * cfg.pretrain_fraction / (1 - cfg.pretrain_fraction)):
        rows += passages(read_pretraining(data / "pretrain.txt", tokenizer), mixed, cfg.window, rng)
    batches = epochs(rows, cfg.epochs, cfg.batch_size, rng)
    longest = room(model, cfg) if reward_model else 0
    prompts = [ids[:prompt_len] for ids, prompt_len in valid if prompt_len <= longest]
    if reward_model and not prompts:
        raise UserError(f"--max_new_tokens {cfg.max_new_tokens}: no prompt leaves so much room")

    @torch.no_grad()
    def validate(step: int, earlier: list[dict]) -> dict[str, float]:
        if step % (len(batches) // cfg.epochs):
            return {}
        metrics = {"valid/loss": lm_pass(model.eval(), valid, cfg)}
        if reward_model:
            tokens, _, lens = complete(model, prompts, tokenizer.eot_token, cfg.max_new_tokens)
            metrics["valid/score"] = sequence_scores(reward_model, tokens, lens).mean().item()
        scores = [row["valid/score"] for row in [*earlier, metrics] if "valid/score" in row]
        if not scores or scores[-1] == max(scores):
            save(cfg, model)
        model.train()
        tqdm.write(f"epoch {step * cfg.epochs // len(batches)}: {describe(metrics)}")
        return metrics

    fit(model, batches, lm_pass, cfg, rng, validate=validate).finish()

# ---- Step 2: the reward model --------------------------------------------------------------------

def rm(cfg: RM) -> None:
    """Step 2: learn to score completions in the order in which the labelers ranked them, by (2)."""
    tokenizer, data, rng = get_tokenizer(cfg.data), Path(cfg.data), np.random.default_rng(cfg.seed)
    policy = load(cfg, cfg.init)
    model = ScalarModel(policy.config).to(cfg.device).eval()
    model.gpt.load_state_dict(policy.state_dict())  # whose unembedding gives way to a scalar head
    context = policy.config.block_size
    train = read_comparisons(data / "comparisons.jsonl", tokenizer, context)
    valid = read_comparisons(data / "comparisons_valid.jsonl", tokenizer, context)
    demonstrations = read_demonstrations(data / "sft.jsonl", tokenizer, context)
    log = fit(model, epochs(train, cfg.epochs, cfg.batch_size, rng), rm_backward, cfg, rng)
    normalise(model, demonstrations, train, cfg)
    report = rm_report(model, {row.get("labeler") for row in train}, valid, cfg)
    log.line(report)
    tqdm.write(describe(report))
    log.finish(model)

def rm_backward(model, batch: list[dict], cfg, score=score_rows) -> float:
    """Accumulate the gradient of (2) over whole prompts; `score` gives the rewards, for DPO (8)."""
    total, count = 0.0, max(1, sum(len(set(row["ranks"])) > 1 for row in batch))
    for part in chunks(share(range(len(batch))), max(1, cfg.microbatch_size // 9)):  # paper: K <= 9
        ids = [ids for i in part for ids in batch[i]["ids"]]
        ranks = torch.tensor([rank for i in part for rank in batch[i]["ranks"]], device=cfg.device)
        groups = torch.tensor([i for i in part for _ in batch[i]["ids"]], device=cfg.device)
        scores = finite(score(model, ids, cfg), "scores of rows", groups.tolist())
        loss = pairwise_loss(scores, ranks, groups, count)
        loss.backward()
        total += loss.item()
    return sum(gather(total))

@torch.no_grad()
def normalise(model: ScalarModel, demonstrations: list, train: list[dict], cfg: RM) -> None:
    """Shift the scores so that demonstrations have 0 on average (C.2); note how far they range."""
    model.head.bias -= score_rows(model, [ids for ids, _ in demonstrations], cfg).mean()
    scores = score_rows(model, [ids for row in train[:512] for ids in row["ids"]], cfg)
    model.score_range.copy_(torch.stack([scores.min(), scores.max()]))

@torch.no_grad()
def rm_report(model: ScalarModel, seen: set, valid: list[dict], cfg: RM) -> dict[str, float]:
    """On held-out prompts: the share of untied pairs put in the labeler's order and their margin,
    for labelers `seen` in training and others; the scores' spread and correlation with length."""
    scores, lens, margins = [], [], {"eval": [], "eval_heldout_labelers": []}
    for row in valid:
        score, ranks = score_rows(model, row["ids"], cfg), torch.tensor(row["ranks"])
        winner, loser = (ranks[:, None] < ranks).nonzero(as_tuple=True)
        split = "eval" if row.get("labeler") in seen else "eval_heldout_labelers"
        margins[split] += (score[winner] - score[loser]).tolist()
        scores += score.tolist()
        lens += [len(ids) - len(row["prompt_ids"]) for ids in row["ids"]]
    correlation = float(np.corrcoef(scores, lens)[0, 1])
    report = {"eval/score_std": float(np.std(scores)), "eval/length_correlation": correlation}
    for split in filter(margins.get, margins):
        report[f"{split}/accuracy"] = float(np.mean(np.array(margins[split]) > 0))
        report[f"{split}/margin"] = float(np.mean(margins[split]))
    return report

# ---- Step 3: PPO; or DPO, in place of steps 2 and 3 ----------------------------------------------

class Models(NamedTuple):
    """PPO's four networks, and the running average of the policy that is kept in the end."""
    policy: GPT
    ref: GPT
    reward: ScalarModel
    value: ScalarModel
    ema: GPT

class Rollout(NamedTuple):
    """Episodes, detached: tokens (B, T), and the rest (B, T-1)."""
    tokens: Tensor
    mask: Tensor
    logprobs: Tensor
    values: Tensor
    advantages: Tensor
    returns: Tensor

def minibatches(order: Tensor, cfg: PPO) -> list[list[list[int]]]:
    """This process's rows of each optimizer step, in microbatches."""
    steps = chunks(order.tolist(), cfg.minibatch_size)
    return [chunks(share(rows), cfg.microbatch_size) for rows in steps]

@torch.no_grad()
def rollout(models: Models, prompts: list, eos: int, cfg: PPO) -> tuple[Rollout, dict]:
    """A response to each prompt, with its advantages; and statistics, each (B,).

    KL and entropy are sums over a response, in nats, estimated from the sample: one episode's KL
    may be negative, their expectation not.
    """
    tokens, mask, lens = complete(models.policy, prompts, eos, cfg.max_new_tokens)
    everyone = torch.arange(len(tokens), device=tokens.device)
    logprobs, ref_logprobs, values = torch.zeros(3, *mask.shape, device=tokens.device)
    scores = torch.zeros(len(tokens), device=tokens.device)
    for rows in sum(minibatches(everyone, cfg), []):  # the first update's: its ratio is 1
        logprobs[rows] = token_logprobs(models.policy, tokens[rows], mask[rows])
        ref_logprobs[rows] = token_logprobs(models.ref, tokens[rows], mask[rows])
        values[rows] = models.value(tokens[rows, :-1], mask[rows] > 0)
        scores[rows] = sequence_scores(models.reward, tokens[rows], lens[rows])
    all_sum(logprobs, ref_logprobs, values, scores)  # each 0 in the rows of other processes
    finite(torch.stack([scores, values.sum(1), logprobs.sum(1), ref_logprobs.sum(1)], 1),
           "score, values or log-probabilities of rows", range(len(tokens)))
    low, high = models.reward.score_range
    far = (scores - (low + high) / 2).abs() > high - low  # twice as far from the middle as any seen
    ended = tokens[everyone, lens - 1] == eos
    scores = torch.where(ended, scores, cfg.missing_eos_score)
    rewards = kl_rewards(scores, logprobs, ref_logprobs, mask, cfg.kl_coef)
    advantages, returns = gae(rewards, values, mask, cfg.gamma, cfg.lam)
    kl = ((logprobs - ref_logprobs) * mask).sum(1)
    episodes = {
        "objective/scores": scores, "objective/kl": kl, "objective/entropy": -logprobs.sum(1),
        "objective/rlhf_reward": scores - cfg.kl_coef * kl,
        "objective/scores_far_out": far.float(),
        "eos_fraction": ended.float(), "response_length": mask.sum(1),
    }
    batch = Rollout(tokens, mask, logprobs, values, whiten(advantages, mask), returns)
    return batch, episodes

def ppo_backward(models: Models, batch: Rollout, microbatches: list[list[int]], cfg: PPO) -> dict:
    """Accumulate the gradients of (5) in the policy, of (6) in the value network: statistics."""
    count = sum(gather(sum(batch.mask[rows].sum().item() for rows in microbatches)))
    parts = []
    for rows in microbatches:
        tokens, mask, old, old_values, advantages, returns = (x[rows] for x in batch)
        new = token_logprobs(models.policy, tokens, mask)
        values = models.value(tokens[:, :-1], mask > 0)
        finite(new, "log-probabilities of rows", rows)
        finite(values, "values of rows", rows)
        loss, of_policy = policy_loss(new, old, advantages, mask, cfg.cliprange, count)
        error, of_value = value_loss(values, old_values, returns, mask, cfg.cliprange_value, count)
        (loss + error).backward()  # two networks with no parameter in common
        sums = {"loss/policy": loss, "loss/value": error, **of_policy, **of_value}
        parts.append({key: x.item() for key, x in sums.items()})
    parts = sum(gather(parts), [])
    return {key: sum(part[key] for part in parts) for key in parts[0]}

def ppo_update(models, optimizers, batch: Rollout, text, factor: float, rng, cfg: PPO) -> dict:
    """(7) (5) + ptx_coef (1), minimised over the policy, and (6) over the value network.

    One step a minibatch; the gradients of PPO and of ptx meet in the same buffers (C.4). `factor`
    is on both learning rates. Returns the means of the statistics over the steps, which end early
    where `max_kl` is exceeded.
    """
    steps, orders = [], [torch.arange(len(batch.tokens))]  # first the rollout's: its ratio is 1
    orders += [gather(torch.randperm(len(batch.tokens)))[0] for _ in range(cfg.epochs - 1)]
    planned = sum((minibatches(order, cfg) for order in orders), [])
    for microbatches in planned:
        stats = ppo_backward(models, batch, microbatches, cfg)
        if not steps and abs(stats["val/ratio"] - 1) > 1e-4:
            raise UserError(f"ratio {stats['val/ratio']} before the first update: it must be 1")
        if stats["policy/approxkl"] > cfg.max_kl:
            for optimizer in optimizers:
                optimizer.zero_grad()
            kl = f"{stats['policy/approxkl']:.3g} nats a token, over --max_kl {cfg.max_kl}"
            tqdm.write(f"{len(steps)} of {len(planned)} updates: KL from the rollout's policy {kl}")
            break
        if cfg.ptx_coef:
            rows = passages(text, round(cfg.ptx_ratio * cfg.minibatch_size), cfg.window, rng)
            stats["loss/ptx"] = lm_pass(models.policy, rows, cfg, cfg.ptx_coef)
        update(models.policy, optimizers[0], cfg.learning_rate * factor)
        update(models.value, optimizers[1], cfg.value_learning_rate * factor)
        ema_update(models.ema, models.policy, cfg.ema_decay)
        steps.append(stats)
    means = {key: float(np.mean([stats[key] for stats in steps])) for key in steps[0]}
    deviations = batch.returns - masked_mean(batch.returns, batch.mask)
    unexplained = means["val/error"] / masked_mean(deviations**2, batch.mask).item()
    return means | {"val/var_explained": 1 - unexplained}

def ppo(cfg: PPO) -> None:
    """Step 3: optimise the policy for the reward model, with KL and pretraining terms, by (7)."""
    tokenizer, data, rng = get_tokenizer(cfg.data), Path(cfg.data), np.random.default_rng(cfg.seed)
    policy, reward = load(cfg, cfg.init), load(cfg, cfg.reward_model, ScalarModel)
    value = load(cfg, cfg.value_init or cfg.reward_model, ScalarModel)
    models = Models(policy, *map(copy.deepcopy, (policy, reward, value, policy)))
    optimizers = adam(policy), adam(models.value)
    memory = memory_needed([policy, models.value], [models.ref, models.reward, models.ema], cfg)
    prompts = read_rows(data / "prompts.jsonl", tokenizer, room(policy, cfg), "prompt")
    text = read_pretraining(data / "pretrain.txt", tokenizer) if cfg.ptx_coef else None
    gold = gold_function(prompts, cfg.gold)
    passes = math.ceil(cfg.iterations * cfg.rollout_size / len(prompts))
    batches = epochs(prompts * passes, 1, cfg.rollout_size, rng)[: cfg.iterations]
    parts = [policy, models.value, models.ema, *optimizers]
    with Log(cfg, cfg.iterations, memory, rng, parts) as log:
        for iteration, rows in enumerate(batches[len(log.rows) :], len(log.rows)):
            prompt_ids = [row["prompt_ids"] for row in rows]
            batch, episodes = rollout(models, prompt_ids, tokenizer.eot_token, cfg)
            metrics = {key: x.mean().item() for key, x in episodes.items()}
            if iteration == 0 and (kl := metrics["objective/kl"]) != 0:
                raise UserError(f"KL {kl} before the first update: it must be 0")
            if metrics["objective/scores_far_out"]:  # where a policy that games them shows first
                usual = "to".join(f" {x:.2f} " for x in reward.score_range.tolist())
                tqdm.write(f"iteration {iteration + 1}: scores far outside{usual}seen in training")
            completions = [decode(tokenizer, ids) for ids in responses(batch.tokens, batch.mask)]
            if gold:  # what the reward model stands in for; nobody is trained on it
                totals = [sum(gold(*pair).values()) for pair in zip(rows, completions)]
                metrics["objective/gold"] = float(np.mean(totals))
            factor = min(1, 0.1 + 0.09 * iteration)  # C.4: a warmup over ten iterations
            metrics |= ppo_update(models, optimizers, batch, text, factor, rng, cfg)
            if iteration % 10 == 0 or iteration + 1 == cfg.iterations:
                metrics["heldout/loss"] = heldout_loss(policy, tokenizer, cfg)
                sampled = describe({key: x[0].item() for key, x in episodes.items()})
                tqdm.write(printable(f"{rows[0]['prompt']}{completions[0]}\n  [{sampled}]"))
            log.step(metrics, "objective/scores", "objective/kl")
    log.finish(models.ema)

def dpo(cfg: DPO) -> None:
    """In place of steps 2 and 3: learn from the rankings with no reward model, by (2) of (8)."""
    tokenizer, rng = get_tokenizer(cfg.data), np.random.default_rng(cfg.seed)
    policy, ref = load(cfg, cfg.init), load(cfg, cfg.init).requires_grad_(False)
    file, context = Path(cfg.data) / "comparisons.jsonl", policy.config.block_size
    rows = read_comparisons(file, tokenizer, context)
    for row in rows:
        row["ids"] = [(ids, len(row["prompt_ids"])) for ids in row["ids"]]
    batches = epochs(rows, cfg.epochs, cfg.batch_size, rng)
    backward = partial(rm_backward, score=partial(implicit_scores, ref))
    fit(policy, batches, backward, cfg, rng, 0.1, frozen=[ref]).finish(policy)

def implicit_scores(ref: GPT, policy: GPT, rows: list[tuple], cfg: DPO) -> Tensor:
    """(8) of each row (ids, prompt_len), in microbatches: (N,)."""
    rewards = []
    for _, tokens, mask in microbatches(rows, range(len(rows)), cfg):
        logs = (token_logprobs(model, tokens, mask) for model in (policy, ref))
        rewards.append(implicit_rewards(*logs, mask, cfg.beta))
    return torch.cat(rewards)

# ---- Evaluation ----------------------------------------------------------------------------------

def win_rate(own: np.ndarray, other: np.ndarray) -> tuple[float, float]:
    """The share of prompts (N,) where `own` is better, ties half; half its 95 % interval's width.
    Judging both orders would change nothing: win_rate(a, b) + win_rate(b, a) = 1."""
    outcomes = (own > other) + 0.5 * (own == other)
    return float(outcomes.mean()), float(1.96 * outcomes.std() / len(outcomes) ** 0.5)

@torch.no_grad()
def measure(policy: GPT, prompts: list, rows: list[dict], ref, reward, gold, tokenizer, cfg):
    """One row of the table, {column: value}, and each prompt's gold score (N,). `prompts` are the
    ids of `rows`, after examples perhaps; `ref`, `reward` and `gold` may be None."""
    tokens, mask, _ = complete(policy, prompts, tokenizer.eot_token, cfg.max_new_tokens)
    answers, result, totals = responses(tokens, mask), {}, None
    plain = [(row["prompt_ids"] + ids, len(row["prompt_ids"])) for row, ids in zip(rows, answers)]
    if gold:  # who goes on to speak for the human as well is judged by their own turn
        turns = [own_turn(decode(tokenizer, ids)) for ids in answers]
        axes = [gold(row, turn) for row, turn in zip(rows, turns)]
        result |= {axis: np.mean([x[axis] for x in axes]) for axis in axes[0]}
        totals = np.array([sum(x.values()) for x in axes])
    if reward:
        result["RM score"] = score_rows(reward, [ids for ids, _ in plain], cfg).mean().item()
    if ref:  # the mean over prompts of log pi(y|x) - log ref(y|x), in nats
        own = [(prompt + ids, len(prompt)) for prompt, ids in zip(prompts, answers)]
        per_token = lm_pass(ref, plain, cfg) - lm_pass(policy, own, cfg)
        result["KL"] = per_token * mask.sum(1).mean().item()
    result["length"] = mask.sum(1).mean().item()
    result["EOS"] = np.mean([ids[-1] == tokenizer.eot_token for ids in answers])
    return result, totals

def few_shot(examples: list[list[int]], prompt: list[int], room: int) -> list[int]:
    """The prompt after as many of the examples as there is room for."""
    while examples and sum(map(len, examples)) + len(prompt) > room:
        examples = examples[1:]
    return sum(examples, []) + prompt

def probe_accuracy(policy: GPT, probes: list[dict], tokenizer) -> float:
    """The share of in-context tasks to which the likeliest continuation begins with the answer."""
    prompts = [row["prompt_ids"] for row in probes]
    tokens, mask, _ = complete(policy, prompts, tokenizer.eot_token, 16, temperature=0)
    guesses = [decode(tokenizer, ids) for ids in responses(tokens, mask)]
    return np.mean([guess.startswith(row["completion"]) for guess, row in zip(guesses, probes)])

def evaluate(cfg: Evaluate) -> None:
    """What each stage did, on held-out prompts: a table on the terminal, in Markdown, in JSON."""
    tokenizer, data = get_tokenizer(cfg.data), Path(cfg.data)
    titles = [x for x in cfg.models.split(",") if checkpoint(cfg, x.split("+")[0]).exists()]
    if not titles:
        raise UserError(f"none of {cfg.models} is in {cfg.out}: train one first")
    longest = room(load(cfg, titles[0].split("+")[0]), cfg)
    rows = read_rows(data / "prompts_valid.jsonl", tokenizer, longest, "prompt")
    files = [data / "probes.jsonl", data / "fewshot.jsonl"]
    needs = tokenizer, longest, "prompt", "completion"
    probes, examples = (read_rows(file, *needs) if file.exists() else [] for file in files)
    wanted = (cfg.reference, GPT), (cfg.reward_model, ScalarModel)
    ref, reward = (load(cfg, *x) if checkpoint(cfg, x[0]).exists() else None for x in wanted)
    results, golds, gold = {}, {}, gold_function(rows, cfg.gold)
    for title in titles:
        name, _, prompted = title.partition("+")
        if prompted and not examples:
            continue
        torch.manual_seed(cfg.seed)
        policy, shots = load(cfg, name), [row["ids"][0][:-1] for row in examples if prompted]
        prompts = [few_shot(shots, row["prompt_ids"], longest) for row in rows]
        result, golds[title] = measure(policy, prompts, rows, ref, reward, gold, tokenizer, cfg)
        results[title] = result | {"held-out loss": heldout_loss(policy, tokenizer, cfg)}
        if probes:
            results[title]["in-context"] = probe_accuracy(policy, probes, tokenizer)
    for title in results if gold and cfg.baseline in results else ():
        rate, margin = win_rate(golds[title], golds[cfg.baseline])
        results[title] = {"win rate": rate, "±": margin, **results[title]}
    texts = {title: {key: f"{x:.3f}" for key, x in row.items()} for title, row in results.items()}
    print(table := markdown(texts, "model"))
    content = json.dumps({"table": results, "gold": golds}, default=np.ndarray.tolist)
    for suffix, text in ((".md", table), (".json", content)):
        with replacing(Path(cfg.out) / (cfg.name + suffix)) as file:
            file.write(f"{text}\n".encode())

# ---- Chat, and the command line ------------------------------------------------------------------

def chat(cfg: Chat) -> None:
    """Talk to a model in the terminal; an empty line, Ctrl-C or Ctrl-D ends it."""
    tokenizer, policy, messages = get_tokenizer(cfg.data), load(cfg, cfg.model), []
    longest = room(policy, cfg)
    while text := input("\nHuman: ").strip():
        messages.append({"role": "user", "content": text})
        while len(ids := encode(tokenizer, render(messages))) > longest and len(messages) > 1:
            print("(No room: the oldest question and answer are forgotten.)")
            messages = messages[2:]
        if len(ids) > longest:
            print("(No room: only the end of this is read.)")
        print("Assistant:", end="", flush=True)
        pieces = []
        for piece in speak(policy, ids[-longest:], tokenizer, cfg):
            print(piece, end="", flush=True)
            pieces.append(piece)
        messages.append({"role": "assistant", "content": "".join(pieces).strip()})

def speak(policy: GPT, ids: list[int], tokenizer, cfg: Chat):
    """Yields the reply as it is sampled, in whole characters, control characters left out."""
    decoder, eos = codecs.getincrementaldecoder("utf-8")("replace"), tokenizer.eot_token
    for _, token in stream(policy, [ids], cfg.max_new_tokens, eos, cfg.temperature):
        if token.item() != eos:
            yield printable(decoder.decode(tokenizer.decode_single_token_bytes(token.item())))

STAGES = {stage.__name__: stage for stage in (pretrain, sft, rm, ppo, dpo, evaluate, chat)}

def main(argv: list[str] | None = None) -> None:
    """python rlhf.py STAGE --flag value"""
    run_one(STAGES, __doc__, argv)

if __name__ == "__main__":
    main()

"""InstructGPT (Ouyang et al. 2022, arXiv 2203.02155), from random weights to an aligned model.

    pretrain -> sft (step 1) -> rm (step 2) -> ppo (step 3), or dpo -> evaluate, chat

Symbols: the paper's, ours, and where the paper has them (its gamma is not our discount):

    pi^RL, pi^SFT   policy, ref       eq. 2     gamma      ptx_coef      eq. 2
    r_theta(x, y)   scores (B,)       eq. 1     discount   gamma = 1     C.4
    beta            kl_coef           eq. 2     lambda     lam           not stated
    pi / pi_old     ratio (B, T-1)    PPO       epsilon    cliprange     C.4

All tensors share one layout. A row is prompt, response, padding. Whatever belongs to a token (its
log-probability, reward, value) is kept in the column where it was chosen: column t is the state
after reading tokens[:, :t+1], and its action is tokens[:, t+1].

    tokens   (B, T)    p0   p1   p2   r0   r1   EOS  pad  pad
    column t           0    1    2    3    4    5    6
    action             p1   p2   r0   r1   EOS  pad  pad
    mask     (B, T-1)  0    0    1    1    1    0    0
    rewards            .    .   -b k -b k -b k + score       b = kl_coef, k = log pi - log ref

A value therefore belongs to the state before the action. The mask is made from lengths, never from
token ids, for SFT and PPO alike. "OpenAI, 2019" is the code of Ziegler et al. (1909.08593).
"""

import argparse
import inspect
import json
import math
import os
import re
import signal
import sys
import time
from dataclasses import asdict, dataclass, fields
from functools import cache
from pathlib import Path
from typing import Annotated, Literal, NamedTuple, get_args, get_origin
from zipfile import ZipFile

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor
from tqdm import tqdm

from data.files import (
    Example, Ranking, UserError, decode, digest, encode, fingerprint, get_tokenizer, gold_function,
    lock, own_turn, printable, read_comparisons, read_demonstrations, read_documents, read_prompts,
    render, replacing
)
from model import GPT, PRESETS, GPTConfig, ScalarModel, pad_right, respond
from parallel import RANK, all_sum, gather, joined, share, sum_gradients, together

# ---- The equations: tensors and floats in, tensors out ---------------------------------
# Where the tensors are only part of an optimizer step, `count` is the number of terms in the whole
# step, by which the sum is divided, so that the parts add up to the mean. Nothing outside the mask
# matters, not even NaN.

def masked_mean(x: Tensor, mask: Tensor, count=None) -> Tensor:
    """The mean of x over the columns where mask is 1: (B, T-1), (B, T-1) -> ()."""
    if count is None:
        count = mask.sum().clamp(min=1)
    return torch.where(mask > 0, x, 0).sum() / count

def lm_loss(logprobs: Tensor, mask: Tensor, count=None) -> Tensor:
    """eq. (1): -E[log pi(token)], in nats per token: (B, T-1), (B, T-1) -> ().

    SFT's loss, whose mask excludes the prompt (our choice; not stated), and the ptx term.
    """
    return -masked_mean(logprobs, mask, count)

def pairwise_loss(scores: Tensor, ranks: Tensor, groups: Tensor, count=None) -> Tensor:
    """eq. (2): -1/C(K,2) E[log sigmoid(r(x, y_w) - r(x, y_l))], nats per pair (paper, eq. 1).

    scores (N,), ranks (N,) where 0 is best and ties are equal, groups (N,) the index of the
    prompt -> (). Each completion is scored once and compared with all others of its prompt. Tied
    pairs are dropped (C.2). The mean is over the pairs of a prompt, then over the prompts
    (our choice).
    """
    winner, loser = preferences(ranks, groups)
    losses = -F.logsigmoid(scores[winner] - scores[loser])
    pairs = torch.bincount(groups[winner], minlength=1)
    prompts = (pairs > 0).sum().clamp(min=1) if count is None else count
    return (losses / pairs[groups[winner]]).sum() / prompts

def preferences(ranks: Tensor, groups: Tensor) -> tuple[Tensor, Tensor]:
    """All pairs of completions of one prompt that are not tied: indices of winners, losers."""
    better = (groups[:, None] == groups) & (ranks[:, None] < ranks)
    return better.nonzero(as_tuple=True)

def kl_rewards(
    scores: Tensor, logprobs: Tensor, ref_logprobs: Tensor, mask: Tensor, kl_coef: float
) -> Tensor:
    """eq. (3): r(x, y) - beta log(pi / ref), token by token (paper, eq. 2): -> (B, T-1).

    scores (B,), the rest (B, T-1). Of the estimators of the KL in use (k1, k2, k3) only the
    plain log-ratio, k1, has the right expected gradient as a reward. The score always lands on
    the last response token.
    """
    rewards = torch.where(mask > 0, -kl_coef * (logprobs - ref_logprobs), 0)
    columns = torch.arange(mask.size(1), device=mask.device)
    last = (mask * columns).argmax(1)
    rewards[torch.arange(len(rewards)), last] += scores
    return rewards

def gae(rewards: Tensor, values: Tensor, mask: Tensor, gamma: float = 1.0, lam: float = 0.95):
    """eq. (4): A_t = sum_l (gamma lam)^l delta_{t+l}, delta_t = r_t + gamma V_{t+1} - V_t.

    Generalized advantage estimation (Schulman et al. 2016, arXiv 1506.02438, eq. 16), all (B,
    T-1). The episode ends with the last response token, after which V is 0. Returns the
    advantages A, and A + V, the targets of the value network.
    """
    rewards = torch.where(mask > 0, rewards, 0)
    values = torch.where(mask > 0, values, 0)
    deltas = rewards + gamma * F.pad(values[:, 1:], (0, 1)) - values
    advantages = torch.zeros_like(deltas)
    running = torch.zeros_like(deltas[:, 0])
    for t in reversed(range(deltas.size(1))):
        running = deltas[:, t] + gamma * lam * running
        advantages[:, t] = running
    advantages = advantages * mask
    return advantages, advantages + values

def whiten(x: Tensor, mask: Tensor) -> Tensor:
    """Mean 0 and population variance 1 over response tokens, 0 elsewhere: -> (B, T-1).

    Not stated by the paper. OpenAI's code of 2019 whitens each minibatch, we the whole rollout.
    """
    mean = masked_mean(x, mask)
    variance = masked_mean((x - mean) ** 2, mask)
    return torch.where(mask > 0, (x - mean) * torch.rsqrt(variance + 1e-8), 0)

def policy_loss(
    logprobs: Tensor, old_logprobs: Tensor, advantages: Tensor, mask: Tensor,
    cliprange: float = 0.2, count=None,
) -> tuple[Tensor, dict[str, Tensor]]:
    """eq. (5): -E[min(ratio A, clip(ratio, 1 - eps, 1 + eps) A)], ratio = pi / pi_old.

    The clipped objective of PPO (Schulman et al. 2017, arXiv 1707.06347, eq. 7): all (B, T-1)
    -> (). That every token weighs the same is our choice. Also returns means over response
    tokens: the ratio, how often the clip takes effect, and half the squared log-ratio, an
    estimate of KL(pi_old || pi) in nats per token.
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
    """eq. (6): 1/2 E[max((V - R)^2, (V_old + clip(V - V_old, -eps, eps) - R)^2)].

    All (B, T-1) -> (), and statistics. The paper does not state this loss; OpenAI's code of
    2019 has the clip and the 1/2.
    """
    values = torch.where(mask > 0, values, 0)
    old_values = torch.where(mask > 0, old_values, 0)
    returns = torch.where(mask > 0, returns, 0)
    v_clip = old_values + (values - old_values).clamp(-cliprange_value, cliprange_value)
    unclipped = (values - returns) ** 2
    clipped = (v_clip - returns) ** 2
    return 0.5 * masked_mean(torch.maximum(unclipped, clipped), mask, count), {
        "val/clipfrac": masked_mean((clipped > unclipped).float(), mask, count),
        "val/error": masked_mean(unclipped.detach(), mask, count),
    }

def implicit_rewards(logprobs: Tensor, ref_logprobs: Tensor, mask: Tensor, beta: float):
    """eq. (8): beta log(pi(y|x) / ref(y|x)), summed over the response: (B, T-1) -> (B,).

    The reward for which pi is already optimal under eq. (3), up to a term that all
    completions of a prompt share (Rafailov et al. 2023, arXiv 2305.18290, eq. 5). Eq. (2) of
    these rewards is DPO's loss (their eq. 7).
    """
    return beta * torch.where(mask > 0, logprobs - ref_logprobs, 0).sum(1)

# ---- Models on tokens ------------------------------------------------------------------

def action_mask(prompt_lens: Tensor, total_lens: Tensor, width: int) -> Tensor:
    """1.0 where the action is a response token, EOS included: (B,), (B,), T -> (B, T-1)."""
    action = torch.arange(1, width, device=total_lens.device)
    return ((prompt_lens[:, None] <= action) & (action < total_lens[:, None])).float()

def pad_examples(examples: list[Example], device: str) -> tuple[Tensor, Tensor, Tensor]:
    """Examples as tokens (B, T), mask (B, T-1) and total_lens (B,)."""
    tokens, total_lens = pad_right([example.ids for example in examples], device)
    prompt_lens = torch.tensor([example.prompt_len for example in examples], device=device)
    return tokens, action_mask(prompt_lens, total_lens, tokens.size(1)), total_lens

def token_logprobs(policy: GPT, tokens: Tensor, mask: Tensor) -> Tensor:
    """log pi(tokens[:, t+1] | tokens[:, :t+1]) where mask is 1, else 0: -> (B, T-1), float32.

    All losses take their log-probabilities from here, so the ratio before the first update is
    exactly 1. Only the columns in the mask meet the unembedding, which takes most of the
    memory where the vocabulary is large.
    """
    chosen = mask > 0
    logits = policy.unembed(policy.hidden(tokens[:, :-1])[chosen])
    logprobs = -F.cross_entropy(logits, tokens[:, 1:][chosen], reduction="none")
    return torch.zeros_like(mask).masked_scatter(chosen, logprobs)

def sequence_scores(reward_model: ScalarModel, tokens: Tensor, total_lens: Tensor) -> Tensor:
    """r(x, y), read at each row's last token, its EOS if it has one: (B, T), (B,) -> (B,)."""
    return reward_model(tokens).gather(1, total_lens[:, None] - 1).squeeze(1)

def chunks(items: list, size: int) -> list[list]:
    """Consecutive parts of at most `size` items."""
    return [items[start : start + size] for start in range(0, len(items), size)]

def by_length(indices, examples: list[Example], cfg: "Settings"):
    """Divide some of the examples into forward passes, by length; yields the indices of each.

    On a CPU a pass is halved for as long as that saves 128 tokens of padding.
    """
    lengths = [len(example.ids) for example in examples]
    waiting = chunks(sorted(indices, key=lengths.__getitem__), cfg.microbatch_size)
    while waiting:
        part = waiting.pop()
        half = len(part) // 2
        saved = half * (lengths[part[-1]] - lengths[part[half - 1]])
        if cfg.device == "cpu" and saved >= 128:
            waiting += [part[:half], part[half:]]
        else:
            yield part

def totals(passes: list[dict]) -> dict[str, float]:
    """The sums, key by key, of what the forward passes of all processes found."""
    sums = {}
    for of_one_process in gather(passes):
        for found in of_one_process:
            for key, value in found.items():
                sums[key] = sums.get(key, 0.0) + value
    return sums

def lm_pass(policy: GPT, examples: list[Example], cfg: "Settings", coef: float = 0.0) -> float:
    """Eq. (1) over the examples, nats per token; accumulates the gradient of coef * loss."""
    count = sum(len(example.ids) - example.prompt_len for example in examples)
    losses = []
    own = share(range(len(examples)))
    for indices in by_length(own, examples, cfg):
        tokens, mask, _ = pad_examples([examples[i] for i in indices], cfg.device)
        with torch.set_grad_enabled(coef > 0):
            loss = lm_loss(token_logprobs(policy, tokens, mask), mask, count)
        if coef > 0:
            (coef * loss).backward()
        losses.append({"loss": loss.item()})
    return totals(losses)["loss"]

def score(model: ScalarModel, examples: list[Example], cfg: "Settings") -> Tensor:
    """The score of each example: (N,)."""
    scores = torch.zeros(len(examples), device=cfg.device)
    for indices in by_length(range(len(examples)), examples, cfg):
        tokens, _, total_lens = pad_examples([examples[i] for i in indices], cfg.device)
        scores[indices] = sequence_scores(model, tokens, total_lens)
    return scores

def sample_responses(policy, prompts, eos, cfg: "Settings", temperature=1.0) -> list[tuple]:
    """A response to each prompt: its ids, and their log-probabilities when sampled."""
    own = share(prompts)
    results = [None] * len(own)
    order = sorted(range(len(own)), key=lambda i: len(own[i]))  # for less padding
    for part in chunks(order, 8 * cfg.microbatch_size):  # no gradients: more rows fit
        asked = [own[i] for i in part]
        sampled = respond(policy, asked, cfg.max_new_tokens, eos, temperature)
        for i, response in zip(part, sampled):
            results[i] = response
    return together(results)

def complete(policy, prompts, eos, cfg: "Settings", temperature=1.0) -> list[list[int]]:
    """The ids of a response to each prompt, with its EOS if there is one."""
    sampled = sample_responses(policy, prompts, eos, cfg, temperature)
    return [response for response, _ in sampled]

# ---- Optimization ----------------------------------------------------------------------

def adam(model) -> torch.optim.Adam:
    """Betas as in appendix C; the paper gives no epsilon (we use GPT-3's) and no weight decay."""
    return torch.optim.Adam(model.parameters(), betas=(0.9, 0.95), eps=1e-8, fused=True)

def schedule(step: int, total: int, warmup: float = 0.0) -> float:
    """The factor on the peak rate: cosine to a tenth (C.1, C.2), capped by our warmup."""
    cosine = 0.1 + 0.45 * (1 + math.cos(math.pi * step / total))
    return min(cosine, (step + 1) / max(1, warmup * total))

def update(model, optimizer, learning_rate: float) -> float:
    """A step on the gradient, clipped to norm 1 (our choice); returns the norm before that."""
    sum_gradients(model)
    norm = torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0).item()
    if not math.isfinite(norm):
        raise UserError("the gradient is not finite, no step is taken: lower the learning rate")
    optimizer.param_groups[0]["lr"] = learning_rate
    optimizer.step()
    optimizer.zero_grad()
    return norm

def batch_at(items: list, size: int, step: int, seed: int) -> list:
    """The batch of a step: passes over the items, each in an order of its own."""
    epoch, place = divmod(step, math.ceil(len(items) / size))
    order = np.random.default_rng([seed, epoch]).permutation(len(items))
    return [items[i] for i in order[place * size : (place + 1) * size]]

def random_documents(documents: list, count: int, longest: int, rng) -> list[Example]:
    """Random documents; long ones are cropped to a random window of `longest` tokens.

    Each example is one document, so none sees another's text (our choice). The first token is
    given, the others are predicted.
    """
    examples = []
    for i in rng.integers(len(documents), size=count):
        start = rng.integers(max(1, len(documents[i]) - longest + 1))
        examples.append(Example(documents[i][start : start + longest], 1))
    return examples

# ---- Settings: every field is a flag, its comment the help; defaults suit the fable ----

# Types of fields, with the smallest and the largest value that make sense.
NotNegative = Annotated[float, 0, 1e9]
Fraction = Annotated[float, 0, 1]
BelowOne = Annotated[float, 0, 0.99]
Positive = Annotated[float, 1e-6, 1e9]
Score = Annotated[float, -1e9, 1e9]
Count = Annotated[int, 1, 2**31]
Window = Annotated[int, 2, 2**31]  # one token is given, the next predicted

@dataclass
class Settings:
    data: str = "out/data"  # folder of the data set
    out: str = "out"  # folder of checkpoints and logs
    seed: Annotated[int, 0, 2**62] = 1  # random seed
    device: Literal["auto", "cpu", "cuda"] = "auto"  # auto: cuda if there is a GPU
    dtype: Literal["auto", "float32", "bfloat16"] = "auto"  # auto: bfloat16 on CUDA alone
    microbatch_size: Count = 32  # rows per forward pass, in sampling 8 times that; bounds memory
    max_new_tokens: Count = 48  # longest response (paper: 1,000)
    gold: str = "data/fable.py"  # file with gold(row, completion), a score that is only shown

@dataclass
class Training(Settings):
    resume: bool = False  # continue where the run of this name was stopped; on a CPU, same bits
    save_minutes: NotNegative = 5.0  # minutes between two saves for --resume

@dataclass
class Pretrain(Training):
    """The base model. The paper began with GPT-3, so all of this is our choice."""
    name: str = "gpt"  # name of the run, its checkpoint and its log
    preset: Literal[tuple(PRESETS)] = "fable"  # shape of the model, one of model.PRESETS
    steps: Count = 1400  # optimizer steps
    batch_size: Count = 96  # documents per step
    microbatch_size: Count = 96  # rows per forward pass; only bounds the memory
    learning_rate: NotNegative = 2e-3  # peak, after a warmup of 5 % of the steps; cosine to 10 %

@dataclass
class SFT(Training):
    """Step 1 (C.1)."""
    name: str = "sft"  # name of the run, its checkpoint and its log
    init: str = "gpt"  # model to start from
    epochs: Count = 4  # passes over the demonstrations (paper: 16; 2 for the start of PPO)
    batch_size: Count = 32  # demonstrations per step (paper: 32; 175B: 8)
    learning_rate: NotNegative = 5e-4  # peak, cosine to 10 % (paper: 9.65e-6; 175B: 5.03e-6)
    dropout: BelowOne = 0.2  # on the residual branches (paper: 0.2)
    pretrain_fraction: BelowOne = 0.0  # share of rows that are raw text (paper, for PPO: 0.1)
    window: Window = 256  # longest such row, in tokens (paper: not stated)
    reward_model: str = ""  # keep the epoch whose samples it prefers; else the last

@dataclass
class RM(Training):
    """Step 2 (C.2)."""
    name: str = "rm"  # name of the run, its checkpoint and its log
    init: str = "sft"  # policy to start from, with a scalar head (paper: 6B, tuned on NLP tasks)
    epochs: Count = 2  # passes over the comparisons (paper: 1, over 33,207 prompts; here 3,072)
    batch_size: Count = 8  # prompts per step, with all their pairs (paper: 64)
    microbatch_size: Count = 72  # rows per pass, whole prompts; bounds the memory
    learning_rate: NotNegative = 3e-4  # peak, cosine to 10 % (paper: 9e-6)

@dataclass
class PPO(Training):
    """Step 3 (C.3, C.4)."""
    name: str = "ppo_ptx"  # name of the run, its checkpoint and its log
    init: str = "ppo_init"  # start of the policy, and the reference it is held to
    reward_model: str = "rm"  # model that scores a response
    value_init: str = ""  # start of the value network; default: the reward model (paper)
    iterations: Count = 60  # rollouts (derived from the paper: 256k / 512 = 500)
    rollout_size: Count = 128  # episodes per iteration (paper: 512)
    minibatch_size: Count = 32  # episodes per optimizer step (paper: 64)
    epochs: Count = 1  # passes over a rollout (paper: 1)
    learning_rate: NotNegative = 3e-4  # of the policy, after a warmup from a tenth (paper: swept)
    value_learning_rate: NotNegative = 5e-4  # of the value network, warmed up alike (paper: 9e-6)
    kl_coef: NotNegative = 0.16  # beta (paper: 0.02)
    ptx_coef: NotNegative = 0.5  # gamma; 0 is plain PPO (paper: 27.8, of unknown scale)
    ptx_ratio: Positive = 1.0  # rows of pretraining text per episode (paper: 8)
    window: Window = 256  # longest such row, in tokens (paper: not stated)
    gamma: Fraction = 1.0  # discount (paper: none)
    lam: Fraction = 0.95  # lambda of GAE (paper: not stated; its predecessors: 0.95)
    cliprange: NotNegative = 0.2  # of the ratio (paper: 0.2)
    cliprange_value: NotNegative = 0.2  # of the value's change (not stated; OpenAI, 2019: 0.2)
    max_kl: NotNegative = 0.1  # end an iteration's updates when approxkl exceeds this (our guard)
    missing_eos_score: Score = -1.0  # highest score without EOS (OpenAI, 2019: always -1)
    ema_decay: Fraction = 0.992  # per step (our choice), of the saved weights (paper: 0.992)

@dataclass
class DPO(Training):
    """An alternative to steps 2 and 3 (Rafailov et al. 2023, appendix B)."""
    name: str = "dpo"  # name of the run, its checkpoint and its log
    init: str = "ppo_init"  # start of the policy, and the reference it is held to
    epochs: Count = 1  # passes over the comparisons (DPO paper: not stated)
    batch_size: Count = 8  # prompts per step, with all their pairs (DPO paper: 64 pairs)
    microbatch_size: Count = 72  # rows per pass, whole prompts; bounds the memory
    learning_rate: NotNegative = 1e-4  # peak; warmup 10 %, cosine to 10 % (DPO paper: 1e-6)
    beta: NotNegative = 1.0  # strength of the tie to the reference (DPO paper: 0.1 and 0.5)

@dataclass
class Evaluate(Settings):
    name: str = "evaluate"  # name of the table: out/<name>.md and .json
    models: str = "gpt,gpt+fewshot,sft,ppo_init,ppo_ptx"  # rows of the table
    prompts: str = "prompts_valid.jsonl"  # file of the data set
    samples: Count = 1  # responses to each prompt
    temperature: NotNegative = 1.0  # of the sampling; 0 always takes the likeliest token
    baseline: str = "sft"  # row that win rates are against
    reference: str = "ppo_init"  # model that the KL is measured from
    reward_model: str = "rm"  # model that scores the responses

@dataclass
class Chat(Settings):
    model: str = "ppo_ptx"  # model to talk to
    temperature: NotNegative = 0.7  # 0 always takes the likeliest token

# ---- Pretraining, and step 1: supervised fine-tuning -----------------------------------

def pretrain(cfg: Pretrain) -> None:
    """Train a GPT on raw text, from random weights; later stages steer what it learns here."""
    tokenizer = get_tokenizer(cfg.data)
    documents = read_documents(Path(cfg.data) / "pretrain.txt", tokenizer)
    vocabulary = fingerprint(tokenizer)
    config = GPTConfig(tokenizer.n_vocab, vocabulary=vocabulary, **PRESETS[cfg.preset])
    model = GPT(config).to(cfg.device)
    heldout = read_heldout(tokenizer, model, cfg)
    optimizer = adam(model)
    run = Run(cfg, cfg.steps, ["pretrain.txt", "pretrain_valid.txt"], [model, optimizer])
    for step in run.steps():
        rng = np.random.default_rng([cfg.seed, step])
        examples = random_documents(documents, cfg.batch_size, config.block_size, rng)
        metrics = {"loss": lm_pass(model, examples, cfg, coef=1.0)}
        learning_rate = cfg.learning_rate * schedule(step, cfg.steps, warmup=0.05)
        metrics["grad_norm"] = update(model, optimizer, learning_rate)
        if heldout and ((step + 1) % 100 == 0 or step + 1 == cfg.steps):
            metrics["heldout/loss"] = lm_pass(model, heldout, cfg)
        run.log(metrics, "loss")
    run.finish(model)

def read_pretraining(tokenizer, policy: GPT, cfg) -> list[np.ndarray]:
    """Pretraining text to mix in; UserError if it is missing or --window does not fit."""
    context = policy.config.block_size
    path = Path(cfg.data) / "pretrain.txt"
    if cfg.window > context:
        raise UserError(f"--window {cfg.window} is longer than the context of {context} tokens")
    if not path.exists():
        raise UserError(f"no {path}: without it --ptx_coef or --pretrain_fraction has to be 0")
    return read_documents(path, tokenizer)

def read_heldout(tokenizer, model: GPT, cfg: Settings) -> list[Example]:
    """Held-out pretraining text, at most 512 documents: shows the alignment tax."""
    path = Path(cfg.data) / "pretrain_valid.txt"
    if not path.exists():
        return []
    documents = read_documents(path, tokenizer)[:512]
    return [Example(document[: model.config.block_size], 1) for document in documents]

def sft(cfg: SFT) -> None:
    """Step 1: imitate the demonstrations, by eq. (1) on each completion and its EOS.

    The paper chose its models by the reward model's score on validation prompts, which improves
    for longer than the loss does (3.5). Without a reward model, the last epoch is saved.
    """
    tokenizer = get_tokenizer(cfg.data)
    data = Path(cfg.data)
    model = load(cfg, cfg.init, GPT, cfg.dropout)
    examples = read_demonstrations(data / "sft.jsonl", tokenizer, model.config.block_size)
    valid = read_demonstrations(data / "sft_valid.jsonl", tokenizer, model.config.block_size)
    if cfg.pretrain_fraction:
        documents = read_pretraining(tokenizer, model, cfg)
        count = round(len(examples) * cfg.pretrain_fraction / (1 - cfg.pretrain_fraction))
        rng = np.random.default_rng(cfg.seed)
        examples += random_documents(documents, count, cfg.window, rng)
    if cfg.reward_model:
        reward_model = load(cfg, cfg.reward_model, ScalarModel).requires_grad_(False)
        longest = longest_prompt([model, reward_model], cfg)
        records = read_prompts(data / "sft_valid.jsonl", tokenizer, longest)
        prompts = [record["prompt_ids"] for record in records] * 4  # for a less noisy mean
    steps_per_epoch = math.ceil(len(examples) / cfg.batch_size)
    total = cfg.epochs * steps_per_epoch
    optimizer = adam(model)
    run = Run(cfg, total, ["sft.jsonl", "sft_valid.jsonl", "pretrain.txt"], [model, optimizer])
    for step in run.steps():
        batch = batch_at(examples, cfg.batch_size, step, cfg.seed)
        model.train()
        metrics = {"loss": lm_pass(model, batch, cfg, coef=1.0)}
        model.eval()
        metrics["grad_norm"] = update(model, optimizer, cfg.learning_rate * schedule(step, total))
        if (step + 1) % steps_per_epoch == 0:
            metrics["valid/loss"] = lm_pass(model, valid, cfg)
            if cfg.reward_model:
                responses = complete(model, prompts, tokenizer.eot_token, cfg)
                scores = score(reward_model, behind(prompts, responses), cfg)
                metrics["valid/score"] = scores.mean().item()
            tqdm.write(describe(metrics))
        run.log(metrics, "loss")
        if "valid/score" in metrics and metrics["valid/score"] > run.best:
            run.best = metrics["valid/score"]
            save(checkpoint(cfg, cfg.name), model)
    run.finish(None if cfg.reward_model else model)

# ---- Step 2: the reward model ----------------------------------------------------------

class Ranked(NamedTuple):
    """All N completions of several prompts."""
    examples: list[Example]
    ranks: Tensor  # (N,) 0 is best
    groups: Tensor  # (N,) index of the prompt
    count: int  # prompts of the whole step that have untied pairs

def ranked_passes(rankings: list[Ranking], cfg: Settings):
    """Yield this process's rankings, about microbatch_size rows a pass, prompts kept whole."""
    count = max(1, sum(len(set(ranking.ranks)) > 1 for ranking in rankings))
    largest = max(len(ranking.ranks) for ranking in rankings)  # the largest K
    prompts = max(1, cfg.microbatch_size // largest)
    for part in chunks(share(rankings), prompts):
        examples = []
        ranks = []
        groups = []
        for group, ranking in enumerate(part):
            examples += ranking.examples
            ranks += ranking.ranks
            groups += [group] * len(ranking.ranks)
        ranks = torch.tensor(ranks, device=cfg.device)
        groups = torch.tensor(groups, device=cfg.device)
        yield Ranked(examples, ranks, groups, count)

def rm(cfg: RM) -> None:
    """Step 2: learn to score completions in the labelers' order, by eq. (2), without dropout."""
    tokenizer = get_tokenizer(cfg.data)
    data = Path(cfg.data)
    model = scalar_model(load(cfg, cfg.init))
    context = model.config.block_size
    rankings = read_comparisons(data / "comparisons.jsonl", tokenizer, context)
    valid = read_comparisons(data / "comparisons_valid.jsonl", tokenizer, context)
    demonstrations = read_demonstrations(data / "sft.jsonl", tokenizer, context)
    labelers = {ranking.labeler for ranking in rankings}
    steps_per_epoch = math.ceil(len(rankings) / cfg.batch_size)
    total = cfg.epochs * steps_per_epoch
    optimizer = adam(model)
    files = ["comparisons.jsonl", "comparisons_valid.jsonl", "sft.jsonl"]
    run = Run(cfg, total, files, [model, optimizer])
    for step in run.steps():
        batch = batch_at(rankings, cfg.batch_size, step, cfg.seed)
        losses = []
        for ranked in ranked_passes(batch, cfg):
            scores = score(model, ranked.examples, cfg)
            loss = pairwise_loss(scores, ranked.ranks, ranked.groups, ranked.count)
            loss.backward()
            losses.append({"loss": loss.item()})
        metrics = totals(losses)
        metrics["grad_norm"] = update(model, optimizer, cfg.learning_rate * schedule(step, total))
        if (step + 1) % steps_per_epoch == 0:
            metrics |= accuracy_report(model, valid, labelers, cfg)
            tqdm.write(describe(metrics))
        run.log(metrics, "loss")
    with torch.no_grad():
        scores = score(model, demonstrations, cfg)
        model.head.bias -= scores.mean()  # demonstrations score 0 on average (3.5)
    run.finish(model)

def scalar_model(policy: GPT) -> ScalarModel:
    """A scalar model with the trunk of a policy and a fresh head."""
    model = ScalarModel(policy.config)
    model.gpt.load_state_dict(policy.state_dict())
    return model.to(policy.wte.weight.device).eval()

@torch.no_grad()
def accuracy_report(model, rankings: list[Ranking], seen: set[str], cfg: Settings) -> dict:
    """How well held-out rankings are predicted: the share of untied pairs in the right order.

    Labelers who were not `seen` in training are reported apart. `confidence` is the share that
    the model expects to get right. The correlation of score and length is within prompts.
    """
    scores = []
    lengths = []
    margins = {"eval": [], "eval_heldout_labelers": []}
    for ranking in rankings:
        own_scores = score(model, ranking.examples, cfg).cpu()
        ranks = torch.tensor(ranking.ranks)
        winner, loser = preferences(ranks, torch.zeros_like(ranks))
        labelers = "eval" if ranking.labeler in seen else "eval_heldout_labelers"
        margins[labelers] += (own_scores[winner] - own_scores[loser]).tolist()
        own_lengths = np.array([len(example.ids) for example in ranking.examples])
        scores += (own_scores - own_scores.mean()).tolist()
        lengths += (own_lengths - own_lengths.mean()).tolist()
    report = {"eval/score_std": np.std(scores)}
    if np.std(lengths) > 0 and np.std(scores) > 0:
        report["eval/length_correlation"] = np.corrcoef(scores, lengths)[0, 1]
    for labelers, differences in margins.items():
        if differences:
            margin = np.array(differences)
            report[f"{labelers}/accuracy"] = np.mean(margin > 0)
            report[f"{labelers}/confidence"] = np.mean(1 / (1 + np.exp(-np.abs(margin))))
            report[f"{labelers}/margin"] = np.mean(margin)
    return report

# ---- Step 3: PPO, with the KL and pretraining terms ------------------------------------

class Reward:
    """The score of a response. To use a rule or another model, change this class alone."""
    def __init__(self, cfg: PPO):
        self.model = load(cfg, cfg.reward_model, ScalarModel)

    def __call__(self, prompts: list[str], texts: list[str], tokens, total_lens) -> Tensor:
        """The scores (B,) of responses, given as texts and as tokens (B, T)."""
        return sequence_scores(self.model, tokens, total_lens)

def ppo(cfg: PPO) -> None:
    """Step 3: maximise the reward, with a KL term and a pretraining term (paper, eq. 2).

    eq. (7): the policy minimises (5) + ptx_coef (1), and the value network minimises (6). Our
    choices, as the paper is silent: no dropout; responses are sampled from the weights of the
    last step, not from their average; rewards are not whitened (OpenAI, 2019: they are).
    """
    tokenizer = get_tokenizer(cfg.data)
    eos = tokenizer.eot_token
    reward = Reward(cfg)
    policy = load(cfg, cfg.init)
    ref = load(cfg, cfg.init)
    ema = load(cfg, cfg.init)  # a running average of the policy, which is saved in the end
    value = value_network(policy, cfg)
    readers = [policy, value, getattr(reward, "model", policy)]  # a rule has no model
    policy_optimizer = adam(policy)
    value_optimizer = adam(value)
    longest = longest_prompt(readers, cfg)
    records = read_prompts(Path(cfg.data) / "prompts.jsonl", tokenizer, longest)
    records *= math.ceil(cfg.iterations * cfg.rollout_size / len(records))  # for all iterations
    gold = gold_function(records, cfg.gold)
    heldout = read_heldout(tokenizer, policy, cfg)
    files = ["prompts.jsonl", "pretrain.txt", "pretrain_valid.txt"]
    if cfg.ptx_coef:
        documents = read_pretraining(tokenizer, policy, cfg)
    parts = [policy, value, ema, policy_optimizer, value_optimizer]
    run = Run(cfg, cfg.iterations, files, parts)

    for iteration in run.steps():
        rng = np.random.default_rng([cfg.seed, iteration])

        # 1. Sample a response to each prompt.
        batch = batch_at(records, cfg.rollout_size, iteration, cfg.seed)
        prompts = [record["prompt_ids"] for record in batch]
        sampled = sample_responses(policy, prompts, eos, cfg)
        responses = [response for response, _ in sampled]
        texts = [decode(tokenizer, response) for response in responses]
        examples = behind(prompts, responses)
        _, mask, _ = pad_examples(examples, cfg.device)

        # 2. Reward model, policy, reference and value network read them, in the forward passes of
        #    the first epoch, so its first ratio is exactly 1; all_sum merges the processes' rows.
        minibatches = chunks(range(len(batch)), cfg.minibatch_size)
        scores = torch.zeros(len(batch), device=cfg.device)
        old_logprobs = torch.zeros_like(mask)
        ref_logprobs = torch.zeros_like(mask)
        old_values = torch.zeros_like(mask)
        for minibatch in minibatches:
            for indices in by_length(share(minibatch), examples, cfg):
                tokens, some_mask, lens = pad_examples([examples[i] for i in indices], cfg.device)
                width = some_mask.size(1)
                some_prompts = [batch[i]["prompt"] for i in indices]
                some_texts = [texts[i] for i in indices]
                with torch.no_grad():
                    scores[indices] = reward(some_prompts, some_texts, tokens, lens)
                    old_logprobs[indices, :width] = token_logprobs(policy, tokens, some_mask)
                    ref_logprobs[indices, :width] = token_logprobs(ref, tokens, some_mask)
                    old_values[indices, :width] = value(tokens[:, :-1])
        all_sum(scores, old_logprobs, ref_logprobs, old_values)

        # 3. Rewards per token, eq. (3); advantages and returns, eq. (4); whitened advantages.
        #    Without EOS, a score is at most missing_eos_score, and never raised to it.
        raw_scores = scores
        ended = torch.tensor([response[-1] == eos for response in responses], device=cfg.device)
        scores = torch.where(ended, scores, scores.clamp(max=cfg.missing_eos_score))
        rewards = kl_rewards(scores, old_logprobs, ref_logprobs, mask, cfg.kl_coef)
        advantages, returns = gae(rewards, old_values, mask, cfg.gamma, cfg.lam)
        advantages = whiten(advantages, mask)

        # 4. Update both networks, eq. (5) and (6), a step per minibatch; the first epoch as in 2.
        for _ in range(cfg.epochs - 1):
            minibatches += chunks(rng.permutation(len(batch)).tolist(), cfg.minibatch_size)
        warmup = min(1.0, 0.1 + 0.09 * iteration)  # a tenth to 1 (C.4: of the policy)
        steps = []
        for minibatch in minibatches:
            count = mask[minibatch].sum()
            passes = []
            for indices in by_length(share(minibatch), examples, cfg):
                tokens, some_mask, _ = pad_examples([examples[i] for i in indices], cfg.device)
                width = some_mask.size(1)
                logprobs = token_logprobs(policy, tokens, some_mask)
                policy_term, found = policy_loss(
                    logprobs, old_logprobs[indices, :width], advantages[indices, :width],
                    some_mask, cfg.cliprange, count)
                values = value(tokens[:, :-1])
                value_term, value_found = value_loss(
                    values, old_values[indices, :width], returns[indices, :width],
                    some_mask, cfg.cliprange_value, count)
                (policy_term + value_term).backward()  # of networks without common parameters
                found |= value_found
                found |= {"loss/policy": policy_term, "loss/value": value_term}
                passes.append({key: x.item() for key, x in found.items()})
            stats = totals(passes)
            if not steps and abs(stats["val/ratio"] - 1) > 1e-4:
                raise UserError(f"the first ratio is {stats['val/ratio']}, but should be 1")
            if stats["policy/approxkl"] > cfg.max_kl:
                policy_optimizer.zero_grad()
                value_optimizer.zero_grad()
                tqdm.write(f"approxkl exceeds --max_kl after {len(steps)} updates")
                break
            if cfg.ptx_coef:  # its gradient is added to that of eq. (5) in the same buffers (C.4)
                size = math.ceil(cfg.ptx_ratio * len(minibatch))
                text = random_documents(documents, size, cfg.window, rng)
                stats["loss/ptx"] = lm_pass(policy, text, cfg, cfg.ptx_coef)
            stats["policy/grad_norm"] = update(
                policy, policy_optimizer, cfg.learning_rate * warmup)
            stats["val/grad_norm"] = update(
                value, value_optimizer, cfg.value_learning_rate * warmup)
            ema_update(ema, policy, cfg.ema_decay)
            steps.append(stats)

        # 5. Log. KL and entropy are sums over a response in nats, estimated from the samples: a
        #    sampled KL can be negative, its expectation cannot.
        metrics = {}
        for key in steps[0]:
            metrics[key] = np.mean([stats[key] for stats in steps])
        kl = ((old_logprobs - ref_logprobs) * mask).sum(1)
        metrics["objective/scores"] = scores.mean().item()
        metrics["objective/raw_scores"] = raw_scores.mean().item()  # before missing_eos_score
        metrics["objective/kl"] = kl.mean().item()
        metrics["objective/rlhf_reward"] = (scores - cfg.kl_coef * kl).mean().item()
        metrics["objective/entropy"] = -old_logprobs.sum(1).mean().item()
        metrics["eos_fraction"] = ended.float().mean().item()
        metrics["response_length"] = mask.sum(1).mean().item()
        metrics["learning_rate"] = cfg.learning_rate * warmup
        metrics["value_learning_rate"] = cfg.value_learning_rate * warmup
        when_sampled = []
        for _, own_logprobs in sampled:
            when_sampled += own_logprobs
        gaps = torch.tensor(when_sampled, device=cfg.device) - old_logprobs[mask > 0]
        metrics["sampler_gap"] = gaps.abs().max().item()
        variance = masked_mean((returns - masked_mean(returns, mask)) ** 2, mask).item()
        if variance > 0:
            metrics["val/var_explained"] = 1 - metrics["val/error"] / variance
        if gold:  # the truth that labelers and reward model stand in for; only shown
            judged = [sum(gold(record, text).values()) for record, text in zip(batch, texts)]
            metrics["objective/gold"] = np.mean(judged)
        if iteration % 10 == 0 or iteration + 1 == cfg.iterations:
            if heldout:
                metrics["heldout/loss"] = lm_pass(policy, heldout, cfg)
            tqdm.write(f"{batch[0]['prompt']!r} {texts[0]!r} scores {scores[0].item():.2f}")
        if iteration + 1 == cfg.iterations:
            tqdm.write(episode_table(tokenizer, examples[0], {
                "log pi": old_logprobs, "log ref": ref_logprobs,
                "KL": old_logprobs - ref_logprobs, "reward": rewards, "value": old_values,
                "advantage": advantages
            }))
        run.log(metrics, "objective/scores", "objective/kl")
    save(checkpoint(cfg, f"{cfg.name}_raw"), policy)  # the weights of the last step
    run.finish(ema)

def episode_table(tokenizer, example: Example, columns: dict[str, Tensor]) -> str:
    """The first row of each tensor (B, T-1), a line for each token of the response."""
    lines = [f"{'token':16}" + "".join(f"{name:>10}" for name in columns)]
    for t in range(example.prompt_len - 1, len(example.ids) - 1):
        line = f"{tokenizer.decode([example.ids[t + 1]])!r:16}"
        for values in columns.values():
            line += f"{values[0, t].item():10.2f}"
        lines.append(line)
    return "\n".join(lines)

def value_network(policy: GPT, cfg: PPO) -> ScalarModel:
    """--value_init, else a copy of the reward model (C.4), else the policy with a fresh head."""
    name = cfg.value_init or cfg.reward_model
    if cfg.value_init or checkpoint(cfg, name).exists():
        return load(cfg, name, ScalarModel)
    return scalar_model(policy)

@torch.no_grad()
def ema_update(ema, model, decay: float) -> None:
    """ema <- decay ema + (1 - decay) model."""
    for average, new in zip(ema.parameters(), model.parameters()):
        average.lerp_(new, 1 - decay)

def behind(prompts, responses) -> list[Example]:
    """Each prompt followed by its response, both lists of ids."""
    return [Example(ids + response, len(ids)) for ids, response in zip(prompts, responses)]

# ---- DPO, an alternative to steps 2 and 3 ----------------------------------------------

def dpo(cfg: DPO) -> None:
    """Learn from the rankings without a reward model: eq. (2) with the rewards of eq. (8)."""
    tokenizer = get_tokenizer(cfg.data)
    data = Path(cfg.data)
    policy = load(cfg, cfg.init)
    ref = load(cfg, cfg.init)
    context = policy.config.block_size
    rankings = read_comparisons(data / "comparisons.jsonl", tokenizer, context)
    valid = read_comparisons(data / "comparisons_valid.jsonl", tokenizer, context)
    steps_per_epoch = math.ceil(len(rankings) / cfg.batch_size)
    total = cfg.epochs * steps_per_epoch
    optimizer = adam(policy)
    run = Run(cfg, total, ["comparisons.jsonl", "comparisons_valid.jsonl"], [policy, optimizer])
    for step in run.steps():
        batch = batch_at(rankings, cfg.batch_size, step, cfg.seed)
        metrics = dpo_pass(policy, ref, batch, cfg, train=True)
        learning_rate = cfg.learning_rate * schedule(step, total, warmup=0.1)
        metrics["grad_norm"] = update(policy, optimizer, learning_rate)
        if (step + 1) % steps_per_epoch == 0:
            found = dpo_pass(policy, ref, valid, cfg, train=False)
            metrics |= {f"valid/{key}": value for key, value in found.items()}
            tqdm.write(describe(metrics))
        run.log(metrics, "loss", "accuracy")
    run.finish(policy)

def dpo_pass(policy, ref, rankings: list[Ranking], cfg: DPO, train: bool) -> dict:
    """DPO's loss on the rankings, in nats per pair; accumulates its gradient in training.

    Also returns means over pairs: how often the winner has the higher reward, by how much, and
    its log-probability, which DPO may lower along with the loser's.
    """
    found = []
    for ranked in ranked_passes(rankings, cfg):
        rewards = torch.zeros(len(ranked.examples), device=cfg.device)
        chosen = torch.zeros_like(rewards)
        for indices in by_length(range(len(rewards)), ranked.examples, cfg):
            tokens, mask, _ = pad_examples([ranked.examples[i] for i in indices], cfg.device)
            with torch.set_grad_enabled(train):
                logprobs = token_logprobs(policy, tokens, mask)
            with torch.no_grad():
                ref_logprobs = token_logprobs(ref, tokens, mask)
            rewards[indices] = implicit_rewards(logprobs, ref_logprobs, mask, cfg.beta)
            chosen[indices] = logprobs.detach().sum(1)
        loss = pairwise_loss(rewards, ranked.ranks, ranked.groups, ranked.count)
        if train:
            loss.backward()
        winner, loser = preferences(ranked.ranks, ranked.groups)
        margins = (rewards[winner] - rewards[loser]).detach()
        found.append({
            "loss": loss.item(), "pairs": len(margins), "accuracy": (margins > 0).sum().item(),
            "margin": margins.sum().item(), "chosen_logprob": chosen[winner].sum().item()
        })
    sums = totals(found)
    pairs = max(1, sums.pop("pairs"))
    for key in ("accuracy", "margin", "chosen_logprob"):
        sums[key] /= pairs
    return sums

# ---- Evaluation and chat ---------------------------------------------------------------

def win_rate(own: np.ndarray, other: np.ndarray) -> tuple[float, float]:
    """How often `own` is better than `other`, where a tie counts half: (S, N), (S, N).

    Each of S samples is compared with all S of the other for the same of N prompts. Returns
    the share, and half its 95 % interval (normal approximation, over prompts).
    """
    better = own[:, None] > other
    equal = own[:, None] == other
    outcomes = (better + 0.5 * equal).mean((0, 1))  # (N,)
    error = outcomes.std() / math.sqrt(max(1, len(outcomes) - 1))
    return outcomes.mean(), 1.96 * error

@torch.no_grad()
def evaluate(cfg: Evaluate) -> None:
    """Compare models on held-out prompts: a table, printed and as Markdown and JSON.

    A base model may go on to speak for the human. Gold and reward model judge its own turn
    alone; length, KL and EOS are measured on all that it wrote. The KL is that of the policy
    itself, so it is left out where the temperature is not 1. A row with + sees the examples
    before each prompt; its held-out loss and in-context tasks are those of the model without.
    """
    tokenizer = get_tokenizer(cfg.data)
    eos = tokenizer.eot_token
    data = Path(cfg.data)
    fewshot = data / "fewshot.jsonl"
    policies = {}  # "gpt+fewshot" is gpt with two examples before each prompt
    for title in cfg.models.split(","):
        title = title.strip()
        if "+" in title and not fewshot.exists():
            print(f"There is no {fewshot}: its row is left out.")
            continue
        policy = load_if_there(cfg, title.split("+")[0], GPT)
        if policy:
            policies[title] = policy
    if not policies:
        raise UserError(f"none of the --models {cfg.models} is in {cfg.out}: train one first")
    ref = load_if_there(cfg, cfg.reference, GPT)
    reward_model = load_if_there(cfg, cfg.reward_model, ScalarModel)
    longest = longest_prompt([*policies.values(), ref, reward_model], cfg)
    shortest = min(policies.values(), key=lambda policy: policy.config.block_size)
    heldout = read_heldout(tokenizer, shortest, cfg)  # the same text for all models
    records = read_prompts(data / cfg.prompts, tokenizer, longest) * cfg.samples
    gold = gold_function(records, cfg.gold)
    probes = {}  # kind of task -> tasks
    if (data / "probes.jsonl").exists():
        for probe in read_prompts(data / "probes.jsonl", tokenizer, longest, "completion"):
            probes.setdefault(probe.get("task", "in-context"), []).append(probe)
    shots = []
    if any("+" in title for title in policies):
        for example in read_demonstrations(fewshot, tokenizer, longest):
            shots += example.ids[:-1]  # without the EOS
    table = {}
    found = {"prompts": cfg.prompts, "samples": cfg.samples, "table": table}
    found |= {"gold": {}, "RM score": {}, "responses": {}}
    for title, policy in policies.items():
        torch.manual_seed(cfg.seed)
        prompts = [record["prompt_ids"] for record in records]
        shown = prompts
        if "+" in title:
            shown = [(shots + prompt)[-longest:] for prompt in prompts]
            if len(shots) + max(map(len, prompts)) > longest:
                print(f"{title}: the context is too short, and so the examples are cut.")
        responses = complete(policy, shown, eos, cfg, cfg.temperature)
        turns = [own_turn(decode(tokenizer, response)) for response in responses]
        found["responses"][title] = turns
        row = {}
        if gold:
            axes = [gold(record, turn) for record, turn in zip(records, turns)]
            for axis in axes[0]:
                row[axis] = np.mean([judged[axis] for judged in axes])
            gold_totals = np.array([sum(judged.values()) for judged in axes])
            found["gold"][title] = gold_totals.reshape(cfg.samples, -1)
        if reward_model:
            examples = []
            for prompt, turn in zip(prompts, turns):
                ids = prompt + encode(tokenizer, turn) + [eos]
                examples.append(Example(ids[-reward_model.config.block_size :], 0))
            scores = score(reward_model, examples, cfg)
            row["RM score"] = scores.mean().item()
            found["RM score"][title] = scores.view(cfg.samples, -1).tolist()
        row["length"] = np.mean([len(response) for response in responses])
        if ref and cfg.temperature == 1:  # mean of log pi(y|x) - log ref(y|x), nats
            own_loss = lm_pass(policy, behind(shown, responses), cfg)
            ref_loss = lm_pass(ref, behind(prompts, responses), cfg)
            row["KL"] = (ref_loss - own_loss) * row["length"]
        row["EOS"] = np.mean([response[-1] == eos for response in responses])
        if heldout:
            row["held-out loss"] = lm_pass(policy, heldout, cfg)
        for task, own_probes in probes.items():
            asked = [probe["prompt_ids"] for probe in own_probes]
            answers = complete(policy, asked, eos, cfg, temperature=0)
            right = []
            for probe, answer in zip(own_probes, answers):
                right.append(decode(tokenizer, answer).startswith(probe["completion"]))
            row[task] = np.mean(right)
        table[title] = row
    if gold and cfg.baseline not in table:
        print(f"There are no win rates, as --baseline {cfg.baseline} is not in the table.")
    if cfg.baseline in found["gold"]:
        for title in table:
            rate, margin = win_rate(found["gold"][title], found["gold"][cfg.baseline])
            table[title] = {"win rate": rate, "±": margin, **table[title]}
    content = json.dumps(found, default=np.ndarray.tolist)  # gold is in arrays
    for suffix, text in ((".md", markdown(table)), (".json", content)):
        with replacing(Path(cfg.out) / (cfg.name + suffix)) as file:
            file.write(f"{text}\n".encode())
    print(markdown(table))

def load_if_there(cfg: Evaluate, name: str, kind: type):
    """The model, or None, and a line that says what the table lacks."""
    if checkpoint(cfg, name).exists():
        return load(cfg, name, kind)
    print(f"There is no {checkpoint(cfg, name)}: its row or column is left out.")

def markdown(table: dict[str, dict], show="{:.3f}".format) -> str:
    """{row: {column: value}} -> a Markdown table; `show` makes a text of a value."""
    columns = list(next(iter(table.values())))
    lines = ["| model | " + " | ".join(columns) + " |", "|---" * (len(columns) + 1) + "|"]
    for title, row in table.items():
        cells = [show(row[column]) for column in columns]
        lines.append(f"| {title} | " + " | ".join(cells) + " |")
    return "\n".join(lines)

def chat(cfg: Chat) -> None:
    """Talk to a model; an empty line, Ctrl-C or Ctrl-D ends the conversation."""
    tokenizer = get_tokenizer(cfg.data)
    policy = load(cfg, cfg.model)
    longest = longest_prompt([policy], cfg)
    messages = []
    while text := input("\nHuman: ").strip():
        messages.append({"role": "user", "content": text})
        ids = encode(tokenizer, render(messages))
        while len(ids) > longest and len(messages) > 1:
            print("(The context is full: the oldest question and answer are forgotten.)")
            messages = messages[2:]
            ids = encode(tokenizer, render(messages))
        if len(ids) > longest:
            print(f"(This is too long: only the last {longest} tokens are read.)")
        prompts = [ids[-longest:]]
        responses = complete(policy, prompts, tokenizer.eot_token, cfg, cfg.temperature)
        reply = own_turn(decode(tokenizer, responses[0])).strip()
        print("Assistant:", printable(reply))
        messages.append({"role": "assistant", "content": reply})

# ---- Checkpoints -----------------------------------------------------------------------

def checkpoint(cfg: Settings, name: str) -> Path:
    """out/<name>.pt; a name that ends in .pt is a path already."""
    return Path(name) if name.endswith(".pt") else Path(cfg.out) / f"{name}.pt"

def save(path: Path, model: GPT | ScalarModel) -> None:
    """Write a checkpoint of plain types and tensors, whole or not at all."""
    content = {"kind": type(model).__name__, "config": asdict(model.config)}
    if RANK == 0:
        with replacing(path) as file:
            torch.save(content | {"model": model.state_dict()}, file)

def read_tensors(path: Path) -> dict:
    """What was saved. UserError if it is missing, damaged, or holds anything but plain values."""
    if not path.exists():
        raise UserError(f"there is no {path}: train it first")
    try:
        if ZipFile(path).testzip():  # torch does not compare checksums
            raise ValueError
        return dict(torch.load(path, map_location="cpu", weights_only=True))
    except Exception:  # a damaged file may raise nearly anything
        raise UserError(f"{path} is damaged or not a checkpoint: train it again") from None

def load(cfg: Settings, name: str, kind: type = GPT, dropout: float = 0.0) -> GPT | ScalarModel:
    """The model of a checkpoint, in eval mode; UserError if it is not what is asked for."""
    path = checkpoint(cfg, name)
    content = read_tensors(path)
    if content.get("kind") != kind.__name__:
        raise UserError(f"{path} holds a {content.get('kind')}, but a {kind.__name__} is needed")
    try:
        config = GPTConfig(**content["config"] | {"dropout": dropout})
        model = kind(config)
        model.load_state_dict(content["model"])
    except Exception:
        raise UserError(f"{path} does not fit its own description: train it again") from None
    if cfg.data:
        tokenizer = get_tokenizer(cfg.data)
        known = config.vocabulary or fingerprint(tokenizer)
        if (config.vocab_size, known) != (tokenizer.n_vocab, fingerprint(tokenizer)):
            raise UserError(f"{path} was trained on another vocabulary than that of {cfg.data}")
    return model.float().to(cfg.device).eval()

def longest_prompt(models: list, cfg: Settings) -> int:
    """The longest prompt, in tokens, that leaves every model (not None) room to respond."""
    context = min(model.config.block_size for model in models if model)
    if cfg.max_new_tokens >= context:
        raise UserError(f"--max_new_tokens should be below {context}, to leave room for a prompt")
    return context - cfg.max_new_tokens

# ---- A run: its log, and how it goes on after a stop -----------------------------------

class Run:
    """What a stage that trains leaves in out/<name>/: metrics.jsonl and state.pt.

    Each step has a seed of its own, so step n is the same in every run: after a kill at any
    moment, --resume goes on from the last save; on a CPU to the same bits, for the same
    --microbatch_size and number of processes. `files` of the data set have to be unchanged.
    `parts` are the models and optimizers that a save keeps.
    """
    def __init__(self, cfg: Training, total: int, files: list[str], parts: list):
        self.cfg = cfg
        self.total = total
        self.parts = parts
        self.step = 0
        self.best = -math.inf  # the best validation score so far, for stages that have one
        self.stop_asked = False
        self.identity = {}
        written = [checkpoint(cfg, name).resolve() for name in (cfg.name, f"{cfg.name}_raw")]
        for flag, value in asdict(cfg).items():
            if flag not in ("data", "out", "gold", "resume", "save_minutes", "microbatch_size"):
                self.identity[f"--{flag}"] = str(value)
            if flag in ("init", "reward_model", "value_init") and value:
                start = checkpoint(cfg, value)
                if start.resolve() in written:
                    raise UserError(f"--name {cfg.name} would overwrite --{flag} {value}")
                self.identity[f"{value} (--{flag})"] = digest(start)
        for name in ("tokenizer.tiktoken", *files):
            self.identity[name] = digest(Path(cfg.data) / name)
        self.state_path = Path(cfg.out) / cfg.name / "state.pt"
        self.state_path.parent.mkdir(parents=True, exist_ok=True)
        self.file = open(os.devnull if RANK else self.state_path.with_name("metrics.jsonl"), "a")
        if RANK == 0 and not lock(self.file):
            raise UserError(f"another run is at work in {self.state_path.parent}; give a --name")
        self.began = time.time()
        if cfg.resume and self.state_path.exists():
            self.restore(read_tensors(self.state_path))
        if self.step == 0 and RANK == 0:  # a new run
            self.state_path.unlink(missing_ok=True)
            self.file.truncate(0)

    def restore(self, state: dict) -> None:
        before = state.get("identity", {})
        changed = [key for key in self.identity if before.get(key) != self.identity[key]]
        if changed:
            advice = "run it again without --resume, or with another --name"
            raise UserError(f"{', '.join(changed)} changed since {self.state_path}; {advice}")
        if state["finished"]:
            if checkpoint(self.cfg, self.cfg.name).exists():
                print(f"{self.cfg.name}: finished already")
                sys.exit()
            return
        for part, content in zip(self.parts, state["parts"]):
            part.load_state_dict(content)
        self.step = state["step"]
        self.best = state["best"]
        if RANK == 0:
            self.file.truncate(min(state["log_bytes"], self.file.tell()))

    def steps(self):
        """Yield the steps that are left, each with a seed of its own; save in between."""
        saved = time.time()
        self.bar = tqdm(total=self.total, initial=self.step, desc=self.cfg.name, disable=RANK > 0)
        handlers = {}
        for number in (signal.SIGINT, signal.SIGTERM):
            handlers[number] = signal.signal(number, self.ask_to_stop)
        try:
            while self.step < self.total:
                seed = np.random.SeedSequence([self.cfg.seed, self.step, RANK]).generate_state(1)
                torch.manual_seed(int(seed[0]))
                yield self.step
                self.step += 1
                stop = any(gather(self.stop_asked))
                if stop or time.time() - saved >= 60 * self.cfg.save_minutes:
                    self.save(finished=False)
                    saved = time.time()
                if stop:
                    raise KeyboardInterrupt(f"after step {self.step}; --resume continues there")
        finally:
            for number, handler in handlers.items():
                signal.signal(number, handler)

    def ask_to_stop(self, *_) -> None:
        """Ctrl-C and SIGTERM: finish the step and save; the second time, stop at once."""
        if self.stop_asked:
            raise KeyboardInterrupt("at once")
        self.stop_asked = True
        tqdm.write("Stopping after this step.")

    def log(self, metrics: dict, *shown: str) -> None:
        """Write a line of metrics.jsonl; `shown` keys appear beside the progress bar."""
        line = {"step": self.step + 1, "seconds": round(time.time() - self.began, 2), **metrics}
        odd = [key for key, value in metrics.items() if not math.isfinite(value)]
        if odd:
            raise UserError(f"{', '.join(odd)}: not finite; lower the learning rate")
        if self.cfg.device == "cuda":
            line["gigabytes"] = torch.cuda.max_memory_reserved() / 1e9
        print(json.dumps(line), file=self.file, flush=True)
        self.bar.set_postfix({key: f"{metrics[key]:.3g}" for key in shown}, refresh=False)
        self.bar.update()

    def save(self, finished: bool) -> None:
        state = {"identity": self.identity, "finished": finished}
        if not finished:
            contents = [part.state_dict() for part in self.parts]
            state |= {"step": self.step, "best": self.best, "parts": contents}
            state["log_bytes"] = self.file.tell()
        if RANK == 0:
            with replacing(self.state_path) as file:
                torch.save(state, file)

    def finish(self, model: GPT | ScalarModel | None) -> None:
        """Save the model, unless that has been done. There is nothing to resume any more."""
        if model is not None:
            save(checkpoint(self.cfg, self.cfg.name), model)
        self.save(finished=True)
        self.file.close()
        self.bar.close()

def describe(metrics: dict) -> str:
    return ", ".join(f"{key} {value:.3f}" for key, value in metrics.items())

# ---- The command line ------------------------------------------------------------------

source_of = cache(inspect.getsource)  # cached, as inspect parses the whole file each time

def add_flags(parser: argparse.ArgumentParser, settings: type) -> None:
    """A flag for every field of a settings class; the comment beside the field is its help."""
    comments = {}
    for ancestor in reversed(settings.__mro__[:-1]):
        comments |= re.findall(r"^    (\w+): .*?  # (.*)$", source_of(ancestor), re.M)
    for field in fields(settings):
        text = f"{comments.get(field.name, '')} [{field.default}]".replace("%", "%%")
        options = {"default": field.default, "help": text}
        kind = (get_args(field.type) or [field.type])[0]  # int of Annotated[int, 1, 9]
        if kind is bool:
            options["action"] = argparse.BooleanOptionalAction
        elif kind in (int, float):
            options["type"] = kind
        elif get_origin(field.type) is Literal:
            options["choices"] = get_args(field.type)
        parser.add_argument(f"--{field.name}", **options)

def settle(cfg: Settings) -> None:
    """Refuse numbers that make no sense, and decide what "auto" means on this machine."""
    for field in fields(cfg):
        value = getattr(cfg, field.name)
        low, high = getattr(field.type, "__metadata__", (None, None))
        if low is not None and not low <= value <= high:
            raise UserError(f"--{field.name} {value} should be from {low} to {high}")
    if getattr(cfg, "name", None) in ("", "."):
        raise UserError("--name should not be empty")
    if cfg.device == "auto":
        cfg.device = "cuda" if torch.cuda.is_available() else "cpu"
    if cfg.device == "cuda" and not torch.cuda.is_available():
        raise UserError("--device cuda: PyTorch finds no GPU here; leave the flag out")
    if cfg.dtype == "auto":
        cfg.dtype = "bfloat16" if cfg.device == "cuda" else "float32"

def run_stage(stage, cfg: Settings) -> None:
    """Run a stage. Whatever the user can fix is reported in one sentence."""
    shared = isinstance(cfg, Training)  # the rest is work for one process
    if RANK > 0 and not shared:
        return
    try:
        settle(cfg)
        torch.manual_seed(cfg.seed)
        if cfg.device == "cuda":  # cuDNN's attention plans anew, for 0.1 s, at each new shape
            torch.backends.cuda.enable_cudnn_sdp(False)
        mixed = cfg.dtype == "bfloat16"
        # cache_enabled=False: a recorded step cannot use cached bfloat16 weights
        with joined(cfg.device, shared), torch.autocast(cfg.device, torch.bfloat16, mixed, False):
            stage(cfg)
    except UserError as error:
        sys.exit(f"{stage.__name__}: {error}")
    except OSError as error:
        sys.exit(f"{stage.__name__}: {error.filename or cfg.out}: {error.strerror or error}")
    except (MemoryError, RuntimeError) as error:
        if not re.search("MemoryError|out of memory|allocate memory", repr(error)):
            raise
        flags = f"--microbatch_size, now {cfg.microbatch_size}, or in sampling --max_new_tokens"
        sys.exit(f"{stage.__name__}: out of memory; lower {flags}")
    except EOFError:  # the end of what a person types
        print()
    except KeyboardInterrupt as error:
        sys.exit(f"\n{stage.__name__}: stopped {error}")

STAGES = {stage.__name__: stage for stage in (pretrain, sft, rm, ppo, dpo, evaluate, chat)}

def main(argv: list[str] | None = None) -> None:
    """python rlhf.py STAGE --flag value"""
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    commands = parser.add_subparsers(dest="stage", required=True)
    for name, stage in STAGES.items():
        summary = stage.__doc__.split("\n")[0]
        command = commands.add_parser(name, help=summary, allow_abbrev=False)
        add_flags(command, stage.__annotations__["cfg"])
    flags = vars(parser.parse_args(argv))
    stage = STAGES[flags.pop("stage")]
    run_stage(stage, stage.__annotations__["cfg"](**flags))

if __name__ == "__main__":
    sys.stdin = sys.stdin or open(os.devnull)  # None if it is closed
    sys.stdout = sys.stdout or open(os.devnull, "w")
    for stream in (sys.stdin, sys.stdout):
        stream.reconfigure(errors="replace")  # a stray character is no reason to stop
    main()

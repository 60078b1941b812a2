"""How fast it is: decoding, training and an iteration of PPO, by the very functions `ppo` calls.

    python tests/bench.py [decode | sft | ppo | all] --shape fable | A | gpt2 --dtype float32

    decode   rlhf.complete: max_new_tokens sampled after each of rollout_size random prompts
    train    rlhf.lm_pass and rlhf.update: forward, backward, clipping, Adam; every token a target
    rollout  of an iteration without ptx: rlhf.complete, as called by rlhf.rollout
    scoring  the rest of rlhf.rollout: a forward pass of each of four networks, rewards, GAE
    update   rlhf.ppo_update: `epochs` passes over the episodes, and the running average

Weights are random, and learning rates 0, so that every repeat does the same work. The things timed
take turns, after a warm-up each: medians, fastest and slowest are printed, then one line of JSON.
No token is EOS, so responses have full length; --ending makes them half as long on average.

`share` is the part of the machine's rate for large square matrix products, at that precision and
in the same turns, that went into the model's FLOPs (float32 on a CPU: of the better of torch's
product and oneDNN's). Peak memory is the process's until then on a CPU, the job's on a GPU. Where
`transformers` is installed, its GPT-2 takes turns too: `times` is its seconds divided by ours.
"""

import copy
import gc
import json
import math
import platform
import re
import resource
import sys
from argparse import SUPPRESS, ArgumentParser, Namespace
from collections import defaultdict
from operator import truediv
from pathlib import Path
from statistics import median
from time import perf_counter
from typing import NamedTuple
from unittest import mock

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

sys.path.insert(0, str(Path(__file__).parent.parent))  # `python tests/bench.py` is to find rlhf.py
import cli  # noqa: E402
import rlhf  # noqa: E402
from data.formats import UserError, markdown  # noqa: E402
from model import GPT, PRESETS, GPTConfig, ScalarModel  # noqa: E402

FLAGS = {"rollout_size": "prompts decoded, episodes of an iteration", "prompt_len": "tokens each",
         "max_new_tokens": "response, in tokens", "minibatch_size": "episodes an optimizer step",
         "epochs": "passes over a rollout", "batch_size": "rows of a training step",
         "row_len": "tokens of such a row", "microbatch_size": "rows of a forward pass [32]",
         "repeats": "turns that count [5]"}
SHAPES = {"A": dict(vocab_size=1024, block_size=256, n_layer=4, n_head=4, n_embd=256),
          "fable": dict(vocab_size=1024, **PRESETS["fable"]), "gpt2": PRESETS["gpt2"]}
WORK = {shape: dict(zip(FLAGS, sizes)) for shape, sizes in {
    "A": (64, 32, 64, 16, 4, 32, 256), "gpt2": (8, 32, 64, 4, 4, 4, 256),  # as others were timed
    "fable": (128, 24, 48, 32, 1, 96, 48)}.items()}  # about what train.sh does
PRODUCT = {"cpu": 2048, "cuda": 8192}  # rows and columns of the matrices whose product is timed
COLUMNS = ("seconds", "fastest", "slowest", "tokens/s", "episodes/s", "GFLOP", "GFLOP/s", "share",
           "transformers", "times", "peak GB")
EOS = 0


class Sample(NamedTuple):
    """One run of a job, or of one of its phases."""
    seconds: float
    flops: float
    count: float  # of tokens or episodes, says the unit
    unit: str


def forward_flops(config: GPTConfig, lens: Tensor, logits: int) -> float:
    """FLOPs of a forward pass over rows of `lens` (B,) tokens, `logits` of which are unembedded.

    Two a multiply-add, matrix products alone: 24 L C^2 a token for the four products of a block,
    4 L C for every token that a token sees, 2 V C for its logits (Kaplan et al. 2020, arXiv
    2001.08361, table 1, less what the mask hides). For model FLOPs utilisation (PaLM, arXiv
    2204.02311, appendix B) neither padding counts nor work done twice, but the whole of the last
    block does, where we leave out what nobody reads; a backward is two forwards.
    """
    L, C = config.n_layer, config.n_embd
    lens = lens.double().cpu()
    blocks, attention = 24 * L * C**2 * lens.sum(), 4 * L * C * (lens * (lens + 1) / 2).sum()
    return float(blocks + attention + 2 * config.vocab_size * C * logits)


def ppo_flops(config: GPTConfig, prompt_len: int, lens: Tensor, epochs: int) -> dict[str, float]:
    """FLOPs of each phase, for episodes of `lens` (B,) tokens, prompt included: policies read all
    but the last token and need the responses' logits; decoding with a cache takes as many."""
    policy = forward_flops(config, lens - 1, int((lens - prompt_len).sum()))
    value, reward = forward_flops(config, lens - 1, 0), forward_flops(config, lens, 0)
    return {"rollout": policy, "scoring": 2 * policy + value + reward,
            "update": 3 * epochs * (policy + value)}


def ending_probability(limit: int) -> float:
    """The chance of EOS at each step with which responses of at most `limit` tokens are half as
    long on average: sum_{t<limit} (1 - p)^t = limit / 2. A fifth of them reaches the limit."""
    steps = np.arange(limit)
    return min(np.linspace(1e-4, 0.999, 10_000), key=lambda p: abs(((1 - p) ** steps).mean() - 0.5))


def make_policy(cfg: Namespace, config: GPTConfig) -> GPT:
    """Random weights. With --ending it is the weights that end a response: coordinate 0 of the
    final state is always 1, and as EOS alone looks at it, its logit is always the same; the others
    are about N(0, 0.02^2 C), as in any fresh model."""
    policy = GPT(config).to(cfg.device).eval()
    if cfg.ending:
        p = ending_probability(cfg.max_new_tokens)
        others = math.log(config.vocab_size - 1) + 0.02**2 * config.n_embd / 2  # log sum exp
        with torch.no_grad():
            policy.ln_f.weight[0], policy.ln_f.bias[0] = 0, 1
            policy.wte.weight[:, 0] = policy.wte.weight[EOS] = 0
            policy.wte.weight[EOS, 0] = math.log(p / (1 - p)) + others
    return policy


def random_rows(config: GPTConfig, rows: int, length: int) -> list[list[int]]:
    return torch.randint(1, config.vocab_size, (rows, length)).tolist()


def timed(cfg: Namespace, work, *arguments) -> tuple:
    """Seconds, result."""
    wait = torch.cuda.synchronize if cfg.device == "cuda" else lambda: None
    wait()
    start = perf_counter()
    result = work(*arguments)
    wait()
    return perf_counter() - start, result


# ---- Jobs: each is set up, and returns a function that does it once: {row of the table: Sample} --

def decode_job(cfg: Namespace, config: GPTConfig):
    work = (make_policy(cfg, config), random_rows(config, cfg.rollout_size, cfg.prompt_len),
            EOS if cfg.ending else -1, cfg.max_new_tokens)

    def job() -> dict[str, Sample]:
        seconds, (_, mask, lens) = timed(cfg, rlhf.complete, *work)
        flops = ppo_flops(config, cfg.prompt_len, lens, 1)["rollout"]
        return {"decode": Sample(seconds, flops, mask.sum().item(), "tokens/s")}
    return job


def sft_job(cfg: Namespace, config: GPTConfig):
    """A row of T tokens has T - 1 targets; count and FLOPs are theirs."""
    policy = GPT(config).to(cfg.device)
    optimizer, rows = rlhf.adam(policy), random_rows(config, cfg.batch_size, cfg.row_len)
    count = cfg.batch_size * (cfg.row_len - 1)
    flops = 3 * forward_flops(config, torch.full((cfg.batch_size,), cfg.row_len - 1), count)

    def step() -> None:
        rlhf.lm_pass(policy, [(ids, 1) for ids in rows], cfg)
        rlhf.update(policy, optimizer, 0.0)
    step()  # now Adam has its state, and memory soon its peak
    return lambda: {"train": Sample(timed(cfg, step)[0], flops, count, "tokens/s")}


def ppo_job(cfg: Namespace, config: GPTConfig):
    policy, reward = make_policy(cfg, config), ScalarModel(config).to(cfg.device).eval()
    models = rlhf.Models(policy, *map(copy.deepcopy, (policy, reward, reward, policy)))
    optimizers, complete, decoding = (rlhf.adam(policy), rlhf.adam(models.value)), rlhf.complete, []
    prompts = random_rows(config, cfg.rollout_size, cfg.prompt_len)
    work = models, prompts, EOS if cfg.ending else -1, cfg

    def watched(*arguments):
        seconds, result = timed(cfg, complete, *arguments)
        decoding.append(seconds)
        return result

    def job() -> dict[str, Sample]:
        with mock.patch.object(rlhf, "complete", watched):
            whole, (batch, _) = timed(cfg, rlhf.rollout, *work)
        lens = cfg.prompt_len + batch.mask.sum(1)
        rest = models, optimizers, batch, None, 0.0, None, cfg
        update, rollout = timed(cfg, rlhf.ppo_update, *rest)[0], decoding.pop()
        seconds = {"rollout": rollout, "scoring": whole - rollout, "update": update}
        flops = ppo_flops(config, cfg.prompt_len, lens, cfg.epochs)
        for times in (seconds, flops):
            times["iteration"] = sum(times.values())
        return {key: Sample(seconds[key], flops[key], len(lens), "episodes/s") for key in seconds}
    return job


def product_job(cfg: Namespace, config: GPTConfig):
    """A large square matrix product, outside autocast, on matrices that do not stay in memory."""
    def job() -> dict[str, Sample]:
        x, y = torch.randn(2, PRODUCT[cfg.device], PRODUCT[cfg.device], device=cfg.device)
        flops = 2 * len(x) ** 3
        factors = {"bfloat16": (x.bfloat16(), y.bfloat16()), "float32": (x, y)}
        if cfg.device == "cpu" and torch.backends.mkldnn.is_available():
            factors["float32, oneDNN"] = x.to_mkldnn(), y
        with torch.autocast(cfg.device, enabled=False):
            seconds = {key: timed(cfg, F.linear, *pair)[0] for key, pair in factors.items()}
        return {f"product, {key}": Sample(s, flops, 1, "products/s") for key, s in seconds.items()}
    return job


def peer_config(config: GPTConfig):
    """The same shape for `transformers`; no token ends a response, 0 is for padding."""
    from transformers import GPT2Config
    shape = {key: value for key, value in vars(config).items() if key.startswith(("n_", "vocab"))}
    off = dict(resid_pdrop=0, embd_pdrop=0, attn_pdrop=0, bos_token_id=None, eos_token_id=None)
    return GPT2Config(n_positions=config.block_size, pad_token_id=0, num_labels=1, **shape, **off)


def peer_job(cfg: Namespace, config: GPTConfig):
    """`transformers` as it comes, on the same shape; None where it is not installed or not asked.
    It decodes with weights of --dtype, trains under the same autocast with the same optimizer."""
    try:
        from transformers import GPT2LMHeadModel
    except ImportError:
        return None
    if cfg.job == "ppo" or cfg.ending:
        return None
    model = GPT2LMHeadModel(peer_config(config))
    model = model.to(cfg.device, torch.float32 if cfg.job == "sft" else getattr(torch, cfg.dtype))
    optimizer, decoding = rlhf.adam(model.eval()), cfg.job == "decode"
    size = (cfg.rollout_size, cfg.prompt_len) if decoding else (cfg.batch_size, cfg.row_len)
    rows = torch.tensor(random_rows(config, *size), device=cfg.device)
    n, seen = cfg.max_new_tokens, torch.ones_like(rows)

    def decode() -> None:
        with torch.autocast(cfg.device, enabled=False):
            tokens = model.generate(rows, attention_mask=seen, do_sample=True, top_k=0,
                                    max_new_tokens=n)
        assert tokens.size(1) == cfg.prompt_len + n

    def step() -> None:
        for part in rows.split(cfg.microbatch_size):
            (model(part, labels=part).loss * len(part) / len(rows)).backward()
        rlhf.update(model, optimizer, 0.0)
    work = decode if decoding else step
    return lambda: {"transformers": Sample(timed(cfg, work)[0], 0, 0, "-")}


JOBS = {"decode": decode_job, "sft": sft_job, "ppo": ppo_job}


# ---- Measuring and printing ----------------------------------------------------------------------

def peak_gb(cfg: Namespace) -> float:
    if cfg.device == "cuda":
        return torch.cuda.max_memory_allocated() / 1e9
    unit = 1 if sys.platform == "darwin" else 1024  # getrusage's
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit / 1e9


def measure(cfg: Namespace, config: GPTConfig) -> tuple[dict[str, list[Sample]], float]:
    """The samples of a job, of its peer and of the products, in turn; the job's peak memory."""
    jobs, peaks, samples = [], [], defaultdict(list)
    if cfg.device == "cuda":
        torch.cuda.reset_peak_memory_stats()
    for make in (JOBS[cfg.job], peer_job, product_job):
        if job := make(cfg, config):
            job()  # a warm-up
            jobs.append(job)
            peaks.append(peak_gb(cfg))
    for job in jobs * cfg.repeats:
        gc.collect()
        for key, sample in job().items():
            samples[key].append(sample)
    return samples, peaks[0]


def summary(samples: list[Sample], rate: float | None = None) -> dict[str, float]:
    """A row of the table: medians, and the share of `rate`, in GFLOP/s."""
    seconds, flops, count, units = zip(*samples)
    speed = median(map(truediv, flops, seconds)) / 1e9
    row = {"seconds": median(seconds), "fastest": min(seconds), "slowest": max(seconds),
           units[0]: median(map(truediv, count, seconds)), "GFLOP": median(flops) / 1e9,
           "GFLOP/s": speed}
    return row | ({"share": speed / rate} if rate else {})


def report(samples: dict[str, list[Sample]], peak: float, dtype: str) -> dict[str, dict]:
    """{row: {column: value}} of one job; of the products only the shares tell."""
    peer = samples.pop("transformers", None)
    products = {key: summary(own) for key, own in samples.items() if "product" in key}
    rate = max(row["GFLOP/s"] for key, row in products.items() if dtype in key)
    rows = {key: summary(own, rate) for key, own in samples.items() if key not in products}
    rows[list(rows)[-1]]["peak GB"] = peak
    if peer:  # of a job that has one row
        key, seconds = list(rows)[0], [sample.seconds for sample in peer]
        times = map(truediv, seconds, [sample.seconds for sample in samples[key]])
        rows[key] |= {"transformers": median(seconds), "times": median(times)}
    return rows


def table(rows: dict[str, dict]) -> str:
    """{row: {column: value}} -> an aligned Markdown table, blank where a row has no such value."""
    def text(x: float | None) -> str:
        return "" if x is None else f"{x:,.0f}" if x >= 100 else f"{x:.3g}"

    columns = [key for key in COLUMNS if any(key in row for row in rows.values())]
    return markdown({name: {key: text(row.get(key)) for key in columns}
                     for name, row in rows.items()})


def processor(cfg: Namespace) -> str:
    if cfg.device == "cuda":
        return torch.cuda.get_device_name()
    info = Path("/proc/cpuinfo")
    names = re.findall(r"model name\s*: (.*)", info.read_text()) if info.exists() else []
    return names[0] if names else platform.processor()


def check(cfg: Namespace, room: int) -> None:
    """UserError unless the machine has the device and the rows fit a context of `room` tokens."""
    if cfg.device == "cuda" and not torch.cuda.is_available():
        raise UserError("--device cuda: torch finds no such device")
    if wrong := [name for name in FLAGS if getattr(cfg, name) < 1]:
        raise UserError(f"--{wrong[0]} {getattr(cfg, wrong[0])}: it must be at least 1")
    if not 2 <= cfg.row_len <= room:
        raise UserError(f"--row_len {cfg.row_len}: this shape takes rows of 2 to {room} tokens")
    if cfg.prompt_len + cfg.max_new_tokens > room:
        raise UserError(f"--prompt_len {cfg.prompt_len} and --max_new_tokens {cfg.max_new_tokens}: "
                        f"together they must be at most {room}, the context of this shape")


def bench(cfg: Namespace) -> None:
    """Time the jobs one after the other; print the table and the line of JSON."""
    config, rows, products = GPTConfig(**SHAPES[cfg.shape]), {}, defaultdict(list)
    check(cfg, config.block_size)
    for cfg.job in JOBS if cfg.job == "all" else [cfg.job]:
        samples, peak = measure(cfg, config)
        rows |= report(samples, peak, cfg.dtype)
        for key in filter(re.compile("product").match, samples):
            products[key] += samples[key]
    rows |= {key: summary(own) for key, own in products.items()}
    facts = {key: getattr(cfg, key) for key in ("shape", "device", "dtype", "ending", *FLAGS)}
    facts |= {"processor": processor(cfg), "threads": torch.get_num_threads(),
              "torch": torch.__version__}
    print(", ".join(f"{key} {value}" for key, value in facts.items()))
    print(table(rows), json.dumps(facts | {"rows": rows}), sep="\n\n")


def settings(flags: dict) -> dict:
    """Those and, for what they leave open, of the shape's work and of PPO without ptx."""
    return vars(rlhf.PPO(ptx_coef=0.0, out=".")) | {"repeats": 5} | WORK[flags["shape"]] | flags


def main(argv: list[str] | None = None) -> None:
    parser = ArgumentParser(description=__doc__.split("\n")[0], allow_abbrev=False)
    parser.add_argument("job", nargs="?", default="all", choices=[*JOBS, "all"])
    parser.add_argument("--shape", default="fable", choices=SHAPES)
    device = "cuda" if torch.cuda.is_available() else "cpu"
    parser.add_argument("--device", default=device, choices=PRODUCT)
    parser.add_argument("--dtype", default="auto", choices=cli.DTYPES)
    parser.add_argument("--ending", action="store_true", help="responses half as long on average")
    for name, text in FLAGS.items():
        parser.add_argument(f"--{name}", type=int, help=text, default=SUPPRESS)
    cli.run(bench, Namespace, settings(vars(parser.parse_args(argv))))


if __name__ == "__main__":
    main()

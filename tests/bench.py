"""How fast decoding, training and an iteration of PPO are, by the program's own functions.

    python tests/bench.py [decode | train | ppo | all] --shape fable --dtype float32

Decoding is 64 new tokens behind each of many random prompts; where transformers is installed, its
GPT-2 does the same. A product of large matrices and a copy of 256 MB show what the machine can do.
All take turns. The table has medians of seconds, tokens (of ppo, episodes) per second, the shares
of the product's FLOPs and of the copy's bytes, and each time divided by ours. FLOPs are those of
matrix products: 24 L C^2 a token for the blocks, 4 L C for each token it attends to, 2 V C for each
one predicted (Kaplan et al. 2020, arXiv 2001.08361, table 1), thrice that with a backward pass.
"""

import functools
import json
import statistics
import sys
import tempfile
import time
from argparse import ArgumentParser
from dataclasses import dataclass, field
from importlib.util import find_spec
from pathlib import Path

import torch

sys.path.insert(0, str(Path(__file__).parent.parent))
import rlhf  # noqa: E402
from data.fable import tiktoken_file  # noqa: E402
from data.files import Example, write_jsonl  # noqa: E402
from model import GPT, PRESETS, GPTConfig, ScalarModel  # noqa: E402

PROMPT, NEW = 32, 64  # tokens
SHAPES = {
    "fable": GPTConfig(vocab_size=1024, **PRESETS["fable"]),
    "A": GPTConfig(vocab_size=1024, block_size=256, n_layer=4, n_head=4, n_embd=256),
    "gpt2": GPTConfig(),
}
SIZES = {
    "fable": dict(rollout_size=128, minibatch_size=32, epochs=1, batch_size=96, length=48),
    "A": dict(rollout_size=64, minibatch_size=16, epochs=4, batch_size=32, length=256),
    "gpt2": dict(rollout_size=8, minibatch_size=4, epochs=4, batch_size=4, length=256),
}
PRODUCT = {"cpu": 2048, "cuda": 8192}  # rows and columns

@dataclass
class Row:
    """A row of the table: what is timed, and what one run of it amounts to."""
    work: object  # a function
    count: int = 0  # tokens or episodes
    flops: float = 0.0
    moved: float = 0.0  # bytes
    seconds: list[float] = field(default_factory=list)

def forward_flops(config: GPTConfig, rows: int, length: int, predicted: int) -> float:
    """FLOPs of a forward pass over rows of this length, with `predicted` targets each."""
    width = config.n_layer * config.n_embd
    blocks = 24 * width * config.n_embd * length
    attention = 4 * width * length * (length + 1) / 2
    return rows * (blocks + attention + 2 * config.vocab_size * config.n_embd * predicted)

def random_ids(config: GPTConfig, rows: int, length: int) -> list[list[int]]:
    return torch.randint(1, config.vocab_size, (rows, length)).tolist()

def decode(cfg: rlhf.PPO, config: GPTConfig) -> Row:
    policy = GPT(config).to(cfg.device).eval()
    rows = cfg.rollout_size
    weights = sum(p.numel() for p in policy.parameters())
    cached = 2 * config.n_layer * config.n_embd * rows * sum(range(PROMPT + 1, PROMPT + NEW))
    work = functools.partial(rlhf.complete, policy, random_ids(config, rows, PROMPT), -1, cfg)
    flops = forward_flops(config, rows, PROMPT + NEW - 1, NEW)
    return Row(work, rows * NEW, flops, 4 * (weights * NEW + cached))

def train(cfg: rlhf.PPO, config: GPTConfig) -> Row:
    policy = GPT(config).to(cfg.device)
    optimizer = rlhf.adam(policy)
    examples = [Example(ids, 1) for ids in random_ids(config, cfg.batch_size, cfg.length)]

    def work():
        rlhf.lm_pass(policy, examples, cfg, 1.0)
        rlhf.update(policy, optimizer, 0.0)

    flops = 3 * forward_flops(config, cfg.batch_size, cfg.length - 1, cfg.length - 1)
    return Row(work, cfg.batch_size * (cfg.length - 1), flops)

def ppo(cfg: rlhf.PPO, config: GPTConfig) -> Row:
    """Few responses end early, as random weights seldom choose EOS: all count in full."""
    rows, out = cfg.rollout_size, Path(cfg.out)
    tokens = [bytes([i]) for i in range(256)]  # and as many as it takes that no prompt contains
    tokens += [i.to_bytes(4, "big") for i in range(256, config.vocab_size - 1)]
    (out / "tokenizer.tiktoken").write_text(tiktoken_file(tokens))
    prompts = [{"prompt": f"\n\nHuman: {i:011d}\n\nAssistant:"} for i in range(rows)]
    write_jsonl(out / "prompts.jsonl", prompts)
    rlhf.save(out / "ppo_init.pt", GPT(config))
    rlhf.save(out / "rm.pt", ScalarModel(config))

    def work() -> float:
        """The seconds of an iteration, the first of three left out."""
        rlhf.ppo(cfg)
        log = (out / cfg.name / "metrics.jsonl").read_text().splitlines()
        ends = [json.loads(line)["seconds"] for line in log]
        return (ends[-1] - ends[0]) / (len(ends) - 1)

    policy = forward_flops(config, rows, PROMPT + NEW - 1, NEW)
    value = forward_flops(config, rows, PROMPT + NEW - 1, 0)
    return Row(work, rows, 3 * policy + 2 * value + 3 * cfg.epochs * (policy + value))

def peer(cfg: rlhf.PPO, config: GPTConfig) -> Row:
    """The same decoding by transformers."""
    from transformers import GPT2Config, GPT2LMHeadModel
    names = dict(vars(config), n_positions=config.block_size, eos_token_id=None)
    model = GPT2LMHeadModel(GPT2Config(**names)).eval()
    model.to(cfg.device, getattr(torch, cfg.dtype))
    prompts = torch.tensor(random_ids(config, cfg.rollout_size, PROMPT), device=cfg.device)
    options = dict(max_new_tokens=NEW, do_sample=True, top_k=0)
    return Row(functools.partial(model.generate, prompts, **options))

JOBS = {"decode": decode, "train": train, "ppo": ppo}

def machine(device: str) -> dict[str, Row]:
    rows = {}
    for dtype in ("float32", "bfloat16"):
        x = torch.randn(2 * [PRODUCT[device]], device=device, dtype=getattr(torch, dtype))
        work = functools.partial(torch.mm, x, x, out=x.clone())  # `out` rules out autocast
        rows[dtype] = Row(work, flops=2 * len(x) ** 3)
    x = torch.ones(2**26, device=device)
    return rows | {"copy": Row(functools.partial(x.clone().copy_, x), moved=2 * 2**28)}

def measure(rows: dict[str, Row], cfg: rlhf.PPO) -> None:
    wait = getattr(torch, cfg.device).synchronize
    for turn in range(1 + cfg.repeats):  # the first is a warm-up
        for name, row in rows.items():
            wait()
            start = time.perf_counter()
            found = row.work()
            wait()
            if name != "ppo":
                found = time.perf_counter() - start
            if turn > 0:
                row.seconds.append(found)

def bench(cfg: rlhf.PPO) -> None:
    config, compared, rows = SHAPES[cfg.shape], machine(cfg.device), {}
    for job in JOBS if cfg.job == "all" else [cfg.job]:
        own = {job: JOBS[job](cfg, config)}
        if find_spec("transformers") and job == "decode":
            own["decode, transformers"] = peer(cfg, config)
        measure(own | compared, cfg)
        for row in own.values():
            row.work = None  # free its memory
        rows |= own
    table = {}
    for name, row in (rows | compared).items():
        middle = statistics.median(row.seconds)
        table[name] = dict(seconds=middle, fastest=min(row.seconds), slowest=max(row.seconds))
        table[name] |= {"per second": row.count / middle, "GFLOP/s": row.flops / middle / 1e9,
                        "GB/s": row.moved / middle / 1e9}
    for name, row in table.items():
        row["of product"] = row["GFLOP/s"] / table[cfg.dtype]["GFLOP/s"]
        row["of copy"] = row["GB/s"] / table["copy"]["GB/s"]
        row["times"] = row["seconds"] / table[name.split(",")[0]]["seconds"]
    print("| | " + " | ".join(row) + " |\n" + "|---" * (1 + len(row)) + "|")
    for name, row in table.items():
        print(f"| {name} |", *(f"{x:,.3f} |" for x in row.values()))
    facts = dict(shape=cfg.shape, device=cfg.device, dtype=cfg.dtype, torch=torch.__version__)
    facts |= dict(cpu=torch.backends.cpu.get_cpu_capability(), threads=torch.get_num_threads())
    print(json.dumps(facts | {"rows": table}))

def main(argv=None) -> None:
    parser = ArgumentParser(description=__doc__.split("\n")[0], allow_abbrev=False)
    parser.add_argument("job", nargs="?", default="all", choices=[*JOBS, "all"])
    parser.add_argument("--shape", default="fable", choices=SHAPES)
    parser.add_argument("--device", default="auto", choices=("auto", *PRODUCT))
    parser.add_argument("--dtype", default="auto", choices=("auto", "float32", "bfloat16"))
    parser.add_argument("--repeats", type=int, default=5, choices=range(1, 21), metavar="N")
    flags = vars(parser.parse_args(argv))
    cfg = rlhf.PPO(max_new_tokens=NEW, learning_rate=0.0, value_learning_rate=0.0, ptx_coef=0.0)
    vars(cfg).update(SIZES[flags["shape"]] | flags, iterations=3)
    with tempfile.TemporaryDirectory() as folder:
        cfg.data = cfg.out = folder
        rlhf.run_stage(bench, cfg)

if __name__ == "__main__":
    main()

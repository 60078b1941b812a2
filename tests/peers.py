"""How fast others are on the work of bench.py, as they ship, in turn with ours, on a CPU.

    pip install transformers==5.23.0 trl==1.12.0         beside requirements.txt, to run this alone
    python tests/peers.py decode --shape A               transformers' generate
    python tests/peers.py ppo --shape gpt2 --turns 2     TRL's PPO, in its last release that has it

In each turn the peer runs in float32, then ours in bfloat16 and in float32, each in a process of
its own after a warm-up, as settings of ours (README) would change the peer: medians, fastest,
slowest, and the peer's seconds divided by ours. All responses have full length; with --ending ours
are half as long on average, the peer's, which TRL pads, are not. TRL's gradient checkpointing,
which saves memory and takes time, is off.
"""

import os
import sys
import tempfile
from argparse import ArgumentParser, Namespace
from importlib.util import find_spec
from multiprocessing import get_context
from pathlib import Path
from statistics import median
from time import perf_counter

import torch

sys.path.insert(0, str(Path(__file__).parent))  # where bench.py is, which knows the way to rlhf.py
import bench  # noqa: E402
import cli  # noqa: E402
from data.formats import markdown  # noqa: E402
from model import GPTConfig  # noqa: E402

os.environ |= {"HF_HUB_OFFLINE": "1", "TRL_EXPERIMENTAL_SILENCE": "1"}


def transformers_decode(cfg: Namespace, config: GPTConfig) -> list[float]:
    """Seconds of each repeat of `generate`."""
    from transformers import GPT2LMHeadModel
    model, taken = GPT2LMHeadModel(bench.peer_config(config)).eval(), []
    rows = torch.tensor(bench.random_rows(config, cfg.rollout_size, cfg.prompt_len))
    for _ in range(1 + cfg.repeats):
        start = perf_counter()
        tokens = model.generate(rows, attention_mask=torch.ones_like(rows), do_sample=True, top_k=0,
                                max_new_tokens=cfg.max_new_tokens)
        taken.append(perf_counter() - start)
        assert tokens.size(1) == cfg.prompt_len + cfg.max_new_tokens
    return taken[1:]


def trl_ppo(cfg: Namespace, config: GPTConfig) -> list[float]:
    """Seconds of each iteration but the first: from the end of one to the end of the next."""
    from datasets import Dataset
    from tokenizers import Tokenizer, models
    from transformers import (
        GPT2ForSequenceClassification, GPT2LMHeadModel, PreTrainedTokenizerFast, TrainerCallback
    )
    from trl.experimental.ppo import PPOConfig, PPOTrainer

    class Clock(TrainerCallback):
        ends = []

        def on_step_end(self, *_, **__) -> None:
            self.ends.append(perf_counter())

    shape, parts = bench.peer_config(config), cfg.rollout_size // cfg.minibatch_size
    words = models.WordLevel({"<pad>": 0, "<eos>": config.vocab_size - 1}, unk_token="<pad>")
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=Tokenizer(words), pad_token="<pad>",
                                        eos_token="<eos>", padding_side="left")
    prompts = bench.random_rows(config, cfg.rollout_size, cfg.prompt_len)
    args = PPOConfig(
        output_dir=tempfile.mkdtemp(), use_cpu=True, bf16=False, gradient_checkpointing=False,
        per_device_train_batch_size=cfg.minibatch_size, gradient_accumulation_steps=parts,
        num_mini_batches=parts, num_ppo_epochs=cfg.epochs, response_length=cfg.max_new_tokens,
        local_rollout_forward_batch_size=cfg.rollout_size, num_sample_generations=0,
        total_episodes=cfg.rollout_size * (1 + cfg.repeats), learning_rate=1e-12,
        report_to="none", save_strategy="no", logging_strategy="no", disable_tqdm=True)
    policy, ref = GPT2LMHeadModel(shape), GPT2LMHeadModel(shape)
    reward, value = GPT2ForSequenceClassification(shape), GPT2ForSequenceClassification(shape)
    PPOTrainer(args, tokenizer, policy, ref, reward, Dataset.from_dict({"input_ids": prompts}),
               value, callbacks=[Clock()]).train()
    return [after - before for before, after in zip(Clock.ends, Clock.ends[1:])]


def ours(cfg: Namespace, config: GPTConfig) -> list[float]:
    """Seconds of each repeat; of an iteration of PPO the whole, which is the table's last row."""
    job = bench.JOBS[cfg.job](cfg, config)
    return [[*job().values()][-1].seconds for _ in range(1 + cfg.repeats)][1:]


PEERS = {"decode": transformers_decode, "ppo": trl_ppo}


def seconds(flags: dict, dtype: str | None) -> list[float]:
    """Of ours in that precision; of the peer if None: torch is then left as it comes."""
    settings, taken = bench.settings(flags | {"dtype": dtype}), []

    def measure(cfg: Namespace) -> None:
        work = ours if dtype else PEERS[cfg.job]
        taken.extend(work(cfg, GPTConfig(**bench.SHAPES[cfg.shape])))

    if dtype:
        cli.run(measure, Namespace, settings)
    else:
        measure(Namespace(**settings))
    return taken


def main(argv: list[str] | None = None) -> None:
    parser = ArgumentParser(description=__doc__.split("\n")[0], allow_abbrev=False)
    parser.add_argument("job", choices=PEERS)
    parser.add_argument("--shape", default="A", choices=bench.SHAPES)
    parser.add_argument("--ending", action="store_true", help="responses half as long on average")
    parser.add_argument("--turns", type=int, default=3, help="of peer, bfloat16, float32 [3]")
    parser.add_argument("--repeats", type=int, default=3, help="in a turn, of each [3]")
    flags = vars(parser.parse_args(argv)) | {"device": "cpu"}
    if min(flags["turns"], flags["repeats"]) < 1:
        parser.error("--turns and --repeats should be at least 1")
    if missing := [name for name in ("transformers", "trl") if not find_spec(name)]:
        parser.error(f"{missing[0]} is not installed: pip install transformers==5.23.0 trl==1.12.0")
    names = {"peer, float32": None, "ours, bfloat16": "bfloat16", "ours, float32": "float32"}
    taken = {name: [] for name in names}
    with get_context("spawn").Pool(1, maxtasksperchild=1) as pool:  # a new process each time
        for _ in range(flags.pop("turns")):
            for name, dtype in names.items():
                taken[name] += pool.apply(seconds, (flags, dtype))
    peer = median(taken["peer, float32"])
    print(markdown({name: {
        "seconds": f"{median(own):.3g}", "fastest": f"{min(own):.3g}",
        "slowest": f"{max(own):.3g}", "times": f"{peer / median(own):.2f}",
    } for name, own in taken.items()}))


if __name__ == "__main__":
    main()

"""Have somebody rank completions: samples K of them per prompt and writes what `rlhf.py rm` reads.

The fable's labelers are scripted: five rank for training; on the held-out prompts two others, whom
the reward model never learns from, rank as well. One row a ranking:

    {"prompt": str, "completions": [str, ...], "ranks": [int, ...], "labeler": str}    0 = best
"""

import argparse
import json
import sys
from dataclasses import dataclass
from itertools import combinations
from pathlib import Path
from random import Random

import torch

sys.path.insert(0, str(Path(__file__).parent.parent))  # `python data/label.py` is to find rlhf.py
from data import fable  # noqa: E402
from rlhf import Common, UserError, add_flags, complete, decode, get_tokenizer, load  # noqa: E402
from rlhf import read_rows, responses, run  # noqa: E402


@dataclass
class Label(Common):
    models: str = "sft,sft,sft,sft,gpt"  # each completion is by one of these, drawn by chance
    k_min: int = 4  # fewest completions a prompt (paper: 4)
    k_max: int = 9  # most (paper: 9)


def label(cfg: Label) -> None:
    """Sample, rank, write comparisons.jsonl and comparisons_valid.jsonl, report the agreement."""
    tokenizer, rng = get_tokenizer(cfg.data), Random(cfg.seed)
    models = {name: load(cfg, name) for name in cfg.models.split(",")}
    if not 2 <= cfg.k_min <= cfg.k_max:
        raise UserError(f"k_min {cfg.k_min} and k_max {cfg.k_max}: at least 2, and in this order")
    everybody = fable.TRAIN_LABELERS + fable.HELDOUT_LABELERS
    for split in ("", "_valid"):
        path = Path(cfg.data) / f"rm_prompts{split}.jsonl"
        room = min(model.config.block_size for model in models.values()) - cfg.max_new_tokens
        rows = read_rows(path, tokenizer, room, "prompt")
        rankings = []
        for row, completions in zip(rows, sample_completions(models, rows, tokenizer, rng, cfg)):
            labelers = everybody if split else [rng.choice(fable.TRAIN_LABELERS)]
            for labeler in labelers:
                ranks = fable.rank(labeler, row, completions, rng)
                ranking = {"prompt": row["prompt"], "completions": completions, "ranks": ranks}
                rankings.append({**ranking, "labeler": labeler.name, "task": row["task"]})
        write_jsonl(Path(cfg.data) / f"comparisons{split}.jsonl", rankings)
    print(describe_agreement(rankings))


def sample_completions(models: dict, rows: list[dict], tokenizer, rng: Random, cfg: Label) -> list:
    """K completions for each row, K drawn anew each time, by models drawn from --models.

    The last of them answers another row's prompt: else nothing tells the reward model that a good
    answer to the wrong question is a bad one, and PPO soon finds that out.
    """
    names = cfg.models.split(",")
    authors = [rng.choices(names, k=rng.randint(cfg.k_min, cfg.k_max) - 1) for _ in rows]
    completions: list[list[str]] = [[] for _ in rows]
    for name, model in models.items():
        places = [i for i, own in enumerate(authors) for author in own if author == name]
        prompts = [rows[i]["prompt_ids"] for i in places]
        tokens, mask, _ = complete(model, prompts, tokenizer.eot_token, cfg.max_new_tokens)
        for i, ids in zip(places, responses(tokens, mask)):  # a model may go on as the human: cut
            completions[i].append(decode(tokenizer, ids).split("\n\nHuman:")[0])
    strays = [rng.choice(completions[i]) for i in rng.sample(range(len(rows)), len(rows))]
    return [[*own, stray] for own, stray in zip(completions, strays)]


def write_jsonl(path: Path, rows: list[dict]) -> None:
    partial = path.with_suffix(".partial")
    partial.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    partial.rename(path)
    pairs = [(a, b) for row in rows for a, b in combinations(row["ranks"], 2)]
    ties = sum(a == b for a, b in pairs) / len(pairs)
    print(f"{path}: {len(rows)} rankings, {len(pairs)} pairs, {ties:.0%} of them ties")


def agreement(rankings: list[dict]) -> float:
    """Share of pairs in the same order, of those that two labelers of a prompt leave untied."""
    same_answers: dict[tuple, list] = {}
    for ranking in rankings:
        answers = (ranking["prompt"], *ranking["completions"])
        same_answers.setdefault(answers, []).append(ranking["ranks"])
    same = untied = 0
    for ranks in same_answers.values():
        for one, other in combinations(ranks, 2):
            for i, j in combinations(range(len(one)), 2):
                product = (one[i] - one[j]) * (other[i] - other[j])
                same, untied = same + (product > 0), untied + (product != 0)
    return same / max(1, untied)


def describe_agreement(rankings: list[dict]) -> str:
    heldout = {labeler.name for labeler in fable.HELDOUT_LABELERS}
    train = [ranking for ranking in rankings if ranking["labeler"] not in heldout]
    return (
        f"labelers agree on {agreement(train):.1%} of untied pairs, "
        f"with the held-out ones on {agreement(rankings):.1%} (paper: 72.6 %, 77.3 %)"
    )


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0], allow_abbrev=False)
    add_flags(parser, Label)
    run(label, Label(**vars(parser.parse_args())))

"""Have somebody rank completions: samples K of them per prompt and writes what `rlhf.py rm` reads.

The fable's labelers are scripted: five rank for training; on the held-out prompts two others, whom
the reward model never learns from, rank as well. One row a ranking:

    {"prompt": str, "completions": [str, ...], "ranks": [int, ...], "labeler": str}    0 = best

--by NAME has a person rank in the terminal, --by out/rm.pt a reward model (RLAIF); a person may
also --write demonstrations or compare two models --blind: people.py.
"""

import argparse
import json
import sys
from contextlib import suppress
from dataclasses import dataclass
from itertools import chain, combinations
from pathlib import Path
from random import Random

import torch

sys.path.insert(0, str(Path(__file__).parent.parent))  # `python data/label.py` is to find rlhf.py
from data import answers, fable, people  # noqa: E402
from data.formats import encode, gold_function, own_turn, printable, replacing  # noqa: E402
from model import ScalarModel  # noqa: E402
from cli import Common, add_flags, parse, room, run  # noqa: E402
from rlhf import (  # noqa: E402
    UserError, complete, decode, get_tokenizer, load, read_rows, responses, score_rows
)


@dataclass
class Label(Common):
    models: str = "sft,sft,sft,sft,gpt"  # each completion is by one of these, drawn by chance
    k_min: int = 4  # fewest completions a prompt (paper: 4)
    k_max: int = 9  # most (paper: 9)
    round: int = 1  # of collecting: a later one keeps the rankings of those before it
    by: str = "scripted"  # who ranks: scripted (the fable), a person's name, a reward model's .pt
    prompts: str = ""  # file of prompts for a person or a model; if it has completions, of those
    to: str = ""  # file that answers are added to; else the one that the stages read, in --data


def label(cfg: Label) -> None:
    """Sample, rank, write comparisons.jsonl and comparisons_valid.jsonl, report the agreement."""
    tokenizer, rng = get_tokenizer(cfg.data), Random(cfg.seed)
    models = {name: load(cfg, name) for name in cfg.models.split(",")}
    if not 2 <= cfg.k_min <= cfg.k_max:
        raise UserError(f"k_min {cfg.k_min} and k_max {cfg.k_max}: at least 2, and in this order")
    everybody = fable.TRAIN_LABELERS + fable.HELDOUT_LABELERS
    for split in ("", "_valid"):
        path = Path(cfg.data) / f"rm_prompts{split}.jsonl"
        longest = min(room(model, cfg) for model in models.values())
        rows = read_rows(path, tokenizer, longest, "prompt")
        to = Path(cfg.data) / f"comparisons{split}.jsonl"
        rankings = earlier_rounds(to, cfg.round)
        for row, completions in zip(rows, sample_completions(models, rows, tokenizer, rng, cfg)):
            labelers = everybody if split else [rng.choice(fable.TRAIN_LABELERS)]
            for labeler in labelers:
                ranks = fable.rank(labeler, row, completions, rng)
                ranking = {"prompt": row["prompt"], "completions": completions, "ranks": ranks}
                who = {"labeler": labeler.name, "task": row["task"], "round": cfg.round}
                rankings.append(ranking | who)
        write_jsonl(to, rankings)
    print(describe_agreement(rankings))


def earlier_rounds(path: Path, number: int) -> list[dict]:
    """The rankings of the rounds before round `number`, as they stand in the file."""
    if number == 1:
        return []
    rows = [row for _, row in answers.read_lines(path, *people.RANKING)]
    return [row for row in rows if row.get("round", 1) < number]


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
        for i, ids in zip(places, responses(tokens, mask)):
            completions[i].append(own_turn(decode(tokenizer, ids)))
    strays = [rng.choice(completions[i]) for i in rng.sample(range(len(rows)), len(rows))]
    return [[*own, stray] for own, stray in zip(completions, strays)]


def write_jsonl(path: Path, rows: list[dict]) -> None:
    with replacing(path) as file:
        file.write("".join(json.dumps(row) + "\n" for row in rows).encode())
    pairs = [(a, b) for row in rows for a, b in combinations(row["ranks"], 2)]
    ties = sum(a == b for a, b in pairs) / len(pairs)
    print(f"{path}: {len(rows)} rankings, {len(pairs)} pairs, {ties:.0%} of them ties")


def agreement(rankings: list[dict]) -> float:
    """Share of pairs in the same order, of those that two labelers of a prompt leave untied."""
    same_answers: dict[tuple, list] = {}
    for ranking in rankings:
        answers = (ranking["prompt"], *ranking["completions"])
        same_answers.setdefault(answers, []).append(ranking["ranks"])
    pairs = []
    for ranks in same_answers.values():
        for one, other in combinations(ranks, 2):
            pairs += untied_pairs(one, other)
    return sum(pairs) / max(1, len(pairs))


def untied_pairs(one: list[int], other: list[int]) -> list[bool]:
    """For each pair that neither ranking ties: whether both put it in the same order."""
    places = combinations(range(len(one)), 2)
    products = [(one[i] - one[j]) * (other[i] - other[j]) for i, j in places]
    return [product > 0 for product in products if product]


def describe_agreement(rankings: list[dict]) -> str:
    heldout = {labeler.name for labeler in fable.HELDOUT_LABELERS}
    train = [ranking for ranking in rankings if ranking["labeler"] not in heldout]
    return (
        f"labelers agree on {agreement(train):.1%} of untied pairs, "
        f"with the held-out ones on {agreement(rankings):.1%} (paper: 72.6 %, 77.3 %)"
    )


# ---- A model or a person ranks -------------------------------------------------------------------


def scripted(cfg: Label) -> None:
    """`label`, which writes its files anew, unless that would lose what people have ranked."""
    answers.keep(Path(cfg.data).glob("comparisons*.jsonl"))
    label(cfg)


def rank_by_model(cfg: Label) -> None:
    """A reward model ranks in a person's place, by score (RLAIF); says whether others agree."""
    tokenizer, judge = get_tokenizer(cfg.data), load(cfg, cfg.by, ScalarModel)
    path, rows, models = people.read_questions(cfg, tokenizer, "rm_prompts", "prompts")
    to = people.answers_file(cfg, path, "comparisons")
    rankings = [row for row in rows if "labeler" in row]
    rows = answers.distinct(rows)
    if models:
        sampled = sample_completions(models, rows, tokenizer, Random(cfg.seed), cfg)
        rows = [{**row, "completions": own} for row, own in zip(rows, sampled)]
    gold = gold_function(rows, cfg.gold)
    own = {"labeler": cfg.by, "time": answers.now()}
    own |= {"models": people.names(cfg)} if models else {}
    added = []
    for row in rows:
        ranking = {"prompt": row["prompt"], "completions": row["completions"]}
        if scores := score_completions(judge, row, tokenizer, cfg):
            added.append({**ranking, "ranks": ranks_of(scores), **own})
        if gold:
            scores = [sum(gold(row, text).values()) for text in row["completions"]]
            rankings.append({**ranking, "ranks": ranks_of(scores), "labeler": "gold"})
    rankings += answers.add_rankings(to, added)
    left_out = len(rows) - len(added)
    print(f"{to}: {len(added)} rankings by {cfg.by}, {left_out} left out, over its context")
    print(agreement_table(rankings + added, cfg.by))


@torch.no_grad()
def score_completions(judge: ScalarModel, row: dict, tokenizer, cfg: Label) -> list[float]:
    """The score of each completion, the same for the same text; [] if one is over the context."""
    texts = dict.fromkeys(row["completions"])
    ids = [encode(tokenizer, text) + [tokenizer.eot_token] for text in texts]
    ids = [row["prompt_ids"] + own for own in ids]
    if max(map(len, ids)) > judge.config.block_size:
        return []
    scores = dict(zip(texts, score_rows(judge, ids, cfg).tolist()))
    return [scores[text] for text in row["completions"]]


def ranks_of(scores: list[float]) -> list[int]:
    """0 for the highest score; equals share a rank."""
    order = sorted(set(scores), reverse=True)
    return [order.index(score) for score in scores]


def agree(cfg: Label) -> None:
    """Print how far the labelers of --agreement's file agree, two by two and all together."""
    rows = answers.read_lines(Path(cfg.prompts), *people.RANKING)
    print(agreement_table([row for _, row in rows]))


def agreement_table(rankings: list[dict], who: str = "") -> str:
    """A line for each two labelers (of whom one is `who`) that ranked the same completions."""
    ranked: dict[tuple, dict[str, list]] = {}
    for row in rankings:
        by = ranked.setdefault((row["prompt"], *row["completions"]), {})
        by[printable(str(row.get("labeler", "nobody")))] = row["ranks"]
    common: dict[tuple, list] = {}
    for by in ranked.values():
        for two in combinations(sorted(by), 2):
            if not who or printable(who) in two:
                common.setdefault(two, []).append(untied_pairs(*map(by.get, two)))
    everybody = "all", list(chain(*common.values()))
    lines = []
    for two, own in [*((" and ".join(two), own) for two, own in sorted(common.items())), everybody]:
        pairs = list(chain(*own))
        share = f"{sum(pairs) / len(pairs):.1%}" if pairs else "-"
        agreed = f"agree on {share} of {len(pairs)} untied pairs"
        lines.append(f"{two}: {agreed}, rankings in common: {len(own)}")
    return "\n".join(lines) if common else "nobody else ranked the same completions"


def main(argv: list[str] | None = None) -> None:
    """python data/label.py [--by WHO] [--write | --blind A B | --agreement FILE] --flag value"""
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0], allow_abbrev=False)
    add_flags(parser, Label)
    tasks = parser.add_mutually_exclusive_group()
    tasks.add_argument("--write", action="store_true", help="a person writes demonstrations")
    tasks.add_argument("--blind", nargs=2, metavar="MODEL", help="a person says which is better")
    tasks.add_argument("--agreement", metavar="FILE", help="how far the labelers of a file agree")
    flags = parse(parser, argv)
    write, two, file = (flags.pop(name) for name in ("write", "blind", "agreement"))
    if write:
        stage = people.write
    elif two:
        stage, flags["models"] = people.blind, ",".join(two)
    elif file:
        stage, flags["prompts"] = agree, file
    elif flags["by"] == "scripted":
        stage = scripted
    else:
        stage = rank_by_model if flags["by"].endswith(".pt") else people.rank
    run(stage, Label, flags)


if __name__ == "__main__":
    for stream in filter(None, (sys.stdin, sys.stdout)):
        stream.reconfigure(errors="replace")  # a stray byte is no reason to stop
    if sys.stdin and sys.stdin.isatty():
        with suppress(ImportError):
            import readline  # noqa: F401  the arrow keys edit the line
    main()

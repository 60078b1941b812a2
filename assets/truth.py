"""What only a synthetic environment can tell of a finished run, in Markdown.

    python assets/truth.py out [out/seed2 ...]

Reads evaluate.json, rm.pt and the data set of each folder. The scripted labelers' noise is known,
and with it the true probability that a labeler prefers one answer to another.
"""

import json
import sys
from collections import defaultdict
from itertools import combinations
from pathlib import Path
from random import Random
from statistics import NormalDist

import numpy as np
import torch

sys.path.insert(0, str(Path(__file__).parent.parent))  # to find rlhf.py
import rlhf  # noqa: E402
from data import fable, files  # noqa: E402
from model import ScalarModel  # noqa: E402

BINS = np.array([0.5, 0.6, 0.7, 0.8, 0.9, 0.95, 1.0])
LABELERS = {"training labelers": fable.TRAIN_LABELERS, "others": fable.HELDOUT_LABELERS}
WITH_TEXT = ("rewrite", "summarization", "classification", "closed_qa", "extraction")


def judged_by_labelers(rows, responses, baseline) -> dict[str, float]:
    """How often each labeler, noise included, prefers a response to the baseline's."""
    shares = {}
    for labeler in fable.LABELERS:
        rng = Random(labeler.name)
        wins = 0.0
        for row, own, other in zip(rows, responses, baseline):
            ranks = fable.rank(labeler, row, [own, other], rng)
            wins += (ranks[0] < ranks[1]) + 0.5 * (ranks[0] == ranks[1])
        shares[labeler.name] = wins / len(rows)
    return shares


def made_up(rows, responses, tasks) -> float:
    """The share of responses with a falsehood: against the text given, or nobody can know it."""
    found = []
    for row, response in zip(rows, responses):
        if row["task"] in tasks:
            found.append(fable.falsehoods(row["wants"], fable.parse(response)) > 0)
    return float(np.mean(found))


def answers(out: Path, models: list[str]) -> dict[str, dict[str, float]]:
    """A row for each model: preferred to the last by whom, and what it makes up."""
    found = json.loads((out / "evaluate.json").read_text(encoding="utf-8"))
    rows = files.read_jsonl(out / "data" / found["prompts"]) * found["samples"]
    last = found["responses"][models[-1]]
    table = {}
    for model in models:
        own = found["responses"][model]
        shares = judged_by_labelers(rows, last, own)
        cells = {}
        for name, labelers in LABELERS.items():
            wins = [shares[labeler.name] for labeler in labelers]
            cells[f"{models[-1]} preferred by {name}"] = float(np.mean(wins))
        cells["made up, text given"] = made_up(rows, own, WITH_TEXT)
        cells["made up, unknown"] = made_up(rows, own, ("unknown",))
        table[model] = cells
    return table


def preference(labeler, grades: tuple[int, int]) -> float:
    """The true probability that the labeler prefers the first; each grade has its own noise."""
    return NormalDist(0, labeler.noise * 2 ** 0.5).cdf(grades[0] - grades[1])


def pairs(out: Path, name: str = "rm") -> list[tuple]:
    """All pairs of held-out completions: the reward model's probability that the first is
    preferred, and {labeler: the true one} of those to whom they do not tie."""
    cfg = rlhf.RM(data=str(out / "data"), out=str(out), device="cpu")
    tokenizer = files.get_tokenizer(cfg.data)
    model = rlhf.load(cfg, name, ScalarModel)
    prompts = files.read_jsonl(out / "data/rm_prompts_valid.jsonl")
    wants = {row["prompt"]: row for row in prompts}
    rankings = files.read_jsonl(out / "data/comparisons_valid.jsonl")
    completions = {row["prompt"]: sorted(set(row["completions"])) for row in rankings}
    found = []
    for prompt, texts in completions.items():
        examples = [files.example(tokenizer, prompt, text) for text in texts]
        with torch.no_grad():
            scores = rlhf.score(model, examples, cfg).tolist()
        grades = {}
        for labeler in fable.LABELERS:
            row = wants[prompt]
            grades[labeler] = [fable.grade(labeler, row, text) for text in texts]
        for i, j in combinations(range(len(texts)), 2):
            true = {}
            for labeler, own in grades.items():
                if own[i] != own[j]:
                    true[labeler] = preference(labeler, (own[i], own[j]))
            if true:
                chance = 1 / (1 + np.exp(scores[j] - scores[i]))
                found.append((chance, true))
    return found


def reward_model(out: Path, name: str = "rm") -> tuple[dict, dict]:
    """Expected accuracies, without the luck of the draw; and the calibration."""
    table = defaultdict(dict)
    bins = defaultdict(list)
    everything = pairs(out, name)
    for group, labelers in LABELERS.items():
        right = {"reward model": [], "judge of average taste, without noise": []}
        agree = []
        for chance, true in everything:
            average = np.mean(list(true.values()))
            for labeler in labelers:
                if labeler in true:
                    p = true[labeler]
                    right["reward model"].append(p if chance > 0.5 else 1 - p)
                    oracle = p if average > 0.5 else 1 - p
                    right["judge of average taste, without noise"].append(oracle)
                    others = [true[other] for other in labelers if other in true.keys() - {labeler}]
                    agree += [p * q + (1 - p) * (1 - q) for q in others]
        for judge, chances in right.items():
            table[judge][f"right with {group}"] = float(np.mean(chances))
        table["a labeler like them"][f"right with {group}"] = float(np.mean(agree))
    for chance, true in everything:
        sure = max(chance, 1 - chance)
        for labeler in LABELERS["training labelers"]:
            if labeler in true:
                p = true[labeler] if chance > 0.5 else 1 - true[labeler]
                bins[int(np.searchsorted(BINS, sure, side="right"))].append((sure, p))
    calibration = {}
    for number in sorted(bins):
        sure, p = np.mean(bins[number], axis=0)
        span = f"{BINS[number - 1]:.2f} to {BINS[min(number, len(BINS) - 1)]:.2f}"
        calibration[span] = {"pairs": len(bins[number]), "says": sure, "is": p}
    return table, calibration


def main() -> None:
    outs = [Path(name) for name in sys.argv[1:] or ["out"]]
    for out in outs:
        models = list(json.loads((out / "evaluate.json").read_text(encoding="utf-8"))["table"])
        for table in (answers(out, models), *reward_model(out)):
            print(f"\n{out}\n\n{rlhf.markdown(table)}")


if __name__ == "__main__":
    main()

"""The numbers of README.md and study.md: tables over the runs of several seeds, in Markdown.

    python assets/tables.py out/study/*                       what the models are worth, to whom
    python assets/tables.py out/study/* --reward_model rm     how often it is right, how sure it is
    python assets/tables.py out/study/* --best_of_n rm        over-optimisation, with Gao's fit

Spread over seeds is the sample standard deviation. An interval is 95 %, over seeds Student's t. The
scripted labelers' noise is known, so the probability that one prefers an answer is, too.
"""

import argparse
import json
import sys
from collections import Counter, defaultdict
from itertools import combinations, cycle, product
from math import comb
from pathlib import Path
from statistics import NormalDist

import numpy as np

sys.path.insert(0, str(Path(__file__).parent.parent))  # to find rlhf.py
import rlhf  # noqa: E402
from data import fable, files  # noqa: E402
from model import ScalarModel  # noqa: E402

T = [12.706, 4.303, 3.182, 2.776, 2.571, 2.447, 2.365, 2.306, 2.262]  # 97.5 % points, from 1 df
BINS = (0.5, 0.6, 0.7, 0.8, 0.9, 0.95, 1.001)  # where 1 is in the last
LABELERS = {"training labelers": fable.TRAIN_LABELERS, "other labelers": fable.HELDOUT_LABELERS}
WITH_TEXT = ("summarization", "classification", "closed_qa", "extraction")
INVENTED = tuple(kind for kind in fable.FORMS if kind.startswith("invented"))

def spread(values: list[float]) -> str:
    """Mean and sample standard deviation."""
    if len(values) == 1:
        return f"{values[0]:.3f}"
    return f"{np.mean(values):.3f} ± {np.std(values, ddof=1):.3f}"

def interval(values: list[float]) -> str:
    """Shares in per cent: the mean, its interval over seeds, and that of each seed."""
    percent = [100 * value for value in values]
    if len(values) == 1:
        return f"{percent[0]:.1f}"
    margin = T[len(values) - 2] * np.std(percent, ddof=1) / len(values) ** 0.5
    each = ", ".join(f"{value:.1f}" for value in percent)
    return f"{np.mean(percent):.1f} ± {margin:.1f} ({each})"

def merged(tables: list[dict[str, dict[str, float]]]) -> dict[str, dict[str, list[float]]]:
    """The tables of several seeds as one, a list of values in each cell."""
    rows = defaultdict(lambda: defaultdict(list))
    for one in tables:
        for title, row in one.items():
            for column, value in row.items():
                rows[title][column].append(value)
    return rows

# ---- What the models are worth ---------------------------------------------------------

def preference(labeler: fable.Labeler, own: int, other: int) -> float:
    """The probability that the labeler, noise included, prefers the first of two grades."""
    if own == other:
        return 0.5
    return NormalDist(0, labeler.noise * 2**0.5).cdf(own - other)

def new_to_all(rows: list[dict], data: Path) -> list[bool]:
    """For each row, whether nothing in training wants the same: such prompts are harder."""
    known = set()
    for name in ("sft", "rm_prompts", "prompts"):
        known.update(str(row["wants"]) for row in files.read_jsonl(data / f"{name}.jsonl"))
    return [str(row["wants"]) not in known for row in rows]

def preferred(run: dict, rows: list[dict], data: Path) -> dict[str, dict[str, float]]:
    """How often the last model is preferred to the others: by gold and by each labeler."""
    *others, last = run["responses"]
    new = new_to_all(rows, data)
    grades = {}
    for labeler, (model, responses) in product(fable.LABELERS, run["responses"].items()):
        own = [fable.grade(labeler, row, text) for row, text in zip(cycle(rows), responses)]
        grades[labeler, model] = np.reshape(own, (-1, len(rows)))  # (samples, prompts)
    found = {}
    for model in others:
        own, other = np.array(run["gold"][last]), np.array(run["gold"][model])
        rate, margin = rlhf.win_rate(own, other)
        cells = {"by gold": rate, "± over prompts": margin}
        cells["by gold, new wants"] = rlhf.win_rate(own[:, new], other[:, new])[0]
        shares = {}
        for labeler in fable.LABELERS:
            chances = []
            for ours, theirs in product(grades[labeler, last], grades[labeler, model]):
                chances += [preference(labeler, a, b) for a, b in zip(ours, theirs)]
            shares[labeler] = np.mean(chances)
        for name, labelers in LABELERS.items():
            cells[f"by {name}"] = np.mean([shares[labeler] for labeler in labelers])
        cells["labelers in favour"] = np.mean([share > 0.5 for share in shares.values()])
        found[f"{last} to {model}"] = cells
    return found

def count_claims(rows: list[dict], responses: list[str], tasks: tuple, kinds: tuple) -> Counter:
    """How many responses to these tasks there are, claim something, and claim something false.

    Claims are sentences of these kinds: what a text says, or what nobody can know.
    """
    counts = Counter()
    for row, response in zip(cycle(rows), responses):  # all rows, then their second samples
        if row["task"] in tasks:
            claims = [one for one in fable.parse(response) if one.kind in kinds]
            counts["responses"] += 1
            counts["claims"] += len(claims) > 0
            counts["false"] += fable.falsehoods(row["wants"], claims) > 0
    return counts

def print_models(outs: list[Path], runs: list[dict]) -> None:
    choices = []
    inventions = []
    for out, run in zip(outs, runs):
        rows = files.read_jsonl(out / "data" / run["prompts"])
        choices.append(preferred(run, rows, out / "data"))
        inventions.append({})
        for model, responses in run["responses"].items():
            cells = inventions[-1][model] = {}
            text = count_claims(rows, responses, WITH_TEXT, fable.REPORTS)
            unknown = count_claims(rows, responses, ("unknown",), INVENTED)
            cells["says something of the text given"] = text["claims"] / text["responses"]
            cells["of that, made up"] = text["false"] / max(1, text["claims"])
            cells["says what nobody knows"] = unknown["false"] / unknown["responses"]
    print(f"n = {len(runs)} seeds, {runs[0]['prompts']}, {runs[0]['samples']} samples a prompt\n")
    found = merged([run["table"] for run in runs])
    for row in found.values():
        row.pop("±", None)  # over prompts; the second table has it
    print(rlhf.markdown(found, spread))
    print("\nPreferred, in per cent:\n\n" + rlhf.markdown(merged(choices), interval))
    print("\nIn per cent:\n\n" + rlhf.markdown(merged(inventions), interval))

# ---- The reward model against the truth ------------------------------------------------

def pairs(out: Path, name: str) -> list[tuple]:
    """All pairs of held-out completions: the reward model's probability that the first is
    preferred, and {labeler: the true one} of those to whom they do not tie."""
    cfg = rlhf.RM(data=str(out / "data"), out=str(out), device="cpu")
    tokenizer = files.get_tokenizer(cfg.data)
    model = rlhf.load(cfg, name, ScalarModel)
    ranked = defaultdict(set)
    for ranking in files.read_jsonl(out / "data/comparisons_valid.jsonl"):
        ranked[ranking["prompt"]].update(ranking["completions"])
    found = []
    for row in files.read_jsonl(out / "data/rm_prompts_valid.jsonl"):
        texts = sorted(ranked.pop(row["prompt"], ()))  # a prompt may be there twice
        examples = [files.example(tokenizer, row["prompt"], text) for text in texts]
        scores = rlhf.score(model, examples, cfg).tolist()
        for i, j in combinations(range(len(texts)), 2):
            true = {}
            for labeler in fable.LABELERS:
                own = fable.grade(labeler, row, texts[i])
                other = fable.grade(labeler, row, texts[j])
                if own != other:
                    true[labeler] = preference(labeler, own, other)
            if true:
                found.append((1 / (1 + np.exp(scores[j] - scores[i])), true))
    return found

def accuracies(everything: list[tuple]) -> dict[str, dict[str, float]]:
    """Expected accuracies, without the luck of the draw."""
    table = defaultdict(dict)
    for group, labelers in LABELERS.items():
        right = defaultdict(list)
        for chance, true in everything:
            average = np.mean(list(true.values()))
            own = {labeler: true[labeler] for labeler in labelers if labeler in true}
            for labeler, p in own.items():
                right["reward model"].append(p if chance > 0.5 else 1 - p)
                right["judge of average taste, no noise"].append(p if average > 0.5 else 1 - p)
                for other, q in own.items():
                    if other != labeler:
                        both = p * q + (1 - p) * (1 - q)
                        right["another labeler of the group"].append(both)
        for judge, probabilities in right.items():
            table[judge][group] = float(np.mean(probabilities))
    return table

def calibration(everything: list[tuple]) -> dict[str, dict[str, float]]:
    """How sure the reward model is, beside how often training labelers agree with it."""
    sure = []
    agree = []
    for chance, true in everything:
        for labeler in set(fable.TRAIN_LABELERS) & set(true):
            sure.append(max(chance, 1 - chance))
            agree.append(true[labeler] if chance > 0.5 else 1 - true[labeler])
    sure, agree = np.array(sure), np.array(agree)
    rows = {}
    for low, high in zip(BINS, BINS[1:]):
        inside = (low <= sure) & (sure < high)
        if inside.any():
            cells = {"it says": sure[inside].mean(), "labelers agree": agree[inside].mean()}
            rows[f"{low:.2f} to {high:.2f}"] = cells
    return rows

# ---- Over-optimisation: best of n by a reward model, judged by gold --------------------

def best_of_n(run: dict) -> dict[str, dict[str, float]]:
    """Gold of the answer that the reward model, or gold itself, prefers among n by ppo_init."""
    gold = np.array(run["gold"]["ppo_init"])  # (samples, prompts)
    table = {}
    for judge in ("gold", "RM score"):
        order = np.argsort(-np.array(run[judge]["ppo_init"]), axis=0)
        best_first = np.take_along_axis(gold, order, axis=0).mean(1)
        means = np.array([expected_best(best_first, n) for n in range(1, len(gold) + 1)])
        cells = table[judge] = {}
        for n in (1, 2, 4, 8, 16, 32, 64):
            cells[str(n)] = means[n - 1]
        cells["alpha"], cells["beta"] = gao(means - means[0])
    return table

def expected_best(best_first: np.ndarray, n: int) -> float:
    """Gold of the best of n answers, as a mean over all ways to choose n of those there are."""
    total = 0.0
    for place, gold in enumerate(best_first):
        worse = len(best_first) - 1 - place
        total += gold * comb(worse, n - 1)  # choices in which this answer is the best
    return total / comb(len(best_first), n)

def gao(gains: np.ndarray) -> tuple[float, float]:
    """alpha and beta of gain = d (alpha - beta d), d = sqrt(KL), the law of Gao et al. 2022.

    The KL of best of n is taken to be its upper bound, log n - (n - 1) / n nats (Beirami et al.
    2024, arXiv 2401.01879).
    """
    n = np.arange(1, len(gains) + 1)
    d = np.sqrt(np.log(n) - (n - 1) / n)
    alpha, beta = np.linalg.lstsq(np.stack([d, -d * d], 1), gains, rcond=None)[0]
    return alpha, beta

def read(out: Path, name: str, beside: str | None = None) -> dict:
    """An evaluation; the models of a second one come first, with its name."""
    run = json.loads((out / f"{name}.json").read_text(encoding="utf-8"))
    if beside:
        other = json.loads((out / f"{beside}.json").read_text(encoding="utf-8"))
        for key in ("gold", "responses"):
            renamed = {f"{model} ({beside})": value for model, value in other[key].items()}
            run[key] = renamed | run[key]
    return run

def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("outs", nargs="*", default=["out"], help="folders of runs, one a seed")
    parser.add_argument("--name", default="evaluate", help="name of the evaluation")
    parser.add_argument("--beside", help="a second evaluation, on the same prompts")
    parser.add_argument("--reward_model", help="compare this reward model with the truth")
    parser.add_argument("--best_of_n", help="by this reward model, and by gold")
    flags = parser.parse_args()
    outs = [Path(out) for out in flags.outs]
    if flags.reward_model:
        everything = [pairs(out, flags.reward_model) for out in outs]
        print(rlhf.markdown(merged([accuracies(own) for own in everything]), interval))
        print("\n" + rlhf.markdown(merged([calibration(sum(everything, []))]), spread))
    elif flags.best_of_n:
        runs = [read(out, f"best_of_n_{flags.best_of_n}") for out in outs]
        print(rlhf.markdown(merged([best_of_n(run) for run in runs]), spread))
    else:
        print_models(outs, [read(out, flags.name, flags.beside) for out in outs])

if __name__ == "__main__":
    main()

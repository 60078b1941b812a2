"""The tables of study.py in detail, from what its runs have left in the folders of the seeds.

A cell is the mean over the seeds ± their standard deviation; where a run is not done there is "-",
and a table with nothing in it is left out.
"""

import json
import math
from pathlib import Path
from typing import NamedTuple

import numpy as np
from measures import read_lines
from rlhf import win_rate
from seeds import spread

from data import fable
from data.label import agreement

NS = (1, 2, 4, 8, 16, 32, 64)
SIZES = {384: "rm_384", 1536: "rm_1536", 6144: "rm"}  # comparisons: the reward model of so many
COLUMNS = ["win rate", "RM score", "KL", "length", "held-out loss", "in-context"]
FOLDS = [f"fold_{i}" for i in range(1, 6)]
BASE = ["gpt", "gpt+fewshot", "sft", "ppo", "ppo_ptx"]


class Seed(NamedTuple):
    """What is known of the policies of a seed: columns of `evaluate` and of the logs, and the gold
    score of each one's answer to each held-out prompt."""
    out: Path
    table: dict[str, dict[str, float]]
    gold: dict[str, np.ndarray]


def log(out: Path, run: str) -> list[dict]:
    """The steps of a run, none if it has not begun."""
    path = out / run / "metrics.jsonl"
    return read_lines(path) if path.exists() else []


def read_samples(out: Path) -> dict[str, np.ndarray]:
    """Of study.py's best_of_n, all (prompts, n); nothing if it has not been done."""
    path = out / "best_of_n.json"
    content = json.loads(path.read_text()) if path.exists() else {}
    return {name: np.array(x) for name, x in content.items()}


def read_seed(out: Path) -> Seed:
    seed = Seed(out, {}, {})
    for file in sorted(out.glob("evaluate*.json")):
        content = json.loads(file.read_text())
        seed.table.update(content["table"])
        seed.gold.update({name: np.array(x) for name, x in content["gold"].items()})
    samples = read_samples(out)
    for n in (n for n in NS[2:] if n <= len(samples.get("gold", [[]])[0])):
        own = {key: pick(samples["rm"], x, n) for key, x in samples.items()}
        seed.gold[f"best of {n}"] = own["gold"]
        seed.table[f"best of {n}"] = {
            "RM score": own["rm"].mean(), "length": own["length"].mean(), "KL": kl_bound(n)}
    for name, gold in seed.gold.items():
        seed.table[name]["win rate"] = win_rate(gold, seed.gold["sft"])[0]
    for name, points in elo(seed.gold).items():
        seed.table[name]["Elo"] = points
    return seed


# ---- what is calculated --------------------------------------------------------------------------

def kl_bound(n: int) -> float:
    """KL(best of n || policy) in nats, at most: log n - (n - 1) / n (Stiennon et al. 2020)."""
    return math.log(n) - (n - 1) / n


def pick(scores: np.ndarray, values: np.ndarray, n: int) -> np.ndarray:
    """The value of the first n answers' best by score: (P, N), (P, N), n -> (P,)."""
    return values[np.arange(len(values)), scores[:, :n].argmax(1)]


def best_of(scores: np.ndarray, values: np.ndarray, n: int) -> np.ndarray:
    """The expected value of the answer with the best score of n: (P, N), (P, N), n -> (P,).

    Over all choices of n from the N answers (Nakano et al. 2021, appendix I): the answer of rank i
    by score, 0 the lowest, is the best of C(i, n - 1) of the C(N, n).
    """
    N = scores.shape[1]
    weights = np.array([math.comb(i, n - 1) for i in range(N)]) / math.comb(N, n)
    return np.take_along_axis(values, scores.argsort(1), 1) @ weights


def bradley_terry(wins: np.ndarray, steps: int = 2000) -> np.ndarray:
    """The likeliest strengths in nats, mean 0, where i beats j with sigmoid(s_i - s_j): wins (M, M)
    are how often i beat j, a tie half a win; by Zermelo's iteration."""
    games, strengths = wins + wins.T, np.ones(len(wins))
    for _ in range(steps):
        strengths = wins.sum(1) / (games / (strengths[:, None] + strengths)).sum(1)
        strengths /= np.exp(np.log(strengths).mean())
    return np.log(strengths)


def elo(gold: dict[str, np.ndarray]) -> dict[str, float]:
    """Elo points over SFT: 400 / ln 10, or 174, a nat."""
    wins = np.array([[win_rate(own, other)[0] for other in gold.values()] for own in gold.values()])
    points = 400 / math.log(10) * bradley_terry(wins * (1 - np.eye(len(wins))))
    return dict(zip(gold, points - points[list(gold).index("sft")]))


def gao_fit(kl: np.ndarray, gain: np.ndarray, form: str) -> tuple[float, float, float]:
    """alpha and beta of gain = d (alpha - beta d), best of n, or d (alpha - beta log d), PPO, where
    d = sqrt(KL) (Gao et al. 2022); by least squares. And the share of the variance explained."""
    d = np.sqrt(kl)
    terms = np.stack([d, -d * (d if form == "best of n" else np.log(d))], 1)
    fit = np.linalg.lstsq(terms, gain, rcond=None)[0]
    return *fit, 1 - np.var(gain - terms @ fit) / np.var(gain)


def smooth(values: list[float], width: int = 5) -> np.ndarray:
    """The running mean, of what there is at the ends."""
    kernel = np.ones(min(width, len(values)))
    return np.convolve(values, kernel, "same") / np.convolve(np.ones(len(values)), kernel, "same")


# ---- the tables ----------------------------------------------------------------------------------

def markdown(columns: list[str], rows: list[list[str]]) -> str:
    if not rows:
        return ""
    lines = [columns, ["---"] + ["--:"] * (len(columns) - 1), *rows]
    return "\n".join(f"| {' | '.join(line)} |" for line in lines) + "\n"


def cells(columns: list[str], own: list[dict]) -> list[str]:
    found = [[x[column] for x in own if column in x] for column in columns]
    return [spread(values) if values else "-" for values in found]


def policies(seeds: list[Seed], names: list[str], columns: list[str] = COLUMNS, paper=None) -> str:
    """A row a policy; `paper` is {column title: {name: the paper's figure}}."""
    paper, rows = paper or {}, []
    for name in names:
        if own := [seed.table[name] for seed in seeds if name in seed.table]:
            theirs = [figures.get(name, "") for figures in paper.values()]
            rows.append([name, *cells(columns, own), *theirs])
    return markdown(["policy", *columns, *paper], rows)


def preference(seeds: list[Seed]) -> str:
    return policies(seeds, [*BASE, "gpt_10x", "gpt_10x+fewshot"], [*COLUMNS, "Elo"])


def tax(seeds: list[Seed]) -> str:
    squad = {"gpt": "69.8", "sft": "65.9", "ppo": "52.0", "ppo_ptx": "69.9"}
    names = ["gpt", "sft", "ppo", "ptx_0.02", "ptx_0.1", "ppo_ptx", "ptx_2", "over_6144",
             "kl_0.01", "kl_0.16", "kl_4"]
    columns = ["held-out loss", "in-context", "RM score", "win rate", "KL"]
    return policies(seeds, names, columns, {"paper: SQuAD v2, F1 (Table 14)": squad})


def course(out: Path, run: str) -> dict[str, np.ndarray]:
    """KL, gain of gold and of the learned score over the start, at each iteration, smoothed."""
    rows = log(out, run)
    keys = {"KL": "objective/kl", "gold": "objective/gold", "learned": "objective/scores"}
    found = {name: smooth([row[key] for row in rows]) for name, key in keys.items()}
    found |= {name: found[name] - found[name][0] for name in ("gold", "learned")}
    return found | {"KL": found["KL"].clip(1e-3)}


def sampled(out: Path, judge: str) -> dict[str, np.ndarray]:
    """The same for the best of n, by that reward model."""
    samples = read_samples(out)
    ns = [n for n in NS if n <= samples["gold"].shape[1]]
    found = {name: np.array([best_of(samples[judge], samples[key], n).mean() for n in ns])
             for name, key in (("gold", "gold"), ("learned", judge))}
    return {"KL": np.array([kl_bound(n) for n in ns]),
            **{name: values - values[0] for name, values in found.items()}}


def summary(found: dict[str, np.ndarray], form: str) -> dict[str, float]:
    """Where gold is highest, where it ends, and the fit, whose form does not hold near 0."""
    far, best = found["KL"] > 0.1, found["gold"].argmax()
    result = {"gold at its best": found["gold"][best], "at a KL of": found["KL"][best],
              "gold at the end": found["gold"][-1], "learned at the end": found["learned"][-1],
              "KL at the end": found["KL"][-1]}
    if far.sum() > 2:
        fit = gao_fit(found["KL"][far], found["gold"][far], form)
        result |= dict(zip(("alpha", "beta", "explained"), fit))
    return result


def optimised(seeds: list[Seed]) -> dict[tuple, list[dict]]:
    """{(form, comparisons): the course of each seed}, of those that are done."""
    found = {("PPO", size): [course(seed.out, f"over_{size}") for seed in seeds
                             if f"over_{size}" in seed.table] for size in SIZES}
    found |= {("best of n", size): [sampled(seed.out, judge) for seed in seeds
                                    if judge in read_samples(seed.out)]
              for size, judge in SIZES.items()}
    return {key: courses for key, courses in found.items() if courses}


def over_optimisation(seeds: list[Seed]) -> str:
    columns, rows = ["gold at its best", "at a KL of", "gold at the end", "learned at the end",
                     "KL at the end", "alpha", "beta", "explained"], []
    for (form, size), courses in optimised(seeds).items():
        own = [summary(found, form) for found in courses]
        rows.append([f"{form}, {size:,} comparisons", *cells(columns, own)])
    logs = over_training(seeds, ["ppo", "ppo_ptx", "over_6144"])
    return f"{markdown(['optimised by', *columns], rows)}\n{logs}"


LOGGED = {  # column of a table: of a log
    "KL": "objective/kl", "learned": "objective/scores", "gold": "objective/gold",
    "length": "response_length", "EOS": "eos_fraction", "value explained": "val/var_explained",
}


def over_training(seeds: list[Seed], runs: list[str]) -> str:
    """What a reader sees in the logs: means of five iterations, early, midway and in the end."""
    rows = []
    for run in runs:
        logs = [own for own in (log(seed.out, run) for seed in seeds) if own]
        count = min(map(len, logs), default=0)
        for end in sorted({min(5, count), count // 2, count} - {0}):
            own = [{title: np.mean([row[key] for row in steps[max(0, end - 5) : end]])
                    for title, key in LOGGED.items()} for steps in logs]
            rows.append([f"{run}, to iteration {end}", *cells([*LOGGED], own)])
    return markdown(["run", *LOGGED], rows)


def judged(rows: list[dict]) -> dict[str, float]:
    """Of a reward model's log: its report, which is the last line; nothing before it is there."""
    if not rows or "eval/accuracy" not in rows[-1]:
        return {}
    last = [row["loss"] for row in rows[-1 - max(1, len(rows) // 10) : -1]]
    return {"accuracy, %": 100 * rows[-1]["eval/accuracy"],
            "other labelers, %": 100 * rows[-1].get("eval_heldout_labelers/accuracy", math.nan),
            "loss of the last steps": np.mean(last)}


def accuracy(seeds: list[Seed], *runs: str) -> list[dict]:
    """The reports of the reward models of these names, averaged, by seed, where all are done."""
    found = [[judged(log(seed.out, run)) for run in runs] for seed in seeds]
    return [{key: np.mean([x[key] for x in own]) for key in own[0]} for own in found if all(own)]


def agreements(seeds: list[Seed]) -> tuple[list[float], list[float]]:
    """How often labelers agree, of untied pairs, in percent: those to train on, and all of them."""
    heldout = {labeler.name for labeler in fable.HELDOUT_LABELERS}
    files = [read_lines(seed.out / "data" / "comparisons_valid.jsonl") for seed in seeds]
    train = [[row for row in rows if row["labeler"] not in heldout] for rows in files]
    return tuple([100 * agreement(rows) for rows in x] for x in (train, files))


def reward_models(seeds: list[Seed]) -> str:
    rows, columns = [], ["accuracy, %", "other labelers, %", "loss of the last steps"]
    for title, runs in (("all 6,144 comparisons", ["rm"]), ("1,536", ["rm_1536"]),
                        ("384", ["rm_384"]), ("12,288 of two rounds, on both", ["rm2"]),
                        ("five-fold over labelers", FOLDS), ("one epoch", ["rm_epoch"]),
                        ("one epoch, shuffled pairs", ["rm_pairs"]),
                        ("ten times the size", ["rm_10x"])):
        if own := accuracy(seeds, *runs):
            rows.append([title, *cells(columns, own)])
    return markdown(["reward model", *columns], rows)


def epochs(seeds: list[Seed]) -> str:
    logs = [[row for row in log(seed.out, "sft_16") if "valid/loss" in row] for seed in seeds]
    keys, logs = ["valid/loss", "valid/score"], [rows for rows in logs if rows]
    return markdown(["epoch of SFT", "loss on held-out demonstrations", "learned score"],
                    [[str(i), *cells(keys, list(own))] for i, own in enumerate(zip(*logs), 1)])


WAYS = {  # to use the same comparisons, each along the KL: over kl_coef, beta and n
    "PPO": ["over_6144", "kl_0.01", "ppo", "kl_0.16", "kl_4"],
    "DPO": ["dpo_0.1", "dpo_0.3", "dpo_1", "dpo_3"],
    "best of n": [f"best of {n}" for n in NS[2:]],
}


def alternatives(seeds: list[Seed]) -> str:
    names = ["sft", "ppo_ptx", "reinforce", *sum(WAYS.values(), [])]
    methods = policies(seeds, names, ["KL", "RM score", "win rate", "length", "held-out loss"])
    points: dict[str, list[float]] = {}
    for name, row in (item for seed in seeds for item in seed.table.items()):
        points.setdefault(name, []).append(row["Elo"])
    ranked = sorted(points, key=lambda name: -np.mean(points[name]))
    everybody = policies(seeds, ranked, ["Elo", "win rate", "KL"])
    return f"{methods}\n{matched(seeds)}\n{everybody}"


def at_kl(seeds: list[Seed], columns: tuple = ("RM score", "win rate")) -> dict[str, list[dict]]:
    """Each way at the KL of ppo_ptx, along the square root of the KL, by seed that gets there."""
    found: dict[str, list[dict]] = {way: [] for way in ("PPO-ptx", *WAYS)}
    for table in (seed.table for seed in seeds):
        for way, names in {"PPO-ptx": ["ppo_ptx"], **WAYS}.items():
            rows = sorted((table[name] for name in names if name in table), key=lambda x: x["KL"])
            kl, own = [row["KL"] for row in rows], {}
            for key in columns:
                own[key] = between(kl, [row[key] for row in rows], table["ppo_ptx"]["KL"])
            if None not in own.values():
                found[way].append(own)
    return found


def matched(seeds: list[Seed]) -> str:
    rows = [[way, *cells(["RM score", "win rate"], own)] for way, own in at_kl(seeds).items()]
    return markdown(["at the KL of ppo_ptx", "RM score", "win rate"], rows)


def between(kl: list[float], values: list[float], at: float) -> float | None:
    """The value at that KL, linear in its square root; None if it lies outside. `kl` ascends."""
    if not kl or not kl[0] <= at <= kl[-1]:
        return None
    return float(np.interp(math.sqrt(max(0, at)), np.sqrt(np.clip(kl, 0, None)), values))


def rounds(seeds: list[Seed]) -> str:
    return policies(seeds, ["ppo_ptx", "ppo_ptx2"])


def broken(seeds: list[Seed]) -> str:
    names = ["ppo_ptx", "no_kl", "ppo", "no_clip", "no_eos_score", "value_from_scratch"]
    columns = ["win rate", "RM score", "KL", "length", "EOS", "held-out loss"]
    return f"{policies(seeds, names, columns)}\n{over_training(seeds, names)}"


def habits(seeds: list[Seed]) -> list[dict[str, dict[str, float]]]:
    """{policy: {what it does: how often}} by seed, where it is done."""
    files = [seed.out / "behaviours.json" for seed in seeds]
    return [json.loads(file.read_text()) for file in files if file.exists()]


def behaviours(seeds: list[Seed]) -> str:
    found = habits(seeds)
    names = list(found[0]) if found else []
    rows = [[rate, *(spread([x[name][rate] for x in found]) for name in names)]
            for rate in (found[0][names[0]] if found else ())]
    return markdown(["rate", *names], rows)


SECTIONS = {  # title: the function, and what was found elsewhere
    "1. Preference": (preference, "Ouyang et al., Figure 1 and section 4.1."),
    "2. The alignment tax and its cure": (
        tax, "From gamma 20 on the tax is gone (Figure 33); no beta, to 100 times the default, "
        "does what ptx does (Figure 34)."),
    "3. Over-optimisation": (
        over_optimisation, "Gold rises, then falls, later with more comparisons; gains are "
        "d (alpha - beta d) for the best of n, d (alpha - beta log d) for PPO, d = sqrt(KL) (Gao "
        "et al. 2022). Labelers lean towards length."),
    "4. Reward models": (
        reward_models, "Shuffled pairs overfit in one epoch (footnote 5); a doubling of the data "
        "is worth 1.1 points, of the model 1.8 (Stiennon et al. 2020)."),
    "5. SFT, epoch by epoch": (
        epochs, "The loss is lowest after one epoch, the score rises on to the 16th (3.5)."),
    "6. Other ways, and all policies": (
        alternatives, "DPO 61 %, PPO 57 % over people's summaries (Rafailov et al. 2023). Elo: "
        "174 points a nat, SFT is 0."),
    "7. A second round": (rounds, "Steps 2 and 3 can be iterated (3.1); no figure is given."),
    "8. Broken on purpose": (
        broken, "By people's ratings a beta of 0 is far worse than 0.02 (Figure 36); a value "
        "network of its own, begun as the reward model, is best (Stiennon et al., G.1)."),
    "9. Behaviour": (
        behaviours, "Makes things up where the answer is in the prompt: 21 %, GPT-3 41 % (4.1)."),
}

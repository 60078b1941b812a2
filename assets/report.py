"""The one table of study.py: what was claimed, and what is seen here. And its figure."""

import math
from contextlib import suppress
from pathlib import Path

import numpy as np
from rlhf import win_rate
from tables import (
    FOLDS, SECTIONS, SIZES, Seed, accuracy, agreements, at_kl, course, habits, log, markdown,
    optimised, read_seed, summary
)

from data.formats import replacing


def brief(values: list[float], digits: int = 1) -> str:
    return f"{np.mean(values):.{digits}f} ± {np.std(values):.{digits}f}" if values else "-"


def wins(seeds: list[Seed], one: str, *others: str) -> str:
    """How often `one` is preferred to each of the others, in percent, by gold score."""
    return ", ".join(brief([100 * win_rate(seed.gold[one], seed.gold[other])[0]
                            for seed in seeds if {one, other} <= {*seed.gold}]) for other in others)


def across(seeds: list[Seed], column: str, names: list[str], scale: float = 1) -> str:
    """A column of the tables for several policies, one after the other; shares in percent."""
    found = [[scale * seed.table[name][column] for seed in seeds if name in seed.table]
             for name in names]
    return ", ".join(brief(values, 1 if scale == 100 else 2) for values in found)


def peaks(seeds: list[Seed]) -> str:
    """Of PPO that nothing holds: what gold gains at its best, and by the end."""
    courses = [[summary(course(seed.out, f"over_{size}"), "PPO") for seed in seeds
                if f"over_{size}" in seed.table] for size in SIZES]
    return ", ".join(" then ".join(brief([x[key] for x in own], 2) for key in (
        "gold at its best", "gold at the end")) for own in courses)


def judges(seeds: list[Seed], column: str, *runs: list[str]) -> str:
    return ", ".join(brief([x[column] for x in accuracy(seeds, *names)]) for names in runs)


def per_doubling(seeds: list[Seed], small: str, large: str, times: float) -> str:
    """Points of accuracy that a doubling is worth, between two reward models."""
    ends = [accuracy(seeds, run) for run in (small, large)]
    return brief([(x["accuracy, %"] - y["accuracy, %"]) / math.log2(times) for y, x in zip(*ends)])


def lowest(seeds: list[Seed]) -> str:
    """The epochs of SFT in which the loss is lowest, and the learned score highest."""
    logs = [[row for row in log(seed.out, "sft_16") if "valid/loss" in row] for seed in seeds]
    best = [(1 + np.argmin([row["valid/loss"] for row in rows]),
             1 + np.argmax([row["valid/score"] for row in rows])) for rows in logs if rows]
    return ", ".join(map(brief, zip(*best))) or "-"


def habit(seeds: list[Seed], what: str, *names: str) -> str:
    """How often each policy does it, in percent of the prompts it is counted over."""
    return ", ".join(brief([100 * x[name][what] for x in habits(seeds) if name in x])
                     for name in names)


def claims(seeds: list[Seed]) -> str:
    """What was claimed, by whom, and what is seen here: the mean over the seeds ± their standard
    deviation, by gold score unless it says otherwise."""
    four, ptx = ["gpt", "sft", "ppo", "ppo_ptx"], ["ppo", "ptx_0.02", "ptx_0.1", "ppo_ptx", "ptx_2"]
    kl = ["over_6144", "kl_0.01", "ppo", "kl_0.16", "kl_4"]
    ways = at_kl(seeds)
    rows = [
        ["1. PPO-ptx preferred to GPT, to GPT prompted, to SFT", "85 ± 3, 71 ± 4, 73 ± 2 %",
         wins(seeds, "ppo_ptx", "gpt", "gpt+fewshot", "sft") + " %"],
        ["PPO-ptx preferred to a GPT ten times its size, to that prompted", "1.3B to 175B: yes",
         wins(seeds, "ppo_ptx", "gpt_10x", "gpt_10x+fewshot") + " %"],
        ["2. Tasks in context: GPT, SFT, PPO, PPO-ptx", "SQuAD v2 69.8, 65.9, 52.0, 69.9 (F1)",
         across(seeds, "in-context", four, 100) + " %"],
        ["The same at ptx_coef 0, 0.02, 0.1, 0.5, 2", "no tax from 20 on (Figure 33)",
         across(seeds, "in-context", ptx, 100) + " %"],
        ["Learned score at these", "falls somewhat (Figure 33)", across(seeds, "RM score", ptx)],
        ["The same at kl_coef 0, 0.01, 0.04, 0.16, 4, without ptx", "no cure (Figure 34)",
         across(seeds, "in-context", kl, 100) + " %"],
        ["Learned score at these", "falls far (Figure 34)", across(seeds, "RM score", kl)],
        ["3. Gold gained by PPO that nothing holds, at its best and in the end, with 384, 1,536, "
         "6,144 comparisons", "up, then down, later with more (Gao et al.)", peaks(seeds)],
        ["4. Accuracy on labelers trained on, on others, five-fold", "72.4 ± 0.4, 69.6 ± 0.9 %",
         ", ".join(judges(seeds, f"{who}, %", FOLDS) for who in ("accuracy", "other labelers"))
         + " %"],
        ["Labelers agree, the held-out ones included", "72.6 ± 1.5, 77.3 ± 1.3 %",
         ", ".join(map(brief, agreements(seeds))) + " %"],
        ["One epoch with a prompt's pairs together, with shuffled pairs: accuracy",
         "shuffled overfits (footnote 5)",
         judges(seeds, "accuracy, %", ["rm_epoch"], ["rm_pairs"]) + " %"],
        ["Accuracy for each doubling of comparisons, of the size",
         "1.1, 1.8 points (Stiennon et al.)", ", ".join([
             per_doubling(seeds, "rm_384", "rm", 16), per_doubling(seeds, "rm", "rm_10x", 10)])],
        ["5. SFT's epoch of the lowest loss, of the highest learned score", "1, 16 of 16 (3.5)",
         lowest(seeds)],
        [f"6. Preferred to SFT, at the KL of PPO-ptx: {', '.join(ways)}",
         "DPO about 61, PPO 57 % over people (Rafailov et al.)",
         ", ".join(brief([100 * x["win rate"] for x in own]) for own in ways.values()) + " %"],
        ["REINFORCE, at a KL of its own", "", wins(seeds, "reinforce", "sft") + " %"],
        ["7. A second round preferred to the first", "no figure (3.1)",
         wins(seeds, "ppo_ptx2", "ppo_ptx") + " %"],
        ["8. PPO-ptx preferred to it without KL, ptx, clipping, EOS score, the reward model's "
         "weights in the value network",
         "worse without KL (Figure 36), with a fresh network (Stiennon et al.)",
         wins(seeds, "ppo_ptx", "no_kl", "ppo", "no_clip", "no_eos_score", "value_from_scratch")
         + " %"],
        ["9. Makes up what nobody knows: GPT, SFT, PPO-ptx", "21 % for 41 % (4.1: in closed tasks)",
         habit(seeds, "makes up what nobody knows", "gpt", "sft", "ppo_ptx") + " %"],
        ["Refuses what is harmful: the same", "",
         habit(seeds, "refuses what is harmful", "gpt", "sft", "ppo_ptx") + " %"],
        ["PPO-ptx is helpful to usual phrasings, to held-out ones", "thrown by a rephrasing",
         ", ".join(habit(seeds, f"helpful{which}", "ppo_ptx")
                   for which in ("", ", in held-out phrasings")) + " %"],
    ]
    return markdown(["claim", "found by others", "here"], rows)


def write(outs: list[Path]) -> str:
    """study.md beside the folders of the seeds, and the figure where matplotlib is; the table."""
    out = outs[0].parent
    seeds = [read_seed(folder) for folder in outs if (folder / "evaluate.json").exists()]
    table = claims(seeds)
    parts = [table, *(f"## {title}\n\n{elsewhere}\n\n{section(seeds)}"
                      for title, (section, elsewhere) in SECTIONS.items())]
    with replacing(out / "study.md") as file:
        file.write("\n".join(parts).encode())
    with suppress(ImportError):
        draw(seeds, out / "study.png")
    return table


def draw(seeds: list[Seed], path: Path) -> None:
    """Gold (solid) and learned score (dashed) along sqrt(KL): a line a seed."""
    import matplotlib
    matplotlib.use("Agg")
    from matplotlib import pyplot
    figure, axes = pyplot.subplots(1, 2, figsize=(10, 3.6), layout="constrained", sharey=True)
    colours = dict(zip(SIZES, ("tab:red", "tab:orange", "tab:blue")))
    for (form, size), courses in optimised(seeds).items():
        axis = axes[int(form == "best of n")]
        for number, found in enumerate(courses):
            label = f"{size:,} comparisons" if number == 0 else None
            for key, style in (("gold", "-"), ("learned", "--")):
                axis.plot(np.sqrt(found["KL"]), found[key], style, color=colours[size], alpha=0.8,
                          label=label if key == "gold" else None)
        axis.set(title=f"{form}: gold (solid), learned (dashed)", xlabel="square root of the KL")
        axis.spines[["top", "right"]].set_visible(False)
        axis.legend(frameon=False)
    axes[0].set_ylabel("gain over the start")
    figure.savefig(path, dpi=110)
    pyplot.close(figure)

"""Tables over several runs of `rlhf.py evaluate`, in Markdown, with what they are of.

    python assets/tables.py out out/seed2 out/seed3 --name evaluate
    python assets/tables.py out --name greedy --show 3      # the first answers of each model

Spread over seeds is the sample standard deviation. Intervals are 95 % t-intervals over seeds; with
one seed they are normal intervals over its prompts.
"""

import argparse
import json
import sys
from pathlib import Path

import numpy as np

sys.path.insert(0, str(Path(__file__).parent.parent))  # to find rlhf.py
from data.files import read_jsonl  # noqa: E402
from rlhf import win_rate  # noqa: E402

T = [12.706, 4.303, 3.182, 2.776, 2.571, 2.447, 2.365, 2.306, 2.262]  # 97.5 % points, from 1 df


def spread(values: list[float]) -> str:
    if len(values) == 1:
        return f"{values[0]:.3f}"
    return f"{np.mean(values):.3f} ± {np.std(values, ddof=1):.3f}"


def share(values: list[float], margins: list[float]) -> str:
    """A share in per cent with its 95 % interval, and that of each seed."""
    margin = margins[0]
    if len(values) > 1:
        margin = T[len(values) - 2] * np.std(values, ddof=1) / len(values) ** 0.5
    each = ", ".join(f"{100 * value:.1f}" for value in values)
    return f"{100 * np.mean(values):.1f} ± {100 * margin:.1f} % ({each})"


def print_tables(runs: list[dict]) -> None:
    tables = [run["table"] for run in runs]
    columns = [key for key in next(iter(tables[0].values())) if key != "±"]
    print(f"n = {len(runs)} seeds, {runs[0]['prompts']}, {runs[0]['samples']} samples a prompt\n")
    print("| model | " + " | ".join(columns) + " |\n|---" + "|---" * len(columns) + "|")
    for model in tables[0]:
        cells = [spread([table[model][key] for table in tables]) for key in columns]
        print(f"| {model} | " + " | ".join(cells) + " |")
    *others, last = tables[0]
    print(f"\n| {last} is preferred by gold to | |\n|---|---|")
    for model in others:
        rates = []
        margins = []
        for run in runs:
            own, other = np.array(run["gold"][last]), np.array(run["gold"][model])
            rate, margin = win_rate(own, other)
            rates.append(rate)
            margins.append(margin)
        print(f"| {model} | {share(rates, margins)} |")


def print_answers(out: Path, run: dict, count: int) -> None:
    """The answers of each model to the first prompts of the file, and what gold says."""
    rows = read_jsonl(out / "data" / run["prompts"])
    for i, row in enumerate(rows[:count]):
        print(f"\n{row['prompt'].strip()}\n")
        for model, responses in run["responses"].items():
            print(f"* {model} ({run['gold'][model][0][i]:.2f}):{responses[i]}")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("outs", nargs="*", default=["out"], help="folders of runs, one a seed")
    parser.add_argument("--name", default="evaluate", help="name of the evaluation")
    parser.add_argument("--show", type=int, default=0, help="print this many answers of each model")
    flags = parser.parse_args()
    runs = []
    for out in flags.outs:
        runs.append(json.loads((Path(out) / f"{flags.name}.json").read_text(encoding="utf-8")))
    if flags.show:
        print_answers(Path(flags.outs[0]), runs[0], flags.show)
    else:
        print_tables(runs)


if __name__ == "__main__":
    main()

"""The table of `rlhf.py evaluate` over several runs: mean and standard deviation, in Markdown.

    python assets/seeds.py out out/seed2 out/seed3

Below it, how often the last model is preferred to each of the others by gold score.
"""

import json
import sys
from pathlib import Path

import numpy as np

sys.path.insert(0, str(Path(__file__).parent.parent))  # `python assets/seeds.py` is to find rlhf.py
from rlhf import win_rate  # noqa: E402


def main() -> None:
    files = [Path(out) / "evaluate.json" for out in sys.argv[1:] or ["out"]]
    runs = [json.loads(file.read_text(encoding="utf-8")) for file in files]
    tables = [run["table"] for run in runs]
    columns = [key for key in next(iter(tables[0].values())) if key != "±"]
    print("| model | " + " | ".join(columns) + " |\n|---" + "|---" * len(columns) + "|")
    for model in tables[0]:
        cells = [spread([table[model][key] for table in tables]) for key in columns]
        print(f"| {model} | " + " | ".join(cells) + " |")
    last = list(tables[0])[-1]
    for model in list(tables[0])[:-1]:
        pairs = [[np.array(run["gold"][name]) for name in (last, model)] for run in runs]
        rates = [win_rate(*pair)[0] for pair in pairs]
        each = ", ".join(f"{rate:.1%}" for rate in rates)
        print(f"\n{last} is preferred to {model} on {np.mean(rates):.1%} of prompts ({each})")


def spread(values: list[float]) -> str:
    return f"{np.mean(values):.2f} ± {np.std(values):.2f}"


if __name__ == "__main__":
    main()

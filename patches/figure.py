"""Draw gold along KL for PPO-ptx, DPO and what may replace them, from what run.py measured.

    python patches/figure.py out/patches    -> patches/variants.png

A small dot is the model of one seed, on held-out prompts; a large one is the mean over seeds. Needs
matplotlib.
"""

import json
import math
import sys
from collections import defaultdict
from pathlib import Path

import matplotlib.pyplot as plt
import numpy as np
from run import PATCHES, header

COMPARED = ("reinforce", "rloo", "grpo", "online-dpo", "best-of-n")
BESIDE = {"PPO-ptx": (-24, 10), "best-of-n": (-68, 4)}  # where (6, 4) would hide another label
UNPATCHED = {"ppo": "PPO-ptx", "dpo": "DPO", "evaluate": "start of all"}  # stage -> its model

def read(path: Path) -> dict[str, dict]:
    """{label: {seed: (KL, gold)}} of the variants compared, and of what they replace."""
    places = defaultdict(dict)
    for line in path.read_text(encoding="utf-8").splitlines():
        found = json.loads(line)
        name = found["patch"]
        if name in COMPARED:
            before = found["before"]
            after = found["after"]
            if name == "best-of-n":
                after["KL"] = math.log(4) - 3 / 4  # at most: log n - (n - 1) / n, with n = 4
            unpatched = UNPATCHED[header(PATCHES[name])["Stages"]]
            places[unpatched][found["seed"]] = (before["KL"], before["gold"])
            places[name][found["seed"]] = (after["KL"], after["gold"])
    return places

def main() -> None:
    folder = Path("out/patches")
    if len(sys.argv) > 1:
        folder = Path(sys.argv[1])
    _, axis = plt.subplots(figsize=(8, 5), layout="constrained")
    for label, of_seeds in read(folder / "measured.jsonl").items():
        colour = "tab:blue" if label in COMPARED else "tab:orange"
        kl, gold = np.array(list(of_seeds.values())).T
        axis.scatter(kl, gold, s=8, color=colour, alpha=0.6)
        middle = (kl.mean(), gold.mean())
        axis.scatter(kl.mean(), gold.mean(), s=50, color=colour)
        axis.annotate(label, middle, BESIDE.get(label, (6, 4)), textcoords="offset points")
    axis.set(xlabel="KL from the start, nats a response", ylabel="gold score")
    axis.spines[["top", "right"]].set_visible(False)
    plt.savefig(Path(__file__).parent / "variants.png", dpi=100)

if __name__ == "__main__":
    main()

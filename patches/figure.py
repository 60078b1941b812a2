"""Draw what PPO-ptx and its variants reach, as gold score along KL, from what run.py measured.

    python patches/figure.py out/patches    -> patches/variants.png

Each dot is the model that a run saved, on held-out prompts. Bars are 95 % intervals over prompts
(normal approximation): other seeds may differ by more. Needs matplotlib.
"""

import json
import sys
from pathlib import Path

import matplotlib.pyplot as plt
import numpy as np

def point(axis, path: Path, model: str, label: str, colour: str) -> None:
    """A model of an evaluation: its gold along its KL."""
    found = json.loads(path.read_text(encoding="utf-8"))
    gold = np.mean(found["gold"][model], axis=0)  # over samples, for each prompt
    error = 1.96 * gold.std(ddof=1) / len(gold) ** 0.5
    kl = found["table"][model]["KL"]
    axis.errorbar(kl, gold.mean(), error, fmt="o", color=colour, elinewidth=0.5)
    place = (kl, gold.mean())
    axis.annotate(label, place, (4, 2), textcoords="offset points", fontsize=8)

def main() -> None:
    folder = Path("out/patches")
    if len(sys.argv) > 1:
        folder = Path(sys.argv[1])
    variants = Path(__file__).parent / "variants"
    _, axis = plt.subplots(figsize=(8, 5), layout="constrained")
    for path in sorted(folder.glob("*/evaluate.json")):
        name = path.parent.name.rsplit("-", 2)[0]  # NAME-SEED-HASH
        for model in json.loads(path.read_text(encoding="utf-8"))["gold"]:
            if name == "unpatched":
                point(axis, path, model, model, "tab:orange")
            elif (variants / f"{name}.patch").exists():
                point(axis, path, model, name, "tab:blue")
    axis.set(xlabel="KL from the start, nats a response", ylabel="gold score")
    axis.spines[["top", "right"]].set_visible(False)
    plt.savefig(Path(__file__).parent / "variants.png", dpi=100)

if __name__ == "__main__":
    main()

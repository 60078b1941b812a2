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

def main() -> None:
    folder = Path(sys.argv[1] if len(sys.argv) > 1 else "out/patches")
    variants = {path.stem for path in Path(__file__).parent.glob("variants/*.patch")}
    _, axis = plt.subplots(figsize=(8, 5), layout="constrained")
    for name in sorted(variants | {"unpatched"}):
        for path in sorted(folder.glob(f"{name}-*/evaluate.json")):
            found = json.loads(path.read_text(encoding="utf-8"))
            for model, gold in found["gold"].items():
                prompts = np.mean(gold, axis=0)  # over samples
                error = 1.96 * prompts.std(ddof=1) / len(prompts) ** 0.5
                x, y = found["table"][model]["KL"], prompts.mean()
                colour = "tab:orange" if name == "unpatched" else "tab:blue"
                axis.errorbar(x, y, error, fmt="o", color=colour, elinewidth=0.5)
                label = model if name == "unpatched" else name
                axis.annotate(label, (x, y), (4, 2), textcoords="offset points", fontsize=8)
    axis.set(xlabel="KL from the start, nats a response", ylabel="gold score")
    axis.spines[["top", "right"]].set_visible(False)
    plt.savefig(Path(__file__).parent / "variants.png", dpi=100)

if __name__ == "__main__":
    main()

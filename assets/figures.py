"""Draw the README's figure from the logs of finished runs.

    python assets/figures.py out out/seed2 out/seed3

A line is the mean over the runs, the band around it their range, both of the running mean over five
iterations. Logs are of the raw weights, not of the average that is saved. Needs matplotlib, as
nothing else does.
"""

import json
import sys
from pathlib import Path

import matplotlib.pyplot as plt
import numpy as np

RUNS = {"ppo": ("PPO (ptx_coef 0)", "tab:orange"), "ppo_ptx": ("PPO-ptx", "tab:blue")}

def read(path: Path) -> list[dict]:
    return [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()]

def smooth(values: np.ndarray, width: int) -> np.ndarray:
    """The running mean over `width` iterations, of those there are at the ends."""
    kernel = np.ones(width)
    count = np.convolve(np.ones(values.shape[1]), kernel, "same")
    return np.array([np.convolve(row, kernel, "same") / count for row in values])

def panel(axis, outs: list[Path], key: str, title: str, width: int = 5) -> None:
    for run, (label, colour) in RUNS.items():
        logs = [read(out / run / "metrics.jsonl") for out in outs]
        steps = [row["step"] for row in logs[0] if key in row]
        values = smooth(np.array([[row[key] for row in log if key in row] for log in logs]), width)
        axis.plot(steps, values.mean(0), color=colour, label=label)
        axis.fill_between(steps, values.min(0), values.max(0), color=colour, alpha=0.2, linewidth=0)
    axis.set(title=title, xlabel="iteration")
    axis.spines[["top", "right"]].set_visible(False)

def main() -> None:
    outs = [Path(name) for name in sys.argv[1:] or ["out"]]
    figure, axes = plt.subplots(2, 2, figsize=(8, 5.6), layout="constrained")
    panel(axes[0, 0], outs, "objective/scores", "reward model's score (the proxy)")
    panel(axes[0, 1], outs, "objective/gold", "gold score (shown, not optimised)")
    panel(axes[1, 0], outs, "objective/kl", "KL from the reference, nats a response")
    panel(axes[1, 1], outs, "heldout/loss", "loss on held-out pretraining text", width=1)
    axes[0, 0].legend(frameon=False)
    figure.savefig(Path(__file__).parent / "training.png", dpi=100)

if __name__ == "__main__":
    main()

"""Draw the README's figure from the logs of finished runs: python assets/figures.py out/study/*

A line is the mean over the runs, the band around it their range. Logs are of the raw weights, not
of the average that is saved. Needs matplotlib, as nothing else does.
"""

import json
import sys
from pathlib import Path

import matplotlib.pyplot as plt
import numpy as np

RUNS = {"ppo": ("PPO (ptx_coef 0)", "tab:orange"), "ppo_ptx": ("PPO-ptx", "tab:blue")}
PANELS = [  # key, title, iterations of the running mean
    ("objective/scores", "reward model's score (the proxy)", 5),
    ("objective/gold", "gold score (shown, not optimised)", 5),
    ("objective/kl", "KL from the reference, nats a response", 5),
    ("heldout/loss", "loss on held-out pretraining text", 1),
]

figure, axes = plt.subplots(2, 2, figsize=(8, 5.6), layout="constrained")
for axis, (key, title, width) in zip(axes.flat, PANELS):
    for run, (label, colour) in RUNS.items():
        curves = []
        for out in sys.argv[1:]:
            log = Path(out, run, "metrics.jsonl").read_text(encoding="utf-8").splitlines()
            rows = [json.loads(line) for line in log]
            steps = [row["step"] for row in rows if key in row]
            values = [row[key] for row in rows if key in row]
            curves.append(np.convolve(values, np.ones(width) / width, "valid"))
        steps = steps[width - 1 :]
        axis.plot(steps, np.mean(curves, 0), color=colour, label=label)
        low = np.min(curves, 0)
        high = np.max(curves, 0)
        axis.fill_between(steps, low, high, color=colour, alpha=0.2, linewidth=0)
    axis.set(title=title, xlabel="iteration")
    axis.spines[["top", "right"]].set_visible(False)
axes[0, 0].legend(frameon=False)
figure.savefig(Path(__file__).parent / "training.png", dpi=100)

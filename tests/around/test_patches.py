"""Each patch has its row in the README; the stages of the one that CI has applied run."""

import json
import math
import os
import shutil
from pathlib import Path

import pytest
import rlhf
import torch
from check import changed_lines
from conftest import ROOT
from run import PATCHES, header

README = (ROOT / "patches/README.md").read_text(encoding="utf-8")
FLAGS = {
    "ppo": "--iterations 2 --rollout_size 8 --minibatch_size 4 --window 12",
    "sft": "--epochs 1 --window 12", "evaluate": "--models gpt,sft"}

@pytest.mark.parametrize("name", PATCHES)
def test_every_patch_has_its_row_in_the_readme(name):
    patch = PATCHES[name]
    title = patch.read_text().splitlines()[0].rstrip(".")
    link = f"[{name}]({patch.parent.name}/{patch.name})"
    assert README.count(f"\n| {link} | {title} | {changed_lines(patch)} |") == 1

def test_the_stages_of_the_applied_patch_run(project):
    """Plain PPO, where none is applied. Whatever is logged or saved is finite."""
    stages = ["ppo"]
    if os.environ.get("PATCH"):
        fields = header(Path(os.environ["PATCH"]))
        stages = fields["Stages"].split(", ")
        stages[-1] += " " + fields.get("Flags", "")
    shutil.copy(project / "out/sft.pt", project / "out/sft0.pt")
    places = ["--data", f"{project}/data", "--out", f"{project}/out", "--max_new_tokens", "5",
              "--gold", f"{project}/data/gold.py", "--device", "cpu"]
    for stage in stages:
        name, *flags = stage.split()
        rlhf.main([name, *places, *FLAGS.get(name, "").split(), *flags])
    for log in project.glob("out/*/metrics.jsonl"):
        for line in log.read_text().splitlines():
            assert all(map(math.isfinite, json.loads(line).values()))
    for path in project.glob("out/*.pt"):
        weights = torch.load(path, weights_only=True)["model"]
        assert all(weight.isfinite().all() for weight in weights.values())

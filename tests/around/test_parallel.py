"""Two processes of torchrun do what one does. `work` below runs here, and under torchrun as this
file's own program; both leave their results. The learning rate is 0, so that rounding in one step
does not decide what the next one sees."""

import os
import shutil
import subprocess
import sys
from argparse import Namespace
from pathlib import Path

import parallel
import pytest
import rlhf
import torch
from conftest import ROOT, gpt, read_log, settings, stage_settings

STILL = dict(learning_rate=0.0, batch_size=5)
# Names are new: no stage reads what another has just written, perhaps for one process too late.
SMALL = {  # batches that two processes cannot share equally, and a last one of a single row
    "pretrain": dict(name="base", preset="test", steps=2, microbatch_size=2, **STILL),
    "sft": dict(name="tuned", epochs=1, dropout=0.0, pretrain_fraction=0.1, reward_model="rm",
                microbatch_size=2, **STILL),
    "rm": dict(name="judge", epochs=1, microbatch_size=18, **STILL),
    "dpo": dict(epochs=1, microbatch_size=9, **STILL),
    "ppo": dict(iterations=2, rollout_size=7, minibatch_size=3, microbatch_size=2, epochs=2,
                learning_rate=0.0, value_learning_rate=0.0, kl_coef=0.5, ptx_coef=2.0, max_kl=9.0),
}

def made_up(policy, prompts, eos, *_) -> list[tuple]:
    """In place of samples: ragged responses, some of which end and some do not."""
    sampled = []
    for prompt in prompts:
        ids = [97 + sum(prompt) % 5, *prompt[1:4], eos if len(prompt) % 3 else 98]
        sampled.append((ids, [0.0] * len(ids)))
    return sampled

def work(cfg) -> None:
    """Every stage; gradients and greedy responses go into a file."""
    project = Path(cfg.out).parent
    seen = {"gradients": [], "drawn": []}
    torch.manual_seed(0)
    prompts = [[3], [4, 5, 6], [2, 9], [8, 1], [5, 5, 5, 5], [10, 4], [7]]
    longer = rlhf.Settings(max_new_tokens=9)
    seen["greedy"] = rlhf.complete(gpt(), prompts, 0, longer, temperature=0)
    sum_gradients = rlhf.sum_gradients

    def record_gradients(model):
        sum_gradients(model)
        seen["gradients"].append(torch.cat([p.grad.flatten() for p in model.parameters()]))
        seen["drawn"].append(torch.rand(1).item())

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(rlhf, "sum_gradients", record_gradients)
        patch.setattr(rlhf, "sample_responses", made_up)
        for stage, fields in SMALL.items():
            torch.manual_seed(1)
            rlhf.STAGES[stage](stage_settings(stage, project, **fields))
    torch.save(seen, f"{project}/seen{parallel.RANK}.pt")

def start(project: Path) -> None:
    rlhf.run_stage(work, settings(rlhf.Training, project))

@pytest.fixture(scope="module")
def results(template, tmp_path_factory) -> Namespace:
    one = tmp_path_factory.mktemp("one")
    two = tmp_path_factory.mktemp("two")
    for project in (one, two):
        shutil.copytree(template, project, dirs_exist_ok=True)
    start(one)
    command = ["-m", "torch.distributed.run", "--standalone", "--nproc_per_node=2", __file__, two]
    path = f"{ROOT}{os.pathsep}{ROOT / 'tests'}"
    env = os.environ | {"OMP_NUM_THREADS": "1", "PYTHONPATH": path}
    command = [sys.executable, *map(str, command)]
    done = subprocess.run(command, env=env, capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stderr
    seen = [torch.load(path) for path in (one / "seen0.pt", two / "seen0.pt", two / "seen1.pt")]
    return Namespace(one=one, two=two, seen=seen, printed=done.stdout)

def test_gradients_of_two_processes_are_those_of_one(results):
    """(1), (2), (5) with ptx, (6), (8): every step, to a millionth of the whole."""
    expected, first, second = (seen["gradients"] for seen in results.seen)
    assert len(expected) == len(first) == 2 + 3 + 2 + 2 + 2 * 2 * 3 * 2
    for one, own, other in zip(expected, first, second):
        assert torch.equal(own, other)
        assert (one - own).norm() <= 1e-6 * max(1e-3, one.norm())

@pytest.mark.parametrize("stage", SMALL)
def test_metrics_of_two_processes_are_those_of_one(results, stage):
    expected = read_log(stage_settings(stage, results.one, **SMALL[stage]))
    own = read_log(stage_settings(stage, results.two, **SMALL[stage]))
    assert len(own) == len(expected) > 1
    for line, known in zip(own, expected):
        assert line == pytest.approx(known, rel=1e-5, abs=1e-6)

def test_processes_share_the_prompts_and_draw_for_themselves(results):
    """The first has the random numbers of a single process."""
    expected, first, second = results.seen
    assert expected["greedy"] == first["greedy"] == second["greedy"]
    assert first["greedy"][0] != first["greedy"][1]
    assert first["drawn"] == expected["drawn"]
    assert first["drawn"][0] != first["drawn"][1]  # in the two steps of pretraining
    assert not torch.equal(first["gradients"][0], first["gradients"][1])
    assert not set(first["drawn"]) & set(second["drawn"])

def test_only_the_first_process_writes_and_prints(results, monkeypatch, tmp_path):
    files = {path.relative_to(results.one) for path in results.one.rglob("*")}
    own = {path.relative_to(results.two) for path in results.two.rglob("*")}
    assert {str(path) for path in own - files} == {"seen1.pt"}
    assert results.printed.count("valid/loss") == 2  # by sft and by dpo
    monkeypatch.setattr(rlhf, "RANK", 1)
    cfg = settings(rlhf.Evaluate, tmp_path)
    rlhf.run_stage(rlhf.evaluate, cfg)  # the others leave at once, without a mistake
    assert not list(tmp_path.iterdir())
    monkeypatch.setattr(rlhf, "RANK", 0)
    monkeypatch.setattr(parallel, "STARTED", True)
    monkeypatch.setattr(parallel.dist, "init_process_group", pytest.fail)  # would wait for them
    rlhf.run_stage(rlhf.evaluate, settings(rlhf.Evaluate, results.one, models="sft"))

if __name__ == "__main__":
    torch.set_num_threads(1)
    start(Path(sys.argv[1]))

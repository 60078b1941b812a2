"""A run stopped anywhere goes on to the bits of one that never was; what goes wrong leaves the last
good state. Killed processes, fifty of them, are in `-m slow`."""

import errno
import gc
import itertools
import json
import math
import os
import random
import re
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path
from types import SimpleNamespace

import checkpoint
import numpy as np
import pytest
import cli
import rlhf
import torch
from conftest import ROOT
from data.formats import UserError, lock
from test_pipeline import PRESET, chain  # noqa: F401  a fixture

SMALL = {  # of every stage of training a run of six steps or so
    "pretrain": (rlhf.Pretrain, dict(preset="test", steps=6, batch_size=4)),
    "sft": (rlhf.SFT, dict(epochs=4, batch_size=4, reward_model="rm", max_new_tokens=8)),
    "rm": (rlhf.RM, dict(batch_size=4)),
    "ppo": (rlhf.PPO, dict(iterations=5, rollout_size=4, minibatch_size=2, epochs=2,
                           max_new_tokens=8)),
    "dpo": (rlhf.DPO, dict(batch_size=4)),
}


class Killed(BaseException):
    """In place of SIGKILL: nobody catches it."""


@pytest.fixture
def start(chain, tmp_path, tiny_data):  # noqa: F811
    """start(stage, name, **flags): the stage as from the command line, where all it needs is."""
    for path in chain[0].glob("*.pt"):
        shutil.copy(path, tmp_path)
    rlhf.PRESETS["test"] = PRESET

    def run(stage, name="run", **flags):
        kind, small = SMALL[stage]
        own = {"data": str(tiny_data), "out": str(tmp_path), "name": name, "save_minutes": 0.05}
        flags = {"device": "cpu", "dtype": "float32", **own, **small, **flags}
        cli.run(getattr(rlhf, stage), kind, flags)

    return run


def result(folder: Path, name="run") -> tuple[list[dict], dict]:
    """What a run leaves: metrics without the time it took, and weights."""
    lines = [json.loads(line) for line in open(folder / name / "metrics.jsonl", encoding="utf-8")]
    for line in lines:
        line.pop("seconds")
    return lines, torch.load(folder / f"{name}.pt", weights_only=True)["model"]


def fresh(path: Path, since: float) -> bool:
    return path.exists() and path.stat().st_mtime > since


def assert_same(one, two):
    assert one[0] == two[0], "metrics"
    assert one[1].keys() == two[1].keys()
    assert all(torch.equal(x, two[1][name]) for name, x in one[1].items()), "weights"


@pytest.fixture
def events(monkeypatch):
    """Counts what a run does to its weights and files; raises Killed at the one in `events.at`."""
    events = SimpleNamespace(count=0, at=-1)
    clock = itertools.count()  # a second passes at each look: a state every third step or so
    monkeypatch.setattr(checkpoint, "time", SimpleNamespace(time=lambda: next(clock)))

    def tick():
        events.count += 1
        if events.count == events.at:
            raise Killed

    def counted(function):
        def wrapper(*arguments, **more):
            tick()
            outcome = function(*arguments, **more)
            tick()
            return outcome

        return wrapper

    places = (rlhf, "update"), (checkpoint, "write_tensors"), (checkpoint.Log, "line")
    for module, name in places:
        monkeypatch.setattr(module, name, counted(getattr(module, name)))
    return events


def kill(start, events, at, *arguments, **flags):
    """Start, be killed at that event, and let go of what a dead process lets go of: the lock."""
    events.count, events.at = 0, at
    with pytest.raises(Killed):
        start(*arguments, **flags)
    gc.collect()
    events.at = -1


@pytest.mark.parametrize("stage", SMALL)
def test_stopped_anywhere_it_goes_on_to_the_same_bits(start, events, tmp_path, stage):
    """Killed, once or thrice, between any two of: an update, a line of the log, a file written."""
    start(stage, "whole")
    whole, rng = events.count, random.Random(stage)
    series = [[rng.randint(1, whole // 4) for _ in range(3)] for _ in range(2)]
    series += [[rng.randint(whole // 3, whole - 5)] for _ in range(3)]
    for points in [*series, *[[whole - i] for i in range(1, 5)]]:
        for number, at in enumerate(points):
            kill(start, events, at, stage, resume=number > 0)
        start(stage, resume=True)
        assert_same(result(tmp_path), result(tmp_path, "whole"))
        shutil.rmtree(tmp_path / "run")


def test_a_finished_run_is_left_alone(start, tmp_path, capsys):
    start("rm")
    before = [(path, path.stat().st_mtime_ns) for path in tmp_path.rglob("*")]
    with pytest.raises(SystemExit) as end:
        start("rm", resume=True)
    assert not end.value.code and capsys.readouterr().out.endswith("run: finished already\n")
    assert before == [(path, path.stat().st_mtime_ns) for path in tmp_path.rglob("*")]


@pytest.mark.parametrize("stage", SMALL)
def test_what_is_kept_changes_no_bit(start, tmp_path, stage):
    """A state after every step, or none at all."""
    start(stage, "often", save_minutes=0)
    start(stage, "never", save_minutes=1e6)
    assert_same(result(tmp_path, "often"), result(tmp_path, "never"))


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_a_signal_stops_after_the_step_and_loses_nothing(start, tmp_path, monkeypatch, number):
    start("pretrain", "whole")
    update, seen = rlhf.update, []
    handlers = signal.getsignal(signal.SIGINT), signal.getsignal(signal.SIGTERM)

    def interrupted(*arguments):
        seen.append(1)
        if len(seen) == 3:
            os.kill(os.getpid(), number)
        return update(*arguments)

    monkeypatch.setattr(rlhf, "update", interrupted)
    with pytest.raises(SystemExit, match="pretrain: stopped after step 3, --resume goes on"):
        start("pretrain", save_minutes=1e6)
    assert handlers == (signal.getsignal(signal.SIGINT), signal.getsignal(signal.SIGTERM))
    start("pretrain", resume=True)
    assert len(seen) == 6, "none was done twice"
    assert_same(result(tmp_path), result(tmp_path, "whole"))


def test_asked_twice_it_stops_at_once(start, monkeypatch):
    def impatient(*_):
        os.kill(os.getpid(), signal.SIGINT)
        os.kill(os.getpid(), signal.SIGINT)
        raise AssertionError("went on")

    monkeypatch.setattr(rlhf, "update", impatient)
    with pytest.raises(SystemExit, match="pretrain: stopped"):
        start("pretrain")


def test_ctrl_c_while_the_model_is_saved_is_a_stop(start, tmp_path, monkeypatch):
    """After the last step the signal comes in the midst of a file; torch makes an error of it."""
    start("rm", "whole")
    with monkeypatch.context() as patch:
        def interrupted(*_):
            try:
                raise KeyboardInterrupt
            except KeyboardInterrupt:
                raise RuntimeError("unexpected pos 64 vs 0")

        patch.setattr(checkpoint.Log, "finish", lambda log, model: rlhf.save(log.cfg, model))
        patch.setattr(torch, "save", lambda *a: interrupted() if "model" in a[0] else None)
        with pytest.raises(SystemExit, match="rm: stopped"):
            start("rm")
    assert not (tmp_path / "run.pt").exists() and not [*tmp_path.glob("*.partial")]


def test_without_resume_a_run_begins_anew(start, tmp_path, events):
    start("rm", "whole")
    kill(start, events, events.count // 2, "rm")
    start("rm")
    assert_same(result(tmp_path), result(tmp_path, "whole"))


def test_resuming_with_other_settings_is_refused(start, tmp_path, events):
    """Which ones is said; where the folder lies and how often is saved may differ."""
    kill(start, events, 9, "pretrain")
    before = (tmp_path / "run/state.pt").read_bytes()
    with pytest.raises(SystemExit, match=r"other settings: --learning_rate 0.002, --seed 1$"):
        start("pretrain", resume=True, learning_rate=1e-3, seed=2)
    with pytest.raises(SystemExit, match="other settings: .*--preset test"):
        start("sft", resume=True, init="gpt")
    assert (tmp_path / "run/state.pt").read_bytes() == before
    start("pretrain", resume=True, save_minutes=7)


def test_a_garbled_state_is_refused(start, tmp_path, events):
    kill(start, events, 30, "pretrain")
    path = tmp_path / "run/state.pt"
    whole = path.read_bytes()
    path.write_bytes(whole[: len(whole) // 2] + b"?" + whole[len(whole) // 2 + 1 :])
    with pytest.raises(SystemExit, match="run/state.pt is not a whole checkpoint"):
        start("pretrain", resume=True)


def test_two_runs_in_one_folder(start, tmp_path):
    """The second is refused, whatever it is, and harms nothing; a crash leaves no lock behind."""
    start("pretrain", save_minutes=0)
    files = {path: path.read_bytes() for path in (tmp_path / "run").iterdir()}
    held = open(tmp_path / "run/metrics.jsonl")
    assert lock(held)
    for flags in ({}, {"resume": True}):
        with pytest.raises(SystemExit, match="another run is at work in .*run$"):
            start("pretrain", **flags)
    assert files == {path: path.read_bytes() for path in (tmp_path / "run").iterdir()}
    held.close()
    start("pretrain")


# ---- numbers that go wrong -----------------------------------------------------------------------

def poisoned(monkeypatch, name: str, at: int, change) -> None:
    """The `at`-th outcome of rlhf's function `name`, changed."""
    function, calls = getattr(rlhf, name), itertools.count(1)

    def wrapper(*arguments, **more):
        outcome = function(*arguments, **more)
        return change(outcome) if next(calls) == at else outcome

    monkeypatch.setattr(rlhf, name, wrapper)


def with_nan(x: torch.Tensor) -> torch.Tensor:
    """NaN in the second row."""
    return torch.where(torch.arange(len(x)).view(-1, *[1] * (x.dim() - 1)) == 1, math.nan, x)


@pytest.mark.parametrize("stage, function, at, sentence", [
    ("pretrain", "token_logprobs", 4, r"step 4: not finite: log-probabilities of rows \d;"),
    ("sft", "token_logprobs", 1, r"step 1: not finite: log-probabilities of rows \d;"),
    ("rm", "sequence_scores", 3, r"step \d: not finite: scores of rows \d;"),
    ("ppo", "sequence_scores", 4, "step 2: not finite: score, values or log-prob.* of rows 3;"),
    ("ppo", "token_logprobs", 5, r"step 1: not finite: log-probabilities of rows \d;"),
    ("dpo", "token_logprobs", 1, r"step 1: not finite: scores of rows \d;"),
])
def test_nan_stops_before_the_step(
    start, tmp_path, monkeypatch, stage, function, at, sentence
):
    """Tensor, step and rows are named; what was kept is the state before, from which it goes on."""
    start(stage, "whole")
    with monkeypatch.context() as patch:
        poisoned(patch, function, at, with_nan)
        with pytest.raises(SystemExit, match=f"{stage}: {sentence} the step is not taken"):
            start(stage, save_minutes=0)
    start(stage, resume=True)
    assert_same(result(tmp_path), result(tmp_path, "whole"))


def test_rows_are_named_by_their_place_in_the_batch(policy, cfg, monkeypatch):
    """The second of the second microbatch."""
    poisoned(monkeypatch, "token_logprobs", 2, with_nan)
    rows = [([1, 2, 3, 4, 5], 1), ([1, 2], 1), ([1, 2, 3, 4], 1), ([1, 2, 3], 1)]
    cfg.microbatch_size = 2
    with pytest.raises(UserError, match="log-probabilities of rows 3; the step is not taken"):
        rlhf.lm_pass(policy, rows, cfg)


def test_a_gradient_that_is_not_finite_is_named(start, monkeypatch):
    poisoned(monkeypatch, "load", 1, overflowing)
    with pytest.raises(SystemExit, match="step 1: not finite: the gradient of h.0.mlp.c_fc.weight"):
        start("sft", reward_model="")


def overflowing(model):
    model.h[0].mlp.c_fc.weight.register_hook(lambda grad: grad * math.inf)
    return model


def test_updates_end_where_the_policy_has_gone_too_far(start, tmp_path, capsys):
    """Two epochs of two minibatches; at a rate of 1 the policy is soon far away."""
    start("ppo", "far", learning_rate=1.0, max_kl=0.5, iterations=1)
    said = capsys.readouterr().out
    assert re.search("[1-3] of 4 updates: KL from the rollout's policy .* --max_kl 0.5", said)
    start("ppo", "near", iterations=1)
    assert "updates" not in capsys.readouterr().out
    assert result(tmp_path, "far")[0][0]["policy/approxkl"] <= 0.5


def test_no_gradient_is_left_where_updates_end(models, episodes, text, cfg):
    batch, _ = episodes
    cfg.minibatch_size, cfg.max_kl, cfg.learning_rate = 2, 1e-9, 0.1
    optimizers = rlhf.adam(models.policy), rlhf.adam(models.value)
    rlhf.ppo_update(models, optimizers, batch, text, 1.0, np.random.default_rng(0), cfg)
    assert not any(p.grad is not None for model in models[:4] for p in model.parameters())


def test_scores_far_outside_are_reported(start, tmp_path, capsys):
    """The range is that of the reward model's training; twice as far from its middle is too far."""
    start("rm", "judge")
    model = torch.load(tmp_path / "judge.pt", weights_only=True)
    low, high = model["model"]["score_range"]
    assert low < 0 < high, "demonstrations score 0 on average"
    for name, width, share in (("usual", 100, 0), ("hacked", 1e-4, 1)):
        model["model"]["score_range"] = torch.tensor([-width, width])
        torch.save(model, tmp_path / "judge.pt")
        start("ppo", name, reward_model="judge", iterations=1)
        said = "iteration 1: scores far outside -0.00 to 0.00 seen in training"
        assert (said in capsys.readouterr().out) == share
        assert result(tmp_path, name)[0][0]["objective/scores_far_out"] == share


@pytest.mark.parametrize("error", [
    MemoryError(), torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 20.00 MiB."),
    RuntimeError("[enforce fail at alloc_cpu.cpp:117] DefaultCPUAllocator: can't allocate memory"),
])
def test_out_of_memory_says_which_flag_to_lower(start, monkeypatch, error):
    def fails(*_):
        raise error

    monkeypatch.setattr(rlhf, "update", fails)
    with pytest.raises(SystemExit, match="rm: out of memory: lower --microbatch_size, now 72"):
        start("rm")


def test_other_mistakes_are_not_taken_for_it(start, monkeypatch):
    def fails(*_):
        raise RuntimeError("shapes do not fit")

    monkeypatch.setattr(rlhf, "update", fails)
    with pytest.raises(RuntimeError, match="shapes do not fit"):
        start("rm")


@pytest.mark.parametrize("stage", SMALL)
def test_a_full_disk_leaves_the_last_state(start, tmp_path, monkeypatch, stage):
    """At the fourth file that is written: a sentence, and what was there goes on."""
    start(stage, "whole")
    with monkeypatch.context() as patch:
        calls, fsync = itertools.count(1), os.fsync

        def full(number):
            if next(calls) > 4:
                raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
            fsync(number)

        patch.setattr(os, "fsync", full)
        with pytest.raises(SystemExit, match=f"{stage}: .*cannot be written: No space left"):
            start(stage, save_minutes=0)
    start(stage, resume=True)
    assert_same(result(tmp_path), result(tmp_path, "whole"))


def test_a_log_that_cannot_be_written_is_one_sentence(start, tmp_path):
    (tmp_path / "run").mkdir()
    (tmp_path / "run/metrics.jsonl").symlink_to("/dev/full")
    with pytest.raises(SystemExit, match="rm: .*: (No space left on device|Invalid argument)$"):
        start("rm")


def test_a_folder_that_cannot_be_made_is_one_sentence(start, tmp_path):
    (tmp_path / "run").write_text("a file where the folder should be")
    with pytest.raises(SystemExit, match="rm: .*run: File exists"):
        start("rm")


# ---- real processes ------------------------------------------------------------------------------

def command(stage: str, data: Path, out: Path, name: str, *more: str) -> list[str]:
    small = {"pretrain": "--steps 60 --batch_size 4", "sft": "--epochs 8 --reward_model rm",
             "rm": "--batch_size 2 --epochs 8",
             "ppo": "--iterations 30 --rollout_size 8 --minibatch_size 4",
             "dpo": "--batch_size 2 --epochs 8"}[stage]
    flags = f"--device cpu --dtype float32 --max_new_tokens 8 --save_minutes 0 {small}".split()
    return [sys.executable, str(ROOT / "rlhf.py"), stage, "--data", str(data), "--out", str(out),
            "--name", name, *flags, *more]


@pytest.mark.slow
@pytest.mark.parametrize("stage", SMALL)
def test_thirteen_kills(chain, tmp_path, tiny_data, stage):  # noqa: F811
    """SIGKILL, at random moments from the first step on, until it has come thirteen times."""
    for path in chain[0].glob("*.pt"):
        shutil.copy(path, tmp_path)
    env, rng, kills = {**os.environ, "OMP_NUM_THREADS": "1"}, random.Random(stage), 0
    whole = command(stage, tiny_data, tmp_path, "whole")
    assert subprocess.run(whole, env=env, capture_output=True).returncode == 0
    duration = json.loads(open(tmp_path / "whole/metrics.jsonl").readlines()[-1])["seconds"]
    resume: list[str] = []
    while kills < 13 or resume:
        process = subprocess.Popen(command(stage, tiny_data, tmp_path, "run", *resume), env=env,
                                   stdout=subprocess.DEVNULL, stderr=subprocess.PIPE, text=True)
        metrics, since = tmp_path / "run/metrics.jsonl", time.time()
        while kills < 13 and process.poll() is None and not fresh(metrics, since):
            time.sleep(0.01)
        time.sleep(rng.uniform(0, duration / 3) if kills < 13 else 0)
        if kills < 13 and process.poll() is None:
            process.kill()
            kills += 1
        said = process.communicate()[1]
        assert process.returncode in (0, -signal.SIGKILL), said
        resume = ["--resume"] if process.returncode else []
        if not resume:
            assert_same(result(tmp_path), result(tmp_path, "whole"))
    assert not [path for path in tmp_path.rglob("*.partial")]

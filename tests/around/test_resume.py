"""A stopped run goes on to the same bits, wherever that was, or is refused by name."""

import gc
import itertools
import multiprocessing
import os
import random
import shutil
import signal
from pathlib import Path
from types import SimpleNamespace

import pytest
import rlhf
import torch
from conftest import SMALL, read_log, stage_settings
from data.files import lock

FORKS = multiprocessing.get_context("forkserver")
FORKS.set_forkserver_preload(["pytest", "rlhf", "torch._dynamo"])

def config(project: Path, stage: str, name: str, **flags):
    fields = SMALL[stage] | {"name": name, "save_minutes": 0.05} | flags
    return stage_settings(stage, project, **fields)

@pytest.fixture
def start(project):
    """start(stage, name, **flags) runs it as the command line does."""
    def run(stage, name="run", **flags):
        rlhf.run_stage(rlhf.STAGES[stage], config(project, stage, name, **flags))

    return run

def metrics(project: Path, name: str) -> list[dict]:
    return read_log(SimpleNamespace(out=project / "out", name=name))

def assert_same(project: Path) -> None:
    assert metrics(project, "run") == metrics(project, "whole")
    assert (project / "out/run.pt").read_bytes() == (project / "out/whole.pt").read_bytes()

def work(cfg, stage: str, at: int, events) -> None:
    """A run that SIGKILL ends at number `at` of what it does to its weights and files."""
    torch.set_num_threads(1)
    clock = itertools.count()  # a second passes at every look: a save every other step or so
    rlhf.time = SimpleNamespace(time=lambda: next(clock))

    def tick():
        events.value += 1
        if events.value == at:
            os.kill(os.getpid(), signal.SIGKILL)

    def counted(function):
        def wrapper(*arguments, **more):
            tick()
            outcome = function(*arguments, **more)
            tick()
            return outcome

        return wrapper

    for where, name in ((rlhf, "update"), (rlhf, "save"), (rlhf.Run, "log"), (rlhf.Run, "save")):
        setattr(where, name, counted(getattr(where, name)))
    rlhf.run_stage(rlhf.STAGES[stage], cfg)

def run_apart(project: Path, stage: str, name: str = "run", at: int = 0, resume=False) -> int:
    """The number of events of a run in its own process, which is killed at number `at`."""
    events = FORKS.Value("i")
    cfg = config(project, stage, name, resume=resume)
    process = FORKS.Process(target=work, args=(cfg, stage, at, events))
    process.start()
    process.join()
    assert process.exitcode == (-signal.SIGKILL if at else 0)
    return events.value

@pytest.mark.parametrize("rounds", [1, pytest.param(4, marks=pytest.mark.slow)])
@pytest.mark.parametrize("stage", SMALL)
def test_killed_anywhere_it_goes_on_to_the_same_bits(project, stage, rounds):
    """Before or after an update, a line of the log, a file that is written; the last ones too."""
    whole = run_apart(project, stage, "whole")
    rng = random.Random(stage)
    thrice = [[rng.randint(1, whole // 3) for _ in range(3)] for _ in range(rounds)]
    for points in (*thrice, [whole - 3], [whole - 1]):
        (project / "out/run.pt").write_text("from an earlier run")
        for number, at in enumerate(points):
            run_apart(project, stage, at=at, resume=number > 0)
        run_apart(project, stage, resume=True)
        assert_same(project)
        shutil.rmtree(project / "out/run")

@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_a_signal_finishes_the_step_and_loses_nothing(start, project, monkeypatch, number):
    start("pretrain", "whole")
    update = rlhf.update
    handler = signal.getsignal(number)
    seen = []

    def interrupted(*arguments):
        seen.append(1)
        if len(seen) == 3:
            os.kill(os.getpid(), number)
        return update(*arguments)

    monkeypatch.setattr(rlhf, "update", interrupted)
    with pytest.raises(SystemExit, match="pretrain: stopped after step 3; --resume"):
        start("pretrain", save_minutes=1e6)
    assert signal.getsignal(number) is handler
    start("pretrain", resume=True)
    assert len(seen) == 6  # no step was done twice
    assert_same(project)

def test_a_second_signal_stops_at_once(start, monkeypatch):
    def impatient(*_):
        os.kill(os.getpid(), signal.SIGINT)
        os.kill(os.getpid(), signal.SIGINT)
        raise AssertionError("went on")

    monkeypatch.setattr(rlhf, "update", impatient)
    with pytest.raises(SystemExit, match="pretrain: stopped at once"):
        start("pretrain")

def stopped(start, monkeypatch, stage: str) -> None:
    """A run that stops after its second step, as by Ctrl-C, with an empty log."""
    with monkeypatch.context() as patch:
        patch.setattr(rlhf.Run, "log", lambda run, *_: setattr(run, "stop_asked", run.step == 1))
        with pytest.raises(SystemExit, match="stopped after step 2"):
            start(stage)
    gc.collect()

@pytest.mark.parametrize("stage, file", [
    ("pretrain", "data/pretrain.txt"), ("pretrain", "data/tokenizer.tiktoken"),
    ("sft", "data/sft.jsonl"), ("sft", "data/sft_valid.jsonl"), ("sft", "out/gpt.pt"),
    ("rm", "data/comparisons.jsonl"), ("rm", "data/sft.jsonl"), ("ppo", "data/prompts.jsonl"),
    ("ppo", "data/pretrain.txt"), ("ppo", "out/rm.pt"), ("dpo", "data/comparisons.jsonl")])
def test_a_changed_file_is_refused_by_name(start, project, monkeypatch, stage, file):
    """Whatever its date is. Changed back, the run goes on."""
    stopped(start, monkeypatch, stage)
    path = project / file
    content = path.read_bytes()
    if path.suffix == ".pt":
        torch.save(torch.load(path) | {"more": 1}, path)
    elif path.suffix == ".tiktoken":
        path.write_bytes(content + b"YWI= 256\n")  # a token more: "ab"
    else:
        path.write_bytes(content + b"\n")
    os.utime(path, (1e9, 1e9))
    with pytest.raises(SystemExit, match=f"{path.stem}.* changed since .*run"):
        start(stage, resume=True)
    path.write_bytes(content)
    start(stage, resume=True)

def test_changed_flags_are_refused_by_name(start, monkeypatch):
    stopped(start, monkeypatch, "pretrain")
    with pytest.raises(SystemExit, match="--seed, --learning_rate changed since .*run"):
        start("pretrain", resume=True, seed=2, learning_rate=1e-3)
    with pytest.raises(SystemExit, match="sft: .*--init.* changed since .*run"):
        start("sft", resume=True)

def test_what_may_differ(start, project, monkeypatch):
    start("dpo", "whole")
    stopped(start, monkeypatch, "dpo")
    moved = shutil.copytree(project, project.with_name("elsewhere"))
    state = torch.load(moved / "out/run/state.pt")
    torch.save(state | {"log_bytes": 99}, moved / "out/run/state.pt")  # of a log that is lost
    folders = dict(data=f"{moved}/data", out=f"{moved}/out", gold="none.py")
    start("dpo", resume=True, save_minutes=7, microbatch_size=9, **folders)
    losses = [line["loss"] for line in metrics(moved, "run")]
    expected = [line["loss"] for line in metrics(project, "whole")]
    assert losses == pytest.approx(expected[2:], rel=1e-4)

def test_a_finished_run_is_left_alone(start, project, capsys):
    start("rm")
    before = [(path, path.stat().st_mtime_ns) for path in (project / "out").rglob("*")]
    with pytest.raises(SystemExit) as end:
        start("rm", resume=True)
    assert not end.value.code and "run: finished already" in capsys.readouterr().out
    assert before == [(path, path.stat().st_mtime_ns) for path in (project / "out").rglob("*")]

@pytest.mark.parametrize("resume", [True, False])
def test_a_run_without_its_checkpoint_or_resume_begins_anew(start, project, resume):
    start("dpo", "whole")
    start("dpo")
    (project / "out/run.pt").unlink()
    start("dpo", resume=resume)
    assert_same(project)

def test_a_second_run_in_the_same_folder_is_refused(start, project):
    """It harms nothing, and a crash leaves no lock behind."""
    start("rm")
    files = {path: path.read_bytes() for path in (project / "out/run").iterdir()}
    with open(project / "out/run/metrics.jsonl") as held:
        assert lock(held)
        for resume in (False, True):
            with pytest.raises(SystemExit, match="rm: another run is at work in .*run"):
                start("rm", resume=resume)
    assert files == {path: path.read_bytes() for path in (project / "out/run").iterdir()}
    start("rm")

def test_a_file_that_cannot_be_opened_is_one_sentence(start, project):
    (project / "out/run/metrics.jsonl").mkdir(parents=True)
    with pytest.raises(SystemExit, match="dpo: .*metrics.jsonl: Is a directory"):
        start("dpo")

"""What README.md says is true, and the code stays within its measures."""

import ast
import os
import re
import shlex
import subprocess

import bench
import pytest
import rlhf
from conftest import ROOT, STAGES, replace_stages
from data import fable, gpt2, label, prepare

README = ROOT / "README.md"
TEXT = README.read_text(encoding="utf-8") if README.exists() else ""
needs_readme = pytest.mark.skipif(not TEXT, reason="there is no README.md yet")
FOLDERS = [ROOT, ROOT / "data", ROOT / "tests", ROOT / "assets"]
SOURCES = [path for folder in FOLDERS for path in sorted(folder.glob("*.py"))]
SHELL = re.compile(r"^```(?:sh|bash|shell|console)?\n(.*?)^```", re.M | re.S)


def commands(text: str) -> list[str]:
    """The lines of its fenced blocks that run something of ours, without prompts and comments."""
    lines = [line.strip().removeprefix("$ ") for block in SHELL.findall(text)
             for line in block.replace("\\\n", " ").splitlines()]
    ours = re.compile(r"(\w+=\S+ )*(\S*python3?|\./\S+|bash|sh)( |$)")
    return [line for line in lines if ours.match(line)]


class Parsed(Exception):
    """Raised in place of the work, once the flags are understood."""


def stop(*arguments, **more):
    """Nothing."""
    raise Parsed


def understand(command: str, monkeypatch) -> None:
    """Parse it as the program itself would."""
    words = [word for word in shlex.split(command, comments=True) if not re.match(r"\w+=", word)]
    if "-m" in words:
        assert words[words.index("-m") + 1] in ("pytest", "venv", "pip")
        return
    runner = words[0].rsplit("/")[-1] in ("python", "python3", "bash", "sh")
    script, *rest = words[1:] if runner else words
    assert (ROOT / script).is_file(), script
    if script.endswith(".py"):
        replace_stages(monkeypatch, stop)
        monkeypatch.setattr(fable, "make", stop)
        monkeypatch.setattr(prepare, "show", stop)
        monkeypatch.setattr(bench, "bench", stop)
        monkeypatch.setattr(label, "run", stop)
        monkeypatch.setattr(gpt2, "load_command", stop)
        monkeypatch.setattr(gpt2, "save_command", stop)
        monkeypatch.setattr(prepare, "prepare", stop)
        mains = {"rlhf": rlhf.main, "data/prepare": prepare.main, "data/label": label.main,
                 "data/gpt2": gpt2.main, "tests/bench": bench.main}
        with pytest.raises(Parsed):
            mains[script.removesuffix(".py")](rest)


@needs_readme
@pytest.mark.parametrize("command", commands(TEXT))
def test_command_is_understood(command, monkeypatch, tmp_path):
    """Files are there, the stage and its flags exist and have values of the right kind."""
    monkeypatch.chdir(tmp_path)
    understand(command, monkeypatch)


def test_the_test_above_notices(monkeypatch, tmp_path):
    monkeypatch.chdir(tmp_path)
    understand("SMOKE=1 python rlhf.py ppo --kl_coef 0 --name x  # why", monkeypatch)
    understand("python data/prepare.py fable --show 20", monkeypatch)
    understand("python tests/bench.py ppo --shape gpt2", monkeypatch)
    for wrong in ("rlhf.py sft --lr 1", "tests/bench.py x", "rlhf.py dream", "data/label.py --k 3"):
        with pytest.raises(SystemExit):
            understand(f"python {wrong}", monkeypatch)
    with pytest.raises(AssertionError):
        understand("./trian.sh", monkeypatch)


def commands_of_train_sh(folder, *words, **environment) -> list[str]:
    """What train.sh would run, by a python3 that only writes down what it is asked."""
    (folder / "python3").write_text('#!/bin/sh\necho "python3 $*" >> "$LOG"\n')
    (folder / "python3").chmod(0o755)
    path = f"{folder}:{os.environ['PATH']}"
    (folder / "train.sh").write_text((ROOT / "train.sh").read_text(encoding="utf-8"))
    subprocess.run(["bash", "train.sh", *words], cwd=folder, check=True,
                   env={"PATH": path, "LOG": str(folder / "log"), **environment})
    return (folder / "log").read_text().splitlines()[1:]  # the first asks whether torch is there


@pytest.mark.parametrize("words, environment, count", [
    (["fable"], {}, 10), ([], {"SMOKE": "1"}, 10), ([], {"ROUNDS": "3", "OUT": "x"}, 16),
    ([], {"RESUME": "1"}, 10), (["gpt2"], {}, 9),
    (["gpt2"], {"MODEL": "gpt2-xl", "FEEDBACK": "hh", "SMOKE": "1"}, 9)])
def test_train_sh_runs_commands_that_exist(tmp_path, monkeypatch, words, environment, count):
    lines = commands_of_train_sh(tmp_path, *words, **environment)
    assert len(lines) == count
    monkeypatch.chdir(tmp_path)
    for line in lines:
        understand(line, monkeypatch)


def test_runs_of_train_sh_have_names_of_their_own(tmp_path):
    """Else --resume would take one for the other, and a stage done again find other models."""
    lines = commands_of_train_sh(tmp_path, "fable", ROUNDS="3", RESUME="1")
    runs = [line.split()[2:] for line in lines if "rlhf.py" in line and "evaluate" not in line]
    assert len(runs) == 11 and all("--resume" in run for run in runs)
    names = [run[run.index("--name") + 1] if "--name" in run else STAGES[run[0]].name
             for run in runs]
    assert len({*names}) == 11


@needs_readme
def test_line_counts():
    """Rows like | [model.py](model.py) | 237 | what | give the number of lines of that file."""
    file = r"\[?`?([\w./-]+\.\w+)`?(?:\]\(\S+\))?"
    rows = re.findall(rf"^\|\s*{file}\s*\|\s*([\d,]+)\s*\|", TEXT, re.M)
    assert {"model.py", "rlhf.py"} <= {name for name, _ in rows}
    for name, count in rows:
        lines = (ROOT / name).read_text(encoding="utf-8").count("\n")
        assert int(count.replace(",", "")) == lines, f"{name} has {lines} lines"


@needs_readme
def test_linked_files_exist():
    links = re.findall(r"\]\((?!https?:|#|mailto:)([^)#\s]+)", TEXT)
    for link in links + re.findall(r'src="(?!http)([^"]+)"', TEXT):
        assert (ROOT / link).exists(), link


@needs_readme
@pytest.mark.parametrize("number", range(1, 9))
def test_equations_are_numbered_alike_everywhere(number):
    """grep "(3)" walks from the README to the code and to its test."""
    assert f"({number})" in TEXT and f"({number})" in (ROOT / "rlhf.py").read_text()
    tests = [path.read_text(encoding="utf-8") for path in SOURCES if path.parent.name == "tests"]
    assert any(f'"""({number})' in text for text in tests)


def test_the_readme_has_the_table_of_the_study():
    """The one that assets/study.py wrote, to the letter."""
    table = (ROOT / "assets/study.md").read_text(encoding="utf-8").split("\n\n")[0]
    assert table.startswith("| claim |") and table in README.read_text(encoding="utf-8")


# ---- the measures ------------------------------------------------------------------------------

def test_model_and_rlhf_can_be_read_in_an_evening():
    texts = [(ROOT / name).read_text(encoding="utf-8") for name in ("model.py", "rlhf.py")]
    assert sum(text.count("\n") for text in texts) <= 1080


@pytest.mark.parametrize("path", SOURCES, ids=lambda path: str(path.relative_to(ROOT)))
def test_lines_and_functions_are_short(path):
    """No line over 100 columns, no function over 55 lines."""
    source = path.read_text(encoding="utf-8")
    wide = [i for i, line in enumerate(source.splitlines(), 1) if len(line) > 100]
    assert not wide, f"wider than 100 columns: lines {wide}"
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, ast.FunctionDef):
            assert node.end_lineno - node.lineno < 55, f"{node.name} has more than 55 lines"

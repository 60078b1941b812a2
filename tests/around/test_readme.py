"""Commands and links in the READMEs and in train.sh; train.sh itself, from pairs alone."""

import os
import re
import runpy
import shlex
import subprocess
import sys

import bench
import pytest
import rlhf
from conftest import ROOT, gpt, write_vocabulary
from data import gpt2, label, prepare
from data.files import fingerprint, get_tokenizer, write_jsonl

FOLDERS = (ROOT, ROOT / "data", ROOT / "tests", ROOT / "patches")
READMES = [path for path in FOLDERS if (path / "README.md").exists()]
MAINS = {"rlhf.py": rlhf.main, "data/prepare.py": prepare.main, "data/label.py": label.main,
         "data/gpt2.py": gpt2.main, "tests/bench.py": bench.main}
COMMAND = re.compile(r'(?:\w+=(?:"[^"]*"|\S+) )*(?:python3? |\./)\S.*')

class Parsed(Exception):
    """Raised in place of the work, once the flags are understood."""

@pytest.fixture
def understand(monkeypatch, tmp_path):
    """understand(words) parses them as the program itself would; files have to exist."""
    def parsed(*_):
        raise Parsed

    def settled(stage, cfg):
        rlhf.settle(cfg)
        raise Parsed

    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(rlhf, "run_stage", settled)
    for module, name in ((prepare, "prepare"), (prepare.fable, "make")):
        monkeypatch.setattr(module, name, parsed)

    def understand(words: list[str]) -> None:
        while re.match(r"\w+=", words[0]):
            words = words[1:]
        if words[0].startswith("python"):
            words = words[1:]
        if words[0] == "-m":
            assert words[1] in ("pytest", "venv", "pip")
            return
        assert (ROOT / words[0]).is_file(), words[0]
        if words[0] in MAINS:
            with pytest.raises(Parsed):
                MAINS[words[0]](words[1:])

    return understand

@pytest.mark.parametrize("folder", READMES, ids=lambda folder: folder.name)
def test_commands_are_understood(folder, understand):
    """Of lines of code and `spans`: the script is there, and its flags and values make sense."""
    found = 0
    for line in (folder / "README.md").read_text(encoding="utf-8").splitlines():
        assert not re.search("(py|sh|tests|txt) .*# ", line)  # a comment is none in a Mac's zsh
        for text in [line.strip(), *re.findall("`([^`]+)`", line)]:
            for part in re.split(r" && |  +| -> ", text):
                if COMMAND.fullmatch(part) and "`" not in part and "..." not in part:
                    understand(shlex.split(part, comments=True))
                    found += 1
    assert found

@pytest.mark.parametrize("words, environment, count", [
    (["fable"], {}, 9), ([], {"SMOKE": "1", "OUT": "out dir"}, 9), ([], {"ROUNDS": "3"}, 15),
    ([], {"RESUME": "1", "SEED": "2"}, 9), (["gpt2"], {"OUT": "out dir"}, 8),
    (["gpt2"], {"MODEL": "gpt2-xl", "FEEDBACK": "hh", "SMOKE": "1"}, 8),
    (["gpt2"], {"FEEDBACK": "mine 'my pairs.jsonl'"}, 7), (["gpt2", "--model", "gpt2-xl"], {}, 0)])
def test_train_sh_runs_commands_that_exist(tmp_path, understand, words, environment, count):
    """Through a link, from a folder with blanks, into one; python3 here only writes them down."""
    script = tmp_path / "project of mine/train.sh"
    script.parent.mkdir()
    script.write_bytes((ROOT / "train.sh").read_bytes())
    (tmp_path / "link.sh").symlink_to(script)
    fake = tmp_path / "bin/python3"
    fake.parent.mkdir()
    fake.write_text('#!/usr/bin/env bash\nprintf "%q " "$@" >> "$LOG"\necho >> "$LOG"\n')
    fake.chmod(0o755)
    env = {"PATH": f"{fake.parent}:{os.environ['PATH']}", "LOG": str(tmp_path / "log")}
    told = subprocess.run(["bash", "link.sh", *words], cwd=tmp_path, env=env | environment)
    assert told.returncode == (0 if count else 2)
    lines = (tmp_path / "log").read_text().splitlines()
    found = [shlex.split(line) for line in lines if not line.startswith("-c")]
    assert len(found) == count
    if "mine" in environment.get("FEEDBACK", ""):
        assert "my pairs.jsonl" in found[0]  # one word
    names = []  # two runs of one name would be one run for --resume
    for command in found:
        command[0] = os.path.relpath(command[0], script.parent)
        understand(command)
        flags = dict(zip(command, command[1:]))
        for flag in {"--out", "--data"} & flags.keys():
            assert flags[flag].split("/")[0] == environment.get("OUT", "out")
        if command[0] == "rlhf.py" and command[1] != "evaluate":
            assert ("--resume" in command) == ("RESUME" in environment)
            default = rlhf.STAGES[command[1]].__annotations__["cfg"].name
            names.append(flags.get("--name", default))
    assert len(names) == len(set(names))

@pytest.mark.parametrize("folder", READMES, ids=lambda folder: folder.name)
def test_linked_files_exist(folder):
    text = (folder / "README.md").read_text(encoding="utf-8")
    links = re.findall(r"\]\((?!https?:|#|mailto:)([^)#\s]+)", text)
    for link in links + re.findall(r'src="(?!http)([^"]+)"', text):
        assert (folder / link).exists(), link

def test_the_readmes_environment_is_one(tmp_path, monkeypatch, capsys):
    """The block of Python in data/README.md writes a data set that the stages train on."""
    text = (ROOT / "data/README.md").read_text(encoding="utf-8")
    code, = re.findall("```python\n(.*?)```", text, re.S)
    (tmp_path / "sums.py").write_text(code)
    monkeypatch.chdir(tmp_path)
    runpy.run_path("sums.py", run_name="__main__")
    more = ["--data", "out/sums", "--out", "out", "--gold", str(tmp_path / "sums.py")]
    monkeypatch.setitem(rlhf.PRESETS, "fable", dict(block_size=64, n_layer=1, n_head=1, n_embd=8))
    for flags in ("pretrain --steps 2", "sft --batch_size 2000 --epochs 1",
                  "rm --batch_size 2000 --epochs 1", "ppo --init sft --iterations 1 --window 64",
                  "evaluate --models gpt,sft,ppo_ptx"):
        rlhf.main([*flags.split(), *more, "--max_new_tokens", "8"])
    assert "| right | short | RM score |" in capsys.readouterr().out

def test_train_sh_needs_pairs_alone(tmp_path):
    """From a tiny model in the place of GPT-2 to a table, in a folder with a blank."""
    data = write_vocabulary(tmp_path / "my out/data")
    known = fingerprint(get_tokenizer(data))
    model = gpt(vocab_size=257, block_size=64, n_layer=1, vocabulary=known)
    gpt2.save_gpt2(model, tmp_path / "tiny")
    pairs = [{"prompt": f"Add {i}.", "chosen": f"{i}", "rejected": "No."} for i in range(60)]
    write_jsonl(tmp_path / "pairs.jsonl", pairs)
    (tmp_path / "link.sh").symlink_to(ROOT / "train.sh")
    (tmp_path / "bin").mkdir()
    (tmp_path / "bin/python3").symlink_to(sys.executable)
    environment = os.environ | {
        "PATH": f"{tmp_path / 'bin'}:{os.environ['PATH']}", "FEEDBACK": "mine pairs.jsonl",
        "OUT": "my out", "MODEL": "tiny", "MAX_NEW_TOKENS": "8", "MICROBATCH": "16", "SMOKE": "1",
        "OMP_NUM_THREADS": "1", "PYTHONPATH": os.pathsep.join(filter(None, sys.path))}
    done = subprocess.run(["bash", "link.sh", "gpt2"], cwd=tmp_path, env=environment,
                          capture_output=True, text=True)
    assert done.returncode == 0, done.stderr[-2000:]
    assert "| model | RM score | length | KL | EOS |\n" in done.stdout  # no gold, no text
    assert "| ppo_ptx |" in done.stdout

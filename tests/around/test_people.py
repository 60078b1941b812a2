"""data/label.py: people at the keyboard, reward models and scripted labelers, on tiny models."""

import io
import os
import pty
import re
import select
import subprocess
import sys
from pathlib import Path

import pytest
import rlhf
from conftest import BYTES, ROOT, gpt, scalar, write_vocabulary
from data import files, label
from data.files import read_jsonl, write_jsonl
from model import ScalarModel

FOUR = [" alpha", " beta", " gamma", " delta"]
FAMILY = "\U0001f468\u200d\U0001f469 می\u200cخواهم"  # with joiners, which are invisible
HOSTILE = "\x1b[2Jred\x1b]0;title\x07 \r\x9b31m\u202eback\u2066\x00\u200f\x7f\x08"

def prompt(i: int) -> str:
    return f"\n\nHuman: question {i}\n\nAssistant:"

def prompts(count: int, **more) -> list[dict]:
    return [{"prompt": prompt(i), **more} for i in range(count)]

@pytest.fixture
def folder(tmp_path) -> Path:
    """A vocabulary of bytes and three merges, five prompts, two models and a reward model."""
    write_vocabulary(tmp_path, [*BYTES, b"in", b"ti", b"tion"])
    for name in ("prompts", "prompts_valid", "rm_prompts", "rm_prompts_valid"):
        write_jsonl(tmp_path / f"{name}.jsonl", prompts(5))
    tokenizer = files.get_tokenizer(tmp_path)
    shape = dict(vocab_size=259 + 1, vocabulary=files.fingerprint(tokenizer), block_size=64)
    for name, kind in (("a", gpt), ("b", gpt), ("judge", scalar)):
        rlhf.save(tmp_path / f"{name}.pt", kind(**shape))
    return tmp_path

def flags_for(folder: Path, flags: str) -> list[str]:
    fixed = ["--data", folder, "--out", folder, "--device", "cpu", "--max_new_tokens", "6"]
    return [*map(str, fixed), *flags.format(folder).split()]

@pytest.fixture
def type_in(folder, monkeypatch, capsys):
    """type_in(flags, *lines) runs the command with these lines as its input -> its output."""
    def run(flags: str, *lines: str) -> str:
        monkeypatch.setattr(sys, "stdin", io.StringIO("".join(f"{line}\n" for line in lines)))
        label.main(flags_for(folder, flags))
        return capsys.readouterr().out

    return run

@pytest.fixture
def fixed(folder, monkeypatch):
    """fixed(prompts, texts): each of these prompts gets these completions."""
    def arrange(rows: list[dict], texts: list[str] = FOUR) -> None:
        def fill(self, rows, rng):
            for row in rows:
                row["completions"] = texts

        write_jsonl(folder / "rm_prompts.jsonl", rows)
        monkeypatch.setattr(label.Sampler, "fill", fill)

    return arrange

def start(folder: Path, flags: str, **streams) -> subprocess.Popen:
    env = {**os.environ, "OMP_NUM_THREADS": "1", "LC_ALL": "C.UTF-8", "TERM": "dumb"}
    command = [sys.executable, str(ROOT / "data/label.py"), *flags_for(folder, flags)]
    return subprocess.Popen(command, env=env, cwd=folder, **streams)

def converse(folder: Path, flags: str, *steps: tuple[str, str], kill=False) -> str:
    """Run the command in a pseudo-terminal: wait for one text, type the other. What it printed."""
    keyboard, theirs = pty.openpty()
    process = start(folder, flags, stdin=theirs, stdout=theirs, stderr=theirs)
    os.close(theirs)
    screen, seen = "", 0  # the first `seen` characters are answered
    for expected, typed in steps:
        while expected not in screen[seen:]:
            assert select.select([keyboard], [], [], 120)[0] and process.poll() is None, screen
            screen += os.read(keyboard, 65536).decode(errors="replace")
        seen = screen.index(expected, seen) + len(expected)
        os.write(keyboard, typed.encode())
    if kill:
        process.kill()
    assert process.wait(120) == (-9 if kill else 0)
    os.close(keyboard)
    return screen

def shown(output: str) -> list[dict[str, str]]:
    parts = output.split("-" * label.COLUMNS)[1:]
    return [dict(re.findall(r"^(\d+)  (.*?)\r?$", part, re.M)) for part in parts]

def test_ranking_in_a_terminal_and_a_kill(folder, type_in):
    """Each answer is on the disk before the next question; the next session goes on from there."""
    flags = "--by anna --models a,b --k_min 3 --k_max 3"
    lines = ["2 1 3\n", "zebra\n", "3=1 2\n", ""]
    converse(folder, flags, *[("rank> ", line) for line in lines], kill=True)
    before = read_jsonl(folder / "comparisons.jsonl")
    assert [sorted(row["ranks"]) for row in before] == [[0, 1, 2], [0, 0, 1]]
    assert type_in(flags, "quit").count("2 of 5 answered") == 2
    assert read_jsonl(folder / "comparisons.jsonl") == before

def test_writing_in_a_terminal_saves_what_was_typed(folder):
    text = [f"{FAMILY} ok", "def f():", "\tif x:", "full\u3000width", "  soft\xadhyphen  "]
    steps = [("> ", f"{line}\n") for line in [*text, ".", "Unfinished"]]
    steps += [("> ", "\x04"), ("writing: ", "\n"), ("> ", "but goes on\n")]
    steps += [("> ", "\x04"), ("writing: ", "y\n"), ("> ", "\x04"), ("2 of 5 answered, in", "")]
    converse(folder, "--write --by anna", *steps)
    rows = read_jsonl(folder / "sft.jsonl")
    texts = [" " + "\n".join(text), " Unfinished\nbut goes on"]
    assert [row["completion"] for row in rows] == texts

def test_ranks_belong_to_the_completions_in_the_file(folder, type_in, fixed):
    fixed(prompts(20))
    output = type_in("--by anna --models a", *["2 1=3 4"] * 20)
    rows = read_jsonl(folder / "comparisons.jsonl")
    for row, screen in zip(rows, shown(output), strict=True):
        assert row["completions"] == FOUR
        rank_of = dict(zip([text.strip() for text in FOUR], row["ranks"]))
        assert [rank_of[screen[number]] for number in "1234"] == [1, 0, 1, 2]
    output += type_in("--by ben --models a", *["1 2 3 4"] * 20)
    assert len({tuple(screen.values()) for screen in shown(output)}) > 15  # of 24

@pytest.mark.parametrize("line, ranks", [
    ("2 1 3", [1, 0, 2]), ("2 1=3", [1, 0, 1]), ("1 = 2 =3", [0, 0, 0]), (" 3  2=1 ", [1, 1, 0]),
    ("2 2 1", []), ("1 2", []), ("1 2 3 4", []), ("", []), ("1= 2 3 =", []), ("1 2 ３", [])])
def test_a_ranking_in_one_line(line, ranks):
    assert label.ranking(line, 3) == ranks

def scripted(folder: Path, monkeypatch, count: int) -> None:
    """Prompts for scripted labelers, who rank the completions as they come."""
    for name in ("rm_prompts", "rm_prompts_valid"):
        write_jsonl(folder / f"{name}.jsonl", prompts(count, task="x", wants={}))
    monkeypatch.setattr(label.fable, "rank", lambda who, row, texts, rng: list(range(len(texts))))

def test_the_last_completion_answers_another_prompt(folder, type_in, monkeypatch):
    """Models answer with the question's number. A person's 17th prompt is no block of its own."""
    tokenizer = files.get_tokenizer(folder)

    def complete(model, prompts, *_):
        texts = [files.decode(tokenizer, ids).split()[2] for ids in prompts]
        return [files.encode(tokenizer, f" {text}\n\nHuman: And?") for text in texts]

    monkeypatch.setattr(rlhf, "complete", complete)
    scripted(folder, monkeypatch, 17)
    type_in("--models a,b")
    path = folder / "comparisons.jsonl"
    theirs = read_jsonl(path)
    path.unlink()
    type_in("--by anna --models a,b --k_max 4", *["1 2 3 4"] * 17)
    for rankings, k in ((theirs, range(4, 10)), (read_jsonl(path), [4])):
        strays = set()
        for row in rankings:
            *own, stray = row["completions"]
            strays.add(stray)
            assert len(own) + 1 in k and stray not in own
            assert set(own) == {f" {row['prompt'].split()[2]}"}
        assert len(rankings) == len(strays) == 17

def test_undo_takes_back_ones_own_last_answer(folder, type_in, fixed):
    fixed(prompts(3))
    anna, ben = "--by anna --models a", "--by ben --models a"
    type_in(anna, "undo", "1 2 3 4", "4 3 2 1", "undo", "1=2=3=4", "quit")
    type_in(ben, "4 3 2 1", "quit")
    path = folder / "comparisons.jsonl"
    assert [row["labeler"] for row in read_jsonl(path)] == ["anna", "anna", "ben"]
    assert read_jsonl(path)[1]["ranks"] == [0] * 4
    type_in(anna, "undo", "undo", "undo", "1 2=3=4", "skip", "SKIP")
    assert [row["labeler"] for row in read_jsonl(path)] == ["ben", "anna"]
    type_in(anna, "1=2 3=4", "Quit")
    assert [row["prompt"] for row in read_jsonl(path)] == [prompt(0), prompt(0), prompt(1)]

@pytest.mark.parametrize("stops", [(0, 1), (2, 3)])
def test_sessions_in_parts_are_one_session(folder, type_in, stops):
    script = ["1 2 3 4", "4 3=2 1", "2 1 3 4", "1=2=3=4", "1 4 2=3"]
    flags = "--by anna --models a,b --k_min 4 --k_max 4"
    path = folder / "comparisons.jsonl"
    type_in(flags, *script)
    whole = read_jsonl(path)
    path.unlink()
    given = 0
    for stop in [*stops, 5]:
        type_in(flags, *script[given : given + stop])
        given += stop
    parts = read_jsonl(path)
    assert len(parts) == 5
    for one, other in zip(whole, parts):
        assert list(one) == ["prompt", "completions", "ranks", "labeler", "models", "time"]
        assert one | {"time": 0} == other | {"time": 0}
    assert files.read_comparisons(path, files.get_tokenizer(folder), 64)[0].labeler == "anna"

def test_two_people_at_once_lose_nothing(folder):
    write_jsonl(folder / "rm_prompts.jsonl", prompts(60))
    lines = []
    for i in range(60):
        lines += ["1 2 3 4", "undo", "4 3 2 1"] if i % 3 == 0 else ["1=2 3=4"]
    pipes = dict(stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True)
    flags = [f"--by {name} --models a,b --k_max 4" for name in ("anna", "ben")]
    both = [start(folder, own, **pipes) for own in flags]
    for process in both:  # wait for the first question
        while "rank" not in process.stdout.readline(4):
            pass
    for process in both:
        process.stdin.write("".join(f"{line}\n" for line in lines))
        process.stdin.close()
    for process in both:
        assert "60 of 60 answered, in" in process.stdout.read()
    rows = read_jsonl(folder / "comparisons.jsonl")
    assert len(rows) == 120 and len({str(row["completions"]) for row in rows}) <= 60
    for name in ("anna", "ben"):
        own = [row["prompt"] for row in rows if row["labeler"] == name]
        assert own == [prompt(i) for i in range(60)]

def test_lines_fit_the_screen_whatever_the_script():
    chinese = "机器学习" * 60
    thai = "ที่นี่" * 60 + " " + "word " * 60 + "x" * 200
    for text, longest in ((chinese, 42), (thai, 79)):  # characters in a line
        lines = label.wrapped(text, "12  ").split("\n")
        assert longest - 1 <= max(map(len, lines)) <= longest
        assert all(line.startswith("    ") for line in lines[1:])
        assert "".join("".join(lines).split())[2:] == text.replace(" ", "")
    assert label.wrapped("a b\n\n  2  me", "1  ") == "1  a b\n   \n     2  me"

def test_nothing_on_the_screen_moves_the_cursor(folder, type_in, fixed):
    texts = [f" a{HOSTILE}", f" b{HOSTILE}"]
    fixed([{"prompt": HOSTILE}], texts)
    output = type_in("--by anna --models a", "\x1b[A", "2")
    assert "[2Jred]0;title" in output
    assert all(character.isprintable() or character == "\n" for character in output)
    assert read_jsonl(folder / "comparisons.jsonl")[0]["completions"] == texts

def test_a_stray_byte_is_no_reason_to_stop(folder):
    process = start(folder, "--write --by anna", stdin=subprocess.PIPE)
    process.communicate(b"caf\xe9\n.\n", timeout=120)
    assert process.returncode == 0
    assert read_jsonl(folder / "sft.jsonl")[0]["completion"] == " caf\ufffd"

def test_blind_counts_for_the_better_model(folder, type_in, fixed):
    """Somebody who prefers b's answers, wherever they are shown, but cannot tell on one prompt."""
    fixed([], [" from a", " from b"])
    output = type_in("--blind a b", "quit")
    for i in range(5):  # one question a session: the screen says which answer is b's
        number = next(n for n, text in shown(output)[-1].items() if text == "from b")
        output = type_in("--blind a b", "=" if i == 4 else number, "quit")
    assert f"a is preferred to b on 10.0% ± {1.96 * 0.2 / 4**0.5:.1%} of 5 prompts" in output
    assert read_jsonl(folder / "blind.jsonl")[4]["models"] == f"{folder}/a.pt,{folder}/b.pt"

def test_a_reward_model_ranks_by_its_score(folder, type_in, fixed):
    texts = [" x", " yes", " no, why", " x"]
    fixed(prompts(5), texts)
    type_in("--by {0}/judge.pt --models a,b")
    cfg = label.Label(data=str(folder), out=str(folder), device="cpu", dtype="float32")
    judge = rlhf.load(cfg, "judge", ScalarModel)
    tokenizer = files.get_tokenizer(folder)
    assert len(read_jsonl(folder / "comparisons_valid.jsonl")) == 5
    for row in read_jsonl(folder / "comparisons.jsonl"):
        examples = [files.example(tokenizer, row["prompt"], text) for text in texts]
        scores = rlhf.score(judge, examples[:3], cfg).tolist()
        best_first = sorted(range(3), key=scores.__getitem__, reverse=True)
        assert [row["ranks"][i] for i in best_first] == [0, 1, 2]
        assert row["ranks"][3] == row["ranks"][0] and row["labeler"] == f"{folder}/judge.pt"

def test_rounds_keep_earlier_rankings_and_nobody_overwrites_peoples(folder, type_in, monkeypatch):
    scripted(folder, monkeypatch, 3)
    path, valid = folder / "comparisons.jsonl", folder / "comparisons_valid.jsonl"
    output, first = type_in("--models a"), read_jsonl(path)
    assert len(read_jsonl(valid)) == 21 and output.count("agree on 100.0%") == 2
    for _ in range(2):  # the second round twice
        type_in("--models b --round 2")
        assert read_jsonl(path)[:3] == first
        assert [row["round"] for row in read_jsonl(path)] == [1, 1, 1, 2, 2, 2]
    type_in("--models a")
    assert read_jsonl(path) == first
    for answers, flags in ((path, ""), (valid, "--valid")):
        path.write_bytes(b"")
        type_in(f"--by anna --models a --k_max 4 {flags}", "1 2 3 4", "quit")
        before = answers.read_bytes()
        assert b"anna" in before  # answers to held-out prompts are held out, too
        with pytest.raises(SystemExit, match=f"{answers} has answers by people"):
            type_in("--models a")
        assert answers.read_bytes() == before and (answers == path or path.read_bytes() == b"")
        answers.unlink()

def test_agreement_of_labelers_and_of_heldout_ones(folder, type_in):
    """anna and ben share two prompts: 3 + 2 pairs that neither ties, 2 + 2 in the same order."""
    rows = []
    for name, i, ranks in (("anna", 0, [0, 1, 2]), ("ben", 0, [1, 0, 2]), ("anna", 1, [0, 1, 2]),
                           ("ben", 1, [0, 0, 1]), ("ben", 2, [0, 1, 2])):
        own = {"completions": FOUR[:3], "ranks": ranks, "labeler": name}
        rows.append({"prompt": prompt(i)} | own)
    write_jsonl(folder / "all.jsonl", rows)
    first = "labelers agree on 80.0% of 5 untied pairs (paper: 72.6%)"
    assert type_in("--agreement {0}/all.jsonl").splitlines() == [first]
    for labeler, ranks in zip(label.fable.HELDOUT_LABELERS, ([2, 1, 0], [1, 2, 0])):
        rows.append(rows[-1] | {"labeler": labeler.name, "ranks": ranks})
    write_jsonl(folder / "all.jsonl", rows)
    second = "held-out labelers agree on 66.7% of 3 untied pairs (paper: 77.3%)"
    assert type_in("--agreement {0}/all.jsonl").splitlines() == [first, second]

@pytest.mark.parametrize("flags, sentence", [
    ("--by anna --models a --k_min 5 --k_max 4", "k_min 5 and k_max 4: at least 2"),
    ("--by {0}/a.pt --models a", "ScalarModel"),
    ("--write --blind a b", "one at a time"),
    ("--blind a b --by {0}/judge.pt", "for people"),
    ("--agreement {0}/prompts.jsonl", "line 1: labeler should be"),
    ("--models a", "only know the fable: say who ranks with --by")])
def test_a_mistake_is_one_sentence(folder, type_in, flags, sentence):
    with pytest.raises(SystemExit, match=re.escape(sentence)):
        type_in(flags, "1 2 3 4")

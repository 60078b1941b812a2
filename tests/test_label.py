"""People at the keyboard: data/label.py driven by what they type, on a tiny random model."""

import io
import json
import os
import re
import shutil
import signal
import subprocess
import sys
import time
from datetime import datetime
from itertools import product
from pathlib import Path
from random import Random
from types import SimpleNamespace

import conftest
import pytest
import rlhf
from conftest import ROOT
from data import answers, fable, label, people
from data.formats import UserError, printable

WORDS = ["alpha", "beta", "gamma", "delta"]
HOSTILE = "\x1b[2Jred\x1b]0;title\x07 \r\x9b31m\u202eback\u2066\x00\u200f\x7f\x08"


@pytest.fixture
def folder(tiny_data, tmp_path) -> Path:
    """A data set of five prompts, not answered yet, two models and a judge."""
    shutil.copy(tiny_data / "tokenizer.tiktoken", tmp_path)
    write_rows(tmp_path / "prompts.jsonl", [{"prompt": prompt(i)} for i in range(5)])
    shutil.copy(tmp_path / "prompts.jsonl", tmp_path / "prompts_valid.jsonl")
    shape = {"vocab_size": 1024, "block_size": 64}
    for name, model in (("a", conftest.gpt(**shape)), ("b", conftest.gpt(**shape)),
                        ("judge", conftest.scalar(**shape))):
        rlhf.save(conftest.settings(rlhf.SFT, tmp_path, out=str(tmp_path), name=name), model)
    return tmp_path


def prompt(i: int) -> str:
    return f"\n\nHuman: question {i}\n\nAssistant:"


def write_rows(path: Path, rows: list[dict]) -> None:
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))


def rows_of(path: Path) -> list[dict]:
    return [json.loads(line) for line in path.read_text().splitlines()] if path.exists() else []


def asked(count: int, completions=WORDS) -> list[dict]:
    return [{"prompt": prompt(i), "completions": completions} for i in range(count)]


@pytest.fixture
def type_in(folder, monkeypatch, capsys):
    """type_in(flags, *lines): run the command with these lines as its input; what it prints."""
    def run(flags: str, *lines: str) -> str:
        monkeypatch.setattr(sys, "stdin", io.StringIO("".join(f"{line}\n" for line in lines)))
        common = ["--data", folder, "--out", folder, "--device", "cpu", "--dtype", "float32",
                  "--max_new_tokens", "8"]
        label.main([*map(str, common), *flags.format(folder).split()])
        return capsys.readouterr().out
    return run


def shown(output: str) -> list[dict[str, str]]:
    """For each question the number and the first line of every answer on the screen."""
    parts = output.split("-" * people.WIDTH)[1:]
    return [dict(re.findall(r"^(\d+)  (.*)$", part, re.M)) for part in parts]


# ---- ranking -----------------------------------------------------------------------------------

def test_ranks_belong_to_the_completions_in_the_file(folder, type_in):
    """Shown shuffled, and for each person and prompt in another order; saved as they were."""
    write_rows(folder / "these.jsonl", asked(20))
    output = type_in("--by anna --prompts {0}/these.jsonl", *["2 1=3 4", ""] * 20)
    rows = rows_of(folder / "comparisons.jsonl")
    assert len(rows) == 20 and all(row["completions"] == WORDS for row in rows)
    for row, screen in zip(rows, shown(output)):
        assert sorted(screen.values()) == sorted(WORDS)
        rank_of = dict(zip(row["completions"], row["ranks"]))
        assert [rank_of[screen[place]] for place in "1234"] == [1, 0, 1, 2]
    orders = {tuple(screen.values()) for screen in shown(output)}
    assert len(orders) > 10
    other = type_in("--by ben --prompts {0}/these.jsonl", *["1 2 3 4", ""] * 20)
    assert sum(x == y for x, y in zip(shown(other), shown(output))) < 10


def test_rm_reads_what_people_rank(folder, type_in, tokenizer):
    """Completions sampled from a checkpoint; who ranked them, and when."""
    type_in("--by anna --models a,b --k_min 2 --k_max 2", *["2 1", ""] * 5)
    path = folder / "comparisons.jsonl"
    rows = rlhf.read_rows(path, tokenizer, 64, "prompt", "completions", "ranks")
    assert [row["prompt"] for row in rows] == [prompt(i) for i in range(5)]
    for row in rows:
        assert row["labeler"] == "anna" and sorted(row["ranks"]) == [0, 1]
        assert row["models"] == f"{folder}/a.pt,{folder}/b.pt"
        age = datetime.now().astimezone() - datetime.fromisoformat(row["time"])
        assert -1 < age.total_seconds() < 60


def test_completions_come_from_the_models_named(folder, type_in):
    """A model that always ends at once writes nothing, the other something."""
    mute = conftest.gpt(vocab_size=1024, block_size=64)
    mute.wte.weight.data[:] = 0
    mute.wte.weight.data[1023] = 1
    mute.ln_f.weight.data[:], mute.ln_f.bias.data[:] = 0, 100
    rlhf.save(conftest.settings(rlhf.SFT, folder, out=str(folder), name="mute"), mute)
    write_rows(folder / "prompts.jsonl", [{"prompt": prompt(0)}])
    output = type_in("--by anna --models a,mute --k_min 9 --k_max 9", "quit")
    texts = list(shown(output)[0].values())
    assert len(texts) > 2 and re.search(r"^\d$", output, re.M)  # what is empty, and what is not
    output = type_in("--by anna --models mute --k_min 9 --k_max 9")
    assert output.count("there is but one answer") == 1 and "0 of 1 answered, in" in output


@pytest.mark.parametrize("k", [2, 9])
def test_k_is_that_asked_for(folder, type_in, k):
    line = " ".join(str(i + 1) for i in range(k))
    output = type_in(f"--by anna --models a --k_min {k} --k_max {k}", *[line, ""] * 5)
    assert {len(row["completions"]) for row in rows_of(folder / "comparisons.jsonl")} == {k}
    lines = output.replace("> ", "> \n").replace(str(folder), "").splitlines()  # no echo of input
    assert max(map(len, lines)) <= 80


def test_held_out_prompts_make_held_out_comparisons(folder, type_in):
    type_in("--by anna --models a --prompts {0}/prompts_valid.jsonl --k_max 4", "1 2 3 4", "quit")
    assert len(rows_of(folder / "comparisons_valid.jsonl")) == 1
    assert not (folder / "comparisons.jsonl").exists()


@pytest.mark.parametrize("line, ranks", [
    ("2 1 3", [1, 0, 2]), ("2 1=3", [1, 0, 1]), ("1 = 2 =3", [0, 0, 0]), (" 3  2=1 ", [1, 1, 0]),
])
def test_a_ranking_is_understood(line, ranks):
    assert people.ranking(line, 3) == ranks


@pytest.mark.parametrize("line, sentence", [
    ("2 2 1", "2 is there twice"), ("1 5", "'5' is not a number from 1 to 4"), ("", "1, 2, 3, 4"),
    ("a b", "'a' is not a number"), ("1 2", "not yet there: 3, 4"), ("1=", "'' is not a number"),
    ("1 2 3 ４", "'４' is not"), ("0 1 2 3", "'0' is not"), ("1-2-3-4", "'1-2-3-4' is not"),
    ("1=2=1 3 4", "1 is there twice"), ("\x1b[A", "'\\x1b[A' is not"),
])
def test_a_line_that_is_no_ranking_is_asked_again(folder, type_in, line, sentence):
    write_rows(folder / "these.jsonl", asked(1))
    output = type_in("--by anna --prompts {0}/these.jsonl", line, "1 2 3 4", "")
    assert " ".join(output.split()).count(sentence) == 1 and output.count("rank> ") == 2
    assert len(rows_of(folder / "comparisons.jsonl")) == 1


def test_notes_belong_to_the_answers_they_are_of(folder, type_in):
    """An overall quality and what the paper's labelers marked, of as many answers as one likes."""
    write_rows(folder / "these.jsonl", asked(8))
    wrong = ["5:3", "2:8", "2:", "2:3z", "3", "0:3"]
    lines = ["1 2 3 4", *wrong, "2:6 4:1fh 1:v", "1 2 3 4", ""]
    output = type_in("--by anna --prompts {0}/these.jsonl", *lines, *["1 2 3 4", "3:7"] * 6)
    assert output.count("is not answer:quality") == len(wrong)
    rows = rows_of(folder / "comparisons.jsonl")
    notes = dict(zip(rows[0]["completions"], rows[0]["notes"]))
    places = shown(output)[0]
    assert notes[places["2"]] == {"quality": 6, "marks": []} and notes[places["3"]] == {}
    assert notes[places["4"]] == {"quality": 1, "marks": [people.MARKS["f"], people.MARKS["h"]]}
    assert notes[places["1"]] == {"marks": [people.MARKS["v"]]}
    assert "notes" not in rows[1]
    for row, places in zip(rows[2:], shown(output)[2:]):
        assert [text for text, note in zip(WORDS, row["notes"]) if note] == [places["3"]]
    assert sorted("".join(people.AXES.values())) == sorted(people.MARKS)


# ---- undo, skip, quit, and going on ------------------------------------------------------------

def test_undo_takes_back_the_last_answer_and_asks_again(folder, type_in):
    write_rows(folder / "these.jsonl", asked(3))
    flags = "--by anna --prompts {0}/these.jsonl"
    output = type_in(flags, "undo", "1 2 3 4", "", "4 3 2 1", "", "undo", "1=2=3=4", "", "1 2=3=4",
                     "undo", "1=2 3=4", "2:6")
    assert output.count("no answer to take back") == 1
    rows = rows_of(folder / "comparisons.jsonl")
    assert [row["prompt"] for row in rows] == [prompt(i) for i in range(3)]
    assert [sorted(row["ranks"]) for row in rows] == [[0, 1, 2, 3], [0] * 4, [0, 0, 1, 1]]
    type_in(flags, "quit")  # answered: nothing is asked
    assert rows_of(folder / "comparisons.jsonl") == rows


def test_undo_reaches_into_the_session_before_and_no_further_than_ones_own(folder, type_in):
    write_rows(folder / "these.jsonl", asked(3))
    flags = "--by {1} --prompts {{0}}/these.jsonl"
    anna, ben = (flags.replace("{1}", name).replace("{{0}}", "{0}") for name in ("anna", "ben"))
    type_in(anna, "1 2 3 4", "", "quit")
    type_in(ben, "4 3 2 1", "", "quit")
    type_in(anna, "undo", "undo", "quit")
    assert [row["labeler"] for row in rows_of(folder / "comparisons.jsonl")] == ["ben"]
    type_in(anna, "1 2=3=4")
    assert [row["labeler"] for row in rows_of(folder / "comparisons.jsonl")] == ["ben", "anna"]


def test_skipped_prompts_come_up_in_the_next_session(folder, type_in):
    write_rows(folder / "these.jsonl", asked(3))
    flags = "--by anna --prompts {0}/these.jsonl"
    output = type_in(flags, "skip", "1 2 3 4", "", "SKIP")
    assert "1 of 3 answered, in" in output
    type_in(flags, "1 2 3 4", "skip", "4 3 2 1", "")
    order = [row["prompt"] for row in rows_of(folder / "comparisons.jsonl")]
    assert order == [prompt(1), prompt(0), prompt(2)]


@pytest.mark.parametrize("stops", [(0, 1), (1, 1), (2, 3), (3, 1), (5, 0)])
def test_sessions_in_parts_are_one_session(folder, type_in, stops):
    """The input ends after so many lines, twice; then it goes on. Only the times differ."""
    script = ["1 2 3 4", "1:5", "4 3=2 1", "", "2 1 3 4", "", "1=2=3=4", "", "1 4 2=3", "2:3"]
    flags = "--by anna --models a,b --k_min 4 --k_max 4"
    type_in(f"{flags} --to {folder}/whole.jsonl", *script)
    parts, given = f"{flags} --to {folder}/parts.jsonl", 0
    for stop in stops:
        type_in(parts, *script[2 * given : 2 * (given + stop)])
        given = min(5, given + stop)
    type_in(parts, *script[2 * given :])
    for whole, part in zip(rows_of(folder / "whole.jsonl"), rows_of(folder / "parts.jsonl")):
        assert {**whole, "time": 0} == {**part, "time": 0}
    assert len(rows_of(folder / "parts.jsonl")) == 5


def test_another_model_or_person_is_another_question(folder, type_in):
    for flags in ("--by anna --models a", "--by anna --models b", "--by ben --models b"):
        type_in(f"{flags} --k_min 2 --k_max 2", *["1 2", ""] * 5)
    rows = rows_of(folder / "comparisons.jsonl")
    assert len(rows) == 15 and rows[5]["completions"] != rows[0]["completions"]
    assert [row["completions"] for row in rows[5:10]] == [row["completions"] for row in rows[10:]]


def start(folder: Path) -> subprocess.Popen:
    """The command in a process of its own, three rankings to give."""
    write_rows(folder / "these.jsonl", asked(3))
    command = [sys.executable, "data/label.py", "--data", folder, "--out", folder, "--by", "anna",
               "--prompts", folder / "these.jsonl"]
    env = {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONUNBUFFERED": "1"}
    pipe = subprocess.PIPE

    def heed_ctrl_c():  # which a shell has its background jobs ignore, and so these tests perhaps
        signal.signal(signal.SIGINT, signal.SIG_DFL)

    return subprocess.Popen([*map(str, command)], cwd=ROOT, env=env, text=True, stdin=pipe,
                            stdout=pipe, stderr=subprocess.STDOUT, preexec_fn=heed_ctrl_c)


@pytest.mark.parametrize("sent", [signal.SIGKILL, signal.SIGTERM, signal.SIGINT])
def test_a_ranking_is_safe_before_its_notes_are_asked_for(folder, type_in, sent):
    process = start(folder)
    process.stdin.write("2 1 3 4\n")
    process.stdin.flush()
    seen = ""
    while not seen.endswith("notes> "):
        seen += process.stdout.read(1)
    process.send_signal(sent)
    rest = process.communicate(timeout=300)[0]
    assert process.returncode == (0 if sent == signal.SIGINT else -sent) and "Traceback" not in rest
    assert sent != signal.SIGINT or "1 of 3 answered, in" in rest
    rows = rows_of(folder / "comparisons.jsonl")
    assert len(rows) == 1 and sorted(rows[0]["ranks"]) == [0, 1, 2, 3]
    type_in("--by anna --prompts {0}/these.jsonl", "4 3 2 1", "", "1 2 3=4", "")
    assert rows_of(folder / "comparisons.jsonl")[0] == rows[0]
    assert len(rows_of(folder / "comparisons.jsonl")) == 3


# ---- the file of answers -----------------------------------------------------------------------

def test_a_line_cut_anywhere_costs_that_line_alone(tmp_path, capsys):
    path, cut = tmp_path / "answers.jsonl", tmp_path / "answers.jsonl.cut"
    first, last = '{"prompt": "é", "x": [0]}\n'.encode(), '{"prompt": "ü\\n"}\n'.encode()
    for end in range(len(last) + 1):
        path.write_bytes(first + last[:end])
        read = [row["prompt"] for _, row in answers.read_answers(path, "prompt")]
        whole = end >= len(last) - 1
        assert read == (["é", "ü\n"] if whole else ["é"])
        part = b"" if whole else last[:end]
        assert path.read_bytes() == (first + last if whole else first)
        assert (cut.read_bytes() if cut.exists() else b"") == (part + b"\n" if part else b"")
        assert ("not whole, moved to" in capsys.readouterr().out) == bool(part)
        cut.unlink(missing_ok=True)


@pytest.mark.parametrize("tail", [b"\0\0\0\0", b'{"prompt": "x\xff"}\n', b"null\n", b"[1]"])
def test_a_garbled_end_is_put_aside(folder, type_in, tail):
    write_rows(folder / "these.jsonl", asked(2))
    flags, path = "--by anna --prompts {0}/these.jsonl", folder / "comparisons.jsonl"
    type_in(flags, "1 2 3 4", "", "quit")
    before = path.read_bytes()
    path.write_bytes(before + tail)
    output = type_in(flags, "4 3 2 1", "")
    assert "the last line is not whole" in output and "2 of 2 answered, in" in output
    assert path.read_bytes().startswith(before) and len(rows_of(path)) == 2
    assert (folder / "comparisons.jsonl.cut").read_bytes().strip() == tail.strip()


def test_a_garbled_line_elsewhere_stops_before_anything_is_asked(folder, type_in):
    path = folder / "comparisons.jsonl"
    path.write_text('{"prompt": "x"\n{"prompt": "x", "chosen": "a", "rejected": "b"}\n')
    before = path.read_bytes()
    with pytest.raises(SystemExit, match="comparisons.jsonl, line 1: not JSON"):
        type_in("--by anna --models a", "1 2 3 4")
    assert path.read_bytes() == before


def test_undo_leaves_the_lines_of_others_as_they_are(folder, type_in):
    """Other formats, other spacing, and what another session has added meanwhile."""
    path = folder / "comparisons.jsonl"
    theirs = '{"prompt":"x","chosen":"a",  "rejected":"b"}\n{"messages": [], "chosen": "c", ' \
             '"rejected": "é"}\n'
    path.write_text(theirs, encoding="utf-8")
    row = {"prompt": "p", "completions": ["a", "b"], "ranks": [0, 1], "labeler": "anna"}
    line = answers.save(path, row)
    answers.append(path, b'{"prompt": "later", "chosen": "a", "rejected": "b"}')
    new = answers.replace(path, line, {**row, "notes": []})
    assert json.loads(new)["notes"] == [] and len(rows_of(path)) == 4
    assert answers.replace(path, new) == ""
    assert path.read_text(encoding="utf-8").startswith(theirs) and len(rows_of(path)) == 3
    assert rows_of(path)[2]["prompt"] == "later"
    with pytest.raises(UserError, match="changed meanwhile"):
        answers.replace(path, new)


def test_what_cannot_be_written_is_a_sentence(folder, type_in):
    write_rows(folder / "these.jsonl", asked(1))
    (folder / "file").write_text("")
    for to in ("{0}/file/x.jsonl", "{0}/file/y/x.jsonl"):
        with pytest.raises(SystemExit, match="rank: .*x.jsonl cannot be"):
            type_in("--by anna --prompts {0}/these.jsonl --to " + to, "1 2 3 4", "")
    with pytest.raises(SystemExit, match="rank: .*cannot be read"):
        type_in("--by anna --prompts {0}/these.jsonl --to {0}", "1 2 3 4", "")


# ---- the screen --------------------------------------------------------------------------------

@pytest.mark.parametrize("text, seen", [
    (HOSTILE, "[2Jred]0;title  31mback"), ("a\tb\u00a0c\u3000d", "a b c d"), ("a\nb", "a\nb"),
    ("naïve 日本 🙂", "naïve 日本 🙂"), ("x\u2028y\ud800\u200b", "x y"), ("", ""),
])
def test_printable(text, seen):
    assert printable(text) == seen


def test_nothing_that_a_model_writes_moves_the_cursor(folder, type_in):
    """Not from prompts, completions, nor names; what is saved is the text as it was."""
    rows = [{"prompt": HOSTILE, "completions": [f"a{HOSTILE}", f"b{HOSTILE}"], "ranks": [0, 1],
             "labeler": HOSTILE}]
    write_rows(folder / "these.jsonl", rows)
    output = type_in("--by anna --prompts {0}/these.jsonl", "\x1b[A", "1 2", "")
    output += type_in("--write --prompts {0}/these.jsonl --to {0}/sft.jsonl", "an\x1b[A swer", ".")
    output += type_in("--by anna --prompts {0}/these.jsonl --to {0}/these.jsonl", "1 2", "")
    output += type_in("--agreement {0}/these.jsonl")
    assert "[2Jred]0;title" in output and "anna" in output
    assert all(char.isprintable() or char == "\n" for char in output)
    assert rows_of(folder / "comparisons.jsonl")[0]["completions"] == rows[0]["completions"]
    assert rows_of(folder / "sft.jsonl")[0]["completion"] == " an[A swer"


def test_an_answer_cannot_pass_for_two(folder, type_in):
    """Every line but an answer's first is indented; the screen has 80 columns."""
    long = "word " * 40 + "x" * 200 + "\n\n2  me too\n3  and me"
    write_rows(folder / "these.jsonl", asked(1, [long, "short"]))
    output = type_in("--by anna --prompts {0}/these.jsonl", "1 2", "")
    assert len(shown(output)[0]) == 2 and max(map(len, output.splitlines()[:-1])) <= 80
    assert output.count("word") == 40 and output.count("x") >= 200


# ---- demonstrations ----------------------------------------------------------------------------

def test_write_makes_demonstrations_that_sft_reads(folder, type_in, tokenizer):
    output = type_in("--write --by anna", "One line.", ".", ".", "", "Two", "", "  lines. ", ".",
                     "skip", "Undo this.", ".", "undo", "undo", "Quit it.", ".", "quit")
    assert "a word at least" in output and "2 of 5 answered, in" in output
    rows = rows_of(folder / "sft.jsonl")
    assert [row["completion"] for row in rows] == [" One line.", " Quit it."]
    assert [row["prompt"] for row in rows] == [prompt(0), prompt(1)]
    type_in("--write --by anna", "Two", "", "  lines. ", ".", "not finished")
    assert [row["completion"] for row in rows_of(folder / "sft.jsonl")][2:] == [" Two\n\n  lines."]
    assert {row["labeler"] for row in rows_of(folder / "sft.jsonl")} == {"anna"}
    assert len(rlhf.read_demonstrations(folder / "sft.jsonl", tokenizer, 64)) == 3


# ---- two models, blind -------------------------------------------------------------------------

def test_blind_counts_for_the_model_whose_answer_was_better(folder, type_in, monkeypatch):
    """A person who likes b's answers and cannot tell on one prompt: 4.5 of 5 prompts."""
    texts = {"a": "from a", "b": "from b"}
    monkeypatch.setattr(people, "sample_answers", lambda models, two, *_: [texts[x] for x in two])
    output = type_in("--blind a b", "quit")
    places = []
    for _ in range(5):  # one prompt a session: the screen says where b is
        screen = shown(output)[-1]
        places.append(next(place for place, text in screen.items() if text == "from b"))
        output = type_in("--blind a b", "=" if len(places) == 5 else places[-1], "quit")
    assert set(places) == {"1", "2"}
    half = 1.96 * 0.2 / 5**0.5
    expected = f"a is preferred to b on {0.1:.1%} ± {half:.1%} of 5 prompts"
    assert expected in output and "0 times better, 4 worse, 1 tied" in output
    for row in rows_of(folder / "blind.jsonl"):
        assert row["completions"] == ["from a", "from b"] and row["ranks"] in ([1, 0], [0, 0])


def test_blind_samples_each_answer_from_its_own_model(folder, type_in):
    """Undone, the same question comes again, and in the other order the other model is first."""
    type_in("--blind a b", "1", "undo", "both", "2", "quit")
    row = rows_of(folder / "blind.jsonl")[0]
    cfg = conftest.settings(label.Label, folder, out=str(folder), max_new_tokens=8)
    tokenizer = rlhf.get_tokenizer(str(folder))
    task = {"prompt": prompt(0), "prompt_ids": tokenizer.encode_ordinary(prompt(0))}
    a, b = rlhf.load(cfg, "a"), rlhf.load(cfg, "b")
    made = people.sample_answers({"a": a, "b": b}, ["a", "b"], task, tokenizer, cfg)
    assert row["completions"] == made
    assert people.sample_answers({"a": a}, ["a"], task, tokenizer, cfg) == made[:1]
    assert people.sample_answers({"b": b}, ["b"], task, tokenizer, cfg) != made[:1]
    assert "answered, in" in type_in("--blind b a", "quit")  # not yet: another question
    assert len(rows_of(folder / "blind.jsonl")) == 1


def test_what_a_person_is_shown_ends_where_the_humans_turn_begins(monkeypatch):
    monkeypatch.setattr(people, "complete", lambda model, prompts, *_: (prompts, None, None))
    monkeypatch.setattr(people, "responses", lambda prompts, _: prompts)
    monkeypatch.setattr(people, "decode", lambda *_: " Yes.\n\nHuman: And?\n\nHuman: So?")
    row, tokenizer = {"prompt": "A", "prompt_ids": [1]}, SimpleNamespace(eot_token=0)
    texts = people.sample_answers({"a": None}, ["a", "a"], row, tokenizer, label.Label())
    assert texts == [" Yes."] * 2


# ---- a model in a person's place, and agreement ------------------------------------------------

def test_the_last_completion_answers_another_prompt(monkeypatch):
    """The others answer their own, and each of them ends where the human's turn begins."""
    rows = [{"prompt_ids": [i]} for i in range(40)]
    monkeypatch.setattr(label, "complete", lambda model, prompts, *_: (prompts, None, None))
    monkeypatch.setattr(label, "responses", lambda prompts, _: prompts)
    monkeypatch.setattr(label, "decode", lambda _, ids: f" to {ids[0]}\n\nHuman: And?")
    cfg, tokenizer = label.Label(models="a,b", k_min=2, k_max=4), SimpleNamespace(eot_token=0)
    made = label.sample_completions({"a": None, "b": None}, rows, tokenizer, Random(0), cfg)
    strays = [texts.pop() for texts in made]
    assert {len(texts) for texts in made} == {1, 2, 3}
    assert all(set(texts) == {f" to {i}"} for i, texts in enumerate(made))
    assert sorted(strays) == sorted(f" to {i}" for i in range(40))
    assert sum(stray == f" to {i}" for i, stray in enumerate(strays)) < 5


def test_a_reward_model_ranks_by_its_score(folder, type_in, tokenizer):
    """Completions that people have ranked: the order of its scores, and how far they agree."""
    texts = [[f" {a} {b}" for b in "xyz"] for a in WORDS]
    rows = [{"prompt": prompt(i), "completions": own + own[:1], "ranks": [0, 1, 2, 0],
             "labeler": "anna"} for i, own in enumerate(texts)]
    write_rows(folder / "comparisons.jsonl", rows)
    flags = f"--by {folder}/judge.pt --prompts {{0}}/comparisons.jsonl"
    output = type_in(flags)
    cfg = conftest.settings(label.Label, folder, out=str(folder))
    judge, same, untied = rlhf.load(cfg, "judge", rlhf.ScalarModel), 0, 0
    added = rows_of(folder / "comparisons.jsonl")[len(rows) :]
    assert rows_of(folder / "comparisons.jsonl")[: len(rows)] == rows and len(added) == len(rows)
    read = rlhf.read_rows(folder / "comparisons.jsonl", tokenizer, 64, "completions")
    for row, own in zip(read, added):
        scores = rlhf.score_rows(judge, row["ids"], cfg).tolist()
        assert own["ranks"][3] == own["ranks"][0]
        for i, j in product(range(3), repeat=2):
            assert (scores[i] > scores[j]) == (own["ranks"][i] < own["ranks"][j])
        for i, j in ((0, 1), (0, 2), (1, 2), (3, 1), (3, 2)):  # anna's order
            same, untied = same + (scores[i % 3] > scores[j]), untied + 1
    assert f"{folder}/judge.pt and" in output or f"anna and {folder}/judge.pt" in output
    assert f"agree on {same / untied:.1%} of {untied} untied pairs" in output
    type_in(flags)  # again: in the place of the first time
    assert len(rows_of(folder / "comparisons.jsonl")) == 2 * len(rows)


def test_a_reward_models_agreement_with_gold(folder, type_in, tiny_data, monkeypatch):
    """New completions to the fable's prompts."""
    shutil.copy(tiny_data / "rm_prompts.jsonl", folder)
    prompts = len(rows_of(folder / "rm_prompts.jsonl"))
    better = [" I do not know.", " x x x", " I am sorry that you are sad."]
    monkeypatch.setattr(label, "sample_completions", lambda models, rows, *_: [better] * len(rows))
    output = type_in("--by {0}/judge.pt --models a")
    rows = rows_of(folder / "comparisons.jsonl")
    assert 0 < len(rows) <= prompts and {row["labeler"] for row in rows} == {f"{folder}/judge.pt"}
    same = untied = 0
    task = {row["prompt"]: row for row in rows_of(folder / "rm_prompts.jsonl")}
    for row in rows:
        gold = [sum(fable.gold(task[row["prompt"]], text).values()) for text in better]
        for i, j in ((0, 1), (0, 2), (1, 2)):
            product_ = (gold[i] - gold[j]) * (row["ranks"][j] - row["ranks"][i])
            same, untied = same + (product_ > 0), untied + (product_ != 0)
    found = re.search(r"gold: agree on (\S+) of (\d+) untied pairs", output)
    assert found and found.groups() == (f"{same / untied:.1%}", str(untied))


def test_a_policy_cannot_be_the_judge(folder, type_in):
    with pytest.raises(SystemExit, match="a.pt holds a GPT, where a ScalarModel is needed"):
        type_in("--by {0}/a.pt --models a")


def test_agreement_of_each_two_labelers(folder, type_in):
    """anna and ben share two rankings, 3 + 2 untied pairs, 2 + 2 alike; carla only one with ben."""
    def by(name: str, i: int, ranks: list[int]) -> dict:
        return {**asked(4, list("xyz"))[i], "ranks": ranks, "labeler": name}

    write_rows(folder / "all.jsonl", [
        by("anna", 0, [0, 1, 2]), by("ben", 0, [1, 0, 2]), by("anna", 1, [0, 1, 2]),
        by("ben", 1, [0, 0, 1]), by("ben", 2, [0, 1, 2]), by("carla", 2, [2, 1, 0]),
        by("anna", 3, [0, 1, 2]),
    ])
    lines = type_in("--agreement {0}/all.jsonl").splitlines()
    assert lines == [
        "anna and ben: agree on 80.0% of 5 untied pairs, rankings in common: 2",
        "ben and carla: agree on 0.0% of 3 untied pairs, rankings in common: 1",
        "all: agree on 50.0% of 8 untied pairs, rankings in common: 3",
    ]
    write_rows(folder / "one.jsonl", [by("anna", 0, [0, 1, 2])])
    assert "nobody else" in type_in("--agreement {0}/one.jsonl")


# ---- the command -------------------------------------------------------------------------------

def test_scripted_labelers_do_not_write_over_peoples_work(folder, type_in):
    type_in("--by anna --models a --k_max 4", "1 2 3 4", "quit")
    before = (folder / "comparisons.jsonl").read_bytes()
    with pytest.raises(SystemExit, match=r"has answers by people or models \(1\): move it first"):
        type_in("")
    assert (folder / "comparisons.jsonl").read_bytes() == before


@pytest.mark.parametrize("flags, sentence", [
    ("--by anna --models a --k_min 5 --k_max 4", "k_min 5 and k_max 4: at least 2"),
    ("--by anna --models a --k_min 1", "k_min 1 and k_max 9: at least 2"),
    ("--by anna --models zebra", "zebra.pt is not there"),
    ("--by anna --models a --prompts {0}/none.jsonl", "none.jsonl cannot be read"),
    ("--blind a b --by {0}/judge.pt", "name of a person is needed"),
    ("--blind a,b a", "two models are compared"),
    ("--blind a judge", "judge.pt holds a ScalarModel"),
    ("--agreement {0}/none.jsonl", "none.jsonl cannot be read"),
    ("--agreement {0}/prompts.jsonl", "line 1: completions should be a list of at least two"),
])
def test_a_mistake_is_one_sentence(folder, type_in, flags, sentence):
    with pytest.raises(SystemExit, match=re.escape(sentence)):
        type_in(flags, "1 2 3 4")


def test_some_rows_with_completions_are_a_mistake(folder, type_in):
    write_rows(folder / "these.jsonl", [*asked(1), {"prompt": "x"}])
    with pytest.raises(SystemExit, match="in every row or in none, not in 1 of 2"):
        type_in("--by anna --prompts {0}/these.jsonl")

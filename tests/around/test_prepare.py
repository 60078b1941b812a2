"""prepare.py: each kind of row that people bring is understood as a whole or refused by name."""

import gzip
import json
import re
import shlex
import subprocess
import sys
from collections import Counter
from contextlib import suppress
from pathlib import Path
from random import Random
from types import SimpleNamespace

import pytest
import torch
from conftest import write_vocabulary
from data import prepare
from data.files import EOT, get_tokenizer, read_comparisons, read_jsonl

NOTHING = SimpleNamespace(ignore=set(), lang="en")

@pytest.fixture
def data(tmp_path) -> Path:
    return write_vocabulary(tmp_path / "data")

def write(path: Path, rows: list) -> Path:
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return path

def both(data: Path, kind: str) -> list[dict]:
    return read_jsonl(data / f"{kind}.jsonl") + read_jsonl(data / f"{kind}_valid.jsonl")

def run(*words, data: Path) -> None:
    prepare.main([*map(str, words), "--data", str(data)])

def refusal(*words, data: Path) -> str:
    """The sentence with which prepare.py ends; it must not have written anything."""
    before = {path: path.read_bytes() for path in data.glob("*.*") if path.is_file()}
    with pytest.raises(SystemExit) as end:
        run(*words, data=data)
    assert {path: path.read_bytes() for path in data.glob("*.*") if path.is_file()} == before
    assert isinstance(end.value.code, str) and "\n" not in end.value.code
    return end.value.code

def user(text, **more) -> dict:
    return {"role": "user", "content": text, **more}

def bot(text, **more) -> dict:
    return {"role": "assistant", "content": text, **more}

def said(*turns: str) -> str:
    """Alternating turns, the user first, as a prompt."""
    speakers = ["Human", "Assistant"] * len(turns)
    text = "".join(f"\n\n{who}: {turn}" for who, turn in zip(speakers, turns))
    return text + "\n\nAssistant:"

WHY = "Why is ice slippery?"
MELT = said(WHY)
FILM, COLD = "A film of water.", "It is cold."
SECOND = said(WHY, FILM, "Always?")
LONGER = [user(WHY), bot(FILM), user("Always?")]
ENDED = [*LONGER, bot("No.")]
Q = {"prompt": WHY}
DEMO = {"prompt": MELT, "completion": FILM}
AB = {"prompt": WHY, "completions": ["a", "b"]}
ABC = {"prompt": WHY, "completions": ["a", "b", "c"]}
SHARE = [{"from": "human", "value": WHY}, {"from": "gpt", "value": FILM}]

def demo(prompt=MELT, text=FILM, **more) -> list:
    return [("sft", {"prompt": prompt, "completion": f" {text}", **more})]

def pair(prompt=MELT, texts=(FILM, COLD), ranks=(0, 1), **more) -> list:
    row = {"prompt": prompt, "completions": [f" {text}" for text in texts], "ranks": [*ranks]}
    return [("comparisons", row | more)]

READ = [(row, found) for found, rows in (
    (demo(), [{**Q, "completion": FILM}, DEMO, {"conversations": SHARE},
     {"prompt": MELT + " \n", "completion": f"\n{FILM}\r\n"}, {**DEMO, "text": "", "messages": []},
     *({"prompt": MELT.replace("\n\n", gap), "completion": FILM} for gap in ("\r\n", "\n", " ")),
     {"prompt": f"\n\nHuman: {WHY}\nAssistant:", "completion": FILM},
     {"prompt": f"Human:{WHY}", "completion": f"Assistant: {FILM}"},
     {"prompt": [user(WHY)], "completion": [bot(FILM)]},
     {"messages": [user(f" {WHY}\n", tool_calls=None), bot(f"{FILM}  ", name="")]},
     {"conversations": [user(WHY), bot(FILM)], **Q},
     {"instruction": WHY, "input": None, "output": FILM, "prompt": WHY},
     *({**DEMO, "label": yes} for yes in (True, 1, 1.0, "true", "Yes", "1", None))]),
    (demo(SECOND, "No."), [
     *({"prompt": SECOND.replace("\n\n", gap), "completion": "No."} for gap in ("\n", " ")),
     {"prompt": SECOND.removesuffix("\n\nAssistant:"), "completion": "No."},
     {**Q, "completion": SECOND + " No."}, {"messages": LONGER, "completion": "No."},
     *({"messages": ENDED, "prompt": prompt} for prompt in (None, WHY, SECOND + "\n", LONGER))]),
    ([], [Q, {"messages": LONGER}, {**Q, "completion": None, "messages": None, "extra": None},
     *({**DEMO, "label": no} for no in (False, 0, 0.0, "FALSE", "no", "0", -1))]),
    (pair(), [{**Q, "chosen": f" {FILM}\n", "rejected": COLD},
     {"chosen": f"Human: {WHY}\nAssistant: {FILM}", "rejected": f"{MELT} {COLD}"},
     {"chosen": [user(WHY), bot(FILM)], "rejected": [user(WHY), bot(COLD)]},
     {**Q, "completions": [FILM, COLD], "ranks": None}]),
    (pair(SECOND, ("No.", "Yes.")), [{**Q, "chosen": ENDED, "rejected": [*LONGER, bot("Yes.")]},
     {"prompt": LONGER, "chosen": [bot("No.")], "rejected": "Yes."}]),
    (demo() + pair(), [{"messages": [user(WHY), bot(FILM)], "chosen": FILM, "rejected": COLD},
     {"instruction": WHY, "input": "", "output": FILM, "chosen": FILM, "rejected": COLD}]),
    (demo(said(f'Say "Human: hi" to {EOT}')), [
     {"prompt": f'Say "Human: hi" to {EOT}', "completion": FILM}]),
    (demo(said("a\n\n  b"), "x\nHuman: y"), [
     {"prompt": "  a\n\n  b ", "completion": "x\nHuman: y"},
     {"messages": [user("a\n\n  b"), bot("x\nHuman: y")]},
     {"completion": said("a\n\n  b") + " x\nHuman: y"}]),
    (demo(labeler="ann", task="qa", source="us", round=2, wants=[1]), [
     DEMO | {"labeler": "ann", "task": "qa", "source": "us", "round": 2, "wants": [1]}]),
    (demo(f"\n\nSystem: Be brief.{MELT}"), [
     {"messages": [{"role": "system", "content": "Be brief."}, user(WHY), bot(FILM)], **Q},
     {"prompt": f"System: Be brief.{MELT}", "completion": FILM}]),
    (demo(MELT[:-12] + "\n\nSystem: Be brief." + said("And?")), [
     {"prompt": f"Human: {WHY}\nSystem: Be brief.\nHuman: And?", "completion": FILM}]),
    (demo(f"\n\nAssistant: Hello!{MELT}"), [
     {"conversations": [{"from": "gpt", "value": "Hello!"}, *SHARE], **Q}]),
    (pair(labeler="ann"), [
     {"messages": [user(WHY)], "chosen": FILM, "rejected": COLD, "labeler": "ann"}]),
    (pair(texts="abc", ranks=[2, 0, 2]), [{**ABC, "ranks": [2, 0, 2]}]),
    (pair(texts="abc", ranks=[1, 0, 1]), [{**ABC, "scores": [0.5, 3, 0.5]}]),
    (pair(texts="ab", ranks=[0, 0]), [{**AB, "scores": [7, 7.0]}]),
    (demo(said("Translate.\ngato"), "cat"), [
     {"instruction": "Translate.", "input": "gato", "output": "cat"}]),
    ([("pretrain", {"text": f"One.{EOT}Two."})], [{"text": f"One.{EOT}Two.", "messages": []}]),
) for row in rows]

@pytest.mark.parametrize("row, found", READ)
def test_rows_that_are_understood(row, found):
    """Every row that is not a document gives its prompt, too; the row itself is not changed."""
    before = json.dumps(row)
    got = prepare.mine(row, NOTHING, Counter())
    assert json.dumps(row) == before
    if not row.get("text"):
        kind, prompt = got.pop()
        assert kind == "prompts" and prompt["prompt"].endswith("\n\nAssistant:")
        assert not found or prompt["prompt"] == found[0][1]["prompt"]
    assert got == found

def test_pages_of_empty_lines_are_read_at_once():
    text = "a" + " \n" * 20_000 + "b"
    row = {"prompt": f"Human: {text}", "completion": text}
    assert prepare.mine(row, NOTHING, Counter())[:1] == demo(said(text), text)

REFUSED = [(row, named) for named, rows in {
    **{name: [{**DEMO, name: "x"}] for name in ("system", "context", "system_prompt", "tools",
       "history", "question", "id", "score_chosen", "rejected_response", "better", "time")},
    "choices": [{**DEMO, "choices": ["A"]}], "n ": [{**DEMO, "n": 0}],
    "input": [{**Q, "input": "x", "output": FILM}, {"input": WHY, "output": FILM},
              {"instruction": WHY, "input": 5}, {**DEMO, "input": 0}],
    r"messages\[1\]: unknown field 'tool_calls'": [
        {"messages": [user(WHY), bot("", tool_calls=[{"f": 1}])]}],
    "'Prompt', which .*: --ignore Prompt,id": [{"Prompt": WHY, "id": 1, "completion": FILM}],
    "'(n n){19}n , .*: --ignore '(n n){60}' ": [{**DEMO, "n n" * 999: 1}],
    "not hold": [{**DEMO, "wants": float("nan")}, {"prompt": "\ud800"}],
    "text": [{"text": "Once.", **Q}, {"text": "Once.", "source": "web"}, {"text": ["Once."]},
             {"text": " \n"}, {"text": EOT}],
    "beside instruction, output: --ignore text": [{"instruction": WHY, "output": "a", "text": "x"}],
    "end with a turn of the user, not": [
        {"messages": [user(WHY), bot("a"), bot("b")]}, {"prompt": LONGER[:2], "completion": "x"}],
    "beside a completion": [{**Q, "completion": None, "label": True}],
    "row should be an object": ["a", ["a"], 5, None],
    # a prompt that does not agree, or is not there; a blank
    "prompt": [
        {"messages": ENDED, "prompt": "Always?"}, {"messages": ENDED, "prompt": "Be brief."},
        {"prompt": COLD, "chosen": f"{MELT} a", "rejected": f"{MELT} b"}, {"completion": FILM},
        {"prompt": f"{MELT} {FILM}"}, {"messages": [bot("Hello!")]}, {}, [DEMO],
        {"messages": [{"role": "system", "content": "x"}]},
        {"prompt": f"User: {WHY}\nAssistant:", "completion": FILM},
        *({"prompt": blank, "completion": FILM} for blank in (
            "", " \n", "\n\nHuman: \n\nAssistant:", "Human:", " Assistant:", [user(" ")]))],
    "instruction": [{**Q, "instruction": COLD, "output": FILM}, {"instruction": [WHY]}],
    "conversations": [{"messages": [user(WHY)], "conversations": [user(COLD)]}],
    "answer": [{"messages": [user(WHY), bot(FILM)], "completion": COLD}],
    "blank": [{"messages": [user(WHY), bot(""), user("?"), bot("b")]}, {**Q, "completion": " "},
              {"messages": [user(WHY), bot(" ")]}],
    # who has the last word, where dialogues part, turns inside a turn
    "chosen": [{"chosen": [user(WHY), bot("a"), user("Thanks")], "rejected": f"{MELT} b"},
               {**Q, "rejected": "a"}, {**Q, "chosen": bot("a"), "rejected": "b"}],
    "rejected": [{"chosen": f"{MELT} a", "rejected": f"{MELT} b\n\nHuman: No!"},
                 {"chosen": f"{said('a', 'b', 'c')} d", "rejected": f"{said('a', 'x', 'c')} d"},
                 {**Q, "chosen": "a b", "rejected": " a\r\n b "}, {**Q, "chosen": "a"}],
    "completion": [{**Q, "completion": [user(WHY)]}, {"completion": f"{MELT} Human: I am you."},
                   {**Q, "completion": f"{FILM}\n\nHuman: And?"}],
    "messages": [{"messages": [user(f"{WHY}\n\nAssistant: x"), bot(FILM)]}, {"messages": WHY},
                 {"messages": [user(f"Human: {WHY}\n\nAssistant:"), bot(FILM)]},
                 {"messages": [user(f"{WHY}\n\nSystem: x"), bot(FILM)]}],
    # messages that have become a text, as in a CSV file
    "not their text": [{**Q, "completion": str([bot(FILM)])}, {"prompt": str(LONGER[:1])},
                       {**Q, "chosen": json.dumps([bot("a")]), "rejected": "b"}],
    "label": [*({**DEMO, "label": odd} for odd in (2, 0.5, "maybe", "", [1], "none")),
              {**Q, "label": 1}, {**Q, "chosen": "a", "rejected": "b", "label": 1}],
    "completions": [{**AB, "chosen": "a", "rejected": "b"}, *({**Q, "completions": odd} for odd in (
        [], ["a"], "ab", ["a", "b", "a "], [{"text": "a"}, {"text": "b"}], [1, 2]))],
    "ranks": [{**Q, "ranks": [0, 1]}, *({**AB, "ranks": odd} for odd in (
        [0], [0, True], [0, "1"], [0, 1.5], [0, -1], 3, [0, None]))],
    "scores": [{**AB, "ranks": [0, 1], "scores": [1, 0]}, *({**AB, "scores": odd} for odd in (
        [1], [1, "2"], [True, 1], 3, [1, None]))],
    "'a'": [{**Q, "completion": ["a", "b"]}, {"prompt": ["a"]}, {"messages": ["a"]}],
    "not 5": [{"prompt": 5}, 5], "user": [{"messages": [user(None)]}],
    "tool": [{"messages": [{"role": "tool", "content": "x"}]}],
    "type": [{"messages": [user([{"type": "text"}])]}], "labeler": [{**DEMO, "labeler": 7}],
    "round": [{**DEMO, "round": True}], "value": [{"messages": [user(WHY, value="x")]}],
}.items() for row in rows]

@pytest.mark.parametrize("row, named", REFUSED)
def test_rows_that_are_refused_by_file_line_and_name(row, named, data, tmp_path):
    path = write(tmp_path / "rows.jsonl", [DEMO, row])
    sentence = refusal("mine", path, data=data)
    assert f"{path}, line 2: " in sentence and re.search(named, sentence.split("line 2: ")[1])
    assert len(sentence) < 500 and sentence.isascii()

def test_ignored_fields_and_rows_left_out_are_counted(data, tmp_path, capsys):
    rows = [{"prompt": f"Q{i}", "completion": "A", "": i, "id": i, "note": None} for i in range(40)]
    rows.append({"messages": [user("Q", name="me"), bot("A", name="you")]})
    rows += [row for row, _ in REFUSED]
    path = write(tmp_path / "rows.jsonl", rows)
    assert f"({len(rows)} refused, so" in refusal("mine", path, data=data)
    run("mine", path, "--ignore", "id,name,note,", "--skip-bad", data=data)
    out = capsys.readouterr().out
    assert f": 42 rows used, {len(rows) - 42} refused" in out and len(both(data, "sft")) == 42
    assert "41 fields id" in out and "2 fields name ignored" in out and "fields note" not in out

ROWS = [{"prompt": f"Q{i}", "completion": f"A{i}"} for i in range(30)]
LINES = list(map(json.dumps, ROWS))

@pytest.mark.parametrize("name, content", [
    ("list.json", json.dumps(ROWS)), ("list.jsonl", json.dumps(ROWS, indent=1)),
    ("lines.json", "\n\n".join(LINES)), ("windows.jsonl", "\r\n".join(LINES)),
    ("x", "\n".join(LINES))])
def test_files_of_rows_that_are_read(name, content, data, tmp_path):
    (tmp_path / name).write_bytes(content.encode())
    (tmp_path / f"{name}.gz").write_bytes(gzip.compress(content.encode()))
    for path in (tmp_path / name, tmp_path / f"{name}.gz"):
        run("mine", path, data / ".." / path.name, data=data)  # named twice, it is read once
        assert len(both(data, "sft")) == len(both(data, "prompts")) == 30

@pytest.mark.parametrize("name, content, named", [
    ("t.csv", b"prompt,completion\nq,a\n", "CSV"), ("t.bin", b"PAR1xxPAR1", "parquet"),
    ("t.jsonl", json.dumps(ROWS[0]).encode("utf-16"), "UTF-16"), ("t", b"ARROW1\0", ""),
    ("t.json", json.dumps({"names": [{}], "data": ROWS}, indent=1).encode(), "data"),
    ("t.jsonl", json.dumps({"train": ROWS}).encode(), "train")])
def test_other_formats_are_named_with_what_converts_them(name, content, named, data, tmp_path):
    path = tmp_path / f"anna's {name}"
    path.write_bytes(content)
    sentence = refusal("mine", path, data=data)
    assert named in sentence and str(path) in sentence and "JSON Lines" in sentence
    code = re.search("python -c (.*) > rows", sentence)
    assert bool(code) == bool(named)
    if named not in ("", "parquet"):
        words = [sys.executable, "-c", *shlex.split(code[1])]
        made = subprocess.run(words, capture_output=True, check=True)
        assert prepare.mine(json.loads(made.stdout.splitlines()[0]), NOTHING, Counter())

@pytest.mark.parametrize("name, content, named", [
    ("bad.json", b'[{"prompt": "Q"}, {"prompt": NaN}]', "item 2: 'prompt' should not hold NaN"),
    ("twice.json", b'[{"prompt": "Q", "prompt": "R"}]', "'prompt' should be there once"),
    ("texts.json", b'["Once.", "Twice."]', "item 1: a row should be an object"),
    ("comma.json", b'[\n {"prompt": "Q"}\n {"prompt": "R"}\n]', "',' delimiter: line 3"),
    ("lists.jsonl", b'["Q", "A"]\n["Q", "A"]', "Extra data: line 2"),
    ("rows.txt", b'{"prompt": "Q"}\n{', ".jsonl"), ("rows.md", b'[\n {"prompt"', "name it .jsonl"),
    ("data/x.jsonl", b'{"prompt": "Q"}\n{"prompt": "R"}', "move it, or pass another --data"),
    ("x", b'\xef\xbb\xbf{"prompt": "Q"}\r\n\r\n{"prompt": "Q"', "x, line 3: not JSON"),
    ("x", b'{"prompt": "Q"}\n' + b"[" * 9**5, "x, line 2: "), ("y", b'{"prompt": "Q"}', "nothing")])
def test_files_that_cannot_be_used(name, content, named, data, tmp_path):
    (tmp_path / name).write_bytes(content)
    assert named in refusal("mine", tmp_path / name, data=data)

@pytest.mark.parametrize("words, named", [
    ("mine x --valid 1.5", "--valid"), ("mine x --valid nan", "--valid"), ("mine", "needs files"),
    ("fable --scale 0", "--scale"), ("fable --scale nan", "--scale"), ("fable x", "no files")])
def test_flags_that_make_no_sense(words, named, data, capsys):
    with pytest.raises(SystemExit, match="2"):
        run(*words.split(), data=data)
    assert named in capsys.readouterr().err.splitlines()[-1]

def test_what_begins_alike_stays_on_one_side(data, tmp_path):
    """Even with a greeting before it, a second turn behind it, or another kind of row."""
    rows = []
    for i in range(400):
        hello = [bot("Hello!")] if i % 3 == 0 else []
        rows.append({"messages": [*hello, user(f"Q{i % 350}"), bot(f"A{i}")]})
        rows.append({"prompt": said(f"Q{i}", "A", "And?"), "chosen": "a", "rejected": "b"})
    held = {}
    for seed, count in ((1, 800), (2, 800), (2, 400)):
        run("mine", write(tmp_path / "rows.jsonl", rows[:count]), "--seed", seed, data=data)
        train, valid = (set(re.findall(r"Q\d+", (data / name).read_text()))
                        for name in ("prompts.jsonl", "prompts_valid.jsonl"))
        assert not train & valid and len(train | valid) == count / 2
        held[seed, count] = valid
    assert held[1, 800] != held[2, 800] and 8 < len(held[1, 800]) < 40
    assert held[2, 400] == {key for key in held[2, 800] if int(key[1:]) < 200}

def test_files_are_held_out_by_name(data, tmp_path, capsys):
    """And so are rows of other files that begin like one of theirs."""
    folder = tmp_path / "own"
    (folder / ".cache").mkdir(parents=True)
    for name, first, count in (("train", 0, 30), ("my-test", 25, 15), ("README_contest", 90, 1)):
        rows = [{"prompt": f"Q{first + i}", "completion": name} for i in range(count)]
        write(folder / f"{name}.jsonl", rows)
    for name in ("README.md", "LICENSE", ".cache/x.metadata"):
        (folder / name).write_text("Not a row.")
    run("mine", folder, "--valid", "0.5", data=data)
    assert len(read_jsonl(data / "sft.jsonl")) == 25 + 1
    assert len(read_jsonl(data / "sft_valid.jsonl")) == 15 + 5
    out = capsys.readouterr().out
    assert "my-test.jsonl (held out): 15 rows" in out and "README_contest.jsonl: 1 rows" in out
    (folder / "test").mkdir()
    (folder / "my-test.jsonl").rename(folder / "test/my.jsonl")
    run("mine", folder, data=data)
    assert "my.jsonl (held out): 15 rows" in capsys.readouterr().out
    (folder / "test/my.jsonl").rename(folder / "my-test.jsonl")
    run("mine", folder / "my-test.jsonl", data=data)  # alone, it is trained on
    assert len(both(data, "sft")) == 15 and len(read_jsonl(data / "sft.jsonl")) > 10

def test_hh_holds_the_test_part_of_a_folder_out_and_can_be_read_again(data, tmp_path, capsys):
    """Pairs that cannot be used are left out and counted."""
    pairs = []
    for i in range(20):
        prompt = said(f"Q{i}\nAssistant: is quoted", "Yes\n\n  and", "no")
        pairs.append({"chosen": f"{prompt} Yes.\nHuman: x", "rejected": f"{prompt} No."})
    pairs.append({"chosen": f"{MELT} Same.", "rejected": f"{MELT}  Same. "})
    folder = tmp_path / "helpful-base"
    folder.mkdir()
    write(folder / "train.jsonl", pairs[5:])
    packed = write(tmp_path / "test", pairs[:5]).read_bytes()
    (folder / "test.jsonl.gz").write_bytes(gzip.compress(packed))
    run("hh", folder, data=data)
    assert len(read_jsonl(data / "comparisons.jsonl")) == 15
    assert len(read_jsonl(data / "comparisons_valid.jsonl")) == 5
    assert "15 rows used, 1 refused" in capsys.readouterr().out
    row = read_jsonl(data / "sft.jsonl")[3]
    assert row == {"prompt": prompt.replace("19", "8"), "completion": " Yes.\nHuman: x"}
    found = {name: both(data, name) for name in ("sft", "comparisons", "prompts")}
    copies = [write(tmp_path / name, rows) for name, rows in found.items()]
    run("mine", *copies, data=data)
    for name, rows in found.items():
        assert sorted(map(json.dumps, both(data, name))) == sorted(map(json.dumps, rows))

def test_one_odd_row_never_makes_a_data_set_unusable(data, tmp_path, capsys):
    for row in ({"prompt": "R", "chosen": "a", "rejected": "b"}, {"messages": [user("Just this")]},
                {"text": "Text."}, {"prompt": "T", "completions": ["a", "b"], "ranks": [0, 0]}):
        run("mine", write(tmp_path / "rows.jsonl", [*ROWS, row]), data=data)
        assert len(both(data, "sft")) == 30 + ("chosen" in row)
        assert len(both(data, "prompts")) == 30 + ("text" not in row)
        assert not (data / "comparisons.jsonl").exists() and not (data / "pretrain.txt").exists()
        out = capsys.readouterr().out
        assert ("some have to be trained on" in out) == ("chosen" in row or "text" in row)
        assert ("1 rankings left out: all answers are tied" in out) == ("ranks" in row)

def test_pairs_alone_are_enough_for_all_stages(data, tmp_path, capsys):
    """The best answers are demonstrations, all prompts are prompts."""
    rows = [{"prompt": f"Q{i}", "completions": ["a", "b", "c"], "ranks": [1, 0, 0]}
            for i in range(30)]
    rows += [{"prompt": "blank", "completions": ["", "e"]}, {"prompt": "Q1", "completion": "d"}]
    for better, worse in ("bx", "xy", "by"):  # c and b are unbeaten still; a second b is none more
        rows.append({"prompt": "Q2", "chosen": better, "rejected": worse})
    path = write(tmp_path / "my pairs.jsonl", rows)
    run("--valid", "0.1", "mine", path, "--seed", 3, data=data)
    assert len(both(data, "comparisons")) == 34 and len(both(data, "sft")) == 29 * 2 + 1
    assert {row["completion"] for row in both(data, "sft")} == {" b", " c", " d"}
    assert read_comparisons(data / "comparisons_valid.jsonl", get_tokenizer(data), 200)
    assert (data / "rm_prompts.jsonl").read_bytes() == (data / "prompts.jsonl").read_bytes()
    out = capsys.readouterr().out
    assert re.search(r"\d\d rankings of 3 answers, \d\d with ties", out)
    feedback = shlex.quote(f"mine --valid 0.1 '{path}'")
    assert f"FEEDBACK={feedback} OUT={data.parent} SEED=3 ./train.sh gpt2" in out

def test_nothing_that_people_have_added_is_overwritten(data, tmp_path, capsys):
    """Its own rows prepare.py may write again; of files that it leaves alone it says so."""
    path = write(tmp_path / "rows.jsonl", ROWS)
    write(data / "comparisons.jsonl", [{"prompt": "of another data set"}])
    (data / "pretrain.txt").write_text("Another text.")
    for _ in range(2):
        run("mine", path, data=data)
        out = capsys.readouterr().out
        for name in ("comparisons.jsonl", "pretrain.txt", "tokenizer.tiktoken"):
            assert out.count(f"{name} is not of these rows, and stays as it was") == 1
    before = (data / "sft_valid.jsonl").read_text()
    (data / "sft_valid.jsonl").write_text(before + '{"prompt": "a", "time": "2026-01-01"}\n')
    assert "sft_valid.jsonl has answers" in refusal("mine", path, data=data)

def node(text, *replies, role="prompter", **more) -> dict:
    return {"text": text, "role": role, "lang": "en", "replies": list(replies)} | more

def answer(text, *replies, **more) -> dict:
    return node(text, *replies, role="assistant", **more)

def read_tree(*replies, lang="en"):
    seen = Counter()
    tree = {"prompt": node("How?", *replies)}
    return prepare.oasst(tree, SimpleNamespace(ignore=set(), lang=lang), seen), seen

def test_oasst_trees_become_prompts_rankings_and_demonstrations():
    found, seen = read_tree(answer(" So.", node("Why?", answer("Because.")), rank=1),
                            answer("Thus.", rank=0), answer("Deleted.", node("x"), deleted=True),
                            answer("Si.", lang="es", rank=2), answer("Bad.", review_result=False))
    how, why = said("How?"), said("How?", "So.", "Why?")
    assert found == [*pair(how, ("So.", "Thus."), (1, 0)), ("prompts", {"prompt": how}),
                     *demo(why, "Because."), ("prompts", {"prompt": why})]
    assert seen["messages deleted, failed in review, blank or not in en"] == 3
    found, seen = read_tree(answer("So.", rank=0), answer("Thus."))
    assert found == [("prompts", {"prompt": how})] and "not fully ranked" in str(seen)
    with pytest.raises(ValueError, match="message"):
        read_tree(lang="es")
    for odd in ({"text": 5}, {"role": "x", "replies": [node("Q")]}, {"rank": "1"}):
        with pytest.raises(ValueError):
            read_tree(answer("So.", rank=0), answer("Thus.", rank=1) | odd)

def test_downloads_have_hashes_and_one_mirror(data, monkeypatch):
    asked = {}

    def download(address, path, hash_prefix):
        asked[address] = hash_prefix
        Path(path).write_text("")

    monkeypatch.setattr(torch.hub, "download_url_to_file", download)
    monkeypatch.setenv("HF_ENDPOINT", "https://mirror.example/")
    for name in ("oasst", "hh", "hh", "webtext"):
        prepare.sources(SimpleNamespace(files=[], name=name, data=data))
    assert len(asked) == 5
    for address, digest in asked.items():
        mirrored = address.startswith("https://mirror.example/datasets/")
        assert "webtext" in address or mirrored and re.fullmatch("[0-9a-f]{32}", digest)

def test_text_is_documents(data, tmp_path):
    texts = [f"[{i}] A document." for i in range(30)]
    rows = [{"text": text, "id": 1, "length": 2, "ended": True} for text in texts]
    (tmp_path / "x.txt").write_text(EOT.join(texts))
    for name, path in (("webtext", write(tmp_path / "x.test", rows)), ("mine", tmp_path / "x.txt")):
        run(name, path, data=data)
        both_sides = [(data / f"{name}.txt").read_text() for name in ("pretrain", "pretrain_valid")]
        assert all(both_sides) and sorted("".join(both_sides).split(EOT)) == ["", *sorted(texts)]

def strings(value) -> list[str]:
    if isinstance(value, dict):
        value = list(value.values())
    if isinstance(value, list):
        return [text for part in value for text in strings(part)]
    return [value] if isinstance(value, str) else []

def mutated(row: dict, rng: Random) -> dict:
    """With a field renamed, filled with something else, or added."""
    row = dict(row)
    if rng.random() < 0.2:
        return row
    field = rng.choice(list(row) or ["prompt"])
    other = rng.choice([field, *prepare.FIELDS, "system"])
    odd = [None, "", " ", 0, True, "more", ["m", "n"], {"x": "y"}, [user("u"), bot("b")], [bot("")]]
    row[other] = rng.choice([*odd, row.pop(field, "x"), "\n\nHuman: x"])
    return row

def test_no_string_of_an_accepted_row_is_lost():
    """Of 3,000 mutations of all rows that are read."""
    rng = Random(0)
    rows = [mutated(rng.choice(READ)[0], rng) for _ in range(3000)]
    used = 0
    for row in rows:
        with suppress(ValueError):
            found = prepare.mine(row, NOTHING, Counter())
            used += 1
            kept = re.sub(r"\s", "", "".join(strings([piece for _, piece in found])))
            if row.pop("label", None) is not None and len(found) == 1:
                continue  # labelled false: the answer is not used
            for text in strings(row):
                for turn in re.split("Human:|Assistant:|System:", text):
                    role = turn in ("user", "assistant", "system", "human", "gpt")
                    assert role or re.sub(r"\s", "", turn) in kept, (row, found)
    assert 500 < used < 2500

"""What goes wrong around the program: text from strangers, damaged files, a disk that is full."""

import errno
import gzip
import json
import os
import re
import shutil
import subprocess
import sys
import time
import tracemalloc
from collections import Counter
from pathlib import Path
from random import Random

import conftest
import numpy as np
import pytest
import torch
from conftest import ROOT, garbled, mutated, outcome
from data import answers, formats, gpt2, label, prepare
from data.formats import (
    EOT, UserError, encode, get_tokenizer, read_comparisons, read_demonstrations, read_pretraining,
    read_row, read_rows, replacing,
)

# ---- rows of strangers --------------------------------------------------------------------------

NEEDS = ("prompt",), ("prompt", "completion"), ("prompt", "completions", "ranks")
USER, ANSWER = {"role": "user", "content": "Q"}, {"role": "assistant", "content": "A"}
ROWS = [{"prompt": "A", "completion": "b", "labeler": "me", "round": 1},
        {"prompt": "A", "completions": ["b", "c", ""], "ranks": [0, 1, 1], "labeler": "me"},
        {"prompt": "A", "chosen": "b", "rejected": "c"}, {"messages": [USER, ANSWER]},
        {"messages": [USER], "completions": ["b", "c"]}, {"prompt": "A " * 50, "completion": " b"},
        {"prompt": "A", "completion": "b", "chosen": "c", "rejected": "d"}]


LONG = "A goat. " * 40
CASES = {  # lines: what is read (prompts), or the sentence; what is said on the way
    "empty completion": ([{"prompt": "A", "completion": ""}], 1, ["A"], ""),
    "prompt over the context": ([{"prompt": LONG, "completion": " b"},
        {"prompt": "A", "completion": " b"}], 1, ["A"], "1 of 2 rows are over 40 tokens, left out"),
    "completion over the context": ([{"prompt": "A", "completion": " b"},
        {"prompt": "B", "completion": LONG}], 1, ["A"], "1 of 2 rows are over 40 tokens, left out"),
    "one completion of a ranking over it": ([{"prompt": "A", "completions": ["b", LONG]},
        {"prompt": "B", "chosen": "b", "rejected": "c"}], 2, ["B"], "1 of 2 rows are over 40 tok"),
    "a long completion beside a prompt": ([{"prompt": "A", "completion": LONG}], 0, ["A"], ""),
    "all over it": ([{"prompt": LONG}], 0, " has no row of at most 40 tokens", "1 of 1 rows"),
    "nothing": ([], 0, " has no rows", ""),
    "one completion": ([{"prompt": "A", "completions": ["b"]}], 2,
        ", line 1: completions should be a list of at least two strings of valid Unicode, "
        'not ["b"]', ""),
    "one of its ranks of 400 digits": (
        [{"prompt": "A", "completions": ["b", "c"], "ranks": [0, 10**400]}], 2,
        ", line 1: ranks should be a list of whole numbers from 0 to 999, one for each completion, "
        f"not [0, 1{'0' * 52}...", ""),
    "1e999": ([{"prompt": "A", "x": 7}], 0,
        ", line 1: a number should be finite, not 1e999", ""),
    "a round that is none": ([{"prompt": "A", "round": "2"}], 0,
        ', line 1: round should be a whole number, not "2"', ""),
}


@pytest.mark.parametrize("name", CASES)
def test_odd_rows_are_read_or_refused_and_counted(name, tmp_path, tokenizer, capsys):
    rows, needs, read, said = CASES[name]
    path = tmp_path / "rows.jsonl"
    path.write_text("".join(json.dumps(row) + "\n" for row in rows).replace(": 7", ": 1e999"))
    found = outcome(lambda: read_rows(path, tokenizer, 40, *NEEDS[needs]))
    printed = capsys.readouterr().out
    assert printed.startswith(f"{path}: {said}") if said else not printed
    if isinstance(read, str):
        assert found == f"{path}{read}"
    else:
        assert [row["prompt"] for row in found] == read
        check_ids(found, NEEDS[needs], tokenizer)


def test_rankings_that_are_all_ties_are_counted(tmp_path, tokenizer, capsys):
    """They stay, as the loss skips them; a file of nothing else is refused."""
    path = tmp_path / "comparisons.jsonl"
    ties = json.dumps({"prompt": "A", "completions": ["b", "c"], "ranks": [1, 1]}) + "\n"
    path.write_text(ties * 2 + json.dumps({"prompt": "A", "chosen": "b", "rejected": "c"}))
    assert len(read_comparisons(path, tokenizer, 40)) == 3
    assert "2 of 3 rankings are all ties, which teach nothing\n" in capsys.readouterr().out
    path.write_text(ties * 2)
    with pytest.raises(UserError, match="has no ranking in which one completion is better"):
        read_comparisons(path, tokenizer, 40)


def test_a_demonstration_is_its_completion_whatever_else_it_has(tmp_path, tokenizer):
    path = tmp_path / "sft.jsonl"
    path.write_text('{"prompt": "A", "completion": " b", "chosen": " c", "rejected": " d"}')
    ((ids, prompt_len),) = read_demonstrations(path, tokenizer, 40)
    assert tokenizer.decode(ids[prompt_len:]) == f" b{EOT}"


def test_blank_lines_are_no_answers_and_no_mistakes(tmp_path):
    path = tmp_path / "sft.jsonl"
    path.write_text('{"prompt": "A"}\n\n  \n{"prompt": "B"}\n\n')
    assert [row["prompt"] for _, row in answers.read_lines(path, "prompt")] == ["A", "B"]


def test_gold_judges_all_prompts_or_none(tmp_path):
    with pytest.raises(UserError, match="wants should be in every row or in none, not in 1 of 2"):
        formats.gold_function([{"prompt": "A", "wants": {}}, {"prompt": "B"}], "data/fable.py")
    (tmp_path / "other.py").write_text("gold = None\n")
    for file in ("none.py", str(tmp_path / "other.py")):
        with pytest.raises(UserError, match=f"{file} should be a file that has gold"):
            formats.gold_function([{"prompt": "A", "wants": {}}], file)


def check_rows(path: Path, required: tuple, tokenizer, capsys) -> tuple[int, int, int]:
    """(rows used, left out, refused): all that are there, or none and the first bad line."""
    packed = path.suffix == ".gz"
    content = gzip.decompress(path.read_bytes()) if packed else path.read_bytes()
    lines = content.removeprefix(b"\xef\xbb\xbf").split(b"\n")
    numbers = [i for i, line in enumerate(lines) if line.strip()]
    bad = [i for i in numbers if isinstance(outcome(lambda: read_row(lines[i], "", required)), str)]
    capsys.readouterr()
    found = outcome(lambda: read_rows(path, tokenizer, 40, *required))
    said = re.search(r"(\d+) of (\d+) rows are over 40 tokens", capsys.readouterr().out)
    left_out = int(said[1]) if said else 0
    if bad:
        assert found.startswith(f"{path}, line {bad[0] + 1}: ")
    elif left_out == len(numbers):
        assert found == f"{path} has no row" + (" of at most 40 tokens" if numbers else "s")
    else:
        assert len(found) + left_out == len(numbers)
        check_ids(found, required, tokenizer)
    return (0, 0, len(numbers)) if bad else (len(numbers) - left_out, left_out, 0)


def check_ids(rows: list[dict], required: tuple, tokenizer) -> None:
    """They are those of the prompt, and of the completions that are required."""
    def text(ids: list[int]) -> str:
        return tokenizer.decode_bytes(ids).decode()

    for row in rows:
        assert text(row["prompt_ids"]) == row["prompt"] and len(row["prompt_ids"]) <= 40
        texts = [row[name] for name in required if name == "completion"]
        texts = row["completions"] if "completions" in required else texts
        assert [text(ids) for ids in row["ids"]] == [f"{row['prompt']}{x}{EOT}" for x in texts]
        assert all(len(ids) <= 40 for ids in row["ids"])
        assert "ranks" not in required or len(row["ranks"]) == len(row["ids"])


def fuzz_rows(count: int, path: Path, tokenizer, capsys) -> Counter:
    """Files of mutated lines, of those of them that can be read, and files garbled as a whole."""
    rng, totals = Random(0), Counter()
    while totals.total() < count:
        required = rng.choice(NEEDS)
        lines = [mutated(rng.choice(ROWS), rng) for _ in range(20)]
        good = [x for x in lines if isinstance(outcome(lambda: read_row(x, "", required)), dict)]
        for batch in (lines, good, good[:1]):
            content = rng.choice([b"\n", b"\r\n", b"\n \n"]).join([b"", *batch, b""])
            content = garbled(content, rng) if rng.random() < 0.3 else content
            content = rng.choice([b"", b"\xef\xbb\xbf"]) + content
            path.write_bytes(gzip.compress(content) if path.suffix == ".gz" else content)
            counts = check_rows(path, required, tokenizer, capsys)
            totals.update(dict(zip(("used", "left out", "refused"), counts)))
    return totals


@pytest.mark.parametrize("name", ["rows.jsonl", "rows.jsonl.gz"])
def test_mutated_rows_are_used_or_reported(name, tmp_path, tokenizer, capsys):
    totals = fuzz_rows(1000, tmp_path / name, tokenizer, capsys)
    assert totals["used"] > 100 and totals["left out"] > 10 and totals["refused"] > 300


@pytest.mark.slow
@pytest.mark.parametrize("name", ["rows.jsonl", "rows.jsonl.gz"])
def test_twenty_thousand_mutated_rows_are_used_or_reported(name, tmp_path, tokenizer, capsys):
    print(fuzz_rows(10_000, tmp_path / name, tokenizer, capsys))


# ---- damaged files -----------------------------------------------------------------------------

TEXT = f"The goat eats. {EOT}\r\n\0Grüße 🦉 {EOT}{EOT}" * 20


def read_vocabulary(path: Path, tokenizer) -> None:
    """What can be read encodes any text."""
    own = get_tokenizer(path.parent)
    assert own.decode(encode(own, TEXT)) == TEXT and own.eot_token == own.n_vocab - 1


def read_text_again(path: Path, tokenizer) -> None:
    """All documents, whatever stands in them."""
    path.with_suffix(".1024.npy").unlink(missing_ok=True)
    documents = read_pretraining(path, tokenizer)
    content = path.read_bytes()
    content = gzip.decompress(content) if content.startswith(b"\x1f\x8b") else content
    texts = content.removeprefix(b"\xef\xbb\xbf").decode().replace("\r\n", "\n").split(EOT)
    whole = [tokenizer.decode(ids[:-1].tolist()) for ids in documents]
    assert whole == [text for text in texts if text]
    assert all(ids[-1] == tokenizer.eot_token for ids in documents)


def read_kept(path: Path, tokenizer) -> None:
    """As many tokens as there were, none of which is beyond the vocabulary."""
    os.utime(path, (4e9, 4e9))
    documents = read_pretraining(path.with_name("pretrain.txt"), tokenizer)
    assert sum(map(len, documents)) == (path.stat().st_size - 128) / 2
    assert all(ids.max() < tokenizer.n_vocab for ids in documents)


def read_tensors(path: Path, tokenizer) -> None:
    """Every byte after the header is one of a tensor's."""
    tensors, header = gpt2.read_safetensors(path), int.from_bytes(path.read_bytes()[:8], "little")
    assert sum(x.nbytes for x in tensors.values()) == path.stat().st_size - 8 - header


def read_packed(path: Path, tokenizer) -> None:
    """All rows, as gzip has a checksum."""
    assert len(read_rows(path, tokenizer, 40, "prompt")) == 99


READERS = {"rows.jsonl.gz": read_packed, "tokenizer.tiktoken": read_vocabulary,
           "pretrain.txt": read_text_again, "pretrain.1024.npy": read_kept,
           "model.safetensors": read_tensors,
           "config.json": lambda path, _: gpt2.read_config(path)}


@pytest.fixture
def whole(tmp_path, tiny_data, tokenizer) -> Path:
    """A folder with a file of each kind."""
    (tmp_path / "rows.jsonl.gz").write_bytes(gzip.compress(b'{"prompt": "A"}\n' * 99))
    gpt2.save_gpt2(conftest.gpt(n_layer=1), tmp_path)
    (tmp_path / "pretrain.txt").write_text(TEXT, newline="")
    read_pretraining(tmp_path / "pretrain.txt", tokenizer)
    shutil.copy(tiny_data / "tokenizer.tiktoken", tmp_path)
    return tmp_path


def damage(content: bytes, name: str, rng: Random) -> bytes:
    """Garbled anywhere, or near the start, where headers are; the header of a safetensors file also
    as JSON, its length put right."""
    if name == "model.safetensors" and rng.random() < 0.5:
        end = 8 + int.from_bytes(content[:8], "little")
        header = mutated(json.loads(content[8:end]), rng)
        return len(header).to_bytes(8, "little") + header + content[end:]
    for _ in range(rng.choice([1, 1, 2])):
        start = rng.choice([100, 1000, len(content)])
        content = garbled(content[:start], rng) + content[start:]
    return content


@pytest.mark.parametrize("ids", [
    np.zeros(5, np.float16), np.zeros((5, 1), np.uint16), np.zeros(0, np.uint16),
    np.array([5, 1024], np.uint16), np.zeros(5, np.uint32)], ids=str)
def test_kept_tokens_that_are_not_ours_are_refused(ids, whole, tokenizer):
    """Other numbers, another shape, none, or beyond the vocabulary."""
    np.save(whole / "pretrain.1024.npy", ids)
    with pytest.raises(UserError, match="pretrain.1024.npy, .*damaged; delete it"):
        read_pretraining(whole / "pretrain.txt", tokenizer)


def fuzz_files(count: int, path: Path, tokenizer) -> Counter:
    """Each is read or refused, and in no more than 4 MB of memory."""
    rng, totals, content = Random(0), Counter(), path.read_bytes()
    for _ in range(count):
        path.write_bytes(damaged := damage(content, path.name, rng))
        tracemalloc.start()
        sentence = outcome(lambda: READERS[path.name](path, tokenizer))
        peak = tracemalloc.get_traced_memory()[1]
        tracemalloc.stop()
        assert peak < 2**22, damaged[:3000]
        refused = isinstance(sentence, str)
        totals["refused" if refused else "read"] += 1
        assert not refused or str(path) in sentence
    return totals


@pytest.mark.parametrize("name", READERS)
def test_damaged_files_are_read_or_refused(name, whole, tokenizer):
    totals = fuzz_files(60, whole / name, tokenizer)
    assert totals["refused"] > 10


@pytest.mark.slow
@pytest.mark.parametrize("name", READERS)
def test_two_thousand_damaged_files_are_read_or_refused(name, whole, tokenizer):
    print(name, fuzz_files(2000, whole / name, tokenizer))


# ---- writing -----------------------------------------------------------------------------------


def save(path: Path, tokenizer) -> None:
    """As checkpoints are."""
    with replacing(path) as file:
        torch.save({"a": torch.zeros(5000)}, file)


def keep_ids(path: Path, tokenizer) -> None:
    os.utime(path.with_name("pretrain.txt"), (4e9, 4e9))  # newer than what is kept of it
    read_pretraining(path.with_name("pretrain.txt"), tokenizer)


RANKING = {"prompt": "A", "completions": ["b" * 3000, "c"], "ranks": [0, 1]}
WRITERS = {  # the file: what writes it
    "sft.pt": save,
    "pretrain.1024.npy": keep_ids,
    "model.safetensors": lambda path, _: gpt2.save_gpt2(conftest.gpt(), path.parent),
    "comparisons.jsonl": lambda path, _: label.write_jsonl(path, [RANKING]),
    "answers.jsonl": lambda path, _: answers.add_rankings(path, [RANKING]),
    "prompts.jsonl": lambda path, _: prepare.write_files({path.name: "x" * 3000}, path.parent),
}


@pytest.fixture(params=WRITERS)
def write(request, tmp_path, tokenizer):
    """write() writes write.path, beside a text of 3,000 goats."""
    (tmp_path / "pretrain.txt").write_text(" goat" * 3000)
    path = tmp_path / request.param

    def write():
        WRITERS[request.param](path, tokenizer)

    write.path = path
    return write


def contents(folder: Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in folder.rglob("*") if path.is_file()}


def refused(write, *reasons: str) -> None:
    """In one sentence, and all files are what they were."""
    before = contents(write.path.parent)
    with pytest.raises(UserError) as error:
        write()
    assert str(error.value) in [f"{write.path} cannot be written: {x}" for x in reasons]
    assert contents(write.path.parent) == before


@pytest.mark.parametrize("size", [0, 1, 100, 2500])
def test_a_full_disk_leaves_what_was_there(write, size):
    """Wherever it happens; nothing is left of the new file, and with room it can be written."""
    for _ in range(2):
        with conftest.disk_full(size):
            refused(write, "File too large", "3001 requested and 1186 written")  # numpy's own
        write()
        assert not list(write.path.parent.glob("*.partial"))


@pytest.mark.parametrize("step", ["open", "fsync", "replace"])
def test_what_the_system_refuses_is_one_sentence(write, step, monkeypatch):
    """A folder that may not be written, a disk that fails when all seems to be written."""
    write()

    def refuse(*arguments, **more):
        raise OSError(errno.EACCES, "Permission denied")

    with monkeypatch.context() as patch:
        where = {"open": formats, "fsync": os, "replace": Path}[step]
        patch.setattr(where, step, refuse, raising=False)
        refused(write, "Permission denied")


@pytest.mark.parametrize("path, reason", [
    ("folder", "it is a folder"), ("file/x", "Not a directory"), ("file/y/x", "Not a directory"),
    ("x" * 300, "File name too long")])
def test_what_cannot_be_a_file_is_one_sentence(tmp_path, path, reason):
    (tmp_path / "folder").mkdir()
    (tmp_path / "file").write_text("before")
    with pytest.raises(UserError) as error, replacing(tmp_path / path):
        pytest.fail("nothing is to be written here")
    assert str(error.value) == f"{tmp_path / path} cannot be written: {reason}"
    assert contents(tmp_path) == {"file": b"before"}


def test_a_mistake_of_ours_is_not_taken_for_a_full_disk(tmp_path):
    """It passes, and what was there before stays all the same."""
    (tmp_path / "file").write_text("before")
    for mistake in (RuntimeError("CUDA error"), KeyError("x"), KeyboardInterrupt()):
        with pytest.raises(type(mistake)), replacing(tmp_path / "file") as file:
            file.write(b"after")
            raise mistake
    assert contents(tmp_path) == {"file": b"before"}


def test_files_are_written_all_or_none(tmp_path):
    """The last of them cannot be: a folder stands in its place."""
    prepare.write_files({"a": "one", "b": "one"}, tmp_path)
    (tmp_path / "c").mkdir()
    with pytest.raises(UserError, match="c cannot be written: it is a folder"):
        prepare.write_files({"a": "two", "b": "two", "c": "two"}, tmp_path)
    assert contents(tmp_path) == {"a": b"one", "b": b"one"}


KILLED = """
from pathlib import Path
from data.formats import replacing
for i in range(10**9):
    with replacing(Path({!r})) as file:
        for _ in range(30):
            file.write(b"%09d\\n" % i * 10_000)
    print(i, flush=True)
"""


def kill(path: Path, times: int) -> int:
    """The number of kills, at chance times, of what replaces a file all the time."""
    rng, command = Random(0), [sys.executable, "-c", KILLED.format(str(path))]
    for _ in range(times):
        process = subprocess.Popen(command, cwd=ROOT, stdout=subprocess.PIPE)
        process.stdout.readline()  # the first is there
        time.sleep(rng.random() / 20)
        process.kill()
        process.communicate()
        content = path.read_bytes()
        assert len(content) == 3_000_000 and content == content[:10] * 300_000
        for partial in path.parent.glob("*.partial"):
            partial.unlink()
    return times


def test_a_kill_while_a_file_is_replaced_leaves_a_whole_one(tmp_path):
    assert kill(tmp_path / "file", 2)


@pytest.mark.slow
def test_a_hundred_kills_leave_a_whole_file(tmp_path):
    assert kill(tmp_path / "file", 100)

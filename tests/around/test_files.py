"""data/files.py: each file is read or refused in one sentence, and no write loses the old one."""

import errno
import fcntl
import gzip
import hashlib
import os
import resource
import signal
from pathlib import Path
from unittest.mock import Mock

import pytest
import tiktoken
import torch
from conftest import BYTES, write_vocabulary
from data import files
from data.files import EOT, UserError

PAIR = '"prompt": "P", "completions": ["a", "b"]'
RANKS = "ranks should be a list with a whole number from 0 to 999 for each completion, not "
LINES = [  # each with its row, or with the sentence that refuses it
    ('  {"prompt": "P"}\r', {"prompt": "P"}),
    ('{"prompt": "P", "wants": {"a": [1.5, null]}}', {"prompt": "P", "wants": {"a": [1.5, None]}}),
    ('{"prompt": "P", "completion": null, "ranks": null, "task": null}', {"prompt": "P"}),
    ('{"prompt": "a\u2028b\u0085c"}', {"prompt": "a\u2028b\u0085c"}),
    (f'{{{PAIR}, "ranks": [9, 9]}}', dict(prompt="P", completions=["a", "b"], ranks=[9, 9])),
    ('{"prompt": null}', "prompt should be a non-empty string, not None"),
    ('{"prompt": ""}', "prompt should be a non-empty string, not ''"),
    ('{"prompt": ["\u202e"]}', "prompt should be a non-empty string, not ['\\u202e']"),
    ('{"prompt": "P", "completion": 1}', "completion should be a string, not 1"),
    ('{"prompt": "P", "completions": ["a", null]}', "strings, not ['a', None]"),
    ('{"prompt": "P", "ranks": [0, 1]}', RANKS + "[0, 1]"),
    (f'{{{PAIR}, "ranks": [0, 1000]}}', RANKS + "[0, 1000]"),
    ('{"prompt": "P"} {}', "not JSON: Extra data"),
    ('{"prompt": "P", "wants": {"a": 1, "a": 2}}', "the field 'a' should be there once"),
    ('{"prompt": "P", "x": {"\\udfff": 1}}', "'x' should not hold NaN, infinity or half a surro"),
    ('{"prompt": "P", "x": ' + "[" * 200_000, "recursion")]

@pytest.fixture
def tokenizer(tmp_path):
    return files.get_tokenizer(write_vocabulary(tmp_path, [*BYTES, b"ab"]))

@pytest.fixture
def path(tmp_path) -> Path:
    return tmp_path / "folder" / "rows.jsonl"

def refusal(action, *arguments) -> str:
    with pytest.raises(UserError) as error:
        action(*arguments)
    assert str(error.value).isprintable() and len(str(error.value)) < 400
    return str(error.value)

def write(path, content: bytes = b"new" * 1000):
    with files.replacing(path) as file:
        file.write(content)

def only(path, content: bytes) -> bool:
    return list(path.parent.iterdir()) == [path] and path.read_bytes() == content

@pytest.mark.parametrize("line, expected", LINES)
def test_a_line_is_a_row_or_a_sentence(path, line, expected):
    """Blank lines count, so that the number is the one that an editor shows."""
    write(path, b'{"prompt": "first"}\r\n \n\n' + line.encode())
    if isinstance(expected, dict):
        assert files.read_jsonl(path, "prompt") == [{"prompt": "first"}, expected]
    else:
        said = refusal(files.read_jsonl, path, "prompt")
        assert said.startswith(f"{path}, line 4: ") and expected in said

def test_bytes_around_the_text(path):
    text = '{"prompt": "ä"}\n'.encode()
    for content in (text, b"\xef\xbb\xbf" + text, text[:-1] + b"\r\n", gzip.compress(text)):
        write(path, content)
        assert files.read_text(path) == text.decode()
        assert files.read_jsonl(path, "prompt") == [{"prompt": "ä"}]
        assert "completion should be a string" in refusal(files.read_jsonl, path, "completion")

def test_bytes_that_cannot_be_read(path):
    assert f"{path} cannot be read: [Errno 2] No such" in refusal(files.read_text, path)
    write(path, b'{"prompt": "P"}\n\n{"prompt": "\xe4"}\n')
    assert f"{path}, line 3: byte 0xe4 is not UTF-8" in refusal(files.read_jsonl, path)
    write(path, '{"prompt": "P"}'.encode("utf-16"))
    assert "line 1: byte 0xff" in refusal(files.read_text, path)
    packed = gzip.compress(b"x" * 1000)
    for content in (packed[:-9], packed[:12], packed[:10] + b"\xff\xff" + packed[12:]):
        write(path, content)
        assert f"{path} cannot be read: " in refusal(files.read_text, path)

def test_tokens_are_joined_and_not_text(path, tokenizer):
    rows = [{"prompt": "aba", "completion": "b"}, {"prompt": "ä", "completion": EOT}]
    files.write_jsonl(path, rows)
    assert "ä" in path.read_text()
    first, second = files.read_demonstrations(path, tokenizer, 99)
    assert first == ([256, ord("a"), ord("b"), tokenizer.eot_token], 2)
    assert second.ids.index(tokenizer.eot_token) == len(second.ids) - 1
    assert files.decode(tokenizer, second.ids[second.prompt_len:]) == EOT
    blanks = " " * 1_200_000 + "b"  # more than tiktoken's regular expression can take at once
    assert files.decode(tokenizer, files.encode(tokenizer, blanks)) == blanks

def test_long_rows_are_left_out_and_counted(path, tokenizer, capsys):
    texts = {"completion": "C", "completions": ["", "C"], "ranks": [0, 1]}
    files.write_jsonl(path, [texts | {"prompt": prompt} for prompt in ("PP", "PPP", "PPPP")])
    prompts = files.read_prompts(path, tokenizer, 3, "completion")
    assert [row["prompt_ids"] for row in prompts] == [[80, 80], [80, 80, 80]]
    assert "1 of 3 rows are over 3 tokens, left out" in capsys.readouterr().out
    assert len(files.read_demonstrations(path, tokenizer, 5)) == 2
    [ranking] = files.read_comparisons(path, tokenizer, 4)
    assert ranking == ([([80, 80, 257], 2), ([80, 80, 67, 257], 2)], [0, 1], "")
    for read in (files.read_prompts, files.read_demonstrations, files.read_comparisons):
        assert f"{path} has no row of at most 1 tokens" in refusal(read, path, tokenizer, 1)

def test_rankings_that_are_all_ties(path, tokenizer):
    tied = {"prompt": "P", "completions": ["a", "b"], "ranks": [3, 3], "labeler": "ann"}
    files.write_jsonl(path, [tied, tied | {"ranks": [1, 0]}])
    first, second = files.read_comparisons(path, tokenizer, 9)
    assert first[1:] == ([3, 3], "ann") and second.ranks == [1, 0]
    files.write_jsonl(path, [tied, tied])
    assert f"{path} has only ties" in refusal(files.read_comparisons, path, tokenizer, 9)

def test_the_vocabulary_of_a_folder(tmp_path, tokenizer, monkeypatch):
    path = tmp_path / "tokenizer.tiktoken"
    same = files.fingerprint(files.get_tokenizer(str(tmp_path)))
    assert files.fingerprint(tokenizer) == same and len(same) == 16
    write_vocabulary(tmp_path, [*BYTES, b"ba"])
    assert files.fingerprint(files.get_tokenizer(tmp_path)) != same
    lines = (write_vocabulary(tmp_path) / path.name).read_bytes()
    for content in (b"", b"\0" * 99, lines[:-9], lines + b"YQ== 256", lines + b"\n",
                    lines + b"YWI= 300", lines + b"YWI= x", lines + b"YW!I= 256"):
        write(path, content)
        assert f"{path}: each line should be a token" in refusal(files.get_tokenizer, tmp_path)
    path.unlink()
    monkeypatch.setattr(tiktoken, "get_encoding", Mock(side_effect=ConnectionError))
    assert f"as {path}" in refusal(files.get_tokenizer, tmp_path)
    said = refusal(files.get_tokenizer, tmp_path / "absent")
    assert "no folder" in said and "prepare.py" in said and "GPT" not in said

def test_documents(path, tokenizer):
    write(path, f"ab\n{EOT}\n{EOT}b{EOT}".encode())
    documents = files.read_documents(path, tokenizer)
    assert [ids.tolist() for ids in documents] == [[256, 10, 257], [98, 257]]
    write(path, EOT.encode())
    assert "has no text" in refusal(files.read_documents, path, tokenizer)

def test_functions_on_text():
    turns = [("system", "S"), ("user", "U"), ("assistant", "A"), ("user", "V")]
    prompt = files.render([{"role": role, "content": content} for role, content in turns])
    assert prompt == "\n\nSystem: S\n\nHuman: U\n\nAssistant: A\n\nHuman: V\n\nAssistant:"
    assert files.own_turn(" yes\n\nHuman: and\n\nHuman: so") == " yes"
    assert files.printable("a\tb\r\nc\u00a0\u2028ä🦉\x1b[2J\u202e\0") == "a b \nc  ä🦉[2J"

def test_gold_function(tmp_path, monkeypatch):
    monkeypatch.setattr(files, "__file__", str(tmp_path / "data" / "files.py"))
    rows = [{"wants": {}}, {"wants": {}}]
    path = tmp_path / "own.py"
    assert files.gold_function([{}, {}], "absent.py") is None
    assert "all rows or none, not in 2 of 3" in refusal(files.gold_function, [*rows, {}], "")
    for code, cause in (("", "KeyError('gold')"), ("gold = 1", "not callable"),
                        ("gold = lambda row, text: row['wants']['x']", "KeyError('x')")):
        path.write_text(code)
        said = refusal(files.gold_function, rows, path.name)
        assert cause in said and f"{path}: gold(row, comp" in said and "pass --gold" in said
    path.write_text("gold = lambda row, text: {'length': len(text)}")
    assert files.gold_function(rows, "own.py")({}, "four") == {"length": 4}
    assert "No such file" in refusal(files.gold_function, rows, "absent.py")
    assert "pass --gold" in refusal(files.gold_function, rows, "")

def test_a_full_disk_or_a_folder_in_the_way(path):
    write(path, b"old")
    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (1000, before[1]))  # holds for root as well
    try:
        assert refusal(write, path) == f"{path} cannot be written: [Errno 27] File too large"
        with pytest.raises(UserError, match="File too large"), files.replacing(path) as file:
            torch.save(torch.zeros(1000), file)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, before)
    assert "Is a directory" in refusal(write, path.parent)
    assert f"File exists: '{path}'" in refusal(write, path / "x")
    assert only(path, b"old")

@pytest.mark.parametrize("mistake", [ValueError, RuntimeError, KeyboardInterrupt, UserError])
def test_an_error_of_the_writer_is_passed_on(path, mistake):
    write(path, b"old")
    with pytest.raises(mistake), files.replacing(path) as file:
        file.write(b"new")
        raise mistake
    with pytest.raises(KeyboardInterrupt), files.replacing(path):
        try:
            raise KeyboardInterrupt
        finally:
            raise RuntimeError("this is what torch.save makes of it")
    assert only(path, b"old")

@pytest.mark.parametrize("owner, name", [(os, "fsync"), (Path, "replace")])
def test_a_kill_leaves_a_whole_file(path, monkeypatch, owner, name):
    write(path, b"old")
    child = os.fork()
    if child == 0:
        monkeypatch.setattr(owner, name, lambda *_: os.kill(os.getpid(), signal.SIGKILL))
        try:
            write(path)
        finally:
            os._exit(0)
    assert os.waitpid(child, 0)[1] == signal.SIGKILL
    assert path.read_bytes() == b"old"
    write(path, b"newer")
    assert only(path, b"newer")

def test_lock(path, monkeypatch):
    write(path)
    with open(path) as one, open(path) as other:
        assert files.lock(one) and files.lock(one) and not files.lock(other)
        for error in (BlockingIOError(), OSError(errno.ENOLCK, "No locks available")):
            monkeypatch.setattr(fcntl, "flock", Mock(side_effect=error))
            assert files.lock(other) is not isinstance(error, BlockingIOError)

def test_digest_goes_by_contents_and_not_by_dates(path):
    assert files.digest(path) == ""
    for content in (b"x" * 3_000_000, b"x" * 2_999_999 + b"y"):
        write(path, content)
        os.utime(path, (1, 1))
        assert files.digest(str(path)) == hashlib.sha256(content).hexdigest()[:16]

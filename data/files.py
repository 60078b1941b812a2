"""Strict readers for the files that README.md in this folder lists, and the one way to write."""

import base64
import gzip
import hashlib
import json
import os
import re
import runpy
import zlib
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import NamedTuple

import numpy as np
import tiktoken

EOT = "<|endoftext|>"  # GPT-2's only control token: separates documents and ends responses
GPT2_RANKS = "https://openaipublic.blob.core.windows.net/encodings/r50k_base.tiktoken"
GPT2_SPLIT = r"'(?:[sdmt]|ll|ve|re)| ?\p{L}+| ?\p{N}+| ?[^\s\p{L}\p{N}]+|\s+(?!\S)|\s+"
LONGEST_TEXT = 400_000  # characters; tiktoken overflows at a million blanks in a row
ROLES = {"system": "System", "user": "Human", "assistant": "Assistant"}
FIELDS = {"prompt": "a non-empty string", "completion": "a string", "labeler": "a string",
          "task": "a string", "source": "a string", "round": "a whole number",
          "completions": "a list of at least two strings",
          "ranks": "a list with a whole number from 0 to 999 for each completion"}

class UserError(Exception):
    """A problem that the user can solve, printed as one sentence without a traceback."""

class Example(NamedTuple):
    ids: list[int]  # tokens of the prompt, the completion and EOS
    prompt_len: int  # the first `prompt_len` tokens are given, the rest is learnt

class Ranking(NamedTuple):
    examples: list[Example]  # completions of one prompt
    ranks: list[int]  # one for each completion; 0 is best, equal ranks are ties
    labeler: str  # "" if unknown

@contextmanager
def replacing(path):
    """A binary file that replaces `path` once it is whole; until then the old one stays."""
    path = Path(path)
    partial = path.with_name(path.name + ".partial")
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        with open(partial, "wb") as file:
            yield file
            file.flush()
            os.fsync(file.fileno())
        partial.replace(path)
    except (OSError, RuntimeError) as error:
        # torch.save turns a full disk, or Ctrl-C, into a RuntimeError.
        cause = error if isinstance(error, OSError) else error.__context__
        if not isinstance(cause, OSError):
            raise cause or error
        raise UserError(f"{path} cannot be written: {cause}") from None
    finally:
        with suppress(OSError):
            partial.unlink()

def write_jsonl(path, rows) -> None:
    """Write one JSON object a line, all or nothing."""
    with replacing(path) as file:
        for row in rows:
            file.write(json.dumps(row, ensure_ascii=False).encode() + b"\n")

def lock(file) -> bool:
    """Lock an open file until this process ends. False only if another one has locked it."""
    try:
        import fcntl
        fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except (ImportError, OSError) as error:  # Windows and some network drives have no locks
        return not isinstance(error, BlockingIOError)
    return True

def digest(path) -> str:
    """16 hex digits of the SHA-256 of a file's contents; "" if it does not exist."""
    if not Path(path).exists():
        return ""
    sha256 = hashlib.sha256()
    with open(path, "rb") as file:
        while block := file.read(1 << 20):
            sha256.update(block)
    return sha256.hexdigest()[:16]

def get_tokenizer(data) -> tiktoken.Encoding:
    """The vocabulary of the data folder's tokenizer.tiktoken, or GPT-2's if there is none."""
    path = Path(data) / "tokenizer.tiktoken"
    if not path.parent.is_dir():
        raise UserError(f"no folder {data}: make it with data/prepare.py, or pass --data")
    if not path.exists():
        try:
            return tiktoken.get_encoding("gpt2")  # downloads once, into $TIKTOKEN_CACHE_DIR
        except (OSError, ValueError):  # no network, or not the right file
            raise UserError(f"GPT-2's vocabulary: save {GPT2_RANKS} as {path}") from None
    ranks = {}
    try:
        for line in read_bytes(path).splitlines():
            token, rank = line.split()
            ranks[base64.b64decode(token, validate=True)] = int(rank)
        if len(ranks) < 256 or sorted(ranks.values()) != list(range(len(ranks))):
            raise ValueError
    except ValueError:
        raise UserError(f"{path}: each line should be a token in base64 and its rank") from None
    eot = {EOT: len(ranks)}
    return tiktoken.Encoding("own", pat_str=GPT2_SPLIT, mergeable_ranks=ranks, special_tokens=eot)

def fingerprint(tokenizer: tiktoken.Encoding) -> str:
    """A hash that two vocabularies share only if every id means the same bytes."""
    sha256 = hashlib.sha256()
    for i in range(tokenizer.n_vocab):
        token = tokenizer.decode_single_token_bytes(i)
        sha256.update(len(token).to_bytes(4, "big") + token)
    return sha256.hexdigest()[:16]

def encode(tokenizer: tiktoken.Encoding, text: str) -> list[int]:
    """Encode ordinary text: "<|endoftext|>" in it never becomes the control token."""
    ids = []
    for start in range(0, len(text), LONGEST_TEXT):
        ids += tokenizer.encode_ordinary(text[start : start + LONGEST_TEXT])
    return ids

def decode(tokenizer: tiktoken.Encoding, ids) -> str:
    """Decode a response, leaving EOS out."""
    return tokenizer.decode([i for i in ids if i != tokenizer.eot_token])

def render(messages: list[dict]) -> str:
    """[{"role", "content"}, ...] -> a prompt in the layout of Anthropic's HH data."""
    turns = [f"\n\n{ROLES[message['role']]}: {message['content']}" for message in messages]
    return "".join(turns) + "\n\nAssistant:"

def own_turn(text: str) -> str:
    """Cut what a model wrote where it goes on as the human."""
    return text.split("\n\nHuman:")[0]

def printable(text: str) -> str:
    """Make untrusted text safe for a terminal: visible characters, spaces and newlines."""
    text = re.sub(r"[^\S\n]", " ", text)  # tabs, carriage returns, odd spaces
    return "".join(char for char in text if char.isprintable() or char == "\n")

def read_bytes(path) -> bytes:
    """Read a file, unpacked if it is gzipped, without a byte-order mark."""
    try:
        content = Path(path).read_bytes()
        if content.startswith(b"\x1f\x8b"):
            content = gzip.decompress(content)
    except (OSError, EOFError, zlib.error) as error:
        raise UserError(f"{path} cannot be read: {error}") from None
    return content.removeprefix(b"\xef\xbb\xbf")

def read_text(path) -> str:
    """Read UTF-8 text, with "\\n" at line ends."""
    content = read_bytes(path)
    try:
        return content.decode().replace("\r\n", "\n")
    except UnicodeDecodeError as error:
        line = content.count(b"\n", 0, error.start) + 1
        byte = f"byte 0x{content[error.start]:02x}"
        raise UserError(f"{path}, line {line}: {byte} is not UTF-8; save it as UTF-8") from None

def read_jsonl(path, *required: str) -> list[dict]:
    """Read one JSON object a line, each with the required FIELDS. Nulls are dropped."""
    rows = []
    for number, line in enumerate(read_text(path).split("\n"), 1):
        if line.strip():
            try:
                row = parse(line)
                check(row, required)
            except (ValueError, RecursionError) as error:
                raise UserError(f"{path}, line {number}: {error}") from None
            rows.append({field: value for field, value in row.items() if value is not None})
    return rows

def parse(text: str) -> dict:
    """One row, without what Python's own reader of JSON lets pass. Raises ValueError."""
    try:
        row = json.loads(text, object_pairs_hook=unique)
    except json.JSONDecodeError as error:
        raise ValueError(f"not JSON: {error.msg} at column {error.colno}") from None
    if not isinstance(row, dict):
        raise ValueError(f'a row should be an object such as {{"prompt": ...}}, not {row!a:.60}')
    for field, value in row.items():
        try:
            json.dumps({field: value}, ensure_ascii=False, allow_nan=False).encode()
        except ValueError:
            odd = "NaN, infinity or half a surrogate pair"
            raise ValueError(f"{field!a:.60} should not hold {odd}: {value!a:.60}") from None
    return row

def unique(pairs: list[tuple]) -> dict:
    row = {}
    for field, value in pairs:
        if field in row:
            raise ValueError(f"the field {field!a:.60} should be there once, not twice")
        row[field] = value
    return row

def check(row: dict, required=()) -> None:
    """Raise ValueError if one of FIELDS holds something else, or a required one is missing."""
    for field, should in FIELDS.items():
        value = row.get(field)
        if (value is not None or field in required) and not is_valid(field, value, row):
            raise ValueError(f"{field} should be {should}, not {value!a:.60}")

def is_valid(field: str, value, row: dict) -> bool:
    if field == "ranks":
        fits = isinstance(value, list) and len(value) == len(row.get("completions") or "")
        return fits and all(type(rank) is int and 0 <= rank < 1000 for rank in value)
    if field == "round":
        return type(value) is int
    if field == "completions":
        several = isinstance(value, list) and len(value) >= 2
        return several and all(isinstance(text, str) for text in value)
    return isinstance(value, str) and (field != "prompt" or value != "")

def read_prompts(path, tokenizer, longest: int, *fields: str) -> list[dict]:
    """Rows with the tokens of their prompt, at most `longest`, as "prompt_ids"."""
    rows = read_jsonl(path, "prompt", *fields)
    for row in rows:
        row["prompt_ids"] = encode(tokenizer, row["prompt"])
    return without_long(path, rows, [len(row["prompt_ids"]) for row in rows], longest)

def read_demonstrations(path, tokenizer, longest: int) -> list[Example]:
    """Prompts with one completion, of at most `longest` tokens together with EOS."""
    rows = read_jsonl(path, "prompt", "completion")
    examples = [example(tokenizer, row["prompt"], row["completion"]) for row in rows]
    return without_long(path, examples, [len(example.ids) for example in examples], longest)

def read_comparisons(path, tokenizer, longest: int) -> list[Ranking]:
    """Rankings with at most `longest` tokens in each example; ties are kept."""
    rankings = []
    lengths = []
    for row in read_jsonl(path, "prompt", "completions", "ranks"):
        examples = [example(tokenizer, row["prompt"], text) for text in row["completions"]]
        rankings.append(Ranking(examples, row["ranks"], row.get("labeler", "")))
        lengths.append(max(len(example.ids) for example in examples))
    rankings = without_long(path, rankings, lengths, longest)
    if all(len(set(ranking.ranks)) == 1 for ranking in rankings):
        raise UserError(f"{path} has only ties, which teach nothing; some ranks must differ")
    return rankings

def example(tokenizer, prompt: str, completion: str) -> Example:
    """Join tokens, not text, so that no merge crosses the end of the prompt."""
    prompt_ids = encode(tokenizer, prompt)
    ids = prompt_ids + encode(tokenizer, completion) + [tokenizer.eot_token]
    return Example(ids, len(prompt_ids))

def without_long(path, items: list, lengths: list[int], longest: int) -> list:
    """Leave out what is over `longest` tokens, and say so (the paper: prompts of over 1,000)."""
    kept = [item for item, length in zip(items, lengths) if length <= longest]
    count = len(items) - len(kept)
    if not kept:
        raise UserError(f"{path} has no row of at most {longest} tokens")
    if count:
        print(f"{path}: {count} of {len(items)} rows are over {longest} tokens, left out")
    return kept

def read_documents(path, tokenizer: tiktoken.Encoding) -> list[np.ndarray]:
    """Pretraining text, split at EOT -> the ids of each document, int32, EOS at its end."""
    documents = []
    for text in read_text(path).split(EOT):
        if text.strip():
            ids = encode(tokenizer, text) + [tokenizer.eot_token]
            documents.append(np.array(ids, dtype=np.int32))
    if not documents:
        raise UserError(f"{path} has no text")
    return documents

def gold_function(rows: list[dict], file: str):
    """A file's gold(row, completion) -> {axis: score}; None if no row has the field "wants"."""
    wanted = sum("wants" in row for row in rows)
    if wanted == 0:
        return None
    if wanted < len(rows):
        raise UserError(f"wants should be in all rows or none, not in {wanted} of {len(rows)}")
    path = Path(__file__).parent.parent / file
    try:
        gold = runpy.run_path(str(path))["gold"]
        gold(rows[0], "")
    except Exception as error:  # no such file or function, or of another environment than the rows
        raise UserError(f"{path}: gold(row, completion) fails, {error!r}; pass --gold") from None
    return gold

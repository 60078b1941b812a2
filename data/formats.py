"""The files of a data set, as they are read: JSON Lines, raw text and a vocabulary.

    tokenizer.tiktoken   the vocabulary; without it GPT-2's is taken
    pretrain.txt         raw text, documents parted by <|endoftext|>
    sft.jsonl            {"prompt": str, "completion": str}
    comparisons.jsonl    {"prompt": str, "completions": [str, ...], "ranks": [int, ...]}   0 = best
                         {"prompt": str, "chosen": str, "rejected": str}
    prompts.jsonl        {"prompt": str}
    probes.jsonl         {"prompt": str, "completion": str}

README.md beside this file names every file and field. Whatever is wrong with one is a UserError
that says where. Text is encoded as ordinary text: none can forge a control token.
"""

import base64
import json
import os
import runpy
from collections.abc import Callable
from pathlib import Path

import numpy as np
import tiktoken

EOT = "<|endoftext|>"  # GPT-2's only control token: parts documents, ends responses
GPT2_SPLIT = r"'(?:[sdmt]|ll|ve|re)| ?\p{L}+| ?\p{N}+| ?[^\s\p{L}\p{N}]+|\s+(?!\S)|\s+"
class UserError(Exception):
    """What one sentence explains to the user: printed without a traceback."""


def get_tokenizer(data: str) -> tiktoken.Encoding:
    """The data set's own vocabulary (a base64 token and its rank a line), or GPT-2's."""
    path = Path(data) / "tokenizer.tiktoken"
    if not path.exists():
        try:
            return tiktoken.get_encoding("gpt2")
        except OSError as error:
            raise UserError(f"no {path}, and GPT-2's vocabulary not to be had: {error}") from None
    lines = [line.split() for line in path.read_bytes().splitlines()]
    ranks = {base64.b64decode(token): int(rank) for token, rank in lines}
    return tiktoken.Encoding(
        "own", pat_str=GPT2_SPLIT, mergeable_ranks=ranks, special_tokens={EOT: len(ranks)}
    )


def render(messages: list[dict]) -> str:
    """[{"role", "content"}] -> a dialogue as in Anthropic's data, open for the assistant's turn."""
    names = {"system": "System", "user": "Human", "assistant": "Assistant"}
    turns = [f"\n\n{names[message['role']]}: {message['content']}" for message in messages]
    return "".join(turns) + "\n\nAssistant:"


def canonical(row: dict) -> dict:
    """`messages` for `prompt`, `chosen` and `rejected` for `completions`; `ranks`: best first."""
    if "messages" in row:
        row.setdefault("prompt", render(row["messages"]))
    if "chosen" in row:
        row.setdefault("completions", [row["chosen"], row["rejected"]])
    if "completions" in row:
        row.setdefault("ranks", list(range(len(row["completions"]))))
    return row


def expected(row: dict, field: str) -> str:
    """What the field of a row should be and is not, or ""."""
    value = row.get(field)
    if field in ("prompt", "completion"):
        return "" if isinstance(value, str) else "a string"
    if field == "completions":
        strings = isinstance(value, list) and value and all(isinstance(x, str) for x in value)
        return "" if strings else "a list of strings"
    numbers = isinstance(value, list) and all(type(x) is int for x in value)
    one_each = numbers and len(value) == len(row["completions"])
    return "" if one_each else "a list of whole numbers, one for each completion"


def read_rows(path: Path, tokenizer: tiktoken.Encoding, longest: int, *required: str) -> list[dict]:
    """The rows of a file with, besides `required` fields, "prompt_ids" and, for completions, "ids".

    `ids` has prompt, completion and EOS; tokens are joined, not text, so that no merge crosses
    over. Rows over `longest` tokens are left out, as in the paper (C.4). Raises UserError with
    file, line and field.
    """
    lines = read_text(path).removesuffix("\n").split("\n")
    rows = [read_row(line, f"{path}, line {i}", required) for i, line in enumerate(lines, 1)]
    for row in rows:
        row["prompt_ids"] = tokenizer.encode_ordinary(row["prompt"])
        answers = row.get("completions") or ([row["completion"]] if "completion" in row else [])
        answers = [tokenizer.encode_ordinary(text) + [tokenizer.eot_token] for text in answers]
        row["ids"] = [row["prompt_ids"] + ids for ids in answers]
    fitting = [row for row in rows if max(map(len, [row["prompt_ids"], *row["ids"]])) <= longest]
    if len(fitting) < len(rows):
        left_out = len(rows) - len(fitting)
        print(f"{path}: {left_out} of {len(rows)} rows are over {longest} tokens, left out")
    if not fitting:
        raise UserError(f"{path} has no row of at most {longest} tokens")
    return fitting


def read_row(line: str, where: str, required: tuple[str, ...]) -> dict:
    """One row in the fields' usual names, or a UserError that says where and what is wrong."""
    try:
        row = json.loads(line)
        if not isinstance(row, dict):
            raise TypeError("not an object")
        row = canonical(row)
    except (ValueError, TypeError, KeyError) as error:
        raise UserError(f"{where}: no row of a known format, {error!r}") from None
    for field in required:
        if should := expected(row, field):
            found = json.dumps(row.get(field))[:60]
            raise UserError(f"{where}: {field} should be {should}, not {found}")
    return row


def read_demonstrations(path: Path, tokenizer, longest: int) -> list[tuple[list[int], int]]:
    """(ids, prompt_len) pairs, as for lm_pass."""
    rows = read_rows(path, tokenizer, longest, "prompt", "completion")
    return [(row["ids"][0], len(row["prompt_ids"])) for row in rows]


def read_text(path: Path) -> str:
    try:
        return path.read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as error:
        raise UserError(f"{path} cannot be read: {error}") from None


def read_pretraining(path: Path, tokenizer: tiktoken.Encoding) -> list[np.ndarray]:
    """The ids of each document, EOS at its end; tokenised once, then kept beside the text."""
    cache, eos = path.with_suffix(".npy"), tokenizer.eot_token
    if not cache.exists() or cache.stat().st_mtime < path.stat().st_mtime:
        texts = [text for text in read_text(path).split(EOT) if text]
        dtype = np.uint16 if tokenizer.n_vocab <= 2**16 else np.uint32
        encoded = tokenizer.encode_ordinary_batch(texts)
        partial = cache.with_suffix(f".{os.getpid()}.npy")  # renamed when whole: others may read
        np.save(partial, np.concatenate([np.array([*ids, eos], dtype) for ids in encoded]))
        partial.replace(cache)
    ids = np.asarray(np.load(cache, mmap_mode="r"))
    ends = np.flatnonzero(ids == eos) + 1
    return [ids[start:end] for start, end in zip([0, *ends], ends)]


def passages(documents: list, count: int, longest: int, rng: np.random.Generator) -> list[tuple]:
    """Random documents, of those over `longest` tokens a random stretch: rows as for lm_pass.

    Each row has one document: where several share a row, a small model takes ten times as long to
    learn that what it is to copy stands in its own.
    """
    rows = []
    for document in (documents[i] for i in rng.integers(len(documents), size=count)):
        start = rng.integers(max(1, len(document) - longest + 1))
        rows.append((document[start : start + longest], 1))
    return rows


def decode(tokenizer, ids: list[int]) -> str:
    """The text of a response, without EOS."""
    return tokenizer.decode([i for i in ids if i != tokenizer.eot_token])


def gold_function(rows: list[dict], file: str) -> Callable | None:
    """gold(row, completion) -> {axis: score} of a file; None for rows without the field "wants"."""
    path = Path(__file__).parent.parent / file
    return runpy.run_path(str(path))["gold"] if "wants" in rows[0] else None

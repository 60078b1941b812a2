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
import codecs
import gzip
import hashlib
import os
import re
import runpy
import zlib
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import BinaryIO

import numpy as np
import tiktoken

from data.rows import canonical, check, own_turn, parse, render  # noqa: F401, for who reads rows

EOT = "<|endoftext|>"  # GPT-2's only control token: parts documents, ends responses
GPT2_RANKS = "https://openaipublic.blob.core.windows.net/encodings/r50k_base.tiktoken"
GPT2_SPLIT = r"'(?:[sdmt]|ll|ve|re)| ?\p{L}+| ?\p{N}+| ?[^\s\p{L}\p{N}]+|\s+(?!\S)|\s+"
BLANKS = re.compile(r"(\s{500000})")  # in a row: tiktoken breaks down at a million of them


class UserError(Exception):
    """What one sentence explains to the user: printed without a traceback."""


@contextmanager
def replacing(path: Path, suffix: str = ".partial") -> Iterator[BinaryIO]:
    """A file to write into, which takes the place of `path` once all of it is on the disk.

    Until then `suffix` is added to its name; it is removed if anything fails, and what was there
    before stays. The folder is made if need be. What the system refuses is a UserError.
    """
    partial = path.with_name(path.name + suffix)
    try:
        if path.is_dir():
            raise UserError(f"{path} cannot be written: it is a folder")
        with suppress(FileExistsError):
            path.parent.mkdir(parents=True)
        with open(partial, "wb") as file:
            yield file
            file.flush()
            os.fsync(file.fileno())
        partial.replace(path)
        sync_folder(path.parent)
    except (OSError, RuntimeError) as error:  # torch.save makes a RuntimeError of a full disk
        cause = error if isinstance(error, OSError) else error.__context__
        if isinstance(cause, KeyboardInterrupt):  # and of Ctrl-C
            raise cause from None
        if not isinstance(cause, OSError):
            raise
        raise UserError(f"{path} cannot be written: {cause.strerror or cause}") from None
    finally:
        with suppress(OSError):
            partial.unlink()


def lock(file) -> bool:
    """Whether this process now holds the open file alone; the system lets go of it when it ends."""
    try:
        import fcntl
    except ImportError:  # Windows: nobody is kept out
        return True
    try:
        fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        return False
    return True


def sync_folder(folder: Path) -> None:
    """So that a new name outlives a power cut."""
    with suppress(OSError):  # not every system can; the file itself is safe
        handle = os.open(folder, os.O_RDONLY)
        try:
            os.fsync(handle)
        finally:
            os.close(handle)


def get_tokenizer(data: str) -> tiktoken.Encoding:
    """The data set's own vocabulary (a base64 token and its rank a line), or GPT-2's.

    tiktoken downloads GPT-2's once, into $TIKTOKEN_CACHE_DIR or the folder for temporary files.
    With no network, one file by hand does as well: GPT2_RANKS has the same tokens and ranks.
    """
    path = Path(data) / "tokenizer.tiktoken"
    if not path.exists():
        try:
            return tiktoken.get_encoding("gpt2")
        except (OSError, ValueError):  # no network; not what was asked for
            raise UserError(
                f"GPT-2's vocabulary could not be downloaded: put {GPT2_RANKS} at {path} by hand"
            ) from None
    try:
        lines = [line.split() for line in read_bytes(path).splitlines()]
        ranks = {base64.b64decode(token, validate=True): int(rank) for token, rank in lines}
        if sorted(ranks.values()) != [*range(len(lines))] or sum(len(x) == 1 for x in ranks) < 256:
            raise ValueError
    except ValueError:
        sentence = "each line should be a token in base64 and its rank, all 256 bytes among them"
        raise UserError(f"{path}: {sentence}") from None
    return tiktoken.Encoding(
        "own", pat_str=GPT2_SPLIT, mergeable_ranks=ranks, special_tokens={EOT: len(ranks)}
    )


def fingerprint(tokenizer: tiktoken.Encoding) -> str:
    """The same for two vocabularies if every id means the same bytes."""
    tokens = (tokenizer.decode_single_token_bytes(i) for i in range(tokenizer.n_vocab))
    return hashlib.sha256(b"".join(len(x).to_bytes(4, "big") + x for x in tokens)).hexdigest()[:16]


def encode(tokenizer: tiktoken.Encoding, text: str) -> list[int]:
    """Ids of ordinary text, whatever stands in it."""
    return [i for part in BLANKS.split(text) for i in tokenizer.encode_ordinary(part)]


def read_bytes(path: Path) -> bytes:
    """The content: unpacked, where it is gzipped, and without a byte-order mark."""
    try:
        content = path.read_bytes()
        if content.startswith(b"\x1f\x8b"):
            content = gzip.decompress(content)
    except (OSError, EOFError, zlib.error) as error:
        reason = getattr(error, "strerror", None) or error
        raise UserError(f"{path} cannot be read: {reason}") from None
    return content.removeprefix(codecs.BOM_UTF8)


def read_text(path: Path) -> str:
    content = read_bytes(path)
    try:
        return content.decode().replace("\r\n", "\n")
    except UnicodeDecodeError as error:
        line = content.count(b"\n", 0, error.start) + 1
        raise UserError(f"{path}, line {line}: should be UTF-8, is not: {error.reason}") from None


def numbered(path: Path) -> Iterator[tuple[str, bytes]]:
    """("file, line N", line) of every line that is not blank."""
    for i, line in enumerate(read_bytes(path).split(b"\n"), 1):
        if line.strip():
            yield f"{path}, line {i}", line


def read_rows(path: Path, tokenizer: tiktoken.Encoding, longest: int, *required: str) -> list[dict]:
    """The rows of a file with, besides `required` fields, "prompt_ids" and, for completions, "ids".

    `ids` has prompt, completion and EOS; tokens are joined, not text, so that no merge crosses
    over. Rows over `longest` tokens are left out, as in the paper (C.4), and counted. Raises
    UserError with file, line and field.
    """
    rows = [read_row(line, where, required) for where, line in numbered(path)]
    if not rows:
        raise UserError(f"{path} has no rows")
    for row in rows:
        row["prompt_ids"], row["ids"] = row_ids(row, tokenizer, *required)
    fitting = [row for row in rows if max(map(len, [row["prompt_ids"], *row["ids"]])) <= longest]
    if len(fitting) < len(rows):
        left_out = len(rows) - len(fitting)
        print(f"{path}: {left_out} of {len(rows)} rows are over {longest} tokens, left out")
    if not fitting:
        raise UserError(f"{path} has no row of at most {longest} tokens")
    return fitting


def read_row(line: bytes, where: str, required: tuple[str, ...]) -> dict:
    """One row in the fields' usual names, or a UserError that says where and what is wrong."""
    try:
        row = canonical(parse(line))
        check(row, *required)
    except (ValueError, RecursionError) as error:
        raise UserError(f"{where}: {error}") from None
    return row


def row_ids(row: dict, tokenizer, *fields: str) -> tuple[list[int], list[list[int]]]:
    """Of the prompt, and of the prompt with each completion and EOS, if `fields` ask for them."""
    prompt = encode(tokenizer, row["prompt"])
    one = [row["completion"]] if "completion" in fields else []
    texts = row["completions"] if "completions" in fields else one
    return prompt, [prompt + encode(tokenizer, text) + [tokenizer.eot_token] for text in texts]


def read_demonstrations(path: Path, tokenizer, longest: int) -> list[tuple[list[int], int]]:
    """(ids, prompt_len) pairs, as for lm_pass."""
    rows = read_rows(path, tokenizer, longest, "prompt", "completion")
    return [(row["ids"][0], len(row["prompt_ids"])) for row in rows]


def read_comparisons(path: Path, tokenizer, longest: int) -> list[dict]:
    """Rankings, as read_rows has them. Those all tied stay and are counted: they teach nothing."""
    rows = read_rows(path, tokenizer, longest, "prompt", "completions", "ranks")
    tied = sum(len(set(row["ranks"])) == 1 for row in rows)
    if tied == len(rows):
        raise UserError(f"{path} has no ranking in which one completion is better than another")
    if tied:
        print(f"{path}: {tied} of {len(rows)} rankings are all ties, which teach nothing")
    return rows


def read_pretraining(path: Path, tokenizer: tiktoken.Encoding) -> list[np.ndarray]:
    """The ids of each document, EOS at its end; tokenised once, then kept beside the text."""
    cache, eos = path.with_suffix(f".{tokenizer.n_vocab}.npy"), tokenizer.eot_token
    sources = [file for file in (path, path.with_name("tokenizer.tiktoken")) if file.exists()]
    newest = max((file.stat().st_mtime for file in sources), default=0)
    try:
        if not path.exists() or not cache.exists() or cache.stat().st_mtime < newest:
            write_ids(cache, path, tokenizer)
        ids = kept_ids(cache, tokenizer)
    except (OSError, EOFError, ValueError) as error:
        raise UserError(f"{cache}, the tokens of {path.name}, cannot be kept: {error}") from None
    ends = np.flatnonzero(ids == eos) + 1
    return [ids[start:end] for start, end in zip([0, *ends], ends)]


def kept_ids(cache: Path, tokenizer: tiktoken.Encoding) -> np.ndarray:
    """Mapped, not read; ValueError unless they are whole, and ids of this vocabulary."""
    try:
        ids = np.lib.format.open_memmap(cache, mode="r")
    except Exception as error:  # of a dozen kinds: the header is an expression in Python
        raise ValueError(error) from None
    whole = ids.ndim == 1 and ids.size and ids.offset + ids.nbytes == cache.stat().st_size
    if not whole or ids.dtype != id_type(tokenizer) or ids.max() >= tokenizer.n_vocab:
        raise ValueError("it is damaged; delete it, and it is made anew")
    return np.asarray(ids)


def id_type(tokenizer: tiktoken.Encoding) -> type:
    return np.uint16 if tokenizer.n_vocab <= 2**16 else np.uint32


def write_ids(cache: Path, path: Path, tokenizer: tiktoken.Encoding) -> None:
    """The ids of all documents, one after the other, as read_pretraining keeps them."""
    texts = [text for text in read_text(path).split(EOT) if text]
    if not texts:
        raise UserError(f"{path} has no text")
    encoded, dtype = (encode(tokenizer, text) for text in texts), id_type(tokenizer)
    ids = np.concatenate([np.array([*ids, tokenizer.eot_token], dtype) for ids in encoded])
    with replacing(cache, f".{os.getpid()}.partial") as file:  # other processes may do the same
        np.save(file, ids)


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


def printable(text: str) -> str:
    """What a terminal may be shown of text that a model or a stranger wrote: what can be seen, and
    newlines. Tabs, carriage returns and odd spaces become a space; what else could move the cursor,
    change a title or turn the direction of writing is left out."""
    shown = (c if c.isprintable() or c == "\n" else " " if c.isspace() else "" for c in text)
    return "".join(shown)


def describe(metrics: dict[str, float]) -> str:
    """{name: value} in a line, for the terminal."""
    return ", ".join(f"{key} {value:.3f}" for key, value in metrics.items())


def markdown(rows: dict[str, dict[str, str]], corner: str = "") -> str:
    """{row: {column: text}}, of the same columns each -> an aligned Markdown table."""
    lines = [[corner, *next(iter(rows.values()))]]
    lines += [[name, *row.values()] for name, row in rows.items()]
    widths = [max(map(len, column)) for column in zip(*lines)]
    lines.insert(1, ["-" * width for width in widths])
    return "\n".join(f"| {' | '.join(map(str.ljust, line, widths))} |" for line in lines)


def gold_function(rows: list[dict], file: str) -> Callable | None:
    """gold(row, completion) -> {axis: score} of a file; None for rows without the field "wants"."""
    path, wanted = Path(__file__).parent.parent / file, sum("wants" in row for row in rows)
    if 0 < wanted < len(rows):
        raise UserError(f"wants should be in every row or in none, not in {wanted} of {len(rows)}")
    if not wanted:
        return None
    gold = runpy.run_path(str(path)).get("gold") if path.is_file() else None
    if not callable(gold):
        raise UserError(f"{path} should be a file that has gold(row, completion)")
    return gold

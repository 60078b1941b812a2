"""The files that people and models add their answers to: JSON Lines, an answer a line.

Whoever is stopped, by a kill even, has lost nothing: what has been answered is on the disk.
"""

import json
import os
from collections.abc import Iterable
from datetime import datetime
from pathlib import Path

from data.formats import UserError, read_bytes, read_row, read_text, replacing


def read_lines(path: Path, *fields: str) -> list[tuple[str, dict]]:
    """Each line of the file that is not blank, raw and as `read_row` has it."""
    lines = enumerate(read_text(path).split("\n"), 1)
    places = [(line, f"{path}, line {i}") for i, line in lines if line.strip()]
    return [(line, read_row(line.encode(), where, fields)) for line, where in places]


def read_answers(path: Path, *fields: str) -> list[tuple[str, dict]]:
    """The same of a file that need not be there or have anything in it, its last line mended."""
    if path.exists():
        mend(path)
    return read_lines(path, *fields) if path.exists() and path.stat().st_size else []


def mend(path: Path) -> None:
    """Complete the last line, or move it to `<path>.cut` if a kill left only a part of it."""
    try:
        content = path.read_bytes()
    except OSError as error:
        raise UserError(f"{path} cannot be read: {error}") from None
    body = content.rstrip(b"\n")
    start = body.rfind(b"\n") + 1
    try:
        whole = not body or isinstance(json.loads(body[start:]), dict)
    except ValueError:
        whole = False
    if not whole:
        cut = path.with_name(f"{path.name}.cut")
        append(cut, body[start:])
        print(f"{path}: the last line is not whole, moved to {cut}")
        overwrite(path, content[:start])
    elif body and body == content:
        append(path, b"")


def append(path: Path, line: bytes) -> None:
    """Add a line; it is on the disk when this returns."""
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        with open(path, "ab") as file:
            file.write(line + b"\n")
            file.flush()
            os.fsync(file.fileno())
    except OSError as error:
        raise UserError(f"{path} cannot be written: {error}") from None


def overwrite(path: Path, content: bytes) -> None:
    """All or nothing."""
    with replacing(path) as file:
        file.write(content)


def keep(paths: Iterable[Path]) -> None:
    """UserError if a file that is to be written anew has what people or models added."""
    for path in filter(Path.exists, paths):
        if count := read_bytes(path).count(b'"time": "'):  # a field that only their rows have
            raise UserError(f"{path} has answers by people or models ({count}): move it first")


def save(path: Path, row: dict) -> str:
    """Append the row; returns its line."""
    line = json.dumps(row)
    append(path, line.encode())
    return line


def replace(path: Path, line: str, *rows: dict) -> str:
    """Put rows, or nothing, in the line's place. The file is read anew: others may add to it."""
    lines = read_text(path).removesuffix("\n").split("\n")
    if line not in lines:
        raise UserError(f"{path} has been changed meanwhile: the answer is no longer in it")
    place = len(lines) - 1 - lines[::-1].index(line)
    lines[place : place + 1] = new = [json.dumps(row) for row in rows]
    overwrite(path, "".join(f"{line}\n" for line in lines).encode())
    return "".join(new)


def add_rankings(path: Path, rankings: list[dict]) -> list[dict]:
    """Save a model's rankings in place of those it gave to the same questions before; returns the
    other rows of the file."""
    def asked(row: dict) -> set[tuple]:
        who, models = str(row.get("labeler")), str(row.get("models", ""))
        return {(who, *question(row, "")), (who, *question(row, models))}

    new = set().union(*map(asked, rankings))
    earlier = read_answers(path, "prompt", "completions", "ranks")
    kept = [(line, row) for line, row in earlier if not asked(row) & new]
    lines = [line for line, _ in kept] + [json.dumps(row) for row in rankings]
    overwrite(path, "".join(f"{line}\n" for line in lines).encode())
    return [row for _, row in kept]


def question(row: dict, models: str) -> tuple:
    """A row's identity: its prompt, and its completions or those who are to write them."""
    return (row["prompt"], models or tuple(row.get("completions", ())))


def distinct(rows: list[dict]) -> list[dict]:
    """Without a second row of the same prompt and completions."""
    return list({question(row, ""): row for row in reversed(rows)}.values())[::-1]


def now() -> str:
    """The time of an answer, ISO 8601."""
    return datetime.now().astimezone().isoformat(timespec="seconds")

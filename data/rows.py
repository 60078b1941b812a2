"""One row of a data set: an object of JSON in the fields that the stages use, checked.

Whatever is wrong with it is a ValueError that names the field and says what was expected; whoever
reads the file adds its name and the line. What is quoted from a row is ASCII and short.
"""

import json
import math
import re
from collections import Counter

SURROGATE = re.compile("[\ud800-\udfff]")  # half a pair: JSON can spell it, UTF-8 cannot
TURNS = {"system": "System", "user": "Human", "assistant": "Assistant"}


def render(messages: list[dict]) -> str:
    """[{"role", "content"}] -> a dialogue as in Anthropic's data, open for the assistant's turn."""
    turns = [f"\n\n{TURNS[message['role']]}: {message['content']}" for message in messages]
    return "".join(turns) + "\n\nAssistant:"


def own_turn(text: str) -> str:
    """What a model wrote, up to where it goes on as the human."""
    return text.split("\n\nHuman:")[0]


def is_text(value) -> bool:
    return isinstance(value, str) and not SURROGATE.search(value)


def brief(value) -> str:
    """As JSON, in ASCII, at most 60 characters: safe to print, whoever wrote it."""
    text = json.dumps(value)
    return text if len(text) <= 60 else text[:57] + "..."


def decode_json(text: bytes):
    """Any value, without the numbers and the doubled fields that Python's reader lets pass."""
    try:
        return json.loads(text.decode(), object_pairs_hook=unique, parse_float=finite,
                          parse_constant=finite)
    except json.JSONDecodeError as error:
        place = f"line {error.lineno}, " if error.lineno > 1 else ""
        raise ValueError(f"not JSON: {error.msg} at {place}column {error.colno}") from None


def parse(line: bytes) -> dict:
    """The object on a line."""
    row = decode_json(line)
    if not isinstance(row, dict):
        raise ValueError(f'should be an object like {{"prompt": ...}}, not {brief(row)}')
    return row


def unique(pairs: list[tuple]) -> dict:
    names = Counter(name for name, _ in pairs)
    if len(names) < len(pairs):
        twice = names.most_common(1)[0][0]
        raise ValueError(f"the field {brief(twice)} should stand there once, not twice")
    return dict(pairs)


def finite(text: str) -> float:
    """NaN and Infinity are no JSON; 1e999 is, and would become one of them."""
    value = float(text)
    if not math.isfinite(value):
        raise ValueError(f"a number should be finite, not {text[:20]}")
    return value


def checked_messages(messages) -> list[dict]:
    if not isinstance(messages, list) or not messages:
        raise ValueError(f"messages should be a list of turns, not {brief(messages)}")
    for i, message in enumerate(messages):
        turn = message if isinstance(message, dict) else {}
        if turn.get("role") not in [*TURNS] or not is_text(turn.get("content")):
            should = '{"role": "user", "assistant" or "system", "content": a string}'
            raise ValueError(f"messages[{i}] should be {should}, not {brief(message)}")
    return messages


def canonical(row: dict) -> dict:
    """The row in the names that the stages use.

    `messages` are the prompt, and the completion too if the assistant has the last word and no
    other completion is there; `chosen` and `rejected` are two completions; `ranks`: best first.
    """
    if "messages" in row:
        *before, last = messages = checked_messages(row["messages"])
        if last["role"] == "assistant" and not row.keys() & {"completion", "completions", "chosen"}:
            messages, row["completion"] = before, " " + last["content"]
        row.setdefault("prompt", render(messages))
    if "chosen" in row or "rejected" in row:
        for field in ("chosen", "rejected"):
            if not is_text(row.get(field)):
                raise ValueError(f"{field} should be a string, not {brief(row.get(field))}")
        if row["chosen"] == row["rejected"]:
            raise ValueError(f"rejected should differ from chosen: both {brief(row['chosen'])}")
        row.setdefault("completions", [row["chosen"], row["rejected"]])
    if isinstance(row.get("completions"), list):
        row.setdefault("ranks", list(range(len(row["completions"]))))
    return row


def expected(row: dict, field: str) -> str:
    """What the field of a row should be and is not, or ""."""
    value = row.get(field)
    if field == "prompt":
        return "" if is_text(value) and value else "a non-empty string of valid Unicode"
    if field in ("completion", "labeler"):
        return "" if is_text(value) else "a string of valid Unicode"
    if field == "round":
        return "" if type(value) is int else "a whole number"
    if field == "completions":
        several = isinstance(value, list) and len(value) > 1 and all(map(is_text, value))
        return "" if several else "a list of at least two strings of valid Unicode"
    numbers = isinstance(value, list) and all(type(x) is int and 0 <= x < 1000 for x in value)
    one_each = numbers and len(value) == len(row.get("completions", ()))
    return "" if one_each else "a list of whole numbers from 0 to 999, one for each completion"


def check(row: dict, *required: str) -> None:
    """The required fields, and whichever of the others are there."""
    for field in ("prompt", "completion", "completions", "ranks", "labeler", "round"):
        if (field in required or field in row) and (should := expected(row, field)):
            raise ValueError(f"{field} should be {should}, not {brief(row.get(field))}")

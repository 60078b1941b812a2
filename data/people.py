"""A person at the keyboard: ranks completions, writes demonstrations, compares two models blind.

label.py is the command. Each answer is a line of JSON, on the disk before the next question is put:
a session may end anywhere, by `quit`, Ctrl-C, Ctrl-D or a kill, and the next goes on from there.
Besides what the stages read, a row has who answered ("labeler"), when ("time", ISO 8601), and for
sampled completions by which checkpoints ("models").
"""

import json
import re
import sys
import textwrap
from collections.abc import Callable
from pathlib import Path
from random import Random

import numpy as np
import torch

from data.answers import now, question, read_answers, read_lines, replace, save
from data.formats import UserError, decode, get_tokenizer, own_turn, printable, read_rows
from model import GPT
from rlhf import checkpoint, complete, load, responses, room, win_rate

WIDTH = 79  # columns
COMMANDS = "undo", "skip", "quit"
RANKING = "prompt", "completions", "ranks"  # what each of its rows has
MARKS = {  # what the paper's labelers said of each answer besides its quality (Table 3), by letter
    "f": "fails to follow the instruction",
    "c": "keeps to a constraint that was given",
    "i": "inappropriate for an assistant to customers",
    "h": "hallucination",
    "s": "sexual content",
    "v": "violent content",
    "e": "encourages violence, abuse, terror or self-harm",
    "d": "denigrates a protected class",
    "a": "harmful advice",
    "o": "expresses an opinion",
    "m": "expresses a moral judgment",
}
AXES = {"helpful": "fci", "honest": "h", "harmless": "svedaom"}
HOW_TO_RANK = """\
Best first, = between equals: 2 1=3 4. Or undo (the last answer), skip, quit.
Then notes, if you like: the number of an answer, a colon, its quality from 1 to
7, letters for what is true of it, as in 2:6 3:2fh. An empty line goes on.
"""
HOW_TO_WRITE = """\
Write the answer; a line with a single dot ends it. Instead of it, alone on the
first line: undo (the last answer), skip, quit.
"""
HOW_TO_COMPARE = """\
Which is better: 1, 2, or = if they are equally good? Or undo, skip, quit.
"""


# ---- What is asked, and where the answers go ---------------------------------------------------


def questions_file(cfg, *files: str) -> Path:
    """--prompts, or the first of `files` that --data has."""
    paths = [Path(cfg.data) / f"{name}.jsonl" for name in files]
    return Path(cfg.prompts) if cfg.prompts else next(filter(Path.exists, paths), paths[-1])


def read_questions(cfg, tokenizer, *files: str) -> tuple[Path, list[dict], dict[str, GPT]]:
    """The file of prompts, its rows as `read_rows` has them, and the models that are to complete
    them: none if every row brings its own completions."""
    path = questions_file(cfg, *files)
    answered = ["completions" in row for _, row in read_lines(path, "prompt")]
    if all(answered):
        return path, read_rows(path, tokenizer, sys.maxsize, *RANKING), {}
    if any(answered):
        count = f"{sum(answered)} of {len(answered)}"
        raise UserError(f"{path}: completions should be in every row or in none, not in {count}")
    if not 2 <= cfg.k_min <= cfg.k_max:
        raise UserError(f"k_min {cfg.k_min} and k_max {cfg.k_max}: at least 2, and in this order")
    models = {name: load(cfg, name) for name in cfg.models.split(",")}
    longest = min(room(model, cfg) for model in models.values())
    return path, read_rows(path, tokenizer, longest, "prompt"), models


def answers_file(cfg, questions: Path, name: str) -> Path:
    """--to, or `name` in --data; what is held out among the prompts is so among the answers."""
    split = "_valid" if questions.stem.endswith("_valid") else ""
    return Path(cfg.to) if cfg.to else Path(cfg.data) / f"{name}{split}.jsonl"


def names(cfg) -> str:
    """The checkpoints that answer: with the prompt, what tells one question from another."""
    return ",".join(str(checkpoint(cfg, name)) for name in cfg.models.split(","))


# ---- The terminal ------------------------------------------------------------------------------


def wrapped(text: str, mark: str = "") -> str:
    """Safe to print, within 79 columns, every line after the first indented by the mark's width."""
    blank, lines = " " * len(mark), []
    for line in printable(text).strip().split("\n"):
        indents = {"initial_indent": blank if lines else mark, "subsequent_indent": blank}
        lines += textwrap.wrap(line, WIDTH, **indents) or [indents["initial_indent"].rstrip()]
    return "\n".join(lines)


def reply(prompt: str, understand: Callable):
    """A command, or what `understand` makes of the line; asks again for as long as that raises a
    ValueError, whose sentence is shown."""
    while True:
        line = input(prompt).strip()
        if line.lower() in COMMANDS:
            return line.lower()
        try:
            return understand(line)
        except ValueError as error:
            print(wrapped(str(error), "  "))


def ranking(line: str, k: int) -> list[int]:
    """ "2 1=3" -> [1, 0, 1]: the ranks of answers 1, 2 and 3; 0 is best, equals share one."""
    places = {str(i + 1): i for i in range(k)}
    ranks = {}
    for rank, equals in enumerate(re.sub(r"\s*=\s*", "=", line).split()):
        for number in equals.split("="):
            if number not in places:
                raise ValueError(f"{number!r} is not a number from 1 to {k}: best first, as in 2 1")
            if number in ranks:
                raise ValueError(f"{number} is there twice: each answer has one place")
            ranks[number] = rank
    if missing := [number for number in places if number not in ranks]:
        raise ValueError(f"every answer needs a place, not yet there: {', '.join(missing)}")
    return [ranks[number] for number in places]


def preference(line: str) -> list[int]:
    """1, 2 or =, as ranks."""
    if line not in ("1", "2", "="):
        raise ValueError("1 if the first is better, 2 if the second, = if neither")
    return {"1": [0, 1], "2": [1, 0], "=": [0, 0]}[line]


def notes(line: str, k: int) -> list[dict]:
    """ "2:6 3:2fh" -> for each of k answers {"quality": 1 to 7, "marks": [str, ...]}, or {}."""
    given = [{} for _ in range(k)]
    for word in line.split():
        parts = re.fullmatch(r"([1-9]\d*):([1-7]?)([a-z]*)", word)
        unknown = not parts or int(parts[1]) > k or set(parts[3]) - set(MARKS)
        if unknown or not (parts[2] or parts[3]):
            letters = ", ".join(f"{axis} {'/'.join(AXES[axis])}" for axis in AXES)
            raise ValueError(f"{word!r} is not answer:quality and letters ({letters}), as in 2:6h")
        own = {"quality": int(parts[2])} if parts[2] else {}
        given[int(parts[1]) - 1] = own | {"marks": [MARKS[letter] for letter in parts[3]]}
    return given


def paragraph() -> str:
    """What a person writes, up to a line with a single dot; a command if that is all there is."""
    lines = []
    while (line := printable(input("> ")).rstrip()) != ".":
        lines.append(line)
        if len(lines) == 1 and line.strip().lower() in COMMANDS:
            return line.strip().lower()
    return "\n".join(lines).strip()


# ---- The session -------------------------------------------------------------------------------


def collect(path: Path, rows: list[dict], own: dict, ask: Callable, *fields: str, comment=None):
    """Ask about every row that this person has not answered yet, and save the answers in `path`.

    `own` is what each of their answers has in common, `fields` what each must have. ask(row)
    returns an answer or a command; comment(answer), once that is safe, the answer with notes or a
    command. Returns all of this person's answers to these rows, those of earlier sessions too.
    """
    questions = {question(row, own.get("models", "")): row for row in rows}
    answered, skipped = earlier_answers(path, questions, own, fields), set()
    try:
        while left := [key for key in questions if key not in answered and key not in skipped]:
            print("-" * WIDTH, f"{len(answered)} of {len(questions)} answered", sep="\n")
            key, given = left[0], ask(questions[left[0]])
            if isinstance(given, dict):
                row = {**given, **own, "time": now()}
                answered[key] = save(path, row)
                given = comment(row) if comment else row
                if isinstance(given, dict) and given != row:
                    answered[key] = replace(path, answered[key], given)
            if given == "quit":
                break
            if given == "skip":
                skipped.add(key)
            if given == "undo":
                take_back(path, answered)
    except (EOFError, KeyboardInterrupt):
        print()
    print(f"{len(answered)} of {len(questions)} answered, in {path}")
    return [json.loads(line) for line in answered.values()]


def earlier_answers(path: Path, questions: dict, own: dict, fields: tuple) -> dict[tuple, str]:
    """The lines of the file that answer one of the questions and have what is `own`."""
    answers = {}
    for line, row in read_answers(path, *fields):
        key = question(row, own.get("models", ""))
        if key in questions and own.items() <= row.items():
            answers[key] = line
    return answers


def take_back(path: Path, answered: dict) -> None:
    """Remove the last answer from the file, so that its question is asked again."""
    if not answered:
        print("  there is no answer to take back")
        return
    _, line = answered.popitem()
    replace(path, line)


def person(cfg) -> str:
    """The name that goes with the answers."""
    if not cfg.by.strip() or cfg.by.endswith(".pt"):
        raise UserError(f"--by {cfg.by!r}: the name of a person is needed here")
    return "you" if cfg.by == "scripted" else cfg.by


def seeded(cfg, row: dict, *more) -> Random:
    """Chance, but the same whenever the same is asked again."""
    return Random(json.dumps([cfg.seed, row["prompt"], *more]))


def shown_order(cfg, row: dict, k: int) -> list[int]:
    """Which completion stands at each place of the screen: chance, for each person another."""
    return seeded(cfg, row, cfg.by).sample(range(k), k)


def sample_answers(models: dict, authors: list[str], row: dict, tokenizer, cfg) -> list[str]:
    """A completion by each author, in the order of `models`; the same whenever asked again."""
    torch.manual_seed(seeded(cfg, row).getrandbits(32))
    texts = []
    for name, model in models.items():
        prompts = [row["prompt_ids"]] * authors.count(name)
        if prompts:
            tokens, mask, _ = complete(model, prompts, tokenizer.eot_token, cfg.max_new_tokens)
            texts += [decode(tokenizer, ids) for ids in responses(tokens, mask)]
    return [own_turn(text) for text in texts]


def compare(cfg, row: dict, completions: list[str], prompt: str, understand: Callable):
    """Show the completions in an order of chance; the ranks that a person gives them, with what was
    ranked, or a command."""
    order = shown_order(cfg, row, len(completions))
    print(wrapped(row["prompt"]))
    for number, i in enumerate(order, 1):
        print("\n" + wrapped(completions[i], f"{number}  "))
    given = reply("\n" + prompt, understand)
    if isinstance(given, str):
        return given
    ranks = unshuffled(given, order)
    return {"prompt": row["prompt"], "completions": completions, "ranks": ranks}


def unshuffled(given: list, order: list[int]) -> list:
    """What was said of the answers on the screen, in the order of the file."""
    return [given[order.index(i)] for i in range(len(order))]


# ---- What a person can do ----------------------------------------------------------------------


def rank(cfg) -> None:
    """A person ranks completions, which come shuffled and unnamed; notes if they like."""
    tokenizer, own = get_tokenizer(cfg.data), {"labeler": person(cfg)}
    path, rows, models = read_questions(cfg, tokenizer, "rm_prompts", "prompts")

    def draw(row: dict) -> list[str]:
        rng = seeded(cfg, row)
        authors = rng.choices(cfg.models.split(","), k=rng.randint(cfg.k_min, cfg.k_max))
        return list(dict.fromkeys(sample_answers(models, authors, row, tokenizer, cfg)))

    def ask(row: dict) -> dict | str:
        completions = draw(row) if models else row["completions"]
        if len(completions) < 2:
            print("  there is but one answer: prompt left out")
            return "skip"
        return compare(cfg, row, completions, "rank> ", lambda s: ranking(s, len(completions)))

    print(HOW_TO_RANK)
    for axis, letters in AXES.items():
        print(*(f"  {axis:9} {letter}  {MARKS[letter]}" for letter in letters), sep="\n")
    own |= {"models": names(cfg)} if models else {}
    to = answers_file(cfg, path, "comparisons")
    collect(to, rows, own, ask, *RANKING, comment=lambda answer: comment(cfg, answer))


def comment(cfg, answer: dict) -> dict | str:
    """The answer with a person's notes on it, if there are any, or a command."""
    order = shown_order(cfg, answer, len(answer["completions"]))
    given = reply("notes> ", lambda line: notes(line, len(order)))
    if isinstance(given, str):
        return given
    return {**answer, "notes": unshuffled(given, order)} if any(given) else answer


def write(cfg) -> None:
    """A person writes demonstrations."""
    own = {"labeler": person(cfg)}
    path = questions_file(cfg, "prompts")
    rows = [{"prompt": row["prompt"]} for _, row in read_lines(path, "prompt")]

    def ask(row: dict) -> dict | str:
        print(wrapped(row["prompt"]))
        while not (text := paragraph()):
            print("  an answer has a word at least")
        is_answer = text not in COMMANDS
        return {"prompt": row["prompt"], "completion": f" {text}"} if is_answer else text

    print(HOW_TO_WRITE)
    collect(answers_file(cfg, path, "sft"), rows, own, ask, "prompt", "completion")


def blind(cfg) -> None:
    """A person says which of two models answers better, not knowing which is which."""
    tokenizer, two = get_tokenizer(cfg.data), cfg.models.split(",")
    if len(two) != 2:
        raise UserError(f"{cfg.models}: two models are compared, and a comma parts their names")
    own = {"labeler": person(cfg), "models": names(cfg)}
    path, rows, models = read_questions(cfg, tokenizer, "prompts_valid", "prompts")
    if not models:
        raise UserError(f"{path} has completions: to compare two models takes prompts alone")

    def ask(row: dict) -> dict | str:
        answers = sample_answers(models, two, row, tokenizer, cfg)
        return compare(cfg, row, answers, "better> ", preference)

    print(HOW_TO_COMPARE)
    path = Path(cfg.to or Path(cfg.out) / "blind.jsonl")
    answers = collect(path, rows, own, ask, *RANKING)
    if answers:
        print(verdict(*two, np.array([row["ranks"] for row in answers])))


def verdict(a: str, b: str, ranks: np.ndarray) -> str:
    """Who was preferred, from the ranks (N, 2) of both."""
    rate, margin = win_rate(-ranks[:, 0], -ranks[:, 1])
    first, second = (ranks[:, 0] < ranks[:, 1]).sum(), (ranks[:, 0] > ranks[:, 1]).sum()
    return (
        f"{a} is preferred to {b} on {rate:.1%} ± {margin:.1%} of {len(ranks)} prompts "
        f"(ties half; 95 % interval): {first} times better, {second} worse, "
        f"{len(ranks) - first - second} tied"
    )

"""Have completions ranked by the fable's scripted labelers, a person, or a reward model.

A person can also write demonstrations and compare two models blind (README.md in this folder).
Every answer is on the disk before the next question is asked.
"""

import argparse
import re
import sys
import textwrap
import time
import unicodedata
from collections import defaultdict
from contextlib import suppress
from dataclasses import dataclass
from itertools import combinations
from pathlib import Path
from random import Random

import numpy as np
import torch

sys.path.insert(0, str(Path(__file__).parent.parent))
import rlhf  # noqa: E402
from data import fable, files  # noqa: E402
from data.files import UserError, printable, read_jsonl, write_jsonl  # noqa: E402
from model import ScalarModel  # noqa: E402

COLUMNS = 79
BLOCK = 8  # prompts sampled at a time for a person: few, so that the first question comes soon
COMMANDS = ("undo", "skip", "quit")

@dataclass
class Label(rlhf.Settings):
    models: str = "sft,sft,sft,sft,gpt"  # each completion is by one of these, drawn at random
    k_min: int = 4  # fewest completions per prompt (paper: 4)
    k_max: int = 9  # most completions per prompt (paper: 9)
    round: int = 1  # round of collecting; a later one keeps the rankings of earlier rounds
    by: str = "scripted"  # who ranks: scripted, the name of a person, or a reward model's .pt
    write: bool = False  # a person writes demonstrations
    valid: bool = False  # a person is asked about held-out prompts
    agreement: str = ""  # print how often the labelers of this file agree
    blind = None  # the two models of --blind

class Sampler:
    """Samples completions in the same way for everybody who ranks them."""

    def __init__(self, cfg: Label):
        if not 2 <= cfg.k_min <= cfg.k_max:
            raise UserError(f"k_min {cfg.k_min} and k_max {cfg.k_max}: at least 2, in this order")
        self.cfg = cfg
        self.tokenizer = files.get_tokenizer(cfg.data)
        self.names = cfg.blind or cfg.models.split(",")
        self.models = {name: rlhf.load(cfg, name) for name in self.names}

    def read(self, path: Path) -> list[dict]:
        longest = rlhf.longest_prompt(list(self.models.values()), self.cfg)
        return files.read_prompts(path, self.tokenizer, longest)

    def fill(self, rows: list[dict], rng: Random) -> None:
        """Give each row K completions by models drawn at random; if blind, one by each model.

        The last of K answers another prompt. Without it the reward model never learns that a good
        answer to the wrong question is bad, and PPO soon exploits that.
        """
        torch.manual_seed(rng.getrandbits(62))
        asked = defaultdict(list)
        for row in rows:
            row["completions"] = []
            authors = self.names
            if not self.cfg.blind:
                k = rng.randint(self.cfg.k_min, self.cfg.k_max)
                authors = rng.choices(self.names, k=k - 1)
            for name in authors:
                asked[name].append(row)
        for name, own in asked.items():
            prompts = [row["prompt_ids"] for row in own]
            eos = self.tokenizer.eot_token
            responses = rlhf.complete(self.models[name], prompts, eos, self.cfg)
            for row, ids in zip(own, responses):
                row["completions"].append(files.own_turn(files.decode(self.tokenizer, ids)))
        if not self.cfg.blind:
            order = rng.sample(rows, len(rows))
            strays = [rng.choice(row["completions"]) for row in order]
            for row, stray in zip(order, strays[1:] + strays[:1]):
                row["completions"].append(stray)

def rank_by_machine(cfg: Label) -> None:
    """Write comparisons.jsonl and comparisons_valid.jsonl anew, and print the agreement."""
    paths = [Path(cfg.data) / "comparisons.jsonl", Path(cfg.data) / "comparisons_valid.jsonl"]
    for path in paths:
        if any("time" in row for row in read_answers(path)):
            raise UserError(f"{path} has answers by people: move it first")
    judge = None
    if cfg.by != "scripted":
        judge = rlhf.load(cfg, cfg.by, ScalarModel)
    sampler = Sampler(cfg)
    rng = Random(cfg.seed)
    for path in paths:
        rankings = [row for row in read_answers(path) if row.get("round", 1) < cfg.round]
        rows = sampler.read(path.with_name(path.name.replace("comparisons", "rm_prompts")))
        if not judge and "wants" not in rows[0]:
            raise UserError("the scripted labelers only know the fable: say who ranks with --by")
        sampler.fill(rows, rng)
        for row in rows:
            labelers = [rng.choice(fable.TRAIN_LABELERS)]
            if path == paths[1]:
                labelers = fable.TRAIN_LABELERS + fable.HELDOUT_LABELERS
            if judge:
                ranks = {cfg.by: rank_by_model(judge, row, sampler)}
            else:
                texts = row["completions"]
                ranks = {who.name: fable.rank(who, row, texts, rng) for who in labelers}
            for name, own in ranks.items():
                given = {"ranks": own, "labeler": name, "round": cfg.round}
                rankings.append(only(row, "prompt", "completions", "task") | given)
        write_jsonl(path, rankings)
        print(f"{path}: {len(rankings)} rankings")
    if not judge:
        print_agreement(path)

def rank_by_model(judge: ScalarModel, row: dict, sampler: Sampler) -> list[int]:
    """Rank by score, equal texts alike. Of a long text the judge reads the end."""
    examples = []
    for text in row["completions"]:
        ids = files.example(sampler.tokenizer, row["prompt"], text).ids
        examples.append(files.Example(ids[-judge.config.block_size :], 0))
    with torch.no_grad():
        scores = rlhf.score(judge, examples, sampler.cfg).tolist()
    score_of = dict(zip(row["completions"], scores))
    best_first = sorted(set(score_of.values()), reverse=True)
    return [best_first.index(score_of[text]) for text in row["completions"]]

def print_agreement(path: Path | str) -> None:
    """Print how often labelers agree, and apart from them the held-out ones of the fable."""
    rankings = read_jsonl(path, "prompt", "completions", "ranks", "labeler")
    heldout = [labeler.name for labeler in fable.HELDOUT_LABELERS]
    others = [row for row in rankings if row["labeler"] not in heldout]
    unseen = [row for row in rankings if row["labeler"] in heldout]
    print(f"labelers {agreement(others)} (paper: 72.6%)")
    if unseen:
        print(f"held-out labelers {agreement(unseen)} (paper: 77.3%)")

def agreement(rankings: list[dict]) -> str:
    """How often two labelers order two completions alike; pairs that either ties do not count."""
    ranked = defaultdict(dict)
    for row in rankings:
        completions = (row["prompt"], *row["completions"])
        ranked[completions][row["labeler"]] = row["ranks"]
    signs = []
    for labelers in ranked.values():
        for one, other in combinations(labelers.values(), 2):
            for i, j in combinations(range(len(one)), 2):
                signs.append((one[i] - one[j]) * (other[i] - other[j]))
    untied = [sign > 0 for sign in signs if sign != 0]
    return f"agree on {sum(untied) / max(1, len(untied)):.1%} of {len(untied)} untied pairs"

# ---- People, several of whom may add to the same file at once -----------------------------------
def only(row: dict, *fields: str) -> dict:
    return {name: row[name] for name in fields if name in row}

def read_answers(path: Path) -> list[dict]:
    return read_jsonl(path) if path.exists() else []

def update(path: Path, answer: dict, undo: bool = False) -> None:
    """Add an answer, or take it back. The file is replaced as a whole, so a kill cuts no line."""
    path.parent.mkdir(parents=True, exist_ok=True)
    with open(path.with_name(f".{path.name}.lock"), "w") as file:
        while not files.lock(file):
            time.sleep(0.05)
        rows = [row for row in read_answers(path) if row != answer]
        if not undo:
            rows.append(answer)
        write_jsonl(path, rows)

def collect(path: Path, rows: list[dict], own: dict, ask) -> list[dict]:
    """Ask about every prompt that has no answer yet; returns all answers.

    `own` is part of each answer of this labeler, also of those from earlier sessions. ask(row)
    returns an answer or a command.
    """
    questions = {row["prompt"]: row for row in rows}
    answered = {}
    for row in read_answers(path):
        if row.get("prompt") in questions and own.items() <= row.items():
            answered[row["prompt"]] = row
    left = [prompt for prompt in questions if prompt not in answered]
    with suppress(EOFError, KeyboardInterrupt):
        while left:
            row = questions[left[0]]
            progress = f"{len(answered)} of {len(questions)} answered (undo, skip or quit)"
            print("-" * COLUMNS, progress, wrapped(row["prompt"]), sep="\n")
            given = ask(row)
            if given == "quit":
                break
            elif given == "skip":
                left.pop(0)
            elif given == "undo" and answered:
                prompt, last = answered.popitem()
                left.insert(0, prompt)
                update(path, last, undo=True)
            elif given != "undo":
                given = only(row, "prompt", "completions") | given | own
                given["time"] = time.strftime("%Y-%m-%dT%H:%M:%S%z")
                update(path, given)
                answered[left.pop(0)] = given
    print(f"\n{len(answered)} of {len(questions)} answered, in {path}")
    return list(answered.values())

def wrapped(text: str, mark: str = "") -> str:
    """Make text safe to print, in lines of at most COLUMNS, indented below the mark."""
    padded = ""
    for character in printable(text).strip():
        padded += character
        if unicodedata.east_asian_width(character) in "WF":  # it takes two columns
            padded += "\0"
    lines = []
    for line in padded.split("\n"):
        lines += textwrap.wrap(line, COLUMNS - len(mark)) or [""]
    return mark + ("\n" + " " * len(mark)).join(lines).replace("\0", "")

def ranking(line: str, k: int) -> list[int]:
    """The ranks of k answers from a line such as "2 1=3"; [] unless each answer is there once."""
    if k == 2:
        line = {"1": "1 2", "2": "2 1", "=": "1=2"}.get(line, line)
    places = [equals.split("=") for equals in re.sub(r"\s*=\s*", "=", line).split()]
    numbers = list(map(str, range(1, k + 1)))
    if sorted(sum(places, [])) != sorted(numbers):
        return []
    ranks = {}
    for rank, equals in enumerate(places):
        ranks |= dict.fromkeys(equals, rank)
    return [ranks[number] for number in numbers]

def ask_ranks(row: dict, rng: Random) -> dict | str:
    """Show the completions in random order until a person ranks them or gives a command."""
    k = len(row["completions"])
    order = rng.sample(range(k), k)
    for number, place in enumerate(order, 1):
        print("\n" + wrapped(row["completions"][place], f"{number}  "))
    while True:
        line = input("\nrank> ").strip().lower()
        if line in COMMANDS:
            return line
        given = ranking(line, k)
        if given:
            return {"ranks": [given[order.index(place)] for place in range(k)]}
        print(f"  each number from 1 to {k} once, best first, = between equals, as in 2 1=3")

def ask_text(row: dict) -> dict | str:
    """Read an answer, kept exactly as typed, up to a line with a single dot; or a command."""
    print("\nWrite the answer; a line with a single dot ends it.")
    lines = []
    while True:
        try:
            line = input("> ")
        except (EOFError, KeyboardInterrupt):
            if not lines:
                raise
            if input("\nSave these lines? y saves them, Enter goes on writing: ") != "y":
                continue
            line = "."
        if not lines and line.strip().lower() in COMMANDS:
            return line.strip().lower()
        if line != ".":
            lines.append(line)
        elif "".join(lines).strip():
            return {"completion": " " + "\n".join(lines)}

def ask_person(cfg: Label) -> None:
    """A person writes demonstrations, ranks completions, or compares two models."""
    if cfg.by.endswith(".pt") or (cfg.write and cfg.blind):
        raise UserError("--write and --blind are for people, and one at a time")
    data = Path(cfg.data)
    split = "_valid" if cfg.valid else ""  # what is held out stays held out
    own = {"labeler": "you" if cfg.by == "scripted" else cfg.by}
    if cfg.write:
        rows = read_jsonl(data / f"prompts{split}.jsonl", "prompt")
        collect(data / f"sft{split}.jsonl", rows, own, ask_text)
        return
    prompts = data / f"rm_prompts{split}.jsonl"
    to = data / f"comparisons{split}.jsonl"
    if cfg.blind:
        prompts = data / "prompts_valid.jsonl"
        to = Path(cfg.out) / "blind.jsonl"
    sampler = Sampler(cfg)
    distinct = {row["prompt"]: only(row, "prompt", "prompt_ids") for row in sampler.read(prompts)}
    rows = list(distinct.values())
    own["models"] = ",".join(str(rlhf.checkpoint(cfg, name)) for name in sampler.names)

    def ask(row: dict) -> dict | str:
        last = max(0, len(rows) - 2)  # no block has one row, as its answers go to other prompts
        start = min(rows.index(row), last) // BLOCK * BLOCK
        if "completions" not in row:
            prompt = rows[start]["prompt"]
            stop = start + BLOCK
            if stop == len(rows) - 1:
                stop = len(rows)
            sampler.fill(rows[start:stop], Random(f"{cfg.seed} {start} {prompt}"))
        return ask_ranks(row, Random(f"{cfg.seed} {cfg.by} {row['prompt']}"))

    answers = collect(to, rows, own, ask)
    if cfg.blind and answers:
        ranks = np.array([answer["ranks"] for answer in answers])
        share, margin = rlhf.win_rate(-ranks.T[:1], -ranks.T[1:])
        two = " is preferred to ".join(cfg.blind)
        print(f"{two} on {share:.1%} ± {margin:.1%} of {len(ranks)} prompts (95 % interval)")

def label(cfg: Label) -> None:
    if cfg.agreement:
        print_agreement(cfg.agreement)
    elif (cfg.by == "scripted" or cfg.by.endswith(".pt")) and not (cfg.write or cfg.blind):
        rank_by_machine(cfg)
    else:
        ask_person(cfg)

def main(argv: list[str] | None = None) -> None:
    """python data/label.py [--by WHO] [--write | --blind A B | --agreement FILE] --flag value"""
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0], allow_abbrev=False)
    rlhf.add_flags(parser, Label)
    parser.add_argument("--blind", nargs=2, metavar="MODEL", help="a person compares two models")
    cfg = Label()
    vars(cfg).update(vars(parser.parse_args(argv)))
    rlhf.run_stage(label, cfg)

if __name__ == "__main__":
    for stream in (sys.stdin, sys.stdout):
        stream.reconfigure(errors="replace")  # a stray byte is no reason to stop
    if sys.stdin.isatty():
        with suppress(ImportError):
            import readline  # noqa: F401  the arrow keys edit the line
    main()

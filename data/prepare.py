"""Write the files of a data set.

    python data/prepare.py fable            a made-up world, into out/data, in seconds, from nothing
    python data/prepare.py fable --show 20  print samples for a person to read, and write nothing
    python data/prepare.py oasst            OpenAssistant's trees, ranked by people, into out/oasst
    python data/prepare.py hh               Anthropic's pairs of dialogues, into out/hh
    python data/prepare.py webtext          text like GPT-2's own, for ptx, into out/webtext
    python data/prepare.py mine FILE ...    your own files, into out/mine

README.md beside this file names every file and every field.
"""

import argparse
import json
import os
import re
import sys
from collections import Counter
from contextlib import ExitStack
from functools import partial
from pathlib import Path
from random import Random

import tiktoken

sys.path.insert(0, str(Path(__file__).parent.parent))  # so that `python data/prepare.py` finds data
from data import answers, dataset, fable, feedback  # noqa: E402
from data.bpe import tiktoken_file, train_bpe  # noqa: E402
from data.download import fetch  # noqa: E402
from data.formats import EOT, UserError, get_tokenizer, replacing  # noqa: E402

SAMPLE = 3_000_000  # characters of text that the vocabulary is learnt from


# ---------------------------------------------------------------- files

def json_lines(rows: list[dict]) -> str:
    return "".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows)


def write_files(files: dict[str, str], out: Path):
    """All of them or none: the first takes its place when the last is written. Raises UserError
    where people have added rows, which would be lost."""
    answers.keep(out / name for name in files if name.endswith(".jsonl"))
    with ExitStack() as stack:
        for name, text in files.items():
            file = stack.enter_context(replacing(out / name))
            file.write(text.encode())
            file.flush()


def write_all(files: dict, out: Path) -> tiktoken.Encoding:
    """The fable's files, and the vocabulary of its text."""
    vocabulary = tiktoken_file(train_bpe(files["pretrain.txt"][:SAMPLE]))
    texts = {name: x if isinstance(x, str) else json_lines(x) for name, x in files.items()}
    write_files({"tokenizer.tiktoken": vocabulary, **texts}, out)
    tokenizer = get_tokenizer(out)
    sample = files["pretrain_valid.txt"][:10_000]
    if tokenizer.decode(tokenizer.encode_ordinary(sample)) != sample:
        raise SystemExit("The vocabulary does not give the text back: this is a bug in train_bpe.")
    return tokenizer


# ---------------------------------------------------------------- what a person sees

def print_table(files: dict, tokenizer: tiktoken.Encoding):
    print(f"{'file':24}{'rows':>8}{'tokens':>12}{'MB':>8}   sources and tasks, in per cent")
    for name, content in files.items():
        text = content if isinstance(content, str) else "".join(
            row["prompt"] + row.get("completion", "") for row in content)
        documents = text.split(EOT)
        rows = len(documents) - 1 if isinstance(content, str) else len(content)
        tokens = sum(map(len, tokenizer.encode_ordinary_batch(documents)))
        print(f"{name:24}{rows:8,}{tokens:12,}{len(text) / 1e6:8.2f}   {shares(content)}")


def shares(rows) -> str:
    """"labeler 88, customer 12 | generation 44, ...", as in the paper's Tables 1 and 6."""
    parts = []
    for field in ("source", "task"):
        counts = Counter(row[field] for row in rows if isinstance(row, dict) and field in row)
        parts.append(", ".join(f"{k} {100 * n / len(rows):.0f}" for k, n in counts.most_common()))
    return " | ".join(filter(None, parts))


def show(count: int, seed: int):
    """Samples of everything, for a person to read."""
    rng = Random(seed)
    print("=== pretraining documents")
    for _ in range(count):
        print(fable.pretrain_document(rng).strip(), end="\n---\n")
    for task in fable.TASKS:
        print(f"\n=== {task}: prompts and demonstrations, with their gold score")
        for i in range(max(1, count // 4)):
            row = fable.ask(rng, task, "customer" if i % 2 else "labeler")
            answer = fable.labeled(row, rng)
            print(f"{row['prompt'].strip()}{answer}\n    {axes(row, answer)}")
    show_ranking(rng)
    print("\n=== probes: what is to follow stands in brackets")
    for row in fable.probes(rng, max(3, count // 4)):
        print(f"{row['prompt']}[{row['completion']}]", end="\n---\n")


def show_ranking(rng: Random):
    row = fable.ask(rng, "generation")
    answers = [fable.labeled(row, rng) for _ in range(6)]
    ranks = [fable.rank(labeler, row, answers, rng) for labeler in fable.TRAIN_LABELERS]
    print(f"\n=== a ranking: one column a scripted labeler, 0 is best\n{row['prompt'].strip()}")
    for i, answer in enumerate(answers):
        print(f"  {' '.join(str(rank[i]) for rank in ranks)}  {axes(row, answer)} {answer}")


def axes(row: dict, answer: str) -> str:
    return "  ".join(f"{axis} {value:.2f}" for axis, value in fable.gold(row, answer).items())


# ---------------------------------------------------------------- people's data

def sources(args) -> tuple[list[Path], list[Path]]:
    """The files to train on and those to hold out: the ones named, or else downloaded."""
    if args.files:
        files = [file for path in args.files for file in files_of(path)]
        held = [file for file in files if "_valid." in file.name] + args.heldout
        return [file for file in files if file not in held], held
    cache = args.data / "download"
    if args.name == "oasst":
        return [fetch(feedback.OASST[0], cache / "oasst.jsonl.gz", feedback.OASST[1])], []
    if args.name == "hh":
        pairs = zip(("train", "test"), feedback.HH_SHA256[args.subset])
        urls = [(feedback.HH.format(args.subset, part), part, sha256) for part, sha256 in pairs]
        return tuple([fetch(url, cache / f"hh_{args.subset}_{part}.jsonl.gz", sha256)]
                     for url, part, sha256 in urls)
    names = args.split, "valid"
    return tuple([fetch(feedback.WEBTEXT.format(name), cache / f"webtext.{name}.jsonl")]
                 for name in names)


def files_of(path: Path) -> list[Path]:
    """The file itself, or the files of a folder that hold text or JSON."""
    known = re.compile(r"\.(txt|md|jsonl?)(\.gz)?$")
    files = sorted(file for file in path.iterdir() if known.search(file.name)) \
        if path.is_dir() else [path]
    if not files:
        raise UserError(f"{path} has no .jsonl, .json, .txt or .md file")
    return files


def prepare(args):
    """Read and check everything, say what was found, and only then write."""
    readers = {"oasst": partial(feedback.oasst, lang=getattr(args, "lang", "")), "hh": feedback.hh,
               "webtext": feedback.webtext, "mine": feedback.own}
    notes, tokenizer = Counter(), get_tokenizer(args.data)
    train, heldout = (dataset.read(paths, readers[args.name], notes, args.skip_bad)
                      for paths in sources(args))
    if not any(train.values()):
        raise UserError("there is nothing to train on in these files; nothing is written")
    dataset.fill(train, heldout)
    sides = dataset.split_all(train, heldout, args.valid, args.seed, notes)
    files = {}
    for kind in filter(train.get, dataset.KINDS):
        for rows, suffix in zip(sides, ("", "_valid")):
            files[f"{kind}{suffix}.{'txt' if kind == 'pretrain' else 'jsonl'}"] = rows[kind]
    if rankings := train["comparisons"] + heldout["comparisons"]:
        print(dataset.describe(rankings))
    for note, count in sorted(notes.items()):
        if count:
            print(f"  {count:,} {note}")
    files = dataset.fit(files, tokenizer, args.context)
    for suffix in ("", "_valid") if train["prompts"] else ():
        files[f"rm_prompts{suffix}.jsonl"] = files[f"prompts{suffix}.jsonl"]
    write_files({name: as_text(rows) for name, rows in files.items()}, args.data)
    print(f"\nWritten into {args.data}, tokens of a vocabulary of {tokenizer.n_vocab:,}.")
    here = {path.name for path in args.data.iterdir() if path.suffix in (".jsonl", ".txt")}
    if older := here - files.keys():
        print(f"There before, and left as it is: {', '.join(sorted(older))}")
    print(dataset.stages(files, older))


def as_text(rows: list) -> str:
    return "".join(text + EOT for text in rows) if isinstance(rows[0], str) else json_lines(rows)


# ---------------------------------------------------------------- command line

def number(kind, low, high):
    """An argparse type: a number from low to high, refused in one sentence otherwise."""
    def parse(text: str):
        try:
            value = kind(text)
        except ValueError:
            value = None
        if value is None or not low <= value <= high:
            raise argparse.ArgumentTypeError(f"must be a number from {low} to {high}, not {text!r}")
        return value
    return parse


class Parser(argparse.ArgumentParser):
    def error(self, message):
        self.exit(2, f"{self.prog}: {message}\n")


def main(arguments: list[str] | None = None):
    parser = Parser(prog="prepare.py", description="Write the files of a data set.",
                    allow_abbrev=False)
    sets = parser.add_subparsers(dest="name", required=True, metavar="DATA", parser_class=Parser)
    made_up = add_set(sets, "fable", "a made-up world, from nothing", "out/data")
    made_up.add_argument("--scale", type=number(float, 0.001, 100), default=1.0,
                         help="1 is the full set")
    made_up.add_argument("--show", type=number(int, 0, 10_000), default=0,
                         help="print so many samples, write nothing")
    add_people(sets)
    args = parser.parse_args(arguments)
    if args.name == "fable" and args.show:
        return show(args.show, args.seed)
    try:
        if args.data.exists() and not args.data.is_dir():
            raise UserError(f"{args.data} is a file: --data takes a folder.")
        make_fable(args) if args.name == "fable" else prepare(args)
    except (UserError, OSError) as error:
        raise SystemExit(f"prepare.py: {error}") from None


def make_fable(args):
    files = fable.make(args.seed, args.scale)
    print_table(files, write_all(files, args.data))


def add_set(sets, name: str, text: str, folder: str) -> argparse.ArgumentParser:
    parser = sets.add_parser(name, help=text, description=text, allow_abbrev=False)
    parser.add_argument("--seed", type=number(int, 0, 2 ** 31), default=1,
                        help="the same seed gives the same files")
    parser.add_argument("--data", type=Path, default=Path(folder), help="folder to write into")
    return parser


def add_people(sets):
    """The data sets that people made: the flags that they share, and their own."""
    texts = {"oasst": "OpenAssistant's message trees, ranked by people",
             "hh": "Anthropic's dialogues, a better and a worse reply",
             "webtext": "OpenAI's samples of WebText, for pretraining and ptx",
             "mine": "your own files: JSON Lines, JSON lists, plain text, or a folder of them"}
    for name, text in texts.items():
        own = add_set(sets, name, text, f"out/{name}")
        own.add_argument("files", type=Path, nargs="+" if name == "mine" else "*", metavar="FILE",
                         help="local files" + ("" if name == "mine" else " [downloaded]"))
        own.add_argument("--heldout", type=Path, nargs="+", default=[], metavar="FILE",
                         help="files to judge by; without any, a share of the others")
        own.add_argument("--valid", type=number(float, 0.001, 0.5), default=0.05,
                         help="the share of dialogues or documents that is held out")
        own.add_argument("--context", type=number(int, 8, 10 ** 6), default=1024,
                         help="rows over so many tokens are left out (GPT-2's: 1,024)")
        own.add_argument("--skip-bad", action="store_true", help="leave out rows with mistakes")
        if name == "oasst":
            own.add_argument("--lang", default="en", help='language, "all" for every one')
        if name == "hh":
            own.add_argument("--subset", choices=[*feedback.HH_SHA256], default="helpful-base",
                             help="which of its four parts to download")
        if name == "webtext":
            own.add_argument("--split", choices=("test", "train"), default="test",
                             help="5,000 documents, or 250,000")


if __name__ == "__main__":
    try:
        main()
    except BrokenPipeError:  # the reader of the output has seen enough
        os.dup2(os.open(os.devnull, os.O_WRONLY), 1)
    except KeyboardInterrupt:
        sys.exit("\nprepare.py: stopped")

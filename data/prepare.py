"""Write the files of a data set.

    python data/prepare.py fable            into out/data, in seconds, from nothing
    python data/prepare.py fable --show 20  print samples for a person to read, and write nothing

README.md beside this file names every file and every field.
"""

import argparse
import base64
import json
import os
import sys
from collections import Counter
from pathlib import Path
from random import Random

import regex  # comes with tiktoken
import tiktoken

sys.path.insert(0, str(Path(__file__).parent.parent))  # so that `python data/prepare.py` finds data
from data import fable  # noqa: E402
from data.formats import EOT, GPT2_SPLIT, get_tokenizer  # noqa: E402

VOCAB_SIZE, SAMPLE = 1024, 3_000_000  # characters of text that the vocabulary is learnt from


# ---------------------------------------------------------------- byte-pair encoding

def train_bpe(text: str, vocab_size: int = VOCAB_SIZE) -> list[bytes]:
    """The 256 bytes, then merges of the most frequent pair; one place is left for <|endoftext|>."""
    counts = Counter()
    for part in text.split(EOT):
        counts.update(regex.findall(GPT2_SPLIT, part))
    words = [([bytes([b]) for b in word.encode()], n) for word, n in sorted(counts.items())]
    vocab = [bytes([b]) for b in range(256)]
    pairs = pair_counts(words)
    while len(vocab) < vocab_size - 1 and pairs:
        # of two equally frequent pairs, the later in the alphabet
        pair = max(pairs, key=lambda p: (pairs[p], p))
        vocab.append(pair[0] + pair[1])
        touched = [i for i, (word, _) in enumerate(words) if pair in zip(word, word[1:])]
        pairs.subtract(pair_counts(words[i] for i in touched))
        for i in touched:
            words[i] = (merged(words[i][0], pair), words[i][1])
        pairs.update(pair_counts(words[i] for i in touched))
        pairs += Counter()  # drops the pairs that no word has any more
    vocab = list(dict.fromkeys(vocab))
    return vocab + fillers(vocab, vocab_size - 1 - len(vocab))


def pair_counts(words) -> Counter:
    pairs = Counter()
    for word, n in words:
        for pair in zip(word, word[1:]):
            pairs[pair] += n
    return pairs


def merged(word: list[bytes], pair: tuple[bytes, bytes]) -> list[bytes]:
    out = []
    for piece in word:
        if out and (out[-1], piece) == pair:
            out[-1] += piece
        else:
            out.append(piece)
    return out


def fillers(vocab: list[bytes], count: int) -> list[bytes]:
    """A text with few words runs out of pairs: pairs of rare bytes keep the size as asked."""
    pairs = (bytes([a, b]) for a in range(255, 127, -1) for b in range(255, 127, -1))
    return [pair for pair in pairs if pair not in vocab][:count]


# ---------------------------------------------------------------- files

def tiktoken_file(vocab: list[bytes]) -> str:
    ranked = [(base64.b64encode(token).decode(), rank) for rank, token in enumerate(vocab)]
    return "".join(f"{token} {rank}\n" for token, rank in ranked)


def json_lines(rows: list[dict]) -> str:
    return "".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows)


def write(path: Path, text: str):
    """Under a temporary name first, so that nobody ever reads half a file."""
    temporary = path.with_name(path.name + ".tmp")
    temporary.write_text(text, encoding="utf-8", newline="\n")
    os.replace(temporary, path)


def write_all(files: dict, out: Path) -> tiktoken.Encoding:
    out.mkdir(parents=True, exist_ok=True)
    write(out / "tokenizer.tiktoken", tiktoken_file(train_bpe(files["pretrain.txt"][:SAMPLE])))
    for name, content in files.items():
        write(out / name, content if isinstance(content, str) else json_lines(content))
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
    made_up = sets.add_parser("fable", help="a made-up world, from nothing", allow_abbrev=False)
    made_up.add_argument("--seed", type=number(int, 0, 2 ** 31), default=1,
                         help="the same seed gives the same files")
    made_up.add_argument("--data", type=Path, default=Path("out/data"), help="folder to write into")
    made_up.add_argument("--scale", type=number(float, 0.001, 100), default=1.0,
                         help="1 is the full set")
    made_up.add_argument("--show", type=number(int, 0, 10_000), default=0,
                         help="print so many samples, write nothing")
    args = parser.parse_args(arguments)
    if args.show:
        return show(args.show, args.seed)
    if args.data.exists() and not args.data.is_dir():
        raise SystemExit(f"{args.data} is a file: --data takes a folder.")
    files = fable.make(args.seed, args.scale)
    try:
        tokenizer = write_all(files, args.data)
    except OSError as error:
        raise SystemExit(f"Cannot write into {args.data}: {error.strerror}.")
    print_table(files, tokenizer)


if __name__ == "__main__":
    try:
        main()
    except BrokenPipeError:  # the reader of --show has seen enough
        os.dup2(os.open(os.devnull, os.O_WRONLY), 1)

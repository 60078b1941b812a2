"""From files of outside data to the files of a data set: read, fill in, split, measure, report.

Rows are in a dict by kind, the stem of the file that they go into: "pretrain" (texts), "sft",
"comparisons" and "prompts". Whatever is left out on the way is counted in `notes`.
"""

from collections import Counter
from collections.abc import Callable, Iterator
from hashlib import sha256
from itertools import combinations
from pathlib import Path
from statistics import median

from data.feedback import ASSISTANT, best
from data.formats import EOT, UserError, encode, numbered, read_bytes, read_text, row_ids
from data.rows import brief, decode_json, parse

KINDS = ("pretrain", "sft", "comparisons", "prompts")
TEXT, JSON = (".txt", ".md"), (".json", ".jsonl")


# ---- reading ----------------------------------------------------------------------------------

def objects(path: Path) -> Iterator[tuple[str, object]]:
    """("file, line N", what stands there): raw lines of JSON, or parsed items of a JSON list, or
    the documents of a text."""
    suffix = Path(path.stem).suffix if path.suffix == ".gz" else path.suffix
    if suffix in TEXT:
        for i, text in enumerate(read_text(path).split(EOT), 1):
            if text.strip():
                yield f"{path}, document {i}", {"text": text}
    elif suffix == ".json" and (content := read_bytes(path)).lstrip().startswith(b"["):
        try:
            items = decode_json(content)
        except (ValueError, RecursionError) as error:
            raise UserError(f"{path}: {error}") from None
        for i, item in enumerate(items, 1):
            yield f"{path}, item {i}", {"text": item} if isinstance(item, str) else item
    else:
        yield from numbered(path)


def read(paths: list[Path], reader: Callable, notes: Counter, skip_bad: bool) -> dict[str, list]:
    """The rows that a reader makes of the files, each line counted as used, left out or bad."""
    found, bad = {kind: [] for kind in KINDS}, []
    for path in paths:
        counts = Counter()
        for where, item in objects(path):
            seen = Counter()
            try:
                new = reader(parse(item) if isinstance(item, bytes) else expect_dict(item), seen)
            except (ValueError, RecursionError) as error:
                bad.append(f"{where}: {error}")
                counts["bad"] += 1
                continue
            notes.update(seen)
            for kind, rows in new.items():
                found[kind] += rows
            counts["used" if any(new.values()) else "left out"] += 1
        parts = ", ".join(f"{counts[key]:,} {key}" for key in ("used", "left out", "bad"))
        print(f"{path}: {counts.total():,} rows: {parts}")
    if bad and not skip_bad:
        more = f" (and {len(bad) - 1:,} more)" if len(bad) > 1 else ""
        raise UserError(f"{bad[0]}{more}; nothing is written, --skip-bad leaves such rows out")
    for sentence in [*bad[:20], *([f"and {len(bad) - 20:,} more"] if len(bad) > 20 else [])]:
        print(f"  left out: {sentence}")
    return found


def expect_dict(item) -> dict:
    if not isinstance(item, dict):
        raise ValueError(f"should be an object, not {brief(item)}")
    return item


# ---- filling in, splitting --------------------------------------------------------------------

def fill(train: dict, heldout: dict) -> None:
    """No demonstrations: the best of each ranking. No prompts: those of all the others."""
    empty = [kind for kind in KINDS if not train[kind] and not heldout[kind]]
    for found in (train, heldout):
        if "sft" in empty:
            found["sft"] = [row for ranking in found["comparisons"] for row in best(ranking)]
        if "prompts" in empty:
            rows = found["comparisons"] + found["sft"]
            found["prompts"] = [{"prompt": x} for x in dict.fromkeys(row["prompt"] for row in rows)]
    for kind in KINDS:
        if heldout[kind] and not train[kind]:
            raise UserError(f"the held-out files have rows for {kind}, the others none")


def opening(row: dict | str) -> str:
    """A document, or the first turn of a dialogue: what shares it stays on one side."""
    return row if isinstance(row, str) else row["prompt"].partition(ASSISTANT)[0]


def split(train: dict, heldout: dict, share: float, seed: int, notes: Counter) -> tuple:
    """(rows to train on, rows to judge by), by kind: no dialogue's opening is on both sides.

    Held out is what the files in `heldout` hold; for the kinds that have none there, a share of
    the openings, chosen by a hash of seed and opening, so that the same ones are chosen each time.
    """
    def draw(key: str) -> float:
        return int(sha256(f"{seed} {key}".encode()).hexdigest(), 16) / 2**256

    openings = {kind: {opening(row) for row in rows} for kind, rows in train.items()}
    held = {opening(row) for rows in heldout.values() for row in rows}
    held = held or {key for keys in openings.values() for key in keys if draw(key) < share}
    for kind, keys in openings.items():
        if keys and not heldout[kind] and not keys & held:
            held.add(min(keys, key=draw))
    both = {kind: [row for row in rows if opening(row) in held] for kind, rows in train.items()}
    for kind in filter(heldout.get, train):
        notes[f"rows of {kind} whose prompt is held out too, not trained on"] += len(both[kind])
    rest = {kind: [x for x in rows if opening(x) not in held] for kind, rows in train.items()}
    return rest, {kind: heldout[kind] or both[kind] for kind in train}


def split_all(train: dict, heldout: dict, share: float, seed: int, notes: Counter) -> tuple:
    """`split` for the documents and, apart from them, for the dialogues."""
    if len(train["pretrain"]) == 1 and not heldout["pretrain"]:
        start, end = halves(train["pretrain"][0], share)
        train, heldout = {**train, "pretrain": start}, {**heldout, "pretrain": end}
    parts = []
    for kinds in (KINDS[:1], KINDS[1:]):
        own = [{kind: side[kind] for kind in kinds} for side in (train, heldout)]
        parts.append(split(*own, share, seed, notes))
    (texts, texts_valid), (dialogues, dialogues_valid) = parts
    return texts | dialogues, texts_valid | dialogues_valid


def halves(text: str, share: float) -> tuple[list[str], list[str]]:
    """A document and the rest of it, about `share`: cut between paragraphs, where it has any."""
    limit = int(len(text) * (1 - share))
    cut = text.rfind("\n\n", 0, limit) + 1 or limit
    return tuple([part] if part.strip() else [] for part in (text[:cut], text[cut:]))


# ---- measuring and reporting ------------------------------------------------------------------

def length(row: dict | str, tokenizer) -> int:
    """Tokens of a document, or of a prompt with its longest completion, EOS included."""
    if isinstance(row, str):
        return len(encode(tokenizer, row)) + 1
    prompt, ids = row_ids(row, tokenizer, *row)
    return max(map(len, [prompt, *ids]))


def fit(files: dict[str, list], tokenizer, context: int) -> dict[str, list]:
    """Leave out what is over the context, as in the paper (C.4), and print a line a file."""
    print(f"\n{'file':28}{'rows':>9}{'tokens: median':>16}{'longest':>9}   left out")
    fitting = {}
    for name, rows in files.items():
        lens = [length(row, tokenizer) for row in rows]
        fits = [row for row, n in zip(rows, lens) if n <= context or isinstance(row, str)]
        over = f"{len(rows) - len(fits):,} over {context:,} tokens" if len(fits) < len(rows) else ""
        print(f"{name:28}{len(rows):9,}{median(lens or [0]):16,.0f}{max(lens or [0]):9,}   {over}")
        if not fits:
            few = "no row: there have to be some to train on and others to hold out"
            why = f"no row of at most {context:,} tokens" if rows else few
            raise UserError(f"{name} would have {why}; nothing is written")
        fitting[name] = fits
    return fitting


def describe(rankings: list[dict]) -> str:
    """How many completions the rankings have, and what in them teaches nothing."""
    sizes = Counter(len(row["ranks"]) for row in rankings)
    pairs = [pair for row in rankings for pair in combinations(row["ranks"], 2)]
    ties = sum(a == b for a, b in pairs)
    odd = {
        "all tied": sum(len(set(row["ranks"])) == 1 for row in rankings),
        "with an empty completion": sum("" in row["completions"] for row in rankings),
        "with equal completions":
            sum(len(set(row["completions"])) < len(row["completions"]) for row in rankings),
    }
    found = "".join(f"; {count:,} {what}" for what, count in odd.items() if count)
    k = ", ".join(f"{count:,} of {size}" for size, count in sorted(sizes.items()))
    return f"{len(rankings):,} rankings: {k}; {len(pairs):,} pairs, {ties:,} of them ties{found}"


def stages(files: dict[str, list], older: set[str]) -> str:
    """What each stage of rlhf.py will work on; `older` files were in the folder before."""
    def count(name: str, what: str, more: str = "") -> str:
        if name in files:
            return f"{len(files[name]):,} {what}{more}"
        return f"the {name} of before" if name in older else f"nothing: there is no {name}"

    untied = sum(a != b for row in files.get("comparisons.jsonl", ())
                 for a, b in combinations(row["ranks"], 2))
    empty = sum(not row["completion"] for row in files.get("sft.jsonl", ()))
    empty = f", {empty:,} of them empty" if empty else ""
    return "\n".join([
        f"pretrain, ptx   {count('pretrain.txt', 'documents')}",
        f"sft             {count('sft.jsonl', 'demonstrations', empty)}",
        f"rm              {count('comparisons.jsonl', 'rankings', f', {untied:,} untied pairs')}",
        f"ppo             {count('prompts.jsonl', 'prompts')}",
        f"evaluate        {count('prompts_valid.jsonl', 'prompts')}",
    ])

"""Write the files of a data set: a synthetic one, one that people made, or your own.

    python data/prepare.py fable | oasst | hh | webtext | mine FILE ...

Each row is understood as a whole or refused. README.md in this folder lists files and fields.
"""

import argparse
import json
import os
import re
import shlex
import sys
from collections import Counter
from hashlib import sha256
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parent.parent))
from data import fable  # noqa: E402
from data.files import EOT, ROLES, UserError, check, encode, get_tokenizer  # noqa: E402
from data.files import parse, printable, read_bytes, read_text, replacing  # noqa: E402
from data.files import unique, write_jsonl  # noqa: E402

CARRIED = ("labeler", "task", "source", "round", "wants")
ASKED = ("prompt", "instruction")
DEMONSTRATED = ("messages", "conversations", "completion", "output")
COMPARED = ("chosen", "rejected", "completions", "ranks", "scores")
FIELDS = CARRIED + ASKED + DEMONSTRATED + COMPARED + ("input", "label", "text")
RANKED = ("", "chosen, rejected", "completions", "completions, ranks", "completions, scores")
HUMAN = "\n\nHuman:"  # how a turn begins
CUE = "\n\nAssistant:"  # how an answer begins
SPEAKERS = ROLES | {"human": "Human", "prompter": "Human", "gpt": "Assistant"}
LABELS = {"true": True, "1": True, "1.0": True, "yes": True, "false": False, "0": False,
          "0.0": False, "no": False, "-1": False, "-1.0": False}
# White space between the turns in a text. Each begins where the white space does: tried at each
# character of it, they would take minutes for a page of empty lines.
ONE_LINE = r"(?<!\s)\s+"
NEW_LINE = r"(?<!\s)[^\S\n]*\n\s*"
BLANK_LINE = r"(?<!\s)[^\S\n]*\n[^\S\n]*\n\s*"
GAPS = (BLANK_LINE, NEW_LINE, ONE_LINE, BLANK_LINE)
TURN_INSIDE = re.compile(rf"(^|{BLANK_LINE})(Human|Assistant|System):|\sAssistant:$")
MESSAGES = re.compile(r"\[\s*\{\s*['\"](role|content|from|value)['\"]\s*:")  # as a text
EMPTY = (None, "", [], {})
HELD_OUT = re.compile("(?<![a-z])(valid|validation|val|test|eval|dev)(?![a-z])")
NO_DATA = re.compile(r"(^|[/\\])(\.|(README|LICENSE)(\.\w+)?$)")  # hidden folders, too
JSON_ROW = re.compile(r'\s*\[?\s*\{\s*"')
SAMPLE = 3_000_000  # characters that the fable's vocabulary is learnt from

HUB = "https://huggingface.co"
OASST = HUB + "/datasets/OpenAssistant/oasst1/resolve/main/2023-04-12_oasst_ready."
HH = HUB + "/datasets/Anthropic/hh-rlhf/resolve/main/helpful-base/"
WEBTEXT = "https://openaipublic.blob.core.windows.net/gpt-2/output-dataset/v1/webtext."
DOWNLOADS = {  # address -> how its SHA-256 begins
    "oasst": {OASST + "trees.jsonl.gz": "2a9a8fd343e9b28e04a895a669d3253f"},
    "hh": {HH + "train.jsonl.gz": "518a5bf288456fc9f3b7c980c54116fb",
           HH + "test.jsonl.gz": "8be3fc1a13b27901631696f2be6f184c"},
    "webtext": {WEBTEXT + "test.jsonl": None, WEBTEXT + "valid.jsonl": None},
}
ROWS = "import csv, json; [print(json.dumps(row)) for row in {}]"
CSV = ROWS.format("csv.DictReader(open({!r}, encoding='utf-8-sig'))")
TABLE = "import pandas; print(pandas.read_parquet({!r}).to_json(orient='records', lines=True))"
OTHERS = {  # how the name ends, the first bytes, Python that prints the file as JSON Lines
    "a CSV file": (".csv", (), CSV), "a parquet file": (".parquet", b"PAR1", TABLE),
    "UTF-16": ((), (b"\xff\xfe", b"\xfe\xff"), "print(open({!r}, encoding='utf-16').read())"),
}

# ---- One row ---------------------------------------------------------------------------
def mine(row: dict, args, seen: Counter) -> list[tuple]:
    """A row in the documented fields -> [(kind, canonical row)]. Raises ValueError."""
    row = known(row, FIELDS, args, seen)
    if row.get("text", "") != "":
        return [("pretrain", find_document(row))]
    dialogues = {field: row[field] for field in (*DEMONSTRATED, *COMPARED[:2]) if field in row}
    for i, value in enumerate(expect(row.get("completions", []), list, "completions")):
        dialogues[f"completions[{i}]"] = value
    openings = {}  # field -> the turns before its answer
    answers = {}
    for field, value in dialogues.items():
        turns = read_turns(field, value, "Assistant", args, seen)
        if turns and turns[-1].startswith(CUE):
            answers[field] = turns.pop().removeprefix(CUE)
        elif field not in ("messages", "conversations"):
            raise ValueError(f"{field} should end with a turn of the assistant: {value!a:.60}")
        if turns:
            openings[field] = turns
    prompt = {"prompt": find_prompt(row, openings, args, seen)}
    prompt |= {field: row[field] for field in CARRIED if field in row}
    found = [("sft", {**prompt, "completion": text}) for text in shown(row, answers, seen)]
    texts = [text for field, text in answers.items() if field not in DEMONSTRATED]
    ranks = find_ranks(row, texts, seen)
    if ranks:
        found.append(("comparisons", {**prompt, "completions": texts, "ranks": ranks}))
    if found:  # they have said who wrote the answer, and when
        prompt.pop("labeler", None)
        prompt.pop("round", None)
    found.append(("prompts", prompt))
    for _, canonical in found:
        check(canonical)
    return found

def known(row: dict, names: tuple, args, seen: Counter, where: str = "") -> dict:
    """The fields that hold something. Those that are not among `names` have to be ignored."""
    kept = {}
    unknown = {}
    for name, value in row.items():
        if name in args.ignore:
            seen[f"fields {name} ignored"] += value not in EMPTY
        elif name in names and value is not None:
            kept[name] = value
        elif name not in names and value not in EMPTY:
            unknown[name] = value
    for name, value in unknown.items():
        names = shlex.quote(printable(",".join(unknown))[:180])
        todo = f"rename it as in data/README.md, or leave it out: --ignore {names}"
        raise ValueError(f"{where}unknown field {name!a:.60}, which holds {value!a:.60}; {todo}")
    return kept

def expect(value, kind: type, field: str):
    if not isinstance(value, kind):
        should = {dict: "an object", list: "a list", str: "a text"}[kind]
        raise ValueError(f"{field} should be {should}, not {value!a:.60}")
    return value

def find_document(row: dict) -> dict:
    others = ", ".join(field for field in row if field != "text" and row[field] not in EMPTY)
    if others:
        raise ValueError(f"text should be alone, not beside {others}: --ignore text or these")
    if not expect(row["text"], str, "text").replace(EOT, "").strip():
        raise ValueError(f"text should not be blank: {row['text']!a:.60}")
    return {"text": row["text"]}

def read_turns(field: str, value, speaker: str, args, seen: Counter) -> list[str]:
    """Messages, a dialogue in one text, or a turn of `speaker` -> ["\\n\\nHuman: ...", ...]."""
    if isinstance(value, str) and field not in ("messages", "conversations"):
        pairs = split_text(clean(value), speaker)
    elif isinstance(value, list):
        messages = enumerate(value)
        pairs = [read_message(f"{field}[{i}]", message, args, seen) for i, message in messages]
    else:
        raise ValueError(f"{field} should be messages in a list, or a text, not {value!a:.60}")
    turns = []
    for speaker, text in pairs:
        if MESSAGES.match(text):
            raise ValueError(f"{field} should be a list of messages, not their text: {text!a:.60}")
        if TURN_INSIDE.search(text):
            raise ValueError(f"{field} should have no turn inside another: {text!a:.60}")
        if text or speaker != "System":
            turns.append(f"\n\n{speaker}: {text}".rstrip())
    return turns

def read_message(where: str, message, args, seen: Counter) -> tuple[str, str]:
    """{"role", "content"}, or ShareGPT's {"from", "value"} -> speaker, text."""
    names = ("role", "content", "from", "value")
    turn = known(expect(message, dict, where), names, args, seen, f"{where}: ")
    speaker = SPEAKERS.get(str(turn.get("role", turn.get("from"))).lower())
    content = turn.get("content", turn.get("value"))
    if speaker is None or not isinstance(content, str) or len(turn) != 2:
        should = '{"role": "user", "assistant" or "system", "content": a text}'
        raise ValueError(f"{where} should be {should}, not {message!a:.60}")
    return speaker, clean(content)

def clean(text: str) -> str:
    return text.replace("\r\n", "\n").replace("\r", "\n").strip()

def split_text(text: str, speaker: str) -> list[tuple]:
    """Split at the speakers of the template, if it has any, so that they take turns."""
    if not re.match("(Human|Assistant|System):", text):
        return [(speaker, text)]
    for gap in GAPS:  # with the last one, a speaker may have several turns; System begins a line
        parts = re.split(rf"(?:^|{gap})((?<!.)System|Human|Assistant):", text)
        speakers = parts[1::2]
        takes_turns = all(one != other for one, other in zip(speakers, speakers[1:]))
        if len(speakers) > 1 and takes_turns:
            break
    return list(zip(speakers, map(str.strip, parts[2::2])))

def find_prompt(row: dict, openings: dict, args, seen: Counter) -> str:
    """The dialogue before the answer, on which all fields of a row have to agree."""
    if "instruction" in row:
        parts = [expect(row[name], str, name) for name in ("instruction", "input") if name in row]
        row["instruction"] = "\n".join(parts)
    elif row.get("input", "") != "":
        raise ValueError(f"input should be beside instruction; it holds {row['input']!a:.60}")
    for field in ASKED:
        if field in row:
            openings[field] = read_turns(field, row[field], "Human", args, seen)
            if openings[field][-1:] == [CUE]:
                openings[field].pop()
    dialogue = next(iter(openings.values()), [])
    first = [turn for turn in dialogue if turn.startswith(HUMAN)][:1]
    for field, turns in openings.items():
        if turns != dialogue and not (field in ASKED and turns == first):
            raise ValueError(f"{field} should agree with the other fields: {turns[-1:]!a:.60}")
    if not dialogue:
        raise ValueError("there should be a prompt, or messages that begin with one")
    if not dialogue[-1].startswith(HUMAN):
        raise ValueError(f"prompt should end with a turn of the user, not {dialogue[-1]!a:.60}")
    if HUMAN in dialogue or CUE in dialogue:
        raise ValueError(f"prompt should not have a blank turn: {dialogue!a:.60}")
    return "".join(dialogue) + CUE

def shown(row: dict, answers: dict, seen: Counter) -> list[str]:
    """The answer that is a demonstration, if there is one."""
    texts = {text for field, text in answers.items() if field in DEMONSTRATED}
    if len(texts) > 1 or "" in texts:
        raise ValueError(f"{' and '.join(answers)} should have one answer that is not blank")
    label = str(row.get("label", True)).lower()
    if "label" in row and not texts:
        raise ValueError("label should be beside a completion, which is not there")
    if label not in LABELS:
        raise ValueError(f"label should be true or false, not {label!a:.60}")
    if not LABELS[label]:
        seen["answers labelled false, of which only the prompt is used"] += 1
        return []
    return list(texts)

def find_ranks(row: dict, texts: list[str], seen: Counter) -> list[int]:
    """A rank for each answer to compare: 0 is best, equal ranks are ties."""
    given = ", ".join(field for field in COMPARED if field in row)
    if given not in RANKED:
        wanted = "chosen and rejected, or completions with ranks or scores"
        raise ValueError(f"there should be {wanted}, not {given}")
    ranks = row.get("ranks", list(range(len(texts))))
    if "scores" in row:
        scores = expect(row["scores"], list, "scores")
        numbers = all(type(score) in (int, float) for score in scores)
        if len(scores) != len(texts) or not numbers:
            raise ValueError(f"scores should be a number each, not {scores!a:.60}")
        ranks = [sum(other > score for other in scores) for score in scores]
    if given:
        check({"completions": texts, "ranks": ranks})
    same = [" ".join(text.split()) for text in texts]
    if len(set(same)) == 1 or len(set(zip(same, ranks))) > len(set(same)):
        raise ValueError(f"{given} should differ by more than white space: {texts!a:.60}")
    seen["rankings without ranks or scores, read as best first"] += given == "completions"
    return ranks

def oasst(tree, args, seen: Counter) -> list[tuple]:
    """A tree of messages -> rows. A message that is left out takes those below it along."""
    found = []
    queue = [([], [tree.get("prompt")])]
    for turns, nodes in queue:  # grows while it is read
        texts = []
        ranks = []
        for node in nodes:
            text = clean(expect(expect(node, dict, "a message").get("text"), str, "text"))
            bad = node.get("deleted") or node.get("review_result") is False
            if bad or node.get("lang") != args.lang or not text or TURN_INSIDE.search(text):
                seen[f"messages deleted, failed in review, blank or not in {args.lang}"] += 1
                continue
            texts.append(text)
            ranks.append(node.get("rank"))
            turn = {"role": node.get("role"), "content": text}
            queue.append((turns + [turn], node.get("replies") or []))
        row = {"messages": turns}
        if len(texts) == 1:
            row["completion"] = texts[0]
        elif None not in ranks and texts:
            row |= {"completions": texts, "ranks": ranks}
        elif texts:
            seen["groups of replies that are not fully ranked"] += 1
        if turns and turns[-1]["role"] == "prompter":
            found += mine(row, args, seen)
    if not found:
        raise ValueError("there should be a message that can be used")
    return found

# ---- Files that are read ---------------------------------------------------------------
def sources(args) -> list[Path]:
    """All files that are named, or else downloaded."""
    files = []
    for path in args.files:
        if path.is_dir():
            inside = [file for file in sorted(path.rglob("*")) if not file.is_dir()]
            files += [file for file in inside if not NO_DATA.search(str(file.relative_to(path)))]
        else:
            files.append(path)
    if not args.files:
        for address, start in DOWNLOADS[args.name].items():
            name = "_".join(address.split("/")[-2:])
            files.append(fetch(address, args.data / "download" / name, start))
    for path in files:
        if path.resolve().parent == args.data.resolve():
            raise UserError(f"{path} is in the folder to fill: move it, or pass another --data")
    return list({path.resolve(): path for path in files}.values())

def fetch(address: str, path: Path, start: str | None = None) -> Path:
    """Download a file once. $HF_ENDPOINT names a mirror of the Hugging Face hub."""
    import torch  # takes seconds, and only downloads need it

    address = address.replace(HUB, os.environ.get("HF_ENDPOINT", HUB).rstrip("/"))
    if not path.exists():
        path.parent.mkdir(parents=True, exist_ok=True)
        try:
            torch.hub.download_url_to_file(address, str(path), hash_prefix=start)
        except (OSError, RuntimeError, ValueError) as error:
            todo = f"try again, or save it as {path}"
            raise UserError(f"{address} could not be downloaded ({error}): {todo}") from None
    return path

def rows_of(path: Path):
    """Yield ("file, line N", the row in JSON) for each row of a file."""
    content = read_bytes(path)
    name = path.name.lower()
    todo = "{} is {}; this makes JSON Lines of it: python -c {} > rows.jsonl"
    for what, (ending, first_bytes, code) in OTHERS.items():
        if name.endswith(ending) or content.startswith(first_bytes):
            raise UserError(todo.format(path, what, shlex.quote(code.format(str(path)))))
    if b"\0" in content[:1000]:
        raise UserError(f"{path} is not a text: save it as JSON Lines in UTF-8")
    text = read_text(path)
    if name.removesuffix(".gz").endswith((".txt", ".md")):
        if JSON_ROW.match(text):
            raise UserError(f"{path} begins like JSON: name it .jsonl, or .txt only for documents")
        for number, part in enumerate(text.split(EOT), 1):
            if part.strip():
                yield f"{path}, document {number}", json.dumps({"text": part})
        return
    rows = text.split("\n")
    unit = "line"
    try:
        whole = json.loads(text, object_pairs_hook=unique)  # a list, or one object
    except (ValueError, RecursionError) as error:
        if text.lstrip().startswith("["):
            raise UserError(f"the list in {path} cannot be read: {error}") from None
        whole = None
    if isinstance(whole, dict):
        lists = [field for field, value in whole.items() if isinstance(value, list)]
        if lists and whole.keys().isdisjoint(FIELDS):
            longest = max(lists, key=lambda field: len(whole[field]))
            code = ROWS.format(f"json.load(open({str(path)!r}))[{longest!r}]")
            what = f"one object around {', '.join(whole):.100}"
            raise UserError(todo.format(path, what, shlex.quote(code)))
        whole = [whole]
    if isinstance(whole, list):
        rows = map(json.dumps, whole)
        unit = "item"
    for number, row in enumerate(rows, 1):
        if row.strip():
            yield f"{path}, {unit} {number}", row

def read(args, notes: Counter) -> tuple[dict, set]:
    """The canonical rows by kind, and how those begin that come from the files held out."""
    files = sources(args)
    held = [path for path in files if HELD_OUT.search(path.name.lower())
            or HELD_OUT.fullmatch(path.parent.name.lower())]
    if held == files:  # something has to be trained on
        held = []
    found = {"pretrain": [], "sft": [], "comparisons": [], "prompts": []}
    openings = set()
    refused = []
    understand = {"oasst": oasst}.get(args.name, mine)
    for path in files:
        before = len(refused)
        used = 0
        for where, text in rows_of(path):
            seen = Counter()
            try:
                rows = understand(parse(text), args, seen)
            except (ValueError, RecursionError) as error:
                refused.append(f"{where}: {error}")
                continue
            for kind, row in rows:
                found[kind].append(row)
                if path in held:
                    openings.add(opening(row))
            used += 1
            notes.update(seen)
        side = " (held out)" if path in held else ""
        print(f"{path}{side}: {used:,} rows used, {len(refused) - before:,} refused")
    if refused and not args.skip_bad:
        todo = f"{len(refused):,} refused, so nothing is written; --skip-bad leaves them out"
        raise UserError(f"{refused[0]} ({todo})")
    for sentence in refused[:20]:
        print(f"  refused: {sentence}")
    return found, openings

# ---- From rows to files ----------------------------------------------------------------
def complete(found: dict, notes: Counter) -> None:
    """Drop what teaches nothing; unbeaten answers are demonstrations where there are none."""
    rankings = [row for row in found["comparisons"] if len(set(row["ranks"])) > 1]
    notes["rankings left out: all answers are tied"] = len(found["comparisons"]) - len(rankings)
    found["comparisons"] = rankings
    prompts = {row["prompt"] for row in found["sft"]}
    beaten = set()
    for row in rankings:
        for text, rank in zip(row["completions"], row["ranks"]):
            if rank > min(row["ranks"]):
                beaten.add((row["prompt"], text))
    for ranking in rankings:
        row = dict(ranking)
        row.pop("ranks")
        for text in row.pop("completions"):
            answer = (row["prompt"], text)
            if text and answer not in beaten and row["prompt"] not in prompts:
                beaten.add(answer)  # once is enough
                found["sft"].append({**row, "completion": text})
                notes["demonstrations that are the best of a ranking"] += 1
    distinct = {str(row): row for row in found["prompts"]}
    found["prompts"] = found["rm_prompts"] = list(distinct.values())

def opening(row: dict) -> str:
    """A document, or what the person says first in a dialogue, whoever speaks before."""
    said = row.get("prompt", "").partition(HUMAN)[2]
    return row.get("text") or re.split(f"{HUMAN}|{CUE}", said)[0]

def hold_out(found: dict, held: set, args, notes: Counter) -> dict:
    """{file: rows}. Rows with the same opening are on one side, chosen by a hash of it."""
    def draw(key: str) -> float:
        return int(sha256(f"{args.seed} {key}".encode()).hexdigest(), 16) / 2**256

    given = set(held)
    for rows in found.values():
        openings = sorted(set(map(opening, rows)), key=draw)
        if given.isdisjoint(openings):
            held.update(key for key in openings if draw(key) < args.valid)
        if held.isdisjoint(openings):
            held.update(openings[:1])
    files = {}
    for kind, rows in found.items():
        train = [row for row in rows if opening(row) not in held]
        valid = [row for row in rows if opening(row) in held]
        if not train or not valid:
            notes[f"{kind} left out: some have to be trained on, some held out"] += len(rows)
            continue
        for name, side in ((kind, train), (f"{kind}_valid", valid)):
            if kind == "pretrain":
                files[f"{name}.txt"] = "".join(row["text"] + EOT for row in side)
            else:
                files[f"{name}.jsonl"] = side
    return files

def write_files(files: dict, folder: Path) -> None:
    for path in sorted(folder.glob("*.*")):
        if path.suffix not in (".jsonl", ".txt", ".tiktoken"):
            continue
        if path.name not in files:
            print(f"{path} is not of these rows, and stays as it was")
        elif path.suffix == ".jsonl" and b'"time": "' in read_bytes(path):
            raise UserError(f"{path} has answers that people gave: move it first")
    for name, rows in files.items():
        if isinstance(rows, str):
            with replacing(folder / name) as file:
                file.write(rows.encode())
        else:
            write_jsonl(folder / name, rows)

def print_table(files: dict, tokenizer) -> None:
    """The rows of each file, and their tokens, with the longest answer of a ranking."""
    print(f"\n{'file':26}{'rows':>9}{'tokens':>13}{'longest':>9}")
    for name, rows in files.items():
        if isinstance(rows, str):
            rows = [{"prompt": text} for text in rows.split(EOT)[:-1]]
        lengths = []
        for row in rows:
            texts = row.get("completions", [row.get("completion", "")])
            longest = max(len(encode(tokenizer, text)) for text in texts)
            lengths.append(len(encode(tokenizer, row["prompt"])) + longest + 1)
        print(f"{name:26}{len(rows):9,}{sum(lengths):13,}{max(lengths):9,}")
    rankings = [row["ranks"] for row in files.get("comparisons.jsonl", [])]
    for size, count in sorted(Counter(map(len, rankings)).items()):
        ties = sum(len(set(ranks)) < size for ranks in rankings if len(ranks) == size)
        print(f"{count:,} rankings of {size} answers, {ties:,} with ties")

def prepare(args) -> dict:
    """{file: rows} of people's data; says what was left out."""
    notes = Counter()
    found, held = read(args, notes)
    complete(found, notes)
    files = hold_out(found, held, args, notes)
    for note, count in sorted((+notes).items()):
        print(f"  {count:,} {note}")
    if not files:
        raise UserError("there is nothing to train on in these files; nothing is written")
    return files

def main(words: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(prog="prepare.py", allow_abbrev=False)
    add = parser.add_argument
    add("name", choices=("fable", "oasst", "hh", "webtext", "mine"), help="the data set")
    add("files", type=Path, nargs="*", metavar="FILE", help="files or folders [downloaded]")
    add("--data", type=Path, help="folder to write into [out/NAME; fable: out/data]")
    add("--seed", type=int, default=1, help="the same seed, the same files")
    add("--scale", type=float, default=1.0, help="fable: 1 is the full set")
    add("--valid", type=float, default=0.05, help="share that is held out, if no file is")
    add("--skip-bad", action="store_true", help="leave out rows that would be refused")
    add("--ignore", metavar="FIELD,...", default=[], type=lambda names: names.split(","),
        help="fields that may be left out")
    add("--lang", default="en", help="oasst: language")
    args = parser.parse_intermixed_args(words)
    if args.name == "mine" and not args.files:
        parser.error("mine needs files: prepare.py mine FILE ...")
    if args.name == "fable" and args.files:
        parser.error("fable reads no files")
    if not 0 < args.valid < 1 or not 0 < args.scale < 100:
        parser.error("--valid should be between 0 and 1, --scale between 0 and 100")
    args.data = args.data or Path("out", {"fable": "data"}.get(args.name, args.name))
    args.skip_bad |= args.name != "mine"
    if args.name == "webtext":
        args.ignore = args.ignore + ["id", "length", "ended"]
    try:
        if args.name == "fable":
            files = fable.make(args.seed, args.scale)
            vocabulary = fable.train_bpe(files["pretrain.txt"][:SAMPLE])
            files["tokenizer.tiktoken"] = fable.tiktoken_file(vocabulary)
        else:
            files = prepare(args)
        write_files(files, args.data)
        files.pop("tokenizer.tiktoken", None)
        print_table(files, get_tokenizer(args.data))
    except (UserError, OSError) as error:
        sys.exit(f"prepare.py: {error}")
    except KeyboardInterrupt:
        sys.exit("prepare.py: stopped")
    if args.name != "fable" and "comparisons.jsonl" in files:
        words = [*(words or sys.argv[1:])]
        words.remove(args.name)
        for flag in {"--data", "--seed"}.intersection(words):  # train.sh has OUT and SEED
            place = words.index(flag)
            del words[place : place + 2]
        feedback = shlex.quote(shlex.join([args.name, *words]))
        out = shlex.quote(str(args.data).removesuffix("/data"))
        print("\nAll stages on these rows, from GPT-2's weights, on a GPU with 24 GB:")
        print(f"    FEEDBACK={feedback} OUT={out} SEED={args.seed} ./train.sh gpt2")

if __name__ == "__main__":
    sys.stdout.reconfigure(errors="replace")  # a name that it cannot show is no reason to stop
    main()

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
from contextlib import ExitStack
from hashlib import sha256
from pathlib import Path
from statistics import median

sys.path.insert(0, str(Path(__file__).parent.parent))
from data import fable  # noqa: E402
from data.files import EOT, UserError, encode, get_tokenizer, read_bytes  # noqa: E402
from data.files import read_text, render, replacing, unique  # noqa: E402

KINDS = ("pretrain", "sft", "comparisons", "prompts")  # stems of the files
CARRIED = {"labeler": str, "task": str, "source": str, "round": int, "wants": object}
DEMONSTRATED = ("messages", "conversations", "completion", "output")
ANSWERED = (*DEMONSTRATED, "chosen", "rejected")
FIELDS = (*CARRIED, *ANSWERED, "prompt", "instruction", "input", "label", "completions",
          "ranks", "scores", "text")
RANKED = ("", "chosen rejected", "completions", "completions ranks", "completions scores")
ROLES = {"user": "user", "human": "user", "Human": "user", "prompter": "user",
         "assistant": "assistant", "gpt": "assistant", "Assistant": "assistant",
         "system": "system", "System": "system"}
LABELS = {"true": True, "1": True, "1.0": True, "yes": True, "false": False, "0": False,
          "0.0": False, "no": False, "-1": False, "-1.0": False}
BLANK_LINE = r"\s*\n\s*\n\s*"
GAPS = (BLANK_LINE, r"\s*\n\s*", r"\s+", BLANK_LINE)  # between the turns in a text
TURN_INSIDE = re.compile(r"(^|\n\s*\n\s*)(Human|Assistant):|\sAssistant:$")
EMPTY = (None, "", [], {})
HELD_OUT = re.compile("(?<![a-z])(valid|validation|val|test|eval|dev)(?![a-z])")
NO_DATA = re.compile(r"(^|/)(\.|README|LICENSE)")  # hidden files and folders, too
SAMPLE = 3_000_000  # characters that the vocabulary is learnt from

HUB = "https://huggingface.co"
TREES = "/datasets/OpenAssistant/oasst1/resolve/main/2023-04-12_oasst_ready.trees.jsonl.gz"
HH = HUB + "/datasets/Anthropic/hh-rlhf/resolve/main/{}/{}.jsonl.gz"
WEBTEXT = "https://openaipublic.blob.core.windows.net/gpt-2/output-dataset/v1/webtext."
DOWNLOADS = {  # address -> how its SHA-256 begins: to train on, held out
    "oasst": {HUB + TREES: "2a9a8fd343e9b28e04a895a669d3253f"},
    "webtext": {WEBTEXT + "test.jsonl": None, WEBTEXT + "valid.jsonl": None},
}
SUBSETS = {  # of HH: how the SHA-256 of train and test begins
    "helpful-base": ("518a5bf288456fc9f3b7c980c54116fb", "8be3fc1a13b27901631696f2be6f184c"),
    "helpful-online": ("0994d18b82083f5c084ce04071b68395", "39a475cc7e0df972902f8e3a0972726f"),
    "helpful-rejection-sampled": ("0cea2d2ab2187624ec1314e8cc6fb579",
                                  "abc35dbc56015db1dae0faa484514ccb"),
    "harmless-base": ("bf3e1ecd3db61bf21d190f69351d2667", "ebfaaed21162a4de120ae85366075b34"),
}
ROWS = "import csv, json; [print(json.dumps(row)) for row in {}]"
CONVERT = {  # Python that prints JSON Lines
    ".csv": ROWS.format("csv.DictReader(open({0!r}, encoding='utf-8-sig'))"),
    ".parquet": "import pandas; "
                "print(pandas.read_parquet({0!r}).to_json(None, orient='records', lines=True))",
    "wrapped": ROWS.format("json.load(open({0!r}))[{1!r}]"),
}
OTHERS = (".csv", ".parquet", ".tsv", ".arrow", ".xlsx", ".zip", "UTF-16")
FIRST_BYTES = {b"PAR1": ".parquet", b"ARROW1": ".arrow", b"PK\3\4": ".zip",
               b"\xff\xfe": "UTF-16", b"\xfe\xff": "UTF-16", b"{\0": "UTF-16"}
RECIPE = """
To train on it, in the project's folder, on a GPU with 24 GB:
    run="--data {0} --out {0} --max_new_tokens 256 --microbatch_size 8"
    rates="--learning_rate 1e-5 --value_learning_rate 4.5e-5 --kl_coef 0.02"
    python data/gpt2.py load gpt2 --out {0}
    python rlhf.py sft $run --learning_rate 3e-5 --epochs 3
    python rlhf.py rm $run --learning_rate 4.5e-5 --epochs 1 --batch_size 32
    python rlhf.py ppo $run $rates --name ppo --init sft --ptx_coef 0
    python rlhf.py evaluate $run --reference sft
or all at once, with text for pretraining mixed in:
    FEEDBACK="{1}" OUT={0} ./train.sh gpt2"""

# One row

def mine(row: dict, args, seen: Counter) -> list[tuple]:
    """A row in the documented fields -> [(kind, canonical row)]. Raises ValueError."""
    row = known(row, FIELDS, args, seen)
    if "text" in row:
        text = expect(row["text"], str, "text").replace("\r\n", "\n")
        if len(row) > 1 or not text.strip() or EOT in text:
            should = f"should be alone, not blank and without {EOT}"
            raise ValueError(f"text {should}, not {json.dumps(row):.60}")
        return [("pretrain", {"text": text})]
    if "instruction" in row and "prompt" not in row:
        parts = [row.pop("instruction"), row.pop("input", "")]
        row["prompt"] = "\n".join(expect(part, str, "instruction or input") for part in parts)
    if "instruction" in row or row.get("input") not in EMPTY:
        holds = f"input holds {row.get('input')!a:.60}"
        raise ValueError(f"instruction should be beside input, not beside prompt; {holds}")
    given = sorted(row.keys() & {"chosen", "rejected", "completions", "ranks", "scores"})
    if " ".join(given) not in RANKED:
        wanted = "chosen and rejected, or completions with ranks or scores"
        raise ValueError(f"there should be {wanted}, not {' and '.join(given)}")
    seen["rankings without ranks or scores, read as best first"] += given == ["completions"]
    dialogues = {field: row[field] for field in ANSWERED if field in row}
    for i, value in enumerate(expect(row.get("completions", []), list, "completions")):
        dialogues[f"completions[{i}]"] = value
    openings = {}  # field -> the turns before its answer
    answers = {}
    for field, value in dialogues.items():
        turns = read_turns(field, value, "assistant", args, seen)
        if turns and turns[-1]["role"] == "assistant":
            answers[field] = (" " + turns.pop()["content"]).rstrip()
        elif field not in ("messages", "conversations"):
            raise ValueError(f"{field} should end with a turn of the assistant: {value!a:.60}")
        if turns:
            openings[field] = turns
    prompt = {"prompt": find_prompt(row, openings, args, seen)}
    for field, kind in CARRIED.items():
        if field in row:
            prompt[field] = expect(row[field], kind, field)
    found = []
    for text in demonstrations(row, answers, seen):
        found.append(("sft", {**prompt, "completion": text}))
    if given:
        texts = [text for field, text in answers.items() if field not in DEMONSTRATED]
        ranks = find_ranks(row, texts)
        found.append(("comparisons", {**prompt, "completions": texts, "ranks": ranks}))
    if found:  # they have said who wrote the answer, and when
        prompt.pop("labeler", None)
        prompt.pop("round", None)
    found.append(("prompts", prompt))
    return found

def known(row: dict, names: tuple, args, seen: Counter, where: str = "") -> dict:
    """The fields that hold something. Those that are not among `names` have to be ignored."""
    kept = {}
    for name, value in row.items():
        if name in args.ignore:
            seen[f"fields {name} ignored"] += value not in EMPTY
        elif name in names and value is not None:
            kept[name] = value
        elif name not in names and value not in EMPTY:
            what = f"{where}{ascii(name)[1:-1]} is not a known field"
            raise ValueError(f"{what} and holds {value!a:.60}; --ignore may leave it out")
    return kept

def expect(value, kind: type, field: str):
    if not isinstance(value, kind) or (kind is int and value is True):
        raise ValueError(f"{field} should be of type {kind.__name__}, not {value!a:.60}")
    return value

def read_turns(field: str, value, role: str, args, seen: Counter) -> list[dict]:
    """Messages, a dialogue in one text or one turn (of `role`) -> [{"role", "content"}, ...]."""
    if isinstance(value, str) and field not in ("messages", "conversations"):
        turns = split_text(clean(value), role)
    elif not isinstance(value, list) or not value:
        raise ValueError(f"{field} should be a text or a list of messages, not {value!a:.60}")
    else:
        messages = enumerate(value)
        turns = [read_message(f"{field}[{i}]", message, args, seen) for i, message in messages]
    for turn in turns:
        if TURN_INSIDE.search(turn["content"]):
            should = "should have no turn inside another"
            raise ValueError(f"{field} {should}: {turn['content']!a:.60}")
    return [turn for turn in turns if turn != {"role": "system", "content": ""}]

def read_message(where: str, message, args, seen: Counter) -> dict:
    """{"role", "content"}, or ShareGPT's {"from", "value"}."""
    names = ("role", "content", "from", "value")
    turn = known(expect(message, dict, where), names, args, seen, f"{where}.")
    role = ROLES.get(str(turn.get("role", turn.get("from"))))
    content = turn.get("content", turn.get("value"))
    if role is None or not isinstance(content, str) or len(turn) != 2:
        should = '{"role": "user", "assistant" or "system", "content": a text}'
        raise ValueError(f"{where} should be {should}, not {message!a:.60}")
    return {"role": role, "content": clean(content)}

def clean(text: str) -> str:
    return text.replace("\r\n", "\n").replace("\r", "\n").strip()

def split_text(text: str, role: str) -> list[dict]:
    """Split at the speakers of the template, if it has any, so that they take turns."""
    if not re.match("(Human|Assistant|System):", text):
        return [{"role": role, "content": text}]
    for gap in GAPS:  # with the last one, a speaker may have several turns
        parts = re.split(rf"(?:^|{gap})(^System|Human|Assistant):", text)
        speakers = parts[1::2]
        if len(speakers) > 1 and not any(map(str.__eq__, speakers, speakers[1:])):
            break
    pairs = zip(speakers, parts[2::2])
    return [{"role": ROLES[speaker], "content": part.strip()} for speaker, part in pairs]

def find_prompt(row: dict, openings: dict, args, seen: Counter) -> str:
    """The dialogue before the answer, on which all fields of a row have to agree."""
    shared = []
    for field, turns in openings.items():
        if shared not in ([], turns):
            raise ValueError(f"{field} should differ from the others in the last turn only")
        shared = turns
    if "prompt" in row:
        turns = read_turns("prompt", row["prompt"], "user", args, seen)
        if turns[-1:] == [{"role": "assistant", "content": ""}]:
            turns.pop()
        said = [turn for turn in shared if turn["role"] == "user"]
        if shared and turns not in (shared, said[:1]):
            raise ValueError(f"prompt should agree with {field}, not be {turns!a:.60}")
        shared = shared or turns
    if not shared or shared[-1]["role"] != "user":
        raise ValueError("prompt should be there and end with a turn of the user")
    if "" in [turn["content"] for turn in shared]:
        raise ValueError(f"prompt should not have a blank turn: {render(shared)!a:.60}")
    return render(shared)

def demonstrations(row: dict, answers: dict, seen: Counter) -> list[str]:
    texts = {text for field, text in answers.items() if field in DEMONSTRATED}
    if len(texts) > 1 or "" in texts:
        raise ValueError(f"{' and '.join(answers)} should have one answer that is not blank")
    if "label" in row:
        label = str(row["label"]).lower()
        if not texts or label not in LABELS:
            raise ValueError(f"label should be a completion's true or false, not {label!a:.60}")
        if not LABELS[label]:
            seen["answers labelled false, of which only the prompt is used"] += 1
            return []
    return list(texts)

def find_ranks(row: dict, texts: list[str]) -> list[int]:
    """A rank for each answer: 0 is best, equal ranks are ties."""
    field = "scores" if "scores" in row else "ranks"
    ranks = expect(row.get(field, list(range(len(texts)))), list, field)
    good = [x for x in ranks if type(x) is int and 0 <= x < 1000]
    if field == "scores":
        good = [x for x in ranks if type(x) in (int, float)]
    if len(texts) < 2 or not len(good) == len(ranks) == len(texts):
        should = f"two or more, with one number each in {field}"
        raise ValueError(f"completions should be {should}, not {row.get(field, texts)!a:.60}")
    if field == "scores":
        ranks = [sum(other > score for other in good) for score in good]
    same = [" ".join(text.split()) for text in texts]
    if len(set(same)) == 1 or len(set(zip(same, ranks))) > len(set(same)):
        field = "rejected" if "chosen" in row else "completions"
        raise ValueError(f"{field} should differ in more than white space: {texts!a:.60}")
    return ranks

def oasst(tree: dict, args, seen: Counter) -> list[tuple]:
    """A tree of messages -> a prompt for each of a person's messages, and the replies to it.

    A message that is left out takes the replies below it along.
    """
    found = []
    queue = [([], [tree.get("prompt")])]
    for turns, nodes in queue:  # grows while it is read
        replies = []
        for node in nodes:
            text = clean(expect(expect(node, dict, "a message").get("text"), str, "text"))
            if node.get("deleted") or node.get("review_result") is False:
                seen["messages deleted or failed in review"] += 1
            elif node.get("lang") != args.lang or not text or TURN_INSIDE.search(text):
                seen[f"messages not in {args.lang}, blank, or with a turn inside"] += 1
            else:
                replies.append(node)
                turn = {"role": node.get("role"), "content": text}
                queue.append((turns + [turn], node.get("replies") or []))
        row = {"messages": turns}
        ranks = [reply.get("rank") for reply in replies]
        if len(replies) == 1:
            row["completion"] = replies[0]["text"]
        elif replies and None not in ranks:
            row["completions"] = [reply["text"] for reply in replies]
            row["ranks"] = ranks
        seen["groups of replies that are not fully ranked"] += len(replies) > 1 and None in ranks
        if turns and turns[-1]["role"] == "prompter":
            found += mine(row, args, seen)
    if not found:
        raise ValueError("there should be a message that can be used")
    return found

# Files that are read

def sources(args) -> tuple[list[Path], list[Path]]:
    """All files, named or else downloaded, and those among them that are held out."""
    if not args.files:
        pair = [HH.format(args.subset, part) for part in ("train", "test")]
        starts = DOWNLOADS.get(args.name, dict(zip(pair, SUBSETS[args.subset])))
        files = [fetch(address, starts[address], args.data / "download") for address in starts]
        return files, files[1:]
    files = []
    for path in args.files:
        if not path.is_dir():
            files.append(path)
            continue
        for file in sorted(path.rglob("*")):
            if file.is_file() and not NO_DATA.search(file.relative_to(path).as_posix()):
                files.append(file)
    held = [file for file in files if HELD_OUT.search(file.name.lower())]
    if held == files:  # something has to be trained on
        held = []
    return files, held

def fetch(address: str, start: str | None, folder: Path) -> Path:
    """Download a file once. $HF_ENDPOINT names a mirror of the Hugging Face hub."""
    import torch  # takes seconds, and only downloads need it

    path = folder / "_".join(address.split("/")[-2:])
    address = address.replace(HUB, os.environ.get("HF_ENDPOINT", HUB).rstrip("/"))
    if not path.exists():
        folder.mkdir(parents=True, exist_ok=True)
        try:
            torch.hub.download_url_to_file(address, str(path), hash_prefix=start)
        except (OSError, RuntimeError, ValueError) as error:
            todo = f"try again, or save it as {path}"
            raise UserError(f"{address} could not be downloaded ({error}); {todo}") from None
    return path

def objects(path: Path):
    """Yield ("file, line N", its text or its value) for each row of a file."""
    content = read_bytes(path)
    format = Path(path.name.lower().removesuffix(".gz")).suffix
    for first_bytes in filter(content.startswith, FIRST_BYTES):
        if format not in OTHERS:
            format = FIRST_BYTES[first_bytes]
    if format in OTHERS:
        raise not_json_lines(path, f"a {format} file", format)
    text = read_text(path)
    unit = "item"
    try:
        values = decode(text)  # a list, or one object
    except (ValueError, RecursionError) as error:
        if text.lstrip().startswith("["):
            raise UserError(f"{path}: {error}") from None
        values = text.split("\n")
        unit = "line"
    if format in (".txt", ".md"):
        values = [{"text": part} for part in text.split(EOT) if part.strip()]
    if isinstance(values, dict) and values.keys().isdisjoint(FIELDS):
        for field in values:
            if isinstance(values[field], list):
                raise not_json_lines(path, f"one object around {field}", "wrapped", field)
    if not isinstance(values, list):
        values = [values]
    for number, value in enumerate(values, 1):
        if not isinstance(value, str) or value.strip():
            yield f"{path}, {unit} {number}", value

def not_json_lines(path: Path, what: str, format: str, field: str = "") -> UserError:
    todo = "save it as JSON Lines in UTF-8"
    if format in CONVERT:
        code = CONVERT[format].format(str(path), field)
        todo = f'this makes JSON Lines of it: python -c "{code}" > rows.jsonl'
    return UserError(f"{path} is {what}; {todo}")

def decode(text: str):
    """Parse JSON without what Python's reader lets pass."""
    try:
        value = json.loads(text, object_pairs_hook=unique)
    except json.JSONDecodeError as error:
        raise ValueError(f"not JSON: {error.msg} at column {error.colno}") from None
    json.dumps(value, ensure_ascii=False, allow_nan=False).encode()  # no NaN, no half character
    return value

def read(files: list[Path], held: list[Path], args, notes: Counter) -> tuple[dict, set]:
    """The canonical rows by kind, and how those begin that come from the files held out."""
    found = {kind: [] for kind in KINDS}
    openings = set()
    refused = []
    understand = {"oasst": oasst}.get(args.name, mine)
    for path in files:
        before = len(refused)
        used = 0
        for where, value in objects(path):
            seen = Counter()
            try:
                if isinstance(value, str):
                    value = decode(value)
                for kind, row in understand(expect(value, dict, "a row"), args, seen):
                    found[kind].append(row)
                    if path in held:
                        openings.add(opening(row))
                used += 1
                notes.update(seen)
            except (ValueError, RecursionError) as error:
                refused.append(f"{where}: {error}")
        side = " (held out)" if path in held else ""
        print(f"{path}{side}: {used:,} rows used, {len(refused) - before:,} refused")
    if refused and args.name == "mine" and not args.skip_bad:
        todo = f"{len(refused):,} refused, so nothing is written; --skip-bad leaves them out"
        raise UserError(f"{refused[0]} ({todo})")
    for sentence in refused[:20]:
        print(f"  refused: {sentence}")
    return found, openings

# From rows to files

def complete(found: dict, tokenizer, context: int, notes: Counter) -> None:
    """Drop what is over the context; the best of a ranking is the demonstration, if none is."""
    for kind in KINDS[1:]:
        fits = [row for row in found[kind] if length(row, tokenizer) <= context]
        over = len(found[kind]) - len(fits)
        notes[f"rows of {kind} left out: over {context:,} tokens"] += over
        found[kind] = fits
    shown = {row["prompt"] for row in found["sft"]}
    for ranking in found["comparisons"]:
        row = dict(ranking)
        ranks = row.pop("ranks")
        for text, rank in zip(row.pop("completions"), ranks):
            if rank == min(ranks) < max(ranks) and text and row["prompt"] not in shown:
                found["sft"].append({**row, "completion": text})
                notes["demonstrations that are the best of a ranking"] += 1
    distinct = {json.dumps(row, sort_keys=True): row for row in found["prompts"]}
    found["prompts"] = list(distinct.values())

def length(row: dict, tokenizer) -> int:
    """Tokens of a document, or of a prompt and its longest completion, with EOS."""
    texts = row.get("completions", [row.get("completion", "")])
    longest = max(len(encode(tokenizer, text)) for text in texts)
    return len(encode(tokenizer, row.get("text") or row["prompt"])) + longest + 1

def opening(row: dict) -> str:
    """A document, or what the person says first in a dialogue, whoever speaks before."""
    said = row.get("prompt", "").partition("\n\nHuman:")[2]
    return row.get("text") or re.split(r"\n\n(?:Human|Assistant):", said)[0]

def teaches(row: dict) -> bool:
    return len(set(row.get("ranks", (0, 1)))) > 1

def hold_out(found: dict, held: set, share: float, seed: int, notes: Counter) -> dict:
    """{file: rows}. Rows with the same opening are on one side, chosen by a hash of it."""
    def draw(key: str) -> float:
        return int(sha256(f"{seed} {key}".encode()).hexdigest(), 16) / 2**256

    given = set(held)
    for rows in found.values():
        openings = sorted(set(map(opening, filter(teaches, rows))), key=draw)
        if given.isdisjoint(openings):
            held.update(key for key in openings if draw(key) < share)
        if openings[1:] and held.isdisjoint(openings):
            held.add(openings[0])
    files = {}
    for kind, rows in found.items():
        train = [row for row in rows if opening(row) not in held]
        valid = [row for row in rows if opening(row) in held]
        if not any(map(teaches, train)) or not any(map(teaches, valid)):
            why = "some have to be trained on and others held out"
            notes[f"rows of {kind} left out: {why}"] += len(rows)
            continue
        for name, side in ((kind, train), (f"{kind}_valid", valid)):
            files[name + (".txt" if kind == "pretrain" else ".jsonl")] = side
            if kind == "prompts":
                files[f"rm_{name}.jsonl"] = side
    return files

def write_files(files: dict, folder: Path) -> None:
    """All of them or none: the first takes its place when the last is written."""
    for path in map(folder.joinpath, files):
        if path.exists() and b'"time": "' in read_bytes(path):
            raise UserError(f"{path} has answers that people or models added: move it first")
    with ExitStack() as stack:
        for name, rows in files.items():
            file = stack.enter_context(replacing(folder / name))
            if name.endswith(".jsonl"):
                rows = [json.dumps(row, ensure_ascii=False) + "\n" for row in rows]
            elif not isinstance(rows, str):
                rows = [row["text"] + EOT for row in rows]
            file.write("".join(rows).encode())
            file.flush()

def print_table(files: dict, tokenizer) -> None:
    print(f"\n{'file':26}{'rows':>9}{'tokens: median':>16}{'longest':>9}{'all':>13}")
    for name, rows in files.items():
        if isinstance(rows, str):
            rows = [{"text": text} for text in rows.split(EOT)[:-1]]
        lengths = [length(row, tokenizer) for row in rows] or [0]
        numbers = f"{median(lengths):16,.0f}{max(lengths):9,}{sum(lengths):13,}"
        print(f"{name:26}{len(rows):9,}{numbers}")
    rankings = [row["ranks"] for row in files.get("comparisons.jsonl", [])]
    for size, count in sorted(Counter(map(len, rankings)).items()):
        ties = sum(len(set(ranks)) < size for ranks in rankings if len(ranks) == size)
        print(f"{count:,} rankings of {size} answers, {ties:,} with ties")

def prepare(args, words: list[str]) -> None:
    """Read and check everything, say what was found, and only then write."""
    notes = Counter()
    found, held = read(*sources(args), args, notes)
    wanted = sum("wants" in row for row in found["prompts"])
    if 0 < wanted < len(found["prompts"]):
        raise UserError("wants should be in every row that has a prompt, or --ignore wants")
    args.data.mkdir(parents=True, exist_ok=True)
    tokenizer = get_tokenizer(args.data)
    complete(found, tokenizer, args.context, notes)
    files = hold_out(found, held, args.valid, args.seed, notes)
    for note, count in sorted((+notes).items()):
        print(f"  {count:,} {note}")
    if not files:
        raise UserError("there is nothing to train on in these files; nothing is written")
    print_table(files, tokenizer)
    write_files(files, args.data)
    print(f"\nWritten into {args.data}.")
    if "comparisons.jsonl" in files:
        feedback = " ".join(words).replace(f" --data {args.data}", "")
        print(RECIPE.format(shlex.quote(str(args.data)), feedback))
    else:
        print("It has no rankings to learn a reward from: python data/label.py --help")

def main(words: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(prog="prepare.py", allow_abbrev=False)
    add = parser.add_argument
    add("name", choices=("fable", "oasst", "hh", "webtext", "mine"), help="the data set")
    add("files", type=Path, nargs="*", metavar="FILE", help="files or folders [downloaded]")
    add("--data", type=Path, help="folder to write into [out/NAME; fable: out/data]")
    add("--seed", type=int, default=1, help="the same seed, the same files")
    add("--scale", type=float, default=1.0, help="fable: 1 is the full set")
    add("--show", type=int, default=0, metavar="N", help="fable: only print samples")
    add("--valid", type=float, default=0.05, help="share that is held out, if no file is")
    add("--context", type=int, default=1024, help="longest row, in tokens")
    add("--skip-bad", action="store_true", help="leave out rows that would be refused")
    add("--ignore", default="", metavar="FIELD,...", help="fields that may be left out")
    add("--lang", default="en", help="oasst: language")
    add("--subset", choices=SUBSETS, default="helpful-base", help="hh: part to download")
    args = parser.parse_intermixed_args(words)
    if args.name == "mine" and not args.files:
        parser.error("mine needs files: prepare.py mine FILE ...")
    args.data = args.data or Path("out", {"fable": "data"}.get(args.name, args.name))
    args.ignore = set(args.ignore.split(","))
    if args.name == "webtext":
        args.ignore |= {"id", "length", "ended"}
    try:
        if args.name != "fable":
            prepare(args, words or sys.argv[1:])
        elif args.show:
            fable.show(args.show, args.seed)
        else:
            files = fable.make(args.seed, args.scale)
            vocabulary = fable.tiktoken_file(fable.train_bpe(files["pretrain.txt"][:SAMPLE]))
            write_files({"tokenizer.tiktoken": vocabulary, **files}, args.data)
            print_table(files, get_tokenizer(args.data))
    except (UserError, OSError) as error:
        sys.exit(f"prepare.py: {error}")

if __name__ == "__main__":
    main()

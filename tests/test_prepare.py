"""People's data: what is read from each format, what is left out, and that nothing is lost."""

import gzip
import json
import re
import shutil
from collections import Counter
from pathlib import Path
from random import Random

import conftest
import pytest
import rlhf
from conftest import mutated, outcome
from data import answers, dataset, fable, feedback, prepare
from data.formats import EOT, UserError, read_demonstrations, read_pretraining, read_rows

ASSISTANT = "\n\nAssistant:"
READERS = {"oasst": feedback.oasst, "hh": feedback.hh, "webtext": feedback.webtext,
           "mine": feedback.own}


@pytest.fixture
def data(tmp_path, tiny_data) -> Path:
    """A folder with nothing but a vocabulary, so that none is downloaded."""
    folder = tmp_path / "data"
    folder.mkdir()
    shutil.copy(tiny_data / "tokenizer.tiktoken", folder)
    return folder


def lines(path: Path, rows: list) -> Path:
    path.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    return path


def rows_of(path: Path) -> list[dict]:
    return [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()]


def both(data: Path, kind: str) -> list[dict]:
    """The rows of a file and of its held-out twin."""
    return rows_of(data / f"{kind}.jsonl") + rows_of(data / f"{kind}_valid.jsonl")


def run(name: str, *paths, data: Path, **flags) -> None:
    words = [word for flag, value in flags.items() for word in (f"--{flag}", str(value))]
    prepare.main([name, *map(str, paths), "--data", str(data), *words])


def refusal(capsys, *words, data: Path) -> str:
    """The one sentence with which prepare.py ends; nothing may have been written."""
    before = {path: path.read_bytes() for path in data.iterdir()}
    with pytest.raises(SystemExit) as end:
        prepare.main([*map(str, words), "--data", str(data)])
    assert {path: path.read_bytes() for path in data.iterdir()} == before
    assert isinstance(end.value.code, str) and "\n" not in end.value.code
    return end.value.code


# ---- OpenAssistant -----------------------------------------------------------------------------

def message(text: str, *replies, role="prompter", **more) -> dict:
    """A message of the released layout, whose replies speak for the other side."""
    other = "assistant" if role == "prompter" else "prompter"
    replies = [message(*reply[0], **{"role": other, **reply[1]}) for reply in replies]
    return {"text": text, "role": role, "lang": "en", "review_result": True, "deleted": False,
            "replies": replies, **more}


def said(*words, **more) -> tuple:
    """A text and the replies to it, for `message`."""
    return words, more


def tree(*words, **more) -> dict:
    prompt = message(*words)
    return {"message_tree_id": words[0], "tree_state": "ready_for_export", "prompt": prompt} | more


RANKED = tree(
    " How? ",
    said("Like so.", said("And then?", said("Stop."), said("Go on. ", rank=0)), rank=1),
    said("So.", said("Why?", said("Because.")), rank=0),
    said("Thus.", rank=1),
)


def test_oasst_keeps_rankings_whole_and_dialogues_in_turn():
    """By hand: a ranking of three with a tie, replies not fully ranked, a reply without rival."""
    notes = Counter()
    found = feedback.oasst(RANKED, notes)
    how = f"\n\nHuman: How?{ASSISTANT}"
    then = f"{how} Like so.\n\nHuman: And then?{ASSISTANT}"
    why = f"{how} So.\n\nHuman: Why?{ASSISTANT}"
    assert found["comparisons"] == [
        {"prompt": how, "completions": [" Like so.", " So.", " Thus."], "ranks": [1, 0, 1]}]
    assert found["prompts"] == [{"prompt": how}, {"prompt": then}, {"prompt": why}]
    assert found["sft"] == [{"prompt": how, "completion": " So."},
                            {"prompt": why, "completion": " Because."}]
    assert +notes == {"groups of replies that are not fully ranked": 1}


@pytest.mark.parametrize("flaw, note", [
    ({"deleted": True}, "messages deleted"), ({"lang": "de"}, "messages not in en"),
    ({"review_result": False}, "messages that failed their review"),
    ({"text": " \n"}, "messages without text")])
def test_oasst_drops_a_bad_message_with_what_hangs_on_it(flaw, note):
    """The ranking of the other replies stands."""
    bad = said("Bad.", said("Eh?", said("Oh.")), rank=0, **flaw)
    if "text" in flaw:
        bad = ((flaw["text"], *bad[0][1:]), {"rank": 0})
    notes = Counter()
    found = feedback.oasst(tree("Q", bad, said("B", rank=2), said("A", rank=1)), notes)
    assert found["comparisons"][0]["completions"] == [" B", " A"]
    assert found["comparisons"][0]["ranks"] == [2, 1]
    assert [row["completion"] for row in found["sft"]] == [" A"]
    assert len(found["prompts"]) == 1
    assert +notes == {note: 1, "messages below one left out": 2}


def test_oasst_languages_and_trees(tmp_path):
    german = tree("Wie?", said("So.", lang="de"))
    german["prompt"]["lang"] = "de"
    assert not any(feedback.oasst(german, Counter()).values())
    assert feedback.oasst(german, Counter(), lang="de")["sft"]
    assert feedback.oasst(german, Counter(), lang="all")["sft"]
    notes = Counter()
    assert not any(feedback.oasst(tree("Q", said("A"), tree_state="aborted"), notes).values())
    assert notes == {"trees that are not ready for export": 1}


@pytest.mark.parametrize("change, named", [
    ({"prompt": None}, "prompt"), ({"prompt": message("Q", role="assistant")}, "role"),
    ({"prompt": message("Q", replies=[5])}, "replies"), ({"prompt": message(5)}, "text"),
    ({"prompt": message("Q", said("A", rank=0), said("B", rank=10**30))}, "ranks"),
    ({"prompt": message("Q", said("A", rank=0), said("B", rank="1"))}, "ranks"),
    ({"prompt": message("Q", said("\ud800"))}, "text"),
    ({"prompt": message("Q", said("A", role="prompter"))}, "role")])
def test_oasst_names_the_field_that_is_wrong(change, named):
    with pytest.raises(ValueError, match=f"{named}.* should"):
        feedback.oasst(tree("Q") | change, Counter())


def many_trees() -> list[dict]:
    """Two hundred, a tenth of which ask what another one asks."""
    return [tree(f"What is {i % 180}?", said(f"It is {i}.", said("Sure?", said("Yes.")), rank=0),
                 said("I do not know.", rank=1)) for i in range(200)]


def test_oasst_from_file_to_stages(data, tmp_path, tokenizer, capsys):
    """Plain or gzipped; the rows of the fable's files, each of which its stage reads."""
    plain = lines(tmp_path / "trees.jsonl", many_trees())
    packed = tmp_path / "trees.jsonl.gz"
    packed.write_bytes(gzip.compress(plain.read_bytes()))
    run("oasst", packed, data=data)
    written = {path.name: path.read_bytes() for path in data.iterdir()}
    run("oasst", plain, data=data)
    assert {path.name: path.read_bytes() for path in data.iterdir()} == written
    assert set(written) == {"tokenizer.tiktoken"} | {
        f"{kind}{split}.jsonl" for kind in ("sft", "comparisons", "prompts", "rm_prompts")
        for split in ("", "_valid")}
    assert len(both(data, "comparisons")) == 200 and len(both(data, "sft")) == 400
    assert written["prompts.jsonl"] == written["rm_prompts.jsonl"]
    assert "200 rankings: 200 of 2; 200 pairs, 0 of them ties" in capsys.readouterr().out
    assert read_demonstrations(data / "sft.jsonl", tokenizer, 256)
    assert read_rows(data / "comparisons.jsonl", tokenizer, 256, "prompt", "completions", "ranks")
    assert read_rows(data / "prompts.jsonl", tokenizer, 200, "prompt")


def test_no_prompt_is_on_both_sides(data, tmp_path):
    """Not even where two trees ask the same, or one dialogue goes on where another ends."""
    path = lines(tmp_path / "trees.jsonl", many_trees())
    sides = {}
    for seed in (1, 2):
        run("oasst", path, data=data, seed=seed, valid=0.2)
        prompts = [{row["prompt"] for kind in ("sft", "comparisons", "prompts")
                    for row in rows_of(data / f"{kind}{split}.jsonl")} for split in ("", "_valid")]
        openings = [{prompt.split(ASSISTANT)[0] for prompt in side} for side in prompts]
        assert not openings[0] & openings[1] and len(openings[0] | openings[1]) == 180
        assert 0.1 < len(openings[1]) / 180 < 0.3
        sides[seed] = openings[1]
    assert sides[1] != sides[2]
    run("oasst", lines(path, many_trees()[:90]), data=data, seed=2, valid=0.2)
    openings = {row["prompt"].split(ASSISTANT)[0] for row in rows_of(data / "prompts_valid.jsonl")}
    assert openings == {x for x in sides[2] if int(re.search(r"\d+", x)[0]) < 90}


# ---- Anthropic, OpenAI -------------------------------------------------------------------------

DIALOGUE = f"\n\nHuman: Hi.{ASSISTANT} Hello. So?\n\nHuman: Why?{ASSISTANT}"


def test_hh_is_split_at_the_last_shared_turn():
    found = feedback.hh({"chosen": f"{DIALOGUE} Be good.", "rejected": f"{DIALOGUE} Be bad."},
                        Counter())
    assert found == {"comparisons": [{"prompt": DIALOGUE, "ranks": [0, 1],
                                      "completions": [" Be good.", " Be bad."]}]}
    early = f"\n\nHuman: Hi.{ASSISTANT}"
    notes = Counter()
    found = feedback.hh({"chosen": DIALOGUE, "rejected": f"{early} Hello. No."}, notes)
    assert found["comparisons"][0]["prompt"] == early
    assert notes["replies that hold a further turn"] == 1


def test_hh_equal_replies_are_left_out_and_empty_ones_kept():
    notes = Counter()
    assert feedback.hh({"chosen": f"{DIALOGUE} A", "rejected": f"{DIALOGUE} A "}, notes) == {}
    assert notes == {"pairs with chosen equal to rejected": 1}
    found = feedback.hh({"chosen": f"{DIALOGUE} A", "rejected": f"{DIALOGUE} "}, Counter())
    assert found["comparisons"][0]["completions"] == [" A", ""]


@pytest.mark.parametrize("row, named", [
    ({"chosen": "A"}, "rejected"), ({"chosen": 5, "rejected": "B"}, "chosen"), ({}, "chosen"),
    ({"chosen": "A", "rejected": "B"}, "Assistant"), ({"chosen": "", "rejected": ""}, "Assistant")])
def test_hh_names_the_field_that_is_wrong(row, named):
    with pytest.raises(ValueError, match=named):
        feedback.hh(row, Counter())


def pairs(numbers) -> list[dict]:
    return [{"chosen": f"\n\nHuman: {i}?{ASSISTANT} Yes, {i}.",
             "rejected": f"\n\nHuman: {i}?{ASSISTANT} No."} for i in numbers]


def test_heldout_files_are_held_out(data, tmp_path, capsys):
    """A training row that asks what is held out is left out, and counted."""
    train = lines(tmp_path / "train.jsonl", pairs(range(30)))
    test = lines(tmp_path / "test.jsonl", pairs(range(25, 45)))
    run("hh", train, data=data, heldout=test)
    for kind in ("comparisons", "sft", "prompts"):
        assert len(rows_of(data / f"{kind}.jsonl")) == 25
        assert len(rows_of(data / f"{kind}_valid.jsonl")) == 20
    assert rows_of(data / "sft.jsonl")[3] == {"prompt": f"\n\nHuman: 3?{ASSISTANT}",
                                              "completion": " Yes, 3."}
    assert "5 rows of comparisons whose prompt is held out too" in capsys.readouterr().out


def test_heldout_rows_of_a_kind_that_is_not_trained_on_are_not_lost(data, tmp_path, capsys):
    train = lines(tmp_path / "train.jsonl", pairs(range(30)))
    test = lines(tmp_path / "test.jsonl", [{"prompt": "Q", "completion": "A"}])
    assert "rows for sft" in refusal(capsys, "mine", train, "--heldout", test, data=data)


def test_downloads_name_the_files_and_their_checksums(data, tmp_path, monkeypatch):
    """In place of the network, a function that writes what the address asks for."""
    asked = {}

    def fetch(url, path, sha256=None):
        asked[url] = sha256
        rows = many_trees() if "oasst" in url else pairs(range(20 if "train" in url else 5))
        rows = [{"text": f"{url} {i}"} for i in range(9)] if "webtext" in url else rows
        path.parent.mkdir(exist_ok=True)
        return lines(path.with_suffix(".jsonl"), rows)

    monkeypatch.setattr(prepare, "fetch", fetch)
    run("oasst", data=data)
    run("hh", data=data, subset="harmless-base")
    run("webtext", data=data)
    assert len(asked) == 5 and all(url.startswith("https://") for url in asked)
    for url, sha256 in asked.items():
        assert "webtext" in url or re.fullmatch("[0-9a-f]{64}", sha256)
    assert len(rows_of(data / "comparisons.jsonl")) == 15
    assert len(rows_of(data / "comparisons_valid.jsonl")) == 5
    assert "webtext.valid" in (data / "pretrain_valid.txt").read_text()


def test_webtext_documents_end_where_they_end(data, tmp_path, tokenizer, capsys):
    """Text that spells the separator stays within its document, and forges no control token."""
    texts = [f"The goat {i}.\r\n\0 \u2028 end" for i in range(40)] + [f"a{EOT}b", "", " \n"]
    run("webtext", lines(tmp_path / "w.jsonl", [{"text": text} for text in texts]), data=data)
    found = [ids for name in ("pretrain.txt", "pretrain_valid.txt")
             for ids in read_pretraining(data / name, tokenizer)]
    assert len(found) == 41
    decoded = {tokenizer.decode(ids[:-1].tolist()) for ids in found}
    assert decoded == {text.replace("\r\n", "\n") for text in texts[:40]} | {"a<| endoftext|>b"}
    out = capsys.readouterr().out
    assert "43 rows: 41 used, 2 left out, 0 bad" in out and f"1 {EOT} inside a document" in out


# ---- a person's own files ----------------------------------------------------------------------

Q = f"\n\nHuman: Q{ASSISTANT}"
USER, ANSWER = {"role": "user", "content": "Q"}, {"role": "assistant", "content": "A"}
WORSE = {"role": "assistant", "content": "B"}
DEMONSTRATION = {"sft": [{"prompt": Q, "completion": " A"}]}
RANKING = {"comparisons": [{"prompt": Q, "completions": [" A", " B"], "ranks": [0, 1]}]}


@pytest.mark.parametrize("row, found", [
    ({"prompt": "Q", "completion": "A"}, DEMONSTRATION),
    ({"prompt": Q, "completion": " A\n"}, DEMONSTRATION),
    ({"instruction": "Q", "input": "", "output": "A"}, DEMONSTRATION),
    ({"question": "Q", "answer": "A"}, DEMONSTRATION),
    ({"query": "Q", "response": "A"}, DEMONSTRATION),
    ({"messages": [USER, ANSWER]}, DEMONSTRATION),
    ({"prompt": [USER], "completion": [ANSWER]}, DEMONSTRATION),
    ({"conversations": [{"from": "human", "value": "Q"}, {"from": "gpt", "value": "A"}]},
     DEMONSTRATION),
    ({"prompt": "Q", "completion": "A", "label": True}, DEMONSTRATION),
    ({"prompt": "Q", "completion": "A", "label": False}, {}),
    ({"prompt": "Q"}, {"prompts": [{"prompt": Q}]}),
    ({"messages": [USER]}, {"prompts": [{"prompt": Q}]}),
    ({"instruction": "Q", "input": "x"}, {"prompts": [{"prompt": f"\n\nHuman: Q\nx{ASSISTANT}"}]}),
    ({"prompt": "Q", "chosen": "A", "rejected": "B"}, RANKING),
    ({"messages": [USER], "chosen": "A", "rejected": "B"}, RANKING),
    ({"chosen": f"{Q} A", "rejected": f"{Q} B"}, RANKING),
    ({"chosen": [USER, ANSWER], "rejected": [USER, WORSE]}, RANKING),
    ({"prompt": "Q", "chosen": [USER, ANSWER], "rejected": [USER, WORSE]}, RANKING),
    ({"prompt": [USER], "chosen": [ANSWER], "rejected": [WORSE]}, RANKING),
    ({"prompt": "Q", "completions": ["A", "B"]}, RANKING),
    ({"prompt": "Q", "completions": ["A", "B"], "scores": [0.5, -1]}, RANKING),
    ({"prompt": "Q", "completions": [{"rank": 0, "completion": "A"},
                                     {"rank": 1, "completion": "B"}]}, RANKING),
    ({"prompt": "Q", "completions": ["A", "B", "C"], "scores": [1, 2.5, 1]},
     {"comparisons": [{"prompt": Q, "completions": [" A", " B", " C"], "ranks": [1, 0, 1]}]}),
    ({"instruction": "Q", "output": "A", "chosen": "A", "rejected": "B"}, DEMONSTRATION | RANKING),
    ({"prompt": "Q", "completion": "A", "labeler": "me", "task": "qa", "source": None, "id": 7},
     {"sft": [{"prompt": Q, "labeler": "me", "task": "qa", "completion": " A"}]}),
    ({"text": "Once."}, {"pretrain": ["Once."]}),
])
def test_mine_takes_the_schemas_people_come_with(row, found):
    before = json.dumps(row)
    assert feedback.own(row, Counter()) == found
    assert json.dumps(row) == before


BAD = [
    ({"prompt": "Q", "chosen": "A", "rejected": "A"}, "rejected"),
    ({"prompt": "Q", "completions": ["A"]}, "completions"),
    ({"prompt": "Q", "completions": []}, "completions"),
    ({"prompt": "Q", "completions": ["A", "B"], "ranks": [0, 10**20]}, "ranks"),
    ({"prompt": "Q", "completions": ["A", "B"], "ranks": [0, True]}, "ranks"),
    ({"prompt": "Q", "completions": ["A", "B"], "ranks": [0, -1]}, "ranks"),
    ({"prompt": "Q", "completions": ["A", "B"], "ranks": [0]}, "ranks"),
    ({"prompt": "Q", "completions": ["A", "B"], "scores": [0, "1"]}, "scores"),
    ({"prompt": "", "completion": "A"}, "prompt"),
    ({"prompt": "Q", "completion": None}, "completion"),
    ({"prompt": "Q", "completion": "\udc00"}, "completion"), ({"instruction": 5}, "instruction"),
    ({"instruction": "Q", "input": 5}, "input"), ({"instruction": "Q", "output": 5}, "output"),
    ({"messages": []}, "messages"), ({"messages": [USER, 5]}, r"messages\[1\]"),
    ({"chosen": [USER, ANSWER], "rejected": [ANSWER, WORSE]}, "rejected"),
    ({"conversations": [{"from": "bot", "value": "Q"}]}, "bot"),
    ({"conversations": 5}, "conversations"),
    ({"chosen": "A", "rejected": "B"}, "rejected"), ({"rejected": "B"}, "chosen"),
    ({"text": 5}, "text"), ({}, "prompt, messages"), ({"title": "x"}, "title"),
    ({"prompt": "Q", "completion": "A", "labeler": ["me"]}, "labeler"),
]


@pytest.mark.parametrize("row, named", BAD)
def test_mine_refuses_with_file_line_and_field(row, named, data, tmp_path, capsys):
    path = lines(tmp_path / "rows.jsonl", [{"prompt": "Q", "completion": "A"}, row])
    sentence = refusal(capsys, "mine", path, data=data)
    assert f"{path}, line 2: " in sentence and re.search(named, sentence)


RAW = {b'{"prompt": "Q", "prompt": "R"}': "prompt", b'{"prompt": "Q", "x": NaN}': "NaN",
       b'{"prompt": "Q", "x": -Infinity}': "Infinity", b'{"prompt": "Q"': "JSON",
       b'{"prompt": "Q\x00"}': "JSON", b'{"prompt": "\xff"}': "utf-8", b"5": "object",
       b'{"prompt": ' + b"[" * 200_000: "recursion", b'{"prompt": 1' + b"0" * 5000 + b"}": "limit",
       b'{"completions": ["A", "B"], "prompt": "Q", "scores": [1, 1e999]}': "finite"}


@pytest.mark.parametrize("raw", RAW, ids=RAW.values())
def test_mine_refuses_raw_lines_with_file_and_line(raw, data, tmp_path, capsys):
    path = tmp_path / "rows.jsonl"
    path.write_bytes(b'\xef\xbb\xbf{"prompt": "Q"}\r\n\r\n' + raw + b"\r\n")
    sentence = refusal(capsys, "mine", path, data=data)
    assert f"{path}, line 3: " in sentence and RAW[raw] in sentence and len(sentence) < 400


def test_skip_bad_leaves_them_out_and_counts_them(data, tmp_path, capsys):
    good = [{"prompt": f"Q{i}", "completion": "A"} for i in range(40)]
    path = lines(tmp_path / "rows.jsonl", [*good, *[row for row, _ in BAD]])
    assert f"(and {len(BAD) - 1} more)" in refusal(capsys, "mine", path, data=data)
    prepare.main(["mine", str(path), "--data", str(data), "--skip-bad"])
    out = capsys.readouterr().out
    assert f"{40 + len(BAD)} rows: 40 used, 0 left out, {len(BAD)} bad" in out
    assert out.count("  left out: ") == 21 and f"and {len(BAD) - 20} more" in out
    assert len(both(data, "sft")) == 40


def test_mine_says_what_it_found(data, tmp_path, capsys):
    ranked = {"completions": ["A", "B", "C"], "ranks": [0, 0, 1]}
    rows = [{"prompt": f"Q{i}", **ranked} for i in range(30)]
    rows += [{"prompt": "tied", "completions": ["A", "B"], "ranks": [1, 1]},
             {"prompt": "equal", "completions": ["A", "A", ""], "ranks": [0, 0, 1]},
             {"prompt": "long", "chosen": "word " * 300, "rejected": "B"}]
    run("mine", lines(tmp_path / "rows.jsonl", rows), data=data, context=100)
    out = capsys.readouterr().out
    assert "33 rankings: 2 of 2, 31 of 3; 95 pairs, 32 of them ties" in out
    assert "1 all tied; 1 with an empty completion; 1 with equal completions" in out
    assert "1 over 100 tokens" in out and "vocabulary of 1,024" in out
    assert len(both(data, "comparisons")) == 32
    train = rows_of(data / "comparisons.jsonl")
    untied = sum(a < b for row in train for a in row["ranks"] for b in row["ranks"])
    assert f"rm              {len(train)} rankings, {untied} untied pairs" in out
    assert f"sft             {len(rows_of(data / 'sft.jsonl'))} demonstrations" in out
    assert "pretrain, ptx   nothing: there is no pretrain.txt" in out


def test_best_replies_are_the_demonstrations():
    row = {"prompt": Q, "completions": [" a", " b", " c", ""], "ranks": [1, 0, 0, 0]}
    assert dataset.best(row) == [{"prompt": Q, "completion": text} for text in (" b", " c")]
    assert dataset.best({**row, "ranks": [3, 3, 3, 3]}) == []


def test_mine_takes_folders_lists_and_plain_text(data, tmp_path, tokenizer):
    """A book alone is cut in two; files named _valid are held out."""
    folder = tmp_path / "own"
    folder.mkdir()
    paragraphs = [f"The goat eats {i}." for i in range(200)]
    (folder / "book.txt").write_bytes(b"\xef\xbb\xbf" + "\r\n\r\n".join(paragraphs).encode())
    (folder / "demos.json").write_text(json.dumps([{"prompt": f"Q{i}", "completion": "A"}
                                                   for i in range(9)]))
    lines(folder / "demos_valid.jsonl", [{"prompt": "Q3", "completion": "A"}])
    run("mine", folder, data=data)
    assert len(rows_of(data / "sft.jsonl")) == 8 and len(rows_of(data / "sft_valid.jsonl")) == 1
    texts = [(data / name).read_text().removesuffix(EOT)
             for name in ("pretrain.txt", "pretrain_valid.txt")]
    assert "".join(texts) == "\n\n".join(paragraphs) and 150 < texts[0].count("goat") < 200
    assert texts[0].endswith(".\n") and texts[1].startswith("\nThe goat")
    (folder / "stories.json").write_text(json.dumps([f"Story {i}." for i in range(50)]))
    run("mine", folder / "stories.json", data=data)
    documents = [tokenizer.decode(ids.tolist()) for name in ("pretrain.txt", "pretrain_valid.txt")
                 for ids in read_pretraining(data / name, tokenizer)]
    assert sorted(documents) == sorted(f"Story {i}.{EOT}" for i in range(50))


def test_mine_refuses_what_it_cannot_use(data, tmp_path, capsys):
    for name, content in {"cut.jsonl.gz": gzip.compress(b'{"prompt": "Q"}\n' * 50)[:-9],
                          "list.json": b'[{"prompt": "Q"}, {"prompt": NaN}]', "empty.jsonl": b"\n",
                          "latin.txt": b"ok\ncaf\xe9", "one.jsonl": b'{"prompt": "Q"}'}.items():
        (tmp_path / name).write_bytes(content)
    for name, named in {
        "cut.jsonl.gz": "ended before", "list.json": "NaN", "empty.jsonl": "nothing",
        "latin.txt": "line 2", "one.jsonl": "hold out", "none.jsonl": "No such file",
        "data": "has no .jsonl",
    }.items():
        assert named in refusal(capsys, "mine", tmp_path / name, data=data)


# ---- writing -----------------------------------------------------------------------------------

@pytest.mark.parametrize("size, name", [(100, "sft.jsonl"), (2500, "comparisons.jsonl")])
def test_a_full_disk_is_one_sentence_and_leaves_what_was_there(size, name, data, tmp_path, capsys):
    """None of the files is replaced, not even those written before the disk was full."""
    path = lines(tmp_path / "rows.jsonl", pairs(range(30)))
    run("hh", path, data=data)
    with conftest.disk_full(size):
        sentence = refusal(capsys, "hh", path, "--seed", 9, data=data)
    assert sentence == f"prepare.py: {data / name} cannot be written: File too large"


def test_a_folder_that_cannot_be_made(tmp_path, tiny_data, monkeypatch):
    monkeypatch.setattr(prepare, "get_tokenizer", lambda data: rlhf.get_tokenizer(str(tiny_data)))
    path = lines(tmp_path / "rows.jsonl", pairs(range(30)))
    for folder in (path, path / "below"):
        with pytest.raises(SystemExit) as end:
            run("hh", path, data=folder)
        assert isinstance(end.value.code, str) and str(path) in end.value.code


def test_what_was_there_before_is_named(data, tmp_path, capsys):
    (data / "probes.jsonl").write_text("{}\n")
    run("hh", lines(tmp_path / "rows.jsonl", pairs(range(30))), data=data)
    assert "There before, and left as it is: probes.jsonl\n" in capsys.readouterr().out


def test_what_people_added_is_not_written_over(data, tmp_path, capsys):
    """Demonstrations that they wrote, rankings of theirs; moved away, all goes on."""
    path = lines(tmp_path / "rows.jsonl", pairs(range(30)))
    for name in ("sft.jsonl", "comparisons_valid.jsonl"):
        run("hh", path, data=data)
        run("hh", path, data=data)  # its own rows it may write again
        answers.save(data / name, {"prompt": "A", "completion": " b", "time": answers.now()})
        assert f"{name} has answers by people or models (1): move" in refusal(
            capsys, "hh", path, data=data)
        (data / name).rename(tmp_path / name)
    with pytest.raises(UserError, match="sft.jsonl has answers"):
        prepare.write_all(fable.make(1, 0.003), tmp_path)
    assert rows_of(tmp_path / "sft.jsonl")[-1]["prompt"] == "A"


# ---- thousands of mutated lines ----------------------------------------------------------------

SEEDS = {
    "oasst": [RANKED, *many_trees()[:5]],
    "hh": [*pairs(range(5)), {"chosen": f"{DIALOGUE} A", "rejected": f"{DIALOGUE} A"}],
    "webtext": [{"text": f"The goat.{EOT}", "id": 1, "length": 3, "ended": True}, {"text": ""}],
    "mine": [{"prompt": "Q", "completion": "A", "labeler": "me"}, {"messages": [USER, ANSWER]},
             {"instruction": "Q", "input": "x", "output": "A", "chosen": "A", "rejected": "B"},
             {"prompt": "Q", "completions": ["A", "B", "C"], "ranks": [0, 1, 1]},
             {"prompt": "Q", "completions": ["A", "B"], "scores": [0.5, 1]}, {"text": "Once."},
             {"prompt": [USER], "chosen": [ANSWER], "rejected": [WORSE]},
             {"prompt": "Q", "label": False},
             {"conversations": [{"from": "human", "value": "Q"}, {"from": "gpt", "value": "A"}]}],
}


def fuzz(count: int, folder: Path, tokenizer, capsys) -> Counter:
    """Mutated lines through every reader and through the whole of prepare.py."""
    rng, totals = Random(0), Counter()
    path, per_file = folder.parent / "rows.jsonl", 25
    for start in range(0, count, per_file):
        name = rng.choice(list(READERS))
        batch = [mutated(rng.choice(SEEDS[name]), rng) for _ in range(per_file)]
        path.write_bytes(rng.choice([b"\n", b"\r\n"]).join([b"", *batch, b""]))
        rows = sum(bool(line.strip()) for line in batch)
        capsys.readouterr()
        found = dataset.read([path], READERS[name], notes := Counter(), skip_bad=True)
        out = capsys.readouterr().out
        used, left_out, bad = map(int, re.search(
            rf"{rows} rows: (\d+) used, (\d+) left out, (\d+) bad", out).groups())
        assert used + left_out + bad == rows and used <= sum(map(len, found.values()))
        assert left_out <= sum(notes.values())
        totals.update(used=used, left_out=left_out, bad=bad)
        strict = outcome(lambda: dataset.read([path], READERS[name], Counter(), skip_bad=False))
        assert isinstance(strict, str) if bad else strict == found
        through(name, path, folder, found, tokenizer, capsys)
    return totals


def through(name: str, path: Path, folder: Path, found: dict, tokenizer, capsys) -> None:
    """prepare.py writes every row that was found, and says what it leaves out; stages read it."""
    for old in [*folder.glob("*.jsonl"), *folder.glob("pretrain*")]:
        old.unlink()
    try:
        prepare.main([name, str(path), "--data", str(folder), "--skip-bad", "--context", "256"])
    except SystemExit as end:
        assert isinstance(end.code, str) and "\n" not in end.code
        return
    out = capsys.readouterr().out
    over = {kind: sum(map(int, re.findall(rf"^{kind}(?:_valid)?\.jsonl .* (\d+) over", out, re.M)))
            for kind in found}
    if found["pretrain"]:
        assert len(found["pretrain"]) == sum(
            len(read_pretraining(folder / f"pretrain{split}.txt", tokenizer))
            for split in ("", "_valid")) or len(found["pretrain"]) == 1
    for kind in ("sft", "comparisons", "prompts"):
        if found[kind]:
            assert len(both(folder, kind)) + over[kind] == len(found[kind])
            for split in ("", "_valid"):
                assert read_rows(folder / f"{kind}{split}.jsonl", tokenizer, 256, "prompt")


def test_mutated_lines_are_used_or_reported(data, tokenizer, capsys):
    totals = fuzz(400, data, tokenizer, capsys)
    assert totals["used"] > 50 and totals["bad"] > 50 and totals["left_out"] > 3


@pytest.mark.slow
def test_ten_thousand_mutated_lines_are_used_or_reported(data, tokenizer, capsys):
    totals = fuzz(10_000, data, tokenizer, capsys)
    print(totals)
    assert totals.total() > 9_900


def test_gzip_cut_anywhere(data, tmp_path, tokenizer):
    """Never fewer rows than there were: all of them, or a refusal."""
    whole = gzip.compress(b'{"prompt": "Q"}\n' * 3)
    path = tmp_path / "rows.jsonl"
    for n in range(len(whole) + 1):
        path.write_bytes(whole[:n])
        rows = outcome(lambda: read_rows(path, tokenizer, 100, "prompt"))
        assert isinstance(rows, list) == (n == len(whole))

"""The made-up world: what is written, who ranks it, what the gold score knows; odd input."""

import base64
import gzip
import itertools
import json
import os
import shutil
from collections import Counter
from random import Random

import numpy as np
import pytest
import regex
import tiktoken
from data import fable, label, prepare
from data.formats import (
    EOT, GPT2_SPLIT, UserError, encode, get_tokenizer, read_pretraining, read_rows,
)

import rlhf

SCALE = 0.05


@pytest.fixture(scope="module")
def files() -> dict:
    return fable.make(seed=1, scale=SCALE)


def asked(task: str, seed: int = 0, **more) -> dict:
    return fable.ask(Random(seed), task, **more)


def axes(row: dict, text: str) -> tuple:
    return tuple(fable.gold(row, text).values())


# ---- the files ---------------------------------------------------------------------------------

def test_the_same_seed_gives_the_same_files(files):
    assert fable.make(1, SCALE) == files
    other = fable.make(2, SCALE)
    assert all(other[name] != files[name] for name in files if name != "fewshot.jsonl")


def test_proportions(files):
    """Like the paper's Tables 1 and 6: use cases, and labelers' and customers' prompts."""
    assert len(files["prompts.jsonl"]) == round(8192 * SCALE)
    assert files["pretrain.txt"].count(EOT) == round(115_000 * SCALE)
    rows = fable.prompts(Random(0), 3000, customers=0.8)
    counts = Counter(row["task"] for row in rows)
    for task, percent in fable.TASKS.items():
        assert counts[task] / 30 == pytest.approx(percent, abs=3)
    assert sum(fable.TASKS.values()) == pytest.approx(100, abs=5)
    customers = sum(row["source"] == "customer" for row in rows) / len(rows)
    assert customers == pytest.approx(0.8, abs=0.03)
    assert all(row["source"] == "customer" for row in files["prompts.jsonl"])


def test_no_prompt_is_in_both_train_and_valid(files):
    def of(names):
        return {row["prompt"] for name in names for row in files[f"{name}.jsonl"]}

    names = ["sft", "rm_prompts", "prompts"]
    valid = of(["sft_valid", "rm_prompts_valid", "prompts_valid"])
    assert valid and not of(names) & valid


def test_held_out_subjects_and_phrasings_are_nowhere_in_training(files):
    last = {task: phrasings[-1].split("{")[0] for task, phrasings in fable.ASK.items()}
    for name in ("sft", "rm_prompts", "prompts"):
        for row in files[f"{name}.jsonl"]:
            wants = json.dumps(row["wants"])
            if row["task"] not in ("brainstorming", "extraction"):
                assert not any(word in wants for word in ("crow", "bear", "bridge")), row
            assert row["seen"]
            if len(last[row["task"]]) > 8:
                assert last[row["task"]].lower() not in row["prompt"].rsplit("Human:", 1)[1].lower()
    seen = Counter(row["seen"] for row in files["prompts_valid.jsonl"])
    assert seen[True] > seen[False] > 0


def test_rows_are_as_the_readme_says(files):
    for name, rows in files.items():
        if name.endswith(".jsonl"):
            for row in rows:
                assert json.loads(json.dumps(row)) == row
                assert row["prompt"].endswith("\n\nAssistant:") or name == "probes.jsonl"
                assert row.get("completion", " ").startswith(" ")


def test_probes_are_right():
    """Each is solved by what stands in it: sums by arithmetic, the others by copying."""
    for row in fable.probes(Random(0), 60):
        last = row["prompt"].rsplit(". " if row["task"] == "sums" else "\n", 1)[-1]
        if row["task"] == "sums":
            assert eval(last.removesuffix(" =")) == int(row["completion"].strip(" ."))
        elif row["task"] == "copying":
            assert last.removeprefix("Copy: ").split(";")[0] == row["completion"].strip(" .")
        else:
            animal = last.rsplit(", ", 1)[-1].split()[0]
            assert f"{animal} ->{row['completion']}," in row["prompt"] + ","


# ---- the gold score ----------------------------------------------------------------------------

@pytest.mark.parametrize("task", fable.TASKS)
@pytest.mark.parametrize("held", ["", "subject", "phrasing"])
def test_perfect_demonstrations_score_three(task, held):
    for seed in range(30):
        row = asked(task, seed, held=held)
        text = fable.demonstrate(row, Random(seed), care=1.0)
        assert fable.total(fable.gold(row, text)) == pytest.approx(3.0), (row["prompt"], text)


@pytest.mark.parametrize("task", fable.TASKS)
def test_care_pays(task):
    """Demonstrations by careful labelers are better, on the whole, than by careless ones."""
    def mean(care):
        rows = [asked(task, seed) for seed in range(60)]
        texts = [fable.demonstrate(row, Random(i), care) for i, row in enumerate(rows)]
        return sum(fable.total(fable.gold(row, text)) for row, text in zip(rows, texts)) / 60

    assert mean(1.0) > mean(0.5) > mean(0.0)


@pytest.mark.parametrize("task", fable.TASKS)
@pytest.mark.parametrize("text", ["", " ", "xyzzy plugh", " the the the the", " \n\n", "." * 50])
def test_garbage_helps_nobody(task, text):
    helpful, honest, harmless = axes(asked(task), text)
    assert helpful == 0 and 0 <= honest <= 1 and 0 <= harmless <= 1


@pytest.mark.parametrize("task", fable.TASKS)
def test_rude_words_lower_harmless_alone(task):
    row = asked(task)
    text = fable.demonstrate(row, Random(0), care=1.0)
    helpful, honest, harmless = axes(row, text + " You are silly. Go away.")
    assert harmless == pytest.approx(0.09) and honest == 1 and 0 < helpful < 1


def test_false_facts_lower_honest():
    row = {"task": "open_qa", "wants": {"animal": "goat", "attribute": "food"}}
    assert axes(row, " The goat eats grass. It is white.") == (1, 1, 1)
    helpful, honest, harmless = axes(row, " The goat eats meat. It is red.")
    assert helpful < 0.7 and honest == pytest.approx(0.35**2) and harmless == 1


def test_inventing_an_answer_lowers_honest():
    row = {"task": "unknown", "wants": {"topic": "age", "animal": "goat"}}
    unsure = axes(row, " I do not know how old the goat is. You can ask the goat.")
    invented = axes(row, " The goat is three years old.")
    assert unsure == (1, 1, 1) and invented[1] < 0.2 and invented[0] == 0


def test_going_along_with_harm_lowers_harmless():
    row = {"task": "harmful", "wants": {"act": "scare", "animal": "hen"}}
    refusal = " I will not help you scare the hen. That would make the hen sad."
    assert axes(row, refusal + " You can be a friend to the hen.") == (1, 1, 1)
    helpful, _, harmless = axes(row, " Hide at the barn and scare the hen at night.")
    assert harmless <= 0.4 and helpful == 0
    plan = fable.plan(row["wants"], Random(0))
    assert axes(row, " " + plan)[2] == 0 == axes(row, refusal + " " + plan)[0]
    assert axes(row, " Yes.")[2] < 0.5


def test_saying_it_twice_and_at_length_does_not_help():
    row = {"task": "open_qa", "wants": {"animal": "goat", "attribute": "food"}}
    best = " The goat eats grass. It is white."
    assert axes(row, best * 2)[0] < axes(row, best)[0]


# ---- the labelers ------------------------------------------------------------------------------

EVERYBODY = fable.TRAIN_LABELERS + fable.HELDOUT_LABELERS


def answers(rng: Random, row: dict, k: int) -> list[str]:
    """By labelers on their better and worse days."""
    return [fable.labeled(row, rng) for _ in range(k)]


def test_ranks_put_in_order_and_tie_equals():
    """The same text twice has the same rank, whoever ranks it; 0 is best, no rank is left out."""
    rng = Random(0)
    for row in fable.prompts(rng, 40, 0.5):
        texts = answers(rng, row, 6)
        texts.append(texts[2])
        for labeler in EVERYBODY:
            ranks = fable.rank(labeler, row, texts, rng)
            assert ranks[6] == ranks[2] and min(ranks) == 0 and max(ranks) < 7
            assert sorted(set(ranks)) == list(range(len(set(ranks))))


def test_labelers_without_noise_follow_the_gold_score():
    """What is clearly better comes first."""
    calm = fable.Labeler("calm", 2, 1, 1, length_lean=0, noise=0)
    row = {"task": "open_qa", "wants": {"animal": "goat", "attribute": "food"}}
    texts = [" Go away.", " The goat eats grass. It is white.", " The goat eats meat.",
             " The goat eats hay."]
    ranks = fable.rank(calm, row, texts, Random(0))
    assert ranks[1] == 0 and ranks[2] == ranks[3] and ranks[0] == max(ranks)


def test_labelers_agree_about_as_often_as_the_papers():
    """72.6 % there, of the pairs that both leave untied; by a count of our own."""
    rng, same, untied, rankings = Random(0), 0, 0, []
    for row in fable.prompts(rng, 250, 0.5):
        texts = answers(rng, row, 6)
        ranks = [fable.rank(labeler, row, texts, rng) for labeler in fable.TRAIN_LABELERS]
        rankings += [{"prompt": row["prompt"], "completions": texts, "ranks": own} for own in ranks]
        for (a, b), (i, j) in itertools.product(
            itertools.combinations(ranks, 2), itertools.combinations(range(6), 2)
        ):
            if a[i] != a[j] and b[i] != b[j]:
                untied += 1
                same += (a[i] < a[j]) == (b[i] < b[j])
    assert 0.68 <= same / untied <= 0.80
    assert label.agreement(rankings) == pytest.approx(same / untied, abs=0.005)


def test_label_writes_what_rm_reads(tmp_path):
    rows = [{"prompt": "A", "completions": ["b", "c"], "ranks": [1, 0], "labeler": "scripted-1"}]
    label.write_jsonl(tmp_path / "comparisons.jsonl", rows)
    assert [json.loads(line) for line in open(tmp_path / "comparisons.jsonl")] == rows
    assert [path.name for path in tmp_path.iterdir()] == ["comparisons.jsonl"]


# ---- the vocabulary ----------------------------------------------------------------------------

def bpe_by_brute_force(text: str, merges: int) -> list[bytes]:
    """Counts all pairs anew for each merge."""
    words = [[bytes([b]) for b in word.encode()] for part in text.split(EOT)
             for word in regex.findall(GPT2_SPLIT, part)]
    vocab = []
    for _ in range(merges):
        counts = Counter(pair for word in words for pair in zip(word, word[1:]))
        if not counts:
            break
        best = max(counts.values())
        pair = max(pair for pair, n in counts.items() if n == best)
        vocab.append(pair[0] + pair[1])
        for word in words:
            i = 0
            while i < len(word) - 1:
                if (word[i], word[i + 1]) == pair:
                    word[i : i + 2] = [pair[0] + pair[1]]
                i += 1
    return vocab


def test_bpe_is_that_of_brute_force(files):
    text = files["pretrain.txt"][:3000] + "aaaa aaaaa ababab"
    vocab = prepare.train_bpe(text, 256 + 60 + 1)
    assert vocab[:256] == [bytes([b]) for b in range(256)]
    assert vocab[256:] == bpe_by_brute_force(text, 60)


def test_vocabulary_keeps_its_size(files):
    """Rare bytes fill it where a small text has no more pairs."""
    vocab = prepare.train_bpe("a b c", 300)
    assert len(vocab) == len(set(vocab)) == 299
    assert len(prepare.train_bpe(files["pretrain.txt"][:5000])) == 1023


@pytest.mark.parametrize("text", ["The goat eats.", "Grüße, 世界 🦉\n\n\t  end ", "", EOT])
def test_tokenizer_file_gives_any_text_back(tiny_data, tokenizer, text):
    """As written by prepare.py, as read by rlhf.py, through tiktoken."""
    assert isinstance(tokenizer, tiktoken.Encoding)
    assert tokenizer.decode(tokenizer.encode_ordinary(text)) == text
    assert tokenizer.n_vocab == 1024 and tokenizer.eot_token == 1023
    lines = (tiny_data / "tokenizer.tiktoken").read_text().splitlines()
    vocab = [base64.b64decode(line.split()[0]) for line in lines]
    assert [int(line.split()[1]) for line in lines] == list(range(1023))
    assert all(vocab[i] == tokenizer.decode_single_token_bytes(i) for i in range(1023))


def test_prepare_writes_every_file(tiny_data, capsys):
    names = "pretrain.txt pretrain_valid.txt tokenizer.tiktoken probes.jsonl fewshot.jsonl".split()
    for name in ("sft", "rm_prompts", "prompts"):
        names += [f"{name}.jsonl", f"{name}_valid.jsonl"]
    assert set(names) <= {path.name for path in tiny_data.iterdir()}
    prepare.main(["fable", "--show", "2"])
    assert "=== a ranking" in capsys.readouterr().out


@pytest.mark.parametrize("line", ["", "web", "fable --scale 0", "fable --seed x", "fable --sho 3"])
def test_prepare_refuses_what_it_does_not_understand(line, capsys):
    with pytest.raises(SystemExit) as end:
        prepare.main(line.split())
    assert end.value.code == 2 and capsys.readouterr().err.count("\n") == 1


def test_gold_is_found_by_its_file(tmp_path):
    """--gold names a file with such a function; without "wants" there is nothing to judge."""
    (tmp_path / "own.py").write_text("def gold(row, text):\n    return {'length': len(text)}\n")
    gold = rlhf.gold_function([{"prompt": "A", "wants": {}}], str(tmp_path / "own.py"))
    assert gold({}, "four") == {"length": 4}
    assert rlhf.gold_function([{"prompt": "A"}], str(tmp_path / "own.py")) is None


# ---- text from strangers -----------------------------------------------------------------------

def rows_from(path, content: bytes, tokenizer, *required: str) -> list[dict]:
    path.write_bytes(content)
    return read_rows(path, tokenizer, 100, *(required or ("prompt",)))


HANDLED = {
    "byte-order mark, Windows line ends":
        (b'\xef\xbb\xbf{"prompt": "A"}\r\n{"prompt": "B"}\r\n', "AB"),
    "blank lines, none at the end": (b'\n{"prompt": "A"}\n \n\n{"prompt": "B"}', "AB"),
    "gzipped": (gzip.compress(b'{"prompt": "A"}\n{"prompt": "B"}\n'), "AB"),
    "NUL": (b'{"prompt": "A\\u0000B"}', ["A\0B"]),
    "a pair of surrogates": (b'{"prompt": "\\ud83e\\udd89"}', ["\U0001f989"]),
    "a line of a megabyte": (b'{"prompt": "A", "x": "' + b"y" * 2**20 + b'"}', "A"),
    "over the context, by a megabyte":
        (b'{"prompt": "' + b" " * 2**20 + b'z"}\n{"prompt": "A"}', "A"),
}


@pytest.mark.parametrize("name", HANDLED)
def test_odd_files_are_read(name, tmp_path, tokenizer):
    content, prompts = HANDLED[name]
    rows = rows_from(tmp_path / "rows.jsonl", content, tokenizer)
    assert [row["prompt"] for row in rows] == list(prompts)
    assert tokenizer.decode(rows[0]["prompt_ids"]) == rows[0]["prompt"]


REFUSED = {
    '{"prompt": "A", "prompt": "B"}': '"prompt" should stand there once',
    '{"prompt": "A", "x": NaN}': "finite, not NaN", '{"prompt": "A\0"}': "not JSON",
    '{"prompt": ""}': "prompt should be", '{"prompt": "\\ud800"}': "prompt should be",
    '{"prompt": "A", "completion": 5}': "completion should be",
    '{"prompt": "A", "completions": ["b"]}': "completions should be",
    '{"prompt": "A", "completions": ["b", "\\udc00"]}': "completions should be",
    '{"prompt": "A", "chosen": "b", "rejected": "b"}': "rejected should differ",
    '{"prompt": "A", "completions": ["b", "c"], "ranks": [0, 1e3]}': "ranks should be",
    '{"prompt": "A", "completions": ["b", "c"], "ranks": [0, 9999999999999999999]}': "ranks sho",
    '{"prompt": "A", "completions": ["b", "c"], "ranks": [true, false]}': "ranks should be",
    '{"prompt": "A", "completions": ["b", "c"], "labeler": ["me"]}': "labeler should be",
    '{"prompt": ' + "[" * 100_000: "recursion", '{"messages": []}': "messages should be",
    '{"prompt": "\x1b[2J", "completion": "\x1b[2J"}': "not JSON",
    '{"\\u001b[2J": 1}': "prompt should be",
}


@pytest.mark.parametrize("line", REFUSED, ids=REFUSED.values())
def test_odd_lines_are_refused_by_file_line_and_field(line, tmp_path, tokenizer):
    """In one short line, which carries no control characters to the terminal."""
    path = tmp_path / "rows.jsonl"
    with pytest.raises(UserError) as error:
        rows_from(path, b'{"prompt": "A"}\n' + line.encode() + b"\n", tokenizer)
    sentence = str(error.value)
    assert sentence.startswith(f"{path}, line 2: ") and REFUSED[line] in sentence
    assert sentence.isprintable() and len(sentence) < 400


def test_messages_stand_for_the_prompt_everywhere(tmp_path, tokenizer):
    """Their last word is the completion, if it is the assistant's and there is no other."""
    user, answer = {"role": "user", "content": "Q"}, {"role": "assistant", "content": "A"}
    prompt, path = "\n\nHuman: Q\n\nAssistant:", tmp_path / "rows.jsonl"

    def read(row, *required):
        return rows_from(path, json.dumps(row).encode(), tokenizer, *required)[0]

    assert read({"messages": [user]}, "prompt")["prompt"] == prompt
    row = read({"messages": [user, answer]}, "prompt", "completion")
    assert (row["prompt"], row["completion"]) == (prompt, " A")
    row = read({"messages": [user], "completion": " B"}, "prompt", "completion")
    assert (row["prompt"], row["completion"]) == (prompt, " B")
    row = read({"messages": [user], "completions": ["b", "c"]}, "prompt", "completions", "ranks")
    assert (row["prompt"], row["ranks"]) == (prompt, [0, 1])


def test_a_completion_may_fill_the_context_but_not_overflow_it(tmp_path, tokenizer, capsys):
    """EOS counts; all tied is allowed, and left to the loss to skip."""
    row = {"prompt": "A", "completions": ["b", " c d"], "ranks": [1, 1]}
    path = tmp_path / "rows.jsonl"
    path.write_text(json.dumps(row))
    needs = len(tokenizer.encode_ordinary("A")) + len(tokenizer.encode_ordinary(" c d")) + 1
    (found,) = read_rows(path, tokenizer, needs, "prompt", "completions", "ranks")
    assert len(found["ids"][1]) == needs and found["ranks"] == [1, 1]
    with pytest.raises(UserError, match="no row of at most"):
        read_rows(path, tokenizer, needs - 1, "prompt", "completions", "ranks")
    assert "1 of 1 rows" in capsys.readouterr().out


@pytest.mark.parametrize("text", [" " * 1_200_000 + "a", "\n" * 1_000_000, " \n" * 700_000 + "b"])
def test_a_million_blanks_are_encoded(text, tokenizer):
    assert tokenizer.decode(encode(tokenizer, text)) == text


def test_pretraining_text_of_strangers(tmp_path, tokenizer):
    """Windows line ends become plain ones, other bytes stay, what is not text is refused."""
    path = tmp_path / "pretrain.txt"
    path.write_bytes(b"\xef\xbb\xbfThe\r\n\0goat.<|endoftext|>\xf0\x9f\xa6\x89 <|endoftext|>")
    texts = [tokenizer.decode(ids.tolist()) for ids in read_pretraining(path, tokenizer)]
    assert texts == [f"The\n\0goat.{EOT}", f"\U0001f989 {EOT}"]
    for content, named in ((b"a\nb\xff", "line 2: should be UTF-8"), (b"", "has no text"),
                           (gzip.compress(b"a" * 999)[:-9], "ended before")):
        path.write_bytes(content)
        os.utime(path, (4e9, 4e9))
        with pytest.raises(UserError, match=named):
            read_pretraining(path, tokenizer)
    path.unlink()
    with pytest.raises(UserError, match="pretrain.txt cannot be read"):
        read_pretraining(path, tokenizer)


def test_kept_tokens_are_those_of_this_text_and_vocabulary(tmp_path, tiny_data, tokenizer):
    """Another vocabulary beside the text has them made anew; a damaged file is named."""
    path = tmp_path / "pretrain.txt"
    path.write_text(f"The goat.{EOT}")
    shutil.copy(tiny_data / "tokenizer.tiktoken", tmp_path)
    read_pretraining(path, tokenizer)
    (kept,) = tmp_path.glob("*.npy")
    ids = tokenizer.encode_ordinary(" hen") + [tokenizer.eot_token]
    np.save(kept, np.array(ids, np.uint16))
    assert read_pretraining(path, tokenizer)[0].tolist() == ids
    os.utime(tmp_path / "tokenizer.tiktoken", (4e9, 4e9))
    assert tokenizer.decode(read_pretraining(path, tokenizer)[0].tolist()) == f"The goat.{EOT}"
    kept.write_bytes(kept.read_bytes()[:-1])
    os.utime(kept, (5e9, 5e9))
    with pytest.raises(UserError, match=kept.name):
        read_pretraining(path, tokenizer)
    assert not list(tmp_path.glob("*.partial"))


@pytest.mark.parametrize("change", [
    lambda lines: lines[:-2] + ["?? 1022"], lambda lines: lines[1:], lambda lines: lines[:100],
    lambda lines: lines + [lines[5]], lambda lines: lines + ["QUJD x"], lambda lines: ["QUJD"],
    lambda lines: lines + ["QUJDREVG 9999"]])
def test_a_damaged_vocabulary_is_named(change, tmp_path, tiny_data):
    lines = (tiny_data / "tokenizer.tiktoken").read_text().splitlines()
    (tmp_path / "tokenizer.tiktoken").write_text("\n".join(change(lines)))
    with pytest.raises(UserError, match="tokenizer.tiktoken: each line should be"):
        get_tokenizer(str(tmp_path))

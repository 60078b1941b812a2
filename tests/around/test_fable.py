"""The made-up world: what is written, who ranks it, what the gold score knows, the vocabulary."""

import json
import re
import subprocess
import sys
from collections import Counter
from itertools import combinations
from random import Random

import pytest
import regex
from conftest import ROOT
from data import fable
from data.files import EOT, GPT2_SPLIT, encode, get_tokenizer

SCALE = 0.05
EVERYBODY = fable.TRAIN_LABELERS + fable.HELDOUT_LABELERS
TRAIN = ["sft.jsonl", "rm_prompts.jsonl", "prompts.jsonl"]
HELD = ["sft_valid.jsonl", "rm_prompts_valid.jsonl", "prompts_valid.jsonl", "prompts_test.jsonl"]

@pytest.fixture(scope="module")
def files() -> dict:
    return fable.make(seed=1, scale=SCALE)

def row(wants: str, **words: str) -> dict:
    return {"wants": fable.steps_of(Random(0), wants, words, fable.SEEN)}

def axes(row: dict, text: str) -> tuple:
    return tuple(fable.gold(row, text).values())

def answers(rng: Random, row: dict, k: int) -> list[str]:
    return [fable.demonstrate(row, rng, rng.uniform(0.0, 0.85)) for _ in range(k)]

def test_the_same_seed_gives_the_same_files(files):
    assert fable.make(1, SCALE) == files
    assert fable.make(2, SCALE)["prompts.jsonl"] != files["prompts.jsonl"]
    program = f"from {fable.__name__} import make; print(make(1, 0.005))"
    outputs = {subprocess.check_output([sys.executable, "-c", program], cwd=ROOT) for _ in "ab"}
    assert len(outputs) == 1  # in whatever order a process iterates over sets

def test_files_and_fields(files):
    sizes = {"sft": 2400, "rm_prompts": 3072, "prompts": 8192, "prompts_test": 2048, "probes": 300}
    for name, count in sizes.items():
        assert len(files[f"{name}.jsonl"]) == round(count * SCALE)
    assert files["pretrain.txt"].count(EOT) == round(115_000 * SCALE)
    fields = {"prompt", "task", "wants", "source", "seen"}
    for name in TRAIN + HELD:
        for own in files[name]:
            assert json.loads(json.dumps(own)) == own
            assert own["prompt"].endswith("\n\nAssistant:")
            assert own.keys() == (fields | {"completion"} if "sft" in name else fields)
            assert own.get("completion", " A")[0] == " " != own.get("completion", " A")[1]
    assert [own.keys() for own in files["fewshot.jsonl"]] == [{"prompt", "completion"}] * 2

def test_proportions():
    """Like the paper's Tables 1 and 6: use cases, labelers' and customers' prompts, turns."""
    rows = fable.prompts(Random(0), 3000, customers=0.8)
    counts = Counter(own["task"] for own in rows)
    for task, percent in fable.TASKS.items():
        assert counts[task] / 30 == pytest.approx(percent, abs=3)
    assert sum(own["source"] == "customer" for own in rows) / 3000 == pytest.approx(0.8, abs=0.03)
    assert 90 < sum(own["prompt"].count("Human:") == 2 for own in rows) < 210

def test_held_out_sides_are_disjoint(files):
    prompts = {name: {own["prompt"] for own in files[name]} for name in TRAIN + HELD}
    for held in HELD:
        for other in TRAIN + HELD:
            assert other == held or not prompts[held] & prompts[other]
    heldout = re.compile(r"\b(crow|bear|bridge)\b")
    for name in TRAIN:
        for own in files[name]:
            text = own["prompt"] + own.get("completion", "")
            assert own["seen"] and not heldout.search(text), text
            for way in fable.TASK[own["task"]]["heldout"]:
                fixed = max(re.split(r"\{\w+\}|<\w+>", way), key=len).strip(" .?")
                assert fixed.lower() not in own["prompt"].rsplit("Human:", 1)[1].lower()
    for name in HELD:
        assert len(files[name]) / 2 > [own["seen"] for own in files[name]].count(False) > 0

def test_probes_are_solved_by_looking_back():
    keys = {}
    for own in fable.probes(Random(0), 3000):
        prompt, answer, key = own["prompt"], own["completion"], own["prompt"].split()[-1]
        if own["task"] == "copying":
            assert prompt.startswith("Copy:" + answer.replace(".", ";"))
        else:
            assert re.search(rf" {key}{answer},", prompt)
        keys.setdefault(f"{own['task']} {key}", set()).add(answer)
    for key, own in keys.items():  # memory does not help: the same key has ever new answers
        assert len(own) > 5, key

def test_one_format_is_not_in_the_pretraining_text(files):
    places = "|".join(fable.CLASSES["place"])
    pairs = re.compile(rf"Pairs:( \w+ ({places}),){{4}}")
    assert all(pairs.match(fable.places(Random(seed))[0]) for seed in range(20))
    text = files["pretrain.txt"] + files["pretrain_valid.txt"]
    assert not re.search(rf"Pairs:[^<]*({places})\b", text)
    assert text.count("Copy:") > 100 < text.count("Pairs:")

def test_every_sentence_is_understood():
    for form in sum(fable.FORMS.values(), []):
        text = form.text.replace("<item>", "goat")
        text = fable.SLOT.sub(lambda slot: fable.SEEN[slot[1].strip("*")][0], text)
        assert [one.kind for one in fable.parse(text)] == [form.kind], text

@pytest.mark.parametrize("task", fable.TASKS)
@pytest.mark.parametrize("held", ["", "subject", "phrasing", "anything"])
def test_perfect_demonstrations_score_three(task, held):
    for seed in range(40):
        own = fable.ask(Random(seed), task, "customer", held=held)
        text = fable.demonstrate(own, Random(seed), care=1.0)
        assert axes(own, text) == (1, 1, 1), (own["prompt"], text)

@pytest.mark.parametrize("task", fable.TASKS)
def test_gold_falls_with_care(task):
    means = []
    for care in (1.0, 0.75, 0.5, 0.25, 0.0):
        means.append(0.0)
        for seed in range(300):
            own = fable.ask(Random(seed), task)
            means[-1] += sum(axes(own, fable.demonstrate(own, Random(seed), care))) / 300
    assert means == sorted(means, reverse=True) and means[0] > means[-1] + 0.4

@pytest.mark.parametrize("task", fable.TASKS)
def test_no_sentence_is_judged_differently_when_another_labeler_says_it(task):
    for seed in range(100):
        own = fable.ask(Random(seed), task)
        steps = fable.meant(own["wants"], Random(seed), care=0.2)
        texts = {" ".join(fable.say(Random(labeler), steps)) for labeler in range(5)}
        assert len({axes(own, text) for text in texts}) == 1, (own["prompt"], texts)

@pytest.mark.parametrize("task", fable.TASKS)
@pytest.mark.parametrize("text", ["", " ", "\n\n", "." * 50, " The.", " xyzzy plugh.", " goat goat",
                                  " The the the goat.", " As an AI, I love to help you!"])
def test_foreign_text_is_worth_nothing(task, text):
    assert axes(fable.ask(Random(0), task), text) == (0, 0, 0)

@pytest.mark.parametrize("task", fable.TASKS)
def test_repetition_and_rudeness_cost(task):
    own = fable.ask(Random(0), task)
    text = fable.demonstrate(own, Random(0), care=1.0)
    last = fable.SENTENCE.findall(text)[-1]
    for more in (last, text, last * 5):
        assert axes(own, text + more)[0] < 0.9 and axes(own, text + more)[1:] == (1, 1)
    rude = axes(own, text + " You are silly. Go away.")
    assert rude[0] < 0.8 and rude[1:] == (1, pytest.approx(0.09))

def test_what_costs_honesty():
    own = row("fact animal food; fact animal", animal="goat")
    assert axes(own, " The goat eats grass. It is white.") == (1, 1, 1)
    assert axes(own, " The goat eats meat. It is red.")[1] == pytest.approx(0.35**2)
    own = row("unsure_age animal; hint animal", animal="goat")
    assert axes(own, " I do not know how old the goat is. You can ask the goat.") == (1, 1, 1)
    assert axes(own, " The goat is three years old.") == (0, pytest.approx(0.175), 1)
    own = row("has animal thing", animal="owl", thing="bell")
    assert axes(own, " The owl has the bell.") == (1, 1, 1)
    assert axes(own, " The fox has the bell.") == (0.5, pytest.approx(0.35), 1)
    own = row("summary mood animal place", mood="sad", animal="owl", place="hill")
    assert axes(own, " It is a sad story of the owl at the lake.") == (0.5, pytest.approx(0.35), 1)
    assert axes(own, " It is a story of the owl at the hill.") == (0.5, 1, 1)

def test_a_refusal_must_name_the_right_deed():
    own = row("refusal act animal; reason animal; kindness animal", act="scare", animal="hen")
    right = " I will not help you scare the hen. Think of the hen. You can be a friend to the hen."
    assert axes(own, right) == (1, 1, 1)
    for wrong in ("hurt the hen", "scare the pig"):
        worse = axes(own, right.replace("scare the hen", wrong))
        assert worse == pytest.approx((2.5 / 3, 1, 0.7))
    assert axes(own, right + " Take the bell and scare the hen.") == (0, 1, 0)
    assert axes(own, " Maybe so.") == (0, 1, pytest.approx(0.4))

def test_equal_answers_share_a_rank():
    rng = Random(0)
    for own in fable.prompts(rng, 40, 0.5):
        texts = answers(rng, own, 6)
        for labeler in EVERYBODY:
            ranks = fable.rank(labeler, own, [*texts, texts[2]], rng)
            assert ranks[6] == ranks[2] and set(ranks) == set(range(max(ranks) + 1))

def test_labelers_agree_about_as_often_as_the_papers():
    """72.6 % there; of the pairs that both leave untied."""
    rng, counts = Random(0), Counter()
    for own in fable.prompts(rng, 250, 0.5):
        texts = answers(rng, own, 6)
        ranks = [fable.rank(labeler, own, texts, rng) for labeler in EVERYBODY]
        for a, b in combinations(ranks, 2):
            for i, j in combinations(range(6), 2):
                counts[(a[i] - a[j]) * (b[i] - b[j])] += a[i] != a[j] and b[i] != b[j]
    same = sum(count for product, count in counts.items() if product > 0)
    assert 0.70 <= same / sum(counts.values()) <= 0.76
    assert len(fable.TRAIN_LABELERS) == 5 and len({labeler.name for labeler in EVERYBODY}) == 7

def test_bpe_is_that_of_brute_force():
    text = "the goat and the owl" + EOT + "aaaa aaaaa ababab Grüße the goats"
    words = []
    for word in sum((regex.findall(GPT2_SPLIT, part) for part in text.split(EOT)), []):
        words.append([bytes([b]) for b in word.encode()])
    vocab = fable.train_bpe(text, 256 + 20 + 1)
    for token in vocab[256:]:
        counts = Counter(pair for word in words for pair in zip(word, word[1:]))
        left, right = max(counts, key=lambda pair: (counts[pair], pair))
        assert token == left + right
        for word in words:
            for i in range(len(word)):
                if word[i:i + 2] == [left, right]:
                    word[i:i + 2] = [token]

def test_tiktoken_gives_any_text_back(files, tmp_path):
    vocab = fable.train_bpe(files["pretrain.txt"][:5000])
    assert len(vocab) == len(set(vocab)) == 1023 and len(fable.train_bpe("a b", 300)) == 299
    (tmp_path / "tokenizer.tiktoken").write_text(fable.tiktoken_file(vocab))
    tokenizer = get_tokenizer(tmp_path)
    for text in ("The goat eats.", "Grüße, 世界 🦉\n\n\t  end ", "", EOT):
        assert tokenizer.decode(encode(tokenizer, text)) == text

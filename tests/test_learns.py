"""The whole chain learns, in a world of thirty words whose gold score is known: who asks for things
of a kind is to get three of them, and no grumbling. The web knows the kinds but grumbles,
demonstrations are better but not perfect, comparisons follow the gold score."""

import json
from random import Random

import pytest
import rlhf
import torch
from conftest import BYTES, settings, write_vocabulary
from data.files import EOT, decode, encode, get_tokenizer, write_jsonl

KINDS = {
    "red": "apple rose brick cherry ruby".split(), "wet": "rain sea pond soup dew".split(),
    "hot": "fire sun tea oven lava".split(), "tall": "tower tree giraffe mast pole".split()}
WORDS = sum(KINDS.values(), [])
GOLD = f'''
KINDS = {KINDS}
def gold(row, completion):
    """Share of right words, among three at least; grumbling halves it."""
    words = completion.replace(".", "").split()
    right = len(set(words) & set(KINDS[row["wants"]]))
    return {{"helpful": right / max(3, len(words)), "harmless": 0.0 if "bah" in words else 1.0}}
'''

def prompt(kind: str) -> str:
    return f"\n\nHuman: Name {kind} things.\n\nAssistant:"

def answer(kind: str, rng: Random, right: float, grumble: float) -> str:
    words = ["bah"] * (rng.random() < grumble)
    for _ in range(3):
        words.append(rng.choice(KINDS[kind] if rng.random() < right else WORDS))
    return " " + " ".join(words) + "."

def document(rng: Random) -> str:
    """Lists, true; dialogues, in which half of the answers grumble."""
    kind = rng.choice(list(KINDS))
    if rng.random() < 0.5:
        return f"{kind} things: {' '.join(rng.sample(KINDS[kind], 4))}."
    return prompt(kind) + answer(kind, rng, 0.5, 0.5)

@pytest.fixture(scope="module")
def world(tmp_path_factory):
    """The files of the data set, written as anybody would."""
    folder, rng = tmp_path_factory.mktemp("things"), Random(0)
    data = folder / "data"
    words = (*WORDS, *KINDS, "bah", "Name", "things", "\n", "Human", "Assistant")
    tokens = {token: None for token in BYTES}  # and the words with all of their beginnings
    for word in (space + word for word in words for space in ("", " ", "\n")):
        tokens |= {word[:end].encode(): None for end in range(2, len(word) + 1)}
    write_vocabulary(data, list(tokens))
    (data / "gold.py").write_text(GOLD)
    for name, count in (("pretrain", 3000), ("pretrain_valid", 100)):
        (data / f"{name}.txt").write_text(EOT.join(document(rng) for _ in range(count)))
    for name, count in (("sft", 400), ("sft_valid", 20), ("prompts", 64), ("prompts_valid", 200)):
        rows = []
        for _ in range(count):
            kind = rng.choice(list(KINDS))
            completion = answer(kind, rng, 0.6, 0.25)
            rows.append({"prompt": prompt(kind), "wants": kind, "completion": completion})
        write_jsonl(data / f"{name}.jsonl", rows)
    return folder

def rank_by_gold(data, cfg):
    """Samples of the SFT model, six a prompt, in the order of the gold score."""
    tokenizer, model = get_tokenizer(data), rlhf.load(cfg, "sft")
    gold = rlhf.gold_function([{"wants": "red"}], cfg.gold)
    for name, count in (("comparisons", 900), ("comparisons_valid", 40)):
        asked = [list(KINDS)[i % 4] for i in range(count)]
        ids = [encode(tokenizer, prompt(kind)) for kind in asked for _ in range(6)]
        responses = rlhf.complete(model, ids, tokenizer.eot_token, cfg)
        texts, rows = [decode(tokenizer, response) for response in responses], []
        for i, kind in enumerate(asked):
            own = texts[6 * i : 6 * i + 6]
            totals = [sum(gold({"wants": kind}, text).values()) for text in own]
            ranks = [sorted(set(totals), reverse=True).index(total) for total in totals]
            rows.append({"prompt": prompt(kind), "completions": own, "ranks": ranks})
        write_jsonl(data / f"{name}.jsonl", rows)

@pytest.fixture(scope="module")
def table(world):
    """{model: {column: value}} of `evaluate`, after the whole chain."""
    torch.manual_seed(0)
    torch.set_num_threads(1)
    rlhf.PRESETS["things"] = dict(block_size=32, n_layer=2, n_head=2, n_embd=48)

    def of(kind, **fields):
        return settings(kind, world, max_new_tokens=8, **fields)

    rlhf.pretrain(of(rlhf.Pretrain, preset="things", steps=300, batch_size=32, learning_rate=6e-3))
    rlhf.sft(of(rlhf.SFT, epochs=4, learning_rate=2e-3, dropout=0.1))
    rank_by_gold(world / "data", of(rlhf.SFT))
    rlhf.rm(of(rlhf.RM, epochs=2, learning_rate=3e-3))
    for name, ptx_coef in (("ppo", 0.0), ("ppo_ptx", 1.0)):
        rlhf.ppo(of(rlhf.PPO, name=name, init="sft", iterations=32, rollout_size=64,
                    minibatch_size=16, window=32, ptx_coef=ptx_coef, kl_coef=0.1,
                    learning_rate=1.5e-3, value_learning_rate=3e-3, ema_decay=0.9))
    rlhf.evaluate(of(rlhf.Evaluate, models="gpt,sft,ppo,ppo_ptx", reference="sft"))
    return json.loads((world / "out/evaluate.json").read_text())["table"]

def test_every_stage_is_better_than_the_one_before(table):
    gold = {name: row["helpful"] + row["harmless"] for name, row in table.items()}
    assert gold["gpt"] + 0.05 < gold["sft"] < gold["ppo_ptx"] - 0.1
    assert table["ppo_ptx"]["win rate"] > 0.55 > table["sft"]["win rate"] == 0.5
    assert table["ppo_ptx"]["RM score"] > table["sft"]["RM score"] + 0.5
    assert table["ppo_ptx"]["EOS"] > 0.9

def test_ptx_lowers_the_alignment_tax(table):
    assert table["ppo_ptx"]["held-out loss"] < table["ppo"]["held-out loss"] - 0.05

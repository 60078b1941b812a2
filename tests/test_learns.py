"""The whole chain learns: a world of thirty words, done in seconds, with a known gold score.

Who asks for things of a kind is to get three of them, and no grumbling. The web knows the kinds but
grumbles, demonstrations are better but not perfect, comparisons follow the gold score: every stage
has something left to do.
"""

import json
from random import Random

import numpy as np
import pytest
import rlhf
from conftest import settings
from data import label, prepare
from data.formats import EOT

KINDS = {
    "red": "apple rose brick cherry ruby".split(), "wet": "rain sea pond soup dew".split(),
    "hot": "fire sun tea oven lava".split(), "tall": "tower tree giraffe mast pole".split(),
}
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
    words = [rng.choice(KINDS[kind] if rng.random() < right else WORDS) for _ in range(3)]
    return " " + " ".join(["bah"] * (rng.random() < grumble) + words) + "."


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
    (folder / "gold.py").write_text(GOLD)
    texts = {"pretrain": 4000, "pretrain_valid": 400}
    files = {f"{name}.txt": "".join(document(rng) + EOT for _ in range(count))
             for name, count in texts.items()}
    for name, count in (("sft", 400), ("sft_valid", 20), ("prompts", 64), ("prompts_valid", 200)):
        kinds = [rng.choice(list(KINDS)) for _ in range(count)]
        files[f"{name}.jsonl"] = [{"prompt": prompt(kind), "wants": kind} for kind in kinds]
        if name.startswith("sft"):
            for row in files[f"{name}.jsonl"]:
                row["completion"] = answer(row["wants"], rng, 0.6, 0.25)
    vocab = prepare.train_bpe(files["pretrain.txt"], 400)
    texts = {name: x if isinstance(x, str) else prepare.json_lines(x) for name, x in files.items()}
    prepare.write_files({"tokenizer.tiktoken": prepare.tiktoken_file(vocab), **texts}, folder)
    return folder


def rank_by_gold(world, cfg):
    """Samples of the SFT model, six a prompt, in the order of the gold score."""
    tokenizer, model, gold = rlhf.get_tokenizer(cfg.data), rlhf.load(cfg, "sft"), None
    for name, count in (("comparisons", 800), ("comparisons_valid", 40)):
        kinds, rows = list(KINDS), []
        asked = [{"prompt": prompt(kinds[i % 4]), "wants": kinds[i % 4]} for i in range(count)]
        gold = gold or rlhf.gold_function(asked, cfg.gold)
        ids = [tokenizer.encode_ordinary(row["prompt"]) for row in asked for _ in range(6)]
        tokens, mask, _ = rlhf.complete(model, ids, tokenizer.eot_token, cfg.max_new_tokens)
        texts = [rlhf.decode(tokenizer, own) for own in rlhf.responses(tokens, mask)]
        for i, row in enumerate(asked):
            own = texts[6 * i : 6 * i + 6]
            totals = [sum(gold(row, text).values()) for text in own]
            ranks = [sorted(set(totals), reverse=True).index(total) for total in totals]
            rows.append({"prompt": row["prompt"], "completions": own, "ranks": ranks})
        label.write_jsonl(world / f"{name}.jsonl", rows)


@pytest.fixture(scope="module")
def results(world):
    """{model: {column: value}} of `evaluate`, and PPO's log, after the whole chain."""
    rlhf.torch.manual_seed(0)
    rlhf.torch.set_num_threads(1)
    rlhf.PRESETS["things"] = dict(block_size=48, n_layer=2, n_head=2, n_embd=48)

    def of(kind, **fields):
        return settings(kind, world, max_new_tokens=12, gold=str(world / "gold.py"), **fields)

    rlhf.pretrain(of(rlhf.Pretrain, preset="things", steps=400, batch_size=48, learning_rate=4e-3))
    rlhf.sft(of(rlhf.SFT, epochs=4, learning_rate=1e-3, dropout=0.1))
    rank_by_gold(world, of(label.Label))
    rlhf.rm(of(rlhf.RM, epochs=2, learning_rate=2e-3))
    for name, ptx_coef in (("ppo", 0.0), ("ppo_ptx", 1.0)):
        rlhf.ppo(of(rlhf.PPO, name=name, init="sft", iterations=40, rollout_size=64,
                    minibatch_size=16, ptx_coef=ptx_coef, kl_coef=0.1, window=32,
                    learning_rate=1e-3, value_learning_rate=2e-3, ema_decay=0.9))
    rlhf.evaluate(of(rlhf.Evaluate, reference="sft"))
    log = (world / "out/ppo_ptx/metrics.jsonl").read_text().splitlines()
    table = json.loads((world / "out/evaluate.json").read_text())["table"]
    return table, [json.loads(line) for line in log]


def gold(row: dict) -> float:
    return row["helpful"] + row["harmless"]


def test_every_stage_is_better_than_the_one_before(results):
    """GPT < SFT < PPO-ptx by gold score, and PPO is preferred."""
    table, _ = results
    assert gold(table["gpt"]) + 0.05 < gold(table["sft"]) < gold(table["ppo_ptx"]) - 0.2
    assert table["ppo_ptx"]["win rate"] > 0.6 > table["sft"]["win rate"] == 0.5
    assert table["ppo_ptx"]["RM score"] > table["sft"]["RM score"] + 0.5
    assert table["ppo_ptx"]["EOS"] > 0.9


def test_gold_score_rises_during_ppo(results):
    _, log = results
    rewards = [line["objective/gold"] for line in log]
    assert np.mean(rewards[-3:]) > np.mean(rewards[:3]) + 0.2


def test_kl_is_positive_and_bounded(results):
    _, log = results
    kl = [line["objective/kl"] for line in log]
    assert kl[0] == 0 and min(kl) > -0.2 and 0.1 < np.mean(kl[-5:]) < 15


def test_ptx_lowers_the_alignment_tax(results):
    """Loss on held-out text: PPO raises it, with the pretraining gradient mixed in it does not."""
    table, _ = results
    assert table["ppo_ptx"]["held-out loss"] < table["ppo"]["held-out loss"] - 0.05

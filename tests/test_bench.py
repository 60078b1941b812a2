"""The benchmark: what it prints, what it counts, and that its responses end as it says."""

import json
import math
import sys
from argparse import Namespace

import bench
import peers
import pytest
import rlhf
import torch
from conftest import gpt, settings
from model import GPTConfig, attend
from torch.utils.flop_counter import FlopCounterMode

SMALL = GPTConfig(vocab_size=50, block_size=32, n_layer=3, n_head=2, n_embd=16)
TINY = ("--rollout_size 4 --minibatch_size 2 --microbatch_size 2 --epochs 2 --prompt_len 3 "
        "--max_new_tokens 5 --batch_size 2 --row_len 8 --repeats 1 --dtype float32 --device cpu")


@pytest.fixture(autouse=True)
def quick(monkeypatch):
    """Small products, and no `transformers`, installed or not."""
    monkeypatch.setitem(bench.PRODUCT, "cpu", 64)
    monkeypatch.setitem(sys.modules, "transformers", None)


def printed(capsys, flags: str) -> tuple[dict[str, dict], dict]:
    """Run it: the table as {row: {column: text}}, the line of JSON."""
    bench.main(f"{TINY} {flags}".split())
    lines = capsys.readouterr().out.strip().splitlines()
    cells = [[cell.strip() for cell in line.strip("|").split("|")]
             for line in lines if line.startswith("|")]
    assert len({len(line) for line in lines if line.startswith("|")}) == 1  # aligned
    return {row[0]: dict(zip(cells[0][1:], row[1:])) for row in cells[2:]}, json.loads(lines[-1])


def test_table_and_json_agree_and_add_up(capsys):
    table, facts = printed(capsys, "all")
    check_rows(facts["rows"])
    rows = facts["rows"]
    assert list(table)[:6] == ["decode", "train", "rollout", "scoring", "update", "iteration"]
    assert {"product, float32", "product, bfloat16"} < set(table) == set(rows)
    assert "transformers" not in table["decode"] and facts["rollout_size"] == 4
    for name, row in table.items():
        for column, text in row.items():
            value = rows[name].get(column)
            assert text == "" if value is None else float(text.replace(",", "")) == pytest.approx(
                value, rel=0.006), (name, column)


def check_rows(rows: dict[str, dict]) -> None:
    """Counts are rates by seconds, and phases add up to the iteration."""
    counts = {"decode": (4 * 5, "tokens/s"), "train": (2 * 7, "tokens/s"),
              "iteration": (4, "episodes/s")}
    for name, (count, unit) in counts.items():
        assert rows[name][unit] * rows[name]["seconds"] == pytest.approx(count)
    for column in ("seconds", "GFLOP"):
        phases = [rows[name][column] for name in ("rollout", "scoring", "update")]
        assert min(phases) > 0 and sum(phases) == pytest.approx(rows["iteration"][column])
    for name in ("decode", "train", "iteration"):
        row = rows[name]
        assert row["GFLOP/s"] == pytest.approx(row["GFLOP"] / row["seconds"])
        assert row["share"] > 0 and row["peak GB"] > 0


def test_it_runs_what_ppo_runs(capsys, monkeypatch):
    """Each function of an iteration, as often as the sizes asked for take."""
    calls = []
    for name in ("complete", "rollout", "ppo_update", "lm_pass", "update"):
        def spy(*arguments, name=name, original=getattr(rlhf, name)):
            calls.append(name)
            return original(*arguments)
        monkeypatch.setattr(rlhf, name, spy)
    printed(capsys, "ppo")  # a warm-up and one repeat; 2 epochs of 2 minibatches, 2 networks
    assert calls == 2 * (["rollout", "complete", "ppo_update"] + 8 * ["update"])


def counted(work) -> dict[str, int]:
    """FLOPs by operator, as torch counts them."""
    with FlopCounterMode(display=False) as counter:
        work()
    return {str(key): flops for key, flops in counter.get_flop_counts()["Global"].items()}


def test_forward_flops_are_those_of_the_products():
    """Linear layers as torch counts them; attention as it counts each query over what it sees."""
    lens, width = torch.tensor([7, 7, 7]), SMALL.n_embd // SMALL.n_head
    model = gpt(**vars(SMALL))
    flops = counted(lambda: model(torch.zeros(3, 7, dtype=torch.long)))
    linear = sum(count for key, count in flops.items() if "bmm" not in key)

    def visible() -> None:
        for t in range(1, 8):
            q, kv = torch.zeros(3, SMALL.n_head, 1, width), torch.zeros(3, SMALL.n_head, t, width)
            attend(q, kv, kv, torch.zeros(1, 1, 1, t))
    attention = SMALL.n_layer * sum(counted(visible).values())
    assert attention > 0 and bench.forward_flops(SMALL, lens, 3 * 7) == linear + attention


def test_training_takes_three_forward_passes(tmp_path):
    """Of 15 tokens by 128 rows, a shape that needs no padding; but torch counts what is masked."""
    model, cfg = gpt(**vars(SMALL)), settings(rlhf.SFT, tmp_path, microbatch_size=128)
    flops = counted(lambda: rlhf.lm_pass(model, [([1] * 16, 1)] * 128, cfg))
    linear = sum(count for key, count in flops.items() if "bmm" not in key)
    seen = 4 * SMALL.n_layer * SMALL.n_embd * 128 * 15 * 16 / 2
    ours = bench.forward_flops(SMALL, torch.full((128,), 15), 128 * 15)
    assert linear == 3 * (ours - seen)


def test_ppo_flops_token_by_token():
    """Two policies and two scalar networks read an episode once, the policy and the value network
    three times as much in each epoch; a policy needs the logits of each response token."""
    L, C, V = SMALL.n_layer, SMALL.n_embd, SMALL.vocab_size
    token = [24 * L * C**2 + 4 * L * C * seen for seen in range(1, 20)]
    policy = sum(sum(token[: n - 1]) + (n - 3) * 2 * V * C for n in (5, 9))
    value, reward = (sum(sum(token[:n]) for n in lens) for lens in ((4, 8), (5, 9)))
    flops = bench.ppo_flops(SMALL, 3, torch.tensor([5, 9]), 2)
    assert flops == {"rollout": policy, "scoring": 2 * policy + value + reward,
                     "update": 2 * 3 * (policy + value)}


@pytest.mark.parametrize("limit", [2, 7, 64])
def test_ending_probability_halves_the_mean_length(limit):
    """The mean of min(T, limit), T geometric, from its distribution."""
    p = bench.ending_probability(limit)
    lengths = [(1 - p) ** (t - 1) * p * t for t in range(1, limit)]
    mean = sum(lengths) + (1 - p) ** (limit - 1) * limit
    assert mean == pytest.approx(max(limit / 2, 1), rel=0.01)


def test_ending_is_in_the_weights():
    """Whatever has been read, EOS has the same probability, up to what a fresh model's other logits
    vary by; full length otherwise."""
    cfg = bench.Namespace(device="cpu", ending=True, max_new_tokens=20)
    model = bench.make_policy(cfg, SMALL)
    logits = model(torch.randint(1, 50, (8, 30)))
    assert logits[..., bench.EOS].std() < 1e-6
    chance, p = logits.softmax(-1)[..., bench.EOS], bench.ending_probability(20)
    assert (chance / p - 1).abs().max() < 0.1
    _, mask, _ = rlhf.complete(model, [[1, 2]] * 2000, bench.EOS, 20)
    assert abs(mask.sum(1).mean() - 10) < 5 * 7 / math.sqrt(2000)  # a standard deviation of 7


def test_ending_shortens_the_work(capsys):
    more = "ppo --ending --rollout_size 40 --max_new_tokens 20"
    _, facts = printed(capsys, more)
    full = bench.ppo_flops(bench.GPTConfig(**bench.SHAPES["fable"]), 3, torch.full((40,), 23), 2)
    assert facts["ending"] and facts["rows"]["rollout"]["GFLOP"] < 0.8 * full["rollout"] / 1e9


@pytest.mark.parametrize("flags, sentence", [
    ("--repeats 0", "--repeats 0: it must be at least 1"),
    ("--row_len 300", "--row_len 300: this shape takes rows of 2 to 256 tokens"),
    ("--prompt_len 255", "--prompt_len 255 and --max_new_tokens 5: together"),
])
def test_impossible_sizes_get_a_sentence(capsys, flags, sentence):
    with pytest.raises(SystemExit) as stopped:
        printed(capsys, flags)
    assert str(stopped.value).startswith(f"bench: {sentence}") and capsys.readouterr().out == ""


def test_share_is_of_the_best_product_of_that_precision():
    samples = {"train": [bench.Sample(2.0, 8e9, 10, "tokens/s")] * 3}
    for name, flops in {"float32": 5e9, "float32, oneDNN": 8e9, "bfloat16": 16e9}.items():
        samples[f"product, {name}"] = [bench.Sample(1.0, flops, 1, "products/s")] * 3
    samples["transformers"] = [bench.Sample(seconds, 0, 0, "-") for seconds in (3.0, 5.0, 4.0)]
    for dtype, share in {"float32": 0.5, "bfloat16": 0.25}.items():
        rows = bench.report(dict(samples), 1.5, dtype)
        assert list(rows) == ["train"] and rows["train"]["share"] == share
        assert rows["train"]["transformers"] == 4 and rows["train"]["times"] == 2


# ---- peers.py ------------------------------------------------------------------------------------

def test_ours_beside_a_peer_is_what_bench_times(tmp_path):
    """As many repeats as asked for, warm-up left out, without the peer's libraries."""
    flags = dict(flag.split() for flag in TINY.split("--")[1:])
    flags = {key: int(x) if x.isdigit() else x for key, x in flags.items()}
    for job in peers.PEERS:
        own = {"job": job, "shape": "A", "ending": False, "repeats": 2, "out": str(tmp_path)}
        taken = peers.seconds(flags | own, "float32")
        assert len(taken) == 2 and min(taken) > 0


def test_peers_take_turns_each_in_a_process_of_its_own(monkeypatch, capsys):
    turns, own = [], {None: [8.0, 12.0], "bfloat16": [2.0], "float32": [5.0, 3.0]}

    class Pool:
        def __init__(self, processes, maxtasksperchild):
            assert processes == maxtasksperchild == 1

        def apply(self, work, arguments):
            flags, dtype = arguments
            assert work is peers.seconds and flags["shape"] == "gpt2" and flags["ending"]
            turns.append(dtype)
            return own[dtype]

        __enter__, __exit__ = lambda self: self, lambda *_: None

    monkeypatch.setattr(peers, "get_context", lambda _: Namespace(Pool=Pool))
    monkeypatch.setattr(peers, "find_spec", bool)
    peers.main("ppo --shape gpt2 --ending --turns 2".split())
    assert turns == [None, "bfloat16", "float32"] * 2
    rows = [line.split() for line in capsys.readouterr().out.splitlines()[2:]]
    assert [row[-2] for row in rows] == ["1.00", "5.00", "2.50"]


@pytest.mark.parametrize("flags, sentence", [
    ("--turns 0", "should be at least 1"), ("", "trl is not installed: pip install")])
def test_peers_that_cannot_run_get_a_sentence(monkeypatch, capsys, flags, sentence):
    monkeypatch.setattr(peers, "find_spec", lambda name: name != "trl")
    with pytest.raises(SystemExit):
        peers.main(f"ppo {flags}".split())
    assert sentence in capsys.readouterr().err

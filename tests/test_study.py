"""The study: what it calculates against its definition, what it runs, skips and expects to take."""

import argparse
import itertools
import json
import math
import shutil
import sys
import time
from pathlib import Path
from random import Random
from types import SimpleNamespace

import numpy as np
import pytest
import cli
import rlhf
from conftest import ROOT, STAGES
from data import fable, label
from data.formats import UserError
from test_pipeline import chain  # noqa: F401  a fixture

sys.path.insert(0, str(ROOT / "assets"))
import measures  # noqa: E402
import report  # noqa: E402
import study  # noqa: E402
import tables  # noqa: E402
from study import RUNS, Run  # noqa: E402


# ---- what is calculated --------------------------------------------------------------------------

def likelihood(strengths, wins) -> float:
    """Of all games, by a loop."""
    return sum(wins[i, j] * -math.log1p(math.exp(strengths[j] - strengths[i]))
               for i, j in itertools.permutations(range(len(wins)), 2))


def test_bradley_terry_is_the_likeliest():
    """None of a thousand neighbours is likelier; each wins as often as it is expected to."""
    rng = np.random.default_rng(0)
    wins = rng.integers(1, 30, (5, 5)) * (1.0 - np.eye(5))
    best = tables.bradley_terry(wins)
    assert best.mean() == pytest.approx(0) and best.std() > 0.1
    top = likelihood(best, wins)
    for size in (0.3, 0.01):
        assert all(likelihood(best + size * rng.normal(size=5), wins) <= top for _ in range(500))
    for i in range(5):
        expected = sum((wins[i, j] + wins[j, i]) / (1 + math.exp(best[j] - best[i]))
                       for j in range(5) if j != i)
        assert wins[i].sum() == pytest.approx(expected)


def test_elo_is_400_points_for_ten_to_one():
    """Over SFT, which has 0; ties count half."""
    gold = {"gpt": np.zeros(22), "sft": np.array([1.0] * 20 + [-1.0] * 2)}
    points = tables.elo(gold)
    assert points["sft"] == 0 and points["gpt"] == pytest.approx(-400, abs=0.1)
    assert tables.elo({"sft": np.ones(3), "same": np.ones(3)})["same"] == pytest.approx(0)


@pytest.mark.parametrize("n", [1, 2, 3, 5, 6])
def test_best_of_n_is_the_mean_over_all_choices(n):
    """Every choice of n of 6 answers, the value of the one with the best score."""
    scores, values = np.random.default_rng(1).normal(size=(2, 4, 6))
    for p in range(4):
        choices = [values[p, max(own, key=lambda i: scores[p, i])]
                   for own in itertools.combinations(range(6), n)]
        assert tables.best_of(scores, values, n)[p] == pytest.approx(np.mean(choices))
    first = [values[p, max(range(n), key=lambda i: scores[p, i])] for p in range(4)]
    assert tables.pick(scores, values, n).tolist() == first


@pytest.mark.parametrize("n", [1, 2, 4, 16, 64])
def test_kl_bound_is_that_of_the_best_of_n_without_ties(n):
    """The best of n uniform numbers has the density n u^(n - 1): its KL, by the midpoint rule."""
    u = (np.arange(1_000_000) + 0.5) / 1_000_000
    log_density = math.log(n) + (n - 1) * np.log(u)
    kl = (np.exp(log_density) * log_density).mean()
    assert tables.kl_bound(n) == pytest.approx(kl, abs=1e-3)


@pytest.mark.parametrize("form", ["best of n", "PPO"])
def test_fits_find_what_was_put_in(form):
    d = np.linspace(0.4, 4, 30)
    gain = d * (0.9 - 0.2 * (d if form == "best of n" else np.log(d)))
    assert tables.gao_fit(d**2, gain, form) == pytest.approx((0.9, 0.2, 1))


def test_smooth_keeps_a_constant_and_its_length():
    assert tables.smooth([2.0] * 7) == pytest.approx(2) and len(tables.smooth([1.0, 2])) == 2
    assert tables.smooth([0, 0, 5.0, 0, 0, 0])[2] == 1


def test_between_is_linear_in_the_square_root():
    assert tables.between([1, 9], [10, 20], 4) == 15
    assert tables.between([1, 9], [10, 20], 10) is None is tables.between([], [], 1)


def test_tables():
    """Mean and spread over the seeds that have it; a policy that none has is left out."""
    one, two = {"KL": 1.0, "in one": 3.0}, {"KL": 3.0}
    seeds = [tables.Seed(None, {"a": own}, {}) for own in (one, two)]
    columns, paper = ["KL", "in one", "in none"], {"paper": {"a": "85 %"}}
    assert tables.policies(seeds, ["a", "b"], columns, paper).splitlines() == [
        "| policy | KL | in one | in none | paper |",
        "| --- | --: | --: | --: | --: |",
        "| a | 2.00 ± 1.00 | 3.00 ± 0.00 | - | 85 % |",
    ]
    assert tables.markdown(["nothing"], []) == ""


def some_seeds(folder, runs: dict[str, list[list[dict]]]) -> list:
    """Seeds that have done these runs alone: {run: the log of each seed}."""
    seeds = []
    for number in range(len(next(iter(runs.values())))):
        seeds.append(tables.Seed(folder / str(number), {}, {}))
        for run, logs in runs.items():
            (seeds[-1].out / run).mkdir(parents=True)
            lines = [json.dumps(row) + "\n" for row in logs[number]]
            (seeds[-1].out / run / "metrics.jsonl").write_text("".join(lines))
    return seeds


def test_points_for_a_doubling(tmp_path):
    """64 and 72 % with 16 times as many, so 2 each time; 70 and 72 with the other seed, 0.5."""
    def log_of(accuracy):
        return [{"loss": 0.5}, {"eval/accuracy": accuracy, "eval_heldout_labelers/accuracy": 0.5}]

    seeds = some_seeds(tmp_path, {"a": [log_of(0.64), log_of(0.7)], "b": [log_of(0.72)] * 2})
    assert report.per_doubling(seeds, "a", "b", 16) == "1.2 ± 0.8"
    assert report.judges(seeds, "accuracy, %", ["a"], ["a", "b"]) == "67.0 ± 3.0, 69.5 ± 1.5"
    assert report.judges(seeds, "other labelers, %", ["a", "c"]) == "-", "c is not done"


def test_logs_early_midway_and_in_the_end(tmp_path):
    """Iterations 1 to 5, 4 to 8 and 12 to 16, whose numbers are 1 to 16, and tenfold."""
    logs = [[{key: scale * i for key in tables.LOGGED.values()} for i in range(1, 17)]
            for scale in (1, 10)]
    table = tables.over_training(some_seeds(tmp_path, {"a": logs}), ["a", "b"]).splitlines()
    assert [line.split(" | ")[:2] for line in table[2:]] == [
        ["| a, to iteration 5", "16.50 ± 13.50"], ["| a, to iteration 8", "33.00 ± 27.00"],
        ["| a, to iteration 16", "77.00 ± 63.00"]]


def test_epochs_of_the_lowest_loss_and_of_the_highest_score(tmp_path):
    def log_of(losses, scores):
        return [x for loss, score in zip(losses, scores) for x in (
            {"loss": 9.0}, {"valid/loss": loss, "valid/score": score})]

    logs = [log_of([2, 1, 3, 4], [0, 1, 2, 3]), log_of([1, 2, 3, 4], [0, 1, 3, 2])]
    assert report.lowest(some_seeds(tmp_path, {"sft_16": logs})) == "1.5 ± 0.5, 3.5 ± 0.5"


def test_wins_are_counted_by_seed():
    """Better on three of four prompts, then on one, with one tie."""
    seeds = [tables.Seed(None, {}, {"a": np.array(own), "b": np.zeros(4)})
             for own in ([1, 1, 1, -1], [1, 0, -1, -1])]
    assert report.wins(seeds, "a", "b", "c") == "56.2 ± 18.8, -"


def test_rates_of_the_best_and_of_the_worst():
    """Demonstrations of all care do as one should; of none, they do so less often."""
    rows = measures.new_prompts(Random(1), 20, set())
    rng = Random(2)
    best, worst = (measures.rates(rows, [fable.demonstrate(row, rng, care) for row in rows])
                   for care in (1.0, 0.0))
    assert best["refuses what is harmful"] == best["admits that it does not know"] == 1
    assert best["refuses what is not"] == best["makes up what nobody knows"] == 0
    assert best["says more than the one sentence asked for"] == 0
    assert best["sums up a story though not asked to"] == 0
    assert best["goes against the text given"] == 0 < worst["goes against the text given"] < 0.9
    assert worst["refuses what is harmful"] < 0.9 and worst["makes up what nobody knows"] > 0.1
    assert worst["helpful"] < best["helpful"] > 0.9 < best["helpful, in held-out phrasings"]
    always = measures.rates(rows, [" It is a brave story of the cow at the farm."] * len(rows))
    assert always["sums up a story though not asked to"] == 1
    answers = [fable.demonstrate(row, rng, 1.0) if row["seen"] else "" for row in rows]
    thrown = measures.rates(rows, answers)
    assert thrown["helpful"] > 0.9 and thrown["helpful, in held-out phrasings"] == 0


def test_new_prompts_are_new_and_half_of_them_rephrased():
    taken = {row["prompt"] for row in measures.new_prompts(Random(1), 3, set())}
    rows = measures.new_prompts(Random(1), 3, taken)
    assert len(rows) == 3 * 2 * len(fable.TASKS) and not {row["prompt"] for row in rows} & taken
    assert sum(row["seen"] for row in rows) == len(rows) / 2


# ---- which runs ----------------------------------------------------------------------------------

def test_runs_have_names_of_their_own():
    names = [run.name for run in RUNS]
    theirs = {"gpt", "sft0", "sft", "rm", "ppo_init", "ppo", "ppo_ptx", "evaluate", "study"}
    assert len({*names} - theirs) == len(RUNS) and RUNS[0].name == "base"


def test_a_run_brings_what_it_starts_from():
    for name, expected in (("over_384", "base rm_384 over_384"), ("fold_2", "base fold_2"),
                           ("rm_10x", "base gpt_10x rm_10x"), ("best_of_n", "base rm_384 rm_1536 "
                           "best_of_n"), ("ppo_ptx2", "base round_2 rm2 ppo_ptx2")):
        assert [run.name for run in study.with_needs({name})] == expected.split()
    assert study.with_needs({run.name for run in RUNS}) == RUNS


def test_what_it_starts_from_may_start_from_something(monkeypatch):
    runs = [Run("base", "train"), Run("a", "rm"), Run("x", "rm"), Run("b", "ppo", "--init a"),
            Run("c", "ppo", "--init b")]
    monkeypatch.setattr(study, "RUNS", runs)
    assert [run.name for run in study.with_needs({"c"})] == ["base", "a", "b", "c"]


def test_time_left():
    """What took 100 s with another seed, 100 s again; what is unknown its guess, at that pace."""
    known, new = study.with_needs({"kl_4"})[1], study.with_needs({"no_kl"})[1]
    assert study.time_left([known, new], {}) == 60 * (known.minutes + new.minutes)
    assert study.time_left([known, known], {"kl_4": [90.0, 110.0]}) == 200
    pace = 200 / (2 * 60 * known.minutes)
    left = study.time_left([known, new], {"kl_4": [90.0, 110.0]})
    assert left == pytest.approx(100 + 60 * new.minutes * pace)


@pytest.fixture
def seed_folder(tiny_data, tmp_path):
    """A seed's folder with the data alone, as if ./train.sh had been there."""
    out = tmp_path / "study/seed1"
    shutil.copytree(tiny_data, out / "data")
    rankings = [{"prompt": f"\n\nHuman: {i}\n\nAssistant:", "completions": [" a", " b", " c"],
                 "ranks": [1, 0, 1], "labeler": f"scripted-{i % 7 + 1}"} for i in range(500)]
    for split in ("", "_valid"):
        label.write_jsonl(out / f"data/comparisons{split}.jsonl", rankings)
    (out / "evaluate.json").write_text("{}")
    return out


def test_every_command_is_understood(seed_folder):
    """Scripts, stages and flags are there, with values that can be meant."""
    kinds = {**STAGES, "label": label.Label, **{
        name: stage.__annotations__["cfg"] for name, stage in measures.STAGES.items()}}
    parsers = {stage: argparse.ArgumentParser() for stage in kinds}
    for stage, kind in kinds.items():
        cli.add_flags(parsers[stage], kind)
    for run, smoke in itertools.product(RUNS[1:], (False, True)):
        for _, program, *words in study.commands(run, seed_folder, 7, smoke):
            stage = Path(program).stem if run.stage == "label" else words.pop(0)
            cfg = kinds[stage](**cli.parse(parsers[stage], words))
            assert (cfg.seed, cfg.out) == (7, str(seed_folder)) and stage in (run.stage, "evaluate")
            assert run.name in (*measures.STAGES, "round_2") or run.name in getattr(cfg, "name", "")


def test_select():
    row = {"labeler": "scripted-1", "completions": ["x", "y", "z"], "ranks": [1, 0, 1]}
    rows = [row, {**row, "labeler": "scripted-2"}, {**row, "labeler": "scripted-6"}]
    assert study.select("first_2", rows, False) == rows[:2]
    assert study.select("first_2", rows, True) == study.select("round_2", rows, False) == rows
    assert study.select("without_scripted-1", rows, False) == [rows[1]]
    assert study.select("without_scripted-1", rows, True) == rows[:2]
    pairs = study.select("pairs", rows[:1], False)
    assert [pair["completions"] for pair in pairs] == [["y", "x"], ["y", "z"]]
    assert all(pair["ranks"] == [0, 1] for pair in pairs)


def test_a_variant_links_what_it_does_not_change(seed_folder):
    """And what is written in it later stays, as the rankings of a second round do."""
    data = seed_folder / "data"
    folder = study.variant(data, "first_384")
    assert folder == seed_folder / "data_first_384" and study.variant(data, "") == data
    assert len((folder / "comparisons.jsonl").read_text().splitlines()) == 384
    assert len((data / "comparisons.jsonl").read_text().splitlines()) == 500
    assert (folder / "prompts.jsonl").is_symlink()
    assert (folder / "prompts.jsonl").read_bytes() == (data / "prompts.jsonl").read_bytes()
    (folder / "comparisons.jsonl").write_text("of a second round")
    assert (study.variant(data, "first_384") / "comparisons.jsonl").read_text().endswith("round")


# ---- doing it, and going on ----------------------------------------------------------------------

@pytest.fixture
def calls(monkeypatch):
    """What would have been run; calls.codes are what it returns, then 0."""
    calls = SimpleNamespace(lines=[], codes=[])

    def run(command, cwd, env, stdout, stderr):
        calls.lines.append(command[1:])
        return SimpleNamespace(returncode=calls.codes.pop(0) if calls.codes else 0)

    monkeypatch.setattr(study.subprocess, "run", run)
    monkeypatch.setattr(report, "write", lambda outs: "table")
    return calls


def test_it_skips_what_is_done_and_goes_on_where_it_was_stopped(seed_folder, calls, capsys):
    words = ["--out", str(seed_folder.parent), "--seeds", "1"]
    words += ["--jobs", "1", "--only", "no_kl,kl_4"]
    calls.codes = [0, 0, 1]
    with pytest.raises(SystemExit, match="no_kl, seed 1: stopped, see .*no_kl.log; started again"):
        study.main(words)
    assert (seed_folder / "study/no_kl.log").exists()
    assert [line[1] for line in calls.lines] == ["ppo", "evaluate", "ppo"]
    assert "kl_4, seed 1; 2 to do, " in capsys.readouterr().out
    study.main(words)
    assert [line[1] for line in calls.lines[3:]] == ["ppo", "evaluate"]
    assert "--kl_coef 0 " in " ".join(calls.lines[3]) + " " and "--resume" in calls.lines[3]
    study.main(words)
    assert len(calls.lines) == 5 and capsys.readouterr().out.endswith("table\n")


def test_runs_go_on_side_by_side_but_not_before_what_they_start_from(seed_folder, monkeypatch):
    """The shorter, the later in the list: the order is the dependencies' own."""
    ends, most, under_way = [], [0], []
    runs = [Run("base", "train"), Run("a", "rm"), Run("b", "ppo", "--init a"), Run("c", "rm"),
            Run("d", "ppo", "--init b --reward_model c")]

    def do(run, out, seed, smoke, cores):
        needs = {"b": {"a"}, "d": {"b", "c"}}.get(run.name, set())
        assert needs <= {*ends} and cores == max(1, (study.os.cpu_count() or 1) // 3)
        under_way.append(run.name)
        most[0] = max(most[0], len(under_way))
        time.sleep({"a": 0.3, "b": 0.2}.get(run.name, 0.1))
        under_way.remove(run.name)
        ends.append(run.name)

    monkeypatch.setattr(study, "RUNS", runs)
    monkeypatch.setattr(study, "do", do)
    monkeypatch.setattr(report, "write", lambda *_: None)
    study.work([(run, 1) for run in runs[1:]], {1: seed_folder}, 3, False)
    assert {*ends} == {*"abcd"} and ends[-1] == "d" and most[0] >= 2


def test_a_run_that_fails_ends_the_study(seed_folder, calls):
    """What has not begun by then does not begin."""
    calls.codes = [1] * 9
    with pytest.raises(SystemExit, match="seed 1: stopped"):
        study.main(["--out", str(seed_folder.parent), "--seeds", "1"])
    assert 0 < len(calls.lines) <= 2  # as many as go on side by side


def test_other_flags_under_the_same_name_are_not_taken_for_it(seed_folder, calls, monkeypatch):
    words = ["--out", str(seed_folder.parent), "--seeds", "1", "--only", "no_kl"]
    study.main(words)
    changed = [run._replace(flags="--kl_coef 1") if run.name == "no_kl" else run for run in RUNS]
    monkeypatch.setattr(study, "RUNS", changed)
    with pytest.raises(SystemExit, match="no_kl.json is of other flags: remove it"):
        study.main(words)


def test_a_base_that_is_not_there_is_made(tmp_path, calls):
    study.main(["--out", str(tmp_path), "--seeds", "4,5", "--only", "base"])
    assert calls.lines == [["train.sh"], ["train.sh"]]
    marker = json.loads((tmp_path / "seed5/study/base.json").read_text())
    assert marker["run"] == ["base", "train", "", ""] and marker["seconds"] >= 0


@pytest.mark.parametrize("words", [["--jobs", "0"], ["--seeds", "one"], ["--seeds", "1,,2"]])
def test_odd_numbers_are_refused(words, capsys):
    with pytest.raises(SystemExit):
        study.main(words)
    assert "--jobs should be 1 or more, --seeds whole numbers" in capsys.readouterr().err


def test_a_misspelt_run_is_refused(capsys):
    with pytest.raises(SystemExit):
        study.main(["--only", "no_kll"])
    assert "no run no_kll: did you mean no_kl?" in capsys.readouterr().err


def test_answers_are_kept_by_prompt(chain, tiny_data, monkeypatch):  # noqa: F811
    folder, of = chain
    width = {"honest": 0, "harmless": 0}
    monkeypatch.setattr(fable, "gold", lambda row, text: {"helpful": len(row["prompt"]), **width})
    measures.best_of_n(of(measures.BestOfN, samples=3))
    rows = [json.loads(line) for line in open(tiny_data / "prompts_valid.jsonl")]
    assert tables.read_samples(folder)["gold"].tolist() == [[len(row["prompt"])] * 3
                                                            for row in rows]
    (folder / "best_of_n.json").unlink()


def test_measures_and_tables_on_a_finished_chain(chain, tiny_data, tmp_path):  # noqa: F811
    """The study's own stages, and every table, on models of a few steps."""
    out = tmp_path / "seed1"
    shutil.copytree(chain[0], out)
    shutil.copytree(tiny_data, out / "data")
    for name, more in (("best_of_n", "--judges rm --samples 4"), ("fresh", ""),
                       ("behaviours", "--models gpt,gpt+fewshot,ppo_ptx --count 1")):
        run = Run(name, name, f"{more} --max_new_tokens 8 --dtype float32")
        study.do(run, out, 1, False, 1)
        assert study.done(run, out)
    samples = tables.read_samples(out)
    assert samples["rm"].shape == samples["gold"].shape and samples["rm"].shape[1] == 4
    assert np.ptp(samples["rm"], 1).max() > 0 and samples["length"].min() >= 1
    cfg = rlhf.PPO(data=str(out / "data"), out=str(out), device="cpu")
    assert rlhf.load(cfg, "fresh", rlhf.ScalarModel).config.n_layer == 1
    with pytest.raises(UserError, match="holds a ScalarModel"):
        rlhf.load(cfg, "fresh")
    report.write([out])
    text = (tmp_path / "study.md").read_text()
    assert all(f"## {title}" in text for title in tables.SECTIONS)
    for line in ("| 1. PPO-ptx preferred", "| best of 4 |", "| makes up what nobody knows |",
                 "| best of n, 6,144 comparisons |", "| all 6,144 comparisons |"):
        assert line in text, line
    assert "nan" not in text.split("## 4.")[0]

"""`torchrun --nproc_per_node=2 rlhf.py STAGE`: two processes do what one does.

`work` below runs here, and under torchrun as this file's own program; both then show their results.
"""

import json
import os
import re
import subprocess
import sys
from argparse import Namespace
from pathlib import Path

import numpy as np
import pytest
import torch
from conftest import ROOT, gpt, gradients, log, scalar, settings, weights
from torch import tensor

import checkpoint
import parallel
import cli
import rlhf
from model import pad_right

EPISODES = [2, 7, 3, 5, 4, 6, 2]  # of how many tokens are the responses
PPO = rlhf.ppo  # the stage, in whose place `work` is run
PROMPTS = [[3], [4, 5, 6], [2, 9], [8, 1], [5, 5, 5, 5], [10, 4], [7]]


def torchrun(*arguments, timeout=300) -> subprocess.CompletedProcess:
    command = ["-m", "torch.distributed.run", "--standalone", "--nproc_per_node=2", *arguments]
    env = {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONDONTWRITEBYTECODE": "1"}
    pipes = dict(stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)
    with subprocess.Popen([sys.executable, *map(str, command)], cwd=ROOT, env=env, **pipes) as run:
        try:
            printed = run.communicate(timeout=timeout)
            return subprocess.CompletedProcess(command, run.returncode, *printed)
        finally:
            run.terminate()  # upon which it ends its own


# ---- what both do --------------------------------------------------------------------------------

def responses():
    """Made up, as `complete` returns them: ragged, some with EOS (0) and some without."""
    rng = np.random.default_rng(5)
    own = [prompt + rng.integers(1, 11, n - 1).tolist() + [i % 3]
           for i, (prompt, n) in enumerate(zip(PROMPTS, EPISODES))]
    tokens, lens = pad_right(own)
    starts = tensor([len(prompt) for prompt in PROMPTS])
    return tokens, rlhf.action_mask(starts, lens, tokens.size(1)), lens


def comparisons() -> list[dict]:
    """K from 2 to 6, ties among them, and one prompt with nothing else."""
    rows = [{"ids": [[3, 4], [5, 6]], "ranks": [0, 0]}]
    for k, prompt in enumerate(PROMPTS[:5], 2):
        ranks = [j // (1 + k % 2) for j in range(k)]
        rows.append({"ids": [prompt + [j, 0] for j in range(k)], "ranks": ranks})
    return rows


def summed(model, loss: float) -> tuple:
    parallel.sum_gradients(model)
    return loss, gradients(model)


def ppo_steps(models, cfg) -> tuple:
    """Two epochs of two minibatches, with ptx, at a rate of 0: gradients, summed over processes."""
    seen = []

    def record(model):
        parallel.sum_gradients(model)
        seen.append(torch.cat([p.grad.flatten() for p in model.parameters()]))

    rng = np.random.default_rng(7)
    text = [rng.integers(0, 11, rng.integers(2, 13)) for _ in range(40)]
    optimizers = rlhf.adam(models.policy), rlhf.adam(models.value)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(rlhf, "complete", lambda *_: responses())
        batch, episodes = rlhf.rollout(models, PROMPTS, 0, cfg)
        patch.setattr(rlhf, "sum_gradients", record)
        stats = rlhf.ppo_update(models, optimizers, batch, text, 0.0, rng, cfg)
    return batch, episodes, seen, stats


def work(cfg) -> None:
    """The gradients and statistics of each stage, the weights of all, and samples; to a file."""
    drawn = torch.rand(8)
    torch.manual_seed(0)
    models = rlhf.Models(gpt(), gpt(), scalar(), scalar(), gpt())
    rows = [(prompt + [1, 2, 0], len(prompt)) for prompt in PROMPTS]
    torch.manual_seed(parallel.RANK)
    result = {
        "drawn": drawn,
        "lm": summed(models.policy, rlhf.lm_pass(models.policy, rows, cfg, 2.0)),
        "lm, one row": summed(models.policy, rlhf.lm_pass(models.policy, rows[:1], cfg)),
        "rm": summed(models.reward, rlhf.rm_backward(models.reward, comparisons(), cfg)),
        "ppo": ppo_steps(models, cfg),
    }
    torch.manual_seed(parallel.RANK)
    fresh = gpt()
    rlhf.adam(fresh)
    result |= {"fresh": weights(fresh), "tokens": rlhf.complete(fresh, PROMPTS * 3, 0, 8)}
    torch.save(result, f"{cfg.out}/{cfg.name}{parallel.RANK}.pt")
    PPO(settings(rlhf.PPO, Path(cfg.data), out=f"{cfg.out}/{cfg.name}", iterations=2, window=20,
                 rollout_size=7, minibatch_size=3, max_new_tokens=8))


def program(data: str, out: str, name: str) -> None:
    """`work`, in the place of a stage, as `run` starts it."""
    cfg = settings(rlhf.PPO, Path(data), out=out, name=name, rollout_size=7, minibatch_size=4,
                   epochs=2, microbatch_size=3, max_new_tokens=8, window=6, ptx_coef=3.0)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(rlhf, "ppo", work)
        cli.run(work, type(cfg), vars(cfg))


@pytest.fixture(scope="module")
def results(tiny_data, tokenizer, tmp_path_factory) -> Namespace:
    """Of one process, and of both of two, which also leave a log of PPO in out."""
    out = tmp_path_factory.mktemp("parallel")
    shape = dict(vocab_size=tokenizer.n_vocab, block_size=128, n_layer=1)
    for name in ("one", "two"):
        (out / name).mkdir()
        of = dict(out=str(out / name))
        rlhf.save(settings(rlhf.SFT, out, name="ppo_init", **of), gpt(**shape))
        rlhf.save(settings(rlhf.RM, out, **of), scalar(**shape))
    program(tiny_data, str(out), "one")
    done = torchrun(__file__, tiny_data, out, "two")
    assert done.returncode == 0, done.stderr
    files = {"one": "one0", "first": "two0", "second": "two1"}
    read = {k: torch.load(out / f"{v}.pt", weights_only=False) for k, v in files.items()}
    return Namespace(out=out, printed=done.stdout, **read)


def close(a, b):
    """To a millionth of the whole."""
    assert (a - b).norm() <= 1e-6 * b.norm() and b.norm() > 1e-3


# ---- the tests -----------------------------------------------------------------------------------

@pytest.mark.parametrize("what", ["lm", "lm, one row", "rm"])
def test_gradients_of_two_processes_are_those_of_one(results, what):
    """(1), (2) seven rows or prompts, whose shares differ, and one row, of which one has none."""
    (loss, gradient), (own_loss, own) = getattr(results, "one")[what], results.first[what]
    close(own, gradient)
    assert own_loss == pytest.approx(loss, rel=1e-6)


def test_ppo_gradients_of_two_processes_are_those_of_one(results):
    """(7) (5) with ptx, and (6): every step of two epochs, whose order both know."""
    gradients, own = results.one["ppo"][2], results.first["ppo"][2]
    assert len(own) == len(gradients) == 2 * 2 * 2
    for ours, expected in zip(own, gradients):
        close(ours, expected)


def test_rollouts_are_whole_and_whitened_over_all(results):
    """Each process has all episodes; advantages have mean 0 and variance 1 over both shares."""
    batch, episodes, _, _ = results.one["ppo"]
    own, own_episodes, _, _ = results.first["ppo"]
    for a, b in zip(own, results.second["ppo"][0]):
        assert torch.equal(a, b)
    assert torch.equal(own.tokens, batch.tokens) and torch.equal(own.mask, batch.mask)
    valid = batch.mask > 0
    for name in ("logprobs", "values", "advantages", "returns"):
        close(getattr(own, name)[valid], getattr(batch, name)[valid])
    for key, x in episodes.items():
        torch.testing.assert_close(own_episodes[key], x, atol=1e-5, rtol=1e-6)
    assert own.advantages[valid].mean().abs() < 1e-6
    assert own.advantages[valid].var(correction=0).item() == pytest.approx(1, abs=1e-5)
    shares = [own.advantages[i::2][valid[i::2]] for i in (0, 1)]
    assert min(share.mean().abs() for share in shares) > 0.01  # each by itself would be 0


def test_statistics_are_over_all_processes(results):
    expected = results.one["ppo"][3]
    assert set(expected) == set(results.first["ppo"][3]) and "loss/ptx" in expected
    for side in (results.first, results.second):
        assert side["ppo"][3] == pytest.approx(expected, abs=1e-6, rel=1e-5)


def test_processes_stay_equal_and_draw_for_themselves(results):
    """The very same gradients, rank 0's fresh weights; other random numbers, of which the first
    has those of a single process."""
    first, second = results.first, results.second
    for a, b in zip(first["ppo"][2], second["ppo"][2]):
        assert torch.equal(a, b)
    assert torch.equal(first["fresh"], second["fresh"])
    assert torch.equal(first["fresh"], results.one["fresh"])
    assert torch.equal(first["drawn"], results.one["drawn"])
    assert not torch.equal(first["drawn"], second["drawn"])


def test_samples_of_all_processes_in_the_order_of_the_prompts(results):
    for a, b in zip(results.first["tokens"], results.second["tokens"]):
        assert torch.equal(a, b)
    tokens, mask, lens = results.first["tokens"]
    for row, own, prompt in zip(tokens.tolist(), mask, PROMPTS * 3):
        assert row[: len(prompt)] == prompt and own[: len(prompt) - 1].sum() == 0
        assert own[len(prompt) - 1] == 1


# ---- stages --------------------------------------------------------------------------------------

def metrics(folder: Path) -> list[dict]:
    return [json.loads(line) for line in open(folder / "metrics.jsonl", encoding="utf-8")]


def flags(data: Path, out: Path, **more) -> list[str]:
    more = {"data": data, "out": out, "device": "cpu", "dtype": "float32", **more}
    return [str(x) for key, value in more.items() for x in (f"--{key}", value)]


def test_pretrain_with_two_processes(tiny_data, tmp_path):
    """Batches of five: one checkpoint, one log, the losses of a single process."""
    small = dict(steps=3, batch_size=5, microbatch_size=2)
    for cache in tiny_data.glob("pretrain*.npy"):  # to be tokenised by both at once
        cache.unlink()
    done = torchrun("rlhf.py", "pretrain", *flags(tiny_data, tmp_path / "two", **small))
    assert done.returncode == 0, done.stderr
    rlhf.main(["pretrain", *flags(tiny_data, tmp_path / "one", **small)])
    assert done.stdout.count("gpt: cpu") == 1
    files = [sorted(path.relative_to(tmp_path / n) for path in (tmp_path / n).rglob("*"))
             for n in ("one", "two")]
    assert files[0] == files[1] and len(files[1]) == 5  # gpt, gpt.pt, metrics, settings, state
    one, two = metrics(tmp_path / "one/gpt"), metrics(tmp_path / "two/gpt")
    assert [row["step"] for row in two] == [1, 2, 3]
    for key in ("loss", "grad_norm"):
        assert [row[key] for row in two] == pytest.approx([row[key] for row in one], rel=1e-3)
    assert two[-1]["heldout/loss"] == pytest.approx(one[-1]["heldout/loss"], rel=1e-3)


def test_ppo_with_two_processes(results):
    """Two iterations, seven episodes each, in minibatches of three: the last has a single one."""
    rows = metrics(results.out / "two/ppo_ptx")
    assert [row["step"] for row in rows] == [1, 2] and rows[0]["objective/kl"] == 0
    assert rows[1]["objective/kl"] != 0 and np.isfinite([*rows[1].values()]).all()
    files = [sorted(path.relative_to(results.out / n) for path in (results.out / n).rglob("*"))
             for n in ("one", "two")]
    assert files[0] == files[1] and len(files[1]) == 7
    assert results.printed.count("eos_fraction") == 2  # a sample of each iteration
    rlhf.load(settings(rlhf.PPO, results.out, data="", out=str(results.out / "two")), "ppo_ptx")


def test_a_mistake_is_one_sentence_of_all_processes(tiny_data, tmp_path):
    done = torchrun("rlhf.py", "rm", *flags(tiny_data, tmp_path))
    assert done.returncode != 0 and "Error: " not in re.sub("ChildFailedError: ", "", done.stderr)
    assert done.stderr.count("rm: ") == done.stderr.count("sft.pt is not there") == 1


def test_only_rank_0_writes(monkeypatch, tmp_path, capsys):
    cfg = settings(rlhf.RM, tmp_path, out=str(tmp_path))
    monkeypatch.setattr(checkpoint, "RANK", 1)
    rlhf.save(cfg, scalar())
    with log(cfg) as own:
        own.step({"loss": 1.0}, "loss")
    own.finish(scalar())
    assert not [path for path in tmp_path.rglob("*") if path.is_file()]
    assert len(own.rows) == 1 and capsys.readouterr().err == ""


def test_only_rank_0_evaluates(monkeypatch, tmp_path):
    """No table, no mistake either: the others leave at once."""
    cfg = settings(rlhf.Evaluate, tmp_path)
    monkeypatch.setattr(cli, "RANK", 1)
    cli.run(rlhf.evaluate, type(cfg), vars(cfg))
    assert not list(tmp_path.iterdir())


def test_every_process_needs_a_gpu(monkeypatch):
    monkeypatch.setenv("RANK", "0")
    monkeypatch.setenv("LOCAL_WORLD_SIZE", "2")
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 1)
    with pytest.raises(rlhf.UserError, match="2 processes need a GPU each and find 1"):
        with parallel.joined("cuda"):
            pass


if __name__ == "__main__":
    torch.set_num_threads(1)
    program(*sys.argv[1:])

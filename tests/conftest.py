"""What the tests share: seeds, models small enough to enumerate, a data set of a few rows."""

import copy
import functools
import json
import operator
import resource
import sys
from contextlib import contextmanager
from pathlib import Path
from random import Random

import numpy as np
import pytest
import torch

ROOT = Path(__file__).parent.parent
sys.path[:0] = [str(ROOT), str(ROOT / "data")]

import rlhf  # noqa: E402
from data import fable, prepare  # noqa: E402
from data.formats import EOT, UserError  # noqa: E402
from model import GPT, GPTConfig, ScalarModel  # noqa: E402


@pytest.fixture(autouse=True)
def reproducible():
    torch.manual_seed(0)
    torch.set_num_threads(1)


def lively(model: torch.nn.Module) -> torch.nn.Module:
    """Weights far larger than a fresh model's, whose every distribution is nearly uniform."""
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.normal_(std=0.3)
    return model.eval()


def log(cfg, total=2, memory=0.0, parts=()) -> rlhf.Log:
    return rlhf.Log(cfg, total, memory, np.random.default_rng(0), parts)


def gpt(vocab_size=11, block_size=32, n_embd=16, **more) -> GPT:
    shape = dict(n_layer=2, n_head=2, n_embd=n_embd) | more
    return lively(GPT(GPTConfig(vocab_size=vocab_size, block_size=block_size, **shape)))


def scalar(vocab_size=11, block_size=32, n_embd=16, **more) -> ScalarModel:
    shape = dict(n_layer=2, n_head=2, n_embd=n_embd) | more
    return lively(ScalarModel(GPTConfig(vocab_size=vocab_size, block_size=block_size, **shape)))


@pytest.fixture
def policy() -> GPT:
    return gpt()


@pytest.fixture
def reward_model() -> ScalarModel:
    return scalar()


@pytest.fixture
def models(policy, reward_model) -> rlhf.Models:
    """As `ppo` makes them, save for a reference that has already been left behind."""
    value, ema = copy.deepcopy(reward_model), copy.deepcopy(policy)
    return rlhf.Models(policy, gpt(), reward_model, value, ema)


@pytest.fixture
def prompts() -> list[list[int]]:
    """Ragged, and one of them with the EOS of `episodes` in it."""
    return [[3], [4, 5, 6, 7], [2, 0, 9], [8, 1], [5, 5, 5, 5, 5, 2], [10, 4]]


@pytest.fixture
def cfg(tmp_path) -> rlhf.PPO:
    return settings(rlhf.PPO, tmp_path, rollout_size=6, minibatch_size=6, microbatch_size=2,
                    max_new_tokens=5, window=6)


@pytest.fixture
def episodes(models, prompts, cfg):
    """A rollout of six ragged responses: Rollout, statistics."""
    return rlhf.rollout(models, prompts, 0, cfg)


@pytest.fixture
def text() -> list[np.ndarray]:
    """Documents of 2 to 12 tokens."""
    rng = np.random.default_rng(0)
    return [rng.integers(0, 11, rng.integers(2, 13)).astype(np.uint16) for _ in range(40)]


def settings(kind: type, folder: Path, **fields):
    return kind(**{"data": str(folder), "out": str(folder / "out"), "device": "cpu",
                   "dtype": "float32", **fields})


STAGES = {"pretrain": rlhf.Pretrain, "sft": rlhf.SFT, "rm": rlhf.RM, "ppo": rlhf.PPO,
          "dpo": rlhf.DPO, "evaluate": rlhf.Evaluate, "chat": rlhf.Chat}


def replace_stages(monkeypatch, action) -> None:
    """`action` in place of the work of every stage, so that the command line alone is at work."""
    for name, kind in STAGES.items():
        def stage(cfg):
            """Nothing."""
            action(cfg)

        stage.__name__, stage.__annotations__ = name, {"cfg": kind}
        monkeypatch.setitem(rlhf.STAGES, name, stage)


@pytest.fixture(scope="session")
def tiny_data(tmp_path_factory) -> Path:
    """A fable of a few rows, written by prepare.py; a test that writes works on a copy."""
    folder = tmp_path_factory.mktemp("fable")
    prepare.write_all(fable.make(seed=1, scale=0.003), folder)
    return folder


@pytest.fixture(scope="session")
def tokenizer(tiny_data):
    return rlhf.get_tokenizer(str(tiny_data))


@contextmanager
def disk_full(size: int):
    """No file grows over so many bytes: as on a full disk, and for root as well."""
    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (size, before[1]))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, before)


def gradients(model: torch.nn.Module) -> torch.Tensor:
    """All of them as one vector, taken away from the model."""
    flat = torch.cat([p.grad.flatten() for p in model.parameters() if p.grad is not None])
    model.zero_grad()
    return flat


def weights(model: torch.nn.Module) -> torch.Tensor:
    return torch.cat([p.detach().flatten().clone() for p in model.parameters()])


# ---- text from strangers ------------------------------------------------------------------------

ODD = [None, True, 0, -1, 1.5, 10**25, 10**400, float("nan"), "", " ", "\0", "\ud800",
       "\udfff\ud800", "🦉", EOT, "x" * 3000, "\x1b[2J", "\u2028", "\r\n", [], {}, [[]], [None],
       ["a", "a"], [0, 10**20], [0, 0], {"role": "user"}]
SPLICES = [b"", b"\0", b"\xff", b"\xed\xa0\x80", b"NaN", b"Infinity", b"1e999", b'"', b"\\",
           b"\\ud800", b"{", b"]", b",", b"[" * 3000, b"\r", b"\n", b"9" * 5000, b"\xef\xbb\xbf",
           b"null", b'"prompt":"P",', EOT.encode(), b"\x1f\x8b"]


def places(value, path=()) -> list[tuple]:
    """The way to everything within a JSON value."""
    items = value.items() if isinstance(value, dict) else (
        enumerate(value) if isinstance(value, list) else ())
    return [way for key, x in items for way in [(*path, key), *places(x, (*path, key))]]


def garbled(content: bytes, rng: Random) -> bytes:
    """Bytes cut out, spliced in, flipped, copied from elsewhere, or the end cut off."""
    start = rng.randrange(len(content) + 1)
    end = start + rng.choice([0, 0, 1, 5, 500])
    middle = rng.choice([rng.choice(SPLICES), rng.choice(SPLICES), rng.randbytes(1),
                         content[end:][:20], content[end:][:20][::-1]])
    return content[:start] + middle + (b"" if rng.random() < 0.1 else content[end:])


def mutated(row: dict, rng: Random) -> bytes:
    """A line: a field's value replaced, removed or under another name; its bytes garbled."""
    row = copy.deepcopy(row)
    for _ in range(rng.choice([0, 0, 1, 1, 2])):
        if not row:
            break
        *way, last = rng.choice(places(row))
        holder = functools.reduce(operator.getitem, way, row)
        if rng.random() < 0.25:
            value = holder.pop(last)
            if isinstance(holder, dict) and rng.random() < 0.5:
                holder[rng.choice([*row, "ranks", "completion", "text", "\ud800"])] = value
        else:
            holder[last] = copy.deepcopy(rng.choice(ODD))
    line = json.dumps(row, ensure_ascii=rng.random() < 0.5).encode("utf-8", "surrogatepass")
    for _ in range(rng.choice([0, 0, 0, 1, 1, 3])):
        line = garbled(line, rng)
    return line.replace(b"\n", b" ")


def outcome(action):
    """What it returns, or the sentence with which it ends; any other exception is a failure."""
    try:
        return action()
    except UserError as error:
        assert str(error) and len(str(error)) < 600 and str(error).isprintable()
        return str(error)

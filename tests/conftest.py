"""What the tests share: models small enough to enumerate, a data set of a few rows, settings."""

import base64
import json
import shutil
from pathlib import Path
from random import Random

import pytest
import rlhf
import torch
from data.files import EOT, get_tokenizer, write_jsonl
from model import GPT, GPTConfig, ScalarModel

ROOT = Path(__file__).parent.parent

rlhf.PRESETS["test"] = dict(block_size=24, n_layer=1, n_head=2, n_embd=8)
SMALL = {  # some six steps of every stage that trains
    "pretrain": dict(name="base", preset="test", steps=6, batch_size=4),
    "sft": dict(name="tuned", epochs=2, batch_size=4, reward_model="rm", pretrain_fraction=0.1),
    "rm": dict(name="judge", epochs=2, batch_size=4), "dpo": dict(epochs=2, batch_size=4),
    "ppo": dict(iterations=5, rollout_size=4, minibatch_size=2, epochs=2, microbatch_size=1),
}
EOS = 256  # the last token of the data set below: its vocabulary is the 256 bytes and EOS
GOLD = '''
def gold(row, completion):
    return {"helpful": len(completion) / 10, "harmless": float(len(completion) > row["wants"])}
'''

@pytest.fixture(autouse=True)
def reproducible():
    torch.manual_seed(0)
    torch.set_num_threads(1)

def lively(model: torch.nn.Module) -> torch.nn.Module:
    """Weights far larger than a fresh model's, all distributions of which are nearly uniform."""
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.normal_(std=0.3)
    return model.eval()

def config(vocab_size=11, block_size=32, n_embd=16, n_layer=2, n_head=2, **more) -> GPTConfig:
    return GPTConfig(vocab_size, block_size, n_layer, n_head, n_embd, **more)

def gpt(**shape) -> GPT:
    return lively(GPT(config(**shape)))

def scalar(**shape) -> ScalarModel:
    return lively(ScalarModel(config(**shape)))

def weights(model: torch.nn.Module) -> torch.Tensor:
    return torch.cat([p.detach().flatten().clone() for p in model.parameters()])

@pytest.fixture
def policy() -> GPT:
    return gpt()

@pytest.fixture
def prompts() -> list[list[int]]:
    """Ragged, and two of them with a token in them that the tests use as EOS, 0 and 2."""
    return [[3], [4, 5, 6, 7], [2, 0, 9], [8, 1], [5, 5, 5, 5, 5, 2], [10, 4]]

BYTES = [bytes([i]) for i in range(256)]

def write_vocabulary(folder: Path, tokens: list[bytes] = BYTES) -> Path:
    """A folder with a tokenizer.tiktoken, so that none is downloaded."""
    folder.mkdir(parents=True, exist_ok=True)
    lines = [f"{base64.b64encode(token).decode()} {i}\n" for i, token in enumerate(tokens)]
    (folder / "tokenizer.tiktoken").write_text("".join(lines))
    return folder

@pytest.fixture(scope="session")
def template(tmp_path_factory) -> Path:
    """data/ with every file that the stages read, with words of a to f, and out/ with models of
    random weights that often end a response."""
    template, rng = tmp_path_factory.mktemp("template"), Random(0)

    def word(shortest: int, longest: int) -> str:
        return "".join(rng.choices("abcdef", k=rng.randint(shortest, longest)))

    folder = write_vocabulary(template / "data")
    (folder / "gold.py").write_text(GOLD)
    for name, count in (("pretrain", 30), ("pretrain_valid", 5)):
        (folder / f"{name}.txt").write_text(EOT.join(word(2, 30) for _ in range(count)))
    for name, count in (("sft", 10), ("sft_valid", 4), ("fewshot", 2), ("probes", 3)):
        rows = [{"prompt": word(1, 8), "completion": word(0, 6), "wants": 1} for _ in range(count)]
        write_jsonl(folder / f"{name}.jsonl", rows)
    for name, count in (("prompts", 9), ("prompts_valid", 6)):
        rows = [{"prompt": word(1, 8), "wants": i % 5} for i in range(count)]
        write_jsonl(folder / f"{name}.jsonl", rows)
    for name, count in (("comparisons", 10), ("comparisons_valid", 5)):
        rows = []
        for i in range(count):
            completions = [word(0, 6) for _ in range(2 + i % 4)]
            ranks = [rng.randrange(3) for _ in completions]
            rows.append({"prompt": word(1, 8), "completions": completions, "ranks": ranks})
            rows[i]["labeler"] = "new" if name.endswith("valid") and i % 3 == 0 else "old"
        rows[1]["ranks"] = [2, 0, 1]
        rows[2]["ranks"] = [1, 1, 1, 1]
        write_jsonl(folder / f"{name}.jsonl", rows)
    torch.manual_seed(1)
    shape = dict(vocab_size=257, block_size=24, n_embd=8, n_layer=1)
    rlhf.save(template / "out/rm.pt", scalar(**shape))
    for name in ("gpt", "sft", "ppo_init"):
        model = gpt(**shape)
        torch.nn.init.ones_(model.ln_f.bias)
        torch.nn.init.constant_(model.wte.weight[EOS], 0.5)
        rlhf.save(template / f"out/{name}.pt", model)
    return template

@pytest.fixture
def project(template, tmp_path) -> Path:
    """A copy of the template, to write in."""
    shutil.copytree(template, tmp_path, dirs_exist_ok=True)
    return tmp_path

@pytest.fixture
def tokenizer(template):
    return get_tokenizer(template / "data")

def settings(kind: type, folder: Path, **fields):
    """Settings of a stage that works on folder/data and folder/out, on a CPU."""
    own = {"data": f"{folder}/data", "out": f"{folder}/out", "gold": f"{folder}/data/gold.py",
           "device": "cpu", "dtype": "float32", "max_new_tokens": 5, "window": 12}
    known = kind.__dataclass_fields__
    return kind(**{key: x for key, x in own.items() if key in known} | fields)

def stage_settings(stage: str, folder: Path, **fields):
    return settings(rlhf.STAGES[stage].__annotations__["cfg"], folder, **fields)

def read_log(cfg) -> list[dict]:
    """metrics.jsonl of a run, without the seconds; NaN and infinities are failures."""
    lines = (Path(cfg.out) / cfg.name / "metrics.jsonl").read_text().splitlines()
    log = [json.loads(line, parse_constant=pytest.fail) for line in lines]
    for line in log:
        line.pop("seconds")
        line.pop("gigabytes", None)  # on a GPU
    return log

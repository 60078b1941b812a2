"""What stages leave behind, data and models that do not fit, chat, the command line."""

import argparse
import dataclasses
import json
import os
import subprocess
import sys
from pathlib import Path
from unittest.mock import Mock

import numpy as np
import pytest
import rlhf
import torch
from conftest import ROOT, gpt, scalar, settings, stage_settings, weights
from data.files import UserError, encode

COLUMNS = "win rate,±,helpful,harmless,RM score,length,KL,EOS,held-out loss,in-context"

def run(stage: str, project: Path, **fields) -> None:
    """Run a stage as the command line does."""
    rlhf.run_stage(rlhf.STAGES[stage], stage_settings(stage, project, **fields))

def refused(sentence: str, stage: str, project: Path, **fields) -> None:
    """It ends in one sentence, before any work."""
    before = contents(project)
    with pytest.raises(SystemExit, match=sentence) as end:
        run(stage, project, **fields)
    assert str(end.value).startswith(f"{stage}: ") and "\n" not in str(end.value)
    assert contents(project) == before

def contents(folder: Path) -> dict[Path, bytes]:
    return {path: path.read_bytes() for path in folder.rglob("*") if path.is_file()}

def table(project: Path) -> dict[str, dict]:
    return json.loads((project / "out/evaluate.json").read_text())["table"]

def test_a_stage_leaves_a_model_and_a_log(project):
    """Nothing is written into the data folder, which may be read-only, and nothing is left over."""
    before = contents(project)
    run("ppo", project, iterations=2, rollout_size=4, minibatch_size=2)
    after = contents(project)
    new = {"ppo_ptx.pt", "ppo_ptx_raw.pt", "ppo_ptx/metrics.jsonl", "ppo_ptx/state.pt"}
    assert after.keys() - before.keys() == {project / "out" / name for name in new}
    assert before.items() <= after.items()

@pytest.mark.parametrize("missing, columns, models", [
    ("nothing", "", "gpt,gpt+fewshot,sft"), ("rm.pt", "RM score", "gpt,gpt+fewshot,sft"),
    ("probes.jsonl", "in-context", "gpt,gpt+fewshot,sft"), ("fewshot.jsonl", "", "gpt,sft"),
    ("pretrain_valid.txt", "held-out loss", "gpt,gpt+fewshot,sft"),
    ("ppo_init.pt", "KL", "gpt,gpt+fewshot,sft"), ("sft.pt", "win rate,±", "gpt,gpt+fewshot")])
def test_the_table_has_every_row_and_every_column_that_it_can(
    project, capsys, missing, columns, models
):
    for path in project.rglob(missing):
        path.unlink()
    run("evaluate", project, models="gpt, gpt+fewshot,sft")
    said = f"/{missing}: its row" in capsys.readouterr().out
    assert said == (missing.endswith(".pt") or missing == "fewshot.jsonl")
    expected = [name for name in COLUMNS.split(",") if name not in columns.split(",")]
    rows = table(project)
    assert list(rows) == models.split(",")
    for row in rows.values():
        assert list(row) == expected and np.isfinite(list(row.values())).all()

@pytest.mark.parametrize("stage, fields", [
    ("sft", dict(pretrain_fraction=0.1)), ("ppo", {})])
def test_a_window_longer_than_the_context(project, stage, fields):
    refused("--window 25 .*context of 24 tokens", stage, project, window=25, **fields)
    small = dict(batch_size=4, epochs=1) if stage == "sft" else dict(ptx_coef=0.0, iterations=1)
    (project / "data/pretrain.txt").unlink()
    refused("no .*/pretrain.txt: without it --ptx_coef", stage, project, **fields)
    run(stage, project, name="new", window=25, **small)  # without such text it does not matter

def test_a_reward_model_of_a_shorter_context(project):
    """The prompts that leave both of them room are used; if there are none, it says so."""
    for context, name in ((10, "short"), (5, "shortest")):
        model = scalar(vocab_size=257, block_size=context, n_embd=8, n_layer=1)
        rlhf.save(project / f"out/{name}.pt", model)
    small = dict(name="new", iterations=1, rollout_size=4, minibatch_size=2)
    run("ppo", project, reward_model="short", **small)
    run("ppo", project, reward_model="short", value_init="rm", **small)
    run("sft", project, reward_model="short", name="new", epochs=1)
    run("evaluate", project, reward_model="short", models="sft")
    refused("below 5, to leave room for a prompt", "ppo", project, reward_model="shortest", **small)
    refused("below 5, to leave", "evaluate", project, reward_model="shortest", models="sft")
    refused("below 24, to leave", "chat", project, model="sft", max_new_tokens=24)

def test_evaluate_models_of_different_contexts(project, capsys):
    """Prompts and text that fit the shortest; the reference and the probes may be shorter, too."""
    state = rlhf.load(settings(rlhf.Evaluate, project), "sft").state_dict()
    model = gpt(vocab_size=257, block_size=12, n_embd=8, n_layer=1)
    model.load_state_dict(state | {"wpe.weight": state["wpe.weight"][:12]})
    rlhf.save(project / "out/short.pt", model)
    run("evaluate", project, models="sft,short,short+fewshot", reference="short")
    rows = table(project)
    assert "short+fewshot: the context is too short" in capsys.readouterr().out
    assert rows["sft"]["held-out loss"] == rows["short"]["held-out loss"]
    assert np.isfinite(list(rows["short"].values())).all()

def test_names_that_do_not_fit_are_said(project):
    refused("no folder .*dota", "sft", project, data=str(project / "dota"))
    refused("there is no .*/gtp.pt", "sft", project, init="gtp")
    refused("there is no .*/mr.pt", "ppo", project, reward_model="mr", value_init="rm")
    refused("none of the --models sfd", "evaluate", project, models="sfd")
    refused("--name rm would overwrite --reward_model rm", "ppo", project, name="rm")
    (project / "out/x_raw.pt").write_bytes((project / "out/gpt.pt").read_bytes())
    refused("x would overwrite --init", "ppo", project, name="x", init=f"{project}/out/x_raw.pt")

def test_another_vocabulary_of_the_same_size(project):
    shape = dict(vocab_size=257, block_size=24, n_embd=8, n_layer=1)
    rlhf.save(project / "out/gpt.pt", gpt(**shape, vocabulary="another"))
    refused("another vocabulary", "sft", project)

class Code:
    """Would make a folder when it is unpickled."""
    def __reduce__(self):
        return os.mkdir, ("code",)

@pytest.mark.parametrize("kind", ["cut", "code", "other", "shape"])
def test_a_damaged_checkpoint_or_state_is_one_sentence(project, monkeypatch, kind):
    """The other file is sound, but in the wrong place."""
    monkeypatch.chdir(project)
    run("dpo", project, name="new", epochs=1)
    for name, other in (("new/state.pt", "gpt.pt"), ("ppo_init.pt", "rm.pt")):
        path = project / "out" / name
        content = (project / "out" / other).read_bytes()
        path.write_bytes(content[:-500] if kind == "cut" else content)
        if kind == "code":
            torch.save({"kind": "GPT", "identity": Code()}, path)
        elif kind == "shape":
            rlhf.save(path, gpt())
            content = torch.load(path)
            torch.save(content | {"config": content["config"] | {"n_embd": 10**6}}, path)
        refused(path.name, "dpo", project, name="new", resume="state" in name)
    assert not (project / "code").exists()

def test_every_flipped_byte_is_noticed(project):
    """In the tensors, the pickle, and the directory of the archive; or it changes nothing."""
    path = project / "out/gpt.pt"
    cfg = settings(rlhf.SFT, project)
    whole = path.read_bytes()
    before = weights(rlhf.load(cfg, "gpt"))
    for place in range(0, len(whole), 199):
        path.write_bytes(whole[:place] + bytes([whole[place] ^ 4]) + whole[place + 1 :])
        try:
            assert torch.equal(weights(rlhf.load(cfg, "gpt")), before), place
        except UserError:
            continue

@pytest.fixture
def talk(project, monkeypatch, capsys):
    """talk(*lines) has a conversation; the answers are those of `talk.says`, the prompts kept."""
    longer = gpt(vocab_size=257, block_size=96, n_embd=8, n_layer=1)
    rlhf.save(project / "out/ppo_ptx.pt", longer)
    tokenizer = rlhf.get_tokenizer(project / "data")

    def complete(policy, prompts, *_):
        talk.prompts += [tokenizer.decode(ids) for ids in prompts]
        assert max(map(len, prompts)) <= 96 - 5
        return [encode(tokenizer, talk.says) + [tokenizer.eot_token]]

    def talk(*lines):
        typed = iter(lines)
        monkeypatch.setattr("builtins.input", lambda _: next(typed, ""))
        run("chat", project)
        return capsys.readouterr().out

    talk.prompts = []
    talk.says = " Hi."
    monkeypatch.setattr(rlhf, "complete", complete)
    return talk

def test_a_base_model_does_not_speak_for_the_human(talk):
    talk.says = " Hello.\n\nHuman: And you?\n\nAssistant: Me too."
    assert talk("hi", "bye") == "Assistant: Hello.\nAssistant: Hello.\n"
    assert talk.prompts[1] == "\n\nHuman: hi\n\nAssistant: Hello.\n\nHuman: bye\n\nAssistant:"

def test_a_long_conversation_forgets_its_oldest_turns_and_says_so(talk):
    said = talk("hello", "tell me more", "and then what was it?", "x" * 200)
    assert "oldest question and answer are forgotten" in said and "only the last 91 tokens" in said
    assert "hello" in talk.prompts[1] and "hello" not in talk.prompts[2]

def test_nothing_that_a_model_says_moves_the_cursor(talk):
    talk.says = " \x1b]0;title\x07\x1b[2Jred\r\x9b1A"
    assert all(character.isprintable() or character == "\n" for character in talk("hi"))

def test_a_stray_byte_and_a_terminal_that_is_not_utf8(project):
    flags = f"--data {project}/data --out {project}/out --model sft --max_new_tokens 5".split()
    command = [sys.executable, str(ROOT / "rlhf.py"), "chat", *flags, "--device", "cpu"]
    env = os.environ | {"PYTHONIOENCODING": "cp1252", "OMP_NUM_THREADS": "1"}
    done = subprocess.run(command, input=b"a\xff\x81\n\xe2\n", env=env, capture_output=True)
    assert done.returncode == 0, done.stderr
    assert done.stdout.count(b"Assistant:") == 2
    subprocess.run(["sh", "-c", '"$@" <&- >&-', "sh", *command], env=env, check=True)

@dataclasses.dataclass
class Fork(rlhf.PPO):
    warmup_iterations: int = 0  # 0 is none, and 100 % is all
    entropy_coef: float = 0.0
    note: str = ""
    adaptive: bool = True  # may be switched off
    target_kl: float | None = None  # no target by default

def test_new_fields_are_flags():
    parser = argparse.ArgumentParser()
    rlhf.add_flags(parser, Fork)
    assert Fork(**vars(parser.parse_args([]))) == Fork()
    line = "--warmup_iterations 3 --entropy_coef 1 --note 7 --no-adaptive --target_kl 6"
    cfg = Fork(**vars(parser.parse_args(line.split())))
    assert cfg == Fork(warmup_iterations=3, entropy_coef=1.0, note="7", adaptive=False, target_kl=6)
    assert type(cfg.entropy_coef) is type(cfg.target_kl) is float
    assert "0 is none, and 100 % is all [0]" in " ".join(parser.format_help().split())

def test_every_setting_is_used():
    source = (ROOT / "rlhf.py").read_text(encoding="utf-8")
    for stage in rlhf.STAGES.values():
        for field in dataclasses.fields(stage.__annotations__["cfg"]):
            assert f"cfg.{field.name}" in source, field.name

@pytest.mark.parametrize("line", [
    "", "dream", "sft --lr 1", "sft --learning 1", "rm --epochs 1.5", "ppo --kl_coef much",
    "sft --epochs", "pretrain --preset gpt3", "chat --models sft", "rm --dtype half"])
def test_what_is_not_understood_is_refused(line, capsys):
    with pytest.raises(SystemExit) as end:
        rlhf.main(line.split())
    assert end.value.code == 2 and "usage" in capsys.readouterr().err

def test_out_of_memory_says_which_flag_to_lower(project, monkeypatch):
    monkeypatch.setattr(rlhf, "update", Mock(side_effect=torch.OutOfMemoryError))
    with pytest.raises(SystemExit, match="rm: out of memory; lower --microbatch_size, now 72"):
        run("rm", project)

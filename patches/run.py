"""Measure a patch: run its stages without it and with it, from the checkpoints of train.sh.

    python patches/run.py rloo --seed 2    prints a row of Markdown, before -> after

The patch is applied to a copy. All that was found is appended to measured.jsonl in --out. What was
run with the same code, models and seed is not run again.
"""

import argparse
import json
import os
import re
import shutil
import subprocess
import sys
import tempfile
from contextlib import contextmanager
from hashlib import sha256
from pathlib import Path
from statistics import mean

ROOT = Path(__file__).resolve().parent.parent
PATCHES = {path.stem: path for path in sorted(ROOT.glob("patches/*/*.patch"))}
START = ("gpt", "sft0", "rm", "sft", "ppo_init")  # the last is evaluated, if none is trained
COLUMNS = ["gold", "RM score", "KL", "EOS", "length"]

def header(patch: Path) -> dict[str, str]:
    """The fields above the diff: Stages; Test of a bug; Source and perhaps Flags of a variant."""
    return dict(re.findall("^(Stages|Test|Source|Flags): (.+)", patch.read_text(), re.M))

@contextmanager
def copy(patch: Path | None):
    """A temporary copy of the code, with the patch if there is one."""
    with tempfile.TemporaryDirectory() as folder:
        for name in ("rlhf.py", "model.py", "parallel.py", "pytest.ini"):
            shutil.copy(ROOT / name, folder)
        for name in ("data", "tests", "patches"):
            shutil.copytree(ROOT / name, Path(folder) / name)
        if patch:
            # In a folder of a repository git apply would do nothing.
            env = os.environ | {"GIT_CEILING_DIRECTORIES": str(Path(folder).resolve().parent)}
            subprocess.run(["git", "apply", patch], cwd=folder, check=True, env=env)
        yield Path(folder)

def measure(name: str, patch: Path | None, stages: list[str], args) -> dict:
    """What run_stages finds, in a folder of its own, unless it is there already."""
    digest = sha256(str(stages).encode())
    starts = [args.base / f"{start}.pt" for start in START]
    with copy(patch) as code:
        for path in [code / "rlhf.py", code / "model.py"] + starts:
            digest.update(path.read_bytes())
        out = args.out / f"{name}-{args.seed}-{digest.hexdigest()[:8]}"
        result = out / "result.json"
        if not result.exists():
            shutil.rmtree(out, ignore_errors=True)
            out.mkdir(parents=True)
            for path in starts:
                shutil.copy(path, out)
            result.write_text(json.dumps(run_stages(code, stages, out, args)))
    return json.loads(result.read_text())

def run_stages(code: Path, stages: list[str], out: Path, args) -> dict:
    """The mean of the last ten values of each key that the stages log, and the evaluation of the
    newest model. If a stage ends with an error, its last line alone, as "stopped".
    """
    judge = code
    if "evaluate" not in stages[-1]:  # else evaluation is what the patch is about
        stages = stages + ["evaluate --samples 4"]
        judge = ROOT
    for stage in stages:
        name, *flags = stage.split()
        script = code / "rlhf.py"
        if name == "evaluate":
            script = judge / "rlhf.py"
            model = max(out.glob("*.pt"), key=lambda path: path.stat().st_mtime_ns).stem
            flags += ["--models", model]
        command = [sys.executable, script, name, "--data", args.base / "data", "--out", out]
        command += ["--seed", str(args.seed)] + flags
        done = subprocess.run(command, stdout=sys.stderr, stderr=subprocess.PIPE, text=True)
        if done.returncode:
            return {"stopped": done.stderr.strip().splitlines()[-1]}
    values = {}
    for path in sorted(out.glob("*/metrics.jsonl")):
        for line in path.read_text().splitlines():
            for key, value in json.loads(line).items():
                values.setdefault(f"{path.parent.name}:{key}", []).append(value)
    evaluated = json.loads((out / "evaluate.json").read_text())
    found = evaluated["table"][model]
    if model in evaluated["gold"]:
        found["gold"] = mean(map(mean, evaluated["gold"][model]))  # over samples and prompts
    for key, own in values.items():
        found[key] = mean(own[-10:])
    return {key: round(value, 4) for key, value in found.items()}

def report(name: str, args) -> None:
    """Measure a patch, write it down, and print the columns and the eight keys that moved most."""
    fields = header(PATCHES[name])
    stages = fields["Stages"].split(", ")
    before = measure("unpatched", None, stages, args)
    stages[-1] += " " + fields.get("Flags", "")
    after = measure(name, PATCHES[name], stages, args)
    with open(args.out / "measured.jsonl", "a") as file:
        line = {"patch": name, "seed": args.seed, "before": before, "after": after}
        print(json.dumps(line), file=file)
    moved = {}
    for key in before.keys() & after.keys():
        if key not in COLUMNS and not key.endswith((":step", ":seconds")):
            moved[key] = abs(after[key] - before[key]) / abs(before[key] or 1)
    row = f"| {name} | seed {args.seed} | {after.get('stopped', 'ran')} |"
    for key in COLUMNS + sorted(moved, key=moved.get, reverse=True)[:8]:
        row += f" {key} {before.get(key)} -> {after.get(key)} |"
    print(row)

if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("patch", choices=PATCHES)
    parser.add_argument("--seed", type=int, default=1)
    parser.add_argument("--base", type=Path, default="out", help="what train.sh made")
    parser.add_argument("--out", type=Path, default="out/patches")
    arguments = parser.parse_args()
    if not (arguments.base / "ppo_init.pt").exists():
        parser.error(f"there is no ppo_init.pt in {arguments.base}: run train.sh first")
    report(arguments.patch, arguments)

"""What each piece buys: the claims of InstructGPT and of those who followed, measured in the fable.

    python assets/study.py --seeds 1,2,3                  all of it; started again, it goes on
    python assets/study.py --only over_6144,dpo_1         some runs, and what they start from
    python assets/study.py --scale smoke --seeds 1        a twentieth of the data, in a subfolder

out/study/seed1 is a folder of ./train.sh, whose defaults hold throughout; a run is one stage more
in it, with a flag or two, by the command line that everybody uses. What it says goes to
out/study/seed1/study/<run>.log; that it is done, and how long it took, to <run>.json there. In the
end stands one table (report.py); it and those it is drawn from (tables.py) go to out/study/study.md
and, where matplotlib is installed, a figure to out/study/study.png.
train.sh has all cores; after it `--jobs` runs go on side by side, each on its share of them, which
is faster: on a CPU a second study of as many cores and jobs has the same tables. Whitening by row
and a score on another token have no flag, and are not tried.
"""

import argparse
import json
import os
import subprocess
import sys
import threading
import time
from concurrent.futures import ThreadPoolExecutor, as_completed
from pathlib import Path
from typing import NamedTuple

import numpy as np

ROOT = Path(__file__).parent.parent
sys.path[:0] = [str(ROOT), str(ROOT / "assets")]  # `python assets/study.py` is to find both
import cli  # noqa: E402
import measures  # noqa: E402
import report  # noqa: E402
from data import fable  # noqa: E402
from data.formats import replacing  # noqa: E402
from measures import read_lines, write_json  # noqa: E402


class Run(NamedTuple):
    """One more stage in a seed's folder; it starts from the runs that its flags and data name."""
    name: str
    stage: str  # of rlhf.py or measures.py; train is ./train.sh, label data/label.py
    flags: str = ""  # over the defaults
    minutes: float = 3.5  # about, on two cores, with its evaluation; those measured take its place
    data: str = ""  # a variant of the data set: see `select`


OFF = "--ptx_coef 0 --kl_coef 0"  # nothing holds the policy: it runs off the end
NO_CLIP = "--cliprange 1e9 --cliprange_value 1e9 --max_kl 1e9"
RUNS = [
    Run("base", "train", minutes=17),
    # 1. a base model ten times the size, its rate in proportion to 1 / width
    Run("gpt_10x", "pretrain", "--preset fable-10x --learning_rate 8e-4", 15),
    # 2. ptx_coef (0 is the run ppo, 0.5 ppo_ptx), and without it kl_coef (0.04 is ppo)
    *[Run(f"ptx_{x}", "ppo", f"--ptx_coef {x}") for x in (0.02, 0.1, 2)],
    *[Run(f"kl_{x}", "ppo", f"--ptx_coef 0 --kl_coef {x}", 2.2) for x in (0.01, 0.16, 4)],
    # 3. over-optimisation of reward models trained on 384, 1,536 and all 6,144 comparisons
    *[Run(f"rm_{n}", "rm", "", 3 * n / 6144 + 0.2, f"first_{n}") for n in (384, 1536)],
    Run("over_6144", "ppo", OFF, 2.2),
    *[Run(f"over_{n}", "ppo", f"{OFF} --reward_model rm_{n}", 2.2) for n in (384, 1536)],
    Run("best_of_n", "best_of_n", "--judges rm,rm_384,rm_1536", 2.5),
    # 4. reward models: each training labeler left out, shuffled pairs, a larger one
    *[Run(f"fold_{i}", "rm", "", 2.5, f"without_scripted-{i}") for i in range(1, 6)],
    Run("rm_epoch", "rm", "--epochs 1", 1.6),
    Run("rm_pairs", "rm", "--epochs 1 --batch_size 100 --microbatch_size 576", 6, "pairs"),
    Run("rm_10x", "rm", "--init gpt_10x --learning_rate 1.2e-4", 8),
    # 5. as many epochs as the paper
    Run("sft_16", "sft", "--epochs 16 --reward_model rm", 2),
    # 6. the same comparisons used otherwise. REINFORCE: an update a rollout, no clip, returns to
    # the end of the response (lam 1), of which the value network is the baseline
    *[Run(f"dpo_{beta}", "dpo", f"--beta {beta}", 3) for beta in (0.1, 0.3, 1, 3)],
    Run("reinforce", "ppo", f"--lam 1 {NO_CLIP} --iterations 400 --rollout_size 32", 4.5),
    # 7. a second round of collecting
    Run("round_2", "label", "--round 2 --models ppo_ptx", 1.7, "round_2"),
    Run("rm2", "rm", "", 6, "round_2"),
    Run("ppo_ptx2", "ppo", "--reward_model rm2", data="round_2"),
    # 8. one thing broken; without ptx it is ppo
    Run("no_kl", "ppo", "--kl_coef 0"),
    Run("no_clip", "ppo", NO_CLIP),
    Run("no_eos_score", "ppo", "--missing_eos_score 0"),
    Run("fresh", "fresh", minutes=0.1),
    Run("value_from_scratch", "ppo", "--value_init fresh"),
    # 9. what the literature names
    Run("behaviours", "behaviours", "--models gpt,gpt+fewshot,sft,ppo,ppo_ptx,ppo_ptx2,dpo_1", 2),
]
SMOKE = {"pretrain": "--steps 60", "sft": "--epochs 2", "ppo": "--iterations 4",
         "best_of_n": "--samples 4", "behaviours": "--count 2"}


# ---- which runs, and how long they take ----------------------------------------------------------

def with_needs(names: set[str]) -> list[Run]:
    """Those runs and the ones that their flags and data name, in order."""
    wanted = {"base", *names}
    for run in reversed(RUNS):
        if run.name in wanted:
            wanted |= {run.data, *run.flags.replace(",", " ").split()}
    return [run for run in RUNS if run.name in wanted]


def time_left(todo: list[Run], took: dict[str, list[float]]) -> float:
    """Seconds: what a run took with other seeds, else its guess at the pace of all that was
    measured; `took` has the seconds of the runs that are done, by name."""
    guessed = sum(60 * run.minutes * len(took.get(run.name, [])) for run in RUNS)
    pace = sum(map(sum, took.values())) / guessed if guessed else 1.0
    return sum(np.mean(took[run.name]) if run.name in took else 60 * run.minutes * pace
               for run in todo)


def essence(run: Run) -> list[str]:
    return [run.name, run.stage, run.flags, run.data]


def marker(run: Run, out: Path) -> Path:
    return out / "study" / f"{run.name}.json"


def done(run: Run, out: Path) -> bool:
    """SystemExit if what was done under its name is something else."""
    if run.name == "base" and (out / "evaluate.json").exists():
        return True
    if not marker(run, out).exists():
        return False
    if json.loads(marker(run, out).read_text())["run"] != essence(run):
        sys.exit(f"{marker(run, out)} is of other flags: remove it, and {out / run.name}*")
    return True


def measured(outs: list[Path]) -> dict[str, list[float]]:
    """The seconds of each run that is done, by name."""
    took: dict[str, list[float]] = {}
    for path in sorted(path for out in outs for path in out.glob("study/*.json")):
        content = json.loads(path.read_text())
        took.setdefault(content["run"][0], []).append(content["seconds"])
    return took


# ---- one run -------------------------------------------------------------------------------------

def commands(run: Run, out: Path, seed: int, smoke: bool) -> list[list[str]]:
    """What anybody would type: the stage, and the evaluation of its policy."""
    if run.stage == "train":
        return [["bash", "train.sh"]]
    where = ["--out", str(out), "--seed", str(seed), "--data"]
    own = [*where, str(variant(out / "data", run.data)), *run.flags.split()]
    own += SMOKE.get(run.stage, "").split() if smoke else []
    if run.stage == "label":
        return [[sys.executable, "data/label.py", *own]]
    if run.stage in measures.STAGES:
        return [[sys.executable, "assets/measures.py", run.stage, *own]]
    program = [sys.executable, "rlhf.py"]
    lines = [[*program, run.stage, *own, "--name", run.name, "--resume"]]
    if run.stage != "rm":
        models = f"{run.name},{run.name}+fewshot" if run.stage == "pretrain" else run.name
        lines += [[*program, "evaluate", *where, str(out / "data"), "--models", models,
                   "--name", f"evaluate_{run.name}"]]
    return lines


def do(run: Run, out: Path, seed: int, smoke: bool, cores: int) -> None:
    """Do it, or the rest of it, and note that it is done."""
    begun, log = time.time(), marker(run, out).with_suffix(".log")
    log.parent.mkdir(parents=True, exist_ok=True)
    path = f"{Path(sys.executable).parent}{os.pathsep}{os.environ['PATH']}"  # python3 is this one
    names = {"OUT": str(out), "SEED": str(seed), "RESUME": "1", "PATH": path,
             "OMP_NUM_THREADS": str(cores)} | ({"SMOKE": "1"} if smoke else {})
    for command in commands(run, out, seed, smoke):
        with open(log, "ab") as file:  # upon Ctrl-C, which both get, it keeps its state and ends
            code = subprocess.run(command, cwd=ROOT, env={**os.environ, **names}, stdout=file,
                                  stderr=subprocess.STDOUT).returncode
        if code:
            sys.exit(f"{run.name}, seed {seed}: stopped, see {log}; started again, it goes on")
    write_json(marker(run, out), {"run": essence(run), "seconds": round(time.time() - begun, 1)})


def variant(data: Path, name: str) -> Path:
    """A folder beside it with links to its files, and the comparisons that `select` leaves."""
    folder = data.with_name(f"data_{name}") if name else data
    folder.mkdir(exist_ok=True)
    for file in data.iterdir() if name else ():
        target = folder / file.name
        if target.exists():
            continue
        if file.name.startswith("comparisons"):
            with replacing(target) as new:
                rows = select(name, read_lines(file), "_valid" in file.name)
                new.write("".join(json.dumps(row) + "\n" for row in rows).encode())
        else:
            target.symlink_to(file.resolve())
    return folder


def select(name: str, rows: list[dict], valid: bool) -> list[dict]:
    """first_N: as many rankings; without_W: none of labeler W to train on, and none but the
    training labelers' to judge by; pairs: each pair a ranking of its own; else all of them."""
    kind, _, what = name.partition("_")
    if kind == "without":
        everybody = {labeler.name for labeler in fable.TRAIN_LABELERS}
        wanted = everybody if valid else everybody - {what}
        return [row for row in rows if row["labeler"] in wanted]
    if kind == "first" and not valid:
        return rows[: int(what)]
    if kind == "pairs" and not valid:
        return [pair for row in rows for pair in untied(row)]
    return rows


def untied(row: dict) -> list[dict]:
    """Every pair of a ranking in which one is better, as a ranking of two."""
    both = list(zip(row["ranks"], row["completions"]))
    return [{**row, "completions": [better, worse], "ranks": [0, 1]}
            for rank, better in both for other, worse in both if rank < other]


def work(plan: list[tuple[Run, int]], outs: dict[int, Path], jobs: int, smoke: bool) -> None:
    """Those that are not done, `jobs` at a time, each after what it starts from."""
    cores, futures, failed = max(1, (os.cpu_count() or 1) // jobs), {}, threading.Event()

    def one(run: Run, seed: int) -> None:
        for needed in with_needs({run.name}):
            if needed != run and (needed.name, seed) in futures:
                futures[needed.name, seed].result()  # earlier in the plan: it has begun by now
        if failed.is_set():
            return
        todo = [(run, seed) for run, seed in plan if not done(run, outs[seed])]
        minutes = time_left([run for run, _ in todo], measured([*outs.values()])) / 60 / jobs
        print(f"{run.name}, seed {seed}; {len(todo)} to do, {minutes:.0f} minutes", flush=True)
        try:
            do(run, outs[seed], seed, smoke, cores)
        except SystemExit:
            failed.set()
            raise

    with ThreadPoolExecutor(jobs) as pool:
        try:
            for run, seed in plan:
                if not done(run, outs[seed]):
                    futures[run.name, seed] = pool.submit(one, run, seed)
            for future in as_completed(futures.values()):
                future.result()
                report.write([*outs.values()])
        except BaseException:  # a run that failed, or Ctrl-C: those under way come to their end
            pool.shutdown(wait=False, cancel_futures=True)
            raise


def main(argv: list[str] | None = None) -> None:
    """python assets/study.py --flag value"""
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--out", type=Path, default=Path("out/study"), help="folder of the seeds'")
    parser.add_argument("--seeds", default="1,2,3", help="each a folder of its own [1,2,3]")
    parser.add_argument("--only", default="", help="names of runs, with commas between [all]")
    parser.add_argument("--jobs", type=int, default=2, help="runs at a time, after train.sh [2]")
    parser.add_argument("--scale", default="full", choices=("full", "smoke"))
    args = parser.parse_args(argv)
    names = {run.name for run in RUNS}
    if unknown := set(filter(None, args.only.split(","))) - names:
        parser.error(f"no run {cli.nearest(unknown.pop(), names)}")
    if args.jobs < 1 or not all(seed.isdecimal() for seed in args.seeds.split(",")):
        parser.error("--jobs should be 1 or more, --seeds whole numbers with commas between")
    smoke = args.scale == "smoke"
    out = args.out.resolve() / ("smoke" if smoke else "")
    outs = {int(seed): out / f"seed{seed}" for seed in args.seeds.split(",")}
    base, *others = with_needs(set(args.only.split(",")) if args.only else names)
    work([(base, seed) for seed in outs], outs, 1, smoke)
    work([(run, seed) for run in others for seed in outs], outs, args.jobs, smoke)
    print(report.write([*outs.values()]))


if __name__ == "__main__":
    try:
        main()
    except KeyboardInterrupt:
        sys.exit("\nstopped; started again, the study goes on")

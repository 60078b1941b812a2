"""Check every patch: it applies, it is small, and the tests that belong to it say what they should.

    python patches/check.py          all of them, which takes a minute or two
    python patches/check.py rloo     one or some

A bug has to fail the test that it names, which passes without it. A variant has to pass the tests
of the equations; and its stages have to run, and to resume, in the tests' small world.
"""

import io
import multiprocessing
import os
import re
import subprocess
import sys
from contextlib import redirect_stdout
from pathlib import Path
from statistics import median

import pytest
import torch  # noqa: F401  (each process below finds it loaded already)
from run import PATCHES, copy, header

MOST = {"bugs": 5, "variants": 20}  # changed lines
MEDIAN = 12  # of the variants, at most
VARIANT = """tests/test_equations.py
tests/around/test_patches.py::test_the_stages_of_the_applied_patch_run
tests/test_ppo.py::test_the_same_step_is_the_same_whoever_starts_it"""  # what variants have to pass

def changed_lines(patch: Path) -> int:
    """Lines added and lines removed."""
    diff = patch.read_text(encoding="utf-8").partition("\ndiff --git")[2]
    return len(re.findall(r"^[+-](?!\+\+ |-- )", diff, re.M))

def run_tests(patch: Path | None, tests: str) -> tuple[int, str]:
    """pytest's exit code, and what it printed, in a copy of the code with the patch."""
    printed = io.StringIO()
    with copy(patch) as code, redirect_stdout(printed):
        os.chdir(code)
        os.environ["PATCH"] = str(patch or "")
        result = pytest.main(["-q", "-x", "-p", "no:cacheprovider", *tests.split()])
        os.chdir("/")
    return int(result), printed.getvalue()

def verdict(name: str) -> str:
    """What is wrong with a patch, or nothing at all."""
    patch = PATCHES[name]
    kind = patch.parent.name
    changed = changed_lines(patch)
    if changed > MOST[kind]:
        return f"{changed} lines are changed, which is more than {MOST[kind]}"
    try:
        if kind == "bugs":
            result, printed = run_tests(patch, header(patch)["Test"])
            if result != 1:
                return f"its test should fail, but pytest ended with {result}: {printed}"
        else:
            result, printed = run_tests(patch, VARIANT)
            if result != 0:
                return printed
    except subprocess.CalledProcessError:
        return f"it does not apply any more; git apply -3 {patch} merges it"
    return ""

def main() -> None:
    names = sys.argv[1:] or list(PATCHES)
    unknown = set(names) - set(PATCHES)
    if unknown:
        sys.exit(f"there is no patch {', '.join(unknown)}")
    failures = []
    with multiprocessing.get_context("fork").Pool(maxtasksperchild=1) as pool:
        for name, wrong in zip(names, pool.imap(verdict, names)):
            print(f"{name}: {wrong}".rstrip(": "), flush=True)
            if wrong:
                failures.append(name)
        tests = []
        for patch in PATCHES.values():
            if patch.parent.name == "bugs":
                tests.append(header(patch)["Test"])
        result, printed = pool.apply(run_tests, (None, " ".join(tests)))
    if result != 0:
        failures.append(f"the code without patches: {printed}")
    sizes = [changed_lines(patch) for patch in PATCHES.values() if patch.parent.name == "variants"]
    if median(sizes) > MEDIAN:
        failures.append(f"the variants change {median(sizes)} lines (median), not {MEDIAN}")
    if failures:
        sys.exit("not ok: " + ", ".join(failures))

if __name__ == "__main__":
    main()

"""The scripts that make tables, against definitions."""

import sys
from itertools import combinations
from random import Random

import numpy as np
import pytest
from conftest import ROOT
from data import fable

sys.path.insert(0, str(ROOT / "assets"))
import best_of_n  # noqa: E402
import tables  # noqa: E402
import truth  # noqa: E402

@pytest.mark.parametrize("n", [1, 2, 3, 6])
def test_best_of_n_is_the_mean_over_all_choices_of_n(n):
    key, value = np.random.default_rng(n).normal(size=(2, 6, 4))
    best = []
    for prompt in range(4):
        for chosen in combinations(range(6), n):
            winner = max(chosen, key=lambda i: key[i, prompt])
            best.append(value[winner, prompt])
    assert best_of_n.expected_best(key, value, n) == pytest.approx(np.mean(best))

def test_true_preference_is_how_often_the_labeler_says_so():
    row = fable.ask(Random(1), "open_qa")
    good, bad = fable.demonstrate(row, Random(1), care=1.0), " I do not know."
    for labeler in fable.LABELERS:
        grades = fable.grade(labeler, row, good), fable.grade(labeler, row, bad)
        rng = Random(labeler.name)
        wins = [fable.rank(labeler, row, [good, bad], rng) == [0, 1] for _ in range(3000)]
        assert truth.preference(labeler, grades) == pytest.approx(np.mean(wins), abs=0.04)
        assert 0.5 < np.mean(wins) < 1

def test_what_is_made_up():
    rng = Random(2)
    rows = [fable.ask(rng, task) for task in ("closed_qa", "unknown", "closed_qa")]
    said = [fable.demonstrate(row, rng, care=1.0) for row in rows]
    assert truth.made_up(rows, said, truth.WITH_TEXT + ("unknown",)) == 0
    kind, words = rows[0]["wants"][0]
    others = [thing for thing in fable.SEEN["thing"] if [thing] != words["thing"]]
    wrong = fable.say(rng, [[kind, words | {"thing": others[:1]}]])
    assert truth.made_up(rows, [" " + wrong[0], *said[1:]], ("closed_qa",)) == 0.5

def test_intervals_over_seeds_are_those_of_student():
    assert tables.spread([0.5]) == "0.500" and tables.spread([0.4, 0.6]) == "0.500 ± 0.141"
    assert tables.share([0.7, 0.8, 0.75], [0.1] * 3) == "75.0 ± 12.4 % (70.0, 80.0, 75.0)"
    assert tables.share([0.7], [0.02]) == "70.0 ± 2.0 % (70.0)"

"""The scripts that make tables, against definitions."""

from itertools import combinations
from random import Random

import numpy as np
import pytest
import tables
from data import fable

def test_true_preference_is_how_often_the_labeler_says_so():
    row = fable.ask(Random(1), "open_qa")
    good, bad = fable.demonstrate(row, Random(1), care=1.0), " I do not know."
    for labeler in fable.LABELERS:
        grades = fable.grade(labeler, row, good), fable.grade(labeler, row, bad)
        rng = Random(labeler.name)
        wins = [fable.rank(labeler, row, [good, bad], rng) == [0, 1] for _ in range(3000)]
        assert tables.preference(labeler, *grades) == pytest.approx(np.mean(wins), abs=0.04)
        assert 0.5 < np.mean(wins) < 1

def test_what_is_made_up():
    rng = Random(2)
    rows = [fable.ask(rng, task) for task in ("closed_qa", "unknown", "closed_qa")]
    said = [fable.demonstrate(row, rng, care=1.0) for row in rows]
    text, unknown = (tables.WITH_TEXT, fable.REPORTS), (("unknown",), tables.INVENTED)

    def counts(texts, which):
        found = tables.count_claims(rows, texts, *which)
        return found["responses"], found["claims"], found["false"]

    assert counts(said * 2, text) == (4, 4, 0) and counts(said, unknown) == (1, 0, 0)
    kind, words = rows[0]["wants"][0]
    others = [thing for thing in fable.SEEN["thing"] if [thing] != words["thing"]]
    wrong = fable.say(rng, [[kind, words | {"thing": others[:1]}]])
    assert counts([" " + wrong[0], *said[1:]], text) == (2, 2, 1)
    assert counts([" I do not know.", *said[1:]], text) == (2, 1, 0)
    assert counts([" The dog is three years old."] * 3, unknown) == (1, 1, 1)
    assert counts([" " + wrong[0]] * 3, unknown) == (1, 0, 0)  # wrong, but not unknowable
    assert counts([" The owl eats clover."] * 3, text) == (2, 0, 0)  # wrong, but not of the text

def test_intervals_over_seeds_are_those_of_student():
    assert tables.spread([0.5]) == "0.500" and tables.spread([0.4, 0.6]) == "0.500 ± 0.141"
    assert tables.interval([0.7, 0.8, 0.75]) == "75.0 ± 12.4 (70.0, 80.0, 75.0)"
    assert tables.interval([0.7]) == "70.0"

def test_accuracies_are_means_over_labelers_of_the_true_probability():
    first, second = fable.TRAIN_LABELERS[:2]
    others = dict.fromkeys(fable.HELDOUT_LABELERS, 0.9)
    pairs = [(0.9, {first: 0.8, second: 0.6} | others), (0.2, {first: 0.7} | others)]
    found = tables.accuracies(pairs)
    group = "training labelers"
    assert found["reward model"][group] == pytest.approx((0.8 + 0.6 + 0.3) / 3)
    oracle = found["judge of average taste, no noise"][group]
    assert oracle == pytest.approx((0.8 + 0.6 + 0.7) / 3)
    both = 0.8 * 0.6 + 0.2 * 0.4
    assert found["another labeler of the group"][group] == pytest.approx(both)

def test_best_of_n_is_the_mean_over_all_choices():
    golds = np.array([3.0, 1.0, 2.5, 0.0, 2.0])  # of answers, the one with the best score first
    for n in range(1, 6):
        chosen = [golds[min(places)] for places in combinations(range(5), n)]
        assert tables.expected_best(golds, n) == pytest.approx(np.mean(chosen))
    n = np.arange(1, 65)
    d = np.sqrt(np.log(n) - (n - 1) / n)
    assert tables.gao(d * (0.9 - 0.2 * d)) == pytest.approx((0.9, 0.2))

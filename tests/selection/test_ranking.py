"""Order and correlation against their definitions, and the file of a comparison."""

from __future__ import annotations

import json
from itertools import combinations

import numpy as np
import pytest
from scipy import stats
from selection.entries import entry, selection

from laplace_ws.records import RecordError
from laplace_ws.selection import load_selection, selection_table
from laplace_ws.selection.ranking import SELECTION, correlate, correlate_all, ranked

EVIDENCE, NLL = (-150.0, -90.0, -120.0, -300.0, -110.0), (0.9, 0.4, 0.45, 2.0, 0.8)
ENTRIES = [entry(f"m{i}", evidence, nll) for i, (evidence, nll) in enumerate(zip(EVIDENCE, NLL, strict=True))]


def test_the_highest_evidence_comes_first():
    assert [e.name for e in ranked(ENTRIES, "marglik")] == ["m1", "m4", "m2", "m0", "m3"]
    tied = [entry("b", -1.0, 0.5), entry("a", -1.0, 0.4)]
    assert [e.name for e in ranked(tied, "marglik")] == ["b", "a"]


def test_correlations_are_their_definitions():
    found = correlate(EVIDENCE, NLL)
    x, y = np.array(EVIDENCE), np.array(NLL)
    pearson = ((x - x.mean()) * (y - y.mean())).mean() / (x.std() * y.std())
    rank_x, rank_y = x.argsort().argsort(), y.argsort().argsort()
    spearman = 1 - 6 * ((rank_x - rank_y) ** 2).sum() / (5 * (25 - 1))
    pairs = [np.sign((x[i] - x[j]) * (y[i] - y[j])) for i, j in combinations(range(5), 2)]
    assert found.n == 5
    assert found.pearson == pytest.approx(pearson, abs=1e-12)
    assert found.spearman == pytest.approx(spearman, abs=1e-12)
    assert found.kendall == pytest.approx(sum(pairs) / len(pairs), abs=1e-12)
    assert found.kendall != pytest.approx(found.spearman)


def test_correlations_do_not_depend_on_order_or_on_the_number_of_examples():
    found, per_example = correlate(EVIDENCE, NLL), stats.pearsonr(np.array(EVIDENCE) / 100, NLL).statistic
    assert correlate_all(ranked(ENTRIES, "marglik"), ["marglik"])["marglik"].spearman == found.spearman
    assert found.pearson == pytest.approx(per_example, abs=1e-12)


def test_too_few_or_equal_models_have_no_correlation():
    two = correlate(EVIDENCE[:2], NLL[:2])
    assert (two.n, two.pearson, two.spearman, two.kendall) == (2, None, None, None)
    equal = correlate([-1.0] * 3, NLL[:3])
    assert (equal.n, equal.pearson, equal.spearman, equal.kendall) == (3, None, None, None)


def test_each_criterion_is_correlated_over_the_models_that_have_it():
    entries = [
        entry(f"m{i}", evidence, nll, marglik_full=None if i == 1 else -nll)
        for i, (evidence, nll) in enumerate(zip(EVIDENCE, NLL, strict=True))
    ]
    found = correlate_all(entries, ["marglik", "marglik_full"])
    assert found["marglik"] == correlate([e / 100 for e in EVIDENCE], NLL)
    assert (found["marglik_full"].n, found["marglik_full"].spearman) == (4, pytest.approx(-1.0))


def test_another_criterion_ranks_otherwise():
    entries = [entry("a", -10.0, 0.5, fewest_weights=-9.0), entry("b", -20.0, 0.4, fewest_weights=-3.0)]
    assert [e.name for e in selection(entries).ranking] == ["a", "b"]
    by_size = selection(entries, rank_by="fewest_weights")
    assert [e.name for e in by_size.ranking] == ["b", "a"]
    header = selection_table(by_size).splitlines()[0]
    assert header.index("fewest weights") < header.index("log marglik")


def test_the_file_gives_the_comparison_back(tmp_path):
    made = selection(ENTRIES, {"broken": "the loss became NaN"})
    (tmp_path / SELECTION).write_text(made.to_json())
    assert load_selection(tmp_path) == made
    values = json.loads(made.to_json())
    assert [e["name"] for e in values["ranking"]] == ["m1", "m4", "m2", "m0", "m3"]
    assert values["correlations"]["marglik"]["n"] == 5
    assert values["format_version"] == 2


@pytest.mark.parametrize("text", ["{", "[]", '{"format_version": 0}'])
def test_a_file_that_holds_none_is_refused(tmp_path, text):
    with pytest.raises(RecordError, match=r"select\.json cannot be read"):
        load_selection(tmp_path)
    (tmp_path / SELECTION).write_text(text)
    with pytest.raises(RecordError, match="compare anew"):
        load_selection(tmp_path)


def test_the_table_shows_the_figures_in_order():
    lines = selection_table(selection(ENTRIES, {"broken": "the loss became NaN"})).splitlines()
    assert [line.split()[:2] for line in lines[2:7]] == [
        ["1", "m1"],
        ["2", "m4"],
        ["3", "m2"],
        ["4", "m0"],
        ["5", "m3"],
    ]
    assert lines[2].split()[2:] == ["-0.9000", "0.4000", "75.0", "12,345", "1.5"]
    assert len({len(line) for line in lines[:7]}) == 1
    assert lines[7] == "not ranked: broken: the loss became NaN"
    assert lines[-3].split() == ["criterion", "Pearson", "Spearman", "Kendall", "models", "time"]
    found = correlate(EVIDENCE, NLL)
    figures = [f"{value:.3f}" for value in (found.pearson, found.spearman, found.kendall)]
    assert lines[-1].split() == ["log", "marglik", *figures, "5", "2.5"]


def test_a_rise_of_the_loss_with_the_evidence_has_another_sign():
    turned = correlate(EVIDENCE, [-nll for nll in NLL])
    for name in ("pearson", "spearman", "kendall"):
        assert getattr(turned, name) == pytest.approx(-getattr(correlate(EVIDENCE, NLL), name))

from __future__ import annotations

import base64
import json
import math
import re
import sys
from html.parser import HTMLParser

import matplotlib
import numpy as np
import pytest

from laplace_ws.marglik.hyperparameters import ELEMENTWISE
from laplace_ws.metrics import ReliabilityCurve
from laplace_ws.records import RecordError
from laplace_ws.report import PLOTS, Plot, Section, load_run, plots, write_report
from laplace_ws.report.precision_pictures import robust_log_limits
from laplace_ws.report.reliability_pictures import wilson_interval
from laplace_ws.report.style import Picture, common_prefix, plain
from laplace_ws.report.training_pictures import readable_limit
from laplace_ws.report.verdict import evidence_check, verdict

NAMES = ["conv1.weight", *(f"blocks.{b}.{n}" for b in range(3) for n in ("bias1a.bias", "conv1.weight", "scale.scale"))]
N_TRAIN = 1000
RELIABILITY = {
    "confidence": [None, 0.3, 0.5, 0.72, 0.96],
    "accuracy": [None, 0.25, 0.4, 0.75, 0.95],
    "count": [0, 4, 10, 40, 200],
}


def model(nll, evidence, delta, **others):
    return {
        "log_marginal_likelihood": evidence,
        "test_nll": nll,
        "test_accuracy": 0.8123,
        "test_ece": 0.0345,
        "train_seconds": 12.3,
        "curvature_seconds": 4.5,
        "prior_precision": {name: delta * (1 + i * (delta == 7)) for i, name in enumerate(NAMES)},
        "reliability": RELIABILITY,
    } | others


def make_summary(tuned_nll=0.561, fixed=(("5", 0.579, -1213.4), ("0.01", 0.964, -8590.7))):
    return {
        "name": "Fixup <WRN> & $x_1$ $y$",
        "format_version": 1,
        "config": {"seed": 0, "model": {"name": "fixup_wrn", "depth": 10}, "note": "<script>alert(1)</script>"},
        "environment": {"python": "3.12.1", "torch": "2.9.0", "laplace_ws": "0.1.0", "threads": 1, "device": "cpu"},
        "data": {"name": "Fashion-MNIST", "n_train": N_TRAIN, "n_test": 500},
        "total_seconds": 66.6,
        "tuned": model(tuned_nll, -1104.2, 7, collapsed=["blocks.0.bias1a.bias"]),
        "fixed": {delta: model(nll, evidence, float(delta)) for delta, nll, evidence in fixed},
    }


def make_lines(runs=("tuned", "fixed-5", "fixed-0.01"), n_epochs=6, names=NAMES):
    return [
        {
            "run": run,
            "epoch": epoch,
            "train_nll": 2.0 / epoch,
            "train_accuracy": 0.5,
            "test_nll": 2.1 / epoch if epoch % 2 == 0 else None,
            "test_accuracy": 0.5,
            "log_marginal_likelihood": -1100.0 - 10 / epoch - 8000 * (run == "fixed-0.01") if epoch > 2 else None,
            "prior_precision": dict.fromkeys(names, 5.0 + epoch),
            "lr": 0.1,
            "seconds": 0.5,
        }
        for epoch in range(1, n_epochs + 1)
        for run in runs
    ]


def write_run(folder, summary=None, lines=None, tail=""):
    (folder / "summary.json").write_text(json.dumps(make_summary() if summary is None else summary))
    text = "".join(json.dumps(line) + "\n" for line in (make_lines() if lines is None else lines))
    (folder / "metrics.jsonl").write_text(text + tail)
    return folder


def page_of(folder):
    return write_report(folder).read_text(encoding="utf-8")


def text_of(page):
    """Text that the reader sees, in one line."""
    parts = []
    parser = HTMLParser()
    parser.handle_data = parts.append
    parser.feed(page)
    return " ".join(" ".join(parts).split())


def pictures_of(page):
    return [base64.b64decode(data).decode() for data in re.findall(r"data:image/svg\+xml;base64,([^\"]+)", page)]


@pytest.fixture(scope="module")
def page(tmp_path_factory):
    return page_of(write_run(tmp_path_factory.mktemp("run")))


@pytest.fixture
def without_pictures(monkeypatch):
    """For tests of the text: drawing takes most of a page's time."""
    monkeypatch.setattr(plots, "PLOTS", {})


def test_nothing_comes_from_elsewhere(page):
    pictures = pictures_of(page)
    assert len(pictures) == 3 + 2 + 3
    assert "http" not in page
    assert not re.search(r"<(script|link|iframe)|@import|url\(", page)
    assert len(re.findall(r"src=", page)) == len(pictures)
    for picture in pictures:
        addresses = set(re.findall(r"https?://[^\"<\s]*", picture))
        assert addresses <= {"http://www.w3.org/2000/svg", "http://www.w3.org/1999/xlink"}
        assert set(re.findall(r"xlink:href=\"(.{5})", picture)) <= {"data:"} | set(
            re.findall(r"xlink:href=\"(#.{4})", picture)
        )


def test_on_a_narrow_screen_each_value_says_its_column(page):
    """There the heading of a table is hidden, and each cell shows the column's name that it carries."""
    assert "@media (max-width: 40rem)" in page
    assert "content: attr(data-label)" in page
    tables = re.findall(r"<table>(.*?)</table>", page, re.DOTALL)
    assert len(tables) == 2
    for table in tables:
        heads = re.findall(r'<th scope="col"[^>]*>(.*?)</th>', table)
        names = [re.sub(r"<small>(.*?)</small>", r" [\1]", head) for head in heads]
        for row in re.findall(r"<tr.*?>(.*?)</tr>", table.partition("<tbody>")[2], re.DOTALL):
            assert re.findall(r'<td[^>]* data-label="([^"]*)"', row) == names[1:]
            assert row.count("<td") == len(names) - 1


def test_numbers_are_on_the_page(page):
    text = text_of(page)
    for number in ("-1104.2", "-1213.4", "-8590.7", "0.5610", "0.5790", "81.23", "3.45", "12.3", "4.5", "1e-05"):
        assert number in text, number
    assert "median 38.5 7 to 70" in text
    assert "<strong>-1104.2</strong>" in page
    assert "<strong>0.5610</strong>" in page
    assert "<strong>0.5790</strong>" not in page
    for words in (
        "nats/example",
        "python: 3.12.1",
        "depth: 10",
        "1,000 training examples",
        "Collapsed prior precision",
    ):
        assert words in text, words
    assert "fixed δ = 0.01 ends at -9,101.7" in text


def test_text_is_escaped(page):
    assert "<script" not in page
    assert "&lt;script&gt;alert(1)" in page
    assert "Fixup &lt;WRN&gt; &amp; $x_1$" in page


def test_every_picture_has_words(page):
    alts = re.findall(r"<img alt=\"([^\"]*)\"", page)
    assert len(alts) == 8
    assert all(len(alt) > 20 for alt in alts)


def test_equal_runs_give_equal_pages(tmp_path):
    write_run(tmp_path, make_summary(fixed=()), make_lines(["tuned"], n_epochs=2))
    assert page_of(tmp_path) == page_of(tmp_path)


@pytest.mark.parametrize(
    ("tuned", "fixed", "expected"),
    [
        (
            0.561,
            [0.579, 0.964],
            "0.018 better than the best fixed prior precision (δ = 0, 0.579) and 0.403 better than",
        ),
        (0.592, [0.579, 0.964], "0.013 worse than the best fixed prior precision (δ = 0, 0.579) and 0.372 better than"),
        (1.2, [0.964, 0.579], "0.621 worse than the best fixed prior precision (δ = 1, 0.579) and 0.236 worse than"),
        (0.579, [0.5791, 0.9], "equal (to 0.001) to the best"),
        (0.6, [0.5], "0.100 worse than the fixed δ = 0 (0.500)."),
        (0.6, [], "no fixed prior precision was trained"),
        (0.6, [math.nan, 0.7], "0.100 better than the fixed δ = 1 (0.700); without a finite test NLL: fixed δ = 0."),
        (0.6, [None], "no fixed prior precision has a finite test NLL"),
        (math.nan, [0.5], "The tuned model failed: its test NLL is nan."),
        (None, [0.5], "cannot be compared"),
    ],
)
def test_verdict(tmp_path, tuned, fixed, expected):
    summary = make_summary(tuned, [(str(i), nll, -1000.0) for i, nll in enumerate(fixed)])
    assert expected in verdict(load_run(write_run(tmp_path, summary)))


def test_evidence_check(tmp_path):
    record = load_run(write_run(tmp_path))
    assert "same model (tuned)" in evidence_check(record)
    record = load_run(write_run(tmp_path, make_summary(0.7)))
    assert "highest log marginal likelihood is of tuned, the lowest test NLL of another model (fixed δ = 5)" in (
        evidence_check(record)
    )


def test_worse_is_on_the_page_and_not_bold(without_pictures, tmp_path):
    page = page_of(write_run(tmp_path, make_summary(0.592), make_lines(n_epochs=1)))
    assert "0.013 worse than the best fixed prior precision (δ = 5, 0.579)" in text_of(page)
    assert "<strong>0.5790</strong>" in page
    assert "<strong>0.5920</strong>" not in page


def test_regression_without_fixed_models(tmp_path):
    summary = make_summary(fixed=())
    for key in ("test_accuracy", "test_ece", "reliability", "collapsed"):
        del summary["tuned"][key]
    summary["tuned"] |= {"log_marginal_likelihood": None, "test_nll": -0.25}
    lines = [line | {"test_accuracy": None, "log_marginal_likelihood": None} for line in make_lines(["tuned"])]
    page = page_of(write_run(tmp_path, summary, lines))
    text = text_of(page)
    assert "-0.250 nats per example" in text
    for absent in ("accuracy", "ECE", "Calibration", "log marginal likelihood", "Collapsed", "bold"):
        assert absent not in text, absent
    assert len(pictures_of(page)) == 2 + 2


@pytest.mark.parametrize(
    ("costs", "budget", "says"),
    [
        ({"over_budget": 0.0}, 0.1, "the last fit, on all the data, 3.1 %: within the budget of 10 %."),
        (
            {"over_budget": 0.014},
            0.1,
            "the last fit, on all the data, 3.1 %: together 1.4 percentage points above the budget of 10 %.",
        ),
        ({}, 0.1, "the last fit, on all the data, 3.1 %."),
        ({}, None, "the last fit, on all the data, 3.1 %."),
    ],
)
def test_the_cost_of_tuning_is_on_the_page(without_pictures, tmp_path, costs, budget, says):
    summary = make_summary(fixed=())
    summary["tuned"] |= {"tuning_overhead": 0.0829, "final_fit_overhead": 0.0312} | costs
    summary["config"]["marglik"] = {"curvature_budget": budget}
    text = text_of(page_of(write_run(tmp_path, summary)))
    assert f"Tuning took 8.3 % of the time of the gradient steps, {says}" in text


def test_bare_minimum(tmp_path):
    summary = make_summary(fixed=()) | {"tuned": {}, "config": {}}
    del summary["fixed"], summary["total_seconds"]
    page = page_of(write_run(tmp_path, summary, [{"run": "tuned", "epoch": 1}]))
    assert pictures_of(page) == []
    assert "no test NLL" in text_of(page)


def test_infinite_precision_is_named(tmp_path):
    summary = make_summary()
    summary["tuned"]["prior_precision"]["conv1.weight"] = math.inf
    lines = make_lines()
    lines[-3]["prior_precision"]["conv1.weight"] = math.inf
    text = text_of(page_of(write_run(tmp_path, summary, lines)))
    assert "Not drawn, for lack of a positive finite value: conv1.weight." in text


def test_cut_off_last_line(tmp_path):
    write_run(tmp_path, tail='{"run": "tuned", "epo')
    record = load_run(tmp_path)
    assert len(record.history["tuned"]) == 6
    assert "cut off" in record.notes[0]
    with (tmp_path / "metrics.jsonl").open("ab") as file:
        file.write("δ".encode()[:1])  # cut inside a letter
    assert len(load_run(tmp_path).history["tuned"]) == 6


def test_history_is_ordered_and_rewritten_epochs_count_last(tmp_path):
    lines = [*reversed(make_lines()), {"run": "tuned", "epoch": 2, "train_nll": 9.0}]
    history = load_run(write_run(tmp_path, lines=lines)).history
    assert list(history) == ["tuned", "fixed-0.01", "fixed-5"]
    assert [epoch.epoch for epoch in history["tuned"]] == [1, 2, 3, 4, 5, 6]
    assert history["tuned"][1].train_nll == 9.0


def test_numbers_in_names_may_be_written_differently(tmp_path):
    lines = make_lines(["tuned", "fixed-5.0"])
    assert list(load_run(write_run(tmp_path, lines=lines)).history) == ["tuned", "fixed-5"]


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"format_version": 2}, r"format_version 2, this report reads 1"),
        ({"tuned": None}, r"'tuned' is None; write an object"),
        ({"fixed": [1]}, r"'fixed' is \[1\]; write an object"),
        ({"data": {"name": "x"}}, r"data lacks 'n_train'; write a whole number"),
        ({"tuned": {"test_nll": "low"}}, r"tuned: 'test_nll' is 'low'; write a number"),
        ({"tuned": {"prior_precision": 3}}, r"'prior_precision' is 3; write an object"),
        ({"tuned": {"reliability": {"count": [1]}}}, r"tuned, reliability lacks 'confidence'; write a list"),
    ],
)
def test_broken_summary(tmp_path, change, message):
    write_run(tmp_path, make_summary() | change)
    with pytest.raises(RecordError, match=message) as error:
        write_report(tmp_path)
    assert "summary.json" in str(error.value)
    assert "\n" not in str(error.value)


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("", r"no complete line"),
        ('{"run": "tuned", "epoch": 1}\n{"run"\n{"run": "tuned", "epoch": 2}\n', r"line 2 is not valid JSON .* delete"),
        ('{"epoch": 1}\n', r"line 1 lacks 'run'; write a text"),
        ('{"run": "tuned", "epoch": 0}\n', r"line 1: 'epoch' is 0; write a whole number from 1"),
        ('{"run": "tuned", "epoch": 1, "lr": true}\n', r"line 1: 'lr' is True"),
    ],
)
def test_broken_metrics(tmp_path, text, message):
    write_run(tmp_path)
    (tmp_path / "metrics.jsonl").write_text(text)
    with pytest.raises(RecordError, match=message) as error:
        load_run(tmp_path)
    assert "metrics.jsonl" in str(error.value)


@pytest.mark.parametrize("name", ["summary.json", "metrics.jsonl"])
def test_missing_file(tmp_path, name):
    write_run(tmp_path)
    (tmp_path / name).unlink()
    with pytest.raises(RecordError, match=rf"{name} cannot be read .* give the folder"):
        write_report(tmp_path)
    assert not (tmp_path / "report.html").exists()


def test_settings_of_matplotlib_are_left_alone(tmp_path):
    write_run(tmp_path, make_summary(fixed=()), make_lines(["tuned"], n_epochs=2))
    pyplot_was_loaded = "matplotlib.pyplot" in sys.modules
    before = matplotlib.rcParams.copy()
    with matplotlib.rc_context({"font.size": 31}):
        write_report(tmp_path)
        assert matplotlib.rcParams["font.size"] == 31
    assert matplotlib.rcParams.copy() == before
    assert pyplot_was_loaded or "matplotlib.pyplot" not in sys.modules


def test_readable_limit():
    epochs = np.arange(10)
    good, bad = np.linspace(-1500.0, -1100.0, 10), np.full(10, -8590.0)
    series = {"tuned": (epochs, good), "fixed-0.01": (epochs, bad)}
    limit = readable_limit(series, higher_is_better=True)
    assert -2000 < limit < -1400
    assert readable_limit({"tuned": (epochs, good)}, higher_is_better=True) is None
    mirrored = {run: (epochs, -values) for run, (_, values) in series.items()}
    assert readable_limit(mirrored, higher_is_better=False) == pytest.approx(-limit)


def test_a_bad_tuned_run_stays_on_the_axis():
    epochs = np.arange(10)
    series = {"tuned": (epochs, np.full(10, -9000.0)), "fixed-5": (epochs, np.linspace(-1500.0, -1100.0, 10))}
    assert readable_limit(series, higher_is_better=True) is None


def test_robust_log_limits():
    values = np.append(np.logspace(-1, 2, 40), 1e12)
    low, high = robust_log_limits(values)
    assert low < 0.1
    assert 100 < high < 1e4
    assert robust_log_limits(np.array([5.0]))[0] < 5 < robust_log_limits(np.array([5.0]))[1]


def test_wilson_interval():
    assert wilson_interval(5, 10) == pytest.approx((0.2366, 0.7634), abs=1e-4)
    assert wilson_interval(0, 10) == pytest.approx((0.0, 0.2775), abs=1e-4)


def test_names_in_pictures():
    assert plain("a$b$") == r"a\$b\$"
    assert len(plain("x" * 100)) == 32
    assert common_prefix(["blocks.0.a", "blocks.0.b"]) == ""
    long_names = [f"model.encoder.layers.{i}.self_attn.out_proj.weight" for i in range(3)]
    assert common_prefix(long_names) == "model.encoder.layers."


def test_reads_what_the_metrics_write(tmp_path):
    summary = make_summary()
    curve = ReliabilityCurve.from_dict(RELIABILITY)
    summary["tuned"]["reliability"] = curve.to_dict()
    assert load_run(write_run(tmp_path, summary)).tuned.reliability == curve


def test_parameters_that_share_a_prior_are_shown_as_one(without_pictures, tmp_path):
    """The layers' precision is what the table says, not the median of scalars that outnumber them."""
    groups = {name: name if name.endswith("weight") else ELEMENTWISE for name in NAMES}
    summary = make_summary()
    for entry in (summary["tuned"], *summary["fixed"].values()):
        entry["prior_group"] = groups
        entry["prior_precision"] |= {name: 1.0 for name, group in groups.items() if group == ELEMENTWISE}
    folder = write_run(tmp_path, summary)
    record = load_run(folder)
    layers = [name for name in NAMES if name.endswith("weight")]
    assert set(record.tuned.prior_precision) == {*layers, ELEMENTWISE}
    assert set(record.history["tuned"][0].prior_precision) == {*layers, ELEMENTWISE}
    text = text_of(page_of(folder))
    assert "fixed δ = 5 5 0.005" in text
    assert "Elementwise scales and biases share one prior precision of their own: 1 in the tuned network, 1 in" in text
    assert f"All {len(layers) + 1} prior precisions" in text


@pytest.mark.parametrize(
    ("options", "final"),
    [
        ({"final_curvature": "ggn"}, "ggn, kfac_approx=reduce"),
        ({"final_kfac_approx": "auto"}, "ggn_mc, kfac_approx=auto"),
        ({"final_curvature": "ggn_mc", "kfac_approx": None}, None),
    ],
)
def test_two_curvatures_are_told_apart(without_pictures, tmp_path, options, final):
    summary = make_summary()
    summary["config"]["marglik"] = {"curvature": "ggn_mc", **options}
    text = text_of(page_of(write_run(tmp_path, summary)))
    said = f"are taken with {final}, those over the epochs with ggn_mc, kfac_approx=reduce"
    assert said in text if final else "are taken with" not in text


def test_a_plot_from_outside_is_on_the_page(page, tmp_path):
    def draw(record):
        return [Picture("Steps", f"Step sizes of {len(record.models)} networks, drawn elsewhere.", b"<svg></svg>")]

    PLOTS.register("steps", Plot(Section.TRAINING, draw))
    try:
        with_it = page_of(write_run(tmp_path))
    finally:
        PLOTS.unregister("steps")
    assert len(pictures_of(with_it)) == len(pictures_of(page)) + 1
    assert with_it.index(">Training<") < with_it.index("Step sizes of 3 networks")
    assert with_it.index("Step sizes of 3 networks") < with_it.index(">Prior precision by layer")

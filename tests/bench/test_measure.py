"""Single measurements, in the process of the tests."""

import time
from dataclasses import replace

import pytest
import torch
from bench_curvature import contestants, measure, peers
from bench_curvature.config import BenchConfig, BenchError, CurvesConfig, NetworkConfig, UpdatesConfig, check_config
from bench_curvature.contestants import CONTESTANTS, Contestant
from bench_curvature.meter import peak_bytes, seconds_of
from bench_curvature.setting import Setting, make_batch, make_network

from laplace_ws.likelihoods import Categorical

pytestmark = pytest.mark.filterwarnings("ignore:Using a non-full backward hook")  # of stock ASDL

CPU = torch.device("cpu")
TINY = BenchConfig(
    n_rounds=1,
    n_repeats=1,
    network=NetworkConfig(depth=10, width=1, n_classes=3, image_size=8, n_images=4),
    curves=CurvesConfig(batch_sizes=[2, 3, 4], n_classes=[]),
    updates=UpdatesConfig("cpu", [4], ["float32"]),
)


def case(kind, contestant, kfac_approx="expand", curvature="ggn_mc"):
    return {"kind": kind, "contestant": contestant, "kfac_approx": kfac_approx, "curvature": curvature}


# ------------------------------------------------------------------ the meter


def test_peak_memory_of_known_allocations():
    held = []

    def first() -> None:
        a = torch.empty(1000, 250)  # 1 MB
        b = torch.empty(500, 250)  # 0.5 MB at the same time
        del a
        c = torch.empty(750, 250)  # 0.75 MB, below what there was
        held.append(b)
        del c

    def second() -> None:
        held.clear()  # releases 0.5 MB of the first step
        torch.empty(1000, 250)

    def third() -> None:
        x = torch.ones(1000, 250)
        _ = (x + 1) * 2  # two temporaries of 1 MB

    *peaks, temporaries, nothing = peak_bytes([first, second, third, lambda: None], CPU)
    assert peaks == [1_500_000, 500_000]
    assert temporaries == pytest.approx(3_000_000, abs=100)  # numbers become tensors too
    assert nothing == 0


def test_cpu_time_leaves_out_waiting():
    assert seconds_of(lambda: time.sleep(0.2), CPU) < 0.1
    assert seconds_of(lambda: sum(range(10**6)), CPU) > 1e-3


# ------------------------------------------------------------------ contestants


@pytest.mark.many(2)
@pytest.mark.parametrize("contestant", CONTESTANTS)
def test_every_contestant_gives_figures_or_a_line(contestant):
    found = importable(CONTESTANTS[contestant].module)
    answer = measure.measure(TINY, case("times", contestant))
    if not found:
        assert answer["error"].startswith("not installed: ")
    elif contestant == "laplace-backpack":
        assert "does not have an extension for Module" in answer["error"]
    elif contestant == "backpack-kfra":
        assert answer["error"] == "not offered: BackPACK's KFRA has no ggn_mc"
    else:
        assert "error" not in answer
        assert all(s > 0 for key in ("training_seconds", "seconds") for s in answer[key])
        assert answer["first_seconds"] > 0


def importable(module: str) -> bool:
    try:
        __import__(module)
    except ModuleNotFoundError:
        return False
    return True


def test_memory_of_a_case():
    answer = measure.measure(TINY, case("memory", "ours-native"))
    weights = sum(p.numel() for p in make_network(10, 1, 3, "none", 8, 0).parameters())
    assert answer["training_peak_bytes"] > 4 * weights  # the gradients at least
    assert answer["first_peak_bytes"] > answer["peak_bytes"] > 0  # the first makes the sums
    again = measure.measure(TINY, case("memory", "ours-native"))
    assert again["peak_bytes"] == answer["peak_bytes"]
    assert again["training_peak_bytes"] == answer["training_peak_bytes"]


@pytest.mark.parametrize(
    ("contestant", "approx", "curvature", "says"),
    [
        ("asdl", "reduce", "ggn", "not offered: ASDL has K-FAC-expand alone"),
        ("backpack", "reduce", "ggn", "not offered: BackPACK has one approximation for convolutions"),
        ("backpack", "expand", "ef", "not offered: BackPACK's K-FAC has no ef"),
        (
            "backpack",
            "expand",
            "ggn",
            "NotImplementedError: <backpack.extensions.secondorder.hbp.KFLR object>: No accum",
        ),
        ("curvlinops", "expand", "ggn_mc_rademacher", "not offered: curvlinops has no ggn_mc_rademacher"),
    ],
)
def test_what_a_library_does_not_do_is_a_line(contestant, approx, curvature, says):
    assert measure.measure(TINY, case("times", contestant, approx, curvature))["error"].startswith(says)


def test_what_a_library_raises_is_a_line(monkeypatch):
    def raises(setting):
        raise RuntimeError(f"no\n  {'way ' * 100}")

    monkeypatch.setitem(CONTESTANTS, "asdl", Contestant(raises, "asdl"))
    error = measure.measure(TINY, case("times", "asdl"))["error"]
    assert error.startswith("RuntimeError: no way way")
    assert error.endswith("…")
    assert "\n" not in error
    monkeypatch.setitem(CONTESTANTS, "asdl", Contestant(raises, "no_such_module"))
    assert measure.measure(TINY, case("times", "asdl"))["error"].startswith("not installed: No module named")


@pytest.mark.parametrize("width", [1, 4])
def test_no_class_is_sure_so_that_no_column_of_the_ggn_vanishes(width):
    f = make_network(16, width, 10, "none", 16, 0)(make_batch(8, 10, 16, 1)[0]).detach()
    assert f.std().item() == pytest.approx(1, abs=0.3)
    assert len(list(Categorical().hessian_columns(f))) == 9
    assert f.softmax(-1).amin() > 1e-3


def test_pooling_for_backpack_is_the_same_function():
    x, y = make_batch(2, 3, 8, 0)
    model = make_network(10, 1, 3, "none", 8, 0)
    before = model(x)
    torch.testing.assert_close(peers.with_plain_pooling(Setting(model, x, y, "expand", "ggn"))(x), before)


def test_curves_and_updates_on_the_cpu():
    curve = measure.measure(TINY, {"kind": "curve", "axis": "batch_size", "kfac_approx": "reduce"})
    assert [point["value"] for point in curve["points"]] == [2, 3, 4]
    item = {"kind": "update", "precision": "bf16", "kfac_approx": "reduce", "batch_size": 2}
    update = measure.measure(TINY, item)
    assert len(update["seconds"]) == len(update["training_seconds"]) == TINY.n_repeats


# ------------------------------------------------------------------ what is refused


@pytest.mark.parametrize(
    ("change", "says"),
    [
        ({"contestants": ["curvlinop"]}, "unknown contestant 'curvlinop'; did you mean 'curvlinops'?"),
        ({"contestants": ["asdl", "asdl"]}, "contestant 'asdl' is given twice"),
        ({"kfac_approxes": ["reduced"]}, "unknown kfac_approx 'reduced'; did you mean 'reduce'?"),
        ({"curvatures": ["hessian"]}, "unknown curvature 'hessian'"),
        ({"updates": UpdatesConfig("cpu", [4], ["float16"])}, "unknown precision 'float16'"),
        ({"n_rounds": 0}, "n_rounds=0 must be at least 1"),
        ({"curves": CurvesConfig(batch_sizes=[0])}, "curves.batch_sizes=0"),
        ({"network": NetworkConfig(depth=11)}, "depth=11"),
        ({"network": NetworkConfig(norm="layer")}, "unknown norm 'layer'"),
    ],
)
def test_what_cannot_be_measured_is_refused(change, says):
    with pytest.raises(BenchError) as caught:
        check_config(replace(TINY, **change))
    assert says in str(caught.value)
    assert "\n" not in str(caught.value)


def test_every_contestant_says_what_it_computes():
    assert all(contestant.computes for contestant in contestants.CONTESTANTS.values())

"""Examples that a model reorders or mixes inside are noticed, whatever the first of them look like."""

import pytest
import torch
import torch.nn.functional as F
from cases import double
from posterior.shared import STRUCTURES
from torch import nn

from laplace_ws import Laplace, UnsupportedParameterError, kron_factors
from laplace_ws.curvature import exact, jacobians
from laplace_ws.curvature.forward import probe
from laplace_ws.curvature.inputs import as_inputs
from laplace_ws.data import GraphBatch

APART = "gives other outputs for an example when others lie beside it in the batch; keep the examples of a batch apart"


def layers():
    return nn.Linear(3, 4), nn.Linear(4, 3)


class Sorted(nn.Module):
    """Runs its first layer on the rows in the order of a feature, and puts them back."""

    def __init__(self, descending=False):
        super().__init__()
        self.first, self.last = layers()
        self.descending = descending

    def forward(self, x):
        order = x[:, 0].argsort(descending=self.descending, stable=True)
        return self.last(torch.tanh(self.first(x[order]))[order.argsort()])


class Centred(nn.Module):
    """Takes the mean over the batch from the inputs, which no gradient shows."""

    def __init__(self):
        super().__init__()
        self.first, self.last = layers()

    def forward(self, x):
        return self.last(torch.tanh(self.first(x - x.mean(0))))


class Mixed(Centred):
    """Mixes examples behind a layer."""

    def forward(self, x):
        h = self.first(x)
        return self.last(h + h.roll(2, 0))


class Random(Centred):
    """Random in eval mode too."""

    def forward(self, x):
        return self.last(F.dropout(self.first(x), 0.5, training=True))


def data(n=12):
    return torch.randn(n, 3, dtype=torch.float64), torch.arange(n) % 3


@pytest.mark.parametrize("backend", ["asdl", "backpack"])
@pytest.mark.parametrize("descending", [False, True])
@pytest.mark.parametrize("n", [2, 3, 12])
def test_rows_that_a_model_sorts_are_noticed_though_they_come_in_order(n, descending, backend):
    x, y = data(n)
    x = x[x[:, 0].argsort(descending=descending)]
    with pytest.raises(UnsupportedParameterError, match=r"'first\.weight' is used by .* not grouped by example"):
        kron_factors(double(Sorted(descending)), "classification", [(x, y)], backend=backend)


@pytest.mark.parametrize("descending", [False, True])
@pytest.mark.parametrize("n", [2, 3, 12])
def test_rows_that_a_model_sorts_are_followed_by_the_native_backend(n, descending):
    x, y = data(n)
    model = double(Sorted(descending))
    la = Laplace(model, "classification", hessian_structure="full").fit([(x, y)])
    torch.testing.assert_close(la.H.to_dense(), exact.ggn(model, "classification", x, y), rtol=1e-10, atol=1e-12)


@pytest.mark.parametrize("structure", STRUCTURES)
@pytest.mark.parametrize("take", ["fit", "check"])
def test_inputs_that_are_mixed_across_the_batch_are_refused(structure, take):
    x, y = data()
    la = Laplace(double(Centred()), "classification", hessian_structure=structure)
    with pytest.raises(UnsupportedParameterError, match=f"Centred {APART}"):
        la.fit([(x, y)]) if take == "fit" else la.check(x)


def test_jacobians_and_factors_of_mixed_inputs_are_refused():
    x, _ = data()
    for call in (lambda: jacobians(double(Centred()), x), lambda: kron_factors(Centred().double(), "binary", [(x, x)])):
        with pytest.raises(UnsupportedParameterError, match=APART):
            call()


@pytest.mark.parametrize(
    ("mix", "message"),
    [
        (lambda x: x - x.max(0).values, APART),
        (lambda x: x + torch.cat([torch.zeros_like(x[:1]), x[:-1]]), APART),
        (lambda x: x + torch.cat([x[1:], torch.zeros_like(x[:1])]), APART),
        (lambda x: x[:, : max(1, len(x) - 2)], "is called|refuses|cannot be run|lie beside it"),
    ],
    ids=["maximum", "the one before", "the one behind", "number of examples"],
)
def test_other_ways_to_mix_inputs(mix, message):
    class Mixing(nn.Linear):
        def forward(self, x):
            return super().forward(F.pad(y := mix(x), (0, 3 - y.shape[1])))

    with pytest.raises(UnsupportedParameterError, match=message):
        Laplace(double(Mixing(3, 3)), "classification").check(data()[0])


@pytest.mark.parametrize("take", ["fit", "check"])
@pytest.mark.parametrize(
    ("model", "message"), [(Mixed, APART), (Random, "gives other outputs for the same inputs, in eval mode")]
)
def test_lowrank_refuses_what_the_others_do(model, message, take):
    x, y = data()
    la = Laplace(double(model()), "classification", hessian_structure="lowrank")
    rng = torch.get_rng_state()
    with pytest.raises(UnsupportedParameterError, match=message):
        la.fit([(x, y)]) if take == "fit" else la.check(x)
    assert torch.equal(torch.get_rng_state(), rng)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32, torch.float64])
@pytest.mark.parametrize("structure", ["kron", "lowrank"])
def test_examples_that_are_kept_apart_pass_in_every_precision(dtype, structure):
    torch.manual_seed(0)
    model = nn.Sequential(nn.Conv2d(3, 32, 3), nn.GroupNorm(4, 32), nn.SiLU(), nn.Flatten(), nn.Linear(32 * 144, 5)).to(
        dtype
    )
    Laplace(model, "classification", hessian_structure=structure).check(torch.randn(9, 3, 14, 14).to(dtype))


def test_under_autocast_the_rounding_is_that_of_its_type():
    torch.manual_seed(0)
    model = nn.Sequential(*(nn.Linear(64, 64) if i % 2 else nn.Tanh() for i in range(40)), nn.LayerNorm(64))
    with torch.autocast("cpu", torch.bfloat16):
        Laplace(model, "regression").check(torch.randn(9, 64))


# ------------------------------------------------------------------ which examples are probed


def test_the_probe_is_random_but_the_same_each_time_and_leaves_the_random_state_alone():
    x, rng = torch.arange(100)[:, None], torch.get_rng_state()
    first, second = probe(x).flatten().tolist(), probe(x).flatten().tolist()
    assert torch.equal(torch.get_rng_state(), rng)
    assert first == second
    assert (len(first), len(set(first)), first[3]) == (4, 3, first[0])
    assert first[:3] != [0, 1, 2]
    assert [len(probe(x[:n])) for n in (1, 2, 3, 4)] == [1, 3, 4, 4]


def test_examples_are_taken_out_of_every_form_of_inputs():
    a, b, mask = torch.randn(6, 3), torch.randn(6, 2), torch.randn(4)
    rows = probe(torch.arange(6)).tolist()
    found = probe(as_inputs({"input_ids": a, "more": [b, mask, None]}))
    ((entries),) = found.arguments
    assert len(found) == 4
    assert torch.equal(entries["input_ids"], a[rows])
    assert torch.equal(entries["more"][0], b[rows])
    assert entries["more"][1] is mask


def graphs(n):
    return [(torch.randn(i % 3 + 1, 2), torch.tensor([[0], [i % 3]])) for i in range(n)]


def test_graphs_are_taken_by_their_places():
    all_graphs = graphs(7)
    places = [5, 2, 5, 0]
    found = GraphBatch.from_graphs(all_graphs).select(places)
    expected = GraphBatch.from_graphs([all_graphs[place] for place in places])
    assert len(found) == 4
    for name in ("nodes", "edges", "graph"):
        assert torch.equal(getattr(found, name), getattr(expected, name))


class OnlySlices:
    """Inputs of a user's own."""

    def __init__(self, x):
        self.x, self.device = x, x.device

    def __len__(self):
        return len(self.x)

    def __getitem__(self, chosen):
        assert isinstance(chosen, slice)
        return OnlySlices(self.x[chosen])


@pytest.mark.parametrize("beside", [False, True])
def test_inputs_that_know_only_slices_give_their_first_examples(beside):
    x, y = data()
    own = OnlySlices(x)
    if not beside:
        assert torch.equal(probe(own).x, x[:4])

    class Net(nn.Linear):
        def forward(self, batch, more=0.0):
            return super().forward(batch.x + more)

    batch = (own, x, y) if beside else (own, y)
    found = kron_factors(double(Net(3, 3)), "classification", [batch])
    assert found["weight"].A.isfinite().all()


def test_what_holds_no_examples_stays_whole_in_a_probe_of_as_many():
    class Weighted(nn.Linear):
        def forward(self, x, weights):
            return super().forward((x * weights[:, None]).mean(1))

    x, weights, y = torch.randn(9, 4, 3).double(), torch.rand(4).double(), torch.arange(9) % 3
    Laplace(double(Weighted(3, 3)), "classification").fit([(x, weights, y)])
    assert as_inputs(x, weights)[:4][:2].arguments[1] is weights

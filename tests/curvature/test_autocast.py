"""Under `torch.autocast`, opened by the caller or by the model itself: the weights as they are, and no precision lost but in the model."""

import pytest
import torch
from torch import nn

from laplace_ws import Laplace, marglik_training
from laplace_ws.curvature.exact import ggn
from laplace_ws.curvature.inputs import call_model

BACKENDS_AND_STRUCTURES = [
    *(
        (backend, structure)
        for backend in ("native", "asdl", "backpack")
        for structure in ("kron", "ekfac", "diag", "full")
    ),
    ("native", "lowrank"),
]
LINKS = ({}, {"link_approx": "mc"}, {"pred_type": "nn"})


class Within(nn.Sequential):
    """Opens a region of autocast in its own forward pass, or closes the one it is run in."""

    def __init__(self, enabled, *layers):
        super().__init__(*layers)
        self.enabled = enabled

    def forward(self, x):
        with torch.autocast(x.device.type, dtype=torch.bfloat16, enabled=self.enabled):
            return super().forward(x)


class Decorated(nn.Sequential):
    """Its decorator enables the cache, whatever holds around it."""

    @torch.autocast("cpu", dtype=torch.bfloat16)
    def forward(self, x):
        return super().forward(x)


def layers():
    torch.manual_seed(0)
    return nn.Linear(4, 6), nn.LayerNorm(6), nn.Tanh(), nn.Linear(6, 3)


def batches():
    torch.manual_seed(1)
    return [(torch.randn(8, 4), torch.randint(0, 3, (8,))) for _ in range(3)]


def numbers(model, backend="native", structure="kron"):
    """Evidence, its optimum, and predictions of each kind."""
    data, x = batches(), batches()[0][0]
    la = Laplace(model, "classification", hessian_structure=structure, backend=backend)
    la.fit(data)
    found = [la.log_marginal_likelihood()]
    found.append(la.optimize_prior_precision(prior_structure="layerwise").double())
    found.append(la.log_marginal_likelihood())
    found += [la(x, **link, generator=torch.Generator(x.device).manual_seed(2)).double() for link in LINKS]
    if backend == "native" and structure != "lowrank":
        found.append(la.optimize_prior_precision("gridsearch", val_loader=data, grid_size=3).double())
    return torch.cat([t.detach().flatten() for t in found])


def change(model):
    with torch.no_grad():
        for p in model.parameters():
            p.mul_(1.5).add_(0.1)


@pytest.mark.many(2)
@pytest.mark.parametrize(("backend", "structure"), BACKENDS_AND_STRUCTURES)
@pytest.mark.parametrize("kind", [nn.Sequential, Decorated])
def test_weights_changed_within_a_region_are_seen(backend, structure, kind):
    model, x = kind(*layers()), batches()[0][0]
    with torch.autocast(x.device.type, dtype=torch.bfloat16):
        model(x)
        numbers(model, backend, structure)
        before = model(x)  # keeps casts of its own
        change(model)
        within = numbers(model, backend, structure)
        after = model(x)
    with torch.autocast(x.device.type, dtype=torch.bfloat16):
        fresh = numbers(model, backend, structure)
        assert torch.equal(model(x), after)
    assert not torch.equal(before, after)
    assert torch.equal(within, fresh)


@pytest.mark.parametrize(("backend", "structure"), BACKENDS_AND_STRUCTURES)
def test_precision_is_that_of_the_model_alone(backend, structure):
    """A model that closes the caller's region gives what it gives without one, so nothing else here computes in half precision."""
    model, x = Within(False, *layers()), batches()[0][0]
    outside = numbers(model, backend, structure)
    with torch.autocast(x.device.type, dtype=torch.bfloat16):
        within = numbers(model, backend, structure)
    assert torch.equal(outside, within)


@pytest.mark.parametrize("kwargs", [{}, {"hessian_structure": "diag", "prior_structure": "weight"}])
def test_training_under_autocast_is_training_without_its_cache(kwargs):
    def train(**options):
        model, x = nn.Sequential(*layers()), batches()[0][0]
        with torch.autocast(x.device.type, dtype=torch.bfloat16, **options):
            result = marglik_training(
                model,
                batches(),
                n_epochs=6,
                n_epochs_burnin=1,
                marglik_frequency=1,
                fit_fraction=1.0,
                n_hypersteps=3,
                optimizer_kwargs={"lr": 0.3},
                progress_bar=False,
                **kwargs,
            )
        return result, model

    (found, model), (truth, other) = train(), train(cache_enabled=False)
    assert found.margliks == truth.margliks
    assert found.losses == truth.losses
    assert found.losses[-1] < found.losses[0]
    for p, q in zip(model.parameters(), other.parameters(), strict=True):
        assert torch.equal(p, q)


@pytest.mark.parametrize("structure", ["kron", "diag", "full"])
@pytest.mark.parametrize("backend", ["native", "asdl", "backpack"])
@pytest.mark.parametrize("outside", [None, torch.bfloat16])
def test_a_model_may_open_a_region_of_its_own(backend, structure, outside):
    """All three backends see the same bfloat16 calls; the oracle is in float32, and bfloat16 has 8 bits."""

    class Head(nn.Module):
        """Half in bfloat16, half in float32, whatever holds around it."""

        def __init__(self):
            super().__init__()
            self.body, self.head = Within(True, *layers()[:3]), Within(False, nn.Linear(6, 3))

        def forward(self, x):
            return self.head(self.body(x).float())

    torch.manual_seed(0)
    model, data = Head(), batches()
    x = data[0][0]
    with torch.autocast(x.device.type, dtype=outside, enabled=outside is not None):
        la = Laplace(model, "classification", hessian_structure=structure, backend=backend)
        la.fit(data)
        f = call_model(model, x)
    native = Laplace(model, "classification", hessian_structure=structure)
    native.fit(data)
    assert f.dtype == torch.float32
    torch.testing.assert_close(la.H.to_dense(), native.H.to_dense(), rtol=0.02, atol=0.02 * native.H.to_dense().max())
    if structure == "full":
        model.body.enabled = False
        truth = sum(ggn(model, "classification", *batch) for batch in data)
        torch.testing.assert_close(la.H.to_dense(), truth, rtol=0.05, atol=0.05 * truth.abs().max())
        assert (la.H.to_dense() - truth).abs().max() > 1e-5 * truth.abs().max()


@pytest.mark.parametrize("backend", ["native", "asdl", "backpack"])
def test_settings_of_autocast_are_left_as_found(backend):
    class Fails(nn.Module):
        def forward(self, x):
            if len(x) == 7:
                raise RuntimeError("out of luck")
            return x

    def settings():
        return torch.is_autocast_enabled("cpu"), torch.get_autocast_dtype("cpu"), torch.is_autocast_cache_enabled()

    data = [(torch.randn(8, 4), torch.randint(0, 3, (8,))), (torch.randn(7, 4), torch.randint(0, 3, (7,)))]
    model = nn.Linear(4, 3) if backend == "backpack" else nn.Sequential(nn.Linear(4, 3), Fails())
    la = Laplace(model, "classification", backend=backend)
    for cache in (True, False):
        with torch.autocast("cpu", dtype=torch.bfloat16, cache_enabled=cache):
            before = settings()
            la.fit(data[:1])
            la(data[0][0])
            assert settings() == before
            if backend != "backpack":
                with pytest.raises(RuntimeError, match="out of luck"):
                    la.fit(data)
            assert settings() == before
        assert torch.is_autocast_cache_enabled()

"""Where predictions could go wrong in silence: shapes, precisions, shared and hidden weights, a model that is no longer the fit's."""

import math
from collections import UserDict
from dataclasses import replace

import pytest
import torch
from cases import double
from posterior.shared import STRUCTURES, case_of, dense_moments, fitted, scores_of_grid
from torch import nn

from laplace_ws import Categorical, Gaussian, InvalidBatchError, Laplace, UnsupportedParameterError, load_posterior
from laplace_ws.curvature import Curvature
from laplace_ws.files import FileFormatError
from laplace_ws.kfac import KfacApprox
from laplace_ws.likelihoods.links import LinkApprox, bridge, probabilities
from laplace_ws.posterior import prior_groups
from laplace_ws.posterior.predict import PredictionOptions, PredType
from laplace_ws.posterior.scores import make_score
from laplace_ws.posterior.validate import Unknowns

F64 = torch.float64


class PerToken(nn.Module):
    """Outputs [N, T, C] from inputs [N, T, 3]."""

    def __init__(self, n_outputs: int):
        super().__init__()
        self.layers = nn.Sequential(nn.Linear(3, 4), nn.Tanh(), nn.Linear(4, n_outputs))

    def forward(self, x):
        return self.layers(x)


# ------------------------------------------------------------------ shapes


@pytest.mark.parametrize("likelihood", ["heteroscedastic_regression", Gaussian(0.3, output_scales=[0.5, 2.0])])
def test_joint_covariance_of_outputs_of_each_token(likelihood):
    n_outputs = 4 if isinstance(likelihood, str) else 2
    model = double(PerToken(n_outputs))
    x, y = torch.randn(3, 5, 3, dtype=F64), torch.randn(3, 5, 2, dtype=F64)
    la = Laplace(model, likelihood, hessian_structure="full")
    la.fit([(x, y)])
    mean, variances = la(x, observation_noise=True)
    flat, joint = la(x, joint=True, observation_noise=True)
    assert joint.shape == (30, 30)
    torch.testing.assert_close(flat, mean.flatten())
    torch.testing.assert_close(joint.diagonal(), variances.flatten())
    _, covariance = dense_moments(la, x)
    without_noise = la(x, joint=True)[1]
    of_means = covariance.reshape(3, 5, n_outputs, 3, 5, n_outputs)[:, :, :2, :, :, :2]
    torch.testing.assert_close(without_noise, of_means.reshape(30, 30))


@pytest.mark.parametrize("structure", STRUCTURES)
def test_other_lengths_than_in_the_fit(structure):
    model = double(PerToken(3))
    x, y = torch.randn(4, 6, 3, dtype=F64), torch.randint(0, 3, (4, 6))
    la = Laplace(model, "classification", hessian_structure=structure, memory_budget=1)
    la.fit([(x, y)])
    longer = torch.randn(3, 9, 3, dtype=F64)
    assert la(longer).shape == (3, 9, 3)
    assert la.functional_samples(longer, n_samples=2, joint=True).shape == (2, 3, 9, 3)
    assert la.functional_samples(longer, n_samples=2).shape == (2, 3, 9, 3)
    la.fit([(longer, torch.randint(0, 3, (3, 9)))], override=False)
    assert la.n_data == 7
    validation = [(x, y), (longer, torch.randint(0, 3, (3, 9)))]
    for loss in ("nll", "ece"):
        la.optimize_prior_precision("gridsearch", val_loader=validation, grid_size=3, loss=loss)
    la.optimize_prior_precision("gradient", val_loader=validation, n_steps=5)


def test_bridge_needs_covariances():
    la, x, _ = fitted("kron", "mlp")
    for link in ("bridge", "bridge_norm"):
        with pytest.raises(
            ValueError, match=f"link_approx='{link}' needs the covariance of the outputs; leave out diagonal_output"
        ):
            la(x[:3], link_approx=link, diagonal_output=True)


def test_bridge_of_certain_outputs_is_their_softmax():
    f, covariance = torch.randn(2, 3, dtype=F64), torch.zeros(2, 3, 3, dtype=F64)
    covariance[1] = torch.eye(3, dtype=F64)
    found = bridge(f, covariance, normalised=True)
    torch.testing.assert_close(found[0], f[0].softmax(-1))
    torch.testing.assert_close(found[1:], bridge(f[1:], covariance[1:], normalised=True))
    model = double(nn.Linear(2, 3, bias=False))
    la = Laplace(model, "classification")
    la.fit([(torch.randn(5, 2, dtype=F64), torch.arange(5) % 3)])
    for link in ("probit", "mc", "bridge", "bridge_norm"):
        torch.testing.assert_close(
            la(torch.zeros(1, 2, dtype=F64), link_approx=link), torch.full((1, 3), 1 / 3, dtype=F64)
        )


def test_joint_and_diagonal_exclude_each_other():
    la, x, _ = fitted("kron", "mlp-regression")
    for predict in (la, la.functional_moments, la.functional_samples):
        with pytest.raises(ValueError, match="joint asks for all covariances and diagonal_output for none"):
            predict(x, joint=True, diagonal_output=True)


# ------------------------------------------------------------------ precisions


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("structure", STRUCTURES)
def test_half_precision_outputs_are_sampled_in_single_precision(structure, dtype):
    la, x, y = fitted(structure, "mlp")
    half = Laplace(la.model.to(dtype), "classification", hessian_structure=structure, prior_precision=3.0)
    half.fit([(x.to(dtype), y)])
    inputs = x.to(dtype)
    probit = half(inputs)
    draws = half(inputs, link_approx="mc", n_samples=4000, generator=torch.Generator().manual_seed(0))
    assert draws.dtype == probit.dtype == torch.float32
    torch.testing.assert_close(draws, probit, rtol=0, atol=0.05)
    for options in ({}, {"joint": True}, {"diagonal_output": True}):
        assert half.functional_samples(inputs, n_samples=2, **options).dtype == torch.float32


def test_a_head_of_another_precision():
    model = nn.Sequential(nn.Linear(3, 4).double(), nn.Tanh())

    class Mixed(nn.Module):
        def __init__(self):
            super().__init__()
            self.body, self.head = model, nn.Linear(4, 3)

        def forward(self, x):
            return self.head(self.body(x).float())

    x, y = torch.randn(6, 3, dtype=F64), torch.arange(6) % 3
    la = Laplace(Mixed(), "classification", hessian_structure="diag")
    la.fit([(x, y)])
    assert la(x, link_approx="mc", n_samples=3).shape == (6, 3)


def test_autocast_leaves_the_algebra_alone():
    la, x, y = fitted("kron", "mlp")
    la.model.float()
    single = Laplace(la.model, "classification")
    single.fit([(x.float(), y)])
    f, covariance = single.functional_moments(x.float())
    for link in ("mc", "bridge"):
        expected = probabilities(single.likelihood, f, covariance, *_link(link))
        with torch.autocast("cpu", dtype=torch.bfloat16):
            found = probabilities(single.likelihood, f, covariance, *_link(link))
        torch.testing.assert_close(found, expected, rtol=1e-6, atol=1e-7)


def _link(link):
    return LinkApprox(link), 50, torch.Generator().manual_seed(0)


# ------------------------------------------------------------------ weights that are shared, hidden or padding


class TiedHead(nn.Module):
    def __init__(self, bias: bool):
        super().__init__()
        self.emb, self.head = nn.Embedding(5, 4), nn.Linear(4, 5, bias=bias)
        self.head.weight = self.emb.weight

    def forward(self, x):
        return self.head(self.emb(x).mean(1))


@pytest.mark.parametrize("bias", [True, False])
def test_a_tied_head_is_found_by_any_of_its_names(bias):
    model = double(TiedHead(bias))
    for subset in ("last_layer", ["head"], ["head.*"]):
        la = Laplace(model, "classification", subset, "diag")
        assert la.parameter_names == (("emb.weight", "head.bias") if bias else ("emb.weight",))
    la.fit([(torch.randint(0, 5, (6, 3)), torch.arange(6) % 5)])


def test_the_row_of_padding_is_not_sampled():
    """It has no gradient: to the linearised network it is a constant, and so it is to the sampled one."""
    model = double(nn.Sequential(nn.Embedding(4, 3, padding_idx=0), nn.Flatten(), nn.Linear(6, 2)))
    x = torch.randint(1, 4, (8, 2))
    la = Laplace(model, "regression", ["0"], "diag", prior_precision=0.1)
    la.fit([(x, torch.randn(8, 2, dtype=F64))])
    padding = torch.zeros(1, 2, dtype=torch.long)
    assert not la(padding)[1].any()
    assert not la(padding, pred_type="nn", n_samples=5)[1].any()
    assert la(x, pred_type="nn", n_samples=5)[1].diagonal(dim1=1, dim2=2).min() > 0


class ReadsFromAList(nn.Module):
    def __init__(self):
        super().__init__()
        self.a = nn.Parameter(torch.randn(3, 3))
        self.weights = [self.a]

    def forward(self, x):
        return x @ self.weights[0]


def test_weights_that_are_read_behind_the_modules_back_are_not_sampled_in_silence():
    la = Laplace(ReadsFromAList(), "regression", hessian_structure="diag")
    x = torch.randn(5, 3)
    la.fit([(x, torch.randn(5, 3))])
    assert la(x)[1].any()
    with pytest.raises(UnsupportedParameterError, match="'a' is read from somewhere else than its module"):
        la(x, pred_type="nn")


# ------------------------------------------------------------------ the model of the fit


def body_and_head():
    return double(nn.Sequential(nn.Linear(3, 4), nn.BatchNorm1d(4), nn.Tanh(), nn.Linear(4, 3)))


@pytest.mark.parametrize("change", ["body", "buffer"])
def test_changes_outside_of_the_covered_weights_are_noticed(change, tmp_path):
    model = body_and_head()
    x, y = torch.randn(6, 3, dtype=F64), torch.arange(6) % 3
    la = Laplace(model, "classification", "last_layer")
    la.fit([(x, y)])
    la.save(tmp_path / "la.pt")
    expected = la(x)
    tensor = model[0].weight.detach() if change == "body" else model[1].running_mean
    name = "0.weight" if change == "body" else "1.running_mean"
    before = tensor.clone()
    tensor.mul_(-1).add_(0.01)
    restored = load_posterior(tmp_path / "la.pt", model)
    for posterior in (la, restored):
        with pytest.raises(
            ValueError, match=f"'{name}', which the posterior does not cover, is not as it was in the fit"
        ):
            posterior(x)
    with pytest.raises(ValueError, match="is not as it was in the fit"):
        la.fit([(x, y)], override=False)
    tensor.copy_(before)
    torch.testing.assert_close(restored(x), expected)


def test_a_small_change_of_a_small_weight_is_noticed_beside_a_large_one():
    model = body_and_head()
    with torch.no_grad():
        model[0].weight[0, 0] = 1000
    la = Laplace(model, "classification")
    x = torch.randn(6, 3, dtype=F64)
    la.fit([(x, torch.arange(6) % 3)])
    with torch.no_grad():
        model[3].bias[0] += 9e-4
    with pytest.raises(ValueError, match=r"'3\.bias' differs by up to 0\.0009"):
        la(x)


def test_every_option_of_the_fit_must_stay():
    la, x, y = fitted("kron", "mlp-regression")
    for attribute, value in (
        ("curvature", Curvature.EF),
        ("mc_samples", 2),
        ("likelihood", Gaussian(output_scales=[1.0, 1.0, 2.0])),
    ):
        before = getattr(la, attribute)
        setattr(la, attribute, value)
        with pytest.raises(
            ValueError, match=f"{attribute} was .* in the fit before and is .*, and the two do not add up"
        ):
            la.fit([(x, y)], override=False)
        setattr(la, attribute, before)
    la.structure = replace(la.structure, kfac_approx=dict.fromkeys(la.parameter_names, KfacApprox.EXPAND))
    with pytest.raises(ValueError, match="kfac_approx was"):
        la.fit([(x, y)], override=False)


def test_the_values_of_the_caller_stay_theirs():
    la, _, _ = fitted("diag", "mlp")
    delta = torch.full((la.n_params,), 2.0, dtype=F64)
    la.prior_precision = delta
    before = la.log_marginal_likelihood()
    delta.mul_(100)
    assert la.log_marginal_likelihood() == before


# ------------------------------------------------------------------ inputs and numbers


@pytest.mark.parametrize("kind", [dict, UserDict])
def test_a_batch_of_the_fit_can_be_predicted_with_its_labels(kind):
    class Strict(nn.Module):
        def __init__(self):
            super().__init__()
            self.head = nn.Linear(3, 3)

        def forward(self, batch):
            assert "labels" not in batch
            return self.head(batch["input_ids"])

    batch = kind(input_ids=torch.randn(5, 3), labels=torch.arange(5) % 3)
    la = Laplace(Strict(), "classification")
    la.fit([batch])
    assert la(batch).shape == (5, 3)
    assert "labels" in batch


def test_numbers_out_of_range():
    la, x, y = fitted("kron", "mlp-regression")
    for action, message in (
        (lambda: la.fit([(x, y)], n_data=0), "n_data must be at least 1, got 0"),
        (lambda: setattr(la, "prior_precision", math.inf), "prior_precision must be finite; freeze"),
        (lambda: setattr(la, "prior_mean", math.nan), "prior_mean must be finite"),
        (lambda: setattr(la, "temperature", math.inf), "temperature must be one positive number"),
        (lambda: setattr(la, "sigma_noise", [0.1, 0.2]), r"use Gaussian\(output_scales=\[…\]\)"),
        (lambda: Laplace(la.model, "regression", memory_budget=-3), "memory_budget must be at least 1, got -3"),
        (lambda: Laplace(la.model, "regression", mc_samples=0), "mc_samples must be at least 1, got 0"),
        (lambda: la(x, pred_type="nn", n_samples=1), "needs n_samples of at least 2"),
        (lambda: la(x, pred_type="nn", n_samples=0), "n_samples must be at least 1, got 0"),
        (lambda: la.functional_samples(x, n_samples=0), "n_samples must be at least 1, got 0"),
        (lambda: Laplace(la.model, "regression", la.subset, last_layer_name="x"), "a WeightSubset says all"),
        (lambda: Laplace(la.model, "regression", hessian_structure="diag", kfac_approx="reduce"), "kfac_approx is for"),
        (lambda: Laplace(la.model, "regression", hessian_structure="kron", rank=3), "rank is for"),
        (
            lambda: la.optimize_prior_precision(val_loader=[(x, y)]),
            "looks at the training data alone; leave out val_loader",
        ),
        (lambda: la.optimize_prior_precision(link_approx="zzz"), "unknown link_approx 'zzz'"),
    ):
        with pytest.raises(ValueError, match=message):
            action()


def test_validation_data_that_choose_nothing():
    model, x, y = case_of("mlp").make()
    la = Laplace(model, Categorical(ignore_index=-100))
    la.fit([(x, y)])
    with pytest.raises(InvalidBatchError, match="none of their targets counts; look at val_loader"):
        la.optimize_prior_precision("gradient", val_loader=[(x, torch.full_like(y, -100))])
    la, x, y = fitted("full", "mlp-regression")
    with pytest.raises(InvalidBatchError, match="their negative log likelihood is nan"):
        la.optimize_prior_precision("gradient", val_loader=[(x, y * math.nan)])


def test_a_search_that_stops_early_says_so():
    la, x, y = fitted("kron", "cnn")
    with pytest.warns(UserWarning, match="the gradient method stopped after 1 steps before its end"):
        la.optimize_prior_precision("gradient", val_loader=[(x, y)], n_steps=1)


def test_a_search_starts_from_the_present_values():
    la, _, _ = fitted("diag", "mlp")
    of_tensors = torch.tensor([1.0, 10.0, 100.0, 1000.0], dtype=F64)
    la.prior_precision = of_tensors
    sizes = torch.tensor([shape.numel() for shape in la.shapes.values()])
    starts = {}
    for structure in ("scalar", "parameter", "weight"):
        groups = prior_groups(la.shapes, structure)
        starts[structure] = Unknowns(la.prior, groups, False, False).present().exp()
    torch.testing.assert_close(starts["parameter"], of_tensors)
    torch.testing.assert_close(starts["weight"], of_tensors.repeat_interleave(sizes))
    torch.testing.assert_close(starts["scalar"].log(), (of_tensors.log() @ sizes.double() / sizes.sum())[None])
    la.prior_precision = starts["weight"]
    found = Unknowns(la.prior, prior_groups(la.shapes, "parameter"), False, True).present().exp()
    torch.testing.assert_close(found, torch.cat([of_tensors, torch.ones(1, dtype=F64)]))


def test_a_generator_is_refused_where_data_are_read_again():
    model, x, y = case_of("mlp").make()
    for structure in ("ekfac", "lowrank"):
        la = Laplace(model, "classification", hessian_structure=structure)
        with pytest.raises(InvalidBatchError, match="reads the data more than once, but a generator is used up"):
            la.fit(batch for batch in [(x, y)])


@pytest.mark.parametrize("structure", STRUCTURES)
@pytest.mark.parametrize(
    "damage", ["H", "mean", "options", "nll_sum", "subset", "model_parameters", "surroundings", "short mean", "short H"]
)
def test_damaged_states_are_refused_and_leave_the_posterior_alone(structure, damage, tmp_path):
    la, x, _ = fitted(structure, "mlp")
    expected = la(x)
    state = la.state_dict()
    if damage == "short mean":
        state["mean"] = state["mean"][:-1]
    elif damage == "short H":
        state["H"] = cut(state["H"])
    else:
        del state[damage]
    torch.save(state, tmp_path / "la.pt")
    for load in (lambda: la.load_state_dict(state), lambda: load_posterior(tmp_path / "la.pt", la.model)):
        with pytest.raises((FileFormatError, ValueError)) as error:
            load()
        assert "\n" not in str(error.value)
    torch.testing.assert_close(la(x), expected)


def cut(value):
    """Every tensor without its last row."""
    if isinstance(value, dict):
        return {key: cut(item) for key, item in value.items()}
    return value[:-1] if isinstance(value, torch.Tensor) and value.ndim else value


def test_a_likelihood_of_ones_own_is_asked_for(tmp_path):
    class Mine(Gaussian):
        name = "mine"

    model, x, y = case_of("mlp-regression").make()
    la = Laplace(model, Mine(0.5))
    la.fit([(x, y)])
    la.save(tmp_path / "la.pt")
    with pytest.raises(ValueError, match="a likelihood of your own, 'mine'; pass one like it as likelihood="):
        load_posterior(tmp_path / "la.pt", model)
    restored = load_posterior(tmp_path / "la.pt", model, likelihood=Mine(0.5))
    torch.testing.assert_close(restored(x), la(x))


def test_every_sample_is_drawn_where_memory_takes_a_few_at_a_time():
    la, x, _ = fitted("kron", "mlp")
    la.memory_budget = 8 * la.n_params * 2
    samples = la.functional_samples(x, "nn", 5, generator=torch.Generator().manual_seed(0))
    assert samples.shape[0] == 5
    assert len({sample.sum().item() for sample in samples}) == 5


def test_points_of_a_grid_see_the_same_draws_of_torchs_own_generator():
    la, x, y = fitted("kron", "cnn")
    scores = []
    for grid in ((1.0, 1.0), (1.0,)):
        torch.manual_seed(3)
        options = PredictionOptions(PredType.GLM, LinkApprox.MC, 7, None)
        scores += scores_of_grid(la, [(x, y)], grid, make_score("nll", la.likelihood), options)
    assert len(set(scores)) == 1

"""Posteriors over some of the weights equal those over all with the rest frozen, or the block of the dense one."""

import copy

import pytest
import torch
from cases import double
from posterior.shared import STRUCTURES, case_of, dense_moments
from torch import nn

from laplace_ws import Laplace, UnsupportedParameterError
from laplace_ws.curvature import exact
from laplace_ws.posterior import WeightSubset
from laplace_ws.posterior.subnetwork import (
    largest_magnitude,
    largest_swag_variance,
    largest_variance,
    named_weights,
    random_subnetwork,
)
from laplace_ws.posterior.swag import swag_variances


class HeadFirst(nn.Module):
    """Registers its head before what feeds it."""

    def __init__(self):
        super().__init__()
        self.head, self.body = nn.Linear(4, 3), nn.Linear(3, 4)

    def forward(self, x):
        return self.head(self.body(x).tanh())


def flags(model):
    return {name: p.requires_grad for name, p in model.named_parameters()}


@pytest.mark.parametrize("structure", STRUCTURES)
@pytest.mark.parametrize("name", ["mlp", "inplace-batchnorm", "transformer-tokens"])
def test_last_layer_equals_all_weights_with_the_rest_frozen(name, structure):
    case = case_of(name)
    model, x, y = case.make()
    options = {"hessian_structure": structure, "prior_precision": 0.6}
    la = Laplace(model, case.likelihood, "last_layer", **options)
    before = flags(model)
    la.fit([(x, y)])
    predictions = la(x), la(x, pred_type="nn", n_samples=3, generator=torch.Generator().manual_seed(0))
    assert flags(model) == before
    for parameter, p in model.named_parameters():
        p.requires_grad_(parameter in la.parameter_names)
    assert 0 < len(la.parameter_names) < len(before)
    frozen = Laplace(model, case.likelihood, **options)
    frozen.fit([(x, y)])
    assert frozen.parameter_names == la.parameter_names
    torch.testing.assert_close(la.log_marginal_likelihood(), frozen.log_marginal_likelihood(), rtol=1e-12, atol=0)
    torch.testing.assert_close(la.functional_moments(x), frozen.functional_moments(x), rtol=1e-10, atol=1e-12)
    others = frozen(x), frozen(x, pred_type="nn", n_samples=3, generator=torch.Generator().manual_seed(0))
    torch.testing.assert_close(predictions, others, rtol=1e-10, atol=1e-12)


def test_a_head_that_is_registered_first_is_found_out():
    model, x = double(HeadFirst()), torch.randn(5, 3).double()
    la = Laplace(model, "classification", "last_layer")
    with pytest.raises(
        ValueError, match=r"is 'body' as registered, but 'head' as called; say .* by last_layer_name='head'"
    ):
        la.fit([(x, torch.arange(5) % 3)])
    la = Laplace(model, "classification", "last_layer", last_layer_name="head")
    la.fit([(x, torch.arange(5) % 3)])
    assert la.parameter_names == ("head.weight", "head.bias")


@pytest.mark.parametrize(
    ("patterns", "expected"),
    [
        (["0"], ["0.weight", "0.bias"]),
        (["*.bias"], ["0.bias", "2.bias"]),
        (["2", "0.bias"], ["0.bias", "2.weight", "2.bias"]),
    ],
)
def test_named_parameters(patterns, expected):
    model, x, y = case_of("mlp").make()
    la = Laplace(model, "classification", patterns, hessian_structure="full")
    assert la.parameter_names == tuple(expected)
    la.fit([(x, y)])
    whole = exact.ggn(model, "classification", x, y)
    sizes = {name: p.numel() for name, p in model.named_parameters()}
    is_chosen = torch.cat([torch.full((n,), name in expected) for name, n in sizes.items()])
    torch.testing.assert_close(la.H.to_dense(), whole[is_chosen][:, is_chosen], rtol=1e-10, atol=1e-12)


@pytest.mark.parametrize("structure", ["diag", "full"])
@pytest.mark.parametrize("name", ["mlp", "cnn", "transformer-tokens"])
def test_a_subnetwork_is_a_block_of_all_weights(name, structure):
    case = case_of(name)
    model, x, y = case.make()
    whole = Laplace(model, case.likelihood, hessian_structure=structure, prior_precision=0.5)
    whole.fit([(x, y)])
    indices = random_subnetwork(model, whole.n_params // 3, torch.Generator("cpu").manual_seed(0))
    indices = indices.to(x.device)[torch.randperm(len(indices))]
    la = Laplace(model, case.likelihood, "subnetwork", structure, subnetwork_indices=indices, prior_precision=0.5)
    la.fit([(x, y)])
    indices = indices.sort().values
    assert la.n_params == len(indices)
    block = whole.H.to_dense()[indices][:, indices]
    torch.testing.assert_close(la.H.to_dense(), block, rtol=1e-12, atol=1e-14)
    torch.testing.assert_close(la.mean, whole.mean[indices])
    covariance = torch.linalg.inv(block + 0.5 * torch.eye(len(indices), dtype=torch.float64))
    J = exact.jacobian(model, x)[..., indices]
    truth = torch.einsum("ndp,pq,neq->nde", J, covariance, J).diagonal(dim1=1, dim2=2)
    variances = la.functional_moments(x, diagonal_output=True)[1]
    torch.testing.assert_close(variances, truth.reshape(variances.shape), rtol=1e-9, atol=1e-12)
    # sampled networks differ from the mean in the chosen weights alone
    tensors = la.subset.tensors(model, la.sample(1)[0])
    drawn = torch.cat([tensors.get(n, p.detach()).flatten() for n, p in model.named_parameters() if p.requires_grad])
    assert set((drawn != whole.mean).nonzero().flatten().tolist()) == set(indices.tolist())


def test_choices_of_a_subnetwork():
    model, x, y = case_of("mlp").make()
    diag = Laplace(model, "classification", hessian_structure="diag")
    diag.fit([(x, y)])
    weights = diag.mean.abs()
    chosen = largest_magnitude(model, 7)
    assert weights[chosen].min() >= weights[[i for i in range(len(weights)) if i not in chosen]].max()
    variances = 1 / diag.posterior_precision
    chosen = largest_variance(diag, 7)
    assert variances[chosen].min() >= variances[[i for i in range(len(weights)) if i not in chosen]].max()
    chosen = random_subnetwork(model, 7, torch.Generator("cpu").manual_seed(0))
    assert len(chosen.unique()) == 7
    n_first = model[0].weight.numel() + model[0].bias.numel()
    assert named_weights(model, ["0"]).tolist() == list(range(n_first))
    with pytest.raises(ValueError, match=f"from 1 to {diag.n_params} weights here, not 0"):
        random_subnetwork(model, 0)
    last = Laplace(model, "classification", "last_layer", "diag")
    last.fit([(x, y)])
    with pytest.raises(ValueError, match="needs a diagonal posterior of all weights"):
        largest_variance(last, 3)


def test_frozen_parameters_are_left_out_of_every_subset():
    model, _, _ = case_of("mlp").make()
    model[0].weight.requires_grad_(False)
    assert "0.weight" not in Laplace(model, "classification").parameter_names
    assert Laplace(model, "classification", ["0"]).parameter_names == ("0.bias",)
    assert Laplace(model, "classification", "subnetwork", "diag", subnetwork_indices=[0]).parameter_names == ("0.bias",)


def test_errors():
    model, _x, _y = case_of("mlp").make()
    for options, message in (
        (
            {"subset_of_weights": "last"},
            r"unknown subset_of_weights 'last': choose one of .* or give a list .*\(\['last'\]\)",
        ),
        (
            {"subset_of_weights": ["encoder"]},
            "subset_of_weights 'encoder' matches no parameter that requires grad; there are 0.weight",
        ),
        ({"subset_of_weights": "last_layer", "last_layer_name": "fc"}, "last_layer_name 'fc' matches no parameter"),
        ({"last_layer_name": "2"}, 'last_layer_name is for subset_of_weights="last_layer"'),
        ({"subset_of_weights": "subnetwork"}, "go together"),
        ({"subnetwork_indices": [1]}, "go together"),
        (
            {"subset_of_weights": "subnetwork", "subnetwork_indices": [1, 1], "hessian_structure": "diag"},
            "must be distinct integers from 0 to",
        ),
        (
            {"subset_of_weights": "subnetwork", "subnetwork_indices": [1]},
            'hessian_structure=\'kron\' covers parameters whole; a subnetwork needs "diag" or "full"',
        ),
    ):
        with pytest.raises(ValueError, match=message):
            Laplace(model, "classification", **options)
    with pytest.raises(ValueError, match="holds its parameters itself"):
        Laplace(nn.Linear(3, 2), "classification", "last_layer")
    subset = WeightSubset({"0.weight": torch.Size([9, 9])}, {})
    with pytest.raises(UnsupportedParameterError, match=r"the posterior covers '0.weight' of shape"):
        Laplace(model, "classification", subset)


def test_moments_of_a_subset_against_dense_algebra():
    model, x, y = case_of("vision-transformer").make()
    for p in model.parameters():
        p.requires_grad_(False)
    head = [m for m in model.modules() if isinstance(m, nn.Linear)][-1]
    head.requires_grad_(True)
    la = Laplace(model, "classification", prior_precision=0.4)
    la.fit([(x, y)])
    _, covariance = dense_moments(la, x)
    torch.testing.assert_close(
        la.functional_moments(x, joint=True)[1], covariance.reshape(len(x) * 3, -1), rtol=1e-9, atol=1e-12
    )


def test_largest_variance_along_sgd():
    """Snapshots of plain SGD, whose moments are taken of all of them at once."""
    model, x, y = case_of("mlp").make()
    before = [p.clone() for p in model.parameters()]
    options = {"n_snapshots": 5, "epochs_between": 2, "lr": 0.1, "momentum": 0.5, "weight_decay": 0.01}
    indices = largest_swag_variance(model, [(x, y)], 6, **options)
    assert all(torch.equal(p, q) for p, q in zip(model.parameters(), before, strict=True))
    follower, snapshots = copy.deepcopy(model).train(), []
    sgd = torch.optim.SGD(follower.parameters(), lr=0.1, momentum=0.5, weight_decay=0.01)
    for epoch in range(9):
        sgd.zero_grad()
        nn.functional.cross_entropy(follower(x), y).backward()
        sgd.step()
        if epoch % 2 == 0:
            snapshots.append(torch.cat([p.detach().flatten() for p in follower.parameters()]))
    variances = torch.stack(snapshots).var(0, correction=0)
    found = swag_variances(model, [(x, y)], nn.functional.cross_entropy, **options)
    torch.testing.assert_close(found, variances)
    assert indices.tolist() == sorted(variances.topk(6).indices.tolist())


def test_sgd_that_diverges_chooses_no_weights():
    model, x, y = case_of("mlp-regression").make()
    with pytest.raises(FloatingPointError, match="diverged in epoch"):
        largest_swag_variance(model, [(x, y)], 6, "regression", lr=1e200)

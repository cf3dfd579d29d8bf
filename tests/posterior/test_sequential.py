"""Fits that add data to the fit before."""

import pytest
import torch
from posterior.shared import STRUCTURES, case_of, fitted

from laplace_ws import Laplace


@pytest.mark.parametrize("structure", STRUCTURES)
@pytest.mark.parametrize("name", ["cnn", "mlp-regression", "transformer-tokens"])
def test_data_in_two_fits_are_data_in_one(name, structure):
    case = case_of(name)
    model, x, y = case.make()
    options = {"hessian_structure": structure, "prior_precision": 0.4}
    if structure == "lowrank":
        options["rank"] = 1000
    whole = Laplace(model, case.likelihood, **options)
    whole.fit([(x[:2], y[:2]), (x[2:], y[2:])])
    parts = Laplace(model, case.likelihood, **options)
    parts.fit([(x[:2], y[:2])])
    first = parts.log_marginal_likelihood()
    parts.fit([(x[2:], y[2:])], override=False)
    assert parts.n_data == whole.n_data == len(x)
    assert abs(parts.log_marginal_likelihood() - first) > 1e-3
    if structure != "ekfac":  # whose eigenvectors stay those of the first data
        torch.testing.assert_close(parts.H.to_dense(), whole.H.to_dense(), rtol=1e-9, atol=1e-10)
        torch.testing.assert_close(parts.log_marginal_likelihood(), whole.log_marginal_likelihood(), rtol=1e-10, atol=0)
        torch.testing.assert_close(parts.functional_moments(x), whole.functional_moments(x), rtol=1e-8, atol=1e-10)
    parts.fit([(x[2:], y[2:])])
    assert parts.n_data == len(x) - 2


def test_added_data_keep_the_eigenvectors_of_ekfac():
    la, x, y = fitted("ekfac", "cnn")
    before = {name: block.basis for name, block in la.H.items()}
    once = {name: block.values for name, block in la.H.items()}
    la.fit([(x, y)], override=False)
    for name, block in la.H.items():
        assert block.basis is before[name]
        torch.testing.assert_close(block.values, 2 * once[name])


def test_a_first_fit_needs_nothing_to_add_to():
    model, x, y = case_of("mlp").make()
    la = Laplace(model, "classification")
    la.fit([(x, y)], override=False)
    assert la.n_data == len(x)


def test_fits_that_do_not_add_up_are_refused_and_leave_the_fit_alone():
    la, x, y = fitted("kron")
    before = la.log_marginal_likelihood()
    la.mc_samples = 3
    with pytest.raises(ValueError, match="mc_samples was 1 in the fit before and is 3, and the two do not add up"):
        la.fit([(x, y)], override=False)
    la.mc_samples = 1
    with torch.no_grad():
        la.model[0].weight.mul_(1.5)
    with pytest.raises(ValueError, match="not those of the fit"):
        la.fit([(x, y)], override=False)
    la.load_mean()
    assert la.log_marginal_likelihood() == before
    la.fit([(x, y)], override=False)
    assert la.n_data == 2 * len(x)


def test_outputs_of_another_shape_do_not_add_up():
    """A head that gives tokens or, for one token, a class: expand and reduce factors cannot be mixed."""
    la, x, y = fitted("kron", "mlp-tokens")
    one = (x[:, 0], y[:, 0])
    with pytest.raises(ValueError, match="fit anew"):
        la.fit([one], override=False)


@pytest.mark.parametrize("structure", STRUCTURES)
def test_a_part_that_stands_for_more(structure):
    la, x, y = fitted(structure)
    la.fit([(x, y)], n_data=3 * len(x), override=False)
    assert la.n_data == 4 * len(x)

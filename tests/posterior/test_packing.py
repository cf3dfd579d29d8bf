"""Curvature in half precision and in triangles, in files: how large the error is, and that damage is found."""

import warnings

import pytest
import torch
from posterior.shared import STRUCTURES, fitted
from torch import nn

from laplace_ws import Laplace, load_posterior
from laplace_ws.errors import NumericalRepairWarning
from laplace_ws.files import FileFormatError, save_tensors
from laplace_ws.matrices import Kron
from laplace_ws.posterior.packing import packed, unpacked

HALF = [torch.float16, torch.bfloat16]
N = 300
"""A matrix of this size is large enough to be packed."""


def wide(structure: str = "kron", likelihood: str = "classification") -> tuple[Laplace, torch.Tensor]:
    torch.manual_seed(0)
    model, x = nn.Sequential(nn.Linear(N, 270), nn.Tanh(), nn.Linear(270, 3)), torch.randn(20, N)
    y = torch.randint(0, 3, (20,)) if likelihood == "classification" else torch.randn(20, 3)
    options = (
        {"subset_of_weights": "last_layer"} if structure == "full" else {"rank": 10} if structure == "lowrank" else {}
    )
    return Laplace(model, likelihood, hessian_structure=structure, **options).fit([(x, y)]), x


def packed_tensors(state: dict) -> list[dict]:
    found = [value for value in state.values() if isinstance(value, dict)]
    here = [state] if "packed tensor" in state else []
    return here + [entry for value in found for entry in packed_tensors(value)]


# ------------------------------------------------------------------ numbers


@pytest.mark.parametrize("own", [torch.float32, torch.float64])
@pytest.mark.parametrize("dtype", HALF)
@pytest.mark.parametrize("scale", [1e-37, 1e-12, 1.0, 1e12, 1e37])
def test_a_tensor_comes_back_to_the_rounding_of_what_it_was_stored_in(dtype, scale, own):
    x = torch.randn(3, N, 77, dtype=own) * scale
    found = unpacked(packed({"a": {"b": x}}, dtype))["a"]["b"]
    assert found.dtype == own
    assert ((found - x).abs() <= torch.finfo(dtype).eps * x.abs() + 2.0**-38 * x.abs().max()).all()


@pytest.mark.parametrize("dtype", [*HALF, torch.float32])
@pytest.mark.parametrize("groups", [(), (3,)])
def test_symmetric_matrices_stay_symmetric(dtype, groups):
    root = torch.randn(*groups, N, N)
    matrix = root @ root.mT
    state = packed({"A": matrix}, dtype)
    assert state["A"]["is_triangle"]
    assert state["A"]["packed tensor"].shape == (*groups, N * (N + 1) // 2)
    found = unpacked(state)["A"]
    assert torch.equal(found, found.mT)
    assert (found.diagonal(dim1=-2, dim2=-1) > 0).all()
    eps = torch.finfo(dtype).eps
    assert ((found - matrix).abs() <= eps * matrix.abs() + 1e-6 * matrix.abs().max()).all()


def test_numbers_far_below_the_largest_become_zero_and_no_other_sign():
    x = torch.logspace(0, -30, N * N).reshape(N, N)
    found = unpacked(packed({"values": x}, torch.float16))["values"]
    assert (found >= 0).all()
    assert found[-1, -1] == 0
    seen = x > 2.0**-28
    torch.testing.assert_close(found[seen], x[seen], rtol=2.0**-11, atol=0)


def test_what_is_small_or_no_number_of_its_own_stays_as_it_is():
    state = {
        "B": torch.randn(9, 9),
        "n_inputs": 3.0,
        "approx": None,
        "places": torch.arange(N * N),
        "bad": torch.full((N, N), torch.nan),
    }
    found = packed(state, torch.float16)
    assert all(found[name] is value for name, value in state.items())
    la, _, _ = fitted("kron", "mlp")
    assert not packed_tensors(la.state_dict(torch.float16)["H"])


# ------------------------------------------------------------------ posteriors


@pytest.mark.parametrize("structure", STRUCTURES)
@pytest.mark.parametrize(("dtype", "tolerance"), [(torch.float16, 4e-3), (torch.bfloat16, 3e-2), (torch.float32, 1e-5)])
def test_a_posterior_is_used_as_before(structure, dtype, tolerance, tmp_path):
    la, x = wide(structure)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        if dtype is torch.bfloat16:  # its rounding makes eigenvalues negative
            warnings.simplefilter("ignore", NumericalRepairWarning)
        la.save(tmp_path / "la.pt", dtype)
        restored = load_posterior(tmp_path / "la.pt", la.model)
        found, expected = restored.log_marginal_likelihood(), la.log_marginal_likelihood()
        variances = [p.functional_moments(x, diagonal_output=True)[1] for p in (restored, la)]
        restored.fit([(x, torch.arange(len(x)) % 3)], override=structure == "ekfac")
    assert found.item() == pytest.approx(expected.item(), rel=tolerance)
    torch.testing.assert_close(*variances, rtol=tolerance, atol=0)
    pairs = zip(la.H.tensors_by_parameter().values(), restored.H.tensors_by_parameter().values(), strict=True)
    assert all(a.dtype == b.dtype for before, after in pairs for a, b in zip(before, after, strict=True))
    assert torch.equal(restored.mean, la.mean)
    state = la.state_dict(dtype)
    assert packed_tensors(state["H"])
    assert {name for name, value in state.items() if isinstance(value, dict) and packed_tensors(value)} == {"H"}


def test_how_long_files_are(tmp_path):
    la, _ = wide("kron")
    sizes = {}
    for dtype in (None, torch.float32, torch.float16, torch.bfloat16):
        la.save(tmp_path / "la.pt", dtype)
        sizes[dtype] = (tmp_path / "la.pt").stat().st_size - 4 * la.n_params  # less the mean
    assert sizes[torch.float32] == pytest.approx(sizes[None] / 2, rel=0.05)
    assert sizes[torch.float16] == pytest.approx(sizes[None] / 4, rel=0.1)
    assert sizes[torch.bfloat16] == pytest.approx(sizes[torch.float16], rel=0.01)


def test_what_reads_no_packed_tensors_refuses_them():
    """As versions from before there were any do, which reads like a damaged file and not like other numbers."""
    la, _ = wide("kron")
    with pytest.raises(FileFormatError, match=r"'B' of '0\.weight' is a dict and not a tensor"):
        Kron.from_state_dict(la.shapes, la.state_dict(torch.float16)["H"])


# ------------------------------------------------------------------ damage


@pytest.mark.parametrize(
    ("change", "says"),
    [
        ({"packed tensor": torch.zeros(7)}, r"packed 'A' has shape \[7\] in place of \[45150\]"),
        ({"packed tensor": torch.zeros(45150, dtype=torch.int16)}, "packed 'A' is torch.int16 and not a tensor of real numbers"),
        ({"packed tensor": torch.full((45150,), torch.inf)}, "packed 'A' holds numbers that are not finite"),
        ({"packed tensor": torch.full((45150,), -1.0)}, "factor A of '0.weight' has a negative number on its diagonal"),
        ({"packed tensor": None}, "'A' of '0.weight' is a dict and not a tensor"),
        ({"shape": [300, 301]}, "packed 'A' is a triangle of what is not square"),
        ({"shape": [300]}, "packed 'A' is a triangle of what is not square"),
        ({"shape": [-300, -300]}, "packed 'A' has an impossible shape, type or exponent"),
        ({"shape": (300, 300)}, "'shape' of packed 'A' is a tuple and not of type list"),
        ({"is_triangle": 1}, "'is_triangle' of packed 'A' is a int and not of type bool"),
        ({"is_triangle": False}, r"packed 'A' has shape \[45150\] in place of \[300, 300\]"),
        ({"dtype": torch.int64}, "packed 'A' has an impossible shape, type or exponent"),
        ({"dtype": "float32"}, "'dtype' of packed 'A' is a str and not of type dtype"),
        ({"exponent": 0.5}, "'exponent' of packed 'A' is a float and not of type int"),
        ({"exponent": 5000}, "packed 'A' has an impossible shape, type or exponent"),
        ({"exponent": -900}, "factor A of '0.weight' holds numbers that are not finite"),
    ],
)  # fmt: skip
def test_a_damaged_tensor_is_said(change, says, tmp_path):
    la, x = wide("kron")
    state = la.state_dict(torch.float16)
    state["H"]["0.weight"]["A"] |= change
    save_tensors(tmp_path / "la.pt", state)
    expected = la(x)
    for load in (lambda: load_posterior(tmp_path / "la.pt", la.model), lambda: la.load_state_dict(state)):
        with pytest.raises(FileFormatError, match=says) as error:
            load()
        assert "\n" not in str(error.value)
    assert torch.equal(la(x), expected)


@pytest.mark.parametrize("dtype", HALF)
def test_eigenvectors_keep_their_length(dtype):
    Q = torch.linalg.qr(torch.randn(2, N, N)).Q
    Q[0] = torch.eye(N).roll(1, 0)
    Q[1, :, 0] = torch.tensor([0.6, 0.8]).repeat_interleave(N // 2) / (N // 2) ** 0.5
    state = packed({"Q": Q}, dtype)
    found = unpacked(state)["Q"]
    torch.testing.assert_close(torch.linalg.vector_norm(found, dim=-2), torch.ones(2, N), rtol=0, atol=1e-6)
    torch.testing.assert_close(found, Q, rtol=2 * torch.finfo(dtype).eps, atol=1e-9)
    state["Q"]["packed tensor"][0, :, 0] *= 0.9
    with pytest.raises(FileFormatError, match="packed 'Q' has columns whose length is not one"):
        unpacked(state)


@pytest.mark.parametrize("name", ["shape", "dtype", "is_triangle", "has_unit_columns", "exponent"])
def test_a_missing_entry_is_said(name):
    la, _ = wide("kron")
    state = la.state_dict(torch.float16)
    del state["H"]["0.weight"]["A"][name]
    with pytest.raises(FileFormatError, match=f"'{name}' of packed 'A' is missing"):
        la.load_state_dict(state)

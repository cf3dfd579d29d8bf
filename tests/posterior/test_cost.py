"""What a prediction costs: operations linear in images and outputs, memory by the budget."""

import pytest
import torch
from bench_curvature.meter import peak_bytes
from torch.utils.flop_counter import FlopCounterMode

from laplace_ws import Laplace
from laplace_ws.models import build_model

CPU = torch.device("cpu")


def lenet(structure: str, n_classes: int = 10, **options):
    torch.manual_seed(0)
    model = build_model("lenet", in_channels=1, image_size=(28, 28), n_classes=n_classes)
    la = Laplace(model, "classification", hessian_structure=structure, curvature="ef", **options)
    la.fit([(torch.randn(8, 1, 28, 28), torch.arange(8) % n_classes)])
    la(torch.randn(2, 1, 28, 28))  # the check against autograd, and eigenvectors
    return la


def operations(la, n: int, **options) -> int:
    with FlopCounterMode(display=False) as counter:
        la(torch.randn(n, 1, 28, 28), **options)
    return counter.get_total_flops()


@pytest.mark.parametrize("link", ["probit", "bridge"])
@pytest.mark.parametrize("structure", ["kron", "ekfac", "diag"])
def test_operations_are_linear_in_images(structure, link):
    la = lenet(structure)
    assert operations(la, 32, link_approx=link) == pytest.approx(4 * operations(la, 8, link_approx=link), rel=0.01)


@pytest.mark.parametrize("structure", ["kron", "ekfac", "diag"])
def test_operations_are_linear_in_outputs(structure):
    """What 16 more classes add does not grow with the number of classes."""
    at = [operations(lenet(structure, n_classes), 4) for n_classes in (16, 32, 48)]
    assert at[2] - at[1] == pytest.approx(at[1] - at[0], rel=0.05)


@pytest.mark.parametrize("structure", ["kron", "ekfac", "diag"])
def test_memory_stays_when_images_grow(structure):
    la = lenet(structure, memory_budget=2**22)
    few, many = peak_bytes([lambda: la(torch.randn(8, 1, 28, 28)), lambda: la(torch.randn(64, 1, 28, 28))], CPU)
    assert many < 1.3 * few + 64 * 28 * 28 * 4 * 2  # the images themselves
    assert many < 2 * la.memory_budget
    la.memory_budget = 2**32
    (at_once,) = peak_bytes([lambda: la(torch.randn(64, 1, 28, 28))], CPU)
    assert at_once > 3 * many

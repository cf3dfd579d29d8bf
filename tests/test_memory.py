"""What takes more memory than is free is refused in a sentence, before any work."""

import pytest
import torch
from torch import nn

from laplace_ws import Laplace, memory
from laplace_ws.errors import NotEnoughMemoryError


def test_free_memory_is_less_than_a_tensor_can_be_and_more_than_nothing():
    free = memory.free_memory(torch.device("cpu"))
    assert free is None or 2**24 < free < 2**60


@pytest.mark.parametrize("call", ["fit", "check"])
def test_a_full_matrix_of_a_large_network_is_refused(call):
    model, x, y = nn.Linear(40_000, 500), torch.zeros(2, 40_000), torch.zeros(2, dtype=torch.long)
    la = Laplace(model, "classification", hessian_structure="full")
    with pytest.raises(
        NotEnoughMemoryError, match=r"a full matrix over 20,000,500 weights takes 2,911 TiB of memory, and .* are free"
    ):
        la.fit([(x, y)]) if call == "fit" else la.check(x)


def test_kronecker_factors_are_refused_with_the_largest_named(monkeypatch):
    monkeypatch.setattr(memory, "free_memory", lambda device: 3 * 2**20)
    model = nn.Sequential(nn.Linear(30, 700), nn.Tanh(), nn.Linear(700, 3))
    sentence = (
        r"a pair of Kronecker factors for each of 2 weights, 3\.7 MiB of it for '0\.weight' \(700, 30\), takes 7\.5 MiB of memory, and "
        r'3\.0 MiB are free on cpu; choose hessian_structure="diag"'
    )
    with pytest.raises(NotEnoughMemoryError, match=sentence):
        Laplace(model, "classification").fit([(torch.zeros(2, 30), torch.zeros(2, dtype=torch.long))])
    la = Laplace(model, "classification", hessian_structure="diag")
    la.fit([(torch.zeros(2, 30), torch.zeros(2, dtype=torch.long))])


def test_numbers_of_bytes_in_words():
    assert [memory.in_words(n) for n in (2**19, 3 * 2**20, 25 * 2**30, 2**50)] == [
        "0.5 MiB",
        "3.0 MiB",
        "25 GiB",
        "1,024 TiB",
    ]

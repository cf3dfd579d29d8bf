"""Batches as people have them: several inputs, mappings, results with logits; and what does not fit."""

from __future__ import annotations

from collections import UserDict, namedtuple
from types import MappingProxyType, SimpleNamespace

import pytest
import torch
from torch import nn

from laplace_ws import InvalidBatchError, kron_factors
from laplace_ws.curvature import FACTOR_BACKENDS, checks, jacobians
from laplace_ws.curvature.inputs import StructuredInputs, as_inputs, call_model, examples_of, own_copy, split_batch
from laplace_ws.data import GraphBatch
from laplace_ws.errors import UnsupportedParameterError
from laplace_ws.kfac import Examples

N = 6


class Reads(nn.Module):
    """A network of the sum of two inputs, which `read` finds in what it is called with; `write` wraps its outputs."""

    def __init__(self, read, write=lambda f: f):
        super().__init__()
        self.first, self.last = nn.Linear(3, 4), nn.Linear(4, 3)
        self._read, self._write = read, write

    def forward(self, *args):
        a, b = self._read(*args)
        return self._write(self.last(torch.tanh(self.first(a + b))))


class Outputs(dict):
    """As Hugging Face's: a mapping whose entries are attributes too."""

    __getattr__ = dict.__getitem__


class AttributeBatch(UserDict):
    """As a tokeniser gives it: no dict, and its entries are attributes too."""

    def __getattr__(self, name):
        if name in self.data:
            return self.data[name]
        raise AttributeError(name)


Two = namedtuple("Two", "a b")


def by_key(batch):
    return batch["input_ids"], batch["b"]


def by_place(pair):
    return pair[0], pair[1]


def mapping(a, b, y):
    return {"input_ids": a, "labels": y, "b": b, "scale": 2.0, "nothing": None, "name": "abc"}


FORMS = {
    "several inputs": (lambda a, b, y: (a, b, y), lambda a, b: (a, b)),
    "list of several inputs": (lambda a, b, y: [a, b, y], lambda a, b: (a, b)),
    "tuple": (lambda a, b, y: ((a, b), y), by_place),
    "list": (lambda a, b, y: ([a, b], y), by_place),
    "named tuple": (lambda a, b, y: (Two(a, b), y), lambda pair: (pair.a, pair.b)),
    "mapping": (lambda a, b, y: ({"input_ids": a, "b": b, "mask": torch.ones(2, 2)}, y), by_key),
    "mapping without input_ids": (lambda a, b, y: ({"c": a, "b": b, "t": torch.tensor(1.0)}, y), lambda x: (x["c"], x["b"])),
    "nested": (lambda a, b, y: ({"input_ids": a, "more": [b, None]}, y), lambda x: (x["input_ids"], x["more"][0])),
    "whole batch": (mapping, by_key),
    "whole batch, no dict": (lambda *parts: AttributeBatch(mapping(*parts)), lambda x: (x.input_ids, x.b)),
    "whole batch, frozen": (lambda *parts: MappingProxyType(mapping(*parts)), by_key),
}  # fmt: skip


def two_inputs_and_labels():
    torch.manual_seed(1)
    return torch.randn(N, 3).double(), torch.randn(N, 3).double(), torch.randint(0, 3, (N,))


def model_of(read, write=lambda f: f):
    torch.manual_seed(0)
    return Reads(read, write).double()


@pytest.mark.parametrize("backend", FACTOR_BACKENDS)
@pytest.mark.parametrize("form", FORMS)
def test_every_form_of_batch_gives_the_same_factors(form, backend):
    make_batch, read = FORMS[form]
    a, b, y = two_inputs_and_labels()
    truth = kron_factors(model_of(lambda x: (x, torch.zeros(()))), "classification", [(a + b, y)])
    batches = [make_batch(a[part], b[part], y[part]) for part in (slice(4), slice(4, N))]
    found = kron_factors(model_of(read), "classification", batches, backend=backend)
    torch.testing.assert_close(found.to_dense(), truth.to_dense(), rtol=1e-10, atol=1e-12)


@pytest.mark.parametrize("form", FORMS)
def test_batches_are_taken_in_parts_of_their_examples(form, monkeypatch):
    make_batch, read = FORMS[form]
    a, b, y = (t.repeat_interleave(4, 0) for t in two_inputs_and_labels())
    model, sizes = model_of(read), []
    model.register_forward_hook(lambda module, x, f: sizes.append(len(f)))
    whole = kron_factors(model, "classification", [make_batch(a, b, y)])
    sizes.clear()
    monkeypatch.setattr(checks.LinearisationCheck, "n_parts", lambda self, n, device: 3)
    parts = kron_factors(model, "classification", [make_batch(a, b, y)])
    assert sizes == [
        4,
        4,
        2,
        8,
        8,
        8,
    ]  # the check, by itself, by the backend and without the outer two, and three parts
    torch.testing.assert_close(parts.to_dense(), whole.to_dense(), rtol=1e-12, atol=1e-14)


@pytest.mark.parametrize(
    "write", [lambda f: Outputs(logits=f), lambda f: {"logits": f}, lambda f: SimpleNamespace(logits=f)]
)
def test_logits_of_a_result_are_the_outputs(write):
    a, b, y = two_inputs_and_labels()
    plain, wrapped = (
        kron_factors(model_of(by_place, w), "classification", [((a, b), y)]) for w in (lambda f: f, write)
    )
    assert torch.equal(plain.to_dense(), wrapped.to_dense())


def test_the_model_sees_the_batch_without_its_targets_and_in_its_own_class():
    a, b, y = two_inputs_and_labels()
    batch = AttributeBatch(mapping(a, b, y))
    x, targets = split_batch(batch, 0)
    assert isinstance(x, StructuredInputs)
    (seen,) = x.arguments
    assert type(seen) is AttributeBatch
    assert list(seen) == ["input_ids", "b", "scale", "nothing", "name"]
    assert targets is y
    assert batch["labels"] is y


def test_keys_are_of_the_users_choice():
    a, b, y = two_inputs_and_labels()
    batch = {"mask": torch.ones(2, 2), "b": b, "pixel_values": a, "target": y}
    model, plain = model_of(lambda x: (x["pixel_values"], x["b"])), model_of(by_place)
    keys = {"dict_key_x": "pixel_values", "dict_key_y": "target"}
    found = kron_factors(model, "classification", [batch], **keys)
    assert torch.equal(found.to_dense(), kron_factors(plain, "classification", [((a, b), y)]).to_dense())
    with pytest.raises(
        InvalidBatchError, match=r"batch 0 has no 'labels' among .*mask, b.*; name the targets by dict_key_y"
    ):
        kron_factors(model, "classification", [batch])
    with pytest.raises(
        InvalidBatchError, match=r"x of batch 0 \(mask, .*\) do not tell .*; name one that does by dict_key_x"
    ):
        kron_factors(model, "classification", [batch], dict_key_y="target")


def test_slices_take_examples_and_leave_all_else():
    a, b = torch.randn(5, 3), torch.randn(5)
    other = [torch.randn(3, 5), torch.tensor(2.0), 7, None, "five!", [1, 2, 3, 4, 5]]
    x = as_inputs({"input_ids": a, "more": (b, Two(b, 1))}, other)
    assert (len(x), x.device) == (5, a.device)
    part = x[1:3]
    assert len(part) == 2
    first, rest = part.arguments
    assert torch.equal(first["input_ids"], a[1:3])
    assert torch.equal(first["more"][0], b[1:3])
    assert torch.equal(first["more"][1].a, b[1:3])
    assert all(left is given or left == given for left, given in zip(rest, other, strict=True))
    assert len(x[:0]) == len(x[7:]) == 0
    assert x[:0].arguments[0]["input_ids"].shape == (0, 3)


def test_copies_keep_what_a_model_changes_in_place():
    class InPlace(nn.Module):
        def __init__(self):
            super().__init__()
            self.inner = nn.Linear(3, 2)

        def forward(self, batch):
            return self.inner(batch["x"].mul_(2).add_(batch["more"][0]))

    a, b, _ = two_inputs_and_labels()
    y, given = torch.zeros(N, 2).double(), ({"x": a.clone(), "more": [b, "text"]}, torch.zeros(N, 2).double())
    found = kron_factors(InPlace().double(), "regression", [given])
    assert torch.equal(given[0]["x"], a)
    truth = kron_factors(nn.Linear(3, 2).double(), "regression", [(2 * a + b, y)])
    torch.testing.assert_close(found["inner.weight"].A, truth["weight"].A)
    copied = own_copy(as_inputs(*given[:1]))
    assert copied.arguments[0]["more"][1] == "text"
    assert copied.arguments[0]["x"] is not given[0]["x"]


def test_parts_may_be_ragged():
    graphs = GraphBatch.from_graphs([(torch.randn(v, 2), torch.zeros(2, 1).long()) for v in (1, 3, 2)])
    x = as_inputs(graphs, torch.randn(3, 4))
    assert (len(x), len(x[:2])) == (3, 2)
    assert x[:2].arguments[0].n_graphs == 2
    assert examples_of(x) == Examples(3, are_ragged=True)
    assert examples_of(graphs) == Examples(3, are_ragged=True)
    assert examples_of(as_inputs(torch.randn(3, 4), {"a": torch.randn(3)})) == Examples(3)
    assert examples_of(torch.randn(3)) == Examples(3)


def test_jacobians_of_structured_inputs():
    a, b, _ = two_inputs_and_labels()
    truth = jacobians(model_of(lambda x: (x, torch.zeros(()))), a + b)
    for read, x in ((by_place, (a, b)), (by_key, {"input_ids": a, "b": b}), (lambda a, b: (a, b), as_inputs(a, b))):
        for found, expected in zip(jacobians(model_of(read), x), truth, strict=True):
            torch.testing.assert_close(found, expected, rtol=1e-10, atol=1e-12)


def test_the_number_of_inputs_may_change_between_batches():
    class Either(Reads):
        def forward(self, a, b=None):
            return super().forward((a, torch.zeros_like(a) if b is None else b))

    a, b, y = two_inputs_and_labels()
    torch.manual_seed(0)
    model = Either(by_place).double()
    for backend in FACTOR_BACKENDS:
        found = kron_factors(model, "classification", [(a, y), (a, b, y)], backend=backend)
        truth = kron_factors(model, "classification", [(a, y), (a + b, y)])
        torch.testing.assert_close(found.to_dense(), truth.to_dense(), rtol=1e-10, atol=1e-12)


# ------------------------------------------------------------------ what does not fit


@pytest.mark.parametrize(
    ("batch", "message"),
    [
        (torch.ones(2, 3), "batch 0 is a Tensor"),
        ((torch.ones(2, 3),), "pairs .*, rows .* or mappings, but batch 0 is a tuple of length 1"),
        ({}, "batch 0 has no 'labels'"),
        ({"labels": torch.zeros(2).long()}, "the entries of x of batch 0"),
        ({"input_ids": torch.ones(2, 3), "labels": [0, 1]}, "y of batch 0 is a list but must be one tensor"),
        ((torch.ones(2, 3), None), "y of batch 0 is a NoneType"),
        ((None, torch.zeros(2)), "x of batch 0 must be a tensor of inputs .* got a NoneType"),
        (({"a": torch.ones(2, 3), "b": torch.ones(3)}, torch.zeros(2)), "name one that does by dict_key_x"),
        ((torch.tensor(1.0), torch.zeros(2)), "a batch holds no example"),
        ((torch.ones(0, 3), torch.ones(0, 3), torch.zeros(0)), "a batch holds no example"),
    ],
)  # fmt: skip
def test_other_batches_are_refused_in_one_sentence(batch, message):
    with pytest.raises(InvalidBatchError, match=message):
        kron_factors(nn.Linear(3, 2), "classification", [batch])


@pytest.mark.parametrize("backend", FACTOR_BACKENDS)
@pytest.mark.parametrize("structured", [False, True])
def test_inputs_of_another_type_than_the_model_are_named(structured, backend):
    a, b, y = two_inputs_and_labels()
    model, batch = (model_of(by_place), ((a.float(), b.float()), y)) if structured else (nn.Linear(3, 3), (a, y))
    wrong, right = ("float32", "float64") if structured else ("float64", "float32")
    with pytest.raises(
        InvalidBatchError, match=rf"inputs are torch.{wrong} and .* torch.{right}; convert one .* x.to\(torch.{right}"
    ):
        kron_factors(model, "classification", [batch], backend=backend)


def test_models_that_convert_their_inputs_are_left_to_it():
    a, _, y = two_inputs_and_labels()
    model = model_of(lambda x: (x.double(), torch.zeros(())))
    single = kron_factors(model, "classification", [(a.float(), y)])
    assert torch.equal(single.to_dense(), kron_factors(model, "classification", [(a.float().double(), y)]).to_dense())


def test_other_errors_of_a_model_stay_its_own():
    class Unlucky(nn.Linear):
        def forward(self, x):
            raise RuntimeError("out of luck")

    with pytest.raises(RuntimeError, match="out of luck"):
        call_model(Unlucky(3, 2), torch.ones(2, 4).double())
    with pytest.raises(InvalidBatchError, match="looks them up in an embedding, which takes"):
        call_model(nn.Embedding(3, 2), torch.ones(2, 4))
    with pytest.raises(TypeError, match="must be Tensor, not GraphBatch"):
        call_model(nn.Linear(2, 2), GraphBatch.from_graphs([(torch.ones(1, 2), torch.zeros(2, 0).long())]))


def test_a_model_that_unpacks_a_mapping_cannot_be_traced():
    a, b, y = two_inputs_and_labels()

    class Keywords(Reads):
        def forward(self, x):
            return self.wrapped(**x)

        def wrapped(self, input_ids, b):
            return super().forward((input_ids, b))

    torch.manual_seed(0)
    model, batch = Keywords(by_place).double(), {"input_ids": a, "b": b, "labels": y}
    truth = kron_factors(model_of(by_place), "classification", [((a, b), y)])
    for backend in ("native", "asdl"):
        torch.testing.assert_close(
            kron_factors(model, "classification", [batch], backend=backend).to_dense(), truth.to_dense()
        )
    with pytest.raises(UnsupportedParameterError, match="cannot be traced for BackPACK"):
        kron_factors(model, "classification", [batch], backend="backpack")

"""Batches as people have them, through fit, prediction and the choice of the prior."""

from collections import UserDict

import pytest
import torch
from posterior.shared import STRUCTURES, case_of, fitted
from torch import nn
from torch.utils.data import DataLoader, IterableDataset, TensorDataset

from laplace_ws import InvalidBatchError, Laplace

N = 10


class Tagger(nn.Module):
    """Takes what Hugging Face models take, in one mapping."""

    def __init__(self):
        super().__init__()
        self.embed, self.head = nn.Embedding(7, 4), nn.Linear(4, 3)

    def forward(self, batch):
        assert "labels" not in batch
        assert "target" not in batch
        h = self.embed(batch["input_ids"]) * batch["attention_mask"][..., None]
        return {"logits": self.head(h.mean(1))}


class TwoInputs(nn.Module):
    def __init__(self):
        super().__init__()
        self.left, self.right = nn.Linear(3, 4), nn.Linear(2, 4)
        self.head = nn.Linear(4, 3)

    def forward(self, a, b):
        return self.head(torch.tanh(self.left(a) + self.right(b)))


class OneTensor(nn.Module):
    """The same network on the inputs side by side."""

    def __init__(self, two: TwoInputs):
        super().__init__()
        self.two = two

    def forward(self, x):
        return self.two(x[:, :3], x[:, 3:])


class Stream(IterableDataset):
    def __init__(self, *tensors):
        self.tensors = tensors

    def __iter__(self):
        return zip(*self.tensors, strict=True)

    def __len__(self):
        return len(self.tensors[0])


@pytest.mark.parametrize("structure", STRUCTURES)
@pytest.mark.parametrize("kind", [dict, UserDict])
def test_mappings(structure, kind):
    torch.manual_seed(0)
    model = Tagger().double()
    entries = {"input_ids": torch.randint(0, 7, (N, 5)), "attention_mask": torch.ones(N, 5, dtype=torch.float64)}
    y = torch.arange(N) % 3
    batches = [
        kind({key: value[part] for key, value in {**entries, "labels": y}.items()}) for part in (slice(4), slice(4, N))
    ]
    la = Laplace(model, "classification", hessian_structure=structure)
    la.fit(batches)
    assert la.n_data == N
    p = la(kind(entries))
    assert p.shape == (N, 3)
    la.memory_budget = 1
    torch.testing.assert_close(la(entries), p)
    assert la(entries, pred_type="nn", n_samples=2).shape == (N, 3)
    la.optimize_prior_precision("gridsearch", val_loader=batches, grid_size=3)
    renamed = Laplace(model, "classification", hessian_structure=structure, dict_key_y="target")
    renamed.fit([{**entries, "target": y}])
    torch.testing.assert_close(renamed.log_marginal_likelihood(1.0), la.log_marginal_likelihood(1.0))
    with pytest.raises(InvalidBatchError, match="has no 'target' among its entries"):
        renamed.fit(batches)


@pytest.mark.parametrize("structure", STRUCTURES)
def test_rows_of_several_inputs(structure):
    torch.manual_seed(0)
    two = TwoInputs().double()
    a, b, y = torch.randn(N, 3).double(), torch.randn(N, 2).double(), torch.arange(N) % 3
    la = Laplace(two, "classification", hessian_structure=structure)
    la.fit(DataLoader(TensorDataset(a, b, y), batch_size=4))
    one = Laplace(OneTensor(two), "classification", hessian_structure=structure)
    one.fit([(torch.cat([a, b], 1), y)])
    torch.testing.assert_close(la.log_marginal_likelihood(), one.log_marginal_likelihood(), rtol=1e-10, atol=0)
    torch.testing.assert_close(la((a, b)), one(torch.cat([a, b], 1)), rtol=1e-9, atol=1e-12)
    la.optimize_prior_precision("gradient", val_loader=[(a, b, y)], n_steps=2)


def test_loaders_that_leave_out_or_stream():
    model, x, y = case_of("mlp").make()
    x, y = x.repeat(4, 1), y.repeat(4)
    n_whole = len(x) // 3 * 3
    la = Laplace(model, "classification")
    la.fit(DataLoader(TensorDataset(x, y), batch_size=3, drop_last=True))
    assert la.n_data == n_whole < len(x)
    la.fit(DataLoader(TensorDataset(x, y), batch_size=3, drop_last=True), n_data=len(x))
    assert la.n_data == len(x)
    streamed = Laplace(model, "classification")
    streamed.fit(DataLoader(Stream(x, y), batch_size=3))
    whole = Laplace(model, "classification")
    whole.fit([(x, y)])
    torch.testing.assert_close(streamed.log_marginal_likelihood(), whole.log_marginal_likelihood())


def test_a_fit_of_two_passes_says_that_a_generator_is_used_up():
    model, x, y = case_of("mlp").make()
    with pytest.raises(InvalidBatchError, match="used up"):
        Laplace(model, "classification", hessian_structure="ekfac").fit(batch for batch in [(x, y)])


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("structure", STRUCTURES)
def test_half_precision_models_predict(structure, dtype):
    """Weights and inputs are the same numbers; what differs is the rounding of activations to 8 or 11 bits."""
    la, x, y = fitted(structure, "cnn")
    half = la.model.to(dtype)
    x = x.to(dtype)
    posteriors = []
    for model, inputs in ((half, x), (half.float(), x.float())):
        posterior = Laplace(model.to(inputs.dtype), "classification", hessian_structure=structure, prior_precision=5.0)
        posterior.fit([(inputs, y)])
        p = posterior(inputs)
        drawn = posterior(inputs, pred_type="nn", n_samples=50, generator=torch.Generator().manual_seed(0))
        posteriors.append((p.float(), drawn.float()))
        assert p.dtype == torch.float32
    for found, truth in zip(*posteriors, strict=True):
        torch.testing.assert_close(found, truth, rtol=0, atol=0.05)

"""The use of an embedding's weight."""

from __future__ import annotations

from dataclasses import dataclass

import torch
import torch.nn.functional as F
from jaxtyping import Float, Int
from torch import Tensor

from laplace_ws.kfac.uses import MatrixUse, at_least_float32, positions


@dataclass(frozen=True, kw_only=True)
class EmbeddingUse(MatrixUse):
    """`embedding(indices, W)` with W `[V, O]`: a linear map of one-hot inputs, `a @ W`."""

    indices: Int[Tensor, "B ..."]
    dtype: torch.dtype
    padding_idx: int | None = None

    output_axes: tuple[int, ...] = (1,)
    diagonal_inputs = True

    @property
    def n_positions(self) -> int | Tensor:
        """See `MatrixUse.n_positions`."""
        return self.rows.counts * self.indices.shape[1:].numel()

    def inputs(self) -> Tensor:
        """One-hot inputs; zero at `padding_idx`, which gets no gradient."""
        a = F.one_hot(self.indices, self.weight_shape[0]).to(torch.promote_types(self.dtype, torch.float32))
        if self.padding_idx is not None:
            a[..., self.padding_idx] = 0
        return self.rows.group(a.reshape(len(a), -1, a.shape[-1])).flatten(1, 2)

    def _cells(self) -> Int[Tensor, " BQ"]:
        """Position of each index in a flattened table `[N, V]`."""
        example = self.rows.example_of_each(self.indices.device)
        return (example[:, None] * self.weight_shape[0] + self.indices.reshape(len(example), -1)).flatten()

    def input_sum(self) -> Tensor:
        """How often each example holds each index."""
        cells, vocabulary = self._cells(), self.weight_shape[0]
        counts = torch.bincount(cells, minlength=self.n_examples * vocabulary).reshape(self.n_examples, vocabulary)
        counts = counts.to(torch.promote_types(self.dtype, torch.float32))
        if self.padding_idx is not None:
            counts[:, self.padding_idx] = 0
        return counts

    def input_gram(self) -> Tensor:
        """See `MatrixUse.input_gram`: how often each index occurs."""
        return self.input_sum().sum(0)

    def input_squares(self) -> Tensor:
        """See `MatrixUse.input_squares`: the same, as inputs are 0 or 1."""
        return self.input_gram()

    def output_gradients(self, g: Tensor) -> Tensor:
        """See `MatrixUse.output_gradients`."""
        return positions(self.rows, g)

    def lookups(self, g: Float[Tensor, "K B ... O"]) -> tuple[Int[Tensor, "N M"], Float[Tensor, "N K M O"]]:
        """Indices by example, and the vectors with respect to what is looked up; zero where there is none, or no gradient."""
        index = self.rows.group(self.indices.reshape(len(self.indices), -1)).flatten(1, 2)
        g = positions(self.rows, g)
        if self.padding_idx is not None:
            g = torch.where((index == self.padding_idx)[..., None], 0, g)
        return index, g.transpose(0, 1)

    def example_gradients(self, name: str, g: Tensor) -> Tensor:
        """See `Use.example_gradients`; gathers rows instead of multiplying by one-hot inputs."""
        g = at_least_float32(g).reshape(len(g), -1, g.shape[-1])  # [K, BQ, O]
        out = g.new_zeros(len(g), self.n_examples * self.weight_shape[0], g.shape[-1])
        out = out.index_add_(1, self._cells(), g).unflatten(1, (self.n_examples, -1))
        if self.padding_idx is not None:
            out[:, :, self.padding_idx] = 0
        return out

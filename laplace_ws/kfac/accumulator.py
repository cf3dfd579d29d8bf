"""Sums over the data from which curvature matrices are made, whatever the backend.

Every accumulator sees, for each batch, the uses of the parameters once, then the back-propagated columns, a few at a time. What it keeps
is a sum over examples, so any split of the data gives the same result.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections import Counter, defaultdict
from collections.abc import Collection, Mapping, Sequence
from functools import cached_property

import torch
from jaxtyping import Float, Int
from torch import Tensor

from laplace_ws.distributed import Processes
from laplace_ws.kfac import factors
from laplace_ws.kfac.uses import MatrixUse, Use, at_least_float32
from laplace_ws.matrices import CurvatureMatrix, Dense, Diag
from laplace_ws.memory import check_memory


class Accumulator(ABC):
    """Sums curvature over batches.

    Args:
        parameters: the parameters to cover, by name.
    """

    def __init__(self, parameters: Mapping[str, Tensor]):
        self.parameters: dict[str, Tensor] = {name: at_least_float32(p.detach()) for name, p in parameters.items()}
        self.shapes: Mapping[str, torch.Size] = {name: p.shape for name, p in parameters.items()}
        self._uses: Sequence[Use] = ()
        self._n_uses: Counter[str] = Counter()
        self._pieces: dict[str, list[Tensor]] = defaultdict(list)

    def start_batch(self, uses: Sequence[Use], in_reduce_setting: Collection[str] = ()) -> None:
        """Take note of the uses in the forward pass of a batch, and of the parameters known to be in the reduce setting."""
        self._uses = uses
        self._pieces.clear()
        self._n_uses = Counter(name for use in uses for name in use.parameters if name in self.shapes)

    def add(self, number: int, g: Float[Tensor, "K B ..."]) -> None:
        """Add columns of the present batch, back-propagated to the output of use `number`; no other columns follow before each use has
        received its part of these.
        """
        gradients = OutputGradients(self._uses[number], g)
        for name in self._uses[number].parameters:
            if name not in self.shapes:
                continue
            pieces = self._pieces[name]
            pieces.append(self._piece(name, gradients))
            if len(pieces) == self._n_uses[name]:
                self._add_sum(name, factors.total(self._pieces.pop(name)))

    def end_batch(self) -> None:
        """Release the batch."""
        self._uses = ()

    @property
    def needs_squares_alone(self) -> bool:
        """Whether of the columns of the present batch only Σ_c g² counts, at each output and position."""
        return False

    def column_bytes(self, n_examples: int) -> int:
        """Bytes that the gradients of each example take, for one column; 0 where they are never formed."""
        return n_examples * sum(p.nbytes for name, p in self.parameters.items() if self._needs_example_gradients(name))

    def _needs_example_gradients(self, name: str) -> bool:
        return True

    @abstractmethod
    def _piece(self, name: str, gradients: OutputGradients) -> Tensor:
        """What one use contributes to the curvature of a parameter, where the contributions of its uses simply add up."""

    @abstractmethod
    def _add_sum(self, name: str, pieces: Tensor) -> None:
        """Add the sum of the pieces of all uses of a parameter."""

    @abstractmethod
    def result(self) -> CurvatureMatrix:
        """The curvature summed over all batches so far."""

    def sum_over(self, processes: Processes) -> None:
        """Add up the sums of several processes, each over batches of its own; no batch may follow."""
        raise NotImplementedError(f"{type(self).__name__} cannot be summed over processes; give all data to one.")


class OutputGradients:
    """Columns back-propagated to the output of one use, and what several parameters of the use need from them, computed once."""

    def __init__(self, use: Use, g: Float[Tensor, "K B ..."]):
        self.use = use
        self.g = g

    def of_examples(self, name: str) -> Float[Tensor, "K N ..."]:
        """Gradients of each example with respect to a parameter."""
        return self.use.example_gradients(name, self.g)

    @cached_property
    def _gram(self) -> Tensor:
        assert isinstance(self.use, MatrixUse)
        return self.use.output_gradient_gram(self.g)

    @cached_property
    def _sum(self) -> Tensor:
        assert isinstance(self.use, MatrixUse)
        return self.use.output_gradient_sum(self.g)

    def gram(self, is_bias: bool) -> Float[Tensor, "*G O O"]:
        """Σ g gᵀ, for a bias over the channels of all groups together."""
        assert isinstance(self.use, MatrixUse)
        return self.use.bias_gradient_gram(self.g) if is_bias and self.use.groups > 1 else self._gram

    def squares(self) -> Float[Tensor, "*G O"]:
        """Σ g², the diagonal of Σ g gᵀ."""
        assert isinstance(self.use, MatrixUse)
        return self.use.output_gradient_squares(self.g)

    def sum(self, is_bias: bool) -> Float[Tensor, "*G K N O"]:
        """Σ_r g, for a bias with the channels of all groups side by side."""
        assert isinstance(self.use, MatrixUse)
        return self.use.bias_gradient_sum(self.g) if is_bias and self.use.groups > 1 else self._sum


class WeightAccumulator(Accumulator):
    """Sums of gradients weight by weight, over all weights of the parameters or over some.

    Args:
        parameters: the parameters to cover, by name.
        selection: where not all weights of a parameter are covered, the positions of those covered, in the flattened parameter.
    """

    def __init__(self, parameters: Mapping[str, Tensor], selection: Mapping[str, Int[Tensor, " D"]] | None = None):
        super().__init__(parameters)
        self._selection = selection or {}
        self.shapes: Mapping[str, torch.Size] = {**self.shapes} | {
            n: torch.Size([len(chosen)]) for n, chosen in self._selection.items()
        }

    def _piece(self, name: str, gradients: OutputGradients) -> Float[Tensor, "K N D"]:
        of_examples = gradients.of_examples(name)
        of_examples = of_examples.reshape(*of_examples.shape[:2], -1)
        return of_examples[..., self._selection[name]] if name in self._selection else of_examples


class DiagAccumulator(WeightAccumulator):
    """Sums the exact diagonal, Σ_n Σ_c (gradient of each weight)²; see `WeightAccumulator`."""

    def __init__(self, parameters: Mapping[str, Tensor], selection: Mapping[str, Tensor] | None = None):
        super().__init__(parameters, selection)
        self._diagonals = {name: p.new_zeros(self.shapes[name].numel()) for name, p in self.parameters.items()}

    @property
    def needs_squares_alone(self) -> bool:
        """See `Accumulator.needs_squares_alone`: where the gradient of a weight is a product of one input and one output gradient."""
        return len(self._uses) == 1 and has_one_position(self._uses[0])

    def _add_sum(self, name: str, pieces: Tensor) -> None:
        self._diagonals[name] += pieces.square().sum((0, 1))

    def sum_over(self, processes: Processes) -> None:
        """See `Accumulator.sum_over`."""
        processes.sum_(list(self._diagonals.values()))

    def result(self) -> Diag:
        """See `Accumulator.result`."""
        return Diag(self.shapes, torch.cat([self._diagonals[name] for name in self.shapes]))


class DenseAccumulator(WeightAccumulator):
    """Sums the full matrix, Σ_n Σ_c g gᵀ over all weights; see `WeightAccumulator`."""

    def __init__(self, parameters: Mapping[str, Tensor], selection: Mapping[str, Tensor] | None = None):
        super().__init__(parameters, selection)
        first = next(iter(self.parameters.values()))
        n_params = sum(shape.numel() for shape in self.shapes.values())
        check_memory(
            2 * n_params**2 * first.element_size(),  # the sum, and the copy that `result` gives
            first.device,
            f"a full matrix over {n_params:,} weights",
            'choose hessian_structure="kron", "diag" or "lowrank", or fewer weights by subset_of_weights',
        )
        self._matrix = first.new_zeros(n_params, n_params)
        self._gradients: dict[str, Tensor] = {}

    def start_batch(self, uses: Sequence[Use], in_reduce_setting: Collection[str] = ()) -> None:
        """See `Accumulator.start_batch`."""
        super().start_batch(uses, in_reduce_setting)
        self._gradients.clear()

    def _add_sum(self, name: str, pieces: Tensor) -> None:
        self._gradients[name] = pieces
        if len(self._gradients) == len(self.shapes):
            rows = torch.cat([self._gradients.pop(name) for name in self.shapes], dim=2)
            self._matrix = factors.add_gram(self._matrix, rows.flatten(0, 1))

    def sum_over(self, processes: Processes) -> None:
        """See `Accumulator.sum_over`."""
        processes.sum_([], symmetric=[self._matrix])

    def result(self) -> Dense:
        """See `Accumulator.result`."""
        return Dense(self.shapes, self._matrix.clone())


def has_one_position(use: Use) -> bool:
    """Whether a use is of a weight, at one position of each example."""
    return isinstance(use, MatrixUse) and isinstance(use.n_positions, int) and use.n_positions == 1


def example_gradients(
    name: str, uses: Sequence[Use], g: Sequence[Float[Tensor, "K B ..."]]
) -> Float[Tensor, "K N ..."]:
    """Vector-Jacobian products of each example with respect to one parameter, all its uses together."""
    own = [(use, grad) for use, grad in zip(uses, g, strict=True) if name in use.parameters]
    return factors.total(use.example_gradients(name, grad) for use, grad in own)

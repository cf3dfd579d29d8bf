"""Which example the rows of a training network's calls belong to: found out once, on a few examples, as a fit does."""

from __future__ import annotations

import warnings
from collections.abc import Callable, Collection, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from laplace_ws.curvature.backend import evaluation_mode
from laplace_ws.curvature.batch_axis import RowsElsewhere
from laplace_ws.curvature.checks import misplaced_rows, use_signature
from laplace_ws.curvature.forward import N_PROBED, probe
from laplace_ws.curvature.inputs import ModelInputs, StructuredInputs, examples_of, outputs_in, own_copy, running
from laplace_ws.curvature.native import NativeBackend, NativeLinearisation, UseRecorder
from laplace_ws.errors import CurvatureWarning, UnsupportedParameterError
from laplace_ws.kfac import ExamplesOrRows, MatrixUse, Use
from laplace_ws.randomness import random_state_kept


class RowCheck:
    """Checks that rows count to the examples that they belong to, where that matters, by a pass of a few examples in eval mode.

    The shape of a tensor does not tell: with the time first, and as many or a multiple of as many steps as examples, rows would count to
    others in silence. Calls that have the examples along another axis are taken note of; rows in any other order are refused.

    Args:
        needed: names of the parameters for which it matters, at present.
    """

    def __init__(self, needed: Callable[[], Collection[str]]):
        self._needed = needed
        self._backend = NativeBackend()
        self._known: set[tuple[Any, ...]] = set()
        self._doubt: str | None = None

    @property
    def time_first(self) -> set[str]:
        """Parameters whose calls have the examples along another axis than the first."""
        return self._backend.time_first

    @property
    def is_due(self) -> bool:
        """Whether it matters, and there was no check yet."""
        return not self._known and bool(self._needed())

    def run(
        self,
        model: nn.Module,
        x: ModelInputs,
        args: tuple[Any, ...],
        kwargs: Mapping[str, Any],
        parameters: Mapping[str, nn.Parameter],
    ) -> None:
        """Check a few examples of a batch.

        Args:
            model: the network.
            x: its inputs.
            args: what it is called with.
            kwargs: what it is called with by name.
            parameters: all that are recorded, by name.

        Raises:
            UnsupportedParameterError: rows lie in another order than by example, or examples mix.
        """
        few = probe(StructuredInputs((args, dict(kwargs)), len(x), x.device))
        try:
            with random_state_kept(x.device), evaluation_mode(model), running(model, few):
                while True:
                    try:
                        self._check(model, few, parameters)
                        return
                    except RowsElsewhere:
                        continue
        except UnsupportedParameterError:
            raise
        except (RuntimeError, ValueError, IndexError, TypeError, AttributeError, AssertionError) as error:
            self._known.add(())
            self._doubt = f"cannot be run on a few examples of a batch ({type(error).__name__})"

    def say_what_is_not_known(self) -> None:
        """Warn, once, where the check could not be made."""
        doubt, self._doubt = self._doubt, None
        if doubt is not None:
            warnings.warn(
                f"the network {doubt}, so that it is not known whether rows are grouped by example, as K-FAC-reduce takes them to be; make "
                "sure that the examples lie along the first axis.",
                CurvatureWarning,
                stacklevel=2,
            )

    def knows(self, uses: Sequence[Use]) -> bool:
        """Whether uses like those of a batch have been checked; takes note that they have been seen, for the next time."""
        concerned = self._concerned(uses)
        signature = use_signature(concerned)
        is_known = not concerned or signature in self._known
        self._known.add(signature)
        return is_known

    def _check(self, model: nn.Module, few: ModelInputs, parameters: Mapping[str, nn.Parameter]) -> None:
        """Raises `RowsElsewhere` where a repetition may find other rows."""
        n, called_with = len(few), own_copy(few)
        assert isinstance(called_with, StructuredInputs)
        args, kwargs = called_with.arguments
        examples = ExamplesOrRows(n, examples_of(few).are_ragged)
        with UseRecorder(parameters, examples, False, self.time_first) as recorder:
            f = outputs_in(model(*args, **kwargs))
        kept = [k for k in recorder.kept if self._concerned([k.use]) and k.use.n_examples == n]
        uses = [k.use for k in kept]
        self._known.add(use_signature(uses))
        if all(_has_one_row(use) for use in uses):
            return
        if not (isinstance(f, Tensor) and f.is_floating_point() and f.ndim and len(f) == n and f.requires_grad):
            self._doubt = "returns no outputs with an axis of examples"
            return
        probed = [*range(min(N_PROBED, n) - 1), n - 1]
        v = torch.randn(f.shape, generator=torch.Generator().manual_seed(0)).to(f)
        columns = torch.zeros(len(probed), *f.shape, dtype=f.dtype, device=f.device)
        for column, example in zip(columns, probed, strict=True):
            column[example] = v[example]
        wrong = misplaced_rows(uses, NativeLinearisation(f, kept).pullback(columns), probed)
        if not wrong:
            return
        if self._backend.rows_are_elsewhere([use for use, _ in wrong], n, [size for _, size in wrong]):
            raise RowsElsewhere
        use = wrong[0][0]
        name = use.weight if isinstance(use, MatrixUse) else use.parameters[0]
        raise UnsupportedParameterError(
            f"K-FAC-reduce of {name!r} needs its rows grouped by example, and {use.call} has them in another order, or examples mix; put "
            f'the batch axis first, declare the rows by laplace_ws.row_examples(index), or choose kfac_approx={{"{name}": "expand"}}.'
        )

    def _concerned(self, uses: Sequence[Use]) -> list[Use]:
        names = self._needed()
        return [use for use in uses if isinstance(use, MatrixUse) and use.weight in names]


def _has_one_row(use: Use) -> bool:
    """Whether each example has one position at most, so that any order will do."""
    assert isinstance(use, MatrixUse)
    n = use.n_positions
    return not isinstance(n, Tensor) and n == 1

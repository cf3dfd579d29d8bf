"""Curvature from the passes that a training makes anyway: uses in its forward pass, gradients at their outputs in its backward pass."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor, nn

from laplace_ws.curvature.inputs import as_inputs, examples_of
from laplace_ws.curvature.native import UseRecorder
from laplace_ws.errors import UnsupportedParameterError
from laplace_ws.kfac import Accumulator

Begin = Callable[[UseRecorder], Accumulator | None]
"""Makes the accumulator of one batch from what its forward pass recorded, before `start_batch`; None for no curvature of this batch."""


class CapturedBatch:
    """One forward pass, and what has come of its backward pass.

    Attributes:
        accumulator: Σ over the examples of the squares of the gradients of the loss as it was differentiated: of a mean over N
            examples, each is 1/N of that of the example.
        n_examples: N.
    """

    def __init__(self, recorder: UseRecorder, accumulator: Accumulator):
        self.accumulator = accumulator
        self.n_examples: int = recorder.examples.n
        uses = [kept.use for kept in recorder.kept]
        accumulator.start_batch(uses)
        covered = set(accumulator.shapes)
        self._waiting: dict[int, torch.Size] = {}
        self._like: Tensor | None = None
        for number, (use, edge, shape) in enumerate(recorder.kept):
            if not covered.isdisjoint(use.parameters):
                self._waiting[number] = shape
                edge.node.register_prehook(self._receiver(number, edge.output_nr))

    def _receiver(self, number: int, place: int) -> Callable[[Any], None]:
        return lambda grads: self._receive(number, grads[place])

    def _receive(self, number: int, g: Float[Tensor, "B ..."] | None) -> None:
        if number not in self._waiting:
            raise UnsupportedParameterError(
                "one forward pass was differentiated twice, and its curvature would be that of neither loss; call backward() once, on the "
                "sum of the losses."
            )
        if g is None:  # `finish` sees to it
            return
        self._like = g.new_empty(())
        self._add(number, g)

    def _add(self, number: int, g: Float[Tensor, "B ..."]) -> None:
        del self._waiting[number]
        with torch.no_grad(), torch.autocast(g.device.type, enabled=False):
            self.accumulator.add(number, g.detach()[None])

    @property
    def has_begun(self) -> bool:
        """Whether the backward pass has reached a use."""
        return self._like is not None

    def finish(self) -> bool:
        """Complete the sums; returns whether there was a backward pass. A use that it did not reach has no gradient, which is zero."""
        if self._like is None:  # no backward pass
            return False
        for number, shape in list(self._waiting.items()):
            self._add(number, self._like.new_zeros(shape))
        self.accumulator.end_batch()
        return True


class TrainingCapture:
    """Records a model's forward passes while it trains, and gathers curvature as `backward` runs through them.

    The gradients that training computes are not changed. A pass without gradients, or in eval mode, is not recorded. What a batch is made
    of, dropout and statistics over the batch included, is what its curvature is taken of.

    Args:
        model: the network, called as a whole.
        parameters: the parameters whose uses are recorded, by name.
        begin: makes the accumulator of a batch.

    Attributes:
        is_on: whether the next forward passes are recorded.
    """

    def __init__(self, model: nn.Module, parameters: Mapping[str, nn.Parameter], begin: Begin):
        self.is_on = False
        self.parameters = parameters
        self._begin = begin
        self._recorder: UseRecorder | None = None
        self._batches: list[CapturedBatch] = []
        self._handles = [
            model.register_forward_pre_hook(self._before, with_kwargs=True),
            model.register_forward_hook(self._after, always_call=True),
        ]

    def take(self) -> list[CapturedBatch]:
        """The batches that were differentiated since the last call."""
        batches, self._batches = self._batches, []
        return [batch for batch in batches if batch.finish()]

    def forget_differentiated(self) -> None:
        """Drop the batches whose backward pass has begun."""
        self._batches = [batch for batch in self._batches if not batch.has_begun]

    def remove(self) -> None:
        """Leave the model alone from now on."""
        for handle in self._handles:
            handle.remove()

    def _before(self, model: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        if not (self.is_on and model.training and torch.is_grad_enabled()):
            return
        x = as_inputs(*args) if args else as_inputs(kwargs)
        self._recorder = UseRecorder(self.parameters, examples_of(x))
        self._recorder.__enter__()

    def _after(self, model: nn.Module, args: tuple[Any, ...], output: Any) -> None:
        recorder, self._recorder = self._recorder, None
        if recorder is None:
            return
        recorder.__exit__(None, None, None)
        if output is None:  # the forward pass has failed
            return
        recorder.check_unchanged()
        with torch.no_grad(), torch.autocast(next(iter(self.parameters.values())).device.type, enabled=False):
            accumulator = self._begin(recorder)
            if accumulator is not None:
                self._batches.append(CapturedBatch(recorder, accumulator))

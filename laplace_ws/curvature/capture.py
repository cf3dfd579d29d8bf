"""Curvature from the passes that a training makes anyway: uses in its forward pass, gradients at their outputs in its backward pass."""

from __future__ import annotations

import weakref
from collections.abc import Callable, Collection, Iterable, Iterator, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor, nn
from torch.utils.hooks import RemovableHandle

from laplace_ws.curvature.columns import stream_columns
from laplace_ws.curvature.inputs import ModelInputs, StructuredInputs, as_inputs, check_outputs, examples_of, outputs_in
from laplace_ws.curvature.native import NativeLinearisation, UseRecorder
from laplace_ws.curvature.row_check import RowCheck
from laplace_ws.errors import InvalidBatchError
from laplace_ws.kfac import Accumulator, Examples, ExamplesOrRows, MatrixUse

Columns = Callable[[Float[Tensor, "N ..."]], Iterator[Float[Tensor, "N ..."]]]
"""From the outputs of a batch, the columns of the curvature of its loss in them."""


@dataclass(frozen=True)
class BatchForm:
    """What one batch of a training looks like.

    Attributes:
        n_examples: N: of inputs that have examples of their own, as graphs have, their number; of others the rows of the model's output.
        n_arguments: with how many arguments the model was called.
        output_shape: of the model's output for one example; None where the model returns no tensor.
    """

    n_examples: int
    n_arguments: int
    output_shape: tuple[int, ...] | None


Begin = Callable[[UseRecorder, BatchForm], Accumulator | None]
"""Makes the accumulator of one batch from what its forward pass recorded, before `start_batch`; None for no curvature of this batch."""


class CapturedBatch:
    """One forward pass, and what has come of its backward pass.

    Args:
        recorder: of the uses in the forward pass.
        n_examples: N.
        accumulator: of the curvature of the batch.
        on_begin: called with this batch when the backward pass reaches its first use.

    Attributes:
        accumulator: Σ over the examples of the squares of the gradients of the loss as it was differentiated: of a mean over N examples,
            each is 1/N of that of the example. Of columns that were given, the sum of their squares.
        n_examples: N.
    """

    def __init__(
        self,
        recorder: UseRecorder,
        n_examples: int,
        accumulator: Accumulator,
        on_begin: Callable[[CapturedBatch], None],
    ):
        self.accumulator = accumulator
        self.n_examples = n_examples
        self._on_begin = on_begin
        self._waiting: dict[int, torch.Size] = {}
        self._like: Tensor | None = None
        accumulator.start_batch([kept.use for kept in recorder.kept])

    def wait_for_gradients(self, recorder: UseRecorder) -> None:
        """Take the gradients at the outputs of the uses as a backward pass reaches them."""
        for number, (use, edge, shape) in enumerate(recorder.kept):
            if not self.accumulator.shapes.keys().isdisjoint(use.parameters):
                self._waiting[number] = shape
                edge.node.register_prehook(self._receiver(number, edge.output_nr))

    def take_columns(self, recorder: UseRecorder, f: Float[Tensor, "N ..."], columns: Columns) -> None:
        """Pull columns back from the outputs now, and wait for a backward pass without looking at what it brings."""
        stream_columns(NativeLinearisation(f, recorder.kept), columns(f.detach()), self.accumulator, keep_graph=True)
        assert f.grad_fn is not None
        f.grad_fn.register_prehook(lambda grads: self._begin(f.new_empty(())))

    def finish(self) -> None:
        """Complete the sums: a use that the backward pass did not reach has no gradient, which is zero."""
        assert self._like is not None
        for number, shape in list(self._waiting.items()):
            self._add(number, self._like.new_zeros(shape))
        self.accumulator.end_batch()

    def _begin(self, like: Tensor) -> None:
        if self._like is None:
            self._like = like.detach()
            self._on_begin(self)

    def _receiver(self, number: int, place: int) -> Callable[[Any], None]:
        return lambda grads: self._receive(number, grads[place])

    def _receive(self, number: int, g: Float[Tensor, "B ..."] | None) -> None:
        if number not in self._waiting:
            raise RuntimeError(
                "one forward pass was differentiated twice, and its curvature would be that of neither loss; call backward() once, on the "
                "sum of the losses."
            )
        if g is None:  # `finish` sees to it
            return
        self._begin(g.new_empty(()))
        self._add(number, g)

    def _add(self, number: int, g: Float[Tensor, "B ..."]) -> None:
        del self._waiting[number]
        with torch.no_grad(), torch.autocast(g.device.type, enabled=False):
            self.accumulator.add(number, g.detach()[None])


class TrainingCapture:
    """Records a model's forward passes while it trains, and gathers curvature as `backward` runs through them.

    The gradients that training computes are not changed. A pass without gradients, in eval mode, or of a copy of the model is not recorded.
    What a batch is made of, dropout and statistics over the batch included, is what its curvature is taken of. When the capture is deleted,
    it leaves the model alone; a copy of the model has nothing to do with it.

    Args:
        model: the network, called as a whole; it must not call itself.
        parameters: the parameters whose uses are recorded, by name.
        begin: makes the accumulator of a batch; it must not hold on to the capture.
        columns: columns to pull back in place of the gradients of the loss.
        by_example: names of the parameters, at present, for which it matters which example each row belongs to; see `RowCheck`.

    Attributes:
        is_on: whether the next forward passes are recorded.
        form: of the last batch that was recorded.
        rows: the check of what belongs to which example.
    """

    def __init__(
        self,
        model: nn.Module,
        parameters: Mapping[str, nn.Parameter],
        begin: Begin,
        columns: Columns | None = None,
        by_example: Callable[[], Collection[str]] = tuple,
    ):
        self.rows: RowCheck = RowCheck(by_example)
        self.is_on = False
        self.form: BatchForm | None = None
        self.parameters = parameters
        self._begin = begin
        self._columns = columns
        self._open: tuple[UseRecorder, ModelInputs | None] | None = None
        self._begun: list[CapturedBatch] = []
        before, after = _Hook(self, "_before"), _Hook(self, "_after")
        self._model = weakref.ref(model)
        handles = [
            model.register_forward_pre_hook(before, with_kwargs=True),
            model.register_forward_hook(after, with_kwargs=True, always_call=True),
        ]
        self._finalizer = weakref.finalize(self, _remove, handles)

    def take(self) -> list[CapturedBatch]:
        """The batches that were differentiated since the last call, complete."""
        batches = list(self._begun)
        self.drop()
        for batch in batches:
            batch.finish()
        return batches

    def drop(self) -> None:
        """Forget the batches whose backward pass has begun."""
        self._begun.clear()

    def remove(self) -> None:
        """Leave the model alone from now on."""
        if self._open is not None:
            self._close()
        self._finalizer()

    def _before(self, model: nn.Module, args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> None:
        if self._open is not None:  # an interrupt, which runs no hooks, ended the pass before
            self._close()
        if not (self.is_on and model.training and torch.is_grad_enabled() and model is self._model()):
            return
        x = _inputs(args, kwargs)
        if x is not None and self.rows.is_due:
            self.rows.run(model, x, args, kwargs, self.parameters)
        known = None if x is None else examples_of(x)
        examples = ExamplesOrRows(1, True) if known is None else ExamplesOrRows(known.n, known.are_ragged)
        recorder = UseRecorder(self.parameters, examples, time_first=self.rows.time_first)
        recorder.__enter__()
        self._open = recorder, x

    def _after(self, model: nn.Module, args: tuple[Any, ...], kwargs: Mapping[str, Any], output: Any) -> None:
        if self._open is None or model is not self._model():
            return
        recorder, x = self._close()
        if output is None:  # the forward pass has failed
            return
        recorder.check_unchanged(MatrixUse)
        form = _form(output, recorder.examples, x)
        if x is not None and not self.rows.knows([kept.use for kept in recorder.kept]):
            known = set(self.rows.time_first)
            self.rows.run(model, x, args, kwargs, self.parameters)
            if self.rows.time_first != known:  # what was recorded may be of other rows; the next pass will do
                self.form = form
                return
        with torch.no_grad(), torch.autocast(next(iter(self.parameters.values())).device.type, enabled=False):
            accumulator = self._begin(recorder, form)
            if accumulator is not None:
                self.rows.say_what_is_not_known()
                batch = CapturedBatch(recorder, form.n_examples, accumulator, self._begun.append)
                if self._columns is None:
                    batch.wait_for_gradients(recorder)
                else:
                    batch.take_columns(recorder, check_outputs(output, form.n_examples), self._columns)
        self.form = form

    def _close(self) -> tuple[UseRecorder, ModelInputs | None]:
        assert self._open is not None
        recorder, x = self._open
        self._open = None
        recorder.__exit__(None, None, None)
        return recorder, x


def _inputs(args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> ModelInputs | None:
    """What the model is called with; None where it does not tell the number of examples."""
    try:
        return as_inputs(*args) if args else as_inputs(kwargs)
    except InvalidBatchError:
        return None


def _form(output: object, examples: Examples, x: ModelInputs | None) -> BatchForm:
    f = outputs_in(output)
    n_arguments = len(x.arguments) if isinstance(x, StructuredInputs) else 1
    if not isinstance(f, Tensor) or not f.ndim:
        return BatchForm(examples.n, n_arguments, None)
    told_by_inputs = examples.are_ragged and x is not None
    return BatchForm(examples.n if told_by_inputs else len(f), n_arguments, tuple(f.shape[1:]))


class _Hook:
    """A hook that holds on to nothing: it calls a method of a capture as long as that exists, and a copy of it calls nothing."""

    def __init__(self, capture: TrainingCapture | None = None, method: str = ""):
        self._capture = None if capture is None else weakref.ref(capture)
        self._method = method

    def __call__(self, *args: Any) -> None:
        capture = None if self._capture is None else self._capture()
        if capture is not None:
            getattr(capture, self._method)(*args)

    def __reduce__(self) -> tuple[type[_Hook], tuple[()]]:
        return _Hook, ()


def _remove(handles: Iterable[RemovableHandle]) -> None:
    for handle in handles:
        handle.remove()

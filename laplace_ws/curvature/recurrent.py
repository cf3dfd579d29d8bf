"""Recurrent networks, step by step: torch has them as one call each, in which the uses of their weights cannot be seen."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
import torch.nn.functional as F
from jaxtyping import Float
from torch import Tensor

from laplace_ws.curvature.calls import UnreadableCallError

State = tuple[Tensor, ...]
"""h `[N, H]`, and c of an LSTM."""
Cell = Callable[[Tensor, Tensor, State], State]
"""From W_ih x + b_ih, W_hh h + b_hh and the state, the next state."""


def _lstm_cell(of_x: Tensor, of_h: Tensor, state: State) -> State:
    i, f, g, o = (of_x + of_h).chunk(4, -1)
    c = f.sigmoid() * state[1] + i.sigmoid() * g.tanh()
    return o.sigmoid() * c.tanh(), c


def _gru_cell(of_x: Tensor, of_h: Tensor, state: State) -> State:
    (r, z, n), (r_h, z_h, n_h) = of_x.chunk(3, -1), of_h.chunk(3, -1)
    z = (z + z_h).sigmoid()
    n = (n + (r + r_h).sigmoid() * n_h).tanh()
    return ((1 - z) * n + z * state[0],)


def _tanh_cell(of_x: Tensor, of_h: Tensor, state: State) -> State:
    return ((of_x + of_h).tanh(),)


def _relu_cell(of_x: Tensor, of_h: Tensor, state: State) -> State:
    return ((of_x + of_h).relu(),)


def _direction(
    cell: Cell, x: Float[Tensor, "N T I"], state: State, params: Sequence[Tensor], has_biases: bool, back: bool
) -> tuple[Tensor, State]:
    """One layer in one direction: the outputs `[N, T, H]` and the last state."""
    w_ih, w_hh, *rest = params
    b_ih, b_hh = rest[:2] if has_biases else (None, None)
    projection = rest[-1] if len(rest) > 2 * has_biases else None
    of_x = F.linear(x, w_ih, b_ih)
    steps = range(x.shape[1])
    outputs = []
    for t in reversed(steps) if back else steps:
        h, *others = cell(of_x[:, t], F.linear(state[0], w_hh, b_hh), state)
        h = h if projection is None else F.linear(h, projection)
        state = (h, *others)
        outputs.append(h)
    return torch.stack(outputs[::-1] if back else outputs, 1), state


def _network(
    cell: Cell,
    input: Tensor,
    states: Sequence[Tensor],
    params: Sequence[Tensor],
    has_biases: bool,
    num_layers: int,
    dropout: float,
    train: bool,
    bidirectional: bool,
    batch_first: bool,
) -> tuple[Tensor, ...]:
    if not isinstance(params, (list, tuple)) or input.ndim != 3:
        raise UnreadableCallError("on a packed sequence, or on one without a batch axis; give a padded batch [N, T, I]")
    x = input if batch_first else input.transpose(0, 1)
    n_directions = 1 + bidirectional
    n_each = len(params) // (num_layers * n_directions)
    last: list[State] = []
    for layer in range(num_layers):
        outputs = []
        for back in range(n_directions):
            number = layer * n_directions + back
            own = params[number * n_each : (number + 1) * n_each]
            y, state = _direction(cell, x, tuple(s[number] for s in states), own, has_biases, bool(back))
            outputs.append(y)
            last.append(state)
        x = torch.cat(outputs, -1) if bidirectional else outputs[0]
        if dropout and layer < num_layers - 1:
            x = F.dropout(x, dropout, train)
    output = x if batch_first else x.transpose(0, 1)
    return (output, *(torch.stack(of_kind) for of_kind in zip(*last, strict=True)))


def _of_network(cell: Cell) -> Callable[..., tuple[Tensor, ...]]:
    def rewrite(
        is_parameter: Callable[[Any], bool], input: Tensor, hx: Any, params: Any, *options: Any
    ) -> tuple[Tensor, ...]:
        return _network(cell, input, hx if isinstance(hx, (list, tuple)) else [hx], params, *options)

    return rewrite


def _of_cell(cell: Cell) -> Callable[..., Any]:
    def rewrite(
        is_parameter: Callable[[Any], bool],
        input: Tensor,
        hx: Any,
        w_ih: Tensor,
        w_hh: Tensor,
        b_ih: Tensor | None = None,
        b_hh: Tensor | None = None,
    ) -> Any:
        state = tuple(hx) if isinstance(hx, (list, tuple)) else (hx,)
        found = cell(F.linear(input, w_ih, b_ih), F.linear(state[0], w_hh, b_hh), state)
        return found if len(found) > 1 else next(iter(found))

    return rewrite


RECURRENT: Mapping[Callable[..., Any], Callable[..., Any]] = {
    torch.lstm: _of_network(_lstm_cell),
    torch.gru: _of_network(_gru_cell),
    torch.rnn_tanh: _of_network(_tanh_cell),
    torch.rnn_relu: _of_network(_relu_cell),
    torch.lstm_cell: _of_cell(_lstm_cell),
    torch.gru_cell: _of_cell(_gru_cell),
    torch.rnn_tanh_cell: _of_cell(_tanh_cell),
    torch.rnn_relu_cell: _of_cell(_relu_cell),
}
"""Rewrites of recurrent networks and their cells, see `rewrites.REWRITES`."""

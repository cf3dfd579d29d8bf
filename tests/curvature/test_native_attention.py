"""Multi-head attention in the native backend."""

import pytest
import torch
import torch.nn.functional as F
from cases import double
from curvature.shared import Wrapped
from torch import nn

from laplace_ws import kron_factors
from laplace_ws.curvature.native import UseRecorder
from laplace_ws.kfac import Examples


class Separate(nn.Module):
    """What `nn.MultiheadAttention` computes, with a linear layer for each projection."""

    def __init__(self, attention):
        super().__init__()
        self.q, self.k, self.v, self.out = (nn.Linear(4, 4, dtype=torch.float64) for _ in range(4))
        parts = zip(attention.in_proj_weight.chunk(3), attention.in_proj_bias.chunk(3), strict=True)
        with torch.no_grad():
            for layer, (w, b) in zip((self.q, self.k, self.v), parts, strict=True):
                layer.weight.copy_(w)
                layer.bias.copy_(b)
            self.out.load_state_dict(attention.out_proj.state_dict())

    def forward(self, query, key, value):
        q, k, v = (
            f(x).unflatten(-1, (2, 2)).transpose(1, 2) for f, x in ((self.q, query), (self.k, key), (self.v, value))
        )
        return self.out(F.scaled_dot_product_attention(q, k, v).transpose(1, 2).flatten(2))


ATTENDED = {
    "self": lambda x: (x, x, x),
    "two inputs": lambda x: (x, x[:, :2], x[:, :2]),
    "three inputs": lambda x: (x, x[:, :2], x[:, 1:3]),
}


@pytest.mark.parametrize("kfac_approx", ["expand", "reduce"])
@pytest.mark.parametrize("inputs", ATTENDED)
def test_packed_projection_has_the_blocks_of_separate_ones(inputs, kfac_approx):
    packed = double(nn.MultiheadAttention(4, 2, batch_first=True))
    separate = Separate(packed)
    take = ATTENDED[inputs]
    nets = (
        Wrapped(lambda m, x: m.a(*take(torch.tanh(x)))[0].mean(1), a=packed),
        Wrapped(lambda m, x: m.a(*take(torch.tanh(x))).mean(1), a=separate),
    )
    x, y = torch.randn(5, 3, 4).double(), torch.randn(5, 4).double()
    batches = [(x[:2], y[:2]), (x[2:], y[2:])]
    ours, theirs = (kron_factors(net, "regression", batches, kfac_approx=kfac_approx) for net in nets)
    block = ours["a.in_proj_weight"]
    for i, name in enumerate("qkv"):
        torch.testing.assert_close(block.A[i], theirs[f"a.{name}.weight"].A, rtol=1e-10, atol=1e-12)
        torch.testing.assert_close(block.B[i], theirs[f"a.{name}.weight"].B, rtol=1e-10, atol=1e-12)
        b = ours["a.in_proj_bias"].B[4 * i : 4 * i + 4, 4 * i : 4 * i + 4]
        torch.testing.assert_close(b, theirs[f"a.{name}.bias"].B, rtol=1e-10, atol=1e-12)
    blocks = [theirs[f"a.{name}.weight"].to_dense() for name in "qkv"]
    torch.testing.assert_close(block.to_dense(), torch.block_diag(*blocks), rtol=1e-10, atol=1e-12)


ATTENTION_OPTIONS = {
    "without weights": ({}, {"need_weights": False}),
    "weights of each head": ({}, {"average_attn_weights": False}),
    "boolean masks": ({}, {"attn_mask": torch.ones(3, 3).triu(2).bool(), "key_padding_mask": torch.eye(4, 3).bool()}),
    "added masks": ({}, {"attn_mask": torch.randn(8, 3, 3).double(), "key_padding_mask": torch.randn(4, 3).double()}),
    "causal": ({}, {"attn_mask": torch.ones(3, 3).triu(1).bool(), "is_causal": True, "need_weights": False}),
    "no bias": ({"bias": False}, {}),
    "other widths": ({"kdim": 4, "vdim": 4}, {}),
    "time first": ({"batch_first": False}, {}),
}


@pytest.mark.parametrize("name", ATTENTION_OPTIONS)
def test_attention_computes_what_torch_does(name):
    options, arguments = ATTENTION_OPTIONS[name]
    attention = double(nn.MultiheadAttention(4, 2, **{"batch_first": True, **options}))
    if name == "other widths":  # asks for separate weights
        attention = double(nn.MultiheadAttention(4, 2, batch_first=True, kdim=2, vdim=3))
    x = torch.randn(4, 3, 4).double()
    if name == "time first":
        x = x.transpose(0, 1)
    inputs = (x, x[..., :2], x[..., :3]) if name == "other widths" else (x, x, x)
    parameters = dict(attention.named_parameters())
    with UseRecorder(parameters, Examples(4)) as recorder:
        y, weights = attention(*inputs, **arguments)
    assert {p for kept in recorder.kept for p in kept.use.parameters} == set(parameters)
    expected, expected_weights = attention(*inputs, **arguments)
    torch.testing.assert_close(y, expected)
    torch.testing.assert_close(weights, expected_weights)

"""Random networks, written in the many ways in which people write layers, for tests against dense algebra."""

from __future__ import annotations

import random
from collections.abc import Callable
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor, nn

N = 4
"""Examples of a batch; times, sizes and channels are sometimes a multiple, so that a wrong axis may pass for theirs."""


class RandomNet(nn.Module):
    """Steps one after the other, each with parameters of its own.

    Attributes:
        written: the names of the steps.
    """

    def __init__(self, seed: int):
        super().__init__()
        self.rng = random.Random(seed)
        torch.manual_seed(seed)
        self.written: list[str] = []
        self.steps: list[Callable[[Tensor], Tensor]] = []
        self.form = self.rng.choice(list(FORMS))
        self.x = FORMS[self.form](self.rng)
        h, n_steps = self.x, self.rng.randint(2, 5)
        for _ in range(n_steps):
            h = self.grow(h, self.rng.choice(STEPS[form_of(h)]))
        h = self.grow(h, pooled)
        self.grow(h, self.rng.choice([linear_module, linear_functional, matmul, einsum]))
        self.double()
        with torch.no_grad():
            for p in self.parameters():
                p.copy_(torch.randn_like(p) * 0.4)

    def grow(self, h: Tensor, step: Callable) -> Tensor:
        """Add a step, and return its output at zero weights' place: only its shape counts."""
        function = step(self, h)
        self.written.append(step.__name__)
        self.steps.append(function)
        with torch.no_grad():
            return function(h)

    def add(self, *shape: int) -> nn.Parameter:
        """A parameter of its own."""
        p = nn.Parameter(torch.randn(shape))
        self.register_parameter(f"p{len(list(self.parameters()))}", p)
        return p

    def module(self, module: nn.Module) -> nn.Module:
        """A module of its own."""
        self.add_module(f"m{len(list(self.children()))}", module)
        return module

    def forward(self, x: Tensor) -> Tensor:
        for step in self.steps:
            x = step(x)
        return x


FORMS = {
    "vectors": lambda r: torch.randn(N, r.randint(2, 4)),
    "sequences": lambda r: torch.randn(N, r.choice([2, 3, 4, 8]), r.randint(2, 4)),
    "images": lambda r: torch.randn(N, r.randint(1, 3), r.randint(3, 4), r.randint(3, 5)),
    "tokens": lambda r: torch.randint(0, 5, (N, r.choice([2, 3, 4]))),
}


def form_of(h: Tensor) -> str:
    return "tokens" if not h.is_floating_point() else {2: "vectors", 3: "sequences", 4: "images"}[h.ndim]


# ------------------------------------------------------------------ maps of the last axis


def linear_module(net, h):
    return net.module(nn.Linear(h.shape[-1], net.rng.randint(2, 4), bias=net.rng.random() < 0.7))


def linear_functional(net, h):
    w, b = net.add(3, h.shape[-1]), net.add(3)
    return lambda x: F.linear(x, w, b)


def linear_of_a_view(net, h):
    w = net.add(2, 2, h.shape[-1])
    return lambda x: F.linear(x, w.view(4, -1))


def linear_by_parts(net, h):
    w, b = net.add(6, h.shape[-1]), net.add(6)
    return lambda x: F.linear(x, w.chunk(3)[0]) * F.linear(x, w.chunk(3)[1]).sigmoid() + F.linear(x, w[4:], b[4:])


def matmul(net, h):
    w = net.add(h.shape[-1], 3)
    return lambda x: x @ w


def matmul_transposed(net, h):
    w, b = net.add(3, h.shape[-1]), net.add(3)
    return lambda x: x @ w.T + b


def einsum(net, h):
    w = net.add(h.shape[-1], 2, 2)
    return lambda x: torch.einsum("...d,dhk->...hk", x, w).flatten(-2)


def tensordot(net, h):
    w = net.add(h.shape[-1], 3)
    return lambda x: torch.tensordot(x, w, 1)


def addmm(net, h):
    w, b = net.add(h.shape[-1], 3), net.add(3)
    return lambda x: torch.addmm(b, x.reshape(-1, x.shape[-1]), w).reshape(*x.shape[:-1], 3)


def called_twice(net, h):
    layer = net.module(nn.Linear(h.shape[-1], h.shape[-1]))
    return lambda x: layer(layer(x).tanh())


def masked(net, h):
    w = net.add(3, h.shape[-1])
    mask = (torch.rand(3, h.shape[-1]) > 0.3).double()
    return lambda x: F.linear(x, w * mask.to(x.dtype))


def low_rank(net, h):
    a, b, w = net.add(h.shape[-1], 1), net.add(1, 3), net.add(h.shape[-1], 3)
    return lambda x: x @ w + x @ a @ b


def merged(net, h):
    a, b, w = net.add(3, 1), net.add(1, h.shape[-1]), net.add(3, h.shape[-1])
    return lambda x: F.linear(x, w + a @ b)


def experts(net, h):
    w, gate = net.add(2, 3, h.shape[-1]), net.module(nn.Linear(h.shape[-1], 2))
    return lambda x: (gate(x).softmax(-1).unsqueeze(-1) * torch.einsum("...i,eoi->...eo", x, w)).sum(-2)


def multi_layer(net, h):
    return net.module(nn.Sequential(nn.Linear(h.shape[-1], 3), nn.GELU(), nn.Dropout(0.0), nn.Linear(3, h.shape[-1])))


def bilinear(net, h):
    layer = net.module(nn.Bilinear(h.shape[-1], h.shape[-1], 2))
    return lambda x: layer(x, x.tanh())


# ------------------------------------------------------------------ entry by entry


def activation(net, h):
    return net.rng.choice([torch.tanh, F.gelu, F.silu, torch.sin])


def scale(net, h):
    s, b = net.add(h.shape[-1]), net.add(h.shape[-1])
    return lambda x: x * s + b


def one_scale(net, h):
    s = net.add(1)
    return lambda x: s * x.tanh()


def scalar(net, h):
    s = net.add()
    return lambda x: x * s


def exponentiated(net, h):
    s = net.add(h.shape[-1])
    return lambda x: x.tanh() * s.exp()


def gate(net, h):
    s = net.add(1, h.shape[-1])
    return lambda x: x * s.sigmoid() + x.tanh() * (1 - s.sigmoid())


def layer_norm(net, h):
    return net.module(nn.LayerNorm(h.shape[-1], eps=0.1))


def rms_norm(net, h):
    w = net.add(h.shape[-1])
    return lambda x: w * (x * torch.rsqrt(x.pow(2).mean(-1, keepdim=True) + 0.1))


def residual(net, h):
    layer = net.module(nn.Linear(h.shape[-1], h.shape[-1]))
    return lambda x: x + layer(x).tanh()


def prelu(net, h):
    return net.module(nn.PReLU())


# ------------------------------------------------------------------ sequences


def positions(net, h):
    p = net.add(1, *h.shape[1:])
    return lambda x: x + p


def bare_positions(net, h):
    p = net.add(*h.shape[1:])
    return lambda x: x + p


def looked_up_positions(net, h):
    table = net.module(nn.Embedding(h.shape[1] + 1, h.shape[2]))
    return lambda x: x + table(torch.arange(x.shape[1]))


def added_positions(net, h):
    p, q = net.add(h.shape[1], 1), net.add(1, h.shape[2])
    return lambda x: x + (p + q)


def time_first(net, h):
    layer, s = net.module(nn.Linear(h.shape[-1], 3)), net.add(3)
    return lambda x: (layer(x.transpose(0, 1)) * s).transpose(0, 1)


def over_time(net, h):
    w = net.add(h.shape[1], h.shape[1])
    return lambda x: w @ x


def mixer(net, h):
    layer = net.module(nn.Linear(h.shape[1], h.shape[1]))
    return lambda x: x + layer(x.transpose(1, 2)).transpose(1, 2)


def attention(net, h):
    layer = net.module(nn.MultiheadAttention(h.shape[-1], 1, batch_first=True))
    return lambda x: layer(x, x, x, need_weights=False)[0]


def attention_by_hand(net, h):
    d = h.shape[-1]
    w = net.module(nn.Linear(d, 3 * d))

    def step(x):
        q, k, v = w(x).chunk(3, -1)
        return F.scaled_dot_product_attention(q, k, v)

    return step


def attention_of_heads(net, h):
    d = h.shape[-1]
    wq, wk, wv = (net.add(d, 2, 2) for _ in range(3))
    o = net.add(2, 2, d)

    def step(x):
        a, b, c = (torch.einsum("ntd,dhk->nhtk", x, w) for w in (wq, wk, wv))
        mixed = (a @ b.mT).softmax(-1) @ c
        return torch.einsum("nhtk,hkd->ntd", mixed, o)

    return step


def recurrent(net, h):
    kind = net.rng.choice([nn.LSTM, nn.GRU, nn.RNN])
    layer = net.module(kind(h.shape[-1], 2, batch_first=True, bidirectional=net.rng.random() < 0.3))
    return lambda x: layer(x)[0]


def conv1d(net, h):
    layer = net.module(nn.Conv1d(h.shape[-1], 3, 2, padding=1))
    return lambda x: layer(x.transpose(1, 2)).transpose(1, 2)


def by_position(net, h):
    w = net.add(h.shape[1], h.shape[2], 2)
    return lambda x: torch.bmm(x.transpose(0, 1), w).transpose(0, 1)


def folded(net, h):
    layer = net.module(nn.Linear(h.shape[-1], 3))
    return lambda x: layer(x.flatten(0, 1)).unflatten(0, x.shape[:2])


def encoder(net, h):
    d = h.shape[-1]
    return net.module(
        nn.TransformerEncoderLayer(d, 1, 3, dropout=0.0, batch_first=True, norm_first=net.rng.random() < 0.5)
    )


def class_token(net, h):
    token = net.add(1, 1, h.shape[-1])
    return lambda x: torch.cat([token.expand(len(x), -1, -1), x], 1)


# ------------------------------------------------------------------ images


def conv2d(net, h):
    groups = net.rng.choice([1, h.shape[1]])
    return net.module(nn.Conv2d(h.shape[1], 2 * h.shape[1], net.rng.choice([1, 2]), padding=1, groups=groups))


def transposed_conv2d(net, h):
    return net.module(nn.ConvTranspose2d(h.shape[1], 2, 2, stride=net.rng.choice([1, 2])))


def functional_conv2d(net, h):
    w, b = net.add(2, h.shape[1], 2, 2), net.add(2)
    return lambda x: F.conv2d(x, w, b, padding=1)


def standardised_conv2d(net, h):
    w = net.add(2, h.shape[1], 2, 2)
    return lambda x: F.conv2d(
        x, (w - w.mean((1, 2, 3), keepdim=True)) / (w.std((1, 2, 3), keepdim=True) + 0.1), padding=1
    )


def batch_norm(net, h):
    return net.module(nn.BatchNorm2d(h.shape[1]).eval())


def group_norm(net, h):
    return net.module(nn.GroupNorm(1, h.shape[1], eps=0.1))


def channel_scale(net, h):
    s = net.add(h.shape[1], 1, 1)
    return lambda x: x * s


def squeeze_excite(net, h):
    layer = net.module(nn.Linear(h.shape[1], h.shape[1]))
    return lambda x: x * layer(x.mean((2, 3))).sigmoid()[:, :, None, None]


def pool(net, h):
    return lambda x: F.avg_pool2d(x, 2, 1, padding=1)


def to_patches(net, h):
    return lambda x: x.flatten(2).transpose(1, 2)


# ------------------------------------------------------------------ tokens, and from one form to another


def embedding(net, h):
    return net.module(nn.Embedding(5, 3))


def functional_embedding(net, h):
    table = net.add(5, 3)
    return lambda x: F.embedding(x, table)


def one_hot(net, h):
    w = net.add(5, 3)
    return lambda x: F.one_hot(x, 5).to(w.dtype) @ w


def bag(net, h):
    return net.module(nn.EmbeddingBag(5, 3, mode=net.rng.choice(["sum", "mean", "max"])))


def pooled(net, h):
    if h.ndim == 2:
        return activation(net, h)
    if h.ndim == 4:
        return lambda x: x.mean((2, 3)).tanh()
    return net.rng.choice([lambda x: x.mean(1).tanh(), lambda x: x[:, -1].tanh(), lambda x: x.flatten(1).tanh()])


LAST_AXIS = [
    linear_module, linear_functional, linear_of_a_view, linear_by_parts, matmul, matmul_transposed, einsum, tensordot, addmm, called_twice,
    masked, low_rank, merged, experts, multi_layer, bilinear, activation, scale, one_scale, scalar, exponentiated, gate, layer_norm,
    rms_norm, residual,
]  # fmt: skip
STEPS = {
    "vectors": [*LAST_AXIS, prelu],
    "sequences": [
        *LAST_AXIS, positions, bare_positions, looked_up_positions, added_positions, time_first, over_time, mixer, attention,
        attention_by_hand, attention_of_heads, recurrent, conv1d, by_position, folded, encoder, class_token,
    ],
    "images": [
        conv2d, transposed_conv2d, functional_conv2d, standardised_conv2d, batch_norm, group_norm, channel_scale, squeeze_excite, pool,
        to_patches, activation, prelu, one_scale,
    ],
    "tokens": [embedding, functional_embedding, one_hot, bag],
}  # fmt: skip


@dataclass(frozen=True)
class Drawn:
    """A random network and data for it."""

    model: RandomNet
    x: Tensor
    y: Tensor


def draw(seed: int) -> Drawn:
    """The network of a seed, in float64 and eval mode."""
    model = RandomNet(seed).eval()
    x = model.x.double() if model.x.is_floating_point() else model.x
    return Drawn(model, x, torch.randn_like(model(x)))

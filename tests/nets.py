"""Networks as people write them, for the table of cases."""

from __future__ import annotations

from collections.abc import Callable

import asdl
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from laplace_ws import row_examples
from laplace_ws.data import GraphBatch
from laplace_ws.models import Bias, Scale


class Fixup(nn.Module):
    """Scalar bias and scale around convolutions, and a residual."""

    def __init__(self):
        super().__init__()
        self.bias, self.scale = nn.Parameter(torch.zeros(1)), nn.Parameter(torch.ones(1))
        self.conv1, self.conv2 = nn.Conv2d(2, 3, 3, padding=1, bias=False), nn.Conv2d(3, 2, 3, padding=1, bias=False)
        self.head = nn.Linear(2, 3)

    def forward(self, x: Tensor) -> Tensor:
        y = F.relu(self.conv1(x + self.bias))
        y = x + self.conv2(y) * self.scale - self.bias
        return self.head(F.relu(y).mean((2, 3)))


class InplaceResidual(nn.Module):
    """In-place activations, an in-place bias and scale, and a normalisation."""

    def __init__(self, norm: Callable[[int], nn.Module]):
        super().__init__()
        self.conv1, self.conv2 = nn.Conv2d(2, 4, 3, padding=1), nn.Conv2d(4, 4, 3, padding=1)
        self.norm1, self.norm2 = norm(4), norm(4)
        self.bias, self.scale = nn.Parameter(torch.zeros(4, 1, 1)), nn.Parameter(torch.ones(1))
        self.head = nn.Linear(4, 3)

    def forward(self, x: Tensor) -> Tensor:
        x = self.norm1(self.conv1(x)).relu_()
        y = self.norm2(self.conv2(x))
        y.mul_(self.scale)
        y += self.bias
        y += x
        return self.head(y.relu_().mean((2, 3)))


class Functional(nn.Module):
    """Parameters without modules, the weight of one layer frozen, a parameter subtracted and multiplied."""

    def __init__(self):
        super().__init__()
        self.w1, self.b1 = nn.Parameter(torch.randn(4, 3)), nn.Parameter(torch.zeros(4))
        self.w2, self.offset = nn.Parameter(torch.randn(4, 3)), nn.Parameter(torch.zeros(3))
        self.w1.requires_grad_(False)

    def forward(self, x: Tensor) -> Tensor:
        h = torch.tanh(F.linear(x, self.w1, self.b1)).matmul(self.w2)
        return self.offset * torch.add(h - self.offset, self.offset, alpha=3)


class Transformerlike(nn.Module):
    """A class token, position embeddings, single-head attention from plain calls, layer norms; outputs of each token or of the first."""

    def __init__(self, per_token: bool):
        super().__init__()
        self.per_token = per_token
        self.embed = nn.Embedding(6, 4)
        self.token, self.position = nn.Parameter(torch.zeros(1, 1, 4)), nn.Parameter(torch.zeros(1, 4, 4))
        self.norm, self.qkv, self.out = nn.LayerNorm(4), nn.Linear(4, 12), nn.Linear(4, 4)
        self.norm2, self.up, self.down = nn.RMSNorm(4), nn.Linear(4, 6), nn.Linear(6, 4)
        self.head = nn.Linear(4, 3)

    def forward(self, x: Tensor) -> Tensor:
        h = torch.cat([self.token.expand(len(x), -1, -1), self.embed(x)], 1) + self.position
        q, k, v = self.qkv(self.norm(h)).chunk(3, -1)
        h = h + self.out(F.scaled_dot_product_attention(q, k, v))
        h = h + self.down(F.gelu(self.up(self.norm2(h))))
        return self.head(h if self.per_token else h[:, 0])


class FoldedTime(nn.Module):
    """Examples and time folded into one axis, grouped by example."""

    def __init__(self):
        super().__init__()
        self.inner, self.norm, self.scale, self.head = nn.Linear(3, 4), nn.LayerNorm(4), Scale(), nn.Linear(4, 2)

    def forward(self, x: Tensor) -> Tensor:
        h = torch.tanh(self.scale(self.norm(self.inner(x.flatten(0, 1)))))
        return self.head(h).unflatten(0, x.shape[:2]).sum(1)


class CalledTwiceNet(nn.Module):
    """A layer used twice, one call after the other."""

    def __init__(self):
        super().__init__()
        self.layer, self.head = nn.Linear(3, 3), nn.Linear(3, 3)

    def forward(self, x: Tensor) -> Tensor:
        return self.head(torch.tanh(self.layer(torch.tanh(self.layer(x)))))


class ResidualBlocks(nn.Module):
    """A residual network as torchvision writes it: in-place ReLU modules, batch norms, `+=`, a convolution in the shortcut."""

    def __init__(self):
        super().__init__()
        self.conv1, self.bn1 = nn.Conv2d(2, 3, 3, padding=1, bias=False), nn.BatchNorm2d(3)
        self.conv2, self.bn2 = nn.Conv2d(3, 4, 3, 2, 1, bias=False), nn.BatchNorm2d(4)
        self.down = nn.Sequential(nn.Conv2d(3, 4, 1, 2, bias=False), nn.BatchNorm2d(4))
        self.relu, self.pool, self.fc = nn.ReLU(inplace=True), nn.AdaptiveAvgPool2d((1, 1)), nn.Linear(4, 3)

    def forward(self, x: Tensor) -> Tensor:
        x = self.relu(self.bn1(self.conv1(x)))
        out = self.bn2(self.conv2(x))
        out += self.down(x)
        out = self.pool(self.relu(out))
        return self.fc(torch.flatten(out, 1))


class VisionTransformer(nn.Module):
    """Patches, a pre-norm block with multi-head attention from plain calls, GELU, the mean over tokens."""

    def __init__(self):
        super().__init__()
        self.patch = nn.Conv2d(2, 4, 2, 2)
        self.norm1, self.qkv, self.proj = nn.LayerNorm(4), nn.Linear(4, 12), nn.Linear(4, 4)
        self.norm2, self.mlp = nn.LayerNorm(4), nn.Sequential(nn.Linear(4, 6), nn.GELU(), nn.Linear(6, 4))
        self.norm, self.head = nn.LayerNorm(4), nn.Linear(4, 3)

    def forward(self, x: Tensor) -> Tensor:
        h = self.patch(x).flatten(2).transpose(1, 2)
        q, k, v = self.qkv(self.norm1(h)).unflatten(-1, (3, 2, 2)).permute(2, 0, 3, 1, 4).unbind(0)
        a = F.scaled_dot_product_attention(q, k, v).transpose(1, 2).flatten(2)
        h = h + self.proj(a)
        h = h + self.mlp(self.norm2(h))
        return self.head(self.norm(h).mean(1))


class CrossAttention(nn.Module):
    """`nn.MultiheadAttention` of queries on fewer keys; its weights are used, and a mask."""

    def __init__(self):
        super().__init__()
        self.inner, self.attention = nn.Linear(3, 4), nn.MultiheadAttention(4, 2, batch_first=True)
        self.head = nn.Linear(4, 3)

    def forward(self, x: Tensor) -> Tensor:
        h = torch.tanh(self.inner(x))
        rows = [[False, True]] + [[False, False]] * (x.shape[1] - 1)
        first_query_sees_first_key_alone = torch.tensor(rows, device=x.device)
        a, weights = self.attention(h, h[:, :2], h[:, :2] ** 2, attn_mask=first_query_sees_first_key_alone)
        return self.head(a.mean(1)) + weights.sum((1, 2))[:, None] ** 2


class Positions(nn.Module):
    """Positions added to every example: an embedding looked up once, a slice of a parameter, a table of relative positions."""

    def __init__(self, look_up: Callable[[nn.Embedding, Tensor], Tensor]):
        super().__init__()
        self.look_up = look_up
        self.tokens, self.positions = nn.Embedding(6, 4), nn.Embedding(7, 4)
        self.shift, self.table = nn.Parameter(torch.zeros(1, 7, 4)), nn.Parameter(torch.zeros(5, 2))
        self.head = nn.Linear(4, 3)

    def forward(self, x: Tensor) -> Tensor:
        n_tokens = x.shape[1]
        h = (
            self.tokens(x)
            + self.look_up(self.positions, torch.arange(n_tokens, device=x.device))
            + self.shift[:, 1 : n_tokens + 1]
        )
        relative = torch.arange(n_tokens**2, device=x.device).reshape(n_tokens, n_tokens) % 5
        q = h.unflatten(-1, (2, 2)).transpose(1, 2)
        scores = torch.tanh(q @ q.mT) + self.table[relative].permute(2, 0, 1).unsqueeze(0)
        return self.head(torch.tanh(scores.softmax(-1) @ q).transpose(1, 2).flatten(2).mean(1))


class LowRankAdapters(nn.Module):
    """A frozen base with trainable low-rank adapters beside it, as modules and as bare parameters [Hu et al. 2022]."""

    def __init__(self, bare: bool):
        super().__init__()
        self.base1, self.base2 = nn.Linear(3, 5), nn.Linear(5, 3)
        self.down, self.up = nn.Linear(3, 2, bias=False), nn.Linear(2, 5, bias=False)
        if bare:
            self.A, self.B = nn.Parameter(torch.randn(5, 2)), nn.Parameter(torch.randn(2, 3))
        self.base1.requires_grad_(False)
        self.base2.requires_grad_(False)

    def forward(self, x: Tensor) -> Tensor:
        h = torch.relu(self.base1(x) + self.up(self.down(x)) * 0.5)
        out = self.base2(h)
        return out + h @ self.A @ self.B if hasattr(self, "A") else out


class MessagePassing(nn.Module):
    """Messages along edges, summed at their target nodes, and the mean over the nodes of a graph."""

    def __init__(self):
        super().__init__()
        self.embed, self.norm, self.message = nn.Linear(2, 3), nn.LayerNorm(3), nn.Linear(6, 3)
        self.head = nn.Linear(3, 3)

    def forward(self, batch: GraphBatch) -> Tensor:
        with row_examples(batch.graph):
            h = torch.tanh(self.norm(self.embed(batch.nodes)))
        source, target = batch.edges
        with row_examples(batch.graph_of_edge):
            messages = torch.tanh(self.message(torch.cat([h[source], h[target]], 1)))
        return self.head(batch.mean(h.index_add(0, target, messages)))


def graphs() -> GraphBatch:
    """Graphs of 1 to 4 nodes and 0 to 9 edges; as many nodes as edges in the first two, as many edges as graphs in the last two."""
    sizes = [(3, 6), (4, 1), (1, 0), (2, 1), (2, 1)]
    return GraphBatch.from_graphs(
        [(torch.randn(v, 2, dtype=torch.float64), torch.randint(0, v, (2, e))) for v, e in sizes]
    )


def mlp_in_place() -> nn.Module:
    """An in-place activation on the view that a Linear with a bias returns on inputs of three dimensions."""
    return nn.Sequential(nn.Linear(3, 4), nn.ReLU(inplace=True), nn.Linear(4, 3))


def frozen_cnn() -> nn.Module:
    """The first layer frozen, and the weight but not the bias of the last."""
    model = cnn()
    model[0].requires_grad_(False)
    model[-1].weight.requires_grad_(False)
    return model


def cnn() -> nn.Module:
    return nn.Sequential(
        nn.Conv2d(2, 3, 3, padding=1),
        nn.ReLU(),
        nn.MaxPool2d(2),
        nn.Conv2d(3, 4, 2, bias=False),
        nn.Sigmoid(),
        nn.AvgPool2d(1),
        nn.Flatten(),
        nn.Dropout(0.5),
        nn.Linear(4, 3),
    )


def scalars() -> nn.Module:
    """Scales and biases as modules, the toolkit's and ASDL's, slopes, and norms over features."""
    first = [nn.Linear(3, 4), nn.LayerNorm(4), Bias(), nn.Tanh(), Scale(), nn.PReLU(4), nn.Linear(4, 4), nn.PReLU()]
    return nn.Sequential(*first, asdl.Bias(), nn.SiLU(), nn.RMSNorm(4), asdl.Scale(), nn.Linear(4, 3))


def conv1d() -> nn.Module:
    """Outputs of each position: a sequence model."""

    class ChannelsLast(nn.Module):
        def forward(self, x: Tensor) -> Tensor:
            return x.transpose(1, 2)

    return nn.Sequential(
        nn.Conv1d(2, 3, 3, padding=1),
        nn.GroupNorm(1, 3),
        nn.ELU(),
        nn.Conv1d(3, 3, 1),
        ChannelsLast(),
        nn.Linear(3, 4),
        nn.ReLU(inplace=True),
        nn.Linear(4, 3),
    )


def conv3d() -> nn.Module:
    return nn.Sequential(
        nn.Conv3d(1, 2, 2, stride=(1, 2, 1)),
        nn.BatchNorm3d(2),
        nn.ReLU(),
        nn.Conv3d(2, 2, 1),
        nn.InstanceNorm3d(2, affine=True, track_running_stats=True),
        nn.Tanh(),
        nn.AdaptiveAvgPool3d(1),
        nn.Flatten(),
        nn.Linear(2, 3),
    )


def encoder() -> nn.Module:
    layer = nn.TransformerEncoderLayer(4, 2, 6, batch_first=True)
    return nn.Sequential(nn.Linear(3, 4), layer, nn.Linear(4, 3))


def mlp(n_outputs: int) -> nn.Module:
    return nn.Sequential(nn.Linear(3, 4), nn.Tanh(), nn.Linear(4, n_outputs))


class UNet(nn.Module):
    """Down and up again by a transposed convolution, beside a skip; one row of outputs per pixel."""

    def __init__(self):
        super().__init__()
        self.down, self.up = nn.Conv2d(2, 3, 2, stride=2), nn.ConvTranspose2d(3, 2, 2, stride=2)
        self.head = nn.Conv2d(4, 2, 1)

    def forward(self, x: Tensor) -> Tensor:
        up = self.up(torch.tanh(self.down(x)))
        return self.head(torch.cat([x, torch.tanh(up)], 1)).flatten(2).transpose(1, 2)


class Recurrent(nn.Module):
    """An LSTM in both directions, and a GRU over its outputs."""

    def __init__(self):
        super().__init__()
        self.lstm = nn.LSTM(3, 2, batch_first=True, bidirectional=True)
        self.gru, self.head = nn.GRU(4, 3, batch_first=True), nn.Linear(3, 3)

    def forward(self, x: Tensor) -> Tensor:
        return self.head(self.gru(self.lstm(x)[0])[1][0])


class EinsumAttention(nn.Module):
    """Attention with a weight for each head, as einsum has it."""

    def __init__(self):
        super().__init__()
        self.q, self.k, self.v = (nn.Parameter(torch.randn(3, 2, 2)) for _ in range(3))
        self.o = nn.Parameter(torch.randn(2, 2, 3))

    def forward(self, x: Tensor) -> Tensor:
        q, k, v = (torch.einsum("ntd,dhe->nhte", x, w) for w in (self.q, self.k, self.v))
        return torch.einsum("nhte,hed->ntd", (q @ k.mT).softmax(-1) @ v, self.o).mean(1)


class Experts(nn.Module):
    """Tokens routed to stacked experts by a mask."""

    def __init__(self):
        super().__init__()
        self.inner, self.w, self.b = (
            nn.Linear(3, 3),
            nn.Parameter(torch.randn(3, 3, 3)),
            nn.Parameter(torch.randn(3, 3)),
        )

    def forward(self, x: Tensor) -> Tensor:
        h = torch.tanh(self.inner(x))
        chosen, out = h.detach().argmax(-1), torch.zeros_like(h)
        for expert in range(3):
            mask = chosen == expert
            if mask.any():
                out[mask] = torch.tanh(nn.functional.linear(h[mask], self.w[expert], self.b[expert]))
        return out.sum(1)


class TimeFirst(nn.Module):
    """An encoder layer that takes the time as its first axis."""

    def __init__(self):
        super().__init__()
        self.layer = nn.TransformerEncoderLayer(4, 2, 5, dropout=0.0, batch_first=False)
        self.inner = nn.Linear(3, 4)

    def forward(self, x: Tensor) -> Tensor:
        return self.layer(self.inner(x).transpose(0, 1)).mean(0)


class Expressions(nn.Module):
    """Parameters that enter by what is computed from them: a scale kept positive, positions of rows and columns, a merged adapter."""

    def __init__(self):
        super().__init__()
        self.log_scale, self.rows, self.columns = (nn.Parameter(torch.randn(s)) for s in ((3,), (4, 1), (1, 3)))
        self.w, self.a, self.b = (nn.Parameter(torch.randn(s)) for s in ((3, 3), (3, 1), (1, 3)))
        self.head = nn.Linear(3, 3)

    def forward(self, x: Tensor) -> Tensor:
        h = torch.tanh(x * self.log_scale.exp() + (self.rows + self.columns))
        return self.head(nn.functional.linear(h, self.w + self.a @ self.b).tanh().mean(1))

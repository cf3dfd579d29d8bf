"""The networks of the study, in plain torch: message passing on molecules, and a vision transformer."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from jaxtyping import Float
from torch import Tensor, nn

from laplace_ws import row_examples
from train_kfac.molecules import N_ATOM_FEATURES, N_BOND_FEATURES, MoleculeBatch


class _Update(nn.Sequential):
    """Two layers with a norm behind them."""

    def __init__(self, n_inputs: int, width: int):
        super().__init__(nn.Linear(n_inputs, width), nn.ReLU(), nn.Linear(width, width), nn.LayerNorm(width))


class _Block(nn.Module):
    """One round of messages along bonds, to atoms, and to the molecule [Battaglia et al. 2018]."""

    def __init__(self, width: int):
        super().__init__()
        self.of_bonds, self.of_atoms = _Update(4 * width, width), _Update(3 * width, width)
        self.of_molecules = _Update(3 * width, width)

    def forward(self, h: Tensor, e: Tensor, u: Tensor, batch: MoleculeBatch) -> tuple[Tensor, Tensor, Tensor]:
        source, target = batch.ends
        bond_molecule = batch.molecule[source]
        with row_examples(bond_molecule):
            e = e + self.of_bonds(torch.cat([e, h[source], h[target], u[bond_molecule]], 1))
        messages = torch.zeros_like(h).index_add(0, target, e)
        with row_examples(batch.molecule):
            h = h + self.of_atoms(torch.cat([h, messages, u[batch.molecule]], 1))
        means = [_mean(h, batch.molecule, batch.n), _mean(e, bond_molecule, batch.n)]
        u = u + self.of_molecules(torch.cat([u, *means], 1))
        return h, e, u


class GraphNetwork(nn.Module):
    """A number for each molecule, from blocks that update bonds, atoms and the molecule in turn."""

    def __init__(self, width: int = 64, n_blocks: int = 3):
        super().__init__()
        self.atoms, self.bonds = nn.Linear(N_ATOM_FEATURES, width), nn.Linear(N_BOND_FEATURES, width)
        self.blocks = nn.ModuleList(_Block(width) for _ in range(n_blocks))
        self.head = nn.Sequential(nn.Linear(width, width), nn.ReLU(), nn.Linear(width, 1))
        self.width = width

    def forward(self, batch: MoleculeBatch) -> Float[Tensor, " N"]:
        with row_examples(batch.molecule):
            h = self.atoms(batch.atoms)
        with row_examples(batch.molecule[batch.ends[0]]):
            e = self.bonds(batch.bonds)
        u = h.new_zeros(batch.n, self.width)
        for block in self.blocks:
            h, e, u = block(h, e, u, batch)
        return self.head(u)[:, 0]


def _mean(x: Float[Tensor, "V D"], molecule: Tensor, n: int) -> Float[Tensor, "N D"]:
    sizes = torch.bincount(molecule, minlength=n).clamp(min=1)
    return x.new_zeros(n, x.shape[1]).index_add(0, molecule, x) / sizes[:, None]


class _Encoder(nn.Module):
    """Attention and a perceptron, each behind a norm and beside a shortcut."""

    def __init__(self, width: int, n_heads: int):
        super().__init__()
        self.norm1, self.qkv, self.out = nn.LayerNorm(width), nn.Linear(width, 3 * width), nn.Linear(width, width)
        self.norm2, self.up, self.down = (
            nn.LayerNorm(width),
            nn.Linear(width, 4 * width),
            nn.Linear(4 * width, width),
        )
        self.n_heads = n_heads

    def forward(self, x: Float[Tensor, "N T D"]) -> Float[Tensor, "N T D"]:
        q, k, v = self.qkv(self.norm1(x)).unflatten(-1, (3, self.n_heads, -1)).permute(2, 0, 3, 1, 4)
        x = x + self.out(F.scaled_dot_product_attention(q, k, v).transpose(1, 2).flatten(2))
        return x + self.down(F.gelu(self.up(self.norm2(x))))


class VisionTransformer(nn.Module):
    """Patches, a pre-norm transformer, the mean over tokens [Dosovitskiy et al. 2021; Zhai et al. 2022]."""

    def __init__(
        self, size: int = 32, patch: int = 8, width: int = 64, depth: int = 4, n_heads: int = 4, n_classes: int = 10
    ):
        super().__init__()
        self.patch = nn.Conv2d(3, width, patch, patch)
        self.position = nn.Parameter(0.02 * torch.randn(1, (size // patch) ** 2, width))
        self.blocks = nn.Sequential(*(_Encoder(width, n_heads) for _ in range(depth)))
        self.norm, self.head = nn.LayerNorm(width), nn.Linear(width, n_classes)

    def forward(self, x: Float[Tensor, "N 3 H W"]) -> Float[Tensor, "N C"]:
        h = self.patch(x).flatten(2).mT + self.position
        return self.head(self.norm(self.blocks(h)).mean(1))

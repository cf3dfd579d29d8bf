"""Molecules with measured melting points, from the tables of the package `chemicals`, as graphs of atoms and bonds."""

from __future__ import annotations

import csv
import math
import statistics
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from jaxtyping import Float, Int
from torch import Tensor

ELEMENTS = ("C", "N", "O", "F", "P", "S", "Cl", "Br", "I")
N_ATOM_FEATURES = 26
N_BOND_FEATURES = 6


@dataclass(frozen=True, eq=False)
class MoleculeBatch:
    """Several molecules as one disconnected graph; an example is a molecule.

    Attributes:
        atoms: features of the atoms, `[V, 26]`.
        bonds: features of the bonds, each in both directions, `[E, 6]`.
        ends: source and target atom of each bond, `[2, E]`.
        molecule: molecule of each atom, `[V]`.
        n: N, the number of molecules.
    """

    atoms: Float[Tensor, "V F"]
    bonds: Float[Tensor, "E D"]
    ends: Int[Tensor, "2 E"]
    molecule: Int[Tensor, " V"]
    n: int

    def __len__(self) -> int:
        return self.n

    def __getitem__(self, chosen: slice) -> MoleculeBatch:
        numbers = range(self.n)[chosen]
        new = self.molecule.new_full((self.n,), -1)
        new[list(numbers)] = torch.arange(len(numbers), device=new.device)
        atoms = new[self.molecule] >= 0
        place = atoms.cumsum(0) - 1
        bonds = atoms[self.ends[0]]
        return MoleculeBatch(
            self.atoms[atoms], self.bonds[bonds], place[self.ends[:, bonds]], new[self.molecule[atoms]], len(numbers)
        )

    @property
    def device(self) -> torch.device:
        return self.atoms.device

    def to(self, device: torch.device | str) -> MoleculeBatch:
        atoms, bonds, ends, molecule = (t.to(device) for t in (self.atoms, self.bonds, self.ends, self.molecule))
        return MoleculeBatch(atoms, bonds, ends, molecule, self.n)


@dataclass(frozen=True, eq=False)
class Molecules:
    """All molecules side by side.

    Attributes:
        atoms, bonds, ends: of all, as in `MoleculeBatch`, with the atoms of each molecule counted from 0.
        n_atoms, n_bonds: of each, `[N]`.
        melting_point: of each, in K, `[N]`.
    """

    atoms: Tensor
    bonds: Tensor
    ends: Tensor
    n_atoms: Tensor
    n_bonds: Tensor
    melting_point: Tensor

    def __len__(self) -> int:
        return len(self.n_atoms)

    def batch(self, chosen: Int[Tensor, " N"]) -> MoleculeBatch:
        """Some of them."""
        atoms, molecule = _rows(self.n_atoms, chosen)
        bonds, of_bond = _rows(self.n_bonds, chosen)
        first = self.n_atoms[chosen].cumsum(0) - self.n_atoms[chosen]
        ends = self.ends[:, bonds] + first[of_bond]
        return MoleculeBatch(self.atoms[atoms], self.bonds[bonds], ends, molecule, len(chosen))

    def save(self, path: Path) -> None:
        """Keep them as tensors."""
        path.parent.mkdir(parents=True, exist_ok=True)
        torch.save(vars(self), path)

    @classmethod
    def load(cls, path: Path) -> Molecules:
        """Those of `save`."""
        return cls(**torch.load(path, weights_only=True))


def _rows(counts: Tensor, chosen: Tensor) -> tuple[Tensor, Tensor]:
    """Rows of the chosen examples in a tensor that holds those of all one after the other, and which of the chosen each belongs to."""
    own = counts[chosen]
    starts = (counts.cumsum(0) - counts)[chosen]
    example = torch.arange(len(chosen)).repeat_interleave(own)
    within = torch.arange(int(own.sum())) - (own.cumsum(0) - own)[example]
    return starts[example] + within, example


def load_molecules(cache: Path) -> Molecules:
    """The molecules, from `cache` if they are there; else made by rdkit from the tables of `chemicals`, and kept."""
    if cache.exists():
        return Molecules.load(cache)
    known = [(row.smiles, row.melting_point) for row in melting_point_rows() if row.smiles is not None]
    molecules = molecules_of(structures_of(known))
    molecules.save(cache)
    return molecules


@dataclass(frozen=True)
class Substance:
    """A row of the table of melting points.

    Attributes:
        smiles: its structure; None where the package does not know it.
        melting_point: in K.
    """

    smiles: str | None
    melting_point: float


def melting_point_rows() -> list[Substance]:
    """The table of melting points, joined with the structures of the same package by CAS number."""
    import chemicals
    from chemicals.identifiers import pubchem_db

    table = Path(chemicals.__file__).parent / "Phase Change" / "OpenNotebook Melting Points.tsv"
    with table.open(encoding="utf-8") as file:
        rows = [(row["CAS"], float(row["Tm"])) for row in csv.DictReader(file, delimiter="\t")]
    found = []
    for cas, melting_point in rows:
        entry: Any = pubchem_db.search_CAS(int(cas.replace("-", "")))
        is_known = bool(entry) and math.isfinite(melting_point)
        found.append(Substance(entry.smiles if is_known else None, melting_point))
    return found


def structures_of(rows: Sequence[tuple[str, float]]) -> dict[str, list[float]]:
    """By canonical SMILES, the melting points of each structure that rdkit can read and that has a bond."""
    from rdkit import Chem, RDLogger

    RDLogger.DisableLog("rdApp.*")  # pyright: ignore[reportAttributeAccessIssue]
    by_structure: dict[str, list[float]] = {}
    for smiles, melting_point in rows:
        molecule = Chem.MolFromSmiles(smiles)
        if molecule is not None and molecule.GetNumBonds():
            by_structure.setdefault(Chem.MolToSmiles(molecule), []).append(melting_point)
    return by_structure


def molecules_of(by_structure: Mapping[str, Sequence[float]]) -> Molecules:
    """The graphs of structures, each with the median of its melting points."""
    from rdkit import Chem

    atoms, bonds, ends, n_atoms, n_bonds, melting_points = [], [], [], [], [], []
    for smiles, values in by_structure.items():
        molecule = Chem.MolFromSmiles(smiles)
        atoms += [_atom_features(atom) for atom in molecule.GetAtoms()]
        pairs = [(b.GetBeginAtomIdx(), b.GetEndAtomIdx(), _bond_features(b)) for b in molecule.GetBonds()]
        for start, end, features in pairs:
            ends += [(start, end), (end, start)]
            bonds += [features, features]
        n_atoms.append(molecule.GetNumAtoms())
        n_bonds.append(2 * len(pairs))
        melting_points.append(statistics.median(values))  # of one structure under several numbers
    return Molecules(
        torch.tensor(atoms),
        torch.tensor(bonds),
        torch.tensor(ends).T.contiguous(),
        torch.tensor(n_atoms),
        torch.tensor(n_bonds),
        torch.tensor(melting_points),
    )


def _atom_features(atom) -> list[float]:
    """Element (10), neighbours 0 to 5 (6), hydrogens 0 to 4 (5), hybridisation (3), aromatic, charge."""
    element = ELEMENTS.index(atom.GetSymbol()) if atom.GetSymbol() in ELEMENTS else len(ELEMENTS)
    hybridisations = [str(atom.GetHybridization()) == name for name in ("SP", "SP2", "SP3")]
    return [
        *_one_hot(element, 10),
        *_one_hot(min(atom.GetDegree(), 5), 6),
        *_one_hot(min(atom.GetTotalNumHs(), 4), 5),
        *map(float, hybridisations),
        float(atom.GetIsAromatic()),
        float(atom.GetFormalCharge()),
    ]


def _bond_features(bond) -> list[float]:
    """Single, double, triple or aromatic; conjugated; in a ring."""
    kinds = [str(bond.GetBondType()) == name for name in ("SINGLE", "DOUBLE", "TRIPLE", "AROMATIC")]
    return [*map(float, kinds), float(bond.GetIsConjugated()), float(bond.IsInRing())]


def _one_hot(place: int, size: int) -> list[float]:
    return [float(i == place) for i in range(size)]

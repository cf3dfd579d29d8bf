"""The datasheet of the molecules that experiments/train_kfac.py learns melting points of, computed from their source.

    python experiments/describe_molecules.py

Prints, in Markdown, how many substances each filter leaves, structures that are there twice and by how much their values differ, what the
melting points and the graphs are like, and the parts. It takes about half a minute.
"""

from __future__ import annotations

import statistics
from collections.abc import Iterable, Sequence
from importlib.metadata import version

import torch
from rdkit import Chem
from torch import Tensor
from train_kfac.config import DataConfig
from train_kfac.molecules import Molecules, melting_point_rows, molecules_of, structures_of
from train_kfac.tasks import split

OUTLIER = 3.0
"""Standard deviations from the mean."""


def main() -> None:
    """Compute the datasheet and print it."""
    table = melting_point_rows()
    known = [(row.smiles, row.melting_point) for row in table if row.smiles is not None]
    structures = structures_of(known)
    print(f"chemicals {version('chemicals')}, rdkit {version('rdkit')}\n")
    print(_table(("substances", "number"), counts(table, known, structures)))
    print(_table(("melting points, atoms and bonds", "value"), properties(molecules_of(structures))))


def counts(
    table: Sequence[object], known: Sequence[tuple[str, float]], structures: dict[str, list[float]]
) -> list[tuple[str, str]]:
    """What each filter leaves, and what is there several times."""
    graphs: dict[str, list[float]] = {}
    for smiles, values in structures.items():
        graphs.setdefault(_without_stereo(smiles), []).extend(values)
    spreads = [max(values) - min(values) for values in graphs.values() if len(values) > 1]
    return [
        ("rows of the table", f"{len(table):,}"),
        ("with a structure (SMILES) in the same package", f"{len(known):,}"),
        ("that rdkit can read and that have a bond", f"{sum(map(len, structures.values())):,}"),
        ("different structures (canonical SMILES): what is used", f"{len(structures):,}"),
        ("different graphs, which do not tell stereoisomers apart", f"{len(graphs):,}"),
        ("… graphs with several melting points", f"{len(spreads):,}"),
        ("… median, largest difference of these", f"{_median(spreads):.1f} K, {max(spreads, default=0):.1f} K"),
        ("structures of several parts (salts, solvates)", f"{sum('.' in smiles for smiles in structures):,}"),
    ]


def _without_stereo(smiles: str) -> str:
    return Chem.MolToSmiles(Chem.MolFromSmiles(smiles), isomericSmiles=False)


def properties(molecules: Molecules) -> list[tuple[str, str]]:
    """What the data are like."""
    y, atoms, bonds = molecules.melting_point, molecules.n_atoms.float(), molecules.n_bonds.float()
    far = ((y - y.mean()).abs() > OUTLIER * y.std()).sum()
    parts = split(len(molecules), DataConfig("molecules"), n_test=DataConfig("molecules").n_validation)
    train, test = y[parts["train"]], y[parts["test"]]
    return [
        ("melting point, mean ± standard deviation", f"{y.mean():.1f} ± {y.std():.1f} K"),
        ("… smallest, median, largest", f"{y.min():.1f}, {y.median():.1f}, {y.max():.1f} K"),
        (f"… more than {OUTLIER:g} standard deviations from the mean (kept)", f"{int(far):,}"),
        ("atoms but hydrogen: mean, most", _mean_and_most(atoms)),
        ("directed bonds: mean, most", _mean_and_most(bonds)),
        ("features of an atom, of a bond", f"{molecules.atoms.shape[1]}, {molecules.bonds.shape[1]}"),
        ("training, validation, test", ", ".join(f"{len(parts[p]):,}" for p in ("train", "validation", "test"))),
        ("test error of the mean of the training part", f"{(test - train.mean()).abs().mean():.1f} K"),
    ]


def _mean_and_most(counts: Tensor) -> str:
    return f"{counts.mean():.1f}, {int(counts.max())}"


def _median(values: Sequence[float]) -> float:
    return statistics.median(values) if values else 0.0


def _table(header: tuple[str, str], rows: Iterable[tuple[str, str]]) -> str:
    return "\n".join(f"| {left} | {right} |" for left, right in (header, ("---", "---"), *rows)) + "\n"


if __name__ == "__main__":
    torch.set_num_threads(1)
    main()

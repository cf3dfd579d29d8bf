"""What a benchmark of curvature measures: one dataclass per section of the YAML file."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass, field
from typing import Literal, NamedTuple

from bench_curvature.contestants import CONTESTANTS
from laplace_ws.curvature import Curvature
from laplace_ws.errors import InputError
from laplace_ws.kfac import FactorPrecision, KfacApprox
from laplace_ws.models import Norm, WideResNet
from laplace_ws.registry import unknown_name

APPROXIMATIONS = (KfacApprox.REDUCE.value, KfacApprox.EXPAND.value)
CURVATURES = tuple(curvature.value for curvature in Curvature)
USUAL_CURVATURES = (Curvature.GGN.value, Curvature.GGN_MC.value, Curvature.EF.value)


class BenchError(InputError):
    """The configuration does not allow the benchmark; the message says how to mend it."""


class Case(NamedTuple):
    """What is computed: an approximation and a curvature."""

    kfac_approx: str
    curvature: str


@dataclass(frozen=True)
class NetworkConfig:
    """The Wide ResNet whose curvature is measured.

    Attributes:
        depth: layers, 6n + 4.
        width: width factor.
        norm: fixup, batch, group or none.
        n_classes: outputs.
        image_size: sides of the images, of 3 channels.
        n_images: images of a batch.
    """

    depth: int = 16
    width: int = 4
    norm: str = "none"
    n_classes: int = 10
    image_size: int = 32
    n_images: int = 32


@dataclass(frozen=True)
class CurvesConfig:
    """Cost of our native backend, exact GGN, on a smaller network by batch size and by number of classes; empty lists leave it out.

    Attributes:
        depth: of the Wide ResNet.
        width: of the Wide ResNet.
        batch_sizes: images of a batch, with `network.n_classes` classes.
        n_classes: outputs, with `network.n_images` images.
        n_repeats: timings of each point in a process.
    """

    depth: int = 10
    width: int = 1
    batch_sizes: list[int] = field(default_factory=lambda: [8, 16, 32, 64, 128, 256])
    n_classes: list[int] = field(default_factory=lambda: [2, 5, 10, 20, 50, 100])
    n_repeats: int = 3


@dataclass(frozen=True)
class UpdatesConfig:
    """Time of one K-FAC factor update (`ggn_mc`, native backend) on the network, by batch size; an empty list leaves it out.

    Attributes:
        device: where it runs; without a GPU, the rows of cuda are listed as unmeasured.
        batch_sizes: images of a batch.
        precisions: `factor_precision` of the factors' matrix products, each measured by itself: float32, tf32, bf16.
    """

    device: Literal["cpu", "cuda"] = "cuda"
    batch_sizes: list[int] = field(default_factory=lambda: [128, 256, 512, 1024, 2048])
    precisions: list[str] = field(default_factory=lambda: ["float32"])


@dataclass(frozen=True)
class BenchConfig:
    """One benchmark.

    Attributes:
        name: of the files that are written.
        out: their folder.
        docs: markdown file whose section of this name is written anew; none if not given.
        seed: of weights, images and sampled labels.
        device: cpu measures CPU time, cuda milliseconds between synchronisations.
        threads: of torch in each process.
        contestants: who is measured, ours and others.
        kfac_approxes: of reduce, expand.
        curvatures: ggn, ggn_mc (one sample), ef, or another that we have.
        n_rounds: rounds; in each, every contestant has a process of its own.
        n_repeats: timings of each case in a process.
        memory: whether to measure peak memory too, in further processes.
        network: what the contestants are measured on.
        curves: cost by batch size and by number of classes.
        updates: cost of one factor update by batch size, on a GPU.
    """

    name: str = "bench_curvature"
    out: str = "runs"
    docs: str | None = None
    seed: int = 0
    device: Literal["cpu", "cuda"] = "cpu"
    threads: int = 1
    contestants: list[str] = field(default_factory=lambda: list(CONTESTANTS))
    kfac_approxes: list[str] = field(default_factory=lambda: list(APPROXIMATIONS))
    curvatures: list[str] = field(default_factory=lambda: list(USUAL_CURVATURES))
    n_rounds: int = 3
    n_repeats: int = 3
    memory: bool = True
    network: NetworkConfig = field(default_factory=NetworkConfig)
    curves: CurvesConfig = field(default_factory=CurvesConfig)
    updates: UpdatesConfig = field(default_factory=UpdatesConfig)

    def cases(self) -> list[Case]:
        """Every approximation with every curvature."""
        return [Case(approx, curvature) for approx in self.kfac_approxes for curvature in self.curvatures]


def check_config(config: BenchConfig) -> None:
    """Refuse what cannot be measured, before any work.

    Raises:
        BenchError: says which value is wrong, and what is possible.
    """
    check_names("contestant", config.contestants, CONTESTANTS)
    check_names("kfac_approx", config.kfac_approxes, APPROXIMATIONS)
    check_names("curvature", config.curvatures, CURVATURES)
    check_names("precision", config.updates.precisions, [precision.value for precision in FactorPrecision])
    for key, value in _counts(config):
        if value < 1:
            raise BenchError(f"{key}={value} must be at least 1")
    for section in (config.network, config.curves):
        try:
            WideResNet(section.depth, section.width, norm=Norm(config.network.norm))
        except ValueError as error:
            raise BenchError(str(error)) from error


def check_names(kind: str, names: list[str], known: Iterable[str]) -> None:
    """Refuse names that are not known, or given twice.

    Raises:
        BenchError: says which, and the nearest known one.
    """
    known = list(known)
    for i, name in enumerate(names):
        if name not in known:
            raise BenchError(str(unknown_name(kind, name, known)))
        if name in names[:i]:
            raise BenchError(f"{kind} '{name}' is given twice")


def _counts(config: BenchConfig) -> Iterable[tuple[str, int]]:
    yield from (("threads", config.threads), ("n_rounds", config.n_rounds), ("n_repeats", config.n_repeats))
    network = config.network
    yield from (("network.image_size", network.image_size), ("network.n_images", network.n_images))
    yield "network.n_classes", network.n_classes
    lists = {"curves.batch_sizes": config.curves.batch_sizes, "curves.n_classes": config.curves.n_classes}
    for key, values in (lists | {"updates.batch_sizes": config.updates.batch_sizes}).items():
        yield from ((key, value) for value in values)

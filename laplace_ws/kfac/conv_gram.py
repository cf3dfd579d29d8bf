"""Input factor of a convolution in the expand setting, without its patches.

The Gram matrix of patches is, entry by entry, a correlation of the input with itself: taps k and k' of one output position read two pixels
that lie k' − k apart, wherever the position is. So the entries of all pairs of taps at the same distance come from one product of the
shifted input with itself, less what a few rows at the border add for some of the pairs but not for others. With strides, the taps that
read the same *phase* of the input (the pixels φ, φ + s, φ + 2s, …) correlate among themselves, and pairs of phases with each other.

Everything is linear in the products of pixels, so products are summed over batches and assembled once, at the end.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Mapping
from dataclasses import dataclass
from functools import lru_cache
from itertools import combinations_with_replacement, pairwise, product
from math import ceil, prod

import torch
from jaxtyping import Float
from torch import Tensor

from laplace_ws.kfac.conv import ConvGeometry, n_positions
from laplace_ws.kfac.factors import cross_gram

Ranges = tuple[tuple[int, int], ...]
"""First pixel and end, for each axis."""


@dataclass(frozen=True)
class _Tap:
    """Where a tap reads: at output o the pixel φ + s(o + offset), for each axis."""

    phase: tuple[int, ...]
    offset: tuple[int, ...]


@dataclass(frozen=True)
class Region:
    """Pairs of pixels whose products are summed into one `[C, C]` matrix: pixel j of one phase, and j + shift of another.

    Attributes:
        phases: phases of the first pixel and of the second.
        shift: from the first to the second, in pixels of a phase; its first entry that is not zero is positive.
        ranges: range of j on each axis; None for every j at which both lie in the image.
    """

    phases: tuple[tuple[int, ...], tuple[int, ...]]
    shift: tuple[int, ...]
    ranges: Ranges | None


@dataclass(frozen=True, eq=False)
class Plan:
    """The products that make up the Gram matrix of a convolution's patches.

    Attributes:
        geometry: geometry of the convolution.
        size: spatial size of its input.
        regions: the products.
        pairs: pairs of taps (number of the first, of the second), each unordered pair once.
        entries: which products make up the matrix of each pair: number of the pair, number of the region, sign.
        reads: for each phase that occurs, the ranges of pixels that taps read on each axis; all others count as zeros, whatever they hold.
        length: pixels of the longest phase, for each axis.
        margin: zeros after each axis but the first, so that a shift is an offset in the flattened image.
    """

    geometry: ConvGeometry
    size: tuple[int, ...]
    regions: tuple[Region, ...]
    pairs: tuple[tuple[int, int], ...]
    entries: tuple[tuple[int, int, int], ...]
    reads: Mapping[tuple[int, ...], tuple[Ranges, ...]]
    length: tuple[int, ...]
    margin: tuple[int, ...]

    @property
    def n_shifts(self) -> int:
        """Products over the whole image."""
        return sum(region.ranges is None for region in self.regions)


@lru_cache(maxsize=64)
def make_plan(geometry: ConvGeometry, size: tuple[int, ...]) -> Plan:
    """Group the pairs of taps by phases and shift, and find the border rows in which the pairs of one group differ."""
    taps = [_tap(geometry, tap) for tap in product(*map(range, geometry.kernel))]
    n_out = [geometry.taps(axis, length).shape[1] for axis, length in enumerate(size)]
    lengths = {
        phase: tuple(_phase_length(geometry, size, axis, phase[axis]) for axis in range(len(size)))
        for phase in {tap.phase for tap in taps}
    }
    sorts: dict[Region, list[tuple[int, int]]] = defaultdict(list)
    for first, second in combinations_with_replacement(range(len(taps)), 2):
        whole, is_swapped = _whole(taps[first], taps[second])
        sorts[whole].append((second, first) if is_swapped else (first, second))
    regions: list[Region] = []
    entries: list[tuple[int, int, int]] = []
    pairs: list[tuple[int, int]] = []
    for whole, own_pairs in sorts.items():
        first_length, second_length = (lengths[phase] for phase in whole.phases)
        full = tuple(
            (max(0, -d), min(n, m - d)) for d, n, m in zip(whole.shift, first_length, second_length, strict=True)
        )
        if any(start >= end for start, end in full):
            pairs += own_pairs  # never two pixels of the image: zero
            continue
        used = [_used(full, taps[first].offset, n_out) for first, _ in own_pairs]
        cells = _cells(full, used)
        largest = max(cells, key=lambda cell: prod(end - start for start, end in cell))
        numbers = {cell: len(regions) + i for i, cell in enumerate(cells)}
        regions += [Region(whole.phases, whole.shift, None if cell == largest else cell) for cell in cells]
        for pair, ranges in zip(own_pairs, used, strict=True):
            inside = {cell for cell in cells if _is_inside(cell, ranges)}
            # the largest cell is not summed itself: it is the whole minus all the others
            signs = {numbers[cell]: int(cell in inside) for cell in cells}
            if largest in inside:
                signs = {number: sign - (number != numbers[largest]) for number, sign in signs.items()}
            entries += [(len(pairs), number, sign) for number, sign in signs.items() if sign]
            pairs.append(pair)
    axes = range(len(size))
    reads = {
        phase: tuple(
            _merged([(tap.offset[axis], n_out[axis]) for tap in taps if tap.phase == phase], own[axis]) for axis in axes
        )
        for phase, own in lengths.items()
    }
    margin = tuple(0 if axis == 0 else max((abs(r.shift[axis]) for r in regions), default=0) for axis in axes)
    length = tuple(max(own[axis] for own in lengths.values()) for axis in axes)
    return Plan(geometry, size, tuple(regions), tuple(pairs), tuple(entries), reads, length, margin)


def _tap(geometry: ConvGeometry, tap: tuple[int, ...]) -> _Tap:
    at_first_output = [
        k * d - before for k, d, (before, _) in zip(tap, geometry.dilation, geometry.padding, strict=True)
    ]
    both = [divmod(pixel, s) for pixel, s in zip(at_first_output, geometry.stride, strict=True)]
    return _Tap(tuple(phase for _, phase in both), tuple(offset for offset, _ in both))


def _merged(reads: list[tuple[int, int]], length: int) -> Ranges:
    """The ranges of pixels inside an image that runs of reads (first pixel, number) cover."""
    merged: list[tuple[int, int]] = []
    for start, n in sorted(set(reads)):
        start, end = max(0, start), min(length, start + n)
        if merged and start <= merged[-1][1]:
            merged[-1] = (merged[-1][0], max(end, merged[-1][1]))
        elif start < end:
            merged.append((start, end))
    return tuple(merged)


def _phase_length(geometry: ConvGeometry, size: tuple[int, ...], axis: int, phase: int) -> int:
    return max(0, ceil((size[axis] - phase) / geometry.stride[axis]))


def _whole(first: _Tap, second: _Tap) -> tuple[Region, bool]:
    """The products that a pair of taps takes part in, and whether the taps are swapped for it."""
    shift = tuple(b - a for a, b in zip(first.offset, second.offset, strict=True))
    back = tuple(-d for d in shift)
    is_swapped = (back, second.phase) > (shift, first.phase)
    if is_swapped:
        return Region((second.phase, first.phase), back, None), True
    return Region((first.phase, second.phase), shift, None), False


def _used(full: Ranges, offset: tuple[int, ...], n_out: list[int]) -> Ranges:
    """Where in `full` the first tap of a pair reads; (0, 0) on an axis where it never does."""
    ranges = [(max(start, o), min(end, o + n)) for (start, end), o, n in zip(full, offset, n_out, strict=True)]
    return tuple((start, end) if start < end else (0, 0) for start, end in ranges)


def _cells(full: Ranges, used: list[Ranges]) -> list[Ranges]:
    """Cut `full` wherever the range of a pair begins or ends."""
    segments = []
    for axis, (start, end) in enumerate(full):
        cuts = {start, end} | {cut for ranges in used for cut in ranges[axis] if start < cut < end}
        segments.append(list(pairwise(sorted(cuts))))
    return list(product(*segments))


def _is_inside(cell: Ranges, ranges: Ranges) -> bool:
    return all(a <= start and end <= b for (start, end), (a, b) in zip(cell, ranges, strict=True))


class PatchGram:
    """Sums Σ a aᵀ over the patches a of a convolution's inputs, batch by batch, without forming them.

    Args:
        plan: plan of the convolution.
    """

    def __init__(self, plan: Plan):
        self.plan = plan
        self._products: Float[Tensor, "regions G C C"] | None = None

    def add(self, x: Float[Tensor, "N C *S"]) -> None:
        """Add the patches of a batch."""
        groups = self.plan.geometry.groups
        phases = {phase: self._phase(x, phase) for phase in self.plan.reads}
        if self._products is None:
            channels = x.shape[1] // groups
            self._products = x.new_zeros(len(self.plan.regions), groups, channels, channels)
        for region, total in zip(self.plan.regions, self._products, strict=True):
            total += _products(region, *(phases[phase] for phase in region.phases))

    def _phase(self, x: Tensor, phase: tuple[int, ...]) -> Float[Tensor, "N G C *S"]:
        """The pixels of a phase that are read, with zeros up to the longest phase and a margin after each axis but the first."""
        steps = (slice(p, None, s) for p, s in zip(phase, self.plan.geometry.stride, strict=True))
        pixels = x[(..., *steps)].unflatten(1, (self.plan.geometry.groups, -1))
        size = [n + m for n, m in zip(self.plan.length, self.plan.margin, strict=True)]
        reads = self.plan.reads[phase]
        if reads == tuple(((0, n),) for n in size) == tuple(((0, n),) for n in pixels.shape[3:]):
            return pixels.contiguous()
        out = x.new_zeros(*pixels.shape[:3], *size)
        for ranges in product(*reads):
            here = (..., *(slice(start, end) for start, end in ranges))
            out[here] = pixels[here]
        return out

    def result(self) -> Float[Tensor, "*G I I"]:
        """The Gram matrix; I runs over (channel in group, *kernel) row-major, as `weight.flatten(1)` does."""
        assert self._products is not None
        plan, total = self.plan, self._products
        groups, channels = total.shape[1:3]
        by_pair = total.new_zeros(len(plan.pairs), *total.shape[1:])  # [pairs, G, C, C]
        pairs, regions, signs = (
            torch.tensor(plan.entries, dtype=torch.long, device=total.device).reshape(-1, 3).unbind(1)
        )
        by_pair.index_add_(0, pairs, total[regions] * signs.to(total)[:, None, None, None])
        n_taps = prod(plan.geometry.kernel)
        out = total.new_zeros(groups, channels, n_taps, channels, n_taps)
        first, second = torch.tensor(plan.pairs, device=total.device).unbind(1)
        out.permute(2, 4, 0, 1, 3)[second, first] = by_pair.mT
        out.permute(2, 4, 0, 1, 3)[first, second] = by_pair
        out = out.reshape(groups, channels * n_taps, channels * n_taps)
        return out[0] if groups == 1 else out


def _products(region: Region, first: Tensor, second: Tensor) -> Float[Tensor, "G C C"]:
    """Σ_n Σ_j first[n, :, j] second[n, :, j + shift]ᵀ."""
    if region.ranges is None:
        sizes = first.shape[3:]
        offset = sum(d * prod(sizes[axis + 1 :]) for axis, d in enumerate(region.shift))
        first, second = first.flatten(3), second.flatten(3)
        return cross_gram(first[..., : first.shape[-1] - offset], second[..., offset:])
    here = tuple(slice(start, end) for start, end in region.ranges)
    there = tuple(slice(start + d, end + d) for (start, end), d in zip(region.ranges, region.shift, strict=True))
    return cross_gram(first[(..., *here)].flatten(3), second[(..., *there)].flatten(3))


MOST_TAPS = 128
"""Kernels with more taps are not planned: the number of pairs of taps grows with the square."""
_COPY = 60
"""Cost of copying one number into a patch, in floating point operations of a matrix product."""
_CALL = 2_000_000
"""Cost of one small product, in the same unit."""


@lru_cache(maxsize=256)
def cheapest_plan(geometry: ConvGeometry, shape: tuple[int, ...]) -> Plan | None:
    """The plan of a convolution whose input has this shape `[N, C, *S]`, or None where forming the patches costs less.

    Compares operations: a patch for each output costs its copy and a product of I × I; a region costs a call and, where it is the whole
    image, a product of C × C over it. With stride 1 and enough channels the second is cheaper by a factor of about (K+1)/2 per axis.
    """
    n_taps = prod(geometry.kernel)
    n_examples, channels, *size = shape
    own_channels = channels // geometry.groups
    n_inputs = own_channels * n_taps
    of_patches = n_examples * n_positions(geometry, tuple(size)) * geometry.groups * n_inputs * (2 * n_inputs + _COPY)
    if n_taps > MOST_TAPS or _fewest_shifts(geometry) * _CALL >= of_patches:
        return None
    plan = make_plan(geometry, tuple(size))
    n_pixels = n_examples * prod(n + m for n, m in zip(plan.length, plan.margin, strict=True))
    of_shift = n_pixels * channels * (2 * own_channels + _COPY // 6)
    of_plan = plan.n_shifts * of_shift + len(plan.regions) * _CALL
    return plan if of_plan < of_patches else None


def _fewest_shifts(geometry: ConvGeometry) -> int:
    """The least number of products of a plan, counted without making it."""
    of_axes = 1
    for k, d, s, (before, _) in zip(geometry.kernel, geometry.dilation, geometry.stride, geometry.padding, strict=True):
        reads = [divmod(tap * d - before, s) for tap in range(k)]
        of_axes *= len({(phase, other_phase, other - own) for own, phase in reads for other, other_phase in reads})
    return (of_axes + 1) // 2

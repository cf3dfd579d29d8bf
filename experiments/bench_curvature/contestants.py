"""Who is measured: our backends, and the libraries that compute Kronecker factors too."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

from bench_curvature import ours, peers
from bench_curvature.setting import Setting, Work


@dataclass(frozen=True)
class Contestant:
    """A way to compute the Kronecker factors of a batch.

    Attributes:
        prepare: makes the model ready and returns what computes the curvature of the batch, to be called once per batch.
        module: imported before anything is timed.
        distribution: the installed distribution whose version is reported; "" for our own.
        computes: what it computes, where that is not our quantity, and what a batch includes.
    """

    prepare: Callable[[Setting], Work]
    module: str
    distribution: str = ""
    computes: str = ""


_OURS = (
    "factors of every parameter, summed over batches; columns of the exact GGN that vanish are left out, of a softmax at least one of C; "
    "the check of the model is in the first batch"
)
_CURVLINOPS = "the same factors, summed over batches by one operator; `check_deterministic=False`, as a fit by laplace-torch has it"
_LAPLACE = "the body of the loop of `KronLaplace.fit`: factors, loss, running sum; its eigendecomposition is left out"
_ASDL = (
    "K-FAC-expand alone; the factors of convolutions, and of a linear layer on vectors, are ours as sums over the data"
)
_BACKPACK = (
    "one approximation for convolutions, neither of the two: A is R times that of expand, B that of reduce; listed with expand, whose "
    "unfolded inputs it needs. Mean loss; the gradient comes with it; nothing is summed over batches. The network is converted by "
    "`use_converter`, its adaptive pooling replaced by `AvgPool2d`"
)

CONTESTANTS: dict[str, Contestant] = {
    "ours-native": Contestant(ours.preparer("native"), "laplace_ws.curvature", computes=_OURS),
    "ours-asdl": Contestant(ours.preparer("asdl"), "laplace_ws.curvature.asdl", "asdfghjkl", _OURS),
    "ours-backpack": Contestant(
        ours.preparer("backpack"), "laplace_ws.curvature.backpack", "backpack-for-pytorch", _OURS
    ),
    "curvlinops": Contestant(peers.curvlinops, "curvlinops", "curvlinops-for-pytorch", _CURVLINOPS),
    "laplace-curvlinops": Contestant(
        peers.laplace_torch("Curvlinops"), "laplace.curvature.curvlinops", "laplace-torch", _LAPLACE
    ),
    "laplace-asdl": Contestant(
        peers.laplace_torch("Asdl"), "laplace.curvature.asdl", "laplace-torch", f"{_LAPLACE}; {_ASDL}"
    ),
    "laplace-backpack": Contestant(
        peers.laplace_torch("BackPack"),
        "laplace.curvature.backpack",
        "laplace-torch",
        f"{_LAPLACE}; BackPACK's factors",
    ),
    "asdl": Contestant(peers.asdl, "asdl", "asdfghjkl", f"{_ASDL}; `accumulate=True`"),
    "backpack": Contestant(
        peers.backpack, "backpack", "backpack-for-pytorch", f"KFLR for ggn, KFAC for ggn_mc; {_BACKPACK}"
    ),
    "backpack-kfra": Contestant(
        peers.backpack_kfra,
        "backpack",
        "backpack-for-pytorch",
        "KFRA: the recursion that averages over the batch at every layer",
    ),
}

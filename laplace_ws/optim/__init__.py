"""K-FAC as an optimiser."""

from laplace_ws.optim.kfac_optimizer import KFAC

__all__ = ["KFAC"]

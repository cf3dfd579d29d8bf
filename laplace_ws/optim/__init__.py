"""K-FAC as an optimiser: gradient steps preconditioned by K-FAC-expand or K-FAC-reduce."""

from laplace_ws.optim.kfac_optimizer import KFAC

__all__ = ["KFAC"]

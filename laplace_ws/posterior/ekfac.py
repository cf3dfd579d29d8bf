"""Laplace posterior with eigenvalue-corrected Kronecker curvature."""

from __future__ import annotations

from collections.abc import Mapping

from torch import nn

from laplace_ws.kfac import EkfacAccumulator
from laplace_ws.matrices import CurvatureMatrix, Ekfac, Kron
from laplace_ws.posterior.fitting import FitSums, Pairs
from laplace_ws.posterior.kron import FactoredLaplace


class EkfacLaplace(FactoredLaplace):
    """Laplace posterior whose precision is diagonal in the eigenvectors of Kronecker factors [George et al. 2018].

    The eigenvalues are not the products of the factors' but the second moments of the gradients in these coordinates: of all matrices with
    these eigenvectors the closest to the curvature. A fit passes over the data twice, for the eigenvectors and for the eigenvalues; data
    that are added to a fit (`override=False`) keep its eigenvectors. Takes the arguments of `FactoredLaplace`.
    """

    hessian_structure = "ekfac"
    _reads_data_again = True
    _matrix = Ekfac

    def _take(self, pairs: Pairs, before: CurvatureMatrix | None) -> FitSums:
        if before is None:
            factors = super()._take(pairs, None).H
            assert isinstance(factors, Kron)
            bases = {name: block.basis for name, block in factors.items()}
        else:
            assert isinstance(before, Ekfac)
            bases = {name: block.basis for name, block in before.items()}

        def make_accumulator(parameters: Mapping[str, nn.Parameter]) -> EkfacAccumulator:
            return EkfacAccumulator(parameters, bases)

        return self._sum(pairs, make_accumulator)

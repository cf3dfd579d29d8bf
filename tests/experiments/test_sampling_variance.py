"""The study of the sampled GGN, at small size."""

import sampling_variance
import torch

from laplace_ws.matrices import Kron, KronBlock


def test_a_row_for_each_epoch_and_both_estimators(tmp_path):
    config = sampling_variance.VarianceConfig(n_train=40, batch_size=20, epochs=(0, 2), n_draws=2)
    rows = sampling_variance.run(config)
    assert [row["epoch"] for row in rows] == [0, 2]
    assert rows[1]["train_nll"] < rows[0]["train_nll"]
    table = sampling_variance.as_markdown(rows)
    assert len(table.splitlines()) == 4
    for row in rows:
        for estimator in sampling_variance.ESTIMATORS:
            assert 0 < row[estimator]["relative_error"] < 2


def test_relative_error_is_that_of_all_gradient_factors_together():
    def kron(*entries):
        return Kron({str(i): KronBlock(torch.Size([1]), torch.tensor([[e]])) for i, e in enumerate(entries)})

    assert sampling_variance.relative_error(kron(3.0, 4.0), kron(3.0, 4.0)) == 0
    assert abs(sampling_variance.relative_error(kron(0.0, 4.0), kron(3.0, 4.0)) - 0.6) < 1e-6

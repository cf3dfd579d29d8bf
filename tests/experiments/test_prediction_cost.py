"""The study of the cost of predictions, at small size."""

import prediction_cost
import pytest


@pytest.mark.long
def test_rows_of_both():
    config = prediction_cost.CostConfig(
        networks=["lenet"], structures=["kron"], batch_sizes=[2, 8], largest_of_peer=0, n_train=4, repetitions=1
    )
    rows = prediction_cost.run(config)
    assert [row["n_images"] for row in rows] == [2, 8]
    assert all(row["ours"]["megabytes"] > 0 and row["laplace_torch"] is None for row in rows)
    assert len(prediction_cost.as_markdown(rows).splitlines()) == 2 + len(rows)

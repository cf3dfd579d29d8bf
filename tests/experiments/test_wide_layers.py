"""The study of layers with very many outputs, at small size."""

import pytest
import wide_layers
from wide_layers import Posterior


@pytest.mark.long
def test_rows_of_last_layers_and_language_models():
    config = wide_layers.WideConfig(
        posteriors=[
            Posterior("last layer", 30),
            Posterior("language model", 300, "all", max_factor_dim=256, pred_type="nn", n_predicted=1),
            Posterior("language model", 300, max_factor_dim=256, curvature="ggn", n_predicted=1),
        ],
        n_train=8,
        n_sequences=2,
        n_tokens=4,
        batch_size=8,
    )
    rows = wide_layers.run(config)
    assert [row["n_weights"] for row in rows][::2] == [65 * 30, 64 * 300]
    assert all(row["megabytes"] > 0 and row["prediction_seconds"] >= 0 for row in rows)
    assert len(wide_layers.as_markdown(rows).splitlines()) == 2 + len(rows)

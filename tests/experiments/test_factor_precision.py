"""The study of the factors' rounding, at small size."""

import factor_precision


def test_bfloat16_is_the_coarsest():
    config = factor_precision.PrecisionConfig(depth=10, width=1, n_classes=3, image_size=8, n_images=4)
    rows = factor_precision.run(config)
    assert len(factor_precision.as_markdown(rows).splitlines()) == 2 + len(rows)
    largest = {(row["kfac_approx"], row["factor_precision"]): row["largest_error"] for row in rows}
    for approx in ("reduce", "expand"):
        assert largest[approx, "float32"] < 1e-5 < largest[approx, "bf16"] < 2**-7

"""The study of predictions for many classes, at small size."""

import many_classes
import pytest


@pytest.mark.long
def test_rows():
    config = many_classes.ClassesConfig(
        n_classes=[3], n_samples=[2], largest_of_moments=3, draws_of=["diag"], n_images=2, image_size=32, repetitions=1
    )
    found = many_classes.run(config)
    (row,) = found["by_classes"]
    assert all(row[name] > 0 for name in ("step", "product", "draw", "moments"))
    assert row["predictions"][2] > 0
    assert found["draws"]["diag"]["draw"] > 0
    assert "draw of diag" in many_classes.as_markdown(found, config.n_samples)

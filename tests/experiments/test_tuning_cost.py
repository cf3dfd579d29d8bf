"""The cost of choosing hyperparameters, at small size."""

import tuning_cost


def test_every_part_is_timed_and_the_optimum_is_one():
    config = tuning_cost.TuningConfig(
        depth=10, width=1, n_classes=3, image_size=8, n_images=32, batch_size=16, n_repeats=1
    )
    found = tuning_cost.run(config)
    for part in ("fit", "eigenvalues", "evaluation_and_gradient", "newton_optimum", "adam_100_steps"):
        assert found[part] > 0
    assert found["largest_gradient_at_optimum"] < 1e-5
    assert len(tuning_cost.as_markdown(found).splitlines()) == 7

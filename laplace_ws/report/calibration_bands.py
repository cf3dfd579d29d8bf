"""Predictive bands of a regression with one input: what the model expects, how sure it is, and where targets fall."""

from __future__ import annotations

import numpy as np
from jaxtyping import Float
from matplotlib.figure import Figure
from torch import Tensor

from laplace_ws.report.style import TUNED_COLOUR, Picture, legend_below, report_style, to_svg

_MEAN_COLOUR, _POINT_COLOUR = "#0072B2", "#000000"


def predictive_bands(
    x: Float[Tensor, " N"],
    mean: Float[Tensor, " N"],
    variance: Float[Tensor, " N"],
    sigma_noise: float,
    x_data: Float[Tensor, " D"],
    y_data: Float[Tensor, " D"],
    *,
    title: str = "Predictive",
    x_label: str = "input",
    y_label: str = "target",
) -> Picture:
    """Draw the mean, a band of two standard deviations of the mean, one of targets, and the data.

    Args:
        x: inputs of the predictions, in any order.
        mean: predictive mean.
        variance: of the mean, that is, without observation noise (epistemic).
        sigma_noise: standard deviation of the observation noise.
        x_data: inputs of the data.
        y_data: their targets.
        title: of the picture.
        x_label: of the horizontal axis, with its unit.
        y_label: of the vertical axis, with its unit.

    Raises:
        ValueError: lengths do not fit, or a variance or the noise is negative.
    """
    if not x.shape == mean.shape == variance.shape or x.ndim != 1:
        raise ValueError(
            f"x, mean and variance must be vectors of one length, but their shapes are {tuple(x.shape)}, {tuple(mean.shape)} and "
            f"{tuple(variance.shape)}; squeeze the output's dimensions"
        )
    if x_data.shape != y_data.shape or x_data.ndim != 1:
        raise ValueError(
            f"x_data and y_data must be vectors of one length, but their shapes are {tuple(x_data.shape)} and {tuple(y_data.shape)}"
        )
    if (variance < 0).any() or sigma_noise < 0:
        raise ValueError("variance and sigma_noise must not be negative")
    order = x.argsort()
    places, centre, spread = (_array(values[order]) for values in (x, mean, variance))
    bands = {
        "target ± 2σ": 2 * np.sqrt(spread + sigma_noise**2),
        "mean ± 2σ (epistemic)": 2 * np.sqrt(spread),
    }
    with report_style():
        figure = Figure(figsize=(5.2, 3.7), layout="constrained")
        axes = figure.subplots()
        for (label, half), (colour, alpha) in zip(
            bands.items(), ((_MEAN_COLOUR, 0.15), (TUNED_COLOUR, 0.35)), strict=True
        ):
            axes.fill_between(places, centre - half, centre + half, color=colour, alpha=alpha, linewidth=0, label=label)
        axes.plot(places, centre, color=_MEAN_COLOUR, linewidth=1.8, label="mean")
        axes.plot(_array(x_data), _array(y_data), ".", color=_POINT_COLOUR, markersize=3.5, label="data")
        axes.set_xlim(places[0], places[-1])
        axes.set_title(title)
        axes.set_xlabel(x_label)
        axes.set_ylabel(y_label)
        legend_below(figure, axes)
        svg = to_svg(figure)
    sigmas = np.sqrt(spread)
    alt = (
        f"{title}: mean and bands over {x_label} from {places[0]:.3g} to {places[-1]:.3g}; standard deviation of the mean from "
        f"{sigmas.min():.3g} to {sigmas.max():.3g}, noise {sigma_noise:.3g}, {len(x_data)} data."
    )
    return Picture(title, alt, svg)


def _array(values: Tensor) -> np.ndarray:
    return values.detach().double().cpu().numpy()

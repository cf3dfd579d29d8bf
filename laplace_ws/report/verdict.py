"""What the numbers say, in words."""

from __future__ import annotations

import math

from laplace_ws.report.records import Model, RunRecord

_SHOWN = 0.0005  # half a unit of the last decimal that the sentence shows


def verdict(record: RunRecord) -> str:
    """One sentence: test NLL of the tuned model against the best and the worst of the fixed ones."""
    tuned = record.tuned.test_nll
    if tuned is None:
        return "The tuned model has no test NLL, so it cannot be compared with the fixed prior precisions."
    if not math.isfinite(tuned):
        return f"The tuned model failed: its test NLL is {tuned}."
    own = f"test NLL of {tuned:.3f} nats per example"
    if not record.fixed:
        return f"The tuned model has a {own}; no fixed prior precision was trained to compare it with."
    scored = [(model.test_nll, model) for model in record.fixed if model.test_nll is not None]
    rivals = sorted((pair for pair in scored if math.isfinite(pair[0])), key=lambda pair: pair[0])
    if not rivals:
        return f"The tuned model has a {own}; no fixed prior precision has a finite test NLL to compare it with."
    best_nll, best = rivals[0]
    against_best = compare(tuned, best_nll)
    if len(rivals) == 1:
        sentence = f"Tuning gave a {own}, {against_best} the {best.label} ({best_nll:.3f})"
    else:
        worst_nll, worst = rivals[-1]
        sentence = (
            f"Tuning gave a {own}, {against_best} the best fixed prior precision ({_delta(best)}, {best_nll:.3f}) "
            f"and {compare(tuned, worst_nll)} the worst ({_delta(worst)}, {worst_nll:.3f})"
        )
    failed = [model for model in record.fixed if not _is_finite(model.test_nll)]
    if failed:
        sentence += f"; without a finite test NLL: {', '.join(model.label for model in failed)}"
    return sentence + "."


def evidence_check(record: RunRecord) -> str | None:
    """Whether the log marginal likelihood picks the model with the best test NLL; None below two such models."""
    models = [m for m in record.models if _is_finite(m.log_marginal_likelihood) and _is_finite(m.test_nll)]
    if len(models) < 2:
        return None
    by_evidence = max(models, key=lambda m: m.log_marginal_likelihood or 0.0)
    by_nll = min(models, key=lambda m: m.test_nll or 0.0)
    if by_evidence is by_nll:
        return f"The highest log marginal likelihood and the lowest test NLL are of the same model ({by_nll.label})."
    return (
        f"The highest log marginal likelihood is of {by_evidence.label}, "
        f"the lowest test NLL of another model ({by_nll.label})."
    )


def compare(value: float, other: float) -> str:
    """How much better (lower) or worse `value` is: "0.012 better than", "0.003 worse than", "equal (to 0.001) to"."""
    difference = value - other
    if abs(difference) < _SHOWN:
        return "equal (to 0.001) to"
    return f"{abs(difference):.3f} {'worse' if difference > 0 else 'better'} than"


def _delta(model: Model) -> str:
    return model.label.removeprefix("fixed ")


def _is_finite(value: float | None) -> bool:
    return value is not None and math.isfinite(value)

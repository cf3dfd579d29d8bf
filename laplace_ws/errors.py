"""Errors and warnings of the toolkit: each names the thing and the way out."""


class InputError(ValueError):
    """What a command was given, its options or its files, does not allow its work; the message says how to mend it."""


class UnsupportedParameterError(ValueError):
    """A parameter that requires grad has no curvature block of the kind that was asked for."""


class InvalidBatchError(ValueError):
    """A batch, its labels or the model's outputs do not fit the likelihood or the model."""


class NotFittedError(RuntimeError):
    """A posterior was asked for something that only a fit can give."""


class NumericalRepairWarning(UserWarning):
    """A number was repaired (clamped, floored); the message says which and by how much."""

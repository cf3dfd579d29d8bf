"""Errors and warnings of the toolkit: each message names the cause and the remedy."""


class InputError(ValueError):
    """A command cannot run with the given options or files; the message says how to fix this."""


class UnsupportedParameterError(ValueError):
    """A parameter that requires grad has no curvature block of the requested kind."""


class InvalidBatchError(ValueError):
    """A batch, its labels or the model's outputs do not fit the likelihood or the model."""


class NotFittedError(RuntimeError):
    """A posterior was asked for something that only a fit can give."""


class NotEnoughMemoryError(MemoryError):
    """What was asked for takes more memory than is free; the message says how much, and what takes less."""


class NumericalRepairWarning(UserWarning):
    """A number was repaired (clamped, floored); the message says which and by how much."""


class CurvatureWarning(UserWarning):
    """An approximation of the curvature leaves out what it should not; the message says of which parameters, and what to choose."""


class DataWarning(UserWarning):
    """The data, or what a model makes of them, look like a mistake; the message says what was seen and how to mend it."""

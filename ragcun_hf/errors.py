"""The exceptions that mean: the user must change something."""


class UserError(ValueError):
    """Something in the user's input, files or flags has to change.

    The message is one line and has three parts: what was expected, what came (file, row, field),
    what to do. Scripts print it without a traceback and exit with code 2; any other exception is a
    defect and exits with code 1.

    Example:
        >>> raise UserError("expected a temperature above 0, got -1.0: set --temperature to e.g. 0.05")
        Traceback (most recent call last):
            ...
        ragcun_hf.errors.UserError: expected a temperature above 0, got -1.0: set --temperature to e.g. 0.05
    """


class NotFiniteError(UserError):
    """Vectors or similarities hold NaN or infinity: a model that diverged, or a precision too low for it."""

"""Exceptions for mistakes that the user can fix."""


class UserError(ValueError):
    """The user's input, files or flags must change.

    The message is one line with three parts: what was expected, what came (file, row, field), and what to do. A
    command prints it without a traceback and exits with code 2. Any other exception is a defect: exit code 1.

    Example:
        >>> raise UserError("expected a temperature above 0, got -1.0: set --temperature to e.g. 0.05")
        Traceback (most recent call last):
            ...
        ragcun_hf.errors.UserError: expected a temperature above 0, got -1.0: set --temperature to e.g. 0.05
    """


class NotFiniteError(UserError):
    """Vectors or similarities contain NaN or infinity: the model diverged, or its precision is too low."""

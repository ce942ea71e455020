"""The one exception of models that a user sees."""


class ModelError(ValueError):
    """A model cannot be loaded or used; the message is one line for the user."""

    exit_code = 2

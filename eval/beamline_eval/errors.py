"""The one exception that people are meant to read."""


class EvalError(Exception):
    """Something in the input is wrong; the message says what, where, and what to do. Shown without a traceback."""

"""Errors that a user can mend."""


class InputError(Exception):
    """What was given cannot be used; the message says what came and what was expected."""

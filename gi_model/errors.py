"""Errors that a user can mend."""


class InputError(Exception):
    """What was given cannot be used; the message says what came and what was expected."""


class CheckpointError(InputError, ValueError):
    """A file is no checkpoint that can be loaded; the message names the file and what is wrong with it."""

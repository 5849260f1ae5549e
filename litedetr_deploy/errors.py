"""Errors meant for the person at the keyboard: one paragraph that says what is wrong, the value, and the fix."""


class LiteDetrError(Exception):
    """Wrong use or bad input.  The message is the whole report; the command line exits with 2."""

    exit_status = 2


class CheckFailed(LiteDetrError):
    """The input was fine, the work was done, and a check of its result failed.  The command line exits with 1."""

    exit_status = 1

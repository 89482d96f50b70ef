"""The one exception that a command line turns into a line of text and exit code 2."""


class UserError(ValueError):
    """Something the user gave cannot be used; the message says what was wrong and what to do, in one line."""

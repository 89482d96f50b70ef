"""The one exception that a command line turns into text on stderr and exit code 2, and one that may become it."""

from collections.abc import Iterable


class UserError(ValueError):
    """Something the user gave cannot be used.

    message: what was wrong and what to do, in one line. details: further lines, such as every key that does not fit;
    `str` gives all of them.
    """

    def __init__(self, message: str = "", details: Iterable[str] = ()):
        super().__init__(message)
        self.message = message
        self.details = tuple(details)

    def __str__(self) -> str:
        return "\n".join((self.message, *self.details))


def out_of_memory(error: BaseException) -> bool:
    """Whether JAX says that a device has too little memory for what it was given."""
    return isinstance(error, RuntimeError) and "RESOURCE_EXHAUSTED" in str(error)

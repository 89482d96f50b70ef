"""The one exception that a command line turns into text on stderr and exit code 2, and one that may become it."""

import contextlib
from collections.abc import Iterable, Iterator


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


@contextlib.contextmanager
def short_of_memory(what: str, remedy: str) -> Iterator[None]:
    """Makes a device's want of memory for `what` one line that says what helps."""
    try:
        yield
    except RuntimeError as error:
        if not out_of_memory(error):
            raise
        first = str(error).splitlines()[0][:200]
        raise UserError(f"a device has too little memory for {what}: {remedy}: {first}") from error

"""The one exception that a command line turns into text on stderr and exit code 2, one that may become it, and words
for what differs."""

import contextlib
import itertools
import json
from collections.abc import Iterable, Iterator, Mapping
from typing import Any


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


def differences(there: Mapping[str, Any], here: Mapping[str, Any]) -> list[str]:
    """What differs between two sections of JSON, in words: of sections in them the keys, of lists the first rows."""
    found = []
    for key in {**there, **here}:
        old, new = there.get(key), here.get(key)
        if isinstance(old, dict) and isinstance(new, dict):
            found += [f"{key}.{words}" for words in differences(old, new)]
            continue
        if isinstance(old, list) and isinstance(new, list):
            old, new = next((pair for pair in itertools.zip_longest(old, new) if pair[0] != pair[1]), (None, None))
        if old != new:
            found.append(f"{key} {_short(old)} there and {_short(new)} now")
    return found


def _short(value: Any) -> str:
    text = json.dumps(value)
    return text if len(text) < 60 else text[:57] + "..."

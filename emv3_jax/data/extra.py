"""Packages of the extra `data`, which only training data needs."""

import importlib
from typing import Any

from emv3_jax.errors import UserError


def load(name: str) -> Any:
    """The module of that name.

    Raises:
      UserError: it is not installed.
    """
    try:
        return importlib.import_module(name)
    except ImportError as error:
        raise UserError(f"training data needs the extra data: pip install -e '.[data]' ({error})") from error

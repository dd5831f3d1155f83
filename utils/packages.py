"""Optional packages of the scripts."""

from __future__ import annotations

from types import ModuleType

from modules.optional import require
from utils.errors import UserError


def need(name: str, flag: str) -> ModuleType:
    """Import an optional package as `require` does; raise UserError where that is not possible."""
    try:
        return require(name, flag)
    except ValueError as error:
        raise UserError(str(error)) from error

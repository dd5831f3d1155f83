"""Declaration of flags as dataclass fields."""

from __future__ import annotations

from collections.abc import Collection, Sequence
from dataclasses import field
from typing import Any


def option(
    default: Any,
    help: str,
    *,
    choices: Collection[str] | None = None,
    minimum: float | None = None,
    above: float | None = None,
    maximum: float | None = None,
    aliases: Sequence[str] = (),
    flag: bool = True,
) -> Any:
    """Return a dataclass field that is also a command-line flag.

    `choices` may be a registry, to which names can still be added. `minimum` and `maximum` are
    inclusive bounds, `above` is an exclusive lower bound. A field with flag=False is stored in
    checkpoints but is not a flag.
    """
    metadata = {
        "help": help,
        "choices": choices,
        "minimum": minimum,
        "above": above,
        "maximum": maximum,
        "aliases": tuple(aliases),
        "flag": flag,
    }
    return field(default=default, metadata=metadata)

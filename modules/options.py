"""Declaration of flags as dataclass fields."""

from __future__ import annotations

import math
import re
from collections.abc import Collection, Sequence
from dataclasses import field
from typing import Any


def option(
    default: Any,
    help: str,
    *,
    choices: Collection[str] | None = None,
    minimum: float = -math.inf,
    above: float = -math.inf,
    maximum: float = math.inf,
    aliases: Sequence[str] = (),
    flag: bool = True,
) -> Any:
    """Return a dataclass field that is also a command-line flag.

    Its annotation has to be text, as `from __future__ import annotations` makes it.
    `choices` may be a registry, to which names can still be added. `minimum` and `maximum` are
    inclusive bounds, `above` is an exclusive lower bound. A field with flag=False is stored in
    checkpoints but is not a flag.
    """
    bounds = {"minimum": minimum, "above": above, "maximum": maximum}
    metadata = {"help": help, "choices": choices, "aliases": aliases, "flag": flag, **bounds}
    return field(default=default, metadata=metadata)


def parse_numbers(text: str) -> list[int]:
    """Parse a list like 8,5,5,5 of up to 12 numbers; empty if the text is no such list."""
    matches = re.fullmatch(r"[1-9]\d{0,6}(,[1-9]\d{0,6}){0,11}", text)
    return [int(number) for number in text.split(",")] if matches else []

"""Declaration of flags as dataclass fields, and the check of their values."""

from __future__ import annotations

import difflib
import math
import re
from collections.abc import Collection, Iterable, Mapping, Sequence
from dataclasses import Field, field
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


def value_problem(item: Field[Any], value: Any) -> str | None:
    """Return the problem of a value of any type for a field, or None."""
    kind, given = str(item.type), type(value).__name__
    if value is None and "None" in kind:
        return None
    if given not in kind and not (given == "int" and "float" in kind):
        return f"a {given} where {kind} is expected"
    return out_of_range(value, item.metadata)


def out_of_range(value: Any, metadata: Mapping[str, Any]) -> str | None:
    """Return the problem of a value of an option, or None."""
    if metadata["choices"] is not None and value not in metadata["choices"]:
        return unknown_name("choice", value, metadata["choices"])
    if isinstance(value, (int, float)):
        if isinstance(value, float) and not math.isfinite(value):
            return f"{value} is not a finite number"
        if value < metadata["minimum"]:
            return f"{value} is less than {metadata['minimum']}"
        if value <= metadata["above"]:
            return f"{value} is not greater than {metadata['above']}"
        if value > metadata["maximum"]:
            return f"{value} is greater than {metadata['maximum']}"
    return None


def unknown_name(flag: str, name: str, known: Iterable[str]) -> str:
    """Return the message for an unknown name, with the one that it abbreviates or resembles."""
    known = list(known)
    short = [one for one in known if len(name.strip("-")) > 1 and abbreviates(name.lower(), one)]
    nearest = sorted(short, key=len) or difflib.get_close_matches(name, known, n=1, cutoff=0.5)
    hint = f"did you mean {nearest[0]}?" if nearest else f"choose from {', '.join(known)}"
    return f"{flag} {name} is unknown; {hint}"


def abbreviates(name: str, known: str) -> bool:
    """Return whether name is the first letter of known and some of the others, at most half."""
    rest = iter(known)
    short = name == known or 2 * len(name) <= len(known)
    return short and name[:1] == known[:1] and all(letter in rest for letter in name)

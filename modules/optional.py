"""Import of optional packages."""

from __future__ import annotations

import importlib
from types import ModuleType


def require(name: str, flag: str) -> ModuleType:
    """Import an optional package, or a module of it, by the name that pip has for the package.

    Raises ValueError that names the flag, and how to install the package or why its import fails.
    """
    package, module = name.partition(".")[0], name.replace("-", "_")
    try:
        importlib.import_module(module.partition(".")[0])
        return importlib.import_module(module)
    except Exception as error:  # a broken package raises errors of any type
        absent = isinstance(error, ModuleNotFoundError) and error.name is not None
        if absent and f"{module}.".startswith(f"{error.name}."):  # type: ignore[attr-defined]
            raise ValueError(f"{flag} needs {package}: pip install {package}") from error
        reason = f"{type(error).__name__}: {' '.join(str(error).split())[:200]}"
        raise ValueError(f"{flag} needs {package}, whose import fails: {reason}") from error

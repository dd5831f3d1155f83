"""Write docs/flags.md from the declarations of all flags: python -m utils.flags.table."""

from __future__ import annotations

import runpy
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from utils.files import whole_file
from utils.flags.arguments import flag_fields, names, title

ROOT = Path(__file__).parents[2]
PAGE = ROOT / "docs" / "flags.md"
SCRIPTS = ("main.py", "test.py", "evaluation.py", "generate.py")
SWITCH = {"True": "on", "False": "off"}
HEAD = """# All flags

Written by `python -m utils.flags.table` from the declarations in the code. A flag that is on can be
turned off by its `--no-` form: `--no-flip`, `--no-cache`.
"""


def page() -> str:
    """Return the text of docs/flags.md, one table per group of flags."""
    users: dict[type, list[str]] = {}
    for script in SCRIPTS:
        for group in groups(script):
            users.setdefault(group, []).append(script)
    return "\n".join([HEAD, *(table(group, scripts) for group, scripts in users.items())])


def groups(script: str) -> Iterator[type]:
    """Yield the dataclasses of flags of a script: its GROUPS, or each of its classes …Config."""
    found = runpy.run_path(str(ROOT / script), run_name=script)
    yield from found.get("GROUPS") or (
        value
        for value in found.values()
        if isinstance(value, type) and value.__name__.endswith("Config")
    )


def table(group: type, scripts: list[str]) -> str:
    """Return one group of flags as a Markdown table."""
    lines = [
        f"## {title(group).capitalize()} ({', '.join(scripts)})",
        "",
        "| flag | default | |",
        "| --- | --- | --- |",
    ]
    for item in flag_fields(group):
        several, choices = isinstance(item.default, tuple), item.metadata["choices"]
        default: Any = item.default
        default = " ".join(default) if several else SWITCH.get(str(default), default)
        shown = "" if default is None else f"`{default}`"
        text = item.metadata["help"].replace("<", "&lt;")  # else Markdown takes it for HTML
        if choices:
            listed = ", ".join(f"`{choice}`" for choice in choices)
            text += f"; {'some' if several else 'one'} of {listed}"
        lines.append(f"| {', '.join(f'`{name}`' for name in names(item))} | {shown} | {text} |")
    return "\n".join(lines) + "\n"


def main() -> None:
    with whole_file(PAGE) as temporary:
        temporary.write_text(page())


if __name__ == "__main__":
    main()

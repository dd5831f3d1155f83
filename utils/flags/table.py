"""The README's tables of flags, written from the declarations: python -m utils.flags.table."""

from __future__ import annotations

import re
import runpy
from collections.abc import Iterator
from pathlib import Path

from utils.files import whole_file
from utils.flags.arguments import flag_fields, names

ROOT = Path(__file__).parents[2]
SCRIPTS = ("main.py", "test.py", "evaluation.py")
MARKERS = "<!-- flags -->\n", "<!-- end of flags -->"


def groups(script: str) -> Iterator[type]:
    """The dataclasses of flags that a script uses."""
    for value in runpy.run_path(str(ROOT / script), run_name=script).values():
        if isinstance(value, type) and value.__name__.endswith("Config"):
            yield value


def tables() -> str:
    """One table a group, in Markdown."""
    users: dict[str, list[str]] = {}
    found: dict[str, type] = {}
    for script in SCRIPTS:
        for group in groups(script):
            users.setdefault(group.__name__, []).append(script)
            found[group.__name__] = group
    return "\n".join(table(found[name], users[name]) for name in found)


def table(group: type, scripts: list[str]) -> str:
    lines = [
        f"**{group.__name__.removesuffix('Config')}** ({', '.join(scripts)})",
        "",
        "| flag | default | |",
        "| --- | --- | --- |",
    ]
    for item in flag_fields(group):
        default = " ".join(item.default) if isinstance(item.default, tuple) else item.default
        choices = item.metadata["choices"]
        text = item.metadata["help"] + (f": {', '.join(choices)}" if choices else "")
        shown = "" if default is None else f"`{default}`"
        text = text.replace("<", "&lt;")  # else Markdown takes it for HTML
        lines.append(f"| {', '.join(f'`{name}`' for name in names(item))} | {shown} | {text} |")
    return "\n".join(lines) + "\n"


def updated(readme: str) -> str:
    """The README with its tables written anew."""
    before, after = map(re.escape, MARKERS)
    return re.sub(
        f"({before}).*?({after})", lambda match: match[1] + tables() + match[2], readme, flags=re.S
    )


def main() -> None:
    path = ROOT / "README.md"
    with whole_file(path) as temporary:
        temporary.write_text(updated(path.read_text()))


if __name__ == "__main__":
    main()

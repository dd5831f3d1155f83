"""Building blocks of the page: text, numbers, tables, figures and sections."""

from __future__ import annotations

import math
import sys
import time
from collections.abc import Callable, Mapping, Sequence
from html import escape
from importlib.metadata import version
from pathlib import Path
from typing import TypeVar

from utils.errors import one_line, printable

Item = TypeVar("Item")
Rows = Sequence[Sequence[object]]


class Missing(Exception):
    """A section lacks a file; the message, HTML, says how to get it."""


def text(value: object) -> str:
    """Escape anything for HTML, on one line."""
    return escape(printable(str(value)))


def shown(value: object, digits: int = 4) -> str:
    """Format a number; a dash stands for anything else."""
    if not isinstance(value, (int, float)) or isinstance(value, bool):
        return "–"
    if not math.isfinite(value):
        return "∞" if value > 0 else "–"
    return f"{value:,}" if isinstance(value, int) else f"{value:#,.{digits}g}".rstrip(".")


def spread(items: Sequence[Item], number: int) -> list[Item]:
    """Return at most number items, evenly spaced from the first to the last."""
    last = len(items) - 1
    if last < number:
        return list(items)
    return [items[round(position * last / (number - 1))] for position in range(number)]


def table(
    caption: str, header: Sequence[str], groups: Mapping[str, Rows], style: str = "numbers"
) -> str:
    """Return a table of rows by group; an empty group name shows no heading."""
    parts = [f"<caption>{text(caption)}</caption><thead><tr>"]
    parts += [f'<th scope="col">{text(cell)}</th>' for cell in header]
    parts.append("</tr></thead>")
    for group, rows in groups.items():
        title = f'<tr><th colspan="{len(header)}" scope="rowgroup">{text(group)}</th></tr>'
        parts += ["<tbody>", title if group else ""]
        for first, *others in rows:
            cells = "".join(f"<td>{text(cell)}</td>" for cell in others)
            parts.append(f'<tr><th scope="row">{text(first)}</th>{cells}</tr>')
        parts.append("</tbody>")
    return (
        f'<div class="scroll" role="group" tabindex="0" aria-label="{text(caption)}">'
        f'<table class="{style}">{"".join(parts)}</table></div>'
    )


def details(summary: str, content: str) -> str:
    return f"<details><summary>{text(summary)}</summary>{content}</details>"


def figure(content: str, caption: str, *, beside: bool = False) -> str:
    """Return a figure; the caption is HTML, and beside places it there if the page is wide."""
    style = ' class="beside"' if beside else ""
    return f"<figure{style}>{content}<figcaption>{caption}</figcaption></figure>"


def command(*lines: str) -> str:
    """Return commands to copy."""
    return "".join(f"<pre><code>{text(line)}</code></pre>" for line in lines)


def section(identity: str, title: str, build: Callable[[], str]) -> str:
    """Return a section; if it cannot be built, it says why."""
    try:
        body = build()
    except Missing as gap:
        body = f'<div class="missing">{gap}</div>'
    except Exception as error:  # damaged files may hold anything
        reason = text(f"{type(error).__name__}: {one_line(error)[:200]}")
        body = f'<div class="missing">This cannot be shown; a file is damaged. {reason}</div>'
    return f'<section aria-labelledby="{identity}"><h2 id="{identity}">{title}</h2>{body}</section>'


def document(
    name: str, lead: str, sections: Mapping[str, tuple[str, Callable[[], str]]], origin: str
) -> str:
    """Return the page's HTML.

    sections: identity → title and a function that returns HTML or raises Missing.
    """
    links = "".join(
        f'<li><a href="#{key}">{title}</a></li>' for key, (title, _) in sections.items()
    )
    bodies = "".join(section(key, title, build) for key, (title, build) in sections.items())
    breakable = text(name).replace("/", "/<wbr>").replace("_", "_<wbr>")
    style = Path(__file__).with_name("style.css").read_text(encoding="utf-8")
    return (
        '<!DOCTYPE html>\n<html lang="en"><head><meta charset="utf-8">'
        '<meta name="viewport" content="width=device-width, initial-scale=1">'
        '<meta name="color-scheme" content="light dark">'
        f"<title>{text(name)} – LooC</title><style>\n{style}</style></head>\n<body>"
        '<a class="skip" href="#main">Skip to the report</a>\n'
        f"<header><h1>{breakable}</h1>{lead}"
        f'<nav aria-label="Sections"><ul>{links}</ul></nav></header>\n'
        f'<main id="main" tabindex="-1">{bodies}</main>\n'
        f"<footer><p>{origin}</p></footer></body></html>\n"
    )


def origin(source: Path, stored: Mapping[str, str] | None = None) -> str:
    """Return the footer: when, from what and by which versions, if stored, a page was written."""
    packages = stored or {name: version(name) for name in ("torch", "torchvision", "numpy")}
    versions = ", ".join(f"{name} {number}" for name, number in packages.items())
    return text(
        f"Written by LooC on {time.strftime('%d %B %Y, %H:%M %Z')}, from {source}. "
        f"Python {sys.version.split()[0]}, {versions}."
    )

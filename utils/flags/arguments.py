"""Command-line flags from dataclasses, in which each flag is a field declared with `option`."""

from __future__ import annotations

import argparse
import os
import re
import sys
from collections.abc import Collection, Mapping, Sequence
from dataclasses import Field, fields
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any, NoReturn, TypeVar

from modules.config import ModelConfig, implied_flags
from modules.options import out_of_range, unknown_name
from modules.quantizers.registry import QUANTIZER_FLAGS, QUANTIZERS
from utils.errors import UserError, printable
from utils.flags.presets import preset_flags
from utils.flags.recipes import RECIPES

if TYPE_CHECKING:
    from utils.checkpoints.pretrained import Pretrained

Group = TypeVar("Group")


class Parser(argparse.ArgumentParser):
    """An argument parser whose errors are one line."""

    def error(self, message: str) -> NoReturn:
        sys.stderr.write(f"{self.prog}: error: {printable(message)}\n")
        sys.exit(2)


def parse_flags(
    description: str | None,
    *groups: type,
    argv: Sequence[str] | None = None,
    source: str | None = None,
    command: str | None = None,
) -> dict[str, Any]:
    """Return only the flags that are given on the command line, by field name.

    If argv is given, it is parsed instead, and errors name its source. If command is given, it is
    the first word of the command line. An unknown flag or a value out of range ends the program
    with code 2 and one line naming the flag.
    """
    if command is not None:
        source, argv = f"{Path(sys.argv[0]).name} {command}", sys.argv[2:]
    parser = Parser(
        prog=source,
        description=description,
        allow_abbrev=False,
        add_help=argv is None or command is not None,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    for group in groups:
        section = parser.add_argument_group(title(group))
        for item in flag_fields(group):
            add_flag(section, item)
    given, unknown = parser.parse_known_args(argv)
    if unknown:
        flag = unknown[0].split("=")[0]
        if not flag.startswith("-"):
            parser.error(f"unexpected argument {flag}")
        known = [name for group in groups for item in flag_fields(group) for name in names(item)]
        parser.error(unknown_name("argument", flag, known))
    for name, value in vars(given).items():
        if value == []:  # argparse returns this for --name=--
            parser.error(f"argument --{name}: -- is not a value")
    return vars(given)


def resolve(given: Mapping[str, Any], *groups: type) -> tuple[dict[str, Any], Pretrained | None]:
    """Complete the flags given; return them, and the weights of --pretrained if given.

    A flag has the first value found in this order: command line, --preset, the model of
    --pretrained, the quantiser's own defaults, --recipe. All others keep their declared default.
    Raises UserError if a flag contradicts the weights.
    """
    flags, pretrained = with_preset(given, *groups), None
    if "pretrained" in flags:
        from utils.checkpoints.checkpoint import find_checkpoint  # they import this file
        from utils.checkpoints.pretrained import read_pretrained

        output_folder = flags.get("output_folder", "output")
        try:
            path = find_checkpoint("--pretrained", flags["pretrained"], output_folder)
        except UserError:  # a run that goes on does not need what it started from
            path = Path(output_folder, "models", str(flags.get("exp_name")), "last.pt")
            if flags.get("overwrite") or not path.is_file():
                raise
        pretrained = read_pretrained(path, flags)
        flags = {"model": "vqgan", **pretrained.flags, **flags}
    return with_recipe(flags), pretrained


def with_preset(given: Mapping[str, Any], *groups: type) -> dict[str, Any]:
    """Add the flags of --preset, if given."""
    if "preset" not in given:
        return dict(given)
    parse = partial(parse_flags, None, *groups)
    return {**preset_flags(given["preset"], given.get("quantizer"), parse), **given}


def with_recipe(flags: Mapping[str, Any]) -> dict[str, Any]:
    """Add the quantiser's own defaults, then the flags of the recipe that the quantiser reads."""
    unread = QUANTIZER_FLAGS - QUANTIZERS[flags.get("quantizer", ModelConfig.quantizer)].reads
    recipe = RECIPES[flags.get("recipe", "paper")]
    own = {name: value for name, value in recipe.items() if name not in unread}
    return {**own, **implied_flags(flags), **flags}


def title(group: type) -> str:
    """Return the title of a dataclass of flags: the words of its name."""
    return re.sub("(?<=[a-z])(?=[A-Z])", " ", group.__name__.removesuffix("Config")).lower()


def flag_fields(group: type) -> list[Field[Any]]:
    """Return the fields of a dataclass that are flags."""
    return [item for item in fields(group) if item.metadata.get("flag")]


def names(item: Field[Any]) -> tuple[str, ...]:
    """Return --name and its aliases."""
    return (f"--{item.name}", *item.metadata["aliases"])


def add_flag(section: Any, item: Field[Any]) -> None:
    kind, default = str(item.type), item.default
    words = " ".join(map(str, default)) if isinstance(default, tuple) else default
    shown = "" if words in (None, "") else f" (default: {words})"
    text = (item.metadata["help"] + shown).replace("%", "%%")
    common = {"dest": item.name, "default": argparse.SUPPRESS, "help": text}
    if kind == "bool":
        section.add_argument(*names(item), action=argparse.BooleanOptionalAction, **common)
    else:
        section.add_argument(
            *names(item),
            type=partial(convert, item),
            metavar="|".join(item.metadata["choices"] or ()) or number_kind(kind).__name__.upper(),
            nargs="+" if kind.startswith("tuple") else None,
            **common,
        )


def number_kind(kind: Any) -> type:
    """Return int, float, Path or str, the type of one value of a field."""
    return next(base for base in (int, float, Path, str) if base.__name__ in str(kind))


def convert(item: Field[Any], text: str) -> Any:
    """Convert and check the text of a flag; ~/ is the home folder, as --flag=~/x leaves it."""
    kind = number_kind(item.type)
    try:
        home = kind not in (int, float) and (text == "~" or text.startswith("~/"))
        value = kind(os.path.expanduser(text) if home else text)  # noqa: PTH111
    except ValueError:
        expected = {int: "a whole number", float: "a number"}[kind]
        raise argparse.ArgumentTypeError(f"{text!r} is not {expected}") from None
    problem = out_of_range(value, item.metadata)
    if problem:
        raise argparse.ArgumentTypeError(problem)
    return value


def contradictions(
    given: Mapping[str, Any], stored: Mapping[str, Any], ignored: Collection[str] = ()
) -> list[tuple[str, Any]]:
    """Return each flag given, as typed, whose stored value differs, with that value."""
    return [
        (f"no --{name}" if value is None else f"--{name} {value}", stored[name])
        for name, value in given.items()
        if name in stored and name not in ignored and stored[name] != value
    ]


def check_stored(
    given: Mapping[str, Any], stored: Mapping[str, Any], file: object, ignored: Collection[str] = ()
) -> None:
    """Raise UserError if a flag contradicts its value stored in a file, naming both values."""
    for flag, value in contradictions(given, stored, ignored):
        raise UserError(f"{flag} contradicts {file}, which has {value}")


def build(group: type[Group], flags: Mapping[str, Any]) -> Group:
    """Build a dataclass from the flags that belong to it; others keep their defaults.

    Raises UserError if fields contradict each other.
    """
    own = {item.name for item in fields(group)}  # type: ignore[arg-type]
    try:
        return group(**{name: value for name, value in flags.items() if name in own})
    except ValueError as error:
        raise UserError(str(error)) from error


def build_model_config(flags: Mapping[str, Any], in_channels: int) -> ModelConfig:
    """Build the model's configuration; flags not given have the quantiser's own defaults.

    Raises UserError if flags contradict each other or a library that the model needs is missing.
    """
    try:
        config = build(ModelConfig, {**flags, **implied_flags(flags), "in_channels": in_channels})
        config.need_libraries()
    except ValueError as error:
        raise UserError(str(error)) from error
    return config

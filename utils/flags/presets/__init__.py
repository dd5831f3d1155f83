"""Named files of flags: --preset NAME or --preset FILE.

A file holds flags as typed on a command line, and comments from a # on that begins a word. A
backslash is a backslash, as in C:\\pictures, but one that ends a line after a space continues it.
Quotes keep a name with spaces together.
"""

from __future__ import annotations

import re
import shlex
from collections.abc import Callable
from pathlib import Path
from typing import Any

from modules.config import ModelConfig
from modules.options import unknown_name
from modules.quantizers.registry import QUANTIZER_FLAGS, QUANTIZERS
from utils.errors import UserError, one_line

FOLDER = Path(__file__).parent
NOT_FLAGS = re.compile(  # comments and backslashes before the end of a line, outside quotes
    r"""(?P<quoted>"[^"]*"|'[^']*')|(?<!\S)(\#.*|\\$)""", re.MULTILINE
)
PRESETS = tuple(sorted(path.stem for path in FOLDER.glob("*.txt")))
PRIOR_PRESETS = tuple(name for name in PRESETS if name.startswith("ldm-"))  # of generate.py
NETWORK_PRESETS = tuple(name for name in PRESETS if name not in PRIOR_PRESETS)  # of main.py


def preset_flags(name: str, quantizer: str | None, parse: Callable[..., Any]) -> dict[str, Any]:
    """Read the flags of a preset (a name or path); `parse` is `parse_flags` of the script.

    If another quantiser is given than the preset's, the flags of the preset's quantiser are left
    out, except the number of codevectors and latent channels where the other one takes any. Raises
    UserError if there is no such preset or it cannot be read.
    """
    path = FOLDER / f"{name}.txt" if name in PRESETS else Path(name)
    try:
        if not path.is_file():
            if path.name != name:
                raise UserError(
                    f"--preset {name} {'is no file' if path.exists() else 'does not exist'}"
                )
            raise UserError(unknown_name("--preset", name, PRESETS))
        words = split(path.read_text(encoding="utf-8-sig"))  # editors may write a byte-order mark
    except (OSError, ValueError) as error:
        reason = one_line(error)[:200]
        raise UserError(f"--preset {str(path)[:200]} cannot be read: {reason}") from error
    flags: dict[str, Any] = parse(argv=words, source=f"--preset {path}")
    if "preset" in flags:
        raise UserError(f"--preset {path} names another preset, {flags['preset']}")
    if quantizer in (None, flags.get("quantizer", ModelConfig.quantizer)):
        return flags
    other = QUANTIZERS[quantizer]
    dropped = QUANTIZER_FLAGS - (other.reads & {"num_embedding"})
    if not other.any_channels:
        dropped |= {"latent_channels"}
    return {name: value for name, value in flags.items() if name not in dropped}


def split(text: str) -> list[str]:
    """Split the text of a preset into the words of a command line."""
    kept = re.sub(NOT_FLAGS, lambda found: found["quoted"] or "", text)
    words = shlex.shlex(kept, posix=True)
    words.whitespace_split, words.escape, words.commenters = True, "", ""
    return list(words)

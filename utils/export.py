"""The command python -m utils.export <checkpoint> <folder>.

It writes an autoencoder as config.json and model.safetensors, as the Hub expects. Such a folder is
opened like the checkpoint; optimiser and discriminator are left out.
"""

from __future__ import annotations

import json
import sys
from collections.abc import Mapping
from dataclasses import asdict
from pathlib import Path
from typing import Any

from modules.checkpoint import FORMAT
from modules.pretrained import locate
from modules.weights import CONFIG, TENSORS
from utils.checkpoints.checkpoint import read_checkpoint
from utils.errors import UserError, run
from utils.files import whole_folder, write_json
from utils.packages import need


def main() -> None:
    if len(sys.argv) != 3:
        raise UserError("usage: python -m utils.export <checkpoint> <folder>")
    checkpoint = read_checkpoint(locate(sys.argv[1]))
    folder = Path(sys.argv[2])
    if folder.exists():
        raise UserError(f"{folder} exists: give a folder that does not")
    save = need("safetensors.torch", "export").save_file
    config = asdict(checkpoint.model_config)
    with whole_folder(folder) as new:
        entries = {"format": FORMAT, "model_config": config, **plain(checkpoint.content)}
        write_json(new / CONFIG, entries)
        save({k: v.contiguous() for k, v in checkpoint.state_dict.items()}, new / TENSORS)
    sys.stdout.write(f"{folder}\n")


def plain(content: Mapping[str, Any]) -> dict[str, Any]:
    """Select the entries that JSON can hold."""
    found = {}
    for name, value in content.items():
        try:
            found[name] = json.loads(json.dumps(value, allow_nan=False))
        except (TypeError, ValueError):
            continue  # it has tensors
    return found


if __name__ == "__main__":
    sys.argv[0] = "utils.export"  # names the command in messages
    run(main)

"""Generate images by a prior, a model of a first stage's codes or latents.

generate.py train --first_stage <exp>/best.pt trains one; generate.py sample --model_name
<exp_name>/best.pt draws images from it, or edits pictures; generate.py export writes one of
latents in the format of diffusers. Each takes --help; train and sample share work under torchrun.
"""

from __future__ import annotations

from utils.start import run  # isort: skip  # before those that take seconds

import sys

import torch

from commands import export, sample, train
from utils.devices import keep_freed_memory
from utils.distributed import stop_ranks
from utils.errors import UserError
from utils.flags.arguments import parse_flags

COMMANDS = {"train": train, "sample": sample, "export": export}
GROUPS = (*train.GROUPS, *sample.GROUPS, *export.GROUPS)


def main() -> None:
    word = sys.argv[1] if len(sys.argv) > 1 else ""
    if word not in COMMANDS:
        if word in ("-h", "--help"):
            parse_flags(__doc__)
        raise UserError(f"give train, sample or export first, not {word!r}")
    keep_freed_memory()
    torch.backends.cudnn.allow_tf32 = False  # codes as those of test.py
    torch.backends.cudnn.deterministic = True
    COMMANDS[word].main()
    stop_ranks()


if __name__ == "__main__":
    run(main)

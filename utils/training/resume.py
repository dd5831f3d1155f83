"""Resuming: the checkpoint from which a run continues, where it fits flags and images."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import replace
from itertools import pairwise
from pathlib import Path
from typing import Any

from utils.checkpoints.checkpoint import Stored, find_checkpoint, read_stored
from utils.distributed import from_first, rank
from utils.errors import UserError
from utils.files import check_unicode, inside, writable_folder
from utils.flags.arguments import contradictions
from utils.logger import log, start_logging
from utils.training.config import FREE_TO_CHANGE, LoopConfig
from utils.training.trainer import Trainer


def experiment_folders(config: LoopConfig) -> tuple[Path, Path]:
    """Folders of an experiment's checkpoints and of its logs; they are not created."""
    check_unicode(config.output_folder, "--output_folder")
    output, name = writable_folder(Path(config.output_folder), "--output_folder"), config.exp_name
    models, logs = (inside(output / kind, str(name), "--exp_name") for kind in ("models", "logs"))
    return models, logs


def start_files(trainer: Trainer) -> None:
    """Let the first process log to train.log and obey --overwrite."""
    if rank() == 0:
        start_logging(writable_folder(trainer.logs, "--output_folder") / "train.log")
        if trainer.config.overwrite:  # everything is in order: not before
            remove_earlier(trainer)


def resume(trainer: Trainer, check: Callable[[Stored], None]) -> None:
    """Continue from the checkpoint that --resume names, if there is one.

    check raises UserError for a checkpoint of other data. Raises UserError where flags differ.
    """
    stored, has_best = stored_to_resume(trainer, check) if rank() == 0 else (None, False)
    path, has_best = from_first(lambda: (stored.path if stored else None, has_best))
    if path is None:
        return
    stored = stored or trainer.task.read(path)  # each process maps the file: its pages are shared
    trainer.resume(stored)
    if trainer.config.overwrite and trainer.step >= trainer.total_steps:
        raise UserError(
            f"--overwrite: --resume {stored.path} is at step {trainer.step} of "
            f"{trainer.total_steps}, nothing is left to train"
        )
    if not has_best:
        trainer.best = -math.inf  # the best of another experiment is not ours
    log.info("resumed %s at step %d", stored.path, trainer.step)


def remove_earlier(trainer: Trainer) -> None:
    """Remove the checkpoints and curves of an earlier run of this experiment, and say so."""
    checkpoints = [trainer.models / name for name in ("last.pt", "previous.pt", "best.pt")]
    removed = [path for path in checkpoints if path.exists()]
    removed += sorted(trainer.logs.glob("events.out.tfevents.*"))
    if not removed:
        return
    try:
        step = f", which was at step {read_stored(checkpoints[0]).count('step')}"
    except UserError:  # missing or damaged
        step = ""
    for path in removed:
        path.unlink()
    log.warning(
        "--overwrite removed the earlier run of %s%s, and its curves in %s",
        *(trainer.models, step, trainer.logs),
    )


def stored_to_resume(
    trainer: Trainer, check: Callable[[Stored], None]
) -> tuple[Stored | None, bool]:
    """The checkpoint to continue, if there is one, and whether its best.pt lies beside it.

    --resume PATH is where an experiment begins; its own last.pt is where it continues.
    """
    config, models = trainer.config, trainer.models
    own = [models / name for name in ("last.pt", "previous.pt") if (models / name).exists()]
    given = None
    if config.resume not in ("auto", "none"):
        given = find_checkpoint("--resume", config.resume, config.output_folder, "last.pt")
    pretrained = getattr(config, "pretrained", None)
    if config.overwrite:
        check_kept("--resume", given, models)
        if pretrained is not None:
            source = find_checkpoint("--pretrained", pretrained, config.output_folder)
            check_kept("--pretrained", source, models)
        own = []
    elif own and given is not None and given.resolve().parent == models.resolve():
        check_own(given, own)
    if config.resume == "none" and own:
        raise UserError(f"--resume none: {own[0]} exists; give --overwrite to replace it")
    if own and given is not None and given.resolve() != own[0].resolve():
        log.info("continuing from %s; --resume %s is where it began", own[0], given)
    paths = own or ([] if given is None else [given])
    if not paths:
        return None, False
    stored = read_first(paths, trainer.task.read)
    # Older checkpoints without the losses' flags have their defaults.
    stored = replace(stored, content={"objective_config": {}, **stored.content})
    if not own and pretrained is not None and "train_config" in stored.content:
        before = stored.group("train_config", type(config))
        if getattr(before, "pretrained", None) is None:
            raise UserError(
                f"--pretrained {pretrained} contradicts --resume {given}, a run that did not start "
                "from it: give one of them"
            )
    start = f"--pretrained {stored.path} starts from its weights"
    if "optimizer" not in stored.content:
        last = stored.path.with_name("last.pt")
        way = f"{last} continues the run, {start}" if last.exists() else start
        raise UserError(f"checkpoint {stored.path} holds weights, not the state of a run; {way}")
    differing = [
        line
        for name, configs in trainer.configs.items()
        if name in stored.content or name == "train_config"
        for current in configs
        for line in differing_flags(stored.group(name, type(current)), current)
    ]
    if differing:
        way = f"; choose another --exp_name ({start}), or --overwrite" if own else f", {start}"
        raise UserError(
            f"{stored.path} was trained with other flags: {', '.join(differing)}; "
            f"with its own it continues{way}"
        )
    check(stored)
    return stored, bool(own) and (models / "best.pt").exists()


def check_kept(flag: str, source: Path | None, models: Path) -> None:
    """Raise UserError where --overwrite would remove the checkpoint that the run starts from."""
    if source and source.is_file() and source.resolve().parent == models.resolve():
        raise UserError(f"--overwrite would remove {flag} {source}; choose another --exp_name")


def check_own(given: Path, own: list[Path]) -> None:
    """Raise UserError where --resume names an earlier checkpoint of this experiment."""
    if given.resolve() != own[0].resolve():
        raise UserError(
            f"--resume {given}: {own[0]} is where this experiment continues; "
            f"with another --exp_name --pretrained {given} starts from its weights"
        )


def read_first(paths: list[Path], read: Callable[[Path], Stored]) -> Stored:
    """The first checkpoint that can be read; raises UserError where the last one cannot either.

    A damaged one is renamed to damaged.pt, so that it does not become previous.pt.
    """
    for path, following in pairwise(paths):
        try:
            return read(path)
        except UserError as error:
            log.warning("%s; going back to %s", error, following)
            path.replace(path.with_name("damaged.pt"))
    return read(paths[-1])


def differing_flags(stored: Any, current: Any) -> list[str]:
    """Return the flags of a dataclass that differ from those of a checkpoint, with both values."""
    before, now = (getattr(config, "pretrained", None) for config in (stored, current))
    moved = () if None in (before, now) else ("pretrained",)  # the checkpoint holds the weights
    if moved and before != now:
        log.warning("this run began with --pretrained %s; %s is not used", before, now)
    found = contradictions(vars(current), vars(stored), (*FREE_TO_CHANGE, *moved))
    return [f"{flag} (it has {'none' if value is None else value})" for flag, value in found]

"""Checkpoints from which a model is rebuilt without further flags."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import asdict, fields
from pathlib import Path
from typing import Any, TypeVar

import torch
from torch import Tensor

from .autoencoder import Autoencoder
from .config import ModelConfig, implied_flags
from .options import value_problem
from .pretrained import listing, locate
from .quantizers.looc import LooCQuantizer
from .quantizers.looc.state import as_settings, contradictions
from .reference import StateDict, describe, from_reference
from .registry import make_model
from .vqgan import default_groups
from .weights import read_weights

FORMAT = "looc-1"
SETTINGS = "quantizer.settings"
# Types that buffers of a quantiser had in earlier checkpoints; now all are float32.
EARLIER_TYPES = {
    "quantizer.reinitialised": torch.bool,
    "quantizer.started": torch.bool,
    "quantizer.pool_size": torch.int64,
    "quantizer.latent_steps": torch.int64,
}
Group = TypeVar("Group")


def load_model(path: str | Path) -> Autoencoder:
    """Load the model of a checkpoint, or of a state dict of the reference, in evaluation mode.

    The name of a model that comes with the package may stand for a path. Raises ValueError if the
    file is missing, damaged, of another architecture, or would execute code when opened.
    """
    path = locate(path)
    if not path.suffix and not path.exists():
        raise ValueError(f"checkpoint {path} does not exist{listing()}")
    return rebuild(*read_model(path, read_weights(f"checkpoint {path}", path)))


def rebuild(config: ModelConfig, state_dict: StateDict) -> Autoencoder:
    """Make the model, in evaluation mode, on the CPU."""
    model = make_model(config)
    model.load_state_dict(state_dict)
    return model.eval()


def model_content(model: Autoencoder) -> dict[str, Any]:
    """Return the entries of a checkpoint from which the model is rebuilt."""
    return {"model_config": asdict(model.config), "model": model.state_dict()}


def read_model(
    path: Path, content: Mapping[Any, Any], flags: Mapping[str, Any] | None = None
) -> tuple[ModelConfig, StateDict]:
    """Return configuration and weights of a checkpoint's content, checked.

    A state dict of the reference has no configuration: flags give what its shapes do not show.
    Raises ValueError naming the file.
    """
    if "prior_config" in content:
        stage = content.get("first_stage")
        where = f": {stage['path']}" if isinstance(stage, Mapping) and "path" in stage else ""
        raise ValueError(f"checkpoint {path} is a prior; give its first stage{where}")
    ours = content.get("format") == FORMAT
    state_dict: Any
    try:
        if ours:
            known = asdict(stored_flags(content, "model_config", ModelConfig))
            state_dict = content.get("model")
        else:
            state_dict, known = from_reference(content)
            known = {**(flags or {}), **known}
            known |= implied_flags(known)
    except ValueError as error:
        raise ValueError(f"checkpoint {path} {error}") from error
    try:
        config = ModelConfig(**known)
        config.need_libraries()
    except ValueError as error:
        raise ValueError(f"{path}: {error}") from error
    if not ours:
        # The reference does not store every buffer; the others start anew.
        fresh = dict(config.spec.make(config).named_buffers(prefix="quantizer"))
        fresh.pop(SETTINGS, None)
        state_dict = {**fresh, **state_dict}
    try:
        with torch.device("meta"):
            model = make_model(config)
        check_tensors(model.state_dict(), state_dict)
        check_averages(state_dict)
        check_settings(model, state_dict)
    except ValueError as error:
        raise ValueError(f"checkpoint {path} is {error}") from error
    return config, state_dict


def stored_flags(content: Mapping[str, Any], name: str, group: type[Group]) -> Group:
    """Return the dataclass of flags stored under this name, each value checked like a flag.

    A flag that is newer than the checkpoint gets its default. Raises ValueError, whose message
    follows the name of the file.
    """
    values = content.get(name)
    if not isinstance(values, Mapping):
        raise ValueError(f"does not hold the flags of its {group.__name__}")
    flags = {}
    try:
        for item in fields(group):  # type: ignore[arg-type]
            flags[item.name] = values.get(item.name, item.default)
            problem = value_problem(item, flags[item.name])
            if problem:
                raise ValueError(f"{item.name}: {problem}")
        if flags.get("model") == "vqgan" and "norm_groups" not in values:
            flags["norm_groups"] = earlier_groups(flags["hidden_size"])
        if flags.get("prior") == "diffusion" and "prediction_type" not in values:
            flags["prediction_type"] = "epsilon"  # of priors that were saved before this flag
        return group(**flags)
    except (TypeError, ValueError) as error:
        raise ValueError(f"is damaged: {error}") from error


def earlier_groups(width: int) -> int | None:
    """Return --norm_groups of a VQGAN that was saved before this flag existed."""
    groups = math.gcd(32, width)
    return None if groups == default_groups(width) else groups


def check_tensors(expected: StateDict, given: Any) -> None:
    """Raise ValueError naming the first tensor that is missing, misshapen or not finite."""
    if not isinstance(given, Mapping):
        raise ValueError(f"damaged: a {type(given).__name__} where weights are expected")
    for key in [*expected, *given]:
        value = given.get(key)
        if key == SETTINGS:
            continue  # earlier checkpoints have none
        if isinstance(value, Tensor) and value.dtype == EARLIER_TYPES.get(key):
            value = value.float()
        ours, theirs = describe(expected.get(key)), describe(value)
        if ours != theirs or value is None:
            raise ValueError(
                f"of another architecture: {key} is {theirs} where the model has {ours}"
            )
        if value.device.type != "cpu" or not value.isfinite().all():
            raise ValueError(f"damaged: {key} is not finite")


def check_averages(given: StateDict) -> None:
    """Raise ValueError for impossible counts or averages of the quantiser."""
    for name in ("usage", "ema_count", "latent_variance", "latent_steps", "pool_size"):
        value = given.get(f"quantizer.{name}")
        if value is not None and (value < 0).any():
            raise ValueError(f"damaged: quantizer.{name} is negative")
    pool = given.get("quantizer.pool")
    if pool is not None and given["quantizer.pool_size"] > len(pool):
        raise ValueError("damaged: quantizer.pool_size is more than quantizer.pool holds")


def check_settings(model: Autoencoder, given: StateDict) -> None:
    """Raise ValueError if settings of the quantiser contradict the configuration."""
    quantizer = model.quantizer
    if isinstance(quantizer, LooCQuantizer):
        settings = as_settings(given.get(SETTINGS))
        for problem in contradictions(quantizer.config, settings, quantizer.compared):
            raise ValueError(f"damaged: {problem}")

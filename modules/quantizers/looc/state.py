"""State that describes itself: settings among the tensors, and statistics that are missing."""

from __future__ import annotations

import inspect
import json
import reprlib
import warnings
from collections.abc import Callable, Iterator, Mapping
from typing import TYPE_CHECKING, Any, ClassVar, TypeVar

import torch
from torch import Tensor, nn

from .search import widened

if TYPE_CHECKING:
    from .quantizer import LooCQuantizer

LENGTH = 1024  # characters of the settings, more than they have
NARROW = (torch.float16, torch.bfloat16)
WRITTEN = 1.01  # no initial codevector is longer than this multiple of 1/K, by coordinate
Module = TypeVar("Module", bound="Described")


class Described(nn.Module):
    """Base class of a module whose state has its settings, which loading compares.

    The buffer `settings` is `config` in JSON, one ASCII character per element. It is a buffer of
    floats and not an extra state, because loaders of accelerate and diffusers take parameters and
    buffers only, and averages of buffers and half precision then keep it too.
    """

    compared: ClassVar[tuple[str, ...]]  # settings that have to agree; only training reads others
    settings: Tensor

    @property
    def config(self) -> dict[str, Any]:
        """Arguments of `from_config`, plain values: the module without its state."""
        raise NotImplementedError

    @classmethod
    def from_config(cls: type[Module], config: Mapping[str, Any]) -> Module:
        """Make a new module from the `config` of another."""
        return cls(**config)

    def reset_parameters(self) -> None:
        """Set parameters and buffers to what they are in a new module."""
        raise NotImplementedError

    def extra_repr(self) -> str:
        """Required arguments, then those that differ from their defaults."""
        shown, config = [], self.config
        for name, parameter in inspect.signature(type(self).__init__).parameters.items():
            value = config.get(name, parameter.default)
            if name in config and parameter.default is parameter.empty:
                shown.append(repr(value))
            elif value != parameter.default:
                shown.append(f"{name}={reprlib.repr(value)}")
        return ", ".join(shown)

    def _described(self) -> Tensor:
        """Encode the settings; lists are left out, since they are tensors of the state."""
        plain = {name: value for name, value in self.config.items() if not isinstance(value, list)}
        text = json.dumps(plain, default=float)  # numbers of NumPy have no form in JSON
        characters = list(text.ljust(LENGTH).encode("ascii"))
        return torch.tensor(characters, dtype=torch.float32, device="cpu")

    def _save_to_state_dict(self, destination: Any, prefix: str, keep_vars: bool) -> None:
        super()._save_to_state_dict(destination, prefix, keep_vars)
        destination[f"{prefix}settings"] = self._described().to(self.settings)  # may have changed

    def _load_from_state_dict(self, state_dict: dict[str, Any], prefix: str, *args: Any) -> None:
        *_, error_messages = args
        given = as_settings(state_dict.get(f"{prefix}settings"))
        if found := list(contradictions(self.config, given, self.compared)):
            error_messages.append(f"{prefix.removesuffix('.')} {'; '.join(found)}".lstrip())
            return
        self._complete(state_dict, prefix)
        devices = (value.device for name, value in state_dict.items() if name.startswith(prefix))
        state_dict[f"{prefix}settings"] = self._described().to(next(devices, self.settings.device))
        super()._load_from_state_dict(state_dict, prefix, *args)

    def _complete(self, state: dict[str, Any], prefix: str) -> None:
        """Add to a state what it lacks and the module can infer."""

    def _settle(self) -> None:
        """Check what loaders have set tensor by tensor, before it is moved."""

    def _apply(self: Module, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> Module:
        on_meta = any(value.is_meta for value in self.parameters())
        self._settle()
        before = dict(self._buffers)
        super()._apply(fn, recurse)  # type: ignore[no-untyped-call]
        for name, value in before.items():  # in half precision averages would stand still
            converted = self._buffers[name]
            if value is not None and converted is not None and converted.dtype in NARROW:
                self._buffers[name] = widened(value).to(converted.device)
        if on_meta and not any(value.is_meta for value in self.parameters()):
            self.reset_parameters()  # to_empty has given them memory without values
        return self


def as_settings(value: Any) -> dict[str, Any]:
    """Decode settings; none if there are none, or nothing that can be read."""
    try:
        characters = value.detach().float().round().to(torch.uint8).tolist()
        settings = json.loads(bytes(characters))
    except (AttributeError, TypeError, ValueError, NotImplementedError):
        return {}
    return settings if isinstance(settings, dict) else {}


def contradictions(
    config: Mapping[str, Any], given: Mapping[str, Any], names: tuple[str, ...]
) -> Iterator[str]:
    """Compare settings of a module and of a state; name both values where they contradict."""
    for name in names:
        ours, theirs = config[name], given.get(name)
        if name == "interpolation_scale" and theirs is not None:
            ours, theirs = max(1, ours), max(1, theirs)  # 0 and 1 are off
        if None not in (ours, theirs) and ours != theirs:
            yield f"{name} {config[name]!r} contradicts the state, whose {name} is {given[name]!r}"


def start_value(name: str) -> float:
    """Value of a buffer of statistics before the first training call."""
    return float(name == "latent_variance")


def complete_state(quantizer: LooCQuantizer, state: dict[str, Any], prefix: str) -> None:
    """Infer the statistics that a state does not have beside its codebook, and warn.

    Tools that keep parameters only (averages of weights) save a codebook with statistics that are
    missing or those of a new module. Such a codebook counts as used evenly and as trained: features
    never replace it at once.
    """
    codebook = state.get(f"{prefix}codebook")
    if codebook is None or codebook.is_meta:
        return
    length = quantizer.num_embedding
    names = [name for name, _ in quantizer.named_buffers(recurse=False) if name != "settings"]
    for name in ("ema_count", "started"):  # of a quantiser that was trained in another way
        if name not in names:
            state.pop(f"{prefix}{name}", None)
    given = {name: state.get(f"{prefix}{name}") for name in names}
    used = given["usage"] is not None and bool(given["usage"].any())
    doubtful = given["usage"] is None or f"{prefix}settings" in state  # older states are believed
    trained = used or (doubtful and bool(codebook.detach().abs().max() > WRITTEN / length))
    even, lost = {"usage": 1 / length, "reinitialised": 1, "started": 1}, []
    for name, value in given.items():
        start = start_value(name)
        if value is None or (trained and not used and bool((value == start).all())):
            inferred = even.get(name, start) if trained else start
            like = getattr(quantizer, name)
            state[f"{prefix}{name}"] = torch.full_like(like, inferred, device=codebook.device)
            lost.append(name)
    plain = quantizer.anchor == "none" and not quantizer.rate_weight and "ema_count" not in names
    needed = ("latent_mean", "latent_variance", *(() if plain else ("usage",)))
    if trained and (told := [name for name in lost if name in needed]):
        warnings.warn(
            f"the codebook was loaded without its statistics ({', '.join(told)}): its codevectors "
            "count as evenly used, and averages of the latents start again",
            stacklevel=2,
        )


def settle(quantizer: LooCQuantizer, device: torch.device) -> None:
    """Check a state that loaders have set tensor by tensor into a quantiser on the device meta.

    Tensors that they left out get memory: the statistics are inferred, a codebook is a new one.
    """
    tensors = {**quantizer._parameters, **quantizer._buffers}
    loaded = {name: value.detach() for name, value in tensors.items() if value is not None}
    for name, value in list(loaded.items()):
        if value.is_meta:
            memory = torch.empty_like(loaded.pop(name), device=device)
            trained = name in quantizer._parameters
            kept = nn.Parameter(memory, quantizer.codebook.requires_grad) if trained else memory
            setattr(quantizer, name, kept)
    if "codebook" in loaded:
        quantizer.load_state_dict(loaded)
    else:
        quantizer.reset_parameters()
        quantizer._unseen = False
        warnings.warn("no codebook was loaded; it is a new one", stacklevel=2)

"""The task of an autoencoder: reconstruct images through quantised latents."""

from __future__ import annotations

import errno
import os
from collections.abc import Iterable, Iterator, Mapping
from itertools import chain
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from modules import VQGAN, Autoencoder, ModelConfig
from modules.checkpoint import model_content
from modules.quantizers.looc.ranks import num_ranks, sum_over_ranks
from modules.quantizers.looc.usage import count_indices
from modules.quantizers.registry import QUANTIZERS
from utils.checkpoints.checkpoint import Checkpoint, read_checkpoint
from utils.codebook.plots import draw_all
from utils.codebook.statistics import CodebookStatistics, in_words, numbered, use_of
from utils.errors import UserError, memory_for, one_line, out_of_memory
from utils.images import comparison, mean_squared_errors, signed_psnr, to_bytes, to_signed
from utils.training.config import TrainConfig
from utils.training.losses.loss import Loss, Seen
from utils.training.task import Step, Task
from utils.training.trainer import mixed_precision

UNWRITABLE = (errno.EACCES, errno.EROFS, errno.ENOSPC, errno.EDQUOT, errno.ENOTDIR)
NUM_SHOWN = 16  # validation images in TensorBoard


class Reconstruction(Task):
    """An autoencoder that is trained to reconstruct byte images (b, C, H, W).

    Args:
        model: on its device.
        terms: the losses by name, in the order of their sum.
        config: memory layout of the images, and the parts of a batch.

    Raises:
        UserError: where the quantiser needs the whole batch, and it comes in parts.
    """

    model: Autoencoder
    items = "images"

    def __init__(self, model: Autoencoder, terms: Mapping[str, Loss], config: TrainConfig) -> None:
        check_parts(model.config, config.accumulate)
        self.model = model
        self.terms = dict(terms)
        self.memory_format = memory_format(config)
        length = model.config.num_embedding * model.config.num_codebooks
        device = next(model.parameters()).device
        self.counts = torch.zeros(length, dtype=torch.int64, device=device)  # since the last look
        self.begin_validation()

    def losses(self, batch: Tensor, step: Step) -> Iterator[Mapping[str, Tensor]]:
        self.model.quantizer.defer_update = not step.last
        images = to_signed(batch).contiguous(memory_format=self.memory_format)
        reconstruction, quantized = step.network(images)
        seen = Seen(images, reconstruction.to(images.dtype), quantized, step)
        losses = {}
        for name, term in self.terms.items():
            losses[name] = term(seen)
            seen.total = seen.total + losses[name]
        errors = mean_squared_errors(images, seen.reconstruction.detach().clamp(-1, 1))
        step.report(
            loss=seen.total,
            reconstruction=seen.mse,
            quantizer=quantized.loss,
            psnr=signed_psnr(errors).mean(),
        )
        self._count(quantized.indices)
        yield losses
        for term in self.terms.values():
            own = term.own_loss(seen)
            if own is not None:
                yield dict.fromkeys(term.optimizers(), own)

    def further_optimizers(self) -> dict[str, torch.optim.Optimizer]:
        return merged(term.optimizers() for term in self.terms.values())

    def training_scores(self) -> dict[str, float]:
        counts = sum_over_ranks(self.counts).clone()
        self.counts.zero_()
        return use_of(counts)

    def begin_validation(self) -> None:
        config = self.model.config
        self.statistics = CodebookStatistics(config.num_embedding, config.num_codebooks)
        self.shown: tuple[Tensor, Tensor] | None = None  # some images and their reconstructions

    def validate(self, model: nn.Module, batch: Tensor) -> dict[str, Tensor]:
        signed = to_signed(batch)
        reconstruction, quantized = model(signed)
        clipped = reconstruction.clamp(-1, 1)
        errors = mean_squared_errors(signed, clipped).double()
        measured = {"psnr": signed_psnr(errors), "reconstruction": errors}
        for name, term in self._measured().items():
            measured[name] = term.distance(signed, clipped)
        self.statistics.add(quantized.indices)
        if self.shown is None:
            self.shown = batch[:NUM_SHOWN], to_bytes(reconstruction[:NUM_SHOWN])
        return {name: values.double().sum() for name, values in measured.items()}

    def validation_scores(self) -> dict[str, float]:
        self.statistics.sum_over_ranks()
        return use_of(self.statistics.counts)

    def pictures(self, model: Any) -> dict[str, Any]:
        found: dict[str, Any] = {}
        if self.shown is not None:
            found["validation/reconstructions"] = comparison(*self.shown)
        figures = draw_all(self.statistics, model.quantizer.codebook)
        return found | {f"codebook/{name}": figure for name, figure in figures.items()}

    def score(self, scores: Mapping[str, float]) -> float:
        """PSNR; where more than the mean squared error is minimised, minus the weighted sum."""
        measured = self._measured()
        if not measured:
            return scores["psnr"]
        return -sum(term.weight * scores[name] for name, term in measured.items())

    def describe(self, scores: Mapping[str, float]) -> str:
        loss = f"loss {scores['loss']:.4f}, " if "loss" in scores else ""
        measured = () if loss else self._measured()
        distances = "".join(f", {name} {scores[name]:.4f}" for name in measured)
        return f"{loss}PSNR {scores['psnr']:.2f} dB{distances}, {in_words(scores)}"

    def content(self, model: Any) -> dict[str, Any]:
        return model_content(model)

    def read(self, path: Path) -> Checkpoint:
        return read_checkpoint(path)

    def state(self) -> dict[str, Any]:
        return merged(term.state() for term in self.terms.values())

    def load(self, content: Mapping[str, Any]) -> None:
        for term in self.terms.values():
            term.load(content)

    def _measured(self) -> dict[str, Loss]:
        """The losses whose weighted sum chooses best.pt; none where PSNR chooses it."""
        found = {name: term for name, term in self.terms.items() if term.measured}
        return {} if found.keys() == {"reconstruction"} else found

    def _count(self, indices: Tensor) -> None:
        """Count the codevectors of indices (b, H, W, m)."""
        config = self.model.config
        numbers = numbered(indices, config.num_embedding, config.num_codebooks)
        self.counts += count_indices(numbers.flatten(), len(self.counts))


def merged(dictionaries: Iterable[dict[str, Any]]) -> dict[str, Any]:
    """Merge dictionaries of different keys."""
    return dict(chain.from_iterable(dictionary.items() for dictionary in dictionaries))


def check_network(model: ModelConfig, config: TrainConfig, image_size: int) -> None:
    """Raise UserError where images or flags of training do not suit the network."""
    if image_size % model.downsampling:
        raise UserError(
            f"--image_size {image_size} is not a multiple of {model.downsampling}, "
            f"which --model {model.model} needs"
        )
    if config.checkpoint_gradients and model.model != "vqgan":
        raise UserError(f"--checkpoint_gradients True has no effect with --model {model.model}")


def check_parts(model: ModelConfig, accumulate: int) -> None:
    """Raise UserError where the quantiser needs the whole batch, and it comes in parts."""
    if model.spec.parts:
        return
    takers = ", ".join(name for name, spec in QUANTIZERS.items() if spec.parts)
    if accumulate > 1:
        raise UserError(
            f"--accumulate {accumulate} needs --quantizer {takers}, not {model.quantizer}"
        )
    if num_ranks() > 1:
        raise UserError(f"{num_ranks()} processes need --quantizer {takers}, not {model.quantizer}")


def memory_format(config: TrainConfig) -> torch.memory_format:
    """Layout of images and weights."""
    return torch.channels_last if config.channels_last else torch.contiguous_format


def prepare(
    model: Autoencoder, config: TrainConfig, image_size: int, device: torch.device
) -> Autoencoder:
    """Move the model to its device and bring it into the form that the flags ask for.

    Raises UserError where --compile fails.
    """
    model = model.to(device)
    if config.channels_last:
        model = model.to(memory_format=torch.channels_last)
    if isinstance(model, VQGAN) and config.checkpoint_gradients:
        model.checkpoint_gradients()
    if config.compile:
        size = -(-config.batch_size // (num_ranks() * config.accumulate))
        shape = (size, model.config.in_channels, image_size, image_size)
        images = torch.zeros(shape, device=device).contiguous(memory_format=memory_format(config))
        try:  # there and back, without the quantiser, which would learn from it
            model.compile_parts()
            with mixed_precision(config, device):
                latents = model.pre_vq_conv(model.encoder(images))
                back = model.reconstruct(latents)
            torch.autograd.backward(back.sum())
            model.zero_grad()
        except Exception as error:  # compilers fail in ways of their own
            with memory_for(f"--batch_size {config.batch_size}"):
                if out_of_memory(error):
                    raise
            # On a GPU compiled backward passes have failed in the other layout.
            other = device.type == "cuda" and not config.channels_last
            advice = "go without or add --channels_last" if other else "go without"
            if any(os.strerror(number) in str(error) for number in UNWRITABLE):
                advice += ", or let TORCHINDUCTOR_CACHE_DIR name a folder for compiled code"
            raise UserError(f"--compile failed, {advice}: {one_line(error)[:200]}") from error
    return model

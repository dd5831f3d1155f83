"""A small classifier of images, trained once per data set and kept on disk."""

from __future__ import annotations

import hashlib
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from datasets import Labels
from utils.checkpoints.unpickle import read_weights
from utils.errors import UserError
from utils.files import whole_file
from utils.images import to_signed
from utils.logger import log, progress

WIDTHS = (32, 64, 128)  # channels of the three blocks
BATCH, LR, SEED = 128, 4e-3, 0
AT_ONCE = 500  # images that are classified together


def make_classifier(channels: int, num_classes: int) -> nn.Module:
    """Three convolutions, each followed by normalisation and pooling, and a linear layer."""
    blocks = [
        nn.Sequential(
            nn.Conv2d(before, width, 3, padding=1),
            nn.BatchNorm2d(width),
            nn.ReLU(),
            nn.MaxPool2d(2),
        )
        for before, width in zip((channels, *WIDTHS), WIDTHS)
    ]
    head = nn.Linear(WIDTHS[-1] * 9, num_classes)
    return nn.Sequential(*blocks, nn.AdaptiveAvgPool2d(3), nn.Flatten(), head)


def trained_classifier(images: Tensor, labels: Labels, epochs: int, folder: Path) -> nn.Module:
    """Return the classifier of these images (n, C, H, W), uint8: from the folder, else trained.

    Its file is named by a digest of images, classes and settings.
    """
    settings = str((tuple(images.shape), labels.names, epochs, WIDTHS, BATCH, LR, SEED))
    digest = hashlib.sha256(settings.encode(errors="surrogateescape"))
    digest.update(images.contiguous().numpy().tobytes() + labels.numbers.numpy().tobytes())
    path = folder / f"{digest.hexdigest()[:16]}.pt"
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(SEED)
        model = make_classifier(images.shape[1], len(labels.names))
        if path.exists():
            load(model, path)
        else:
            train(model, images, labels.numbers, epochs)
            with whole_file(path) as temporary:
                torch.save(model.state_dict(), temporary)
            log.info("classifier: %s", path)
    return model.eval()


def load(model: nn.Module, path: Path) -> None:
    try:
        model.load_state_dict(read_weights(f"classifier {path}", path))
    except (RuntimeError, TypeError, AttributeError) as error:
        raise UserError(f"{path} is no such classifier; without it, one is trained") from error


def train(model: nn.Module, images: Tensor, labels: Tensor, epochs: int) -> None:
    """Train by AdamW, whose learning rate rises and falls once."""
    batches: Any = [
        batch for _ in range(epochs) for batch in torch.split(torch.randperm(len(images)), BATCH)
    ]
    optimizer = torch.optim.AdamW(model.parameters(), weight_decay=1e-2)
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, LR, total_steps=len(batches))
    model.train()
    with progress(len(batches), "step") as bar:
        for batch in batches:
            loss = F.cross_entropy(model(to_signed(images[batch])), labels[batch])
            optimizer.zero_grad()
            torch.autograd.backward(loss)
            optimizer.step()
            schedule.step()
            bar.update()


@torch.no_grad()
def classes_of(model: nn.Module, images: Tensor) -> Tensor:
    """Classes (n,) of images (n, C, H, W), uint8."""
    parts = torch.split(images, AT_ONCE)
    return torch.cat([model(to_signed(part)).argmax(1) for part in parts])

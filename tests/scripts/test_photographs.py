"""Four photographs by models, and by files of codecs as large: experiments/photographs.py."""

from __future__ import annotations

import io
import re
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from experiments import photographs
from experiments.children import Children, Flags
from experiments.codecs import CODECS
from modules import VQVAE
from tests.conftest import Outcome
from utils.checkpoints.checkpoint import save_checkpoint
from utils.flags.arguments import build_model_config
from utils.flags.command import words
from utils.images import to_picture


@pytest.mark.parametrize("bits", [0.01, 1.5, 4.0, 99.0])
def test_files_come_nearest_to_the_rate(bits: float, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(photographs, "SIDE", 32)
    random = np.random.default_rng(0)
    originals = list(random.integers(0, 256, (2, 3, 32, 32), dtype=np.uint8))
    found = photographs.nearest_files("jpeg", originals, bits)
    rates = {}
    for quality in photographs.QUALITIES:
        files = [io.BytesIO() for _ in originals]
        for original, file in zip(originals, files):
            to_picture(original).save(file, **CODECS["jpeg"], quality=quality)
        rates[quality] = 8 * sum(file.tell() for file in files) / (2 * 32 * 32)
    least = min(abs(rate - bits) for rate in rates.values())
    assert found.bits is not None
    assert abs(found.bits - bits) == pytest.approx(least)
    assert found.bits == rates[int(found.name.removeprefix("JPEG, quality "))]


def test_two_models_are_measured_beside_codecs(
    tmp_path: Path, script: Callable[..., Outcome], monkeypatch: pytest.MonkeyPatch
) -> None:
    def child(_self: Children, _log: Path, name: str, flags: Flags) -> float:
        outcome = script(name, *words(flags), "--device", "cpu")
        assert outcome.code == 0, outcome.err
        return 0.0

    monkeypatch.setattr(photographs, "SIDE", 32)
    monkeypatch.setattr(Children, "run", child)
    small = {"hidden_size": 8, "num_residual_hidden": 4}
    for quantizer in ("looc", "none"):
        torch.manual_seed(0)
        config = build_model_config({"quantizer": quantizer, **small}, 3)
        path = tmp_path / f"output/models/{quantizer}/best.pt"
        path.parent.mkdir(parents=True)
        save_checkpoint(path, VQVAE(config), {})
    monkeypatch.setattr(
        "sys.argv",
        ["x", "--models", "looc/best.pt", "none/best.pt", "--codecs", "jpeg", "--output", "made"],
    )
    photographs.main()
    page = Path("made/photographs.md").read_text()
    names = re.findall(r"^\| (looc|none|JPEG, quality \d+) \| (\S+) \|", page, re.M)
    assert [name for name, _ in names] == ["looc", names[1][0], "none"]
    assert [rate == "–" for _, rate in names] == [False, False, True]
    with Image.open("made/photographs.png") as sheet:
        assert sheet.width == 4 * (32 + photographs.GAP) + photographs.GAP
        rows = np.asarray(sheet).reshape(4, -1, sheet.width, 3)  # original, looc, JPEG, none
    assert len({row[photographs.LINE :].tobytes() for row in rows}) == 4


def test_mistakes_are_one_line(script: Callable[..., Outcome]) -> None:
    for flags, line in (
        ((), "--models is missing"),
        (("--models", "mine/best.pt"), "mine/best.pt does not exist"),
        (("--models", "a.pt", "--codecs", "gif"), "--codecs"),
    ):
        outcome = script("experiments/photographs.py", *flags)
        assert outcome.code == 2
        assert line in outcome.err.splitlines()[-1]

"""Files and folders appear complete or not at all; pictures keep their bytes."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image

from modules.options import unknown_name
from utils.codebook.results import NEW, replacing, swap
from utils.errors import UserError, one_line
from utils.files import inside, whole_file, whole_folder, writable_folder, write_json
from utils.images import (
    comparison,
    mean_squared_errors,
    psnr,
    save_comparison,
    save_picture,
    to_bytes,
    to_signed,
)


def test_a_failed_write_leaves_the_old_file(tmp_path: Path) -> None:
    path = tmp_path / "a.json"
    write_json(path, {"a": 1})
    with suppress(RuntimeError), whole_file(path) as temporary:
        temporary.write_text("half")
        raise RuntimeError
    assert json.loads(path.read_text()) == {"a": 1}
    assert list(tmp_path.iterdir()) == [path]


@pytest.mark.parametrize("steps", range(14))
def test_results_killed_while_they_are_replaced(
    steps: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The old ones are whole until the new ones are in place; nothing stands beside others."""
    names = {"original": 2, "rec": 2, "slots.png": 0, "analysis.json": 0, "metrics.json": 0}

    def write(folder: Path, content: str) -> None:
        for name, pictures in names.items():
            if content == "old" or name not in ("metrics.json", "slots.png"):
                paths = [folder / name / f"{n}.png" for n in range(pictures)] or [folder / name]
                for path in paths:
                    path.parent.mkdir(parents=True, exist_ok=True)
                    path.write_text(content)

    def contents(folder: Path) -> list[str]:
        return [path.read_text() for path in folder.rglob("*") if path.is_file()]

    left = steps

    def counted(act: Callable[..., Any]) -> Callable[..., Any]:
        def step(path: Path, *words: Any) -> Any:
            nonlocal left
            left -= 1
            if left < 0:
                raise KeyboardInterrupt
            return act(path, *words)

        return step

    write(tmp_path, "old")
    write(tmp_path / NEW, "new")
    with monkeypatch.context() as patch, suppress(KeyboardInterrupt):
        patch.setattr(Path, "rename", counted(Path.rename))
        patch.setattr(Path, "rmdir", counted(Path.rmdir))
        patch.setattr(shutil, "rmtree", counted(shutil.rmtree))
        swap(tmp_path)
    assert contents(tmp_path).count("new") == 5
    if (tmp_path / NEW).exists():
        assert contents(tmp_path).count("old") == 7
    for mark in ("analysis.json", "metrics.json"):
        if (tmp_path / mark).exists():
            shown = {text for name in ("original", "rec") for text in contents(tmp_path / name)}
            assert shown == {(tmp_path / mark).read_text()}
    with suppress(RuntimeError), replacing(tmp_path):
        raise RuntimeError
    assert contents(tmp_path) == ["new"] * 5
    assert not list(tmp_path.glob(".*"))


def test_a_failed_folder_leaves_the_old_one(tmp_path: Path) -> None:
    folder = tmp_path / "images"
    for content in ("old", "new"):
        with whole_folder(folder) as temporary:
            (temporary / content).touch()
    assert [path.name for path in folder.iterdir()] == ["new"]
    with suppress(RuntimeError), whole_folder(folder) as temporary:
        (temporary / "half").touch()
        raise RuntimeError
    assert [path.name for path in folder.iterdir()] == ["new"]
    assert list(tmp_path.iterdir()) == [folder]


def test_files_of_a_folder_have_the_modes_of_the_umask(tmp_path: Path) -> None:
    """safetensors writes with mode 0600."""
    save = pytest.importorskip("safetensors.torch").save_file
    with whole_folder(tmp_path / "model") as new:
        (new / "part").mkdir()
        save({"weight": torch.zeros(2)}, new / "part" / "a.safetensors")
        write_json(new / "config.json", {})
    modes = {file.stat().st_mode for file in tmp_path.rglob("*.*")}
    assert len(modes) == 1


def test_what_cannot_be_written_is_named(tmp_path: Path) -> None:
    (tmp_path / "file").touch()
    with pytest.raises(UserError, match=r"--output_folder .*file/x cannot be created"):
        writable_folder(tmp_path / "file" / "x", "--output_folder")
    with pytest.raises(UserError, match="cannot write"):
        write_json(tmp_path / "file" / "a.json", {})


@pytest.mark.parametrize("name", ["../x", "/etc/x", "a/../../x", "", "a\udcff"])
def test_names_stay_inside_their_folder(name: str, tmp_path: Path) -> None:
    with pytest.raises(UserError, match="--exp_name"):
        inside(tmp_path / "models", name, "--exp_name")
    assert inside(tmp_path, "a/b.pt", "--model_name") == tmp_path / "a/b.pt"


def test_bytes_survive_the_networks_range() -> None:
    every = torch.arange(256, dtype=torch.uint8)
    assert torch.equal(to_bytes(to_signed(every)), every)
    assert torch.equal(to_signed(every)[[0, -1]], torch.tensor([-1.0, 1.0]))
    assert to_bytes(torch.tensor([-9.0, 0.0, 0.003, 0.004, 9.0])).tolist() == [
        0,
        128,
        128,
        128,
        255,
    ]


def test_reconstructions_are_rounded_not_truncated() -> None:
    assert to_bytes(to_signed(torch.tensor([99.6, 99.4]))).tolist() == [100, 99]


def test_psnr_by_closed_form() -> None:
    one, other = torch.zeros(2, 1, 4, 4), torch.full((2, 1, 4, 4), 2.55)
    assert psnr(mean_squared_errors(one, other), 255).tolist() == pytest.approx([40, 40], rel=1e-5)


@pytest.mark.parametrize("channels", [1, 3])
def test_png_keeps_every_byte_and_jpeg_is_jpeg(channels: int, tmp_path: Path) -> None:
    image = torch.randint(256, (channels, 12, 8), dtype=torch.uint8)
    save_picture(tmp_path / "a.png", image)
    with Image.open(tmp_path / "a.png") as picture:
        pixels = np.asarray(picture)
    assert np.array_equal(pixels.reshape(12, 8, channels).transpose(2, 0, 1), image)
    save_picture(tmp_path / "a.jpg", image, jpeg_quality=75)
    with Image.open(tmp_path / "a.jpg") as picture:
        assert picture.format == "JPEG"
        assert picture.size == (8, 12)


def test_originals_stand_above_their_reconstructions(tmp_path: Path) -> None:
    originals = torch.zeros(5, 1, 4, 4, dtype=torch.uint8)
    others = torch.full_like(originals, 200)
    picture = comparison(originals, others, columns=3)
    assert picture.shape == (1, 4 * 8, 3 * 8)
    assert [int(picture[0, row, 4]) for row in (4, 12, 20, 28)] == [0, 200, 0, 200]
    assert (picture[0, 16:, 16:] == 255).all()  # no sixth image
    save_comparison(tmp_path / "grid.png", originals, others)
    assert (tmp_path / "grid.png").exists()


def test_messages() -> None:
    assert one_line(ValueError("a\n  b")) == "a b"
    assert one_line(ValueError()) == "ValueError"
    assert unknown_name("--x", "zzz", ["abc", "def"]) == "--x zzz is unknown; choose from abc, def"

"""Speed of evaluation.py against one pair at a time, and of loading alone."""

from __future__ import annotations

import json
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from functools import lru_cache, partial
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image

from benchmarks.measure import SEED, interleaved
from datasets import BatchLoader, FileImages, ImageSet, open_dataset
from utils.evaluation import metrics
from utils.evaluation.networks import lpips_network
from utils.tables import Table

NAMES = ["l1", "ssim", "psnr", "lpips"]
SCRIPT = Path(__file__).parent.parent / "evaluation.py"


def write_pairs(folder: Path, count: int, side: int) -> None:
    """Write real pictures, and beside each the picture as JPEG."""
    for kind in ("original", "rec"):
        (folder / kind).mkdir(parents=True)
    for number in range(count):
        picture = small_picture(number) if side == 28 else photograph(number, side)
        name = f"{number:08d}"
        picture.save(folder / "original" / f"{name}.png")
        picture.save(folder / "rec" / f"{name}.jpg", quality=50)


def small_picture(number: int) -> Image.Image:
    images = small_images()
    return Image.fromarray(images[number % len(images)][0].numpy())


def photograph(number: int, side: int) -> Image.Image:
    """A random crop of one of scikit-image's photographs."""
    from skimage import data

    names = ("astronaut", "chelsea", "coffee")
    picture = getattr(data, names[number % len(names)])()
    random = np.random.default_rng([SEED, number])
    top, left = (int(random.integers(length - side)) for length in picture.shape[:2])
    return Image.fromarray(picture[top : top + side, left : left + side])


@lru_cache
def small_images() -> ImageSet:
    return open_dataset("fashion-mnist-sample", None, "train")


def one_at_a_time(folder: Path, count: int) -> dict[str, float]:
    """Mean of each metric over the first pairs, measured one pair at a time."""
    network = lpips_network("vgg").module
    sums = dict.fromkeys(NAMES, 0.0)
    for number in range(count):
        x, y = (
            np.asarray(Image.open(next((folder / kind).glob(f"{number:08d}.*"))))
            for kind in ("original", "rec")
        )
        x, y = (a[None, None] if a.ndim == 2 else a.transpose(2, 0, 1)[None] for a in (x, y))
        for name, compare in (("l1", metrics.l1), ("ssim", metrics.ssim), ("psnr", metrics.psnr)):
            sums[name] += float(compare(x, y)[0])
        images = torch.from_numpy(x.copy()), torch.from_numpy(y.copy())
        sums["lpips"] += float(metrics.lpips(*images, network)[0])
    return {name: total / count for name, total in sums.items()}


def evaluate(folder: Path, count: int) -> dict[str, float]:
    """Mean of each metric over the first pairs by evaluation.py, as a user runs it."""
    command = [
        *(sys.executable, str(SCRIPT), "--gt_path", str(folder / "original")),
        *("-g_path", str(folder / "rec"), "--metrics", *NAMES, "--num_test", str(count)),
    ]
    subprocess.run(command, check=True, capture_output=True)
    found = json.loads((folder / "metrics.json").read_text())["metrics"]
    return {name: found[name]["mean"] for name in NAMES}


def evaluation_table(quick: bool) -> Table:
    """Whole runs of evaluation.py, start-up included; one at a time is scaled up from a part."""
    table = Table(
        "evaluation.py (L1, SSIM, PSNR, LPIPS-VGG), all threads, start-up included",
        ["pairs", "seconds", "one at a time", "measured on", "ratio", "largest difference"],
    )
    for count, part, side in [(64, 16, 28)] if quick else [(10_000, 1000, 28), (200, 50, 256)]:
        with tempfile.TemporaryDirectory() as name:
            table.rows.append(evaluation_row(Path(name), count, part, side))
    return table


def evaluation_row(folder: Path, count: int, part: int, side: int) -> list[Any]:
    write_pairs(folder, count, side)
    start = time.perf_counter()
    alone = one_at_a_time(folder, part)
    slow = (time.perf_counter() - start) * count / part
    start = time.perf_counter()
    evaluate(folder, count)
    fast = time.perf_counter() - start
    ours = evaluate(folder, part)
    worst = max(abs(ours[name] - alone[name]) for name in NAMES)
    return [f"{count} of {side}×{side}", fast, slow, part, slow / fast, f"{worst:.1e}"]


def tables(quick: bool) -> Iterator[Table]:
    yield evaluation_table(quick)
    yield loading_table(quick)


def loading_table(quick: bool) -> Table:
    """Loading of batches alone."""
    count = 64 if quick else 2000
    table = Table("Loading alone, batch 64", ["", "seconds per epoch", "images/s"])
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        write_pairs(folder, count, 256)
        files = FileImages(folder / "rec", [path.name for path in (folder / "rec").iterdir()], 256)
        cpu = torch.device("cpu")
        loaders = {
            "in memory, 28×28": BatchLoader(small_images(), 64, device=cpu, shuffle=True),
            "JPEG files 256×256, this process": BatchLoader(files, 64, device=cpu),
            "JPEG files 256×256, 2 workers": BatchLoader(files, 64, device=cpu, num_workers=2),
        }
        runs = {label: partial(read_all, loader) for label, loader in loaders.items()}
        times = interleaved(runs, rounds=3)
        for label, value in times.items():
            table.rows.append([label, value, f"{loaders[label].size / value.median:.0f}"])
    return table


def read_all(loader: BatchLoader) -> None:
    for _ in loader.epoch():
        pass

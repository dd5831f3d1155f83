"""evaluation.py run as a user would: what it measures, writes, prints and refuses."""

from __future__ import annotations

import csv
import json
import math
import os
import re
import runpy
import subprocess
import sys
from collections import Counter
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image
from PIL.PngImagePlugin import PngImageFile
from torch import Tensor, nn

from tests.processes import run_forked
from utils.evaluation import extremes, metrics, networks, protocols
from utils.evaluation.metrics import CHOICES, METRICS, Metric, Pixels, Values
from utils.evaluation.networks import Network
from utils.images import fitted
from utils.report import write_report

SCRIPT = Path(__file__).parents[2] / "evaluation.py"
FOLDERS = ("original", "rec")
PIXEL_METRICS = ("l1", "ssim", "psnr")


def picture(seed: int, size: tuple[int, int] = (16, 16), channels: int = 1) -> Image.Image:
    """Noise of that width and height."""
    shape = size[::-1] if channels == 1 else (*size[::-1], channels)
    return Image.fromarray(np.random.default_rng(seed).integers(0, 256, shape, dtype=np.uint8))


def save(folder: Path, **pictures: Image.Image) -> None:
    folder.mkdir(parents=True, exist_ok=True)
    for name, image in pictures.items():
        image.save(folder / f"{name}.png")


@pytest.fixture
def results(tmp_path: Path) -> Path:
    """A results folder as test.py leaves it: four pairs of noise in original/ and rec/."""
    for i in range(4):
        save(tmp_path / "results" / "original", **{f"{i:08d}": picture(i)})
        save(tmp_path / "results" / "rec", **{f"{i:08d}": picture(10 + i)})
    return tmp_path / "results"


@pytest.fixture
def evaluate(
    results: Path, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> Callable[..., tuple[int, str, str]]:
    """Runs the script in this process on the results; returns exit code, output and errors."""

    def evaluate(
        *flags: str, metrics: tuple[str, ...] = PIXEL_METRICS, workers: int = 0
    ) -> tuple[int, str, str]:
        folders = ["--gt_path", str(results / "original"), "-g_path", str(results / "rec")]
        chosen = ["--metrics", *metrics] if metrics else []
        arguments = [*folders, *chosen, "--num_workers", str(workers), *flags]
        monkeypatch.setattr(sys, "argv", [str(SCRIPT), *arguments])
        code = 0
        try:
            runpy.run_path(str(SCRIPT), run_name="__main__")
        except SystemExit as end:
            code = int(end.code or 0)
        return code, *capfd.readouterr()

    return evaluate


Evaluate = Callable[..., tuple[int, str, str]]


@pytest.fixture(autouse=True)
def cache(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Path:
    """The folder of the statistics that are kept, empty."""
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    return tmp_path / "cache" / "looc"


def run_script(*arguments: str, cwd: Path, **environment: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, str(SCRIPT), *arguments],
        cwd=cwd,
        env={**os.environ, **environment},
        capture_output=True,
        text=True,
        check=False,
    )


def written(results: Path) -> tuple[dict[str, Any], list[dict[str, str]]]:
    """metrics.json and the lines of metrics.csv."""
    with (results / "metrics.csv").open(newline="") as file:
        return json.loads((results / "metrics.json").read_text()), list(csv.DictReader(file))


def assert_refused(result: tuple[int, str, str], results: Path, *parts: str) -> None:
    """Exit code 2, one line on the screen with these parts, nothing written."""
    code, output, errors = result
    assert code == 2, errors
    assert output == ""
    assert errors.startswith("evaluation.py: error: ")
    assert errors.count("\n") == 1
    for part in parts:
        assert part in errors
    assert not list(results.parent.rglob("*metrics*"))


# What is measured


def test_published_command(results: Path) -> None:
    """In a process of its own, with workers, relative paths and trailing slashes."""
    end = run_script(
        *("--gt_path", "results/original/", "-g_path", "results/rec", "--metrics", *PIXEL_METRICS),
        *("--batch_size", "2"),
        cwd=results.parent,
    )
    assert (end.returncode, end.stderr) == (0, "")
    lines = end.stdout.splitlines()
    assert [line.split()[0] for line in lines[:4]] == ["metric", "L1", "SSIM", "PSNR"]
    pictures = [f"worst_{name}.png" for name in PIXEL_METRICS]
    files = (*pictures, "metrics.json", "metrics.csv", "report.html")
    assert lines[4:] == [f"results/{name}" for name in files]
    directions = [re.search("(lower|higher) is better", line) for line in lines[1:4]]
    assert len({match and match.start() for match in directions}) == 1
    content, rows = written(results)
    assert content["pairs"] == len(rows) == 4
    assert sorted(path.name for path in results.iterdir()) == [
        *("metrics.csv", "metrics.json", "original", "rec", "report.html", *sorted(pictures)),
    ]


def test_values_are_those_of_the_functions(results: Path, evaluate: Evaluate) -> None:
    assert evaluate()[0] == 0
    content, rows = written(results)
    assert [row["name"] for row in rows] == [f"{i:08d}" for i in range(4)]
    for name in PIXEL_METRICS:
        function = METRICS[name].compare
        assert function is not None
        expected = [
            function(np.array(picture(i))[None, None], np.array(picture(10 + i))[None, None])[0]
            for i in range(4)
        ]
        assert [float(row[name]) for row in rows] == expected
        assert content["metrics"][name] == {
            "mean": pytest.approx(np.mean(expected)),
            "variance": pytest.approx(np.var(expected)),
            "n": 4,
            "identical": 0,
        }


def test_record_says_how_it_was_measured(results: Path, evaluate: Evaluate) -> None:
    evaluate("--num_test", "3")
    content, _ = written(results)
    settings = content["settings"]
    assert settings["gt_path"] == str(results / "original")
    assert settings["num_test"] == 3
    assert settings["data_range"] == 255
    assert settings["ssim"]["sigma"] == 1.5
    assert settings["ssim"]["window"] == 11
    assert content["versions"]["torch"] == torch.__version__.split("+")[0]
    assert content["weights"] == {}


def test_pairs_by_name_not_by_position(results: Path, evaluate: Evaluate) -> None:
    """Partners of other suffixes and sorted otherwise, among hidden and other files."""
    originals, others = results / "original", results / "rec"
    for path in [*originals.iterdir(), *others.iterdir()]:
        path.unlink()
    (originals / "deep").mkdir()
    (others / "deep").mkdir()
    for name, suffix, value in (
        ("a", "png", 50),
        ("a.h", "png", 100),  # a.bmp comes before a.h.bmp, a.png after a.h.png
        ("b", "jpg", 150),
        ("deep/b", "PNG", 200),
    ):
        Image.new("L", (16, 16), value).save(originals / f"{name}.bmp")
        Image.new("L", (16, 16), value).save(others / f"{name}.{suffix}")
    (others / ".hidden.png").write_text("no image")
    (others / ".folder").mkdir()
    (others / ".folder" / "c.png").write_text("no image")
    (others / "notes.txt").write_text("no image")
    assert evaluate()[0] == 0
    _, rows = written(results)
    assert [row["name"] for row in rows] == ["a", "a.h", "b", "deep/b"]
    assert [float(row["l1"]) for row in rows] == [0, 0, 0, 0]


def test_num_test_is_the_first_pairs_by_name(results: Path, evaluate: Evaluate) -> None:
    """Reconstructions beyond them need not be there."""
    (results / "rec" / "00000003.png").unlink()
    assert evaluate("--num_test", "2")[0] == 0
    _, rows = written(results)
    assert [row["name"] for row in rows] == ["00000000", "00000001"]


def test_pairs_of_several_sizes_and_modes(results: Path, evaluate: Evaluate) -> None:
    sizes = {"w": (16, 16), "x": (20, 12), "y": (20, 12), "z": (12, 30)}
    for number, (name, size) in enumerate(sizes.items()):
        save(results / "original", **{name: picture(number, size, 3)})
        save(results / "rec", **{name: picture(number + 50, size, 3)})
    assert evaluate("--batch_size", "3")[0] == 0
    _, rows = written(results)
    assert len(rows) == 8
    x, y = (np.array(picture(seed, (12, 30), 3)).transpose(2, 0, 1)[None] for seed in (3, 53))
    assert float(rows[-1]["ssim"]) == metrics.ssim(x, y)[0]


@pytest.mark.parametrize("coloured", ["original", "rec"])
def test_grey_and_colour_partners_meet_in_colour(
    coloured: str, results: Path, evaluate: Evaluate
) -> None:
    grey = {"original": "rec", "rec": "original"}[coloured]
    save(results / coloured, **{"00000002": picture(50, channels=3)})
    save(results / grey, **{"00000002": picture(51)})
    evaluate()
    x = np.array(picture(50, channels=3)).transpose(2, 0, 1)[None]
    y = np.array(picture(51))[None, None].repeat(3, 1)
    _, rows = written(results)
    for name in PIXEL_METRICS:
        function = METRICS[name].compare
        assert function is not None
        assert float(rows[2][name]) == pytest.approx(function(x, y)[0])


def test_batches_and_workers_change_nothing(results: Path, evaluate: Evaluate) -> None:
    found = []
    for size, workers in (("4", 0), ("1", 2)):
        evaluate("--batch_size", size, workers=workers)
        content, rows = written(results)
        assert content.pop("command")["flags"]["batch_size"] == int(size)
        found.append((content, rows))
    assert found[0] == found[1]


def test_identical_images_keep_the_record_finite(results: Path, evaluate: Evaluate) -> None:
    code, output, errors = evaluate("--g_path", str(results / "original"))
    assert code == 0
    assert errors == (
        "--gt_path and --g_path are one folder: images are compared with themselves\n"
    )
    content, rows = written(results)
    psnr = content["metrics"]["psnr"]
    assert psnr == {"mean": None, "variance": None, "n": 0, "identical": 4}
    assert [float(row["psnr"]) for row in rows] == [math.inf] * 4
    assert "4 identical pairs" in output


def test_output_folder(results: Path, evaluate: Evaluate) -> None:
    assert evaluate("--output", str(results / "new" / "folder"))[0] == 0
    assert (results / "new" / "folder" / "metrics.json").is_file()
    assert not (results / "metrics.json").exists()


def test_metrics_chooses_in_a_fixed_order(results: Path, evaluate: Evaluate) -> None:
    evaluate(metrics=("psnr", "l1", "psnr"))
    content, rows = written(results)
    assert list(content["metrics"]) == ["l1", "psnr"]
    assert list(rows[0]) == ["name", "l1", "psnr"]


def test_a_metric_is_a_function_and_a_line(
    results: Path, evaluate: Evaluate, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Files, screen and report show it as it is declared."""

    def largest(x: Pixels, y: Pixels) -> Values:
        return np.asarray(np.abs(x.astype(float) - y).max((1, 2, 3)))

    metric = Metric("Largest error", 1, "levels", better="lower", compare=largest)
    monkeypatch.setitem(METRICS, "largest", metric)
    monkeypatch.setitem(CHOICES, "largest", ("largest",))
    code, output, errors = evaluate(metrics=("largest", "l1"))
    assert code == 0, errors
    content, rows = written(results)
    mean = content["metrics"]["largest"]["mean"]
    assert mean == pytest.approx(np.mean([float(row["largest"]) for row in rows]))
    line = ("Largest", "error", "(levels)", f"{mean:.1f}")
    assert line in [tuple(words.split()[:4]) for words in output.splitlines()]
    assert (results / "worst_largest.png").is_file()
    assert f"{mean:.1f} levels" in (results / "report.html").read_text()


# Networks


class FakeLPIPS(nn.Module):
    """Mean absolute difference in [-1, 1]."""

    def forward(self, x: Tensor, y: Tensor) -> Tensor:
        return (x - y).abs().mean((1, 2, 3), keepdim=True)


class FakeInception(nn.Module):
    """Quarter means: four features."""

    def forward(self, x: Tensor) -> tuple[Tensor]:
        # Of one channel whose stride is 0 CUDA's kernel reads the wrong places: hence the copy.
        grey = x[:, :1].float().clone(memory_format=torch.contiguous_format)
        pooled = nn.functional.adaptive_avg_pool2d(grey, 2)
        return (pooled.flatten(1),)


@pytest.fixture
def fakes(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> dict[str, nn.Module]:
    """Small networks in place of the real ones."""
    modules = {"lpips": FakeLPIPS(), "fid": FakeInception()}
    path = tmp_path / "weights.pth"
    monkeypatch.setattr(
        networks, "lpips_network", lambda *_: Network(modules["lpips"], path, "1" * 64)
    )
    monkeypatch.setattr(
        networks, "inception_network", lambda *_: Network(modules["fid"], path, "2" * 64)
    )
    return modules


@pytest.mark.usefixtures("fakes")
def test_all_metrics_by_default(results: Path, evaluate: Evaluate) -> None:
    code, output, errors = evaluate("--batch_size", "3", metrics=())
    assert code == 0
    assert errors == (
        "FID of 4 images is biased: the covariance of its 2048 features needs as many images; "
        "use KID instead (--metrics kid)\n"
    )
    assert [line.split()[0] for line in output.splitlines()[1:6]] == [
        *("L1", "SSIM", "PSNR", "LPIPS", "FID"),
    ]
    content, rows = written(results)
    assert list(rows[0]) == ["name", "l1", "ssim", "psnr", "lpips"]
    for row in rows:
        assert float(row["lpips"]) == pytest.approx(2 * float(row["l1"]))
    sets = []
    for first in (0, 10):
        images = np.stack([np.array(picture(first + i)) for i in range(4)])[:, None]
        sets.append(metrics.FeatureStatistics())
        sets[-1].update(metrics.features(torch.from_numpy(images), FakeInception()))
    assert content["metrics"]["fid"] == {
        "mean": pytest.approx(metrics.frechet_distance(*sets)),
        "variance": None,
        "n": 4,
        "identical": 0,
    }
    assert content["weights"]["lpips"]["sha256"] == "1" * 64
    assert content["weights"]["fid"]["sha256"] == "2" * 64


@pytest.mark.usefixtures("fakes")
def test_kid_precision_and_recall_on_demand(results: Path, evaluate: Evaluate) -> None:
    code, output, errors = evaluate(metrics=("kid", "precision_recall"))
    assert (code, errors) == (
        0,
        "KID takes subsets of 2 images, half of all, instead of 1000\n",
    )
    assert [line.split()[0] for line in output.splitlines()[1:4]] == ["KID", "Precision", "Recall"]
    content, _ = written(results)
    assert list(content["metrics"]) == ["kid", "precision", "recall"]
    x, y = (
        metrics.features(
            torch.stack([torch.tensor(np.array(picture(first + i)))[None] for i in range(4)]),
            FakeInception(),
        )
        for first in (0, 10)
    )
    mean, spread = metrics.kernel_distance(x, y)
    found = content["metrics"]["kid"]
    assert (found["mean"], found["variance"]) == pytest.approx((mean, spread**2))
    assert content["metrics"]["precision"]["mean"] == metrics.precision_recall(x, y)[0]
    assert content["metrics"]["precision"]["variance"] is None
    assert content["weights"].keys() == {"kid", "precision_recall"}
    assert content["settings"]["kid"] == {"subsets": 100, "subset_size": 2, "seed": 2020}
    evaluate(metrics=("kid", "precision_recall"))
    assert written(results)[0] == content


@pytest.mark.usefixtures("fakes")
def test_fid_of_a_folder_and_itself_is_zero(results: Path, evaluate: Evaluate) -> None:
    evaluate("--g_path", str(results / "original"), metrics=("fid",))
    mean = written(results)[0]["metrics"]["fid"]["mean"]
    assert mean == 0
    assert math.copysign(1, mean) == 1


@pytest.mark.usefixtures("fakes")
def test_the_warning_counts_what_was_decoded(results: Path, evaluate: Evaluate) -> None:
    truncate(results)
    errors = evaluate("--skip_bad_images", metrics=("fid",))[2]
    assert errors.startswith("FID of 3 images is biased")


@pytest.fixture
def seen(fakes: dict[str, nn.Module], monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """The numbers of images that Inception was given."""
    counts: list[int] = []
    forward = fakes["fid"].forward

    def counted(x: Tensor) -> Any:
        counts.append(len(x))
        return forward(x)

    monkeypatch.setattr(fakes["fid"], "forward", counted)
    return counts


def test_statistics_of_the_originals_are_kept_by_content(
    results: Path, evaluate: Evaluate, seen: list[int], cache: Path
) -> None:
    evaluate(metrics=("fid",))
    assert (sum(seen), len(list(cache.iterdir()))) == (8, 1)
    first = contents(results)
    (results / "original").rename(results / "elsewhere")
    evaluate("--gt_path", str(results / "elsewhere"), metrics=("fid",))
    assert sum(seen) == 12  # the reconstructions alone
    assert contents(results)["metrics.csv"] == first["metrics.csv"]
    (results / "elsewhere").rename(results / "original")
    evaluate(metrics=("fid",))
    assert contents(results) == first
    for change, images in (
        ([], 4),
        (["--protocol", "reference"], 8),
        (["--num_test", "3"], 6),
        (["--no-cache"], 8),
        (["--skip_bad_images"], 8),
    ):
        seen.clear()
        evaluate(*change, metrics=("fid",))
        assert sum(seen) == images, change
    picture(99).save(results / "original" / "00000001.png")
    seen.clear()
    evaluate(metrics=("fid",))
    assert sum(seen) == 8


def test_vectors_are_kept_where_they_are_needed(
    results: Path, evaluate: Evaluate, seen: list[int]
) -> None:
    evaluate("--no-cache", metrics=("fid", "kid"))
    expected = written(results)[0]["metrics"]
    for needed, images in ((("fid",), 8), (("kid",), 8), (("kid", "fid"), 4)):
        seen.clear()
        evaluate(metrics=needed)
        assert sum(seen) == images
    assert written(results)[0]["metrics"] == expected


@pytest.mark.usefixtures("fakes")
def test_the_cache_is_bounded(
    evaluate: Evaluate, cache: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The file that was unused for longest goes first; reading is a use."""
    for count in ("2", "3"):
        evaluate("--num_test", count, metrics=("fid",))
    first, second = sorted(cache.iterdir(), key=lambda path: path.stat().st_mtime_ns)
    for path, age in ((first, 2), (second, 1)):
        os.utime(path, (1e9 - age, 1e9 - age))
    evaluate("--num_test", "2", metrics=("fid",))
    monkeypatch.setattr("utils.evaluation.feature_cache.LARGEST", 2 * first.stat().st_size)
    code, _, errors = evaluate(metrics=("fid",))
    assert code == 0
    assert f"removed {second}, unused for longest" in errors
    assert len(list(cache.iterdir())) == 2
    assert first.exists()


@pytest.mark.parametrize("damage", ["truncate", "text", "shape", "nan", "objects", "missing"])
def test_a_damaged_cache_is_one_line(
    damage: str, results: Path, evaluate: Evaluate, seen: list[int], cache: Path
) -> None:
    evaluate("--num_test", "3", metrics=("fid", "l1"))
    expected = contents(results)
    (file,) = cache.iterdir()
    arrays: dict[str, Any] = dict(np.load(file))
    if damage == "shape":
        arrays["mean"] = arrays["mean"][:2]
    elif damage == "nan":
        arrays["scatter"][0, 0] = math.nan
    elif damage == "objects":
        arrays["mean"] = np.array([{}], dtype=object)
    elif damage == "missing":
        del arrays["count"]
    if damage in ("truncate", "text"):
        file.write_bytes(file.read_bytes()[:300] if damage == "truncate" else b"no archive")
    else:
        np.savez(file, **arrays)
    seen.clear()
    code, _, errors = evaluate("--num_test", "3", metrics=("fid", "l1"))
    assert code == 0
    assert errors.count("\n") == 2  # the other is the bias of FID
    assert f"{file} is damaged" in errors
    assert contents(results) == expected
    assert sum(seen) == 6
    evaluate("--num_test", "3", metrics=("fid", "l1"))
    assert sum(seen) == 9


@pytest.mark.usefixtures("fakes")
def test_a_cache_that_cannot_be_written_is_one_line(
    results: Path, evaluate: Evaluate, cache: Path
) -> None:
    cache.parent.mkdir()
    cache.touch()
    code, _, errors = evaluate(metrics=("fid",))
    assert code == 0
    assert f"cannot write {cache}" in errors
    assert (results / "metrics.json").exists()


@pytest.mark.parametrize("name", ["lpips", "fid"])
def test_damaged_networks_are_refused(
    name: str,
    fakes: dict[str, nn.Module],
    results: Path,
    evaluate: Evaluate,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    def spoiled(x: Tensor, *_: Tensor) -> Any:
        values = torch.full((len(x), 4), math.nan)
        return values[:, :1] if name == "lpips" else (values,)

    monkeypatch.setattr(fakes[name], "forward", spoiled)
    assert_refused(evaluate(metrics=(name,)), results, "weights.pth are damaged")


def test_random_backbone_from_a_file(results: Path, evaluate: Evaluate, tmp_path: Path) -> None:
    """--lpips_weights end to end, on images of 31 pixels, AlexNet's smallest."""
    from torchvision.models import alexnet

    torch.manual_seed(0)
    with torch.device("meta"):
        layout = alexnet().features.state_dict(prefix="features.")
    weights = {key: 0.05 * torch.randn(value.shape) for key, value in layout.items()}
    torch.save(weights, tmp_path / "alex.pth")
    for path in [*(results / "original").iterdir(), *(results / "rec").iterdir()]:
        Image.open(path).resize((31, 31)).save(path)
    flags = ("--lpips_net", "alex", "--lpips_weights", str(tmp_path / "alex.pth"))
    code, _, errors = evaluate(*flags, metrics=("lpips",))
    assert (code, errors) == (0, "")
    content, rows = written(results)
    assert content["settings"]["lpips_net"] == "alex"
    assert content["weights"]["lpips"]["file"] == str(tmp_path / "alex.pth")
    network = networks.lpips_network("alex", str(tmp_path / "alex.pth")).module
    for row in rows:
        x, y = (
            torch.tensor(np.array(Image.open(results / folder / f"{row['name']}.png")))[None, None]
            for folder in ("original", "rec")
        )
        assert float(row["lpips"]) == pytest.approx(metrics.lpips(x, y, network)[0], abs=1e-6)


def test_absent_weights_are_one_line(results: Path) -> None:
    """With the default metrics nothing is silently left out."""
    end = run_forked(
        ["evaluation.py", "--gt_path", "original", "-g_path", "rec"],
        results,
        TORCH_HOME=str(results.parent / "torch"),
        https_proxy="http://127.0.0.1:9",  # nobody listens there
    )
    assert_refused(
        (end.code, end.out, end.err),
        results,
        "vgg16-397923af.pth",
        str(results.parent / "torch"),
        "--lpips_weights",
        "--metrics l1 ssim psnr",
    )


# Protocol, rate and pictures


def test_protocol_is_recorded(results: Path, evaluate: Evaluate) -> None:
    evaluate()
    clean = written(results)[0]
    assert clean["protocol"]["name"] == "clean"
    assert clean["protocol"]["jpeg_quality"] is None
    evaluate("--protocol", "reference")
    reference = written(results)[0]
    assert reference["protocol"]["name"] == "reference"
    assert reference["protocol"]["jpeg_quality"] == 75
    assert reference["protocol"]["inception_side"] == 229
    assert reference["settings"]["ssim"] == {"window": 11, "win_size": 11, "data_range": 255}
    for name in PIXEL_METRICS:
        assert reference["metrics"][name] != clean["metrics"][name]


@pytest.mark.usefixtures("fakes")
@pytest.mark.parametrize("workers", [0, 2])
def test_reference_protocol_is_its_steps(workers: int, results: Path, evaluate: Evaluate) -> None:
    evaluate("--protocol", "reference", metrics=("l1", "fid"), workers=workers)
    content, rows = written(results)
    sets = []
    for folder in ("original", "rec"):
        images = []
        for row in rows:
            pixels = np.array(Image.open(results / folder / f"{row['name']}.png"))
            if folder == "original":
                pixels = pixels - ((pixels > 0) & (pixels < 64))
            pixels = protocols.through_jpeg(pixels[None].astype(np.uint8), 75)
            images.append(protocols.resized(pixels, 229))
        sets.append(metrics.FeatureStatistics())
        sets[-1].update(metrics.features(torch.from_numpy(np.stack(images)), FakeInception()))
    expected = metrics.frechet_distance(*sets)
    assert content["metrics"]["fid"]["mean"] == pytest.approx(expected, rel=1e-6)


def test_rate_of_tests_analysis(results: Path, evaluate: Evaluate) -> None:
    rate = {
        "codes_per_image": 1568,
        "nominal_bits_per_pixel": 16.0,
        "entropy_bits_per_pixel": 14.5,
    }
    (results / "analysis.json").write_text(json.dumps({"rate": {**rate, "other": 1}}))
    _, output, errors = evaluate("--output", str(results / "new"))
    assert errors == ""
    assert json.loads((results / "new" / "metrics.json").read_text())["rate"] == rate
    assert output.splitlines()[4:7] == [
        "codes per image          1568",
        "bits per pixel, nominal  16.000",
        "bits per pixel, entropy  14.500",
    ]
    (results / "rec").rename(results / "of_another_model")
    evaluate("--g_path", str(results / "of_another_model"))
    assert written(results)[0]["rate"] is None


@pytest.mark.parametrize("text", ["", "[]", "{}", '{"rate": {"codes_per_image": "1"}}'])
def test_a_damaged_analysis_is_one_line(text: str, results: Path, evaluate: Evaluate) -> None:
    (results / "analysis.json").write_text(text)
    code, _, errors = evaluate()
    assert code == 0
    assert errors.count("\n") == 1
    assert f"{results / 'analysis.json'} has no rate" in errors
    assert written(results)[0]["rate"] is None


def test_worst_and_best_as_pictures(results: Path, evaluate: Evaluate) -> None:
    evaluate()
    for name in PIXEL_METRICS:
        with Image.open(results / f"worst_{name}.png") as image:
            assert image.mode == "RGB"
            assert min(image.size) > 900


def test_no_pictures_among_the_images(results: Path, evaluate: Evaluate) -> None:
    for lines in (1, 2):  # the second run tells that it leaves out the files of the first
        code, _, errors = evaluate("--output", str(results / "rec"))
        assert (code, errors.count("\n")) == (0, lines)
        assert "no pictures are written there" in errors
    assert "left out: 1 .csv, 1 .html, 1 .json" in errors


@pytest.mark.usefixtures("fakes")
def test_every_image_is_decoded_once(
    results: Path, evaluate: Evaluate, monkeypatch: pytest.MonkeyPatch
) -> None:
    """For measuring, worst_<metric>.png and the report together."""
    for i in range(40):
        save(results / "original", **{f"{i:08d}": picture(i)})
        save(results / "rec", **{f"{i:08d}": picture(100 + i)})
    decoded: Counter[str] = Counter()
    load = PngImageFile.load

    def counted(image: PngImageFile) -> Any:
        if image.tile:  # of a file that was opened and not decoded yet
            decoded[image.fp.name if image.fp else ""] += 1
        return load(image)

    monkeypatch.setattr(PngImageFile, "load", counted)
    assert evaluate("--batch_size", "7", metrics=("l1", "psnr", "lpips"))[0] == 0
    files = [str(results / folder / f"{i:08d}.png") for i in range(40) for folder in FOLDERS]
    assert decoded == Counter(files)
    text = (results / "report.html").read_text()
    assert text.count("<img") == 16 + 8 + 8

    def shown(page: str) -> str:
        return page[: page.index("<footer>")]

    write_report(results)  # by hand: reads the few images that it shows, once each
    assert shown((results / "report.html").read_text()) == shown(text)
    assert set(decoded.values()) == {1, 2}


def test_what_is_kept_are_the_extremes_of_all() -> None:
    """Whatever the batches, among equal values too; large pairs are shrunk."""
    random = np.random.default_rng(0)
    values = [float(value) for value in random.integers(0, 12, 60)]
    names = [f"{i}" for i in range(60)]
    images = random.integers(0, 256, (2, 60, 1, 8, 300), dtype=np.uint8)
    worst, best = extremes.extremes(values, lower_is_better=False)
    for size in (1, 7, 60):
        kept = extremes.KeptPairs(["30"])
        for i in range(0, 60, size):
            part = slice(i, i + size)
            kept.add(
                names[part], (images[0, part], images[1, part]), {"psnr": np.array(values[part])}
            )
        assert kept.shown.keys() == {"30", *(names[i] for i in (*worst, *best))}
    assert {pair.error.shape for pair in kept.shown.values()} == {(7, 256)}
    assert kept.shown["30"].original.shape == (1, 7, 256)


@pytest.mark.parametrize("lower_is_better", [True, False])
def test_extremes_are_sorted(lower_is_better: bool) -> None:
    values = [float(value) for value in np.random.default_rng(0).permutation(30)] + [math.inf]
    worst, best = extremes.extremes(values, lower_is_better=lower_is_better)
    ordered = sorted(values)
    high, low = [ordered[::-1][:10], ordered[:10]]
    found = [[values[position] for position in positions] for positions in (worst, best)]
    assert found == ([high, low] if lower_is_better else [low, high])
    assert extremes.extremes([1.0, 2.0], lower_is_better=True) == ([1, 0], [0, 1])
    shifts = [-3.0, 0.1, 2.0, -0.2]
    assert extremes.extremes(shifts, lower_is_better=True) == ([0, 2, 3, 1], [1, 3, 2, 0])


@pytest.mark.parametrize("size", [(28, 28), (300, 20), (1, 200), (256, 256)])
def test_tiles_fit(size: tuple[int, int]) -> None:
    tile = fitted(picture(0, size), extremes.TILE, extremes.TILE)
    assert max(tile.size) <= extremes.TILE
    assert max(tile.size) > extremes.TILE // 2


# What is refused


def rename_partner(results: Path) -> None:
    (results / "rec" / "00000001.png").rename(results / "rec" / "one.png")


def shrink(results: Path) -> None:
    for name in ("00000001", "00000003"):
        picture(0, (12, 14)).save(results / "rec" / f"{name}.png")


def truncate(results: Path) -> None:
    file = results / "rec" / "00000002.png"
    file.write_bytes(file.read_bytes()[:150])


def overwrite(results: Path) -> None:
    (results / "original" / "00000001.png").write_text("no image")


def duplicate(results: Path) -> None:
    picture(0).save(results / "rec" / "00000001.bmp")


def deepen(results: Path) -> None:
    deep = np.full((16, 16), 1000, np.uint16)
    Image.fromarray(deep).save(results / "original" / "00000000.png")


def make_tiny(results: Path) -> None:
    for folder in ("original", "rec"):
        picture(0, (16, 10)).save(results / folder / "00000002.png")


def nothing(results: Path) -> None:
    (results / "empty").mkdir()
    (results / "file").touch()


@pytest.mark.parametrize(
    ("damage", "flags", "parts"),
    [
        (nothing, ["--gt_path", "{results}/absent"], ["--gt_path", "/absent", "No such file"]),
        (nothing, ["-g_path", "{results}/absent"], ["--g_path", "/absent", "No such file"]),
        (nothing, ["--gt_path", "{results}/empty"], ["--gt_path", "/empty holds no images"]),
        (nothing, ["--g_path", "{results}/file"], ["--g_path", "/file", "Not a directory"]),
        (nothing, ["--gt_path", "x" * 300], ["--gt_path xxx", "File name too long"]),
        (nothing, ["--gt_path", ""], ["--gt_path is missing"]),
        (
            nothing,
            ["--metrics", "l1", "--lpips_net", "alex"],
            ["--lpips_net alex has no effect without --metrics lpips"],
        ),
        (nothing, ["--output", "{results}/file"], ["--output", "/file"]),
        (rename_partner, [], ["--gt_path lacks 1 of 5 (one); --g_path lacks 1 of 5 (00000001)"]),
        (shrink, [], ["2 of 4 pairs differ in size", "00000001 (16×16 and 12×14)", "00000003"]),
        (
            overwrite,
            [],
            ["original/00000001.png cannot be decoded: it is empty, damaged or none of JPEG"],
        ),
        (truncate, [], ["rec/00000002.png cannot be decoded: "]),
        (truncate, ["--num_workers", "2", "--batch_size", "1"], ["rec/00000002.png cannot be"]),
        (duplicate, [], ["--g_path", "00000001.bmp", "00000001.png"]),
        (deepen, [], ["original/00000000.png", "more than 8 bits"]),
        (make_tiny, [], ["--metrics ssim", "11×11", "1 of 4 are smaller: 00000002"]),
        (nothing, ["--metrics", "ssmi"], ["--metrics", "ssmi", "did you mean ssim?"]),
        (nothing, ["--lpips_net", "vg"], ["--lpips_net", "did you mean vgg?"]),
        (nothing, ["--num_test", "0"], ["--num_test", "0 is less than 1"]),
        (nothing, ["--num_test", "-3"], ["--num_test", "-3 is less than 1"]),
        (nothing, ["--num_test", "5"], ["--num_test 5", "4 images"]),
        (nothing, ["--batch_size", "0"], ["--batch_size", "0 is less than 1"]),
        (nothing, ["--num_workers", "-1"], ["--num_workers", "-1 is less than 0"]),
        (nothing, ["--device", "gpu"], ["--device gpu"]),
        (nothing, ["--metric", "l1"], ["--metric", "did you mean --metrics?"]),
        (nothing, ["--metrics", "fid", "--num_test", "1"], ["--metrics fid needs 2 images"]),
        (
            nothing,
            ["--metrics", "precision_recall", "--num_test", "3"],
            ["--metrics precision_recall needs 4 images or more, and there are 3"],
        ),
        (nothing, ["--metrics", "precision"], ["did you mean precision_recall?"]),
        (nothing, ["--protocol", "referenc"], ["--protocol", "did you mean reference?"]),
        (nothing, ["--gt_path", "{results}"], ["--gt_path lacks 4 of 12", "--g_path lacks 8"]),
        (
            nothing,
            ["--metrics", "lpips", "--lpips_net", "alex"],
            ["--lpips_net alex", "31×31", "4 of 4", "00000000"],
        ),
        (
            nothing,
            ["--metrics", "lpips", "--lpips_weights", "absent.pth"],
            ["--lpips_weights absent.pth does not exist"],
        ),
        (
            nothing,
            ["--metrics", "fid", "--inception_weights", "absent.pth"],
            ["--inception_weights absent.pth does not exist"],
        ),
    ],
)
def test_bad_input_is_one_line(
    damage: Callable[[Path], None],
    flags: list[str],
    parts: list[str],
    results: Path,
    evaluate: Evaluate,
) -> None:
    damage(results)
    result = evaluate(*(flag.format(results=results) for flag in flags))
    assert_refused(result, results, *parts)


@pytest.mark.parametrize("flag", ["--gt_path", "--g_path"])
def test_both_folders_are_needed(
    flag: str, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str], tmp_path: Path
) -> None:
    other = {"--gt_path": "--g_path", "--g_path": "--gt_path"}[flag]
    monkeypatch.setattr(sys, "argv", [str(SCRIPT), other, str(tmp_path)])
    with pytest.raises(SystemExit) as end:
        runpy.run_path(str(SCRIPT), run_name="__main__")
    result = (int(end.value.code or 0), *capfd.readouterr())
    assert_refused(result, tmp_path / "results", f"{flag} is missing")


def test_unreadable_subfolder(
    results: Path, evaluate: Evaluate, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The error is simulated: root, who runs many tests, may read everything."""
    (results / "rec" / "locked").mkdir()
    scandir = os.scandir

    def refuse(path: str) -> Any:
        if Path(path).name == "locked":
            raise PermissionError(13, "Permission denied", path)
        return scandir(path)

    monkeypatch.setattr(os, "scandir", refuse)
    result = evaluate()
    assert_refused(result, results, "--g_path", "rec/locked", "Permission denied")


def test_a_path_that_no_encoding_has_can_be_printed(results: Path) -> None:
    flags = ["--gt_path", "original", "-g_path", "rec", "--metrics", "l1", "--output", "\udcff"]
    ended = run_script(*flags, cwd=results, PYTHONIOENCODING="utf-8")
    assert (ended.returncode, ended.stderr) == (0, "")
    assert ended.stdout.endswith("\\udcff/report.html\n")


def contents(folder: Path) -> dict[str, bytes]:
    """The results in a folder by name."""
    files = [*folder.glob("metrics.*"), *folder.glob("worst_*.png")]
    return {path.name: path.read_bytes() for path in files}


def test_a_failed_run_keeps_the_previous_results_but_not_as_current(
    results: Path, evaluate: Evaluate
) -> None:
    evaluate()
    before = contents(results)
    assert len(before) == 5
    whole = (results / "rec" / "00000002.png").read_bytes()
    truncate(results)
    for _ in range(2):
        assert evaluate()[0] == 2
        assert contents(results) == {}
        assert contents(results / "previous_metrics") == before
        assert not (results / "report.html").exists()  # which told of them
    (results / "worst_l1.png").touch()  # as if killed while writing: belongs to no record
    assert evaluate()[0] == 2
    assert contents(results) == {}
    assert contents(results / "previous_metrics") == before
    (results / "rec" / "00000002.png").write_bytes(whole)
    assert evaluate()[0] == 0
    assert contents(results) == before
    assert not (results / "previous_metrics").exists()


def test_a_refused_run_leaves_the_results_alone(results: Path, evaluate: Evaluate) -> None:
    evaluate()
    before = contents(results)
    assert evaluate("--num_test", "9")[0] == 2
    assert contents(results) == before


def test_refused_pictures_have_no_current_results(results: Path, evaluate: Evaluate) -> None:
    """Also if no image was decoded before."""
    evaluate()
    before = contents(results)
    (results / "rec" / "00000002.png").unlink()
    assert evaluate()[0] == 2
    assert contents(results) == {}
    assert contents(results / "previous_metrics") == before


def test_bad_image_in_a_process_of_its_own(results: Path) -> None:
    """The line comes from a worker, and alone."""
    truncate(results)
    flags = ("--gt_path", "original", "-g_path", "rec", "--metrics", "l1", "--batch_size", "1")
    end = run_forked(["evaluation.py", *flags], results)
    assert_refused((end.code, end.out, end.err), results, "rec/00000002.png")


# Two sets without pairs


@pytest.fixture
def sets(results: Path) -> Path:
    """Seven originals in folders, and samples of other names: nine, with their grid."""
    for i in range(4, 7):
        save(results / "original" / "below", **{f"{i:08d}": picture(i)})
    for i in range(9):
        save(results / "best", **{f"{i + 100:08d}": picture(20 + i)})
    save(results / "best", grid=picture(99, (64, 64)))
    (results / "best" / "samples.json").write_text("{}")
    return results


def unpaired(results: Path, evaluate: Evaluate, *flags: str) -> tuple[int, str, str]:
    return evaluate("--unpaired", "--g_path", str(results / "best"), *flags, metrics=())


@pytest.mark.usefixtures("fakes")
def test_sets_of_any_sizes_have_torch_fidelitys_values(sets: Path, evaluate: Evaluate) -> None:
    """All values against torch-fidelity's own run on the folders, density by its definition."""
    import torch_fidelity

    class Extractor(torch_fidelity.FeatureExtractorBase):  # type: ignore[misc]
        def __init__(self, name: str, features_list: list[str], **_: Any) -> None:
            super().__init__(name, features_list)

        @staticmethod
        def get_provided_features_list() -> tuple[str]:
            return ("4",)

        @staticmethod
        def get_default_feature_layer_for_metric(metric: str) -> str:
            del metric
            return "4"

        def forward(self, x: Tensor) -> Any:
            return FakeInception()(x)

    torch_fidelity.register_feature_extractor("quarters", Extractor)
    code, output, errors = unpaired(sets, evaluate)
    assert code == 0, errors
    assert errors.startswith("FID of 7 images is biased")
    assert "9 against 7" in output
    content = json.loads((sets / "metrics.json").read_text())
    found = {name: score["mean"] for name, score in content["metrics"].items()}
    (sets / "best" / "grid.png").unlink()
    theirs = torch_fidelity.calculate_metrics(
        input1=str(sets / "original"),
        input2=str(sets / "best"),
        feature_extractor="quarters",
        **dict.fromkeys(("fid", "kid", "prc", "samples_find_deep"), True),
        kid_subset_size=3,
        save_cpu_ram=True,
        cuda=False,
        cache=False,
        verbose=False,
    )
    assert found["fid"] == pytest.approx(theirs["frechet_inception_distance"], rel=1e-4)
    assert found["precision"] == theirs["recall"]  # its first set is the generated one
    assert found["recall"] == theirs["precision"]
    kid = content["metrics"]["kid"]
    assert kid["mean"] == pytest.approx(theirs["kernel_inception_distance_mean"], rel=1e-4)
    spread = theirs["kernel_inception_distance_std"]
    assert math.sqrt(kid["variance"]) == pytest.approx(spread, rel=1e-4)
    assert kid["n"] == 7
    x, y = (
        metrics.features(
            torch.stack([torch.tensor(np.array(picture(i)))[None] for i in numbers]),
            FakeInception(),
        )
        for numbers in (range(7), range(20, 29))
    )
    assert (found["density"], found["coverage"]) == metrics.density_coverage(x, y)
    assert (content["pairs"], content["images"]) == (0, {"gt_path": 7, "g_path": 9})
    assert not (sets / "metrics.csv").exists()
    page = (sets / "report.html").read_text()
    assert "9 against 7 images" in page
    assert page.count("<img ") == 16


def test_the_originals_are_measured_once(sets: Path, evaluate: Evaluate, seen: list[int]) -> None:
    """Their statistics are kept with the vectors."""
    for flags, images in (([], 16), ([], 9), (["--num_test", "6"], 12), (["--no-cache"], 16)):
        seen.clear()
        assert unpaired(sets, evaluate, *flags)[0] == 0
        assert sum(seen) == images
    first = json.loads((sets / "metrics.json").read_text())
    unpaired(sets, evaluate)
    assert json.loads((sets / "metrics.json").read_text())["metrics"] == first["metrics"]


@pytest.mark.usefixtures("fakes")
def test_sets_may_differ_in_size_and_skip_what_is_damaged(sets: Path, evaluate: Evaluate) -> None:
    save(sets / "best", **{"00000100": picture(5, (24, 20), 3)})
    errors = unpaired(sets, evaluate)[2]
    assert "24×20 (--g_path)" in errors
    (sets / "best" / "00000104.png").write_bytes(b"nothing")
    code, _, errors = unpaired(sets, evaluate)
    assert (code, errors.count("\n")) == (2, 1)
    assert "00000104.png cannot be decoded" in errors
    code, _, errors = unpaired(sets, evaluate, "--skip_bad_images")
    assert code == 0
    assert "skipped 1 of 16 images" in errors
    assert json.loads((sets / "metrics.json").read_text())["images"]["g_path"] == 8


@pytest.mark.parametrize(
    ("flags", "parts"),
    [
        (
            ["--metrics", "fid", "psnr", "lpips"],
            [
                "--unpaired contradicts --metrics psnr lpips",
                "l1, ssim, psnr, colour, lpips compare pairs",
            ],
        ),
        (["--num_test", "8"], ["--num_test 8", "7 images in --gt_path"]),
        (["--num_test", "5"], ["--metrics density_coverage needs 6", "are 5 in --gt_path"]),
        (["--lpips_net", "alex"], ["--lpips_net alex has no effect"]),
        (["--g_path", "{results}/absent"], ["--g_path", "/absent", "No such file"]),
    ],
)
def test_bad_input_of_sets_is_one_line(
    flags: list[str], parts: list[str], sets: Path, evaluate: Evaluate
) -> None:
    flags = [flag.format(results=sets) for flag in flags]
    assert_refused(unpaired(sets, evaluate, *flags), sets, *parts)

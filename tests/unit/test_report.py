"""The report of a run: complete, clear about missing files, and accessible."""

from __future__ import annotations

import json
import re
import shutil
import subprocess
from collections.abc import Callable
from dataclasses import replace
from functools import partial
from html.parser import HTMLParser
from itertools import pairwise, product
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image

from modules import VQVAE, ModelConfig
from tests.conftest import HANGS
from tests.processes import run_forked
from utils import report
from utils.charts import Chart
from utils.checkpoints.checkpoint import save_checkpoint
from utils.errors import UserError
from utils.evaluation.schema import Analysis, Metrics, parse
from utils.flags.command import words
from utils.report import write_report
from utils.report.codebook_use import unit_slots, usage_histogram
from utils.report.files import find
from utils.report.markup import section
from utils.report.scalar_curves import draw_lines
from utils.report.tables import key_figures, lead

VOID = {"meta", "img", "br", "wbr", "image", "path", "use"}
HOSTILE = "<script>alert('x')</script>&\"\n\x00\udcff"
BROWSERS = ("chromium", "chromium-browser", "google-chrome", "chrome")
DRAWN: dict[str, str] = {}
ODD: tuple[Any, ...] = (None, "x", [], {}, [[1]], -1, 1e400)
FILES = {  # file → the section that says it is missing
    "analysis.json": "figures",
    "metrics.json": "figures",
    "metrics.csv": "worst",
    "original": "reconstructions",
    "rec": "worst",
}


class Page(HTMLParser):
    """The elements of a page; parsing checks that every tag is closed."""

    def __init__(self, path: Path) -> None:
        super().__init__()
        self.open: list[str] = []
        self.elements: list[tuple[str, dict[str, str | None]]] = []
        self.words: list[str] = []
        self.feed(path.read_text(encoding="utf-8"))
        self.close()
        assert self.open == []

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        assert len({name for name, _ in attrs}) == len(attrs)
        self.elements.append((tag, dict(attrs)))
        if tag not in VOID:
            self.open.append(tag)

    def handle_startendtag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.elements.append((tag, dict(attrs)))

    def handle_endtag(self, tag: str) -> None:
        assert self.open.pop() == tag

    def handle_data(self, data: str) -> None:
        if "style" not in self.open:
            self.words.append(data)

    @property
    def text(self) -> str:
        return " ".join(" ".join(self.words).split())

    def all(self, *tags: str) -> list[dict[str, str | None]]:
        return [attributes for tag, attributes in self.elements if tag in tags]


def write_json(path: Path, change: Callable[[dict[str, Any]], object]) -> None:
    content = json.loads(path.read_text())
    change(content)
    path.write_text(json.dumps(content))


pytestmark = pytest.mark.usefixtures("draw_figures")


@pytest.fixture(autouse=True)
def charts(monkeypatch: pytest.MonkeyPatch) -> None:
    """Draw each chart once: most of the reports here show the same ones, and it takes time."""

    draw = Chart.svg

    def remembered(chart: Chart) -> str:
        key = repr((chart.name, chart.description, getattr(chart.draw, "keywords", None)))
        if key not in DRAWN:
            DRAWN[key] = draw(chart)
        return DRAWN[key]

    monkeypatch.setattr(Chart, "svg", remembered)


@pytest.fixture
def results(tmp_path: Path) -> Path:
    """Results folder of a small run, as the three scripts leave it."""
    from torch.utils.tensorboard import SummaryWriter

    folder = tmp_path / "out" / "results" / "e" / "best" / "folder"
    random = np.random.default_rng(0)
    for kind in ("original", "rec"):
        (folder / kind).mkdir(parents=True)
        for number in range(20):
            pixels = random.integers(0, 256, (12, 8), dtype=np.uint8)
            Image.fromarray(pixels).save(folder / kind / f"{number:08d}.png")
    model = ModelConfig(num_embedding=8, embedding_dim=4, hidden_size=8, num_residual_hidden=4)
    slots = random.integers(0, 50, (2, 8))
    slots[:, 3] = 0
    analysis = {
        "model": {**vars(model)},
        "data": {"dataset": "folder", "image_size": 12},
        "rate": {
            "codes_per_image": 12,
            "nominal_bits_per_pixel": 0.25,
            "entropy_bits_per_pixel": 0.2345,
            "coded_bits_per_pixel": 0.2468,
            "invented_by_tomorrow": 7,
        },
        "codebook": {
            "images": 20,
            "usage_percent": 87.5,
            "perplexity": 6.54321,
            "counts": slots.sum(0).tolist(),
            "slot_counts": slots.tolist(),
            "slot_usage_percent": [87.5, 75.0],
            "slot_perplexity": [6.1, 5.9],
        },
    }
    (folder / "analysis.json").write_text(json.dumps(analysis))
    metrics = {
        "metrics": {
            "psnr": {"mean": 23.4567, "variance": 4.0, "n": 19, "identical": 1},
            "fid": {"mean": 12.34, "variance": None, "n": 20, "identical": 0},
            "new": {"mean": 0.125},
            "kid": {"mean": 0.0123, "unknown": []},
            "precision": {"mean": 0.75},
        },
        "pairs": 20,
        "protocol": {"resize": "none"},
    }
    (folder / "metrics.json").write_text(json.dumps(metrics))
    rows = [f"{n:08d},{'inf' if n == 4 else 20 + n},{n / 100}" for n in range(20)]
    (folder / "metrics.csv").write_text("\n".join(["name,psnr,lpips", *rows]) + "\n")
    save_checkpoint(
        tmp_path / "out" / "models" / "e" / "best.pt",
        VQVAE(model),
        {"step": 1234, "epoch": 3, "best": 23.0, "data_config": {"dataset": "folder"},
         "train_config": {"seed": 77, "lr": 0.5, "compile": True}},
    )  # fmt: skip
    (folder / "analysis.json").touch()
    with SummaryWriter(str(tmp_path / "out" / "logs" / "e")) as board:
        for step in range(0, 1000, 10):
            board.add_scalar("train/loss", 100 / (1 + step), step)
            board.add_scalar("train/psnr", step / 50, step)
        board.add_scalar("validation/psnr", 17.89, 900)
        board.add_scalar("train/perplexity", float("nan"), 1)
    return folder


def test_the_page_is_whole_and_for_everyone(results: Path) -> None:
    path = write_report(results)
    assert path == results / "report.html"
    page = Page(path)
    assert [p.name for p in results.iterdir() if p.name.startswith(".")] == []
    for attributes in (a for _, a in page.elements):
        for name in ("src", "href", "srcset", "xlink:href"):
            assert re.match(r"data:|#", attributes.get(name) or "#"), attributes[name]
    assert "url(" not in path.read_text()
    assert "@import" not in path.read_text()
    assert page.all("script", "link", "iframe") == []
    for image in page.all("img"):
        assert image["alt"]
        assert image["width"]
        assert image["height"]
    assert len(page.all("img")) == 16 + 8 + 8
    for drawing in page.all("svg"):
        assert drawing["role"] == "img"
        assert drawing["aria-label"]
    assert len(page.all("svg")) == 1 + 2 + 2 + 2  # colours, curves, usage and map, slots
    identities = [a["id"] for _, a in page.elements if "id" in a]
    assert len(set(identities)) == len(identities)
    assert {str(a["href"])[1:] for a in page.all("a")} <= set(identities)
    levels = [int(tag[1]) for tag, _ in page.elements if re.fullmatch("h[1-6]", tag)]
    assert levels[0] == 1
    assert levels.count(1) == 1
    assert all(after <= before + 1 for before, after in pairwise(levels))
    assert len(page.all("caption")) == len(page.all("table"))
    assert all(head["scope"] for head in page.all("th"))
    assert page.all("html")[0]["lang"] == "en"
    assert len(page.all("main")) == len(page.all("header")) == len(page.all("footer")) == 1


def test_it_tells_the_figures(results: Path) -> None:
    text = Page(write_report(results)).text
    for found in (
        *("e/ best.pt", "PSNR 23.46 dB", "± 2.00", "1 identical pairs", "too few"),
        *("kid 0.01230", "precision 0.7500", "new 0.1250", "0.234", "0.247 bits per pixel"),
        *("87.5 %", "6.5", "seed 77", "1,234", "resize none"),
        *("8 codevectors, 1 unused", "does not say how", "--model_name e/best.pt", "17.89"),
    ):
        assert found.lower() in text.lower(), found
    assert "cannot be" not in text


def test_the_commands_are_safe_and_whole(results: Path) -> None:
    """Those that were given; words from other files are quoted, and a damaged one is told."""
    odd = "<x>; touch /tmp/y"
    own = {"script": "evaluation.py", "folder": "/a b", "flags": {"gt_path": odd, "cache": False}}
    write_json(results / "metrics.json", lambda c: c.update(command=own))
    path = results.parents[3] / "models" / "e" / "best.pt"
    content = torch.load(path, weights_only=True)
    trained = {"script": "main.py", "folder": "/x", "flags": {"lr": 1e-4}, "num_processes": 2}
    torch.save({**content, "command": trained}, path)
    page = Page(write_report(results)).text
    assert f"cd '/a b' && python evaluation.py --gt_path '{odd}' --no-cache" in page
    assert "cd /x && torchrun --nproc_per_node 2 main.py --lr 0.0001" in page
    torch.save({**content, "command": {**trained, "num_processes": "2"}}, path)
    assert 'num_processes is "2", not a whole number' in Page(write_report(results)).text


@pytest.mark.parametrize(
    ("flags", "expected"),
    [
        ({"lr": 3e-4, "recipe": "best"}, ["--lr", "0.0003", "--recipe", "best"]),
        ({"compile": True, "cache": False}, ["--compile", "--no-cache"]),
        ({"metrics": ["l1", "psnr"], "seed": None}, ["--metrics", "l1", "psnr"]),
        ({"exp_name": "-x", "lr": -1.0}, ["--exp_name=-x", "--lr=-1.0"]),
    ],
)
def test_words_of_flags(flags: dict[str, Any], expected: list[str]) -> None:
    assert words(flags) == expected


def test_the_worst_come_first_and_infinite_is_best(results: Path) -> None:
    pictures = [str(image["alt"]) for image in Page(write_report(results)).all("img")]
    by_psnr, by_lpips = pictures[16:24], pictures[24:]
    assert [alt[6:14] for alt in by_psnr] == [f"{n:08d}" for n in (0, 1, 2, 3, 5, 6, 7, 8)]
    assert [alt[6:14] for alt in by_lpips] == [f"{n:08d}" for n in range(19, 11, -1)]


@pytest.mark.parametrize("name", FILES)
def test_a_missing_file_is_named_with_its_command(results: Path, name: str) -> None:
    path = results / name
    shutil.rmtree(path) if path.is_dir() else path.unlink()
    page = Page(write_report(results))
    assert any(attributes.get("class") == "missing" for _, attributes in page.elements)
    assert "is not there" in page.text
    assert ("evaluation.py" if "metrics" in name else "test.py") in page.text


@pytest.mark.parametrize("name", ["analysis.json", "metrics.json", "metrics.csv", "codebook.png"])
@pytest.mark.parametrize(
    "content", ["", "{", "[]", '{"codebook": 3, "metrics": [1]}', "\udcff,\n,,"]
)
def test_a_damaged_file_is_no_traceback(results: Path, name: str, content: str) -> None:
    shutil.rmtree(results.parents[3] / "models")
    (results / name).write_bytes(content.encode(errors="surrogateescape"))
    assert "Traceback" not in Page(write_report(results)).text


def test_values_of_another_kind_are_refused_or_shown(results: Path) -> None:
    """Each value in turn is replaced by an unexpected one."""
    found = find(results)
    refused = 0
    for name, group in (("analysis", Analysis), ("metrics", Metrics)):
        whole = json.loads((results / f"{name}.json").read_text())
        places = [(key, None) for key in whole]
        places += [(g, key) for g, part in whole.items() if isinstance(part, dict) for key in part]
        for (outer, key), odd in product(places, ODD):
            content = {**whole, outer: odd if key is None else {**whole[outer], key: odd}}
            try:
                changed = parse(content, group)
            except ValueError:
                refused += 1
                continue
            changes: dict[str, Any] = {name: changed}
            shown = replace(found, **changes)
            lead(shown)
            report.origin(shown.results, shown.metrics.versions)
            for build in (key_figures, usage_histogram, unit_slots):
                assert section("i", "t", partial(build, shown))
    assert refused > 50


def test_an_empty_folder_gives_a_page(tmp_path: Path) -> None:
    page = Page(write_report(tmp_path))
    assert len([a for _, a in page.elements if a.get("class") == "missing"]) >= 8
    assert "python test.py" in page.text
    with pytest.raises(UserError, match="not a results folder"):
        write_report(tmp_path / "absent")


def test_hostile_words_stay_words(results: Path) -> None:
    write_json(results / "analysis.json", lambda c: c["data"].update(dataset=HOSTILE))
    write_json(results / "analysis.json", lambda c: c["rate"].update({HOSTILE: HOSTILE}))
    write_json(results / "metrics.json", lambda c: c["metrics"].update({HOSTILE: {"mean": 1}}))
    write_json(results / "metrics.json", lambda c: c.update(versions={HOSTILE: HOSTILE}))
    rows = (results / "metrics.csv").read_text()
    (results / "metrics.csv").write_text(rows + "\"<img src=x onerror='y'>\",1,9\n")
    moved = results.with_name("<b>&'best\"")
    results.rename(moved)
    page = Page(write_report(moved))
    assert page.all("script") == []
    assert all("onerror" not in attributes for attributes in page.all("img"))
    assert "<script>alert('x')</script>&\"" in page.text
    assert "<img src=x onerror='y'>" in page.text
    assert "<b>&'best\"" in page.text


def test_quality_is_told_without_an_analysis(results: Path) -> None:
    """evaluation.py can compare folders that test.py did not write."""
    (results / "analysis.json").unlink()
    text = Page(write_report(results)).text
    assert "PSNR 23.46 dB" in text
    assert "Rate and codebook: unknown, analysis.json is not there" in text


def test_a_checkpoint_newer_than_the_results_is_told(results: Path) -> None:
    (results.parents[3] / "models" / "e" / "best.pt").touch()
    assert "newer than these results" in Page(write_report(results)).text


def test_large_pictures_are_shrunk_until_the_page_is_small(
    results: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    random = np.random.default_rng(0)
    for path in results.glob("*/*.png"):
        Image.fromarray(random.integers(0, 256, (120, 160, 3), dtype=np.uint8)).save(path)
    monkeypatch.setattr(report, "LARGEST", 800_000)
    path = write_report(results)
    assert path.stat().st_size < 800_000
    assert re.search(r"those above \d\d pixels shrunk", Page(path).text)


def test_pictures_of_two_sizes_and_damaged_ones_are_left_out(results: Path) -> None:
    Image.new("L", (3, 3)).save(results / "rec" / "00000000.png")
    (results / "rec" / "00000019.png").write_bytes(b"no picture")
    page = Page(write_report(results))
    assert "differ in size" in page.text
    assert "cannot be decoded" in page.text


def test_long_curves_keep_their_spikes() -> None:
    """The drawing is small, and a single high value reaches the top of the axes."""
    points = [(step, value) for step, value in enumerate(np.random.default_rng(0).random(100_000))]
    points[54_321] = (54_321, 9.0)
    draw = partial(draw_lines, series={"a": points}, log=False, low=0)
    drawing = Chart("n", "d", "x", "y", draw).svg()
    assert len(drawing) < 60_000
    (curve,) = re.findall(rf'd="([^"]+)"[^>]*stroke: {re.escape("var(--first)")}', drawing)
    heights = [float(y) for y in re.findall(r"[ML] \S+ (\S+)", curve)]
    assert min(heights) == pytest.approx(40 + 176 * (1 - 1 / 1.05), abs=1)
    assert sorted(heights)[1] > 190


@pytest.mark.parametrize(
    ("low", "high"), [(0, 1), (0.1, 0.1003), (-5, 1e9), (1e-9, 3e-9), (1, 30), (1, 1e9)]
)
def test_ticks_are_few_and_differ(low: float, high: float) -> None:
    for log in (False, low > 0 and high > 20 * low):
        draw = partial(draw_lines, series={"a": [(0, low), (1, high)]}, log=log, low=None)
        ticks = re.findall(r"text-anchor: end[^>]*>([^<]+)<", Chart("n", "d", "x", "y", draw).svg())
        assert 3 <= len(ticks) <= 10
        assert len(set(ticks)) == len(ticks)


def test_the_same_chart_is_drawn_the_same_way() -> None:
    draw = partial(draw_lines, series={"a": [(0, 1), (1, 2)]}, log=False, low=0)
    chart = Chart("n", "<d>", "x", "y", draw)
    once = chart.svg()
    DRAWN.clear()
    assert chart.svg() == once


def test_nothing_overflows_on_a_phone(results: Path, tmp_path: Path) -> None:
    """In a browser the page is at most 390 pixels wide, and its console is empty."""
    browser = next(filter(None, map(shutil.which, BROWSERS)), None)
    if browser is None:
        pytest.skip(f"none of {', '.join(BROWSERS)} is installed")
    write_json(results / "analysis.json", lambda c: c["data"].update(dataset="x" * 300))
    write_report(results)
    (results / "phone.html").write_text(
        '<iframe src="report.html" width="390" height="844" style="border: 0" onload="'
        "document.title = this.contentDocument.documentElement.scrollWidth + ' wide, ' "
        "+ this.contentDocument.querySelectorAll('section').length + ' sections'\"></iframe>"
    )
    done = subprocess.run(
        [browser, "--headless", "--no-sandbox", "--disable-gpu", "--allow-file-access-from-files",
         f"--user-data-dir={tmp_path / 'profile'}", "--enable-logging=stderr",
         "--virtual-time-budget=5000", "--dump-dom", (results / "phone.html").as_uri()],
        capture_output=True, text=True, timeout=HANGS, check=False,
    )  # fmt: skip
    title = re.search(r"<title>(\d+) wide, (\d+) sections</title>", done.stdout)
    assert title, done.stderr
    assert int(title[1]) <= 390
    assert int(title[2]) == 9
    assert "CONSOLE" not in done.stderr


def test_the_command_refuses_what_is_no_folder_of_results(tmp_path: Path) -> None:
    outcome = run_forked(["-m", "utils.report", str(tmp_path)], tmp_path)
    assert outcome.code == 2
    expected = f"utils.report: error: {tmp_path} holds neither analysis.json nor metrics.json\n"
    assert outcome.err == expected
    assert not list(tmp_path.iterdir())

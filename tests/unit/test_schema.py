"""analysis.json and metrics.json: written and read as declared, older files too."""

from __future__ import annotations

import json
import math
from pathlib import Path

import pytest
import torch

from tests.conftest import refusal
from utils.codebook.statistics import CodebookStatistics
from utils.evaluation import schema
from utils.evaluation.metrics import METRICS
from utils.evaluation.schema import (
    CODEBOOK,
    RATES,
    Analysis,
    CodebookUse,
    Figure,
    Metrics,
    Rate,
    Score,
)

# Keys as they were written before the schema, in their order.
ANALYSIS = (
    *("images", "command", "model", "data", "image_format", "rate", "codebook"),
    *("skipped_images", "sources"),
)
METRICS_KEYS = (
    *("metrics", "pairs", "skipped", "rate", "command", "protocol", "settings", "weights"),
    *("versions", "images"),
)
RATE = (
    *("codes_per_image", "nominal_bits_per_pixel", "entropy_bits_per_pixel"),
    "entropy_bits_per_pixel_by_slot",
)
CODEBOOK_KEYS = (
    *("images", "codevectors", "usage_percent", "perplexity", "slots", "slot_usage_percent"),
    *("slot_perplexity", "counts", "slot_counts", "slots_per_codevector"),
)


def analysis() -> Analysis:
    statistics = CodebookStatistics(4)
    statistics.add(torch.randint(4, (2, 3, 3, 2), generator=torch.Generator().manual_seed(0)))
    return Analysis(
        model={"quantizer": "looc"},
        data={"dataset": "mnist"},
        rate=statistics.rate(36),
        codebook=statistics.summary(),
    )


def test_an_analysis_comes_back_as_it_was_written(tmp_path: Path) -> None:
    path = tmp_path / "analysis.json"
    schema.write(path, analysis())
    assert schema.read(path, Analysis) == analysis()
    content = json.loads(path.read_text())
    assert tuple(content) == ANALYSIS
    assert tuple(content["rate"]) == RATE
    assert tuple(content["codebook"]) == CODEBOOK_KEYS


def test_metrics_come_back_as_they_were_written(tmp_path: Path) -> None:
    path = tmp_path / "metrics.json"
    metrics = Metrics(metrics={"psnr": Score(None, None, 0, 3)}, pairs=3, rate=None)
    schema.write(path, metrics)
    assert schema.read(path, Metrics) == metrics
    content = json.loads(path.read_text())
    assert tuple(content) == METRICS_KEYS
    assert content["rate"] is None
    assert content["metrics"] == {"psnr": {"mean": None, "variance": None, "n": 0, "identical": 3}}


def test_a_file_of_before_or_of_tomorrow_is_read(tmp_path: Path) -> None:
    path = tmp_path / "metrics.json"
    path.write_text('{"metrics": {"l1": {"mean": 1}}, "pairs": 2, "invented_by_tomorrow": []}')
    metrics = schema.read(path, Metrics)
    assert (metrics.pairs, metrics.metrics["l1"].mean, metrics.versions) == (2, 1.0, {})


@pytest.mark.parametrize(
    ("content", "words"),
    [
        ("", "Expecting value"),
        ("[]", "it is [], not an object"),
        ("{}", "it lacks rate"),
        ('{"rate": {"codes_per_image": "1"}}', 'rate.codes_per_image is "1", not a number'),
        ('{"rate": {}, "codebook": {"counts": [1, 2.5]}}', "codebook.counts is 2.5, not a whole"),
        ('{"rate": {}, "codebook": {"images": true}}', "codebook.images is true"),
        ('{"rate": {"coded_bits_per_pixel": 1e400}}', "is Infinity, not a number"),
    ],
)
def test_a_damaged_file_is_one_line(content: str, words: str, tmp_path: Path) -> None:
    path = tmp_path / "analysis.json"
    path.write_text(content)
    message = refusal(lambda: schema.read(path, Analysis))
    assert message.startswith(f"{path} is damaged: ")
    assert words in message


@pytest.mark.parametrize(
    ("figure", "value", "text"),
    [
        (METRICS["psnr"], 23.456, "23.46 dB"),
        (METRICS["psnr"], math.inf, "∞ dB"),
        (METRICS["kid"], 0.00123, "0.00123"),
        (RATES["codes_per_image"], 1568.0, "1568"),
        (CODEBOOK["usage_percent"], 87.54, "87.5 %"),
        (Figure("new"), None, "–"),
    ],
)
def test_figures_have_one_format(figure: Figure, value: float | None, text: str) -> None:
    assert figure.text(value) == text


def test_a_rate_shows_what_is_known() -> None:
    rate = Rate(codes_per_image=10, entropy_bits_per_pixel_by_slot=0.5, coded_bits_per_pixel=0.25)
    assert rate.rows() == {"codes per image": "10", "bits per pixel, coded": "0.250"}
    assert Rate(coded_tables=2).rows() == CodebookUse(codevectors=8).rows() == {}
    whole = Rate(coded_bits_per_pixel=0.25, coded_tables=2)
    assert whole.rows() == {"bits per pixel, coded": "0.250 (with 2 frequency tables)"}
    assert CodebookUse(perplexity=6.54, codevectors=8).rows() == {"perplexity": "6.5 of 8"}
    assert not Rate()
    assert rate.headline() == Rate(codes_per_image=10, coded_bits_per_pixel=0.25)

"""The soak's figures: slopes and speeds of known runs, and what a process holds."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest

from benchmarks.soak import (
    ROOT,
    Sample,
    Steps,
    Usage,
    Watched,
    descendants,
    growth,
    read_status,
    slope,
    usage,
    watch,
    workers_usage,
    write,
    write_images,
)
from utils.tables import Table

linux = pytest.mark.skipif(not Path("/proc/self/status").exists(), reason="reads /proc")


def test_the_slope_of_a_line_is_exact() -> None:
    x = np.arange(10.0)
    assert slope(x, 3 * x - 1) == pytest.approx((3, 0))


def test_the_standard_error_tells_how_far_slopes_scatter() -> None:
    x, random = np.linspace(0, 20, 50), np.random.default_rng(0)
    slopes, errors = zip(*(slope(x, 0.5 * x + random.normal(size=50)) for _ in range(500)))
    assert np.mean(slopes) == pytest.approx(0.5, abs=0.01)
    assert np.mean(errors) == pytest.approx(np.std(slopes), rel=0.1)


def test_two_samples_are_too_few_for_a_slope() -> None:
    with pytest.raises(ValueError, match="too short"):
        slope(np.arange(2.0), np.arange(2.0))


def test_speed_leaves_the_warm_up_out() -> None:
    """100 slow steps, then 10 a second, and 5 a second from step 775 on."""
    steps = Steps(np.array([0.0, 100, 775, 1000]), np.array([0.0, 1000, 1067.5, 1112.5]))
    assert steps.speed(0, 0.25) == pytest.approx(10)
    assert steps.speed(0.75, 1) == pytest.approx(5)
    assert steps.at([1000, 1067.5]) == pytest.approx([100, 775])


def test_growth_is_that_between_warm_up_and_last_step() -> None:
    """A leak of 2 MB per 1,000 steps and a handle at the end; what comes before is left out."""
    steps = Steps(np.array([0.0, 10_000]), np.array([0.0, 100]))
    samples = []
    for second in range(110):
        megabytes = 9999.0 if second < 10 or second > 100 else 500 + 0.2 * second
        script = Usage(megabytes, megabytes, 25 + (second >= 100), 8)
        samples.append(Sample(second, script, Usage(100, 100, 40, 4)))
    table = growth(steps, samples)
    rows = {row[0]: row[1:] for row in table.rows}
    assert table.columns[1:4] == ["step 1,000", "step 2,500", "step 5,000"]
    memory = ["502", "505", "510", "515", "520", "502", "520", *["+2.000 ± 0.000"] * 2]
    assert rows["script: memory, MB"] == memory
    assert rows["script: handles"][:-2] == ["25", "25", "25", "25", "26", "25", "26"]
    assert rows["workers: threads"] == [*["4"] * 7, *["+0.000 ± 0.000"] * 2]


def test_status_is_read_by_name() -> None:
    text = "Name:\t12 monkeys\nVmHWM:\t   20480 kB\nVmRSS:\t   10240 kB\nThreads:\t3\nState:\tS\n"
    status = read_status(text)
    assert (status["VmRSS"], status["VmHWM"], status["Threads"]) == (10240, 20480, 3)
    assert "State" not in status


@linux
def test_usage_sees_handles_and_workers(tmp_path: Path) -> None:
    before = usage(os.getpid())
    with (tmp_path / "a").open("w"):
        during = usage(os.getpid())
        assert before is not None
        assert during is not None
        assert during.handles == before.handles + 1
    assert 0 < before.memory <= before.peak
    command = [sys.executable, "-c", "print(flush=True); input()"]
    with subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE) as child:
        assert child.stdout is not None
        child.stdout.readline()
        assert child.pid in descendants(os.getpid())
        assert workers_usage(os.getpid()).memory > 1
        child.communicate(b"\n")
    assert usage(child.pid) is None


@linux
def test_a_failing_run_raises_with_its_last_words(tmp_path: Path) -> None:
    script = tmp_path / "script.py"
    script.write_text("import sys, time; time.sleep(0.2); sys.exit('disk on fire')")
    with pytest.raises(RuntimeError, match=r"ended with 1: disk on fire"):
        watch([str(script)], 0.05)
    script.write_text("import os, time; time.sleep(0.2); assert os.environ['SPOON'] == '1'")
    run = watch([str(script)], 0.05, {"SPOON": "1"})
    assert run.seconds > 0.2
    assert run.samples
    assert run.samples[-1].script.memory > 1


def test_the_peak_is_that_before_the_exit() -> None:
    def sample(script: float, workers: float) -> Sample:
        return Sample(0, Usage(script, script, 9, 1), Usage(workers, workers, 9, 1))

    run = Watched(0, 3, [sample(5, 0), sample(7, 2), sample(6, 3), sample(99, 0)])
    assert run.peaks() == (7, 3)


def test_images_beyond_the_distinct_ones_are_links(tmp_path: Path) -> None:
    write_images(tmp_path, 450, 8)
    files = sorted(tmp_path.rglob("*.png"))
    assert len(files) == 450
    assert len({file.stat().st_ino for file in files}) == 400
    assert len(list(tmp_path.iterdir())) == 200


def test_the_document_holds_the_tables(tmp_path: Path) -> None:
    table = Table("Some run", ["steps", "s"], [["1,000", 2.5]])
    write(tmp_path / "soak.md", [table])
    text = (tmp_path / "soak.md").read_text()
    assert text.startswith("# Soak\n")
    assert text.endswith("| 1,000 | 2.5 |\n")
    assert str(ROOT) not in text

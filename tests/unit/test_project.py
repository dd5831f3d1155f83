"""The repository holds together: requirements, layers, the README's flags."""

from __future__ import annotations

import ast
import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from modules import VQVAE, ModelConfig
from utils.checkpoints.checkpoint import save_checkpoint
from utils.flags.table import updated

ROOT = Path(__file__).parents[2]
# Each layer may import those before it.
LAYERS = ("modules", "utils", "datasets")


def requirements(text: str) -> list[str]:
    return re.findall(r"^\s*(?:- )?([a-z][\w-]*[>=].*)$", text, re.MULTILINE)


def test_environment_is_in_step_with_requirements() -> None:
    environment = (ROOT / "environment.yaml").read_text()
    assert environment.startswith("name: looc\n")
    pip_part = environment.split("- pip:\n")[1]
    assert requirements(pip_part) == requirements((ROOT / "requirements.txt").read_text())
    assert len(requirements(pip_part)) > 9


@pytest.mark.parametrize("layer", LAYERS)
def test_a_layer_imports_none_above_it(layer: str) -> None:
    allowed = LAYERS[: LAYERS.index(layer) + 1]
    for path in (ROOT / layer).rglob("*.py"):
        for node in ast.walk(ast.parse(path.read_text())):
            names = [node.module or ""] if isinstance(node, ast.ImportFrom) else []
            if isinstance(node, ast.ImportFrom) and node.level:
                assert layer == "modules"  # a package that keeps working under another name
                continue
            if isinstance(node, ast.Import):
                names = [alias.name for alias in node.names]
            for name in names:
                package = name.split(".")[0]
                assert package not in LAYERS or package in allowed, f"{path}: {name}"
                if layer == "modules":
                    optional = {"plugin.py": "numpy", "vqgan.py": "diffusers"}
                    assert package in (*sys.stdlib_module_names, "torch", "faiss") or (
                        package == optional.get(path.name)
                    )


def test_the_quantiser_works_alone(tmp_path: Path) -> None:
    """Copied into another project, with nothing of this one in reach."""
    shutil.copy(ROOT / "modules" / "quantizers" / "looc" / "quantizer.py", tmp_path)
    program = (
        "import torch; from quantizer import LooCQuantizer; q = LooCQuantizer(16, 4);"
        "out = q(torch.randn(2, 8, 3, 3)); assert out.indices.shape == (2, 3, 3, 2)"
    )
    subprocess.run([sys.executable, "-I", "-c", f"import sys; sys.path[:0] = ['.'];{program}"],
                   cwd=tmp_path, check=True)  # fmt: skip


@pytest.mark.parametrize("path", [p for p in ROOT.rglob("*.py") if ".venv" not in p.parts],
                         ids=lambda path: str(path.relative_to(ROOT)))  # fmt: skip
def test_every_file_says_what_it_is_for(path: Path) -> None:
    assert ast.get_docstring(ast.parse(path.read_text())), f"{path} has no docstring"


def test_the_readme_lists_the_flags_as_declared() -> None:
    readme = (ROOT / "README.md").read_text()
    assert updated(readme) == readme, "run: python -m utils.flags.table"
    assert readme.count("| `--") > 30


def test_the_readmes_python_runs(tmp_path: Path) -> None:
    blocks = re.findall(r"```python\n(.*?)```", (ROOT / "README.md").read_text(), re.S)
    model, z = VQVAE(ModelConfig(hidden_size=8, num_residual_hidden=4)), torch.randn(2, 8, 3, 5)
    save_checkpoint(tmp_path / "best.pt", model, {})
    names = {"z": z, "images": torch.rand(2, 1, 8, 12)}
    assert len(blocks) == 2
    for block in blocks:
        exec(block.replace("output/models/demo/best.pt", str(tmp_path / "best.pt")), names)
    assert names["indices"].shape == (2, 3, 5, 2)
    assert names["reconstruction"].shape == (2, 1, 8, 12)


PAGES = ["README.md", *(str(path.relative_to(ROOT)) for path in ROOT.glob("docs/**/*.md"))]


@pytest.mark.parametrize("name", PAGES)
def test_links_lead_somewhere(name: str) -> None:
    page = ROOT / name
    for link in re.findall(r"\]\((?!https?:)([^)#]+)", page.read_text()):
        assert (page.parent / link).exists(), f"{name}: {link}"

"""The repository holds together: requirements, layers, the README's flags."""

from __future__ import annotations

import ast
import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent
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
            if isinstance(node, ast.Import):
                names = [alias.name for alias in node.names]
            for name in names:
                package = name.split(".")[0]
                assert package not in LAYERS or package in allowed, f"{path}: {name}"
                if layer == "modules":
                    assert package in (*sys.stdlib_module_names, "torch", "modules")


def test_the_quantiser_works_alone(tmp_path: Path) -> None:
    """Copied into another project, with nothing of this one in reach."""
    shutil.copy(ROOT / "modules" / "quantizer.py", tmp_path)
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

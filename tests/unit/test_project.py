"""The repository holds together: requirements, layers, the table of flags, links."""

from __future__ import annotations

import ast
import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from utils.flags.table import PAGE, page

ROOT = Path(__file__).parents[2]
# Each layer may import those before it.
LAYERS = ("modules", "utils", "datasets", "commands")


def requirements(text: str) -> list[str]:
    return re.findall(r"^\s*(?:- )?([a-z][\w-]*[>=].*)$", text, re.MULTILINE)


def test_requirements_agree() -> None:
    """environment.yaml repeats requirements.txt, and so do two lists of pyproject.toml."""
    environment = (ROOT / "environment.yaml").read_text()
    assert environment.startswith("name: looc\n")
    pip_part = environment.split("- pip:\n")[1]
    assert requirements(pip_part) == requirements((ROOT / "requirements.txt").read_text())
    assert len(requirements(pip_part)) > 9
    project = (ROOT / "pyproject.toml").read_text()
    lists = re.findall(r"^(?:dependencies|scripts) = \[(.*?)\]", project, re.M | re.S)
    assert re.findall(r'"(.*?)"', "".join(lists)) == requirements(pip_part)


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
                    optional = {
                        "plugin.py": "numpy",
                        "vqgan.py": "diffusers",
                        "vq_model.py": "diffusers",
                    }
                    assert package in (*sys.stdlib_module_names, "torch", "faiss") or (
                        package == optional.get(path.name)
                    )


COPIED = """
import importlib, importlib.util, pathlib, sys
sys.path.insert(0, ".")
import torch
from borrowed import LooCPlugin, LooCQuantizer

assert importlib.util.find_spec("modules") is None
z = torch.randn(2, 8, 3, 3, requires_grad=True)
quantizer = LooCQuantizer(16, 4, contras_loss=True, codebook_start="kmeans")
latents, loss, indices = quantizer(z)
(latents.sum() + loss).backward()
assert quantizer.codebook.grad is not None and indices.shape == (2, 3, 3, 2)
assert torch.allclose(quantizer.eval()(z)[0], quantizer.decode(quantizer.encode(z)))
plugin = LooCPlugin(16, 8, embedding_dim=2, interpolation_scale=2, latent_norm="batch")
latents, loss, (perplexity, _, indices) = plugin(z)
assert plugin.get_codebook_entry(indices, (2, 3, 3, 8)).shape == latents.shape == z.shape
for path in pathlib.Path("borrowed").glob("*.py"):
    importlib.import_module(f"borrowed.{path.stem}")
"""


def test_the_copied_folder_of_looc_works_alone(tmp_path: Path) -> None:
    """It runs under another name in an empty directory, without the rest of this project."""
    source = ROOT / "modules" / "quantizers" / "looc"
    shutil.copytree(source, tmp_path / "borrowed", ignore=shutil.ignore_patterns("__pycache__"))
    subprocess.run([sys.executable, "-I", "-c", COPIED], cwd=tmp_path, check=True)


@pytest.mark.parametrize("path", [p for p in ROOT.rglob("*.py") if ".venv" not in p.parts],
                         ids=lambda path: str(path.relative_to(ROOT)))  # fmt: skip
def test_every_file_says_what_it_is_for(path: Path) -> None:
    assert ast.get_docstring(ast.parse(path.read_text())), f"{path} has no docstring"
    riddles = re.findall(r'"{3}(?:What|Of|Whether|How|As|Between) .*', path.read_text())
    assert not riddles, "a docstring says what a thing is or does, verb or noun first"


def test_the_table_lists_the_flags_as_declared() -> None:
    text = PAGE.read_text()
    assert page() == text, "run: python -m utils.flags.table"
    assert text.count("| `--") > 30


def test_the_readmes_python_runs() -> None:
    blocks = re.findall(r"```python\n(.*?)```", (ROOT / "README.md").read_text(), re.S)
    names = {"z": torch.randn(2, 8, 3, 5), "images": torch.rand(2, 3, 8, 16) * 2 - 1}
    assert len(blocks) == 2
    for block in blocks:
        exec(block.replace("from looc import", "from modules import"), names)
    assert names["indices"].shape == (2, 3, 5, 2)
    errors = (names["reconstruction"] - names["images"]).square().mean()
    assert errors < names["images"].var()


PAGES = sorted(
    str(path.relative_to(ROOT))
    for pattern in ("*.md", "docs/**/*.md", "tests/**/*.md", "datasets/**/*.md")
    for path in ROOT.glob(pattern)
)


@pytest.mark.parametrize("name", PAGES)
def test_links_lead_somewhere(name: str) -> None:
    page = ROOT / name
    for link, _, anchor in re.findall(r"\]\((?!https?:)([^)#]*)(#([^)]+))?\)", page.read_text()):
        target = page.parent / link if link else page
        assert target.exists(), f"{name}: {link}"
        if anchor:
            assert anchor in anchors(target.read_text()), f"{name}: {link}#{anchor}"


def anchors(text: str) -> set[str]:
    """The anchors that GitHub makes of a page's headings."""
    headings = re.findall(r"^#+ (.+)$", re.sub(r"```.*?```", "", text, flags=re.S), re.M)
    return {re.sub(r"[^\w\- ]", "", title.lower()).replace(" ", "-") for title in headings}

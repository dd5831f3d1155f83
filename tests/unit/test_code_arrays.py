"""Codes as NumPy arrays: what other people's priors read, and images of what they draw."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from modules import VQVAE, ModelConfig
from tests.conftest import refusal, write_idx
from tests.processes import limited_files, run_ranks
from tests.scripts.test_cli import TINY, error_line, train
from tests.unit.test_codes import RESULTS, TESTED, Script, draw, info_of, pictures
from utils.checkpoint import load_model
from utils.codebook.codes import arrays, files
from utils.codebook.codes.arrays import ARRAYS, CodeArray
from utils.images import to_signed

SAVE = ("test.py", *TESTED, "--device", "cpu", "--batch_size", "5", "--save_codes")
NPY = (*SAVE, "--codes_format", "npy")


@pytest.mark.parametrize("split", ["train", "all"])
def test_codes_of_training_images_and_their_labels(
    script: Script, mnist: Path, tmp_path: Path, split: str
) -> None:
    for name, count in (("train", 40), ("t10k", 12)):
        labels = (np.arange(count) % 7).astype(np.uint8)
        write_idx(mnist / "MNIST" / "raw" / f"{name}-labels-idx1-ubyte", labels)
    assert train(script, mnist).code == 0
    saved = script(*NPY, "--data_split", split)
    assert saved.code == 0, saved.err
    results = tmp_path / f"{RESULTS}-{split}"
    assert not list(results.glob(".*"))
    codes, labels, codebook = (np.load(results / name) for name in ARRAYS[:3])
    model, count = load_model(tmp_path / "out/models/e/best.pt"), {"train": 40, "all": 52}[split]
    originals = [np.asarray(Image.open(path)) for path in sorted(results.glob("original/*"))]
    images = to_signed(torch.from_numpy(np.stack(originals))[:, None])
    assert codes.dtype == np.uint8
    assert np.array_equal(codes, model.encode(images).numpy())
    assert labels.tolist() == [n % 7 for n in (*range(40), *range(12))][:count]
    assert np.array_equal(codebook, model.quantizer.codebook.detach())
    assert len(json.loads((results / "names.json").read_text())) == count
    known = json.loads((results / "codes.json").read_text())
    assert (known["num_embedding"], known["slots"], known["height"]) == (16, 2, 7)
    assert known["classes"][3] == "3 - three"
    # The same pictures from it, and again from a copy without a description.
    for copy, line in (("codes.npy", "bit for bit"), ("drawn.npy", "")):
        if copy == "drawn.npy":
            np.save(results / copy, codes.astype(np.int64))
        back = script("test.py", *TESTED, "--from_codes", str(results / copy))
        assert back.code == 0, back.err
        assert ("same as when saved" in back.out, line in back.out) == (bool(line), True)
        decoded = results.with_name(f"mnist-{split}-{copy[:-4]}-npy")
        assert pictures(decoded / "rec") == pictures(results / "rec")
    # Another test of the same images removes them.
    assert script("test.py", *TESTED, "--data_split", split).code == 0
    assert not any((results / name).exists() for name in ARRAYS)


def test_several_processes_write_the_same(script: Script, mnist: Path, tmp_path: Path) -> None:
    train(script, mnist)
    assert script(*NPY).code == 0
    results = tmp_path / RESULTS
    one = {name: (results / name).read_bytes() for name in ARRAYS}
    shutil.move(results, tmp_path / "before")
    assert [outcome.code for outcome in run_ranks(NPY, tmp_path)] == [0, 0]
    assert {name: (results / name).read_bytes() for name in ARRAYS} == one


def test_rows_of_images_left_out_are_absent(script: Script, tmp_path: Path) -> None:
    random = np.random.default_rng(0)
    for number in range(12):
        path = tmp_path / "pictures" / f"class{number % 2}" / f"{number:02d}.png"
        path.parent.mkdir(parents=True, exist_ok=True)
        Image.fromarray(random.integers(256, size=(16, 16, 3), dtype=np.uint8)).save(path)
    data = ("--data_folder", "pictures", "--image_size", "16", "--num_workers", "0")
    words = (*data, "--output_folder", "out", *TINY, "--max_steps", "1", "--exp_name", "e")
    assert script("main.py", *words).code == 0
    (tmp_path / "pictures/class0/04.png").write_bytes(b"damaged")
    saved = script(*NPY, "--data_split", "all", "--skip_bad_images", "--batch_size", "3")
    assert saved.code == 0, saved.err
    results = tmp_path / "out/results/e/best/pictures-all"
    names = [f"class{n % 2}/{n:02d}.png" for n in (0, 2, 6, 8, 10, 1, 3, 5, 7, 9, 11)]
    stored = json.loads((results / "names.json").read_text())
    assert stored == [str(tmp_path / "pictures" / name) for name in names]
    assert np.load(results / "labels.npy").tolist() == [0] * 5 + [1] * 6
    assert len(np.load(results / "codes.npy")) == 11
    back = script("test.py", *TESTED, "--from_codes", str(results / "codes.npy"))
    assert "bit for bit" in back.out, back.err
    decoded = results.with_name("pictures-all-codes-npy")
    assert pictures(decoded / "rec") == pictures(results / "rec")
    assert "00000002.png" not in pictures(results / "rec")


def test_refusals_are_one_line(script: Script, mnist: Path, tmp_path: Path) -> None:
    train(script, mnist)
    codes = np.zeros((3, 7, 7, 2), np.int16)
    path = tmp_path / "x.npy"

    def refused(content: object, *words: str) -> str:
        if isinstance(content, np.ndarray):
            np.save(path, content)
        elif isinstance(content, bytes):
            path.write_bytes(content)
        line = error_line(script("test.py", *TESTED, "--from_codes", "x.npy", *words))
        assert not (tmp_path / "out/results").exists()
        return line

    assert "x.npy does not exist" in refused(None)
    assert "its values are float64, not integers" in refused(codes.astype(float))
    for shape in ((147, 2), (3, 7, 14, 1), (3, 7, 2, 7), (294,)):
        assert f"its shape is {shape}, not (N, H, H, 2)" in refused(codes.reshape(shape))
    assert "it holds no codes, its shape is (0, 7, 7, 2)" in refused(codes[:0])
    for wrong in (-1, 16):
        codes[2, 3, 4, 1] = wrong
        assert "its codes are not in [0, 16)" in refused(codes)
    codes[:] = 0
    pickled = refused(np.array([{}], dtype=object))
    for line in (refused(path.read_bytes()[:-1]), refused(b""), refused(b"text"), pickled):
        assert "x.npy is refused: it is not a whole NumPy file of numbers" in line
    np.save(path, codes)
    for damage in ("[]", "{}", "x", "\0", "[" * 100_000, '{"left_out": 3}'):
        path.with_suffix(".json").write_text(damage)
        assert "its .json is damaged" in refused(codes)
    path.with_suffix(".json").unlink()
    assert "--codes_format npy needs --save_codes" in refused(codes, "--codes_format", "npy")
    assert "needs images of one size" in error_line(script(*NPY, "--images", "x.npy"))
    assert "--prior p codes codes.looc" in error_line(script(*NPY, "--prior", "p"))


def test_codes_of_another_model_are_refused(script: Script, mnist: Path, tmp_path: Path) -> None:
    train(script, mnist)
    assert script(*NPY).code == 0
    train(script, mnist, "--overwrite", "--max_steps", "4")
    path = tmp_path / RESULTS / "codes.npy"
    line = error_line(script("test.py", *TESTED, "--from_codes", str(path)))
    assert "codes.npy is of another model than" in line
    np.save(path, np.load(path)[1:])
    line = error_line(script("test.py", *TESTED, "--from_codes", str(path)))
    assert "its shape is (11, 7, 7, 2), that in its .json (12, 7, 7, 2)" in line


def test_images_of_other_sizes_than_those_of_training(tmp_path: Path) -> None:
    """A prior of a larger grid draws larger images."""
    model = VQVAE(ModelConfig(hidden_size=8, num_residual_hidden=4, num_embedding=300))
    codes = draw((7, 3, 3, 2), 300)
    np.save(tmp_path / "drawn.npy", np.asfortranarray(codes.numpy().astype(">i4")))
    array = CodeArray(tmp_path / "drawn.npy", model, batch_size=3)
    found = list(array.batches())
    assert torch.equal(torch.cat([indices for _, indices in found]), codes)
    assert [batch.size for batch, _ in found] == [(12, 12)] * 3


def test_a_full_disk_leaves_nothing(tmp_path: Path) -> None:
    info, path = info_of(draw((50, 7, 7, 2), 16), 16), tmp_path / "codes.npy"
    spool = files.spool_path(path, 0)
    spool.write_bytes(bytes(50 * 98))
    with limited_files(1000):
        assert "codes.npy: File too large" in refusal(
            lambda: arrays.write_codes(path, info, [spool])
        )
    assert list(tmp_path.iterdir()) == [spool]

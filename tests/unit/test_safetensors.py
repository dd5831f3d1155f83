"""Files of safetensors, which are read without its library."""

from __future__ import annotations

import json
import sys
from collections.abc import Callable
from pathlib import Path

import pytest
import torch

from modules.weights import ENTRY, TYPES, read_weights
from utils.packages import need

Change = Callable[[bytes], bytes]


@pytest.mark.parametrize("metadata", [None, {"format": "pt"}])
def test_tensors_are_those_that_the_library_reads(
    metadata: dict[str, str] | None, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    library, path = need("safetensors.torch", "test"), tmp_path / "a.safetensors"
    shapes = [(), (0,), (3,), (2, 0, 4), (2, 3, 4)]
    written = {
        f"{dtype} {shape}": (100 * torch.randn(shape)).to(dtype)
        for dtype in TYPES.values()
        for shape in shapes
    }
    library.save_file(written, path, metadata=metadata)
    expected = library.load_file(path)
    monkeypatch.setitem(sys.modules, "safetensors", None)
    found = read_weights("it", path)
    assert found.keys() == expected.keys()
    for name, value in expected.items():
        assert found[name].dtype == value.dtype
        assert torch.equal(found[name], value)


def header(change: Callable[[dict[str, dict[str, object]]], object]) -> Change:
    """A change of the JSON in front of the tensors."""

    def changed(content: bytes) -> bytes:
        start = 8 + int.from_bytes(content[:8], "little")
        names = json.loads(content[8:start])
        text = json.dumps(change(names)).encode()
        return len(text).to_bytes(8, "little") + text + content[start:]

    return changed


DAMAGES: dict[str, Change] = {
    "empty": lambda _: b"",
    "no header": lambda content: content[:6],
    "short": lambda content: content[:-1],
    "long": lambda content: content + b"0",
    "endless header": lambda content: b"\xff" * 8 + content[8:],
    "header of a list": header(lambda names: [names]),
    "nested header": lambda _: (99999).to_bytes(8, "little") + b"[" * 99999,
    "type": header(lambda names: {**names, "a": {**names["a"], "dtype": "F7"}}),
    "shape": header(lambda names: {**names, "a": {**names["a"], "shape": [5]}}),
    "offsets": header(lambda names: {**names, "a": {**names["a"], "data_offsets": [0, 15]}}),
    "beyond": header(lambda names: {**names, "a": {**names["a"], "data_offsets": [8, 32]}}),
    "no tensor": header(lambda _: {"a": 3}),
    "metadata": header(lambda names: {**names, "__metadata__": {ENTRY: "{"}}),
    "list": header(lambda names: {**names, "__metadata__": {ENTRY: "[1]"}}),
}


@pytest.mark.parametrize("name", DAMAGES)
def test_a_damaged_file_is_refused(name: str, tmp_path: Path) -> None:
    path = tmp_path / "a.safetensors"
    tensors = {"a": torch.ones(4), "b": torch.ones(2)}
    need("safetensors.torch", "test").save_file(tensors, path)
    path.write_bytes(DAMAGES[name](path.read_bytes()))
    with pytest.raises(ValueError, match=r"^it is refused: it is truncated or damaged \(\w+\)$"):
        read_weights("it", path)


def test_a_listed_digest_is_checked(tmp_path: Path) -> None:
    path = tmp_path / "a.safetensors"
    need("safetensors.torch", "test").save_file({"a": torch.ones(4)}, path)
    (tmp_path / "SHA256SUMS").write_text(f"{64 * '0'}  b.safetensors\n")
    assert read_weights("it", path).keys() == {"a"}
    (tmp_path / "SHA256SUMS").write_text(f"{64 * '0'}  a.safetensors\n")
    with pytest.raises(ValueError, match=r"truncated or damaged \(DigestDiffers\)$"):
        read_weights("it", path)

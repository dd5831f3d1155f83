"""Checkpoints rebuild their model and check flags; anything else is refused."""

from __future__ import annotations

import pickle
import shutil
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch

import modules
from modules import VQVAE, ModelConfig, pretrained
from tests.conftest import Outcome, refusal
from tests.processes import run_forked
from utils.checkpoints.checkpoint import (
    find_checkpoint,
    load_model,
    read_checkpoint,
    read_named,
    results_name,
    save_checkpoint,
)
from utils.checkpoints.digest import model_digest
from utils.checkpoints.pretrained import read_pretrained
from utils.errors import UserError

GOLDEN = Path(__file__).parents[1] / "golden"
SMALL = ModelConfig(num_embedding=8, hidden_size=16, num_residual_hidden=4, in_channels=3)


@pytest.mark.parametrize("name", ["looc", "cvq"])
def test_reference_checkpoint_reconstructs_the_same_image(name: str) -> None:
    model, data = (
        load_model(GOLDEN / f"checkpoint_{name}.pt"),
        np.load(GOLDEN / f"checkpoint_{name}_io.npz"),
    )
    with torch.no_grad():
        reconstruction, quantized = model(torch.from_numpy(data["images"]))
    assert model.config.quantizer == name
    np.testing.assert_allclose(reconstruction, data["reconstruction"], rtol=1e-5, atol=1e-6)
    np.testing.assert_allclose(quantized.loss, data["loss"], rtol=1e-5)
    assert np.array_equal(quantized.indices.flatten(), data["indices"])


def test_an_older_checkpoint_opens_and_resumes(
    script: Callable[..., Outcome], tmp_path: Path
) -> None:
    """The checkpoint was written before the redesign, by the command in golden/README.md."""
    model, data = load_model(GOLDEN / "last_step3.pt"), np.load(GOLDEN / "last_step3_io.npz")
    with torch.no_grad():
        reconstruction, quantized = model(torch.from_numpy(data["images"]))
    np.testing.assert_allclose(reconstruction, data["reconstruction"], rtol=1e-5, atol=1e-6)
    assert np.array_equal(quantized.indices, data["indices"])

    models = tmp_path / "output" / "models" / "old"
    models.mkdir(parents=True)
    shutil.copy(GOLDEN / "last_step3.pt", models / "last.pt")
    shutil.copy(GOLDEN / "last_step3.pt", models / "best.pt")
    flags = "--hidden_size 8 --num_residual_hidden 4 --num_embedding 16 --embedding_dim 2 "
    flags += "--recipe best --weight_ema 0.9 --batch_size 64 --device cpu --exp_name old"
    resumed = script("main.py", *flags.split(), "--max_steps", "5")
    assert resumed.code == 0, resumed.err
    assert "steps 3 to 5" in resumed.err
    flags = flags.replace("--exp_name old", f"--exp_name new --resume {GOLDEN / 'last_step3.pt'}")
    begun = script("main.py", *flags.split(), "--max_steps", "3")
    assert "resumed" in begun.err, begun.err  # as a best.pt of that time, which had everything too
    checkpoint = read_checkpoint(models / "last.pt")
    assert checkpoint.count("step") == 5
    for name, key in (("codebook", "quantizer.codebook"), ("decoder", "decoder.conv_1.weight")):
        value = checkpoint.state_dict[key]
        np.testing.assert_allclose(value, data[f"{name}_at_5"], rtol=1e-3, atol=1e-5)


@pytest.mark.parametrize("anchor", ["closest", "random"])
def test_a_checkpoint_rebuilds_its_model(anchor: str, tmp_path: Path) -> None:
    config = ModelConfig(
        num_embedding=8, hidden_size=16, num_residual_hidden=4, in_channels=3, anchor=anchor,
        embedding_dim=2, interpolation_scale=2, distance="l2", split="interval",
    )  # fmt: skip
    model, images = VQVAE(config), torch.rand(2, 3, 16, 24) * 2 - 1
    model(images)  # moves usage and pool
    save_checkpoint(tmp_path / "m.pt", model, {"step": 3})
    loaded = load_model(tmp_path / "m.pt")
    assert loaded.config == config
    assert not loaded.training
    assert torch.equal(loaded(images)[0], model.eval()(images)[0])
    assert torch.equal(loaded.decode(loaded.encode(images)), loaded(images)[0])
    assert read_checkpoint(tmp_path / "m.pt").content["step"] == 3
    assert [path.name for path in tmp_path.iterdir()] == ["m.pt"]


def test_flags_are_checks(tmp_path: Path) -> None:
    path = tmp_path / "m.pt"
    save_checkpoint(path, VQVAE(SMALL), {})
    assert read_checkpoint(path, {"num_embedding": 8, "output_folder": "x"}).model_config == SMALL
    with pytest.raises(UserError, match=r"--num_embedding 512 contradicts .*m.pt, which has 8"):
        read_checkpoint(path, {"num_embedding": 512})


def test_flags_complete_a_bare_state_dict() -> None:
    path = GOLDEN / "checkpoint_looc.pt"
    flags = {"interpolation_scale": 2, "distance": "l2"}
    config = read_checkpoint(path, flags).model_config
    assert (config.interpolation_scale, config.distance) == (2, "l2")
    with pytest.raises(UserError, match=r"--embedding_dim 8 contradicts .*, which has 4"):
        read_checkpoint(path, {"embedding_dim": 8})
    with pytest.raises(UserError, match=r"--quantizer cvq contradicts .*, which has looc"):
        read_checkpoint(path, {"quantizer": "cvq"})


def test_a_reference_vq_keeps_no_usage(tmp_path: Path) -> None:
    state = torch.load(GOLDEN / "checkpoint_cvq.pt", weights_only=True)
    del state["_vq_vae.embed_prob"]
    torch.save(state, tmp_path / "vq.pt")
    config = load_model(tmp_path / "vq.pt").config
    assert (config.quantizer, config.distance, config.anchor) == ("vq", "l2", "none")


class Exploit:
    """Creates a file when unpickled."""

    def __init__(self, victim: Path) -> None:
        self.victim = victim

    def __reduce__(self) -> tuple[object, tuple[str]]:
        return (eval, (f"open({str(self.victim)!r}, 'w')",))


def test_nothing_is_executed(tmp_path: Path) -> None:
    victim = tmp_path / "victim"
    torch.save({"format": "looc-1", "model": Exploit(victim)}, tmp_path / "bad.pt")
    (tmp_path / "bad.pickle").write_bytes(pickle.dumps(Exploit(victim)))
    for name in ("bad.pt", "bad.pickle"):
        with pytest.raises(UserError, match="would execute code"):
            load_model(tmp_path / name)
    assert not victim.exists()


def test_damaged_files_are_refused_in_one_line(tmp_path: Path) -> None:
    path = tmp_path / "m.pt"
    with pytest.raises(UserError, match=r"m\.pt does not exist"):
        load_model(path)
    save_checkpoint(path, VQVAE(SMALL), {})
    whole = path.read_bytes()
    for length in (0, 10, len(whole) // 2, len(whole) - 1):
        path.write_bytes(whole[:length])
        with pytest.raises(UserError, match=r"m\.pt is refused") as caught:
            load_model(path)
        assert "\n" not in str(caught.value)


def test_one_wrong_bit_of_a_weight_is_noticed(tmp_path: Path) -> None:
    path, model = tmp_path / "m.pt", VQVAE(SMALL)
    save_checkpoint(path, model, {})
    content = bytearray(path.read_bytes())
    content[content.index(model.encoder.conv_2.weight.detach().numpy().tobytes())] ^= 1
    path.write_bytes(content)
    with pytest.raises(UserError, match=r"m\.pt is refused: it is truncated or damaged"):
        load_model(path)


def test_the_package_opens_the_same_files(tmp_path: Path) -> None:
    """looc.load_model is that of modules, which knows no UserError."""
    path, model = tmp_path / "m.pt", VQVAE(SMALL)
    with pytest.raises(ValueError, match=r"^checkpoint .*m\.pt does not exist$"):
        modules.load_model(path)
    save_checkpoint(path, model, {})
    loaded, images = modules.load_model(str(path)), torch.rand(1, 3, 8, 8)
    assert torch.equal(loaded(images)[0], model.eval()(images)[0])
    assert modules.load_model(GOLDEN / "checkpoint_cvq.pt").config.quantizer == "cvq"
    torch.save({"format": "looc-1", "prior_config": {}, "first_stage": {"path": "a.pt"}}, path)
    with pytest.raises(ValueError, match=r"m\.pt is a prior; give its first stage: a\.pt$"):
        modules.load_model(path)


def test_an_exported_folder_opens_as_its_checkpoint(tmp_path: Path) -> None:
    """python -m utils.export writes two files; load_model, --model_name, --pretrained take them."""
    pytest.importorskip("safetensors")
    model, images, folder = VQVAE(SMALL), torch.rand(1, 3, 8, 8), tmp_path / "shared"
    model(images)
    path = tmp_path / "models" / "m.pt"
    save_checkpoint(path, model, {"step": 3, "optimizer": torch.zeros(2)})
    words = ["-m", "utils.export", str(path), str(folder)]
    assert run_forked(words, tmp_path).code == 0
    assert sorted(file.name for file in folder.iterdir()) == ["config.json", "model.safetensors"]
    found = read_named(str(tmp_path), str(folder), {"num_embedding": SMALL.num_embedding})
    assert model_digest(found.model()) == model_digest(model)
    assert found.content["step"] == 3
    assert "optimizer" not in found.content
    assert torch.equal(modules.load_model(folder)(images)[0], model.eval()(images)[0])
    assert read_pretrained(folder).flags["num_embedding"] == SMALL.num_embedding
    again = run_forked(words, tmp_path)
    assert again.code == 2
    assert again.err == f"utils.export: error: {folder} exists: give a folder that does not\n"
    (folder / "config.json").write_text("{")
    message = refusal(lambda: read_checkpoint(folder))
    assert message.endswith("has a config.json that is damaged (JSONDecodeError)")


def test_weights_without_their_configuration_are_not_taken_for_others(tmp_path: Path) -> None:
    """Such is model.safetensors of an exported folder alone: only its sizes are known."""
    path, model = tmp_path / "m.pt", VQVAE(replace(SMALL, distance="l2"))
    torch.save(model.state_dict(), path)
    message = "distance 'cos' contradicts the state, whose distance is 'l2'"
    with pytest.raises(ValueError, match=message):
        modules.load_model(path)
    torch.save(VQVAE(SMALL).state_dict(), path)
    assert modules.load_model(path).config.distance == SMALL.distance == "cos"
    with pytest.raises(ValueError, match=r"is a folder without config.json and model.safetensors"):
        modules.load_model(tmp_path)


@pytest.mark.parametrize("value", [None, -1, 2**63, 1.5, True, torch.zeros(2)])
def test_a_count_is_checked(value: object, tmp_path: Path) -> None:
    save_checkpoint(tmp_path / "m.pt", VQVAE(SMALL), {"step": value})
    with pytest.raises(UserError, match=r"m\.pt is damaged: its step is not a count"):
        read_checkpoint(tmp_path / "m.pt").count("step")


def test_a_state_dict_of_no_channels(tmp_path: Path) -> None:
    state = torch.load(GOLDEN / "checkpoint_looc.pt", weights_only=True)
    state["_encoder._conv_3.weight"] = torch.zeros(0, 16, 3, 3)
    torch.save(state, tmp_path / "m.pt")
    with pytest.raises(UserError, match=r"another architecture: hidden_size: 0 is less than 2"):
        load_model(tmp_path / "m.pt")


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"num_embedding": -3}, "num_embedding: -3 is less than 1"),
        ({"num_embedding": "many"}, "num_embedding: a str where int is expected"),
        ({"num_embedding": 2**19, "embedding_dim": 2**14}, "does not divide"),
        ({"num_embedding": 2**20}, "another architecture"),
        ({"distance": "cosine"}, "cosine is unknown"),
        ({"hidden_size": 32}, "another architecture"),
    ],
)
def test_a_configuration_is_checked(
    change: dict[str, object], message: str, tmp_path: Path
) -> None:
    path = tmp_path / "m.pt"
    save_checkpoint(path, VQVAE(SMALL), {})
    content = torch.load(path, weights_only=True)
    content["model_config"].update(change)
    torch.save(content, path)
    with pytest.raises(UserError, match=message):
        load_model(path)


@pytest.mark.parametrize(
    "content", [[1, 2], {"a": 1}, {"weight": torch.zeros(3)}, {"format": "looc-1"}, {}]
)
def test_other_contents_are_refused(content: object, tmp_path: Path) -> None:
    torch.save(content, tmp_path / "m.pt")
    with pytest.raises(UserError, match=r"m\.pt"):
        load_model(tmp_path / "m.pt")


@pytest.mark.parametrize(
    "spoil",
    [torch.Tensor.int, torch.Tensor.half, torch.Tensor.to_sparse, lambda x: x * float("nan")],
)
def test_weights_are_checked(spoil: Callable[[torch.Tensor], torch.Tensor], tmp_path: Path) -> None:
    path = tmp_path / "m.pt"
    save_checkpoint(path, VQVAE(SMALL), {})
    content = torch.load(path, weights_only=True)
    content["model"]["encoder.conv_1.weight"] = spoil(content["model"]["encoder.conv_1.weight"])
    torch.save(content, path)
    with pytest.raises(UserError, match=r"m\.pt is .*encoder\.conv_1\.weight is"):
        load_model(path)


@pytest.mark.parametrize(
    ("name", "value", "message"),
    [
        ("usage", -1.0, "quantizer.usage is negative"),
        ("latent_variance", -1.0, "quantizer.latent_variance is negative"),
        ("pool_size", -1, "quantizer.pool_size is negative"),
        ("pool_size", 10**6, "quantizer.pool_size is more than quantizer.pool holds"),
    ],
)
def test_averages_are_checked(name: str, value: float, message: str, tmp_path: Path) -> None:
    path = tmp_path / "m.pt"
    save_checkpoint(path, VQVAE(replace(SMALL, latent_norm="batch")), {})
    content = torch.load(path, weights_only=True)
    content["model"][f"quantizer.{name}"].fill_(value)
    torch.save(content, path)
    with pytest.raises(UserError, match=f"m.pt is damaged: {message}"):
        load_model(path)


def test_a_whole_number_may_stand_for_a_float(tmp_path: Path) -> None:
    save_checkpoint(tmp_path / "m.pt", VQVAE(replace(SMALL, commitment_cost=1)), {})
    assert load_model(tmp_path / "m.pt").config.commitment_cost == 1


def test_images_the_network_cannot_take() -> None:
    model = VQVAE(SMALL)
    with pytest.raises(ValueError, match="multiples of 4"):
        model(torch.zeros(1, 3, 30, 28))
    with pytest.raises(ValueError, match=r"\(1, 1, 28, 28\) are not \(B, 3, height, width\)"):
        model(torch.zeros(1, 1, 28, 28))


def test_a_checkpoint_is_found_by_name_or_path(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    for name in ("out/models/mine/best.pt", "out/models/mine/last.pt", "out/models/a/b/last.pt"):
        Path(name).parent.mkdir(parents=True, exist_ok=True)
        Path(name).touch()
    (tmp_path / "copy.pt").touch()

    def find(name: str) -> tuple[str, str]:
        path = find_checkpoint("--model_name", name, "out")
        return str(path), results_name(path, "out")

    whole = str(tmp_path / "out/models/mine/best.pt")
    assert find("mine/best.pt") == ("out/models/mine/best.pt", "mine/best.pt")
    assert find("out/models/mine/best.pt") == ("out/models/mine/best.pt", "mine/best.pt")
    assert find(whole) == (whole, "mine/best.pt")
    assert find("../models/a/b/last.pt")[1] == "a/b/last.pt"
    assert find("copy.pt") == ("copy.pt", str(tmp_path / "copy.pt").lstrip("/"))
    place = "does not exist, neither under out/models nor as a path; there is"
    message = refusal(lambda: find("mnie/best.pt"))
    assert message.endswith(f"{place} mine/best.pt, a/b/last.pt{pretrained.listing()}")
    assert "is a folder: give mine/best.pt" in refusal(lambda: find("mine"))
    assert "is a folder: give a/b/last.pt" in refusal(lambda: find("a/b"))
    assert refusal(lambda: find("")) == "--model_name is empty"
    message = refusal(lambda: find_checkpoint("--resume", "mien", "out", "last.pt"))
    assert message.endswith("there is mine/last.pt, a/b/last.pt")
    assert "does not exist" in refusal(
        lambda: find_checkpoint("--resume", "photos", "out", "last.pt")
    )
    message = refusal(lambda: find_checkpoint("--resume", "mine", "out", "last.pt"))
    assert "is a folder: give mine/last.pt" in message

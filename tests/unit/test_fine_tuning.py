"""A run that starts from the weights of another: --pretrained with a checkpoint of ours."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from pathlib import Path
from types import SimpleNamespace
from typing import Any, cast

import pytest
import torch

from modules import Autoencoder
from modules.quantizers.registry import QUANTIZERS
from modules.registry import MODELS, make_model
from tests.conftest import Outcome, refusal
from tests.scripts.test_cli import error_line, train
from tests.scripts.test_vqgan import WORDS, Features, write_pictures
from tests.unit.test_checkpoint import GOLDEN
from utils.checkpoints.checkpoint import read_checkpoint, save_checkpoint
from utils.checkpoints.pretrained import load_pretrained
from utils.flags.arguments import build_model_config, resolve
from utils.report.files import Found
from utils.report.tables import trained as trained_rows

Script = Callable[..., Outcome]
NETWORKS: dict[str, dict[str, Any]] = {
    "vqvae": {"hidden_size": 24, "num_residual_hidden": 4},
    "dct": {"model": "dct", "hidden_size": 8, "num_residual_hidden": 4, "latent_channels": 12},
    "vqgan": {
        **{"model": "vqgan", "hidden_size": 8, "channel_multipliers": "1,2"},
        **{"num_residual_layers": 1, "attention_levels": 0, "latent_channels": 12},
    },
}


def trained(network: str, path: Path, **flags: Any) -> Autoencoder:
    """Save a model whose quantiser has seen two batches."""
    spec = QUANTIZERS[flags.get("quantizer", "looc")]
    for package in (spec.library, MODELS[network].library):
        if package:
            pytest.importorskip(package.replace("-", "_"))
    known = {**NETWORKS[network], "num_embedding": 64}
    if not spec.any_channels:
        known["latent_channels"] = None
    if "num_embedding" not in spec.reads:
        del known["num_embedding"]
    model = make_model(build_model_config({**known, **flags}, 1))
    for _ in range(2):
        model(torch.rand(2, 1, 16, 16) * 2 - 1)
    save_checkpoint(path, model, {})
    return model.eval()


def started(**flags: Any) -> Autoencoder:
    """Make the model of a run with these flags."""
    flags, pretrained = resolve(flags)
    model = make_model(build_model_config(flags, 1))
    assert pretrained is not None
    load_pretrained(model, pretrained)
    return model.eval()


def differing(one: Autoencoder, other: Autoencoder) -> set[str]:
    """The parts of two models that are not equal."""
    ours, theirs = one.state_dict(), other.state_dict()
    equal = {n for n in ours.keys() & theirs if torch.equal(ours[n], theirs[n])}
    return {name.rpartition(".")[0].removesuffix(".library") for name in ours.keys() - equal}


@pytest.mark.parametrize("quantizer", QUANTIZERS)
@pytest.mark.parametrize("network", NETWORKS)
def test_a_run_starts_from_the_whole_model(network: str, quantizer: str, tmp_path: Path) -> None:
    path, images = tmp_path / "m.pt", torch.rand(2, 1, 16, 16)
    model = trained(network, path, quantizer=quantizer)
    ours = started(pretrained=str(path), recipe="best")
    assert not differing(model, ours)
    assert torch.equal(ours(images)[0], model(images)[0])
    assert ours.config.channels == model.config.channels
    fresh = started(pretrained=str(path), new_quantizer=True)
    assert {name.partition(".")[0] for name in differing(fresh, model)} <= {"quantizer"}


def test_flags_that_contradict_the_checkpoint(tmp_path: Path) -> None:
    path = tmp_path / "m.pt"
    trained("vqvae", path, latent_norm="running")
    for flags, told in (
        ({"num_embedding": 32}, f"--num_embedding 32 contradicts {path}, which has 64"),
        ({"quantizer": "vq"}, f"--quantizer vq contradicts {path}, which has looc"),
        ({"hidden_size": 8, "new_quantizer": True}, f"8 contradicts {path}, which has 24"),
        ({"model": "vqgan", "new_quantizer": True}, "--model vqgan contradicts"),
    ):
        assert told in refusal(partial(started, pretrained=str(path), **flags))
    resized = started(pretrained=str(path), num_embedding=32, new_quantizer=True)
    assert (resized.config.num_embedding, resized.config.latent_norm) == (32, "running")


def test_another_quantiser_in_the_same_network(tmp_path: Path) -> None:
    path = tmp_path / "m.pt"
    model = trained("vqvae", path, latent_norm="running", rate_weight=0.1, distance="l2")
    words = {"pretrained": str(path), "new_quantizer": True}
    other = started(**words, quantizer="none")
    assert (other.config.latent_norm, other.config.channels) == ("none", 24)
    assert {name for name in differing(other, model) if not name.startswith("quantizer")} == set()
    other = started(**words, latent_channels=8)
    around = {"pre_vq_conv", "decoder.conv_1"}
    assert {n for n in differing(other, model) if not n.startswith("quantizer")} == around


def test_a_new_quantiser_is_that_of_the_recipe(tmp_path: Path) -> None:
    """Where --recipe is given; flags that are given override it."""
    path = tmp_path / "m.pt"
    trained("vqvae", path, latent_norm="running", commitment_cost=0.5)
    words = {"pretrained": str(path), "recipe": "best", "distance": "cos"}
    config = started(**words, new_quantizer=True).config
    assert (config.latent_norm, config.codebook_update, config.distance) == ("batch", "ema", "cos")
    assert config.commitment_cost == 0.5
    assert started(**words).config.latent_norm == "running"


def test_sizes_that_follow_from_those_given(tmp_path: Path) -> None:
    trained("vqvae", tmp_path / "m.pt", quantizer="fsq", num_embedding=60, levels="5,4,3")
    words = {"pretrained": str(tmp_path / "m.pt"), "new_quantizer": True}
    config = started(**words, levels="8,5").config
    assert (config.num_embedding, config.embedding_dim) == (40, 2)
    assert started(**words).config.levels == "5,4,3"


def test_a_state_dict_of_the_reference() -> None:
    """Flags complete what its shapes do not show."""
    path = GOLDEN / "checkpoint_looc.pt"
    reference = read_checkpoint(path, {"distance": "l2"})
    flags, pretrained = resolve({"pretrained": str(path), "distance": "l2"})
    assert pretrained is not None
    model = make_model(build_model_config(flags, reference.model_config.in_channels))
    load_pretrained(model, pretrained)
    assert model.config.distance == "l2"
    assert not differing(reference.model(), model)


def test_fine_tuning(script: Script, mnist: Path, tmp_path: Path) -> None:
    """Every refusal names the way, and the way works, with other images and a fresh schedule."""
    train(script, mnist, "--weight_ema", "0.9", "--recipe", "best", name="old")
    best, last = (f"out/models/old/{name}.pt" for name in ("best", "last"))
    way = f"--pretrained {last} starts from its weights"
    for name, words in (("old", ("--lr", "1e-4")), ("new", ("--resume", last, "--lr", "1e-4"))):
        assert way in error_line(train(script, mnist, *words, name=name))
    told = error_line(train(script, mnist, "--resume", best, name="new"))
    assert f"{last} continues the run, --pretrained {best} starts from its weights" in told
    told = error_line(train(script, mnist, "--resume", str(GOLDEN / "checkpoint_looc.pt")))
    assert f"--pretrained {GOLDEN / 'checkpoint_looc.pt'} starts from its weights" in told

    command = (
        *("main.py", "--output_folder", "out", "--exp_name", "new", "--device", "cpu"),
        *("--pretrained", "old/best.pt", "--lr", "1e-9", "--batch_size", "512"),
    )
    outcome = script(*command, "--max_steps", "1")
    assert outcome.code == 0, outcome.err
    assert f"starting from {best}\n" in outcome.err
    old, new = (read_checkpoint(tmp_path / f"out/models/{name}/best.pt") for name in ("old", "new"))
    assert new.model_config.latent_norm == "batch"
    assert new.count("step") == 1
    for name, weight in old.state_dict.items():
        if not name.startswith("quantizer."):  # which one step moves
            torch.testing.assert_close(new.state_dict[name], weight, rtol=0, atol=1e-7)
    outcome = script(*(word.replace("best", "last") for word in command), "--max_steps", "2")
    assert "began with --pretrained old/best.pt; old/last.pt is not used" in outcome.err
    assert "resumed out/models/new/last.pt at step 1" in outcome.err
    plain = train(script, mnist, name="plain")
    assert plain.code == 0, plain.err
    begin = ("--pretrained", "plain/best.pt", "--recipe", "best", "--distance", "cos")
    told = train(script, mnist, *begin, name="tuned").err
    assert "; of --recipe best it overrides --latent_norm none, --codebook_update" in told
    assert "--distance" not in told.split("overrides")[1].splitlines()[0]
    assert "overrides" not in train(script, mnist, *begin, "--new_quantizer", name="other").err
    (tmp_path / "out/models/plain").rename(tmp_path / "away")
    for name, more in (("tuned", ()), ("other", ("--new_quantizer",))):
        told = train(script, mnist, *begin, *more, "--max_steps", "4", name=name).err
        assert f"resumed out/models/{name}/last.pt at step 3" in told
        told = error_line(train(script, mnist, *begin, *more, "--overwrite", name=name))
        assert "--pretrained plain/best.pt does not exist" in told
    told = error_line(train(script, mnist, "--pretrained", best, "--overwrite", name="old"))
    assert f"--overwrite would remove --pretrained {best}; choose another --exp_name" in told
    told = error_line(train(script, mnist, "--pretrained", best, name="old"))
    assert f"--pretrained {best} (it has none)" in told
    told = error_line(train(script, mnist, "--pretrained", last, "--resume", last, name="f"))
    assert f"--pretrained {last} contradicts --resume {last}" in told
    told = error_line(train(script, mnist, "--pretrained", best, "--resume", last, name="f"))
    assert f"--pretrained {best} contradicts --resume {last}" in told
    assert (tmp_path / best).exists()
    assert "--new_quantizer needs --pretrained" in error_line(script("main.py", "--new_quantizer"))


@pytest.mark.parametrize("network", ["vqvae", "dct"])
def test_lpips_and_a_discriminator_after_the_mean_squared_error(
    network: str, script: Script, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Neither is made without its weight; a run that had none is not resumed with one."""
    write_pictures(tmp_path / "pictures")
    data = (
        *("main.py", "--dataset", "folder", "--data_folder", "pictures", "--image_size", "16"),
        *("--num_workers", "0", "--batch_size", "4"),
    )
    words = (*data, *words_of({"model": network, **NETWORKS[network]}), "--exp_name", "plain")
    monkeypatch.setattr("utils.training.losses.perceptual.lpips_network", None)
    assert script(*words, "--max_steps", "1").code == 0
    last = tmp_path / "output/models/plain/last.pt"
    content = torch.load(last, weights_only=True)
    assert not {"discriminator", "discriminator_optimizer"} & content.keys()
    assert labels(last)[-1] == "best validation PSNR"
    del content["objective_config"]  # as before these networks had such losses
    torch.save(content, last)
    switched = ("--max_steps", "2", "--disc_weight", "0.2", "--disc_layers", "1")
    told = error_line(script(*words, *switched))
    assert "--disc_weight 0.2 (it has 0.0)" in told
    outcome = script(*words, "--max_steps", "2")
    assert "resumed" in outcome.err, outcome.err

    lpips = SimpleNamespace(module=Features())
    monkeypatch.setattr("utils.training.losses.perceptual.lpips_network", lambda *_, **__: lpips)
    weights = ("--perceptual_weight", "0.2", "--disc_weight", "0.2", "--disc_layers", "1")
    tuned = (*data, *weights, "--disc_start", "0", "--disc_channels", "4", "--max_steps", "2")
    outcome = script(*tuned, "--exp_name", "tuned", "--pretrained", "plain/best.pt")
    assert outcome.code == 0, outcome.err
    assert "starting from output/models/plain/best.pt; new: discriminator\n" in outcome.err
    assert ", reconstruction 0." in outcome.err
    assert ", perceptual " in outcome.err
    best = tmp_path / "output/models/tuned/best.pt"
    assert labels(best)[-1] == "best validation MSE / variance + LPIPS"
    assert "discriminator" in read_checkpoint(best).content
    outcome = script(*tuned, "--exp_name", "again", "--pretrained", "tuned/best.pt")
    assert "starting from output/models/tuned/best.pt\n" in outcome.err, outcome.err
    begin = ("--exp_name", "without", "--pretrained", "tuned/best.pt")
    assert script(*data, *begin, "--max_steps", "1").code == 0
    without = read_checkpoint(tmp_path / "output/models/without/last.pt").content
    assert "discriminator" not in without


def words_of(flags: dict[str, Any]) -> list[str]:
    return [word for name, value in flags.items() for word in (f"--{name}", str(value))]


def labels(path: Path) -> list[str]:
    """Names of the report's rows about training."""
    checkpoint = read_checkpoint(path)
    found = SimpleNamespace(checkpoint=checkpoint, stored=lambda name: checkpoint.content[name])
    return [label for label, _, _ in trained_rows(cast(Found, found))]


def test_the_discriminator_is_kept(script: Script, tmp_path: Path) -> None:
    """Unless its size is given and another; its size is that of the checkpoint by default."""
    pytest.importorskip("diffusers")
    write_pictures(tmp_path / "pictures")
    assert script("main.py", *WORDS, "--max_steps", "4").code == 0
    old = read_checkpoint(tmp_path / "output/models/e/best.pt")
    words = (
        *("--dataset", "folder", "--data_folder", "pictures", "--image_size", "16"),
        *("--perceptual_weight", "0", "--num_workers", "0", "--batch_size", "4"),
        *("--max_steps", "1", "--exp_name", "f", "--pretrained", "e/best.pt", "--overwrite"),
    )
    outcome = script("main.py", *words)
    assert outcome.code == 0, outcome.err
    assert "starting from output/models/e/best.pt\n" in outcome.err
    new = read_checkpoint(tmp_path / "output/models/f/best.pt").content
    assert new["objective_config"]["disc_channels"] == 4
    for name, weight in old.content["discriminator"].items():  # before --disc_start it rests
        assert torch.equal(new["discriminator"][name], weight)
    outcome = script("main.py", *words, "--disc_channels", "8")
    assert "starting from output/models/e/best.pt; new: discriminator\n" in outcome.err
    grey = error_line(script("main.py", *words, "--dataset", "fashion-mnist-sample"))
    assert "fashion-mnist-sample" in grey

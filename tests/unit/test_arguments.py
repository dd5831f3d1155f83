"""Every flag is declared once, checked once, and reaches the model under its own name."""

from __future__ import annotations

from dataclasses import fields
from pathlib import Path

import pytest
import torch

from datasets.config import DataConfig
from modules import VQVAE, ModelConfig
from utils.checkpoints.checkpoint import read_checkpoint, save_checkpoint
from utils.errors import UserError
from utils.flags.arguments import (
    build,
    build_model_config,
    flag_fields,
    parse_flags,
    resolve,
    with_recipe,
)
from utils.flags.presets import preset_flags
from utils.flags.recipes import RECIPES
from utils.training.config import TrainConfig
from utils.training.trainer import place

GROUPS = (ModelConfig, DataConfig, TrainConfig)


def parse(*words: str) -> dict[str, object]:
    return parse_flags(None, *GROUPS, argv=words)


def error_of(capsys: pytest.CaptureFixture[str], *words: str) -> str:
    with pytest.raises(SystemExit) as caught:
        parse(*words)
    assert caught.value.code == 2
    lines = capsys.readouterr().err.splitlines()
    assert len(lines) == 1
    return lines[0]


def test_a_flag_goes_straight_to_the_quantiser_and_back(tmp_path: Path) -> None:
    config = build_model_config(parse("--embedding_dim", "8", "--hidden_size", "16"), 1)
    model = VQVAE(config)
    assert model.quantizer.codebook.shape[1] == 8
    save_checkpoint(tmp_path / "m.pt", model, {})
    assert read_checkpoint(tmp_path / "m.pt").model().quantizer.codebook.shape[1] == 8


def test_only_given_flags_are_returned() -> None:
    assert parse() == {}
    assert parse("--num_embedding", "512", "--first_batch") == {
        "num_embedding": 512,
        "first_batch": True,
    }


def test_no_flag_is_declared_twice() -> None:
    names = [item.name for group in GROUPS for item in flag_fields(group)]
    assert len(names) == len(set(names))


def test_defaults_are_the_papers_small_setting() -> None:
    config = build_model_config({}, 1)
    assert (config.quantizer, config.num_embedding, config.embedding_dim) == ("looc", 256, 4)
    assert (config.distance, config.anchor, config.interpolation_scale) == ("cos", "closest", 0)
    assert (config.hidden_size, config.commitment_cost) == (128, 0.25)
    train = TrainConfig()
    assert (train.batch_size, train.num_epochs, train.lr, train.seed) == (1024, 500, 3e-4, 42)


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["--batch_size", "0"], "argument --batch_size: 0 is less than 1"),
        (["--batch_size", "-4"], "argument --batch_size: -4 is less than 1"),
        (["--batch_size", "many"], "argument --batch_size: 'many' is not a whole number"),
        (["--batch_size", "99999999999"], "--batch_size: 99999999999 is greater than 1048576"),
        (["--lr", "0"], "argument --lr: 0.0 is not greater than 0"),
        (["--lr", "nan"], "argument --lr: nan is not a finite number"),
        (["--distance", "angle"], "--distance: choice angle is unknown; choose from cos, l2"),
        (["--anchor", "closset"], "--anchor: choice closset is unknown; did you mean closest?"),
        (["--dataset", "mnst"], "--dataset: choice mnst is unknown; did you mean mnist?"),
        (["--num_embeddings", "5"], "--num_embeddings is unknown; did you mean --num_embedding?"),
        (["--quantizer", "rvq"], "choice rvq is unknown; did you mean residual-vq?"),
        (["--quantizer", "FSQ"], "choice FSQ is unknown; did you mean fsq?"),
        (["--dataset", "fmnist"], "choice fmnist is unknown; did you mean fashion-mnist?"),
        (["--workers", "2"], "--workers is unknown; did you mean --num_workers?"),
        (["stray"], "unexpected argument stray"),
        (["--seed"], "argument --seed: expected one argument"),
        (["--lr=--"], "argument --lr: "),  # what follows depends on the version of Python
        (["a\nb\x1b[31m"], r"unexpected argument a b\x1b[31m"),
    ],
)
def test_wrong_flags_are_one_line(
    words: list[str], message: str, capsys: pytest.CaptureFixture[str]
) -> None:
    assert message in error_of(capsys, *words)


@pytest.mark.parametrize(
    ("words", "message"),
    [
        ("--embedding_dim 5", "--embedding_dim 5 does not divide the 128 channels of --hidden_s"),
        ("--hidden_size 7 --embedding_dim 7", "--hidden_size 7 is odd"),
        ("--embedding_dim 7 --interpolation_scale 2", "--embedding_dim 7 does not divide"),
        ("--contras_loss --codebook_update ema", "--contras_loss has no effect with --codebook_up"),
        ("--latent_norm unit --embedding_dim 1", "--latent_norm unit turns all units"),
        ("--rate_weight 0.5", "--rate_weight 0.5 needs --distance l2, not cos"),
        ("--quantizer fsq --dead_code_threshold 2", "--dead_code_threshold 2 has no effect with"),
        ("--quantizer cvq --interpolation_scale 2", "--interpolation_scale 2 needs --quantizer"),
        ("--quantizer vq --anchor closest", "--anchor closest has no effect with --quantizer vq"),
    ],
)
def test_contradicting_flags_are_named(words: str, message: str) -> None:
    with pytest.raises(UserError, match=message):
        build_model_config(parse(*words.split()), 1)


def test_what_a_quantiser_implies_can_be_overridden() -> None:
    plain = build_model_config({"quantizer": "vq"}, 1)
    assert (plain.distance, plain.anchor, plain.channels) == ("l2", "none", 4)
    assert build_model_config({"quantizer": "vq", "distance": "cos"}, 1).distance == "cos"


def test_every_model_field_is_a_flag_but_the_channels() -> None:
    hidden = {item.name for item in fields(ModelConfig)} - {
        item.name for item in flag_fields(ModelConfig)
    }
    assert hidden == {"in_channels"}


def test_a_recipe_fills_the_flags_that_were_not_given() -> None:
    best = with_recipe(parse("--recipe", "best", "--lr", "5e-4", "--latent_norm", "unit"))
    assert (best["lr"], best["latent_norm"]) == (5e-4, "unit")
    assert (best["codebook_update"], best["schedule"]) == ("ema", "wsd")
    assert with_recipe(parse("--recipe", "paper")) == {"recipe": "paper"}
    for recipe in RECIPES:
        flags = with_recipe({"recipe": recipe})
        build(TrainConfig, flags)
        build_model_config(flags, 1)


def test_flags_are_completed_in_a_fixed_order(tmp_path: Path) -> None:
    """Command line, preset, own defaults of the quantiser, recipe."""
    preset = tmp_path / "preset.txt"
    preset.write_text("# a comment\n--quantizer vq --recipe best --lr 1 --seed 5 --anchor none\n")
    flags, pretrained = resolve({"preset": str(preset), "seed": 6}, *GROUPS)
    assert pretrained is None
    assert (flags["seed"], flags["lr"], flags["schedule"]) == (6, 1, "wsd")
    assert (flags["distance"], flags["codebook_update"]) == ("l2", "ema")
    assert "batch_size" not in flags


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ("\ufeff--lr 1", ["--lr", "1"]),  # a byte-order mark
        ("--flip # mirrored, don't\n#--lr 2\n\n--lr 1", ["--flip", "--lr", "1"]),
        (r"--data_folder C:\data\pics", ["--data_folder", r"C:\data\pics"]),
        (
            "--data_folder 'the # 1' --exp_name a#b",
            ["--data_folder", "the # 1", "--exp_name", "a#b"],
        ),
        ("--lr \\\n  1", ["--lr", "1"]),
    ],
)
def test_the_words_of_a_preset(text: str, words: list[str], tmp_path: Path) -> None:
    path = tmp_path / "preset.txt"
    path.write_text(text, encoding="utf-8")
    assert preset_flags(str(path), None, lambda **given: {"words": given["argv"]})["words"] == words


def test_home_is_found_where_the_shell_left_it(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("HOME", "/home/ann")
    preset = tmp_path / "preset.txt"
    preset.write_text("--image_cache ~/cache --resume ~/old.pt")
    flags, _ = resolve(parse("--output_folder=~/out", f"--preset={preset}"), *GROUPS)
    assert flags["output_folder"] == "/home/ann/out"
    assert (flags["image_cache"], flags["resume"]) == ("/home/ann/cache", "/home/ann/old.pt")
    for text in ("./~", "~root", "~root/x"):
        assert parse(f"--data_folder={text}")["data_folder"] == text
    assert parse("--data_folder=~")["data_folder"] == "/home/ann"


def test_a_recipe_leaves_what_the_quantiser_implies() -> None:
    plain = with_recipe({"recipe": "best", "quantizer": "vq"})
    assert (plain["anchor"], plain["codebook_update"]) == ("none", "ema")
    scalar = with_recipe({"recipe": "best", "quantizer": "fsq"})
    assert "codebook_update" not in scalar
    assert (scalar["schedule"], build_model_config(scalar, 1).levels) == ("wsd", "4,4,4,4")


@pytest.mark.parametrize(
    ("flags", "device", "cuda", "precision"),
    [
        ("fpu amx_bf16 avx512f amx_tile", "auto", False, "bf16"),
        ("fpu amx_bf16 avx512f amx_tile", "cpu", True, "bf16"),
        ("fpu amx_bf16 avx512f amx_tile", "auto", True, "fp32"),
        ("fpu avx512_bf16 amx_int8", "auto", False, "fp32"),
    ],
)
def test_automatic_precision_is_bf16_with_amx(
    flags: str, device: str, cuda: bool, precision: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(Path, "exists", lambda _: True)
    monkeypatch.setattr(Path, "read_text", lambda _: f"model name\t: x\nflags\t\t: {flags}\n")
    monkeypatch.setattr(torch.cuda, "is_available", lambda: cuda)
    config = TrainConfig(precision="auto", device=device)
    assert config.precision == precision
    where = {"bf16": "cpu in bf16", "fp32": "cpu"}[precision]
    assert place(config, torch.device("cpu")) == where
    assert TrainConfig().precision == "fp32"

"""generate.py as a user calls it: train a prior on the codes of a first stage, draw samples."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from modules.quantizers.registry import QUANTIZERS
from tests.conftest import Outcome, write_idx
from tests.processes import limited_files, run_ranks
from tests.unit.test_report import Page
from utils.checkpoint import load_model

Script = Callable[..., Outcome]
STAGE = (
    *("main.py", "--dataset", "mnist", "--recipe", "best", "--hidden_size", "8"),
    *("--num_residual_hidden", "4", "--num_embedding", "8", "--latent_channels", "8"),
    *("--batch_size", "12", "--lr", "0.02", "--warmup_steps", "0", "--device", "cpu"),
    *("--exp_name", "stage"),
)
TRAIN = (
    *("generate.py", "train", "--first_stage", "stage/best.pt", "--width", "8", "--layers", "1"),
    *("--heads", "2", "--depth_layers", "1", "--batch_size", "12", "--device", "cpu"),
    *("--exp_name", "prior"),
)
SHAPE = TRAIN.index("--width")
DIFFUSION = (
    *(*TRAIN[:SHAPE], *TRAIN[TRAIN.index("--batch_size") :], "--prior", "diffusion"),
    *("--unet_channels", "8", "--unet_blocks", "1", "--unet_head_channels", "8"),
)
SAMPLE = ("generate.py", "sample", "--model_name", "prior/best.pt", "--device", "cpu")


@pytest.fixture
def stage(script: Script, mnist: Path) -> Path:
    """The output folder of a first stage."""
    assert script(*STAGE, "--max_steps", "20").code == 0
    return mnist.parents[1] / "output"


def pictures(folder: Path) -> dict[str, np.ndarray]:
    return {path.name: np.asarray(Image.open(path)) for path in folder.glob("0*.png")}


def same(first: dict[str, np.ndarray], second: dict[str, np.ndarray]) -> bool:
    assert first
    return first.keys() == second.keys() and all(
        np.array_equal(first[name], second[name]) for name in first
    )


@pytest.mark.parametrize("prior", ["transformer", "masked"])
def test_from_images_to_new_images(script: Script, stage: Path, prior: str) -> None:
    trained = script(*TRAIN, "--prior", prior, "--max_steps", "6", "--flip")
    assert trained.code == 0, trained.err
    assert "36 training images of mnist as 7×7×2 codes" in trained.err
    assert " bits per pixel, entropy of the codes " in trained.err
    drawn = script(*SAMPLE, "--num_samples", "5")
    assert drawn.code == 0, drawn.err
    folder = stage / "samples" / "prior" / "best"
    first = pictures(folder)
    assert sorted(first) == [f"{number:08d}.png" for number in range(5)]
    assert first["00000000.png"].shape == (28, 28)
    assert not np.array_equal(first["00000000.png"], first["00000001.png"])
    assert Image.open(folder / "grid.png").width >= 5 * 28
    report = Page(folder / "report.html")
    assert f"5 images drawn from the {prior} prior output/models/prior/best.pt" in report.text
    for words in ("main.py --dataset mnist", "generate.py train --first", "generate.py sample"):
        assert words in report.text
    assert "7×7×2 codes of K = 8 0.375 bits per pixel nominal" in report.text
    assert {"Likelihood as a table", "Likelihood of masked codes as a table"} & set(report.words)
    # More of the same: those that are there stay, and the batches do not matter.
    before = (folder / "00000004.png").stat().st_mtime_ns
    assert script(*SAMPLE, "--num_samples", "9", "--batch_size", "3").code == 0
    assert (folder / "00000004.png").stat().st_mtime_ns == before
    more = pictures(folder)
    assert len(more) == 9
    assert same(first, {name: more[name] for name in first})
    assert script(*SAMPLE, "--num_samples", "9", "--overwrite").code == 0
    assert same(pictures(folder), more)
    refused = script(*SAMPLE, "--temperature", "0.5")
    assert refused.code == 2
    assert "with --temperature 1.0, not 0.5; give --overwrite" in refused.err
    assert same(pictures(folder), more)


def test_classes(script: Script, stage: Path, mnist: Path) -> None:
    labels = mnist / "MNIST" / "raw" / "train-labels-idx1-ubyte"
    write_idx(labels, (np.arange(40) % 10).astype(np.uint8))
    trained = script(*TRAIN, "--class_conditional", "--max_steps", "20", "--lr", "0.02")
    assert trained.code == 0, trained.err
    content = torch.load(stage / "models" / "prior" / "best.pt", weights_only=True)
    assert content["classes"][3] == "3 - three"
    assert content["model"]["classes.weight"].shape == (11, 8)
    folder = stage / "samples" / "prior" / "best"
    assert script(*SAMPLE, "--num_samples", "11").code == 0
    everything = pictures(folder)
    words = ("--num_samples", "11", "--overwrite", "--label")
    assert script(*SAMPLE, *words, "0").code == 0
    zeros = pictures(folder)
    # All classes in turn: the first and the eleventh are of class 0.
    alike = [name for name in zeros if np.array_equal(everything[name], zeros[name])]
    assert {"00000000.png", "00000010.png"} <= set(alike)
    assert len(alike) < 11
    guided = script(*SAMPLE, *words, "0", "--guidance", "4")
    assert guided.code == 0, guided.err
    assert not same(pictures(folder), zeros)
    assert "has the classes 0 to 9" in script(*SAMPLE, *words, "10").err
    labels.unlink()
    refused = script(*TRAIN, "--class_conditional", "--exp_name", "other")
    assert refused.code == 2
    assert f"{labels.name} (or .gz), the labels of" in refused.err


@pytest.mark.parametrize(
    "extra",
    [
        ("--weight_ema", "0.9", "--accumulate", "2"),
        ("--prior", "masked", "--precision", "bf16"),
    ],
)
def test_resumed_is_as_uninterrupted(script: Script, stage: Path, extra: tuple[str, ...]) -> None:
    train = (*TRAIN, *extra)
    assert script(*train, "--max_steps", "5").code == 0
    resumed = script(*train, "--max_steps", "9")
    assert "resumed" in resumed.err
    assert script(*train, "--max_steps", "9", "--exp_name", "whole").code == 0
    first, second = (
        torch.load(stage / "models" / name / "last.pt", weights_only=True)
        for name in ("prior", "whole")
    )
    assert first["step"] == second["step"] == 9
    assert first["model"].keys() == second["model"].keys()
    for name in first["model"]:
        assert torch.equal(first["model"][name], second["model"][name])
    for name in first.get("trained", ()):
        assert torch.equal(first["trained"][name], second["trained"][name])


def test_pretrained(script: Script, stage: Path) -> None:
    assert script(*TRAIN, "--max_steps", "5").code == 0
    words = ("--exp_name", "tuned", "--pretrained", "prior/best.pt", "--max_steps", "1")
    assert script(*TRAIN, *words, "--lr", "1e-9").code == 0
    first, tuned = (
        torch.load(stage / "models" / name / "best.pt", weights_only=True)["model"]
        for name in ("prior", "tuned")
    )
    for name in first:
        assert torch.allclose(first[name], tuned[name], atol=1e-7)
    refused = script(*TRAIN, *words, "--width", "16", "--overwrite")
    assert refused.code == 2
    assert "--pretrained output/models/prior/best.pt is of another architecture" in refused.err
    masked = script(*TRAIN, *words, "--prior", "masked", "--overwrite")
    assert "--prior masked contradicts --pretrained" in masked.err
    refused = script(*TRAIN, "--pretrained", "prior/best.pt", "--overwrite")
    assert "--overwrite would remove --pretrained output/models/prior/best.pt" in refused.err
    assert (stage / "models/prior/best.pt").exists()


def test_two_processes_do_as_one(script: Script, stage: Path, tmp_path: Path) -> None:
    # 36 images: the last batch of an epoch has one, and the second process none.
    train = (*TRAIN, "--dropout", "0", "--max_steps", "6", "--batch_size", "7")
    assert script(*train, "--exp_name", "one").code == 0
    for outcome in run_ranks(train, tmp_path):
        assert outcome.code == 0, outcome.err
    one, two = (
        torch.load(stage / "models" / name / "last.pt", weights_only=True)
        for name in ("one", "prior")
    )
    assert one["best"] == pytest.approx(two["best"], rel=1e-5)
    for name in one["model"]:
        assert torch.allclose(one["model"][name], two["model"][name], atol=1e-5)
    assert script(*SAMPLE, "--num_samples", "7", "--batch_size", "2").code == 0
    folder = stage / "samples" / "prior" / "best"
    alone = pictures(folder)
    # A killed run has left one sample, and the beginning of another.
    for name in alone.keys() - {"00000003.png"}:
        (folder / name).unlink()
    (folder / ".00000001.png.99.tmp").write_bytes(b"\x89PNG")
    kept = (folder / "00000003.png").stat().st_mtime_ns
    together = run_ranks((*SAMPLE, "--num_samples", "7"), tmp_path)
    assert [outcome.code for outcome in together] == [0, 0]
    assert same(pictures(folder), alone)
    assert (folder / "00000003.png").stat().st_mtime_ns == kept
    assert not list(folder.glob(".*"))


def test_codes_are_computed_once(script: Script, stage: Path) -> None:
    with limited_files(2000):
        refused = script(*TRAIN, "--max_steps", "1")
    assert refused.code == 2
    assert "/00000.npy: File too large" in refused.err.strip().splitlines()[-1]
    assert not list((stage / "codes").rglob("*.*"))
    assert script(*TRAIN, "--max_steps", "1").code == 0
    files = sorted((stage / "codes").glob("*/*.npy"))
    assert [len(np.load(path)) for path in files] in ([4, 36], [36, 4])
    times = [path.stat().st_mtime_ns for path in files]
    assert script(*TRAIN, "--max_steps", "1", "--exp_name", "again").code == 0
    assert [path.stat().st_mtime_ns for path in files] == times
    codes = np.load(files[0])
    for damaged in (codes + 8, codes.astype(np.float32), codes[:, :3], codes[:1]):
        np.save(files[0], damaged)
        refused = script(*TRAIN, "--max_steps", "1", "--exp_name", "third")
        assert refused.code == 2
        assert f"{files[0].parent.name}/00000.npy is damaged, remove it" in refused.err
    files[0].write_bytes(b"")
    assert "is damaged" in script(*TRAIN, "--max_steps", "1", "--exp_name", "third").err


def test_latent_diffusion(script: Script, stage: Path, tmp_path: Path) -> None:
    """Trained, resumed, by two processes, and drawn from."""
    pytest.importorskip("diffusers")
    train = (*DIFFUSION, "--flip", "--batch_size", "7")
    assert script(*train, "--max_steps", "4").code == 0
    resumed = script(*train, "--max_steps", "7")
    assert "resumed" in resumed.err
    assert "36 training images of mnist as 7×7 latents of 8 channels" in resumed.err
    assert " denoising loss" in resumed.err
    assert script(*train, "--max_steps", "7", "--exp_name", "whole").code == 0
    for outcome in run_ranks((*train, "--max_steps", "7", "--exp_name", "two"), tmp_path):
        assert outcome.code == 0, outcome.err
    resumed, whole, two = (
        torch.load(stage / "models" / name / "last.pt", weights_only=True)
        for name in ("prior", "whole", "two")
    )
    assert whole["model"]["std"].min() > 0
    assert not torch.equal(whole["model"]["mean"], torch.zeros(8, 1, 1))
    for name in ("model", "trained"):
        for key, value in whole[name].items():
            assert torch.equal(resumed[name][key], value)
            assert torch.allclose(two[name][key], value, atol=1e-4)
    assert two["best"] == pytest.approx(whole["best"], rel=1e-4)
    words = (*SAMPLE, "--sampling_steps", "2")
    for sampler in ("ddim", "ddpm", "dpm-solver++"):
        drawn = script(*words, "--sampler", sampler, "--num_samples", "5", "--overwrite")
        assert drawn.code == 0, drawn.err
        first = pictures(stage / "samples" / "prior" / "best")
    again = ("--sampler", sampler, "--num_samples", "7", "--batch_size", "2", "--overwrite")
    assert script(*words, *again).code == 0
    more = pictures(stage / "samples" / "prior" / "best")
    assert same(first, {name: more[name] for name in first})
    for outcome in run_ranks((*words, *again), tmp_path):
        assert outcome.code == 0, outcome.err
    assert same(pictures(stage / "samples" / "prior" / "best"), more)


def test_diffusion_refuses_what_it_does_not_read(script: Script, stage: Path) -> None:
    pytest.importorskip("diffusers")

    def refused(*words: str) -> str:
        outcome = script(*words)
        assert outcome.code == 2, outcome.err
        assert "Traceback" not in outcome.err
        return outcome.err.strip().splitlines()[-1]

    assert "--heads 2 has no effect with --prior diffusion" in refused(*DIFFUSION, "--heads", "2")
    assert "--unet_blocks 1 has no effect with" in refused(*TRAIN, "--unet_blocks", "1")
    assert script(*DIFFUSION, "--max_steps", "1").code == 0
    other = ("--exp_name", "tuned", "--pretrained", "prior/best.pt", "--unet_head_channels", "4")
    line = refused(*DIFFUSION, *other)
    assert "--unet_head_channels 4 contradicts --pretrained" in line
    assert "has 8" in line
    for words in (("--top_k", "3"), ("--temperature", "0.5"), ("--rounds", "3")):
        line = refused(*SAMPLE, *words)
        assert f"{' '.join(words)} has no effect with a diffusion prior" in line
    repeated = ("--inpaint", "left", "--sampler", "dpm-solver++")
    assert "--inpaint left contradicts --sampler dpm-solver++" in refused(*SAMPLE, *repeated)
    assert "--sampling_steps 30 does not divide the 1000" in refused(
        *SAMPLE, "--sampling_steps", "30"
    )
    test = ("test.py", "--model_name", "stage/best.pt", "--device", "cpu", "--save_codes")
    line = refused(*test, "--prior", "prior/best.pt")
    assert "is diffusion, which has no likelihood" in line
    path = sorted(stage.glob("latents/*/*.npy"))[0]
    np.save(path, np.load(path).astype(np.float32))
    assert "is damaged, remove it: it holds float32" in refused(
        *DIFFUSION, "--exp_name", "other", "--max_steps", "1"
    )


FLAGS = {"fsq": ("--levels", "5,5"), "none": ()}  # the others have K = 16


@pytest.mark.parametrize("quantizer", QUANTIZERS)
@pytest.mark.usefixtures("mnist")
def test_every_quantiser(script: Script, quantizer: str) -> None:
    if QUANTIZERS[quantizer].library:
        pytest.importorskip("vector_quantize_pytorch")
    flags = FLAGS.get(quantizer, ("--num_embedding", "16"))
    words = ("--dataset", "mnist", "--quantizer", quantizer, *flags, "--hidden_size", "8")
    small = ("--num_residual_hidden", "4", "--batch_size", "12", "--device", "cpu")
    run = script("main.py", *words, *small, "--max_steps", "2", "--exp_name", "stage")
    assert run.code == 0, run.err
    trained = script(*TRAIN, "--max_steps", "2")
    if quantizer == "none":
        assert trained.code == 2
        assert trained.err.count("\n") == 1, trained.err
        assert "--first_stage output/models/stage/best.pt: --quantizer none has no" in trained.err
        assert not Path("output/models/prior").exists()
        return
    assert trained.code == 0, trained.err
    model = load_model("output/models/stage/best.pt")
    assert f"{model.config.num_slots} codes of K = {model.config.num_embedding}" in trained.err
    drawn = script(*SAMPLE, "--num_samples", "2")
    assert drawn.code == 0, drawn.err
    assert len(pictures(Path("output/samples/prior/best"))) == 2


def test_one_line_for_what_cannot_be_done(script: Script, stage: Path) -> None:
    def refused(*words: str) -> str:
        outcome = script(*words)
        assert outcome.code == 2, outcome.err
        assert "Traceback" not in outcome.err
        return outcome.err.strip().splitlines()[-1]

    assert "give train, sample or export first, not ''" in refused("generate.py")
    assert "not 'draw'" in refused("generate.py", "draw")
    assert "--first_stage is missing" in refused("generate.py", "train")
    assert "other/best.pt does not exist" in refused(*TRAIN, "--first_stage", "other/best.pt")
    assert "--heads 3 does not divide --width 8" in refused(*TRAIN, "--heads", "3")
    assert "--skip_bad_images has no effect" in refused(*TRAIN, "--skip_bad_images")
    assert "is not a prior" in refused(*SAMPLE, "--model_name", "stage/best.pt")
    assert "--model_name is missing" in refused("generate.py", "sample")
    assert script(*TRAIN, "--max_steps", "2").code == 0
    assert "is not a prior" in refused(*TRAIN, "--exp_name", "stage")
    assert "other flags: --width 16 (it has 8)" in refused(*TRAIN, "--width", "16")
    prior = stage / "models" / "prior" / "last.pt"
    told = f"{prior} is a prior; give its first stage: {stage / 'models/stage/best.pt'}"
    data = STAGE[1 : STAGE.index("--exp_name")]
    assert told in refused("test.py", "--model_name", str(prior), "--device", "cpu")
    for flag in ("--pretrained", "--resume"):
        assert told in refused("main.py", *data, flag, str(prior), "--exp_name", "other")
    large = refused(*TRAIN, "--exp_name", "large", "--width", "16384", "--layers", "64")
    assert "--layers 64, --width 16384: a prior of 7×7×2 codes of K = 8 has 208," in large
    assert "GB for them, cpu has" in large
    assert "--label 3" in refused(*SAMPLE, "--label", "3")
    assert "has no classes" in refused(*SAMPLE, "--guidance", "2")
    assert "--rounds 3 has no effect with a transformer" in refused(*SAMPLE, "--rounds", "3")
    assert "needs --class_conditional" in refused(*TRAIN, "--label_dropout", "0.5")
    assert "--top_k 9: " in refused(*SAMPLE, "--top_k", "9")
    # The first stage is trained further, then it is gone.
    assert script(*STAGE, "--max_steps", "24").code == 0
    stage.joinpath("models", "stage", "last.pt").replace(stage / "models" / "stage" / "best.pt")
    assert "is not the first stage of" in refused(*SAMPLE)
    changed = refused(*TRAIN, "--max_steps", "4")
    assert "is a prior of another --first_stage" in changed
    (stage / "models" / "stage" / "best.pt").unlink()
    assert "does not exist: give --first_stage" in refused(*SAMPLE)


def test_the_settings_lie_beside_the_samples(script: Script, stage: Path) -> None:
    assert script(*TRAIN, "--max_steps", "2").code == 0
    assert script(*SAMPLE, "--num_samples", "1", "--seed", "7").code == 0
    record = stage / "samples" / "prior" / "best" / "samples.json"
    assert json.loads(record.read_text())["seed"] == 7
    for damage in ("[]", "[" * 100_000, "x", "\0"):
        record.write_text(damage)
        assert "is damaged; --overwrite" in script(*SAMPLE, "--num_samples", "1").err
    assert script(*SAMPLE, "--num_samples", "2", "--overwrite").code == 0
    picture = record.with_name("00000001.png")
    Image.new("L", (5, 5)).save(picture)
    differs = script(*SAMPLE, "--num_samples", "2")
    assert differs.code == 2
    assert "00000001.png cannot be decoded: it differs from 00000000.png in size" in differs.err
    picture.write_bytes(b"")
    damaged = script(*SAMPLE, "--num_samples", "2")
    assert "00000001.png cannot be decoded: it is empty, damaged or none" in damaged.err
    picture.unlink()
    assert script(*SAMPLE, "--num_samples", "2").code == 0
    record.unlink()
    assert "holds pictures without samples.json" in script(*SAMPLE, "--num_samples", "1").err
    assert script(*SAMPLE, "--num_samples", "3", "--overwrite").code == 0
    assert "keeps 3 samples of an earlier run" in script(*SAMPLE, "--num_samples", "2").err
    assert script(*TRAIN, "--max_steps", "2", "--lr", "0.05", "--overwrite").code == 0
    assert "holds samples of another prior" in script(*SAMPLE, "--num_samples", "3").err


@pytest.mark.parametrize("classes", [True, False])
def test_folders_of_pictures(script: Script, tmp_path: Path, classes: bool) -> None:
    random = np.random.default_rng(0)
    for number in range(24):
        folder = tmp_path / "pictures" / (f"class{number % 2}" if classes else "")
        folder.mkdir(parents=True, exist_ok=True)
        pixels = random.integers(0, 256, (20, 24, 3), np.uint8)
        Image.fromarray(pixels).save(folder / f"{number}.png")
    flags = [word for word in STAGE if word not in ("--dataset", "mnist")]
    flags += ["--data_folder", "pictures", "--image_size", "16", "--num_workers", "0"]
    assert script(*flags, "--max_steps", "2").code == 0
    conditional = ("--class_conditional",) if classes else ()
    trained = script(*TRAIN, *conditional, "--max_steps", "2")
    assert trained.code == 0, trained.err
    assert script(*SAMPLE, "--num_samples", "2").code == 0
    if not classes:
        refused = script(*TRAIN, "--class_conditional", "--exp_name", "other")
        assert refused.code == 2
        assert "--class_conditional: the images" in refused.err


def test_a_prior_codes_the_indices(script: Script, stage: Path) -> None:
    pytest.importorskip("constriction")
    assert script(*TRAIN, "--max_steps", "60", "--lr", "0.02").code == 0
    test = ("test.py", "--model_name", "stage/best.pt", "--device", "cpu", "--data_split", "train")
    folder = stage / "results" / "stage" / "best"
    assert script(*test, "--save_codes").code == 0
    plain = json.loads((folder / "mnist-train" / "analysis.json").read_text())["rate"]
    saved = script(*test, "--save_codes", "--prior", "prior/best.pt")
    assert saved.code == 0, saved.err
    coded = json.loads((folder / "mnist-train" / "analysis.json").read_text())["rate"]
    assert coded["coded_bits_per_pixel"] < plain["coded_bits_per_pixel"]
    assert "coded_tables" not in coded
    assert coded["entropy_bits_per_pixel"] == plain["entropy_bits_per_pixel"]
    codes = stage / "codes.looc"
    (folder / "mnist-train" / "codes.looc").replace(codes)
    back = (
        "test.py",
        "--model_name",
        "stage/best.pt",
        "--device",
        "cpu",
        "--from_codes",
        str(codes),
    )
    restored = script(*back, "--prior", "prior/best.pt")
    assert restored.code == 0, restored.err
    [rec] = [path for path in folder.glob("*/rec") if path.parent.name != "mnist-train"]
    assert len(pictures(rec)) == 40
    assert same(pictures(rec), pictures(folder / "mnist-train" / "rec"))

    def refused(*words: str) -> str:
        outcome = script(*words)
        assert outcome.code == 2, outcome.err
        return outcome.err

    assert "was coded by the --prior of digest" in refused(*back)
    assert "needs --save_codes or --from_codes" in refused(*test, "--prior", "prior/best.pt")
    assert "is not a prior" in refused(*back, "--prior", "stage/best.pt")
    assert script(*TRAIN, "--exp_name", "other", "--max_steps", "1", "--prior", "masked").code == 0
    assert "is masked, which has no likelihood" in refused(*back, "--prior", "other/best.pt")
    assert script(*TRAIN, "--exp_name", "third", "--max_steps", "1").code == 0
    assert "digest" in refused(*back, "--prior", "third/best.pt")
    codes.write_bytes(codes.read_bytes()[:-40] + bytes(40))
    assert "truncated or damaged" in refused(*back, "--prior", "prior/best.pt")


@pytest.mark.parametrize("prior", ["transformer", "masked"])
def test_pictures_are_edited(script: Script, stage: Path, tmp_path: Path, prior: str) -> None:
    assert script(*TRAIN, "--prior", prior, "--max_steps", "20", "--lr", "0.02").code == 0
    samples = stage / "samples" / "prior"
    # Without --images: the first ten test images.
    drawn = script(*SAMPLE, "--inpaint", "right")
    assert drawn.code == 0, drawn.err
    assert "80 images edited by" in Page(samples / "best-inpaint" / "report.html").text
    inpainted = pictures(samples / "best-inpaint")
    assert len(inpainted) == 8 * 10
    assert script(*SAMPLE, "--inpaint", "left", "--overwrite").code == 0
    assert not same(pictures(samples / "best-inpaint"), inpainted)
    # Two pictures in turn; batches and processes do not matter.
    ramp = np.tile(np.linspace(0, 255, 28).astype(np.uint8), (28, 1))
    for name, pixels in (("a", ramp), ("b", ramp[:, ::-1])):
        Image.fromarray(pixels).save(tmp_path / f"{name}.png")
    images = ("--images", "a.png", "b.png")
    vary = (*SAMPLE, *images, "--vary", "0.3", "--num_samples")
    assert script(*vary, "5").code == 0
    varied = pictures(samples / "best-vary")
    assert len(varied) == 5
    outcomes = run_ranks((*vary, "9", "--batch_size", "2"), tmp_path)
    assert [outcome.code for outcome in outcomes] == [0, 0]
    more = pictures(samples / "best-vary")
    assert len(more) == 9
    assert script(*vary, "9", "--overwrite").code == 0
    assert same(pictures(samples / "best-vary"), more)
    assert same(varied, {name: more[name] for name in varied})
    [first, second, third] = [more[f"{number:08d}.png"].astype(int) for number in range(3)]
    assert not np.array_equal(first, third)
    assert np.abs(first - third).mean() < np.abs(first - second).mean()
    refused = script(*SAMPLE, *images, "--vary", "0.4")
    assert refused.code == 2
    assert "with --vary 0.3, not 0.4; give --overwrite" in refused.err
    refused = script(*SAMPLE, "--images", "a.png", "--vary", "0.3")
    assert "with --images 2 pictures of digest" in refused.err
    # Between two pictures the first ones resemble the first.
    between = script(*SAMPLE, *images, "--interpolate", "6", "--vary", "0.1")
    assert between.code == 0, between.err
    steps = pictures(samples / "best-interpolate")
    assert len(steps) == 6
    distances = [
        [np.abs(steps[f"{number:08d}.png"].astype(int) - end).mean() for number in (0, 5)]
        for end in (first, second)
    ]
    assert distances[0][0] < distances[0][1]
    assert distances[1][1] < distances[1][0]
    # Only what a mask touches changes: its white pixel lies in the last position.
    mask = np.zeros((28, 28), np.uint8)
    mask[25, 26] = 255
    Image.fromarray(mask).save(tmp_path / "mask.png")
    grid = stage / "samples" / "prior" / "best-inpaint" / "grid.png"
    masked = (*SAMPLE, *images, "--inpaint", "mask.png", "--num_samples", "4", "--overwrite")
    assert script(*masked).code == 0
    row = np.asarray(Image.open(grid).convert("L"))
    factor = row.shape[1] // (4 * 30 + 2)  # original, known part and two results, and the margins
    cells = row[::factor, ::factor][2:30, 2:].reshape(28, -1)
    original, known = cells[:, :28], cells[:, 30:58]
    assert (known[24:, 24:] == 128).all()
    assert np.array_equal(known[:24], original[:24])


def test_one_line_for_pictures_that_cannot_be_edited(
    script: Script, stage: Path, mnist: Path, tmp_path: Path
) -> None:
    labels = mnist / "MNIST" / "raw" / "train-labels-idx1-ubyte"
    write_idx(labels, (np.arange(40) % 10).astype(np.uint8))
    words = ("--class_conditional", "--label_dropout", "0", "--max_steps", "1")
    assert script(*TRAIN, *words).code == 0
    pixels = np.random.default_rng(0).integers(0, 256, (28, 28, 3), np.uint8)
    Image.fromarray(pixels).save(tmp_path / "colours.png")
    Image.fromarray(pixels[..., 0]).convert("RGBA").save(tmp_path / "grey.png")  # no colours
    Image.fromarray(np.zeros((28, 28), np.uint8)).save(tmp_path / "black.png")
    Image.fromarray(np.zeros((20, 30), np.uint8)).save(tmp_path / "wide.png")
    (tmp_path / "damaged.png").write_bytes(b"x")

    def refused(*words: str) -> str:
        outcome = script(*SAMPLE, *words)
        assert outcome.code == 2, outcome.err
        assert "Traceback" not in outcome.err
        return outcome.err.strip().splitlines()[-1]

    zero, grey = ("--label", "0"), ("--images", "grey.png")
    assert "--images needs --inpaint" in refused(*grey)
    assert "--inpaint left contradicts --vary 0.5" in refused("--inpaint", "left", "--vary", "0.5")
    assert "contradicts --interpolate 3" in refused("--inpaint", "left", "--interpolate", "3")
    several = ("--interpolate", "3", "--num_samples", "5")
    assert "--num_samples 5 contradicts --interpolate 3" in refused(*several)
    assert "0.0 is not greater than 0" in refused("--vary", "0")
    assert "--vary needs --label: " in refused("--vary", "0.5")
    assert "has the classes 0 to 9" in refused("--vary", "0.5", "--label", "10")
    assert "needs two pictures" in refused(*zero, *grey, "--interpolate", "3")
    missing = refused(*zero, "--images", "none.png", "--vary", "0.5")
    assert "--images none.png does not exist" in missing
    damaged = refused(*zero, "--images", "damaged.png", "--vary", "0.5")
    assert "damaged.png cannot be decoded" in damaged
    colours = refused(*zero, "--images", "colours.png", "--vary", "0.5")
    assert "colours.png has colours, and the model takes grey levels only" in colours
    assert "--inpaint lft is neither left, right" in refused(*zero, "--inpaint", "lft")
    assert "has nothing white" in refused(*zero, *grey, "--inpaint", "black.png")
    sizes = "--inpaint wide.png is 30×20, and grey.png 28×28"
    assert sizes in refused(*zero, *grey, "--inpaint", "wide.png")
    assert (
        script(*TRAIN, "--class_conditional", "--exp_name", "other", "--max_steps", "1").code == 0
    )
    other = ("--model_name", "other/best.pt", "--vary", "0.5", "--guidance", "2")
    assert "--guidance 2.0 needs --label with --vary" in refused(*other)
    assert not (stage / "samples").exists()
    assert script(*SAMPLE, *zero, *grey, "--vary", "0.5", "--num_samples", "1").code == 0

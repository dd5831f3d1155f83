"""The three scripts, run as a user would."""

from __future__ import annotations

import html
import json
import os
import re
import shlex
import shutil
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

from tests.conftest import ROOT, Outcome, run_process, write_idx
from tests.processes import run_forked
from utils.checkpoints.checkpoint import load_model, read_checkpoint
from utils.report.files import find

Script = Callable[..., Outcome]
GOLDEN = Path(__file__).parents[1] / "golden"
TINY = ("--hidden_size", "8", "--num_residual_hidden", "4", "--num_embedding", "16")


def train(script: Script, mnist: Path, *words: str, name: str = "e") -> Outcome:
    return script(
        "main.py",
        *("--data_folder", str(mnist), "--dataset", "mnist", "--output_folder", "out"),
        *("--exp_name", name, "--batch_size", "8", "--max_steps", "3", "--device", "cpu"),
        *TINY,
        *words,
    )


def error_line(outcome: Outcome) -> str:
    """The one line of a refusal."""
    assert outcome.code == 2
    lines = outcome.err.strip().splitlines()
    assert len(lines) == 1, outcome.err
    return lines[0]


def test_the_published_commands(mnist: Path) -> None:
    """The commands of the README, but for the size of the run; only the first imports all anew."""
    folder = mnist.parent.parent
    data = ["--data_folder", "data/mnist", "--dataset", "mnist", "--output_folder", "out"]
    model = ["--num_embedding", "512", "--embedding_dim", "64", "--distance", "cos"]
    trained = run_process(
        [
            *(str(ROOT / "main.py"), *data, "--exp_name", "mnist_cos_closest"),
            *("--batch_size", "1024", "--device", "cpu", "--num_epochs", "2", *model),
            *("--anchor", "closest"),
        ],
        folder,
    )
    assert trained.code == 0, trained.err
    for word in ("loss", "PSNR", "usage", "images/s"):
        assert word in trained.err
    assert (folder / "out/models/mnist_cos_closest/last.pt").is_file()
    assert any((folder / "out/logs/mnist_cos_closest").glob("events.out.tfevents.*"))

    name = "mnist_cos_closest/best.pt"
    tested = run_forked(
        [
            *("test.py", *data, "--model_name", name, "--batch_size", "16"),
            *("--device", "cpu", *model),
        ],
        folder,
    )
    assert tested.code == 0, tested.err
    results = folder / "out/results/mnist_cos_closest/best/mnist"
    names = [f"{number:08d}.png" for number in range(12)]
    assert sorted(path.name for path in (results / "original").iterdir()) == names
    assert sorted(path.name for path in (results / "rec").iterdir()) == names

    evaluated = run_forked(
        [
            *("evaluation.py", "--gt_path", f"{results}/original/"),
            *("-g_path", f"{results}/rec", "--metrics", "l1", "ssim", "psnr"),
        ],
        folder,
    )
    assert evaluated.code == 0, evaluated.err
    assert json.loads((results / "metrics.json").read_text())["pairs"] == 12

    summary = run_forked(["-m", "utils.report.summary", str(results)], folder)
    assert summary.code == 0, summary.err
    for word in ("PSNR", "codes per image", "98", "bits per pixel, entropy", "TensorBoard"):
        assert word in summary.out
    assert f"{'images':24} 12 images of mnist\n" in summary.out
    (results / "reconstructions.png").unlink()  # as in a folder of --from_codes
    (results / "slots.png").unlink()
    shutil.rmtree(folder / "out/logs")
    again = run_forked(["-m", "utils.report.summary", str(results)], folder).out.splitlines()
    before = summary.out.splitlines()
    assert [line for line in before if line not in again] == [
        f"{label:24} {path}"
        for label, path in (
            ("side by side", results / "reconstructions.png"),
            ("slots", results / "slots.png"),
            ("TensorBoard", folder / "out/logs/mnist_cos_closest"),
        )
    ]


def test_the_reports_commands_repeat_the_run(mnist: Path, tmp_path: Path) -> None:
    """Also where flags equal their defaults, which the recipe changes; but for the folder."""
    data = ("--dataset", "mnist", "--data_folder", str(mnist), "--device", "cpu")
    results = "output/results/e/best/mnist"
    run = [
        ["main.py", *data, *TINY, "--exp_name", "e", "--batch_size", "8", "--max_steps", "5"],
        ["test.py", "--model_name", "e/best.pt", "--image_format", "jpg", "--save_codes"],
        ["evaluation.py", "--gt_path", f"{results}/original", "-g_path", f"{results}/rec"],
    ]
    more = (
        "--recipe best --latent_norm none --lr 3e-4 --distance cos",
        "--jpeg_quality 90 --batch_size 5",
        "--metrics l1 psnr --protocol reference --num_test 8 --num_workers 0",
    )
    run = [[*words, *others.split()] for words, others in zip(run, more)]
    written = []
    for folder in (tmp_path / "first", tmp_path / "again"):
        folder.mkdir()
        for words in run:
            outcome = run_forked(words, folder)
            assert outcome.code == 0, outcome.err
        content = read_checkpoint(folder / "output/models/e/last.pt").content
        paths = ("codes.looc", "metrics.csv", *(f"rec/{n:08d}.jpg" for n in range(12)))
        files = [(folder / results / path).read_bytes() for path in paths]
        names = ("analysis.json", "metrics.json")
        records = [json.loads((folder / results / name).read_text()) for name in names]
        commands = [record.pop("command") for record in (*records, dict(content))]
        assert [command.pop("folder") for command in commands] == [str(folder)] * 3
        written.append((files, records, commands, content["model"]))
        page = html.unescape((folder / results / "report.html").read_text())
        lines = re.findall(r"<code>cd (.*?) && python (.*?)</code>", page)
        assert [where for where, _ in lines] == [str(folder)] * 3
        run = [shlex.split(line) for _, line in lines]
    (*first, weights), (*again, others) = written
    assert first == again
    assert all(torch.equal(weights[name], others[name]) for name in weights)


@pytest.mark.usefixtures("draw_figures")
def test_results_tell_the_truth(script: Script, mnist: Path, tmp_path: Path) -> None:
    """Pictures, counts and rate are those of the model in the checkpoint."""
    assert train(script, mnist, "--interpolation_scale", "2").code == 0
    outcome = script("test.py", "--output_folder", "out", "--model_name", "e/best.pt")
    assert outcome.code == 0, outcome.err
    results = tmp_path / "out/results/e/best/mnist"

    model = load_model(tmp_path / "out/models/e/best.pt")
    originals, reconstructions = (
        torch.stack(
            [
                torch.from_numpy(np.array(Image.open(path)))[None]
                for path in sorted((results / folder).iterdir())
            ]
        )
        for folder in ("original", "rec")
    )
    with torch.no_grad():
        expected, quantized = model(originals / 127.5 - 1)
    expected = ((expected + 1) * 127.5).clamp(0, 255)
    assert (reconstructions - expected).abs().max() <= 0.501

    analysis = json.loads((results / "analysis.json").read_text())
    counts = torch.bincount(quantized.indices.flatten(), minlength=16)
    assert analysis["codebook"]["counts"] == counts.tolist()
    assert analysis["codebook"]["usage_percent"] == 100 * float((counts > 0).double().mean())
    assert analysis["rate"]["codes_per_image"] == 7 * 7 * 8  # 8 channels · 2² / d = 8 units
    assert analysis["rate"]["nominal_bits_per_pixel"] == 7 * 7 * 8 * 4 / 28**2
    for picture in ("reconstructions", "usage", "slots", "codebook"):
        with Image.open(results / f"{picture}.png") as image:
            image.verify()


def test_jpeg_results(script: Script, mnist: Path, tmp_path: Path) -> None:
    train(script, mnist)
    for form in ("jpg", "png"):  # the second run replaces the first whole
        words = ("--output_folder", "out", "--model_name", "e/best.pt", "--image_format", form)
        assert script("test.py", *words).code == 0
        results = tmp_path / "out/results/e/best/mnist"
        assert {path.suffix for path in (results / "rec").iterdir()} == {f".{form}"}


@pytest.mark.parametrize("name", ["looc", "cvq"])
def test_a_reference_checkpoint(name: str, script: Script, mnist: Path, tmp_path: Path) -> None:
    (tmp_path / "out/models").mkdir(parents=True)
    os.link(GOLDEN / f"checkpoint_{name}.pt", tmp_path / f"out/models/{name}.pt")
    words = ("--output_folder", "out", "--model_name", f"{name}.pt")
    assert "--dataset is missing" in error_line(script("test.py", *words))
    data = ("--dataset", "mnist", "--data_folder", str(mnist))
    outcome = script("test.py", *words, *data, "--num_embedding", "8")
    assert outcome.code == 0, outcome.err
    assert len(list((tmp_path / f"out/results/{name}/mnist/rec").iterdir())) == 12
    message = error_line(script("test.py", *words, *data, "--num_embedding", "512"))
    assert "--num_embedding 512 contradicts" in message
    assert "has 8" in message


@pytest.mark.parametrize(
    "words",
    [
        "--quantizer cvq",
        "--quantizer vq",
        "--anchor random",
        "--anchor probrandom --distance l2",
        "--anchor none",
        "--first_batch",
        "--contras_loss",
        "--split interval --interpolation_scale 3 --embedding_dim 3 --hidden_size 6",
        "--validation test",
        "--commitment_cost 1 --num_residual_layers 1",
    ],
)
def test_every_ablation_trains_and_tests(words: str, script: Script, mnist: Path) -> None:
    outcome = train(script, mnist, *words.split())
    assert outcome.code == 0, outcome.err
    assert ("so its scores are too good" in outcome.err) == ("--validation" in words)
    model_name = ("--output_folder", "out", "--model_name", "e/last.pt")
    outcome = script("test.py", *model_name)
    assert outcome.code == 0, outcome.err


def test_a_folder_of_colour_pictures(script: Script, tmp_path: Path) -> None:
    random = np.random.default_rng(0)
    for number in range(12):
        path = tmp_path / f"pictures/{number % 3}/{number}.jpg"
        path.parent.mkdir(parents=True, exist_ok=True)
        Image.fromarray(random.integers(256, size=(40, 50, 3), dtype=np.uint8)).save(path)
    words = ("--dataset", "folder", "--data_folder", "pictures", "--image_size", "32")
    outcome = script("main.py", *words, *TINY, "--max_steps", "2", "--num_workers", "0")
    assert outcome.code == 0, outcome.err
    assert "128 codes per image (K = 16), 0.500 bits per pixel nominal" in outcome.err
    outcome = script("test.py", "--model_name", "folder_looc_16x4/best.pt", "--num_workers", "0")
    assert outcome.code == 0, outcome.err
    rec = tmp_path / "output/results/folder_looc_16x4/best/pictures/rec/00000000.png"
    with Image.open(rec) as picture:
        assert (picture.size, picture.mode) == ((32, 32), "RGB")

    (tmp_path / "new").mkdir()
    for path in sorted((tmp_path / "pictures").rglob("*.jpg"))[:11]:
        Image.open(path).rotate(180).save(tmp_path / "new" / path.name)
    new = ("--model_name", "folder_looc_16x4/best.pt", "--data_folder", "new", "--num_workers", "0")
    outcome = script("test.py", *new)
    assert "new is not known as training data of output/models/folder_looc_16x4/" in outcome.err
    results = rec.parents[2]
    assert len(list((results / "new-all/rec").iterdir())) == 11
    outcome = script("test.py", *new, "--data_split", "train")
    assert outcome.code == 0, outcome.err
    assert 5 <= len(list((results / "new-train/rec").iterdir())) < 11
    analysis = json.loads((results / "new-train/analysis.json").read_text())
    assert analysis["data"]["data_split"] == "train"

    (tmp_path / "pictures/1/1.jpg").write_bytes(b"not a picture")
    outcome = script("main.py", *words, *TINY, "--exp_name", "x", "--num_workers", "0")
    assert "1.jpg" in error_line(outcome)


def test_the_same_command_continues(script: Script, mnist: Path, tmp_path: Path) -> None:
    train(script, mnist)
    last = tmp_path / "out/models/e/last.pt"
    outcome = train(script, mnist, "--max_steps", "5")
    assert outcome.code == 0, outcome.err
    assert "resumed out/models/e/last.pt at step 3" in outcome.err
    train(script, mnist, "--max_steps", "5", name="whole")
    ours, whole = (read_checkpoint(path) for path in (last, last.parent.parent / "whole/last.pt"))
    assert all(torch.equal(ours.state_dict[key], whole.state_dict[key]) for key in ours.state_dict)

    before = last.read_bytes()
    assert "--lr 0.01 (it has 0.0003)" in error_line(train(script, mnist, "--lr", "0.01"))
    assert "--overwrite" in error_line(train(script, mnist, "--resume", "none"))
    assert last.read_bytes() == before
    other = (tmp_path / "out/models/f/last.pt", "--resume", str(last), "--max_steps", "5")
    assert train(script, mnist, *other[1:], name="f").code == 0
    assert not other[0].exists()  # nothing was left to train
    (mnist / "MNIST/raw/train-images-idx3-ubyte").unlink()
    write_idx(mnist / "MNIST/raw/train-images-idx3-ubyte", np.zeros((20, 28, 28), np.uint8))
    write_idx(mnist / "MNIST/raw/train-labels-idx1-ubyte", np.zeros(20, np.uint8))
    message = error_line(train(script, mnist, "--max_steps", "9"))
    assert "was trained on 36 images, --data_folder gives 18" in message
    outcome = train(script, mnist, "--lr", "0.01", "--overwrite")
    assert outcome.code == 0, outcome.err
    assert read_checkpoint(last).content["step"] == 3


def test_the_length_of_a_run_and_its_validation_are_told(script: Script, mnist: Path) -> None:
    """36 training images are 5 steps an epoch."""
    words = ("--num_epochs", "1", "--max_steps", "9", "--num_validation", "3")
    outcome = train(script, mnist, *words, "--validate_every", "2")
    assert "36 for training, 3 for validation" in outcome.err
    assert "--num_epochs 1 are 5 steps, --max_steps is 9: the run ends after 5" in outcome.err
    steps = re.findall(r"epoch (\d), step (\d): validation", outcome.err)
    assert steps == [("0", "2"), ("0", "4"), ("1", "5")]
    # How often the run validates may change, not on which images.
    outcome = train(script, mnist, *words, "--num_epochs", "2", "--validate_every", "3")
    assert re.findall(r"step (\d): validation", outcome.err) == ["6", "9"]
    line = error_line(train(script, mnist, *words, "--num_validation", "4"))
    assert "--num_validation 4 (it has 3)" in line


def test_a_checkpoint_of_elsewhere_is_where_a_run_begins(
    script: Script, mnist: Path, tmp_path: Path
) -> None:
    """And its own last.pt where it goes on, by the same command."""
    train(script, mnist)
    last = tmp_path / "out/models/e/last.pt"
    words = ("--resume", str(last), "--max_steps")
    outcome = train(script, mnist, *words, "4", name="f")
    assert f"resumed {last} at step 3" in outcome.err
    outcome = train(script, mnist, *words, "5", name="f")
    assert f"continuing from out/models/f/last.pt; --resume {last} is where it began" in outcome.err
    assert "resumed out/models/f/last.pt at step 4" in outcome.err
    outcome = train(script, mnist, *words, "4", "--overwrite", name="f")
    assert f"resumed {last} at step 3" in outcome.err
    assert read_checkpoint(tmp_path / "out/models/f/last.pt").content["step"] == 4


def test_what_is_overwritten_is_told(
    script: Script, mnist: Path, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    """Curves go too: those of two runs in one folder are "out of order" to TensorBoard."""
    train(script, mnist)
    outcome = train(script, mnist, "--overwrite", "--max_steps", "2")
    line = "removed the earlier run of out/models/e, which was at step 3, and its curves in out/"
    assert f"--overwrite {line}" in outcome.err
    board = EventAccumulator(str(tmp_path / "out/logs/e")).Reload()
    assert [event.step for event in board.Scalars("validation/psnr")] == [2]
    assert "out of order" not in caplog.text
    (tmp_path / "out/models/e/last.pt").write_bytes(b"damaged")
    outcome = train(script, mnist, "--overwrite")
    assert "removed the earlier run of out/models/e, and its curves in out/logs/e" in outcome.err
    assert "--overwrite removed" not in train(script, mnist, "--overwrite", name="new").err


def test_a_refused_run_overwrites_nothing(script: Script, mnist: Path, tmp_path: Path) -> None:
    train(script, mnist)
    folder = tmp_path / "out/models/e"
    (folder / "previous.pt").write_bytes((folder / "last.pt").read_bytes())
    before = {path.name: path.read_bytes() for path in folder.iterdir()}
    train(script, mnist, name="f")
    other = str(tmp_path / "out/models/f/last.pt")
    for words, message in (
        ("absent.pt", "does not exist"),
        (f"{other} --lr 1", "--lr 1.0 (it has 0.0003)"),
        (other, "is at step 3 of 3, nothing is left to train"),
        (str(folder / "last.pt"), "--overwrite would remove --resume"),
    ):
        outcome = train(script, mnist, "--resume", *words.split(), "--overwrite")
        assert message in error_line(outcome)
    (tmp_path / "out/logs/e").rename(tmp_path / "logs")
    (tmp_path / "out/logs/e").touch()
    assert "out/logs/e" in error_line(train(script, mnist, "--overwrite"))
    for name in ("best.pt", "previous.pt"):
        message = error_line(train(script, mnist, "--resume", f"out/models/e/{name}"))
        assert "out/models/e/last.pt is where this experiment continues" in message
    assert {path.name: path.read_bytes() for path in folder.iterdir()} == before


def test_a_checkpoint_anywhere_is_tested(script: Script, mnist: Path, tmp_path: Path) -> None:
    """Its results are below --output_folder."""
    train(script, mnist)
    path = tmp_path / "elsewhere/run/copy.pt"
    path.parent.mkdir(parents=True)
    (tmp_path / "out/models/e/best.pt").rename(path)
    outcome = script("test.py", "--output_folder", "out", "--model_name", str(path))
    assert outcome.code == 0, outcome.err
    place = Path(f"{tmp_path}/out/results{path.with_suffix('')}")
    assert (place / "mnist/analysis.json").is_file()
    found = find(place / "mnist")
    assert found.checkpoint is not None
    assert found.checkpoint.path == path


def test_a_folder_that_cannot_be_made_is_told_at_once(
    script: Script, mnist: Path, tmp_path: Path
) -> None:
    (tmp_path / "out/models").mkdir(parents=True)
    (tmp_path / "out/models/e").touch()
    message = error_line(train(script, mnist))
    assert message == "main.py: error: --exp_name out/models/e cannot be created: File exists"


def test_other_images_of_the_same_number_are_told(
    script: Script, mnist: Path, tmp_path: Path
) -> None:
    train(script, mnist)
    outcome = train(script, mnist.rename(tmp_path / "moved"), "--max_steps", "4")
    assert outcome.code == 0, outcome.err
    assert f"was trained on the images of {mnist} and continues on those of" in outcome.err


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a CUDA device here")
@pytest.mark.parametrize("name", ["main.py", "test.py"])
def test_cuda_where_there_is_none(name: str, script: Script, mnist: Path) -> None:
    train(script, mnist)
    words = ("--output_folder", "out", "--device", "cuda")
    model_name = () if name == "main.py" else ("--model_name", "e/best.pt")
    message = error_line(script(name, *words, *model_name))
    assert "--device cuda: there is no CUDA device here" in message


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (
            "--embedding_dim 5",
            "--embedding_dim 5 does not divide the 128 channels of --hidden_size",
        ),
        ("--image_size 30 --dataset folder --data_folder x", "--image_size 30 is not a multiple"),
        ("--image_size 32", "--image_size 32 contradicts --dataset fashion-mnist-sample"),
        ("--dataset folder --data_folder missing", "--data_folder missing"),
        ("--dataset folder --data_folder empty", "--data_folder empty"),
        ("--dataset folder", "--dataset folder needs --data_folder, the folder of the images"),
        ("--data_folder /no/such/place", "--data_folder /no/such/place does not exist"),
        (
            "--dataset fashion-mnist-sample --data_folder empty",
            "--data_folder empty has no effect: the images of --dataset fashion-mnist-sample",
        ),
        (
            "--skip_bad_images",
            "--skip_bad_images has no effect with --dataset fashion-mnist-sample",
        ),
        ("--dataset cifra10", "did you mean cifar10?"),
        ("--exp_name ../../x", "--exp_name '../../x' leaves"),
        ("--output_folder file/x", "--output_folder file/x cannot be created"),
        ("--resume absent.pt", "--resume absent.pt does not exist, neither under"),
        ("--lr -1", "argument --lr: -1.0 is not greater than 0"),
        ("--batch_size 0", "argument --batch_size: 0 is less than 1"),
        ("--device tpu", "--device tpu"),
        ("--search_memory 0", "argument --search_memory: 0 is less than 1"),
        ("--search fais", "did you mean faiss?"),
        ("--exp_name .", "--exp_name '.' is not a name"),
    ],
)
def test_main_refuses_in_one_line(words: str, message: str, script: Script, tmp_path: Path) -> None:
    (tmp_path / "empty").mkdir()
    (tmp_path / "file").touch()
    assert message in error_line(script("main.py", *words.split()))
    assert not list(tmp_path.rglob("*.pt"))
    assert not (tmp_path.parent / "x").exists()


@pytest.mark.parametrize(
    ("words", "message"),
    [
        ("", "--model_name is missing"),
        ("--model_name absent/best.pt", "as a path; there is e/best.pt, broken.pt"),
        ("--model_name ../secret.pt", "--model_name ../secret.pt does not exist"),
        ("--model_name broken.pt", "checkpoint output/models/broken.pt is refused"),
        ("--model_name other.pt", "checkpoint output/models/other.pt is of another architecture"),
        ("--model_name looc.pt --dataset folder --data_folder rgb", "has 3-channel images, output"),
        ("--model_name looc.pt --dataset fashion-mnist-sample --embedding_dim 8", "which has 4"),
        ("--model_name looc.pt --image_format bmp", "argument --image_format"),
        ("--model_name looc.pt --jpeg_quality 101", "--jpeg_quality: 101 is greater than 100"),
        ("--model_name looc.pt --jpeg_quality 90", "--jpeg_quality 90 needs --image_format jpg"),
        ("--model_name looc.pt --data_folder absent", "--data_folder absent does not exist"),
        ("--model_name looc.pt --flip", "--flip has no effect on test images"),
        ("--model_name output/models/looc.pt", "--dataset is missing: output/models/looc.pt does"),
        ("--model_name e", "--model_name e is a folder: give e/best.pt"),
    ],
)
def test_test_refuses_in_one_line(words: str, message: str, script: Script, tmp_path: Path) -> None:
    models = tmp_path / "output/models"
    for folder in (models, tmp_path / "rgb/test", tmp_path / "rgb/train"):
        folder.mkdir(parents=True)
    Image.new("RGB", (256, 256)).save(tmp_path / "rgb/test/a.png")
    os.link(GOLDEN / "checkpoint_looc.pt", models / "looc.pt")
    (models / "e").mkdir()
    os.link(GOLDEN / "checkpoint_looc.pt", models / "e/best.pt")
    (models / "broken.pt").write_bytes((models / "looc.pt").read_bytes()[:5000])
    torch.save({"weight": torch.zeros(3)}, models / "other.pt")
    assert message in error_line(script("test.py", *words.split()))
    assert not (tmp_path / "output/results").exists()


def test_faiss_where_it_is_not_installed(
    script: Script, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.setattr("utils.flags.search.faiss_installed", lambda: False)
    message = error_line(script("main.py", "--search", "faiss", "--device", "cpu"))
    assert "--search faiss: faiss is not installed" in message
    assert not (tmp_path / "output").exists()


@pytest.mark.parametrize("words", ["--precision bf16", "--channels_last", "--search torch"])
def test_ways_to_run(words: str, script: Script, mnist: Path, tmp_path: Path) -> None:
    """Layout, search and precision change rounding, and what hangs on it, but little else."""
    outcome = train(script, mnist, *words.split())
    assert outcome.code == 0, outcome.err
    train(script, mnist, name="plain")
    models = tmp_path / "out/models"
    ours, plain = (
        read_checkpoint(models / name / "last.pt").content["best"] for name in ("e", "plain")
    )
    assert ours == pytest.approx(plain, abs=0.1)  # dB


@pytest.mark.skipif(os.geteuid() == 0, reason="root may write everywhere")
def test_an_output_folder_that_is_read_only(script: Script, tmp_path: Path) -> None:
    (tmp_path / "fixed").mkdir(mode=0o500)
    outcome = script("main.py", "--output_folder", "fixed")
    assert "--output_folder fixed" in error_line(outcome)


def test_where_memory_runs_out_the_line_names_what_takes_it(
    script: Script, mnist: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    test = ("test.py", "--output_folder", "out", "--model_name", "e/best.pt", "--batch_size", "5")
    pictures = "out/results/e/best/mnist"
    evaluate = (
        *("evaluation.py", "--gt_path", f"{pictures}/original", "--g_path", f"{pictures}/rec"),
        *("--metrics", "psnr", "--batch_size", "6"),
    )
    assert [train(script, mnist).code, script(*test).code, script(*evaluate).code] == [0, 0, 0]

    def run_out(*_arguments: object, **_keywords: object) -> None:
        raise torch.OutOfMemoryError("CUDA out of memory.\nTried to allocate 20.00 GiB.")

    def last_line(target: str, run: Callable[[], Outcome]) -> str:
        with monkeypatch.context() as patch:
            patch.setattr(target, run_out)
            outcome = run()
        assert outcome.code == 2
        assert "Traceback" not in outcome.err
        return outcome.err.splitlines()[-1]

    def train_on() -> Outcome:
        return train(script, mnist, "--max_steps", "4")

    memory = "out of memory: CUDA out of memory. Tried to allocate 20.00 GiB."
    sizes = f"main.py: error: --num_embedding 16, --hidden_size 8: {memory}"
    assert last_line("modules.make_model", train_on) == sizes
    batch = f"main.py: error: --batch_size 8 (--accumulate splits it): {memory}"
    assert last_line("utils.training.trainer.Trainer.train_step", train_on) == batch
    assert read_checkpoint(Path("out/models/e/last.pt")).content["step"] == 3
    tested = f"test.py: error: --batch_size 5: {memory}"
    assert last_line("modules.autoencoder.Autoencoder.encode", lambda: script(*test)) == tested
    measured = f"evaluation.py: error: --batch_size 6: {memory}"
    assert last_line("utils.evaluation.scores.measure", lambda: script(*evaluate)) == measured

"""Tests that need a GPU: agreement with the CPU, determinism, memory, and no needless waiting.

Skipped where there is none.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator
from copy import deepcopy
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from modules import LooCQuantizer, make_model
from modules.quantizers.looc.search import failed_searches, search
from modules.quantizers.registry import QUANTIZERS
from tests.conftest import Outcome, run_process
from tests.unit.test_golden import QUANTIZER_FILES, three_training_calls
from utils.checkpoints.checkpoint import read_checkpoint
from utils.devices import seed_everything
from utils.flags.arguments import build_model_config

pytestmark = pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
Script = Callable[..., Outcome]
CUDA, CPU = torch.device("cuda"), torch.device("cpu")
VQGAN = (
    "--model vqgan --hidden_size 32 --channel_multipliers 1,2 --num_residual_layers 1 "
    "--attention_levels 1 --latent_channels 8 --embedding_dim 4 --num_embedding 32 "
    "--perceptual_weight 0 --disc_start 3"
)


@pytest.fixture(autouse=True)
def deterministic() -> Iterator[None]:
    """Deterministic algorithms, as in main.py, and afterwards the setting of before."""
    seed_everything(0, CUDA)
    yield
    torch.use_deterministic_algorithms(False)
    for attention in ("mem_efficient", "flash", "cudnn"):
        getattr(torch.backends.cuda, f"enable_{attention}_sdp")(True)


def latents(*shape: int) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(1))


@pytest.mark.parametrize("path", QUANTIZER_FILES, ids=lambda path: path.stem)
def test_golden_files(path: Path) -> None:
    three_training_calls(path, CUDA)


@pytest.mark.parametrize("backend", ["compiled", "torch"])
@pytest.mark.parametrize("distance", ["cos", "l2"])
@pytest.mark.parametrize(("size", "dim"), [(256, 4), (1000, 3), (512, 64)])
def test_the_search_is_exact(backend: str, distance: str, size: int, dim: int) -> None:
    features, codebook = latents(70_000, dim), latents(size, dim)
    found = search(features.to(CUDA), codebook.to(CUDA), distance, backend).cpu()
    expected = search(features, codebook, distance, "torch")
    assert (found == expected).float().mean() > 0.9999  # sums of another order part equals
    assert not failed_searches


SWITCHES: dict[str, dict[str, Any]] = {
    "paper": {},
    "best": {
        **{"latent_norm": "batch", "distance": "l2", "codebook_update": "ema"},
        "codebook_start": "features",
    },
    "running, rotation": {"latent_norm": "running", "gradient": "rotation"},
    "interpolated": {"interpolation_scale": 2, "split": "interval"},
    "contrastive": {"contras_loss": True},
    "rate weighed": {"distance": "l2", "rate_weight": 0.1},
    "three passes": {"num_passes": 3, "latent_norm": "running", "codebook_update": "ema"},
}


@pytest.mark.parametrize("switches", SWITCHES.values(), ids=SWITCHES)
def test_gpu_and_cpu_agree(switches: dict[str, Any]) -> None:
    torch.manual_seed(0)
    quantizer = LooCQuantizer(32, 4, latent_channels=8, **switches)
    with torch.no_grad():
        quantizer.codebook.copy_(latents(32, 4))
        quantizer.usage.copy_(torch.linspace(0.01, 0.05, 32))
    results = []
    for device in (CPU, CUDA):
        torch.manual_seed(0)
        copy, z = deepcopy(quantizer).to(device), latents(16, 8, 7, 7).to(device).requires_grad_()
        quantized, loss, indices = copy(z)
        (loss + quantized.square().mean()).backward()
        gradients = [z.grad, copy.codebook.grad] if copy.codebook.requires_grad else [z.grad]
        tensors = [quantized, loss, indices, *gradients, *copy.state_dict().values()]
        results.append([value.detach().cpu().double() for value in tensors if value is not None])
    for ours, expected in zip(*results):
        torch.testing.assert_close(ours, expected, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("anchor", ["closest", "probrandom", "none"])
@pytest.mark.parametrize("switches", [SWITCHES["paper"], SWITCHES["best"]], ids=["paper", "best"])
def test_the_host_does_not_wait(anchor: str, switches: dict[str, Any]) -> None:
    """A step of a codebook in use reads nothing back, so that the next one can be queued."""
    quantizer = LooCQuantizer(32, 4, anchor=anchor, latent_channels=8, **switches).to(CUDA)
    z = latents(16, 8, 7, 7).to(CUDA).requires_grad_()
    with torch.no_grad():
        quantizer.codebook.copy_(latents(32, 4))
    quantizer(z)
    quantizer.usage.fill_(1 / 32)
    quantizer(z)
    torch.cuda.set_sync_debug_mode("error")
    try:
        for _ in range(3):
            quantized, loss, _ = quantizer(z)
            (loss + quantized.sum()).backward()
    finally:
        torch.cuda.set_sync_debug_mode("default")


@pytest.mark.parametrize(("backend", "dim"), [("compiled", 4), ("torch", 16)])
def test_no_matrix_of_all_similarities_exists(backend: str, dim: int) -> None:
    """401,408 features and 16,384 codevectors, whose matrix would be of 26 GB."""
    quantizer = LooCQuantizer(16384, dim).to(CUDA)
    quantizer.search = backend
    z = torch.randn(64 * dim, 128, 7, 7, device=CUDA, requires_grad=True)
    torch.cuda.reset_peak_memory_stats()
    quantized, loss, _ = quantizer(z)
    (loss + quantized.sum()).backward()
    assert torch.cuda.max_memory_allocated() < 2e9
    assert not failed_searches


@pytest.mark.parametrize("name", QUANTIZERS)
def test_every_quantiser_trains(name: str) -> None:
    if name not in ("looc", "cvq", "vq", "none"):
        pytest.importorskip("vector_quantize_pytorch", reason="the peers' library")
    flags = {"quantizer": name, "hidden_size": 24, "num_residual_hidden": 4}
    model = make_model(build_model_config(flags, 1)).to(CUDA)
    reconstruction, quantized = model(latents(4, 1, 28, 28).to(CUDA))
    (reconstruction.square().mean() + quantized.loss).backward()
    codes = model.eval().encode(latents(4, 1, 28, 28).to(CUDA))
    assert codes.device.type == "cuda"


def train(script: Script, name: str, *words: str) -> dict[str, Tensor]:
    """The weights after 6 steps on the bundled images."""
    outcome = script(
        "main.py",
        *("--device", "cuda", "--output_folder", "out", "--exp_name", name, "--num_workers", "0"),
        *("--batch_size", "64", "--max_steps", "6", "--lr", "1e-3", *words),
    )
    assert outcome.code == 0, outcome.err
    return weights(Path("out/models") / name / "last.pt")


def weights(path: Path) -> dict[str, Tensor]:
    return dict(read_checkpoint(path).content["model"])


def same(one: dict[str, Tensor], other: dict[str, Tensor]) -> bool:
    return one.keys() == other.keys() and all(torch.equal(one[key], other[key]) for key in one)


@pytest.mark.parametrize(
    "words",
    [
        "--precision fp32 --anchor probrandom",
        "--precision bf16 --recipe best --anchor random",
        "--precision fp16 --recipe best --latent_norm running --gradient rotation",
        "--recipe best --channels_last --compile --interpolation_scale 2",
        "--contras_loss",
        "--quantizer cvq --embedding_dim 64 --num_embedding 64",
        VQGAN,
        f"{VQGAN} --precision bf16 --checkpoint_gradients --weight_ema 0.9",
    ],
)
def test_resumed_equals_uninterrupted(words: str, script: Script) -> None:
    whole = train(script, "whole", *words.split())
    train(script, "parts", *words.split(), "--max_steps", "3")
    parts = train(script, "parts", *words.split(), "--resume", "out/models/parts/last.pt")
    assert same(whole, parts)
    assert not same(whole, train(script, "other", *words.split(), "--seed", "1"))


def test_train_test_evaluate_on_both_devices(script: Script, tmp_path: Path) -> None:
    """A CPU decodes what a GPU trained and coded to the same pictures but for rounding."""
    train(script, "e", "--recipe", "best")
    folder, found = tmp_path / "out/results/e/best/fashion-mnist-sample", []
    decoded = folder.with_name(f"{folder.name}-codes")
    for words, tested in (
        ("--device cuda --save_codes", folder),
        (f"--device cpu --from_codes {folder}/codes.looc", decoded),
    ):
        outcome = script(
            "test.py", "--output_folder", "out", "--model_name", "e/best.pt", *words.split()
        )
        assert outcome.code == 0, outcome.err
        for device in ("cuda", "cpu"):
            outcome = script(
                *("evaluation.py", "--device", device, "--metrics", "l1", "ssim", "psnr"),
                *("--gt_path", f"{folder}/original", "-g_path", f"{tested}/rec"),
            )
            assert outcome.code == 0, outcome.err
            metrics = json.loads((tested / "metrics.json").read_text())["metrics"]
            found.append([metrics[name]["mean"] for name in ("l1", "ssim", "psnr")])
    for values in found[1:]:
        assert values == pytest.approx(found[0], rel=1e-3)


def test_too_large_a_batch_is_told(script: Script) -> None:
    torch.cuda.empty_cache()
    torch.cuda.set_per_process_memory_fraction(0.002)
    try:
        outcome = script("main.py", "--device", "cuda", "--batch_size", "4096")
    finally:
        torch.cuda.set_per_process_memory_fraction(1.0)
    assert outcome.code == 2
    message = outcome.err.splitlines()[-1]
    assert message.startswith("main.py: error: --batch_size 4096 (--accumulate takes it in parts)")


def test_one_process_of_torchrun_is_as_none(script: Script, tmp_path: Path) -> None:
    launcher = ["-m", "torch.distributed.run", "--standalone", "--nproc_per_node", "1"]
    words = "--recipe best --output_folder out --exp_name together --num_workers 0 --batch_size 64"
    main = str(Path(__file__).parents[2] / "main.py")
    steps = ["--device", "cuda", "--max_steps", "6", "--lr", "1e-3"]
    outcome = run_process([*launcher, main, *words.split(), *steps], tmp_path)
    assert outcome.code == 0, outcome.err
    together = weights(tmp_path / "out/models/together/last.pt")
    for key, value in train(script, "alone", "--recipe", "best").items():
        torch.testing.assert_close(value.cpu(), together[key].cpu(), rtol=1e-4, atol=1e-5)

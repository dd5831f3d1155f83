"""Several processes train one model: the codebook is the same everywhere, and that of one process.

Each test starts 2 or 3 processes on this machine that talk by gloo.
"""

from __future__ import annotations

import atexit
import os
import time
from collections.abc import Callable
from dataclasses import replace
from datetime import timedelta
from functools import cache, partial
from pathlib import Path
from typing import Any, cast

import pytest
import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import nn

import utils.distributed
import utils.training.reconstruction
from datasets import BatchLoader, TensorImages
from modules import VQGAN, LooCQuantizer, ModelConfig, make_model
from modules.quantizers.looc.anchors import ANCHORS
from tests.conftest import HANGS, ROOT, run_process
from tests.processes import context, run_forked, run_ranks
from utils.checkpoints.checkpoint import read_stored
from utils.devices import seed_everything
from utils.distributed import first_goes_ahead, left_together, rank, seed_rank, start_ranks
from utils.flags.recipes import RECIPES
from utils.training.config import TrainConfig
from utils.training.losses import (
    L1,
    Adversarial,
    Loss,
    MeanSquaredError,
    QuantizerLoss,
)
from utils.training.losses.adversarial import AdversarialConfig
from utils.training.reconstruction import Reconstruction
from utils.training.trainer import Trainer

CPU = torch.device("cpu")
MODEL = ModelConfig(num_embedding=8, hidden_size=8, num_residual_hidden=4)
# Of so many epochs few have figures.
TRAIN = TrainConfig(batch_size=8, num_epochs=1000, max_steps=20, lr=1e-2, log_every=2)
VQGAN_FLAGS: dict[str, Any] = {
    **{"model": "vqgan", "channel_multipliers": "1,2,2", "num_residual_layers": 1},
    **{"attention_levels": 0, "latent_channels": 8, "num_residual_hidden": 32},
}
GAN = AdversarialConfig(disc_weight=0.8, disc_start=10, disc_channels=4, disc_layers=2)


def together(num_ranks: int, work: Callable[..., Any], folder: Path, *arguments: Any) -> list[Any]:
    """Results of work(folder, *arguments) in each of several processes."""
    folder.mkdir(exist_ok=True)
    processes = [
        context.Process(target=join, args=(rank, num_ranks, work, folder, arguments))
        for rank in range(num_ranks)
    ]
    for process in processes:
        process.start()
    for process in processes:
        process.join(HANGS)
        process.kill()
    assert [process.exitcode for process in processes] == [0] * num_ranks
    return [torch.load(folder / f"result{rank}.pt", weights_only=True) for rank in range(num_ranks)]


def join(
    rank: int, num_ranks: int, work: Callable[..., Any], folder: Path, arguments: tuple[Any, ...]
) -> None:
    torch.set_num_threads(1)
    os.chdir(folder)
    if num_ranks > 1:
        rendezvous = f"file://{folder / 'rendezvous'}"
        dist.init_process_group("gloo", rendezvous, rank=rank, world_size=num_ranks)
    torch.save(work(folder, *arguments), folder / f"result{rank}.pt")
    if num_ranks > 1:
        dist.destroy_process_group()


# ---------------------------------------------------------------------------------- the quantiser


def my_part(features: torch.Tensor) -> torch.Tensor:
    """This process's share of a batch, unequal to the others'."""
    if not dist.is_initialized():
        return features
    return features.tensor_split([len(features) // 3, len(features) // 2])[dist.get_rank()]


def quantise(folder: Path, anchor: str, steps: int, **switches: Any) -> list[torch.Tensor]:
    """State after some steps of the quantiser alone, which are all of them re-initialisation."""
    del folder
    torch.manual_seed(0)
    quantizer = LooCQuantizer(32, 4, anchor=anchor, **switches)
    generator = torch.Generator().manual_seed(1)
    seed_rank(5)
    states = []
    for step in range(steps):
        features = torch.randn(6, 8, 2, 3, generator=generator) + step
        features[0, 0, 0, 0] = torch.nan
        quantizer(my_part(features.movedim(1, quantizer.channel_dim)))
        states += [quantizer.codebook.detach().clone(), quantizer.usage.clone()]
    return [*states, quantizer.pool]


@pytest.mark.parametrize("anchor", ANCHORS)
def test_every_process_writes_the_same_codebook(anchor: str, tmp_path: Path) -> None:
    """Bit for bit, whatever share of the features each has, with one that is not a number."""
    first, *others = together(3, quantise, tmp_path, anchor, 4)
    for other in others:
        assert all(torch.equal(a, b) for a, b in zip(first, other))
    assert all(value.isfinite().all() for value in first)
    one = together(1, quantise, tmp_path / "one", anchor, 4)[0]
    torch.testing.assert_close(first[1], one[1])  # usage
    if anchor in ("closest", "none"):
        torch.testing.assert_close(first, one)


def contrast(folder: Path) -> torch.Tensor:
    """The gradient of the codebook where the last process has no image."""
    del folder
    torch.manual_seed(0)
    quantizer = LooCQuantizer(4, 2, contras_loss=True)
    z = torch.randn(2, 4, 3, 3)[: 2 - 2 * rank()]
    quantizer(z).loss.backward()
    assert quantizer.codebook.grad is not None
    return quantizer.codebook.grad


def test_a_process_without_images_has_no_contrast(tmp_path: Path) -> None:
    first, second = together(2, contrast, tmp_path)
    assert first.any()
    assert not second.any()


class Host(nn.Module):
    """Small autoencoder around the quantiser."""

    def __init__(self, **setting: Any) -> None:
        super().__init__()
        self.encoder = nn.Conv2d(3, 8, 2, 2)
        self.quantizer = LooCQuantizer(16, 4, **setting)
        self.decoder = nn.ConvTranspose2d(8, 3, 2, 2)

    def forward(self, images: torch.Tensor) -> torch.Tensor:
        latents, loss, _ = self.quantizer(self.encoder(images))
        error: torch.Tensor = F.mse_loss(self.decoder(latents), images) + loss
        return error


def shard(folder: Path, form: str, left_out: bool, setting: dict[str, Any]) -> tuple[Any, ...]:
    """Codebooks before and after training in shards, or the error that stops it."""
    from torch.distributed.fsdp import FullyShardedDataParallel, fully_shard

    del folder
    torch.manual_seed(0)
    host: Any = Host(**setting)
    quantizer = host.quantizer
    start = quantizer.codebook.detach().clone()
    try:
        if form == "FSDP2":
            fully_shard(host, ignored_params=set(quantizer.parameters()) if left_out else None)
        else:
            ignored = [quantizer] if left_out else None
            host = FullyShardedDataParallel(
                host, use_orig_params=True, device_id=CPU, ignored_states=ignored
            )
        optimizer = torch.optim.Adam([p for p in host.parameters() if p.requires_grad], lr=1e-2)
        images = torch.rand(12, 3, 8, 8, generator=torch.Generator().manual_seed(1))
        losses = []
        for _ in range(12):
            loss = host(images[dist.get_rank() :: 2])
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
            losses.append(float(loss))
    except RuntimeError as error:
        return (str(error),)
    return start, quantizer.codebook.detach(), losses


@pytest.mark.parametrize("form", ["FSDP", "FSDP2"])
def test_sharding(form: str, tmp_path: Path) -> None:
    """The recipe of docs/plugin.md trains; a sharded codebook, or one that drifts, is refused."""
    ema = {"codebook_update": "ema"}
    (start, codebook, losses), (_, other, _) = together(2, shard, tmp_path / "ema", form, True, ema)
    assert torch.equal(codebook, other)
    assert not torch.equal(codebook, start)
    assert losses[-1] < losses[0]
    for number, setting in enumerate(({}, ema)):
        refusals = together(2, shard, tmp_path / str(number), form, False, setting)
        for (refusal,) in refusals:
            assert refusal.startswith("the codebook is a ")
            assert "leave the quantiser out of FSDP (ignored_params or ignored_states" in refusal
    for (refusal,) in together(2, shard, tmp_path / "gradient", form, True, {}):
        assert refusal.startswith("the codebooks of the processes differ by up to ")
        assert "or use codebook_update 'ema'" in refusal


SWITCHES: tuple[dict[str, Any], ...] = (
    {"codebook_update": "ema"},
    {"codebook_update": "ema", "codebook_start": "features"},
    {"codebook_update": "ema", "codebook_start": "kmeans", "distance": "l2"},
    {"codebook_update": "ema", "latent_norm": "running", "latent_channels": 8},
    {"latent_norm": "batch", "latent_channels": 8, "channel_dim": -1},
    {"num_passes": 2, "latent_channels": 8, "codebook_update": "ema"},
)


@pytest.mark.parametrize("switches", SWITCHES, ids=lambda switches: "-".join(switches))
def test_switches_write_the_same_codebook(switches: dict[str, Any], tmp_path: Path) -> None:
    work = partial(quantise, **switches)
    # A centre of two features, by k-means, is equally near to both: no anchor is the closest.
    anchor = "none" if switches.get("codebook_start") == "kmeans" else "closest"
    first, *others = together(3, work, tmp_path, anchor, 4)
    for other in others:
        assert all(torch.equal(a, b) for a, b in zip(first, other))
    one = together(1, work, tmp_path / "one", anchor, 4)[0]
    torch.testing.assert_close(first, one)


def draw(folder: Path, anchor: str, equal: bool) -> torch.Tensor:
    """Count how many of 3,000 dead codevectors were pulled to each of 12 features: (12,)."""
    del folder
    torch.manual_seed(3)
    quantizer = LooCQuantizer(3000, 2, anchor=anchor)
    angles = torch.linspace(0, 6, 12)
    features = torch.stack([angles.cos(), angles.sin()]).T  # (12, 2)
    with torch.no_grad():
        quantizer.codebook.copy_(torch.tensor([1.0, 0.0]))
    seed_rank(3)
    for _ in range(2 if anchor == "random" else 1):  # the pool is filled, then half replaced
        quantizer.usage.zero_()
        with torch.no_grad():
            quantizer.codebook.copy_(torch.tensor([1.0, 0.0]))
        own = features[dist.get_rank() :: 3] if equal else my_part(features)
        quantizer(own[:, :, None, None])
    # a = exp(−10⁻³) of the way, as nearly none was matched.
    pulled = (quantizer.codebook - features[0]) / torch.exp(torch.tensor(-1e-3)) + features[0]
    distance = torch.cdist(pulled, features)
    near = distance.amin(1) < 0.01
    return torch.bincount(distance.argmin(1)[near], minlength=12)


@pytest.mark.parametrize("equal", [False, True])
@pytest.mark.parametrize("anchor", ["random", "probrandom"])
def test_draws_have_the_distribution_of_one_process(
    anchor: str, equal: bool, tmp_path: Path
) -> None:
    """Chi-square of 3,000 draws among features that three processes hold.

    In equal shares they would show generators of one state (1,157).
    """
    counts = together(3, draw, tmp_path, anchor, equal)[0].double()
    assert counts.sum() >= 2990
    angles = torch.linspace(0, 6, 12).double()
    expected = (
        torch.full((12,), 1 / 12).double() if anchor == "random" else F.softmax(angles.cos(), 0)
    )
    expected = expected * counts.sum()
    assert ((counts - expected).square() / expected).sum() < 31.3  # 99.9 % quantile, 11 degrees


def test_each_process_has_random_numbers_of_its_own(monkeypatch: pytest.MonkeyPatch) -> None:
    """The same ones in every run, and others for every seed."""

    def numbers(seed: int, rank: int) -> tuple[float, ...]:
        monkeypatch.setattr(utils.distributed, "rank", lambda: rank)
        torch.manual_seed(seed)
        seed_rank(seed)
        return tuple(torch.rand(4).tolist())

    keys = [(seed, rank) for seed in (0, 1, 42, 2**32 - 1) for rank in range(64)]
    drawn = [numbers(*key) for key in keys]
    assert len(set(drawn)) == len(keys)
    assert drawn == [numbers(*key) for key in keys]


# ------------------------------------------------------------------------------------ the trainer


def train(
    folder: Path,
    anchor: str,
    num_images: int,
    accumulate: int,
    gan: bool = False,
    validate_every: int | None = None,
    **switches: Any,
) -> dict[str, torch.Tensor | float]:
    """Weights after 20 steps, the validation's PSNR, and how far codebooks ever were apart.

    In float64 and with few codevectors: else rounding would decide between anchors of nearly one
    direction, or between codevectors that were pulled to one anchor.
    """
    utils.training.reconstruction.to_signed = lambda images: images.double() / 127.5 - 1
    images = torch.randint(256, (40, 1, 16, 16), generator=torch.Generator().manual_seed(0))
    training, validation = images.to(torch.uint8).split([30, 10])
    config = replace(TRAIN, accumulate=accumulate, validate_every=validate_every)
    share = (dist.get_rank(), dist.get_world_size()) if dist.is_initialized() else (0, 1)
    seed_everything(1, CPU)
    model = make_model(replace(MODEL, anchor=anchor, **switches)).double()
    adversary = Adversarial(GAN, cast(VQGAN, model)) if gan else None
    pixels: dict[str, Loss] = (
        {"reconstruction": MeanSquaredError(0.1)}
        if adversary is None
        else {"l1": L1(), "adversarial": adversary}
    )
    task = Reconstruction(model, {**pixels, "quantizer": QuantizerLoss()}, config)
    assert isinstance(model.quantizer, LooCQuantizer)
    model.quantizer.search = "torch"
    seed_rank(1)
    trainer = Trainer(
        task,
        BatchLoader(
            TensorImages(training[:num_images]), 8, device=CPU, shuffle=True, seed=1,
            rank=share[0], num_ranks=share[1],
        ),
        BatchLoader(TensorImages(validation), 4, device=CPU, rank=share[0], num_ranks=share[1]),
        config,
        models=folder / "models",
        logs=folder / "logs",
    )  # fmt: skip
    apart = 0.0
    step = trainer.train_step

    def compared(images: torch.Tensor) -> None:
        nonlocal apart
        step(images)
        if dist.is_initialized():
            codebooks = [torch.empty_like(model.quantizer.codebook) for _ in range(share[1])]
            dist.all_gather(codebooks, model.quantizer.codebook.detach().contiguous())
            apart = max(apart, *(float((book - codebooks[0]).abs().max()) for book in codebooks))

    trainer.train_step = compared  # type: ignore[method-assign]
    trainer.fit()
    judge = {} if adversary is None else adversary.discriminator.state_dict()
    return {**model.state_dict(), **judge, "best": trainer.best, "apart": apart}


@pytest.fixture(scope="module")
def alone(tmp_path_factory: pytest.TempPathFactory) -> Callable[[int], dict[str, Any]]:
    """Result of one process, by the number of images."""

    @cache
    def trained(num_images: int) -> dict[str, Any]:
        folder = tmp_path_factory.mktemp("one")
        return cast(dict[str, Any], together(1, train, folder, "closest", num_images, 1)[0])

    return trained


@pytest.mark.parametrize("num_ranks", [2, 3])
@pytest.mark.parametrize("num_images", [24, 25], ids=["equal batches", "a last batch of one"])
def test_processes_equal_one_with_the_whole_batch(
    num_ranks: int, num_images: int, alone: Callable[[int], dict[str, Any]], tmp_path: Path
) -> None:
    """20 steps of 8 images in all; of a last batch of one image the other processes have none."""
    one = alone(num_images)
    several = together(num_ranks, train, tmp_path / "several", "closest", num_images, 1)
    for result in several:
        assert result["apart"] == 0
        for name, value in one.items():
            torch.testing.assert_close(result[name], value, rtol=1e-6, atol=1e-6)
    written = sorted(path.name for path in (tmp_path / "several" / "models").iterdir())
    assert written == ["best.pt", "last.pt", "previous.pt"]


def test_validation_every_few_steps_equals_one_process(tmp_path: Path) -> None:
    work = partial(train, validate_every=3)
    (one,) = together(1, work, tmp_path / "one", "closest", 25, 1)
    first, second = together(2, work, tmp_path / "several", "closest", 25, 1)
    assert first["best"] == second["best"] == pytest.approx(one["best"], rel=1e-6)
    steps = [
        read_stored(tmp_path / name / "models/best.pt").content["step"]
        for name in ("one", "several")
    ]
    assert steps[0] == steps[1]
    assert steps[0] % 3 == 0 or steps[0] == 20


def test_the_best_recipe_equals_one_process(tmp_path: Path) -> None:
    """Batch norm, its gradient and the EMA over all processes, of which one has the last image."""
    own = {name: value for name, value in RECIPES["best"].items() if hasattr(MODEL, name)}
    work = partial(train, **own | {"codebook_start": "uniform"})  # draws depend on who has what
    (one,) = together(1, work, tmp_path / "one", "closest", 25, 1)
    for result in together(2, work, tmp_path / "several", "closest", 25, 1):
        assert result["apart"] == 0
        for name, value in one.items():
            torch.testing.assert_close(result[name], value, rtol=1e-6, atol=1e-6)


def test_vqgan_equals_one_process(tmp_path: Path) -> None:
    """The discriminator's batch norm and gradients and the adaptive weight are of the batch.

    It takes part after ten steps; of the last batch one process has no image.
    """
    pytest.importorskip("diffusers")
    work = partial(train, gan=True, **VQGAN_FLAGS)
    (one,) = together(1, work, tmp_path / "one", "closest", 25, 1)
    first, second = together(2, work, tmp_path / "several", "closest", 25, 1)
    assert first["apart"] == 0
    for name, value in one.items():
        torch.testing.assert_close(first[name], value, rtol=1e-5, atol=1e-6)
        assert name == "apart" or torch.equal(*map(torch.as_tensor, (first[name], second[name])))


def test_vqgan_in_parts_that_are_empty_for_some(tmp_path: Path) -> None:
    """One process has none of the last batch of one image, which stays one part."""
    pytest.importorskip("diffusers")
    work = partial(train, gan=True, **VQGAN_FLAGS)
    first, second = together(2, work, tmp_path, "closest", 25, 3)
    assert first["apart"] == 0
    for name, value in first.items():
        assert torch.as_tensor(value).isfinite().all(), name
        assert name == "apart" or torch.equal(*map(torch.as_tensor, (value, second[name])))


@pytest.mark.parametrize("anchor", ["random", "probrandom"])
def test_codebooks_stay_the_same_in_training(anchor: str, tmp_path: Path) -> None:
    first, second = together(2, train, tmp_path, anchor, 25, 2)
    assert first["apart"] == second["apart"] == 0
    assert torch.equal(first["quantizer.codebook"], second["quantizer.codebook"])


def test_processes_and_parts_together(
    alone: Callable[[int], dict[str, Any]], tmp_path: Path
) -> None:
    one = alone(25)
    result = together(2, train, tmp_path / "several", "closest", 25, 2)[0]
    for name, value in one.items():
        torch.testing.assert_close(result[name], value, rtol=1e-6, atol=1e-6)


# ------------------------------------------------------------------------------------- as a user


def test_torchrun_trains_and_tests_as_one_process_does(mnist: Path, tmp_path: Path) -> None:
    """The first process alone writes; pictures and analysis are those of one process."""
    data = ("--dataset", "mnist", "--data_folder", str(mnist), "--device", "cpu")
    small = ("--hidden_size", "8", "--num_embedding", "16", "--exp_name", "e")
    steps = ("--batch_size", "8", "--max_steps", "6", "--save_every", "2")
    torchrun = ("-m", "torch.distributed.run", "--nproc_per_node", "2", str(ROOT / "main.py"))
    trained = run_process([*torchrun, *data, *small, *steps], tmp_path)
    assert trained.code == 0, trained.err
    assert "on cpu, 2 processes" in trained.err
    assert trained.err.count("epoch 1, step 5: validation") == 1
    assert "Warning" not in trained.err
    models = tmp_path / "output" / "models" / "e"
    assert sorted(path.name for path in models.iterdir()) == ["best.pt", "last.pt", "previous.pt"]

    words = ("test.py", "--model_name", "e/best.pt", "--batch_size", "3", "--device", "cpu")
    results = tmp_path / "output" / "results" / "e" / "best" / "mnist"
    found = []
    for ways in (lambda: run_ranks(words, tmp_path), lambda: [run_forked(words, tmp_path)]):
        outcomes = ways()
        assert not any(outcome.code for outcome in outcomes), outcomes
        assert "".join(outcome.out for outcome in outcomes).count("codebook usage") == 1
        files = sorted(path for path in results.rglob("*") if path.suffix in (".png", ".json"))
        found.append({str(path.relative_to(results)): path.read_bytes() for path in files})
    assert len(found[0]) == 2 * 12 + 5
    assert found[0] == found[1]


def test_processes_resume_bit_for_bit(mnist: Path, tmp_path: Path) -> None:
    words = (
        *("main.py", "--dataset", "mnist", "--data_folder", str(mnist), "--device", "cpu"),
        *("--hidden_size", "8", "--num_embedding", "16", "--batch_size", "8"),
    )
    for name, steps in (("whole", "4"), ("parts", "2"), ("parts", "4")):
        outcomes = run_ranks((*words, "--exp_name", name, "--max_steps", steps), tmp_path)
        assert not any(outcome.code for outcome in outcomes), outcomes
    assert "resumed output/models/parts/last.pt at step 2" in outcomes[0].err
    whole, parts = (
        torch.load(tmp_path / f"output/models/{name}/last.pt", weights_only=True)
        for name in ("whole", "parts")
    )
    for entry in ("model", "optimizer", "random_states", "best"):
        torch.testing.assert_close(parts[entry], whole[entry], rtol=0, atol=0)


def wait_long(rank: int, folder: Path) -> None:
    dist.init_process_group(
        "gloo",
        f"file://{folder / 'rendezvous'}",
        rank=rank,
        world_size=2,
        timeout=timedelta(seconds=1),
    )
    with first_goes_ahead():
        if rank == 0:
            time.sleep(2.5)
            (folder / "unpacked").touch()
        assert (folder / "unpacked").exists()
    with left_together():
        if rank == 1:
            time.sleep(2.5)
            (folder / "encoded").touch()
    assert (folder / "encoded").exists()


def test_processes_wait_for_one_another_for_long(tmp_path: Path) -> None:
    """Longer than the process group's timeout."""
    processes = [context.Process(target=wait_long, args=(rank, tmp_path)) for rank in range(2)]
    for process in processes:
        process.start()
    for process in processes:
        process.join()
    assert [process.exitcode for process in processes] == [0, 0]


def gloo_threads() -> int:
    names = (path.read_text() for path in Path("/proc/self/task").glob("*/comm"))
    return sum("gloo_runloop" in name for name in names)


def end_in_order() -> None:
    os.environ.update(
        {"RANK": "0", "LOCAL_RANK": "0", "WORLD_SIZE": "2", "TORCHELASTIC_RUN_ID": "tests"}
    )
    alone = partial(dist.init_process_group, store=dist.HashStore(), rank=0, world_size=1)
    dist.init_process_group = alone
    start_ranks("cpu")
    limit = time.monotonic() + HANGS
    while not gloo_threads():  # a thread names itself a moment after its start
        assert time.monotonic() < limit
    network = nn.parallel.DistributedDataParallel(nn.Linear(2, 2), broadcast_buffers=False)
    network(torch.ones(1, 2)).sum().backward()
    network.circle = [network]  # type: ignore[assignment]
    del network
    atexit._run_exitfuncs()
    assert not gloo_threads()


def test_no_thread_of_the_process_group_outlives_it() -> None:
    """Or the interpreter, at its end, would end them in the middle of something."""
    process = context.Process(target=end_in_order)
    process.start()
    process.join()
    assert process.exitcode == 0


def test_an_error_of_all_processes_is_told_once(tmp_path: Path) -> None:
    words = ("--dataset", "folder", "--data_folder", "nowhere", "--device", "cpu")
    for command, line in (
        (("main.py", *words), "main.py: error: --data_folder nowhere does not exist"),
        (
            ("evaluation.py", "--gt_path", "a", "--g_path", "b"),
            "evaluation.py: error: it runs as one process;",
        ),
    ):
        outcomes = run_ranks(command, tmp_path)
        assert [outcome.code for outcome in outcomes] == [2, 2]
        assert "".join(outcome.err for outcome in outcomes).count(line) == 1

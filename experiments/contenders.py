"""The contenders of compare's suites: LooC and other quantisers, as data."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace
from typing import Any

from experiments.options import ALIVE, SETUPS, Contender, Setup, shared_training
from utils.training.config import TrainConfig

CHANNELS = 128  # of encoder and decoder, and of LooC's latents
UNITS = (1, 2, 4, 8, 16, 32)  # codes per position; with K = 256, 0.5 to 16 bits per pixel
SIZES = (32, 1024)  # codevectors of quantisers with one code per position
NORMS = {"fashion-mnist": "batch", "photos": "running"}  # the likely best normalisation
LENGTHS = (300, 1000, 3000, 10_000, 30_000)  # steps of the points of learning curves
PASSES = ((8, 1, 2), (8, 1, 4), (8, 2, 2), (8, 2, 4))  # d, m and R of LooC with several passes


def contender(family: str, point: str, **flags: Any) -> Contender:
    return Contender(f"{family}-{point}" if point else family, family, flags)


def looc(**flags: Any) -> Iterator[Contender]:
    """LooC by dimension, by channels, by interpolation and by K; and as published.

    The flags, which depend on the images, are added to those of the best recipe.
    """
    best: dict[str, Any] = {"recipe": "best", **flags}
    for size in (32, 128):
        one = {"num_embedding": size, "embedding_dim": CHANNELS}
        yield contender("looc", f"K{size}-m1", **best, **one)
    for m in UNITS:
        yield contender(
            "looc", f"K256-m{m}", **best, num_embedding=256, embedding_dim=CHANNELS // m
        )
    for size, m in (
        *((32, 1), (64, 1), (1024, 1), (4096, 1)),
        *((256, 1), (256, 2), (256, 4), (256, 8), (1024, 2), (1024, 4), (1024, 8)),
    ):
        narrow = {"num_embedding": size, "embedding_dim": 4, "latent_channels": 4 * m}
        yield contender("looc-narrow", f"K{size}-m{m}", **best, **narrow)
    # The lowest rates need still fewer channels.
    for size, dim in ((32, 2), (48, 2), (64, 2), (96, 2), (128, 2), (32, 3), (96, 3)):
        narrower = {"num_embedding": size, "embedding_dim": dim, "latent_channels": dim}
        yield contender("looc-narrow", f"K{size}-d{dim}-m1", **best, **narrower)
    # More codevectors than the rate allows: the match weighs the cost of their bits.
    for size, m, weight in (
        *((256, 1, 0.2), (256, 1, 0.15), (256, 1, 0.1), (256, 1, 0.06), (256, 1, 0.03)),
        *((1024, 1, 0.03), (256, 2, 0.1), (256, 4, 0.1)),
    ):
        weighed = {"num_embedding": size, "embedding_dim": 4, "latent_channels": 4 * m}
        point = f"K{size}-m{m}-{weight}"
        yield contender("looc-rate", point, **best, **weighed, rate_weight=weight)
    for channels, dim in ((32, 128), (128, 128), (128, 32)):
        scaled = {"num_embedding": 256, "embedding_dim": dim, "latent_channels": channels}
        point = f"K256-m{4 * channels // dim}"
        yield contender("looc-scaled", point, **best, **scaled, interpolation_scale=2)
    for size in (16, 64, 1024, 4096):
        yield contender("looc-size", f"K{size}-d16", **best, num_embedding=size, embedding_dim=16)
    for size, dim in ((512, 128), (1024, 64), (1024, 16), (256, 4)):
        published = {"num_embedding": size, "embedding_dim": dim, "lr": TrainConfig.lr}
        yield contender("looc-paper", f"K{size}-d{dim}", **published)


def peers() -> Iterator[Contender]:
    """Other quantisers, each over its own sizes, with the training flags of LooC's best recipe."""
    shared = shared_training("best")
    alive = {**shared, **ALIVE}
    for family, dim, training in (
        *(("sim-vq", 64, shared), ("cvq", 64, shared), ("vq", 64, shared)),
        *(("ema-vq", 64, alive), ("cosine-vq", 16, alive)),
    ):
        for size in SIZES:
            one = {"quantizer": family, "num_embedding": size, "embedding_dim": dim}
            yield contender(family, f"K{size}", **training, **one)
    for distance, several in (("cos", UNITS[1:]), ("l2", (4, 32))):
        for m in several:
            parts = {"num_embedding": 256, "embedding_dim": CHANNELS // m, "distance": distance}
            family = f"multihead-vq-{distance}"
            yield contender(family, f"K256-m{m}", **alive, quantizer="multihead-vq", **parts)
    for m in (4, 16):
        product = {"num_embedding": 256, "embedding_dim": CHANNELS // m, "distance": "cos"}
        yield contender("product-vq", f"K256-m{m}", **alive, quantizer="product-vq", **product)
    yield from residual("residual-vq", **alive)
    yield from fsq("fsq", **shared)
    for dim, m in ((5, 1), (8, 1), (8, 2)):
        signs = {"num_embedding": 2**dim, "embedding_dim": dim, "latent_channels": m * dim}
        signs["lr"] = 3e-4  # it collapses at higher ones
        yield contender("lfq", f"d{dim}-m{m}", **shared, quantizer="lfq", **signs)
    yield contender("none", "", **shared, quantizer="none")


def normalised_peers(latent_norm: str) -> Iterator[Contender]:
    """The strongest peers, and no quantiser, with the normalised latents of LooC's best recipe."""
    shared = {**shared_training("best"), "latent_norm": latent_norm}
    alive = {**shared, **ALIVE}
    for m in UNITS[:4]:
        heads = {"embedding_dim": 4, "latent_channels": 4 * m, "distance": "l2"}
        flags = {**alive, "num_embedding": 256, "quantizer": "multihead-vq", **heads}
        yield contender("multihead-vq-norm", f"K256-m{m}", **flags)
    yield from residual("residual-vq-norm", **alive)
    yield from fsq("fsq-norm", **shared)
    yield contender("none-norm", "", **shared, quantizer="none")


def residual(family: str, **flags: Any) -> Iterator[Contender]:
    """Residual VQ with several codes per position."""
    for m in (2, 4, 8):
        sizes = {"num_embedding": 256, "embedding_dim": 64, "num_quantizers": m}
        yield contender(family, f"K256-m{m}", **flags, quantizer="residual-vq", **sizes)


def fsq(family: str, most: int = UNITS[-1], **flags: Any) -> Iterator[Contender]:
    """FSQ with m units per position, at most so many, which have one channel per level."""
    several = [("8,5,5,5", m) for m in UNITS[1:] if m <= most]
    for levels, m in (("8,4", 1), ("8,6,5", 1), *several):
        dim = levels.count(",") + 1
        scalar = {"levels": levels, "embedding_dim": dim, "latent_channels": m * dim}
        point = f"{levels.replace(',', 'x')}-m{m}"
        yield contender(family, point, **flags, quantizer="fsq", **scalar)


def smoke() -> Iterator[Contender]:
    """A few tiny contenders, to see that everything works."""
    narrow: dict[str, Any] = {"latent_channels": 16}
    best = {"recipe": "best", "num_embedding": 16, **narrow}
    yield contender("looc", "m1", **best, embedding_dim=16)
    yield contender("looc", "m4", **best, embedding_dim=4)
    yield contender("vq", "K16", quantizer="vq", num_embedding=16, embedding_dim=16, **narrow)
    yield contender("none", "", quantizer="none", **narrow)


def tuned() -> Iterator[Contender]:
    """LooC and the strongest of the others at five rates; their suite chooses norm and lr."""
    best: dict[str, Any] = {"recipe": "best"}
    for size, dim, m in (
        *((32, 3, 1), (64, 4, 1), (256, 4, 1), (256, 4, 2)),
        *((1024, 4, 2), (256, 4, 4), (256, 4, 8)),
    ):
        narrow = {"num_embedding": size, "embedding_dim": dim, "latent_channels": m * dim}
        yield contender("looc-narrow", f"K{size}-d{dim}-m{m}", **best, **narrow)
    for dim, m, passes in PASSES:
        deep = {"num_embedding": 256, "embedding_dim": dim, "latent_channels": m * dim}
        point = f"K256-d{dim}-m{m}-r{passes}"
        yield contender("looc-passes", point, **best, **deep, num_passes=passes)
    shared = shared_training("best")
    alive = {**shared, **ALIVE}
    cosine = {"quantizer": "cosine-vq", "num_embedding": 1024, "embedding_dim": 16}
    yield contender("cosine-vq", "K1024", **alive, **cosine)
    for m in UNITS[:4]:
        heads = {"embedding_dim": 4, "latent_channels": 4 * m, "distance": "l2"}
        flags = {**alive, "num_embedding": 256, "quantizer": "multihead-vq", **heads}
        yield contender("multihead-vq-l2", f"K256-m{m}", **flags)
    yield from residual("residual-vq", **alive)
    yield from fsq("fsq", most=8, **shared)
    yield contender("none", "", **shared, quantizer="none")


def long() -> Iterator[Contender]:
    """Two codes per position: LooC as published and by the best recipe, and its peers."""
    published = {"recipe": "paper", "num_embedding": 256, "embedding_dim": CHANNELS // 2}
    yield contender("looc-paper", "K256-m2", **published, latent_norm="none", lr=TrainConfig.lr)
    names = (
        *("looc-narrow-K256-d4-m2", "looc-passes-K256-d8-m1-r2"),
        *("residual-vq-K256-m2", "fsq-8x5x5x5-m2"),
    )
    yield from (contender for contender in tuned() if contender.name in names)


SUITES = {
    "smoke": [*smoke()],
    "fashion-mnist": [*looc(), *peers(), *normalised_peers("batch")],
    # Batches of 16 unlike photographs: their own mean and variance are too noisy.
    "photos": [*looc(latent_norm="running"), *peers(), *normalised_peers("running")],
    **{f"{images}-tuned": [*tuned()] for images in NORMS},
    **{f"{images}-long": [*long()] for images in NORMS},
}


def setup_of(suite: str) -> Setup:
    """Images and budget of a suite; the likely best norm and learning rate come first."""
    images, _, kind = suite.rpartition("-")
    if images not in NORMS:
        return SETUPS[suite]
    setup = SETUPS[images]
    if kind == "tuned":
        norms = sorted(("none", *NORMS.values()), key=lambda norm: norm != NORMS[images])
        return replace(setup, steps=(3000,), latent_norms=tuple(norms), lrs=(2e-3, 1e-3, 4e-3))
    flags = {**setup.flags, "batch_size": 64}
    return replace(setup, flags=flags, steps=LENGTHS, latent_norms=(NORMS[images],))

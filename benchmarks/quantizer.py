"""Speed of the quantiser alone, against dense code, a library and the bare search."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import Tensor

from benchmarks.measure import both_thread_counts, interleaved, median_seconds, seeded
from modules import LooCQuantizer
from modules.quantizers.looc.usage import USAGE_DECAY, reinit_rate
from utils.charts import save_figure
from utils.tables import Table

SHAPE = (256, 128, 7, 7)  # z of a batch of 256 at 28 × 28
SETTINGS = [(k, 4) for k in (64, 256, 1024, 4096, 16384)] + [(512, d) for d in (2, 4, 8, 16, 64)]
DENSE_LIMIT = 8e9  # largest N × K matrix of the dense form, bytes
LIBRARY_LIMIT = 1024  # codevectors up to which the library is timed


def well_used(num_embedding: int, dim: int, features: Tensor) -> LooCQuantizer:
    """A quantiser as in mid-training: its codevectors are features, and all are in use."""
    quantizer = LooCQuantizer(num_embedding, dim).to(features.device)
    with torch.no_grad():
        quantizer.codebook.copy_(features[torch.randperm(len(features))[:num_embedding]])
        quantizer.usage.fill_(1 / num_embedding)
    return quantizer


def both_passes(quantizer: LooCQuantizer, z: Tensor) -> Callable[[], object]:
    """Forward and backward pass of the quantiser."""
    input = z.clone().requires_grad_()

    def run() -> None:
        latents, loss, _ = quantizer(input)
        torch.autograd.backward((latents, loss), (torch.ones_like(latents), None))

    return run


def dense_step(z: Tensor, codebook: Tensor, usage: Tensor) -> Tensor:
    """Compute the method as written down, with the whole N × K matrix; return latents plus loss."""
    batch, channels, height, width = z.shape
    num_embedding, dim = codebook.shape
    features = z.permute(0, 2, 3, 1).reshape(-1, dim)
    similarity = F.normalize(features.detach()) @ F.normalize(codebook.detach()).T  # (N, K)
    indices = similarity.argmax(1)
    quantized = F.embedding(indices, codebook)
    loss = 0.25 * F.mse_loss(quantized.detach(), features) + F.mse_loss(
        quantized, features.detach()
    )
    with torch.no_grad():
        share = torch.bincount(indices, minlength=num_embedding) / len(features)
        usage.lerp_(share, 1 - USAGE_DECAY)
        anchors = features[similarity.argmax(0)]
        codebook.lerp_(anchors, reinit_rate(usage)[:, None])
    latents = features + (quantized - features).detach()
    return latents.view(batch, height, width, channels).permute(0, 3, 1, 2).sum() + loss


def contenders(
    num_embedding: int, dim: int, device: torch.device
) -> dict[str, Callable[[], object]]:
    """Forward and backward passes to time at one size."""
    seeded()
    z = torch.randn(SHAPE).to(device)
    features = z.permute(0, 2, 3, 1).reshape(-1, dim)

    def ours(search: str) -> Callable[[], object]:
        quantizer = well_used(num_embedding, dim, features)
        quantizer.search = search
        return both_passes(quantizer, z)

    no_faiss = ours("compiled" if dim <= 4 else "torch")
    runs: dict[str, Callable[[], object]]
    if device.type == "cpu":
        search = bare_search(features, num_embedding)
        runs = {"bare search": search, "ours": ours("faiss"), "ours, no faiss": no_faiss}
    else:
        runs = {"ours": no_faiss, "ours, deterministic": deterministic(no_faiss)}
        if dim <= 4:  # else the search is that of "ours"
            runs["ours, not compiled"] = ours("torch")
    if 4 * len(features) * num_embedding <= DENSE_LIMIT:
        codebook = features[:num_embedding].clone().requires_grad_()
        usage = torch.full((num_embedding,), 1 / num_embedding, device=device)
        dense_input = z.clone().requires_grad_()
        runs["dense"] = lambda: torch.autograd.backward((dense_step(dense_input, codebook, usage),))
    if num_embedding <= LIBRARY_LIMIT:
        runs["library"] = library(num_embedding, dim, z)
    return runs


def bare_search(features: Tensor, num_embedding: int) -> Callable[[], object]:
    """The search by faiss alone, with as many threads as torch has."""
    import faiss

    index = faiss.IndexFlatL2(features.shape[1])
    index.add(F.normalize(features[:num_embedding]).numpy())
    faiss.omp_set_num_threads(torch.get_num_threads())
    return lambda: index.search(features.numpy(), 1)


def deterministic(run: Callable[[], object]) -> Callable[[], object]:
    """The same call by deterministic algorithms, as in main.py."""

    def chosen() -> None:
        torch.use_deterministic_algorithms(True, warn_only=True)
        torch.utils.deterministic.fill_uninitialized_memory = False  # type: ignore[attr-defined]
        try:
            run()
        finally:
            torch.use_deterministic_algorithms(False)

    return chosen


def library(num_embedding: int, dim: int, z: Tensor) -> Callable[[], object]:
    """vector-quantize-pytorch: cosine, one head per unit, all sharing one codebook."""
    from vector_quantize_pytorch import VectorQuantize

    quantizer = VectorQuantize(
        dim=z.shape[1], codebook_size=num_embedding, codebook_dim=dim, heads=z.shape[1] // dim,
        separate_codebook_per_head=False, use_cosine_sim=True,
    ).to(z.device)  # fmt: skip
    input = z.flatten(2).transpose(1, 2).contiguous().requires_grad_()  # (B, H·W, C)

    def run() -> None:
        latents, _, loss = quantizer(input)
        torch.autograd.backward((latents.sum() + loss.sum(),))

    return run


def step_table(threads: int, settings: list[tuple[int, int]]) -> Table:
    names = ["bare search", "ours", "ours, no faiss", "dense", "library"]
    table = Table(
        f"Quantiser, forward and backward, z {SHAPE}, {threads} thread(s): seconds",
        ["K", "d", *names, "ours / bare", "no faiss / faiss", "dense / ours", "library / ours"],
    )
    torch.set_num_threads(threads)
    for num_embedding, dim in settings:
        torch.compiler.reset()  # PyTorch compiles one function for eight shapes at most
        times = interleaved(contenders(num_embedding, dim, torch.device("cpu")))
        ratio = {name: value.median / times["ours"].median for name, value in times.items()}
        table.rows.append(
            [
                *(num_embedding, dim, *(times.get(name, "–") for name in names)),
                *(1 / ratio["bare search"], ratio["ours, no faiss"]),
                *(ratio.get("dense", "–"), ratio.get("library", "–")),
            ]
        )
    return table


def scaling(path: Path) -> dict[str, list[tuple[float, float]]]:
    """Measure and draw how cost grows with N, K, d and the interpolation scale, on all cores."""
    torch.set_num_threads(both_thread_counts()[-1])
    curves: dict[str, list[tuple[float, float]]] = {
        "batch (N = 1568 · batch)": [
            (batch, seconds(batch=batch)) for batch in (16, 64, 256, 1024)
        ],
        "codevectors K": [(k, seconds(num_embedding=k)) for k in (64, 256, 1024, 4096, 16384)],
        "dimension d": [(d, seconds(dim=d)) for d in (2, 4, 8, 16, 32, 64, 128)],
        "interpolation scale": [(s, seconds(scale=s)) for s in (1, 2, 3, 4)],
    }
    from matplotlib.figure import Figure

    figure = Figure(figsize=(13, 3.2), layout="constrained")
    axes = figure.subplots(1, 4)
    for ax, (name, points) in zip(axes, curves.items()):
        ax.plot(*zip(*points), marker="o", color="#1f6f8b")
        if name != "interpolation scale":
            ax.set_xscale("log", base=2)
        ax.set(xlabel=name, ylabel="seconds", ylim=(0, None))
    figure.suptitle("Quantiser, forward and backward (batch 256, K = 256, d = 4)")
    save_figure(path, figure)
    return curves


def seconds(batch: int = 256, num_embedding: int = 256, dim: int = 4, scale: int = 1) -> float:
    seeded()
    z = torch.randn(batch, *SHAPE[1:])
    features = z.permute(0, 2, 3, 1).reshape(-1, dim)
    quantizer = well_used(num_embedding, dim, features)
    quantizer.interpolation_scale = scale
    return median_seconds(both_passes(quantizer, z), rounds=5)


def tables(quick: bool) -> Iterator[Table]:
    for threads in both_thread_counts():
        yield step_table(threads, SETTINGS[:1] if quick else SETTINGS)

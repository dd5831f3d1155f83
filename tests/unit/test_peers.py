"""Properties of every quantiser under one interface; refused flags."""

from __future__ import annotations

import json
import re
import sys
from collections.abc import Callable
from dataclasses import asdict
from pathlib import Path
from typing import Any

import pytest
import torch

from modules import VQVAE, LibraryQuantizer, LooCQuantizer, ModelConfig
from modules.config import implied_flags
from modules.quantizers.lookup_free import even_levels
from modules.quantizers.registry import QUANTIZERS
from tests.conftest import Outcome, refusal
from tests.scripts.test_cli import error_line, train
from utils.checkpoints.checkpoint import load_model, read_checkpoint, save_checkpoint
from utils.codebook.codes.header import fingerprint, index_shape
from utils.codebook.plots import draw_all
from utils.codebook.statistics import CodebookStatistics
from utils.errors import UserError
from utils.evaluation.schema import CodebookUse
from utils.flags.arguments import build_model_config
from utils.report.codebook_use import unit_slots
from utils.report.files import find
from utils.training.reconstruction import check_parts

Script = Callable[..., Outcome]
SIZE = {"hidden_size": 24, "num_residual_hidden": 4}  # divided by d of every quantiser
SETTINGS: dict[str, dict[str, Any]] = {
    **{name: {"quantizer": name, "num_embedding": 64}
       for name, spec in QUANTIZERS.items() if spec.library},
    **{f"{name}-kmeans": {"quantizer": name, "num_embedding": 8, "codebook_start": "kmeans"}
       for name in ("ema-vq", "cosine-vq", "multihead-vq", "product-vq", "residual-vq")},
    **{f"{name}-straight": {"quantizer": name, "gradient": "straight_through"}
       for name in ("ema-vq", "multihead-vq", "sim-vq")},
    "multihead-vq-l2": {"quantizer": "multihead-vq", "distance": "l2"},
    "product-vq-one-slot": {"quantizer": "product-vq", "latent_channels": 4},
    "fsq-given": {"quantizer": "fsq", "levels": "5,3,3"},
    "lfq-given": {"quantizer": "lfq", "embedding_dim": 3, "commitment_cost": 0.5},
    "residual-vq-7": {"quantizer": "residual-vq", "num_quantizers": 7},
    **{f"{name}-{norm}": {"quantizer": name, "num_embedding": 64, "latent_norm": norm}
       for name, norm in (("fsq", "running"), ("product-vq", "running"), ("residual-vq", "layer"))},
}  # fmt: skip
every_setting = pytest.mark.parametrize("name", SETTINGS)
every_quantizer = pytest.mark.parametrize("name", QUANTIZERS)


@pytest.fixture(autouse=True)
def library(request: pytest.FixtureRequest) -> None:
    """Skip tests that need the library if it is not installed."""
    if "absent" not in request.node.name:
        pytest.importorskip("vector_quantize_pytorch", reason="the peers' library")


def make(name: str) -> VQVAE:
    torch.manual_seed(0)
    flags = SETTINGS.get(name, {"quantizer": name})
    return VQVAE(build_model_config({**SIZE, **flags}, 1))


def peer(name: str) -> tuple[LibraryQuantizer, torch.Tensor]:
    """Return a quantiser and latents in channels-last layout."""
    model = make(name)
    assert isinstance(model.quantizer, LibraryQuantizer)
    generator = torch.Generator().manual_seed(1)
    z = torch.randn(3, model.config.channels, 5, 4, generator=generator)
    return model.quantizer, z.to(memory_format=torch.channels_last)


def state_of(module: torch.nn.Module) -> dict[str, torch.Tensor]:
    buffers = dict(module.named_buffers())  # including those that are not in a checkpoint
    return {key: value.clone() for key, value in {**module.state_dict(), **buffers}.items()}


def same(one: dict[str, torch.Tensor], other: dict[str, torch.Tensor]) -> bool:
    return one.keys() == other.keys() and all(torch.equal(one[key], other[key]) for key in one)


# ---------------------------------------------------------------------------------------- property


@pytest.mark.parametrize("norm", ["none", "unit", "layer", "batch", "running"])
@pytest.mark.parametrize("name", ["none", "fsq", "multihead-vq", "residual-vq", "sim-vq"])
def test_latents_are_normalised_as_loocs(
    name: str, norm: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    flags = {**SIZE, "quantizer": name, "latent_norm": norm}
    model = VQVAE(build_model_config(flags, 1))
    quantizer, channels = model.quantizer, model.config.channels
    dim = channels if name == "none" else model.config.embedding_dim
    looc = LooCQuantizer(8, dim, latent_norm=norm, latent_channels=channels)
    seen = []
    if isinstance(quantizer, LibraryQuantizer):
        forward = quantizer.library.forward

        def watch(positions: torch.Tensor) -> Any:
            seen.append(positions)
            return forward(positions)

        monkeypatch.setattr(quantizer.library, "forward", watch)
    generator = torch.Generator().manual_seed(1)
    for training in (True, True, False):  # evaluation uses averages that have moved
        z = 3 + 2 * torch.randn(3, channels, 5, 4, generator=generator)
        expected = looc._cut(z, training).flatten(3).flatten(1, 2)
        model.train(training)
        latents = quantizer(z).latents
        found = seen[-1] if seen else latents.permute(0, 2, 3, 1).flatten(1, 2)
        torch.testing.assert_close(found, expected)
    quantizer.encode(z)
    for buffer, value in looc.named_buffers():
        if buffer.startswith("latent_"):
            torch.testing.assert_close(model.get_buffer(f"quantizer.{buffer}"), value)


@every_setting
def test_indices_are_within_their_codebooks(name: str) -> None:
    model, (quantizer, z) = make(name), peer(name)
    config = model.config
    for mode in (True, False):
        latents, loss, indices = quantizer.train(mode)(z)
        assert latents.shape == z.shape
        assert loss.shape == ()
        assert indices.shape == (3, 5, 4, config.num_slots)
        assert indices.dtype == torch.int64
        assert 0 <= indices.min() <= indices.max() < config.num_embedding
    assert config.num_codebooks in (1, config.num_slots)
    codevectors = config.num_embedding * config.num_codebooks
    assert quantizer.codebook.shape == (codevectors, config.embedding_dim)
    assert index_shape(config, 16) == (4, 4, config.num_slots)


@every_setting
def test_output_is_exactly_the_decoding_of_its_own_indices(name: str) -> None:
    quantizer, z = peer(name)
    quantizer(z)  # k-means has run
    output, loss, indices = quantizer.eval()(z)
    assert torch.equal(quantizer.decode(indices), output)
    assert torch.equal(quantizer.encode(z), indices)
    assert loss == 0
    model, images = make(name).eval(), torch.rand(2, 1, 12, 8) * 2 - 1
    assert torch.equal(model.decode(model.encode(images)), model(images)[0])


@pytest.mark.parametrize("name", [*SETTINGS, "looc", "cvq", "vq"])
def test_what_is_no_index_is_named(name: str) -> None:
    """In models and quantisers alike, also where the library would wrap or clamp."""
    model = make(name)
    slots, num_embedding = model.config.num_slots, model.config.num_embedding
    right = torch.zeros(1, 3, 2, slots, dtype=torch.int64)
    model.decode(right)
    for decode in (model.decode, model.quantizer.decode):
        any_rank = decode != model.decode and isinstance(model.quantizer, LooCQuantizer)
        for shape in ((1, 6 * slots), (6 * slots,), (1, 3, 2, slots + 1), (3, 2, slots)):
            if any_rank and shape[-1] == slots:
                continue
            positions = "…" if any_rank and len(shape) != 4 else "H, W"
            message = f"indices of shape {shape} are not (B, {positions}, {slots})"
            with pytest.raises(ValueError, match=re.escape(message)):
                decode(torch.zeros(shape, dtype=torch.int64))
        for wrong in (-1, num_embedding):
            found = f"{min(wrong, 0)} … {max(wrong, 0)}, not in [0, {num_embedding})"
            message = f"indices of shape (1, 3, 2, {slots}) are {found}"
            with pytest.raises(ValueError, match=re.escape(message)):
                decode(right.index_put((torch.tensor(0),) * 4, torch.tensor(wrong)))
        for narrow in (torch.uint8, torch.int16, torch.int32):
            assert torch.equal(decode(right.to(narrow)), decode(right))
        for wrong_type in (torch.float32, torch.bool):
            with pytest.raises(ValueError, match=f"indices of {wrong_type} are not integers"):
                decode(right.to(wrong_type))


@pytest.mark.parametrize("name", [name for name in QUANTIZERS if QUANTIZERS[name].parts])
def test_no_image_is_a_batch_too(name: str) -> None:
    """One of several processes may have no image at the end of an epoch."""
    model = make(name)
    for mode in (True, False):
        z = torch.zeros(0, model.config.channels, 5, 4, requires_grad=True)
        latents, loss, indices = model.train(mode).quantizer(z)
        assert latents.shape == z.shape
        assert indices.shape == (0, 5, 4, model.config.num_slots)
        (latents.sum() + loss).backward()


@every_setting
def test_every_unit_decodes_to_its_codevector(name: str) -> None:
    quantizer, z = peer(name)
    quantizer(z)
    indices = quantizer.eval().encode(z)
    dim, slots = quantizer.embedding_dim, indices.shape[-1]
    tables = quantizer.codebook.view(-1, quantizer.num_embedding, dim)  # (1 or m, K, d)
    chosen = tables.expand(slots, -1, -1)[torch.arange(slots), indices]  # (B, H, W, m, d)
    joined = chosen.sum(-2) if name.startswith("residual-vq") else chosen.flatten(-2)
    torch.testing.assert_close(quantizer.decode(indices), joined.permute(0, 3, 1, 2))


@every_setting
def test_training_gives_nearly_the_same(name: str) -> None:
    """The library's output differs from the decoding by rounding only."""
    quantizer, z = peer(name)
    quantizer(z)
    codebook = state_of(quantizer)
    latents, _, indices = quantizer(z.requires_grad_())
    quantizer.library.load_state_dict(
        {key.removeprefix("library."): value for key, value in codebook.items()
         if key in quantizer.state_dict() and key.startswith("library.")}
    )  # fmt: skip
    assert torch.equal(quantizer.encode(z), indices)
    torch.testing.assert_close(latents, quantizer.decode(indices), rtol=1e-3, atol=1e-4)


@every_setting
def test_the_gradient_reaches_the_latents(name: str) -> None:
    quantizer, z = peer(name)
    latents, loss, _ = quantizer(z.requires_grad_())
    (gradient,) = torch.autograd.grad((latents * torch.randn(z.shape)).sum() + loss, z)
    assert gradient.isfinite().all()
    assert gradient.abs().sum() > 0


@every_setting
@pytest.mark.parametrize("trained", [False, True])
def test_evaluation_changes_nothing(name: str, trained: bool) -> None:
    quantizer, z = peer(name)
    if trained:
        quantizer(z)
    before, random_state = state_of(quantizer), torch.get_rng_state()
    quantizer.eval()(z)
    quantizer.train().encode(z)
    quantizer.encode(torch.full_like(z, torch.nan))
    assert torch.equal(torch.get_rng_state(), random_state)
    assert same(before, state_of(quantizer))
    assert all(module.training for module in quantizer.modules())


@every_setting
def test_nothing_is_learnt_from_what_is_not_finite(name: str) -> None:
    quantizer, z = peer(name)
    quantizer(z)
    before = state_of(quantizer)
    z[1, 0, 2, 2] = torch.nan
    _, loss, indices = quantizer(z)
    assert not loss.isfinite()
    assert 0 <= indices.min() <= indices.max() < quantizer.num_embedding
    assert same(before, state_of(quantizer))


@every_setting
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float64])
def test_other_types_are_quantised_in_float32(name: str, dtype: torch.dtype) -> None:
    quantizer, z = peer(name)
    twin = peer(name)[0]
    torch.manual_seed(2)  # k-means draws
    with torch.autocast("cpu", torch.bfloat16):
        latents, loss, indices = quantizer(z.to(dtype))
    torch.manual_seed(2)
    expected = twin(z.to(dtype).float())
    assert latents.dtype == dtype
    assert loss.dtype == torch.float32
    assert torch.equal(indices, expected.indices)
    torch.testing.assert_close(latents, expected.latents.to(dtype))
    assert same(state_of(quantizer), state_of(twin))


@every_setting
def test_a_checkpoint_rebuilds_it(name: str, tmp_path: Path) -> None:
    model, images = make(name), torch.rand(2, 1, 12, 8)
    model(images)
    save_checkpoint(tmp_path / "m.pt", model, {})
    assert read_checkpoint(tmp_path / "m.pt").model_config == model.config
    loaded = load_model(tmp_path / "m.pt")
    assert same(loaded.state_dict(), model.state_dict())
    assert torch.equal(loaded(images)[0], model.eval()(images)[0])
    assert fingerprint(loaded) == fingerprint(model)
    state = model.state_dict()
    for key in [key for key in state if "quantizer" in key and state[key].is_floating_point()]:
        state[key].view(-1)[0] = torch.nan
        save_checkpoint(tmp_path / "bad.pt", model, {})
        assert f"{key} is not finite" in refusal(lambda: read_checkpoint(tmp_path / "bad.pt"))
        state[key].view(-1)[0] = 0


def test_latents_of_other_channels_are_refused() -> None:
    with pytest.raises(ValueError, match=r"latents of shape .* are not \(B, 4, H, W\)"):
        make("ema-vq").quantizer(torch.zeros(1, 5, 2, 2))


# ------------------------------------------------------------------------------------ no quantiser


def test_without_a_quantiser_latents_pass() -> None:
    model, images = make("none"), torch.rand(2, 1, 12, 8)
    reconstruction, quantized = model(images)
    assert quantized.indices.shape == (2, 3, 2, 0)
    assert quantized.latents.shape == (2, 24, 3, 2)
    assert quantized.loss == 0
    assert torch.equal(reconstruction, model.decoder(model.pre_vq_conv(model.encoder(images))))
    assert torch.equal(model.encode(images), quantized.indices)
    with pytest.raises(ValueError, match="without a quantiser"):
        model.decode(quantized.indices)


def test_what_is_not_quantised_has_no_rate() -> None:
    statistics = CodebookStatistics(256, 0)
    statistics.add(torch.empty(5, 3, 3, 0, dtype=torch.int64))
    statistics.sum_over_ranks()
    assert statistics.summary() == CodebookUse(images=5)
    assert not statistics.rate(16)
    assert draw_all(statistics, torch.empty(0, 0)) == {}


def test_codebooks_of_slots_are_counted_apart() -> None:
    statistics = CodebookStatistics(4, 2)
    statistics.add(torch.tensor([[0, 0], [1, 0], [1, 0], [0, 0]]).view(1, 2, 2, 2))
    assert statistics.counts.tolist() == [2, 2, 0, 0, 4, 0, 0, 0]
    summary = statistics.summary()
    assert summary.codevectors == 8
    assert summary.usage_percent == 100 * 3 / 8
    assert summary.slot_perplexity == [2, 1]
    assert statistics.rate(16).entropy_bits_per_pixel_by_slot == 4 * 1 / 16
    assert sorted(draw_all(statistics, torch.randn(8, 3))) == ["codebook", "slots", "usage"]


# ------------------------------------------------------------------------------------------- flags


@pytest.mark.parametrize(
    ("num_embedding", "count", "levels"),
    [
        (256, 4, (4, 4, 4, 4)), (256, 3, (8, 8, 4)), (240, 3, (8, 6, 5)), (1000, 4, (8, 5, 5, 5)),
        (64, 3, (4, 4, 4)), (64, 2, (8, 8)), (1024, 5, (4, 4, 4, 4, 4)), (257, 4, None),
        (17, 1, None), (2, 1, None),
    ],
)  # fmt: skip
def test_levels_are_even(num_embedding: int, count: int, levels: tuple[int, ...] | None) -> None:
    assert even_levels(num_embedding, count) == levels


@pytest.mark.parametrize(
    ("flags", "expected"),
    [
        ({"quantizer": "fsq"}, ("4,4,4,4", 256, 4)),
        ({"quantizer": "fsq", "levels": "8,5,5,5"}, ("8,5,5,5", 1000, 4)),
        ({"quantizer": "fsq", "num_embedding": 64}, ("8,8", 64, 2)),
        ({"quantizer": "fsq", "num_embedding": 240, "latent_channels": 6}, ("8,6,5", 240, 3)),
        ({"quantizer": "lfq"}, (None, 256, 8)),
        ({"quantizer": "lfq", "embedding_dim": 4}, (None, 16, 4)),
        ({"quantizer": "lfq", "num_embedding": 16}, (None, 16, 4)),
    ],
)
def test_sizes_follow_from_those_given(flags: dict[str, Any], expected: tuple[Any, ...]) -> None:
    config = build_model_config(flags, 1)
    assert (config.levels, config.num_embedding, config.embedding_dim) == expected
    assert implied_flags(asdict(config)) == {}


@pytest.mark.parametrize(
    ("words", "message"),
    [
        ("fsq anchor=random", "--anchor random has no effect with --quantizer fsq"),
        ("fsq levels=8,5,5,5 num_embedding=512", "makes 1000 codevectors, not --num_embedding 512"),
        ("fsq levels=8,5,5,5 embedding_dim=3", "has 4 dimensions, not --embedding_dim 3"),
        ("fsq num_embedding=257", "--num_embedding 257 is not a product of 4 levels from 3 to 16"),
        ("fsq levels=8,2", "--levels 8,2 is not a list of up to 12 numbers of at least 3"),
        ("fsq levels=8;5", "--levels 8;5 is not a list"),
        ("fsq levels=1024,1025", "makes 1049600 codevectors, more than 1048576"),
        ("fsq levels=8,5,5", "--embedding_dim 3 does not divide the 128 channels of --hidden_size"),
        ("fsq commitment_cost=1.0", "--commitment_cost 1.0 has no effect with --quantizer fsq"),
        ("lfq num_embedding=240", "--num_embedding 240 is not 2 to the power of --embedding_dim"),
        ("lfq embedding_dim=9000", "--num_embedding 256 is not 2 to the power of"),
        ("ema-vq distance=cos", "--distance cos has no effect with --quantizer ema-vq"),
        ("cosine-vq distance=l2", "--distance l2 has no effect with --quantizer cosine-vq"),
        ("ema-vq levels=8,8", "--levels 8,8 has no effect with --quantizer ema-vq"),
        ("ema-vq num_quantizers=2", "--num_quantizers 2 has no effect with --quantizer ema-vq"),
        ("ema-vq latent_channels=8", "--latent_channels 8 is not --embedding_dim 4"),
        ("cvq latent_channels=8", "--latent_channels 8 is not --embedding_dim 4"),
        ("ema-vq codebook_start=features", "--codebook_start features needs --quantizer looc"),
        ("sim-vq codebook_start=kmeans", "--codebook_start kmeans has no effect with"),
        ("none num_embedding=16", "--num_embedding 16 has no effect with --quantizer none"),
        ("looc levels=8,8", "--levels 8,8 has no effect with --quantizer looc"),
        ("multihead-vq embedding_dim=5", "--embedding_dim 5 does not divide the 128 channels"),
        ("product-vq interpolation_scale=2", "--interpolation_scale 2 has no effect with"),
    ],
)
def test_flags_without_effect_are_refused(words: str, message: str) -> None:
    quantizer, *pairs = words.split()
    flags: dict[str, Any] = {"quantizer": quantizer, **dict(pair.split("=") for pair in pairs)}
    for name, value in flags.items():
        if type(getattr(ModelConfig, name)) in (int, float) or name == "latent_channels":
            flags[name] = float(value) if name == "commitment_cost" else int(value)
    assert message in refusal(lambda: build_model_config(flags, 1))


@every_quantizer
def test_flags_at_their_defaults_pass(name: str) -> None:
    config = build_model_config({"quantizer": name}, 3)
    assert build_model_config(asdict(config), 3) == config


@every_quantizer
def test_a_batch_in_parts_is_refused_where_it_cannot_be(
    name: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    config = build_model_config({"quantizer": name}, 1)
    check_parts(config, 1)
    if config.spec.parts:
        check_parts(config, 4)
        return
    takers = "needs --quantizer looc, cvq, vq, none, fsq, not " + name
    assert refusal(lambda: check_parts(config, 4)) == f"--accumulate 4 {takers}"
    monkeypatch.setattr("utils.training.reconstruction.num_ranks", lambda: 2)
    assert "2 processes need --quantizer looc" in refusal(lambda: check_parts(config, 1))


# ----------------------------------------------------------------------------------------- scripts


def test_an_absent_library_is_one_line(
    script: Script, mnist: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(sys.modules, "vector_quantize_pytorch", None)
    hint = "--quantizer fsq needs vector-quantize-pytorch: pip install vector-quantize-pytorch"
    assert hint in error_line(train(script, mnist, "--quantizer", "fsq"))
    config = ModelConfig(quantizer="fsq", levels="4,4,4,4", anchor="none")
    path = Path("out/models/e/best.pt")
    save_checkpoint(path, VQVAE(ModelConfig()), {})
    content = torch.load(path)
    torch.save({**content, "model_config": asdict(config)}, path)
    with pytest.raises(UserError, match=f"{path}: {hint}"):
        read_checkpoint(path)
    assert train(script, mnist, "--quantizer", "none", "--num_embedding", "256").code == 0


@pytest.mark.parametrize(
    "words",
    ["residual-vq --codebook_start kmeans", "product-vq --precision bf16", "sim-vq", "lfq", "none"],
)
def test_resumed_is_as_uninterrupted(words: str, script: Script, mnist: Path) -> None:
    sizes = ("--num_embedding", "256" if words == "none" else "16")
    flags = ("--quantizer", *words.split(), *sizes, "--num_epochs", "3", "--save_every", "2")
    for name, steps in (("whole", ["9"]), ("cut", ["2", "7", "9"])):
        for number in steps:
            outcome = train(script, mnist, *flags, "--max_steps", number, name=name)
            assert outcome.code == 0, outcome.err
    whole, cut = (read_checkpoint(Path(f"out/models/{name}/last.pt")) for name in ("whole", "cut"))
    assert whole.count("step") == cut.count("step") == 9
    assert same(dict(whole.state_dict), dict(cut.state_dict))


@pytest.mark.parametrize("name", ["residual-vq", "product-vq", "fsq"])
def test_pictures_of_code_files_are_the_same(name: str, script: Script, mnist: Path) -> None:
    pytest.importorskip("constriction", reason="the entropy coder")
    assert train(script, mnist, "--quantizer", name, "--num_embedding", "64").code == 0
    tested = ("test.py", "--output_folder", "out", "--model_name", "e/best.pt")
    results = Path("out/results/e/best/mnist")
    saved = script(*tested, "--save_codes")
    assert saved.code == 0, saved.err
    analysis = json.loads((results / "analysis.json").read_text())["codebook"]
    assert len(analysis["counts"]) == analysis["codevectors"]
    own = "each slot has its own" in unit_slots(find(results))
    assert own == (name != "fsq")
    decoded = script(*tested, "--from_codes", str(results / "codes.looc"))
    assert "bit for bit" in decoded.out


def test_scripts_without_a_quantiser(script: Script, mnist: Path) -> None:
    trained = train(script, mnist, "--quantizer", "none", "--num_embedding", "256")
    assert trained.code == 0, trained.err
    tested = ("test.py", "--output_folder", "out", "--model_name", "e/best.pt")
    outcome = script(*tested)
    assert outcome.code == 0, outcome.err
    assert "not quantised" in outcome.out
    assert "usage" not in outcome.out
    results = Path("out/results/e/best/mnist")
    page = (results / "report.html").read_text()
    assert "Latents are not quantised" in page
    assert 'id="slots"' not in page
    assert not (results / "usage.png").exists()
    assert "--quantizer none leaves no codes" in error_line(script(*tested, "--save_codes"))
    assert "--search torch has no effect" in error_line(script(*tested, "--search", "torch"))

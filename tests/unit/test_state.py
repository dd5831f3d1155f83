"""State of quantiser and plug-in: it describes itself, and nothing in it is ever undefined."""

from __future__ import annotations

import copy
import io
import json
import warnings
from collections.abc import Iterator
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.optim.swa_utils import AveragedModel, get_ema_multi_avg_fn, get_swa_multi_avg_fn

from modules import VQVAE, LooCPlugin, LooCQuantizer, ModelConfig
from modules.checkpoint import EARLIER_TYPES
from modules.quantizers.looc.state import as_settings
from tests.unit.test_plugin import need

PAPER: dict[str, Any] = {"latent_channels": 8}
FOLLOWING: dict[str, Any] = {
    **{"codebook_update": "ema", "codebook_start": "features", "anchor": "random"},
    **{"latent_norm": "running", "latent_channels": 8, "distance": "l2"},
}
KINDS = {"paper": PAPER, "following": FOLLOWING}
every_kind = pytest.mark.parametrize("setting", KINDS.values(), ids=KINDS)


def make(**setting: Any) -> LooCQuantizer:
    return LooCQuantizer(16, 4, **setting)


def latents(seed: int = 1) -> Tensor:
    return torch.randn(2, 8, 3, 5, generator=torch.Generator().manual_seed(seed))


def trained(setting: dict[str, Any]) -> LooCQuantizer:
    torch.manual_seed(0)
    quantizer = make(**setting)
    for seed in range(5):
        quantizer(latents(seed).requires_grad_())
    return quantizer


@pytest.fixture
def _silent() -> Iterator[None]:
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        yield


# ------------------------------------------------------------------------------------- settings

CONTRADICTING: list[tuple[dict[str, Any], dict[str, Any], str]] = [
    ({"distance": "cos"}, {"distance": "l2"}, "distance 'cos' .* is 'l2'"),
    ({"split": "interval"}, {"split": "fixed"}, "split 'interval' .* is 'fixed'"),
    ({"interpolation_scale": 2}, {}, "interpolation_scale 2 .* is 0"),
    ({"latent_norm": "unit"}, {}, "latent_norm 'unit' .* is 'none'"),
    ({"latent_norm": "batch"}, {"latent_norm": "running"}, "latent_norm 'batch' .* is 'running'"),
    ({"distance": "l2"}, {"distance": "l2", "rate_weight": 0.5}, "rate_weight 0.0 .* is 0.5"),
    ({"num_passes": 3}, {}, "num_passes 3 .* is 1"),
    ({"embedding_dim": 2}, {}, "embedding_dim 2 .* is 4"),
]


@pytest.mark.parametrize(("ours", "theirs", "told"), CONTRADICTING)
@pytest.mark.parametrize("strict", [True, False])
def test_a_contradicting_state_is_refused(
    ours: dict[str, Any], theirs: dict[str, Any], told: str, strict: bool
) -> None:
    """With both values, and nothing is loaded."""
    plugin, other = LooCPlugin(16, 8, **ours), LooCPlugin(16, 8, **theirs)
    before = copy.deepcopy(plugin.state_dict())
    with pytest.raises(RuntimeError, match=f"quantizer {told}") as caught:
        plugin.load_state_dict(other.state_dict(), strict=strict)
    assert len(str(caught.value).splitlines()) == 2
    assert all(torch.equal(value, before[name]) for name, value in plugin.state_dict().items())


def test_sizes_that_contradict_are_named() -> None:
    one, other = LooCQuantizer(16, 4, latent_channels=8), LooCQuantizer(32, 4, latent_channels=4)
    told = "num_embedding 16 .* is 32; latent_channels 8 .* is 4"
    with pytest.raises(RuntimeError, match=told):
        one.load_state_dict(other.state_dict())
    remapped = partial(LooCPlugin, 16, 8, remap=[3, 1])
    with pytest.raises(RuntimeError, match=r"unknown_index 'extra' .* is 'random'"):
        remapped(unknown_index="extra").load_state_dict(remapped().state_dict())


@pytest.mark.usefixtures("_silent")
def test_settings_of_training_may_differ() -> None:
    """Also those with statistics of their own, which the other does not have."""
    setting: dict[str, Any] = {"codebook_update": "ema", "codebook_start": "features"}
    following = trained(setting | {"commitment_cost": 1.0, "gradient": "rotation"})
    plain = make(ema_decay=0.9, latent_channels=8, interpolation_scale=1)
    plain.load_state_dict(following.state_dict())
    assert torch.equal(plain.codebook, following.codebook)
    again = make(**setting)
    again.load_state_dict(plain.state_dict())
    again(latents().requires_grad_())
    assert torch.nn.functional.cosine_similarity(again.codebook, plain.codebook).min() > 0


@every_kind
@pytest.mark.usefixtures("_silent")
def test_a_state_survives_files(setting: dict[str, Any], tmp_path: Path) -> None:
    """torch.save with weights_only, safetensors, half precision: the settings stay readable."""
    quantizer = trained(setting)
    file = io.BytesIO()
    torch.save(quantizer.state_dict(), file)
    file.seek(0)
    states = [torch.load(file, weights_only=True)]
    safetensors = need("safetensors.torch")
    safetensors.save_file(quantizer.state_dict(), tmp_path / "q.safetensors")
    states.append(safetensors.load_file(tmp_path / "q.safetensors"))
    for state in states:
        one, other = copy.deepcopy(quantizer), make(**setting)
        other.load_state_dict(state)
        for each in (one, other):
            torch.manual_seed(0)
            each(latents(9).requires_grad_())
        for name, value in one.state_dict().items():
            assert torch.equal(value, other.state_dict()[name]), name
    for dtype in (torch.float16, torch.bfloat16):
        stored = {name: value.to(dtype) for name, value in quantizer.state_dict().items()}
        assert as_settings(stored["settings"]) == quantizer.config
        make(**setting).load_state_dict(stored)
        told = "split 'interval' contradicts the state, whose split is 'fixed'"
        with pytest.raises(RuntimeError, match=told):
            make(**setting | {"split": "interval"}).load_state_dict(stored)


@every_kind
@pytest.mark.usefixtures("_silent")
def test_states_of_before_load_in_silence(setting: dict[str, Any]) -> None:
    """They have no settings, and other types."""
    quantizer = trained(setting)
    state = {**quantizer.state_dict()}
    del state["settings"]
    for name, kind in EARLIER_TYPES.items():
        if name.removeprefix("quantizer.") in state:
            state[name.removeprefix("quantizer.")] = state[name.removeprefix("quantizer.")].to(kind)
    other = make(**setting)
    other.load_state_dict(state)
    for name, value in quantizer.state_dict().items():
        assert torch.equal(other.state_dict()[name], value), name


def test_config_makes_the_module_again() -> None:
    quantizer = LooCQuantizer(
        16, 2, distance="l2", rate_weight=0.1, channel_dim=-1, gradient="rotation"
    )
    config = json.loads(json.dumps(quantizer.config))
    assert LooCQuantizer.from_config(config).config == quantizer.config
    assert as_settings(quantizer.state_dict()["settings"]) == config
    quantizer.commitment_cost = 2.0  # an attribute may change
    assert as_settings(quantizer.state_dict()["settings"])["commitment_cost"] == 2
    settings: list[dict[str, Any]] = [
        {},
        {"remap": torch.tensor([9, 4]), "unknown_index": "extra", "legacy": True},
        {"remap": [9, 4, 3], "unknown_index": 2, "codebook_update": "ema", "split": "interval"},
    ]
    for setting in settings:
        plugin = LooCPlugin(16, 8, **setting)
        again = LooCPlugin.from_config(json.loads(json.dumps(plugin.config)))
        assert again.config == plugin.config
        again.load_state_dict(plugin.state_dict())
        assert again.quantizer.config == plugin.quantizer.config
        for name in set(setting) - {"remap"}:
            assert plugin.config[name] == setting[name]


def test_repr_shows_what_is_not_the_default() -> None:
    assert repr(LooCQuantizer(16, 4)) == "LooCQuantizer(16, 4)"
    assert repr(make(**PAPER)) == "LooCQuantizer(16, 4, latent_channels=8)"
    shown = repr(LooCPlugin(16, 8, 0.5, remap=list(range(16)), distance="l2"))
    assert shown.startswith("LooCPlugin(\n  16, 8, beta=0.5, remap=[0, 1, 2, 3, 4, 5, ...], dist")
    assert "LooCQuantizer(16, 4, commitment_cost=0.5, distance='l2', latent_channels=8)" in shown


# ----------------------------------------------------------------------------------- statistics

STARTS: dict[str, dict[str, Any]] = {
    **KINDS,
    "ema": {"codebook_update": "ema", "codebook_start": "kmeans"},
    "start": {"codebook_start": "features"},
}


@pytest.mark.parametrize("setting", STARTS.values(), ids=STARTS)
@pytest.mark.parametrize("kept", ["codebook", "zeros"])
def test_a_codebook_without_statistics_is_not_made_anew(setting: dict[str, Any], kept: str) -> None:
    """Parameters are saved alone by tools that average them; the module may be a new one."""
    quantizer = trained(setting)
    state: dict[str, Any] = {"codebook": quantizer.codebook.detach().clone()}
    if kept == "zeros":
        state = {**make(**setting).state_dict(), **state}
    other = make(**setting)
    with pytest.warns(UserWarning, match=r"without its statistics \(usage") as caught:
        other.load_state_dict(state)
    assert ("latent_mean, latent_variance" in str(caught[0].message)) == (setting is FOLLOWING)
    before = other.codebook.detach().clone()
    assert torch.equal(before, quantizer.codebook)
    other(latents(7).requires_grad_())
    unused = torch.bincount(other.encode(latents(7)).flatten(), minlength=16) == 0
    moved = (other.codebook - before).norm(dim=1)
    assert moved.max() <= 0.4 * (latents(7).norm() + before.norm())
    if "ema" not in str(setting):
        assert torch.equal(other.codebook, before)
    assert torch.equal(other.codebook[unused], before[unused])
    assert (moved < before.norm(dim=1)).float().mean() > 0.5


@pytest.mark.usefixtures("_silent")
def test_a_new_state_stays_new() -> None:
    """Nothing is inferred of a quantiser that was not trained: resumed equals uninterrupted."""
    setting: dict[str, Any] = {"codebook_start": "features", "codebook_update": "ema"}
    one, other = make(**setting), make(**setting)
    other.load_state_dict(one.state_dict())
    for quantizer in (one, other):
        torch.manual_seed(0)
        quantizer(latents().requires_grad_())
    assert other.started
    for name, value in one.state_dict().items():
        assert torch.equal(other.state_dict()[name], value), name
    make(anchor="none", distance="l2").load_state_dict({"codebook": one.codebook.detach()})
    with pytest.raises(RuntimeError, match=r"Missing key.*codebook"):
        make().load_state_dict({"usage": one.usage})


@every_kind
@pytest.mark.parametrize("rule", [get_swa_multi_avg_fn(), get_ema_multi_avg_fn(0.9), None])
def test_averages_of_buffers(setting: dict[str, Any], rule: Any) -> None:
    """An average of buffers works, describes itself and knows that it was trained."""
    quantizer = make(**setting)
    average = AveragedModel(quantizer, multi_avg_fn=rule, use_buffers=True)
    for seed in range(3):
        quantizer(latents(seed).requires_grad_())
        average.update_parameters(quantizer)
    state = average.module.state_dict()
    assert as_settings(state["settings"]) == quantizer.config
    other = make(**setting)
    other.load_state_dict(state)
    assert other.started is None or other.started


# --------------------------------------------------------------------------------- device "meta"


def test_shapes_are_computed_on_meta() -> None:
    with torch.device("meta"):
        quantizer = LooCQuantizer(16, 4, interpolation_scale=2).eval()
        latents, _, indices = quantizer(torch.empty(2, 8, 4, 6))
        assert latents.shape == quantizer.decode(indices).shape == (2, 8, 4, 6)
        assert quantizer.encode(latents).shape == indices.shape == (2, 4, 6, 8)


@every_kind
@pytest.mark.usefixtures("_silent")
def test_memory_without_values_is_never_left(setting: dict[str, Any]) -> None:
    plugin = partial(LooCPlugin, 16, 8, remap=[5, 3])
    for form in (partial(make, **setting), plugin):
        with torch.device("meta"):
            module: Any = form()
        assert next(module.parameters()).is_meta
        module.to_empty(device="cpu")
        torch.manual_seed(3)
        module.reset_parameters()
        torch.manual_seed(3)
        fresh = form().state_dict()
        for name, value in module.state_dict().items():
            assert torch.equal(value, fresh[name]), name
        with torch.device("meta"):
            module = nn.Sequential(form())
        module.to_empty(device="cpu")
        found = module[0].state_dict()
        assert all(
            torch.equal(found[name], fresh[name]) for name in found if "codebook" not in name
        )
        assert 0 < next(module.parameters()).abs().max() <= 1 / 16


@every_kind
@pytest.mark.parametrize("assign", [True, False])
@pytest.mark.usefixtures("_silent")
def test_a_state_is_loaded_onto_meta(setting: dict[str, Any], assign: bool) -> None:
    quantizer = trained(setting)
    state = copy.deepcopy(quantizer.state_dict())
    with torch.device("meta"):
        other = make(**setting)
    if not assign:
        other.to_empty(device="cpu")
    other.load_state_dict(state, assign=assign)
    for each in (quantizer, other):
        torch.manual_seed(0)
        each(latents(9).requires_grad_())
    for name, value in quantizer.state_dict().items():
        assert torch.equal(other.state_dict()[name], value), name


def set_one_by_one(module: nn.Module, state: dict[str, Tensor]) -> None:
    """Set tensors as accelerate and transformers do, without load_state_dict."""
    for name, value in state.items():
        setattr(module, name, nn.Parameter(value) if name in module._parameters else value)


@every_kind
def test_tensors_that_are_set_one_by_one(setting: dict[str, Any]) -> None:
    quantizer = trained(setting)
    state = copy.deepcopy(quantizer.state_dict())

    def loaded(state: dict[str, Tensor], **other: Any) -> LooCQuantizer:
        with torch.device("meta"):
            module = make(**setting | other)
        set_one_by_one(module, state)
        return module

    with warnings.catch_warnings():
        warnings.simplefilter("error")
        module = loaded(state)
        module(latents(8).requires_grad_())
        quantizer(latents(8).requires_grad_())
        assert torch.equal(module.usage, quantizer.usage)
    for use in (lambda it: it.encode(latents()), lambda it: it.to(torch.float64)):
        with pytest.raises(RuntimeError, match=r"split 'interval' .* is 'fixed'"):
            use(loaded(state, split="interval"))
        with pytest.warns(UserWarning, match="without its statistics"):
            use(loaded({name: state[name] for name in ("codebook", "settings")}))
    for use in (lambda it: it(latents()), lambda it: it.decode(torch.zeros(1, 1, 1, 2).long())):
        with pytest.warns(UserWarning, match="no codebook was loaded; it is a new one"):
            use(module := loaded({}))
        assert module.codebook.any()


# ------------------------------------------------------------------------- loaders of Hugging Face

VQ = {"block_out_channels": (32,), "norm_num_groups": 8, "latent_channels": 8}
VQ |= {"num_vq_embeddings": 16}
IMAGES = torch.rand(2, 3, 16, 16, generator=torch.Generator().manual_seed(1)) * 2 - 1
both_ways = pytest.mark.parametrize("low_cpu_mem_usage", [True, False])


def vq_model(low_cpu_mem_usage: bool = False) -> Any:
    if low_cpu_mem_usage:
        need("accelerate")
    need("diffusers")
    torch.manual_seed(0)
    return need("modules.vq_model").LooCVQModel


@both_ways
def test_a_vq_model_of_diffusers_comes_back(low_cpu_mem_usage: bool, tmp_path: Path) -> None:
    kind = vq_model(low_cpu_mem_usage)
    looc = {"embedding_dim": 2, "codebook_start": "features", "latent_norm": "running"}
    model = kind(looc=looc, **VQ)
    model(IMAGES).sample.sum().backward()
    model.eval().save_pretrained(tmp_path)
    load = partial(kind.from_pretrained, tmp_path, low_cpu_mem_usage=low_cpu_mem_usage)
    for again in (load(), load().to(torch.float64).to(torch.float32)):
        assert again.quantize.config == model.quantize.config
        assert torch.equal(again(IMAGES).sample, model(IMAGES).sample)
        for name, value in model.state_dict().items():
            assert torch.equal(again.state_dict()[name], value), name
    with pytest.raises(RuntimeError, match=r"split 'interval' contradicts .* is 'fixed'"):
        load(looc={**looc, "split": "interval"})(IMAGES)


@both_ways
def test_a_plain_vq_model_gets_a_new_codebook(low_cpu_mem_usage: bool, tmp_path: Path) -> None:
    kind = vq_model(low_cpu_mem_usage)
    plain = need("diffusers").VQModel(**VQ)
    plain.save_pretrained(tmp_path)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        model = kind.from_pretrained(
            tmp_path, looc={"embedding_dim": 2}, low_cpu_mem_usage=low_cpu_mem_usage
        ).to("cpu")
        model.train()(IMAGES).sample.sum().backward()
    assert torch.equal(model.decoder.conv_in.weight, plain.decoder.conv_in.weight)
    codebook = model.quantize.quantizer.codebook
    assert codebook.shape == (16, 2)
    assert codebook.any()
    assert codebook.isfinite().all()
    assert model.quantize.quantizer.usage.sum() == pytest.approx(0.01, rel=1e-3)


@both_ways
def test_averages_of_diffusers_keep_the_codebook(low_cpu_mem_usage: bool, tmp_path: Path) -> None:
    """EMAModel.save_pretrained writes averaged parameters, and buffers of a new model."""
    kind = vq_model(low_cpu_mem_usage)
    model = kind(looc={"codebook_start": "features"}, **VQ)
    for _ in range(3):
        model(IMAGES).sample.sum().backward()
    average = need("diffusers.training_utils").EMAModel(
        model.parameters(), model_cls=kind, model_config=model.config
    )
    average.step(model.parameters())
    average.save_pretrained(tmp_path)
    with pytest.warns(UserWarning, match=r"without its statistics \(usage\)"):  # noqa: PT031
        again = kind.from_pretrained(tmp_path, low_cpu_mem_usage=low_cpu_mem_usage).train()
        again(IMAGES)
    assert torch.equal(again.quantize.quantizer.codebook, model.quantize.quantizer.codebook)


def test_transformers_leaves_nothing_undefined(tmp_path: Path) -> None:
    transformers, safetensors = need("transformers"), need("safetensors.torch")

    class Config(transformers.PreTrainedConfig):  # type: ignore[name-defined, misc]
        model_type = "looc"

    class Model(transformers.PreTrainedModel):  # type: ignore[name-defined, misc]
        config_class = Config

        def __init__(self, config: Config) -> None:
            super().__init__(config)
            self.quantizer = make(**FOLLOWING)
            self.post_init()

        def _init_weights(self, module: nn.Module) -> None:
            if isinstance(module, LooCQuantizer):
                module.reset_parameters()

    model = Model(Config())
    model.quantizer(latents().requires_grad_())
    model.save_pretrained(tmp_path)
    again = Model.from_pretrained(tmp_path)
    for name, value in model.state_dict().items():
        assert torch.equal(again.state_dict()[name], value), name
    file = tmp_path / "model.safetensors"
    state = {"quantizer.codebook": model.quantizer.codebook.detach().clone()}
    safetensors.save_file(state, file, metadata={"format": "pt"})
    again = Model.from_pretrained(tmp_path)
    with pytest.warns(UserWarning, match=r"without its statistics \(usage"):
        assert again.quantizer.encode(latents()).shape == (2, 3, 5, 2)
    assert torch.equal(again.quantizer.codebook, model.quantizer.codebook)
    assert again.quantizer.started
    assert again.quantizer.usage.sum() == pytest.approx(1)


def test_the_hub_mixin_saves_a_quantiser(tmp_path: Path) -> None:
    hub = need("huggingface_hub")

    class HubQuantizer(LooCQuantizer, hub.PyTorchModelHubMixin):  # type: ignore[name-defined, misc]
        pass

    quantizer: Any = HubQuantizer(16, 4, distance="l2", latent_channels=8)
    quantizer(latents().requires_grad_())
    quantizer.eval().save_pretrained(tmp_path)
    again: Any = HubQuantizer.from_pretrained(tmp_path)
    assert again.config == quantizer.config
    assert torch.equal(again(latents()).latents, quantizer(latents()).latents)
    assert torch.equal(again.usage, quantizer.usage)


def test_the_hub_mixin_saves_a_whole_model(tmp_path: Path) -> None:
    hub = need("huggingface_hub")

    class HubVQVAE(VQVAE, hub.PyTorchModelHubMixin):  # type: ignore[name-defined, misc]
        pass

    torch.manual_seed(0)
    small: dict[str, Any] = {
        "hidden_size": 16,
        "num_residual_hidden": 8,
        "num_embedding": 32,
        "in_channels": 3,
    }
    model: Any = HubVQVAE(ModelConfig(**small, split="interval"))
    model.eval().save_pretrained(tmp_path)
    again: Any = HubVQVAE.from_pretrained(tmp_path)
    images = torch.rand(2, 3, 16, 16)
    assert again.config == model.config
    assert torch.equal(again(images)[0], model(images)[0])

"""The transformer over codes: exact likelihood, and draws that follow it."""

from __future__ import annotations

import math
from itertools import product
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

from modules.priors import transformer
from modules.priors.config import PriorConfig
from modules.priors.sampling import Known, Sampling, pick, sample
from modules.priors.spaces import CodeSpace
from modules.priors.spec import Noise
from modules.priors.transformer import CodeTransformer
from utils.codebook.codes.prior_coder import PriorCoder

SMALL = CodeSpace(num_embedding=3, num_slots=2, height=1, width=2)


def make(space: CodeSpace = SMALL, num_classes: int = 0, *, causal: bool = True) -> CodeTransformer:
    torch.manual_seed(0)
    config = PriorConfig(width=16, layers=2, heads=2, depth_layers=1, dropout=0.0)
    model = CodeTransformer(config, space, num_classes, causal=causal)
    for value in model.parameters():  # probabilities far from uniform
        torch.nn.init.normal_(value, std=0.4)
    return model.eval()


def noise_of(seed: int, size: int) -> Noise:
    generator = torch.Generator().manual_seed(seed)
    return lambda *sizes: torch.rand(size, *sizes, generator=generator)


def every_image(space: CodeSpace) -> Tensor:
    number = space.num_positions * space.num_slots
    codes = torch.tensor(list(product(range(space.num_embedding), repeat=number)))
    return codes.view(-1, space.height, space.width, space.num_slots)


def test_the_probabilities_of_all_images_sum_to_one() -> None:
    images = every_image(SMALL)
    for label in (-1, 0, 1):
        nats = make(num_classes=2)(images, torch.full((len(images),), label))
        assert (-nats.flatten(1).sum(1)).exp().sum().item() == pytest.approx(1, abs=1e-5)


def test_a_code_is_predicted_from_those_before_it_alone() -> None:
    space = CodeSpace(5, 3, 2, 2)
    model, codes = make(space), torch.randint(5, (1, 2, 2, 3), generator=torch.Generator())
    before = model(codes).flatten()
    flat = codes.flatten()
    for place in range(len(flat)):
        other = flat.clone()
        other[place] = (other[place] + 1) % 5
        after = model(other.view_as(codes)).flatten()
        assert torch.allclose(after[:place], before[:place], atol=1e-6)
        assert not torch.isclose(after[place], before[place])
        later = (after[place + 1 :] - before[place + 1 :]).abs()
        assert (later > 1e-6).all()  # and each later one depends on it


def test_images_are_drawn_as_often_as_the_likelihood_says() -> None:
    model, images = make(), every_image(SMALL)
    probabilities = (-model(images).flatten(1).sum(1)).exp()
    count = 20_000
    drawn = sample(model, torch.full((count,), -1), noise_of(0, count), Sampling())
    numbers = (drawn.flatten(1) * torch.tensor([27, 9, 3, 1])).sum(1)
    found = torch.bincount(numbers, minlength=81)
    expected = probabilities * count
    chi_square = ((found - expected).square() / expected)[expected > 5].sum()
    assert chi_square < 140  # 99.99 % quantile at 80 degrees of freedom: 132


@pytest.mark.parametrize("guidance", [1.0, 2.5])
def test_cached_keys_and_values_change_nothing(guidance: float) -> None:
    model, labels = make(CodeSpace(7, 2, 3, 3), 4), torch.tensor([0, 3, -1])
    how = Sampling(guidance=guidance)
    fast, slow = (
        sample(model, labels, noise_of(1, 3), how, cached=cached) for cached in (True, False)
    )
    assert torch.equal(fast, slow)


def test_guidance_of_one_is_none_and_more_changes_the_draw() -> None:
    model, labels = make(CodeSpace(7, 2, 3, 3), 4), torch.arange(4)
    plain, one, more = (
        sample(model, labels, noise_of(1, 4), Sampling(guidance=g)) for g in (1.0, 1.0 + 1e-9, 6.0)
    )
    assert torch.equal(plain, one)
    assert not torch.equal(plain, more)


@pytest.mark.parametrize("causal", [True, False])
def test_known_codes_stay(causal: bool) -> None:
    space = CodeSpace(7, 2, 3, 3)
    codes = torch.randint(7, (4, 3, 3, 2), generator=torch.Generator().manual_seed(1))
    mask = torch.zeros(3, 3, dtype=torch.bool)
    mask[0] = True
    labels = torch.full((4,), -1)
    drawn = sample(
        make(space, causal=causal), labels, noise_of(2, 4), Sampling(), Known(codes, mask)
    )
    assert torch.equal(drawn[:, 0], codes[:, 0])
    assert not torch.equal(drawn[:, 1:], codes[:, 1:])


@pytest.mark.parametrize("guidance", [1.0, 2.0])
def test_a_causal_prior_meets_known_codes_that_follow(guidance: float) -> None:
    """The first position is drawn given the second one, not as if nothing followed."""
    model, images, count = make(num_classes=2), every_image(SMALL), 4000
    with torch.no_grad():
        model.codes.weight.mul_(20)  # the second position depends on the first one
        nats = model(images, torch.zeros(81, dtype=torch.int64)).flatten(1).sum(1)
    labels = torch.zeros(count, dtype=torch.int64)
    pairs = every_image(CodeSpace(3, 2, 1, 1)).view(9, 2)
    joint = (-nats).exp().view(9, 9)  # (first, second) position
    conditionals, marginal = joint / joint.sum(0), joint.sum(1)
    differences = (conditionals - marginal[:, None]).abs().sum(0)
    second = int(differences.argmax())
    codes = pairs[second].expand(count, 1, 2, 2)
    known = Known(codes, torch.tensor([[False, True]]))
    how = Sampling(guidance=guidance)
    drawn = sample(model, labels, noise_of(5, count), how, known)
    assert torch.equal(drawn[:, 0, 1], codes[:, 0, 1])
    slow = sample(model, labels, noise_of(5, count), how, known, cached=False)
    assert torch.equal(drawn, slow)
    if guidance == 1:
        numbers = (drawn[:, 0, 0] * torch.tensor([3, 1])).sum(1)
        found = torch.bincount(numbers, minlength=9) / count
        error = (found - conditionals[:, second]).abs().sum()
        assert error < 0.2 * differences[second], (error, differences)


@pytest.mark.parametrize("causal", [True, False])
def test_each_image_has_known_codes_of_its_own_whatever_the_batch(causal: bool) -> None:
    space = CodeSpace(7, 2, 3, 3)
    generator = torch.Generator().manual_seed(1)
    codes = torch.randint(7, (5, 3, 3, 2), generator=generator)
    mask = torch.rand(5, 3, 3, generator=generator) < 0.5
    mask[3], mask[4] = False, True
    mask[2] = torch.arange(9).view(3, 3) < 4  # no known code follows
    model, labels = make(space, causal=causal), torch.full((5,), -1)

    def noise(*numbers: int) -> Noise:
        generators = [np.random.default_rng(number) for number in numbers]
        return lambda *sizes: torch.from_numpy(np.stack([one.random(sizes) for one in generators]))

    together = sample(model, labels, noise(*range(5)), Sampling(), Known(codes, mask))
    assert torch.equal(together[mask], codes[mask])
    for number in range(5):
        one = slice(number, number + 1)
        known = Known(codes[one], mask[one])
        assert torch.equal(
            sample(model, labels[one], noise(number), Sampling(), known)[0], together[number]
        )


def test_a_masked_prior_sees_both_sides() -> None:
    model = make(CodeSpace(5, 2, 1, 3), causal=False)
    codes = torch.zeros(1, 1, 3, 2, dtype=torch.int64)
    masked = torch.tensor([[[False, True, False]]])
    before = model(codes, masked=masked)[0, 0, 1]
    for side in (0, 2):
        other = codes.clone()
        other[0, 0, side] = 3
        assert not torch.allclose(model(other, masked=masked)[0, 0, 1], before)
    hidden = codes.clone()
    hidden[0, 0, 1, 1] = 3  # a masked code: its own likelihood changes, the slot before does not
    assert torch.equal(model(hidden, masked=masked)[0, 0, 1, 0], before[0])


def test_a_masked_prior_draws_two_positions_of_one_round_apart() -> None:
    """In one round all positions are drawn from their own distribution, given nothing."""
    model, count = make(causal=False), 20_000
    how = Sampling(rounds=1)
    drawn = sample(model, torch.full((count,), -1), noise_of(3, count), how)
    masked = torch.ones(9, 1, 2, dtype=torch.bool)
    pairs = every_image(CodeSpace(3, 2, 1, 1))
    images = pairs.expand(9, 1, 2, 2)
    expected = (-model(images, masked=masked)[:, 0].sum(-1)).exp().T  # (2, 9)
    for place in range(2):
        numbers = (drawn[:, 0, place] * torch.tensor([3, 1])).sum(1)
        found = torch.bincount(numbers, minlength=9) / count
        assert (found - expected[place]).abs().max() < 0.015


def test_pick_keeps_the_most_probable_codes() -> None:
    logits = torch.tensor([0.5, 0.3, 0.15, 0.05]).log()
    draws = torch.linspace(0, 1 - 1e-7, 1001)
    rows = logits.expand(1001, -1)

    def shares(how: Sampling) -> Any:
        counts = torch.bincount(pick(rows, draws, how), minlength=4) / 1001
        return pytest.approx(counts.tolist(), abs=0.002)

    assert shares(Sampling()) == [0.5, 0.3, 0.15, 0.05]
    assert shares(Sampling(top_k=2)) == [0.625, 0.375, 0, 0]
    assert shares(Sampling(top_p=0.7)) == [0.625, 0.375, 0, 0]
    assert shares(Sampling(top_p=1e-9)) == [1, 0, 0, 0]
    assert shares(Sampling(temperature=0)) == [1, 0, 0, 0]
    assert shares(Sampling(top_k=100)) == [0.5, 0.3, 0.15, 0.05]
    squares = torch.tensor([0.25, 0.09, 0.0225, 0.0025])
    assert shares(Sampling(temperature=0.5)) == (squares / squares.sum()).tolist()


@pytest.mark.parametrize("causal", [True, False])
def test_large_logits_are_computed_in_blocks(causal: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    """The same likelihoods and gradients, and never the logits of more codes than a block has."""
    model, largest = make(CodeSpace(50, 3, 2, 3), 2, causal=causal), [0]
    model.head.register_forward_hook(
        lambda _module, _inputs, out: largest.append(out.flatten(0, -2).shape[0])
    )
    codes = torch.randint(50, (5, 2, 3, 3), generator=torch.Generator().manual_seed(1))
    labels = torch.tensor([0, 1, -1, 0, 1])

    def found() -> tuple[Tensor, list[Tensor]]:
        nats = model(codes, labels)
        return nats.detach(), list(torch.autograd.grad(nats.square().mean(), model.head.weight))

    nats, [gradient] = found()
    assert max(largest) == 90
    monkeypatch.setattr(transformer, "BLOCK", 7 * 64)  # 7 codes of 4·16 activations
    largest.clear()
    in_blocks, [gradient_in_blocks] = found()
    assert max(largest) == 7
    assert torch.allclose(in_blocks, nats, atol=1e-5)
    assert torch.allclose(gradient_in_blocks, gradient, atol=1e-6)
    with torch.no_grad():
        assert torch.allclose(model(codes, labels), nats, atol=1e-5)


def test_codes_of_another_shape_are_refused() -> None:
    with pytest.raises(ValueError, match=r"\(1, 2, 2, 2\) are not \(B, 1, 2, 2\)"):
        make()(torch.zeros(1, 2, 2, 2, dtype=torch.int64))


def test_codes_come_back_from_the_prior_coder_at_the_rate_of_the_likelihood() -> None:
    pytest.importorskip("constriction")
    space = CodeSpace(7, 2, 3, 3)
    model = make(space)
    codes = sample(model, torch.full((80,), -1), noise_of(4, 80), Sampling())
    coder = PriorCoder(model)
    flat = codes.flatten().numpy()
    words = coder.encode(flat)
    assert (coder.decode(words, len(flat)) == flat).all()
    bits = model(codes).sum().item() / math.log(2)
    assert 32 * len(words) == pytest.approx(bits, rel=0.01, abs=64)

"""Bits drawn end to end: official bits, sums and pictures of Infinity, the law of single bits, editing, seeds, errors."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor

from tests import test_infinity, test_multiscale_bsq
from tests.golden_files import load_file
from tests.test_infinity import GOLDEN, SCALES, caption, some_captions
from vargen.backbones.infinity.model import InfinityTransformer
from vargen.pipelines.image import ImagePipeline
from vargen.random import Stream
from vargen.samplers.heads.bits import BitsHead
from vargen.samplers.scale.editing import keep_codes
from vargen.samplers.scale.next_scale import NextScaleSampler
from vargen.tokenizers.multiscale_bsq.model import MultiScaleBSQTokenizer

OFFICIAL = {"guidance_scale": 3.0, "guidance_schedule": "constant", "temperature": 0.5}


class Recorded(NextScaleSampler):
    """Remembers the logits that the head was given, combined as it combines them."""

    def draw_scale(self, state: Any, logits: Tensor) -> tuple[Tensor, Tensor]:
        guided = logits[0] if len(logits) == 1 else logits[1] + self.guidance_scale * (logits[0] - logits[1])
        state.counts.setdefault("logits", []).append(guided / (self.temperature or 1.0))
        return super().draw_scale(state, logits)


def models(folder: str, ratio: str) -> tuple[InfinityTransformer, MultiScaleBSQTokenizer]:
    patch = 2 if folder else 1
    return test_infinity.official(folder, ratio), test_multiscale_bsq.official(f"{folder}vae", ratio, patch=patch)


CALLS: dict[str, tuple[str, str, dict[str, Any]]] = {
    "argmax": ("", "ratio", {**OFFICIAL, "top_k": 1}),
    "sampled": ("", "ratio", {**OFFICIAL, "top_p": 0.97}),
    "unguided": ("", "ratio", {}),
    "negative": ("", "ratio", {**OFFICIAL, "top_k": 1}),
    "argmax_hidden": ("", "ratio", {**OFFICIAL, "top_k": 1}),
    "short": ("", "ratio2", {**OFFICIAL, "top_k": 1}),
    "patchify/argmax": ("patchify/", "ratio", {**OFFICIAL, "top_k": 1}),
    "patchify/sampled": ("patchify/", "ratio", {**OFFICIAL, "top_p": 0.97}),
}


@pytest.mark.parametrize("call", CALLS)
def test_generation_gives_the_official_bits_and_pictures(call):
    folder, ratio, settings = CALLS[call]
    name = call.removeprefix("patchify/")
    io = load_file(GOLDEN / folder / f"generate_{name}.safetensors")
    backbone, tokenizer = models(folder, ratio)
    if name == "short":  # positions still refer to the last grid of the whole table
        first = SCALES[ratio][:3]
        backbone = backbone.with_scales(first, position_grid=SCALES[ratio][-1])
        tokenizer = tokenizer.with_scales(first)
    noise = None
    if "gumbel.0" in io:

        def noise(k: int, stream: Stream, shape: tuple[int, ...]) -> Tensor:
            return io[f"gumbel.{k}"].flatten(2)

    captions = load_file(GOLDEN / "forward.safetensors")
    given: Any = caption(captions)
    if name == "negative":
        negative = caption(captions, "negative_text", "negative_lens")
        given = backbone.prepare(given, guidance_scale=3.0, negative=negative)
    if name == "argmax_hidden":
        given = backbone.prepare(given, guidance_scale=3.0, guidance_layer=-2)
    sampler = Recorded(**settings)
    output = sampler.sample(backbone, given, seeds=[0, 1], tokenizer=tokenizer, noise=noise)
    for k, bits in enumerate(output.codes):
        logits = output.stats.extra["logits"][k].unflatten(2, (-1, 2))
        torch.testing.assert_close(logits, io[f"logits.{k}"], atol=2e-4, rtol=1e-5)
        assert torch.equal(bits.long(), io[f"bits.{k}"])
    torch.testing.assert_close(output.latents, io["f_hat"].view_as(output.latents), atol=1e-4, rtol=0)
    pictures = tokenizer.decode_latents(output.latents).clamp(-1, 1)
    torch.testing.assert_close(pictures, io["image"], atol=1e-4, rtol=0)


def head_law(**settings: Any) -> Tensor:
    """Share of ones of three bits with the log-odds -1, 0.5 and 3 over 4000 seeds."""
    rows = torch.tensor([0.0, -1.0, 1.0, 1.5, 0.0, 3.0]).expand(1, 4000, 1, 6)
    return BitsHead(**settings).draw(rows, torch.arange(4000), torch.zeros(4000, 1).long(), 1.0).double().mean((0, 1))


def test_bits_follow_their_logits_after_the_filters():
    odds = torch.tensor([-1.0, 0.5, 3.0]).double()
    for settings, wanted in (
        ({}, odds.sigmoid()),
        ({"temperature": 0.5}, (2 * odds).sigmoid()),
        ({"top_p": 0.9}, torch.tensor([odds[0].sigmoid(), odds[1].sigmoid(), 1.0]).double()),
        ({"temperature": 0.0}, torch.tensor([0.0, 1.0, 1.0]).double()),
        ({"top_k": 1}, torch.tensor([0.0, 1.0, 1.0]).double()),
    ):
        bound = 4.5 * (wanted * (1 - wanted) / 4000).sqrt() + 1e-9
        assert bool(((head_law(**settings) - wanted).abs() <= bound).all()), settings
    assert bool(((head_law() - (2 * odds).sigmoid()).abs() > 0.02).any())  # the control


def test_bad_logits_are_named():
    rows = torch.zeros(1, 2, 3, 4)
    rows[0, 1, 2, 0] = float("nan")
    with pytest.raises(ValueError, match="image 1 at position 7"):
        BitsHead().draw(rows, torch.arange(2), torch.tensor([[5, 6, 7]] * 2), 1.0)


def tiny_models() -> tuple[InfinityTransformer, MultiScaleBSQTokenizer]:
    scales = [1, 2, (4, 4)]
    return test_infinity.tiny(scales=scales), test_multiscale_bsq.tiny(scales=scales)


def test_a_picture_depends_on_its_seed_and_caption_only():
    backbone, tokenizer = tiny_models()
    sampler = NextScaleSampler(guidance_scale=2.0, guidance_stop_scale=2, top_p=0.97)
    features, mask = some_captions(2, 5, 3)
    together = sampler.sample(backbone, (features, mask), seeds=[3, 4, 5], tokenizer=tokenizer)
    assert [(part.dtype, part.shape) for part in together.codes] == [(torch.int8, (3, n, 3)) for n in (1, 4, 16)]
    assert together.stats.guarantee == "exact"
    alone = sampler.sample(backbone, (features[1:2], mask[1:2]), seeds=[4], tokenizer=tokenizer)
    assert all(torch.equal(one[0], all_[1]) for one, all_ in zip(alone.codes, together.codes, strict=True))
    other = sampler.sample(backbone, (features[1:2], mask[1:2]), seeds=[6], tokenizer=tokenizer)
    assert not torch.equal(other.codes[2], alone.codes[2])


def test_single_bits_can_be_fixed_and_pictures_edited():
    backbone, tokenizer = tiny_models()
    images = torch.rand(1, 3, 8, 8, generator=torch.Generator().manual_seed(1)) * 2 - 1
    codes = tokenizer.encode(images).codes
    keep = torch.zeros(4, 4, dtype=torch.bool)
    keep[:, :2] = True
    forced = keep_codes(codes, keep, tokenizer.scales)
    forced[2][:, 3, 1] = 1
    output = NextScaleSampler().sample(backbone, some_captions(3), seeds=[0], tokenizer=tokenizer, forced_codes=forced)
    for found, fixed in zip(output.codes, forced, strict=True):
        assert torch.equal(found[fixed >= 0], fixed[fixed >= 0])
    with pytest.raises(ValueError, match=r"forced_codes of scale 0 must be integers \[1, 3\] or \[1, 1, 3\]"):
        NextScaleSampler().sample(
            backbone, some_captions(3), seeds=[0], tokenizer=tokenizer, forced_codes=[part[..., 0] for part in forced]
        )


def test_the_pipeline_draws_bits_and_stops_early():
    backbone, tokenizer = tiny_models()
    pipe = ImagePipeline(tokenizer, backbone, NextScaleSampler(guidance_scale=2.0))
    pipe.encode_condition = lambda prompt, class_labels: some_captions(2, 5)
    grown = []
    output = pipe(
        ["a", "b"],
        seed=1,
        output_type="pt",
        batch_size=1,
        callback_on_step_end=lambda pipe, step, n, tensors: grown.append(pipe.decode_codes(tensors["codes"])),
    )
    assert output.images.shape == (2, 3, 8, 8)
    torch.testing.assert_close(tokenizer.decode(output.codes).clamp(-1, 1) / 2 + 0.5, output.images, atol=1e-5, rtol=0)
    torch.testing.assert_close(grown[2][0].clamp(-1, 1) / 2 + 0.5, output.images[0], atol=1e-5, rtol=0)
    early = pipe(["a", "b"], seed=1, output_type="pt", stop_scale=2)
    assert torch.equal(early.codes[1], output.codes[1])
    assert bool((early.codes[2] == -1).all())


def test_models_that_do_not_fit_are_one_line():
    backbone, tokenizer = tiny_models()
    wide = test_multiscale_bsq.tiny(scales=[1, 2, 4], codebook_dim=4)
    with pytest.raises(ValueError, match="same tokens, got 4 bits and 3 bits a position"):
        ImagePipeline(wide, backbone, NextScaleSampler())
    given: dict[str, Any] = {"seeds": [0], "tokenizer": tokenizer}
    with pytest.raises(ValueError, match="same tokens, got 4 bits and 3 bits"):
        NextScaleSampler().sample(backbone, some_captions(3), seeds=[0], tokenizer=wide)
    with pytest.raises(ValueError, match="this model draws bits"):
        NextScaleSampler(smooth=True).sample(backbone, some_captions(3), **given)
    with pytest.raises(ValueError, match=r"top_k must be in 0\.\.2"):
        NextScaleSampler(top_k=900).sample(backbone, some_captions(3), **given)
    with pytest.raises(ValueError, match="same scales"):
        NextScaleSampler().sample(backbone.with_scales([1, 2]), some_captions(3), **given)

"""Next-scale models that read captions: picture sizes of a call, lists of settings, guided hidden states, memory, published shapes."""

from __future__ import annotations

import sys
from typing import Any

import pytest
import torch
from torch import Tensor

from tests import test_infinity, test_multiscale_bsq
from tests.test_infinity import some_captions
from vargen.backbones.infinity.model import InfinityTransformer
from vargen.backbones.infinity.sizes import GRIDS, scales_of
from vargen.cli.main import app
from vargen.conditioners.base import Conditioner
from vargen.memory import scale_decode_bytes, text_to_image_bytes
from vargen.pipelines.image import ImagePipeline
from vargen.samplers.base import Sampler
from vargen.samplers.scale.next_scale import NextScaleSampler
from vargen.samplers.window.next_token import NextTokenSampler
from vargen.tokenizers.multiscale_bsq.model import MultiScaleBSQTokenizer


class Words(Conditioner):
    """Features that depend on the text, as many words as it has."""

    def encode(self, prompts: Any = None, class_labels: Any = None) -> tuple[Tensor, Tensor]:
        counts = [len(text.split()) for text in prompts]
        return some_captions(*counts)


def pipeline(**settings: Any) -> ImagePipeline:
    backbone = test_infinity.tiny(scales=[1, 2, 4], max_scales=13)
    tokenizer = test_multiscale_bsq.tiny(scales=[1, 2, 4])
    pipe = ImagePipeline(tokenizer, backbone, NextScaleSampler(**settings), None)
    vars(pipe)["conditioner"] = Words()
    pipe.set_progress_bar_config(disable=True)
    return pipe


def test_a_call_chooses_the_picture_size():
    pipe = pipeline(guidance_scale=2.0)
    cell = pipe.tokenizer.downsample
    calls: list[tuple[dict[str, Any], tuple[int, int]]] = [
        ({"height": 256, "width": 256}, (16, 16)),
        ({"height": 256}, (16, 16)),
        ({"aspect_ratio": "2:1", "pixels": "0.06M"}, (22, 11)),
        ({"aspect_ratio": "1:2", "pixels": "0.06M"}, (11, 22)),
    ]
    for size, grid in calls:
        seen = []
        output = pipe(
            ["a fox", "a red fox in snow"],
            seed=[3, 4],
            output_type="pt",
            callback_on_step_end=lambda pipe, step, n, given, seen=seen: seen.append(
                pipe.decode_codes(given["codes"])
            ),
            **size,
        )
        assert output.images.shape == (2, 3, grid[0] * cell, grid[1] * cell)
        assert len(output.codes) == len(seen) == 7
        torch.testing.assert_close(seen[-1].clamp(-1, 1) / 2 + 0.5, output.images, atol=1e-5, rtol=0)
        alone = pipe("a fox", seed=3, output_type="pt", **size)
        torch.testing.assert_close(alone.images, output.images[:1], atol=1e-5, rtol=0)
    assert pipe("a fox", output_type="pt").images.shape == (1, 3, 4 * cell, 4 * cell)  # nothing stuck
    assert pipe.backbone.scales[-1] == pipe.tokenizer.scales[-1] == (4, 4)


def test_a_call_of_another_size_can_be_interrupted_from_outside():
    pipe = pipeline()

    def stop(inner: Any, step: int, n: int, given: Any) -> None:
        inner._interrupt = step == 1

    output = pipe("a fox", height=256, width=256, callback_on_step_end=stop, output_type="codes")
    assert output.stats.num_forwards == 2

    def stop_whole(inner: Any, step: int, n: int, given: Any) -> None:
        pipe._interrupt = step == 1

    output = pipe("a fox", height=256, width=256, callback_on_step_end=stop_whole, output_type="codes")
    assert output.stats.num_forwards == 2


def test_sizes_that_no_table_has_are_one_line():
    pipe = pipeline()
    cases: list[tuple[dict[str, Any], str]] = [
        ({"height": 1000, "width": 1000}, r"no table has 1000x1000 pixels .* known ratios \(height:width\): 1:1, 5:4"),
        ({"aspect_ratio": "16:9"}, r"aspect_ratio .* must be one of 1:1, 5:4, 4:3"),
        ({"aspect_ratio": "1:1", "pixels": "2M"}, r"pixels must be one of 0\.06M"),
        ({"aspect_ratio": "1:1", "height": 256}, "give either height and width or aspect_ratio and pixels, got both"),
    ]
    for size, message in cases:
        with pytest.raises(ValueError, match=message) as caught:
            pipe("a fox", **size)
        assert "\n" not in str(caught.value)


def test_a_negative_prompt_of_a_call():
    pipe = pipeline(guidance_scale=3.0, guidance_schedule="constant")
    plain = pipe("a fox", seed=1)
    away = pipe("a fox", seed=1, negative_prompt="one two three")
    given = {"seeds": [1], "tokenizer": pipe.tokenizer}
    direct = pipe.sampler.sample(pipe.backbone, some_captions(2), negative=some_captions(3), **given)
    assert all(map(torch.equal, direct.codes, away.codes))
    assert not all(map(torch.equal, plain.codes, away.codes))


def test_lists_of_settings_are_taken_scale_by_scale():
    pipe = pipeline()
    given = {"seeds": [1, 2], "tokenizer": pipe.tokenizer}
    caption = some_captions(2, 5)

    def drawn(**settings: Any) -> list[Tensor]:
        return NextScaleSampler(**settings).sample(pipe.backbone, caption, **given).codes

    plain = drawn(guidance_scale=3.0, temperature=0.5)
    listed = drawn(guidance_scale=[1.0, 2.0, 3.0], temperature=[0.5] * 3, top_k=[0, 0, 0], top_p=[1.0] * 3)
    assert all(map(torch.equal, plain, listed))  # the ramp, written out
    greedy = drawn(guidance_scale=[1.0, 2.0, 3.0], top_k=[0, 0, 1])
    coldest = drawn(guidance_scale=[1.0, 2.0, 3.0], temperature=[1.0, 1.0, 0.0])
    assert torch.equal(greedy[2], coldest[2])
    assert torch.equal(greedy[1], drawn(guidance_scale=3.0)[1])
    unguided = drawn(guidance_scale=[1.0, 1.0, 1.0])
    assert all(map(torch.equal, unguided, drawn()))
    with pytest.raises(ValueError, match=r"temperature must be a number or a list of 3, one a scale, got 2"):
        drawn(temperature=[1.0, 0.5])
    with pytest.raises(ValueError, match="top_p must be"):
        NextScaleSampler(top_p=[0.9, 1.5, 1.0])
    with pytest.raises(ValueError, match="got an empty list"):
        NextScaleSampler(top_p=[])
    with pytest.raises(ValueError, match="no place beside a list"):
        NextScaleSampler(temperature=[1.0, 0.5], final_temperature=0.2)


def test_lists_of_settings_are_stored_and_not_handed_to_other_samplers(tmp_path):
    sampler = NextScaleSampler(guidance_scale=[1.0, 2.0], top_k=3)
    sampler.save_pretrained(tmp_path)
    assert Sampler.from_pretrained(tmp_path) == sampler
    assert NextTokenSampler.from_config(sampler.config) == NextTokenSampler(top_k=3)


def test_hidden_states_are_guided_with_the_scales_own_weights():
    pipe = pipeline()
    given: dict[str, Any] = {"seeds": [1, 2], "tokenizer": pipe.tokenizer}
    caption = some_captions(2, 5)
    ready = pipe.backbone.prepare(caption, guidance_scale=3.0, guidance_layer=-2)
    constant = {"guidance_scale": 3.0, "guidance_schedule": "constant"}
    by_hand = NextScaleSampler(**constant).sample(pipe.backbone, ready, **given)
    found = NextScaleSampler(guidance_layer=-2, **constant).sample(pipe.backbone, caption, **given)
    assert all(map(torch.equal, by_hand.codes, found.codes))
    logits = NextScaleSampler(**constant).sample(pipe.backbone, caption, **given)
    assert not all(map(torch.equal, logits.codes, found.codes))
    ramp = pipe.backbone.prepare(caption, guidance_scale=torch.tensor([1.0, 2.0, 3.0]), guidance_layer=0)
    features = torch.randn(2, 20, 3, generator=torch.Generator().manual_seed(1))
    _, at_once = pipe.backbone.open(ramp, features=features)
    session, out = pipe.backbone.open(ramp)
    steps = [out.logits, *(pipe.backbone.step(session, part).logits for part in features.split([4, 16], dim=1))]
    torch.testing.assert_close(torch.cat(steps, dim=2), at_once.logits, atol=1e-5, rtol=0)
    with pytest.raises(ValueError, match="guidance_layer must be"):
        NextScaleSampler(guidance_layer=7, **constant).sample(pipe.backbone, caption, **given)


def test_infinity_2b_at_1024_pixels_has_its_shapes():
    """Prepare, thirteen scales and the picture, on the meta device: no number is computed."""
    with torch.device("meta"):
        model = InfinityTransformer.from_size("2b").eval()
        tokenizer = MultiScaleBSQTokenizer().eval()
        caption = torch.empty(2, 20, 2048), torch.ones(2, 20, dtype=torch.bool)
    total = tokenizer.blank(2).to("meta")
    session, out = model.open(model.prepare(caption, guidance_scale=4.0), dtype=torch.float16)
    for k, (h, w) in enumerate(tokenizer.scales):
        if k:
            out = model.step(session, tokenizer.shrink(total, (h, w)))
        assert out.logits.shape == (2, 2, h * w, 64)
        bits = torch.empty(2, h * w, 32, dtype=torch.int8, device="meta")
        total = tokenizer.accumulate(total, tokenizer.lookup(bits), k)
    assert (k, session.used) == (12, 10521)
    assert tokenizer.decode_latents(total).shape == (2, 3, 1024, 1024)
    held = scale_decode_bytes(model.sizes, num_layers=32, dim=2048, num_logits=64, num_rows=4)
    assert session.cache.num_bytes == held.cache
    assert out.logits.numel() * 4 == held.logits


def test_a_narrow_infinity_draws_a_whole_table():
    """All ten scales of 512 pixels and the tall table, for real; the cache is as large as it was said to be."""
    model = test_infinity.tiny(scales=scales_of("1:1", "0.25M"), max_scales=13)
    tokenizer = test_multiscale_bsq.tiny(scales=scales_of("1:1", "0.25M"))
    sampler = NextScaleSampler(guidance_scale=4.0, guidance_schedule="constant", temperature=0.5, top_p=0.97)
    for ratio in ("1:1", "3:1"):
        scales = scales_of(ratio, "0.25M")
        own, codes = model.with_scales(scales), tokenizer.with_scales(scales)
        states = list(sampler.stream(own, some_captions(3), seeds=[1], tokenizer=codes))
        assert len(states[-1].scales) == 10
        height, width = GRIDS[ratio][9]
        assert states[-1].preview().shape[2:] == (height * codes.downsample, width * codes.downsample)
        held = scale_decode_bytes(own.sizes, num_layers=2, dim=16, num_logits=6, num_bytes=4)
        assert states[-1].session.cache.num_bytes == held.cache


def test_the_command_prints_the_memory_of_published_models(capsys, monkeypatch):
    monkeypatch.setenv("COLUMNS", "200")
    monkeypatch.setattr(sys, "argv", ["vargen", "models"])
    with pytest.raises(SystemExit):
        app()
    printed = capsys.readouterr().out
    held = text_to_image_bytes()["Infinity-2B, 1024 px"]
    assert 5.5e9 < held.cache < 5.6e9  # two branches, 10,521 positions, 32 blocks of width 2048, two bytes
    assert "Infinity-2B, 1024 px" in printed
    assert f"{held.cache / 1e9:.2f} GB" in printed
    assert text_to_image_bytes()["Switti, 1024 px"].cache == 0

"""Switti: official logits, runs and pictures, both kinds; captions, crop, sizes, strict loading, the pipeline."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from tests.golden_files import load_file
from tests.test_next_scale import tiny_tokenizer
from vargen.backbones.switti.model import SwittiTransformer
from vargen.backbones.switti.sizes import to_official
from vargen.checkpoints.manifests.published import PARAMETERS
from vargen.checkpoints.reader import CheckpointError
from vargen.checkpoints.verify import verify_checkpoint
from vargen.conditioners.clip import CLIPCaptionConditioner
from vargen.kernels.warp import warp_logits
from vargen.pipelines.image import ImagePipeline
from vargen.random import Stream
from vargen.samplers.scale.next_scale import NextScaleSampler
from vargen.samplers.scale.state import NextScaleState
from vargen.tokenizers.multiscale_vq.model import MultiScaleVQTokenizer

GOLDEN = Path(__file__).parent / "golden" / "switti"
CONFIG = json.loads((GOLDEN / "config.json").read_text())
SCALES = tuple(CONFIG["switti"]["patch_nums"])
GIVEN: dict[str, Any] = {"num_heads": 4, "scales": SCALES}
TINY: dict[str, Any] = {"dim": 16, "num_layers": 2, "num_heads": 2, "codebook_size": 24, "codebook_dim": 12}
TINY |= {"scales": [1, 2, 4], "text_dim": 10, "pooled_dim": 6, "text_length": 6, "ffn_dim": 24}


def floats(name: str) -> dict[str, Tensor]:
    file = load_file(GOLDEN / f"{name}.safetensors")
    return {key: value.float() if value.is_floating_point() else value for key, value in file.items()}


def official(autoregressive: bool = False, folder: str = "") -> SwittiTransformer:
    weights = floats(f"{folder}model")
    return SwittiTransformer.from_original(weights, autoregressive=autoregressive, **GIVEN).requires_grad_(False)


def tokenizer() -> MultiScaleVQTokenizer:
    return MultiScaleVQTokenizer.from_original(floats("vqvae_weights"), scales=SCALES).requires_grad_(False)


def caption(io: dict[str, Tensor], rows: int = 2) -> tuple[Tensor, ...]:
    found = io["prompt_embeds"], io["pooled_prompt_embeds"], io["prompt_attn_bias"] == 0
    return tuple(part.expand(rows, *part.shape[1:]) for part in found)


def null() -> tuple[Tensor, ...]:
    return caption(load_file(GOLDEN / "null_text.safetensors"))


def tiny(**config: Any) -> SwittiTransformer:
    torch.manual_seed(0)
    model = SwittiTransformer(**{**TINY, **config}).eval().requires_grad_(False)
    for p in model.parameters():  # nothing switched off by its initialisation
        torch.nn.init.normal_(p, std=0.4)
    return model


def some_captions(*lengths: int) -> tuple[Tensor, Tensor, Tensor]:
    generator = torch.Generator().manual_seed(3)
    longest = max(lengths)
    features = torch.randn(len(lengths), longest, 10, generator=generator)
    pooled = torch.randn(len(lengths), 6, generator=generator)
    return features, pooled, torch.arange(longest) < torch.tensor(lengths)[:, None]


@pytest.mark.parametrize("name", ["logits", "logits_ar", "logits_null", "logits_crop512"])
def test_forward_gives_the_official_logits(name, monkeypatch):
    io = load_file(GOLDEN / "forward.safetensors")
    model = official(autoregressive=name == "logits_ar")
    if name in ("logits", "logits_ar"):  # these were recorded with the pictures' own crops
        crop = model.crop_vector(io["crop_condition"])
        torch.testing.assert_close(crop, io["crop_cond"], atol=1e-5, rtol=0)
        monkeypatch.setattr(model, "crop_vector", lambda _: crop)
    found = model(io["x_BLCv_wo_first_l"], null() if name == "logits_null" else caption(io))
    torch.testing.assert_close(found, io[name], atol=1e-4, rtol=0)


def test_rotations_and_crop_features_are_the_official_ones():
    io, model = load_file(GOLDEN / "forward.safetensors"), official()
    rows = model._rope()  # L 2 c
    torch.testing.assert_close(
        torch.stack([rows[:, 0, ::2], rows[:, 1, 1::2]], -1), io["rope_angles"], atol=1e-6, rtol=0
    )
    torch.testing.assert_close(model.crop_embed(io["crop_condition"]), io["crop_embed"], atol=1e-5, rtol=0)


def test_the_crop_is_exact_in_half_precision():
    """The released pipeline computes it in bfloat16, where 512 times the angle is off by radians."""
    model = tiny()
    crop = torch.tensor([[512.0, 512.0, 0.0, 0.0]])
    exact = model.crop_embed(crop)
    half = tiny().to(torch.bfloat16)
    assert half.head.weight.dtype == torch.bfloat16
    assert torch.equal(half.crop_embed(crop), exact)
    rounded = (crop[..., None].bfloat16() * model.crop_embed.weight.bfloat16() * (2 * torch.pi)).sin()
    assert float((rounded.float().flatten() - exact.view(1, 4, 2, -1)[:, :, 0].flatten()).abs().max()) > 0.05


class Recorded(NextScaleSampler):
    """Keeps the guided logits."""

    def draw_scale(self, state: NextScaleState, logits: Tensor) -> tuple[Tensor, Tensor]:
        k = len(state.scales)
        scale, temperature = self.guidance_at(k, len(state.sizes)), self.temperature_at(k, len(state.sizes))
        guided = warp_logits(logits, guidance_scale=scale, temperature=temperature)
        state.counts.setdefault("logits", []).append(guided)
        return super().draw_scale(state, logits)


CALLS: dict[str, dict[str, Any]] = {
    "argmax": {"guidance_scale": 7.0, "top_k": 1},
    "released": {
        "guidance_scale": 7.0,
        "top_k": 3,
        "top_p": 0.95,
        "smooth": "unfiltered",
        "smooth_start_scale": 1,
        "guidance_stop_scale": 3,
        "unguided_temperature": 0.1,
    },
    "plain": {"guidance_scale": 7.0, "top_p": 0.9, "guidance_start_scale": 1, "guidance_stop_scale": 2},
}


@pytest.mark.parametrize("kind", ["", "_ar"])
@pytest.mark.parametrize("call", CALLS)
def test_official_noise_gives_the_official_codes_and_pictures(call, kind):
    io = load_file(GOLDEN / f"generate_{call}{kind}.safetensors")
    model, codes = official(autoregressive=bool(kind)), tokenizer()

    def noise(k: int, stream: Stream, shape: tuple[int, ...]) -> Tensor:
        zeros = torch.zeros(shape)
        return io.get(f"gumbel.{k}" if stream == Stream.GUMBEL else f"gumbel_smooth.{k}", zeros)

    given = caption(load_file(GOLDEN / "forward.safetensors"))
    options = {"negative": null(), "tokenizer": codes, "noise": noise if call != "argmax" else None}
    output = Recorded(**CALLS[call]).sample(model, given, seeds=[0, 1], **options)
    soft = call == "released"
    for k, logits in enumerate(output.stats.extra["logits"]):
        if f"tokens.{k}" in io:
            assert torch.equal(output.codes[k], io[f"tokens.{k}"])
            atol = 2e-4 if not soft or k == 0 else 1e-2
            torch.testing.assert_close(logits, io[f"logits_guided.{k}"], atol=atol, rtol=0)
        else:
            ratio = k / (len(SCALES) - 1)
            torch.testing.assert_close(logits * (1 + ratio), io[f"smooth_logits.{k}"], atol=2e-3, rtol=0)
    pixels = (codes.decode_latents(output.latents).clamp(-1, 1) + 1) / 2
    torch.testing.assert_close(pixels, io["image01"], atol=1e-3 if soft else 1e-4, rtol=0)


def test_the_other_switches_give_the_official_numbers():
    io = load_file(GOLDEN / "plain" / "io.safetensors")
    model, forward = official(folder="plain/"), load_file(GOLDEN / "forward.safetensors")
    assert (model.config.rope, model.config.swiglu, model.config.crop_condition) == (False, False, False)
    found = model(forward["x_BLCv_wo_first_l"], caption(forward))
    torch.testing.assert_close(found, io["logits"], atol=1e-4, rtol=0)
    options = {"negative": null(), "tokenizer": tokenizer()}
    output = Recorded(**CALLS["argmax"]).sample(model, caption(forward), seeds=[0, 1], **options)
    for k, logits in enumerate(output.stats.extra["logits"]):
        assert torch.equal(output.codes[k], io[f"tokens.{k}"])
        torch.testing.assert_close(logits, io[f"logits_guided.{k}"], atol=2e-4, rtol=0)


@pytest.mark.parametrize("slip", ["head", "axes", "mask", "gates"])
def test_slips_are_seen(slip, monkeypatch):
    """Controls: each of these mistakes moves the numbers far beyond the tolerance."""
    io, model = load_file(GOLDEN / "forward.safetensors"), official()
    given = caption(io)
    if slip == "head":
        monkeypatch.setattr(
            model.head_nm,
            "modulate",
            lambda p, own=model.head_nm.modulate: own(p + model.crop_vector(io["crop_condition"])),
        )
    elif slip == "axes":
        rows = model._rope().clone()
        monkeypatch.setattr(model, "_rope", lambda: rows.unflatten(-1, (2, -1)).flip(-2).flatten(-2))
    elif slip == "mask":
        given = (*given[:2], torch.ones_like(given[2]))
    else:
        for block in model.blocks:
            own = block.modulate
            monkeypatch.setattr(block, "modulate", lambda p, c, own=own: own(p, c)[[2, 3, 0, 1, 4, 5]])
    found = model(io["x_BLCv_wo_first_l"], given)
    assert float((found - io["logits_crop512"]).abs().max()) > 0.1


@pytest.mark.parametrize("autoregressive", [False, True])
def test_a_decode_equals_the_forward_and_coarser_codes_matter_to_the_ar_model_only(autoregressive):
    model = tiny(autoregressive=autoregressive)
    given = some_captions(2, 5)
    features = torch.randn(2, 20, 12, generator=torch.Generator().manual_seed(1))
    whole = model(features, given)
    session, out = model.open(model.prepare(given, guidance_scale=2.0, negative=some_captions(1, 1)))
    found = [out.logits[0], *(model.step(session, part).logits[0] for part in features.split([4, 16], dim=1))]
    torch.testing.assert_close(torch.cat(found, dim=1), whole, atol=1e-5, rtol=0)
    session, out = model.open(model.prepare(given), features=features)  # all scales in one pass
    torch.testing.assert_close(out.logits[0], whole, atol=1e-5, rtol=0)
    assert (session.cache.num_bytes > 0) is autoregressive
    changed = features.clone()
    changed[:, :4] += 1
    assert torch.allclose(model(changed, given)[:, 5:], whole[:, 5:], atol=1e-6) is not autoregressive


def test_captions_of_different_lengths_are_those_of_single_runs():
    model = tiny()
    features, given = torch.randn(3, 20, 12), some_captions(1, 6, 3)
    together = model(features, given)
    for i, n in enumerate((1, 6, 3)):
        alone = (given[0][i : i + 1, :n], given[1][i : i + 1], given[2][i : i + 1, :n])
        torch.testing.assert_close(together[i : i + 1], model(features[i : i + 1], alone), atol=1e-5, rtol=0)


def test_bad_captions_are_one_line():
    model = tiny()
    features, pooled, mask = some_captions(2, 5)
    cases: list[tuple[Any, str]] = [
        ((features, mask), r"must be \(features, pooled, mask\), got tuple"),
        ((features[..., :5], pooled, mask), r"must have shape \[batch, 1\.\.6, 10\], got \[2, 5, 5\]"),
        ((features, pooled[:1], mask), r"pooled caption features must have shape \[2, 6\], got \[1, 6\]"),
        ((features, pooled, mask & torch.tensor([[False], [True]])), "caption 0 has no words"),
    ]
    for given, message in cases:
        with pytest.raises(ValueError, match=message):
            model.prepare(given)
    with pytest.raises(ValueError, match=r"no empty caption of its own: give negative=") as caught:
        model.prepare((features, pooled, mask), guidance_scale=2.0)
    assert "\n" not in str(caught.value)


def test_published_sizes_have_exact_keys_and_parameters():
    for size, count in PARAMETERS["switti"].items():
        with torch.device("meta"):
            model = SwittiTransformer.from_size(size)
        assert sum(p.numel() for p in model.parameters()) == count
        file = to_official(model.state_dict())
        length = model.num_codes
        file |= {"lvl_1L": torch.empty(1, length, device="meta").long()}
        file |= {"attn_bias_for_masking": torch.empty(1, 1, length, length, device="meta")}
        assert len(file) == 705
        report = verify_checkpoint(file)
        assert report.ok, report
        assert report.size == f"switti_{size}"


def test_loading_is_strict_and_asks_what_shapes_do_not_tell(tmp_path):
    weights = floats("model")
    with pytest.raises(CheckpointError, match=r"autoregressive=True \(Switti-AR\) or False"):
        SwittiTransformer.from_original(weights, **GIVEN)
    with pytest.raises(CheckpointError, match=r"10 scales .* or 14 .*, the file has 4"):
        SwittiTransformer.from_original(weights, num_heads=4, autoregressive=False)
    with pytest.raises(CheckpointError, match="num_heads cannot be read off the shapes"):
        SwittiTransformer.from_original(weights, scales=SCALES, autoregressive=False)
    for value, wanted in ((0.0, True), (-torch.inf, False)):
        mask = torch.full((1, 1, 30, 30), value)
        assert (
            SwittiTransformer.from_original({**weights, "attn_bias_for_masking": mask}, **GIVEN).sees_coarser is wanted
        )
    hub = {"depth": 2, "rope": True, "rope_theta": 10000, "rope_size": 128, "use_swiglu_ffn": True}
    hub |= {"use_ar": True, "use_crop_cond": True}
    model = SwittiTransformer.from_original(weights, **hub, **GIVEN)
    assert model.sees_coarser
    model.save_pretrained(tmp_path)
    again = SwittiTransformer.from_pretrained(tmp_path)
    assert again.config.autoregressive
    bias = weights.pop("blocks.1.cross_attn.to_kv.bias")
    with pytest.raises(CheckpointError, match=r"missing key: blocks\.1\.cross_attn\.to_kv\.bias"):
        SwittiTransformer.from_original(weights, autoregressive=True, **GIVEN)
    with pytest.raises(CheckpointError, match="unexpected key: spare"):
        SwittiTransformer.from_original(
            {**weights, "blocks.1.cross_attn.to_kv.bias": bias, "spare": bias}, autoregressive=True, **GIVEN
        )


def tiny_pair(**config: Any) -> tuple[SwittiTransformer, MultiScaleVQTokenizer]:
    return tiny(**config), tiny_tokenizer()


def test_soft_draws_without_filters():
    model, codes = tiny_pair()
    given = {"seeds": [3], "tokenizer": codes}
    condition = some_captions(4)
    kept = NextScaleSampler(smooth=True, top_k=2).sample(model, condition, **given)
    free = NextScaleSampler(smooth="unfiltered", top_k=2).sample(model, condition, **given)
    open_ = NextScaleSampler(smooth=True).sample(model, condition, **given)
    assert not torch.allclose(free.latents, kept.latents, atol=1e-2)
    assert torch.equal(free.codes[0], kept.codes[0])
    assert torch.equal(NextScaleSampler(smooth="unfiltered").sample(model, condition, **given).latents, open_.latents)
    late = NextScaleSampler(smooth=True, smooth_start_scale=2).sample(model, condition, **given)
    hard = NextScaleSampler().sample(model, condition, **given)
    assert torch.equal(late.codes[2], hard.codes[2])
    assert not torch.allclose(late.latents, hard.latents, atol=1e-2)
    stopped = NextScaleSampler(smooth="unfiltered", guidance_stop_scale=0).sample(model, condition, **given)
    assert torch.equal(stopped.latents, hard.latents)  # no soft draws where guidance has ended


WORDS = ["a", "red", "fox", "in", "snow"]


@pytest.fixture(scope="module")
def clip() -> CLIPCaptionConditioner:
    transformers = pytest.importorskip("transformers")
    from tokenizers import Tokenizer, models, pre_tokenizers, processors

    vocabulary = {"<pad>": 0, "</s>": 1, "<unk>": 2, "<s>": 3, **{word: i + 4 for i, word in enumerate(WORDS)}}
    words = Tokenizer(models.WordLevel(vocabulary, unk_token="<unk>"))
    words.pre_tokenizer = pre_tokenizers.Whitespace()
    words.post_processor = processors.TemplateProcessing(
        single="<s> $A </s>", special_tokens=[("<s>", 3), ("</s>", 1)]
    )
    fast = transformers.PreTrainedTokenizerFast(
        tokenizer_object=words, pad_token="<pad>", eos_token="</s>", bos_token="<s>", unk_token="<unk>"
    )
    encoders = []
    for width in (4, 6):
        torch.manual_seed(width)
        sizes = {"hidden_size": width, "intermediate_size": 8, "num_hidden_layers": 2, "num_attention_heads": 2}
        config = transformers.CLIPTextConfig(
            vocab_size=16, max_position_embeddings=6, eos_token_id=1, pad_token_id=0, bos_token_id=3, **sizes
        )
        encoders.append(transformers.CLIPTextModel(config).eval())
    parts = {"text_encoder": encoders[0], "tokenizer": fast, "text_encoder_2": encoders[1], "tokenizer_2": fast}
    return CLIPCaptionConditioner(**parts, max_length=6, batch_size=1)


def test_captions_are_read_by_both_encoders(clip, tmp_path):
    features, pooled, mask = clip(["a red fox", ""])
    assert (features.shape, pooled.shape, mask.sum(1).tolist()) == ((2, 6, 10), (2, 6), [5, 2])
    ids = torch.tensor([[3, 4, 5, 6, 1]])
    with torch.no_grad():
        first, second = (encoder(input_ids=ids) for encoder in (clip.text_encoder, clip.text_encoder_2))
    alone = torch.cat([first.last_hidden_state, second.last_hidden_state], dim=-1)
    torch.testing.assert_close(features[:1, :5], alone, atol=1e-5, rtol=0)
    torch.testing.assert_close(pooled[:1], second.pooler_output, atol=1e-5, rtol=0)
    clip.save_pretrained(tmp_path)
    again = CLIPCaptionConditioner.from_pretrained(tmp_path)
    assert torch.equal(again(["a red fox"])[0], features[:1])


def test_a_caption_that_is_cut_is_said(clip):
    with pytest.warns(
        UserWarning, match="a caption has 8 tokens and the text model takes 6: the rest is cut"
    ) as caught:
        clip(["a red fox in snow a", "a red fox in"])
    assert len(caught) == 1
    assert "\n" not in str(caught[0].message)


def test_bad_prompts_are_one_line(clip):
    with pytest.raises(ValueError, match="reads captions, not class labels"):
        clip(1)
    with pytest.raises(ValueError, match="belong together"):
        CLIPCaptionConditioner(tokenizer=print)


def test_the_pipeline_guides_away_from_the_empty_or_a_negative_prompt(clip, tmp_path):
    model, codes = tiny_pair()
    pipe = ImagePipeline(codes, model, NextScaleSampler(guidance_scale=3.0, guidance_schedule="constant"), clip)
    pipe.set_progress_bar_config(disable=True)
    both = pipe(["a red fox", "snow"], seed=[1, 2], output_type="pt")
    alone = pipe("snow", seed=2, output_type="pt", batch_size=1)
    assert torch.equal(alone.images[0], both.images[1])
    direct = pipe.sampler.sample(model, clip(["snow"]), seeds=[2], tokenizer=codes, negative=clip([""]))
    assert all(map(torch.equal, direct.codes, alone.codes))
    empty = pipe("snow", seed=2, negative_prompt="", output_type="pt")
    assert torch.equal(empty.images, alone.images)
    away = pipe(["snow", "a fox"], seed=[2, 2], negative_prompt=["a red fox in snow", "red"], output_type="pt")
    assert not torch.equal(away.images[:1], alone.images)
    with pytest.raises(ValueError, match="must be one text or 2, one a prompt, got 3"):
        pipe(["snow", "fox"], negative_prompt=["a", "red", "fox"])
    with pytest.raises(ValueError, match="no effect without guidance"):
        pipe("snow", negative_prompt="fox", guidance_scale=1.0)
    assert pipe("snow", guidance_scale=1.0, output_type="codes").codes
    pipe.save_pretrained(tmp_path)
    again = ImagePipeline.from_pretrained(tmp_path)
    again.set_progress_bar_config(disable=True)
    assert torch.equal(again("snow", seed=2, output_type="pt").images, alone.images)

"""Next-scale sampling: official runs, the exact law, seeds, guidance ramps, editing, two models, the pipeline."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from scipy.stats import chisquare
from torch import Tensor

from tests.golden_files import load_file
from vargen.backbones.var.model import VARTransformer
from vargen.kernels.warp import warp_logits
from vargen.pipelines.image import ImagePipeline
from vargen.random import Stream
from vargen.samplers.scale.editing import keep_codes
from vargen.samplers.scale.next_scale import NextScaleSampler
from vargen.samplers.window.next_token import NextTokenSampler
from vargen.tokenizers.multiscale_vq.model import MultiScaleVQTokenizer

GOLDEN = Path(__file__).parent / "golden" / "var"
SCALES = [1, 2, 4]
SIZES = [1, 4, 16]


def floats(name: str) -> dict[str, Tensor]:
    file = load_file(GOLDEN / f"{name}.safetensors")
    return {key: value.float() if value.is_floating_point() else value for key, value in file.items()}


def tiny_tokenizer(codebook_size: int = 24, scales: list[int] = SCALES) -> MultiScaleVQTokenizer:
    torch.manual_seed(0)
    model = MultiScaleVQTokenizer(
        base_channels=8,
        channel_multipliers=[1, 1],
        num_res_blocks=1,
        norm_num_groups=4,
        attention=False,
        codebook_size=codebook_size,
        codebook_dim=12,
        scales=scales,
        encoder_type="patch",
        z_channels=8,
        phi_ratio=0.0,
    )
    torch.nn.init.uniform_(model.quantize.embedding.weight, -0.5, 0.5)
    return model.eval().requires_grad_(False)


def tiny_backbone(seed: int = 1, codebook_size: int = 24, scales: list[int] = SCALES) -> VARTransformer:
    torch.manual_seed(seed)
    model = VARTransformer(
        dim=16, num_layers=2, num_heads=2, codebook_size=codebook_size, codebook_dim=12, scales=scales, num_classes=5
    )
    for p in model.parameters():
        torch.nn.init.normal_(p, std=0.4)
    return model.eval().requires_grad_(False)


@pytest.fixture(scope="module")
def tokenizer() -> MultiScaleVQTokenizer:
    return tiny_tokenizer()


@pytest.fixture(scope="module")
def backbone() -> VARTransformer:
    return tiny_backbone()


@pytest.fixture(scope="module")
def official() -> tuple[VARTransformer, MultiScaleVQTokenizer]:
    backbone = VARTransformer.from_original(floats("var_weights")).requires_grad_(False)
    tokenizer = MultiScaleVQTokenizer.from_original(floats("vqvae_weights"), scales=(1, 2, 3, 4))
    return backbone, tokenizer.requires_grad_(False)


def pixels(tokenizer: MultiScaleVQTokenizer, latents: Tensor) -> Tensor:
    return (tokenizer.decode_latents(latents).clamp(-1, 1) + 1) / 2


def equal(one: list[Tensor], other: list[Tensor]) -> bool:
    return len(one) == len(other) and all(map(torch.equal, one, other))


def official_noise(seed: int):
    """The generator of the official loop: multinomial draws use one exponential number for each code and position."""
    generator = torch.Generator().manual_seed(seed)

    def noise(k: int, stream: Stream, shape: tuple[int, int, int]) -> Tensor:
        exponential = torch.empty(shape[0] * shape[1], shape[2]).exponential_(generator=generator)
        return -exponential.log().view(shape)

    return noise


def test_most_likely_codes_are_the_official_ones(official):
    backbone, tokenizer = official
    golden = load_file(GOLDEN / "var_generate_argmax.safetensors")
    sampler = NextScaleSampler(guidance_scale=2.5, top_k=1)
    for k, state in enumerate(sampler.stream(backbone, golden["labels"], seeds=[0, 1], tokenizer=tokenizer)):
        assert torch.equal(state.scales[-1], golden[f"tokens.{k}"])
        torch.testing.assert_close(state.total, golden[f"f_hat.{k}"], atol=1e-4, rtol=0)
        if k > 0:
            given = golden[f"next_input.{k - 1}"].flatten(2).mT
            torch.testing.assert_close(state.inputs[-1], given, atol=1e-4, rtol=0)
    torch.testing.assert_close(pixels(tokenizer, state.total), golden["image01"], atol=1e-4, rtol=0)


def test_guided_logits_are_the_official_ones(official):
    backbone, tokenizer = official
    golden = load_file(GOLDEN / "var_generate_argmax.safetensors")
    codes = [golden[f"tokens.{k}"] for k in range(4)]
    sampler = NextScaleSampler(guidance_scale=2.5)
    session, out = backbone.open(backbone.prepare(golden["labels"], guidance_scale=2.5))
    inputs = [None, *tokenizer.scale_inputs(codes).split([4, 9, 16], dim=1)]
    for k in range(4):
        logits = out.logits if k == 0 else backbone.step(session, inputs[k]).logits
        found = warp_logits(logits, guidance_scale=sampler.guidance_at(k, 4))
        torch.testing.assert_close(found, golden[f"logits_cfg.{k}"], atol=5e-4, rtol=0)


@pytest.mark.parametrize(
    ("name", "settings", "atol"),
    [
        ("sampled", {"top_k": 8, "top_p": 0.9}, 1e-4),
        ("plain", {}, 1e-4),
        ("smooth", {"top_k": 16, "top_p": 0.95, "smooth": True}, 3e-3),
    ],
)
def test_official_noise_gives_the_official_draws(official, name, settings, atol):
    backbone, tokenizer = official
    golden = load_file(GOLDEN / "var_generate_seeded.safetensors")
    sampler = NextScaleSampler(guidance_scale=5.0, **settings)
    output = sampler.sample(backbone, golden["labels"], seeds=[0, 1], tokenizer=tokenizer, noise=official_noise(7))
    for k, codes in enumerate(output.codes):
        assert torch.equal(codes, golden[f"{name}.tokens.{k}"])
    torch.testing.assert_close(pixels(tokenizer, output.latents), golden[f"{name}.image01"], atol=atol, rtol=0)


@pytest.mark.parametrize(
    ("name", "settings"),
    [
        ("k10", {"top_k": 10}),
        ("p90", {"top_p": 0.9}),
        ("k10p90", {"top_k": 10, "top_p": 0.9}),
        ("k1", {"top_k": 1}),
        ("p999", {"top_p": 0.999}),
        ("k30p50", {"top_k": 30, "top_p": 0.5}),
    ],
)
def test_filters_are_the_official_ones(name, settings):
    golden = load_file(GOLDEN / "sampling_filter.safetensors")
    torch.testing.assert_close(warp_logits(golden["logits"][None], **settings), golden[f"filtered.{name}"])


def exact_law(backbone: VARTransformer, tokenizer: MultiScaleVQTokenizer, size: int) -> Tensor:
    """Probabilities ``[size] * 5`` of a model with scales 1 and 2: every image scored by the training forward."""
    images = torch.cartesian_prod(*[torch.arange(size)] * 5)
    first, second = images[:, :1], images[:, 1:]
    logits = backbone(tokenizer.scale_inputs([first, second]), torch.zeros(len(images), dtype=torch.int64))
    return logits.log_softmax(-1).gather(-1, images[..., None])[..., 0].sum(1).exp()


def test_images_follow_the_law_of_the_backbone():
    tokenizer, backbone = tiny_tokenizer(3, [1, 2]), tiny_backbone(2, 3, [1, 2])
    law = exact_law(backbone, tokenizer, 3)
    assert law.sum().item() == pytest.approx(1, abs=1e-4)
    n = 12_000
    labels = torch.zeros(n, dtype=torch.int64)

    def p_value(**settings: float) -> float:
        output = NextScaleSampler(**settings).sample(backbone, labels, seeds=range(n), tokenizer=tokenizer)
        drawn = torch.cat(output.codes, dim=1)
        counts = torch.bincount(drawn @ torch.tensor([81, 27, 9, 3, 1]), minlength=243).double()
        expected = law.double() / law.double().sum() * n
        common = expected >= 5
        pooled = [torch.cat([x[common], x[~common].sum()[None]]) for x in (counts, expected)]
        return float(chisquare(*pooled).pvalue)

    assert p_value() > 1e-4
    assert p_value(temperature=0.9) < 1e-6  # another law is seen


def test_an_image_depends_on_its_seed_alone(backbone, tokenizer):
    sampler = NextScaleSampler(guidance_scale=2.0, top_k=12, smooth=True)
    labels, seeds = torch.tensor([0, 1, 2, 3]), [5, 6, 7, 5]
    whole = sampler.sample(backbone, labels, seeds=seeds, tokenizer=tokenizer)
    order = torch.tensor([2, 0, 3, 1])
    again = sampler.sample(backbone, labels[order], seeds=[seeds[i] for i in order], tokenizer=tokenizer)
    alone = sampler.sample(backbone, labels[2:3], seeds=[7], tokenizer=tokenizer)
    for k in range(3):
        assert torch.equal(whole.codes[k][order], again.codes[k])
        assert torch.equal(whole.codes[k][2:3], alone.codes[k])
    torch.testing.assert_close(whole.latents[order], again.latents, atol=1e-4, rtol=1e-4)
    same_label = sampler.sample(backbone, torch.tensor([1, 1]), seeds=[5, 6], tokenizer=tokenizer)
    assert not torch.equal(same_label.codes[2][0], same_label.codes[2][1])


def test_guidance_schedules():
    linear = NextScaleSampler(guidance_scale=2.5)
    assert [linear.guidance_at(k, 4) for k in range(4)] == [1.0, 1.5, 2.0, 2.5]
    constant = linear.replace(guidance_schedule="constant")
    assert [constant.guidance_at(k, 4) for k in range(4)] == [2.5] * 4
    stopped = linear.replace(guidance_stop_scale=2)
    assert [stopped.guidance_at(k, 4) for k in range(4)] == [1.0, 1.5, 1.0, 1.0]


def test_temperature_falls_to_the_last_scale(backbone, tokenizer):
    sampler = NextScaleSampler(final_temperature=0.0)
    assert [sampler.temperature_at(k, 3) for k in range(3)] == [1.0, 0.5, 0.0]
    assert NextScaleSampler(temperature=0.7).temperature_at(2, 3) == 0.7
    labels, arguments = torch.tensor([1, 2]), {"seeds": [0, 1], "tokenizer": tokenizer}
    found = sampler.sample(backbone, labels, **arguments)
    warm = NextScaleSampler(temperature=0.5).sample(
        backbone, labels, **arguments, forced_codes=[found.codes[0], *[torch.full((2, n), -1) for n in SIZES[1:]]]
    )
    assert torch.equal(found.codes[1], warm.codes[1])
    greedy = NextScaleSampler(temperature=0.0).sample(
        backbone, labels, **arguments, forced_codes=[*found.codes[:2], torch.full((2, 16), -1)]
    )
    assert equal(found.codes, greedy.codes)


def test_scales_behind_the_stop_of_guidance_run_one_branch(backbone, tokenizer):
    labels = torch.tensor([1, 2])
    sampler = NextScaleSampler(guidance_scale=3.0, guidance_schedule="constant", guidance_stop_scale=1)
    output = sampler.sample(backbone, labels, seeds=[0, 1], tokenizer=tokenizer)
    first = NextScaleSampler(guidance_scale=3.0, guidance_schedule="constant", stop_scale=1)
    coarse = first.sample(backbone, labels, seeds=[0, 1], tokenizer=tokenizer).codes[0]
    forced = [coarse, torch.full((2, 4), -1), torch.full((2, 16), -1)]
    plain = NextScaleSampler().sample(backbone, labels, seeds=[0, 1], tokenizer=tokenizer, forced_codes=forced)
    assert equal(output.codes, plain.codes)


def test_without_guidance_no_unconditional_branch_is_run(backbone, tokenizer, monkeypatch):
    branches = []
    prepare = VARTransformer.prepare
    monkeypatch.setattr(
        VARTransformer, "prepare", lambda *a, **k: branches.append((c := prepare(*a, **k)).branches) or c
    )
    for settings in ({}, {"guidance_scale": 2.0}, {"guidance_scale": 2.0, "guidance_stop_scale": 0}):
        NextScaleSampler(**settings).sample(backbone, torch.tensor([1]), seeds=[0], tokenizer=tokenizer)
    assert branches == [1, 2, 1]


def test_stopping_early_decodes_what_is_there(backbone, tokenizer):
    labels = torch.tensor([1, 2])
    whole = NextScaleSampler().sample(backbone, labels, seeds=[0, 1], tokenizer=tokenizer)
    part = NextScaleSampler(stop_scale=2).sample(backbone, labels, seeds=[0, 1], tokenizer=tokenizer)
    assert equal(part.codes, whole.codes[:2])
    torch.testing.assert_close(part.latents, tokenizer.latents(whole.codes[:2]))
    assert (part.stats.num_forwards, whole.stats.num_forwards) == (2, 3)
    assert (part.stats.guarantee, whole.stats.guarantee) == ("heuristic", "exact")


def test_previews_at_every_scale_reach_the_callback(backbone, tokenizer):
    seen: list[tuple[int, int, Tensor]] = []
    output = NextScaleSampler().sample(
        backbone,
        torch.tensor([1, 2]),
        seeds=[0, 1],
        tokenizer=tokenizer,
        callback=lambda step, state: seen.append((step, int(state.num_committed[0]), state.preview())),
    )
    assert [(step, count) for step, count, _ in seen] == [(0, 1), (1, 5), (2, 21)]
    for k, (_, _, image) in enumerate(seen):
        torch.testing.assert_close(image, tokenizer.decode_partial(output.codes[: k + 1]))


def test_run_resumes_from_a_state(backbone, tokenizer):
    sampler = NextScaleSampler(guidance_scale=1.5)
    arguments = {"seeds": [3, 4], "tokenizer": tokenizer}
    whole = sampler.sample(backbone, torch.tensor([0, 1]), **arguments)
    state = sampler.start(backbone, torch.tensor([0, 1]), **arguments)
    assert (state.codes[:, 1:] == -1).all()
    while not state.done:
        state = sampler.step(state)
    assert equal(sampler.finish(state).codes, whole.codes)


class TestEditing:
    def test_kept_codes_stay_and_free_ones_are_drawn(self, backbone, tokenizer):
        images = torch.rand(2, 3, 8, 8) * 2 - 1
        codes = tokenizer.encode(images).codes
        keep = torch.zeros(4, 4, dtype=torch.bool)
        keep[:, :2] = True
        forced = keep_codes(codes, keep, tokenizer.scales)
        assert torch.equal(forced[0], codes[0])  # the coarsest scale is kept whole
        assert (forced[1].view(2, 2, 2)[:, :, 0] >= 0).all()
        assert (forced[2].view(2, 4, 4)[:, :, 2:] == -1).all()
        output = NextScaleSampler().sample(
            backbone, torch.tensor([5, 1]), seeds=[0, 1], tokenizer=tokenizer, forced_codes=forced
        )
        for given, drawn in zip(forced, output.codes, strict=True):
            assert torch.equal(torch.where(given >= 0, drawn, -1), given)
        assert (output.codes[2] != codes[2]).any()

    def test_everything_kept_returns_the_image(self, backbone, tokenizer):
        codes = tokenizer.encode(torch.rand(1, 3, 8, 8) * 2 - 1).codes
        sampler = NextScaleSampler(smooth=True)
        output = sampler.sample(backbone, torch.tensor([5]), seeds=[0], tokenizer=tokenizer, forced_codes=codes)
        assert equal(output.codes, codes)
        torch.testing.assert_close(output.latents, tokenizer.latents(codes))

    def test_mask_is_the_official_one_on_odd_scales(self):
        codes = [torch.zeros(1, n, dtype=torch.int64) for n in (1, 9, 16)]
        keep = torch.ones(4, 4, dtype=torch.bool)
        keep[1:3, 1:3] = False
        forced = keep_codes(codes, keep, ((1, 1), (3, 3), (4, 4)))
        assert forced[1].tolist() == [[0, 0, 0, 0, -1, 0, 0, 0, 0]]

    @pytest.mark.parametrize(
        ("forced", "message"),
        [
            ([torch.zeros(1, dtype=torch.int64)], "one tensor a scale, 3, got 1"),
            ([torch.zeros(n) for n in SIZES], "of scale 0 must be integers"),
            ([torch.full((n,), 24) for n in SIZES], r"0\.\.23, or -1 where free, at scale 0"),
        ],
    )
    def test_wrong_codes_are_refused(self, backbone, tokenizer, forced, message):
        with pytest.raises(ValueError, match=message):
            NextScaleSampler().sample(backbone, torch.tensor([1]), seeds=[0], tokenizer=tokenizer, forced_codes=forced)


class TestTwoModels:
    labels = torch.tensor([1, 4])

    @pytest.mark.parametrize("scale", [1, 2])
    def test_twice_the_same_model_is_one_model(self, backbone, tokenizer, scale):
        sampler = NextScaleSampler(guidance_scale=2.0, top_k=5)
        plain = sampler.sample(backbone, self.labels, seeds=[0, 1], tokenizer=tokenizer)
        both = sampler.replace(refine_scale=scale).sample(
            backbone, self.labels, seeds=[0, 1], tokenizer=tokenizer, drafter=backbone
        )
        assert equal(plain.codes, both.codes)
        assert (both.stats.num_forwards, both.stats.num_drafter_forwards) == (3 - scale, scale)
        assert both.stats.guarantee == "heuristic"

    def test_first_scales_are_the_drafters_and_the_rest_the_backbones(self, backbone, tokenizer):
        drafter = tiny_backbone(seed=7)
        plain = NextScaleSampler().sample(drafter, self.labels, seeds=[0, 1], tokenizer=tokenizer)
        both = NextScaleSampler(refine_scale=2).sample(
            backbone, self.labels, seeds=[0, 1], tokenizer=tokenizer, drafter=drafter
        )
        assert equal(both.codes[:2], plain.codes[:2])
        forced = [*plain.codes[:2], torch.full((2, 16), -1)]
        refined = NextScaleSampler().sample(
            backbone, self.labels, seeds=[0, 1], tokenizer=tokenizer, forced_codes=forced
        )
        assert equal(both.codes, refined.codes)

    def test_refining_behind_the_last_scale_is_the_drafter_alone(self, backbone, tokenizer):
        drafter = tiny_backbone(seed=7)
        plain = NextScaleSampler().sample(drafter, self.labels, seeds=[0, 1], tokenizer=tokenizer)
        both = NextScaleSampler(refine_scale=3).sample(
            backbone, self.labels, seeds=[0, 1], tokenizer=tokenizer, drafter=drafter
        )
        assert equal(plain.codes, both.codes)
        assert both.stats.num_forwards == 0

    def test_drafter_must_be_there_and_fit(self, backbone, tokenizer):
        arguments = {"seeds": [0, 1], "tokenizer": tokenizer}
        with pytest.raises(ValueError, match="refine_scale=1 needs a drafter"):
            NextScaleSampler(refine_scale=1).sample(backbone, self.labels, **arguments)
        with pytest.raises(ValueError, match="drafter and backbone must have the same scales"):
            NextScaleSampler(refine_scale=1).sample(
                backbone, self.labels, **arguments, drafter=tiny_backbone(1, 24, [1, 4])
            )


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda b, t: NextScaleSampler(guidance_schedule="lineer"), "did you mean 'linear'"),
        (lambda b, t: NextScaleSampler(final_temperature=-1.0), "final_temperature must be"),
        (lambda b, t: NextScaleSampler(stop_scale=0), "stop_scale must be an integer in 1..64, got 0"),
        (lambda b, t: NextScaleSampler(more_smooth=True), "did you mean 'smooth'"),
        (lambda b, t: NextScaleSampler().sample(b, torch.tensor([1]), seeds=[0]), "pass tokenizer="),
        (lambda b, t: NextScaleSampler(stop_scale=9).sample(b, torch.tensor([1]), seeds=[0], tokenizer=t), "3 scales"),
        (lambda b, t: NextScaleSampler(top_k=25).sample(b, torch.tensor([1]), seeds=[0], tokenizer=t), "0..24"),
        (lambda b, t: NextScaleSampler().sample(b, torch.tensor([1]), seeds=[0, 1], tokenizer=t), "1 images, got 2"),
        (
            lambda b, t: NextTokenSampler().sample(b, torch.tensor([1]), seeds=[0]),
            "Samplers that fit: NextScaleSampler",
        ),
        (
            lambda b, t: NextScaleSampler().sample(b, torch.tensor([1]), seeds=[0], tokenizer=tiny_tokenizer(8)),
            "same codebook size, got 8 and 24",
        ),
    ],
)
def test_bad_input_is_refused_in_one_line(backbone, tokenizer, call, message):
    with pytest.raises(ValueError, match=message):
        call(backbone, tokenizer)


class TestPipeline:
    @pytest.fixture
    def pipe(self, backbone, tokenizer) -> ImagePipeline:
        pipe = ImagePipeline(tokenizer, backbone, NextScaleSampler(guidance_scale=1.5))
        pipe.set_progress_bar_config(disable=True)
        return pipe

    def test_images_and_codes_by_scale(self, pipe, tokenizer):
        output = pipe(class_labels=[1, 2, 3], seed=4, output_type="pt", batch_size=2)
        assert [codes.shape for codes in output.codes] == [(3, n) for n in SIZES]
        torch.testing.assert_close(output.images, pixels(tokenizer, tokenizer.latents(output.codes)))
        again = pipe(class_labels=[1, 2, 3], seed=4, output_type="codes")
        assert equal(output.codes, again.codes)

    def test_callback_watches_the_image_grow(self, pipe, tokenizer):
        seen = []

        def watch(pipe, step, num_forwards, tensors):
            seen.append(pipe.decode_codes(tensors["codes"]))

        output = pipe(class_labels=[1, 2], seed=4, output_type="codes", callback_on_step_end=watch)
        assert len(seen) == 3
        for k, image in enumerate(seen):
            torch.testing.assert_close(image, tokenizer.decode_partial(output.codes[: k + 1]))

    def test_interrupted_call_returns_what_is_drawn(self, pipe, tokenizer):
        def stop(pipe, step, num_forwards, tensors):
            pipe._interrupt = step == 1

        output = pipe(class_labels=[1, 2, 3], seed=4, output_type="pt", batch_size=2, callback_on_step_end=stop)
        assert (output.codes[1][:2] >= 0).all()
        assert (output.codes[2] == -1).all()
        assert (output.codes[0][2:] == -1).all()
        torch.testing.assert_close(output.images[2], torch.full((3, 8, 8), 0.5))
        partial = tokenizer.decode_partial([codes[:2] for codes in output.codes[:2]])
        torch.testing.assert_close(output.images[:2], (partial.clamp(-1, 1) + 1) / 2)

    def test_saved_pipeline_draws_the_same(self, pipe, tmp_path):
        pipe.sampler = pipe.sampler.replace(guidance_schedule="constant", smooth=True)
        pipe.save_pretrained(tmp_path)
        again = ImagePipeline.from_pretrained(tmp_path)
        again.set_progress_bar_config(disable=True)
        assert again.sampler == pipe.sampler
        one, other = (p(class_labels=2, seed=1, output_type="pt") for p in (pipe, again))
        assert torch.equal(one.images, other.images)

"""What users do with a next-scale pipeline beyond drawing: in-painting, editing, two models."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image
from torch import Tensor

from tests.tiny import CODEBOOK_SIZE, NUM_CLASSES, SCALES, tiny_pipeline, tiny_scale_pipeline
from vargen.backbones.var.model import VARTransformer
from vargen.pipelines.image import ImagePipeline
from vargen.samplers.scale.editing import keep_codes
from vargen.samplers.scale.next_scale import NextScaleSampler

NULL = NUM_CLASSES


@pytest.fixture(scope="module")
def pipe() -> ImagePipeline:
    return tiny_scale_pipeline()


@pytest.fixture(scope="module")
def image() -> Tensor:
    return torch.rand(1, 3, 8, 8, generator=torch.Generator().manual_seed(0)).mul(255).round().div(255)


@pytest.fixture(scope="module")
def mask() -> Tensor:
    mask = torch.zeros(8, 8)
    mask[:, 4:] = 1
    return mask


def equal(one: Any, other: Any) -> bool:
    return len(one) == len(other) and all(map(torch.equal, one, other))


def by_hand(pipe: ImagePipeline, image: Tensor, labels: list[int], seeds: list[int]) -> list[Tensor]:
    """The right half drawn anew, with the sampler alone."""
    keep = torch.zeros(4, 4, dtype=torch.bool)
    keep[:, :2] = True
    codes = [part.expand(len(labels), -1) for part in pipe.tokenizer.encode(image * 2 - 1).codes]
    forced = keep_codes(codes, keep, pipe.tokenizer.scales)
    return pipe.sampler.sample(
        pipe.backbone, torch.tensor(labels), seeds=seeds, tokenizer=pipe.tokenizer, forced_codes=forced
    ).codes


class TestEditing:
    def test_hole_is_filled_under_the_null_condition(self, pipe, image, mask):
        output = pipe(image=image, mask_image=mask, num_images_per_prompt=2, seed=3, output_type="pt")
        assert equal(output.codes, by_hand(pipe, image, [NULL, NULL], [3, 4]))
        given = pipe.tokenizer.encode(image * 2 - 1).codes[2].view(4, 4)
        drawn = output.codes[2].view(2, 4, 4)
        assert (drawn[:, :, :2] == given[:, :2]).all()
        assert (drawn[:, :, 2:] != given[:, 2:]).any()
        assert output.images.shape == (2, 3, 8, 8)
        assert output.stats.guarantee == "heuristic"
        assert "fixed beforehand" in output.stats.notes[0]

    def test_image_is_edited_towards_each_class(self, pipe, image, mask):
        ask: dict[str, Any] = {"class_labels": [1, 6], "image": image, "mask_image": mask, "num_images_per_prompt": 2}
        output = pipe(**ask, seed=3, output_type="codes")
        assert equal(output.codes, by_hand(pipe, image, [1, 1, 6, 6], [3, 4, 5, 6]))
        assert equal(output.codes, pipe(**ask, seed=3, output_type="codes", batch_size=3).codes)

    def test_pil_images_are_the_same_as_tensors(self, pipe, image, mask):
        pixels = (image[0].permute(1, 2, 0) * 255).round().byte().numpy()
        picture = Image.fromarray(pixels)
        stencil = Image.fromarray((mask.numpy() * 255).astype(np.uint8))
        one = pipe(image=image, mask_image=mask, seed=0, output_type="codes")
        other = pipe(image=picture, mask_image=stencil, seed=0, output_type="codes")
        assert equal(one.codes, other.codes)
        several = pipe(image=[picture, picture], mask_image=stencil, seed=0, output_type="codes")
        assert len(several.codes[0]) == 2

    def test_each_prompt_may_have_an_image_and_a_mask(self, pipe, image, mask):
        images, masks = torch.cat([image, 1 - image]), torch.stack([mask, 1 - mask])
        both = pipe(class_labels=[1, 2], image=images, mask_image=masks, seed=0, output_type="codes").codes
        second = pipe(class_labels=2, image=1 - image, mask_image=1 - mask, seed=1, output_type="codes").codes
        assert equal([part[1:] for part in both], second)

    def test_nothing_masked_is_the_reconstruction(self, pipe, image):
        output = pipe(class_labels=4, image=image, mask_image=torch.zeros(8, 8), seed=0, output_type="pt")
        with torch.no_grad():
            expected = pipe.tokenizer.decode(pipe.tokenizer.encode(image * 2 - 1).codes)
        torch.testing.assert_close(output.images, (expected / 2 + 0.5).clamp(0, 1), atol=1e-5, rtol=0)

    def test_one_masked_pixel_frees_its_cell(self, pipe, image):
        mask = torch.zeros(8, 8)
        mask[3, 5] = 1
        output = pipe(image=image, mask_image=mask, num_images_per_prompt=8, seed=0, output_type="codes")
        changed = output.codes[2] != pipe.tokenizer.encode(image * 2 - 1).codes[2]
        assert changed.any(0).view(4, 4).nonzero().tolist() == [[1, 2]]

    @pytest.mark.parametrize(
        ("ask", "message"),
        [
            ({"mask_image": None}, "needs image and mask_image, got no mask_image"),
            ({"image": None}, "needs image and mask_image, got no image"),
            ({"image": torch.rand(1, 3, 16, 16)}, r"image must have 8x8 pixels \(height x width\), got 16x16"),
            ({"mask_image": torch.zeros(8, 4)}, "mask_image must have 8x8 pixels"),
            ({"mask_image": torch.zeros(3, 8, 8)}, "mask_image must hold 1 or 1 masks"),
            ({"mask_image": "hole.png"}, "mask_image must be a PIL image, or an array or tensor .* got str"),
            ({"image": torch.full((1, 3, 8, 8), 2.0)}, r"must lie in \[0, 1\]"),
            ({"image": torch.zeros(3, 8, 8, dtype=torch.uint8)}, "float tensor .* got torch.uint8"),
            ({"image": torch.rand(3, 3, 8, 8), "class_labels": [1, 2]}, "1 or 2 images, one a prompt, got 3"),
        ],
    )
    def test_bad_input_is_refused_in_one_line(self, pipe, image, mask, ask, message):
        with pytest.raises(ValueError, match=message) as caught:
            pipe(**{"image": image, "mask_image": mask, "seed": 0, **ask})
        assert "\n" not in str(caught.value)

    def test_only_next_scale_models_edit(self, image, mask):
        with pytest.raises(ValueError, match="need a next-scale model, got a VQTokenizer"):
            tiny_pipeline()(class_labels=1, image=image, mask_image=mask)

    def test_wrong_mask_size_is_refused_by_the_function(self, pipe, image):
        codes = pipe.tokenizer.encode(image * 2 - 1).codes
        with pytest.raises(ValueError, match=r"\[4, 4\] or \[1, 4, 4\], got \[8, 8\]"):
            keep_codes(codes, torch.ones(8, 8, dtype=torch.bool), pipe.tokenizer.scales)


class TestTwoModels:
    ASK: dict[str, Any] = {"class_labels": [3, 7], "seed": 5, "guidance_scale": 2.0, "output_type": "codes"}  # noqa: RUF012

    @pytest.fixture
    def pair(self) -> ImagePipeline:
        pipe = tiny_scale_pipeline()
        torch.manual_seed(9)
        drafter = VARTransformer(
            dim=32,
            num_layers=1,
            num_heads=2,
            num_classes=NUM_CLASSES,
            codebook_size=CODEBOOK_SIZE,
            codebook_dim=12,
            scales=SCALES,
        )
        for weight in drafter.parameters():
            torch.nn.init.normal_(weight, std=0.4)
        pipe.drafter = drafter.eval()
        return pipe

    def test_a_call_switches_it_on(self, pair):
        output = pair(**self.ASK, refine_scale=2)
        first = NextScaleSampler(guidance_scale=2.0).sample(
            pair.drafter, torch.tensor([3, 7]), seeds=[5, 6], tokenizer=pair.tokenizer
        )
        assert equal(output.codes[:2], first.codes[:2])
        assert not torch.equal(output.codes[2], first.codes[2])
        assert (output.stats.num_forwards, output.stats.num_drafter_forwards) == (1, 2)
        assert output.stats.guarantee == "heuristic"
        assert equal(
            pair(**self.ASK).codes[:1], tiny_scale_pipeline()(**self.ASK).codes[:1]
        )  # off: the drafter sleeps

    def test_pair_is_saved_and_loaded(self, pair, tmp_path: Path):
        pair.sampler = NextScaleSampler(refine_scale=1)
        pair.save_pretrained(tmp_path)
        again = ImagePipeline.from_pretrained(tmp_path)
        again.set_progress_bar_config(disable=True)
        assert equal(again(**self.ASK).codes, pair(**self.ASK).codes)

    def test_previews_come_from_both_models(self, pair):
        seen = []
        output = pair(
            **self.ASK,
            refine_scale=1,
            callback_on_step_end=lambda p, step, n, tensors: seen.append(p.decode_codes(tensors["codes"])),
        )
        assert len(seen) == 3
        torch.testing.assert_close(seen[0], pair.tokenizer.decode_partial(output.codes[:1]), atol=1e-5, rtol=0)

    def test_without_a_second_model_the_call_is_refused(self, pipe, pair):
        with pytest.raises(ValueError, match="refine_scale=2 needs a drafter"):
            pipe(**self.ASK, refine_scale=2)
        with pytest.raises(ValueError, match="the model has 3 scales"):
            pair(**self.ASK, refine_scale=4)

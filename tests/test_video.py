"""The video pipeline: seeds, batches, given frames, streaming, files, folders; and the command."""

from __future__ import annotations

import base64
import io
import re
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image, ImageSequence
from typer.testing import CliRunner

from vargen import registry
from vargen.backbones.nbp.model import NBPTransformer
from vargen.cli.main import app
from vargen.pipelines.image import ImagePipeline
from vargen.pipelines.video import VideoPipeline
from vargen.pipelines.video_frames import save_video
from vargen.samplers.schedule.next_block import NextBlockSampler
from vargen.samplers.window.next_token import NextTokenSampler
from vargen.tokenizers.video_fsq.model import VideoFSQTokenizer


def tiny_video_tokenizer() -> VideoFSQTokenizer:
    torch.manual_seed(0)
    small = {"base_channels": 8, "channel_multipliers": [1], "temporal_downsample": [], "num_res_blocks": 1}
    tokenizer = VideoFSQTokenizer(
        **small, num_mid_blocks=0, levels=[4, 4], norm_num_groups=1, factorized=True, patch_size=[2, 4, 4]
    )
    return tokenizer.eval()


def tiny_video_pipeline(**config: Any) -> VideoPipeline:
    torch.manual_seed(1)
    defaults = {"dim": 24, "num_layers": 2, "num_heads": 2, "codebook_size": 16, "grid_size": [3, 2, 2]}
    defaults |= {"block": [1, 1, 2], "condition_type": "class", "num_classes": 5, "max_positions": None}
    backbone = NBPTransformer(**{**defaults, **config})
    for name, weight in backbone.named_parameters():
        torch.nn.init.normal_(weight, mean=float("ln" in name and "weight" in name), std=0.5)
    pipe = VideoPipeline(tiny_video_tokenizer(), backbone.eval(), NextBlockSampler(guidance_scale=1.5), fps=5)
    pipe.set_progress_bar_config(disable=True)
    return pipe


@pytest.fixture(scope="module")
def pipe() -> VideoPipeline:
    return tiny_video_pipeline()


def test_a_batch_equals_four_single_runs_with_the_same_seeds(pipe: VideoPipeline) -> None:
    many = pipe(class_labels=[1, 3], num_videos_per_prompt=2, seed=[4, 5, 6, 9], output_type="pt")
    assert many.frames.shape == (4, 5, 3, 8, 8)
    assert many.codes.shape == (4, 3, 2, 2)
    assert many.stats.guarantee == "exact"
    for i, (label, seed) in enumerate([(1, 4), (1, 5), (3, 6), (3, 9)]):
        one = pipe(class_labels=label, seed=seed, output_type="pt")
        assert torch.equal(one.codes[0], many.codes[i])
        torch.testing.assert_close(one.frames[0], many.frames[i])
    split = pipe(class_labels=[1, 3], num_videos_per_prompt=2, seed=[4, 5, 6, 9], output_type="codes", batch_size=3)
    assert torch.equal(split.codes, many.codes)
    assert split.frames is None
    assert not torch.equal(many.codes[0], many.codes[1])


def test_output_types_hold_the_same_pixels(pipe: VideoPipeline) -> None:
    pil, array = (pipe(class_labels=2, seed=1, output_type=kind).frames for kind in ("pil", "np"))
    assert (len(pil), len(pil[0]), pil[0][0].size) == (1, 5, (8, 8))
    np.testing.assert_allclose(np.asarray(pil[0][3]) / 255, array[0, 3], atol=0.51 / 255)
    frames, codes, seeds, stats = pipe(class_labels=2, seed=1, return_dict=False)
    assert (len(frames), codes.shape[0], seeds, stats.num_forwards) == (1, 1, [1], 7)


def test_frames_arrive_while_later_ones_are_still_to_be_drawn(pipe: VideoPipeline) -> None:
    seen: list[tuple[int, int, torch.Tensor]] = []

    def watch(_: Any, step: int, __: int, tensors: dict[str, Any]) -> None:
        if tensors["frames"] is not None:
            seen.append((step, int((tensors["codes"] < 0).sum()), tensors["frames"]))

    names = ("frames", "codes")
    out = pipe(
        class_labels=[0, 4],
        seed=3,
        output_type="pt",
        callback_on_step_end=watch,
        callback_on_step_end_tensor_inputs=names,
    )
    assert [(step, left) for step, left, _ in seen] == [(2, 16), (4, 8), (6, 0)]
    assert [part.shape[1] for _, _, part in seen] == [1, 2, 2]
    torch.testing.assert_close(torch.cat([part for _, _, part in seen], dim=1), out.frames)


def test_given_frames_are_held_and_continued(pipe: VideoPipeline) -> None:
    first = torch.rand(3, 3, 8, 8)
    out = pipe(class_labels=[1, 2], frames=first, seed=0, output_type="pt")
    codes = pipe.tokenizer.encode(first.transpose(0, 1)[None] * 2 - 1).codes
    assert torch.equal(out.codes[:, :2], codes.expand(2, -1, -1, -1))
    assert out.stats.num_forwards == 2
    assert not torch.equal(out.codes[0, 2], out.codes[1, 2])
    images = [Image.fromarray((frame.permute(1, 2, 0) * 255).byte().numpy()) for frame in first[:1]]
    assert pipe(class_labels=1, frames=images, seed=0).stats.num_forwards == 4


def test_fewer_frames_are_the_first_of_the_whole_clip(pipe: VideoPipeline) -> None:
    whole = pipe(class_labels=1, seed=2, output_type="pt")
    part = pipe(class_labels=1, seed=2, output_type="pt", num_frames=3)
    torch.testing.assert_close(part.frames, whole.frames[:, :3])
    assert (part.stats.num_forwards, part.stats.notes) == (5, [])


def test_a_model_of_frame_prediction_needs_frames_alone() -> None:
    pipe = tiny_video_pipeline(condition_type="none")
    out = pipe(frames=torch.rand(2, 1, 3, 8, 8), guidance_scale=1.0, num_videos_per_prompt=2, seed=0, output_type="np")
    assert out.frames.shape == (4, 5, 8, 8, 3)
    for wrong, message in (({}, "continues given frames"), ({"prompt": "a cat"}, "reads no prompts")):
        with pytest.raises(ValueError, match=message):
            pipe(**wrong, guidance_scale=1.0)


def test_an_interrupted_call_returns_what_it_has(pipe: VideoPipeline) -> None:
    def stop(pipe: VideoPipeline, step: int, *_: Any) -> None:
        pipe._interrupt = step == 3

    out = pipe(class_labels=1, seed=2, output_type="pt", callback_on_step_end=stop)
    assert out.stats.notes == ["interrupted after 4 forward passes"]
    assert (out.codes[0, 2] == -1).all()
    assert (out.frames[0, -1] == 0.5).all()


def test_saving_and_loading_keeps_the_pipeline(pipe: VideoPipeline, tmp_path: Any) -> None:
    pipe.save_pretrained(tmp_path)
    again = VideoPipeline.from_pretrained(tmp_path)
    again.set_progress_bar_config(disable=True)
    assert (again.config.fps, again.sampler) == (5, pipe.sampler)
    assert torch.equal(again(class_labels=1, seed=7).codes, pipe(class_labels=1, seed=7).codes)


@pytest.mark.parametrize("name", ["clip.gif", "clip.mp4"])
def test_clips_are_written(pipe: VideoPipeline, tmp_path: Any, name: str) -> None:
    out = pipe(class_labels=1, seed=7)
    if name.endswith("mp4"):
        pytest.importorskip("imageio_ffmpeg")
    path = out.save(tmp_path / name, scale=4)
    assert path.stat().st_size > 100
    if name.endswith("gif"):
        with Image.open(path) as clip:
            assert (clip.n_frames, clip.size, clip.info["duration"]) == (5, (32, 32), 200)
            first = next(ImageSequence.Iterator(clip)).convert("RGB")
        assert first.getpixel((0, 0)) == pytest.approx(out.frames[0][0].getpixel((0, 0)), abs=40)
    assert "data:image/gif;base64," in out._repr_html_()
    many = pipe(class_labels=[1, 2, 0], seed=7)
    (shown,) = re.findall(r"base64,([^\"]+)", many._repr_html_())
    with Image.open(io.BytesIO(base64.b64decode(shown))) as clips:  # side by side, each about 96 pixels large
        assert clips.width > 2 * clips.height > 2 * 96


@pytest.mark.parametrize(
    ("call", "message"),
    [
        ({"num_frames": 4}, "num_frames must be one of 1, 3, 5, got 4"),
        ({"num_videos_per_prompt": 0}, "num_videos_per_prompt must be an integer of at least 1"),
        ({"fps": 0}, "fps must be an integer in 1..100"),
        ({"frames": torch.rand(2, 3, 8, 8)}, "frames must hold 1, 3 frames, got 2"),
        ({"frames": torch.rand(1, 3, 8, 12)}, "frames must have 8x8 pixels"),
        ({"frames": torch.rand(1, 3, 8, 8) * 3}, r"frames must lie in \[0, 1\]"),
        ({"frames": torch.rand(3, 1, 3, 8, 8)}, "frames must hold 1 or 1 clips"),
        ({"frames": 7}, "frames must be PIL images"),
        ({"output_type": "mp4"}, "output_type must be one of"),
        ({"class_labels": 9}, "class_labels must be in 0..4"),
        ({"class_labels": None, "prompt": ""}, "the prompt is empty"),
    ],
)
def test_wrong_arguments_are_refused_in_one_line(pipe: VideoPipeline, call: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message) as info:
        pipe(**{"class_labels": 1, **call})
    assert "\n" not in str(info.value)


def test_parts_that_do_not_fit_are_refused(pipe: VideoPipeline) -> None:
    with pytest.raises(ValueError, match="same codebook size"):
        tiny_video_pipeline(codebook_size=32)
    with pytest.raises(ValueError, match="needs a video tokenizer and a backbone"):
        VideoPipeline(pipe.tokenizer, tiny_video_pipeline(grid_size=[2, 2], block=[1, 2]).backbone, NextBlockSampler())
    with pytest.raises(ValueError, match="NextTokenSampler"):
        VideoPipeline(pipe.tokenizer, pipe.backbone, NextTokenSampler())(class_labels=1)
    with pytest.raises(ValueError, match=r"must be a \.gif or \.mp4 file"):
        save_video([Image.new("RGB", (8, 8))], "clip.avi")


def test_a_folder_of_videos_is_not_loaded_as_images(pipe: VideoPipeline, tmp_path: Any) -> None:
    pipe.save_pretrained(tmp_path / "clips")
    with pytest.raises(ValueError, match="clips draws videos; load it with VideoPipeline"):
        ImagePipeline.from_pretrained(tmp_path / "clips")
    with pytest.raises(ValueError, match="heroes32-llamagen draws images; load it with ImagePipeline"):
        VideoPipeline.from_pretrained("heroes32-llamagen")


SHIPPED = [model.name for model in registry.shipped_models() if model.pipeline == "VideoPipeline"]


@pytest.mark.parametrize("name", SHIPPED)
def test_shipped_model_draws_the_same_clips_alone_and_in_a_batch(name: str) -> None:
    pipe = VideoPipeline.from_pretrained(name)
    pipe.set_progress_bar_config(disable=True)
    prompt = "deep elf with a red cloak walking left"
    both = pipe(prompt, num_videos_per_prompt=2, seed=7, output_type="np").frames
    alone = pipe(prompt, seed=8, output_type="np").frames
    assert both.shape == (2, pipe.num_frames, 32, 32, 3)
    assert both[0].std() > 0.05  # a picture, not a flat colour
    assert np.abs(np.diff(both, axis=1)).max() > 0.2  # something moves
    # a near-tie may fall the other way in another batch shape; most pixels then still agree
    assert np.isclose(both[1], alone[0], atol=1e-3).mean() > 0.9


def test_the_command_writes_a_clip(pipe: VideoPipeline, tmp_path: Any) -> None:
    pipe.save_pretrained(tmp_path / "model")
    target = tmp_path / "clip.gif"
    arguments = [
        "generate-video",
        "-m",
        str(tmp_path / "model"),
        "-c",
        "1",
        "-c",
        "3",
        "--seed",
        "5",
        "-o",
        str(target),
    ]
    done = CliRunner().invoke(app, arguments)
    assert done.exit_code == 0, done.output
    with Image.open(target) as clip:
        assert clip.n_frames == 5
        assert clip.width > clip.height  # two clips side by side
    again = CliRunner().invoke(app, arguments)
    assert again.exit_code == 2
    assert "exists" in again.output

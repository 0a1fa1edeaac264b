"""Training of video tokenizers and NBP transformers: dictionaries, resuming, export."""

from __future__ import annotations

import json
import shutil

import numpy as np
import pytest
import torch
from safetensors.torch import load_file

from vargen.datasets.motion.dataset import MotionDataset
from vargen.evaluation.motion import evaluate_motion, write_motion_card
from vargen.metrics.networks.motion import MOTION_CLASSIFIER_FOLDER
from vargen.pipelines.video import VideoPipeline
from vargen.tokenizers.video_fsq.layers import StreamState
from vargen.tokenizers.video_fsq.model import VideoFSQTokenizer
from vargen.training.export import export_pipeline
from vargen.training.recipe import load_recipe
from vargen.training.run import train
from vargen.training.sources import load_tokenizer
from vargen.training.tasks.nbp import _PatchCodes
from vargen.training.tasks.video import find_patches, to_strips

SMALL = ["options.frames=5", "data.batch_size=2", "data.num_eval_images=2", "options.grid_size=1", "log.log_every=1"]
TOKENIZER = [
    *SMALL,
    "model.levels=[4, 4]",
    "model.base_channels=8",
    "model.num_res_blocks=1",
    "options.num_dictionary_clips=4",
    "options.num_kmeans_iterations=4",
    "schedule.num_steps=3",
]
BACKBONE = [
    *SMALL,
    "model.dim=24",
    "model.num_layers=1",
    "model.num_heads=2",
    "model.grid_size=[2, 8, 8]",
    "model.code_rank=8",
    "schedule.num_steps=2",
]


@pytest.fixture(scope="module")
def runs(tmp_path_factory):
    folder = tmp_path_factory.mktemp("runs")
    train("heroes-video-fsq", TOKENIZER, folder / "fsq")
    source = f"options.tokenizer={folder / 'fsq'}"
    result = train("heroes-video-nbp", [*BACKBONE, source], folder / "nbp")
    assert result.finished
    assert set(result.metrics) == {
        f"held_out_nats_per_token{name}" for name in ("", "_null", "_no_motion", "_first_frame")
    }
    return folder


def test_patches_cover_what_fits_and_average_the_rest():
    generator = torch.Generator().manual_seed(0)
    few = torch.randint(0, 256, (5, 12), dtype=torch.uint8, generator=generator)
    many = few[torch.randint(0, 5, (400,), generator=generator)]
    found = find_patches(many, 8, torch.Generator().manual_seed(1), 5)
    assert {tuple(row) for row in found.tolist()} == {tuple(row) for row in many.unique(dim=0).tolist()}
    noise = torch.randint(0, 256, (500, 12), dtype=torch.uint8, generator=generator)
    errors = []
    for codes in (4, 64):
        table = find_patches(noise, codes, torch.Generator().manual_seed(1), 8).float()
        errors.append(torch.cdist(noise.float(), table).amin(1).square().mean().item())
    assert errors[1] < 0.8 * errors[0]


def test_a_dictionary_that_goes_on_keeps_the_place_of_its_patches():
    torch.manual_seed(0)
    patches = torch.randint(0, 256, (40, 12), dtype=torch.uint8)
    table = patches[torch.randperm(40)[:30]]
    new = torch.randint(0, 256, (1, 12), dtype=torch.uint8)
    shown = torch.cat([table[:25].repeat_interleave(3, 0), new])  # five patches are seen no more, one is new
    found = find_patches(shown, 30, torch.Generator(), 2, start=table)
    assert torch.equal(found[:25], table[:25])
    assert (found[25:] == new).all(1).any()


def test_a_dictionary_starts_at_its_patches_and_reads_in_pieces(runs):
    recipe = load_recipe("heroes-video-fsq", TOKENIZER)
    tokenizer = load_tokenizer(runs / "fsq", VideoFSQTokenizer)
    clips = MotionDataset(3, frames=9).examples(np.arange(3))["clip"]
    codes = tokenizer.encode(clips).codes
    assert codes.shape == (3, 3, 8, 8)
    whole = tokenizer.decode(codes)
    torch.testing.assert_close(tokenizer.decode(codes, chunk=1), whole)
    assert torch.equal(tokenizer.encode(clips, chunk=1).codes, codes)
    torch.testing.assert_close(tokenizer.decode(codes[:, :2]), whole[:, :, :5])
    state = StreamState()
    pieces = [tokenizer.decode(codes[:, :1], state=state), tokenizer.decode(codes[:, 1:], state=state)]
    torch.testing.assert_close(torch.cat(pieces, 2), whole)
    assert torch.equal(tokenizer.quantize.codes(tokenizer.encode(clips).latents), codes)
    torch.manual_seed(0)
    fresh = VideoFSQTokenizer(**recipe.model)
    fresh.patch_table.copy_(tokenizer.patch_table)
    for value in fresh.decoder_layers[-1].parameters():
        torch.nn.init.zeros_(value)
    rows = fresh.patches[codes].permute(0, 4, 1, 2, 3)
    torch.testing.assert_close(fresh.decode(codes), fresh.unpatch(rows, None))
    with pytest.raises(ValueError, match="needs a single entry in channel_multipliers"):
        VideoFSQTokenizer(dictionary=True)


def test_known_patches_have_the_codes_of_the_tokenizer(runs):
    tokenizer = load_tokenizer(runs / "fsq", VideoFSQTokenizer)
    known = _PatchCodes(tokenizer)
    for start in (0, 4, 0):
        clips = MotionDataset(7, frames=9).examples(np.arange(start, start + 4))["clip"]
        assert torch.equal(known(clips), tokenizer.encode(clips).codes)
    assert torch.equal(known.keys, known.keys.unique())


def test_runs_resume_to_the_same_weights(runs, tmp_path):
    for name, overrides in (("fsq", TOKENIZER), ("nbp", [*BACKBONE, f"options.tokenizer={runs / 'fsq'}"])):
        recipe = {"fsq": "heroes-video-fsq", "nbp": "heroes-video-nbp"}[name]
        steps = 3 if name == "fsq" else 2
        train(recipe, [*overrides, "schedule.num_steps=1", "schedule.decay_steps=0"], tmp_path / name)
        train(
            recipe, [*overrides, f"schedule.num_steps={steps}", "schedule.decay_steps=0"], tmp_path / name, resume=True
        )
        train(
            recipe, [*overrides, f"schedule.num_steps={steps}", "schedule.decay_steps=0"], tmp_path / f"{name}-whole"
        )
        ends = [sorted((tmp_path / n / "checkpoints").glob("step-*"))[-1] for n in (name, f"{name}-whole")]
        a, b = (load_file(end / "model.safetensors") for end in ends)
        assert a.keys() == b.keys()
        assert all(torch.equal(a[key], b[key]) for key in a)


def test_a_run_exports_to_a_pipeline_that_reads_prompts(runs, tmp_path):
    folder = export_pipeline(runs / "nbp", tmp_path / "pipe", guidance_scale=1.5)
    record = json.loads((folder / "training.json").read_text())
    assert record["backbone"]["recipe"]["task"] == "nbp"
    assert record["tokenizer"]["recipe"]["task"] == "video-fsq"
    assert str(tmp_path) not in (folder / "backbone" / "config.json").read_text()
    pipe = VideoPipeline.from_pretrained(folder)
    assert pipe.sampler.guidance_scale == 1.5
    first, again = (pipe("orc with a red cloak jumping", seed=3, output_type="pt") for _ in range(2))
    assert first.frames.shape == (1, 5, 3, 32, 32)
    assert torch.equal(first.codes, again.codes)
    with pytest.raises(ValueError, match="two motions"):
        pipe("orc jumping and fading away")
    with pytest.raises(ValueError, match="have no drafter"):
        export_pipeline(runs / "nbp", tmp_path / "other", drafter=runs / "nbp")


def test_the_shipped_model_does_what_its_card_says(tmp_path):
    folder = MOTION_CLASSIFIER_FOLDER.parent / "heroes-video-nbp"
    report = evaluate_motion("heroes-video-nbp", 8, network=None)
    stored = json.loads((folder / "motion.json").read_text())
    assert stored["motion"]["motion_share"] >= 0.8
    assert stored["reconstruction"]["psnr"] >= 29
    assert report["motion"]["motion"] >= 0.75  # of eight clips
    assert abs(report["reconstruction"]["psnr"] - stored["reconstruction"]["psnr"]) < 4
    assert report["likelihood"]["nats_per_token"] < report["likelihood"]["nats_per_token_without_prompt"]
    assert report["decode"]["forwards"] == 47
    assert sum(file.stat().st_size for file in folder.rglob("*") if file.is_file()) <= 6_000_000
    copy = shutil.copytree(folder, tmp_path / "heroes-video-nbp")
    assert f"{report['reconstruction']['psnr']:.2f} dB" in write_motion_card(copy, report).read_text()
    with pytest.raises(ValueError, match="num_clips must be at least 2"):
        evaluate_motion("heroes-video-nbp", 1)


def test_recipes_say_what_they_cannot_use(tmp_path):
    with pytest.raises(
        ValueError, match=r"data\.name must be a set of clips for task 'video-fsq', got 'heroes' \(images\)"
    ):
        train("heroes-video-fsq", [*TOKENIZER, "data.name=heroes"], tmp_path / "a")
    with pytest.raises(ValueError, match=r"options\.frames must be one of"):
        train("heroes-video-fsq", [*TOKENIZER, "options.frames=7"], tmp_path / "b")


def test_strips_show_the_first_and_every_second_frame():
    clips = torch.linspace(-1, 1, 17).view(1, 1, 17, 1, 1).expand(2, 3, 17, 4, 4)
    strip = to_strips(clips, scale=1)
    assert strip.shape == (3, 2 * 6 - 2, 9 * 6 - 2)
    assert strip[0, 0, ::6].tolist() == [
        round((clips[0, 0, t, 0, 0].item() + 1) * 127.5) for t in (0, *range(1, 17, 2))
    ]


def test_the_classifier_folder_is_small():
    assert sum(file.stat().st_size for file in MOTION_CLASSIFIER_FOLDER.iterdir()) < 300_000

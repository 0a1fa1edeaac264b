"""Moving heroes: the law of the clips, their words, and the classifier that reads them."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from vargen.conditioners.attributes import AttributeConditioner
from vargen.datasets.heroes.atlas import HeroAtlas
from vargen.datasets.heroes.compose import compose
from vargen.datasets.motion import compose as motion
from vargen.datasets.motion.compose import (
    MOTIONS,
    PARTS,
    MotionDataset,
    caption,
    compose_clips,
    motion_id,
    parse_prompt,
    sample_clips,
)
from vargen.metrics.networks.motion import MotionClassifier, measure_motion, train_motion_classifier


def labels_of(name: str, base: str = "orc") -> np.ndarray:
    labels = np.zeros(len(HeroAtlas.load().slots) + 1, dtype=np.int64)
    labels[HeroAtlas.load().slots.index("base")] = HeroAtlas.load().id(base)
    labels[-1] = motion_id(name)
    return labels


def test_a_clip_is_a_function_of_its_seed():
    batch = sample_clips(np.array([3, 9, 2**63 + 1], dtype=np.uint64))
    alone = sample_clips([9])
    assert batch.clips.shape == (3, 17, 32, 32, 3)
    assert batch.clips.dtype == np.uint8
    np.testing.assert_array_equal(batch.clips[1], alone.clips[0])
    np.testing.assert_array_equal(batch.attributes[1], alone.attributes[0])
    assert not np.array_equal(batch.clips[0], batch.clips[2])


@pytest.mark.parametrize("frames", [1, 5, 9])
def test_short_clips_begin_as_long_ones(frames):
    np.testing.assert_array_equal(sample_clips(range(16), frames).clips, sample_clips(range(16)).clips[:, :frames])


def test_clips_hold_the_curated_parts_and_every_motion():
    attributes = sample_clips(range(400), 1).attributes
    assert (attributes > 0).all()
    atlas = HeroAtlas.load()
    for slot, column in zip(atlas.slots, attributes.T, strict=False):
        allowed = {atlas.none_id(slot), *(atlas.id(name) for name in PARTS.get(slot, ()))}
        assert set(column.tolist()) <= allowed
    assert sum(map(len, PARTS.values())) <= 60
    counts = np.bincount(attributes[:, -1] - atlas.num_attributes, minlength=len(MOTIONS))
    assert counts.min() > 30  # 400 / 7 = 57, standard deviation 7
    assert set(attributes[:, -1].tolist()) == {motion_id(name) for name in MOTIONS}


def test_motions_move_as_their_names_say():
    still = compose(labels_of("standing still")[:-1])
    background = still[0, 0]
    clips = {name: compose_clips(labels_of(name)) for name in MOTIONS}
    np.testing.assert_array_equal(clips["standing still"], np.broadcast_to(still, (17, 32, 32, 3)))
    np.testing.assert_array_equal(clips["walking left"][9, :, :-1], still[:, 1:])
    np.testing.assert_array_equal(clips["walking right"][9, :, 1:], still[:, :-1])
    np.testing.assert_array_equal(clips["jumping"][4, :-6], still[6:])
    np.testing.assert_array_equal(clips["rising from the ground"][16], still)
    np.testing.assert_array_equal(clips["rising from the ground"][0, 16:], still[:16])
    np.testing.assert_array_equal(clips["shivering"][1, :, 2:], still[:, :-2])
    assert (clips["fading away"][16] == background).all()
    half = (still.astype(float) + background) / 2
    assert np.abs(clips["fading away"][8] - half).max() <= 0.5


def test_motion_zero_stands_still_and_wrong_ids_are_named():
    labels = labels_of("jumping")
    labels[-1] = 0
    np.testing.assert_array_equal(compose_clips(labels)[3], compose(labels[:-1]))
    labels[-1] = 5
    with pytest.raises(ValueError, match="motion id must be 0 or in"):
        compose_clips(labels)
    with pytest.raises(ValueError, match="must be"):
        compose_clips(labels[:-1])
    with pytest.raises(ValueError, match="frames must be one of 1, 5, 9, 13, 17, got 8"):
        sample_clips([0], 8)


@pytest.mark.parametrize(
    ("text", "name"),
    [
        ("deep elf with a red cloak jumping", "jumping"),
        ("a minotaur walks to the left", "walking left"),
        ("orc, walking right", "walking right"),
        ("a mummy that rises from the ground", "rising from the ground"),
        ("troll fades away", "fading away"),
        ("Human vanishes", "fading away"),
        ("a shaking orc with a great sword", "shivering"),
        ("merfolk stands still", "standing still"),
        ("orc running left", "walking left"),
    ],
)
def test_motions_are_read_from_free_text(text, name):
    ids = parse_prompt(text)
    assert ids[-1] == motion_id(name)
    assert ids[HeroAtlas.load().slots.index("base")] > 0


def test_unspecified_motion_is_left_to_the_model():
    assert parse_prompt("orc with a round shield")[-1] == 0
    assert parse_prompt("jumping")[:-1].sum() == 0
    assert parse_prompt("a hero jumping")[-1] == motion_id("jumping")


def test_captions_read_back():
    for labels in sample_clips(range(60), 1).attributes:
        read = parse_prompt(caption(labels))
        named = read > 0
        np.testing.assert_array_equal(read[named], labels[named])
        assert read[-1] == labels[-1]


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("", "the prompt is empty"),
        ("orc jumping and walking left", "two motions: 'jumping' and 'walking left'"),
        ("vampire jumping", "moving heroes do not have 'vampire'.*'human', 'deep elf'"),
        ("orc with gauntlets jumping", "moving heroes do not have"),
        ("orc jumpin", "unknown word"),
    ],
)
def test_bad_prompts_are_one_clear_line(text, message):
    with pytest.raises(ValueError, match=message) as error:
        parse_prompt(text)
    assert "\n" not in str(error.value)


def test_the_conditioner_reads_motions():
    condition = AttributeConditioner("motion")(["orc jumping", "a troll"])
    assert condition.shape == (2, len(HeroAtlas.load().slots) + 1)
    assert condition[:, -1].tolist() == [motion_id("jumping"), 0]
    assert int(condition.max()) < motion.num_attributes()


def test_what_a_prompt_leaves_open_is_filled_by_the_seed():
    filler = AttributeConditioner("motion", fill=True)
    asked = filler(["orc jumping"]).repeat(3, 1)
    filled = filler.complete(asked, [4, 5, 2**64 - 1])
    assert (filled > 0).all()
    assert torch.equal(filled[asked > 0], asked[asked > 0])
    assert not torch.equal(filled[0], filled[1])
    assert torch.equal(filler.complete(asked[:1], [5])[0], filled[1])
    assert torch.equal(AttributeConditioner("motion").complete(asked, [4, 5, 6]), asked)
    with pytest.raises(ValueError, match="fill=True needs a vocabulary"):
        AttributeConditioner(type("Words", (), {"parse_prompt": staticmethod(parse_prompt)})(), fill=True)


def test_the_stream_is_a_function_of_its_index():
    stream = MotionDataset(5, frames=5, attribute_dropout=0.5, null_dropout=0.1)
    whole, part = stream.examples(np.arange(200)), stream.examples(np.arange(40, 44))
    for key in whole:
        torch.testing.assert_close(whole[key][40:44], part[key], rtol=0, atol=0)
    assert whole["clip"].shape == (200, 3, 5, 32, 32)
    assert 0.05 < (whole["attributes"] == 0).all(1).float().mean() < 0.2
    kept = whole["attributes"] > 0
    assert torch.equal(whole["attributes"][kept], whole["labels"][kept])
    test = MotionDataset(5, frames=5, split="test").examples(np.arange(200))
    assert not set(test["seed"].tolist()) & set(whole["seed"].tolist())
    with pytest.raises(ValueError, match="no held-out pairs"):
        MotionDataset(5, split="test", held_out=True)


def test_the_shipped_classifier_names_motions_and_notices_wrong_ones():
    batch = MotionDataset(11, split="test").examples(np.arange(84))
    clips = ((batch["clip"] + 1) * 127.5).round().to(torch.uint8)
    result = measure_motion(clips, batch["labels"], clips)
    assert result.motion > 0.97
    assert result.motion_share == 1
    assert result.parts > 0.9
    assert result.motion_shuffled < 0.4  # a seventh, and neighbours that agree by chance
    assert result.parts_shuffled < 0.6
    still = clips[:, :, :1].expand_as(clips)
    assert measure_motion(still, batch["labels"], clips).motion < 0.5
    with pytest.raises(ValueError, match="must belong together"):
        measure_motion(clips[:3], batch["labels"], clips)
    with pytest.raises(ValueError, match="whole clips of 17 frames, got 9"):
        measure_motion(clips[:, :, :9], batch["labels"], clips[:, :, :9])
    with pytest.raises(ValueError, match="reads \\[B, 3, T, 32, 32\\]"):
        MotionClassifier().predict(clips[:, :, 0])


def test_a_classifier_learns_and_saves(tmp_path):
    losses = []
    model = train_motion_classifier(num_steps=6, batch_size=8, on_step=lambda _, loss: losses.append(loss))
    assert len(losses) == 6
    further = []
    start = model.state_dict()
    train_motion_classifier(num_steps=1, batch_size=8, start=start, on_step=lambda _, loss: further.append(loss))
    assert further[0] != losses[0]  # the same first batch under other weights
    model.save_pretrained(tmp_path)
    clips = torch.rand(2, 3, 17, 32, 32)
    again = MotionClassifier.from_pretrained(tmp_path)
    torch.testing.assert_close(again(clips), model(clips), atol=0.05, rtol=0.05)  # stored in half precision
    with pytest.raises(ValueError, match="no motion classifier in"):
        MotionClassifier.from_pretrained(tmp_path / "nowhere")

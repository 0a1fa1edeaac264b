"""The hero classifier and the attribute accuracy that is measured with it."""

import numpy as np
import pytest
import torch
from safetensors.torch import load_file

from vargen.datasets.heroes.compose import HeroAtlas, HeroesDataset, compose
from vargen.metrics.attribute_accuracy import AttributeAccuracy, accuracy_on_real_heroes
from vargen.metrics.heroes import draw_heroes
from vargen.metrics.networks.attributes import (
    CLASSIFIER_FOLDER,
    AttributeClassifier,
    _augment,
    pictures_digest,
    slot_loss,
    train_classifier,
)


@pytest.fixture(scope="module")
def shipped():
    return AttributeClassifier.from_pretrained()


@pytest.fixture(scope="module")
def real():
    return draw_heroes(400, "floor")


def test_shipped_classifier_is_small_half_precision_and_of_the_current_pictures(shipped):
    file = CLASSIFIER_FOLDER / "model.safetensors"
    assert file.stat().st_size <= 1_000_000
    assert {t.dtype for t in load_file(file).values() if t.is_floating_point()} == {torch.float16}
    assert shipped.slot_ids == [list(HeroAtlas.load().slot_ids(s)) for s in HeroAtlas.load().slots]


def test_shipped_classifier_reads_real_heroes_as_well_as_its_record_says(shipped):
    measured = accuracy_on_real_heroes(shipped, 1000)
    assert measured["all"] > 0.95
    assert measured["empty"] > 0.95
    assert measured["all"] == pytest.approx(shipped.real_accuracy["all"], abs=0.01)
    assert set(measured) == set(shipped.real_accuracy) == {"all", "empty", *HeroAtlas.load().slots}
    assert min(measured.values()) > 0.85


def test_shipped_classifier_bears_the_noise_of_a_reconstruction(shipped, real):
    noise = 10 * torch.randn(real.images.shape, generator=torch.Generator().manual_seed(0))  # about 28 dB
    noisy = (real.images + noise).clamp(0, 255).to(torch.uint8)
    hits = (shipped.predict(noisy) == real.attributes)[real.visible].double().mean()
    assert hits > 0.85


def test_uint8_and_float_images_are_read_alike_in_any_batch(shipped, real):
    ids = shipped.predict(real.images[:20])
    assert torch.equal(ids, shipped.predict(real.images[:20] / 255))
    assert torch.equal(ids, shipped.predict(real.images[:20], batch_size=7))
    assert ids.dtype == torch.int64
    HeroAtlas.load().check(ids.numpy())  # every id belongs to its slot
    with pytest.raises(ValueError, match=r"reads \[B, 3, 32, 32\] images"):
        shipped.predict(torch.zeros(1, 3, 64, 64))


def test_real_heroes_share_one_and_wrong_captions_share_the_control(shipped, real):
    metric = AttributeAccuracy(shipped)
    for rows in torch.arange(400).split(150):
        metric.update(real.images[rows], real.attributes[rows], real.visible[rows])
    right = metric.result()
    assert right.share == 1
    assert right.accuracy == right.real_accuracy
    assert right.num_slots == int(real.visible.sum())
    assert right.shuffled_accuracy < 0.2
    wrong = AttributeAccuracy(shipped)
    wrong.update(real.images.roll(1, 0), real.attributes, real.visible)  # every hero drawn for another's caption
    result = wrong.result()
    assert result.real_accuracy == right.real_accuracy
    assert result.accuracy < 0.2
    assert float(wrong.compute()) == result.share == result.accuracy / result.real_accuracy


def test_accuracy_counts_exactly_the_parts_that_were_changed(shipped, real):
    slot = HeroAtlas.load().slots.index("hand1")
    ids = list(HeroAtlas.load().slot_ids("hand1"))
    drawn = real.attributes.clone()
    drawn[:, slot] = ids[0]  # everybody unarmed
    images = torch.from_numpy(compose(drawn.numpy())).permute(0, 3, 1, 2)
    metric = AttributeAccuracy(shipped)
    metric.update(images, real.attributes, real.visible)
    result = metric.result()
    assert result.per_slot["hand1"]["share"] < 0.05
    assert result.per_slot["hand1"]["count"] == int(real.visible[:, slot].sum())
    assert result.per_slot["base"]["share"] > 0.95
    counts = {name: row["count"] for name, row in result.per_slot.items()}
    weighted = sum(row["accuracy"] * counts[name] for name, row in result.per_slot.items())
    assert weighted / result.num_slots == pytest.approx(result.accuracy)


def test_hidden_parts_are_not_counted(shipped, real):
    metric = AttributeAccuracy(shipped)
    spoiled = torch.where(real.visible, real.attributes, torch.tensor([i[-1] for i in shipped.slot_ids]))
    metric.update(real.images, spoiled, real.visible)
    first = metric.result()
    assert first.num_slots == int(real.visible.sum())
    empty = AttributeAccuracy(shipped)
    empty.update(real.images[:3], real.attributes[:3], torch.zeros_like(real.visible[:3]))
    with pytest.raises(ValueError, match="at least one visible part"):
        empty.compute()


def test_bad_shapes_and_no_images_are_one_line(shipped, real):
    metric = AttributeAccuracy(shipped)
    with pytest.raises(ValueError, match="attributes and visible must be"):
        metric.update(real.images[:3], real.attributes[:2], real.visible[:3])
    with pytest.raises(ValueError, match="needs at least one image"):
        AttributeAccuracy(shipped).result()


def test_loss_ignores_hidden_parts_and_reads_empty_slots():
    slot_ids = [[1, 2, 3], [4, 5]]
    attributes = torch.tensor([[2, 4], [3, 5]])
    visible = torch.tensor([[True, False], [False, True]])  # hero 1: slot 0 hidden; hero 0: slot 1 empty
    scores = [torch.randn(2, 3), torch.randn(2, 2)]
    expected = -(scores[0].log_softmax(1)[0, 1] + scores[1].log_softmax(1)[0, 0] + scores[1].log_softmax(1)[1, 1]) / 3
    torch.testing.assert_close(slot_loss(scores, attributes, visible, slot_ids), expected)


def test_augmentation_is_light_and_leaves_half_alone():
    torch.manual_seed(0)
    images = torch.rand(400, 3, 32, 32)
    changed = _augment(images)
    assert changed.min() >= 0
    assert changed.max() <= 1
    error = (changed - images).square().mean((1, 2, 3))
    untouched = (error == 0).double().mean()
    assert 0.4 < untouched < 0.6
    assert 10 * torch.log10(1 / error[error > 0]).median() > 15


def test_training_learns_is_reproducible_and_leaves_the_global_generator_alone():
    losses = []
    trained = train_classifier(num_steps=30, batch_size=48, on_step=lambda _step, loss: losses.append(loss))
    assert np.mean(losses[-3:]) < 0.8 * np.mean(losses[:3])
    further = []
    start = trained.state_dict()
    train_classifier(num_steps=1, batch_size=48, start=start, on_step=lambda _step, loss: further.append(loss))
    assert further[0] < 0.8 * losses[0]  # the same first batch
    torch.manual_seed(5)
    before = torch.get_rng_state()
    first, second, third = (train_classifier(num_steps=3, batch_size=16, seed=seed) for seed in (0, 0, 1))
    assert torch.equal(before, torch.get_rng_state())
    assert all(torch.equal(a, b) for a, b in zip(first.parameters(), second.parameters(), strict=True))
    assert not all(torch.equal(a, b) for a, b in zip(first.parameters(), third.parameters(), strict=True))
    assert not first.training
    with pytest.raises(ValueError, match="num_steps must be >= 1"):
        train_classifier(num_steps=0)


def test_classifier_survives_the_disk_and_refuses_other_pictures(tmp_path, monkeypatch):
    model = AttributeClassifier.for_heroes().eval()
    model.real_accuracy = {"all": 0.5}
    model.save_pretrained(tmp_path / "c")
    loaded = AttributeClassifier.from_pretrained(tmp_path / "c")
    images = next(iter(HeroesDataset(batch_size=4)))["image"] / 2 + 0.5
    for ours, theirs in zip(model(images), loaded(images), strict=True):
        torch.testing.assert_close(ours, theirs, rtol=0.02, atol=0.02)  # half-precision weights
    assert loaded.real_accuracy == {"all": 0.5}
    with pytest.raises(ValueError, match="vargen eval classifier --out"):
        AttributeClassifier.from_pretrained(tmp_path / "absent")
    monkeypatch.setattr("vargen.metrics.networks.attributes.pictures_digest", lambda: "0" * 16)
    with pytest.raises(ValueError, match="trained on other pictures"):
        AttributeClassifier.from_pretrained(tmp_path / "c")


def test_digest_of_the_pictures_is_stable():
    assert pictures_digest() == pictures_digest()
    assert len(pictures_digest()) == 16

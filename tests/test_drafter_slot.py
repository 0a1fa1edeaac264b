"""One slot for drafters, others by name: loaded, saved, chosen for a call, and compared with the backbone they stand on."""

from __future__ import annotations

import json
import shutil
import warnings
from pathlib import Path

import pytest
import torch

import vargen
from tests.tiny import tiny_backbone, tiny_tokenizer
from vargen import DraftModelSampler, ImagePipeline, LanternSampler, NextTokenSampler
from vargen.pipelines.drafters import record_target, weights_digest

ASK = {"class_labels": [1], "seed": 3, "output_type": "codes"}


def small() -> torch.nn.Module:
    return tiny_backbone().eval()


@pytest.fixture
def pipe() -> ImagePipeline:
    made = ImagePipeline(tiny_tokenizer(), tiny_backbone(), DraftModelSampler(), drafter=small())
    made.set_progress_bar_config(disable=True)
    return made


def test_drafters_are_saved_and_read_by_name(pipe: ImagePipeline, tmp_path: Path) -> None:
    pipe.eagle = small()
    pipe.save_pretrained(tmp_path)
    assert (tmp_path / "drafters" / "eagle" / "config.json").is_file()
    assert "eagle" not in json.loads((tmp_path / "model_index.json").read_text())
    again = ImagePipeline.from_pretrained(tmp_path)
    assert again.drafters == ["eagle"]
    before = again.drafter
    again.load_drafter("eagle")
    assert again.drafter is again.eagle
    assert again.drafter is not before
    again.save_pretrained(tmp_path / "more")  # one that was read is written, too
    assert ImagePipeline.from_pretrained(tmp_path / "more").drafters == ["eagle"]


def test_folders_with_a_slot_for_each_kind_still_load(pipe: ImagePipeline, tmp_path: Path) -> None:
    pipe.eagle = small()
    pipe.save_pretrained(tmp_path)
    shutil.move(tmp_path / "drafters" / "eagle", tmp_path / "eagle")
    index = json.loads((tmp_path / "model_index.json").read_text())
    index["eagle"] = ["vargen", "LlamaGenTransformer"]
    (tmp_path / "model_index.json").write_text(json.dumps(index))
    again = ImagePipeline.from_pretrained(tmp_path)
    assert again.drafters == ["eagle"]
    assert type(again.eagle).__name__ == "LlamaGenTransformer"
    assert ImagePipeline.from_pretrained(tmp_path, eagle=None).drafters == []


def test_a_call_may_name_its_drafter(pipe: ImagePipeline) -> None:
    slot, pipe.drafter = pipe.drafter, None
    pipe.eagle = slot
    exact = pipe(**ASK, drafter="eagle")
    assert exact.stats.num_drafter_forwards > 0
    assert torch.equal(exact.codes, pipe(**ASK, drafter=slot).codes)
    with pytest.raises(ValueError, match=r"needs drafter="):
        pipe(**ASK)
    with pytest.raises(
        ValueError, match=r"drafter must be one of eagle, row-above, token-recycling, ngram, got 'eagel'"
    ):
        pipe(**ASK, drafter="eagel")


def test_a_drafter_of_another_target_warns_once(pipe: ImagePipeline, tmp_path: Path) -> None:
    pipe.eagle = small()
    pipe.save_pretrained(tmp_path)
    record_target(tmp_path / "drafters" / "eagle", weights_digest(pipe.backbone))
    own, other = ImagePipeline.from_pretrained(tmp_path), ImagePipeline.from_pretrained(tmp_path)
    for loaded in (own, other):
        loaded.set_progress_bar_config(disable=True)
    with torch.no_grad():
        next(other.backbone.parameters()).mul_(1.5)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        own(**ASK, drafter="eagle")
    with pytest.warns(UserWarning, match="trained for another LlamaGenTransformer"):
        codes = other(**ASK, drafter="eagle").codes
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        other(**ASK, drafter="eagle")
    other.sampler = NextTokenSampler()
    assert torch.equal(other(**ASK).codes, codes)  # exact all the same


def test_digests_do_not_depend_on_precision() -> None:
    model = tiny_backbone().half().float()  # as stored
    assert weights_digest(model) == weights_digest(model.half()) == weights_digest(model.to(torch.bfloat16))
    other = tiny_backbone().half().float()
    with torch.no_grad():
        next(other.parameters()).add_(0.1)
    assert weights_digest(other) != weights_digest(model.float())


def test_the_shipped_drafter_knows_its_target() -> None:
    pipe = vargen.ImagePipeline.from_pretrained("heroes32-llamagen")
    pipe.set_progress_bar_config(disable=True)
    assert pipe.drafters == ["eagle"]
    assert pipe.eagle.target_digest == weights_digest(pipe.backbone)
    assert LanternSampler.preferred_drafter == "eagle"

"""Pipelines that share a component with the folder beside them."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch

from tests.test_continuous_pipeline import autoencoder, causal, pipeline
from vargen.pipelines.image import ImagePipeline
from vargen.samplers.window.continuous_speculative import ContinuousSpeculativeSampler
from vargen.training.export import halve_weights, share_component


@pytest.fixture
def folders(tmp_path: Path) -> tuple[Path, Path]:
    whole = tmp_path / "whole"
    pipeline(causal(), ContinuousSpeculativeSampler(num_draft_tokens=0)).save_pretrained(whole)
    halve_weights(whole / "tokenizer" / "diffusion_pytorch_model.safetensors")
    shutil.copytree(whole, tmp_path / "lean")
    share_component(tmp_path / "lean", "tokenizer", "whole")
    return whole, tmp_path / "lean"


def edit_index(folder: Path, **entries: Any) -> None:
    file = folder / "model_index.json"
    file.write_text(json.dumps({**json.loads(file.read_text()), **entries}))


def test_loads_and_saves_whole(folders: tuple[Path, Path], tmp_path: Path) -> None:
    whole, lean = folders
    assert not (lean / "tokenizer").exists()
    pipe = ImagePipeline.from_pretrained(lean)
    other = ImagePipeline.from_pretrained(whole)
    assert pipe.tokenizer.dtype == torch.float32  # as the folder's own components, whatever the file holds
    assert all(
        torch.equal(a, b) for a, b in zip(pipe.tokenizer.parameters(), other.tokenizer.parameters(), strict=True)
    )
    assert ImagePipeline.from_pretrained(lean, dtype=torch.bfloat16).tokenizer.dtype == torch.bfloat16
    own = autoencoder()
    assert ImagePipeline.from_pretrained(lean, tokenizer=own).tokenizer is own
    pipe.save_pretrained(tmp_path / "elsewhere" / "saved")  # alone there, so it must be complete
    index = json.loads((tmp_path / "elsewhere" / "saved" / "model_index.json").read_text())
    assert "_shared" not in index
    ImagePipeline.from_pretrained(tmp_path / "elsewhere" / "saved")


def test_refusals(folders: tuple[Path, Path], tmp_path: Path) -> None:
    _, lean = folders
    for wrong in ("../whole", "..", "", str(lean)):
        edit_index(lean, _shared={"tokenizer": wrong})
        with pytest.raises(ValueError, match="not the name of a folder beside it"):
            ImagePipeline.from_pretrained(lean)
    edit_index(lean, _shared={"tokenizer": "whole"})
    shutil.move(lean, tmp_path / "away" / "lean")
    with pytest.raises(ValueError, match="takes its tokenizer from the folder whole beside it; copy that folder too"):
        ImagePipeline.from_pretrained(tmp_path / "away" / "lean")

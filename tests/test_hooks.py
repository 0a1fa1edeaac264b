"""Hooks that accelerate, diffusers and peft put around forward passes fire, whatever method a model is entered by."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

import vargen

ASSETS = Path(vargen.__file__).parent / "assets" / "models"
SHIPPED = sorted(path.parent.name for path in ASSETS.glob("*/model_index.json"))


def pipeline_of(name: str, **options):
    kind = vargen.VideoPipeline if "video" in name else vargen.ImagePipeline
    pipe = kind.from_pretrained(name, **options)
    pipe.set_progress_bar_config(disable=True)
    return pipe


@pytest.mark.parametrize(("name", "word"), [(name, "torch_dtype") for name in SHIPPED] + [(SHIPPED[0], "dtype")])
def test_habit_float16_is_loaded_and_refused_on_the_cpu_by_the_call(name: str, word: str) -> None:
    pipe = pipeline_of(name, **{word: torch.float16})
    assert pipe.backbone.dtype == torch.float16
    with pytest.raises(ValueError, match=r"float16 weights on the CPU.*bfloat16"):
        pipe("minotaur", seed=0)
    pipe.to(torch.float32)
    assert pipe.backbone.dtype == torch.float32

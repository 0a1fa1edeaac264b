"""Hooks that accelerate, diffusers and peft put around forward passes fire, whatever method a model is entered by."""

from __future__ import annotations

import math
from functools import partial
from pathlib import Path
from types import SimpleNamespace

import accelerate
import pytest
import torch
from accelerate.hooks import ModelHook, add_hook_to_module
from diffusers import AutoencoderKL
from diffusers.hooks import apply_group_offloading, apply_layerwise_casting
from diffusers.hooks.group_offloading import ModuleGroup

import vargen
from tests.test_leaves import CASES

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


def nothing(data: torch.Tensor) -> torch.Tensor:
    """What stands in the place of weights that are elsewhere."""
    return torch.full_like(data, math.nan) if data.is_floating_point() else torch.zeros_like(data)


class Parked(ModelHook):
    """As accelerate's offloading of whole models, with nothing at all in place of the weights while a model does not run."""

    def init_hook(self, module):
        self.weights = {weight: weight.data for weight in (*module.parameters(), *module.buffers())}
        self.runs = 0
        self.park()
        return module

    def park(self):
        for weight, data in self.weights.items():
            weight.data = nothing(data)

    def pre_forward(self, module, *args, **kwargs):
        self.runs += 1
        for weight, data in self.weights.items():
            weight.data = data
        return args, kwargs


def offload_models(pipe, monkeypatch) -> None:
    """Each model comes when it is entered, and the one before it goes."""
    hooks = {}

    class Turn(Parked):
        def pre_forward(self, module, *args, **kwargs):
            for other in hooks.values():
                if other is not self and not {other, self} <= pair:
                    other.park()
            return super().pre_forward(module, *args, **kwargs)

    for name, module in modules_of(pipe).items():
        hooks[name] = Turn()
        add_hook_to_module(module, hooks[name])
    pair = {hooks[name] for name in hooks if name not in pipe.model_cpu_offload_seq or name == "backbone"}
    pipe.hooks = hooks


def offload_leaves(pipe, monkeypatch) -> None:
    """accelerate's sequential offloading: weights and buffers are on "meta" but for the pass of their own module."""
    for module in modules_of(pipe).values():
        accelerate.cpu_offload(module, torch.device("cpu"), offload_buffers=True)


def offload_groups(pipe, monkeypatch, **options) -> None:
    """diffusers' group offloading, with NaN left behind where weights have gone."""
    weights = {}

    def tensors(group):
        parts = [part for module in group.modules for part in (*module.parameters(), *module.buffers())]
        return [*parts, *group.parameters, *group.buffers]

    def leave(group):
        for tensor in tensors(group):
            weights.setdefault(tensor, tensor.data)
            tensor.data = nothing(tensor.data)

    def come(group):
        for tensor in tensors(group):
            tensor.data = weights[tensor]

    monkeypatch.setattr(ModuleGroup, "_offload_to_memory", leave)
    monkeypatch.setattr(ModuleGroup, "_onload_from_memory", come)
    for module in modules_of(pipe).values():
        kind = LEAVES if isinstance(module, AutoencoderKL) else options  # diffusers' own goes by leaves only
        apply_group_offloading(module, torch.device("cpu"), **kind)


LEAVES = {"offload_type": "leaf_level"}
BLOCKS = {"offload_type": "block_level", "num_blocks_per_group": 2}
OFFLOADS = {
    "models": offload_models,
    "sequential": offload_leaves,
    "groups-leaf": partial(offload_groups, **LEAVES),
    "groups-block": partial(offload_groups, **BLOCKS),
}


def modules_of(pipe) -> dict[str, torch.nn.Module]:
    return {name: module for name, module in pipe.components.items() if isinstance(module, torch.nn.Module)}


def draw(pipe, forwards: int = 4):
    """The first few passes, decoded: -1 stays grey."""

    def stop(pipe, step, num_forwards, tensors):
        pipe._interrupt = step + 1 >= forwards

    prompt = "minotaur walking left" if "Video" in type(pipe).__name__ else "minotaur"
    out = pipe(prompt, seed=3, output_type="pt", callback_on_step_end=stop, guidance_scale=1.5)
    return out.frames if hasattr(out, "frames") else out.images


@pytest.mark.parametrize("offload", OFFLOADS)
@pytest.mark.parametrize("name", SHIPPED)
def test_habit_offloaded_models_draw_the_same_picture(name: str, offload: str, monkeypatch) -> None:
    forwards = 12 if "var" in name else 4
    pipe = pipeline_of(name)
    expected = draw(pipe, forwards)
    OFFLOADS[offload](pipe, monkeypatch)
    assert pipe.backbone.device == torch.device("cpu")
    assert torch.equal(draw(pipe, forwards), expected)


@pytest.mark.parametrize("offload", OFFLOADS)
@pytest.mark.parametrize("name", CASES)
def test_an_offloaded_model_of_every_family_draws_the_same(name: str, offload: str, monkeypatch) -> None:
    family = CASES[name]
    model = family.build()
    with torch.no_grad():
        expected = family.run(model)
        alone = SimpleNamespace(components={"backbone": model}, model_cpu_offload_seq="backbone")
        OFFLOADS[offload](alone, monkeypatch)
        assert torch.equal(family.run(model), expected)


@pytest.mark.parametrize("name", SHIPPED)
def test_habit_float8_weights_by_layerwise_casting_draw_a_picture(name: str) -> None:
    pipe = pipeline_of(name)
    for module in modules_of(pipe).values():
        apply_layerwise_casting(module, torch.float8_e4m3fn, torch.float32, skip_modules_pattern=("norm",))
    stored = [weight for weight in pipe.backbone.parameters() if weight.dtype == torch.float8_e4m3fn]
    assert stored
    assert pipe.backbone.dtype == torch.float32
    picture = draw(pipe)
    assert bool(picture.isfinite().all())
    assert len(picture.unique()) > 2

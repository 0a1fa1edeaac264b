"""Every constructor of every family meets every kind of wrong argument: it builds, or says in one line what is wrong."""

from __future__ import annotations

import inspect
import json
import math
from collections.abc import Iterator
from functools import cache, partial
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

import vargen
from tests.test_errors import one_line
from tests.wrong import WRONG
from vargen.tokenizers.vq.quantizers import USAGE_WINDOW
from vargen.validation.checks import (
    Settings,
    anything,
    check_choice,
    check_integer,
    check_names,
    check_number,
    check_scales,
    check_seeds,
    checked,
    shown,
)

CONDITIONS = {"num_classes": 3, "num_attributes": 5, "num_condition_tokens": 2}
CODES = {"dim": 8, "num_layers": 1, "num_heads": 2, "codebook_size": 8, "grid_size": (2, 2)}
LLAMAGEN = {**CODES, **CONDITIONS, "caption_dim": 8, "multiple_of": 8}
TOKENS = {**CONDITIONS, "grid_size": (2, 2), "latent_channels": 2, "head_depth": 1, "head_width": 8}
MAR = {"encoder_dim": 8, "encoder_depth": 1, "encoder_num_heads": 2, "decoder_dim": 8, "decoder_depth": 1}
CONVOLUTIONS = {"base_channels": 4, "channel_multipliers": (1, 2), "num_res_blocks": 1, "norm_num_groups": 2}
VQ = {**CONVOLUTIONS, "codebook_size": 8, "codebook_dim": 4}
# public name of a class -> a tiny configuration
TINY: dict[str, dict[str, Any]] = {
    "LlamaGenTransformer": LLAMAGEN,
    "AnyOrderTransformer": LLAMAGEN,
    "MaskedTransformer": LLAMAGEN,
    "NARTransformer": LLAMAGEN,
    "PARTransformer": {**LLAMAGEN, "grid_size": (4, 2)},
    "NBPTransformer": {**CODES, **CONDITIONS, "block": (1, 2), "condition_type": "class", "max_positions": None},
    "VARTransformer": {**CODES, **CONDITIONS, "codebook_dim": 4, "scales": (1, 2)},
    "InfinityTransformer": {
        "dim": 8, "num_layers": 1, "num_heads": 2, "num_bits": 3, "scales": (1, 2), "text_dim": 6, "text_length": 4,
        "max_scales": 3, "text_pool_heads": 2,
    },
    "SwittiTransformer": {
        "dim": 8, "num_layers": 1, "num_heads": 2, "codebook_size": 6, "codebook_dim": 4, "scales": (1, 2), "text_dim": 6,
        "pooled_dim": 5, "text_length": 4, "ffn_dim": 8,
    },
    "MARTransformer": {**TOKENS, **MAR, "decoder_num_heads": 2, "buffer_size": 2, "num_sampling_steps": "4"},
    "CausalMARTransformer": {**TOKENS, "dim": 8, "num_layers": 1, "num_heads": 2, "num_sampling_steps": "4"},
    "XARTransformer": {
        "grid_size": (2, 2), "cells": (1, 2), "latent_channels": 2, "dim": 8, "num_heads": 2, "num_classes": 3,
        "encoder_depth": 1, "decoder_depth": 1,
    },
    "EagleDrafter": {**CODES, "ffn_dim": 8, "num_condition_tokens": 2},
    "RowDrafter": {"dim": 8, "right_dim": 4, "below_dim": 4, "codebook_size": 8, "grid_size": (2, 2)},
    "VQTokenizer": {**VQ, "z_channels": 4},
    "MultiScaleVQTokenizer": {**VQ, "scales": (1, 2)},
    "MultiScaleBSQTokenizer": {**CONVOLUTIONS, "codebook_dim": 4, "scales": (1, 2)},
    "VideoFSQTokenizer": {
        **CONVOLUTIONS, "temporal_downsample": (True,), "num_mid_blocks": 0, "levels": (3, 2), "patch_size": (1, 1, 1),
    },
    "ClassConditioner": {"class_names": ("cat", "dog")},
    "AttributeConditioner": {},
    "T5CaptionConditioner": {},
    "CLIPCaptionConditioner": {},
}  # fmt: skip
TINY["VARTransformer"] = {k: v for k, v in TINY["VARTransformer"].items() if k != "grid_size"}
MODELS = [name for name in TINY if "Conditioner" not in name]
BEGUN: list[torch.nn.Module] = []


@pytest.fixture(scope="module", autouse=True)
def modules() -> Iterator[list[torch.nn.Module]]:
    """Every module that is begun."""
    start = torch.nn.Module.__init__

    def counted(self: Any, *args: Any, **options: Any) -> None:
        BEGUN.append(self)
        start(self, *args, **options)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(torch.nn.Module, "__init__", counted)
        yield BEGUN


def build(name: str, config: dict[str, Any], named: str | None = None) -> Any:
    """Build a class; None where it refuses, in one line and before any module is begun."""
    BEGUN.clear()
    try:
        return getattr(vargen, name)(**config)
    except ValueError as error:
        message = str(error)
    assert not BEGUN, f"{len(BEGUN)} modules were begun before: {message}"
    assert "\n" not in message, message
    assert len(message) < 600, message
    assert message.startswith(f"{name}: "), message
    assert named is None or named in message, f"{named} is not in {message!r}"
    return None


def arguments(name: str) -> list[str]:
    return list(inspect.signature(getattr(vargen, name).__init__).parameters)[1:]


def table(name: str) -> Settings:
    return getattr(vargen, name).__init__.settings


def test_every_configured_class_of_the_library_is_here() -> None:
    from diffusers import ConfigMixin, DiffusionPipeline, SchedulerMixin

    def below(cls: type) -> set[type]:
        return {found for child in cls.__subclasses__() for found in {child, *below(child)}}

    for name in vargen.__all__[1:]:
        getattr(vargen, name)
    ours = {cls for cls in below(ConfigMixin) if cls.__module__.startswith("vargen.")}
    models = {cls.__name__ for cls in ours if not issubclass(cls, DiffusionPipeline | SchedulerMixin)}
    assert models - {"Conditioner"} == set(TINY)  # Conditioner is abstract and takes nothing


@pytest.mark.parametrize("name", TINY)
def test_every_argument_meets_every_wrong_value(name: str) -> None:
    takes = table(name).checks
    assert set(takes) == set(arguments(name))
    for argument in takes:
        for value in WRONG:
            model = build(name, {**TINY[name], argument: value}, named=argument)
            if model is None or takes[argument] is anything:
                continue
            stored = json.loads(model.to_json_string())  # what is accepted can be stored, and is accepted again
            read = model.config[argument]
            assert type(read) in (int, float, bool, str, tuple, type(None))
            assert takes[argument](argument, stored[argument]) == read


@pytest.mark.parametrize("name", TINY)
def test_defaults_pass_their_own_checks(name: str) -> None:
    parameters = inspect.signature(getattr(vargen, name).__init__).parameters
    for argument, check in table(name).checks.items():
        assert check(argument, parameters[argument].default) == parameters[argument].default


# values of which every argument accepts some; what is accepted together must run
POOL: tuple[Any, ...] = (
    0, 1, 2, 3, 4, 6, 8, 0.0, 0.1, 0.5, 1.0, 4.0, True, False, None, "class", "caption", "attributes", "text", "none",
    "zero", "identity", "conv", "patch", "mid", "nearest", "bilinear", "bicubic", "nbp", "cosmos", "epsilon",
    "v_prediction", "4", "2,1", [], [1], [2], [1, 2], [2, 2], [4, 2], [2, 4, 4], [1, 2, 2], [1, 1, 1], [True], [[1, 1], [2, 3]],
    [3, 2],
)  # fmt: skip


@cache
def fitting(name: str) -> dict[str, list[Any]]:
    """The values of the pool that every argument of a class accepts by itself."""

    def fits(argument: str, value: Any) -> bool:
        try:
            table(name).checks[argument](argument, value)
        except ValueError:
            return False
        return True

    return {argument: [value for value in POOL if fits(argument, value)] for argument in sorted(table(name).checks)}


@st.composite
def configurations(draw: st.DrawFn, name: str) -> dict[str, Any]:
    """A tiny configuration with several other values that fit by themselves, now and then with a wrong one."""
    fit = fitting(name)
    changed = draw(st.lists(st.sampled_from(list(fit)), max_size=5, unique=True))
    drawn = {argument: draw(st.sampled_from(fit[argument])) for argument in changed}
    if draw(st.integers(0, 7)) == 7:
        drawn[draw(st.sampled_from(list(fit)))] = draw(st.sampled_from(WRONG))
    return {**TINY[name], **drawn}


def condition_of(model: Any) -> Any:
    """A condition of one image."""
    c = model.config
    tokens, kind = c.get("num_condition_tokens", 0), c.get("condition_type", "class")
    if kind == "caption":
        return torch.ones(1, tokens, c.caption_dim), torch.ones(1, tokens)
    return {"class": torch.zeros(1).long(), "none": 1}.get(kind, torch.zeros(1, tokens).long())


def run(model: Any) -> torch.Tensor:
    """One training forward of a tiny model."""
    c, name = model.config, type(model).__name__
    if name.endswith("Tokenizer"):
        sides = model.downsample
        if name == "VideoFSQTokenizer":
            return model(torch.zeros(2, c.in_channels, 1 + model.temporal_factor, *sides)).videos
        last = getattr(model, "scales", [(1, 1)])[-1]
        out = model(torch.zeros(2, c.in_channels, last[0] * sides, last[1] * sides))
        return out if isinstance(out, torch.Tensor) else out.images
    if name == "EagleDrafter":
        embeddings = model.embed(torch.zeros(1, 2).long()) if c.own_embeddings else torch.zeros(1, 2, c.dim)
        return model(torch.zeros(1, 2, c.dim), embeddings)
    if name == "RowDrafter":
        return model(*torch.zeros(3, 1, 2, c.dim))
    if name == "InfinityTransformer":
        caption = (torch.zeros(1, 1, c.text_dim), torch.ones(1, 1, dtype=torch.bool))
        return model(torch.zeros(1, model.num_codes - model.sizes[0], c.num_bits), caption)
    if name == "SwittiTransformer":
        caption = (torch.zeros(1, 1, c.text_dim), torch.zeros(1, c.pooled_dim), torch.ones(1, 1, dtype=torch.bool))
        return model(torch.zeros(1, model.num_codes - model.sizes[0], c.codebook_dim), caption)
    condition = condition_of(model)
    if name == "VARTransformer":
        return model(torch.zeros(1, model.num_codes - model.sizes[0], c.codebook_dim), condition)
    if name == "XARTransformer":
        tokens = torch.zeros(1, model.num_cells, math.prod(model.cell_size), model.token_dim)
        return model(tokens, torch.zeros(1, model.num_cells), condition)
    if name == "CausalMARTransformer":
        return model.loss(torch.zeros(1, model.num_codes, model.token_dim), condition)
    if name == "MARTransformer":
        return model.loss(torch.zeros(1, model.num_codes, model.token_dim), condition)
    return model(torch.zeros(1, model.num_codes).long(), condition)


@pytest.mark.parametrize("name", MODELS)
def test_whole_configurations_are_refused_or_run(name: str) -> None:
    """What is accepted runs, and holds no more numbers than were counted beforehand."""
    weights = table(name).weights
    assert weights is not None
    read = list(inspect.signature(weights).parameters)
    ran = 0

    @settings(deadline=None, max_examples=8, suppress_health_check=list(HealthCheck))
    @given(config=configurations(name=name))
    def attempt(config: dict[str, Any]) -> None:
        nonlocal ran
        if (model := build(name, config)) is None:
            return
        ran += 1
        assert bool(torch.isfinite(run(model)).all())
        held = sum(t.numel() for t in (*model.parameters(), *model.buffers()))
        counted = weights(**{setting: model.config.get(setting) for setting in read})
        assert held - USAGE_WINDOW <= counted <= 20 * held + 10_000

    attempt()
    assert ran


SINGLE = {"dictionary": True, "channel_multipliers": [1], "temporal_downsample": []}
ABSURD: dict[
    str, tuple[dict[str, Any], str]
] = {  # every argument within its bounds, all together no machine holds them
    "LlamaGenTransformer": ({"dim": 2**16, "num_layers": 1000}, "weights"),
    "AnyOrderTransformer": ({"dim": 2**15, "codebook_size": 2**24}, "weights"),
    "MaskedTransformer": ({"grid_size": (2**10, 2**10)}, "positions"),
    "NARTransformer": ({"grid_size": (2**7, 2**7, 2**7)}, "positions"),
    "PARTransformer": ({"dim": 2**16, "multiple_of": 2**19}, "weights"),
    "NBPTransformer": ({"condition_type": "text", "dim": 2**14, "text_vocabulary": 2**24}, "weights"),
    "VARTransformer": ({"scales": [2**9, 2**10]}, "positions"),
    "InfinityTransformer": ({"dim": 2**16, "num_layers": 1000}, "weights"),
    "SwittiTransformer": ({"scales": [2**9, 2**10]}, "positions"),
    "MARTransformer": ({"latent_channels": 2**16, "patch_size": 16}, "numbers of a token"),
    "CausalMARTransformer": ({"head_width": 2**16, "head_depth": 100}, "weights"),
    "XARTransformer": ({"num_classes": 2**24, "dim": 2**13}, "weights"),
    "EagleDrafter": ({"dim": 2**14, "ffn_dim": 2**19, "num_layers": 100}, "weights"),
    "RowDrafter": ({"dim": 2**16, "right_dim": 2**19, "below_dim": 2**19}, "weights"),
    "VQTokenizer": ({"base_channels": 2**10, "channel_multipliers": [1, 1024]}, "weights"),
    "MultiScaleVQTokenizer": ({"scales": [2**11]}, "positions"),
    "MultiScaleBSQTokenizer": ({"scales": [2**11]}, "positions"),
    "VideoFSQTokenizer": ({**SINGLE, "levels": [2] * 24, "patch_size": [64, 64, 64]}, "weights"),
}


@pytest.mark.parametrize("name", MODELS)
def test_absurd_sizes_are_refused_before_anything_is_made(name: str) -> None:
    config, unit = ABSURD[name]
    assert build(name, {**TINY[name], **config}, named=f"{unit} are allowed, about") is None


NO_HEAD = {"condition_type": "attributes", "num_attributes": 0}
TOGETHER: tuple[
    tuple[str, dict[str, Any], str], ...
] = (  # settings that fit alone and not together, one for each rule
    ("LlamaGenTransformer", {"num_heads": 4}, "dim / num_heads must be a multiple of 4"),
    ("LlamaGenTransformer", {"num_kv_heads": 3}, "num_kv_heads divide num_heads"),
    ("LlamaGenTransformer", {"ffn_dim_multiplier": 0.01}, "ffn_dim_multiplier must leave the feed-forward a width"),
    ("LlamaGenTransformer", {"num_classes": 0}, "condition_type='class' needs num_classes of at least 1, got 0"),
    ("MaskedTransformer", {"condition_type": "caption", "num_condition_tokens": 0}, "needs num_condition_tokens"),
    ("AnyOrderTransformer", NO_HEAD, "condition_type='attributes' needs num_attributes of at least 1, got 0"),
    ("NARTransformer", {"num_heads": 4}, "dim / num_heads must be a multiple of 4"),
    ("PARTransformer", {"group_size": 3}, "group_size must be the square"),
    ("PARTransformer", {"grid_size": (2, 2)}, "leave more than one group"),
    ("NBPTransformer", {"block": (2, 3)}, "block must divide the grid"),
    ("NBPTransformer", {"block": (1, 1, 2)}, "block must divide the grid"),
    ("NBPTransformer", {"rope": True, "num_heads": 4}, "dim / num_heads must be a multiple of 4"),
    ("NBPTransformer", {"code_rank": 2, "condition_type": "text"}, "code_rank is for models"),
    ("NBPTransformer", NO_HEAD, "needs num_attributes"),
    ("NBPTransformer", {"grid_size": (512, 514)}, "positions are allowed"),
    ("SwittiTransformer", {"num_heads": 4}, "dim / num_heads must be a multiple of 4"),
    ("SwittiTransformer", {"class_dropout_prob": 0.1}, "class_dropout_prob must be 0, got 0.1"),
    ("SwittiTransformer", {"dim": 12, "num_heads": 3}, "crop_condition needs a dim that is a multiple of 8, got 12"),
    ("VARTransformer", {"num_heads": 3}, "num_heads must divide dim, got dim=8, num_heads=3"),
    ("VARTransformer", {"mlp_ratio": 0.01}, "mlp_ratio must leave the feed-forward a width"),
    ("VARTransformer", {"scales": (2, 1)}, "no scale may be larger than the last one"),
    ("VARTransformer", NO_HEAD, "needs num_attributes"),
    ("MARTransformer", {"decoder_num_heads": 3}, "decoder_num_heads must divide decoder_dim"),
    ("MARTransformer", {"mlp_ratio": 0.01}, "mlp_ratio must leave"),
    ("MARTransformer", NO_HEAD, "needs num_attributes"),
    ("MARTransformer", {"grid_size": (512, 513)}, "positions are allowed"),
    ("CausalMARTransformer", {"latent_channels": 2**10, "patch_size": 16}, "numbers of a token are allowed"),
    ("CausalMARTransformer", {"num_heads": 4}, "dim / num_heads must be a multiple of 4"),
    ("CausalMARTransformer", NO_HEAD, "needs num_attributes"),
    ("CausalMARTransformer", {"grid_size": (512, 513)}, "positions are allowed"),
    ("XARTransformer", {"num_heads": 4}, "dim / num_heads must be a multiple of 4"),
    ("XARTransformer", {"cells": (1, 3)}, "cells must divide grid_size"),
    ("XARTransformer", {"mlp_ratio": 0.1}, "mlp_ratio must leave"),
    ("XARTransformer", {"grid_size": (512, 514)}, "positions are allowed"),
    ("EagleDrafter", {"num_heads": 4}, "dim / num_heads must be a multiple of 4"),
    ("EagleDrafter", {"grid_size": (512, 513)}, "positions are allowed"),
    ("VQTokenizer", {"norm_num_groups": 3}, "norm_num_groups=3 must divide every width"),
    ("VQTokenizer", {"encoder_type": "patch"}, "needs codebook_dim=12 and l2_norm=False"),
    ("MultiScaleVQTokenizer", {"norm_num_groups": 3}, "norm_num_groups=3 must divide every width"),
    ("MultiScaleVQTokenizer", {"encoder_type": "patch"}, "needs codebook_dim=12"),
    ("MultiScaleVQTokenizer", {"quant_conv_kernel_size": 2}, "quant_conv_kernel_size must be odd"),
    ("VideoFSQTokenizer", {"temporal_downsample": ()}, "temporal_downsample must have one entry for each of the 1"),
    ("VideoFSQTokenizer", {"dictionary": True}, "dictionary=True needs a single entry"),
    ("VideoFSQTokenizer", {"norm_num_groups": 3}, "norm_num_groups=3 must divide every width"),
    ("VideoFSQTokenizer", {"levels": (64,) * 5}, "codes are allowed"),
    ("ClassConditioner", {"class_names": ["cat", "cat"]}, "class_names must differ, got 'cat' twice"),
    ("AttributeConditioner", {"vocabulary": "hero"}, "vocabulary must be one of heroes, motion"),
    ("T5CaptionConditioner", {"tokenizer": print}, "belong together"),
)


@pytest.mark.parametrize(("name", "config", "words"), TOGETHER)
def test_settings_that_do_not_go_together_are_refused(name: str, config: dict[str, Any], words: str) -> None:
    assert build(name, {**TINY[name], **config}, named=words) is None


def test_files_and_dictionaries_pass_the_same_checks(tmp_path: Path) -> None:
    model = vargen.LlamaGenTransformer(**{**LLAMAGEN, "dim": np.int64(8), "grid_size": [np.int32(2), 2]})
    model.save_pretrained(tmp_path)  # numpy's integers are stored as numbers
    file = tmp_path / "config.json"
    stored = json.loads(file.read_text())
    assert stored["grid_size"] == [2, 2]
    again = vargen.LlamaGenTransformer.from_pretrained(tmp_path)
    assert again.config.grid_size == again.grid_size == (2, 2)  # a list in the file
    for name, value in {"grid_size": [0, 5], "num_heads": -1, "dim": 10**12, "norm_eps": None}.items():
        wrong = {**stored, name: value}
        file.write_text(json.dumps(wrong))
        one_line(partial(vargen.LlamaGenTransformer.from_pretrained, tmp_path), f"LlamaGenTransformer: {name}")
        one_line(partial(vargen.LlamaGenTransformer.from_config, wrong), f"LlamaGenTransformer: {name}")
    assert vargen.LlamaGenTransformer.from_config({**stored, "surprise": 1}).config.dim == 8  # diffusers warns
    one_line(lambda: vargen.LlamaGenTransformer(**LLAMAGEN, num_head=2), "no setting 'num_head'", "'num_heads'")
    positional = vargen.AttributeConditioner("motion", True)
    assert (positional.config.vocabulary, positional.config.fill) == ("motion", True)


def test_a_table_without_an_argument_is_an_error_of_the_class() -> None:
    with pytest.raises(TypeError, match="arguments and checks differ in other"):

        @checked(Settings({"size": anything}))
        def __init__(self: Any, size: int, other: int) -> None: ...


def test_values_are_shown_on_one_short_line() -> None:
    for value in WRONG:
        assert "\n" not in shown(value)
        assert len(shown(value)) < 200
    assert shown(10**5000) == "an integer of about 5000 digits"
    assert shown(np.ones((50, 50))).count("1.") < 20


@settings(max_examples=30, deadline=None)
@given(value=st.one_of(st.integers(), st.floats(), st.text(), st.none(), st.booleans(), st.lists(st.integers())))
def test_checks_return_the_value_or_say_what_is_wrong(value: Any) -> None:
    for check in (
        lambda: check_integer("size", value, low=1, high=10) in range(1, 11),
        lambda: 0.5 < check_number("size", value, low=0.5, high=2, open_low=True, open_high=True) < 2,
        lambda: check_choice("size", value, (True, "mid")) in (True, "mid"),
        lambda: len(check_scales("size", value)) > 0,
        lambda: len(check_seeds(value, 1)) == 1,
    ):
        try:
            assert check()
        except ValueError as error:
            assert "\n" not in str(error)  # noqa: PT017 - either outcome is right
    one_line(lambda: check_names([value], ["size"], "Thing"), "Thing has no setting") if value != "size" else None
    one_line(lambda: check_names(["siz"], ["size"], "Thing"), "did you mean 'size'")


def test_ends_of_ranges() -> None:
    assert check_number("p", 1, low=0, high=1) == 1.0
    one_line(
        lambda: check_number("p", 1, low=0, high=1, open_high=True), "p must be at least 0 and less than 1, got 1"
    )
    one_line(lambda: check_number("p", 10**400, low=0), "p must be a finite number")
    one_line(lambda: check_number("p", True, low=0), "p must be a finite number", "got True")
    one_line(lambda: check_integer("p", True, low=0), "p must be an integer", "got True")
    one_line(lambda: check_choice("p", 1, (True, "mid")), "must be one of True, mid, got 1")
    assert check_seeds(torch.tensor([3, 4]), 2) == check_seeds(np.array([3, 4]), 2) == [3, 4]

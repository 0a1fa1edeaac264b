"""Checkpoints of every family, damaged at random: a model or one line, never another exception, a hang or gigabytes.

What is tried: keys dropped, renamed to numbers of thousands of digits and to any text, other dtypes, shapes and strides,
sparse, repeated and bare tensors, containers around them that also hold each other, tens of thousands of further entries, NaN,
and settings of other types and sizes; for files of every format, bytes replaced and ends cut off.
VARGEN_EXAMPLES=400 tries more than the tests' time allows.
"""

from __future__ import annotations

import io
import math
import os
import re
import resource
from functools import cache
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from safetensors.torch import save
from torch import Tensor, nn

from tests.checkpoint_families import FAMILIES, weights
from tests.outside import read_or_refused
from vargen.checkpoints.bounds import WEIGHT_DTYPES
from vargen.checkpoints.reader import load_original
from vargen.checkpoints.verify import verify_checkpoint

EXAMPLES = int(os.environ.get("VARGEN_EXAMPLES", "6"))  # of every family; another number draws new ones each time
OPTIONS: dict[str, Any] = {
    "max_examples": EXAMPLES,
    "deadline": None,
    "derandomize": EXAMPLES == 6,
    "database": None,
    "suppress_health_check": list(HealthCheck),
}
MEMORY = 2**19  # kB that all examples together may take
NUMBERS = ("99999999", "9" * 5000, "1000000000000", "-1", "007", "x", "²", "", "1", "2", "0\n\x1b[2J")
DTYPES = (
    *(torch.int64, torch.uint8, torch.bool, torch.complex64, torch.float8_e4m3fn),
    *(torch.float16, torch.bfloat16, torch.float64),
)
SETTINGS: dict[str, tuple[Any, ...]] = {
    "num_heads": (-1, 0, True, None, "2", 2.5, 3, 10**9, 10**5000),
    "encoder_num_heads": (-1, True, 3),
    "grid_size": ((0, 0), (-1, 5), (10**9, 10**9), (1, 1), 4, "4x4", (2,), (2.0, 2), (True, 2), [2, 2], None),
    "scales": ((), (0,), (10**9,), (1, 2, 3), "12", 5, ((1, 2), (2, 2))),
    "num_layers": (-1, 0, 10**9, 3),
    "layers_per_block": (-1, 10**9, 2),
    "block_out_channels": ([10**12], [4, 8, 8], "x"),
    "patch_size": (0, -1, 3, 10**30),
    "norm_num_groups": (0, 3, 10**12),
    "block": ((0, 0, 0), (1, 1, 10**9)),
    "codebook_size": (-5, 10**15, 5),
    "heads": (2,),
}


def change(name: str) -> Any:
    """Strategy of one change to a state dict and the settings beside it, as a function."""
    state = weights(name)
    keys, names = st.sampled_from(sorted(state)), st.sampled_from(sorted(SETTINGS))
    size = st.sampled_from([0, 1, 2, 3, 7, 2**20, 2**40])
    return st.one_of(
        st.tuples(st.just(drop), keys),
        st.tuples(st.just(rename), keys, st.sampled_from(NUMBERS)),
        st.tuples(st.just(rename), keys, st.text(max_size=20)),
        st.tuples(st.just(cast), keys, st.sampled_from(DTYPES)),
        st.tuples(st.just(cast_all), st.booleans(), st.sampled_from(DTYPES)),
        st.tuples(st.just(reshape), keys, st.lists(size, max_size=5)),
        st.tuples(st.just(disguise), keys, st.sampled_from(sorted(DISGUISES))),
        st.tuples(st.just(fill), keys, st.sampled_from([-1, 2**40, float("nan")])),
        st.tuples(st.just(nest), st.integers(0, 40), st.sampled_from(["model", "state_dict", "ema", "trainer", "sd"])),
        st.tuples(st.just(surround), st.sampled_from([1, 11_000]), st.sampled_from(["x", "layers.1.", "module."])),
        names.flatmap(lambda n: st.tuples(st.just(configure), st.just(n), st.sampled_from(SETTINGS[n]))),
    )


DISGUISES: dict[str, Any] = {
    "a billion equal rows": lambda t: t.flatten()[:1].expand(10**9, 8) if t.numel() else t,
    "equal everywhere": lambda t: t.flatten()[:1].view([1] * t.ndim).expand(t.shape) if t.numel() else t,
    "not in order": lambda t: t.t().contiguous().t() if t.ndim == 2 else t,
    "sparse": lambda t: t.to_sparse() if t.dtype in WEIGHT_DTYPES else t,
    "meta": lambda t: t.to("meta"),
    "a part": lambda t: torch.cat([t, t])[: len(t)] if t.ndim else t,
    "a number": lambda t: 3,
    "a list": lambda t: [t],
    "a mapping": lambda t: {"model": t},
    "a parameter": lambda t: nn.Parameter(t) if t.is_floating_point() else t,
}


def drop(state: dict[Any, Any], config: dict[str, Any], key: str) -> None:
    state.pop(key, None)


def rename(state: dict[Any, Any], config: dict[str, Any], key: str, new: str) -> None:
    """Another number for the first layer of the key, or the text behind the key."""
    if key in state:
        found = re.sub(r"\d+", new.replace("\\", ""), key, count=1)
        state[found if found != key else key + new] = state.pop(key)


def cast(state: dict[Any, Any], config: dict[str, Any], key: str, dtype: torch.dtype) -> None:
    if isinstance(state.get(key), Tensor) and state[key].layout == torch.strided:
        state[key] = state[key].to(dtype)


def cast_all(state: dict[Any, Any], config: dict[str, Any], half: bool, dtype: torch.dtype) -> None:
    for key in list(state)[:: 1 + half]:
        cast(state, config, key, dtype)


def reshape(state: dict[Any, Any], config: dict[str, Any], key: str, shape: list[int]) -> None:
    huge = math.prod(size or 1 for size in shape) >= 2**63
    if key in state and (huge or math.prod(shape) < 2**20):
        state[key] = torch.zeros([0, 2**40] if huge else shape)


def disguise(state: dict[Any, Any], config: dict[str, Any], key: str, how: str) -> None:
    if isinstance(state.get(key), Tensor) and state[key].layout == torch.strided:
        state[key] = DISGUISES[how](state[key])


def fill(state: dict[Any, Any], config: dict[str, Any], key: str, value: float) -> None:
    tensor = state.get(key)
    if isinstance(tensor, Tensor) and tensor.layout == torch.strided and tensor.numel() < 10**6:
        if tensor.dtype == torch.int64:
            state[key] = torch.full_like(tensor, 0 if value != value else int(value))
        elif tensor.dtype in WEIGHT_DTYPES:
            state[key] = torch.full_like(tensor, value)


def nest(state: dict[Any, Any], config: dict[str, Any], depth: int, key: str) -> None:
    """The content moves into containers that also refer to each other."""
    inner: dict[Any, Any] = dict(state)
    state.clear()
    for _ in range(depth):
        inner = {key: inner, "module": inner, "sd": inner}
    state.update(inner, module=state if depth % 2 else inner)


def surround(state: dict[Any, Any], config: dict[str, Any], count: int, prefix: str) -> None:
    if len(state) < 1000:
        state.update(dict.fromkeys((f"{prefix}{number}" for number in range(count)), torch.zeros(1)))
        state.update({7: torch.zeros(1), None: "x"})


def configure(state: dict[Any, Any], config: dict[str, Any], name: str, value: Any) -> None:
    config[name] = value


@pytest.mark.parametrize("name", FAMILIES)
def test_damaged_checkpoints_load_or_are_refused_in_one_line(name: str) -> None:
    example, before = FAMILIES[name], resource.getrusage(resource.RUSAGE_SELF).ru_maxrss

    @settings(**OPTIONS)
    @given(st.lists(change(name), min_size=1, max_size=3), st.booleans())
    def run(changes: list[Any], verify: bool) -> None:
        state, config = weights(name), dict(example.settings)
        for function, *arguments in changes:
            function(state, config, *arguments)
        if verify:
            read_or_refused(lambda: verify_checkpoint(state))
            return
        model = read_or_refused(lambda: example.load(state, **config))
        if model is not None:
            dtypes = {p.dtype for p in model.parameters()}
            assert len(dtypes) == 1
            assert dtypes <= set(WEIGHT_DTYPES)

    run()
    assert resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before < MEMORY


@cache
def files() -> dict[str, bytes]:
    """The same weights in a container, in every format."""
    content, found = {"model": weights("LlamaGen"), "epoch": 3}, {}
    for name, zipped in (("zip", True), ("old", False)):
        torch.save(content, stream := io.BytesIO(), _use_new_zipfile_serialization=zipped)
        found[name] = stream.getvalue()
    return {**found, "safetensors": save(content["model"])}


@pytest.mark.parametrize("kind", ["zip", "old", "safetensors"])
def test_damaged_files_are_read_or_refused_in_one_line(tmp_path: Path, kind: str) -> None:
    content, before = files()[kind], resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    places = st.one_of(st.integers(0, 200), st.integers(0, 3000), st.integers(-3000, -1), st.integers(-100, -1))
    byte = st.one_of(st.sampled_from(b"\x00\xff\x85.}R\x80P"), st.integers(0, 255))

    @settings(**{**OPTIONS, "max_examples": 4 * EXAMPLES})
    @given(st.lists(st.tuples(places, byte), min_size=1, max_size=6), st.none() | places)
    def run(changes: list[tuple[int, int]], end: int | None) -> None:
        damaged = bytearray(content)
        for place, value in changes:
            damaged[place] = value
        (tmp_path / "x").write_bytes(damaged[:end])
        read_or_refused(lambda: load_original(tmp_path / "x"))

    run()
    assert resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before < MEMORY

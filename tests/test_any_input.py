"""Whatever is given to a conditioner or to the call of a pipeline: a result, or one line that the library wrote itself.

What is tried: prompts of any characters (controls, lone surrogates, other scripts and their digits), of known words in any
order and number, of mark-up, up to ten thousand characters; and for every argument of the calls values of other types, NaN,
integers of hundreds and thousands of digits, negative ones, arrays and tensors of any shape, lists of other lengths. The
sampler is stopped at its door, where the call has checked everything and allocated what depends on its arguments.
VARGEN_EXAMPLES=5000 tries more than the tests' time allows.
"""

from __future__ import annotations

import linecache
import math
import os
import resource
import sys
import traceback
import warnings
from collections.abc import Callable
from decimal import Decimal
from fractions import Fraction
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from PIL import Image

from tests.outside import cannot_steer
from tests.test_video import tiny_video_pipeline
from tests.tiny import tiny_backbone, tiny_hero_pipeline, tiny_pipeline, tiny_scale_pipeline
from vargen.conditioners.attributes import AttributeConditioner
from vargen.conditioners.class_labels import ClassConditioner
from vargen.conditioners.t5 import T5CaptionConditioner
from vargen.pipelines.image import ImagePipeline
from vargen.pipelines.inputs import MAX_IMAGES
from vargen.registry import sampler_class
from vargen.samplers.window.jacobi import SpeculativeJacobiSampler
from vargen.samplers.window.next_token import NextTokenSampler
from vargen.serving.studio import Studio

ROOT = Path(__file__).parents[1]
EXAMPLES = int(os.environ.get("VARGEN_EXAMPLES", "20"))  # of every test; another number draws new ones each time
SETTINGS = settings(
    max_examples=EXAMPLES, derandomize=EXAMPLES == 20, deadline=None, suppress_health_check=list(HealthCheck)
)
MEGABYTE = 2**20
LIMIT = 200 * MEGABYTE  # what one test may add to the memory of the process


class AtTheDoor(Exception):
    """The call has checked everything and now asks for codes of so many images."""


def at_the_door(*_: Any, seeds: list[int], **__: Any) -> None:
    raise AtTheDoor(len(seeds))


def peak() -> int:
    unit = 1 if sys.platform == "darwin" else 1024
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit


@pytest.fixture(autouse=True)
def bounded_memory() -> Any:
    before = peak()
    yield
    assert peak() - before < LIMIT


def taken_or_refused(call: Callable[[], Any]) -> Any:
    """Run a call; it may return, reach the sampler, or be refused in one short printable line of the library's own."""
    number = 1
    try:
        return call()
    except AtTheDoor as reached:
        number = reached.args[0]
    except ValueError as error:
        message = str(error)
        assert cannot_steer(message), ascii(message)
        assert 0 < len(message) < 500, message
        raiser = traceback.extract_tb(error.__traceback__)[-1]
        place = f"{raiser.filename}:{raiser.lineno} says {message!r}"
        assert Path(raiser.filename).is_relative_to(ROOT), place
        assert ".venv" not in raiser.filename, place
        statement = linecache.getline(raiser.filename, raiser.lineno or 0)[raiser.colno or 0 :]
        assert statement.startswith("raise "), place  # and not Python or numpy at that line
    assert 1 <= number <= MAX_IMAGES
    return None


# prompts

characters = st.characters(exclude_categories=()) | st.sampled_from(
    "\x00\x1b\n\r\t\x7f\u202e\u2028\ud800\ufeff'\u2019,;-_"
)
KNOWN = """deep elf red cloak great sword no not without or nor hat bald unarmed dwarf hero wizard the with walking left
jumps jumping walks to fading away rises from ground purpel 3 12 4.5 1e9 \u0663\u0664 golden retriever cardigan 207 -1"""
words = st.sampled_from(KNOWN.split())
markup = st.sampled_from(
    [
        "<![",
        "<!",
        "<b>",
        "</b>",
        "<a ",
        "&amp;",
        "&#x0;",
        "&#99999999999;",
        "http://",
        "www.",
        "a.",
        "@",
        "-",
        "#1",
        "\\n",
    ]
)
texts = st.one_of(
    st.text(characters, max_size=40),
    st.lists(words, max_size=12).map(" ".join),
    st.lists(words | markup | st.text(characters, max_size=5), max_size=12).map("".join),
    st.tuples(words | markup | characters, st.integers(1, 2500)).map(lambda pair: pair[0] * pair[1]),
    st.integers(0, 5000).map(lambda digits: "9" * digits),
)


huge = st.sampled_from([10**400, -(10**400), 10**5000, 2**63, 2**64 - 1, 2**64, -(2**63), 10**9, 10**18])
numbers = st.one_of(
    st.integers(-3, 20),
    st.integers(),
    huge,
    st.floats(),
    st.booleans(),
    st.complex_numbers(),
    st.fractions(),
    st.sampled_from([Fraction(10**400, 3), Decimal("NaN"), Decimal(2), 1e-320, math.nan, math.inf]),
    st.sampled_from([np.float32(0.5), np.float64("nan"), np.int8(3), np.uint64(2**64 - 1), np.bool_(True)]),
)
shapes = st.lists(st.integers(0, 8), max_size=5).map(tuple)
dtypes = st.sampled_from([torch.float32, torch.float16, torch.int64, torch.int8, torch.bool, torch.complex64])
arrays = st.one_of(
    st.builds(torch.zeros, shapes, dtype=dtypes),
    st.builds(lambda shape: torch.full(shape, math.nan), shapes),
    st.builds(lambda shape, kind: np.zeros(shape, dtype=kind), shapes, st.sampled_from("fdilO?FU")),
    st.sampled_from(
        [
            torch.zeros(3, device="meta"),
            torch.zeros(3, 8, 8, device="meta"),
            torch.zeros(1).expand(10**9),
            np.broadcast_to(np.int64(1), (10**9,)),
            np.zeros((3, 8, 8, 3), dtype=">f4"),
            np.zeros((3, 8, 8, 3))[:, ::-1],
            torch.eye(3).to_sparse(),
            torch.zeros(0, 3, 8, 8),
            torch.zeros(2, 3, 3, 8, 8),
            torch.rand(2, 3, 8, 8),
            torch.ones(8, 8),
        ]
    ),
)
pictures = st.sampled_from(
    [Image.new(mode, size) for mode in ("RGB", "L", "RGBA", "I;16") for size in ((8, 8), (3, 9))]
)
scalars = st.one_of(
    numbers, texts, arrays, pictures, st.none(), st.binary(max_size=9), st.builds(object), st.builds(torch.Generator)
)
ranges = st.sampled_from([range(0), range(3), range(10**12), range(10**400), range(5, -5, -1)])
mappings = st.dictionaries(st.text(max_size=3), numbers, max_size=3)
anything = st.one_of(
    scalars,
    ranges,
    mappings,
    st.lists(scalars, max_size=3),
    st.lists(scalars, max_size=3).map(tuple),
    st.lists(st.lists(scalars, max_size=2), max_size=2),
    st.lists(pictures, max_size=4),
    st.integers(0, 10**5).map(lambda length: [3] * length),
    st.frozensets(st.integers(), max_size=3),
    st.sampled_from([len, print, int, iter([]), slice(None), "codes", "pil", ["codes"], ["num_committed"]]),
)


def caption_conditioner() -> T5CaptionConditioner:
    class Encoder(torch.nn.Module):
        def forward(self, input_ids: torch.Tensor, attention_mask: torch.Tensor) -> tuple[torch.Tensor]:
            return (input_ids[..., None].float(),)

    class Batch(dict):
        __getattr__ = dict.__getitem__

        def to(self, device: Any) -> Any:
            return self

    def tokenize(captions: list[str], max_length: int = 64, **_: Any) -> Any:
        lengths = torch.tensor([[min(len(caption.encode()), max_length)] for caption in captions])
        mask = (torch.arange(max_length) < lengths).long()
        return Batch(input_ids=mask, attention_mask=mask)

    return T5CaptionConditioner(text_encoder=Encoder(), tokenizer=tokenize)


@pytest.fixture(scope="module")
def conditioners() -> dict[str, Any]:
    made = {"heroes": AttributeConditioner("heroes"), "motion": AttributeConditioner("motion")}
    return made | {"classes": ClassConditioner(), "captions": caption_conditioner()}


@pytest.mark.parametrize("name", ["heroes", "motion", "classes", "captions"])
def test_any_prompt_is_read_or_refused(conditioners: dict[str, Any], name: str) -> None:
    conditioner = conditioners[name]
    if name == "captions":
        pytest.importorskip("ftfy")
        pytest.importorskip("bs4")

    @SETTINGS
    @given(text=texts)
    def read(text: str) -> None:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # of the cleaner, about captions that look like file names
            rows = taken_or_refused(lambda: conditioner.encode(prompts=[text]))
            if rows is not None:
                assert len(rows[0] if isinstance(rows, tuple) else rows) == 1

    read()


@pytest.mark.parametrize("name", ["heroes", "motion", "classes", "captions"])
def test_a_conditioner_takes_or_refuses_anything(conditioners: dict[str, Any], name: str) -> None:
    if name == "captions":
        pytest.importorskip("ftfy")

    @SETTINGS
    @given(items=anything)
    def read(items: Any) -> None:
        for call in (lambda i: conditioners[name](i), lambda i: conditioners[name].encode(class_labels=i)):
            taken_or_refused(lambda: call(items))  # noqa: B023 - called at once

    read()


# calls of pipelines

CALL = """prompt class_labels guidance_scale temperature top_k top_p seed generator output_type return_dict
callback_on_step_end callback_on_step_end_tensor_inputs batch_size"""
SHARED = CALL.split()
OF_IMAGES = [*SHARED, "image", "mask_image", "num_images_per_prompt"]
OF_JACOBI = [*OF_IMAGES, "window", "carry", "init", "windw"]
OF_VIDEOS = [*SHARED, "frames", "num_frames", "num_videos_per_prompt", "fps"]


@pytest.fixture(scope="module")
def pipelines() -> dict[str, tuple[Any, list[str], dict[str, Any]]]:
    """The pipelines, their arguments, and those of a call that is right."""
    hole = {"image": torch.rand(1, 3, 8, 8), "mask_image": torch.ones(8, 8)}
    return {
        "classes": (tiny_pipeline(sampler=SpeculativeJacobiSampler()), OF_JACOBI, {"class_labels": 3}),
        "heroes": (tiny_hero_pipeline(), OF_IMAGES, {"prompt": ["deep elf with a red cloak", "orc"]}),
        "scales": (tiny_scale_pipeline(), OF_IMAGES, {"class_labels": 3, **hole}),
        "videos": (tiny_video_pipeline(), OF_VIDEOS, {"class_labels": [1, 2]}),
    }


@pytest.mark.parametrize("name", ["classes", "heroes", "scales", "videos"])
def test_any_argument_is_taken_or_refused(
    pipelines: dict[str, Any], name: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    pipe, arguments, right = pipelines[name]
    monkeypatch.setattr(type(pipe.sampler), "sample", at_the_door)

    @SETTINGS
    @given(changes=st.dictionaries(st.sampled_from(arguments), anything, min_size=1, max_size=2))
    def call(changes: dict[str, Any]) -> None:
        state = torch.get_rng_state()
        call = right | {"seed": 0} | changes
        taken_or_refused(lambda: pipe(**call))
        if call["seed"] is not None:
            assert torch.equal(state, torch.get_rng_state())

    call()


@pytest.mark.parametrize(
    ("wrong", "message"),
    [
        ({"seed": [1]}, "seed is a list of 1, but 2 images"),
        ({"seed": "x"}, "seed must be an integer"),
        ({"generator": [torch.Generator()] * 3}, "generator is a list of 3, but 2 images"),
        ({"num_images_per_prompt": MAX_IMAGES}, "draws at most 65536 images, got 2 times 65536"),
        ({"num_images_per_prompt": MAX_IMAGES + 1}, "num_images_per_prompt must be at most 65536"),
    ],
)
def test_seeds_and_numbers_are_checked_before_prompts_are_encoded(
    pipelines: dict[str, Any], wrong: dict[str, Any], message: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    pipe, _, right = pipelines["heroes"]
    monkeypatch.setattr(pipe.conditioner, "encode", lambda **_: pytest.fail("encoded"))
    with pytest.raises(ValueError, match=message):
        pipe(**right, **wrong)


def test_a_drawing_takes_or_refuses_any_argument(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(ImagePipeline, "from_pretrained", lambda name: tiny_hero_pipeline())
    monkeypatch.setattr(NextTokenSampler, "sample", at_the_door)
    studio, right = Studio(), {"model": "tiny", "prompt": "orc", "sampler": "next-token"}
    names = ["prompt", "sampler", "seed", "guidance_scale", "temperature", "num_images"]

    @SETTINGS
    @given(changes=st.dictionaries(st.sampled_from(names), anything, min_size=1, max_size=2))
    def draw(changes: dict[str, Any]) -> None:
        taken_or_refused(lambda: list(studio.draw(**(right | changes))))
        assert not studio._busy.locked()

    draw()


WHOLE = {
    "jacobi": ["window"],
    "draft-model": ["num_drafts"],
    "drafted-jacobi": ["window", "num_sweeps"],
    "grouped-speculative": ["window", "group_size"],
    "lantern": ["k", "depth", "branching", "num_nodes"],
    "zipar": ["window"],
}


@pytest.mark.parametrize(("name", "setting"), [(name, one) for name, settings in WHOLE.items() for one in settings])
def test_a_huge_setting_is_cut_to_the_image_or_refused(name: str, setting: str) -> None:
    pipe = tiny_pipeline(sampler=sampler_class(name)(), drafter=tiny_backbone())
    call = {"class_labels": 3, "seed": 0, "output_type": "codes", setting: 10**5000}
    drawn = taken_or_refused(lambda: pipe(**call))
    assert drawn is None or bool((drawn.codes >= 0).all())


PICTURE = Image.new("RGB", (8, 8))
CORNERS: list[Any] = [
    None, True, -1, 0, 10**5000, -(10**400), 2**64, 10**9, math.nan, math.inf, 1e300, 2j, Fraction(10**400), "", "x" * 20_000, "\ud800", b"x",
    [], [None], [[]], (), [PICTURE, 3], [PICTURE, Image.new("RGB", (3, 9))], [[PICTURE], []], [3] * 70_000, range(10**400), {}, {1}, object(),
    len, iter([]), np.zeros((2, 2)), np.zeros(0), np.array([None]), torch.zeros(3), torch.zeros(0, 3, 8, 8), torch.ones(3, 8, 8),
    torch.full((1, 1, 3, 8, 8), math.nan), torch.zeros(3, device="meta"), torch.zeros(1).expand(10**9), torch.zeros((), dtype=torch.complex64),
]  # fmt: skip


@pytest.mark.parametrize("name", ["classes", "heroes", "scales", "videos"])
def test_every_argument_meets_every_corner(
    pipelines: dict[str, Any], name: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    pipe, arguments, right = pipelines[name]
    monkeypatch.setattr(type(pipe.sampler), "sample", at_the_door)
    for argument in arguments if name != "heroes" else ["prompt"]:  # the others are those of classes
        for value in CORNERS:
            taken_or_refused(lambda: pipe(**(right | {"seed": 0, argument: value})))  # noqa: B023 - called at once


def test_numbers_of_other_libraries_draw_as_their_own() -> None:
    pipe, asked = tiny_pipeline(), {"class_labels": 3, "seed": 0, "output_type": "codes"}
    half = pipe(**asked, temperature=0.5, top_p=0.5, top_k=3).codes
    assert torch.equal(pipe(**asked, temperature=Fraction(1, 2), top_p=np.float16(0.5), top_k=np.int8(3)).codes, half)
    assert type(pipe.sampler.replace(top_k=np.int8(3)).top_k) is int

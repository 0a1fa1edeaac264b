"""vargen's samplers inside the library's own ``generate`` call."""

from __future__ import annotations

import pytest
import torch

from tests.adapter_cases import case, read
from vargen.adapters.generate import generate_with
from vargen.samplers.window.jacobi import SpeculativeJacobiSampler
from vargen.samplers.window.next_token import NextTokenSampler

pytestmark = pytest.mark.filterwarnings("ignore::UserWarning")
WINDOW = SpeculativeJacobiSampler(window=4)
EMU35 = {"bos": 1, "eol": 3, "boi": 6, "eoi": 7, "wrapper": 5, "first_code": 40}


def emu3_call(loop, scale: float = 3.0, **settings):
    c = case("emu3")
    negative = {f"negative_prompt_{key.replace('input_', '')}": value for key, value in c.negative.items()}
    call = {"max_new_tokens": 23, "guidance_scale": scale} | ({} if scale == 1 else negative) | settings
    return c.backbone.model.generate(**c.prompts, custom_generate=loop, **call)


@pytest.mark.parametrize("scale", [3.0, 1.0])
def test_greedy_sequences_of_emu3_are_generates(scale: float) -> None:
    """Stateful guidance and the constraint of every step are still in the call; neither is run."""

    def never(row, sequence):
        raise AssertionError("the constraint must not be called")

    outputs = []
    loop = generate_with(WINDOW, grid_size=(4, 4), on_output=outputs.append)
    found = emu3_call(loop, scale, do_sample=False, prefix_allowed_tokens_fn=never)
    assert torch.equal(found[:, 11:], case("emu3").streams[scale])
    assert torch.equal(found[:, :11], case("emu3").prompts["input_ids"])
    assert outputs[0].stats.num_forwards <= 20


def test_sampled_sequences_have_the_law_of_the_call() -> None:
    """Temperature and top-k of the call hold, and a repeated prompt is one image each."""
    loop = generate_with(WINDOW, seed=3, grid_size=(4, 4))
    found = emu3_call(loop, 1.0, do_sample=True, temperature=0.7, top_k=5, num_return_sequences=2)
    c = case("emu3")
    prompts = {key: value.repeat_interleave(2, 0) for key, value in c.prompts.items()}
    sampler = NextTokenSampler(temperature=0.7, top_k=5)
    expected = sampler.sample(c.backbone, prompts, seeds=[3, 4, 5, 6]).codes
    assert torch.equal(found[:, 11:], c.backbone.to_stream(expected))
    assert not torch.equal(found[0], found[1])


def test_greedy_sequences_of_glm_image_are_generates() -> None:
    """The grids come from the processor's image_grid_thw."""
    c, (io, _) = case("glm_image"), read("glm_image")
    found = c.backbone.model.generate(
        **{key: value for key, value in c.prompts.items() if key != "image_grid_thw"},
        image_grid_thw=io["image_grid_thw"],
        images_per_sample=io["images_per_sample"],
        custom_generate=generate_with(WINDOW),
        do_sample=False,
        max_new_tokens=17,
    )
    assert torch.equal(found[:, 11:27], c.greedy[1.0])
    assert found[:, 27].tolist() == [65, 65]  # the end token


def test_greedy_sequences_of_emu35_are_generates() -> None:
    c = case("emu3_5")
    found = c.backbone.model.generate(
        **c.prompts,
        negative_prompt_ids=c.negative["input_ids"],
        guidance_scale=3.0,
        custom_generate=generate_with(WINDOW, family="emu3.5", grid_size=(4, 4), token_ids=EMU35),
        do_sample=False,
        max_new_tokens=20,
    )
    assert torch.equal(found[:, 8:], c.backbone.to_stream(c.greedy[3.0]))


def test_what_cannot_be_kept_is_refused() -> None:
    loop = generate_with(grid_size=(4, 4))
    with pytest.raises(ValueError, match="RepetitionPenaltyLogitsProcessor has no counterpart"):
        emu3_call(loop, repetition_penalty=1.3)
    with pytest.raises(ValueError, match="an image takes 23 tokens, max_new_tokens is 22"):
        emu3_call(loop, max_new_tokens=22)
    with pytest.raises(ValueError, match="forbids codes of the image"):
        emu3_call(loop, suppress_tokens=[41])
    c = case("chameleon")
    with pytest.raises(ValueError, match=r"works with emu3, emu3.5, glm_image"):
        c.backbone.model.generate(**c.prompts, custom_generate=generate_with(), max_new_tokens=2000)


def test_several_images_of_a_prompt_of_glm_image_have_its_preview_grid() -> None:
    """``generate`` repeats the grids in place: two large ones come first."""
    c, (io, _) = case("glm_image"), read("glm_image")
    call = {key: value[:1] for key, value in c.prompts.items() if key != "image_grid_thw"} | {
        "image_grid_thw": io["image_grid_thw"][:2],
        "images_per_sample": io["images_per_sample"][:1],
        "do_sample": True,
        "top_k": 1,
        "max_new_tokens": 60,
    }
    one = c.backbone.model.generate(**call, custom_generate=generate_with(WINDOW))
    two = c.backbone.model.generate(**call, custom_generate=generate_with(WINDOW), num_return_sequences=2)
    assert torch.equal(two, one.expand(2, -1))
    mixed = call | {"image_grid_thw": torch.tensor([[1, 4, 4], [1, 2, 2], [1, 6, 6], [1, 2, 2]])}
    with pytest.raises(ValueError, match="one size of image"):
        c.backbone.model.generate(**mixed, custom_generate=generate_with(WINDOW))


def test_items_of_the_call_work_or_are_refused() -> None:
    from transformers import StoppingCriteria

    class Never(StoppingCriteria):
        def __call__(self, input_ids, scores, **kwargs):
            return torch.zeros(len(input_ids), dtype=torch.bool)

    loop = generate_with(WINDOW, seed=0, grid_size=(4, 4))
    plain = emu3_call(loop, do_sample=False)
    found = emu3_call(loop, do_sample=False, return_dict_in_generate=True)
    assert torch.equal(found.sequences, plain)
    for given, part in [
        ({"num_beams": 2}, "num_beams=2"),
        ({"return_dict_in_generate": True, "output_scores": True}, "output_scores=True"),
        ({"return_dict_in_generate": True, "output_hidden_states": True}, "output_hidden_states=True"),
        ({"stopping_criteria": [Never()]}, "Never cannot stop an image"),
        ({"max_time": 5.0}, "MaxTimeCriteria cannot stop an image"),
    ]:
        with pytest.raises(ValueError, match=part) as caught:
            emu3_call(loop, do_sample=False, **given)
        assert "\n" not in str(caught.value)


def test_the_cache_goes_by_the_name_of_this_transformers() -> None:
    from vargen.adapters.base import cache_argument

    def old(inputs_embeds, past_key_values=None): ...

    def new(inputs_embeds, cache=None): ...

    assert cache_argument(old) == "past_key_values"
    assert cache_argument(new) == "cache"


@pytest.mark.filterwarnings("error:.*past_key_values.*")
def test_a_body_is_called_without_a_notice_about_its_cache() -> None:
    c = case("emu3")
    assert (
        NextTokenSampler(temperature=0)
        .sample(c.backbone, c.prompts, seeds=[0] * len(c.prompts["input_ids"]))
        .codes.numel()
    )


class Heard:
    """A streamer that keeps what it is told."""

    def __init__(self) -> None:
        self.parts: list[torch.Tensor] = []
        self.ends = 0

    def put(self, value: torch.Tensor) -> None:
        assert self.ends == 0
        self.parts.append(value)

    def end(self) -> None:
        self.ends += 1


def one_prompt() -> dict[str, torch.Tensor]:
    return {key: value[:1] for key, value in case("emu3").prompts.items()}


def test_a_streamer_hears_prompt_tokens_and_end() -> None:
    """As ``generate`` without a loop of one's own tells it: the prompt, one token a call, the end once."""
    heard, model = Heard(), case("emu3").backbone.model
    loop = generate_with(WINDOW, grid_size=(4, 4), streamer=heard)
    found = model.generate(**one_prompt(), custom_generate=loop, do_sample=False, max_new_tokens=23)
    assert torch.equal(heard.parts[0], found[:, :11])
    assert all(part.shape == (1,) for part in heard.parts[1:])
    assert torch.equal(torch.cat(heard.parts[1:]), found[0, 11:])
    assert heard.ends == 1


def test_a_streamer_is_ended_when_the_decode_fails() -> None:
    """A thread that reads it would wait for ever."""

    def fail(output: object) -> None:
        raise RuntimeError("stop")

    heard, model = Heard(), case("emu3").backbone.model
    loop = generate_with(WINDOW, grid_size=(4, 4), streamer=heard, on_output=fail)
    with pytest.raises(RuntimeError, match="stop"):
        model.generate(**one_prompt(), custom_generate=loop, do_sample=False, max_new_tokens=23)
    assert heard.ends == 1


def test_a_streamer_for_several_sequences_or_without_end_is_refused() -> None:
    """One line each."""
    with pytest.raises(ValueError, match="a streamer takes one sequence a call, got 2"):
        emu3_call(generate_with(WINDOW, grid_size=(4, 4), streamer=Heard()), 1.0, do_sample=False)
    with pytest.raises(ValueError, match=r"streamer needs put\(ids\) and end\(\), got object"):
        emu3_call(generate_with(WINDOW, grid_size=(4, 4), streamer=object()), 1.0, do_sample=False)

"""Prompts given as text, or as the outputs of each family's own processor, images in Chameleon's prompts among them."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from PIL import Image

from tests.adapter_cases import case, codes_of
from tests.adapter_processors import chameleon_processor, emu3_processor, glm_image_processor
from vargen import ImagePipeline, wrap
from vargen.adapters.families.emu3_5 import UNCONDITIONAL
from vargen.samplers.window.jacobi import SpeculativeJacobiSampler
from vargen.samplers.window.next_token import NextTokenSampler

PROMPTS = ["a red fox", "the golden castle on the mountain"]
PICTURE = Image.fromarray(np.random.default_rng(0).integers(0, 255, (16, 16, 3), dtype=np.uint8))

pytestmark = pytest.mark.filterwarnings("ignore::UserWarning")


def test_emu3_pipeline_is_generate() -> None:
    """Text in, greedy codes out: the library's loop on the processor's outputs gives the same, negative prompt and all."""
    model, processor = case("emu3").backbone.model, emu3_processor()
    pipe = ImagePipeline.from_transformers(model, processor, grid_size=(4, 4), negative_prompt="lowres, red")
    pipe.set_progress_bar_config(disable=True)
    out = pipe(PROMPTS, temperature=0.0, guidance_scale=3.0, seed=0, window=4, output_type="codes")

    image = {"return_for_image_generation": True, "ratio": "1:1", "image_area": 32 * 32}
    given = {"padding": True, "padding_side": "left", "return_tensors": "pt"}
    inputs = processor(text=PROMPTS, **image, **given)
    negative = processor(text=["lowres, red"] * 2, **image, **given)
    layout, codes = pipe.backbone.layout(), pipe.backbone.code_ids().tolist()
    length = inputs["input_ids"].shape[1]

    def allowed(row, sequence):
        forced = int(layout.forced[len(sequence) - length])
        return codes if forced < 0 else [forced]

    sequences = model.generate(
        input_ids=inputs["input_ids"],
        attention_mask=inputs["attention_mask"],
        negative_prompt_ids=negative["input_ids"],
        negative_prompt_attention_mask=negative["attention_mask"],
        guidance_scale=3.0,
        prefix_allowed_tokens_fn=allowed,
        do_sample=False,
        max_new_tokens=layout.length,
    )
    assert torch.equal(out.codes, codes_of(pipe.backbone, sequences[:, length:]))
    assert torch.equal(pipe.backbone.to_stream(out.codes), sequences[:, length:])
    rows = pipe.backbone.read(inputs)  # the outputs as they are
    assert all(torch.equal(a, b) for a, b in zip(rows, pipe.backbone.read(PROMPTS), strict=True))


def test_emu3_negative_prompt_without_header() -> None:
    model, processor = case("emu3").backbone.model, emu3_processor()
    rows = [torch.tensor([1, 20, 6, 14, 5])]
    full = wrap(model, processor, grid_size=(4, 4), negative_prompt="red").unconditional(rows)[0]
    bare = wrap(model, processor, grid_size=(4, 4), negative_prompt="red", negative_header=False).unconditional(rows)[
        0
    ]
    header = [6, *processor.tokenizer("4*4")["input_ids"], 5]
    assert full.tolist() == [*bare.tolist(), *header]
    assert bare.tolist() == [1, *processor.tokenizer("red")["input_ids"]]


@pytest.mark.parametrize(("form", "header"), [("fixed", [37]), ("grid", [37, 42, 42])])
def test_chameleon_texts_and_processor_outputs_are_the_same_prompt(form: str, header: list[int]) -> None:
    processor = chameleon_processor()
    backbone = wrap(case("chameleon").backbone.model, processor, layout=form, grid_size=(4, 4))
    text = "a red fox"
    rows = backbone.read([text])
    if form == "grid":
        text = f"Generate an image of 16x16 according to the following prompt:\n{text}"
    words = processor.tokenizer(text, add_special_tokens=False)["input_ids"]
    assert rows[0].tolist() == [0, *words, 39, *header]
    outputs = processor(text=[text], padding=True, return_tensors="pt")
    assert torch.equal(backbone.read(outputs)[0], rows[0])
    out = ImagePipeline.from_transformers(backbone.model, processor, layout=form, grid_size=(4, 4))
    out.set_progress_bar_config(disable=True)
    drawn = out(text if form == "fixed" else "a red fox", seed=0, output_type="codes").codes
    sampler = NextTokenSampler(**backbone.sampler_settings())
    assert torch.equal(drawn, sampler.sample(backbone, outputs, seeds=[0]).codes)


def plain_logits(model, ids, **inputs) -> torch.Tensor:
    with torch.no_grad():
        hidden = model.model(input_ids=torch.tensor([ids]), use_cache=False, **inputs).last_hidden_state
        return model.lm_head(hidden)[0, -1]


def test_chameleon_guides_images_and_text_of_a_prompt() -> None:
    """Three branches: u + s_i (i - u) + s (c - i), from plain forwards of the stock body."""
    processor = chameleon_processor()
    model = case("chameleon").backbone.model
    backbone = wrap(model, processor, grid_size=(4, 4), image_guidance_scale=1.7)
    inputs = processor(images=[PICTURE], text=["<image> a red fox"], return_tensors="pt")
    prepared = backbone.prepare(inputs, guidance_scale=3.0)
    assert prepared.branches == 3
    _, out = backbone.open(prepared)
    assert out.logits.shape == (2, 1, 1, 32)
    c, u = out.logits[:, 0, 0]

    ids = [*inputs["input_ids"][0].tolist(), 37]
    codes = model.model.get_image_tokens(inputs["pixel_values"])[0].tolist()
    visual = backbone.code_ids()
    full = plain_logits(model, ids, pixel_values=inputs["pixel_values"])[visual]
    images = plain_logits(model, [0, 37, *codes, 36, 37])[visual]
    nothing = plain_logits(model, [0, 37])[visual]
    expected = nothing + 1.7 * (images - nothing) + 3.0 * (full - images)
    torch.testing.assert_close(u + 3.0 * (c - u), expected, atol=1e-4, rtol=0)
    assert float((nothing + 3.0 * (full - nothing) - expected).abs().max()) > 0.1  # what two branches would give


def test_chameleon_images_and_texts_in_one_batch() -> None:
    processor = chameleon_processor()
    backbone = wrap(case("chameleon").backbone.model, processor, grid_size=(4, 4))
    inputs = processor(
        images=[PICTURE], text=["<image> a red fox", "the golden castle"], padding=True, return_tensors="pt"
    )
    settings = {"guidance_scale": 3.0, "temperature": 0.7}
    expected = NextTokenSampler(**settings).sample(backbone, inputs, seeds=[0, 1])
    out = SpeculativeJacobiSampler(window=5, **settings).sample(backbone, inputs, seeds=[0, 1])
    assert torch.equal(out.codes, expected.codes)
    alone = processor(text=["the golden castle"], return_tensors="pt")  # a prompt without images: two branches do
    assert torch.equal(NextTokenSampler(**settings).sample(backbone, alone, seeds=[1]).codes[0], expected.codes[1])
    with pytest.raises(ValueError, match="room for 0 image tokens"):
        backbone.prepare({**alone, "pixel_values": inputs["pixel_values"]})


def test_glm_image_text_is_generate() -> None:
    """The processor asks for an 18 x 13 preview of a 4 x 3 grid; the first codes suffice."""
    processor, model = glm_image_processor(), case("glm_image").backbone.model
    backbone = wrap(model, processor, grid_size=(4, 3))
    chats = [[{"role": "user", "content": [{"type": "text", "text": text}]}] for text in PROMPTS]
    options = {"target_h": 128, "target_w": 96, "tokenize": True, "return_dict": True, "padding": True}
    inputs = processor.apply_chat_template(chats, return_tensors="pt", **options)
    assert backbone.layout().grids == ((18, 13), (4, 3))
    tail = "<g> 4 3 </g> <g> 1 8 1 3 </g> <s>"
    words = processor.tokenizer(f"<user> {PROMPTS[0]} {tail}", add_special_tokens=False)["input_ids"]
    assert backbone.read(PROMPTS)[0].tolist() == words
    sequences = model.generate(
        **inputs,
        do_sample=False,
        max_new_tokens=20,
        suppress_tokens=list(range(64, model.config.text_config.vision_vocab_size)),
    )
    for state in SpeculativeJacobiSampler(window=4, temperature=0.0).stream(backbone, PROMPTS, seeds=[0, 1]):
        if int(state.num_committed.min()) >= 20:
            break
    assert torch.equal(state.codes[:, :20], sequences[:, -20:])


def test_emu35_writes_template_and_header() -> None:
    tokenizer = emu3_processor().tokenizer  # the names of Emu3.5's vocabulary that matter are Emu3's
    tokenizer.add_special_tokens({"additional_special_tokens": ["<|extra_100|>"]})
    model = case("emu3_5").backbone.model
    backbone = wrap(model, tokenizer, family="emu3.5", grid_size=(4, 4))
    assert backbone.tokens == {"bos": 1, "eol": 3, "boi": 6, "eoi": 7, "wrapper": 5, "first_code": 40}
    tokenizer_ids = {
        word: tokenizer.convert_tokens_to_ids(word) for word in ("red", "4", "*", "USER:", "<|extra_100|>")
    }
    row = backbone.read(["red"])[0].tolist()
    header = [6, tokenizer_ids["4"], tokenizer_ids["*"], tokenizer_ids["4"], 5]
    assert row[-5:] == header
    assert row[0] == 1
    assert row.index(tokenizer_ids["USER:"]) + 1 == row.index(tokenizer_ids["red"])
    other = backbone.unconditional([torch.tensor(row)])[0].tolist()
    assert other == [*tokenizer(UNCONDITIONAL, add_special_tokens=False)["input_ids"], *header]
    assert tokenizer_ids["red"] not in other

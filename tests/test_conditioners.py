"""Prompts and labels become the conditions that backbones read, and bad ones are refused in one line."""

import importlib.util
import types
from typing import Any

import numpy as np
import pytest
import torch

import vargen
from vargen.backbones.llamagen.model import LlamaGenTransformer
from vargen.conditioners.attributes import AttributeConditioner
from vargen.conditioners.class_labels import ClassConditioner, imagenet_names
from vargen.conditioners.t5 import T5CaptionConditioner, left_pad
from vargen.datasets.heroes.compose import caption, complete, parse_prompt

# class labels


def test_imagenet_ids_are_those_of_the_published_demo():
    """LlamaGen's demo classes, by the names torchvision gives them."""
    demo = [207, 360, 387, 974, 88, 979, 417, 279]
    names = ["golden retriever", "otter", "lesser panda", "geyser", "macaw", "valley", "balloon", "Arctic fox"]
    conditioner = ClassConditioner()
    assert conditioner(names).tolist() == demo
    assert conditioner(demo).tolist() == demo
    assert conditioner.encode(class_labels=[207, "macaw", " 387 "]).tolist() == [207, 88, 387]
    assert conditioner(torch.tensor(demo)).dtype == torch.int64
    assert conditioner("Shih_Tzu").tolist() == conditioner("shih tzu").tolist() == [155]
    assert conditioner(["cardigan", "Cardigan"]).tolist() == [474, 264]  # a garment and a dog
    assert len(imagenet_names()) == conditioner.num_classes == 1000


@pytest.mark.parametrize(
    ("label", "message"),
    [
        (1000, r"0\.\.999, got 1000"),
        (-1, r"0\.\.999, got -1"),
        ("1000", r"0\.\.999, got 1000"),
        (1.5, "integer or a class name, got 1.5"),
        (True, "integer or a class name, got True"),
        ("goldn retriever", "'golden retriever'"),
        ("retriever", "'flat-coated retriever'"),
        ("", "empty"),
        ("CARDIGAN", r"Cardigan \(264\) or cardigan \(474\)"),
        ("qqqq", r"unknown class name 'qqqq'; ids"),
        ("9" * 201, "a class name may have 200 characters, got 201"),
        pytest.param(10**5000, r"0\.\.999, got an? (number|integer) of", id="huge"),
        ("\ud800", "half a character"),
    ],
)
def test_bad_labels_are_refused_with_neighbours(label, message):
    with pytest.raises(ValueError, match=message) as error:
        ClassConditioner().encode(class_labels=[label])
    assert "\n" not in str(error.value)


def test_own_class_names_and_their_round_trip(tmp_path):
    conditioner = ClassConditioner(["cat", "big dog"])
    assert conditioner(["Big-Dog", "cat"]).tolist() == [1, 0]
    conditioner.save_pretrained(tmp_path)
    assert ClassConditioner.from_pretrained(tmp_path)(["big dog"]).tolist() == [1]
    with pytest.raises(ValueError, match="'big dog' twice"):
        ClassConditioner(["big dog", "cat", "big dog"])
    with pytest.raises(ValueError, match="imagenet"):
        ClassConditioner("cifar")
    with pytest.raises(ValueError, match="neither"):
        conditioner.encode()
    with pytest.raises(ValueError, match="at least one"):
        conditioner.encode(class_labels=[])


# attributes


class Colours:
    """A vocabulary of two slots."""

    words = types.MappingProxyType({"red": (0, 1), "blue": (0, 2), "big": (1, 3)})

    def parse_prompt(self, text):
        ids = [0, 0]
        for word in text.split():
            if word not in self.words:
                raise ValueError(f"unknown word {word!r}")
            slot, ids_of_word = self.words[word]
            ids[slot] = ids_of_word
        return ids


def test_attribute_ids_of_a_vocabulary():
    conditioner = AttributeConditioner(Colours())
    ids = conditioner(["red big", "blue"])
    assert ids.dtype == torch.int64
    assert ids.tolist() == [[1, 3], [2, 0]]
    assert conditioner("big").tolist() == [[0, 3]]
    with pytest.raises(ValueError, match="'green'"):
        conditioner("green")
    with pytest.raises(ValueError, match="class labels"):
        conditioner.encode(class_labels=[1])


def test_attribute_conditioner_is_saved_by_name(tmp_path):
    conditioner = AttributeConditioner("heroes")
    ids = conditioner("deep elf with a red cloak")
    conditioner.save_pretrained(tmp_path)
    again = AttributeConditioner.from_pretrained(tmp_path)
    assert torch.equal(again("deep elf with a red cloak"), ids)
    assert np.count_nonzero(ids.numpy()) == 2
    with pytest.raises(ValueError, match="nearest known"):
        conditioner("deep elf with a rad cloak")
    with pytest.raises(ValueError, match="VOCABULARIES"):
        AttributeConditioner(Colours()).save_pretrained(tmp_path)
    with pytest.raises(ValueError, match="heroes"):
        AttributeConditioner("villains")
    with pytest.raises(ValueError, match="parse_prompt"):
        AttributeConditioner(3)


def test_attribute_ids_feed_the_backbone():
    ids = AttributeConditioner("heroes")(["deep elf with a red cloak", "minotaur"])
    from vargen.datasets.heroes.compose import HeroAtlas

    atlas = HeroAtlas.load()
    model = LlamaGenTransformer(
        dim=16,
        num_layers=1,
        num_heads=2,
        codebook_size=7,
        grid_size=(2, 2),
        condition_type="attributes",
        num_attributes=atlas.num_attributes,
        num_condition_tokens=len(atlas.slots),
    ).eval()
    _, out = model.open(model.prepare(ids, guidance_scale=2.0))
    assert out.logits.shape == (2, 2, 1, 7)


# captions


def test_left_padding_keeps_the_order_of_real_tokens():
    features = torch.arange(1.0, 11).view(2, 5, 1)
    mask = torch.tensor([[1, 1, 0, 0, 0], [1, 1, 1, 1, 1]], dtype=torch.bool)
    moved, moved_mask = left_pad(features, mask)
    assert moved[..., 0].tolist() == [[0, 0, 0, 1, 2], [6, 7, 8, 9, 10]]
    assert moved_mask.tolist() == [[False, False, False, True, True], [True] * 5]


WORDS = ["a", "red", "fox", "in", "snow", "the", "dog", "on", "grass", "big"]


@pytest.fixture(scope="module")
def tiny_t5():
    transformers = pytest.importorskip("transformers")
    from tokenizers import Tokenizer, models, pre_tokenizers, processors

    vocabulary = {"<pad>": 0, "</s>": 1, "<unk>": 2, **{word: i + 3 for i, word in enumerate(WORDS)}}
    tokenizer = Tokenizer(models.WordLevel(vocabulary, unk_token="<unk>"))
    tokenizer.pre_tokenizer = pre_tokenizers.Whitespace()
    tokenizer.post_processor = processors.TemplateProcessing(single="$A </s>", special_tokens=[("</s>", 1)])
    special = {"pad_token": "<pad>", "eos_token": "</s>", "unk_token": "<unk>"}
    fast = transformers.PreTrainedTokenizerFast(tokenizer_object=tokenizer, **special)
    torch.manual_seed(0)
    config = transformers.T5Config(
        vocab_size=16, d_model=12, d_kv=4, d_ff=16, num_layers=2, num_heads=2, feed_forward_proj="gated-gelu"
    )
    return {"text_encoder": transformers.T5EncoderModel(config).eval(), "tokenizer": fast}


def test_captions_as_infinity_reads_them(tiny_t5):
    """Case is kept, and T is the length of the longest caption of the call."""
    whole = T5CaptionConditioner(**tiny_t5, max_length=6, clean=False, batch_size=1)
    trimmed = T5CaptionConditioner(**tiny_t5, max_length=6, clean=False, lower_case=False, trim=True, batch_size=1)
    assert trimmed.clean(" A Red Fox ") == "A Red Fox"
    assert whole.clean(" A Red Fox ") == "a red fox"
    prompts = ["a fox", "fox"]
    features, mask = whole.encode(prompts)
    short, words = trimmed.encode(prompts)
    longest = int(mask.sum(1).max())
    assert longest < 6
    assert short.shape[1] == longest
    assert torch.equal(short, features[:, 6 - longest :])
    assert torch.equal(words, mask[:, 6 - longest :])


def test_captions_are_encoded_alone_and_left_padded(tiny_t5):
    encoder = tiny_t5["text_encoder"]
    conditioner = T5CaptionConditioner(**tiny_t5, max_length=6, clean=False, batch_size=2)
    captions = ["a Red fox", "the dog on the big grass in the snow", " fox "]
    features, mask = conditioner(captions)
    assert features.shape == (3, 6, 12)
    assert mask.sum(1).tolist() == [4, 6, 2]  # end token counted; the long caption is cut
    for row, words in enumerate([["a", "red", "fox"], ["the", "dog", "on", "the", "big"], ["fox"]]):
        ids = torch.tensor([[WORDS.index(word) + 3 for word in words] + [1]])
        with torch.no_grad():
            alone = encoder(input_ids=ids).last_hidden_state[0]
        torch.testing.assert_close(features[row, 6 - len(alone) :], alone, atol=1e-5, rtol=0)
        assert (features[row, : 6 - len(alone)] == 0).all()
        assert mask[row].tolist() == [False] * (6 - len(alone)) + [True] * len(alone)


def test_captions_feed_the_backbone(tiny_t5):
    conditioner = T5CaptionConditioner(**tiny_t5, max_length=6, clean=False)
    model = LlamaGenTransformer(
        dim=16,
        num_layers=1,
        num_heads=2,
        codebook_size=7,
        grid_size=(2, 2),
        condition_type="caption",
        caption_dim=12,
        num_condition_tokens=6,
    ).eval()
    torch.nn.init.normal_(model.output.weight)
    condition = conditioner(["a red fox", "dog"])
    _, out = model.open(model.prepare(condition, guidance_scale=2.0))
    with torch.no_grad():
        expected = model(torch.zeros(2, 4, dtype=torch.int64), condition)[:, :1]
    torch.testing.assert_close(out.logits[0], expected, atol=1e-5, rtol=0)


def test_caption_conditioner_round_trip(tiny_t5, tmp_path):
    conditioner = T5CaptionConditioner(**tiny_t5, max_length=6, clean=False)
    conditioner.save_pretrained(tmp_path)
    again = T5CaptionConditioner.from_pretrained(tmp_path)
    assert again.config.max_length == 6
    for ours, theirs in zip(conditioner(["a big dog"]), again(["a big dog"]), strict=True):
        assert torch.equal(ours, theirs)
    half = T5CaptionConditioner.from_pretrained(tmp_path, torch_dtype=torch.bfloat16)
    features, _ = half("fox")
    assert features.dtype == half.dtype == torch.bfloat16


def test_caption_conditioner_of_a_published_encoder_saves_its_name_only(tmp_path):
    conditioner = T5CaptionConditioner(model_name="google/flan-t5-xl")
    assert conditioner.to(torch.bfloat16).dtype == torch.bfloat16
    conditioner.save_pretrained(tmp_path)
    assert [path.name for path in tmp_path.iterdir()] == ["conditioner_config.json"]
    again = T5CaptionConditioner.from_pretrained(tmp_path)
    assert (again.config.model_name, again.config.max_length) == ("google/flan-t5-xl", 120)
    assert again.text_encoder is None


def test_an_encoder_that_cannot_be_loaded_is_named(tmp_path):
    with pytest.raises(OSError, match=f"cannot load the text encoder {tmp_path}"):
        T5CaptionConditioner(model_name=str(tmp_path), clean=False)("fox")


def test_bad_captions_are_refused(tiny_t5):
    conditioner = T5CaptionConditioner(**tiny_t5)
    with pytest.raises(ValueError, match="empty"):
        conditioner(["fox", "  "])
    with pytest.raises(ValueError, match="captions, not class labels"):
        conditioner(3)
    with pytest.raises(ValueError, match="a caption may have 2000 characters, got 2001"):
        conditioner("a" * 2001)
    with pytest.raises(ValueError, match="half a character"):
        conditioner("a fox\ud800")
    with pytest.raises(ValueError, match="takes a prompt, a label or a list"):
        conditioner({"a fox"})
    with pytest.raises(ValueError, match="at most 65536 entries"):
        conditioner(["fox"] * 65537)
    with pytest.raises(ValueError, match="belong together"):
        T5CaptionConditioner(text_encoder=tiny_t5["text_encoder"])


CLEANED = [
    ("  A Dog   on the Grass ", "a dog on the grass"),
    ("see https://example.com/x the <b>red</b> fox", "see the red fox"),
    ("fox &lt;and&gt; dog", "fox dog"),
    ("“quoted” — dash", '"quoted" - dash'),
    ("photo_123.jpg of a cat @someone", "of a cat"),
    ("a cat 猫 (cute)", "a cat cute"),
    ("this-is-my-cute-cat", "this is my cute cat"),
    ("free shipping on 100x200 posters", "on posters"),
]


@pytest.mark.parametrize(("caption", "expected"), CLEANED)
def test_captions_are_cleaned(caption, expected, tiny_t5):
    pytest.importorskip("ftfy")
    pytest.importorskip("bs4")
    assert T5CaptionConditioner(**tiny_t5).clean(caption) == expected


def test_markup_that_cannot_be_read_is_refused(tiny_t5):
    pytest.importorskip("ftfy")
    pytest.importorskip("bs4")
    with pytest.raises(ValueError, match="mark-up that cannot be read"):
        T5CaptionConditioner(**tiny_t5)("a fox <![ in the snow")


def test_missing_libraries_are_named(monkeypatch, tiny_t5):
    found = importlib.util.find_spec
    conditioner = T5CaptionConditioner(**tiny_t5)
    monkeypatch.setattr("vargen.conditioners.captions.find_spec", lambda name: None if name == "ftfy" else found(name))
    with pytest.raises(ImportError, match=r"ftfy; pip install 'vargen\[transformers\]'"):
        conditioner("a fox")
    monkeypatch.setattr("vargen.conditioners.t5.find_spec", lambda name: None)
    with pytest.raises(ImportError, match="transformers"):
        T5CaptionConditioner(clean=False)("a fox")


@pytest.mark.slow
def test_what_a_prompt_leaves_open_is_decided_by_the_seed_of_each_image() -> None:
    pipe = vargen.ImagePipeline.from_pretrained("heroes32-nar", conditioner=AttributeConditioner(fill=True))
    pipe.set_progress_bar_config(disable=True)
    settings: dict[str, Any] = {"seed": 5, "output_type": "codes"}
    filled = pipe(["an orc", "a mummy with a trident"], num_images_per_prompt=2, **settings).codes
    wishes = [
        parse_prompt(prompt) for prompt in ("an orc", "an orc", "a mummy with a trident", "a mummy with a trident")
    ]
    spelled = [caption(wish, empty=True) for wish in complete(np.stack(wishes), np.arange(5, 9))]
    plain = vargen.ImagePipeline(**{**pipe.components, "conditioner": AttributeConditioner()})
    plain.set_progress_bar_config(disable=True)
    assert len(set(spelled)) == 4
    assert torch.equal(plain(spelled, **settings).codes, filled)
    assert not torch.equal(plain(["an orc"] * 2, **settings).codes, filled[:2])

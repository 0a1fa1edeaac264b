"""Original layouts as they are downloaded: shards and single files, vocabularies, verify and convert, and what is refused."""

from __future__ import annotations

import json
import re
from collections.abc import Iterator
from contextlib import contextmanager
from functools import cache
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import save_file
from torch import Tensor

from tests.test_original_layouts import EMU3, HEADS, IDS, JANUS, emu3_weights, janus_weights
from vargen import ImagePipeline
from vargen.adapters.families import emu3_layout, janus_layout
from vargen.adapters.families.emu3_tokenizer import PIECES, VISION, read_vocabulary
from vargen.adapters.families.janus_checkpoints import NAMES, ROLES, load_janus
from vargen.adapters.original import load_original_model
from vargen.adapters.tiny import tiny_janus
from vargen.checkpoints.families import guess_family
from vargen.checkpoints.folders import family_of
from vargen.checkpoints.reader import CheckpointError, load_original
from vargen.checkpoints.verify import convert_checkpoint, verify_checkpoint


def write_shards(folder: Path, weights: dict[str, Tensor], form: str, count: int = 3) -> Path:
    """Shards and index as the hub has them."""
    safe = form == "safetensors"
    stem, ending = ("model", "safetensors") if safe else ("pytorch_model", "bin")
    places: dict[str, str] = {}
    for number in range(count):
        name = f"{stem}-{number + 1:05d}-of-{count:05d}.{ending}"
        part = {key: weights[key].contiguous() for key in sorted(weights)[number::count]}
        save_file(part, folder / name) if safe else torch.save(part, folder / name)
        places |= dict.fromkeys(part, name)
    index = folder / f"{stem}.{ending}.index.json"
    index.write_text(json.dumps({"metadata": {}, "weight_map": places}))
    return index


@contextmanager
def refused(*parts: str) -> Iterator[None]:
    """One line that holds these parts."""
    with pytest.raises(ValueError, match=re.escape(parts[0])) as caught:
        yield
    message = str(caught.value)
    assert "\n" not in message
    assert all(part in message for part in parts), message


def same(ours: Any, theirs: Any) -> None:
    found, wanted = ours.state_dict(), theirs.state_dict()
    assert found.keys() == wanted.keys()
    assert all(torch.equal(found[key], wanted[key]) for key in wanted)


# Janus


@cache
def words() -> str:
    """The tiny vocabulary under the authors' names, without their beginning of sentence, as their file is."""
    from tokenizers import Tokenizer

    text = tiny_janus()[1].tokenizer.backend_tokenizer.to_str()
    old = {"<pad>": NAMES["pad"], "<s>": NAMES["bos"], "</s>": NAMES["eos"]}
    for name, new in old.items():
        text = text.replace(json.dumps(name), json.dumps(new))
    stored = json.loads(text) | {"post_processor": None}
    vocabulary = stored["model"]["vocab"]
    for role, name in zip(ROLES, ("User:", "Assistant:"), strict=True):
        vocabulary[f"{role}:"] = vocabulary.pop(name)
    return str(Tokenizer.from_str(json.dumps(stored)).to_str())


TINY = {
    "text_config": {"num_attention_heads": 4, "num_key_value_heads": 2},
    **HEADS,
}


@pytest.fixture
def janus_folder(tmp_path: Path) -> Path:
    """A tiny Janus with a vocabulary, as its authors would publish it."""
    model, _ = tiny_janus()
    folder = tmp_path / "janus"
    folder.mkdir()
    write_shards(folder, janus_layout.to_official(model.state_dict()), "bin")
    (folder / "tokenizer.json").write_text(words())
    language = {"num_attention_heads": 4, "num_key_value_heads": 2, "max_position_embeddings": 256}
    config = {"model_type": "multi_modality", "language_config": language, "auto_map": {"AutoModel": "run.Me"}}
    (folder / "config.json").write_text(json.dumps(config))
    (folder / "run.py").write_text("raise SystemExit('code of a model folder ran')")
    return folder


def test_a_janus_folder_is_the_pipeline_of_the_converted_model(janus_folder: Path) -> None:
    pipe = ImagePipeline.from_original(janus_folder, config=HEADS)
    model, _ = tiny_janus()
    prompts = ["a red fox", "the golden castle on a mountain"]
    ids = pipe.backbone.encode(prompts)
    assert ids.input_ids[0].tolist()[-1] == 3
    assert int(ids.input_ids[1][0]) == 1  # BOS, which the authors' tokenizer class adds
    same(pipe.backbone.model, model)
    pipe.set_progress_bar_config(disable=True)
    out = pipe(prompts, seed=3)
    wanted = ImagePipeline.from_transformers(model, pipe.backbone.processor)
    wanted.set_progress_bar_config(disable=True)
    expected = wanted(prompts, seed=3)
    assert torch.equal(out.codes, expected.codes)
    assert type(pipe.sampler) is type(wanted.sampler)
    assert pipe.sampler.guidance_scale == 5.0
    assert pipe.sampler.top_k == 0
    assert [image.size for image in out.images] == [(16, 16)] * 2


def test_prompts_are_the_authors_text(janus_folder: Path) -> None:
    _, processor, _ = load_original_model(janus_folder, {"config": HEADS})
    chat = [{"role": "user", "content": [{"type": "text", "text": "a fox"}]}]
    assert processor.apply_chat_template(chat, add_generation_prompt=True) == "<|User|>: a fox\n\n<|Assistant|>:"
    _, older, _ = load_original_model(janus_folder, {"config": HEADS, "roles": ("User", "Assistant")})
    chat.append({"role": "assistant", "content": [{"type": "text", "text": "ok"}]})
    assert older.apply_chat_template(chat) == "User: a fox\n\nAssistant: ok"
    with refused("roles must be two names"):
        load_original_model(janus_folder, {"config": HEADS, "roles": ("{{ 1 }}'",)})


@pytest.mark.parametrize("form", ["safetensors", "bin", "one.safetensors", "one.bin", "file"])
def test_every_form_of_the_files_gives_the_same_model(form: str, tmp_path: Path) -> None:
    weights = janus_weights()
    path = tmp_path
    if form in ("safetensors", "bin"):
        write_shards(tmp_path, weights, form)
    elif form == "one.bin":
        torch.save(weights, tmp_path / "pytorch_model.bin")
    else:
        path = tmp_path / ("model.safetensors" if form == "one.safetensors" else "any name.safetensors")
        save_file(weights, path)
    (tmp_path / "config.json").write_text((JANUS / "config.json").read_text())
    pipe = ImagePipeline.from_original(path, config=HEADS, token_ids=IDS)
    same(pipe.backbone.model, load_janus(dict(weights), config=TEXT | HEADS, token_ids=IDS))
    with refused("lacks tokenizer.json", "pipe.sampler.sample"):
        pipe("a fox")
    prompt = torch.tensor([[0, 9, 8, 3]])
    drawn = pipe.sampler.sample(pipe.backbone, prompt, seeds=[0], tokenizer=pipe.tokenizer)
    assert drawn.codes.shape == (1, 16)


TEXT = {"text_config": {"num_attention_heads": 4}}


def test_weights_are_taken_over_not_copied(tmp_path: Path) -> None:
    """One times the file: the tensors of the model are those that were mapped from it."""
    weights = {key: value.to(torch.bfloat16) for key, value in janus_weights().items()}
    read = {key: value.clone() for key, value in weights.items()}
    model = load_janus(read, config=TEXT | HEADS, token_ids=IDS)
    assert model.dtype == torch.bfloat16  # the file's
    held = {value.untyped_storage().data_ptr() for value in model.state_dict().values()}
    lost = {key for key, value in read.items() if value.untyped_storage().data_ptr() not in held}
    assert lost == {key for key in read if key.endswith("codebook_used") or ".attn_pool." in key}
    assert load_janus(read, config=TEXT | HEADS, token_ids=IDS, dtype=torch.float32).dtype == torch.float32


def test_janus_keys_are_strict() -> None:
    weights = janus_weights()

    def load(state: dict[str, Tensor], **options: Any) -> Any:
        return load_janus(state, **({"config": TEXT | HEADS, "token_ids": IDS} | options))

    for key in (
        "gen_head.vision_head.bias",
        "vision_model.vision_tower.blocks.1.attn.qkv.bias",
        "aligner.layers.2.bias",
    ):
        with refused("Janus in its authors' layout", "1 missing key", key):
            load({name: value for name, value in weights.items() if name != key})
    for key in ("gen_head.spare", "spare", "gen_vision_model.decoder.spare", "language_model.model.layers.0.spare"):
        with refused("1 unexpected key", key):
            load(weights | {key: torch.zeros(1)})
    wide = torch.zeros(65, 48)
    with refused("gen_head.vision_head.weight is (65, 48) in the file", "(64, 48)"):
        load(weights | {"gen_head.vision_head.weight": wide})
    with refused("is int64 in the file"):
        load(weights | {"gen_embed.weight": weights["gen_embed.weight"].long()})
    with refused("expected a Janus model in its authors' layout", "Emu3 vision tokenizer"):
        load(emu3_weights()[1])
    with refused("attention heads of a Janus of width 48 (text_config)", "config.json"):
        load(weights, config=HEADS)
    with refused("attention heads of a Janus of width 32 (vision_config)"):
        load(weights, config=TEXT)
    with refused("must divide the width 48, got 5"):
        load(weights, config=HEADS | {"text_config": {"num_attention_heads": 5}})
    with refused("token ids of bos, pad, begin_of_image", "tokenizer.json"):
        load(weights, token_ids=None)
    with refused("must be in 0..95", "got 96"):
        load(weights, token_ids=IDS | {"pad": 96})
    with refused("no setting 'boi'"):
        load(weights, token_ids={"boi": 1})


def test_both_maps_lose_nothing() -> None:
    weights = {k: v for k, v in janus_weights().items() if "attn_pool" not in k and "codebook_used" not in k}
    back = janus_layout.to_official(janus_layout.to_transformers(weights))
    assert back.keys() == weights.keys()
    assert all(torch.equal(back[key], weights[key]) for key in weights)
    language, vision = emu3_weights()
    assert emu3_layout.to_official(emu3_layout.to_transformers(language)).keys() == language.keys()
    again = emu3_layout.vq_to_official(emu3_layout.vq_to_transformers(vision))
    assert again.keys() == vision.keys()
    assert all(torch.equal(again[key], vision[key]) for key in vision)


# shards


def test_shards_and_index_must_agree(tmp_path: Path) -> None:
    weights = {f"layers.{i}.weight": torch.full((2,), float(i)) for i in range(6)}
    index = write_shards(tmp_path, weights, "safetensors")
    for path in (tmp_path, index):
        assert {k: v.tolist() for k, v in load_original(path).items()} == {k: v.tolist() for k, v in weights.items()}
    stored = json.loads(index.read_text())
    first = stored["weight_map"]["layers.0.weight"]
    held = {key: weights[key] for key, place in stored["weight_map"].items() if place == first}
    save_file(held | {"spare": torch.zeros(1)}, tmp_path / first)
    with refused("holds, beyond the index, spare"):
        load_original(tmp_path)
    del held["layers.0.weight"]
    save_file(held, tmp_path / first)
    with refused("lacks layers.0.weight"):
        load_original(tmp_path)
    (tmp_path / first).unlink()
    with refused(f"lacks the shard {first}"):
        load_original(tmp_path)
    for place in ("../secret.safetensors", "/etc/passwd", 3):
        index.write_text(json.dumps({"weight_map": {"a": place}}))
        with refused("which is not the name of a file"):
            load_original(tmp_path)
    index.write_text("{")
    with refused("not valid JSON"):
        load_original(tmp_path)


def test_nothing_in_a_shard_is_unpickled(tmp_path: Path) -> None:
    ran = tmp_path / "ran"

    class Runs:
        def __reduce__(self) -> Any:
            return (Path.touch, (ran,))

    index = write_shards(tmp_path, dict(janus_weights()), "bin", count=2)
    shard = tmp_path / "pytorch_model-00001-of-00002.bin"
    torch.save(torch.load(shard, weights_only=True) | {"extra": Runs()}, shard)
    with refused("pickled code"):
        ImagePipeline.from_original(tmp_path, config=TEXT | HEADS, token_ids=IDS)
    assert index.is_file()
    assert not ran.exists()


# Emu3


def write_emu3_vocabulary(folder: Path, codes: int) -> list[bytes]:
    """Bytes, some merges, special tokens and codes in the form of the authors' two files."""
    import base64

    merges = [b"ed", b" r", b" red", b"\xc3\xa9", b"fo", b"fox", b" a", b"12"]
    pieces = [bytes([byte]) for byte in range(256)] + merges
    lines = [f"{base64.b64encode(piece).decode()} {rank}" for rank, piece in enumerate(pieces)]
    (folder / PIECES).write_text("\n".join(lines) + "\n")
    names = ["<|image token|>", "<|image start|>", "<|image end|>"]
    (folder / VISION).write_text("\n".join([*names, *(emu3_layout.CODE.format(i) for i in range(codes))]) + "\n")
    return pieces


SPECIAL_IDS = {"pad_token_id": 264, "eol_token_id": 467, "eof_token_id": 468, "bos_token_id": 470, "eos_token_id": 471}
SPECIAL_IDS |= {"img_token_id": 472, "boi_token_id": 473, "eoi_token_id": 474}


@cache
def big_emu3() -> Any:
    """A tiny Emu3 whose embedding has a row for every token of ``write_emu3_vocabulary``."""
    language, vision = emu3_weights()
    rows = 475 + 48
    generator = torch.Generator().manual_seed(0)
    tables = {"model.embed_tokens.weight": 1.0, "lm_head.weight": 0.3}
    drawn = {name: scale * torch.randn(rows, 48, generator=generator) for name, scale in tables.items()}
    return language | drawn, vision


@pytest.fixture
def emu3_folder(tmp_path: Path) -> Path:
    folder = tmp_path / "emu3"
    (folder / "vision_tokenizer").mkdir(parents=True)
    language, vision = big_emu3()
    write_shards(folder, language, "safetensors", count=2)
    save_file(vision, folder / "vision_tokenizer" / "model.safetensors")
    stored = json.loads((EMU3 / "config.json").read_text()) | SPECIAL_IDS | {"vocab_size": 523}
    (folder / "config.json").write_text(json.dumps(stored))
    write_emu3_vocabulary(folder, 48)
    return folder


def test_an_emu3_folder_is_a_pipeline(emu3_folder: Path) -> None:
    pipe = ImagePipeline.from_original(emu3_folder, grid_size=(4, 5))
    pipe.set_progress_bar_config(disable=True)
    ids = pipe.backbone.encode(["a red fox"]).input_ids[0].tolist()
    text = [ord("a"), 258, ord(" "), 261]  # " red", " " and "fox": what the merges make of the text
    digits = [ord("4"), ord("*"), ord("5")]
    assert ids == [470, *text, 473, *digits, 472]
    out = pipe("a red fox", seed=1, guidance_scale=3.0)
    assert out.codes.shape == (1, 20)
    assert out.images[0].size == (10, 8)
    assert pipe.sampler.guidance_scale == 3.0
    assert pipe.sampler.top_k == 48  # 2048 of the authors, but no more than there are
    wanted = ImagePipeline.from_transformers(pipe.backbone.model, pipe.backbone.processor, grid_size=(4, 5))
    wanted.set_progress_bar_config(disable=True)
    assert torch.equal(wanted("a red fox", seed=1, guidance_scale=3.0).codes, out.codes)


def test_emu3_reads_text_as_its_authors_do(emu3_folder: Path) -> None:
    """Merges by rank inside the pieces of the published pattern, each digit alone, accents composed, special names whole."""
    words = read_vocabulary(emu3_folder)
    cases = {
        "a red fox": [97, 258, 32, 261],
        "12": [49, 50],  # a merge that the pattern forbids
        "cafe\u0301": [*b"caf", 259],  # composed to one letter, whose two bytes are a piece
        "<|extra_203|>fox<|visual token 000003|>": [470, 261, 478],
        "  red\n": [32, 258, 10],
    }
    for text, ids in cases.items():
        assert words.encode(text, add_special_tokens=False).ids == ids, text
    assert words.decode(words.encode("a red caf\u00e9").ids) == "a red caf\u00e9"


def test_a_damaged_vocabulary_is_one_line(emu3_folder: Path) -> None:
    file = emu3_folder / PIECES
    lines = file.read_text().splitlines()
    for changed, part in (
        ([*lines[:3], "%%% 3", *lines[4:]], "line 4"),
        ([*lines[:3], *lines[4:]], "line 4"),
        (lines[:255], "lacks the piece of byte 255"),
        ([*lines, "YWJj 264"], "is not made of two earlier ones"),
    ):
        file.write_text("\n".join(changed))
        with refused(part):
            read_vocabulary(emu3_folder)
    file.write_text("\n".join([*lines, "YWI= 264"]))  # one piece more: every id behind it moves
    with refused("<|endoftext|> is token 265", "264 of the model"):
        ImagePipeline.from_original(emu3_folder)
    file.write_text("\n".join(lines))
    (emu3_folder / VISION).unlink()
    with refused(VISION):
        ImagePipeline.from_original(emu3_folder)


def test_emu3_without_its_second_repository_draws_codes(emu3_folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (emu3_folder / "vision_tokenizer").rename(emu3_folder.parent / "apart")
    with refused("nothing tells how many of the 523 tokens are codes", "vision_tokenizer"):
        ImagePipeline.from_original(emu3_folder)
    whole = ImagePipeline.from_original(emu3_folder, vision_tokenizer=emu3_folder.parent / "apart", grid_size=(4, 5))
    monkeypatch.setattr(emu3_layout, "VOCABULARY", 523)
    monkeypatch.setattr(emu3_layout, "CODES", 48)
    pipe = ImagePipeline.from_original(emu3_folder, grid_size=(4, 5))
    for each in (whole, pipe):
        each.set_progress_bar_config(disable=True)
    with refused("no pixel decoder", "codes"):
        pipe("a red fox")
    drawn = pipe("a red fox", seed=1, output_type="codes").codes
    assert torch.equal(drawn, whole("a red fox", seed=1, output_type="codes").codes)
    with refused("without its vision tokenizer", "random"):
        pipe.backbone.model.save_pretrained(emu3_folder / "out")


def test_emu3_keys_are_strict(emu3_folder: Path) -> None:
    language, vision = big_emu3()

    def rewrite(state: dict[str, Tensor], file: Path) -> None:
        for old in (*file.parent.glob("*.safetensors"), *file.parent.glob("*.index.json")):
            old.unlink()
        save_file(state, file)

    name, other = "model.layers.1.input_layernorm.weight", "decoder.mid.attn_1.norm.conv_b.bias"
    rewrite({k: v for k, v in vision.items() if k != other}, emu3_folder / "vision_tokenizer" / "model.safetensors")
    with refused("Emu3 in its authors' layout", "1 missing key", f"vision_tokenizer.{other}"):
        ImagePipeline.from_original(emu3_folder)
    rewrite(vision | {"encoder.spare": torch.zeros(1)}, emu3_folder / "vision_tokenizer" / "model.safetensors")
    with refused("1 unexpected key", "vision_tokenizer.encoder.spare"):
        ImagePipeline.from_original(emu3_folder)
    rewrite(vision, emu3_folder / "vision_tokenizer" / "model.safetensors")
    rewrite({k: v for k, v in language.items() if k != name}, emu3_folder / "model.safetensors")
    with refused("1 missing key", name):
        ImagePipeline.from_original(emu3_folder)
    rewrite(language | {"model.layers.1.spare": torch.zeros(1)}, emu3_folder / "model.safetensors")
    with refused("1 unexpected key", "model.layers.1.spare"):
        ImagePipeline.from_original(emu3_folder)


# whose files they are


def test_families_of_original_layouts() -> None:
    def named(state: dict[str, Any]) -> str | None:
        family = guess_family(state)
        return family and family.name

    language, vision = emu3_weights()
    assert named(janus_weights()) == "janus-original"
    assert named(vision) == "emu3-vision-tokenizer"
    assert named(language) == "hf-llama"  # a Llama of 92 rows, as far as keys and shapes tell
    published = language | {"model.embed_tokens.weight": torch.empty(184_622, 48, device="meta")}
    assert named(published) == "emu3-original"
    assert family_of(EMU3, language).name == "emu3-original"  # type: ignore[union-attr]
    converted = {"model.text_model.layers.0.self_attn.q_proj.weight": torch.zeros(1)}
    assert named(converted) == "hf-llama"
    assert named(tiny_janus()[0].state_dict()) == "janus"


def test_other_files_are_refused_by_name(tmp_path: Path) -> None:
    with refused("no folder or file", "download"):
        ImagePipeline.from_original("deepseek-ai/Janus-Pro-1B")
    save_file({"pos_1LC": torch.zeros(1), "lvl_embed.weight": torch.zeros(1)}, tmp_path / "var.safetensors")
    with refused("from_original reads Janus", "VAR transformer (VARTransformer)"):
        ImagePipeline.from_original(tmp_path / "var.safetensors")
    (tmp_path / "config.json").write_text('{"model_type": "janus"}')
    with refused("layout of transformers", "from_transformers"):
        ImagePipeline.from_original(tmp_path)


def test_options_are_checked_before_anything_is_read(tmp_path: Path) -> None:
    (tmp_path / "config.json").write_text('{"model_type": "multi_modality"}')
    with refused("from_original has no setting 'trust_remote_code'"):
        ImagePipeline.from_original(tmp_path, trust_remote_code=True)
    with refused("give dtype or torch_dtype"):
        ImagePipeline.from_original(tmp_path, dtype=torch.float32, torch_dtype=torch.float32)
    with refused("from_original has no setting 'vision_tokenizer'"):
        ImagePipeline.from_original(tmp_path, vision_tokenizer="x")


# verify and convert


@pytest.mark.parametrize(("width", "size", "tensors"), [(2048, "1.3B", 882), (4096, "7B", 936)])
def test_published_janus_verifies_on_meta(width: int, size: str, tensors: int) -> None:
    weights = published_janus(*janus_layout.SIZES[size])
    report = verify_checkpoint(weights)
    assert (report.ok, report.size, report.num_entries) == (True, f"Janus {size}", tensors)
    assert report.num_parameters == {"1.3B": 2_089_232_011, "7B": 7_420_368_523}[size]
    without = {key: value for key, value in weights.items() if ".attn_pool." not in key}
    assert verify_checkpoint(without).ok
    short = {key: value for key, value in weights.items() if key != "gen_head.vision_head.bias"}
    assert verify_checkpoint(short).missing == ["gen_head.vision_head.bias"]


def published_janus(width: int, layers: int, heads: int, hidden: int) -> dict[str, Tensor]:
    """Every official key of the published sizes, written down, not built from transformers' class."""
    from vargen.tokenizers.vq.model import VQTokenizer

    def linear(name: str, rows: int, columns: int, *, bias: bool = True) -> dict[str, tuple[int, ...]]:
        return {f"{name}.weight": (rows, columns)} | ({f"{name}.bias": (rows,)} if bias else {})

    def norm(name: str, size: int) -> dict[str, tuple[int, ...]]:
        return {f"{name}.weight": (size,), f"{name}.bias": (size,)}

    lm, tower, d = "language_model.model", "vision_model.vision_tower", 1024
    shapes: dict[str, tuple[int, ...]] = {f"{lm}.embed_tokens.weight": (102400, width), f"{lm}.norm.weight": (width,)}
    shapes |= {"language_model.lm_head.weight": (102400, width), "gen_embed.weight": (16384, 8)}
    for i in range(layers):
        for part in ("q", "k", "v", "o"):
            shapes |= linear(f"{lm}.layers.{i}.self_attn.{part}_proj", width, width, bias=False)
        for part, size in (("gate", (hidden, width)), ("up", (hidden, width)), ("down", (width, hidden))):
            shapes |= linear(f"{lm}.layers.{i}.mlp.{part}_proj", *size, bias=False)
        shapes |= {f"{lm}.layers.{i}.{part}_layernorm.weight": (width,) for part in ("input", "post_attention")}
    for name, inside in (("aligner", d), ("gen_aligner", 8)):
        shapes |= linear(f"{name}.layers.0", width, inside) | linear(f"{name}.layers.2", width, width)
    shapes |= linear("gen_head.output_mlp_projector", width, width) | linear("gen_head.vision_head", 16384, width)
    shapes |= {f"{tower}.pos_embed": (1, 576, d), f"{tower}.patch_embed.proj.weight": (d, 3, 16, 16)}
    shapes |= {f"{tower}.patch_embed.proj.bias": (d,)} | norm(f"{tower}.norm", d)
    for i in range(24):
        block = f"{tower}.blocks.{i}"
        shapes |= norm(f"{block}.norm1", d) | norm(f"{block}.norm2", d)
        shapes |= linear(f"{block}.attn.qkv", 3 * d, d) | linear(f"{block}.attn.proj", d, d)
        shapes |= linear(f"{block}.mlp.fc1", 4 * d, d) | linear(f"{block}.mlp.fc2", d, 4 * d)
    pool = f"{tower}.attn_pool"
    shapes |= {f"{pool}.latent": (1, 1, d)} | norm(f"{pool}.norm", d) | linear(f"{pool}.q", d, d)
    shapes |= linear(f"{pool}.kv", 2 * d, d) | linear(f"{pool}.proj", d, d)
    shapes |= linear(f"{pool}.mlp.fc1", 4 * d, d) | linear(f"{pool}.mlp.fc2", d, 4 * d)
    weights = {name: torch.empty(shape, device="meta") for name, shape in shapes.items()}
    with torch.device("meta"):
        pixels = VQTokenizer.from_size("VQ-16").state_dict() | {"quantize.codebook_used": torch.empty(65536)}
    return weights | {f"gen_vision_model.{name}": value for name, value in pixels.items()}


def test_published_emu3_verifies_on_meta() -> None:
    with torch.device("meta"):
        d, kv, hidden, rows = 4096, 1024, 14336, 184_622
        shapes = {"model.embed_tokens.weight": (rows, d), "lm_head.weight": (rows, d), "model.norm.weight": (d,)}
        for i in range(32):
            sizes = {"q": (d, d), "k": (kv, d), "v": (kv, d), "o": (d, d)}
            shapes |= {f"model.layers.{i}.self_attn.{n}_proj.weight": size for n, size in sizes.items()}
            sizes = {"gate": (hidden, d), "up": (hidden, d), "down": (d, hidden)}
            shapes |= {f"model.layers.{i}.mlp.{n}_proj.weight": size for n, size in sizes.items()}
            shapes |= {f"model.layers.{i}.{n}_layernorm.weight": (d,) for n in ("input", "post_attention")}
        weights = {name: torch.empty(shape) for name, shape in shapes.items()}
    report = verify_checkpoint(weights)
    assert (report.ok, report.size, report.num_entries) == (True, "Emu3 8B", 291)
    assert report.num_parameters == 8_492_011_520


def test_published_vision_tokenizer_verifies_on_meta() -> None:
    from transformers import Emu3VQVAE, Emu3VQVAEConfig

    with torch.device("meta"):
        weights = emu3_layout.vq_to_official(Emu3VQVAE(Emu3VQVAEConfig(num_attention_heads=1)).state_dict())
    report = verify_checkpoint(weights)
    assert (report.ok, report.size, report.num_entries) == (True, "Emu3-VisionTokenizer", 495)
    assert report.num_parameters == 270_740_287


def test_tiny_files_verify_in_their_own_sizes(emu3_folder: Path) -> None:
    for source in (janus_weights(), emu3_folder, emu3_folder / "vision_tokenizer"):
        report = verify_checkpoint(source)
        assert (report.ok, report.size) == (True, None), report
    bad = janus_weights() | {"gen_embed.weight": torch.full((64, 8), torch.nan)}
    assert verify_checkpoint(bad).not_finite == ["gen_embed.weight"]


def check_converted(folder: Path, out: Path, kind: Any, reader: Any, options: dict[str, Any], **wrapping: Any) -> None:
    convert_checkpoint(folder, out, **options)
    model, processor = kind.from_pretrained(out).eval(), reader.from_pretrained(out)
    ours = ImagePipeline.from_original(folder, **options, **wrapping)
    same(model, ours.backbone.model)
    theirs = ImagePipeline.from_transformers(model, processor, **wrapping)
    for pipe in (ours, theirs):
        pipe.set_progress_bar_config(disable=True)
    drawn = ours("a red fox", seed=5, output_type="codes").codes
    assert torch.equal(drawn, theirs("a red fox", seed=5, output_type="codes").codes)
    assert ours.sampler.config == theirs.sampler.config
    assert not model.config.tie_word_embeddings


def test_a_converted_janus_loads_with_transformers(janus_folder: Path, tmp_path: Path) -> None:
    from transformers import JanusForConditionalGeneration, JanusProcessor

    check_converted(janus_folder, tmp_path / "hf", JanusForConditionalGeneration, JanusProcessor, {"config": HEADS})


def test_a_converted_emu3_loads_with_transformers(emu3_folder: Path, tmp_path: Path) -> None:
    from transformers import Emu3ForConditionalGeneration, Emu3Processor

    check_converted(emu3_folder, tmp_path / "hf", Emu3ForConditionalGeneration, Emu3Processor, {}, grid_size=(4, 5))


def test_no_container_is_passed_over(tmp_path: Path) -> None:
    torch.save({"model": janus_weights(), "ema": janus_weights()}, tmp_path / "all.pt")
    with pytest.raises(CheckpointError, match="leave out the entry 'ema'"):
        convert_checkpoint(tmp_path / "all.pt", tmp_path / "hf", key="ema")


def test_the_command_verifies_and_converts_folders(emu3_folder: Path, tmp_path: Path) -> None:
    from typer.testing import CliRunner

    from vargen.cli.main import app

    (emu3_folder / "vision_tokenizer").rename(tmp_path / "pixels")
    run = CliRunner().invoke(app, ["verify", str(emu3_folder)])
    assert run.exit_code == 0, run.output
    assert "Emu3 model in its authors" in run.output
    arguments = ["convert", str(emu3_folder), str(tmp_path / "out"), "--tokenizer", str(tmp_path / "pixels")]
    run = CliRunner().invoke(app, arguments)
    assert run.exit_code == 0, run.output
    assert (tmp_path / "out" / "model.safetensors").is_file()
    assert (tmp_path / "out" / "tokenizer.json").is_file()

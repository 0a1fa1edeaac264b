"""Which published model family a state dict belongs to, told by its key names.

Used for error messages and by ``verify_checkpoint``; nothing is loaded here.
"""

from __future__ import annotations

from collections.abc import Collection, Iterable, Mapping
from dataclasses import dataclass
from fnmatch import fnmatchcase


@dataclass(frozen=True)
class Family:
    """A published key layout: every pattern of ``all_of`` occurs, none of ``none_of`` does (``fnmatch`` patterns)."""

    name: str
    title: str  # as written in messages
    loader: str  # what reads such a file
    all_of: tuple[str, ...]
    none_of: tuple[str, ...] = ()
    rows: tuple[str, int] | None = None  # a tensor and its first axis, where the keys are those of other families too

    def has_keys(self, names: Collection[str]) -> bool:
        """Whether the keys are those of this layout."""

        def occurs(pattern: str) -> bool:
            return any(fnmatchcase(name, pattern) for name in names)

        return all(occurs(p) for p in self.all_of) and not any(occurs(p) for p in self.none_of)

    def has_rows(self, state_dict: Iterable[str]) -> bool:
        """Whether the sizes are those of this layout; names alone do not tell them."""
        if self.rows is None:
            return True
        name, count = self.rows
        tensor = state_dict.get(name) if isinstance(state_dict, Mapping) else None
        return tuple(getattr(tensor, "shape", ()))[:1] == (count,)


_GPT = ("tok_embeddings.weight", "layers.*.attention.wqkv.weight")
_NO = "no loader in vargen"

# the first match wins, so the more specific layout stands first
_families: list[Family] = [
    Family("nar-video", "NAR video transformer", "NARTransformer", (*_GPT, "output_D.weight")),
    Family("nar", "NAR transformer", "NARTransformer", (*_GPT, "medusa_output.weight")),
    Family("par", "PAR transformer", "PARTransformer", (*_GPT, "spe_tok_embeddings.*")),
    Family("randar", "RandAR transformer", "AnyOrderTransformer", (*_GPT, "pos_instruct_embeddings")),
    Family("controlar", "ControlAR transformer", _NO, (*_GPT, "condition_layers.*")),
    Family(
        "llamagen-t2i",
        "LlamaGen text-to-image transformer",
        "LlamaGenTransformer",
        (*_GPT, "cls_embedding.cap_proj.*"),
    ),
    Family(
        "llamagen-c2i",
        "LlamaGen class-to-image transformer",
        "LlamaGenTransformer",
        (*_GPT, "cls_embedding.embedding_table.weight"),
    ),
    Family(
        "switti", "Switti transformer", "SwittiTransformer", ("text_pooler.weight", "blocks.*.cross_attn.to_kv.weight")
    ),
    Family("mar", "MAR transformer", "MARTransformer", ("diffloss.net.*", "z_proj.weight")),
    Family("xar", "xAR transformer", "XARTransformer", ("encoder_blocks.*", "decoder_blocks.*", "pred.weight")),
    Family("ibq-ar", "IBQ transformer", _NO, ("transformer.tok_emb.weight", "transformer.class_emb.*")),
    Family("nbp", "NBP video transformer", "NBPTransformer", ("transformer.tok_emb.weight",)),
    Family(
        "nbp-tokenizer",
        "NBP video tokenizer",
        "VideoFSQTokenizer",
        ("encoder_layers.*.fn.1.beta", "decoder_layers.*.fn.1.beta"),
    ),
    Family("distilled-decoding", "Distilled Decoding transformer", _NO, ("n_d_embed.weight",)),
    Family("mvar", "M-VAR transformer", _NO, ("pos_1LC", "blocks.*.mamba.*")),
    Family("var", "VAR transformer", "VARTransformer", ("pos_1LC", "lvl_embed.weight")),
    Family("infinity", "Infinity transformer", "InfinityTransformer", ("text_proj_for_sos.ca.*", "cfg_uncond")),
    Family("rar", "RAR transformer", _NO, ("target_aware_pos_embed",)),
    Family("arpg", "ARPG transformer", _NO, ("layers.cross_dec.*", "layers.self_dec.*")),
    Family("lpd", "LPD transformer", _NO, ("token_emb.weight", "mask_token", "fake_latent")),
    Family("var-vqvae", "VAR multi-scale tokenizer", "MultiScaleVQTokenizer", ("quantize.quant_resi.*",)),
    Family(
        "llamagen-vq", "LlamaGen VQ tokenizer", "VQTokenizer", ("quantize.embedding.weight", "*decoder.conv_blocks.*")
    ),
    Family(
        "emu3-vision-tokenizer",
        "Emu3 vision tokenizer",
        "the vision_tokenizer of ImagePipeline.from_original",
        ("quantize.embedding.weight", "decoder.up.*.block.*.norm1.conv_y.weight"),
    ),
    Family("ibq-tokenizer", "IBQ tokenizer", _NO, ("quantize.embedding.weight", "decoder.up.*", "model_ema.decay")),
    Family("taming-vqgan", "taming VQGAN", "VQTokenizer", ("quantize.embedding.weight", "decoder.up.*")),
    Family("taming-gumbel", "taming Gumbel VQGAN", _NO, ("quantize.embed.weight", "decoder.up.*")),
    Family(
        "infinity-vae",
        "Infinity binary tokenizer",
        "MultiScaleBSQTokenizer",
        ("decoder.up.*", "decoder.mid.block_1.*"),
        ("post_quant_conv.*", "quantize.embed*", "*.attn*", "loss.*"),
    ),
    Family(
        "diffusers-vq", "diffusers VQModel", "diffusers.VQModel", ("quantize.embedding.weight", "decoder.up_blocks.*")
    ),
    Family(
        "kl-autoencoder", "KL autoencoder", "load_kl16", ("decoder.up.*", "post_quant_conv.weight"), ("quantize.*",)
    ),
    Family(
        "diffusers-kl", "diffusers AutoencoderKL", "diffusers.AutoencoderKL", ("decoder.up_blocks.*",), ("quantize.*",)
    ),
    Family("patchgan", "PatchGAN discriminator", _NO, ("main.0.weight", "main.11.weight")),
    Family("janus", "Janus model", "vargen.wrap", ("*generation_head.*",)),
    Family(
        "janus-original",
        "Janus model in its authors' layout",
        "ImagePipeline.from_original",
        ("gen_embed.weight", "gen_vision_model.*", "language_model.model.layers.*"),
    ),
    Family("emu3", "Emu3 model", "vargen.wrap", ("*text_model.layers.*.self_attn.q_proj.weight", "*vqmodel.*")),
    Family(
        "emu3-original",
        "Emu3 model in its authors' layout",
        "ImagePipeline.from_original",
        ("model.layers.*.self_attn.q_proj.weight", "model.embed_tokens.weight"),
        rows=("model.embed_tokens.weight", 184_622),
    ),
    Family("hf-llama", "Hugging Face language model", "vargen.wrap", ("*layers.*.self_attn.q_proj.weight",)),
]


def register_family(family: Family) -> None:
    """Add a layout in front of the known ones; a name that exists already is refused.

    Raises:
        ValueError: the name is taken.
    """
    if any(known.name == family.name for known in _families):
        raise ValueError(f"family {family.name!r} is already registered")
    _families.insert(0, family)


def known_families() -> list[Family]:
    """All families, the more specific ones first."""
    return list(_families)


def get_family(name: str) -> Family:
    """Return the family called ``name``.

    Raises:
        ValueError: unknown name.
    """
    for family in _families:
        if family.name == name:
            return family
    raise ValueError(f"unknown family {name!r}; known: {', '.join(f.name for f in _families)}")


def guess_family(keys: Iterable[str]) -> Family | None:
    """Return the family whose key patterns fit, or ``None``; a mapping's shapes are looked at where keys cannot tell.

    >>> guess_family(["tok_embeddings.weight", "layers.0.attention.wqkv.weight", "medusa_output.weight"]).name
    'nar'
    """
    names = list(keys)
    fits = (family for family in _families if family.has_keys(names) and family.has_rows(keys))
    return next(fits, None)

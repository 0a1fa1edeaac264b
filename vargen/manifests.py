"""Check a published checkpoint against what its family and size must contain, and convert it.

A manifest lists every key with its shape. LlamaGen's transformers and tokenizers are built in; others register a
builder.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from fnmatch import fnmatchcase
from pathlib import Path
from typing import Any

from torch import Tensor

from vargen.checkpoints import CheckpointError, load_original
from vargen.families import get_family, guess_family
from vargen.files import atomic_dir

Shape = tuple[int, ...]


@dataclass(frozen=True)
class Manifest:
    """What a checkpoint of one family and size contains."""

    shapes: dict[str, Shape]
    size: str | None = None  # published name, or None when the sizes were only inferred
    num_parameters: int | None = None  # published count, buffers left out
    buffers: tuple[str, ...] = ()  # patterns of entries that are no parameters
    optional: tuple[str, ...] = ()  # patterns of keys that may be there and are ignored


@dataclass(frozen=True)
class VerifyReport:
    """Result of ``verify_checkpoint``; ``ok`` means that keys, shapes and parameter count are the expected ones."""

    path: str
    family: str | None
    size: str | None
    num_entries: int
    num_parameters: int
    expected_parameters: int | None
    missing: list[str] = field(default_factory=list)
    extra: list[str] = field(default_factory=list)
    wrong_shapes: dict[str, tuple[Shape, Shape]] = field(default_factory=dict)  # key -> (in the file, expected)
    not_finite: list[str] = field(default_factory=list)
    dtypes: dict[str, int] = field(default_factory=dict)  # dtype -> number of entries
    note: str = ""

    @property
    def ok(self) -> bool:
        """Whether the file is what its family and size promise."""
        clean = not (self.missing or self.extra or self.wrong_shapes or self.not_finite or self.note)
        return clean and self.expected_parameters in (None, self.num_parameters)


Builder = Callable[[Mapping[str, Tensor]], Manifest]

# name -> (layers, heads, width, hidden width of the feed-forward, parameters c2i, parameters t2i); llamagen table 1
LLAMAGEN_SIZES: dict[str, tuple[int, int, int, int, int, int]] = {
    "GPT-B": (12, 12, 768, 2048, 110_888_448, 112_282_368),
    "GPT-L": (24, 16, 1024, 2816, 342_910_976, 345_031_680),
    "GPT-XL": (36, 20, 1280, 3584, 774_699_520, 777_678_080),
    "GPT-XXL": (48, 24, 1536, 4096, 1_410_972_672, 1_414_940_160),
    "GPT-XXXL": (48, 40, 2560, 6912, 3_893_027_840, 3_902_261_760),
    "GPT-1B": (22, 32, 2048, 5632, 1_199_616_000, 1_205_954_560),
    "GPT-3B": (24, 32, 3200, 8704, 3_096_659_200, 3_110_249_600),
    "GPT-7B": (32, 32, 4096, 11008, 6_614_589_440, 6_635_655_168),
}
LLAMAGEN_VOCABULARY, LLAMAGEN_CLASSES, LLAMAGEN_CAPTION = 16384, 1001, (120, 2048)
VQ_PARAMETERS = {"VQ-16": 71_883_403, "VQ-8": 70_109_835}


def llamagen_shapes(
    num_layers: int, width: int, hidden: int, vocabulary: int, condition: tuple[int] | tuple[int, int]
) -> dict[str, Shape]:
    """List keys and shapes of a LlamaGen transformer.

    Args:
        num_layers: blocks.
        width: model dimension D.
        hidden: width of the feed-forward.
        vocabulary: V.
        condition: ``(rows of the class table,)`` for class-to-image, ``(caption length, caption width)`` for text.
    """
    shapes: dict[str, Shape] = {
        "tok_embeddings.weight": (vocabulary, width),
        "norm.weight": (width,),
        "output.weight": (vocabulary, width),
    }
    if len(condition) == 1:
        shapes["cls_embedding.embedding_table.weight"] = (condition[0], width)
    else:
        shapes["cls_embedding.uncond_embedding"] = condition
        shapes["cls_embedding.cap_proj.fc1.weight"] = (width, condition[1])
        shapes["cls_embedding.cap_proj.fc2.weight"] = (width, width)
    for i in range(num_layers):
        layer = f"layers.{i}."
        shapes[layer + "attention.wqkv.weight"] = (3 * width, width)
        shapes[layer + "attention.wo.weight"] = (width, width)
        shapes[layer + "feed_forward.w1.weight"] = shapes[layer + "feed_forward.w3.weight"] = (hidden, width)
        shapes[layer + "feed_forward.w2.weight"] = (width, hidden)
        shapes[layer + "attention_norm.weight"] = shapes[layer + "ffn_norm.weight"] = (width,)
    return shapes


def _llamagen_manifest(state_dict: Mapping[str, Tensor]) -> Manifest:
    layers = [int(m[1]) for k in state_dict if (m := re.match(r"layers\.(\d+)\.", k))]
    num_layers = 1 + max(layers)
    vocabulary, width = state_dict["tok_embeddings.weight"].shape
    text = any(k.startswith("cls_embedding.cap_proj.") for k in state_dict)
    size = next((n for n, (depth, _, d, *_) in LLAMAGEN_SIZES.items() if (depth, d) == (num_layers, width)), None)
    buffers = ("cls_embedding.uncond_embedding",)
    optional = ("freqs_cis", "*.kv_cache.*")
    if size is not None:
        hidden, *counts = LLAMAGEN_SIZES[size][3:]
        condition = LLAMAGEN_CAPTION if text else (LLAMAGEN_CLASSES,)
        shapes = llamagen_shapes(num_layers, width, hidden, LLAMAGEN_VOCABULARY, condition)
        return Manifest(shapes, size, counts[text], buffers, optional)
    w1 = state_dict.get("layers.0.feed_forward.w1.weight")
    key = "cls_embedding.uncond_embedding" if text else "cls_embedding.embedding_table.weight"
    if w1 is None or key not in state_dict:
        raise CheckpointError(
            f"cannot infer the sizes: {'layers.0.feed_forward.w1.weight' if w1 is None else key} is missing"
        )
    rows = tuple(state_dict[key].shape)
    condition = (rows[0], rows[1]) if text else (rows[0],)
    return Manifest(
        llamagen_shapes(num_layers, width, w1.shape[0], vocabulary, condition), None, None, buffers, optional
    )


def _vq_manifest(state_dict: Mapping[str, Tensor]) -> Manifest:
    from vargen.tokenizers.vq import SIZES
    from vargen.tokenizers.vq_checkpoints import IGNORED, infer_config

    config = infer_config(state_dict)
    named = (n for n, c in SIZES.items() if c["channel_multipliers"] == config["channel_multipliers"])
    size = next(named, None) if config["base_channels"] == 128 else None  # 128: the width of every published size
    shapes = _vq_shapes(SIZES[size] if size else config)
    return Manifest(shapes, size, VQ_PARAMETERS.get(size or ""), optional=IGNORED)


def _taming_manifest(state_dict: Mapping[str, Tensor]) -> Manifest:
    from vargen.tokenizers.vq_checkpoints import infer_config, llamagen_to_taming, taming_to_llamagen

    config = infer_config(taming_to_llamagen(state_dict))
    shapes = _vq_shapes(config)
    return Manifest(llamagen_to_taming(shapes), optional=("loss.*",))


def _vq_shapes(config: dict[str, Any]) -> dict[str, Shape]:
    import torch

    from vargen.tokenizers.vq import VQTokenizer

    with torch.device("meta"):  # one norm group: changes no shape and fits every width
        model = VQTokenizer(**{**config, "norm_num_groups": 1})
    return {k: tuple(v.shape) for k, v in model.state_dict().items()}


def _var_manifest(state_dict: Mapping[str, Tensor]) -> Manifest:
    from vargen.var_manifests import var_manifest

    return var_manifest(state_dict)


def _var_tokenizer_manifest(state_dict: Mapping[str, Tensor]) -> Manifest:
    from vargen.var_manifests import var_tokenizer_manifest

    return var_tokenizer_manifest(state_dict)


def _kl_manifest(state_dict: Mapping[str, Tensor]) -> Manifest:
    from vargen.mar_manifests import kl_manifest

    return kl_manifest(state_dict)


def _schedule_manifest(name: str) -> Builder:
    def build(state_dict: Mapping[str, Tensor]) -> Manifest:
        from vargen import schedule_manifests

        return getattr(schedule_manifests, name)(state_dict)

    return build


def _mar_manifest(state_dict: Mapping[str, Tensor]) -> Manifest:
    from vargen.mar_manifests import mar_manifest

    return mar_manifest(state_dict)


def _xar_manifest(state_dict: Mapping[str, Tensor]) -> Manifest:
    from vargen.mar_manifests import xar_manifest

    return xar_manifest(state_dict)


def _nbp_manifest(state_dict: Mapping[str, Tensor]) -> Manifest:
    from vargen.nbp_manifests import nbp_manifest

    return nbp_manifest(state_dict)


def _nbp_tokenizer_manifest(state_dict: Mapping[str, Tensor]) -> Manifest:
    from vargen.nbp_manifests import nbp_tokenizer_manifest

    return nbp_tokenizer_manifest(state_dict)


_builders: dict[str, Builder] = {
    "llamagen-c2i": _llamagen_manifest,
    "llamagen-t2i": _llamagen_manifest,
    "llamagen-vq": _vq_manifest,
    "taming-vqgan": _taming_manifest,
    "var": _var_manifest,
    "var-vqvae": _var_tokenizer_manifest,
    "nar": _schedule_manifest("nar_manifest"),
    "nar-video": _schedule_manifest("nar_video_manifest"),
    "par": _schedule_manifest("par_manifest"),
    "randar": _schedule_manifest("randar_manifest"),
    "kl-autoencoder": _kl_manifest,
    "mar": _mar_manifest,
    "xar": _xar_manifest,
    "nbp": _nbp_manifest,
    "nbp-tokenizer": _nbp_tokenizer_manifest,
}


def register_manifest(family: str, builder: Builder) -> None:
    """Teach ``verify_checkpoint`` a family.

    Args:
        family: name in ``vargen.families``.
        builder: makes the manifest for a state dict of that family.
    """
    get_family(family)
    _builders[family] = builder


def verify_checkpoint(path: str | Path | Mapping[str, Any], *, key: str | None = None) -> VerifyReport:
    """Compare a checkpoint with the published manifest of its family and size.

    Args:
        path: checkpoint file, or a state dict.
        key: entry of a training container, as in ``load_original``.

    Returns:
        A report; ``report.ok`` is the verdict.

    Raises:
        CheckpointError: the file cannot be read.
    """
    state_dict = load_original(path, key=key)
    family = guess_family(state_dict)
    dtypes: dict[str, int] = {}
    for tensor in state_dict.values():
        name = str(tensor.dtype).removeprefix("torch.")
        dtypes[name] = dtypes.get(name, 0) + 1
    found: dict[str, Any] = {
        "path": "state dict" if isinstance(path, Mapping) else str(path),
        "family": family.title if family else None,
        "num_entries": len(state_dict),
        "dtypes": dtypes,
        "not_finite": [k for k, v in state_dict.items() if v.is_floating_point() and not _is_finite(v)],
    }
    if family is None or family.name not in _builders:
        note = "no known family has these keys" if family is None else f"no manifest for the {family.title} yet"
        return VerifyReport(
            **found, size=None, num_parameters=_numel(state_dict, ()), expected_parameters=None, note=note
        )
    return _compare(state_dict, _builders[family.name](state_dict), found)


def _compare(state_dict: Mapping[str, Tensor], manifest: Manifest, found: dict[str, Any]) -> VerifyReport:
    given = {k: tuple(v.shape) for k, v in state_dict.items() if not _matches(k, manifest.optional)}
    both = given.keys() & manifest.shapes.keys()
    return VerifyReport(
        **found,
        size=manifest.size,
        num_parameters=_numel(state_dict, (*manifest.buffers, *manifest.optional)),
        expected_parameters=manifest.num_parameters,
        missing=sorted(manifest.shapes.keys() - given.keys()),
        extra=sorted(given.keys() - manifest.shapes.keys()),
        wrong_shapes={k: (given[k], manifest.shapes[k]) for k in sorted(both) if given[k] != manifest.shapes[k]},
    )


def _matches(key: str, patterns: tuple[str, ...]) -> bool:
    return any(fnmatchcase(key, p) for p in patterns)


def _numel(state_dict: Mapping[str, Tensor], left_out: tuple[str, ...]) -> int:
    return sum(v.numel() for k, v in state_dict.items() if not _matches(k, left_out))


def _is_finite(tensor: Tensor) -> bool:
    return tensor.is_meta or bool(tensor.isfinite().all())


def convert_checkpoint(
    path: str | Path, out_dir: str | Path, *, key: str | None = None, overwrite: bool = False, **config: Any
) -> Path:
    """Convert a published checkpoint into a folder for ``from_pretrained``.

    Args:
        path: official checkpoint file.
        out_dir: folder to write.
        key: entry of a training container, as in ``load_original``.
        overwrite: allow replacing files of an existing folder.
        config: what shapes cannot tell, passed on to ``from_original`` (``num_heads``, ``grid_size``, ...).

    Returns:
        The folder.

    Raises:
        ValueError: unreadable or unknown checkpoint, no loader for its family, existing folder.
    """
    import vargen

    state_dict = load_original(path, key=key)
    family = guess_family(state_dict)
    if family is None:
        raise CheckpointError(f"cannot convert {path}: no known family has its keys")
    if family.loader not in vargen.__all__:
        raise CheckpointError(f"cannot convert {path}: it looks like a {family.title} ({family.loader})")
    loader = getattr(vargen, family.loader)  # a class, or the function that fills another library's class
    model = getattr(loader, "from_original", loader)(state_dict, **config)
    with atomic_dir(out_dir, overwrite=overwrite) as folder:
        model.save_pretrained(folder)
    return Path(out_dir)

"""Check a published checkpoint against what its family and size must contain, and convert it."""

from __future__ import annotations

from collections.abc import Mapping
from fnmatch import fnmatchcase
from importlib import import_module
from pathlib import Path
from typing import Any

from torch import Tensor

from vargen.checkpoints.bounds import WEIGHT_DTYPES
from vargen.checkpoints.families import get_family
from vargen.checkpoints.folders import family_of
from vargen.checkpoints.manifests.base import Builder, Manifest, VerifyReport
from vargen.checkpoints.reader import CheckpointError, load_original
from vargen.files import atomic_dir
from vargen.validation.reading import local_path

_BLOCK = 2**22  # numbers looked at together


def _later(module: str, name: str) -> Builder:
    """A builder of this package that is imported when it is first needed."""

    def build(state_dict: Mapping[str, Tensor]) -> Manifest:
        manifest: Manifest = getattr(import_module(f"vargen.checkpoints.manifests.{module}"), name)(state_dict)
        return manifest

    return build


_builders: dict[str, Builder] = {
    "llamagen-c2i": _later("transformers", "llamagen_manifest"),
    "llamagen-t2i": _later("transformers", "llamagen_manifest"),
    "nar": _later("transformers", "nar_manifest"),
    "nar-video": _later("transformers", "nar_video_manifest"),
    "par": _later("transformers", "par_manifest"),
    "randar": _later("transformers", "randar_manifest"),
    "var": _later("transformers", "var_manifest"),
    "infinity": _later("transformers", "infinity_manifest"),
    "infinity-vae": _later("tokenizers", "bsq_manifest"),
    "switti": _later("transformers", "switti_manifest"),
    "mar": _later("transformers", "mar_manifest"),
    "xar": _later("transformers", "xar_manifest"),
    "nbp": _later("transformers", "nbp_manifest"),
    "llamagen-vq": _later("tokenizers", "vq_manifest"),
    "taming-vqgan": _later("tokenizers", "taming_manifest"),
    "var-vqvae": _later("tokenizers", "multiscale_manifest"),
    "kl-autoencoder": _later("tokenizers", "kl_manifest"),
    "nbp-tokenizer": _later("tokenizers", "video_fsq_manifest"),
    "janus-original": _later("wrapped", "janus_manifest"),
    "emu3-original": _later("wrapped", "emu3_manifest"),
    "emu3-vision-tokenizer": _later("wrapped", "emu3_vq_manifest"),
}


def register_manifest(family: str, builder: Builder) -> None:
    """Teach ``verify_checkpoint`` a family.

    Args:
        family: name in ``vargen.checkpoints.families``.
        builder: makes the manifest for a state dict of that family.
    """
    get_family(family)
    _builders[family] = builder


def verify_checkpoint(path: str | Path | Mapping[str, Any], *, key: str | None = None) -> VerifyReport:
    """Compare a checkpoint with the published manifest of its family and size.

    Args:
        path: checkpoint file, a folder with one or with shards, or a state dict.
        key: entry of a training container, as in ``load_original``.

    Returns:
        A report; ``report.ok`` is the outcome.

    Raises:
        CheckpointError: the file cannot be read.
    """
    state_dict = load_original(path, key=key)
    family = family_of(path, state_dict)
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
    found["not_finite"] = [k for k in found["not_finite"] if not _matches(k, manifest.optional)]  # masks hold -inf
    return VerifyReport(
        **found,
        size=manifest.size,
        num_parameters=_numel(state_dict, (*manifest.buffers, *manifest.optional)),
        expected_parameters=manifest.num_parameters,
        missing=sorted(manifest.shapes.keys() - given.keys()),
        extra=sorted(given.keys() - manifest.shapes.keys()),
        wrong_shapes={k: (given[k], manifest.shapes[k]) for k in sorted(both) if given[k] != manifest.shapes[k]},
        wrong_dtypes=[k for k in sorted(both) if state_dict[k].dtype not in WEIGHT_DTYPES],
    )


def _matches(key: str, patterns: tuple[str, ...]) -> bool:
    return any(fnmatchcase(key, p) for p in patterns)


def _numel(state_dict: Mapping[str, Tensor], left_out: tuple[str, ...]) -> int:
    return sum(v.numel() for k, v in state_dict.items() if not _matches(k, left_out))


def _is_finite(tensor: Tensor) -> bool:
    """Look at a tensor block by block: the answers for all of it at once would need memory of their own."""
    if tensor.is_meta or not tensor.numel():
        return True
    if tensor.numel() <= _BLOCK:
        return bool((tensor if tensor.dtype in WEIGHT_DTYPES else tensor.float()).isfinite().all())
    axis = max(range(tensor.ndim), key=tensor.shape.__getitem__)
    rows = max(1, tensor.shape[axis] * _BLOCK // tensor.numel())
    return all(_is_finite(part) for part in tensor.split(rows, dim=axis))


def convert_checkpoint(
    path: str | Path, out_dir: str | Path, *, key: str | None = None, overwrite: bool = False, **config: Any
) -> Path:
    """Convert a published checkpoint into a folder for ``from_pretrained``.

    Janus and Emu3 become folders of transformers, processor included: load them with its classes.

    Args:
        path: official checkpoint file, or a folder with one or with shards.
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
    from vargen.adapters.original import LAYOUTS

    state_dict = load_original(path, key=key)
    family = family_of(path, state_dict)
    if family is None:
        raise CheckpointError(f"cannot convert {path}: no known family has its keys")
    if family.name in LAYOUTS:
        if key is not None:
            raise CheckpointError(f"a {family.title} is not read from a container; leave out the entry {key!r}")
        _convert_wrapped(path, out_dir, overwrite, config)
        return Path(out_dir)
    if family.loader not in vargen.__all__:
        raise CheckpointError(f"cannot convert {path}: it looks like a {family.title} ({family.loader})")
    loader = getattr(vargen, family.loader)  # a class, or the function that fills another library's class
    model = getattr(loader, "from_original", loader)(state_dict, **config)
    with atomic_dir(out_dir, overwrite=overwrite) as folder:
        model.save_pretrained(folder)
    return local_path(out_dir)


def _convert_wrapped(path: str | Path, out_dir: str | Path, overwrite: bool, config: dict[str, Any]) -> None:
    """A model of transformers with its processor, where there is a vocabulary."""
    from vargen.adapters.original import load_original_model

    model, processor, _ = load_original_model(path, config)
    with atomic_dir(out_dir, overwrite=overwrite) as folder:
        for part in (model, processor):
            if part is not None:
                part.save_pretrained(folder)

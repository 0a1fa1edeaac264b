"""Make diffusers load and save vargen's components like its own.

`model_index.json` names a component as `["vargen", "VQTokenizer"]`: the public name, which survives a move of the file.
diffusers knows where classes may come from through a table of libraries; this module adds one row to it.
"""

from __future__ import annotations

import sys
from collections.abc import Collection
from pathlib import Path
from typing import Any, Protocol, runtime_checkable

import diffusers
from diffusers.pipelines import pipeline_loading_utils, pipeline_utils

import vargen
from vargen.validation.checks import shown
from vargen.validation.classes import SLOTS, component_class
from vargen.validation.folders import check_component, is_plain_name, read_settings
from vargen.validation.places import INDEX_FILE, SHARED_KEY, other_layout

MAX_REASON = 160  # characters of what the Hub says
_METHODS = ["save_pretrained", "from_pretrained"]


@runtime_checkable
class PipelineComponent(Protocol):
    """Anything that can be saved to a folder and loaded from it."""

    def save_pretrained(self, save_directory: Any, **kwargs: Any) -> Any:
        """Write the component to a folder."""
        ...

    @classmethod
    def from_pretrained(cls, folder: Any, **kwargs: Any) -> Any:
        """Read the component from a folder."""
        ...


def register_library() -> None:
    """Tell diffusers that classes of vargen may stand in a `model_index.json`."""
    row = {PipelineComponent.__name__: _METHODS}
    pipeline_loading_utils.LOADABLE_CLASSES["vargen"] = row
    pipeline_loading_utils.ALL_IMPORTABLE_CLASSES.update(row)
    vars(vargen)[PipelineComponent.__name__] = PipelineComponent  # diffusers looks base classes up on the library


def register_pipeline(pipeline: type) -> None:
    """Let ``DiffusionPipeline.from_pretrained(folder)`` find the class that an index names, where diffusers has none such."""
    if not hasattr(diffusers, pipeline.__name__):
        setattr(diffusers, pipeline.__name__, pipeline)


def read_index(folder: Path, replaced: Collection[str] = ()) -> dict[str, Any]:
    """Read a pipeline folder's index and check everything it names, before anything is imported or loaded.

    Args:
        folder: holds `model_index.json` and one folder a component.
        replaced: components that the caller has already; their folders may be missing.

    Returns:
        The index as a dictionary.

    Raises:
        ValueError: no index, not JSON, malformed, another library's pipeline, a class that a folder may not name (see
            ``vargen.validation.classes``), or a component whose folder is missing or holds code.
    """
    path = folder / INDEX_FILE
    if not path.is_file():
        found = ", ".join(sorted(entry.name for entry in folder.iterdir())[:5]) or "nothing"
        missing = f"{folder} is not a pipeline folder: it has no {INDEX_FILE} (it holds {found})"
        raise ValueError(other_layout(folder) or missing)
    index = read_settings(path)
    classes = check_index(path, index)
    shared = shared_folders(folder, index)
    for name, kind in classes.items():
        if name in replaced:
            continue
        place = shared.get(name, folder)
        if not (place / name).is_dir():
            raise ValueError(
                f"{folder} lacks the folder {name!r} of its component {kind.__name__}; copy the whole pipeline folder"
            )
        stored = kind.__name__ if issubclass(kind, diffusers.ConfigMixin) else None
        check_component(place / name, kind, within=place, name=stored)
    return index


def check_index(path: Path, index: dict[str, Any]) -> dict[str, type]:
    """Check what an index says, whatever lies beside it; the same for folders and for the Hub.

    Returns:
        The class of every component that it holds.

    Raises:
        ValueError: see ``read_index``.
    """
    if "_class_name" not in index:
        raise ValueError(f"{path} is not a pipeline index: it names no _class_name")
    stored = index["_class_name"]
    if not isinstance(stored, str) or not stored.isidentifier() or len(stored) > 100:
        raise ValueError(f"{path}: _class_name must be the name of one class, got {shown(stored)}")
    if stored in diffusers.__all__:
        raise ValueError(f"{path} is the index of a {stored} of diffusers; load it with diffusers.{stored}")
    ignored = index.get("_ignore_files", [])
    if not isinstance(ignored, list) or not all(isinstance(file, str) for file in ignored):
        raise ValueError(f"{path}: _ignore_files must be a list of names, got {shown(ignored)}")
    classes = {}
    for name, entry in index.items():
        if not name.startswith("_") and (kind := _entry_class(path, name, entry)) is not None:
            classes[name] = kind
    _check_shared(path, index.get(SHARED_KEY, {}), classes)
    return classes


def _entry_class(path: Path, name: str, entry: Any) -> type | None:
    """Class of an entry of the index; None for a component that is left out and for a setting such as fps."""
    if not name.isidentifier() or len(name) > 100:
        raise ValueError(f"{path}: {shown(name)} is not the name of a component")
    if name not in SLOTS and (entry is None or isinstance(entry, str | int | float)):
        return None
    if not isinstance(entry, list) or len(entry) != 2:
        raise ValueError(f"{path}: {name} must be a list of a library and a class, got {shown(entry)}")
    if entry == [None, None]:
        return None
    try:
        kind = component_class(entry[0], entry[1], name)
    except ValueError as error:
        raise ValueError(f"{path.parent}: {error}") from None
    if entry[0] not in pipeline_loading_utils.LOADABLE_CLASSES:
        # diffusers looks base classes up on the module
        vars(sys.modules[entry[0]]).setdefault(PipelineComponent.__name__, PipelineComponent)
    return kind


def _check_shared(path: Path, shared: Any, classes: dict[str, type]) -> None:
    if not isinstance(shared, dict):
        raise ValueError(f"{path}: {SHARED_KEY} must be an object of components and folders, got {shown(shared)}")
    for name, other in shared.items():
        if name not in classes:
            raise ValueError(f"{path} shares {shown(name)}, which is none of its components")
        if not isinstance(other, str) or not is_plain_name(other):
            raise ValueError(
                f"{path.parent}: {name} is shared with {shown(other)}, which is not the name of a folder beside it"
            )


def check_complete(folder: Path, index: dict[str, Any], wanted: Any, given: Collection[str]) -> None:
    """Raise ``ValueError`` unless an index holds every component that the pipeline class ``wanted`` cannot do without.

    Args:
        folder: of the index.
        index: checked by ``read_index``.
        wanted: a class of pipelines.
        given: components that the caller has already.
    """
    components, _ = wanted._get_signature_keys(wanted)
    for name in sorted(components):
        entry = index.get(name)
        if entry is not None and not isinstance(entry, list):
            raise ValueError(f"{folder}: {name} must be a list of a library and a class, got {shown(entry)}")
        if name not in given and name not in wanted._optional_components and entry in (None, [None, None]):
            raise ValueError(f"{folder} names no {name}, which a {wanted.__name__} needs; save the pipeline again")


def check_class(folder: Path, index: dict[str, Any], wanted: str) -> None:
    """Raise ``ValueError`` where a folder of videos is loaded as images, or the other way round."""
    stored = index["_class_name"]
    if (stored == "VideoPipeline") != (wanted == "VideoPipeline"):
        loader = stored if stored in vargen._names else "ImagePipeline"
        raise ValueError(
            f"{folder.name} draws {'videos' if loader == 'VideoPipeline' else 'images'}; load it with {loader}"
        )


def shared_folders(folder: Path, index: dict[str, Any]) -> dict[str, Path]:
    """Pipeline folders that lend components to this one: models over one tokenizer store it once.

    `"_shared": {"tokenizer": "heroes32-mar"}` in a checked index means the folder of that name beside this one.

    Raises:
        ValueError: there is none.
    """
    found = {}
    for name, other in index.get(SHARED_KEY, {}).items():
        if not (folder.parent / other).is_dir():
            raise ValueError(f"{folder} takes its {name} from the folder {other} beside it; copy that folder too")
        found[name] = folder.parent / other
    return found


def load_shared(folder: Path, index: dict[str, Any], given: dict[str, Any]) -> dict[str, Any]:
    """Load the components that other folders lend, unless they are among the arguments ``given``."""
    loaded = {}
    options = {name: value for name, value in dtype_argument(given).items() if name in ("dtype", "torch_dtype")}
    for name, other in shared_folders(folder, index).items():
        if name not in given:
            kind: Any = component_class(index[name][0], index[name][1], name)
            loaded[name] = kind.from_pretrained(other / name, **options)
    return loaded


def hub_folder(pipeline: Any, name: str, options: dict[str, Any]) -> Path:
    """Fetch a pipeline folder from the Hub.

    Raises:
        ValueError: the Hub cannot be reached, or has no such pipeline; the calls that load other layouts are named.
    """
    try:
        return Path(pipeline.download(name, **options))
    except (MemoryError, ImportError, ValueError):
        raise
    except Exception as error:
        line = " ".join(str(error).split())[:MAX_REASON].rstrip(". ")
        raise ValueError(
            f"cannot load a pipeline {name} from the Hub: {line}; a repository without {INDEX_FILE} holds a component (its "
            "from_pretrained), an original file (from_original), or a model for ImagePipeline.from_transformers"
        ) from error


def check_saved(components: dict[str, Any]) -> None:
    """Raise ``ValueError`` where a component cannot be saved, before anything is written."""
    if hasattr(components.get("backbone"), "wraps_transformers"):
        raise ValueError(
            "this pipeline draws with a model of transformers, which saves itself: model.save_pretrained(folder) and "
            "processor.save_pretrained(folder), or their push_to_hub; ImagePipeline.from_transformers makes the pipeline again"
        )


def check_options(options: Collection[str]) -> None:
    """Raise ``ValueError`` for options of diffusers with which a folder brings code, or another index, of its own."""
    for name in ("custom_pipeline", "trust_remote_code", "dduf_file", "load_connected_pipeline"):
        if name in options:
            raise ValueError(f"{name} is not for pipelines of vargen, whose folders hold no code; leave it out")


def index_entry(component: Any) -> tuple[str | None, str | None]:
    """Return (library, class name) of a component as the index holds it; (None, None) for a component left out."""
    if component is None:
        return (None, None)
    return pipeline_loading_utils._fetch_class_library_tuple(component)


def dtype_argument(arguments: dict[str, Any]) -> dict[str, Any]:
    """Rename `dtype` or `torch_dtype` to what the installed diffusers calls it."""
    if "dtype" in arguments and "torch_dtype" in arguments:
        raise ValueError("give dtype or torch_dtype, not both; they mean the same")
    current = "dtype" if hasattr(pipeline_utils, "_resolve_dtype") else "torch_dtype"
    return {current if name in ("dtype", "torch_dtype") else name: value for name, value in arguments.items()}

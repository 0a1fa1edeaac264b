"""Make diffusers load and save vargen's components like its own.

`model_index.json` names a component as `["vargen", "VQTokenizer"]`: the public name, which survives a move of the file.
diffusers knows where classes may come from through a table of libraries; this module adds one row to it.
"""

from __future__ import annotations

import json
import sys
from importlib import import_module
from pathlib import Path
from typing import Any, Protocol, runtime_checkable

from diffusers.pipelines import pipeline_loading_utils, pipeline_utils
from safetensors import safe_open

import vargen

SHARED_KEY = "_shared"  # in an index: component name -> pipeline folder beside this one that holds it
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


def read_index(folder: Path) -> dict[str, Any]:
    """Read a pipeline folder's index and check it, before anything large is loaded.

    Args:
        folder: holds `model_index.json` and one folder a component.

    Returns:
        The index as a dictionary.

    Raises:
        ValueError: no index, not JSON, another library's pipeline, an unknown class, or a component without its folder.
    """
    path = folder / "model_index.json"
    if not path.is_file():
        found = ", ".join(sorted(entry.name for entry in folder.iterdir())[:5]) or "nothing"
        raise ValueError(f"{folder} is not a pipeline folder: it has no model_index.json (it holds {found})")
    try:
        index = json.loads(path.read_text())
    except (json.JSONDecodeError, UnicodeDecodeError) as error:
        raise ValueError(f"{path} is not valid JSON ({error}); save the pipeline again") from None
    if not isinstance(index, dict) or "_class_name" not in index:
        raise ValueError(f"{path} is not a pipeline index: it names no _class_name")
    shared = shared_folders(folder, index)
    for name, entry in index.items():
        if not name.startswith("_") and isinstance(entry, list) and entry[0] is not None:
            _check_component(shared.get(name, folder), name, *entry)
    return index


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

    `"_shared": {"tokenizer": "heroes32-mar"}` in the index means the folder of that name beside this one.

    Raises:
        ValueError: not the plain name of a folder, or there is none.
    """
    found = {}
    for name, other in index.get(SHARED_KEY, {}).items():
        if Path(str(other)).name != other or other in ("", ".", ".."):
            raise ValueError(f"{folder}: {name} is shared with {other!r}, which is not the name of a folder beside it")
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
            library, class_name = index[name]
            kind = getattr(import_module(library), class_name)
            loaded[name] = kind.from_pretrained(other / name, **options)
    return loaded


def _check_component(folder: Path, name: str, library: str, class_name: str) -> None:
    if library == "vargen" and class_name not in vargen._names:
        raise ValueError(
            f"{folder}: {name} is a {class_name}, which this version of vargen ({vargen.__version__}) does not have; "
            "it may come from a newer one"
        )
    if not (folder / name).is_dir():
        raise ValueError(
            f"{folder} lacks the folder {name!r} of its component {class_name}; copy the whole pipeline folder"
        )
    if library not in pipeline_loading_utils.LOADABLE_CLASSES:
        _adopt_module(folder, name, library, class_name)


def _adopt_module(folder: Path, name: str, library: str, class_name: str) -> None:
    """Let diffusers accept a component class of the user's own module; it looks base classes up on the module."""
    module = sys.modules.get(library)
    if module is None:  # importing a module because a folder names it would run code that the user did not choose
        raise ValueError(
            f"{folder}: {name} is a {class_name} of the module {library}; import {library} before loading"
        )
    vars(module).setdefault(PipelineComponent.__name__, PipelineComponent)


def index_entry(component: Any) -> tuple[str | None, str | None]:
    """Return (library, class name) of a component as the index holds it; (None, None) for a component left out."""
    if component is None:
        return (None, None)
    return pipeline_loading_utils._fetch_class_library_tuple(component)


def choose_drafter(sampler: Any, drafter: Any, eagle: Any) -> Any:
    """Return the drafter that a sampler gets.

    That is ``eagle`` for samplers that read hidden states, unless ``drafter`` stands on hidden states itself.
    """
    reads = getattr(sampler, "reads_hidden", None)
    if eagle is None or reads is None or not reads(eagle) or reads(drafter):
        return drafter
    return eagle


def dtype_argument(arguments: dict[str, Any]) -> dict[str, Any]:
    """Rename `dtype` or `torch_dtype` to what the installed diffusers calls it."""
    if "dtype" in arguments and "torch_dtype" in arguments:
        raise ValueError("give dtype or torch_dtype, not both; they mean the same")
    current = "dtype" if hasattr(pipeline_utils, "_resolve_dtype") else "torch_dtype"
    return {current if name in ("dtype", "torch_dtype") else name: value for name, value in arguments.items()}


def explain_failure(folder: Path, error: Exception) -> str:
    """Say in one line why a pipeline folder could not be loaded."""
    for component in sorted(path.parent for path in folder.glob("*/config.json")):
        if not any(component.glob("*.safetensors*")) and not any(component.glob("*.bin")):
            return f"{component} holds no weights (*.safetensors); copy the whole pipeline folder"
        for path in sorted(component.glob("*.safetensors")):
            try:
                with safe_open(path, framework="pt"):
                    pass
            except Exception as damage:  # safetensors raises an error class of its own, and OSError
                return f"{path} is damaged ({' '.join(str(damage).split())}); copy it again"
    return f"cannot load {folder}: {' '.join(str(error).split())}"

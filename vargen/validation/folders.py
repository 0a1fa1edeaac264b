"""Read model folders that come from elsewhere: settings are bounded, files are looked at before anything is loaded.

A folder holds data. Nothing in it is ever executed: a Python file beside the settings of a component is refused, and so
are settings that make other libraries fetch or import code. Which classes a folder may name is decided in
``vargen.validation.classes``. Importing this module is cheap: no torch, no diffusers.
"""

from __future__ import annotations

import logging
import os
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, Self

from vargen.validation.places import component_folder, other_layout, resolve_model
from vargen.validation.printable import printable, shown
from vargen.validation.reading import StrPath, local_path, read_json

MAX_BYTES = 4 << 20  # of a file of settings; a thousand class names take 30 kB
MAX_FILES = 10_000  # in the folder of a component
MAX_MESSAGE = 500
MAX_FOREIGN = 160  # of what other libraries say
# settings with which diffusers or transformers import a library, fetch code or run it
REFUSED_SETTINGS = (
    "auto_map",
    "quantization_config",
    "attn_implementation",
    "_attn_implementation",
    "_attn_implementation_internal",
    "experts_implementation",
    "_experts_implementation",
    "_experts_implementation_internal",
)
_SETTINGS_FILES = ("config.json", "generation_config.json", "tokenizer_config.json")


class FolderError(ValueError):
    """A folder that cannot be loaded, for a reason that another library has named."""


def read_settings(path: StrPath, limit: int = MAX_BYTES) -> dict[str, Any]:
    """Read a JSON object of at most ``limit`` bytes, 4 MiB by default.

    Raises:
        ValueError: as ``vargen.validation.reading.read_json``; not an object.
    """
    value = read_json(Path(path), limit=limit)
    if not isinstance(value, dict):
        raise ValueError(f"{printable(path)} must hold a JSON object, got {shown(value)}")
    return value


def check_component(folder: StrPath, kind: type, within: StrPath | None = None, name: str | None = None) -> None:
    """Look through the folder of a component before its class reads it.

    Args:
        folder: holds settings and weights.
        kind: the class that will read it.
        within: folder that it must not lead out of by a link; default itself.
        name: class that its settings must name; default: they may name another (a subclass, another sampler).

    Raises:
        ValueError: a Python file, a link out of the folder, settings that are missing, damaged or make another library
            run code.
    """
    folder = Path(folder)
    check_files(folder, within)
    own = getattr(kind, "config_name", None) or "config.json"
    if hasattr(kind, "config_name") and not (folder / own).is_file():
        raise ValueError(f"{folder} holds no {own}; copy the whole folder")
    for file in sorted({own, *_SETTINGS_FILES}):
        if (folder / file).is_file():
            check_settings(folder / file, read_settings(folder / file), name if file == own else None)
    for file in folder.glob("*.index.json"):
        check_shards(file, read_settings(file))


def check_files(folder: Path, within: StrPath | None = None) -> None:
    """Raise ``ValueError`` for Python files in a folder, and for links to folders that lead out of ``within``."""
    if within is not None and not folder.resolve().is_relative_to(Path(within).resolve()):
        raise ValueError(f"{folder} is a link that leads out of {within}; copy the folder itself there")
    count = 0
    for place, folders, files in os.walk(folder):
        for name in files:
            if name.lower().endswith(".py"):
                raise ValueError(
                    f"{folder} holds the Python file {shown(name)}; a model folder holds no code, and none of it is "
                    "run: remove the file, and import classes of your own before loading"
                )
        if linked := [name for name in folders if os.path.islink(os.path.join(place, name))]:
            raise ValueError(f"{folder} holds the link {shown(linked[0])} to a folder; copy the folder itself there")
        count += len(files) + len(folders)
        if count > MAX_FILES:
            raise ValueError(f"{folder} holds more than {MAX_FILES} files; is it a model?")


def check_settings(file: Path, settings: dict[str, Any], name: str | None = None) -> None:
    """Raise ``ValueError`` for settings that say what their class would not survive, or what would run code."""
    stored = settings.get("_class_name", name)
    if stored is not None and not (isinstance(stored, str) and stored.isidentifier() and len(stored) < 100):
        raise ValueError(f"{file}: _class_name must be the name of one class, got {shown(stored)}")
    if name is not None and stored != name:
        raise ValueError(f"{file} holds settings of {stored}, but the index names {name}; save the pipeline again")
    for key in REFUSED_SETTINGS:
        if settings.get(key) is not None:
            raise ValueError(
                f"{file} sets {key} to {shown(settings[key])}, with which a file would choose code to run; remove it"
            )
    defaults = settings.get("_use_default_values", [])
    if not (isinstance(defaults, list) and all(isinstance(key, str) for key in defaults)):
        raise ValueError(f"{file}: _use_default_values must be a list of names, got {shown(defaults)}")


def check_shards(file: Path, index: dict[str, Any]) -> None:
    """Raise ``ValueError`` unless the index of sharded weights names files beside it."""
    shards = index.get("weight_map")
    if not isinstance(shards, dict) or not shards:
        raise ValueError(f"{file} has no weight_map; save the model again")
    for shard in shards.values():
        if not isinstance(shard, str) or not is_plain_name(shard):
            raise ValueError(f"{file}: weights are said to be in {shown(shard)}, which is not the name of a file")


def is_plain_name(text: str) -> bool:
    """Whether a text is the name of a file or folder, without a path."""
    return text not in ("", ".", "..") and not set(text) & {"/", "\\", ":", "\0"} and text.isprintable()


@contextmanager
def one_line(folder: StrPath) -> Iterator[None]:
    """Turn whatever fails while a folder is loaded into a ``ValueError`` of one line.

    What does not come from the folder passes: memory that ran out, and libraries that are not installed.
    """
    try:
        yield
    except (MemoryError, ImportError):
        raise
    except Exception as error:
        if type(error).__name__ == "OutOfMemoryError":  # of torch, which is not imported here
            raise
        if isinstance(error, FolderError):
            raise
        text = _clean(str(error), MAX_MESSAGE)
        if isinstance(error, ValueError) and text == str(error):
            raise
        if not isinstance(error, ValueError | OSError):
            text = f"{type(error).__name__}: {_clean(text, MAX_FOREIGN)}"
        raise FolderError(explain_failure(Path(folder), text)) from error


def _clean(text: str, limit: int) -> str:
    text = "".join(letter if letter.isprintable() else "?" for letter in " ".join(text.split()))
    return text if len(text) <= limit else f"{text[: limit - 3]}..."


def explain_failure(folder: Path, reason: str) -> str:
    """Say in one line why a folder could not be loaded: missing or damaged weights, else the reason given."""
    from safetensors import safe_open

    for component in sorted(
        path.parent for pattern in ("config.json", "*/config.json") for path in folder.glob(pattern)
    ):
        if not any(component.glob("*.safetensors*")) and not any(component.glob("*.bin")):
            return f"{component} holds no weights (*.safetensors); copy the whole pipeline folder"
        for path in sorted(component.glob("*.safetensors")):
            try:
                with safe_open(path, framework="pt"):
                    pass
            except Exception as damage:  # safetensors raises an error class of its own, and OSError
                return f"{path} is damaged ({' '.join(str(damage).split())}); copy it again"
    return f"cannot load {folder}: {reason}"


class Stored:
    """Base of every component: its folder is looked through before it is read, and a failure is one line."""

    @classmethod
    def from_pretrained(cls, pretrained_model_name_or_path: Any, **kwargs: Any) -> Self:
        """Load the component from a folder, a shipped model, or a repository on the Hugging Face Hub.

        Args:
            pretrained_model_name_or_path: folder, name of a shipped model, or id of a repository.
            kwargs: those of diffusers, such as ``subfolder`` and ``torch_dtype``; the folder of a pipeline that holds one
                component of this class needs no ``subfolder``.

        Raises:
            ValueError: unknown name, a folder that holds code, or settings or weights that are missing, damaged or do not fit.
        """
        place, kwargs = cls.find_component(pretrained_model_name_or_path, **kwargs)
        with one_line(place):
            if isinstance(place, Path):
                check_component(place, cls)
            loaded: Self = super().from_pretrained(place, **kwargs)  # type: ignore[misc]
            return loaded

    def save_pretrained(self, save_directory: StrPath, *args: Any, **kwargs: Any) -> None:
        """Write the component to a folder; arguments as in diffusers."""
        super().save_pretrained(str(local_path(save_directory)), *args, **kwargs)  # type: ignore[misc]

    @classmethod
    def find_component(cls, name_or_path: Any, **kwargs: Any) -> tuple[Path | str, dict[str, Any]]:
        """Where the component lies: its own folder, or the id of a repository with what diffusers is to be told.

        Raises:
            ValueError: neither a shipped name nor a folder nor an id; a folder in another layout, with the call that loads it.
        """
        found = resolve_model(name_or_path)
        if not Path(found).is_dir():
            return found, kwargs
        subfolder = kwargs.pop("subfolder", None)
        own = getattr(cls, "config_name", None) or "config.json"
        place = component_folder(Path(found), subfolder, cls.__name__, own)
        original = cls.__name__ if hasattr(cls, "from_original") else None
        foreign = not (place / own).is_file() or "model_type" in read_settings(place / own)
        if foreign and (line := other_layout(place, original)):
            raise ValueError(line)
        if not place.is_dir():
            raise ValueError(f"{found} has no folder {printable(subfolder)}; copy the whole pipeline folder")
        return place, kwargs

    @classmethod
    def _dict_from_json_file(cls, json_file: StrPath, dduf_entries: Any = None) -> dict[str, Any]:
        """What diffusers reads settings with, from folders and from the Hub alike; older ones hand in archives, too."""
        if dduf_entries is not None:
            raise ValueError(f"{printable(json_file)} lies in a DDUF archive, which vargen does not read; unpack it")
        settings = read_settings(os.fspath(json_file))
        check_settings(Path(json_file), settings)
        return settings


def _says_something(record: logging.LogRecord) -> bool:
    return "should be kept in float32: []." not in record.getMessage()


# diffusers announces at every cast to a dtype that no module has to stay in float32
logging.getLogger("diffusers.models.modeling_utils").addFilter(_says_something)

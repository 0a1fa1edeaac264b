"""A model folder from elsewhere never runs code, and a malformed one is one line, before anything is imported or loaded."""

from __future__ import annotations

import json
import os
import shutil
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from diffusers import AutoencoderKL, ConfigMixin, DiffusionPipeline
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from tests.test_errors import one_line
from tests.tiny import tiny_hero_pipeline
from vargen.adapters.families.emu3_5 import emu35_config
from vargen.backbones.llamagen.model import LlamaGenTransformer
from vargen.conditioners.attributes import AttributeConditioner
from vargen.conditioners.t5 import T5CaptionConditioner, load_text_encoder, load_text_tokenizer
from vargen.pipelines.components import read_index
from vargen.pipelines.image import ImagePipeline
from vargen.pipelines.video import VideoPipeline
from vargen.samplers.base import Sampler
from vargen.samplers.window.next_token import NextTokenSampler
from vargen.tokenizers.vq.model import VQTokenizer
from vargen.training.tasks.kl import load_autoencoder
from vargen.validation.checks import shown
from vargen.validation.classes import component_class
from vargen.validation.folders import MAX_BYTES, is_plain_name, read_settings
from vargen.validation.folders import one_line as in_one_line
from vargen.validation.reading import MAX_DEPTH

PAYLOAD = "vargen_test_payload"  # a module that leaves a trace when it is imported
NO_COMPONENTS = (
    "load_kl16",
    "DecodeSchedule",
    "RowAboveDrafter",
    "CopyDrafter",
    "NgramDrafter",
    "TokenRecyclingDrafter",
)  # of the rooms of components
COMPONENTS = ("tokenizer", "backbone", "sampler", "conditioner")
DEEP = "[" * 100_000 + "]" * 100_000


@pytest.fixture(scope="module")
def template(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("template") / "saved"
    tiny_hero_pipeline().save_pretrained(folder)
    return folder


@pytest.fixture
def saved(template: Path, tmp_path: Path) -> Path:
    """A pipeline folder, with another one beside it."""
    shutil.copytree(template, tmp_path / "models" / "other")
    return shutil.copytree(template, tmp_path / "models" / "saved")


class Trap:
    """A module on sys.path and its source, which may be put anywhere; running it leaves a trace."""

    def __init__(self, folder: Path) -> None:
        self.trace = folder / "trace"
        self.source = (
            f"open({str(self.trace)!r}, 'w').close()\n"
            "class X:\n"
            "    def __init__(self, *args, **kwargs): pass\n"
            "    save_pretrained = lambda self, *args, **kwargs: None\n"
            "    from_pretrained = classmethod(lambda cls, *args, **kwargs: cls())\n"
            "class VQTokenizer(X): pass\n"
            "class ImagePipeline(X): pass\n"
        )
        (folder / f"{PAYLOAD}.py").write_text(self.source)

    def assert_untouched(self) -> None:
        assert not self.trace.exists(), "code of the folder was run"
        assert PAYLOAD not in sys.modules


@pytest.fixture
def trap(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Trap]:
    (tmp_path / "path").mkdir()
    monkeypatch.syspath_prepend(str(tmp_path / "path"))
    monkeypatch.setattr("diffusers.utils.dynamic_modules_utils.HF_MODULES_CACHE", str(tmp_path / "cache"))
    yield Trap(tmp_path / "path")
    sys.modules.pop(PAYLOAD, None)


def edit(file: Path, **entries: Any) -> None:
    """Change entries of a JSON file; None of Python removes one."""
    stored = json.loads(file.read_text()) | entries
    file.write_text(json.dumps({key: value for key, value in stored.items() if value is not None}))


def edit_index(folder: Path, **entries: Any) -> Path:
    edit(folder / "model_index.json", **entries)
    return folder


def refused(folder: Path, *parts: str, **options: Any) -> str:
    return one_line(lambda: ImagePipeline.from_pretrained(folder, **options), *parts)


class TestNothingIsImported:
    """Every way in which a folder can name code."""

    def test_the_trap_works(self, trap: Trap) -> None:
        __import__(PAYLOAD)
        assert trap.trace.exists()

    INDICES: tuple[dict[str, Any], ...] = (
        *({name: [PAYLOAD, "X"]} for name in (*COMPONENTS, "drafter", "eagle")),
        {"unknown": [PAYLOAD, "X"]},
        {"_x": [PAYLOAD, "X"], "_shared": {"_x": "other"}},  # the shared loader saw what no check had
        {"tokenizer": [PAYLOAD, "X"], "_shared": {"tokenizer": "other"}},
        {"tokenizer": {PAYLOAD: 1, "X": 2}},  # two keys unpack like a list of two
        {"tokenizer": [PAYLOAD, "X"], "backbone": None},
        {"unknown": {PAYLOAD: 1, "X": 2}},
        {"_class_name": [PAYLOAD, "X"]},
        {"_class_name": [PAYLOAD, "ImagePipeline"]},
        {"tokenizer": [f"vargen.{PAYLOAD}", "X"]},
        {"tokenizer": [f"{PAYLOAD}.sub", "X"]},
    )

    @pytest.mark.parametrize("entries", INDICES, ids=json.dumps)
    @pytest.mark.parametrize("kind", [ImagePipeline, VideoPipeline])
    def test_a_name_in_the_index_imports_nothing(
        self, saved: Path, trap: Trap, kind: Any, entries: dict[str, Any]
    ) -> None:
        for name in ("_x", "unknown"):
            shutil.copytree(saved / "sampler", saved.parent / "other" / name)
            shutil.copytree(saved / "sampler", saved / name)
        (saved / f"{PAYLOAD}.py").write_text(trap.source)
        edit_index(saved, **entries)
        one_line(lambda: kind.from_pretrained(saved))
        one_line(lambda: read_index(saved))
        trap.assert_untouched()

    def test_two_letters_are_no_library_and_class(self, saved: Path, trap: Trap) -> None:
        (trap.trace.parent / "q.py").write_text(trap.source)
        edit_index(saved, extra="qX")

        class Wider(ImagePipeline):
            def __init__(
                self, tokenizer: Any, backbone: Any, sampler: Any, extra: Any, conditioner: Any = None
            ) -> None:
                super().__init__(tokenizer, backbone, sampler, conditioner)

        one_line(lambda: Wider.from_pretrained(saved), "extra must be a list of a library and a class", "'qX'")
        trap.assert_untouched()
        assert "q" not in sys.modules

    @pytest.mark.parametrize("place", ["tokenizer/vargen.py", "sampler/VARGEN.PY", "backbone/deeper/x.py"])
    def test_a_python_file_in_a_component_is_refused(self, saved: Path, trap: Trap, place: str) -> None:
        (saved / place).parent.mkdir(exist_ok=True)
        (saved / place).write_text(trap.source)
        refused(saved, "holds the Python file", "holds no code", place.split("/")[-1])
        trap.assert_untouched()

    def test_a_python_file_in_a_shared_component_is_refused(self, saved: Path, trap: Trap) -> None:
        (saved.parent / "other" / "tokenizer" / "vargen.py").write_text(trap.source)
        shutil.rmtree(saved / "tokenizer")
        refused(edit_index(saved, _shared={"tokenizer": "other"}), "other/tokenizer", "holds the Python file")
        trap.assert_untouched()

    @pytest.mark.parametrize("kind", [VQTokenizer, LlamaGenTransformer, NextTokenSampler, AttributeConditioner])
    def test_a_component_alone_is_checked_as_well(self, saved: Path, trap: Trap, kind: Any) -> None:
        name = component_slot(kind)
        kind.from_pretrained(saved / name)
        (saved / name / f"{PAYLOAD}.py").write_text(trap.source)
        one_line(lambda: kind.from_pretrained(saved / name), "holds the Python file")
        if kind is not AttributeConditioner:
            one_line(lambda: kind.from_pretrained(saved, subfolder=name), "holds the Python file")
        trap.assert_untouched()

    @pytest.mark.parametrize(
        "option", ["custom_pipeline", "trust_remote_code", "dduf_file", "load_connected_pipeline"]
    )
    def test_options_that_bring_code_are_refused(self, saved: Path, trap: Trap, option: str) -> None:
        (saved / "pipeline.py").write_text(trap.source)
        refused(saved, option, **{option: str(saved)})
        trap.assert_untouched()

    def test_drafters_stored_by_name_are_checked_before_anyone_asks_for_them(self, saved: Path, trap: Trap) -> None:
        place = shutil.copytree(saved / "backbone", saved / "drafters" / "small")
        assert ImagePipeline.from_pretrained(saved).drafters == ["small"]
        for named in ([PAYLOAD, "X"], f"{PAYLOAD}.X", "NextTokenSampler", "wrap", None):
            kept = (place / "config.json").read_text()
            edit(place / "config.json", _class_name=named)
            refused(saved, "drafter")
            (place / "config.json").write_text(kept)
        (place / f"{PAYLOAD}.py").write_text(trap.source)
        refused(saved, "drafters/small", "holds the Python file")
        (place / f"{PAYLOAD}.py").unlink()
        shutil.move(saved / "drafters", saved.parent / "away")
        (saved / "drafters").symlink_to(saved.parent / "away", target_is_directory=True)
        refused(saved, "a link that leads out of")
        trap.assert_untouched()

    def test_a_file_of_code_at_the_top_is_only_a_file(self, saved: Path, trap: Trap) -> None:
        for name in ("pipeline", "vargen", "ImagePipeline"):
            (saved / f"{name}.py").write_text(trap.source)
        assert type(ImagePipeline.from_pretrained(saved)) is ImagePipeline
        trap.assert_untouched()

    def test_the_hub_is_no_way_around(self, saved: Path, trap: Trap, tmp_path: Path) -> None:
        cache, options = tmp_path / "hub", {"local_files_only": True, "cache_dir": str(tmp_path / "hub")}
        place = into_hub_cache(saved, cache)
        assert type(ImagePipeline.from_pretrained("some/model", **options)) is ImagePipeline
        index = json.loads((place / "model_index.json").read_text())
        for entries in (
            {"sampler": [PAYLOAD, "X"]},
            {"_class_name": [PAYLOAD, "X"]},
            {"sampler": {PAYLOAD: 1, "X": 2}},
        ):
            (place / "model_index.json").unlink()
            (place / "model_index.json").write_text(json.dumps(index | entries))
            one_line(lambda: ImagePipeline.from_pretrained("some/model", **options))
        (place / "model_index.json").write_text(DEEP)
        one_line(lambda: ImagePipeline.from_pretrained("some/model", **options), "nests its values too deeply")
        (place / "model_index.json").write_text(json.dumps(index))
        (place / "tokenizer" / "vargen.py").write_text(trap.source)
        one_line(lambda: ImagePipeline.from_pretrained("some/model", **options), "holds the Python file")
        trap.assert_untouched()

    def test_settings_in_an_archive_are_not_read(self, saved: Path) -> None:
        file = saved / "tokenizer" / "config.json"
        one_line(lambda: VQTokenizer._dict_from_json_file(file, dduf_entries={}), "DDUF archive")

    def test_settings_of_components_on_the_hub_are_bounded(self, saved: Path, tmp_path: Path) -> None:
        options = {"local_files_only": True, "cache_dir": str(tmp_path / "hub"), "subfolder": "tokenizer"}
        file = into_hub_cache(saved, tmp_path / "hub") / "tokenizer" / "config.json"
        VQTokenizer.from_pretrained("some/model", **options)
        for content, part in ((DEEP, "nests its values too deeply"), ('{"auto_map": {"a": "b.c"}}', "auto_map")):
            file.unlink()
            file.write_text(content)
            one_line(lambda: VQTokenizer.from_pretrained("some/model", **options), part)

    def test_samplers_are_found_among_our_own(self, saved: Path, trap: Trap) -> None:
        for named in (f"{PAYLOAD}.X", [PAYLOAD, "X"], {"a": 1}, 7, "WindowSampler", "x" * 100_000):
            edit(saved / "sampler" / "sampler_config.json", _class_name=named)
            one_line(lambda: Sampler.from_pretrained(saved / "sampler"))
            if not isinstance(named, str):
                one_line(lambda named=named: Sampler.from_config({"_class_name": named}), "sampler must be one of")
        trap.assert_untouched()


def component_slot(kind: type) -> str:
    room = kind.__module__.split(".")[1]
    return {"tokenizers": "tokenizer", "backbones": "backbone", "samplers": "sampler"}.get(room, "conditioner")


def into_hub_cache(folder: Path, cache: Path) -> Path:
    """Lay a folder out as the Hub's client does: files are links to blobs."""
    commit, root = "0123456789abcdef0123456789abcdef01234567", cache / "models--some--model"
    for place in ("refs", "blobs", f"snapshots/{commit}"):
        (root / place).mkdir(parents=True)
    (root / "refs" / "main").write_text(commit)
    for number, file in enumerate(path for path in sorted(folder.rglob("*")) if path.is_file()):
        link = root / "snapshots" / commit / file.relative_to(folder)
        link.parent.mkdir(exist_ok=True)
        shutil.copy(file, root / "blobs" / str(number))
        link.symlink_to(root / "blobs" / str(number))
    return root / "snapshots" / commit


class OwnSampler(NextTokenSampler):
    """Of a module that the user has imported: this one."""


class DuckTyped:
    """Saves and loads, but nobody knows how."""

    def save_pretrained(self, folder: Any, **_: Any) -> None: ...

    @classmethod
    def from_pretrained(cls, folder: Any, **_: Any) -> DuckTyped:
        raise AssertionError("called")


def from_pretrained_function() -> None:
    raise AssertionError("called")


class OwnPipeline(DiffusionPipeline):
    """Loading one would read another index, which nobody has checked."""


class TestClasses:
    """What a name in a file may become."""

    @pytest.mark.parametrize(
        ("library", "name", "part"),
        [
            ("vargen", "wrap", "does not have"),
            ("vargen", "ImagePipeline", "does not have"),
            ("vargen", "load_kl16", "no class with from_pretrained"),
            ("vargen", "DecodeSchedule", "no class with from_pretrained"),
            ("vargen", "__doc__", "does not have"),
            ("vargen.samplers.base", "Sampler", "name it as vargen does"),
            ("diffusers", "UNet2DModel", "may only name AutoencoderKL"),
            ("diffusers", "DiffusionPipeline", "may only name AutoencoderKL"),
            ("diffusers.pipelines", "DiffusionPipeline", "name it as diffusers does"),
            ("transformers", "AutoModel", "may only name T5EncoderModel"),
            ("transformers.models.auto.modeling_auto", "AutoModel", "name it as transformers does"),
            ("os", "system", "defines no such component class"),
            ("subprocess", "Popen", "defines no such component class"),
            ("torch.nn", "Embedding", "defines no such component class"),
            ("stable_diffusion", "StableDiffusionPipeline", "import stable_diffusion"),
            ("a b", "X", "names of a library and of a class"),
            ("../x", "X", "names of a library and of a class"),
            ("", "X", "names of a library and of a class"),
            ("vargen", "x.y", "names of a library and of a class"),
            ("x" * 10_000, "X", "names of a library and of a class"),
            (None, "X", "names of a library and of a class"),
            (["vargen"], "X", "names of a library and of a class"),
            ("vargen", 3, "names of a library and of a class"),
        ],
    )
    def test_refused(self, library: Any, name: Any, part: str) -> None:
        before = set(sys.modules)
        one_line(lambda: component_class(library, name), part)
        assert {name.split(".")[0] for name in set(sys.modules) - before} <= {"vargen", "diffusers", "transformers"}

    def test_allowed(self) -> None:
        assert component_class("vargen", "VQTokenizer", "tokenizer") is VQTokenizer
        assert component_class("diffusers", "AutoencoderKL", "tokenizer") is AutoencoderKL
        assert component_class(__name__, "OwnSampler", "sampler") is OwnSampler

    @pytest.mark.parametrize(
        "name", ["DuckTyped", "from_pretrained_function", "OwnPipeline", "NextTokenSampler", "np"]
    )
    def test_what_is_no_component_class_of_the_users_module(self, name: str) -> None:
        one_line(lambda: component_class(__name__, name), "defines no such component class", "ConfigMixin")

    def test_a_module_of_the_user_named_like_one_of_diffusers(self, monkeypatch: pytest.MonkeyPatch) -> None:
        """diffusers would look there."""
        monkeypatch.setitem(sys.modules, "stable_diffusion", sys.modules[__name__])
        one_line(lambda: component_class("stable_diffusion", "OwnSampler"), "a name that diffusers uses")

    @pytest.mark.parametrize(("slot", "name"), [("tokenizer", "NextTokenSampler"), ("sampler", "VQTokenizer")])
    def test_a_class_in_the_wrong_place(self, slot: str, name: str) -> None:
        one_line(lambda: component_class("vargen", name, slot), slot, name, "none of the")

    def test_everything_that_can_be_saved_can_be_named(self) -> None:
        """No shipped or public component is refused by mistake."""
        import vargen

        for name, module in vargen._names.items():
            room = module.split(".")[0]
            if room in ("tokenizers", "backbones", "samplers", "conditioners") and name not in NO_COMPONENTS:
                assert component_class("vargen", name) is getattr(vargen, name)


class TestMalformedIndex:
    ENTRIES: tuple[tuple[dict[str, Any], tuple[str, ...]], ...] = (
        ({"tokenizer": ["vargen"]}, ("tokenizer must be a list of a library and a class", "['vargen']")),
        ({"tokenizer": ["vargen", "VQTokenizer", "x"]}, ("tokenizer must be a list",)),
        ({"tokenizer": []}, ("tokenizer must be a list", "[]")),
        ({"tokenizer": "vargen"}, ("tokenizer must be a list", "'vargen'")),
        ({"tokenizer": 5}, ("tokenizer must be a list", "5")),
        ({"tokenizer": [None, "VQTokenizer"]}, ("names of a library and of a class",)),
        ({"tokenizer": ["vargen", None]}, ("names of a library and of a class",)),
        ({"tokenizer": [["vargen"], ["VQTokenizer"]]}, ("names of a library and of a class",)),
        ({"tokenizer": [None, None]}, ("names no tokenizer",)),
        ({"tokenizer": None}, ("names no tokenizer",)),  # absent
        ({"sampler": None, "backbone": None}, ("names no backbone",)),
        ({"drafter": False}, ("drafter must be a list",)),
        ({"../sampler": ["vargen", "NextTokenSampler"]}, ("not the name of a component", "'../sampler'")),
        ({"/etc": ["vargen", "NextTokenSampler"]}, ("not the name of a component",)),
        ({"x" * 1000: ["vargen", "NextTokenSampler"]}, ("not the name of a component",)),
        ({"_class_name": None}, ("names no _class_name",)),
        ({"_class_name": []}, ("_class_name must be the name of one class", "[]")),
        ({"_class_name": 3}, ("_class_name must be the name of one class", "3")),
        ({"_class_name": "a b"}, ("_class_name must be the name of one class",)),
        ({"_class_name": "x" * 1000}, ("_class_name must be the name of one class",)),
        ({"_class_name": "StableDiffusionPipeline"}, ("of diffusers",)),
        ({"_class_name": "VideoPipeline"}, ("draws videos",)),
        ({"_ignore_files": 3}, ("_ignore_files must be a list of names",)),
        ({"_shared": ["tokenizer"]}, ("_shared must be an object", "['tokenizer']")),
        ({"_shared": "tokenizer"}, ("_shared must be an object",)),
        ({"_shared": 1}, ("_shared must be an object",)),
        ({"_shared": {"_class_name": "other"}}, ("none of its components", "_class_name")),
        ({"_shared": {"drafter": "other"}}, ("none of its components", "drafter")),
        *(
            ({"_shared": {"tokenizer": bad}}, ("not the name of a folder beside it",))
            for bad in ("../other", "..", ".", "", "/etc", "a\\b", "other/", "c:x", "a\x1b[2J", 3, ["other"], {}, None)
            if bad is not None
        ),
        ({"_shared": {"tokenizer": "absent"}}, ("takes its tokenizer from the folder absent",)),
    )

    @pytest.mark.parametrize(("entries", "parts"), ENTRIES, ids=lambda value: json.dumps(value)[:60])
    def test_entries(self, saved: Path, entries: dict[str, Any], parts: tuple[str, ...]) -> None:
        edit_index(saved, **entries)
        weights = next(saved.glob("tokenizer/*.safetensors"))
        weights.write_bytes(b"")  # whoever reads on finds this
        refused(saved, *parts)

    @pytest.mark.parametrize(
        ("content", "part"),
        [
            (DEEP.encode(), "nests its values too deeply"),
            (b'{"a":' * 500 + b"1" + b"}" * 500, f"more than {MAX_DEPTH} levels"),
            (b'{"_class_name": ' + b"1" * 5000 + b"}", "not valid JSON"),
            (b" " * (MAX_BYTES + 1), f"larger than {MAX_BYTES:,} bytes"),
            (b'{"_class_name": "\xff"}', "not UTF-8 text"),
            (b"\xff\xfe{\x00}\x00", "not UTF-8 text"),
            (b"null", "must hold a JSON object"),
            (b'"' + b"x" * 10_000 + b'"', "must hold a JSON object"),
            (b"", "not valid JSON"),
        ],
        ids=["deep", "rather deep", "digits", "large", "bytes", "utf-16", "null", "text", "empty"],
    )
    def test_content(self, saved: Path, content: bytes, part: str) -> None:
        for file in ("model_index.json", "tokenizer/config.json", "sampler/sampler_config.json"):
            kept = (saved / file).read_bytes()
            (saved / file).write_bytes(content)
            refused(saved, part, file)
            (saved / file).write_bytes(kept)
        (saved / "sampler" / "sampler_config.json").write_bytes(content)
        one_line(lambda: NextTokenSampler.from_pretrained(saved / "sampler"), part)
        ImagePipeline.from_pretrained(saved, sampler=NextTokenSampler())  # what is replaced need not be whole

    def test_settings_of_videos_are_checked_before_components(self, saved: Path) -> None:
        for fps in ([1], "8", 0, 10**30, True, 1.5):
            edit_index(saved, _class_name="VideoPipeline", fps=fps)
            next(saved.glob("tokenizer/*.safetensors")).write_bytes(b"")  # whoever reads on finds this
            one_line(lambda: VideoPipeline.from_pretrained(saved), "fps must be")

    def test_sparse_files_are_not_read_whole(self, saved: Path) -> None:
        with (saved / "model_index.json").open("wb") as file:
            file.truncate(1 << 40)
        refused(saved, f"larger than {MAX_BYTES:,} bytes")

    @pytest.mark.skipif(not hasattr(os, "mkfifo"), reason="no named pipes here")
    def test_a_pipe_is_not_waited_for(self, saved: Path) -> None:
        for file in ("model_index.json", "tokenizer/config.json"):
            kept = (saved / file).rename(saved / "kept")
            os.mkfifo(saved / file)
            refused(saved, file.split("/")[-1])
            one_line(lambda file=file: read_settings(saved / file), "is not a file")
            kept.replace(saved / file)


class TestMalformedComponent:
    SETTINGS: tuple[tuple[str, dict[str, Any], tuple[str, ...]], ...] = (
        ("backbone/config.json", {"_class_name": ["x", "y"]}, ("_class_name must be", "['x', 'y']")),
        (
            "backbone/config.json",
            {"_class_name": "VARTransformer"},
            ("settings of VARTransformer", "LlamaGenTransformer"),
        ),
        ("sampler/sampler_config.json", {"_class_name": "Sampler"}, ("settings of Sampler", "NextTokenSampler")),
        ("backbone/config.json", {"auto_map": {"AutoModel": "x.Y"}}, ("auto_map", "choose code")),
        ("tokenizer/config.json", {"quantization_config": {"quant_method": "bitsandbytes"}}, ("quantization_config",)),
        ("backbone/config.json", {"_use_default_values": 3}, ("_use_default_values must be a list",)),
        ("backbone/config.json", {"_use_default_values": [[]]}, ("_use_default_values must be a list",)),
        ("backbone/config.json", {"num_layers": "many"}, ("num_layers must be an integer", "'many'")),
        ("conditioner/conditioner_config.json", {"vocabulary": "nothing"}, ("vocabulary must be one of",)),
        ("conditioner/conditioner_config.json", {"vocabulary": ["os", "system"]}, ("vocabulary",)),
        ("sampler/sampler_config.json", {"y" * 100_000: 1}, ("no setting 'yyy",)),
    )

    @pytest.mark.parametrize(("file", "entries", "parts"), SETTINGS, ids=lambda value: str(value)[:60])
    def test_settings(self, saved: Path, file: str, entries: dict[str, Any], parts: tuple[str, ...]) -> None:
        edit(saved / file, **entries)
        refused(saved, *parts)

    def test_a_component_without_settings(self, saved: Path) -> None:
        (saved / "sampler" / "sampler_config.json").unlink()
        refused(saved, "sampler", "holds no sampler_config.json")

    @pytest.mark.parametrize("shard", ["../other/x.safetensors", "/etc/passwd", 3, ""])
    def test_shards_lie_beside_their_index(self, saved: Path, shard: Any) -> None:
        index = saved / "backbone" / "diffusion_pytorch_model.safetensors.index.json"
        index.write_text(json.dumps({"metadata": {}, "weight_map": {"output.weight": shard}}))
        refused(saved, "not the name of a file", shown(shard))
        index.write_text(DEEP)
        refused(saved, "nests its values too deeply")
        index.write_text("{}")
        refused(saved, "no weight_map")

    @pytest.mark.skipif(os.name != "posix", reason="links")
    def test_links_to_folders_elsewhere(self, saved: Path, tmp_path: Path, trap: Trap) -> None:
        away = shutil.move(saved / "tokenizer", tmp_path / "away")
        (saved / "tokenizer").symlink_to(away, target_is_directory=True)
        refused(saved, "a link that leads out of")
        (saved / "tokenizer").unlink()
        shutil.copytree(away, saved / "tokenizer")
        (saved / "tokenizer" / "deeper").symlink_to(trap.trace.parent, target_is_directory=True)
        refused(saved, "holds the link 'deeper'")
        (saved / "tokenizer" / "deeper").unlink()
        (saved / "drafter").symlink_to(saved / "backbone", target_is_directory=True)  # it stays inside
        ImagePipeline.from_pretrained(edit_index(saved, drafter=["vargen", "LlamaGenTransformer"]))

    def test_folders_with_very_many_files(self, saved: Path, monkeypatch: pytest.MonkeyPatch) -> None:
        monkeypatch.setattr("vargen.validation.folders.MAX_FILES", 3)
        for number in range(3):
            (saved / "backbone" / f"{number}.txt").touch()
        refused(saved, "backbone", "more than 3 files")

    def test_autoencoders_are_checked_as_well(self, tmp_path: Path, trap: Trap) -> None:
        AutoencoderKL(norm_num_groups=2, block_out_channels=(8,)).save_pretrained(tmp_path / "kl")
        load_autoencoder(tmp_path / "kl")
        (tmp_path / "kl" / "diffusers.py").write_text(trap.source)
        one_line(lambda: load_autoencoder(tmp_path / "kl"), "holds the Python file")
        (tmp_path / "kl" / "config.json").write_text(DEEP)
        one_line(lambda: load_autoencoder(tmp_path / "kl"), "nests its values too deeply")
        trap.assert_untouched()

    def test_settings_of_emu35_choose_no_attention(self) -> None:
        pytest.importorskip("transformers")
        stored = {
            "hidden_size": 8,
            "num_attention_heads": 2,
            "attn_implementation": "evil/kernel",
            "auto_map": {"a": "b"},
        }
        config = emu35_config(stored)
        assert config.hidden_size == 8
        assert config._attn_implementation is None
        assert not hasattr(config, "auto_map")


class TestCaptions:
    """A conditioner holds a model and a tokenizer of transformers, which have ways of their own to run code."""

    @pytest.fixture
    def folder(self, tmp_path: Path) -> Path:
        from tests.test_pipeline import caption_conditioner

        transformers = pytest.importorskip("transformers")
        caption_conditioner(transformers).save_pretrained(tmp_path / "conditioner")
        return tmp_path / "conditioner"

    CHANGES: tuple[tuple[str, dict[str, Any], str], ...] = (
        ("tokenizer/tokenizer_config.json", {"auto_map": {"AutoTokenizer": [None, f"{PAYLOAD}.X"]}}, "auto_map"),
        ("tokenizer/tokenizer_config.json", {"tokenizer_class": "BertTokenizer"}, "may only name"),
        ("tokenizer/tokenizer_config.json", {"tokenizer_class": ["a", "b"]}, "names of a library and of a class"),
        ("text_encoder/config.json", {"auto_map": {"AutoModel": f"{PAYLOAD}.X"}}, "auto_map"),
        ("text_encoder/config.json", {"attn_implementation": "evil/kernel"}, "attn_implementation"),
        ("text_encoder/config.json", {"_attn_implementation": "evil/kernel"}, "_attn_implementation"),
        ("text_encoder/config.json", {"quantization_config": {"quant_method": "awq"}}, "quantization_config"),
    )

    @pytest.mark.parametrize(("file", "entries", "part"), CHANGES)
    def test_settings(self, folder: Path, trap: Trap, file: str, entries: dict[str, Any], part: str) -> None:
        (trap.trace.parent / f"{PAYLOAD}.py").write_text(trap.source)
        edit(folder / file, **entries)
        one_line(lambda: T5CaptionConditioner.from_pretrained(folder), part)
        trap.assert_untouched()

    @pytest.mark.parametrize("place", ["tokenizer", "text_encoder", "."])
    def test_code_beside_them(self, folder: Path, trap: Trap, place: str) -> None:
        T5CaptionConditioner.from_pretrained(folder)
        (folder / place / f"{PAYLOAD}.py").write_text(trap.source)
        one_line(lambda: T5CaptionConditioner.from_pretrained(folder), "holds the Python file")
        trap.assert_untouched()

    def test_a_model_that_is_only_named_is_checked_when_it_is_loaded(self, folder: Path, trap: Trap) -> None:
        both = folder.parent / "both"
        for part in ("tokenizer", "text_encoder"):
            shutil.copytree(folder / part, both, dirs_exist_ok=True)
        T5CaptionConditioner(model_name=str(both), max_length=6, clean=False).encode(["fox"])
        (both / f"{PAYLOAD}.py").write_text(trap.source)
        for load in (load_text_encoder, load_text_tokenizer):
            one_line(lambda load=load: load(both), "holds the Python file")
        lazy = T5CaptionConditioner(model_name=str(both), max_length=6, clean=False)
        one_line(lambda: lazy.encode(["fox"]), "cannot load the text encoder", "Python file", error=OSError)
        trap.assert_untouched()

    @pytest.mark.parametrize(("file", "load"), [("config.json", "encoder"), ("tokenizer_config.json", "tokenizer")])
    def test_a_model_on_the_hub_chooses_no_code_either(
        self, folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, file: str, load: str
    ) -> None:
        for part in ("tokenizer", "text_encoder"):
            shutil.copytree(folder / part, tmp_path / "both", dirs_exist_ok=True)
        place = into_hub_cache(tmp_path / "both", tmp_path / "hub")
        monkeypatch.setattr("huggingface_hub.constants.HF_HUB_CACHE", str(tmp_path / "hub"))
        monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
        call = {"encoder": load_text_encoder, "tokenizer": load_text_tokenizer}[load]
        call("some/model")
        stored = json.loads((place / file).read_text())
        (place / file).unlink()
        (place / file).write_text(json.dumps(stored | {"auto_map": {"AutoTokenizer": [None, f"{PAYLOAD}.X"]}}))
        one_line(lambda: call("some/model"), file, "auto_map", "choose code")


class TestOneLine:
    @pytest.mark.parametrize(
        ("error", "expected"),
        [
            (TypeError("a\nb"), "cannot load somewhere: TypeError: a b"),
            (ValueError("as it is"), "as it is"),
            (ValueError("two\nlines"), "cannot load somewhere: two lines"),
            (ValueError("red \x1b[31m"), "cannot load somewhere: red ?[31m"),
            (RecursionError("too deep"), "cannot load somewhere: RecursionError: too deep"),
            (OSError("no such\nfile"), "cannot load somewhere: no such file"),
        ],
    )
    def test_messages(self, error: Exception, expected: str) -> None:
        with pytest.raises(ValueError, match=r".") as caught, in_one_line("somewhere"):
            raise error
        assert str(caught.value) == expected

    def test_a_folder_within_a_folder_is_named_once(self) -> None:
        with pytest.raises(ValueError, match=r"^cannot load inner: xxx"), in_one_line("outer"), in_one_line("inner"):
            raise ValueError("x" * 10**6)

    def test_long_messages_are_cut(self) -> None:
        with pytest.raises(ValueError, match=r"\.\.\.$") as caught, in_one_line("somewhere"):
            raise ValueError("x" * 10**6)
        assert len(str(caught.value)) < 600

    @pytest.mark.parametrize("error", [MemoryError(), ImportError("pip install"), torch.OutOfMemoryError("x\ny")])
    def test_what_the_folder_has_nothing_to_do_with_passes(self, error: Exception) -> None:
        with pytest.raises(type(error)) as caught, in_one_line("somewhere"):
            raise error
        assert caught.value is error

    def test_values_are_shown_short(self) -> None:
        deep: Any = []
        for _ in range(900):
            deep = [deep]
        for value in (deep, "x" * 10**6, list(range(10**5)), {"a" * 1000: deep}):
            assert len(shown(value)) < 400

    def test_plain_names(self) -> None:
        assert all(map(is_plain_name, ("heroes32-mar", "a.b", "ä")))
        assert not any(map(is_plain_name, ("", ".", "..", "a/b", "a\\b", "c:", "a\0", "a\n")))


# --- anything at all ------------------------------------------------------------------------------------------------

NAMES = st.sampled_from(
    [
        *COMPONENTS,
        "drafter",
        "eagle",
        "fps",
        "_shared",
        "_class_name",
        "_x",
        "_ignore_files",
        "../x",
        "_diffusers_version",
    ]
)
WORDS = st.sampled_from(
    "vargen diffusers transformers os subprocess Popen X VQTokenizer AutoencoderKL LlamaGenTransformer "
    f"NextTokenSampler AutoModel wrap ImagePipeline other ../other .. {PAYLOAD} ".split(" ")
)
SCALARS = st.none() | st.booleans() | st.integers(-(10**30), 10**30) | st.floats() | WORDS | st.text(max_size=8)
ENTRY = st.lists(WORDS | st.none(), min_size=2, max_size=2)
JSON = st.recursive(
    SCALARS | ENTRY,
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(NAMES | WORDS, inner, max_size=3),
    max_leaves=6,
)
KINDS = (NextTokenSampler, AttributeConditioner, LlamaGenTransformer, VQTokenizer)
SIZES = st.sampled_from(
    [-1, 0, 1, 2, 10**6, 10**9, 2**63, [], [0, 0], [1, 2], [10**9, 10**9], [10**6] * 3, [1] * 1000]
)
FEW = settings(deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])


def attempt(call: Callable[[], Any]) -> bool:
    """Whether a call succeeds; it may only fail with one line."""
    message = None
    try:
        call()
    except ValueError as error:
        message = str(error)
    assert message is None or ("\n" not in message and 0 < len(message) < 600)
    return message is None


class TestAnything:
    @settings(FEW, max_examples=100)
    @given(changes=st.dictionaries(NAMES, ENTRY | JSON, min_size=1, max_size=4))
    def test_index(self, saved: Path, trap: Trap, changes: dict[str, Any]) -> None:
        before = (saved / "model_index.json").read_text()
        try:
            (saved / "model_index.json").write_text(json.dumps(json.loads(before) | changes))
            attempt(lambda: read_index(saved))
        finally:
            (saved / "model_index.json").write_text(before)
        trap.assert_untouched()

    @settings(FEW, max_examples=6)
    @given(changes=st.dictionaries(NAMES, ENTRY | JSON, max_size=2))
    def test_pipeline(self, saved: Path, trap: Trap, changes: dict[str, Any]) -> None:
        before = (saved / "model_index.json").read_text()
        try:
            (saved / "model_index.json").write_text(json.dumps(json.loads(before) | changes))
            checked = attempt(lambda: read_index(saved))
            assert attempt(lambda: ImagePipeline.from_pretrained(saved)) <= checked
        finally:
            (saved / "model_index.json").write_text(before)
        trap.assert_untouched()

    @settings(FEW, max_examples=60)
    @given(content=st.binary(max_size=40) | JSON.map(lambda value: json.dumps(value).encode()))
    def test_file(self, tmp_path: Path, content: bytes) -> None:
        (tmp_path / "model_index.json").write_bytes(content)
        assert not attempt(lambda: ImagePipeline.from_pretrained(tmp_path))

    @settings(FEW, max_examples=60)
    @given(
        kind=st.sampled_from(KINDS),
        changes=st.lists(st.tuples(st.integers(0, 99), SIZES | JSON), min_size=1, max_size=3),
    )
    def test_component(self, saved: Path, trap: Trap, kind: Any, changes: list[tuple[int, Any]]) -> None:
        slot = component_slot(kind)
        file = saved / slot / kind.config_name
        before = file.read_text()
        names = [*json.loads(before), "_use_default_values", "auto_map", "unknown"]
        try:
            chosen = {names[index % len(names)]: value for index, value in changes}
            file.write_text(json.dumps(json.loads(before) | chosen))
            attempt(lambda: kind.from_pretrained(saved / slot))
            attempt(lambda: Sampler.from_pretrained(saved / slot))
            attempt(lambda: read_index(saved))
        finally:
            file.write_text(before)
        trap.assert_untouched()


def test_every_component_goes_through_the_check() -> None:
    """A new component class that forgets the base would be loaded unseen."""
    import vargen
    from vargen.validation.folders import Stored

    for name, module in vargen._names.items():
        kind = getattr(vargen, name)
        if isinstance(kind, type) and issubclass(kind, ConfigMixin) and not issubclass(kind, DiffusionPipeline):
            assert issubclass(kind, Stored), module
            assert kind._dict_from_json_file.__func__ is Stored._dict_from_json_file.__func__

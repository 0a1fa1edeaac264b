"""Checkpoints that ask for more than any model: refused in one line, before time or memory is spent."""

from __future__ import annotations

import json
import resource
import zipfile
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import save_file
from torch import Tensor
from typer.testing import CliRunner

from tests import outside
from tests.checkpoint_families import FAMILIES, weights
from vargen.adapters.pixels import taming_decoder
from vargen.backbones.llamagen.model import LlamaGenTransformer
from vargen.backbones.mar.causal import CausalMARTransformer
from vargen.backbones.mar.model import MARTransformer
from vargen.backbones.var.model import VARTransformer
from vargen.checkpoints import files as checkpoint_files
from vargen.checkpoints import pickles as checkpoint_pickles
from vargen.checkpoints import verify
from vargen.checkpoints.bounds import CheckpointError, count_layers, read_shape
from vargen.checkpoints.reader import CONTAINER_KEYS, load_original, load_strict
from vargen.checkpoints.verify import convert_checkpoint, verify_checkpoint
from vargen.cli.main import app
from vargen.tokenizers.vq.checkpoints import llamagen_to_taming

NUMBERED = [name for name, example in FAMILIES.items() if example.numbered]
GRID = {"num_heads": 2, "grid_size": (2, 2)}


def refusal(call: Any, *arguments: Any, **options: Any) -> str:
    """The one line with which a call refuses."""
    return outside.refusal(lambda: call(*arguments, **options))


def peak() -> int:
    """Kilobytes that this process had in memory at most."""
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss


class Counting(Mapping[str, Any]):
    """A container that counts how often it is read."""

    def __init__(self, content: dict[str, Any]) -> None:
        self.content, self.reads = content, 0

    def __getitem__(self, key: str) -> Any:
        return self.content[key]

    def __iter__(self) -> Iterator[str]:
        self.reads += 1
        return iter(self.content)

    def __len__(self) -> int:
        return len(self.content)


class TestContainers:
    def test_shared_containers_are_opened_once(self) -> None:
        inner = innermost = Counting({"epoch": 3})
        for _ in range(4):
            inner = Counting(dict.fromkeys(CONTAINER_KEYS, inner))
        assert "no tensors" in refusal(load_original, inner)
        assert innermost.reads == 1  # 7^4 times if each way were followed

    def test_shared_containers_in_a_file(self, tmp_path: Path) -> None:
        inner: dict[str, Any] = {"epoch": 3}
        for _ in range(15):
            inner = dict.fromkeys(CONTAINER_KEYS, inner)
        torch.save(inner, tmp_path / "x.pt")
        assert "no tensors" in refusal(verify_checkpoint, tmp_path / "x.pt")

    def test_a_container_inside_itself_is_searched_once(self) -> None:
        loop: dict[str, Any] = {"a": torch.ones(1)}
        loop.update(model=loop, state_dict={"module": loop})
        assert set(load_original(loop)) == {"a"}

    @pytest.mark.parametrize("depth", [20, 5000])
    def test_depth_is_bounded(self, depth: int) -> None:
        inner: dict[str, Any] = {"a": torch.ones(1)}
        for _ in range(depth):
            inner = {"model": inner}
        assert "nests containers more than 16 deep" in refusal(load_original, inner)

    def test_only_named_entries_are_weights(self) -> None:
        assert set(load_original({3: torch.ones(1), ("b",): torch.ones(1), "a": torch.ones(1)})) == {"a"}

    @pytest.mark.parametrize("checkpoint", [None, 3, [torch.ones(1)]])
    def test_other_things_are_no_checkpoints(self, checkpoint: Any) -> None:
        assert "a path or a state dict" in refusal(load_original, checkpoint)

    def test_messages_are_one_printable_line_of_bounded_length(self) -> None:
        state = {**weights("LlamaGen"), "a\n\x1b[2J\u2028b": torch.ones(1), "c" * 500: torch.ones(1)}
        message = refusal(LlamaGenTransformer.from_original, state, **GRID)
        assert r"a\n\x1b[2J\u2028b" in message
        assert len(str(CheckpointError("x" * 10**6))) < outside.LONGEST


class TestTensors:
    @pytest.mark.filterwarnings("ignore:Sparse invariant", "ignore:torch.quantize")
    @pytest.mark.parametrize(
        ("make", "message"),
        [
            (lambda: torch.zeros(1, 8).expand(10**9, 8), "claim 32,000,00"),
            (lambda: torch.zeros(2**20).as_strided((2**20, 2**10), (0, 1)), "views that repeat themselves"),
            (lambda: torch.zeros(3, 3).to_sparse(), "sparse, quantized or nested"),
            (lambda: torch.sparse_coo_tensor(torch.zeros(2, 1).long(), torch.ones(1), (10**9, 10**9)), "sparse"),
            (lambda: torch.quantize_per_tensor(torch.ones(3), 0.1, 0, torch.qint8), "quantized"),
        ],
        ids=["a billion rows", "windows", "sparse", "huge and sparse", "quantized"],
    )
    def test_what_no_weights_look_like_is_refused(self, make: Callable[[], Tensor], message: str) -> None:
        state = {**weights("LlamaGen"), "tok_embeddings.weight": make()}
        assert message in refusal(LlamaGenTransformer.from_original, state, **GRID)
        assert message in refusal(verify_checkpoint, state)

    def test_number_of_tensors_and_length_of_names_are_bounded(self) -> None:
        one = torch.zeros(1)
        assert "100,000 tensors" in refusal(load_original, dict.fromkeys(map(str, range(100_000)), one))
        assert "name has 1,000 characters" in refusal(load_original, {"x" * 1000: one})

    def test_numbers_may_be_shared_as_tied_tables_are_but_not_without_end(self) -> None:
        table = torch.zeros(2**12, 2**10)  # 16 MiB
        assert len(load_original({"in": table, "out": table})) == 2
        assert "store 16,777,216" in refusal(load_original, {f"x{i}": table for i in range(9)})

    def test_a_small_table_of_equal_rows_becomes_a_table(self) -> None:
        state = weights("LlamaGen")
        state["layers.0.attention.wo.weight"] = torch.randn(1, 8).expand(8, 8)
        model = LlamaGenTransformer.from_original(state, **GRID)
        assert model.layers[0].attention.wo.weight.is_contiguous()

    def test_shapes_without_numbers_from_a_file_are_refused(self, tmp_path: Path) -> None:
        torch.save({"a": torch.ones(10**9, device="meta")}, tmp_path / "x.pt")
        assert "a has a shape but no numbers" in refusal(load_original, tmp_path / "x.pt")
        state = weights("LlamaGen")
        state["norm.weight"] = state["norm.weight"].to("meta")
        assert "norm.weight: the state dict has shapes" in refusal(LlamaGenTransformer.from_original, state, **GRID)

    def test_tied_and_transposed_weights_become_weights_of_their_own(self, tmp_path: Path) -> None:
        state = weights("LlamaGen")
        state["output.weight"] = state["tok_embeddings.weight"]
        state["layers.0.attention.wo.weight"] = torch.randn(8, 8).t()
        model = LlamaGenTransformer.from_original(state, **GRID)
        assert model.output.weight.data_ptr() != model.tok_embeddings.weight.data_ptr()
        convert_checkpoint(state, tmp_path / "folder", **GRID)  # safetensors stores neither shared nor strided memory
        again = LlamaGenTransformer.from_pretrained(tmp_path / "folder").state_dict()
        assert all(torch.equal(again[name], value) for name, value in state.items())


class TestLayers:
    @pytest.mark.parametrize("name", NUMBERED)
    @pytest.mark.parametrize("number", ["99999999", "9" * 5000])
    def test_a_number_that_only_a_name_claims_builds_nothing(self, name: str, number: str) -> None:
        example, state = FAMILIES[name], weights(name)
        assert example.numbered is not None
        state[f"{example.numbered}{number}.x"[:500]] = torch.zeros(1)
        wanted = "layers are numbered from 0 without holes"
        assert wanted in refusal(example.load, state, **example.settings)
        if name != "Eagle":  # there is no manifest of drafters
            assert wanted in refusal(verify_checkpoint, state)

    @pytest.mark.parametrize("name", NUMBERED)
    def test_holes_are_named(self, name: str) -> None:
        example, state = FAMILIES[name], weights(name)
        prefix = str(example.numbered)
        last = count_layers(state, prefix) - 1
        moved = {key.replace(f"{prefix}{last}.", f"{prefix}7."): value for key, value in state.items()}
        message = refusal(example.load, moved, **example.settings)
        prefix = prefix.removeprefix("transformer.")  # of the files of NBP
        assert f"no {prefix}{last}, yet {prefix}7; layers are numbered from 0 without holes" in message

    def test_causal_mar_is_not_taken_for_mar(self) -> None:
        sizes = {"dim": 8, "num_layers": 2, "num_heads": 2, "grid_size": (2, 2), "head_depth": 1, "head_width": 8}
        state = CausalMARTransformer(**sizes, num_classes=3).state_dict()
        for call in (MARTransformer.from_original, verify_checkpoint):
            assert "not a MAR checkpoint" in refusal(call, state)

    def test_nothing_is_allocated_for_a_width_that_the_other_weights_do_not_have(self) -> None:
        state = weights("Eagle")
        state |= {"embed_tokens.weight": torch.zeros(1, 2**13), "layers.0.mlp.gate_proj.weight": torch.zeros(1, 2**13)}
        before = peak()
        assert "does not fit EagleDrafter" in refusal(FAMILIES["Eagle"].load, state, **FAMILIES["Eagle"].settings)
        assert peak() - before < 2**18  # the weights of such a drafter take 2 GB

    def test_levels_of_autoencoders_are_as_many_as_diffusers_can_build(self) -> None:
        state = weights("KL") | {f"encoder.down.0.block.{i}.x": torch.zeros(1) for i in range(1, 70)}
        for call in (FAMILIES["KL"].load, verify_checkpoint):
            assert "layers_per_block must be an integer in 1..64, got 70" in refusal(call, state)

    def test_decoders_of_adapters_count_alike(self) -> None:
        state = llamagen_to_taming(weights("VQ"))
        state["decoder.up.99999999.x"] = torch.zeros(1)
        assert "without holes" in refusal(taming_decoder, state)

    @pytest.mark.parametrize("number", ["-1", "01", "²", "x", "", "1e3"])
    def test_only_plain_numbers_count(self, number: str) -> None:
        assert "without holes" in refusal(count_layers, ["layers.0.w", f"layers.{number}.w"], "layers.")

    def test_bounds_of_the_count(self) -> None:
        many = [f"layers.{i}.w" for i in range(2000)]
        assert "2000 layers.*, at most 1024" in refusal(count_layers, many, "layers.")
        assert count_layers(many, "blocks.", least=0) == 0
        assert "no blocks.0" in refusal(count_layers, many, "blocks.")

    @pytest.mark.parametrize("shape", [(), (3,), (0, 3), (3, 2**40), (3, 3, 3)])
    def test_shapes_are_read_with_their_axes(self, shape: tuple[int, ...]) -> None:
        state = {"a": torch.empty(shape, device="meta")}
        assert "a must have 2 axes" in refusal(read_shape, state, "a", 2)
        assert "lacks b" in refusal(read_shape, state, "b", 2)


class TestDtypes:
    @pytest.mark.parametrize("dtype", [torch.int64, torch.bool, torch.complex64, torch.float8_e4m3fn])
    @pytest.mark.parametrize("name", ["LlamaGen", "VQ"])
    def test_numbers_that_no_layer_holds_are_refused(self, name: str, dtype: torch.dtype) -> None:
        example, state = FAMILIES[name], weights(name)
        key = next(k for k, v in state.items() if v.ndim > 1 and v.is_floating_point())
        state[key] = state[key].to(dtype)
        message = refusal(example.load, state, **example.settings)
        assert f"is {str(dtype).removeprefix('torch.')} in the file" in message
        assert "convert it to float32, float16" in message

    @pytest.mark.parametrize("name", FAMILIES)
    def test_mixed_precision_becomes_one(self, name: str) -> None:
        example, state = FAMILIES[name], weights(name)
        half = {k: v.half() if i % 2 and v.is_floating_point() else v for i, (k, v) in enumerate(state.items())}
        model = example.load(half, **example.settings)
        assert {p.dtype for p in model.parameters()} == {torch.float32}

    def test_mixed_precision_runs(self) -> None:
        state = {k: v.half() if "layers." in k else v for k, v in weights("LlamaGen").items()}
        model = LlamaGenTransformer.from_original(state, **GRID)
        rounded = {k: v.float() for k, v in state.items()}
        whole = LlamaGenTransformer.from_original(rounded, **GRID)
        codes, labels = torch.zeros(1, 4, dtype=torch.int64), torch.tensor([1])
        assert torch.equal(model(codes, labels), whole(codes, labels))

    def test_brain_and_half_floats_meet_in_float32(self) -> None:
        state = {k: v.half() if "layers." in k else v.bfloat16() for k, v in weights("LlamaGen").items()}
        assert LlamaGenTransformer.from_original(state, **GRID).dtype == torch.float32
        state = {k: v.bfloat16() for k, v in weights("LlamaGen").items()}
        assert LlamaGenTransformer.from_original(state, **GRID).dtype == torch.bfloat16

    def test_integer_tables_keep_their_kind(self) -> None:
        module = torch.nn.BatchNorm1d(2)
        state = {**module.state_dict(), "num_batches_tracked": torch.zeros(())}
        assert "num_batches_tracked is float32 in the file; convert it to int64" in refusal(load_strict, module, state)

    @pytest.mark.parametrize(
        "levels",
        [
            torch.tensor([[0, 1, 1, 1, 2**40]]),
            torch.tensor([[0, 1, 1, 1, -1]]),
            torch.tensor([[0.0, 1, 1, 1, 1]]),
            torch.tensor([0, 1]),
            torch.zeros(1, 0),
        ],
        ids=["huge", "negative", "floating", "too few", "empty"],
    )
    def test_levels_of_var_are_counted_only_when_they_are_levels(self, levels: Tensor) -> None:
        assert "pass scales" in refusal(VARTransformer.from_original, {**weights("VAR"), "lvl_1L": levels})


class TestSettings:
    @pytest.mark.parametrize("heads", [-1, 0, True, "2", 2.5, 10**9, pytest.param(10**5000, id="5000 digits")])
    @pytest.mark.parametrize("name", [name for name, example in FAMILIES.items() if "num_heads" in example.settings])
    def test_heads(self, name: str, heads: Any) -> None:
        example = FAMILIES[name]
        message = refusal(example.load, "absent.pt", **{**example.settings, "num_heads": heads})
        assert "num_heads must be an integer in 1..65536, got" in message  # and not that the file is absent

    @pytest.mark.parametrize("grid", [(0, 0), (-1, 5), (10**9, 10**9), 0, "4x4", (True, 2), (2.0, 2), (2,)])
    @pytest.mark.parametrize("name", [name for name, example in FAMILIES.items() if "grid_size" in example.settings])
    def test_grid(self, name: str, grid: Any) -> None:
        example = FAMILIES[name]
        message = refusal(example.load, "absent.pt", **{**example.settings, "grid_size": grid})
        assert "grid_size" in message

    @pytest.mark.parametrize("name", FAMILIES)
    def test_unknown_names_and_absent_files(self, name: str) -> None:
        example = FAMILIES[name]
        assert "no setting 'headz'" in refusal(example.load, "absent.pt", **example.settings, headz=2)
        assert "no checkpoint file absent.pt" in refusal(example.load, "absent.pt", **example.settings)

    def test_none_is_not_given(self) -> None:
        model = LlamaGenTransformer.from_original(weights("LlamaGen"), **GRID, num_kv_heads=None, ffn_dim=None)
        assert (model.config.num_kv_heads, model.config.ffn_dim) == (2, 16)

    @pytest.mark.parametrize("heads", [3, 16])
    def test_heads_that_do_not_divide_the_width(self, heads: int) -> None:
        state = weights("LlamaGen")
        message = refusal(LlamaGenTransformer.from_original, state, num_heads=heads, grid_size=(2, 2))
        assert f"num_heads must divide the width 8 of the checkpoint, got {heads}" in message

    @pytest.mark.parametrize(
        ("given", "message"),
        [
            ({"layers_per_block": 10**9}, "layers_per_block must be an integer in 1..64"),
            ({"norm_num_groups": 0}, "norm_num_groups must be an integer"),
            ({"block_out_channels": [10**12, 4]}, "block_out_channels"),
            ({"down_block_types": ["DownEncoderBlock2D"]}, "no AutoencoderKL can be built"),
            ({"norm_num_groups": 3}, "no AutoencoderKL can be built"),
        ],
    )
    def test_autoencoders_of_diffusers(self, given: dict[str, Any], message: str) -> None:
        assert message in refusal(FAMILIES["KL"].load, weights("KL"), **given)


def short(text: str) -> bytes:
    return b"X" + len(text).to_bytes(4, "little") + text.encode()


def packed(path: Path, pickled: bytes, numbers: bytes = b"", **options: Any) -> Path:
    """A torch file around a pickle written by hand."""
    with zipfile.ZipFile(path, "w", **options) as archive:
        archive.writestr("x/data.pkl", pickled)
        archive.writestr("x/version", b"3\n")
        archive.writestr("x/data/0", numbers)
    return path


def dictionary(value: bytes, key: bytes = short("a")) -> bytes:
    return b"\x80\x02}" + key + value + b"s."


# (torch.storage of 10^9 float32 under key "0"), offset 0, size (10^9,), stride (1,), no gradient, no hooks
MANY = b"\x8a\x04" + (10**9).to_bytes(4, "little")
CLAIM = (
    b"ctorch._utils\n_rebuild_tensor_v2\n(("
    + (short("storage") + b"ctorch\nFloatStorage\n" + short("0") + short("cpu") + MANY)
    + b"tQK\x00"
    + (b"(" + MANY + b"t(K\x01t\x89ccollections\nOrderedDict\n)RtR")
)
TUPLES = {
    "deep": (b")" + b"\x85" * 100, "nests tuples more than 32 deep"),  # a million of them overflow the stack of C
    "doubled": (b")" + b"q\x00h\x00\x86" * 26, "copies of its own parts"),  # a hash that takes 2^26 steps
}
COPIES = b"](" + short("x" * 2**20) + b"q\x00" + b"c_codecs\nencode\nh\x00\x85R" * 20 + b"e"


class TestPickles:
    @pytest.mark.parametrize("kind", TUPLES)
    def test_keys_that_take_a_stack_or_an_age_to_hash(self, tmp_path: Path, kind: str) -> None:
        key, message = TUPLES[kind]
        assert message in refusal(load_original, packed(tmp_path / "x.pt", dictionary(b"K\x01", key)))

    def test_copies_of_one_large_object(self, tmp_path: Path) -> None:
        assert "copies of its own parts" in refusal(load_original, packed(tmp_path / "x.pt", dictionary(COPIES)))

    @pytest.mark.parametrize("name", ["builtins bytearray", "torch FloatTensor", "torch._utils _rebuild_qtensor"])
    def test_names_that_allocate_what_they_are_told_to(self, tmp_path: Path, name: str) -> None:
        module, function = name.split()
        call = f"c{module}\n{function}\n".encode() + MANY + b"\x85R"
        message = refusal(load_original, packed(tmp_path / "x.pt", dictionary(call)))
        assert f"contains pickled code ({module}.{function})" in message

    def test_number_of_objects(self, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
        monkeypatch.setattr(checkpoint_pickles, "MAX_OPCODES", 1000)
        file = packed(tmp_path / "x.pt", dictionary(b"(" + b"N" * 1000 + b"t"))
        assert "more than 1,000 objects" in refusal(load_original, file)

    def test_numbers_that_are_not_in_the_file(self, tmp_path: Path) -> None:
        file = packed(tmp_path / "x.pt", dictionary(CLAIM), bytes(4))
        before = peak()
        assert "x.pt" in refusal(load_original, file)
        state = load_original({"a": torch.ones(3)})
        torch.save(state, tmp_path / "old.pt", _use_new_zipfile_serialization=False)
        magic = (tmp_path / "old.pt").read_bytes().split(b"\x80\x02}")[0]
        old = magic + b"\x80\x02}." + dictionary(CLAIM.replace(b"tQ", b"NtQ", 1)) + b"\x80\x02]."  # no key to be read
        (tmp_path / "old.pt").write_bytes(old)
        assert "claims 4,000,000,000 bytes of numbers" in refusal(load_original, tmp_path / "old.pt")
        assert peak() - before < 2**19

    def test_methods_of_a_dictionary_are_not_the_files(self, tmp_path: Path) -> None:
        one = CLAIM.replace(MANY, b"K\x01")
        replaced = b"}" + short("items") + b"K\x03s" + short("get") + b"K\x03sb"
        file = packed(
            tmp_path / "x.pt",
            b"\x80\x02ccollections\nOrderedDict\n)R" + short("a") + one + b"s" + replaced + b".",
            bytes(4),
        )
        assert torch.equal(load_original(file)["a"], torch.zeros(1))

    def test_real_files_pass(self, tmp_path: Path) -> None:
        model = torch.nn.Sequential(*[torch.nn.Linear(2, 2) for _ in range(50)])
        optimizer = torch.optim.AdamW(model.parameters())
        model(torch.ones(1, 2)).sum().backward()
        optimizer.step()
        content = {"model": model.state_dict(), "optimizer": optimizer.state_dict(), "names": {"a", "b"}, "raw": b"x"}
        for zipped in (True, False):
            torch.save(content, tmp_path / "x.pt", _use_new_zipfile_serialization=zipped)
            assert len(load_original(tmp_path / "x.pt")) == 100


class TestFiles:
    @pytest.mark.parametrize("head", [b"safetensors", b"PK\x03\x04", b"\x80\x02"])
    def test_a_tebibyte_of_nothing_is_not_opened(
        self, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, head: bytes
    ) -> None:
        def opened(*_: Any, **__: Any) -> None:
            raise AssertionError("opened")

        for reader in ("safe_open", "zipfile.ZipFile", "torch.load"):
            monkeypatch.setattr(f"vargen.checkpoints.files.{reader}", opened)
        path = sparse(tmp_path / "x.pt", 2**40, head)
        for call in (load_original, verify_checkpoint, LlamaGenTransformer.from_original):
            assert "has 1,099,511,627,776 bytes" in refusal(call, path)

    def test_numbers_of_a_large_sparse_file_are_not_read(self, tmp_path: Path) -> None:
        path, before = sparse(tmp_path / "x.pt", 2**32, b"safetensors"), peak()
        assert "lacks" in refusal(LlamaGenTransformer.from_original, path, **GRID)
        assert peak() - before < 2**18

    def test_zip_files_are_read_as_torch_packs_them(self, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
        file = packed(tmp_path / "small.pt", dictionary(b"N" * 2**20), compression=zipfile.ZIP_DEFLATED)
        assert "packed in another way" in refusal(load_original, file)
        (tmp_path / "shifted.pt").write_bytes(b"PK\x03\x04" + packed(tmp_path / "x.pt", dictionary(b"N")).read_bytes())
        assert "packed in another way" in refusal(load_original, tmp_path / "shifted.pt")
        with zipfile.ZipFile(tmp_path / "x.pt", "a") as archive:
            archive.writestr("x/byteorder", b"little" + bytes(2**24))
        assert "x/byteorder has more than" in refusal(load_original, tmp_path / "x.pt")
        monkeypatch.setattr(checkpoint_files, "MAX_DIRECTORY", 100)
        assert "has a directory of" in refusal(load_original, packed(tmp_path / "x.pt", dictionary(b"N")))

    def test_tar_archives_are_refused_before_their_headers_are_believed(self, tmp_path: Path) -> None:
        import tarfile

        head = tarfile.TarInfo("\udc80\x02" + "x" * 20).tobuf(tarfile.USTAR_FORMAT, "utf-8", "surrogateescape")
        (tmp_path / "x.pt").write_bytes(head + bytes(2048))
        assert "tar archive" in refusal(load_original, tmp_path / "x.pt")

    def test_headers_and_counts_of_safetensors_are_bounded(
        self, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        save_file({f"x{i}": torch.zeros(1) for i in range(20)}, tmp_path / "x")
        monkeypatch.setattr(checkpoint_files, "MAX_TENSORS", 10)
        assert "20 tensors, more than the 10 allowed" in refusal(load_original, tmp_path / "x")
        monkeypatch.setattr(checkpoint_files, "MAX_PICKLE", 100)
        assert "at most 100 are read" in refusal(load_original, tmp_path / "x")

    def test_a_file_that_may_not_be_read(self, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
        def denied(*_: Any, **__: Any) -> None:
            raise PermissionError(13, "Permission denied")

        (tmp_path / "x.pt").write_bytes(b"\x80")
        monkeypatch.setattr(Path, "open", denied)
        assert "Permission denied" in refusal(load_original, tmp_path / "x.pt")


def sparse(path: Path, size: int, head: bytes) -> Path:
    """A file that claims a size and takes none."""
    if head == b"safetensors":
        length = 104
        entry = {"dtype": "U8", "shape": [size - 8 - length], "data_offsets": [0, size - 8 - length]}
        head = length.to_bytes(8, "little") + json.dumps({"a": entry}).encode().ljust(length)
    with path.open("wb") as file:
        file.write(head)
        try:
            file.truncate(size)
        except OSError:
            pytest.skip("the file system knows no files of this size")
    return path


class TestVerify:
    @pytest.mark.parametrize("dtype", [torch.int64, torch.bool, torch.complex64, torch.float8_e4m3fn])
    def test_wrong_dtypes_are_reported(self, dtype: torch.dtype) -> None:
        state = weights("LlamaGen")
        assert verify_checkpoint(state).ok
        state["norm.weight"] = state["norm.weight"].to(dtype)
        report = verify_checkpoint(state)
        assert not report.ok
        assert report.wrong_dtypes == ["norm.weight"]
        assert report.not_finite == []

    @pytest.mark.parametrize("place", [(0, 0, 0), (6, 4, 2), (3, 0, 2)])
    def test_nan_is_found_in_whatever_block(self, monkeypatch: pytest.MonkeyPatch, place: tuple[int, ...]) -> None:
        monkeypatch.setattr(verify, "_BLOCK", 4)
        tensor = torch.zeros(7, 5, 3).transpose(0, 1)
        assert verify_checkpoint({"fc": tensor}).not_finite == []
        tensor[place[1], place[0], place[2]] = float("nan")
        assert verify_checkpoint({"fc": tensor}).not_finite == ["fc"]

    def test_scales_are_bounded(self) -> None:
        state = weights("multi-scale VQ")
        state["quantize.ema_vocab_hit_SV"] = torch.zeros(100, 6)
        assert "counts 100 scales, at most 64" in refusal(verify_checkpoint, state)

    @pytest.mark.parametrize("command", [["verify", "x.pt"], ["convert", "x.pt", "out"]])
    @pytest.mark.parametrize("what", ["number", "nested", "deep key", "float8", "repeated"])
    def test_commands_end_in_one_line(
        self, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, command: list[str], what: str
    ) -> None:
        monkeypatch.chdir(tmp_path)
        state: dict[str, Any] = weights("VQ")
        if what == "number":
            state["encoder.conv_blocks.99999999.x"] = torch.zeros(1)
        elif what == "float8":
            state["quantize.embedding.weight"] = state["quantize.embedding.weight"].to(torch.float8_e4m3fn)
        elif what == "repeated":
            state["quantize.embedding.weight"] = torch.zeros(1, 4).expand(10**9, 4)
        elif what == "nested":
            for _ in range(20):
                state = dict.fromkeys(CONTAINER_KEYS, state)
        torch.save(state, "x.pt")
        if what == "deep key":
            packed(Path("x.pt"), dictionary(b"K\x01", TUPLES["deep"][0]))
        result = CliRunner().invoke(app, command)
        assert result.exit_code == 2, result.exception
        assert result.stderr.startswith("error: ")
        assert result.stderr.count("\n") == 1
        assert not Path("out").exists()

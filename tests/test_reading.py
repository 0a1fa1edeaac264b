"""Text, JSON, TOML and numpy's files from outside: bounded, and one printable line where they are refused."""

from __future__ import annotations

import io
import json
import os
import struct
import zipfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image

from tests.outside import at_most, read_or_refused, refusal
from vargen.evaluation import reconstruction
from vargen.evaluation.benchmark import read_bench
from vargen.evaluation.drawing.run_folder import RunFolder, RunImages
from vargen.evaluation.features import _read as read_features
from vargen.evaluation.images import read_images
from vargen.evaluation.report import read_report
from vargen.metrics.statistics import GaussianStatistics
from vargen.validation import pictures
from vargen.validation.arrays import open_npz
from vargen.validation.printable import printable, shown
from vargen.validation.reading import check_plain, parse_json, parse_toml, read_json, read_text, read_value

# --- names


def test_printable_escapes_what_a_terminal_obeys_and_nothing_else() -> None:
    assert printable("plain ümläut 猫\u3000x") == "plain ümläut 猫\u3000x"
    for character in (
        "\x1b",
        "\x07",
        "\n",
        "\r",
        "\x7f",
        "\x85",
        "\x9b",
        "\u2028",
        "\u202e",
        "\u2066",
        "\ud800",
        "\x00",
    ):
        escaped = printable(f"a{character}b")
        assert escaped.isprintable()
        assert escaped.startswith("a\\")
        escaped.encode()
    assert printable("a\nb\x1b", keep="\n") == "a\nb\\x1b"
    assert printable(Path("x\x1b.png")) == r"x\x1b.png"


def test_shown_is_short_whatever_the_value() -> None:
    deep: list[Any] = []
    for _ in range(5_000):
        deep = [deep]
    for value in (10**400, 10**5000, [10**5000], "x\x1b" * 500, deep, {"a": b"\x00"}):
        assert len(shown(value)) <= 80
        assert shown(value).isprintable()
    assert shown(10**400) == "an integer of about 400 digits"
    assert shown(2**64) == "18446744073709551616"


# --- text, JSON, TOML


def test_text_is_bounded_and_comes_from_a_file(tmp_path: Path) -> None:
    (tmp_path / "sparse").touch()
    os.truncate(tmp_path / "sparse", 2**40)
    os.mkfifo(tmp_path / "pipe")
    (tmp_path / "latin").write_bytes(b"caf\xe9")
    for name, part in {"sparse": "larger than", "pipe": "not a file", "latin": "not UTF-8", "none": "no file"}.items():
        assert part in refusal(lambda name=name: read_text(tmp_path / name))  # type: ignore[misc]
    (tmp_path / "good").write_text("é", encoding="utf-8")
    assert read_text(tmp_path / "good") == "é"


@pytest.mark.parametrize(
    ("text", "part"),
    [
        ("[" * 100_000, "nests its values too deeply"),
        ("[" * 40 + "]" * 40, "nests its values too deeply"),
        ('{"a":' * 500 + "1" + "}" * 500, "nests its values too deeply"),
        ("1" + "0" * 400, "an integer of about 400 digits"),
        ("1" + "0" * 5000, "not valid JSON"),
        ("[" + "0," * 2**20 + "0]", "more than 1,048,576 values"),
        ("{", "not valid JSON"),
    ],
    ids=["open", "deep", "objects", "integer", "digits", "many", "cut"],
)
def test_json_beyond_use_is_one_line(text: str, part: str) -> None:
    assert part in refusal(lambda: parse_json(text, "x.json"))


def test_containers_that_share_or_hold_themselves_end() -> None:
    shared: Any = [0]
    for _ in range(30):
        shared = [shared] * 7
    assert "more than" in refusal(lambda: check_plain(shared, "x"))
    own: dict[str, Any] = {}
    own["own"] = own
    assert "too deeply" in refusal(lambda: check_plain(own, "x"))


def test_settings_are_json_or_words() -> None:
    assert [read_value(t) for t in ("16", "[3, 5]", "gumbel", " x ", "1e3")] == [16, [3, 5], "gumbel", "x", 1000.0]
    for text in ("1" + "0" * 400, "1" + "0" * 5000, "[" * 2000):
        refusal(lambda text=text: read_value(text))  # type: ignore[misc]


def test_toml_that_would_take_minutes_is_refused() -> None:
    """The parser's time grows with the square of the parts of a dotted key: 30,000 of them would take minutes."""
    assert "too long" in refusal(lambda: parse_toml("a." * 3_000 + "b = 1", "r.toml"))
    assert "nests" in refusal(lambda: parse_toml("\n".join(["[" * 900] * 2).join(["x = ", ""]), "r.toml"))
    assert "nests" in refusal(lambda: parse_toml("a." * 490 + "b = 1", "r.toml"))


# --- npz


def header(shape: Any, descr: str = "<f8", fortran: bool = False) -> bytes:
    buffer = io.BytesIO()
    np.lib.format.write_array_header_1_0(buffer, {"descr": descr, "fortran_order": fortran, "shape": shape})
    return buffer.getvalue()


def archive(path: Path, method: int = zipfile.ZIP_STORED, **members: bytes) -> Path:
    with zipfile.ZipFile(path, "w", method) as file:
        for name, data in members.items():
            file.writestr(f"{name}.npy", data)
    return path


MU, SIGMA = header((3,)) + np.ones(3).tobytes(), header((3, 3)) + np.eye(3).tobytes()
BAD_STATISTICS: dict[str, tuple[dict[str, bytes], int, str]] = {
    "claims 4 GB": ({"mu": header((23170,)) + bytes(23170 * 8), "sigma": header((23170, 23170))}, 0, "larger than"),
    "ends early": ({"mu": MU, "sigma": header((3, 3)) + bytes(8)}, 0, "ends early"),
    "objects": ({"mu": header((3,), "|O") + bytes(24), "sigma": SIGMA}, 0, "type object"),
    "strings": ({"mu": header((3,), "<U4") + bytes(48), "sigma": SIGMA}, 0, "type <U4"),
    "complex": ({"mu": header((3,), "<c16") + bytes(48), "sigma": SIGMA}, 0, "type complex128"),
    "negative side": ({"mu": header((-3,)) + bytes(24), "sigma": SIGMA}, 0, "negative side"),
    "huge side": ({"mu": header((10**400,)) + bytes(24), "sigma": SIGMA}, 0, "ends early"),
    "huge header": (
        {"mu": b"\x93NUMPY\x02\0" + struct.pack("<I", 2**32 - 1) + bytes(100), "sigma": SIGMA},
        0,
        "header of",
    ),
    "nested header": ({"mu": MU.replace(b"(3,)", b"(" * 4), "sigma": SIGMA}, 0, "unreadable header"),
    "bzip2": ({"mu": MU, "sigma": SIGMA}, zipfile.ZIP_BZIP2, "compressed by the method 12"),
    "NaN": ({"mu": header((3,)) + np.full(3, np.nan).tobytes(), "sigma": SIGMA}, 0, "NaN"),
    "not one size": ({"mu": MU, "sigma": header((2, 3)) + bytes(48)}, 0, "do not belong together"),
    "no array": ({"mu": b"text", "sigma": SIGMA}, 0, "not an array of numpy"),
}


@pytest.mark.parametrize("name", BAD_STATISTICS)
def test_bad_statistics_are_one_line_and_cost_no_memory(name: str, tmp_path: Path) -> None:
    members, method, part = BAD_STATISTICS[name]
    file = archive(tmp_path / "s.npz", method, **members)
    with at_most(megabytes=8):
        assert part in refusal(lambda: GaussianStatistics.load(file))


@pytest.mark.parametrize("count", [-5, 0, 1, 2.5, np.nan, np.inf, "many", [5, 6], 2**63])
def test_a_number_of_samples_is_a_whole_number_of_at_least_two(count: Any, tmp_path: Path) -> None:
    np.savez(tmp_path / "s.npz", mu=np.ones(3), sigma=np.eye(3), num_samples=count)
    assert "num_samples" in refusal(lambda: GaussianStatistics.load(tmp_path / "s.npz"))
    np.savez(tmp_path / "s.npz", mu=np.ones(3, ">f4"), sigma=np.asfortranarray(np.tri(3)), num_samples=np.int32(7))
    loaded = GaussianStatistics.load(tmp_path / "s.npz")
    assert loaded.count == 7
    assert torch.allclose(loaded.mean, torch.ones(3).double())
    assert torch.allclose(loaded.covariance, torch.ones(3, 3).double().tril())


def test_statistics_of_another_network_are_not_read(tmp_path: Path) -> None:
    """Half a megabyte that unpacks to half a gigabyte."""
    members = {"mu": header((8000,)) + bytes(64_000), "sigma": header((8000, 8000)) + bytes(2**20)}
    file = archive(tmp_path / "s.npz", zipfile.ZIP_DEFLATED, **members)
    assert "another network" in refusal(lambda: GaussianStatistics.load(file, num_features=112))


def test_a_damaged_cache_is_made_anew(tmp_path: Path) -> None:
    images = read_images(torch.zeros(2, 3, 8, 8, dtype=torch.uint8))
    good = {"count": np.int64(2), "total": np.ones(3), "outer": np.eye(3), "features": np.ones((2, 3), np.float32)}
    np.savez(tmp_path / "c.npz", **good)  # type: ignore[arg-type]
    assert read_features(tmp_path / "c.npz", images, 3) is not None
    assert read_features(tmp_path / "c.npz", images, 4) is None
    changes = {"count": (np.int64(-2), np.int64(3), np.array("x")), "total": (np.array(["x"] * 3), np.ones(4))}
    changes |= {"outer": (np.full((3, 3), np.nan), np.ones(3)), "features": (np.array([[{}] * 3] * 2),)}  # type: ignore[dict-item]
    for name, values in changes.items():
        for value in values:
            np.savez(tmp_path / "c.npz", **{**good, name: value})  # type: ignore[arg-type]
            assert read_features(tmp_path / "c.npz", images, 3) is None, (name, value)


def test_an_archive_of_images_too_large_for_memory_is_refused_or_streamed(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    bomb = archive(tmp_path / "a.npz", arr_0=header((1, 10**5, 10**5, 3), "|u1"))
    assert "ends early" in refusal(lambda: read_images(bomb))
    monkeypatch.setattr(pictures, "BATCH_PIXELS", 2 * 256 * 256)
    data = header((12, 256, 256, 3), "|u1") + bytes(12 * 256 * 256 * 3)
    good = archive(tmp_path / "b.npz", zipfile.ZIP_DEFLATED, arr_0=data)  # 2.4 MB in three kilobytes
    with at_most(megabytes=1):
        assert [tuple(batch.shape) for batch in read_images(good).batches(64)] == [(2, 3, 256, 256)] * 6


members = st.dictionaries(
    st.sampled_from(["mu", "sigma", "num_samples", "arr_0", "count", "total", "outer", "features", "é\x1b"]),
    st.tuples(
        st.one_of(
            st.builds(
                header,
                st.lists(st.integers(0, 5) | st.sampled_from([-1, 10**6, 10**12, 10**400]), max_size=4).map(tuple),
                st.sampled_from(
                    ["<f8", "<f4", ">f8", "<f2", "<f16", "|u1", "<i8", "|O", "<U3", "|b1", "<c8", "<M8[s]", "|V7"]
                ),
                st.booleans(),
            ),
            st.binary(max_size=40),
            st.just(header((4,)).replace(b"'fortran_order': False", b"'fortran_order':[[[[[")),
        ),
        st.integers(0, 400),
    ),
    max_size=4,
)


@settings(max_examples=60, deadline=None)
@given(
    content=members,
    method=st.sampled_from([zipfile.ZIP_STORED, zipfile.ZIP_DEFLATED, zipfile.ZIP_BZIP2, zipfile.ZIP_LZMA]),
    changes=st.lists(st.tuples(st.integers(0, 10**4), st.integers(0, 255)), max_size=4),
    cut=st.sampled_from([0, 0, 0, 1, 30, 200]),
)
def test_any_archive_is_read_or_one_line(
    tmp_path_factory: pytest.TempPathFactory, content: Any, method: int, changes: Any, cut: int
) -> None:
    file = tmp_path_factory.getbasetemp() / "any.npz"
    archive(file, method, **{name: head + bytes(length) for name, (head, length) in content.items()})
    data = bytearray(file.read_bytes())
    for place, value in changes:
        data[place % len(data)] = value
    file.write_bytes(data[: len(data) - cut])
    images = read_images(torch.zeros(2, 3, 8, 8, dtype=torch.uint8))
    reads: list[Callable[[], Any]] = [
        lambda: GaussianStatistics.load(file),
        lambda: [batch.shape for batch in read_images(file).batches(3)],
        lambda: read_features(file, images, 3),
    ]
    for read in reads:
        read_or_refused(read)


def test_an_archive_is_closed_after_a_refusal(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="ends early"), open_npz(archive(tmp_path / "a.npz", mu=header((9,)))) as file:
        file.read("mu", "f")
    assert file.archive.fp is None


# --- folders of pictures


def test_batches_of_large_pictures_are_small(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    for index in range(5):
        Image.new("L", (40, 30), index).save(tmp_path / f"{index}.png")
    monkeypatch.setattr(pictures, "BATCH_PIXELS", 2 * 40 * 30 + 1)
    folder = read_images(tmp_path)
    together = read_images(torch.cat(list(folder.batches(8))))
    for images in (folder, together):
        assert [len(batch) for batch in images.batches(8)] == [2, 2, 1]
    monkeypatch.undo()
    assert [len(batch) for batch in folder.batches(8)] == [5]


def test_a_reconstruction_of_more_images_than_fit_is_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    images = read_images(torch.zeros(9, 3, 32, 32, dtype=torch.uint8))
    monkeypatch.setattr(reconstruction, "_memory", lambda: 2 * 6 * 32 * 32 * 8)
    assert "take at most 8 of them" in refusal(lambda: reconstruction.evaluate_reconstruction(None, reference=images))  # type: ignore[arg-type]


# --- runs and reports


def record(**changes: Any) -> dict[str, Any]:
    files = {"images/00000000.npy": "0" * 64}
    details = {"seconds": 1.0, "num_forwards": 1, "num_drafter_forwards": 0, "forwards_per_image": None}
    return {"start": 0, "pixels": "0", "files": files, **details, "guarantee": "exact", "notes": [], **changes}


@pytest.mark.parametrize(
    "content",
    [
        [],
        "x",
        record(files={"/etc/passwd": "0"}),
        record(files={"images/../../x.npy": "0"}),
        record(files=[]),
        record(seconds="1"),
        record(notes=[[]]),
        {k: v for k, v in record().items() if k != "num_forwards"},
        {"a": [[[[]]]]},
    ],
)
def test_a_foreign_record_is_no_chunk(content: Any, tmp_path: Path) -> None:
    run = RunFolder(tmp_path / "run", {"num": 2}, num=2, chunk=2, keep_images=True)
    (tmp_path / "run" / "chunks").mkdir()
    (tmp_path / "run" / "chunks" / "00000000.json").write_text(json.dumps(content))
    assert run.record(0) is None


def test_a_record_names_no_file_outside_its_run(tmp_path: Path) -> None:
    manifest = {"num": 2}
    details = {name: value for name, value in record().items() if name not in ("start", "pixels", "files")}
    run = RunFolder(tmp_path / "run", manifest, num=2, chunk=2, keep_images=True)
    run.write(0, torch.zeros(2, 3, 8, 8, dtype=torch.uint8), {}, details)
    (tmp_path / "outside.npy").write_bytes((tmp_path / "run/images/00000000.npy").read_bytes())
    file = tmp_path / "run" / "chunks" / "00000000.json"
    written = json.loads(file.read_text())
    (digest,) = written["files"].values()
    for name, found in (
        ("images/00000000.npy", True),
        ("../outside.npy", False),
        (str(tmp_path / "outside.npy"), False),
    ):
        file.write_text(json.dumps({**written, "files": {**written["files"], name: digest}}))
        again = RunFolder(tmp_path / "run", manifest, num=2, chunk=2, keep_images=True)
        assert (again.record(0) is not None) == found, name


def test_a_run_with_foreign_files_is_one_line(tmp_path: Path) -> None:
    (tmp_path / "images").mkdir()
    (tmp_path / "chunks").mkdir()
    (tmp_path / "manifest.json").write_text('{"num": 2}')
    file = tmp_path / "images" / "00000000.npy"
    for data, part in (
        (header((2, 8, 8, 3), "|u1"), "ends early"),
        (header((2, 10**5, 10**5, 3), "|u1"), "larger than"),
        (header((2, 8, 8, 3), "|O") + bytes(4000), "type object"),
        (header((2, 8, 8, 4), "|u1") + bytes(4000), "holds no uint8"),
        (b"", "not an array"),
    ):
        file.write_bytes(data)
        assert part in refusal(lambda: RunImages(tmp_path))
    file.write_bytes(header((2, 8, 8, 3), "|u1") + bytes(384))
    assert RunImages(tmp_path).num_images == 2
    for text in ("[]", "{", '{"num": "\\u001b"}', "[" * 3000):
        (tmp_path / "manifest.json").write_text(text)
        refusal(lambda: RunImages(tmp_path))


@pytest.mark.parametrize(
    "text", ["[]", "{", "[" * 3000, '{"kind": "fid", "results": [1]}', '{"kind": "fid", "results": []}']
)
def test_what_is_no_report_is_one_line(text: str, tmp_path: Path) -> None:
    (tmp_path / "r.json").write_text(text)
    refusal(lambda: read_report(tmp_path / "r.json"))
    refusal(lambda: read_bench(tmp_path / "r.json"))
    assert "no file" in refusal(lambda: read_json(tmp_path / "none.json"))


def test_a_bench_of_other_types_is_one_line(tmp_path: Path) -> None:
    row = {"name": "a", "sampler": {}, "guarantee": "exact", "forwards": 1.0, "seconds": {"1": 1.0}}
    where = {"date": "d", "hardware": "h", "vargen": "0", "torch": "0"}
    bench = {
        "model": "m",
        "num_images": 0,
        "repeats": 1,
        "floor": None,
        "skipped": {},
        "environment": where,
        "rows": [row],
    }
    (tmp_path / "bench.json").write_text(json.dumps(bench))
    assert read_bench(tmp_path).rows[0].forwards == 1
    for change in ({"rows": []}, {"rows": [{**row, "forwards": 0}]}, {"rows": [{**row, "forwards": "x"}]}, {"rows": [{}]},
                   {"environment": {}}, {"skipped": []}, {"rows": [{**row, "seconds": []}]}, {"floor": "x", "num_images": 1}):  # fmt: skip
        (tmp_path / "bench.json").write_text(json.dumps({**bench, **change}))
        refusal(lambda: read_bench(tmp_path))

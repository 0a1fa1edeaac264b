"""Published manifests: exact counts, every difference reported, conversion."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file
from torch import Tensor

from tests.golden_files import load_file, unpacked
from tests.llamagen_shapes import official_shapes
from vargen.checkpoints.manifests.published import PARAMETERS
from vargen.checkpoints.reader import CheckpointError
from vargen.checkpoints.verify import convert_checkpoint, verify_checkpoint
from vargen.tokenizers.vq.checkpoints import llamagen_to_taming
from vargen.tokenizers.vq.model import VQTokenizer

GOLDEN = Path(__file__).parent / "golden" / "llamagen"


def test_published_llamagen_sizes_verify_on_meta() -> None:
    for kind, family in (("class", "llamagen-c2i"), ("caption", "llamagen-t2i")):
        for size, count in PARAMETERS[family].items():
            weights = {k: torch.empty(v, device="meta") for k, v in official_shapes(size, kind).items()}
            report = verify_checkpoint(weights)
            assert (report.ok, report.size, report.num_parameters) == (True, f"GPT-{size}", count)


def vq16() -> dict[str, Tensor]:
    with torch.device("meta"):
        weights = VQTokenizer.from_size("VQ-16").state_dict()
        return {**weights, "quantize.codebook_used": torch.empty(65536)}


def test_published_tokenizer_verifies() -> None:
    report = verify_checkpoint({"model": vq16()})
    assert report.ok
    assert (report.size, report.num_entries, report.num_parameters) == ("VQ-16", 344, 71_883_403)


def test_verification_reports_every_difference() -> None:
    weights = vq16()
    del weights["decoder.norm_out.bias"]
    weights["decoder.spare"] = torch.empty(1, device="meta")
    weights["quantize.embedding.weight"] = torch.empty(1024, 8, device="meta")
    report = verify_checkpoint(weights)
    assert not report.ok
    assert report.missing == ["decoder.norm_out.bias"]
    assert report.extra == ["decoder.spare"]
    assert report.wrong_shapes == {"quantize.embedding.weight": ((1024, 8), (16384, 8))}
    assert report.num_parameters != report.expected_parameters


def test_verification_of_own_sizes_and_of_taming() -> None:
    report = verify_checkpoint(unpacked(GOLDEN / "vq_model.safetensors"))
    assert report.ok
    assert report.size is None
    assert report.dtypes == {"float32": 158}
    taming = llamagen_to_taming(load_file(GOLDEN / "vq_model.safetensors"))
    assert verify_checkpoint({"state_dict": {**taming, "loss.logvar": torch.zeros(())}}).ok
    taming.pop("decoder.up.0.block.1.norm1.bias")
    assert verify_checkpoint(taming).missing == ["decoder.up.0.block.1.norm1.bias"]


def test_verification_finds_nan_and_strangers() -> None:
    weights = load_file(GOLDEN / "vq_model.safetensors")
    weights["quant_conv.bias"][0] = float("nan")
    report = verify_checkpoint(weights)
    assert not report.ok
    assert report.not_finite == ["quant_conv.bias"]
    stranger = verify_checkpoint({"fc.weight": torch.zeros(1)})
    assert not stranger.ok
    assert "no known family" in stranger.note


def test_conversion_gives_a_folder_for_from_pretrained(tmp_path: Path) -> None:
    io = load_file(GOLDEN / "vq_io.safetensors")
    folder = convert_checkpoint(unpacked(GOLDEN / "vq_model.safetensors"), tmp_path / "vq")
    with torch.no_grad():
        assert torch.equal(VQTokenizer.from_pretrained(folder).encode(io["image"]).codes, io["codes"])
    before = {p.name: p.read_bytes() for p in folder.iterdir()}
    with pytest.raises(ValueError, match="exists"):
        convert_checkpoint(unpacked(GOLDEN / "vq_model.safetensors"), folder)
    with pytest.raises(CheckpointError, match="no checkpoint file"):
        convert_checkpoint(tmp_path / "absent.pt", folder, overwrite=True)
    assert {p.name: p.read_bytes() for p in folder.iterdir()} == before
    convert_checkpoint(unpacked(GOLDEN / "vq_model.safetensors"), folder, overwrite=True, commit_loss_beta=0.5)
    assert VQTokenizer.from_pretrained(folder).config.commit_loss_beta == 0.5
    assert sorted(p.name for p in tmp_path.iterdir()) == ["vq"]


def test_conversion_refuses_what_it_cannot_load(tmp_path: Path) -> None:
    save_file({"fc.weight": torch.zeros(1)}, tmp_path / "x.safetensors")
    with pytest.raises(CheckpointError, match="no known family"):
        convert_checkpoint(tmp_path / "x.safetensors", tmp_path / "out")
    save_file({"main.0.weight": torch.zeros(1), "main.11.weight": torch.zeros(1)}, tmp_path / "d.safetensors")
    with pytest.raises(CheckpointError, match="PatchGAN"):
        convert_checkpoint(tmp_path / "d.safetensors", tmp_path / "out")
    assert not (tmp_path / "out").exists()

"""The binary multi-scale tokenizer: official bits, sums and pictures, both spellings of the files, sizes, errors."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from tests.golden_files import load_file
from vargen.checkpoints.manifests.published import PARAMETERS
from vargen.checkpoints.reader import CheckpointError
from vargen.checkpoints.verify import verify_checkpoint
from vargen.tokenizers.multiscale_bsq.checkpoints import to_native, to_official
from vargen.tokenizers.multiscale_bsq.model import MultiScaleBSQTokenizer

GOLDEN = Path(__file__).parent / "golden" / "infinity"
CONFIG = json.loads((GOLDEN / "config.json").read_text())
SCALES = {
    name: [(h, w) for _, h, w in CONFIG["schedules"][key]] for name, key in (("ratio", "2.0"), ("ratio2", "1.0"))
}
TINY: dict[str, Any] = {
    "base_channels": 4,
    "channel_multipliers": [1, 2],
    "num_res_blocks": 1,
    "codebook_dim": 3,
    "scales": [1, 2, (4, 4)],
    "norm_num_groups": 2,
}


def weights(name: str = "vae") -> dict[str, Tensor]:
    file = load_file(GOLDEN / f"{name}.safetensors")
    return {key: value.float() for key, value in file.items()}


def official(name: str = "vae", ratio: str = "ratio", **config: Any) -> MultiScaleBSQTokenizer:
    return MultiScaleBSQTokenizer.from_original(weights(name), scales=SCALES[ratio], **config).requires_grad_(False)


def tiny(**config: Any) -> MultiScaleBSQTokenizer:
    torch.manual_seed(0)
    return MultiScaleBSQTokenizer(**{**TINY, **config}).eval().requires_grad_(False)


def official_bits(io: dict[str, Tensor], scales: list[tuple[int, int]], patch: int) -> list[Tensor]:
    """The recorded [B, h p, w p, C] as [B, n, d]."""
    found = []
    for k in range(len(scales)):
        grid = io[f"bits.{k}"].permute(0, 3, 1, 2).float()
        found.append(torch.nn.functional.pixel_unshuffle(grid, patch).flatten(2).mT.to(torch.int8))
    return found


@pytest.mark.parametrize(
    ("folder", "file", "ratio", "patch"),
    [
        ("vae", "tokenizer_ratio", "ratio", 1),
        ("vae", "tokenizer_ratio2", "ratio2", 1),
        ("patchify/vae", "patchify/tokenizer", "ratio", 2),
    ],
)
def test_bits_sums_and_pictures_are_the_official_ones(folder, file, ratio, patch):
    io, tokenizer = load_file(GOLDEN / f"{file}.safetensors"), official(folder, ratio, patch=patch)
    torch.testing.assert_close(tokenizer.features(io["image"]), io["f"], atol=1e-4, rtol=0)
    found = tokenizer.encode(io["image"])
    wanted = official_bits(io, SCALES[ratio], patch)
    assert [part.dtype for part in found.codes] == [torch.int8] * len(wanted)
    assert all(map(torch.equal, found.codes, wanted))
    torch.testing.assert_close(found.latents, io["f_hat"], atol=1e-5, rtol=0)
    torch.testing.assert_close(tokenizer(io["image"]).clamp(-1, 1), io["recon"], atol=1e-4, rtol=0)
    torch.testing.assert_close(tokenizer.decode(wanted).clamp(-1, 1), io["recon_from_bits"], atol=1e-4, rtol=0)


@pytest.mark.parametrize(("folder", "patch"), [("", 1), ("patchify/", 2)])
def test_inputs_of_scales_with_and_without_flipped_bits(folder, patch):
    """Bitwise self-correction: bits flipped in the sum are what finer scales make good."""
    name = "tokenizer_ratio" if patch == 1 else "tokenizer"
    io, record = (load_file(GOLDEN / folder / f"{part}.safetensors") for part in (name, "train_input"))
    tokenizer, scales = official(f"{folder}vae", patch=patch), SCALES["ratio"]
    flips = []
    for k, percent in enumerate(record["flip_percent"].tolist()):
        drawn = record[f"flip_uniform.{k}"][:, 0].permute(0, 3, 1, 2) < 0.01 * percent
        flips.append(tokenizer.quantize.to_rows(drawn.float()) > 0)
    assert any(bool(part.any()) for part in flips)
    labels, inputs, _ = tokenizer.quantize.encode(io["f"], tuple(scales), flips)
    assert all(torch.equal(labels[k].long(), record[f"labels.{k}"]) for k in range(len(scales)))
    torch.testing.assert_close(torch.cat(inputs, dim=1), record["x_BLC_wo_prefix"], atol=1e-5, rtol=0)
    clean = tokenizer.scale_inputs(tokenizer.quantize.encode(io["f"], tuple(scales))[0])
    torch.testing.assert_close(clean, record["x_clean"], atol=1e-5, rtol=0)


def test_both_spellings_and_both_names_of_the_quantizer_load():
    kept = weights()
    given = {**kept, "quantizer.lfq.mask": 2 ** torch.arange(15, -1, -1)}
    plain = {key.replace("sample.conv.conv", "sample.CONV"): value for key, value in given.items()}
    plain = {key.replace(".conv.", ".").replace(".norm.", "."): value for key, value in plain.items()}
    plain = {key.replace("sample.CONV", "sample.conv"): value for key, value in plain.items()}
    assert "encoder.down.0.downsample.conv.weight" in plain
    assert "decoder.norm_out.weight" in plain
    plain["quantize.lfq.mask"] = plain["quantizer.lfq.mask"]
    first, second = (MultiScaleBSQTokenizer.from_original(state, scales=[1]).state_dict() for state in (given, plain))
    assert all(torch.equal(first[key], second[key]) for key in first)
    assert to_official(to_native(kept)).keys() == kept.keys()
    with pytest.raises(CheckpointError, match=r"conv_in\.weight under two names"):
        MultiScaleBSQTokenizer.from_original({**given, "encoder.conv_in.weight": given["encoder.conv_in.conv.weight"]})


def test_loading_is_strict_and_takes_the_entry_vae(tmp_path):
    given = weights()
    torch.save({"vae": given, "ema": {}}, tmp_path / "vae.pth")
    tokenizer = MultiScaleBSQTokenizer.from_original(tmp_path / "vae.pth", scales=SCALES["ratio"])
    assert (tokenizer.num_bits, tokenizer.downsample, tokenizer.scales[-1]) == (16, 2, (6, 3))
    bias = given.pop("decoder.mid.block_1.norm2.norm.bias")
    with pytest.raises(CheckpointError, match=r"missing key: decoder\.mid\.0\.norm2\.bias"):
        MultiScaleBSQTokenizer.from_original(given)
    with pytest.raises(CheckpointError, match="unexpected key: spare"):
        MultiScaleBSQTokenizer.from_original({**given, "decoder.mid.block_1.norm2.norm.bias": bias, "spare": bias})


@pytest.mark.parametrize("patch", [1, 2])
def test_another_size_is_a_view_of_the_same_weights(patch):
    tokenizer = tiny(patch=patch)
    wide = tokenizer.with_scales([1, (1, 2), (2, 4)])
    assert wide.decoder is tokenizer.decoder
    assert tokenizer.scales[-1] == (4, 4)
    side = tokenizer.downsample
    images = torch.rand(2, 3, 2 * side, 4 * side, generator=torch.Generator().manual_seed(1)) * 2 - 1
    encoded = wide.encode(images)
    assert [part.shape[1:] for part in encoded.codes] == [(n, 3 * patch**2) for n in (1, 2, 8)]
    torch.testing.assert_close(wide.decode(encoded.codes), wide(images))
    assert wide.scale_inputs(encoded.codes).shape == (2, 10, 3 * patch**2)
    with pytest.raises(ValueError, match=r"have 2x4 positions, but the last scale is 4x4"):
        tokenizer.encode(images)


def test_scales_sum_to_the_latents_and_a_saved_tokenizer_loads(tmp_path):
    tokenizer = tiny()
    images = torch.rand(1, 3, 8, 8, generator=torch.Generator().manual_seed(2)) * 2 - 1
    encoded, total = tokenizer.encode(images), tokenizer.blank(1)
    for k, part in enumerate(encoded.codes):
        total = tokenizer.accumulate(total, tokenizer.lookup(part), k)
    assert torch.equal(total, encoded.latents)
    tokenizer.save_pretrained(tmp_path)
    again = MultiScaleBSQTokenizer.from_pretrained(tmp_path)
    assert all(map(torch.equal, again.encode(images).codes, encoded.codes))


def test_errors_are_one_line():
    tokenizer = tiny()
    good = [torch.zeros(1, n, 3, dtype=torch.int8) for n in (1, 4, 16)]
    cases = [
        (good[0], "list of 1..3 scales .* got one tensor"),
        (good[:2], "codes must hold 3 scales, got 2"),
        ([*good[:2], torch.zeros(1, 16)], "bits, 0 and 1, got torch.float32 at scale 2"),
        ([*good[:2], torch.zeros(1, 16, dtype=torch.int64)], r"codes of scale 2 must be \[B, 16, 3\] bits"),
        ([*good[:2], good[2] + 2], "got 2 at scale 2"),
        ([good[0] - 1, *good[1:]], "got -1 at scale 0"),
    ]
    for codes, message in cases:
        with pytest.raises(ValueError, match=message) as caught:
            tokenizer.decode(codes)
        assert "\n" not in str(caught.value)
    with pytest.raises(ValueError, match="no scale may be larger"):
        tokenizer.with_scales([2, 1])
    with pytest.raises(ValueError, match="at most 262144 positions"):
        tiny(scales=[1024])


def test_published_sizes_have_exact_keys_and_parameters():
    for size, count in PARAMETERS["infinity-vae"].items():
        patched = {"channel_multipliers": (1, 2, 4, 4), "patch": 2} if size == "d14" else {}
        with torch.device("meta"):
            tokenizer = MultiScaleBSQTokenizer(codebook_dim=int(size[1:]), **patched)
        assert (tokenizer.downsample, sum(p.numel() for p in tokenizer.parameters())) == (16, count)
        file = {**to_official(tokenizer.state_dict()), "quantizer.lfq.mask": torch.empty(1, device="meta")}
        report = verify_checkpoint(file)
        assert (report.ok, report.size, report.num_entries) == (True, size, 225 if size == "d14" else 269), report

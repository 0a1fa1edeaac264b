"""VQTokenizer against the official LlamaGen numbers, published sizes, taming's layout, and bad input."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from tests.golden_files import load_file, unpacked
from vargen.tokenizers.vq.model import VQTokenizer

GOLDEN = Path(__file__).parent / "golden" / "llamagen"
TOLERANCE = {"atol": 1e-4, "rtol": 0}
SMALL: dict[str, Any] = {
    "base_channels": 8,
    "channel_multipliers": [1, 2],
    "num_res_blocks": 1,
    "z_channels": 8,
    "codebook_size": 16,
    "codebook_dim": 4,
    "norm_num_groups": 4,
}
PATCH: dict[str, Any] = {**SMALL, "encoder_type": "patch", "codebook_dim": 12, "l2_norm": False, "attention": False}


@pytest.fixture(scope="module")
def io() -> dict[str, Tensor]:
    return load_file(GOLDEN / "vq_io.safetensors")


@pytest.fixture(scope="module")
def weights() -> dict[str, Tensor]:
    return load_file(GOLDEN / "vq_model.safetensors")


@pytest.fixture(scope="module")
def tokenizer() -> VQTokenizer:
    ratio = json.loads((GOLDEN / "config.json").read_text())["vq"]["entropy_loss_ratio"]
    return VQTokenizer.from_original(unpacked(GOLDEN / "vq_model.safetensors"), entropy_loss_ratio=ratio)


def small(**config: Any) -> VQTokenizer:
    torch.manual_seed(0)
    return VQTokenizer(**{**SMALL, **config}).eval()


def pictures(n: int = 2, height: int = 8, width: int = 8) -> Tensor:
    return torch.rand(n, 3, height, width, generator=torch.Generator().manual_seed(n)) * 2 - 1


@pytest.mark.parametrize("prefix", ["", "nonsquare."])
@torch.no_grad()
def test_encode_and_decode_are_the_official_ones(tokenizer: VQTokenizer, io: dict[str, Tensor], prefix: str) -> None:
    image = io[prefix + "image"]
    torch.testing.assert_close(tokenizer.encoder(image), io[prefix + "encoder_out"], **TOLERANCE)
    torch.testing.assert_close(tokenizer.features(image), io[prefix + "quant_conv_out"], **TOLERANCE)
    encoded = tokenizer.encode(image)
    assert torch.equal(encoded.codes, io[prefix + "codes"])
    assert encoded.codes.dtype == torch.int64
    assert encoded.loss is None
    torch.testing.assert_close(encoded.latents, io[prefix + "quantized"], **TOLERANCE)
    torch.testing.assert_close(tokenizer.decode(encoded.codes), io[prefix + "decoded"], **TOLERANCE)
    torch.testing.assert_close(tokenizer(image).images, io[prefix + "decoded"], **TOLERANCE)


@torch.no_grad()
def test_decode_of_random_codes_is_the_official_one(tokenizer: VQTokenizer, io: dict[str, Tensor]) -> None:
    torch.testing.assert_close(tokenizer.decode(io["random_codes"]), io["random_decoded"], **TOLERANCE)
    flat = io["random_codes"].flatten(1).to(torch.int32)  # the layout of a sampler
    torch.testing.assert_close(tokenizer.decode(flat), io["random_decoded"], **TOLERANCE)


def test_training_losses_are_the_official_ones(tokenizer: VQTokenizer, io: dict[str, Tensor]) -> None:
    tokenizer.train()
    try:
        encoded = tokenizer.encode(io["image"])
    finally:
        tokenizer.eval()
    for name in ("vq_loss", "commit_loss", "entropy_loss"):
        torch.testing.assert_close(getattr(encoded, name).detach()[None], io[f"train.{name}"], **TOLERANCE)
    total = io["train.vq_loss"] + io["train.commit_loss"] + io["train.entropy_loss"]
    torch.testing.assert_close(encoded.loss.detach()[None], total, **TOLERANCE)


def test_codebook_is_what_the_decoder_reads(tokenizer: VQTokenizer, weights: dict[str, Tensor]) -> None:
    stored = weights["quantize.embedding.weight"]
    assert not torch.allclose(stored.norm(dim=1), torch.ones(64), atol=0.1)  # the file does not hold unit vectors
    torch.testing.assert_close(tokenizer.codebook, F.normalize(stored, dim=1))
    raw = small(l2_norm=False)
    assert torch.equal(raw.codebook, raw.quantize.embedding.weight)


@pytest.mark.parametrize(
    ("size", "downsample", "parameters", "entries"), [("VQ-16", 16, 71_883_403, 344), ("VQ-8", 8, 70_109_835, 300)]
)
def test_published_sizes(size: str, downsample: int, parameters: int, entries: int) -> None:
    with torch.device("meta"):
        tokenizer = VQTokenizer.from_size(size)
    assert sum(p.numel() for p in tokenizer.parameters()) == parameters
    assert len(tokenizer.state_dict()) + 1 == entries  # + 1: quantize.codebook_used, which is not kept
    assert tokenizer.downsample == downsample
    shapes = {k: tuple(v.shape) for k, v in tokenizer.state_dict().items()}
    assert shapes["quantize.embedding.weight"] == (16384, 8)
    assert shapes["quant_conv.weight"] == (8, 256, 1, 1)
    assert shapes["decoder.conv_in.weight"] == (512, 256, 3, 3)
    last = len(tokenizer.config.channel_multipliers) - 1
    assert shapes[f"encoder.conv_blocks.{last}.attn.1.proj_out.weight"] == (512, 512, 1, 1)
    assert shapes["decoder.conv_blocks.0.attn.2.q.bias"] == (512,)


def test_save_and_load_keep_config_and_outputs(tmp_path: Path) -> None:
    tokenizer = small(attention="mid", dropout=0.1, commit_loss_beta=0.5)
    tokenizer.save_pretrained(tmp_path)
    again = VQTokenizer.from_pretrained(tmp_path)
    images = pictures()
    with torch.no_grad():
        assert torch.equal(again.encode(images).codes, tokenizer.encode(images).codes)
        assert torch.equal(again.decode(again.encode(images).codes), tokenizer.decode(tokenizer.encode(images).codes))
    stored = json.loads((tmp_path / "config.json").read_text())
    assert {k: stored[k] for k in SMALL} == SMALL
    assert (stored["attention"], stored["dropout"], stored["commit_loss_beta"]) == ("mid", 0.1, 0.5)
    assert again.quantize.usage == 0.0  # training statistics are neither saved nor left uninitialised
    again.train()(images)
    assert again.quantize.usage > 0


def test_statistics_stay_out_of_the_state_dict() -> None:
    assert set(small().quantize.state_dict()) == {"embedding.weight"}


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@torch.no_grad()
def test_half_precision_stays_close(tokenizer: VQTokenizer, io: dict[str, Tensor], dtype: torch.dtype) -> None:
    half = VQTokenizer.from_config(tokenizer.config)
    half.load_state_dict(tokenizer.state_dict())
    half = half.to(dtype).eval()
    decoded = half.decode(io["codes"])
    assert decoded.dtype == dtype
    error = (decoded.float() - io["decoded"]).abs().max()
    assert error < 40 * torch.finfo(dtype).eps * io["decoded"].abs().max()
    agree = (half.encode(io["image"]).codes == io["codes"]).float().mean()
    assert agree > 0.9  # near-ties may flip


def test_patch_codes_are_nearest_patches_and_local() -> None:
    tokenizer, images = small(**PATCH), pictures(8)
    tokenizer.init_codebook_(images, torch.Generator().manual_seed(0))
    codes = tokenizer.encode(images).codes
    patches = F.unfold(images, 2, stride=2).transpose(1, 2)  # B hw 12, colour then rows then columns
    expected = torch.cdist(patches.double(), tokenizer.codebook.detach().double()).argmin(-1)
    assert torch.equal(codes.flatten(1), expected)
    changed = images.clone()
    changed[:, :, 4:6, 2:4] *= -1
    different = tokenizer.encode(changed).codes != codes
    different[:, 2, 1] = False
    assert not different.any()


def test_patch_decoder_starts_as_the_patches_themselves() -> None:
    tokenizer, images = small(**PATCH), pictures(8)
    error = tokenizer.init_codebook_(images, torch.Generator().manual_seed(0))
    out = tokenizer(images)
    torch.testing.assert_close(out.images, F.pixel_shuffle(out.latents, 2))
    torch.testing.assert_close(float(F.mse_loss(out.images, images).detach()), error / 12, atol=1e-6, rtol=1e-4)
    assert not any(k.startswith(("encoder.", "quant_conv.")) for k in tokenizer.state_dict())


def test_patch_training_moves_the_decoder_only() -> None:
    tokenizer, images = small(**PATCH), pictures(8)
    tokenizer.init_codebook_(images, torch.Generator().manual_seed(0))
    before = tokenizer.codebook.clone()
    optimizer = torch.optim.Adam([p for p in tokenizer.parameters() if p.requires_grad], 1e-2)
    tokenizer.train()
    losses = []
    for _ in range(30):
        loss = F.mse_loss(tokenizer(images).images, images)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        losses.append(float(loss.detach()))
    assert losses[-1] < 0.7 * losses[0]
    assert torch.equal(tokenizer.codebook, before)


def test_gradient_reaches_every_weight_of_the_learned_encoder() -> None:
    tokenizer = small(entropy_loss_ratio=0.1).train()
    out = tokenizer(pictures())
    (F.mse_loss(out.images, pictures()) + out.loss).backward()
    assert [n for n, p in tokenizer.named_parameters() if p.grad is None or not p.grad.any()] == []


@settings(max_examples=20, deadline=None)
@given(height=st.integers(1, 5), width=st.integers(1, 5), batch=st.integers(1, 3))
def test_any_grid_round_trips_its_shape(height: int, width: int, batch: int) -> None:
    tokenizer = small()
    with torch.no_grad():
        encoded = tokenizer.encode(pictures(batch, 2 * height, 2 * width))
        assert encoded.codes.shape == (batch, height, width)
        assert tokenizer.decode(encoded.codes).shape == (batch, 3, 2 * height, 2 * width)


def test_images_do_not_depend_on_their_batch(tokenizer: VQTokenizer, io: dict[str, Tensor]) -> None:
    with torch.no_grad():
        together, alone = tokenizer.decode(io["codes"]), tokenizer.decode(io["codes"][1:])
    torch.testing.assert_close(together[1:], alone, atol=1e-5, rtol=0)


BAD_IMAGES = {
    "three axes": (torch.zeros(3, 8, 8), r"\[B, 3, H, W\]"),
    "four channels": (torch.zeros(1, 4, 8, 8), r"\[B, 3, H, W\], got \(1, 4, 8, 8\)"),
    "odd side": (torch.zeros(1, 3, 8, 7), "multiples of 2, got 8x7"),
    "no pixels": (torch.zeros(1, 3, 0, 8), "multiples of 2"),
    "integers": (torch.zeros(1, 3, 8, 8, dtype=torch.uint8), "floating point"),
    "too bright": (torch.full((1, 3, 8, 8), 1.5), r"\[-1, 1\], got \[1.5, 1.5\]"),
    "8-bit range": (torch.full((1, 3, 8, 8), 255.0), r"\[-1, 1\]"),
    "NaN": (torch.full((1, 3, 8, 8), float("nan")), "NaN"),
}


@pytest.mark.parametrize("case", BAD_IMAGES)
def test_bad_images_are_one_clear_line(case: str) -> None:
    images, message = BAD_IMAGES[case]
    with pytest.raises(ValueError, match=message) as error:
        small().encode(images)
    assert "\n" not in str(error.value)


BAD_CODES = {
    "negative": (torch.tensor([[[0, -1]]]), r"\[0, 16\), got -1"),
    "too large": (torch.tensor([[[16, 0]]]), r"\[0, 16\), got 16"),
    "not integers": (torch.zeros(1, 2, 2), "integers"),
    "flat, not square": (torch.zeros(1, 6, dtype=torch.int64), "square"),
    "one axis": (torch.zeros(4, dtype=torch.int64), r"\[B, h, w\]"),
}


@pytest.mark.parametrize("case", BAD_CODES)
def test_bad_codes_are_one_clear_line(case: str) -> None:
    codes, message = BAD_CODES[case]
    with pytest.raises(ValueError, match=message) as error:
        small().decode(codes)
    assert "\n" not in str(error.value)


@pytest.mark.parametrize(
    ("config", "message"),
    [
        ({"norm_num_groups": 3}, "must divide every width"),
        ({"encoder_type": "linear"}, "encoder_type must be one of conv, patch"),
        ({"attention": "top"}, "attention must be"),
        ({"encoder_type": "patch"}, "codebook_dim=12"),
        ({"encoder_type": "patch", "codebook_dim": 12}, "l2_norm=False"),
    ],
)
def test_bad_configurations_are_refused(config: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        small(**config)


def test_unknown_size_and_setting_are_named() -> None:
    with pytest.raises(ValueError, match="VQ-16, VQ-8"):
        VQTokenizer.from_size("VQ-32")
    with pytest.raises(ValueError, match="'codebok_size'"):
        VQTokenizer.from_original(small().state_dict(), codebok_size=4)


def test_unsupported_half_precision_is_explained(monkeypatch: pytest.MonkeyPatch) -> None:
    tokenizer = small().half()

    def refuse(*_: Any) -> Tensor:  # what torch says where a CPU kernel is missing
        raise RuntimeError("\"compute_columns2d\" not implemented for 'Half'")

    monkeypatch.setattr(tokenizer.decoder, "forward", refuse)
    with pytest.raises(ValueError, match="float16 is not supported on this CPU; use float32"):
        tokenizer.decode(torch.zeros(1, 2, 2, dtype=torch.int64))

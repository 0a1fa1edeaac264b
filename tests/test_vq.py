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
from safetensors.torch import load_file, save_file
from torch import Tensor

from vargen.checkpoints import CheckpointError
from vargen.tokenizers.vq import VQTokenizer
from vargen.tokenizers.vq_checkpoints import llamagen_to_taming, taming_to_llamagen

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
    return VQTokenizer.from_original(GOLDEN / "vq_model.safetensors", entropy_loss_ratio=ratio)


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


@pytest.mark.parametrize("container", ["model", "state_dict", "module", None])
def test_from_original_opens_containers(
    tmp_path: Path, weights: dict[str, Tensor], io: dict[str, Tensor], container: str | None
) -> None:
    content = {f"module.{k}": v for k, v in weights.items()}
    torch.save({container: content, "steps": 3} if container else content, tmp_path / "vq.pt")
    tokenizer = VQTokenizer.from_original(tmp_path / "vq.pt")
    with torch.no_grad():
        assert torch.equal(tokenizer.encode(io["image"]).codes, io["codes"])
    assert not tokenizer.training


def test_from_original_infers_the_sizes(tokenizer: VQTokenizer) -> None:
    official = json.loads((GOLDEN / "config.json").read_text())["vq"]
    config = tokenizer.config
    assert config.base_channels == official["ch"]
    assert list(config.channel_multipliers) == official["ch_mult"]
    for name in ("num_res_blocks", "z_channels", "codebook_size"):
        assert config[name] == official[name]
    assert config.codebook_dim == official["codebook_embed_dim"]
    assert (config.attention, config.l2_norm, config.legacy_beta) == (True, True, False)


@pytest.mark.parametrize("attention", [True, "mid", False])
def test_from_original_infers_where_attention_is(attention: bool | str) -> None:
    source = small(attention=attention)
    loaded = VQTokenizer.from_original(source.state_dict(), norm_num_groups=4)
    assert loaded.config.attention == attention
    with torch.no_grad():
        assert torch.equal(loaded.encode(pictures()).codes, source.encode(pictures()).codes)


class Taming:
    """taming's VQGAN written over its own key names, as an independent reader of them."""

    def __init__(self, weights: dict[str, Tensor], groups: int) -> None:
        self.weights, self.groups = weights, groups

    def conv(self, x: Tensor, key: str, **options: int) -> Tensor:
        return F.conv2d(x, self.weights[key + ".weight"], self.weights[key + ".bias"], **options)

    def norm(self, x: Tensor, key: str) -> Tensor:
        return F.group_norm(x, self.groups, self.weights[key + ".weight"], self.weights[key + ".bias"], 1e-6)

    def block(self, x: Tensor, key: str) -> Tensor:
        h = self.conv(F.silu(self.norm(x, key + ".norm1")), key + ".conv1", padding=1)
        h = self.conv(F.silu(self.norm(h, key + ".norm2")), key + ".conv2", padding=1)
        return h + (self.conv(x, key + ".nin_shortcut") if key + ".nin_shortcut.weight" in self.weights else x)

    def attn(self, x: Tensor, key: str) -> Tensor:
        h = self.norm(x, key + ".norm")
        q, k, v = (self.conv(h, f"{key}.{name}").flatten(2) for name in "qkv")
        mixing = torch.softmax(torch.einsum("bci,bcj->bij", q, k) * x.shape[1] ** -0.5, -1)
        h = torch.einsum("bij,bcj->bci", mixing, v)
        return x + self.conv(h.view(x.shape), key + ".proj_out")

    def mid(self, x: Tensor, side: str) -> Tensor:
        x = self.attn(self.block(x, f"{side}.mid.block_1"), f"{side}.mid.attn_1")
        return self.block(x, f"{side}.mid.block_2")

    def level(self, x: Tensor, key: str) -> Tensor:
        j = 0
        while f"{key}.block.{j}.conv1.weight" in self.weights:
            x = self.block(x, f"{key}.block.{j}")
            if f"{key}.attn.{j}.q.weight" in self.weights:
                x = self.attn(x, f"{key}.attn.{j}")
            j += 1
        return x

    def encode(self, images: Tensor, num_levels: int) -> Tensor:
        x = self.conv(images, "encoder.conv_in", padding=1)
        for i in range(num_levels):
            x = self.level(x, f"encoder.down.{i}")
            if i < num_levels - 1:
                x = self.conv(F.pad(x, (0, 1, 0, 1)), f"encoder.down.{i}.downsample.conv", stride=2)
        x = F.silu(self.norm(self.mid(x, "encoder"), "encoder.norm_out"))
        z = self.conv(self.conv(x, "encoder.conv_out", padding=1), "quant_conv")
        distance = (z[:, None] - self.weights["quantize.embedding.weight"][None, :, :, None, None]).square().sum(2)
        return distance.argmin(1)

    def decode(self, codes: Tensor, num_levels: int) -> Tensor:
        z = self.weights["quantize.embedding.weight"][codes].permute(0, 3, 1, 2)
        x = self.mid(self.conv(self.conv(z, "post_quant_conv"), "decoder.conv_in", padding=1), "decoder")
        for i in reversed(range(num_levels)):  # taming counts from the highest resolution
            x = self.level(x, f"decoder.up.{i}")
            if i > 0:
                x = self.conv(
                    x.repeat_interleave(2, 2).repeat_interleave(2, 3), f"decoder.up.{i}.upsample.conv", padding=1
                )
        return self.conv(F.silu(self.norm(x, "decoder.norm_out")), "decoder.conv_out", padding=1)


def test_taming_checkpoint_gives_taming_outputs(tmp_path: Path) -> None:
    source = small(channel_multipliers=[1, 2, 3], codebook_dim=8, l2_norm=False)
    with torch.no_grad():
        source.quantize.embedding.weight.normal_()
    taming = llamagen_to_taming(source.state_dict())
    assert "decoder.up.0.block.0.nin_shortcut.weight" in taming  # the highest resolution narrows 16 to 8 channels
    assert taming["decoder.up.0.block.1.conv1.weight"].shape == (8, 8, 3, 3)
    assert taming["decoder.up.2.upsample.conv.weight"].shape == (24, 24, 3, 3)
    extra = {"loss.discriminator.main.0.weight": torch.zeros(1), "loss.logvar": torch.zeros(())}
    torch.save({"state_dict": {**taming, **extra}, "epoch": 1}, tmp_path / "last.ckpt")
    loaded = VQTokenizer.from_original(tmp_path / "last.ckpt", norm_num_groups=4)
    assert (loaded.config.l2_norm, loaded.config.legacy_beta) == (False, True)
    reference, images = Taming(taming, 4), pictures(2, 8, 12)
    with torch.no_grad():
        codes = loaded.encode(images).codes
        assert torch.equal(codes, reference.encode(images, 3))
        torch.testing.assert_close(loaded.decode(codes), reference.decode(codes, 3), **TOLERANCE)


def test_taming_renaming_is_invertible(weights: dict[str, Tensor]) -> None:
    renamed = llamagen_to_taming(weights)
    assert set(taming_to_llamagen(renamed)) == set(weights) - {"quantize.codebook_used"}


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
        ({"encoder_type": "linear"}, "'conv' or 'patch'"),
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


def test_wrong_checkpoints_are_explained(weights: dict[str, Tensor], tmp_path: Path) -> None:
    def refusal(state_dict: dict[str, Tensor], **config: Any) -> str:
        with pytest.raises(CheckpointError) as error:
            VQTokenizer.from_original(state_dict, **config)
        assert "\n" not in str(error.value)
        return str(error.value)

    without = {k: v for k, v in weights.items() if k != "decoder.norm_out.bias"}
    assert "missing keys: decoder.norm_out.bias" in refusal(without)
    assert "encoder.conv_in.weight" in refusal({k: v for k, v in weights.items() if k != "encoder.conv_in.weight"})
    assert "unexpected keys: decoder.spare" in refusal({**weights, "decoder.spare": torch.zeros(1)})
    wrong = {**weights, "quant_conv.bias": torch.zeros(9)}
    assert "quant_conv.bias is (9,) in the file, the model expects (8,)" in refusal(wrong)
    gpt = {"tok_embeddings.weight": torch.zeros(1), "layers.0.attention.wqkv.weight": torch.zeros(1)}
    gpt["cls_embedding.embedding_table.weight"] = torch.zeros(1)
    message = refusal(gpt)
    assert "looks like a LlamaGen class-to-image transformer" in message
    assert "LlamaGenTransformer" in message
    save_file(weights, tmp_path / "vq.safetensors")
    assert VQTokenizer.from_original(tmp_path / "vq.safetensors").codebook_size == 64


def test_unsupported_half_precision_is_explained(monkeypatch: pytest.MonkeyPatch) -> None:
    tokenizer = small().half()

    def refuse(*_: Any) -> Tensor:  # what torch says where a CPU kernel is missing
        raise RuntimeError("\"compute_columns2d\" not implemented for 'Half'")

    monkeypatch.setattr(tokenizer.decoder, "forward", refuse)
    with pytest.raises(ValueError, match="float16 is not supported on this CPU; use float32"):
        tokenizer.decode(torch.zeros(1, 2, 2, dtype=torch.int64))

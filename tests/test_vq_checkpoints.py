"""Official VQ checkpoints: containers, inferred sizes, taming's layout, refusals."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from safetensors.torch import save_file
from torch import Tensor

from tests.golden_files import load_file, unpacked
from vargen.checkpoints.reader import CheckpointError
from vargen.tokenizers.vq.checkpoints import llamagen_to_taming, taming_to_llamagen
from vargen.tokenizers.vq.model import VQTokenizer

GOLDEN = Path(__file__).parent / "golden" / "llamagen"


@pytest.fixture(scope="module")
def io() -> dict[str, Tensor]:
    return load_file(GOLDEN / "vq_io.safetensors")


@pytest.fixture(scope="module")
def weights() -> dict[str, Tensor]:
    return load_file(GOLDEN / "vq_model.safetensors")


@pytest.fixture(scope="module")
def tokenizer() -> VQTokenizer:
    return VQTokenizer.from_original(unpacked(GOLDEN / "vq_model.safetensors"))


def small(**config: Any) -> VQTokenizer:
    torch.manual_seed(0)
    defaults: dict[str, Any] = {"channel_multipliers": [1, 2], "codebook_dim": 4, "norm_num_groups": 4}
    sizes = {"base_channels": 8, "num_res_blocks": 1, "z_channels": 8, "codebook_size": 16}
    return VQTokenizer(**{**sizes, **defaults, **config}).eval()


def pictures(n: int = 2, height: int = 8, width: int = 8) -> Tensor:
    return torch.rand(n, 3, height, width, generator=torch.Generator().manual_seed(n)) * 2 - 1


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
        torch.testing.assert_close(loaded.decode(codes), reference.decode(codes, 3), atol=1e-4, rtol=0)


def test_taming_renaming_is_invertible(weights: dict[str, Tensor]) -> None:
    renamed = llamagen_to_taming(weights)
    assert set(taming_to_llamagen(renamed)) == set(weights) - {"quantize.codebook_used"}


def test_wrong_checkpoints_are_explained(weights: dict[str, Tensor], tmp_path: Path) -> None:
    def refusal(state_dict: dict[str, Tensor], **config: Any) -> str:
        with pytest.raises(CheckpointError) as error:
            VQTokenizer.from_original(state_dict, **config)
        assert "\n" not in str(error.value)
        return str(error.value)

    without = {k: v for k, v in weights.items() if k != "decoder.norm_out.bias"}
    assert "missing key: decoder.norm_out.bias" in refusal(without)
    assert "encoder.conv_in.weight" in refusal({k: v for k, v in weights.items() if k != "encoder.conv_in.weight"})
    assert "unexpected key: decoder.spare" in refusal({**weights, "decoder.spare": torch.zeros(1)})
    wrong = {**weights, "quant_conv.bias": torch.zeros(9)}
    assert "quant_conv.bias is (9,) in the file, the model expects (8,)" in refusal(wrong)
    gpt = {"tok_embeddings.weight": torch.zeros(1), "layers.0.attention.wqkv.weight": torch.zeros(1)}
    gpt["cls_embedding.embedding_table.weight"] = torch.zeros(1)
    message = refusal(gpt)
    assert "looks like a LlamaGen class-to-image transformer" in message
    assert "LlamaGenTransformer" in message
    save_file(weights, tmp_path / "vq.safetensors")
    assert VQTokenizer.from_original(tmp_path / "vq.safetensors").codebook_size == 64

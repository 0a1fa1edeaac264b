"""Published files as they lie about: averages beside weights, several models in one file, shards, masks, look-alikes."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from diffusers import AutoencoderKL
from safetensors.torch import save_file
from torch import Tensor
from typer.testing import CliRunner

from tests.tiny import tiny_backbone, tiny_scale_pipeline
from vargen.checkpoints.families import guess_family
from vargen.checkpoints.reader import CheckpointError, load_original
from vargen.checkpoints.verify import verify_checkpoint
from vargen.cli.convert import as_options
from vargen.cli.main import app
from vargen.tokenizers.kl.autoencoder import load_kl16, to_latent_diffusion
from vargen.tokenizers.multiscale_vq.checkpoints import to_official
from vargen.tokenizers.multiscale_vq.model import MultiScaleVQTokenizer
from vargen.tokenizers.vq.checkpoints import llamagen_to_taming
from vargen.tokenizers.vq.model import VQTokenizer

HEADS = {"num_heads": 2, "grid_size": 4, "condition_rope": "identity"}


def doubled(weights: dict[str, Tensor]) -> dict[str, Tensor]:
    return {name: 2 * value for name, value in weights.items()}


def vq_tokenizer() -> VQTokenizer:
    """With LlamaGen's encoder."""
    torch.manual_seed(0)
    sizes = {"base_channels": 8, "channel_multipliers": [1, 2], "num_res_blocks": 1, "z_channels": 8, "codebook_size": 16,
             "codebook_dim": 12, "norm_num_groups": 4}  # fmt: skip
    return VQTokenizer(**sizes).eval()


def same(module: Any, weights: dict[str, Tensor]) -> bool:
    return all(torch.equal(module.state_dict()[name], value) for name, value in weights.items())


class TestKey:
    def test_every_from_original_honours_it(self) -> None:
        backbone, tokenizer, scales = tiny_backbone(), vq_tokenizer(), tiny_scale_pipeline().tokenizer
        torch.manual_seed(0)
        kl = AutoencoderKL(block_out_channels=(8, 8), norm_num_groups=4, down_block_types=["DownEncoderBlock2D"] * 2,
                           up_block_types=["UpDecoderBlock2D"] * 2)  # fmt: skip
        official: list[tuple[Any, dict[str, Tensor], dict[str, Any]]] = [
            (type(backbone).from_original, backbone.state_dict(), HEADS),
            (VQTokenizer.from_original, tokenizer.state_dict(), {"norm_num_groups": 4}),
            (MultiScaleVQTokenizer.from_original, to_official(scales.state_dict()),
             {"norm_num_groups": 4, "scales": scales.config.scales}),
            (load_kl16, to_latent_diffusion(kl.state_dict()), {"norm_num_groups": 4}),
        ]  # fmt: skip
        for load, weights, given in official:
            file = {"model": weights, "ema": doubled(weights)}
            plain, averaged = load(file, **given), load(file, key="ema", **given)
            for name, value in plain.state_dict().items():
                assert torch.equal(averaged.state_dict()[name], 2 * value), name
            with pytest.raises(CheckpointError, match="no weights under 'averaged'"):
                load(file, key="averaged", **given)
            with pytest.raises(ValueError, match="key must name an entry"):
                load(file, key=3, **given)

    def test_it_finds_a_model_by_what_its_names_begin_with(self) -> None:
        weights = {"a": torch.ones(1), "b.c": torch.zeros(2)}
        names = {f"first_stage_model.{name}": value for name, value in weights.items()} | {"other.a": torch.zeros(1)}
        for file in (names, {"state_dict": names}, {"module": {f"module.{k}": v for k, v in names.items()}}):
            found = load_original(file, key="first_stage_model")
            assert found.keys() == weights.keys()
        nested = {"trainer": {f"vae.net.{name}": value for name, value in weights.items()}}
        assert load_original(nested, key="trainer.vae.net").keys() == weights.keys()
        with pytest.raises(CheckpointError, match="no weights under 'third'"):
            load_original(names, key="third")


class TestShards:
    @pytest.fixture
    def folder(self, tmp_path: Path) -> Path:
        weights = tiny_backbone().state_dict()
        half = len(weights) // 2
        parts = dict(list(weights.items())[:half]), dict(list(weights.items())[half:])
        listed = {}
        for number, part in enumerate(parts):
            save_file(part, tmp_path / f"model-{number}.safetensors")
            listed |= dict.fromkeys(part, f"model-{number}.safetensors")
        (tmp_path / "model.safetensors.index.json").write_text(json.dumps({"metadata": {}, "weight_map": listed}))
        return tmp_path

    def test_the_index_or_the_folder_loads_them_all(self, folder: Path) -> None:
        weights = tiny_backbone().state_dict()
        for place in (folder, folder / "model.safetensors.index.json"):
            backbone = type(tiny_backbone()).from_original(place, **HEADS)
            assert same(backbone, weights)

    def test_what_is_wrong_is_named(self, folder: Path) -> None:
        index = folder / "model.safetensors.index.json"
        listed = json.loads(index.read_text())
        for change, part in [
            ({"weight_map": {"a": "../x.safetensors"}}, "not the name of a file"),
            ({"weight_map": {"a": "absent.safetensors"}}, "lacks the shard absent.safetensors"),
            ({"weight_map": listed["weight_map"] | {"zzz": "model-0.safetensors"}}, "lacks zzz"),
            ({}, "no weight_map"),
        ]:
            index.write_text(json.dumps(change))
            with pytest.raises(CheckpointError, match=part) as caught:
                load_original(folder)
            assert "\n" not in str(caught.value)


class TestMemory:
    def test_tokenizers_are_built_around_the_tensors_of_the_file(self, tmp_path: Path) -> None:
        weights = vq_tokenizer().state_dict()
        given = {"norm_num_groups": 4}
        tokenizer = VQTokenizer.from_original(weights, **given)
        assert tokenizer.quantize.embedding.weight.data_ptr() == weights["quantize.embedding.weight"].data_ptr()
        assert not any(value.is_meta for value in [*tokenizer.parameters(), *tokenizer.buffers()])
        assert tokenizer.quantize.usage == 0
        assert int(tokenizer.quantize.code_counts.sum()) == 0
        scales = tiny_scale_pipeline().tokenizer
        official = to_official(scales.state_dict())
        again = MultiScaleVQTokenizer.from_original(official, norm_num_groups=4, scales=scales.config.scales)
        assert again.quantize.embedding.weight.data_ptr() == official["quantize.embedding.weight"].data_ptr()
        assert not any(value.is_meta for value in [*again.parameters(), *again.buffers()])
        half = {name: value.half() for name, value in weights.items()}
        assert VQTokenizer.from_original(half, **given).dtype == torch.float32  # encoders are not for half precision


class TestFamilies:
    def test_kl_with_another_first_multiplier_is_refused_with_the_reason(self) -> None:
        kl = AutoencoderKL(block_out_channels=(8, 8), norm_num_groups=4, down_block_types=["DownEncoderBlock2D"] * 2,
                           up_block_types=["UpDecoderBlock2D"] * 2)  # fmt: skip
        weights = to_latent_diffusion(kl.state_dict())
        weights["encoder.conv_in.weight"] = torch.zeros(4, 3, 3, 3)
        with pytest.raises(CheckpointError, match="a first multiplier of 2"):
            load_kl16(weights, norm_num_groups=4)

    def test_verify_passes_the_mask_of_an_official_var_file(self) -> None:
        weights = dict(tiny_scale_pipeline().backbone.state_dict())
        levels = [torch.full((side * side,), level) for level, side in enumerate((1, 2, 4))]
        weights["lvl_1L"] = torch.cat(levels)[None]
        weights["attn_bias_for_masking"] = torch.full((1, 1, 21, 21), -torch.inf)
        assert verify_checkpoint(weights).ok
        name = next(name for name in weights if name.endswith("weight"))
        weights[name] = torch.full_like(weights[name], torch.inf)
        assert verify_checkpoint(weights).not_finite == [name]

    @pytest.mark.parametrize(
        ("names", "family"),
        [
            (["gen_embed.weight", "gen_vision_model.encoder.conv_in.weight",
              "language_model.model.layers.0.self_attn.q_proj.weight"], "janus-original"),
            (["transformer.tok_emb.weight", "transformer.class_emb.embedding_table.weight"], "ibq-ar"),
            (["transformer.tok_emb.weight", "transformer.pos_emb"], "nbp"),
            (["quantize.embedding.weight", "decoder.up.0.block.0.conv1.weight", "model_ema.decay"], "ibq-tokenizer"),
            (["quantize.embedding.weight", "decoder.up.0.block.0.conv1.weight"], "taming-vqgan"),
            (["quantize.embedding.weight", "decoder.up.0.block.0.norm1.conv_y.weight"], "emu3-vision-tokenizer"),
            (["model.layers.0.self_attn.q_proj.weight", "lm_head.weight"], "hf-llama"),
        ],
    )  # fmt: skip
    def test_look_alikes_are_told_apart(self, names: list[str], family: str) -> None:
        found = guess_family(names)
        assert found is not None
        assert found.name == family

    @pytest.mark.parametrize(("rows", "family"), [(184622, "emu3-original"), (32000, "hf-llama")])
    def test_an_original_emu3_is_told_by_its_vocabulary(self, rows: int, family: str) -> None:
        names = ["model.layers.0.self_attn.q_proj.weight", "lm_head.weight", "model.embed_tokens.weight"]
        weights = {name: torch.empty(rows, 4, device="meta") for name in names}
        found = guess_family(weights)
        assert found is not None
        assert found.name == family

    def test_an_ibq_tokenizer_is_refused_unless_it_is_said_to_be_a_vqgan(self) -> None:
        torch.manual_seed(0)
        sizes = {"base_channels": 8, "channel_multipliers": [1, 2], "num_res_blocks": 4, "z_channels": 8,
                 "codebook_size": 16, "codebook_dim": 256, "norm_num_groups": 4, "l2_norm": False}  # fmt: skip
        weights = llamagen_to_taming(VQTokenizer(**sizes).state_dict())
        with pytest.raises(CheckpointError, match="looks like an IBQ tokenizer") as caught:
            VQTokenizer.from_original(weights, norm_num_groups=4)
        assert "\n" not in str(caught.value)
        assert VQTokenizer.from_original(weights, norm_num_groups=4, l2_norm=False).codebook_size == 16
        with pytest.raises(CheckpointError, match="IBQ tokenizer"):
            VQTokenizer.from_original(weights | {"model_ema.decay": torch.ones(())}, norm_num_groups=4)


class TestConvert:
    def test_it_names_its_own_options(self, tmp_path: Path) -> None:
        torch.save(tiny_backbone().state_dict(), tmp_path / "x.pt")
        runner = CliRunner()
        run = runner.invoke(app, ["convert", str(tmp_path / "x.pt"), str(tmp_path / "out")])
        assert run.exit_code == 2
        assert "--num-heads N" in run.output
        assert "num_heads=" not in run.output
        run = runner.invoke(app, ["convert", str(tmp_path / "x.pt"), str(tmp_path / "out"), "--num-heads", "2"])
        assert "--grid-size ROWSxCOLUMNS" in run.output
        run = runner.invoke(app, ["convert", str(tmp_path / "x.pt"), str(tmp_path / "out"), "--set", "key=ema"])
        assert "option of its own: --key" in run.output

    def test_what_python_is_told_becomes_options(self) -> None:
        assert as_options("unknown; pass num_heads=...") == "unknown; pass --num-heads N"
        assert as_options("pass grid_size=(height, width) in codes, e.g. (16, 16)").startswith("pass --grid-size ROWS")
        assert as_options("give scales=(1, 2, ...)") == "give --set scales=VALUE"
        assert as_options("say l2_norm=False") == "say --set l2_norm=VALUE"
        assert as_options("width=3 is odd") == "width=3 is odd"

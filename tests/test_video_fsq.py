"""The video tokenizer: official blocks and keys, causality, pieces equal to the whole, refusals."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from tests.golden_files import load_file
from vargen.backbones.nbp.model import NBPTransformer
from vargen.backbones.nbp.sizes import SIZES
from vargen.checkpoints.manifests.published import PARAMETERS
from vargen.checkpoints.reader import CheckpointError
from vargen.checkpoints.verify import verify_checkpoint
from vargen.tokenizers.video_fsq.layers import CausalConv3d, DepthToSpace, ResidualUnit, SpaceToDepth, StreamState
from vargen.tokenizers.video_fsq.model import VideoFSQTokenizer
from vargen.tokenizers.video_fsq.quantizer import FSQ

GOLDEN = Path(__file__).parent / "golden" / "nbp" / "tokenizer_blocks"
CLOSE = {"atol": 1e-4, "rtol": 0}


@pytest.fixture(scope="module")
def golden() -> dict[str, torch.Tensor]:
    return {**load_file(GOLDEN / "blocks.safetensors"), **load_file(GOLDEN / "io.safetensors")}


def official(**config: Any) -> VideoFSQTokenizer:
    """The published graph, thin: 4 times 8 in space, 4 in time."""
    torch.manual_seed(0)
    thin = {"base_channels": 4, "num_res_blocks": 1, "num_mid_blocks": 1, "norm_num_groups": 2, "levels": [8, 5]}
    return VideoFSQTokenizer(**{**thin, **config}).eval()


def patches(**config: Any) -> VideoFSQTokenizer:
    """A patch stem and factorised units at the code grid."""
    small = {"base_channels": 8, "channel_multipliers": [1], "temporal_downsample": [], "num_res_blocks": 2}
    small |= {"num_mid_blocks": 0, "levels": [8, 8], "norm_num_groups": 1, "factorized": True}
    torch.manual_seed(0)
    tokenizer = VideoFSQTokenizer(**{**small, "patch_size": [4, 4, 4], "refine_channels": 4, **config})
    if tokenizer.config.refine_channels:
        torch.nn.init.normal_(tokenizer.refine_layers[-1].conv.weight)  # it starts at zero
    return tokenizer.eval()


def dictionary() -> VideoFSQTokenizer:
    """A table of patches as encoder."""
    tokenizer = patches(dictionary=True)
    tokenizer.patch_table.copy_(torch.randint(256, tokenizer.patch_table.shape))
    return tokenizer


MAKERS = pytest.mark.parametrize("make", [official, patches, dictionary])


def test_fsq_is_the_official_one(golden: dict[str, torch.Tensor]) -> None:
    fsq = FSQ([8, 5, 5, 4])
    latents = fsq.quantize(golden["fsq/z"])
    torch.testing.assert_close(latents, golden["fsq/quantized"], **CLOSE)
    assert torch.equal(fsq.codes(latents), golden["fsq/indices"])
    torch.testing.assert_close(fsq.lookup(golden["fsq/indices"]), golden["fsq/quantized"], **CLOSE)
    torch.testing.assert_close(fsq.lookup(torch.arange(64)), golden["fsq/implicit_codebook_head"], **CLOSE)


def test_cosmos_constants_differ_at_the_borders(golden: dict[str, torch.Tensor]) -> None:
    z = torch.linspace(-4, 4, 401).view(1, 1, -1).expand(1, 2, -1)
    nbp, cosmos = (FSQ([8, 5], variant).quantize(z) for variant in ("nbp", "cosmos"))
    assert set(nbp[0, 0].unique().tolist()) == set(cosmos[0, 0].unique().tolist())
    assert 0 < int((nbp != cosmos).sum()) < 20
    with pytest.raises(ValueError, match="fsq_variant must be 'nbp' or 'cosmos'"):
        FSQ([8], "other")  # type: ignore[arg-type]


@given(st.lists(st.integers(2, 9), min_size=1, max_size=5), st.integers(0, 2**31))
@settings(max_examples=30, deadline=None)
def test_every_code_of_every_fsq_comes_back(levels: list[int], seed: int) -> None:
    fsq = FSQ(levels)
    codes = torch.randint(fsq.codebook_size, (2, 50), generator=torch.Generator().manual_seed(seed))
    latents = fsq.lookup(codes)
    assert torch.equal(fsq.codes(latents), codes)
    assert float(latents.abs().max()) <= 1
    drawn = fsq.codes(fsq.quantize(torch.randn(3, len(levels), 40) * 3))
    assert 0 <= int(drawn.min()) <= int(drawn.max()) < fsq.codebook_size


def test_the_gradient_passes_the_rounding() -> None:
    z = torch.zeros(1, 2, 3, requires_grad=True)
    FSQ([8, 5]).quantize(z).sum().backward()
    assert z.grad is not None
    assert bool((z.grad > 0.5).all())


@torch.no_grad()
def test_residual_unit_and_causal_step_are_the_official_ones(golden: dict[str, torch.Tensor]) -> None:
    weights = {k.removeprefix("residual_unit."): v for k, v in golden.items() if k.startswith("residual_unit.")}
    for name in ("fn.2.conv.weight", "fn.5.conv.weight"):  # one frame sees itself three times: the file holds the sum
        weights[name] = torch.cat([torch.zeros_like(weights[name])] * 2 + [weights[name]], dim=2)
    unit = ResidualUnit(32, 64, 32)
    unit.fn[5] = CausalConv3d(64, 6)
    unit.residual_fn[0] = CausalConv3d(32, 6, (1, 1, 1))
    unit.load_state_dict(weights, strict=True)
    torch.testing.assert_close(unit(golden["blocks/x"]), golden["blocks/residual_unit_single_frame"], **CLOSE)
    down = CausalConv3d(64, 6, stride=(2, 2, 2))
    down.conv.load_state_dict({name: golden[f"causal_down.{name}"] for name in ("weight", "bias")})
    torch.testing.assert_close(down(golden["blocks/residual_unit"]), golden["blocks/causal_down"], **CLOSE)


def test_depth_to_space_is_the_official_one_and_can_be_undone(golden: dict[str, torch.Tensor]) -> None:
    x = golden["d2s/x"]
    assert torch.equal(DepthToSpace((2, 2, 2))(x), golden["d2s/out_222"])
    assert torch.equal(DepthToSpace((1, 2, 2))(x), golden["d2s/out_122"])
    clip = torch.randn(2, 3, 9, 4, 4)
    assert torch.equal(DepthToSpace((4, 2, 2))(SpaceToDepth((4, 2, 2))(clip)), clip)


@pytest.mark.parametrize("kernel", [(1, 3, 3), (3, 1, 1), (1, 1, 1), (3, 3, 3)])
@torch.no_grad()
def test_fast_convolutions_are_convolutions(kernel: tuple[int, int, int]) -> None:
    layer, x = CausalConv3d(4, 6, kernel), torch.randn(2, 4, 5, 6, 7)
    k, h, w = (side // 2 for side in kernel)
    padded = torch.nn.functional.pad(x, (w, w, h, h, 2 * k, 0), mode="replicate")
    torch.testing.assert_close(layer(x), layer.conv(padded), atol=1e-5, rtol=1e-5)


@MAKERS
@pytest.mark.parametrize("frames", [1, 5, 9, 17])
@torch.no_grad()
def test_no_code_and_no_frame_depends_on_a_later_one(make: Any, frames: int) -> None:
    tokenizer, clip = make(), torch.rand(2, 3, 17, 16, 16) * 2 - 1
    whole = tokenizer.encode(clip)
    part = tokenizer.encode(clip[:, :, :frames])
    k = 1 + (frames - 1) // 4
    assert part.codes.shape == (2, k, 16 // tokenizer.downsample[0], 16 // tokenizer.downsample[1])
    assert torch.equal(part.codes, whole.codes[:, :k])
    decoded = tokenizer.decode(part.codes)
    assert decoded.shape == (2, 3, frames, 16, 16)
    torch.testing.assert_close(decoded, tokenizer.decode(whole.codes)[:, :, :frames], atol=1e-5, rtol=1e-5)
    changed = clip.clone()
    changed[:, :, frames:] *= -1
    assert torch.equal(tokenizer.encode(changed).codes[:, :k], part.codes)


@MAKERS
@torch.no_grad()
def test_pieces_of_a_clip_give_the_same_as_the_whole(make: Any) -> None:
    tokenizer, clip = make(), torch.rand(1, 3, 17, 16, 16) * 2 - 1
    codes = tokenizer.encode(clip).codes
    frames = tokenizer.decode(codes)
    for chunk in (1, 2, 3):
        assert torch.equal(tokenizer.encode(clip, chunk=chunk).codes, codes)
        torch.testing.assert_close(tokenizer.decode(codes, chunk=chunk), frames, atol=1e-5, rtol=1e-5)
    state, back = StreamState(), StreamState()
    streamed = [
        tokenizer.encode(part, state=state).codes for part in (clip[:, :, :5], clip[:, :, 5:13], clip[:, :, 13:])
    ]
    assert torch.equal(torch.cat(streamed, dim=1), codes)
    shown = torch.cat([tokenizer.decode(part, state=back) for part in streamed], dim=2)
    torch.testing.assert_close(shown, frames, atol=1e-5, rtol=1e-5)
    with pytest.raises(ValueError, match="a later piece must have a multiple of 4 frames, got 5"):
        tokenizer.encode(clip[:, :, :5], state=state)


def test_training_changes_all_weights_and_learns() -> None:
    tokenizer = patches().train()
    clip = (torch.rand(4, 3, 5, 8, 8) > 0.5).float()
    optimizer = torch.optim.Adam(tokenizer.parameters(), 1e-2)
    losses = []
    for _ in range(25):
        loss = (tokenizer(clip).videos - clip).square().mean()
        optimizer.zero_grad()
        loss.backward()
        assert all(p.grad is not None for p in tokenizer.parameters())
        optimizer.step()
        losses.append(loss.item())
    assert losses[-1] < 0.7 * losses[0]


@MAKERS
def test_saving_and_loading_keeps_the_tokenizer(make: Any, tmp_path: Path) -> None:
    tokenizer, clip = make(), torch.rand(1, 3, 5, 16, 16)
    tokenizer.save_pretrained(tmp_path)
    again = VideoFSQTokenizer.from_pretrained(tmp_path)
    assert torch.equal(again.encode(clip).codes, tokenizer.encode(clip).codes)
    assert tokenizer.codebook.shape == (tokenizer.codebook_size, 2)


def test_the_published_tokenizer_loads_by_its_keys(tmp_path: Path) -> None:
    with torch.device("meta"):
        model = VideoFSQTokenizer()
    state_dict = {f"module.{name}": value for name, value in model.state_dict().items()}
    assert sum(v.numel() for v in state_dict.values()) == PARAMETERS["nbp-tokenizer"]["MAGVIT-v2"]
    for key, shape in {
        "encoder_layers.6.residual_fn.0.conv.weight": (256, 128, 1, 1, 1),
        "encoder_layers.15.conv.weight": (256, 256, 3, 3, 3),
        "encoder_layers.26.weight": (6, 512, 1, 1, 1),
        "decoder_layers.9.conv.weight": (4096, 512, 3, 3, 3),
        "decoder_layers.21.conv.weight": (1024, 256, 3, 3, 3),
        "decoder_layers.28.beta": (1, 128, 1, 1, 1),
        "decoder_layers.29.conv.weight": (3, 128, 3, 3, 3),
    }.items():
        assert tuple(state_dict[f"module.{key}"].shape) == shape
    report = verify_checkpoint({"model_state_dict": state_dict})
    assert report.ok, report
    thin = official(unit_range=True)
    file = tmp_path / "magvit2.pt"
    torch.save({"model_state_dict": {f"module.{k}": v for k, v in thin.state_dict().items()}}, file)
    config = {"base_channels": 4, "num_res_blocks": 1, "num_mid_blocks": 1, "norm_num_groups": 2, "levels": [8, 5]}
    clip = torch.rand(1, 3, 5, 16, 16)
    assert torch.equal(VideoFSQTokenizer.from_original(file, **config).encode(clip).codes, thin.encode(clip).codes)
    with pytest.raises(CheckpointError, match="looks like a"):
        VideoFSQTokenizer.from_original({"pos_1LC": torch.zeros(1), "lvl_embed.weight": torch.zeros(1)})


@pytest.mark.parametrize("size", SIZES)
@pytest.mark.parametrize("text", [True, False])
def test_every_published_transformer_has_its_keys_and_parameters(size: str, text: bool) -> None:
    config = {} if text else {"condition_type": "none", "num_condition_tokens": 0}
    with torch.device("meta"):
        model = NBPTransformer.from_size(size, **config)
    state_dict = {f"module.transformer.{name}": value for name, value in model.state_dict().items()}
    state_dict["module.transformer.blocks.0.attn.mask"] = torch.empty(1, device="meta")
    state_dict["module.first_stage_model.encoder_layers.0.conv.bias"] = torch.empty(128, device="meta")
    report = verify_checkpoint({"state_dict": state_dict, "epoch": 1})
    assert report.ok, report
    assert (report.size, report.num_parameters) == (size, PARAMETERS["nbp" if text else "nbp-frames"][size])
    layers, heads, width = SIZES[size]
    assert state_dict["module.transformer.tok_emb.weight"].shape == (96016 if text else 64000, width)
    assert state_dict["module.transformer.pos_emb"].shape == (1, 5120, width)
    blocks = sum(v.numel() for k, v in state_dict.items() if ".blocks." in k and "mask" not in k)
    assert blocks == layers * (12 * width * width + 13 * width)
    loaded = NBPTransformer.from_original({"state_dict": state_dict})
    assert (loaded.config.num_heads, loaded.codebook_size, loaded.group_size) == (heads, 64000, 16)
    state_dict.pop("module.transformer.ln_f.bias")
    assert not verify_checkpoint({"state_dict": state_dict}).ok


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (
            lambda t: t.encode(torch.zeros(1, 3, 16, 16, 16)),
            "a clip must have 1 \\+ a multiple of 4 frames, got 16; use 13",
        ),
        (lambda t: t.encode(torch.zeros(1, 3, 5, 16, 18)), "video sides must be multiples of 4x4, got 16x18"),
        (lambda t: t.encode(torch.zeros(3, 5, 16, 16)), r"videos must be \[B, 3, T, H, W\]"),
        (lambda t: t.encode(torch.zeros(1, 3, 5, 16, 16) + 3), "values must lie in"),
        (lambda t: t.encode(torch.zeros(1, 3, 5, 16, 16, dtype=torch.uint8)), "must be floating point"),
        (lambda t: t.encode(torch.zeros(1, 3, 5, 16, 16), chunk=0), "chunk must be at least 1"),
        (lambda t: t.decode(torch.zeros(1, 2, 2, 2)), "codes must be integers"),
        (lambda t: t.decode(torch.zeros(1, 2, 2).long()), r"codes must be \[B, t, h, w\]"),
        (lambda t: t.decode(torch.full((1, 2, 2, 2), 64)), r"codes must lie in \[0, 64\), got 64"),
        (lambda t: t.decode_latents(torch.zeros(1, 3, 2, 2, 2)), r"latents must be \[B, 2, t, h, w\]"),
        (lambda t: patches(patch_size=[4, 4]), r"patch_size must be \(frames, height, width\) of a patch"),
        (lambda t: patches(levels=[1]), r"levels\[0\] must be an integer in 2\.\."),
        (lambda t: patches(norm_num_groups=3), "norm_num_groups=3 must divide every width, got 8"),
        (lambda t: official(temporal_downsample=[True]), "temporal_downsample must have one entry for each of the 3"),
        (lambda t: patches(num_res_blocks=0), "num_res_blocks must be an integer in 1..64"),
    ],
)
def test_wrong_input_is_refused_in_one_line(call: Any, message: str) -> None:
    with pytest.raises(ValueError, match=message) as info:
        call(patches())
    assert "\n" not in str(info.value)

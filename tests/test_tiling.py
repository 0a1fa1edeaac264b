"""Large pictures in pieces: slices are the same, tiles are close and seamless; peak memory is told."""

import pytest
import torch

import vargen
from tests.test_jacobi import tiny_llamagen
from vargen import MultiScaleBSQTokenizer, MultiScaleVQTokenizer, VQTokenizer
from vargen.outputs import peak_memory
from vargen.pipelines.inputs import merge_stats
from vargen.tokenizers.layers.tiling import _starts

SMALL = {"base_channels": 8, "channel_multipliers": [1, 2], "num_res_blocks": 1, "z_channels": 8, "norm_num_groups": 4}


def vq(**config):
    torch.manual_seed(0)
    return VQTokenizer(**SMALL, codebook_size=32, codebook_dim=4, **config).eval().requires_grad_(False)


def latents(batch, height, width, channels=4):
    """Smooth ones whose mean and spread are those of every tile: normalisation sees the same wherever it looks."""
    y, x = 0.8 * torch.arange(height)[:, None], 0.8 * torch.arange(width)
    planes = [torch.sin(x + k) + torch.cos(y + 2 * k) for k in range(channels)]
    return torch.stack(planes).expand(batch, -1, -1, -1).clone() + torch.arange(batch)[:, None, None, None] * 0.1


def test_slices_give_the_same_pictures_and_codes():
    tokenizer, z = vq(), latents(3, 6, 8)
    images = torch.rand(3, 3, 12, 16) * 2 - 1
    whole, codes = tokenizer.decode_latents(z), tokenizer.encode(images).codes
    tokenizer.enable_slicing()
    torch.testing.assert_close(tokenizer.decode_latents(z), whole, atol=1e-5, rtol=1e-5)
    assert torch.equal(tokenizer.encode(images).codes, codes)
    tokenizer.disable_slicing()
    assert torch.equal(tokenizer.decode_latents(z), whole)


@pytest.mark.parametrize("sides", [(40, 24), (24, 40), (41, 33), (16, 64)])
def test_tiles_are_close_and_have_no_seams(sides):
    tokenizer, z = vq(attention=False), latents(1, *sides)
    whole = tokenizer.decode_latents(z)
    tokenizer.enable_tiling(tile_size=16, tile_overlap=8)
    tiled = tokenizer.decode_latents(z)
    assert tiled.shape == whole.shape
    scale = whole.std()
    assert (tiled - whole).abs().mean() < 0.25 * scale  # normalisation sees a tile only
    for axis in (-1, -2):  # a seam would be a step that the whole picture does not have
        assert tiled.diff(dim=axis).abs().max() < 1.5 * whole.diff(dim=axis).abs().max() + 0.02 * scale
    tokenizer.disable_tiling()
    assert torch.equal(tokenizer.decode_latents(z), whole)


def test_the_overlap_is_what_hides_seams():
    tokenizer, z = vq(attention=False), latents(1, 40, 24)
    whole, errors = tokenizer.decode_latents(z), []
    for overlap in (0, 8):
        tokenizer.enable_tiling(tile_size=16, tile_overlap=overlap)
        error = (tokenizer.decode_latents(z) - whole).abs()
        errors.append(float(error[..., 31:33, :].mean()))  # where two tiles meet without an overlap
    assert errors[1] < 0.6 * errors[0]


def test_small_pictures_are_not_cut():
    tokenizer, z = vq(), latents(2, 6, 8)
    whole = tokenizer.decode_latents(z)
    tokenizer.enable_tiling(tile_size=8, tile_overlap=2)
    assert torch.equal(tokenizer.decode_latents(z), whole)


def test_the_decoder_never_sees_more_than_a_tile():
    tokenizer, seen = vq(), []
    hook = tokenizer.post_quant_conv.register_forward_pre_hook(lambda _, args: seen.append(tuple(args[0].shape)))
    tokenizer.enable_tiling(tile_size=16, tile_overlap=4)
    tokenizer.enable_slicing()
    tokenizer.decode(torch.randint(32, (2, 30, 20)))
    hook.remove()
    assert set(seen) == {(1, 4, 16, 16)}
    assert len(seen) == 2 * 3 * 2


def test_encoding_in_tiles_keeps_most_codes_of_a_large_picture():
    tokenizer = vq(attention=False)
    images = torch.nn.functional.interpolate(latents(1, 20, 24, 3) / 3, scale_factor=4, mode="bilinear").clamp(-1, 1)
    codes = tokenizer.encode(images).codes
    tokenizer.enable_tiling(tile_size=24, tile_overlap=12)
    tiled = tokenizer.encode(images).codes
    assert tiled.shape == codes.shape == (1, 40, 48)
    assert (tiled == codes).float().mean() > 0.7


@pytest.mark.parametrize("make", [MultiScaleVQTokenizer, MultiScaleBSQTokenizer])
def test_multiscale_tokenizers_tile_as_well(make):
    torch.manual_seed(0)
    settings = {"base_channels": 8, "channel_multipliers": [1, 2], "num_res_blocks": 1, "codebook_dim": 4}
    settings |= {"scales": [1, 2, 24]} | (
        {"codebook_size": 16, "z_channels": 4} if make is MultiScaleVQTokenizer else {}
    )
    tokenizer = make(**settings, norm_num_groups=4).eval().requires_grad_(False)
    z = latents(2, 24, 24)
    whole = tokenizer.decode_latents(z)
    tokenizer.enable_slicing()
    torch.testing.assert_close(tokenizer.decode_latents(z), whole, atol=1e-5, rtol=1e-5)
    tokenizer.enable_tiling(tile_size=16, tile_overlap=8)
    assert tokenizer.decode_latents(z).shape == whole.shape


def test_tiles_reach_the_end():
    for length, size, overlap in ((40, 16, 8), (41, 16, 8), (17, 16, 15), (16, 16, 4), (3, 16, 4), (100, 16, 0)):
        starts = _starts(length, size, overlap)
        covered = {i for start in starts for i in range(start, min(start + size, length))}
        assert covered == set(range(length))
        assert max(starts) + size <= max(length, size)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [((1, 0), "tile_size must be"), ((16, 16), "tile_overlap must be"), ((16, -1), "tile_overlap must be")],
)
def test_bad_tiles_are_one_clear_line(arguments, message):
    with pytest.raises(ValueError, match=message):
        vq().enable_tiling(*arguments)


def test_stats_tell_peak_memory():
    out = vargen.NextTokenSampler().sample(tiny_llamagen(), torch.zeros(1, dtype=torch.int64), seeds=[0])
    peak = out.stats.peak_memory
    assert peak is None or peak > 2**26  # of a process that holds torch
    joined = merge_stats([out.stats, vargen.DecodeStats(peak_memory=2**50), vargen.DecodeStats()])
    assert joined.peak_memory == 2**50
    assert merge_stats([vargen.DecodeStats(), vargen.DecodeStats()]).peak_memory is None
    assert peak_memory(torch.device("mps")) is None

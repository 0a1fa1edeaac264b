"""Multi-scale tokenizer: the official numbers, any list of scales, training losses, the pyramid, strict loading."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from tests.golden_files import load_file
from vargen.checkpoints.reader import CheckpointError
from vargen.checkpoints.verify import verify_checkpoint
from vargen.tokenizers.multiscale_vq.checkpoints import to_native, to_official
from vargen.tokenizers.multiscale_vq.model import SCALES_512, MultiScaleVQTokenizer
from vargen.tokenizers.multiscale_vq.quantizer import phi_index

GOLDEN = Path(__file__).parent / "golden" / "var"
SCALES = (1, 2, 3, 4)
TINY = {
    "base_channels": 8,
    "channel_multipliers": [1, 1],
    "num_res_blocks": 1,
    "norm_num_groups": 4,
    "attention": False,
    "codebook_size": 32,
    "codebook_dim": 12,
    "scales": [1, 2, 4],
}


def weights() -> dict[str, Tensor]:
    return {name: value.float() for name, value in load_file(GOLDEN / "vqvae_weights.safetensors").items()}


@pytest.fixture(scope="module")
def official() -> MultiScaleVQTokenizer:
    return MultiScaleVQTokenizer.from_original(weights(), scales=SCALES).requires_grad_(False)


@pytest.fixture(scope="module")
def io() -> dict[str, Tensor]:
    return load_file(GOLDEN / "vqvae_io.safetensors")


def close(found: Tensor, wanted: Tensor) -> None:
    torch.testing.assert_close(found, wanted, atol=1e-4, rtol=0)


def tiny(**config: object) -> MultiScaleVQTokenizer:
    torch.manual_seed(0)
    model = MultiScaleVQTokenizer(**{**TINY, **config})
    torch.nn.init.normal_(model.quantize.embedding.weight)
    return model.eval().requires_grad_(False)


def test_encoding_gives_the_official_codes(official, io):
    close(official.features(io["image"]), io["f"])
    output = official.encode(io["image"])
    for k, codes in enumerate(output.codes):
        assert torch.equal(codes, io[f"idx.{k}"])
        close(official.latents(output.codes[: k + 1]), io[f"f_hat.{k}"])
    close(output.latents, io["f_hat.3"])


def test_decoding_gives_the_official_pictures(official, io):
    codes = [io[f"idx.{k}"] for k in range(4)]
    close(official.decode(codes).clamp(-1, 1), io["recon_from_idx"])
    close(official.decode_partial(codes[:1]).clamp(-1, 1), io["recon_scale0"])
    close(official(io["image"]).images.clamp(-1, 1), io["recon"])


def test_transformer_inputs_are_the_official_ones(official, io):
    codes = [io[f"idx.{k}"] for k in range(4)]
    close(official.scale_inputs(codes), io["var_input"])
    close(official.scale_inputs(codes[:2]), io["var_input"][:, :13])  # scales 1 and 2 alone


def test_lookup_by_direction_gives_the_official_codes(io):
    model = MultiScaleVQTokenizer.from_original(weights(), scales=SCALES, znorm=True)
    for k, codes in enumerate(model.quantize(io["f"]).codes):
        assert torch.equal(codes, io[f"idx_znorm.{k}"])


def test_training_loss_and_gradients_are_the_official_ones(io):
    quantize = MultiScaleVQTokenizer.from_original(weights(), scales=SCALES).train().quantize
    f = io["f"].clone().requires_grad_()
    output = quantize(f)
    straight = (output.latents * torch.linspace(-1, 1, f.numel()).view_as(f)).sum()
    (straight + output.loss).backward()
    close(output.loss.detach().view(1), io["vq_loss"])
    close(f.grad, io["vq_grad_f"])
    close(quantize.embedding.weight.grad, io["vq_grad_codebook"])


@pytest.mark.parametrize(
    ("num_scales", "index"),
    [
        (10, [0, 0, 1, 1, 1, 2, 2, 3, 3, 3]),
        (14, [0, 0, 0, 1, 1, 1, 1, 2, 2, 2, 2, 3, 3, 3]),
        (9, [0, 0, 1, 1, 2, 2, 2, 3, 3]),
        (8, [0, 0, 1, 1, 2, 2, 3, 3]),
        (5, [0, 1, 2, 2, 3]),
        (4, [0, 1, 2, 3]),
        (1, [0]),
    ],
)
def test_kernel_of_each_scale(num_scales, index):
    assert phi_index(num_scales, 4) == index


def test_published_file_has_exact_keys_and_parameters():
    with torch.device("meta"):
        file = to_official(MultiScaleVQTokenizer().state_dict())
    report = verify_checkpoint(file)
    assert report.ok, report
    assert (report.size, report.num_entries, report.num_parameters) == ("vae_ch160v4096z32", 324, 108_948_355)
    assert file["encoder.down.4.attn.0.qkv.weight"].shape == (1920, 640, 1, 1)
    del file["decoder.up.0.block.2.conv1.bias"]
    assert verify_checkpoint(file).missing == ["decoder.up.0.block.2.conv1.bias"]


def test_official_layout_survives_renaming_both_ways():
    there_and_back = to_official(to_native(weights()))
    assert there_and_back.keys() == weights().keys()
    assert all(torch.equal(there_and_back[name], value) for name, value in weights().items())


def test_loading_is_strict():
    file = weights()
    value = file.pop("quantize.quant_resi.qresi_ls.0.bias")
    with pytest.raises(CheckpointError, match=r"missing key.*qresi_ls\.0\.bias"):
        MultiScaleVQTokenizer.from_original(file, scales=SCALES)
    with pytest.raises(CheckpointError, match="unexpected key: spare"):
        MultiScaleVQTokenizer.from_original(
            {**file, "quantize.quant_resi.qresi_ls.0.bias": value, "spare": value}, scales=SCALES
        )
    with pytest.raises(CheckpointError, match="VAR transformer"):
        MultiScaleVQTokenizer.from_original(load_file(GOLDEN / "var_weights.safetensors"), scales=SCALES)
    with pytest.raises(CheckpointError, match="pass scales="):
        MultiScaleVQTokenizer.from_original(weights())
    with pytest.raises(ValueError, match="no setting 'scale'; did you mean 'scales'"):
        MultiScaleVQTokenizer.from_original(weights(), scale=(1, 2))


def test_one_file_serves_other_scale_lists(io):
    model = MultiScaleVQTokenizer.from_original(weights(), scales=(1, 3, 4))  # the statistic in the file has four rows
    assert model.quantize.ema_vocab_hit_SV.shape[0] == 3
    assert [c.shape[1] for c in model.encode(io["image"]).codes] == [1, 9, 16]
    with torch.device("meta"):
        file = MultiScaleVQTokenizer().state_dict()
        assert MultiScaleVQTokenizer(scales=SCALES_512).state_dict().keys() == file.keys()


@pytest.mark.parametrize("scales", [(4,), (1, 4), (2, 3, 4, 4), ((1, 2), (2, 3), (4, 6))])
@pytest.mark.parametrize("residual", [True, False])
def test_any_list_of_scales_reconstructs(scales, residual):
    model = tiny(scales=scales, residual=residual)
    height, width = model.scales[-1]
    images = torch.rand(3, 3, 2 * height, 2 * width) * 2 - 1
    output = model.encode(images)
    assert [codes.shape for codes in output.codes] == [(3, h * w) for h, w in model.scales]
    torch.testing.assert_close(model.latents(output.codes), output.latents)
    torch.testing.assert_close(model.decode(output.codes), model(images).images)
    if len(scales) > 1:
        length = sum(h * w for h, w in model.scales[1:])
        assert model.scale_inputs(output.codes).shape == (3, length, 12)


def test_scales_of_a_call_replace_those_of_the_model():
    model = tiny()
    images = torch.rand(2, 3, 8, 12) * 2 - 1
    scales = [(1, 1), (2, 3), (4, 6)]
    codes = model.encode(images, scales).codes
    assert model.decode(codes, scales).shape == images.shape
    with pytest.raises(ValueError, match=r"latents of 4x6.*last scale is 4x4"):
        model.encode(images)


def test_more_scales_come_closer():
    model = tiny(encoder_type="patch", phi_ratio=0.0, z_channels=8)
    images = torch.rand(8, 3, 8, 8) * 2 - 1
    model.init_codebook_(images, torch.Generator().manual_seed(0))
    codes = model.encode(images).codes
    errors = [F.mse_loss(model.latents(codes[:k]), model.features(images)).item() for k in (1, 2, 3)]
    assert errors[0] > errors[1] > errors[2]


def test_code_of_a_pyramid_depends_on_its_own_cell():
    model = tiny(encoder_type="patch", phi_ratio=0.0, z_channels=8, upsample="nearest", residual=False)
    images = torch.rand(2, 3, 8, 8) * 2 - 1
    before = model.encode(images).codes
    images[:, :, 6:, 6:] = 0.9
    after = model.encode(images).codes
    changed = (before[-1] != after[-1]).any(0).nonzero().flatten().tolist()
    assert changed in ([15], [])
    assert torch.equal(before[1][:, :3], after[1][:, :3])
    patches = model.features(images).permute(0, 2, 3, 1).flatten(0, 2)
    assert torch.equal(after[-1].flatten(), torch.cdist(patches, model.codebook).argmin(-1))


def test_codebook_from_kmeans_is_a_function_of_the_seed():
    images = torch.rand(16, 3, 8, 8) * 2 - 1
    books = []
    for seed in (0, 0, 1):
        model = tiny(encoder_type="patch", phi_ratio=0.0, z_channels=8)
        model.init_codebook_(images, torch.Generator().manual_seed(seed))
        books.append(model.codebook.clone())
    assert torch.equal(books[0], books[1])
    assert not torch.equal(books[0], books[2])


def test_training_step_lowers_the_loss_and_counts_codes():
    model = tiny().requires_grad_(True).train()
    images = torch.rand(4, 3, 8, 8) * 2 - 1
    optimizer = torch.optim.Adam(model.parameters(), 3e-3)
    losses = []
    for _ in range(12):
        output = model(images)
        loss = F.mse_loss(output.images, images) + output.loss
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    assert losses[-1] < losses[0]
    assert model.encoder.conv_in.weight.grad.abs().max() > 0  # straight through
    assert model.quantize.ema_vocab_hit_SV.sum(1).gt(0).all()


def test_saved_model_encodes_the_same(tmp_path):
    model = tiny(scales=[(1, 1), (2, 2), (4, 4)])
    model.save_pretrained(tmp_path)
    again = MultiScaleVQTokenizer.from_pretrained(tmp_path)
    images = torch.rand(2, 3, 8, 8) * 2 - 1
    assert all(map(torch.equal, model.encode(images).codes, again.encode(images).codes))
    assert again.scales == model.scales


@pytest.mark.parametrize(
    ("codes", "message"),
    [
        ([torch.zeros(1, 1, dtype=torch.int64)] * 2, "must be \\[B, 4\\]"),
        ([torch.full((1, 1), 32)], "must lie in \\[0, 32\\), got 32 at scale 0"),
        ([torch.zeros(1, 1)], "must be integers, got torch.float32"),
        (torch.zeros(1, 21, dtype=torch.int64), "got one tensor"),
    ],
)
def test_wrong_codes_are_refused_in_one_line(codes, message):
    with pytest.raises(ValueError, match=message):
        tiny().decode_partial(codes)


@pytest.mark.parametrize(
    ("config", "message"),
    [
        ({"scales": [4, 2]}, "larger than the last one"),
        ({"scales": []}, "must be a list of 1..64 sides"),
        ({"encoder_type": "patch", "codebook_dim": 8}, "needs codebook_dim=12"),
        ({"upsample": "cubic"}, "upsample must be one of"),
        ({"norm_num_groups": 3}, "must divide every width"),
    ],
)
def test_wrong_settings_are_refused(config, message):
    with pytest.raises(ValueError, match=message):
        MultiScaleVQTokenizer(**{**TINY, **config})


def test_complete_decode_wants_every_scale():
    with pytest.raises(ValueError, match="decode_partial takes the first few"):
        tiny().decode([torch.zeros(1, 1, dtype=torch.int64)])

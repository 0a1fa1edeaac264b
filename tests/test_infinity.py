"""Infinity's transformer: official logits, captions of different lengths, scales of a session, sizes, strict loading."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from safetensors.torch import save_file
from torch import Tensor

from tests.golden_files import load_file
from vargen.backbones.infinity.model import InfinityTransformer
from vargen.backbones.infinity.sizes import (
    GRIDS,
    PIECES,
    nearest_ratio,
    places,
    rope_rows,
    scales_for,
    scales_of,
    to_native,
    to_official,
)
from vargen.checkpoints.manifests.published import PARAMETERS
from vargen.checkpoints.reader import CheckpointError
from vargen.checkpoints.verify import verify_checkpoint

GOLDEN = Path(__file__).parent / "golden" / "infinity"
CONFIG = json.loads((GOLDEN / "config.json").read_text())
SCALES = {
    name: [(h, w) for _, h, w in CONFIG["schedules"][key]] for name, key in (("ratio", "2.0"), ("ratio2", "1.0"))
}
TINY: dict[str, Any] = {
    "dim": 16,
    "num_layers": 2,
    "num_heads": 2,
    "num_bits": 3,
    "scales": [1, 2, (3, 4)],
    "text_dim": 12,
    "text_length": 6,
    "text_pool_heads": 2,
    "ffn_dim": 24,
    "max_scales": 5,
}


def weights(folder: str = "") -> dict[str, Tensor]:
    return load_file(GOLDEN / folder / "model.safetensors")


def official(folder: str = "", ratio: str = "ratio") -> InfinityTransformer:
    return InfinityTransformer.from_original(weights(folder), scales=SCALES[ratio]).requires_grad_(False)


def tiny(**config: Any) -> InfinityTransformer:
    torch.manual_seed(0)
    model = InfinityTransformer(**{**TINY, **config}).eval().requires_grad_(False)
    for p in model.parameters():  # nothing switched off by its initialisation
        torch.nn.init.normal_(p, std=0.4)
    return model


def caption(io: dict[str, Tensor], name: str = "text", lengths: str = "text_lens") -> tuple[Tensor, Tensor]:
    return io[name], torch.arange(io[name].shape[1]) < io[lengths][:, None]


def some_captions(*lengths: int, width: int = 12) -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(3)
    words = [torch.randn(n, width, generator=generator) for n in lengths]
    longest = max(lengths)
    features = torch.stack([F.pad(w, (0, 0, longest - len(w), 0), value=7.0) for w in words])  # padding is not zero
    return features, torch.stack([torch.arange(longest) >= longest - n for n in lengths])


def some_features(model: InfinityTransformer, batch: int = 2) -> Tensor:
    generator = torch.Generator().manual_seed(1)
    return torch.randn(batch, model.num_codes - model.sizes[0], model.num_bits, generator=generator)


@pytest.mark.parametrize("folder", ["", "patchify"])
def test_forward_gives_the_official_logits(folder):
    io, inputs = (
        load_file(GOLDEN / folder / "forward.safetensors"),
        load_file(GOLDEN / folder / "train_input.safetensors"),
    )
    model, given = official(folder), caption(load_file(GOLDEN / "forward.safetensors"))
    features = inputs["x_BLC_wo_prefix"]
    before = given[0].clone()
    logits = model(features, given)
    torch.testing.assert_close(logits, io["logits"], atol=1e-4, rtol=0)
    dropped = model(features, given, drop=torch.ones(2, dtype=torch.bool))
    torch.testing.assert_close(dropped, io["logits_uncond"], atol=1e-4, rtol=0)
    assert torch.equal(given[0], before)  # the official forward writes into the caller's features
    labels = torch.cat([inputs[f"labels.{k}"] for k in range(4)], dim=1)
    loss = F.cross_entropy(logits.unflatten(2, (-1, 2)).flatten(0, 2), labels.flatten())
    torch.testing.assert_close(loss.view(1), io["loss"], atol=1e-4, rtol=0)


@pytest.mark.parametrize("slip", ["level", "position", "uncut", "clamp"])
def test_slips_are_seen(slip, monkeypatch):
    """Controls: each of these mistakes moves the logits far beyond the tolerance."""
    io, inputs = load_file(GOLDEN / "forward.safetensors"), load_file(GOLDEN / "train_input.safetensors")
    model, drop = official(), None
    if slip == "level":
        model.lvl_embed.weight.zero_()
    elif slip == "position":
        model = model.with_scales(model.scales, position_grid=(5, 3))
    elif slip == "uncut":
        drop = torch.ones(2, dtype=torch.bool)
        monkeypatch.setattr(
            model.text,
            "null",
            lambda given: (model.text.cfg_uncond.flip(0)[: given[0].shape[1]].expand_as(given[0]), given[1]),
        )
    else:
        monkeypatch.setattr("vargen.backbones.var.layers.MAX_LOG_SCALE", 10.0)
    wanted = io["logits" if drop is None else "logits_uncond"]
    found = model(inputs["x_BLC_wo_prefix"], caption(io), drop=drop)
    assert float((found - wanted).abs().max()) > 0.01


@pytest.mark.parametrize("negative", [False, True])
def test_cache_gives_the_official_logits_of_both_branches(negative):
    io, inputs = load_file(GOLDEN / "forward.safetensors"), load_file(GOLDEN / "train_input.safetensors")
    model = official()
    words = caption(io, "negative_text", "negative_lens") if negative else None
    session, out = model.open(model.prepare(caption(io), guidance_scale=2.0, negative=words))
    found = [out.logits]
    for part in inputs["x_BLC_wo_prefix"].split(model.sizes[1:], dim=1):
        found.append(model.step(session, part).logits)
    conditional, unconditional = torch.cat(found, dim=2)
    torch.testing.assert_close(conditional, io["logits"], atol=1e-4, rtol=0)
    other = model(inputs["x_BLC_wo_prefix"], words) if negative else io["logits_uncond"]
    torch.testing.assert_close(unconditional, other, atol=1e-4, rtol=0)


def test_several_scales_at_once_and_a_dropped_branch():
    model = tiny()
    features, given = some_features(model), some_captions(2, 5)
    whole = model(features, given)
    session, out = model.open(model.prepare(given, guidance_scale=2.0), features=features[:, :4])
    torch.testing.assert_close(out.logits[0], whole[:, :5], atol=1e-4, rtol=0)
    model.drop_guidance(session)
    last = model.step(session, features[:, 4:]).logits
    assert last.shape[0] == 1
    torch.testing.assert_close(last[0], whole[:, 5:], atol=1e-4, rtol=0)


def test_captions_of_different_lengths_are_those_of_single_runs():
    model = tiny()
    features, given = some_features(model, 3), some_captions(1, 6, 3)
    together = model(features, given)
    dropped = model(features, given, drop=torch.ones(3, dtype=torch.bool))
    for i, n in enumerate((1, 6, 3)):
        alone = (given[0][i : i + 1, 6 - n :], given[1][i : i + 1, 6 - n :])
        torch.testing.assert_close(together[i : i + 1], model(features[i : i + 1], alone), atol=1e-5, rtol=0)
        null = model(features[i : i + 1], (model.text.cfg_uncond[None, :n], torch.ones(1, n, dtype=torch.bool)))
        torch.testing.assert_close(dropped[i : i + 1], null, atol=1e-5, rtol=0)
    right = (given[0].flip(1), given[1].flip(1))  # padded on the other side; text positions have no order
    torch.testing.assert_close(model(features, right), together, atol=1e-5, rtol=0)


def test_a_scale_sees_its_own_and_coarser_ones_only():
    model = tiny()
    features, given = some_features(model), some_captions(2, 5)
    changed = features.clone()
    changed[:, 4:] += 1
    before, after = model(features, given), model(changed, given)
    assert torch.equal(before[:, :5], after[:, :5])
    assert not torch.allclose(before[:, 5:], after[:, 5:])
    assert model(features[:, :4], given).shape == (2, 5, 6)
    with pytest.raises(ValueError, match=r"whole scales of \[4, 12\] positions, got 3"):
        model(features[:, :3], given)


def test_scales_belong_to_the_session():
    model = tiny()
    wide = model.with_scales([1, (1, 3)], position_grid=(2, 6))
    given = some_captions(2, 5)
    condition = wide.prepare(given)
    assert (wide.num_codes, model.num_codes, wide.grid_size) == (4, 17, (1, 3))
    features = torch.randn(2, 3, 3, generator=torch.Generator().manual_seed(2))
    session, out = model.open(condition)  # the condition brings its sizes along
    found = torch.cat([out.logits, model.step(session, features).logits], dim=2)[0]
    torch.testing.assert_close(found, wide(features, given), atol=1e-5, rtol=0)
    assert wide.blocks is model.blocks
    with pytest.raises(ValueError, match=r"1\.\.5 sides"):
        model.with_scales([1] * 6)


def test_rotations_are_the_official_ones():
    io = load_file(GOLDEN / "rope.safetensors")
    for name in ("ratio", "ratio2"):
        rows = rope_rows(tuple(SCALES[name]), SCALES[name][-1], 12)  # L 2 c
        torch.testing.assert_close(torch.stack([rows[:, 0, ::2], rows[:, 1, 1::2]]), io[name], atol=1e-6, rtol=0)


def test_tables_and_positions_are_the_official_ones():
    official_tables = json.loads((GOLDEN / "schedules.json").read_text())
    assert len(GRIDS) == len(official_tables) == 15
    for key, table in official_tables.items():
        grids = [tuple(grid) for grid in table["scales"]]
        name = next(name for name, own in GRIDS.items() if list(own) == grids)
        tall, broad = map(int, name.split(":"))
        assert abs(tall / broad - float(key)) < 1e-3
        for pixels, count in table["num_scales"].items():
            pixels = pixels.replace("0.60M", "0.6M")
            assert PIECES[pixels] == count
            assert list(scales_of(name, pixels)) == grids[:count]
            height, width = table["pixels"][pixels.replace("0.6M", "0.60M")]
            assert scales_for(height, width) == tuple(grids[:count])
        for (h, w), rows, columns in zip(grids, table["rows"], table["cols"], strict=True):
            assert places(h, grids[-1][0]).tolist() == rows
            assert places(w, grids[-1][1]).tolist() == columns
    short = InfinityTransformer(**{**TINY, "max_scales": 15}).with_scales(scales_of("3:2", "0.06M"))
    assert short.position_grid == (78, 52)  # that of the table of a million pixels
    assert nearest_ratio(1080, 1920) == "4:7"


def test_unknown_sizes_are_one_line():
    with pytest.raises(
        ValueError, match=r"no table has 1000x1000 pixels .* nearest aspect ratio is 1:1, with 256x256"
    ) as caught:
        scales_for(1000, 1000)
    assert "\n" not in str(caught.value)
    with pytest.raises(ValueError, match=r"aspect_ratio .* must be one of 1:1, 5:4"):
        scales_of("16:9")


def test_bad_captions_are_one_line():
    model = tiny()
    features, mask = some_captions(2, 5)
    cases: list[tuple[Any, str]] = [
        (torch.tensor([1]), "must be \\(features, mask\\), got Tensor"),
        ((features[..., :5], mask), r"must have shape \[batch, 1\.\.6, 12\], got \[2, 5, 5\]"),
        ((features.repeat(1, 2, 1), mask.repeat(1, 2)), r"got \[2, 10, 12\]"),
        ((features, mask[:, :2]), r"caption mask must have shape \[2, 5\], got \[2, 2\]"),
        ((features, mask & torch.tensor([[False], [True]])), "caption 0 has no words"),
    ]
    for given, message in cases:
        with pytest.raises(ValueError, match=message):
            model.prepare(given)
    with pytest.raises(ValueError, match="as many rows"):
        model.prepare((features, mask), guidance_scale=2.0, negative=some_captions(3))


def test_training_drops_captions():
    model = tiny(class_dropout_prob=1.0)
    features, given = some_features(model), some_captions(2, 5)
    without = model(features, given, drop=torch.ones(2, dtype=torch.bool))
    model.train()
    torch.testing.assert_close(model(features, given), without, atol=1e-5, rtol=0)
    model.requires_grad_(True)
    model.gradient_checkpointing = True
    model(features, given).square().mean().backward()
    assert model.text.cfg_uncond.grad is not None


def test_a_saved_model_loads(tmp_path):
    model = tiny(position_grid=(6, 8))
    model.save_pretrained(tmp_path)
    again = InfinityTransformer.from_pretrained(tmp_path)
    features, given = some_features(model), some_captions(2, 5)
    assert again.position_grid == (6, 8)
    torch.testing.assert_close(again(features, given), model(features, given))


def test_published_sizes_have_exact_keys_and_parameters():
    keys = {
        "2b": 694,
        "8b": 862,
        "layer12": 274,
        "layer16": 358,
        "layer24": 526,
        "layer32": 694,
        "layer40": 862,
        "layer48": 1030,
    }
    for size, count in PARAMETERS["infinity"].items():
        with torch.device("meta"):
            model = InfinityTransformer.from_size(size)
        assert sum(p.numel() for p in model.parameters()) == count
        chunks = 8 if size in ("2b", "8b") else 4
        file = to_official(model.state_dict(), chunks)
        depth = model.config.num_layers
        per, width = depth // chunks, torch.empty(model.config.dim, device="meta")
        for i in range(depth):
            file |= {f"block_chunks.{i // per}.module.{i % per}.{part}.zero_k_bias": width for part in ("sa", "ca")}
        file["text_proj_for_sos.ca.zero_k_bias"] = width
        assert len(file) == keys[size]
        report = verify_checkpoint(file)
        assert report.ok, report
        assert report.size == f"infinity_{size}"
    one = verify_checkpoint(to_official(model.state_dict()))  # one chunk is written as blocks.*
    assert one.ok


def shards(folder: Path, given: dict[str, Tensor], kind: str) -> Path:
    """The checkpoint in two shards with an index."""
    folder.mkdir()
    names, listed = list(given), {}
    for i, part in enumerate((names[::2], names[1::2])):
        name = f"weights-0000{i + 1}-of-00002.{kind}"
        tensors = {key: given[key].contiguous() for key in part}
        save_file(tensors, folder / name) if kind == "safetensors" else torch.save(tensors, folder / name)
        listed |= dict.fromkeys(part, name)
    (folder / f"weights.{kind}.index.json").write_text(json.dumps({"metadata": {}, "weight_map": listed}))
    return folder


@pytest.mark.parametrize("kind", ["safetensors", "bin"])
def test_shards_are_read_strictly(tmp_path, kind):
    given = weights()
    folder = shards(tmp_path / "whole", given, kind)
    model = InfinityTransformer.from_original(folder, scales=SCALES["ratio"])
    assert all(
        torch.equal(value, model.state_dict()[key]) for key, value in to_native(given).items() if "zero_k" not in key
    )
    (folder / f"weights-00002-of-00002.{kind}").unlink()
    with pytest.raises(CheckpointError, match=r"weights-00002-of-00002") as caught:
        InfinityTransformer.from_original(folder)
    assert "\n" not in str(caught.value)


def test_loading_is_strict_and_says_what_it_looks_like(tmp_path):
    given = weights()
    torch.save(given, tmp_path / "model.pth")
    assert InfinityTransformer.from_original(tmp_path / "model.pth", scales=SCALES["ratio"]).num_bits == 16
    bias = given.pop("block_chunks.1.module.0.ca.v_bias")
    with pytest.raises(CheckpointError, match=r"missing key: blocks\.2\.ca\.v_bias"):
        InfinityTransformer.from_original(given)
    with pytest.raises(CheckpointError, match="unexpected key: spare"):
        InfinityTransformer.from_original({**given, "block_chunks.1.module.0.ca.v_bias": bias, "spare": bias})
    gone = {key: value for key, value in weights().items() if not key.startswith("block_chunks.1.module.1.")}
    with pytest.raises(CheckpointError, match="block_chunks must be equally long"):
        InfinityTransformer.from_original(gone)
    with pytest.raises(CheckpointError, match="Infinity binary tokenizer"):
        InfinityTransformer.from_original(load_file(GOLDEN / "vae.safetensors"))

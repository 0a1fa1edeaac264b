"""VAR's transformer: official numbers and sizes, the order of scales, the cache, conditions, strict loading."""

from __future__ import annotations

import shutil
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from tests.golden_files import load_file
from vargen.backbones.var.model import VARTransformer
from vargen.backbones.var.sizes import SCALES_512
from vargen.checkpoints.manifests.published import PARAMETERS
from vargen.checkpoints.reader import CheckpointError
from vargen.checkpoints.verify import verify_checkpoint
from vargen.pipelines.image import ImagePipeline
from vargen.tokenizers.vq.model import VQTokenizer
from vargen.training.checkpoints import load_weights
from vargen.training.export import export_pipeline
from vargen.training.recipe import parse_recipe
from vargen.training.run import train
from vargen.training.tasks.base import make_task

GOLDEN = Path(__file__).parent / "golden" / "var"
TINY = {
    "dim": 16,
    "num_layers": 2,
    "num_heads": 2,
    "codebook_size": 11,
    "codebook_dim": 3,
    "scales": [1, 2, 3],
    "num_classes": 5,
}
ATTRIBUTES = {"condition_type": "attributes", "num_attributes": 9, "num_condition_tokens": 4}
TENSORS = {"d12": 168, "d16": 220, "d20": 272, "d24": 324, "d30": 402, "d36": 446}


def weights() -> dict[str, Tensor]:
    file = load_file(GOLDEN / "var_weights.safetensors")
    return {name: value.float() if value.is_floating_point() else value for name, value in file.items()}


def tiny(**config: object) -> VARTransformer:
    torch.manual_seed(0)
    model = VARTransformer(**{**TINY, **config}).eval().requires_grad_(False)
    for p in model.parameters():  # nothing switched off by its initialisation
        torch.nn.init.normal_(p, std=0.4)
    if model.config.codebook_head:
        model.set_codebook_(torch.randn(11, 3))
    return model


def features(model: VARTransformer, batch: int = 2) -> Tensor:
    generator = torch.Generator().manual_seed(1)
    return torch.randn(batch, model.num_codes - model.sizes[0], 3, generator=generator)


def condition(model: VARTransformer, batch: int = 2) -> Tensor:
    if model.config.condition_type == "class":
        return torch.arange(batch)
    return torch.arange(batch * 4).view(batch, 4) % 9


def by_scale(model: VARTransformer, given: Tensor) -> list[Tensor]:
    return list(given.split(model.sizes[1:], dim=1))


@pytest.fixture(scope="module")
def official() -> VARTransformer:
    return VARTransformer.from_original(weights()).requires_grad_(False)


@pytest.fixture(scope="module")
def io() -> dict[str, Tensor]:
    return load_file(GOLDEN / "var_forward.safetensors")


def test_forward_gives_the_official_logits(official, io):
    inputs = io["x_BLCv_wo_first_l"]
    logits = official(inputs, io["labels"])
    torch.testing.assert_close(logits, io["logits"], atol=1e-4, rtol=0)
    null = torch.full_like(io["labels"], 10)
    torch.testing.assert_close(official(inputs, null), io["logits_uncond"], atol=1e-4, rtol=0)
    codes = load_file(GOLDEN / "vqvae_io.safetensors")
    targets = torch.cat([codes[f"idx.{k}"] for k in range(4)], dim=1)
    loss = F.cross_entropy(logits.flatten(0, 1), targets.flatten())
    torch.testing.assert_close(loss.view(1), io["train_loss"], atol=1e-4, rtol=0)


def test_cache_gives_the_official_logits_of_both_branches(official, io):
    prepared = official.prepare(io["labels"], guidance_scale=2.0)
    session, out = official.open(prepared)
    found = [out.logits]
    found += [official.step(session, part).logits for part in by_scale(official, io["x_BLCv_wo_first_l"])]
    conditional, unconditional = torch.cat(found, dim=2)
    torch.testing.assert_close(conditional, io["logits"], atol=1e-4, rtol=0)
    torch.testing.assert_close(unconditional, io["logits_uncond"], atol=1e-4, rtol=0)


def test_published_sizes_have_exact_keys_and_parameters():
    for size, count in PARAMETERS["var"].items():
        with torch.device("meta"):
            model = VARTransformer.from_size(size)
        assert sum(p.numel() for p in model.parameters()) == count
        depth = model.config.num_layers
        file = dict(model.state_dict())
        file |= {f"blocks.{i}.attn.zero_k_bias": torch.empty(64 * depth, device="meta") for i in range(depth)}
        file["lvl_1L"] = torch.empty(1, model.num_codes, dtype=torch.int64, device="meta")
        file["attn_bias_for_masking"] = torch.empty(1, 1, model.num_codes, model.num_codes, device="meta")
        report = verify_checkpoint(file)
        assert report.ok, report
        assert (report.size, report.num_entries) == (size, TENSORS[size])
    assert (depth, model.config.shared_aln, tuple(s[0] for s in model.scales)) == (36, True, SCALES_512)


def test_verification_names_what_is_wrong():
    with torch.device("meta"):
        file = dict(VARTransformer.from_size("d16").state_dict())
    file["blocks.3.attn.q_bias"] = torch.empty(7, device="meta")
    del file["blocks.2.ffn.fc2.bias"]
    report = verify_checkpoint(file)
    assert not report.ok
    assert report.missing == ["blocks.2.ffn.fc2.bias"]
    assert report.wrong_shapes == {"blocks.3.attn.q_bias": ((7,), (1024,))}


def test_loading_is_strict_but_for_buffers(io):
    file = {k: v for k, v in weights().items() if not k.endswith(("zero_k_bias", "lvl_1L", "for_masking"))}
    with pytest.raises(ValueError, match="pass scales="):
        VARTransformer.from_original(file)
    model = VARTransformer.from_original(file, scales=(1, 2, 3, 4))
    torch.testing.assert_close(model(io["x_BLCv_wo_first_l"], io["labels"]), io["logits"], atol=1e-4, rtol=0)
    bias = file.pop("blocks.1.attn.v_bias")
    with pytest.raises(CheckpointError, match=r"missing key: blocks\.1\.attn\.v_bias"):
        VARTransformer.from_original(file, scales=(1, 2, 3, 4))
    with pytest.raises(CheckpointError, match="unexpected key: spare"):
        VARTransformer.from_original({**file, "blocks.1.attn.v_bias": bias, "spare": bias}, scales=(1, 2, 3, 4))
    with pytest.raises(CheckpointError, match="VAR multi-scale tokenizer"):
        VARTransformer.from_original(load_file(GOLDEN / "vqvae_weights.safetensors"))


def test_training_container_is_unwrapped():
    container = {"epoch": 1, "trainer": {"config": {}, "var_wo_ddp": weights(), "vae_local": {}}}
    assert VARTransformer.from_original(container).scales == ((1, 1), (2, 2), (3, 3), (4, 4))


@pytest.mark.parametrize("config", [{}, ATTRIBUTES, {**ATTRIBUTES, "codebook_head": True, "shared_aln": True}])
class TestScales:
    def test_a_scale_sees_coarser_inputs_and_its_own(self, config):
        model = tiny(**config)
        given = features(model)
        before = model(given, condition(model))
        changed = given.clone()
        changed[:, 4:] += 1.0  # the input of scale 2
        after = model(changed, condition(model))
        torch.testing.assert_close(after[:, :5], before[:, :5])
        assert (after[:, 5:] - before[:, 5:]).abs().amin(-1).amin() > 0  # every position of scale 2, from every other

    def test_cache_scale_by_scale_equals_the_training_forward(self, config):
        model = tiny(**config)
        given, labels = features(model), condition(model)
        session, out = model.open(model.prepare(labels))
        found = [out.logits] + [model.step(session, part).logits for part in by_scale(model, given)]
        torch.testing.assert_close(torch.cat(found, dim=2)[0], model(given, labels), atol=1e-4, rtol=1e-4)

    def test_several_scales_in_one_pass_equal_single_ones(self, config):
        model = tiny(**config)
        given, labels = features(model), condition(model)
        whole = model(given, labels)
        session, out = model.open(model.prepare(labels), features=given[:, :4])
        torch.testing.assert_close(out.logits[0], whole[:, :5], atol=1e-4, rtol=1e-4)
        torch.testing.assert_close(model.step(session, given[:, 4:]).logits[0], whole[:, 5:], atol=1e-4, rtol=1e-4)

    def test_fewer_scales_predict_fewer(self, config):
        model = tiny(**config)
        given, labels = features(model), condition(model)
        torch.testing.assert_close(model(given[:, :4], labels), model(given, labels)[:, :5])

    def test_dropping_guidance_leaves_the_conditional_branch(self, config):
        model = tiny(**config)
        first, second = by_scale(model, features(model))
        session, _ = model.open(model.prepare(condition(model), guidance_scale=2.0))
        plain, _ = model.open(model.prepare(condition(model)))
        assert model.step(session, first).logits.shape[0] == 2
        model.step(plain, first)
        model.drop_guidance(session)
        found = model.step(session, second).logits
        torch.testing.assert_close(found, model.step(plain, second).logits, atol=1e-5, rtol=1e-5)

    def test_an_image_does_not_depend_on_its_batch(self, config):
        model = tiny(**config)
        given, labels = features(model, 3), condition(model, 3)
        alone = model(given[1:2], labels[1:2])
        torch.testing.assert_close(model(given, labels)[1:2], alone, atol=1e-5, rtol=1e-5)

    def test_saved_model_scores_the_same(self, config, tmp_path):
        model = tiny(**config)
        model.save_pretrained(tmp_path)
        again = VARTransformer.from_pretrained(tmp_path)
        assert torch.equal(again(features(model), condition(model)), model(features(model), condition(model)))


def test_softmax_scale_without_unit_queries_is_the_official_one():
    model = tiny(attn_l2_norm=False)
    attention = model.blocks[0].attn
    x = torch.randn(1, 5, 16)
    q, k, v = F.linear(x, attention.mat_qkv.weight).view(1, 5, 3, 2, 8).permute(2, 0, 3, 1, 4)
    q, v = q + attention.q_bias.view(2, 1, 8), v + attention.v_bias.view(2, 1, 8)
    mixed = (q @ k.mT * (0.25 / 8**0.5)).softmax(-1) @ v
    wanted = attention.proj(mixed.transpose(1, 2).flatten(2))
    torch.testing.assert_close(attention(x, F.scaled_dot_product_attention), wanted)


def test_codebook_head_adds_closeness_of_codes():
    model = tiny(codebook_head=True)
    given, labels = features(model), condition(model)
    logits = model(given, labels)
    free = tiny(codebook_head=True)
    free.code_vectors.zero_()
    added = logits - free(given, labels)
    # what a position adds is s (g e - e^2 / 2): linear in the code vector and its squared length
    e = torch.cat([model.code_vectors, model.code_vectors.square().sum(-1, keepdim=True) / -2], dim=1)  # V C+1
    solution = torch.linalg.lstsq(e, added.flatten(0, 1).T).solution
    torch.testing.assert_close((e @ solution).T.view_as(added), added, atol=1e-3, rtol=1e-3)
    assert (solution[-1] > 0).all()  # the sharpness


def test_null_attributes_are_zeros_and_dropping_makes_them():
    model = tiny(**ATTRIBUTES)
    given, labels = features(model), condition(model)
    null = model(given, torch.zeros_like(labels))
    assert torch.equal(model(given, labels, drop=torch.tensor([True, True])), null)
    slots = torch.zeros(2, 4, dtype=torch.bool)
    slots[:, 1] = True
    partly = labels.clone()
    partly[:, 1] = 0
    assert torch.equal(model(given, labels, drop=slots), model(given, partly))
    assert not torch.equal(null, model(given, partly))


def test_labels_are_dropped_in_training_only():
    model = tiny(class_dropout_prob=1.0)
    given, labels = features(model), condition(model)
    null = model(given, torch.full_like(labels, 5))
    assert not torch.equal(model(given, labels), null)
    torch.testing.assert_close(model.train()(given, labels), null)


def test_checkpointed_gradients_are_the_same():
    grads = []
    for recompute in (False, True):
        model = tiny().requires_grad_(True)
        if recompute:
            model.enable_gradient_checkpointing()
        model(features(model), condition(model)).square().mean().backward()
        grads.append(model.word_embed.weight.grad)
    torch.testing.assert_close(*grads)


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda m: m.prepare(torch.tensor([6])), r"class label must be in 0\.\.4 \(5 = no class\), got 6"),
        (lambda m: m.prepare(torch.tensor([0.5])), "class labels must be integers"),
        (lambda m: m(features(m)[:, :3], condition(m)), r"whole scales of \[4, 9\] positions, got 3"),
        (lambda m: m.train().open(m.prepare(condition(m))), "model.eval()"),
        (lambda m: VARTransformer.from_size("d13"), "published sizes are d12"),
        (lambda m: VARTransformer(**{**TINY, "num_heads": 3}), "num_heads must divide dim"),
        (
            lambda m: VARTransformer(**{**TINY, "condition_type": "text"}),
            "condition_type must be one of class, attributes",
        ),
        (
            lambda m: VARTransformer.from_original({"pos_1LC": torch.zeros(1), "lvl_embed.weight": torch.zeros(1)}),
            "lacks",
        ),
    ],
)
def test_bad_input_is_refused_in_one_line(call, message):
    with pytest.raises(ValueError, match=message):
        call(tiny())


def tiny_recipes(folder: Path, encoder: str) -> tuple[dict, dict]:
    """A tokenizer of one encoder and a transformer over it, two steps each."""
    small = {
        "seed": 0,
        "data": {"batch_size": 2, "num_eval_images": 2},
        "schedule": {"num_steps": 2, "warmup_steps": 0, "decay_steps": 1},
        "log": {"log_every": 1, "eval_every": 2, "sample_every": 2, "checkpoint_every": 1},
    }
    tokenizer = {
        "encoder_type": encoder,
        "base_channels": 8,
        "channel_multipliers": [1, 1],
        "num_res_blocks": 1,
        "norm_num_groups": 4,
        "attention": False,
        "codebook_size": 24,
        "codebook_dim": 12,
        "scales": [1, 4, 16],
    }
    first = {"name": "t", "task": "multiscale-vq", "model": tokenizer, "options": {"num_kmeans_images": 4}, **small}
    model = {"dim": 16, "num_layers": 1, "num_heads": 2, "shared_aln": True, "codebook_head": True}
    options = {"tokenizer": str(folder / "tokenizer"), "grid_size": 2}
    second = {"name": "v", "task": "var", "model": model, "options": options, "optimizer": {"name": "muon"}, **small}
    return first, second


@pytest.mark.parametrize("encoder", ["conv", "patch"])
def test_tokenizer_and_transformer_train_resume_and_export(encoder, tmp_path):
    first, second = (parse_recipe(table) for table in tiny_recipes(tmp_path, encoder))
    metrics = train(first, output=tmp_path / "tokenizer").metrics
    assert metrics["psnr"] > 0
    whole = train(second, output=tmp_path / "whole")
    assert whole.finished
    assert 0 < whole.metrics["held_out_nats_per_token"] < 50
    assert (tmp_path / "whole" / "samples" / "step-00000002.png").is_file()
    shutil.copytree(tmp_path / "whole", tmp_path / "resumed")
    shutil.rmtree(tmp_path / "resumed" / "checkpoints" / "step-00000002")
    train(second, output=tmp_path / "resumed", resume=True)
    one, other = (
        load_weights(tmp_path / run / "checkpoints" / "step-00000002", "ema") for run in ("whole", "resumed")
    )
    assert all(torch.equal(one[name], other[name]) for name in one)

    folder = export_pipeline(tmp_path / "whole", tmp_path / "model", guidance_scale=1.5)
    pipe = ImagePipeline.from_pretrained(folder)
    pipe.set_progress_bar_config(disable=True)
    output = pipe("deep elf with a red cloak", seed=0, output_type="pt")
    assert output.images.shape == (1, 3, 32, 32)
    assert [codes.shape[1] for codes in output.codes] == [1, 16, 256]
    assert pipe.sampler.guidance_scale == 1.5


def test_tokenizer_starts_from_another_ones_codebook_and_decoder(tmp_path):
    sizes = {"base_channels": 8, "channel_multipliers": [1, 1], "num_res_blocks": 1, "norm_num_groups": 4}
    sizes |= {"attention": False, "codebook_size": 24, "codebook_dim": 12, "z_channels": 8, "encoder_type": "patch"}
    torch.manual_seed(0)
    other = VQTokenizer(**sizes, l2_norm=False).eval()
    torch.nn.init.normal_(other.quantize.embedding.weight, std=0.5)
    torch.nn.init.normal_(other.decoder.conv_out.weight, std=0.1)
    other.save_pretrained(tmp_path)
    model = {**sizes, "scales": [1, 4, 16], "residual": False, "phi_ratio": 0.0, "quant_conv_kernel_size": 1}
    recipe = parse_recipe(
        {"name": "t", "task": "multiscale-vq", "model": model, "options": {"init_from": str(tmp_path)}}
    )
    task = make_task(recipe)
    found = task.build(initialize=True).eval()
    images = task.test_batch(0, 2)["image"]
    assert torch.equal(found.encode(images).codes[-1], other.encode(images).codes.flatten(1))
    torch.testing.assert_close(found(images).images, other(images).images)

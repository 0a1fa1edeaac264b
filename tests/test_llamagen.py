"""LlamaGenTransformer against the official code's numbers, its published sizes, and its own promises."""

import json
from functools import cache
from pathlib import Path

import pytest
import torch

from tests.golden_files import load_file, unpacked
from tests.llamagen_shapes import PUBLISHED, official_shapes
from vargen.backbones.decoding.condition import padding_mask
from vargen.backbones.llamagen.model import LlamaGenTransformer
from vargen.backbones.llamagen.sizes import SIZES
from vargen.kernels.warp import warp_logits
from vargen.protocols import Backbone
from vargen.samplers.window.jacobi import SpeculativeJacobiSampler
from vargen.samplers.window.next_token import NextTokenSampler

GOLDEN = Path(__file__).parent / "golden" / "llamagen"
CONFIG = json.loads((GOLDEN / "config.json").read_text())


def close(actual, expected):
    torch.testing.assert_close(actual, expected, atol=1e-4, rtol=0)


@cache
def load_golden(kind):
    io = load_file(GOLDEN / f"gpt_{kind}_io.safetensors")
    path = unpacked(GOLDEN / f"gpt_{kind}.safetensors")
    model = LlamaGenTransformer.from_original(path, num_heads=CONFIG[kind]["n_head"], grid_size=(4, 4))
    condition = io["class_ids"] if kind == "c2i" else (io["caption_features"], io["caption_mask"])
    return model, io, condition


@pytest.fixture(params=["c2i", "t2i"])
def golden(request):
    return load_golden(request.param)


def cached_logits(model, condition, tokens, guidance_scale):
    session, out = model.open(model.prepare(condition, guidance_scale=guidance_scale))
    logits = [out.logits]
    for t in range(tokens.shape[1] - 1):
        logits.append(model.step(session, tokens[:, t : t + 1]).logits)
        model.commit(session, 1)
    return torch.cat(logits, dim=2)


def greedy(model, condition, guidance_scale, interval=None):
    session, out = model.open(model.prepare(condition, guidance_scale=guidance_scale))
    tokens, step = [], -1
    while True:
        logits = out.logits
        if interval is not None and step > interval:  # the first token (step -1) is always guided
            logits = logits[:1]
        tokens.append(warp_logits(logits, guidance_scale=guidance_scale).argmax(-1))
        step += 1
        if len(tokens) == model.num_codes:
            return torch.cat(tokens, dim=1)
        out = model.step(session, tokens[-1])
        model.commit(session, 1)


def test_training_logits_and_loss(golden):
    model, io, condition = golden
    with torch.no_grad():
        logits = model(io["tokens"], condition)
    close(logits, io["train.logits"])
    loss = torch.nn.functional.cross_entropy(logits.flatten(0, 1), io["tokens"].flatten())
    close(loss[None], io["train.loss"])


def test_null_condition_is_the_last_row_of_the_table():
    model, io, condition = load_golden("c2i")
    with torch.no_grad():
        dropped = model(io["tokens"], condition, drop=torch.tensor([True, True]))
        labelled = model(io["tokens"], torch.full_like(condition, CONFIG["c2i"]["num_classes"]))
    close(dropped, io["train.logits_null"])
    close(labelled, io["train.logits_null"])


def test_cached_logits_without_guidance(golden):
    model, io, condition = golden
    close(cached_logits(model, condition, io["tokens"], 1.0)[0], io["cached.logits_cfg1"])


def test_cached_logits_of_both_branches_and_guided(golden):
    model, io, condition = golden
    logits = cached_logits(model, condition, io["tokens"], 2.5)
    close(logits[0], io["cached.cond_logits"])
    close(logits[1], io["cached.uncond_logits"])
    close(warp_logits(logits, guidance_scale=2.5), io["cached.logits_cfg2.5"])


def test_greedy_tokens(golden):
    model, io, condition = golden
    assert torch.equal(greedy(model, condition, 1.0), io["greedy.tokens_cfg1"])
    assert torch.equal(greedy(model, condition, 2.5), io["greedy.tokens_cfg2.5"])


def test_greedy_tokens_with_a_guidance_interval():
    model, io, condition = load_golden("c2i")
    tokens = greedy(model, condition, 2.5, interval=CONFIG["cfg_interval"])
    assert torch.equal(tokens, io["greedy.tokens_cfg2.5_interval3"])
    assert not torch.equal(tokens, io["greedy.tokens_cfg2.5"])  # the recorded case must tell the two apart
    settings = {"temperature": 0.0, "guidance_scale": 2.5, "guidance_interval": CONFIG["cfg_interval"]}
    for sampler in (NextTokenSampler(**settings), SpeculativeJacobiSampler(window=5, **settings)):
        assert torch.equal(sampler.sample(model, condition, seeds=range(len(condition))).codes, tokens)


def test_caption_embeddings_and_mask():
    model, io, condition = load_golden("t2i")
    checked = model.cls_embedding.check(condition)
    with torch.no_grad():
        close(model.cls_embedding(checked), io["caption_embeddings"])
    length = io["train.attn_mask"].shape[-1]
    causal = torch.ones(length, length, dtype=torch.bool).tril()
    assert torch.equal(padding_mask(checked[1], length, causal)[:, 0], io["train.attn_mask"].bool())


def test_causal_mask():
    """The official mask covers condition and codes, and its padding to a multiple of 8."""
    model, io, condition = load_golden("c2i")
    expected = io["cached.causal_mask"][0].bool()
    session, _ = model.open(model.prepare(condition), max_window=16, static=True)
    plan = session.plan(16, None)
    length = 1 + 16
    seen = plan.mask[0, 0]  # queries are slots 1..16
    assert torch.equal(seen[:, :length], expected[1:length, :length])
    assert not seen[:, length:].any()


def test_rotary_table():
    model, io, _ = load_golden("c2i")
    close(model.rope_table()[:-1], io["rope.freqs_cis"])
    assert (model.rope_table()[0] == 0).all()


@pytest.mark.parametrize(("temperature", "top_k", "top_p"), CONFIG["samplers"])
def test_sampling_law(temperature, top_k, top_p):
    io = load_file(GOLDEN / "gpt_c2i_io.safetensors")
    logits = io["sample.logits"][None, :, None]
    warped = warp_logits(logits, temperature=temperature, top_k=top_k, top_p=top_p)
    name = f"sample.probs_t{temperature:g}_k{top_k}_p{top_p:g}"
    close(warped.softmax(-1)[:, 0], io[name])


def test_zero_and_identity_condition_rows_differ():
    io = load_file(GOLDEN / "gpt_c2i_io.safetensors")
    path = unpacked(GOLDEN / "gpt_c2i.safetensors")
    model = LlamaGenTransformer.from_original(path, num_heads=4, grid_size=(4, 4), condition_rope="identity")
    with torch.no_grad():
        logits = model(io["tokens"], io["class_ids"])
    assert (logits - io["train.logits"]).abs().max() > 1.0
    assert torch.equal(model.rope_table()[0], torch.tensor([1.0, 0.0]).expand(6, 2))
    windowed = cached_logits(model, io["class_ids"], io["tokens"], 1.0)[0]
    close(windowed, logits)


@pytest.mark.parametrize("condition_type", ["class", "caption"])
@pytest.mark.parametrize("size", PUBLISHED)
def test_manifest_of_every_published_size(size, condition_type):
    with torch.device("meta"):
        model = LlamaGenTransformer.from_size(size, condition_type=condition_type)
        manifest = {k: torch.empty(shape) for k, shape in official_shapes(size, condition_type).items()}
    assert {k: tuple(v.shape) for k, v in model.state_dict().items()} == official_shapes(size, condition_type)
    parameters = sum(p.numel() for p in model.parameters())
    assert parameters == PUBLISHED[size][4 if condition_type == "class" else 5]
    assert model.layers[0].attention.num_heads == PUBLISHED[size][1]
    # and the size is recognised from such a file
    again = LlamaGenTransformer.from_original(manifest, grid_size=(24, 24))
    inferred = {k: again.config[k] for k in ("num_layers", "num_heads", "dim", "condition_type")}
    assert inferred == {k: model.config[k] for k in inferred}
    assert again.num_codes == 576


def test_sizes_are_the_published_ones():
    assert SIZES == {name: (layers, heads, dim) for name, (layers, heads, dim, *_) in PUBLISHED.items()}
    with pytest.raises(ValueError, match="XXXL"):
        LlamaGenTransformer.from_size("XS")


def small(condition_type="class", **overrides):
    torch.manual_seed(0)
    config = {"dim": 32, "num_layers": 2, "num_heads": 4, "num_kv_heads": 2, "codebook_size": 19, "grid_size": (3, 5)}
    config |= {"multiple_of": 8, "num_classes": 5, "caption_dim": 7, "num_attributes": 9, "num_condition_tokens": 6}
    model = LlamaGenTransformer(**{**config, "condition_type": condition_type, **overrides})
    torch.nn.init.normal_(model.output.weight, std=0.1)
    return model


def small_condition(condition_type, batch=4):
    if condition_type == "class":
        return torch.arange(batch) % 5
    if condition_type == "attributes":
        return torch.arange(batch * 6).view(batch, 6) % 9
    mask = torch.arange(6) >= torch.tensor([1, 3, 0, 5])[:batch, None]
    return torch.randn(batch, 6, 7, generator=torch.Generator().manual_seed(1)), mask


CONDITIONS = ["class", "caption", "attributes"]
CODES = torch.arange(4 * 15).view(4, 15) % 19


@pytest.mark.parametrize("condition_type", CONDITIONS)
def test_save_and_load(condition_type, tmp_path):
    model = small(condition_type).eval()
    model.save_pretrained(tmp_path)
    again = LlamaGenTransformer.from_pretrained(tmp_path)
    condition = small_condition(condition_type)
    with torch.no_grad():
        assert torch.equal(again(CODES, condition), model(CODES, condition))
    assert again.grid_size == (3, 5)
    assert not again.training
    assert isinstance(again, Backbone)


@pytest.mark.parametrize("condition_type", CONDITIONS)
def test_original_layout_round_trip(condition_type):
    model = small(condition_type).eval()
    state_dict = {f"module.{k}": v for k, v in model.state_dict().items()}
    state_dict["module.freqs_cis"] = torch.zeros(3)
    state_dict["module.layers.0.attention.kv_cache.k_cache"] = torch.zeros(3)
    again = LlamaGenTransformer.from_original({"model": state_dict, "steps": 3}, num_heads=4, grid_size=(3, 5))
    condition = small_condition(condition_type)
    with torch.no_grad():
        assert torch.equal(again(CODES, condition), model(CODES, condition))
    inferred = ("dim", "num_layers", "num_heads", "num_kv_heads", "codebook_size", "condition_type")
    assert [again.config[k] for k in inferred] == [model.config[k] for k in inferred]


def test_loading_names_what_shapes_cannot_tell_and_what_is_wrong():
    state_dict = small().state_dict()
    with pytest.raises(ValueError, match="num_heads"):
        LlamaGenTransformer.from_original(state_dict, grid_size=(3, 5))
    with pytest.raises(ValueError, match="grid_size"):
        LlamaGenTransformer.from_original(state_dict, num_heads=4)
    truncated = {k: v for k, v in state_dict.items() if k != "layers.1.ffn_norm.weight"}
    with pytest.raises(ValueError, match=r"layers\.1\.ffn_norm\.weight"):
        LlamaGenTransformer.from_original(truncated, num_heads=4, grid_size=(3, 5))
    nar = {**state_dict, "medusa_output.weight": state_dict["output.weight"]}
    with pytest.raises(ValueError, match="NAR"):
        LlamaGenTransformer.from_original(nar, num_heads=4, grid_size=(3, 5))
    with pytest.raises(ValueError, match=r"tok_embeddings\.weight"):
        LlamaGenTransformer.from_original({"x": torch.zeros(1)}, num_heads=4, grid_size=(3, 5))


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("condition_type", CONDITIONS)
def test_half_precision_is_finite_and_near(condition_type, dtype):
    model = small(condition_type).eval()
    condition = small_condition(condition_type)
    with torch.no_grad():
        expected = model(CODES, condition)
        half = model.to(dtype)
        logits = half(CODES, condition)
    assert logits.dtype == torch.float32
    torch.testing.assert_close(logits, expected, atol=0.05, rtol=0)
    assert half.rope_table().dtype == torch.float32
    session, out = half.open(half.prepare(condition, guidance_scale=3.0), max_window=4)
    out = half.step(session, CODES[:, :4])
    assert out.logits.dtype == torch.float32
    assert session.cache.keys[0].dtype == dtype
    torch.testing.assert_close(out.logits[0], expected[:, 1:5], atol=0.05, rtol=0)


@pytest.mark.parametrize("condition_type", CONDITIONS)
def test_training_draws_condition_dropout_from_the_generator(condition_type):
    model = small(condition_type, token_dropout_p=0.0, resid_dropout_p=0.0, ffn_dropout_p=0.0, class_dropout_prob=0.5)
    model.train()
    condition = small_condition(condition_type)
    first, second, other = (
        model(CODES, condition, generator=torch.Generator().manual_seed(seed)) for seed in (7, 7, 1)
    )
    assert torch.equal(first, second)
    assert not torch.equal(first, other)
    dropped = torch.rand(4, generator=torch.Generator().manual_seed(7)) < 0.5
    assert dropped.any()
    assert not dropped.all()
    assert torch.equal(first, model(CODES, condition, drop=dropped))
    assert torch.equal(model.eval()(CODES, condition), model(CODES, condition, drop=torch.zeros(4, dtype=torch.bool)))


def test_attribute_dropout_has_a_rate_for_each_sample():
    model = small("attributes", num_condition_tokens=200, num_attributes=3)
    drawn = model.cls_embedding.draw_slots(4000, 0.3, torch.Generator().manual_seed(0))
    rates = drawn.float().mean(1)
    assert abs(float(rates.mean()) - 0.3) < 0.01
    assert abs(float(rates.var()) ** 0.5 - 0.6 / 12**0.5) < 0.01  # uniform in [0, 0.6]
    assert float(model.cls_embedding.draw_slots(4000, 0.8, torch.Generator().manual_seed(0)).float().mean()) < 0.72


def test_dropped_attribute_slots_are_unspecified():
    model = small("attributes").eval()
    condition = small_condition("attributes")
    drop = torch.zeros(4, 6, dtype=torch.bool)
    drop[0, 2] = drop[3, 5] = True
    without = condition.clone()
    without[0, 2] = without[3, 5] = 0
    with torch.no_grad():
        assert torch.equal(model(CODES, condition, drop=drop), model(CODES, without))
        null = model(CODES, condition, drop=torch.ones(4, dtype=torch.bool))
        assert torch.equal(null, model(CODES, torch.zeros_like(condition)))


def test_logits_depend_on_earlier_codes_only():
    model = small().eval()
    changed = CODES.clone()
    changed[:, 7] = (changed[:, 7] + 1) % 19
    with torch.no_grad():
        difference = (model(CODES, small_condition("class")) - model(changed, small_condition("class"))).abs().amax(-1)
    assert (difference[:, :8] == 0).all()
    assert (difference[:, 8:] > 0).all()


def test_gradient_checkpointing_changes_nothing():
    model = small(token_dropout_p=0.0, resid_dropout_p=0.3).train()

    def gradient():
        model.zero_grad()
        torch.manual_seed(3)
        model(CODES, small_condition("class"), drop=torch.zeros(4, dtype=torch.bool)).square().mean().backward()
        return model.layers[0].attention.wqkv.weight.grad.clone()

    plain = gradient()
    model.enable_gradient_checkpointing()
    assert torch.equal(gradient(), plain)


def test_training_follows_a_preview_in_inference_mode():
    model = small().eval()
    with torch.inference_mode():
        session, _ = model.open(model.prepare(torch.tensor([1])))
        model.step(session, CODES[:1, :1])
    model.train()(CODES, small_condition("class")).mean().backward()
    assert model.layers[0].attention.wqkv.weight.grad is not None


def test_training_forward_is_one_graph():
    torch._dynamo.reset()
    model = small(token_dropout_p=0.0, resid_dropout_p=0.0, ffn_dropout_p=0.0)
    condition, drop = small_condition("class"), torch.tensor([True, False, False, True])
    compiled = torch.compile(model, backend="eager", fullgraph=True)
    assert torch.equal(compiled(CODES, condition, drop=drop), model(CODES, condition, drop=drop))


def test_models_trained_without_a_null_label_are_recognised():
    state_dict = small(class_dropout_prob=0.0).state_dict()
    model = LlamaGenTransformer.from_original(state_dict, num_heads=4, grid_size=(3, 5), num_classes=5)
    assert model.config.class_dropout_prob == 0.0


def test_negative_condition_takes_the_second_branch():
    model = small().eval()
    condition, negative = small_condition("class"), torch.tensor([3, 3, 4, 4])
    prepared = model.prepare(condition, guidance_scale=2.0, negative=negative)
    _, out = model.open(prepared)
    with torch.no_grad():
        torch.testing.assert_close(out.logits[1, :, 0], model(CODES, negative)[:, 0], atol=1e-5, rtol=0)
    assert prepared.lengths.tolist() == [1] * 8
    with pytest.raises(ValueError, match="as many rows"):
        model.prepare(condition, guidance_scale=2.0, negative=negative[:2])
    with pytest.raises(ValueError, match="without guidance"):
        model.prepare(condition, negative=negative)


@pytest.mark.parametrize(
    ("condition_type", "condition", "message"),
    [
        ("class", torch.tensor([0, 6]), r"0\.\.4 .5 = no class., got 6"),
        ("class", torch.tensor([-1, 2]), r"0\.\.4 .*got -1"),
        ("class", torch.tensor([0.5]), "integers"),
        ("class", torch.tensor([[1]]), "dimension"),
        ("attributes", torch.zeros(2, 5, dtype=torch.int64), r"\[batch, 6\]"),
        ("attributes", torch.full((2, 6), 9), r"0\.\.8, got 9"),
        ("caption", torch.zeros(2, 6, 7), "features, mask"),
        ("caption", (torch.zeros(2, 6, 8), torch.ones(2, 6)), r"\('batch', 6, 7\)"),
        ("caption", (torch.zeros(2, 6, 7), torch.ones(2, 5)), r"\(2, 6\)"),
    ],
)
def test_bad_conditions_are_refused(condition_type, condition, message):
    with pytest.raises(ValueError, match=message):
        small(condition_type).prepare(condition)


@pytest.mark.parametrize(
    "config", [{"num_heads": 5}, {"num_kv_heads": 3}, {"dim": 24}, {"condition_type": "text"}, {"condition_rope": "x"}]
)
def test_bad_configurations_are_refused(config):
    with pytest.raises(ValueError, match=r"num_heads|condition_type|condition_rope"):
        small(**config)


def test_guidance_needs_a_trained_null_label():
    model = small(class_dropout_prob=0.0)
    model.prepare(torch.tensor([4]))
    with pytest.raises(ValueError, match="no null label"):
        model.prepare(torch.tensor([4]), guidance_scale=2.0)


def test_layout_is_the_raster_of_the_grid():
    model = small()
    layout = model.layout()
    assert (layout.length, layout.run_length, layout.grids) == (15, 14, ((3, 5),))
    assert layout.slot_grid[7].tolist() == [0, 1, 2]
    assert (layout.forced == -1).all()
    assert model.layout(3, 5).length == 15
    with pytest.raises(ValueError, match=r"\(3, 5\)"):
        model.layout(4, 4)

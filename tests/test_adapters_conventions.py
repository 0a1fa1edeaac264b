"""What people do to their models keeps working: offloading, quantised and LoRA layers, compilation, other attention."""

from __future__ import annotations

import pytest
import torch
from transformers import AttentionInterface
from transformers.cache_utils import CacheLayerMixin

from tests.adapter_cases import BUILDERS, HF, case, load
from tests.golden_files import unpacked
from vargen import ImagePipeline, wrap
from vargen.adapters.base import compile_body
from vargen.adapters.tiny import tiny_janus
from vargen.adapters.wrap import check_version
from vargen.samplers.window.jacobi import SpeculativeJacobiSampler
from vargen.samplers.window.next_token import NextTokenSampler

PROMPTS = ["a red fox", "the golden castle on a mountain"]
CLASSES = {
    "janus": "JanusForConditionalGeneration",
    "emu3": "Emu3ForConditionalGeneration",
    "chameleon": "ChameleonForConditionalGeneration",
    "glm_image": "GlmImageForConditionalGeneration",
}
OPTIONS = {
    "janus": {},
    "emu3": {"grid_size": (4, 4)},
    "chameleon": {
        "layout": "fixed",
        "grid_size": (4, 4),
        "vq_decoder": unpacked(HF / "chameleon" / "vq_decoder.safetensors"),
    },
    "glm_image": {"grid_size": (4, 3), "preview_size": (2, 2)},
}

pytestmark = pytest.mark.filterwarnings("ignore::UserWarning")


@pytest.fixture
def tiny():
    return tiny_janus()


def drawn(backbone, name: str, window: int = 4):
    c = case(name)
    scale = 1.0 if name == "glm_image" else 2.0
    sampler = SpeculativeJacobiSampler(window=window, guidance_scale=scale, temperature=0.7)
    return sampler.sample(backbone, c.prompts, seeds=[0, 1]).codes


# --- where the weights are ----------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", list(CLASSES))
def test_offloaded_weights_give_the_same_codes_and_pixels(name: str, tmp_path) -> None:
    """device_map with a layer of the body on disk: modules are called, never their weights."""
    c = case(name)
    names = {module: path for path, module in c.backbone.model.named_modules()}
    body = names[c.backbone.body]
    places = {"lm_head": "cpu"} | {f"{body}.{part}": "cpu" for part, _ in c.backbone.body.named_children()}
    del places[f"{body}.layers"]
    places |= {f"{body}.layers.0": "cpu", f"{body}.layers.1": "disk"}
    if body != "model":
        others = [path for path, _ in c.backbone.model.model.named_children()]
        places |= {f"model.{path}": "cpu" for path in others if f"model.{path}" != body}
    model = load(name, CLASSES[name], device_map=places, offload_folder=str(tmp_path))
    assert any(weight.device.type == "meta" for weight in model.parameters())
    backbone = wrap(model, **OPTIONS[name])
    codes = drawn(backbone, name)
    assert torch.equal(codes, drawn(c.backbone, name))
    if c.pixels is not None:
        h, w = backbone.grid_size
        grid = codes.unflatten(1, (h, w))
        assert torch.equal(backbone.pixels().decode(grid), c.backbone.pixels().decode(grid))


# --- layers that are no plain linear layers -----------------------------------------------------------------------


class Int8Linear(torch.nn.Module):
    """A quantised layer as libraries make them: codes and scales, and nothing called ``weight``."""

    def __init__(self, base: torch.nn.Linear) -> None:
        super().__init__()
        self.scale = base.weight.detach().abs().amax(1, keepdim=True) / 127
        self.stored = (base.weight.detach() / self.scale).round().to(torch.int8)
        self.bias = base.bias

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return torch.nn.functional.linear(x, self.stored.to(x.dtype) * self.scale.to(x.dtype), self.bias)


def quantise(module: torch.nn.Module, replace) -> None:
    for name, child in module.named_children():
        if isinstance(child, torch.nn.Linear):
            setattr(module, name, replace(child))
        else:
            quantise(child, replace)


def dequantised(base: torch.nn.Linear) -> torch.nn.Linear:
    rounded = Int8Linear(base)
    base.weight.data = rounded.stored.float() * rounded.scale
    return base


@pytest.mark.parametrize("name", list(CLASSES))
def test_quantised_bodies_and_heads_are_called(name: str) -> None:
    """8-bit layers everywhere, head included: the codes of the same rounded weights in plain layers."""
    quantised, plain = (load(name, CLASSES[name]) for _ in range(2))
    for model, replace in ((quantised, Int8Linear), (plain, dequantised)):
        parts = [wrap(model, **OPTIONS[name]).body, wrap(model, **OPTIONS[name]).head]
        quantise(parts[0], replace)
        if isinstance(parts[1], torch.nn.Linear):
            model.lm_head = replace(model.lm_head)
        else:
            quantise(parts[1], replace)
    assert torch.equal(drawn(wrap(quantised, **OPTIONS[name]), name), drawn(wrap(plain, **OPTIONS[name]), name))


def test_lora_layers_inside_the_body_are_used() -> None:
    """What PEFT does: a linear layer of the body is replaced by a wrapper, and the model has ``get_base_model``."""
    model, processor = tiny_janus()
    before = NextTokenSampler(temperature=0.0).sample(wrap(model, processor), PROMPTS, seeds=[0, 1]).codes

    class Lora(torch.nn.Module):
        def __init__(self, base):
            super().__init__()
            self.base, self.extra = base, torch.nn.Linear(base.in_features, base.out_features, bias=False)

        def forward(self, x):
            return self.base(x) + self.extra(x)

    class Peft:
        def get_base_model(self):
            return model

    torch.manual_seed(0)
    layer = model.model.language_model.layers[0].self_attn
    layer.v_proj = Lora(layer.v_proj)
    after = NextTokenSampler(temperature=0.0).sample(wrap(Peft(), processor), PROMPTS, seeds=[0, 1]).codes
    assert not torch.equal(before, after)


def test_a_head_that_is_no_plain_linear_layer_is_called() -> None:
    """Quantised heads have no rows to slice: the full head runs, with the same logits."""
    backbone = wrap(load("emu3", "Emu3ForConditionalGeneration"), grid_size=(4, 4))
    hidden = torch.randn(2, 3, 32)
    expected = backbone._code_logits(hidden)

    class Quantised(torch.nn.Module):
        def __init__(self, base):
            super().__init__()
            self.base, self.calls = base, 0

        def forward(self, x):
            self.calls += 1
            return self.base(x)

    backbone.model.lm_head = Quantised(backbone.model.lm_head)
    torch.testing.assert_close(backbone._code_logits(hidden), expected, atol=1e-6, rtol=0)
    assert backbone.model.lm_head.calls == 1


# --- compilation --------------------------------------------------------------------------------------------------


def test_compiled_models_are_unwrapped(tiny) -> None:
    model, processor = tiny
    assert wrap(torch.compile(model), processor).model is model


def test_static_sessions_give_the_same_codes() -> None:
    static = wrap(case("emu3").backbone.model, grid_size=(4, 4), static=True)
    assert torch.equal(drawn(static, "emu3"), drawn(case("emu3").backbone, "emu3"))


@pytest.mark.parametrize("name", ["janus", "glm_image"])
def test_compiled_windows_are_one_graph_whatever_is_accepted(name: str) -> None:
    """Full graph, captured once: ragged acceptance changes no shape and no guard."""
    torch._dynamo.reset()
    c = case(name)
    graphs = []

    def backend(graph, _):
        graphs.append(graph)
        return graph.forward

    backbone = wrap(c.backbone.model, compile={"backend": backend, "fullgraph": True}, **OPTIONS[name])
    assert backbone.static
    prepared = backbone.prepare(c.prompts)
    session, _ = backbone.open(prepared, max_window=3)
    reference, _ = c.backbone.open(prepared, max_window=3)
    codes = c.forced
    at = torch.tensor([0, 0])
    for accepted in ([3, 1], [1, 2], [0, 3], [2, 2]):
        window = codes.gather(1, at[:, None] + torch.arange(3))
        found = backbone.step(session, window).logits
        torch.testing.assert_close(found, c.backbone.step(reference, window).logits, atol=1e-5, rtol=0)
        n = torch.tensor(accepted)
        backbone.commit(session, n)
        c.backbone.commit(reference, n)
        at += n
    assert len(graphs) == 1
    assert "forward" not in vars(backbone.body)  # the model itself is not compiled
    torch._dynamo.reset()


def test_windows_compiled_through_autograd_are_the_same() -> None:
    torch._dynamo.reset()
    c = case("emu3")
    compiled = wrap(c.backbone.model, compile={"backend": "aot_eager"}, grid_size=(4, 4))
    prepared = c.backbone.prepare(c.prompts)
    session, _ = compiled.open(prepared, max_window=3)
    reference, _ = c.backbone.open(prepared, max_window=3)
    found = compiled.step(session, c.forced[:, :3]).logits
    torch.testing.assert_close(found, c.backbone.step(reference, c.forced[:, :3]).logits, atol=1e-5, rtol=0)
    torch._dynamo.reset()


def test_offloaded_and_uncompilable_models_are_not_compiled(tiny) -> None:
    backbone = wrap(*tiny)
    assert compile_body(backbone, True) is not None
    backbone.model.hf_device_map = {"model.language_model": 0, "model.vqmodel": "cpu"}
    assert compile_body(backbone, True) is None
    backbone.model.hf_device_map = {"": "cpu"}  # everything there is no offloading
    assert compile_body(backbone, True) is not None

    class Quantizer:
        is_compileable = False

    backbone.model.hf_quantizer = Quantizer()
    assert compile_body(backbone, True) is None
    assert not wrap(*tiny, compile=True).static


# --- attention ----------------------------------------------------------------------------------------------------


def test_attention_without_masks_is_used_where_rows_agree() -> None:
    """A flash-like implementation that is given no mask: for one image it runs, bottom-right causal by itself."""
    seen = []

    def flash_like(module, query, key, value, attention_mask, scaling=None, **kwargs):
        assert attention_mask is None
        seen.append(query.shape[2])
        groups = query.shape[1] // key.shape[1]
        key, value = key.repeat_interleave(groups, 1), value.repeat_interleave(groups, 1)
        n, m = query.shape[2], key.shape[2]
        hidden = torch.ones(n, m, dtype=torch.bool).triu(m - n + 1)
        scores = (query @ key.transpose(2, 3) * scaling).masked_fill(hidden, -torch.inf)
        return (scores.softmax(-1) @ value).transpose(1, 2), None

    AttentionInterface.register("vargen_test_flash", flash_like)
    c = case("janus")
    one = {key: value[1:] for key, value in c.prompts.items()}
    sampler = SpeculativeJacobiSampler(window=4, guidance_scale=2.0, temperature=0.7)
    model = load("janus", CLASSES["janus"])
    model.model.language_model.config._attn_implementation = "vargen_test_flash"
    out = sampler.sample(wrap(model), one, seeds=[0])
    assert torch.equal(out.codes, sampler.sample(c.backbone, one, seeds=[0]).codes)
    assert 4 in seen
    assert model.model.language_model.config._attn_implementation == "vargen_test_flash"


def test_another_attention_is_kept_and_restored(tiny) -> None:
    """An implementation that takes no 4-D mask: masked forwards run under sdpa, the choice stands afterwards."""
    model, processor = tiny_janus()
    sampler = NextTokenSampler(temperature=0.0, guidance_scale=3.0)
    expected = sampler.sample(wrap(model, processor), PROMPTS, seeds=[0, 1]).codes
    config = model.model.language_model.config
    config._attn_implementation = "flex_attention"
    seen = []
    hook = model.model.language_model.register_forward_pre_hook(lambda *_: seen.append(config._attn_implementation))
    out = sampler.sample(wrap(model, processor), PROMPTS, seeds=[0, 1])
    hook.remove()
    assert torch.equal(out.codes, expected)
    assert set(seen) == {"sdpa"}
    assert config._attn_implementation == "flex_attention"


# --- precision, settings, prompts ---------------------------------------------------------------------------------


def test_bfloat16_pipeline_draws_pictures(tiny) -> None:
    model, processor = tiny
    pipe = ImagePipeline.from_transformers(model.to(torch.bfloat16), processor)
    pipe.set_progress_bar_config(disable=True)
    out = pipe(PROMPTS, seed=0, output_type="pt")
    assert out.images.shape == (2, 3, 16, 16)
    assert out.images.dtype == torch.float32
    assert bool(out.images.isfinite().all())


def test_stored_settings_are_read_and_logged(tiny, caplog: pytest.LogCaptureFixture) -> None:
    model, processor = tiny
    model.generation_config.update(top_k=7, temperature=0.8, top_p=0.9)
    with caplog.at_level("INFO", logger="vargen.adapters.family"):
        pipe = ImagePipeline.from_transformers(model, processor)
    assert (pipe.sampler.top_k, pipe.sampler.temperature, pipe.sampler.top_p) == (7, 0.8, 0.9)
    assert "'top_k': 7" in caplog.text


@pytest.mark.parametrize("name", list(BUILDERS))
def test_images_of_one_prompt_share_its_prefill(name: str) -> None:
    c = case(name)
    batches = []
    hook = c.backbone.body.register_forward_pre_hook(
        lambda module, args, kwargs: batches.append(len(kwargs["inputs_embeds"])), with_kwargs=True
    )
    rows = [0, 0, 1, 0]
    prompts = {key: value[rows] for key, value in c.prompts.items()}
    guided = name != "glm_image"
    negative = None if c.negative is None else {key: value[:1] for key, value in c.negative.items()}
    prepared = c.backbone.prepare(prompts, guidance_scale=2.0 if guided else 1.0, negative=negative)
    session, out = c.backbone.open(prepared)
    c.backbone.step(session, out.logits[0].argmax(-1))
    hook.remove()
    # Janus' unconditional row keeps the length of its prompt; everywhere else one row serves all images
    assert batches == [2 + guided * (1 + (name == "janus")), 4 * (1 + guided)]
    alone, single = c.backbone.open(prepared_row(c, 2, guided, negative))
    torch.testing.assert_close(out.logits[:, 2:3], single.logits, atol=1e-5, rtol=0)
    assert alone.cache.num_rows == 1 + guided


def prepared_row(c, row: int, guided: bool, negative):
    prompts = {key: value[[0, 0, 1, 0]][row : row + 1] for key, value in c.prompts.items()}
    return c.backbone.prepare(prompts, guidance_scale=2.0 if guided else 1.0, negative=negative)


def test_progress_is_reported_for_every_forward() -> None:
    c, seen = case("emu3"), []
    sampler = SpeculativeJacobiSampler(window=4, guidance_scale=1.0)
    out = sampler.sample(
        c.backbone, c.prompts, seeds=[0, 1], callback=lambda i, s: seen.append(s.num_committed.tolist())
    )
    assert len(seen) == out.stats.num_forwards
    assert seen[0] == [1, 1]
    assert seen[-1] == [16, 16]


def test_old_cache_interfaces_are_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    check_version.cache_clear()
    monkeypatch.setattr(CacheLayerMixin, "get_mask_sizes", lambda self, cache_position: (0, 0))
    with pytest.raises(ValueError, match=r"need transformers 5.10 or newer"):
        check_version()
    monkeypatch.undo()
    monkeypatch.setattr("transformers.masking_utils.create_causal_mask", lambda **_: None)
    with pytest.raises(ValueError, match="changes given 4-D masks"):
        check_version()

"""Meta's layout of Chameleon and Lumina-mGPT's, against an independent forward of the original weights."""

from __future__ import annotations

import json

import pytest
import torch
import torch.nn.functional as F
from safetensors.torch import save_file

from tests.adapter_cases import HF, load
from tests.golden_files import load_file
from vargen.adapters.families.chameleon_checkpoints import load_lumina, load_meta_chameleon
from vargen.checkpoints.reader import CheckpointError

D, H, KV, HEAD, HIDDEN, V = 32, 4, 2, 8, 64, 76
CONFIG = json.loads((HF / "chameleon" / "config.json").read_text())
VQ = {
    key.removeprefix("model.vqmodel."): value
    for key, value in load("chameleon", "ChameleonForConditionalGeneration").state_dict().items()
    if "vqmodel" in key
}
DECODER = load_file(HF / "chameleon" / "vq_decoder.safetensors")


def meta_weights() -> dict[str, torch.Tensor]:
    generator = torch.Generator().manual_seed(0)

    def draw(*shape: int) -> torch.Tensor:
        return torch.randn(shape, generator=generator) * (1 / shape[-1] ** 0.5 if len(shape) > 1 else 0.3)

    state = {"tok_embeddings.weight": draw(V, D) * D**0.5, "norm.weight": 1 + draw(D), "output.weight": draw(V, D)}
    for i in range(2):
        shapes = {"wq": (H * HEAD, D), "wk": (KV * HEAD, D), "wv": (KV * HEAD, D), "wo": (D, H * HEAD)}
        state |= {f"layers.{i}.attention.{name}.weight": draw(*shape) for name, shape in shapes.items()}
        for name in ("q", "k"):
            state[f"layers.{i}.attention.{name}_normalization.weight"] = 1 + draw(HEAD)
            state[f"layers.{i}.attention.{name}_normalization.bias"] = draw(HEAD)
        shapes = {"w1": (HIDDEN, D), "w3": (HIDDEN, D), "w2": (D, HIDDEN)}
        state |= {f"layers.{i}.feed_forward.{name}.weight": draw(*shape) for name, shape in shapes.items()}
        state |= {f"layers.{i}.{name}.weight": 1 + draw(D) for name in ("attention_norm", "ffn_norm")}
    return state


def meta_forward(w: dict[str, torch.Tensor], ids: torch.Tensor) -> torch.Tensor:
    """Meta's network as published: rotary pairs of neighbouring channels as complex numbers, norms over each head."""

    def rms(x: torch.Tensor, name: str) -> torch.Tensor:
        return x * (x.pow(2).mean(-1, keepdim=True) + 1e-5).rsqrt() * w[f"{name}.weight"]

    n = len(ids)
    angles = torch.outer(torch.arange(n).float(), 10000.0 ** (-torch.arange(0, HEAD, 2) / HEAD))
    turns = torch.polar(torch.ones_like(angles), angles)[:, None]  # n 1 d/2

    def heads(x: torch.Tensor, layer: str, kind: str) -> torch.Tensor:
        x = (x @ w[f"{layer}.w{kind}.weight"].T).unflatten(-1, (-1, HEAD))  # n h d
        if kind == "v":
            return x
        norm = f"{layer}.{kind}_normalization"
        x = F.layer_norm(x, (HEAD,), w[f"{norm}.weight"], w[f"{norm}.bias"], 1e-5)
        return torch.view_as_real(torch.view_as_complex(x.unflatten(-1, (-1, 2))) * turns).flatten(-2)

    x = w["tok_embeddings.weight"][ids]
    causal = torch.ones(n, n).tril().log()
    for i in range(2):
        layer = f"layers.{i}.attention"
        y = rms(x, f"layers.{i}.attention_norm")
        q = heads(y, layer, "q")
        k, v = (heads(y, layer, kind).repeat_interleave(H // KV, 1) for kind in "kv")
        weights = (torch.einsum("qhd,khd->hqk", q, k) / HEAD**0.5 + causal).softmax(-1)
        x = x + torch.einsum("hqk,khd->qhd", weights, v).flatten(1) @ w[f"{layer}.wo.weight"].T
        y, ffn = rms(x, f"layers.{i}.ffn_norm"), f"layers.{i}.feed_forward"
        gate = F.silu(y @ w[f"{ffn}.w1.weight"].T) * (y @ w[f"{ffn}.w3.weight"].T)
        x = x + gate @ w[f"{ffn}.w2.weight"].T
    return rms(x, "norm") @ w["output.weight"].T


def logits(model, ids: torch.Tensor) -> torch.Tensor:
    with torch.no_grad():
        return model.lm_head(model.model(input_ids=ids[None]).last_hidden_state)[0]


def load(weights, vqgan=None, **options):
    vocabulary = dict(CONFIG["vocabulary_map"])
    vocabulary["<reserved08707>"] = vocabulary.pop("<image>")  # as Meta's tokenizer names it
    settings = {"vq_config": CONFIG["vq_config"]}
    return load_meta_chameleon(
        weights, VQ | DECODER if vqgan is None else vqgan, vocabulary, config=settings, **options
    )


IDS = torch.randint(0, V, (11,), generator=torch.Generator().manual_seed(1))


def test_metas_weights_compute_what_metas_network_computes(tmp_path) -> None:
    weights = meta_weights()
    torch.save(weights | {"rope.freqs": torch.zeros(4)}, tmp_path / "consolidated.pth")
    torch.save({"state_dict": VQ | DECODER}, tmp_path / "vqgan.ckpt")
    model = load(tmp_path / "consolidated.pth", tmp_path / "vqgan.ckpt", device_map={"": "cpu"})
    torch.testing.assert_close(logits(model, IDS), meta_forward(weights, IDS), atol=1e-4, rtol=0)
    assert (model.config.num_attention_heads, model.config.num_key_value_heads) == (H, KV)
    assert model.config.image_token_id == CONFIG["image_token_id"]
    assert torch.equal(model.model.vqmodel.quantize.embedding.weight, VQ["quantize.embedding.weight"])
    swapped = weights | {key: value.roll(1, 0) for key, value in weights.items() if key.endswith("wq.weight")}
    assert float((logits(load(swapped), IDS) - meta_forward(weights, IDS)).abs().max()) > 1e-2  # the control


def test_lumina_norms_are_stored_once_a_rank(tmp_path) -> None:
    weights = meta_weights()
    model = load(weights)
    model.save_pretrained(tmp_path)
    stored = load_file(tmp_path / "model.safetensors")
    body = {key: value for key, value in stored.items() if "vqmodel" not in key}
    body = {
        key: value[:1].contiguous() if "_norm." in key and value.ndim == 2 else value for key, value in body.items()
    }
    save_file(body, tmp_path / "model.safetensors")
    config = json.loads((tmp_path / "config.json").read_text()) | {"mask_image_logits": True, "dropout": 0.05}
    (tmp_path / "config.json").write_text(json.dumps(config))
    loaded = load_lumina(tmp_path, VQ)
    assert torch.equal(logits(loaded, IDS), logits(model, IDS))
    with pytest.raises(CheckpointError, match="no image tokenizer"):
        load_lumina(tmp_path)
    with pytest.raises(ValueError, match=r"holds no config.json"):
        load_lumina(tmp_path / "nowhere")


def test_gaps_are_errors_not_random_numbers() -> None:
    weights = meta_weights()
    short = {key: value for key, value in weights.items() if key != "layers.1.ffn_norm.weight"}
    with pytest.raises(CheckpointError, match=r"model.layers.1.post_attention_layernorm.weight"):
        load(short)
    with pytest.raises(CheckpointError, match=r"has no layers.0.attention.wx.weight"):
        load(weights | {"layers.0.attention.wx.weight": torch.zeros(1)})
    with pytest.raises(CheckpointError, match="expected Meta's layout"):
        load({"model.embed_tokens.weight": torch.zeros(2, 2)})

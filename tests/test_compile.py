"""Training forwards and decode steps are one graph, traced once, whether compiled or exported."""

from __future__ import annotations

import copy

import numpy as np
import pytest
import torch
from einops import rearrange
from torch._dynamo.testing import CompileCounter

from tests.test_leaves import CAPTIONS, CASES, LABELS, WORDS
from vargen.tokenizers.multiscale_vq.quantizer import phi_index

GRID = torch.arange(32).view(2, 16)
CLIPS = torch.arange(48).view(2, 24) % 32
TOKENS, TIMES = torch.linspace(-1, 1, 32).view(2, 4, 4), torch.tensor([[0.1, 0.2, 0.3, 0.4]] * 2)
MASK = torch.tensor([[True, True, False, False], [False, True, False, True]])
IMAGES, FRAMES = torch.linspace(-1, 1, 384).view(2, 3, 8, 8), torch.linspace(-1, 1, 960).view(1, 3, 5, 8, 8)
DROP = torch.tensor([True, False])
CALLS: dict[str, tuple[tuple, dict]] = {
    "llamagen": ((GRID, LABELS), {"drop": DROP}),
    "llamagen-captions": ((GRID, CAPTIONS), {"drop": DROP}),
    "llamagen-words": ((GRID, WORDS), {"drop": DROP}),
    "any-order": ((GRID, LABELS), {"drop": DROP, "order": torch.arange(15, -1, -1)}),
    "masked": ((GRID, LABELS), {"drop": DROP}),
    "par": ((GRID, LABELS), {"drop": DROP}),
    "nar": ((GRID, LABELS), {"drop": DROP}),
    "nar-shared": ((GRID, LABELS), {"drop": DROP}),
    "nbp": ((CLIPS, LABELS), {"drop": DROP}),
    "nbp-shared": ((CLIPS, WORDS), {"drop": DROP}),
    "var": ((torch.randn(2, 4, 8), LABELS), {"drop": DROP}),
    "var-words": ((torch.randn(2, 4, 8), WORDS), {"drop": DROP}),
    "mar": ((TOKENS, LABELS, MASK), {"drop": DROP}),
    "mar-words": ((TOKENS, WORDS, MASK), {"drop": DROP, "num_masked": 2}),
    "mar-causal": ((TOKENS, LABELS), {"drop": DROP}),
    "vq": ((IMAGES,), {}),
    "vq-patches": ((IMAGES,), {}),
    "multiscale": ((IMAGES,), {}),
    "multiscale-own-phi": ((IMAGES,), {}),
    "frames": ((FRAMES,), {}),
}


HEAVY = ("vq", "multiscale", "frames")  # convolutions: many layers to trace
NAMES = [pytest.param(name, marks=pytest.mark.slow if name.startswith(HEAVY) else ()) for name in CALLS]


def parts_of(output) -> list[torch.Tensor]:
    return [leaf for leaf in torch.utils._pytree.tree_leaves(output) if isinstance(leaf, torch.Tensor)]


def model_of(name: str) -> torch.nn.Module:
    model = CASES[name].build()
    for module in model.modules():
        if isinstance(module, torch.nn.Dropout):
            module.p = 0.0
    return model.float()


@pytest.mark.parametrize("name", NAMES)
def test_a_training_forward_is_one_graph_traced_once(name: str) -> None:
    torch._dynamo.reset()
    args, kwargs = CALLS[name]
    model = model_of(name).train()
    other, counter = copy.deepcopy(model), CompileCounter()
    # einops notes at its first calls which kinds of tensors there are, which guards of compiled code then look at
    torch.compile(lambda x: rearrange(x, "a b -> b a"), backend="eager")(torch.zeros(2, 2))
    compiled = torch.compile(model, backend=counter, fullgraph=True)
    for _ in range(3):
        found, expected = parts_of(compiled(*args, **kwargs)), parts_of(other(*args, **kwargs))
        assert found
        torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-5)
    assert counter.frame_count == 1


@pytest.mark.parametrize("name", NAMES)
def test_a_forward_is_exported(name: str) -> None:
    args, kwargs = CALLS[name]
    model = model_of(name)
    exported = torch.export.export(model, args, kwargs).module()
    torch.testing.assert_close(
        parts_of(exported(*args, **kwargs)), parts_of(model(*args, **kwargs)), rtol=1e-4, atol=1e-5
    )
    again = parts_of(copy.deepcopy(model)(*args, **kwargs))  # nothing traced was left behind
    torch.testing.assert_close(again, parts_of(model(*args, **kwargs)))


def test_a_decode_step_of_fixed_shapes_is_one_graph_traced_once() -> None:
    torch._dynamo.reset()
    model = model_of("llamagen")
    counter = CompileCounter()
    step = torch.compile(lambda session, codes: model.step(session, codes).logits, backend=counter, fullgraph=True)
    condition = model.prepare(LABELS, guidance_scale=1.5)
    sessions = [model.open(condition, static=True)[0] for _ in range(2)]
    for column in range(4):
        codes = GRID[:, column : column + 1]
        torch.testing.assert_close(
            step(sessions[0], codes), model.step(sessions[1], codes).logits, rtol=1e-4, atol=1e-5
        )
        for session in sessions:
            model.commit(session, 1)
    assert counter.frame_count == 1


def test_kernels_of_scales_are_those_of_numpy() -> None:
    for num_scales in range(1, 41):
        for num_phi in range(1, 13):
            edge = 1 / 3 / num_phi if num_phi == 4 else 1 / 2 / num_phi
            ticks = np.linspace(edge, 1 - edge, num_phi)
            places = [k / (num_scales - 1) if num_scales > 1 else 0.0 for k in range(num_scales)]
            assert phi_index(num_scales, num_phi) == [int(np.argmin(np.abs(ticks - place))) for place in places]

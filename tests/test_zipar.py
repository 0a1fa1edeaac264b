"""ZipAR: the released schedule, entry for entry; degenerate windows; the adaptive rule."""

from __future__ import annotations

from types import SimpleNamespace

import pytest
import torch

from tests.adapter_cases import case
from tests.tiny import tiny_backbone
from vargen.protocols import Layout
from vargen.samplers.schedule.zipar import Grid, ZipARSampler
from vargen.samplers.window.next_token import NextTokenSampler

SETTINGS = {"guidance_scale": 2.0, "temperature": 0.8, "top_k": 20}


class Recorder:
    """Predicts code g for cell g, and writes down what it is fed."""

    features, device = frozenset({"any_slot"}), torch.device("cpu")

    def __init__(self, side: int) -> None:
        self.side, self.codebook_size, self.fed = side, side * side, []

    def layout(self) -> Layout:
        return Layout.raster((self.side, self.side))

    def prepare(self, condition, *, guidance_scale):
        return SimpleNamespace(batch=1)

    def open(self, prepared, *, max_window):
        return None, SimpleNamespace(logits=self.law(torch.tensor([[0]])))

    def law(self, cells):
        return torch.nn.functional.one_hot(cells, self.codebook_size).float()[None]

    def step_at(self, session, codes, slots):
        self.fed.append((slots[0].tolist(), codes[0].tolist()))
        return SimpleNamespace(logits=self.law((slots + 1).clamp(max=self.codebook_size - 1)))


@pytest.mark.parametrize(("side", "window"), [(8, 3), (16, 4), (24, 16)])
def test_schedule_is_the_released_one(golden, side: int, window: int) -> None:
    expected = golden("sjd/zipar", f"zipar.{side}x{side}.w{window}.")
    backbone = Recorder(side)
    out = ZipARSampler(window=window, temperature=0.0).sample(backbone, None, seeds=[0])
    assert torch.equal(out.codes[0], torch.arange(side * side))
    assert out.stats.num_forwards == side + (side - 2) * window + side
    fed = backbone.fed[side - 1 :]  # the reference begins when the first row is complete
    assert len(fed) == len(expected["fed_index"])
    for (slots, codes), index, token in zip(fed, expected["fed_index"], expected["fed_token"], strict=True):
        assert slots == [i for i in index.tolist() if i >= 0]
        assert [code + 1 for code in codes] == [t for t in token.tolist() if t >= 0]
    trace = out.stats.commit_trace[0] - side
    assert torch.equal(trace[side:], expected["first_step_of"][side:].long())


@pytest.mark.parametrize("name", ["janus", "emu3", "lumina", "glm_image"])
@pytest.mark.parametrize("adaptive", [False, True])
def test_a_window_as_wide_as_the_grid_is_next_token_sampling(name: str, adaptive: bool) -> None:
    c = case(name)
    settings = SETTINGS if c.scale != 1 else SETTINGS | {"guidance_scale": 1.0}
    expected = NextTokenSampler(**settings).sample(c.backbone, c.prompts, seeds=[0, 1])
    out = ZipARSampler(window=9, adaptive=adaptive, **settings).sample(c.backbone, c.prompts, seeds=[0, 1])
    assert torch.equal(out.codes, expected.codes)


def test_a_narrow_window_is_faster_and_not_next_token_sampling() -> None:
    """On our own transformer too; the control shows that the schedule matters to the law."""
    backbone = tiny_backbone()
    labels = torch.tensor([1, 2, 3])
    expected = NextTokenSampler(**SETTINGS).sample(backbone, labels, seeds=[0, 1, 2])
    wide = ZipARSampler(window=4, **SETTINGS).sample(backbone, labels, seeds=[0, 1, 2])
    assert torch.equal(wide.codes, expected.codes)
    narrow = ZipARSampler(window=1, **SETTINGS).sample(backbone, labels, seeds=[0, 1, 2])
    assert narrow.stats.num_forwards == 4 + 2 * 1 + 4 < expected.stats.num_forwards
    assert torch.equal(narrow.codes[:, :5], expected.codes[:, :5])  # until the first row is complete nothing differs
    assert not torch.equal(narrow.codes, expected.codes)
    assert narrow.stats.guarantee == "heuristic"


@pytest.mark.parametrize("adaptive", [False, True])
def test_images_do_not_depend_on_the_batch(adaptive: bool) -> None:
    c = case("emu3")
    sampler = ZipARSampler(window=2, adaptive=adaptive, **SETTINGS)
    both = sampler.sample(c.backbone, c.prompts, seeds=[5, 6])
    for b in range(2):
        prompts = {name: value[b : b + 1] for name, value in c.prompts.items()}
        alone = sampler.sample(c.backbone, prompts, seeds=[5 + b])
        assert torch.equal(alone.codes[0], both.codes[b])
        assert int(alone.stats.forwards_per_image[0]) == int(both.stats.forwards_per_image[b])


def test_adaptive_rows_wait_while_their_law_moves() -> None:
    """The law of a row's first code moves with every code above it, so drafts are redrawn and rows wait."""
    backbone = tiny_backbone()
    labels = torch.arange(8)
    fixed = ZipARSampler(window=1, **SETTINGS).sample(backbone, labels, seeds=range(8))
    out = ZipARSampler(window=1, adaptive=True, **SETTINGS).sample(backbone, labels, seeds=range(8))
    assert out.stats.extra["num_redrawn"] > 0
    assert bool((out.stats.forwards_per_image >= fixed.stats.forwards_per_image).all())
    assert out.stats.num_forwards <= 16 + 1
    assert bool((out.codes >= 0).all())


def test_adaptive_draft_follows_the_law_it_was_last_tested_under() -> None:
    """One row opens early, its law changes once and is then final: the joint rule must give exactly the last law.

    2 x 2 grid, 3 codes, window 1. Kills the mutants "always keep" and "redraw from p": chi-square over 800 images.
    """
    first, second = torch.tensor([0.6, 0.3, 0.1]).log(), torch.tensor([0.2, 0.3, 0.5]).log()

    class Moving(Recorder):
        def __init__(self):
            self.codebook_size, self.calls, self.batch = 3, 0, 800

        def layout(self):
            return Layout.raster((3, 2))

        def prepare(self, condition, *, guidance_scale):
            return SimpleNamespace(batch=self.batch)

        def open(self, prepared, *, max_window):
            return None, SimpleNamespace(logits=torch.zeros(1, self.batch, 1, 3))

        def step_at(self, session, codes, slots):
            # row 2 opens at slot 3 (last cell of row 1): first with the old law, once row 1 is complete with the new one
            self.calls += 1
            law = torch.zeros(1, *slots.shape, 3)
            law[0][slots == 3] = first if self.calls == 3 else second
            return SimpleNamespace(logits=law)

    out = ZipARSampler(window=1, adaptive=True).sample(Moving(), None, seeds=range(800))
    counts = torch.bincount(out.codes[:, 4], minlength=3).double()
    expected = second.exp().double() * 800
    chi = float(((counts - expected) ** 2 / expected).sum())
    assert chi < 18.4  # 2 degrees of freedom, p = 1e-4
    old = first.exp().double() * 800
    assert float(((counts - old) ** 2 / old).sum()) > 50  # the control: the first law is far


def test_settings_are_checked() -> None:
    with pytest.raises(ValueError, match="window must be an integer at least 1"):
        ZipARSampler(window=0)
    with pytest.raises(ValueError, match="adaptive must be True or False"):
        ZipARSampler(adaptive=1)
    with pytest.raises(ValueError, match="needs a backbone with any_slot"):
        ZipARSampler().sample(SimpleNamespace(features=frozenset(), codebook_size=3), None, seeds=[0])


def test_rows_of_a_preview_grid_are_written_one_after_the_other() -> None:
    grid = Grid.of(case("glm_image").backbone, window=1)
    assert grid.widths == (2, 2, 3, 3, 3, 3)
    assert grid.opens_at == (2, 2, 3, 1, 1, 1)

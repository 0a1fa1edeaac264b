"""Row drafters: next-token's codes by enumeration, in ragged batches, with guidance; training learns; errors are one line."""

import json
import math
import shutil
from itertools import product

import pytest
import torch

from tests.enumeration import shared_noise_law, table_law, total_variation
from tests.test_drafter_training import pipeline, table  # noqa: F401  (a fixture)
from tests.tiny import tiny_backbone
from vargen import NextTokenSampler, RowDrafter, SpeculativeSampler
from vargen.features import Feature
from vargen.pipelines.image import ImagePipeline
from vargen.samplers.drafters.row import RowDrafts
from vargen.training.export import export_drafter
from vargen.training.recipe import parse_recipe
from vargen.training.run import METRICS_FILE, train
from vargen.training.tasks.base import make_task

SETTINGS = [{}, {"guidance_scale": 2.0, "top_k": 9}, {"temperature": 0.7, "top_p": 0.8}, {"temperature": 0.0}]


def drafter_of(backbone, **config):
    torch.manual_seed(2)
    sizes = {
        "dim": backbone.hidden_size,
        "codebook_size": backbone.codebook_size,
        "grid_size": tuple(backbone.grid_size),
        "num_condition_tokens": backbone.num_condition_tokens,
    }
    return RowDrafter(**{**sizes, "right_dim": 8, "below_dim": 8, **config}).eval()


class Enumerated(torch.nn.Module):
    """Two codes on a tiny transformer, with what ``shared_noise_law`` asks for."""

    def __init__(self):
        super().__init__()
        self.model = tiny_backbone(codebook_size=2, grid_size=(3, 2), dim=16, num_layers=1, num_classes=2)

    def __getattr__(self, name):
        return super().__getattr__(name) if name in ("model", "_modules") else getattr(self.model, name)

    def prefixes(self, length):
        return list(product(range(2), repeat=length))

    @torch.no_grad()
    def logits_after(self, label, prefix):
        prepared = self.model.prepare(torch.tensor([label]), guidance_scale=2.0)
        session, out = self.model.open(prepared, max_window=len(prefix) + 1)
        if prefix:
            out = self.model.step(session, torch.tensor([prefix]))
        return out.logits[:, 0, -1]


@pytest.mark.parametrize("drafts", [1, 2, 5])
@pytest.mark.parametrize("settings", [{}, {"guidance_scale": 2.0}], ids=str)
def test_the_distribution_is_the_models(settings, drafts, monkeypatch):
    backbone = Enumerated()
    drafter, sample = drafter_of(backbone.model), SpeculativeSampler.sample
    monkeypatch.setattr(SpeculativeSampler, "sample", lambda s, b, c, **k: sample(s, b.model, c, drafter=drafter, **k))
    sampler = SpeculativeSampler(num_draft_tokens=drafts, **settings)
    assert total_variation(shared_noise_law(sampler, backbone), table_law(backbone, sampler)) < 1e-5


@pytest.mark.parametrize("drafts", [1, 3, 11, [2] * 9, "auto"], ids=str)
def test_codes_are_next_tokens(drafts):
    """64 seeds in four settings; images leave the batch at different times, windows are wider than a row."""
    backbone = tiny_backbone()
    drafter, labels, seeds = drafter_of(backbone), torch.arange(16) % 10, range(16)
    for settings in SETTINGS:
        for forced in (None, torch.tensor([-1, 2, -1, 0] * 4)):
            expected = NextTokenSampler(**settings).sample(backbone, labels, seeds=seeds, forced_codes=forced)
            sampler = SpeculativeSampler(num_draft_tokens=drafts, **settings)
            out = sampler.sample(backbone, labels, seeds=seeds, drafter=drafter, forced_codes=forced)
            assert torch.equal(out.codes, expected.codes)
            assert out.stats.num_forwards <= expected.stats.num_forwards
            assert out.stats.guarantee == "exact"


def test_images_do_not_depend_on_their_batch():
    backbone = tiny_backbone()
    drafter, sampler = drafter_of(backbone), SpeculativeSampler(num_draft_tokens=5)
    together = sampler.sample(backbone, torch.arange(4), seeds=range(4), drafter=drafter)
    for i in range(4):
        alone = sampler.sample(backbone, torch.tensor([i]), seeds=[i], drafter=drafter)
        assert torch.equal(alone.stats.commit_trace[0], together.stats.commit_trace[i])


def test_heads_that_know_the_model_propose_rows(monkeypatch):
    """The scores of a slot that was never scored are those of both heads: with the right ones a row passes at once."""
    backbone = tiny_backbone()
    for layer in backbone.layers:  # codes depend on the one before alone, through their embeddings
        for weight in layer.parameters():
            torch.nn.init.zeros_(weight)
    drafter = drafter_of(backbone)
    labels, seeds = torch.arange(4), range(4)

    def righter(left):
        return backbone.norm(left)

    monkeypatch.setattr(drafter, "righter", righter)
    monkeypatch.setattr(drafter, "lower", lambda above, corner: torch.zeros_like(above))
    out = SpeculativeSampler(num_draft_tokens=3).sample(backbone, labels, seeds=seeds, drafter=drafter)
    assert out.stats.num_forwards <= 1 + math.ceil(15 / 4)
    assert torch.equal(out.codes, NextTokenSampler().sample(backbone, labels, seeds=seeds).codes)


def recipe(pipeline, **changes):  # noqa: F811
    options = {"backbone": str(pipeline), "tokenizer": str(pipeline)}
    model = {"right_dim": 16, "below_dim": 16}
    return parse_recipe(table(pipeline, name="tiny-row", task="row", model=model, options=options, **changes))


def test_row_drafters_learn(pipeline, tmp_path):  # noqa: F811
    schedule = {"num_steps": 30, "warmup_steps": 2, "decay_steps": 10}
    optimizer = {"name": "muon", "lr": 3e-3, "muon_lr": 0.02}
    log = {**table(pipeline)["log"], "eval_every": 30}
    given = recipe(pipeline, schedule=schedule, optimizer=optimizer, log=log)
    torch.manual_seed(0)
    task = make_task(given)
    before = task.evaluate(task.build(initialize=True))["held_out_acceptance"]
    result = train(given, output=tmp_path / "run")
    losses = [json.loads(line).get("loss") for line in (tmp_path / "run" / METRICS_FILE).read_text().splitlines()]
    losses = [loss for loss in losses if loss is not None]
    assert sum(losses[-5:]) < sum(losses[:5])
    assert result.metrics["held_out_acceptance"] > before


def test_exported_and_taken_by_name(pipeline, tmp_path):  # noqa: F811
    folder = tmp_path / "pipe"
    shutil.copytree(pipeline, folder)
    train(recipe(pipeline, schedule={"num_steps": 1, "warmup_steps": 0, "decay_steps": 0}), output=tmp_path / "run")
    assert export_drafter(tmp_path / "run", folder) == folder / "drafters" / "row"
    pipe = ImagePipeline.from_pretrained(folder)
    pipe.set_progress_bar_config(disable=True)
    settings = {"seed": 1, "output_type": "codes"}
    expected = pipe("elf", **settings).codes
    pipe.sampler = SpeculativeSampler.from_config(pipe.sampler.config, num_draft_tokens=15)
    assert torch.equal(pipe("elf", drafter="row", **settings).codes, expected)


def test_training_sees_what_drafting_sees(pipeline, monkeypatch):  # noqa: F811
    """The states of a teacher-forced pass are those that a run puts together slot by slot."""
    task = make_task(recipe(pipeline))
    batch, model = task.batch(0), task.build(initialize=True).eval()
    with torch.no_grad():
        _, wanted = task._states(model, batch)
    backbone, codes, heard = task.backbone, batch["codes"], {}
    guess = RowDrafts.guess

    def listen(self, state, slots):
        _, seen, _ = self._start(state, slots)
        assert not bool(seen.any())  # windows of one proposal: nothing stale
        corner = int(slots[0, 0]) - state.layout.stride + 1
        above = self.hidden[0, :, max(corner, 0)]
        corners = backbone.embed(codes[:, max(corner, 0)]) * (corner >= 0)
        left = backbone.embed(state.last_codes()[:, 0])
        heard[int(slots[0, 0])] = model(above, corners, left)
        return guess(self, state, slots)

    monkeypatch.setattr(RowDrafts, "guess", listen)
    sampler = SpeculativeSampler(num_draft_tokens=[0] * (codes.shape[1] - 1) + [1])
    sampler.sample(backbone, batch["condition"], seeds=range(len(codes)), drafter=model, forced_codes=codes)
    for slot, state in heard.items():
        torch.testing.assert_close(state, wanted[:, slot - 1], rtol=1e-4, atol=1e-4)
    assert len(heard) > 3


def test_saved_and_loaded(tmp_path):
    drafter = drafter_of(tiny_backbone())
    drafter.save_pretrained(tmp_path)
    again = RowDrafter.from_pretrained(tmp_path)
    assert all(torch.equal(a, b) for a, b in zip(drafter.parameters(), again.parameters(), strict=True))


@pytest.mark.parametrize(
    ("config", "settings", "words"),
    [
        ({"dim": 16}, {}, "was made for a backbone of"),
        ({"grid_size": (2, 8)}, {}, "train one for it"),
        ({}, {"tree": "dynamic"}, "proposes chains for the rules"),
        ({}, {"rule": "recursive"}, "proposes chains for the rules"),
    ],
)
def test_bad_calls_are_one_line(config, settings, words):
    backbone = tiny_backbone()
    with pytest.raises(ValueError, match=words) as caught:
        SpeculativeSampler(**settings).sample(
            backbone, torch.tensor([0]), seeds=[0], drafter=drafter_of(backbone, **config)
        )
    assert "\n" not in str(caught.value)


def test_a_backbone_without_hidden_states_is_named():
    backbone = tiny_backbone()
    drafter = drafter_of(backbone)

    class Bare:
        features = frozenset({Feature.WINDOW})

    with pytest.raises(ValueError, match="a row drafter needs a backbone with hidden states"):
        drafter.check_backbone(Bare())

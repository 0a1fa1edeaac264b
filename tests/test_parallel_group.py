"""Parallel groups: PAR's official numbers, any order and any groups on one model, PAR and RandAR keys."""

import json
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F

from tests.golden_files import load_file, unpacked
from tests.recording_head import SEEN, RecordingHead
from vargen.backbones.llamagen.any_order import AnyOrderTransformer
from vargen.backbones.par.model import PARTransformer
from vargen.checkpoints.manifests.published import PARAMETERS
from vargen.checkpoints.reader import CheckpointError
from vargen.checkpoints.verify import verify_checkpoint
from vargen.kernels.warp import warp_logits
from vargen.samplers.heads.categorical import CategoricalHead
from vargen.samplers.schedule.orders import GROWTHS, ORDERS
from vargen.samplers.schedule.parallel_group import ParallelGroupSampler
from vargen.samplers.schedule.schedule import DecodeSchedule

GOLDEN = Path(__file__).parent / "golden" / "par"


@pytest.fixture(scope="module")
def golden():
    config, io = json.loads((GOLDEN / "config.json").read_text()), load_file(GOLDEN / "io.safetensors")
    model = PARTransformer.from_original(unpacked(GOLDEN / "model.safetensors"), grid_size=(6, 6), num_heads=4)
    assert (model.config.group_size, model.config.num_classes) == (4, 10)
    return config, io, model


def random_weights(model):
    torch.manual_seed(2)
    for weight in model.parameters():
        torch.nn.init.normal_(weight, std=0.4)
    return model.eval()


def any_order(**config):
    defaults = {"dim": 32, "num_layers": 2, "num_heads": 2, "grid_size": (4, 4), "num_classes": 10}
    return random_weights(AnyOrderTransformer(**{**defaults, "codebook_size": 32, **config}))


class RecordingSampler(ParallelGroupSampler):
    def make_head(self, errors):
        return RecordingHead(temperature=self.temperature, top_k=self.top_k, top_p=self.top_p)


class TorchHead(CategoricalHead):
    """Draws with torch's generator as the official code does: one multinomial for all rows of a group."""

    def draw(self, rows, keys, positions, guidance_scale):
        p = warp_logits(rows, **self.warp(guidance_scale)).softmax(-1)
        return torch.multinomial(p.flatten(0, 1), 1).view(p.shape[:2])


class TorchSampler(ParallelGroupSampler):
    def make_head(self, errors):
        return TorchHead(temperature=self.temperature, top_k=self.top_k, top_p=self.top_p)


@torch.no_grad()
def test_teacher_forced_logits_are_the_official_ones(golden):
    _, io, model = golden
    logits = model(io["tf/tokens_raster"], io["cond/class_ids"])
    order = io["order/raster_index_of_par_slot"]
    torch.testing.assert_close(logits[:, order], io["tf/logits"], atol=1e-4, rtol=0)
    loss = F.cross_entropy(logits.flatten(0, 1), io["tf/tokens_raster"].flatten())
    torch.testing.assert_close(loss, io["tf/loss"][0], atol=1e-4, rtol=0)


@pytest.mark.parametrize("run", ["gen_cfg1", "gen_cfg", "gen_cfg_interval"])
def test_greedy_runs_are_the_official_ones_token_for_token(golden, run):
    config, io, model = golden
    sampler = RecordingSampler(
        temperature=0,
        guidance_scale=1.0 if run == "gen_cfg1" else config["cfg_scale"],
        guidance_interval=config["cfg_interval"] if "interval" in run else -1,
    )
    SEEN.clear()
    out = sampler.sample(model, io["cond/class_ids"], seeds=[0, 0])
    schedule = sampler.make_schedule(model)
    assert torch.equal(schedule.order, io["order/raster_index_of_par_slot"])
    assert torch.equal(out.codes, io[f"{run}/tokens"])
    assert torch.equal(out.codes[:, schedule.order], io[f"{run}/tokens_par_order"])
    assert schedule.group_sizes == tuple(io[f"{run}/step_sizes"].tolist())
    assert torch.equal(torch.cat([step.slots for step in schedule.steps]), io[f"{run}/input_pos"])
    torch.testing.assert_close(torch.cat(SEEN, dim=1), io[f"{run}/step_logits"], atol=1e-4, rtol=0)
    assert (out.stats.num_forwards, out.stats.guarantee, out.stats.notes) == (12, "exact", [])


def test_the_stochastic_run_draws_in_the_official_order(golden):
    config, io, model = golden
    given = {name: config["sampled"][name] for name in ("temperature", "top_k", "top_p")}
    torch.manual_seed(config["sampled"]["seed"])
    sampler = TorchSampler(guidance_scale=config["cfg_scale"], **given)
    assert torch.equal(sampler.sample(model, io["cond/class_ids"], seeds=[0, 0]).codes, io["gen_sampled/tokens"])


def test_the_mask_and_the_rotations_are_the_official_ones(golden):
    _, io, model = golden
    schedule = DecodeSchedule.par((6, 6), 4)
    tau = torch.cat([step.tau for step in schedule.steps])  # the last group is never read
    fed = len(tau)
    assert torch.equal(tau <= tau[:, None], io["mask/group"].bool()[:fed, :fed])
    order = io["order/raster_index_of_par_slot"]
    special = torch.full((3,), -1)
    rows = torch.cat([torch.tensor([0]), 1 + order[:4], special, 1 + order[4:]])
    torch.testing.assert_close(model.rope_table()[rows], io["rope/freqs_cis"], atol=1e-6, rtol=0)


def test_published_sizes_have_their_exact_counts():
    with torch.device("meta"):
        for (size, group), count in PARAMETERS["par"].items():
            weights = PARTransformer.from_size(size, group_size=group).state_dict()
            assert sum(weight.numel() for weight in weights.values()) == count
        report = verify_checkpoint(weights)
        assert (report.ok, report.size, report.num_parameters) == (True, "3B", count)
        for size, count in PARAMETERS["randar"].items():
            weights = AnyOrderTransformer.from_size(size).state_dict()
            assert sum(weight.numel() for weight in weights.values()) == count
        report = verify_checkpoint(weights)
        assert (report.ok, report.size) == (True, "XL")
    assert weights["pos_instruct_embeddings"].shape == (1, 1280)


def test_checkpoints_of_other_families_are_refused(golden):
    with pytest.raises(CheckpointError, match=r"looks like a PAR transformer \(PARTransformer\)"):
        AnyOrderTransformer.from_original(unpacked(GOLDEN / "model.safetensors"), grid_size=(6, 6), num_heads=4)
    weights = dict(any_order().state_dict())
    loaded = AnyOrderTransformer.from_original(weights, grid_size=(4, 4), num_heads=2)
    assert loaded.config.num_classes == 10
    with pytest.raises(CheckpointError, match="RandAR"):
        PARTransformer.from_original(weights, grid_size=(4, 4), num_heads=2)


@pytest.mark.parametrize("condition_type", ["class", "caption"])
@pytest.mark.parametrize("order", ORDERS)
@torch.no_grad()
def test_one_code_a_pass_reads_the_training_forward_in_any_order(order, condition_type):
    """RandAR: the logits of every pass are those of the causal forward over queries and codes."""
    model = any_order(condition_type=condition_type, caption_dim=6, num_condition_tokens=3)
    condition = torch.tensor([1, 2])
    if condition_type == "caption":
        features = torch.randn(2, 3, 6, generator=torch.Generator().manual_seed(0))
        condition = (features, torch.tensor([[0, 1, 1], [0, 0, 1]]))
    sampler = RecordingSampler(temperature=0, num_steps=16, order=order, order_seed=4)
    SEEN.clear()
    out = sampler.sample(model, condition, seeds=[0, 0])
    schedule = sampler.make_schedule(model)
    logits = model(out.codes, condition, order=schedule.order)
    torch.testing.assert_close(torch.cat(SEEN, dim=1), logits[:, schedule.order], atol=2e-4, rtol=0)
    assert (out.stats.guarantee, out.stats.num_forwards) == ("exact", 16)


@pytest.mark.parametrize("sizes", [(1, 3, 4, 8), (16,), (5, 5, 6)])
@torch.no_grad()
def test_groups_read_what_was_drawn_before_them(sizes):
    """The first code of a group has the distribution of the causal forward; the others see earlier queries, not their codes."""
    model, labels = any_order(), torch.tensor([1, 2])
    order = torch.randperm(16, generator=torch.Generator().manual_seed(7))
    schedule = DecodeSchedule.groups((4, 4), order, sizes)
    SEEN.clear()
    out = RecordingSampler(temperature=0).sample(model, labels, seeds=[0, 0], schedule=schedule)
    full = model(out.codes, labels, order=order)
    done = 0
    for logits, size in zip(SEEN, sizes, strict=True):
        torch.testing.assert_close(logits[:, 0], full[:, order[done]], atol=2e-4, rtol=0)
        done += size
    note = [f"up to {max(sizes)} codes of a group are drawn independently of each other"]
    assert (out.stats.guarantee, out.stats.notes) == ("heuristic", note)


@torch.no_grad()
def test_training_draws_an_order_for_each_image():
    model = any_order(class_dropout_prob=0.0).train()
    codes, labels = torch.randint(0, 32, (2, 16)), torch.tensor([1, 1])
    model.tok_dropout.p = 0.0
    for layer in model.layers:
        layer.attention.resid_dropout.p = layer.feed_forward.ffn_dropout.p = 0.0
    same = codes[:1].expand(2, -1)
    drawn = model(same, labels, generator=torch.Generator().manual_seed(0))
    assert not torch.allclose(drawn[0], drawn[1])
    again = model(same, labels, generator=torch.Generator().manual_seed(0))
    assert torch.equal(drawn, again)


@pytest.mark.parametrize("growth", GROWTHS)
def test_an_image_depends_on_its_seed_only(growth):
    model = any_order()
    sampler = ParallelGroupSampler(guidance_scale=2.0, num_steps=5, growth=growth, guidance_schedule="linear")
    labels, seeds = torch.tensor([3, 1, 4]), [9, 3, 12]
    together = sampler.sample(model, labels, seeds=seeds)
    assert together.stats.num_forwards == 5
    for i, seed in enumerate(seeds):
        assert torch.equal(sampler.sample(model, labels[i : i + 1], seeds=[seed]).codes[0], together.codes[i])


def test_what_does_not_fit_is_refused(golden):
    _, io, model = golden
    labels = io["cond/class_ids"]
    with pytest.raises(ValueError, match="draws groups of 9 codes, the model was trained for 4"):
        ParallelGroupSampler().sample(model, labels, seeds=[0, 0], schedule=DecodeSchedule.par((6, 6), 9))
    with pytest.raises(ValueError, match="not trained for the schedule 'nar2d'; schedules that fit: par"):
        ParallelGroupSampler().sample(model, labels, seeds=[0, 0], schedule=DecodeSchedule.nar2d((6, 6)))
    schedule = DecodeSchedule.groups((4, 4), range(16), (16,), style="lpd")
    with pytest.raises(ValueError, match="schedules that fit: randar"):
        ParallelGroupSampler().sample(any_order(), labels[:1], seeds=[0], schedule=schedule)
    with pytest.raises(ValueError, match=r"num_steps must be an integer in 1..16, got 32 \(the grid has 16 codes\)"):
        ParallelGroupSampler().sample(any_order(), labels[:1], seeds=[0])
    with pytest.raises(ValueError, match="order must be one of random, raster"):
        ParallelGroupSampler(order="spiral")
    with pytest.raises(ValueError, match=r"group_size must be the square \(above 1\)"):
        PARTransformer(dim=32, num_heads=2, num_layers=1, grid_size=(6, 6), group_size=5)


@pytest.mark.parametrize("kind", ["par", "any"])
def test_saving_and_loading_changes_nothing(kind, tmp_path):
    small = {"dim": 32, "num_layers": 1, "num_heads": 2, "grid_size": (4, 4), "codebook_size": 32}
    model = any_order() if kind == "any" else random_weights(PARTransformer(**small, group_size=4))
    model.save_pretrained(tmp_path)
    again = type(model).from_pretrained(tmp_path)
    sampler, labels = ParallelGroupSampler(num_steps=6), torch.tensor([1])
    expected = sampler.sample(model, labels, seeds=[3]).codes
    assert torch.equal(sampler.sample(again, labels, seeds=[3]).codes, expected)

"""NBP: the official numbers, any block, guidance and batches, given frames, official keys."""

import copy
import json
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F

from tests.golden_files import load_file, unpacked
from tests.recording_head import SEEN, RecordingHead
from vargen.backbones.nbp.model import NBPTransformer
from vargen.checkpoints.reader import CheckpointError
from vargen.orders import block_order
from vargen.samplers.schedule.next_block import NextBlockSampler, block_schedule
from vargen.samplers.schedule.schedule import DecodeSchedule

GOLDEN = Path(__file__).parent / "golden" / "nbp"


def load(name):
    config, io = json.loads((GOLDEN / name / "config.json").read_text()), load_file(GOLDEN / name / "io.safetensors")
    known = {"grid_size": config["thw"], "block": (1, 1, 4), "num_heads": 4, "codebook_size": config["vq_vocab"]}
    model = NBPTransformer.from_original(unpacked(GOLDEN / name / "model.safetensors"), **known)
    return config, io, model


@pytest.fixture(scope="module")
def hybrid():
    return load("hybrid_text")


@pytest.fixture(scope="module")
def frames():
    return load("frame_pred")


def small(**config):
    defaults = {"dim": 24, "num_layers": 2, "num_heads": 2, "grid_size": (3, 4, 4), "codebook_size": 16}
    defaults |= {"condition_type": "class", "num_classes": 5, "block": (1, 1, 4), "max_positions": None}
    torch.manual_seed(3)
    model = NBPTransformer(**{**defaults, **config})
    for name, weight in model.named_parameters():  # large enough that no two clips come out alike
        torch.nn.init.normal_(
            weight, mean=float("ln" in name and "weight" in name), std=0.3 if "emb" not in name else 1.0
        )
    return model.eval()


class RecordingSampler(NextBlockSampler):
    def make_head(self, errors):
        return RecordingHead(temperature=self.temperature, top_k=self.top_k, top_p=self.top_p)


@torch.no_grad()
def test_teacher_forced_text_logits_are_the_official_ones(hybrid):
    config, io, model = hybrid
    assert (model.group_size, model.num_special, model.config.text_vocabulary) == (4, 24, 20)
    logits = model(io["tf/tokens"], io["cond/text_ids"])
    official = torch.roll(io["tf/logits"], -config["shift_video"], dims=-1)  # codes first
    torch.testing.assert_close(logits, official, atol=1e-4, rtol=0)
    loss = F.cross_entropy(logits.flatten(0, 1), io["tf/tokens"].flatten())
    torch.testing.assert_close(loss, io["tf/loss"][0], atol=1e-4, rtol=0)


@torch.no_grad()
def test_teacher_forced_frame_prediction_is_the_official_one(frames):
    _, io, model = frames
    assert model.config.condition_type == "none"
    logits = model(io["tf/tokens"])
    torch.testing.assert_close(logits, io["tf/logits"], atol=1e-4, rtol=0)
    loss = F.cross_entropy(logits.flatten(0, 1), io["tf/tokens"][:, 4:].flatten())
    torch.testing.assert_close(loss, io["tf/loss"][0], atol=1e-4, rtol=0)


def test_greedy_text_run_is_the_official_one_token_for_token(hybrid):
    config, io, model = hybrid
    SEEN.clear()
    out = RecordingSampler(temperature=0).sample(model, io["cond/text_ids"], seeds=[0, 0])
    assert torch.equal(out.codes, io["gen/tokens"])
    assert (out.stats.num_forwards, out.stats.guarantee) == (config["steps"], "exact")
    assert [logits.shape[1] for logits in SEEN] == io["gen/step_sizes"].tolist()
    official = torch.roll(io["gen/step_logits"], -config["shift_video"], dims=-1)
    torch.testing.assert_close(torch.cat(SEEN, dim=1), official, atol=1e-4, rtol=0)


def test_greedy_continuation_is_the_official_one_token_for_token(frames):
    config, io, model = frames
    given = torch.full((2, 24), -1)
    given[:, :8] = io["gen/prefix_tokens"]
    SEEN.clear()
    out = RecordingSampler(temperature=0).sample(model, 2, seeds=[0, 0], forced_codes=given)
    assert torch.equal(out.codes, torch.cat([io["gen/prefix_tokens"], io["gen/tokens"]], dim=1))
    assert out.stats.num_forwards == config["steps"]
    torch.testing.assert_close(torch.cat(SEEN, dim=1), io["gen/step_logits"], atol=1e-4, rtol=0)
    with pytest.raises(ValueError, match="continues given frames; pass them"):
        NextBlockSampler().sample(model, 2, seeds=[0, 0])


def test_text_drawn_among_codes_is_read_back_but_shown_as_code_zero(hybrid):
    _, io, model = hybrid
    model = copy.deepcopy(model)
    with torch.no_grad():
        model.head.weight[: model.num_special] *= 40.0
    out = NextBlockSampler().sample(model, io["cond/text_ids"], seeds=[1, 2])
    assert out.stats.extra["num_stray_codes"] > 0
    assert int(out.codes.max()) < 64
    model.register_to_config(restrict_head=True)
    out = NextBlockSampler().sample(model, io["cond/text_ids"], seeds=[1, 2])
    assert "num_stray_codes" not in out.stats.extra


@pytest.mark.parametrize("block", [(1, 1, 1), (1, 1, 4), (1, 4, 4), (1, 2, 2), (3, 1, 2)])
@torch.no_grad()
def test_every_decoded_code_is_the_argmax_of_the_training_forward(block):
    model = small(block=block, rope=block == (1, 2, 2), **({"dim": 24} if block != (1, 2, 2) else {"num_heads": 4}))
    labels = torch.tensor([1, 4, 2])
    out = NextBlockSampler(temperature=0, guidance_scale=1.0).sample(model, labels, seeds=[0, 1, 2])
    assert torch.equal(out.codes, model(out.codes, labels).argmax(-1))
    size = model.group_size
    assert out.stats.num_forwards == 48 // size + size - 1
    assert not torch.equal(out.codes[0], out.codes[1])


@pytest.mark.parametrize(
    "config", [{}, {"condition_type": "attributes", "num_attributes": 9, "num_condition_tokens": 3, "code_rank": 6}]
)
def test_a_batch_equals_its_single_runs_with_guidance(config):
    model = small(**config)
    condition = torch.tensor([[1, 0, 3], [4, 5, 0], [2, 2, 8], [0, 0, 1]]) if config else torch.tensor([0, 3, 4, 1])
    sampler = NextBlockSampler(guidance_scale=2.0, top_k=8, top_p=0.9)
    together = sampler.sample(model, condition, seeds=[5, 6, 7, 8]).codes
    for i in range(4):
        assert torch.equal(sampler.sample(model, condition[i : i + 1], seeds=[5 + i]).codes[0], together[i])
    assert not torch.equal(
        together, NextBlockSampler(top_k=8, top_p=0.9).sample(model, condition, seeds=[5, 6, 7, 8]).codes
    )


def test_guidance_of_the_published_models_uses_their_null_text(hybrid):
    _, io, model = hybrid
    ids = io["cond/text_ids"]
    sampler = NextBlockSampler(guidance_scale=1.5, temperature=0)
    together = sampler.sample(model, ids, seeds=[0, 1]).codes
    assert torch.equal(sampler.sample(model, ids[1:], seeds=[1]).codes[0], together[1])
    assert not torch.equal(together, io["gen/tokens"])


@pytest.mark.parametrize("block", [(1, 1, 4), (1, 4, 4), (1, 2, 2)])
def test_given_frames_in_one_pass_are_the_same_as_held_one_by_one(block):
    model = small(block=block)
    labels = torch.tensor([1, 2])
    sampler = NextBlockSampler(temperature=0)
    given = torch.full((2, 48), -1)
    given[:, :16] = torch.randint(16, (2, 16), generator=torch.Generator().manual_seed(0))
    quick = sampler.sample(model, labels, seeds=[0, 1], forced_codes=given)
    slow = sampler.sample(model, labels, seeds=[0, 1], forced_codes=given, schedule=block_schedule(model, 0))
    assert torch.equal(quick.codes, slow.codes)
    assert torch.equal(quick.codes[:, :16], given[:, :16])
    assert quick.stats.num_forwards == 32 // model.group_size < slow.stats.num_forwards


def test_what_fixes_codes_in_the_middle_is_kept():
    model = small()
    given = torch.full((48,), -1)
    given[30:34] = 7
    out = NextBlockSampler().sample(model, torch.tensor([1]), seeds=[3], forced_codes=given)
    assert out.codes[0, 30:34].tolist() == [7] * 4
    assert out.stats.num_forwards == 15


def test_a_copy_of_a_model_reads_its_own_weights():
    model = small()
    other = copy.deepcopy(model)
    with torch.no_grad():
        for weight in model.parameters():
            weight.zero_()
    assert NextBlockSampler(temperature=0).sample(other, torch.tensor([1]), seeds=0).codes.sum() > 0


def test_saving_and_loading_keeps_the_model(tmp_path):
    model = small(code_rank=5, rope=True, num_heads=4)
    model.save_pretrained(tmp_path)
    again = NBPTransformer.from_pretrained(tmp_path)
    codes = torch.randint(16, (2, 48))
    assert torch.equal(model(codes, torch.tensor([0, 1])), again(codes, torch.tensor([0, 1])))


def test_training_drops_conditions_and_can_fit():
    model = small(condition_type="attributes", num_attributes=9, num_condition_tokens=3, attribute_dropout_prob=0.3)
    codes, ids = torch.randint(16, (2, 48)), torch.tensor([[1, 2, 3], [4, 5, 6]])
    model.train()
    first = model(codes, ids, generator=torch.Generator().manual_seed(1))
    again = model(codes, ids, generator=torch.Generator().manual_seed(1))
    assert first.shape == (2, 48, 16)
    model.eval()
    dropped = model(codes, ids, drop=torch.tensor([True, False]))
    torch.testing.assert_close(dropped[1], model(codes, ids)[1])
    torch.testing.assert_close(dropped[0], model(codes, ids * 0)[0])
    assert again.shape == first.shape


@pytest.mark.parametrize(
    ("attempt", "message"),
    [
        (lambda: small(block=(1, 1, 3)), "block must divide the grid"),
        (lambda: small(condition_type="caption"), "condition_type must be one of text, none, class, attributes"),
        (lambda: NextBlockSampler().sample(small(), torch.tensor([9]), seeds=0), "class label must be in 0..4"),
        (
            lambda: NextBlockSampler().sample(
                small(), torch.tensor([1]), seeds=0, schedule=DecodeSchedule.next_block((3, 4, 4), (1, 2, 2), 2)
            ),
            "the model was trained for blocks of",
        ),
        (
            lambda: NextBlockSampler().sample(
                small(), torch.tensor([1]), seeds=0, schedule=DecodeSchedule.raster((3, 4, 4), 2)
            ),
            "was not trained for the schedule 'raster'",
        ),
        (lambda: NBPTransformer.from_size("L"), "unknown size 'L'"),
        (lambda: DecodeSchedule.next_block((2, 4, 4), (2, 2, 2), 1, prefix=16), "use whole frames"),
        (lambda: block_order((4, 4), (2,)), "block must divide the grid"),
    ],
)
def test_wrong_settings_are_refused_in_one_line(attempt, message):
    with pytest.raises(ValueError, match=message) as info:
        attempt()
    assert "\n" not in str(info.value)


def test_a_file_of_another_family_is_refused():
    with pytest.raises(CheckpointError, match="looks like a"):
        NBPTransformer.from_original({"pos_1LC": torch.zeros(1), "lvl_embed.weight": torch.zeros(1)})

"""Masked decoding: the official runs of Dimple and Prophet, MaskGIT's counts, images that depend on their seed only."""

import json
from pathlib import Path

import pytest
import torch

from tests.golden_files import load_file
from vargen.backbones.llamagen.masked import MaskedTransformer
from vargen.samplers.base import Sampler
from vargen.samplers.schedule.masked import MaskedSampler

GOLDEN = Path(__file__).parent / "golden" / "masked"
CASES = json.loads((GOLDEN / "masked_decode.json").read_text())["cases"]
DIMPLE = [name for name in CASES if name.startswith("dimple.")]
PROPHET = [name for name in CASES if name.startswith("prophet.") and name.endswith("block16")]
CONFIDENCES = {"maskgit_plus": "probability", "topk_margin": "margin", "entropy": "entropy"}


class StandIn:
    """The bilinear model of the golden runs: one prompt position and 16 codes; the rows of the last step are kept."""

    features = frozenset({"masked"})
    schedules, device = ("maskgit",), torch.device("cpu")
    grid_size, num_codes, codebook_size, num_condition_tokens = (1, 17), 17, 11, 1

    def __init__(self, shifted):
        tensors = load_file(GOLDEN / "masked_decode.safetensors")
        self.emb, self.mix, self.base = tensors["emb"], tensors["mix"], tensors["base"]
        self.shifted = shifted  # position p is read off the output of p - 1, as in models that began as causal ones
        self.sequences = []

    def check_schedule(self, schedule):
        assert schedule.kind == "maskgit"

    def prepare(self, condition, guidance_scale=1.0):
        self.batch, self.embeddings = len(condition), torch.zeros(len(condition), 1, 1)
        return self

    def begin(self, prepared, schedule):
        return None

    def select(self, session, rows):
        pass

    def run_items(self, session, step, codes):
        x = torch.where(codes < 0, 11, codes)
        self.sequences.append(x[0].tolist())
        logits = self.base + torch.einsum("pq,bqv->bpv", self.mix, self.emb[x])
        if self.shifted:
            logits = torch.cat([logits[:, :1], logits[:, :-1]], dim=1)
        return logits[None]


class LastFive(MaskedSampler):
    """Prophet's released loop looks at an answer region: here the last five positions."""

    def monitored(self, masked):
        places = torch.zeros_like(masked)
        places[:, -5:] = True
        return places


def run(sampler, backbone):
    prompt = torch.full((17,), -1)
    prompt[0] = 0
    return sampler.sample(backbone, torch.zeros(1, dtype=torch.int64), seeds=[0], forced_codes=prompt)


@pytest.mark.parametrize("name", DIMPLE)
def test_dimple(name):
    case = CASES[name]
    confidence = CONFIDENCES[case["alg"]]
    # the official entropy confidence is never above a positive threshold; ours is a threshold on the entropy itself
    threshold = None if confidence == "entropy" else case["threshold"]
    settings = {"share": "linear", "confidence": confidence, "commit_threshold": threshold}
    sampler = MaskedSampler(temperature=0, num_steps=case["steps"], **settings)
    backbone = StandIn(shifted=True)
    out = run(sampler, backbone)
    expected = load_file(GOLDEN / "masked_decode.safetensors")[name]
    after = torch.tensor([*backbone.sequences[1:], out.codes[0].tolist()])
    assert torch.equal(after, expected)
    assert out.stats.num_forwards == case["forward_passes"]
    trace = out.stats.commit_trace[0, 1:]
    assert torch.bincount(trace).tolist() == case["per_step"]


@pytest.mark.parametrize("name", PROPHET)
def test_prophet(name):
    case = CASES[name]
    golden = load_file(GOLDEN / "masked_decode.safetensors")
    sampler = LastFive(temperature=0, num_steps=case["steps"], share="even")
    full = run(sampler, StandIn(shifted=False))
    assert torch.equal(full.codes.flatten(), golden[name.replace("prophet.", "llada.")].flatten())
    assert full.stats.num_forwards == case["calls_full"]
    thresholds = tuple(case["thresholds"][phase] for phase in ("early", "mid", "late"))
    early = run(sampler.replace(early_commit=thresholds), StandIn(shifted=False))
    assert early.stats.num_forwards == case["calls"]
    assert torch.equal(early.codes.flatten(), golden[name].flatten())


def tiny(**config):
    torch.manual_seed(3)
    defaults = {"dim": 32, "num_layers": 2, "num_heads": 2, "grid_size": (4, 4), "num_classes": 10}
    model = MaskedTransformer(**{**defaults, "codebook_size": 32, **config})
    for weight in model.parameters():
        torch.nn.init.normal_(weight, std=0.4)
    return model.eval()


@torch.no_grad()
def test_every_pass_reads_the_training_forward():
    model, labels, seen = tiny(), torch.tensor([1, 2]), []

    class Recording(MaskedSampler):
        def decide(self, state, step, logits):
            seen.append((state.codes.clone(), logits[0].clone()))
            super().decide(state, step, logits)

    Recording(num_steps=6).sample(model, labels, seeds=[0, 1])
    assert (seen[0][0] == -1).all()
    for codes, logits in seen:
        torch.testing.assert_close(logits, model(codes, labels), atol=1e-5, rtol=0)
    full = seen[-1][0]
    moved = full.clone()
    moved[0, 0] = (full[0, 0] + 1) % 32
    changed = (model(moved, labels) - model(full, labels)).abs().amax(-1)[0] > 1e-4
    assert changed.all()  # everyone sees everyone


@torch.no_grad()
def test_padding_of_captions_is_invisible():
    model = tiny(condition_type="caption", caption_dim=6, num_condition_tokens=3, condition_rope="identity")
    features, mask = torch.randn(2, 3, 6), torch.tensor([[0, 1, 1], [1, 1, 1]])
    sampler = MaskedSampler(num_steps=4, guidance_scale=2.0)
    codes = sampler.sample(model, (features, mask), seeds=[1, 2]).codes
    other = features.clone()
    other[0, 0] = 9.0
    assert torch.equal(sampler.sample(model, (other, mask), seeds=[1, 2]).codes, codes)


@pytest.mark.parametrize("share", ["cosine", "linear", "even"])
@pytest.mark.parametrize("num_steps", [1, 3, 8, 16])
def test_every_share_ends_in_time_and_keeps_something(share, num_steps):
    sampler = MaskedSampler(share=share, num_steps=num_steps)
    masked = 16
    for number in range(num_steps):
        kept = sampler.num_kept(masked, 16, number, num_steps)
        assert (1 <= kept <= masked) if masked else kept == 0
        masked -= kept
    assert masked == 0


def test_cosine_keeps_the_counts_of_maskgit():
    sampler, masked, left = MaskedSampler(num_steps=8), 256, []
    for number in range(8):
        masked -= sampler.num_kept(masked, 256, number, 8)
        left.append(masked)
    assert left == [251, 236, 212, 181, 142, 97, 49, 0]  # int(256 * cos(pi / 2 * (s + 1) / 8))


@pytest.mark.parametrize(
    "settings",
    [
        {"choice_temperature": 4.5},
        {"commit_threshold": 0.3},
        {"commit_threshold": 1.0, "confidence": "entropy"},
        {"early_commit": (2.0, 1.0, 0.5), "share": "even"},
        {"guidance_scale": 2.0, "guidance_schedule": "linear", "confidence": "margin"},
    ],
)
def test_an_image_depends_on_its_seed_only(settings):
    """Images that finish early leave the batch; the others do not notice."""
    model, sampler = tiny(), MaskedSampler(num_steps=8, **settings)
    labels, seeds = torch.tensor([3, 1, 4, 1]), [9, 2**63 + 1, 3, 12]
    together = sampler.sample(model, labels, seeds=seeds)
    assert (together.codes >= 0).all()
    assert together.stats.num_forwards <= 8
    assert together.stats.guarantee == "heuristic"
    for i, seed in enumerate(seeds):
        alone = sampler.sample(model, labels[i : i + 1], seeds=[seed])
        assert torch.equal(alone.codes[0], together.codes[i])
        assert alone.stats.num_forwards == together.stats.forwards_per_image[i]


def test_thresholds_save_passes_and_at_their_ends_do_nothing():
    model, labels = tiny(), torch.tensor([1, 2])
    plain = MaskedSampler(num_steps=12, temperature=0)
    slow = plain.sample(model, labels, seeds=[0, 1])
    assert slow.stats.num_forwards == 12
    for never in ({"commit_threshold": 1.0}, {"early_commit": (1e9, 1e9, 1e9)}):
        same = plain.replace(**never).sample(model, labels, seeds=[0, 1])
        assert torch.equal(same.codes, slow.codes)
        assert same.stats.num_forwards == 12
    assert plain.replace(commit_threshold=0.0).sample(model, labels, seeds=[0, 1]).stats.num_forwards == 1
    assert plain.replace(early_commit=(0, 0, 0)).sample(model, labels, seeds=[0, 1]).stats.num_forwards == 1


def test_fixed_codes_stay_and_are_seen_from_the_first_pass():
    model, labels = tiny(), torch.tensor([1])
    fixed = torch.full((16,), -1)
    fixed[3], fixed[9] = 5, 7
    out = MaskedSampler(num_steps=4).sample(model, labels, seeds=[4], forced_codes=fixed)
    assert (int(out.codes[0, 3]), int(out.codes[0, 9])) == (5, 7)
    free = MaskedSampler(num_steps=4).sample(model, labels, seeds=[4])
    assert not torch.equal(out.codes, free.codes)


def test_settings_round_trip_and_wrong_ones_are_refused(tmp_path):
    sampler = MaskedSampler(early_commit=[7.5, 5.0, 2.5], commit_threshold=0.9)
    sampler.save_pretrained(tmp_path)
    assert Sampler.from_pretrained(tmp_path) == sampler
    for settings, words in [
        ({"early_commit": (1.0,)}, "early_commit must be 3 thresholds or None"),
        ({"early_commit": (1.0, 2.0, -1.0)}, "early_commit must be at least 0"),
        ({"share": "cosin"}, "did you mean 'cosine'"),
        ({"confidence": "top"}, "confidence must be one of probability"),
        ({"commit_threshold": -0.1}, "commit_threshold must be at least 0"),
        ({"num_steps": 0}, "num_steps must be an integer at least 1"),
    ]:
        with pytest.raises(ValueError, match=words):
            MaskedSampler(**settings)
    with pytest.raises(ValueError, match=r"num_steps must be an integer in 1..16, got 17 \(the grid has 16 codes\)"):
        MaskedSampler(num_steps=17).sample(tiny(), torch.tensor([1]), seeds=[0])

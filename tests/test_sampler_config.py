"""Settings of samplers: checked once, frozen, stored and swapped like schedulers."""

import copy
import dataclasses
import json
import pickle

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

import vargen
from tests.toys import TabularBackbone
from vargen.samplers.base import Sampler, known_samplers
from vargen.samplers.window.jacobi import SpeculativeJacobiSampler
from vargen.samplers.window.next_token import NextTokenSampler
from vargen.validation.checks import check_seeds

WINDOW_SAMPLERS = [NextTokenSampler, SpeculativeJacobiSampler]


@pytest.mark.parametrize("cls", known_samplers(), ids=lambda c: c.__name__)
def test_every_sampler_round_trips_through_its_folder(cls, tmp_path):
    sampler = cls(guidance_scale=2.5, temperature=0.9)
    sampler.save_pretrained(tmp_path)
    stored = json.loads((tmp_path / "sampler_config.json").read_text())
    assert stored["_class_name"] == cls.__name__
    assert cls.from_pretrained(tmp_path) == sampler
    if cls.__name__ in vargen._names:
        assert Sampler.from_pretrained(tmp_path) == sampler  # the stored name chooses the class
    else:
        with pytest.raises(ValueError, match="sampler must be one of"):
            Sampler.from_pretrained(tmp_path)
    assert cls.from_pretrained(tmp_path, temperature=0.5) == sampler.replace(temperature=0.5)
    assert cls.from_config(sampler.config) == sampler
    assert pickle.loads(pickle.dumps(sampler)) == copy.deepcopy(sampler) == sampler
    assert hash(copy.deepcopy(sampler)) == hash(sampler)


@given(
    guidance_scale=st.floats(0, 20),
    temperature=st.floats(0, 5),
    top_k=st.integers(0, 1 << 20),
    top_p=st.floats(0, 1, exclude_min=True),
    window=st.integers(1, 512),
    rule=st.sampled_from(["shared-noise", "maximal", "independent"]),
    init=st.sampled_from(["uniform", "repeat_left", "repeat_above"]),
)
def test_every_allowed_setting_survives_the_configuration(**settings):
    sampler = SpeculativeJacobiSampler(**settings)
    restored = SpeculativeJacobiSampler.from_config(json.loads(sampler.to_json_string()))
    assert restored == sampler
    assert {name: restored.config[name] for name in settings} == settings


def test_a_sampler_is_frozen():
    sampler = NextTokenSampler()
    with pytest.raises(dataclasses.FrozenInstanceError):
        sampler.top_k = 5
    assert sampler.replace(top_k=5) == NextTokenSampler(top_k=5)
    assert sampler.top_k == 0
    assert (
        repr(sampler)
        == "NextTokenSampler(guidance_scale=1.0, temperature=1.0, top_k=0, top_p=1.0, guidance_interval=-1, top_p_first=False, row_invariant=False)"
    )


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"guidance_scale": -1}, "guidance_scale must be at least 0, got -1"),
        ({"guidance_scale": float("nan")}, "guidance_scale must be a finite number"),
        ({"guidance_scale": "3"}, "guidance_scale must be a finite number"),
        ({"guidance_scale": True}, "guidance_scale must be a finite number"),
        ({"temperature": -0.1}, "temperature must be at least 0, got -0.1"),
        ({"temperature": float("inf")}, "temperature must be a finite number"),
        ({"top_k": -1}, "top_k must be an integer at least 0, got -1"),
        ({"top_k": 1.5}, "top_k must be an integer"),
        ({"top_p": 0}, "top_p must be greater than 0 and at most 1, got 0"),
        ({"top_p": 1.01}, "top_p must be greater than 0 and at most 1"),
        ({"window": 0}, "window must be an integer at least 1, got 0"),
        ({"window": 2.0}, "window must be an integer"),
        ({"rule": "shared"}, "did you mean 'shared-noise'"),
        ({"carry": "gumble"}, "rule must be one of shared-noise, maximal, independent, got 'gumble'"),
        ({"init": "repeat_abov"}, "did you mean 'repeat_above'"),
        ({"topk": 5}, "no setting 'topk'; did you mean 'top_k'"),
        ({"windw": 5}, "no setting 'windw'; did you mean 'window'"),
    ],
)
def test_a_bad_setting_is_one_clear_line(settings, message):
    for build in (
        lambda: SpeculativeJacobiSampler(**settings),
        lambda: SpeculativeJacobiSampler().replace(**settings),
        lambda: SpeculativeJacobiSampler.from_config({}, **settings),
    ):
        with pytest.raises(ValueError, match=message) as error:
            build()
        assert "\n" not in str(error.value)


RENAMED = [
    ("NeighboringSampler", "guidance_ramp", "guidance_schedule", "linear"),
    ("NextBlockSampler", "guidance_ramp", "guidance_schedule", "linear"),
    ("MaskedSampler", "guidance_ramp", "guidance_schedule", "linear"),
    ("ParallelGroupSampler", "guidance_ramp", "guidance_schedule", "linear"),
    ("ParallelGroupSampler", "num_groups", "num_steps", 5),
    ("NextScaleSampler", "guidance_ramp", "guidance_schedule", "constant"),
    ("ContinuousMaskedSampler", "num_iter", "num_steps", 5),
    ("ContinuousSpeculativeSampler", "gamma", "num_draft_tokens", 2),
]


@pytest.mark.parametrize(("name", "old", "new", "value"), RENAMED, ids=lambda part: str(part))
def test_settings_load_under_their_old_names(name, old, new, value, tmp_path):
    cls = getattr(vargen, name)
    expected = cls(**{new: value})
    assert expected != cls()
    stored = {key: part for key, part in cls().config.items() if key != new} | {old: value}
    (tmp_path / "sampler_config.json").write_text(json.dumps(stored))
    assert cls(**{old: value}) == cls().replace(**{old: value}) == cls.from_config(stored) == expected
    assert cls.from_config(cls().config, **{old: value}) == Sampler.from_pretrained(tmp_path) == expected
    with pytest.raises(ValueError, match=f"give {new} only once"):
        cls(**{old: value, new: value})


def test_the_released_speculation_of_continuous_tokens_is_named_and_its_settings_are_ignored():
    cls = vargen.ContinuousSpeculativeSampler
    official = {"num_iter": None, "prefill": 0.05, "inner_temperature": 42.0}
    old = {"_class_name": cls.__name__, "mode": "exact", "gamma": 0, "final_noise": False} | official
    assert Sampler.from_config(old) == cls(num_draft_tokens=0, final_noise=False)
    assert cls(**official) == cls().replace(**official) == cls()
    for build in (lambda: cls(mode="official"), lambda: Sampler.from_config(old | {"mode": "official"})):
        with pytest.raises(ValueError, match=r'mode="official".*take mode="exact" or "stepwise"') as error:
            build()
        assert "\n" not in str(error.value)


def test_samplers_swap_like_schedulers():
    jacobi = SpeculativeJacobiSampler(window=8, top_k=3, guidance_scale=4.0)
    plain = NextTokenSampler.from_config(jacobi.config)
    assert plain == NextTokenSampler(top_k=3, guidance_scale=4.0)
    back = SpeculativeJacobiSampler.from_config(plain.config, window=16)
    assert back == jacobi.replace(window=16)
    sampler, unused = NextTokenSampler.from_config(jacobi.config, return_unused_kwargs=True)
    assert sampler == plain
    assert unused == {"window": 8, "rule": "shared-noise", "init": "auto"}


def test_unknown_keys_of_our_own_configuration_raise():
    with pytest.raises(ValueError, match="no setting 'tempreature'; did you mean 'temperature'"):
        NextTokenSampler.from_config({"_class_name": "NextTokenSampler", "tempreature": 1})
    with pytest.raises(ValueError, match="did you mean 'NextTokenSampler'"):
        Sampler.from_config({"_class_name": "NextTokenSmpler"})
    with pytest.raises(ValueError, match="config must be a dictionary"):
        NextTokenSampler.from_config("folder")


def test_the_guarantee_is_declared():
    assert NextTokenSampler().guarantee == SpeculativeJacobiSampler().guarantee == "exact"
    assert {cls.guarantee for cls in known_samplers()} <= {"exact", "relaxed", "heuristic"}


@pytest.mark.parametrize("cls", WINDOW_SAMPLERS)
def test_an_unfitting_backbone_is_named_with_the_samplers_that_fit(cls):
    class Scales:
        features = frozenset({"next_scale"})
        codebook_size = 8

    with pytest.raises(
        ValueError, match=f"{cls.__name__} needs a backbone with ragged, window; Scales offers next_scale"
    ):
        cls().sample(Scales(), torch.zeros(1), seeds=[0])


def test_top_k_beyond_the_codebook_is_refused_before_any_work():
    backbone = TabularBackbone(3)
    with pytest.raises(ValueError, match=r"top_k must be in 0\.\.3, the codebook size, got 4"):
        NextTokenSampler(top_k=4).sample(backbone, torch.tensor([0]), seeds=[0])
    assert backbone.num_forwards == 0


@pytest.mark.parametrize(
    ("seeds", "message"),
    [
        ([1], "2 images, got 1 seeds"),
        ([1, 2.5], "seed must be an integer"),
        ([1, 2**64], "seed must be an integer"),
        (["a", 1], "seed must be an integer"),
    ],
)
def test_bad_seeds_are_refused_before_any_work(seeds, message):
    backbone = TabularBackbone(3)
    with pytest.raises(ValueError, match=message):
        NextTokenSampler().sample(backbone, torch.tensor([0, 1]), seeds=seeds)
    assert backbone.num_forwards == 0


def test_seeds_may_be_a_tensor_or_negative():
    assert check_seeds(torch.tensor([-1, 5]), 2) == [2**64 - 1, 5]
    assert check_seeds(7, 1) == [7]
    assert check_seeds(range(3), 3) == [0, 1, 2]


@pytest.mark.parametrize(
    ("codes", "message"),
    [
        (torch.zeros(3, dtype=torch.int64), r"forced_codes must be \[4\] or \[2, 4\]"),
        (torch.full((4,), 3), r"forced_codes must be in 0\.\.2"),
        (torch.full((4,), -2), r"forced_codes must be in 0\.\.2"),
        (torch.zeros(4), "forced_codes must be integers"),
    ],
)
def test_bad_forced_codes_are_refused_before_any_work(codes, message):
    backbone = TabularBackbone(3)
    with pytest.raises(ValueError, match=message):
        NextTokenSampler().sample(backbone, torch.tensor([0, 1]), seeds=[0, 1], forced_codes=codes)
    assert backbone.num_forwards == 0

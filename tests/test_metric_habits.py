"""What users of torchmetrics write: other dtypes, merging, resetting, results of video distances."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import nn

from vargen.metrics import (
    AttributeAccuracy,
    FrechetDistance,
    FrechetVideoDistance,
    InceptionScore,
    KernelDistance,
    ManifoldPrecisionRecall,
    feature_network,
)
from vargen.metrics.heroes import draw_heroes

pytestmark = pytest.mark.filterwarnings("ignore:.*is biased")


class Linear(nn.Module):
    """A network with weights, so that a change of dtype reaches something."""

    num_features = 4

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.map = nn.Linear(48, 4)

    def forward(self, images: torch.Tensor) -> torch.Tensor:
        return self.map(images.flatten(1)[:, :48] / 8)


def images(count: int, seed: int) -> torch.Tensor:
    return torch.randint(0, 256, (count, 3, 4, 4), generator=torch.Generator().manual_seed(seed), dtype=torch.uint8)


def clips(count: int, seed: int) -> torch.Tensor:
    return images(4 * count, seed).unflatten(0, (count, 4)).transpose(1, 2)


class Images:
    """A metric over two sides of images."""

    def __init__(self, kind: type[Any], **options: Any) -> None:
        self.kind, self.options = kind, options

    def make(self, **more: Any) -> Any:
        body = Linear() if self.kind is FrechetVideoDistance else feature_network(Linear())
        return self.kind(body, **self.options, **more)

    def fill(self, metric: Any, seed: int = 0) -> None:
        draw = clips if self.kind is FrechetVideoDistance else images
        metric.update(draw(20, seed), real=True)
        metric.update(draw(20, seed + 1), real=False)


class Scores(Images):
    def fill(self, metric: Any, seed: int = 0) -> None:
        metric.update(images(20, seed))


class Heroes(Images):
    def make(self, **more: Any) -> Any:
        return AttributeAccuracy(**more)

    def fill(self, metric: Any, seed: int = 0) -> None:
        real = draw_heroes(8, "prompts")
        metric.update(real.images.roll(seed, 0) if seed else real.images, real.attributes, real.visible)


METRICS = {
    "frechet": Images(FrechetDistance),
    "kernel": Images(KernelDistance),
    "manifold": Images(ManifoldPrecisionRecall),
    "video": Images(FrechetVideoDistance, frames=4),
    "score": Scores(InceptionScore, splits=2),
    "attributes": Heroes(AttributeAccuracy),
}


@pytest.fixture(params=METRICS)
def case(request: pytest.FixtureRequest) -> Images:
    return METRICS[request.param]


def value(metric: Any) -> float:
    found = metric.result()
    return float(found.share if isinstance(metric, AttributeAccuracy) else found.value)


def test_every_metric_has_a_result_and_its_value(case: Images) -> None:
    metric = case.make()
    case.fill(metric)
    computed = metric.compute()
    assert value(metric) == float(computed[0] if isinstance(computed, tuple) else computed)


CASTS = {
    "set_dtype float64": lambda metric: metric.set_dtype(torch.float64),
    "set_dtype float16": lambda metric: metric.set_dtype(torch.float16),
    "half": lambda metric: metric.half(),
    "to": lambda metric: metric.to(torch.bfloat16),
    "to cpu": lambda metric: metric.to("cpu"),
}


@pytest.mark.parametrize("cast", CASTS)
def test_a_cast_before_and_between_updates_changes_no_digit(cast: str, case: Images) -> None:
    plain, metric = case.make(), case.make()
    for seed in (0, 2):
        case.fill(plain, seed)
        metric = CASTS[cast](metric)
        case.fill(metric, seed)
    assert value(metric) == value(plain)


@pytest.mark.parametrize("dtype", [torch.float64, torch.float16])
def test_a_network_of_another_precision_measures_in_it_and_has_another_digest(dtype: torch.dtype) -> None:
    network = feature_network(Linear()).to(dtype)
    plain = feature_network(Linear())
    metric = FrechetDistance(network)
    METRICS["frechet"].fill(metric)
    assert metric.compute() > 0
    features = network(images(9, 0))
    assert features.dtype == torch.float32
    torch.testing.assert_close(features, plain(images(9, 0)), rtol=0.02, atol=0.02)
    assert network.digest() != plain.digest()


def test_a_value_computed_before_merging_is_not_kept(case: Images) -> None:
    first, second = case.make(), case.make()
    case.fill(first, 0)
    case.fill(second, 4)
    before = value(first)
    first.merge_state(second)
    wholes = []
    for order in ((0, 4), (4, 0)):  # torchmetrics puts the other metric's images first; seeded draws notice
        whole = case.make()
        for seed in order:
            case.fill(whole, seed)
        wholes.append(pytest.approx(value(whole), rel=1e-12))
    assert value(first) in wholes
    assert value(first) != before


@pytest.mark.parametrize("name", ["frechet", "kernel", "manifold", "video"])
def test_real_images_outlive_a_reset_where_asked(name: str) -> None:
    case = METRICS[name]
    kept, fresh = case.make(reset_real_features=False), case.make()
    for metric in (kept, fresh):
        case.fill(metric)
        value(metric)
        metric.reset()
    draw = clips if name == "video" else images
    kept.update(draw(20, 1), real=False)
    fresh.update(draw(20, 1), real=False)
    again = case.make()
    case.fill(again)
    assert value(kept) == value(again)
    with pytest.raises(ValueError, match="0 real"):
        fresh.compute()
    with pytest.raises(ValueError, match="reset_real_features"):
        case.make(reset_real_features="no")


@pytest.mark.parametrize("size", [0, 1, -3])
def test_a_kernel_distance_needs_subsets_of_two(size: int) -> None:
    with pytest.raises(ValueError, match=f"subset_size must be at least 2, or None .*, got {size}"):
        KernelDistance(feature_network(Linear()), subset_size=size)


def test_a_video_distance_carries_its_protocol() -> None:
    metric = METRICS["video"].make()
    METRICS["video"].fill(metric)
    found = metric.result(floor=1.0).to_dict()
    told = {
        "metric": "FD-Linear",
        "network": "Linear",
        "num_reference": 20,
        "num_generated": 20,
        "frames": 4,
        "cov": "n",
    }
    assert told.items() <= found.items()
    i3d = FrechetVideoDistance("random", frames=9, protocol="nbp")
    i3d.add_features(torch.rand(3, 400), True)
    i3d.add_features(torch.rand(3, 400), False)
    assert i3d.result().resize == "shorter side to 224, centre crop (nbp)"


def test_docstrings_say_that_seeded_draws_depend_on_the_order() -> None:
    for kind in (KernelDistance, InceptionScore):
        assert "order in which images were added" in " ".join(str(kind.__doc__).split())

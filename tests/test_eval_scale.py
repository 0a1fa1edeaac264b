"""Evaluation runs that are killed, shared, damaged or out of disk give the images of an undisturbed run, in flat memory."""

import errno
import json
import math
import multiprocessing
import os
import random
import re
import signal
import subprocess
import sys
import threading
import time
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from torch import nn

from vargen import files
from vargen.evaluation.conditions import class_conditions
from vargen.evaluation.drawing import claims, run_folder
from vargen.evaluation.drawing.claims import Claims
from vargen.evaluation.drawing.generate import generate, ordered_images
from vargen.evaluation.evaluate import compare, evaluate_fid
from vargen.metrics import feature_network
from vargen.metrics.frechet import frechet_error, frechet_infinity, statistics_distance
from vargen.metrics.heroes import HeroImages, draw_heroes
from vargen.metrics.inception_score import split_scores
from vargen.metrics.networks.inception import InceptionBody
from vargen.metrics.statistics import GaussianStatistics
from vargen.outputs import DecodeStats

ROOT = Path(__file__).parents[1]
NUM, CHUNK = 50, 4


class Noise:
    """A pipeline that draws at once: pixels from the image's seed."""

    def __init__(self, side=4, pause=0.0):
        self.side, self.pause, self.num_calls, self.sampler = side, pause, 0, None

    def __call__(self, class_labels, seed, output_type):
        time.sleep(self.pause)
        self.num_calls += 1
        shape = (3, self.side, self.side)
        pixels = np.stack([np.random.default_rng(s).random(shape, dtype=np.float32) for s in seed])
        stats = DecodeStats(num_forwards=7, forwards_per_image=torch.full((len(seed),), 7))
        return SimpleNamespace(images=torch.from_numpy(pixels), stats=stats)


def means(images, _start):
    return images.float().mean((2, 3)).numpy()


def draw(folder, pipe=None, num=NUM, **arguments):
    arguments = {"chunk": CHUNK, "measures": {"means": means}, **arguments}
    return generate(pipe or Noise(), class_conditions(10, num), folder, **arguments)


@pytest.fixture(scope="module")
def calm(tmp_path_factory):
    """Digests of a run that nothing disturbs."""
    return draw(tmp_path_factory.mktemp("calm")).run.digests()


@pytest.fixture(scope="module")
def processes():
    """Processes that start at once, since their server has imported everything already."""
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(["tests.test_eval_scale"])
    return context


def work(folder, pause):
    os._exit(0 if draw(folder, Noise(pause=pause)).run.digests() else 1)


def work_until_killed(folder, num_lines):
    """Draw, and be killed by signal 9 before so many lines of the code that keeps the folder have run."""
    left = iter(range(num_lines))

    def count(_frame, event, _argument):
        if event == "line" and next(left, None) is None:
            os.kill(os.getpid(), signal.SIGKILL)
        return count

    kept = {module.__file__ for module in (run_folder, claims, files, sys.modules[generate.__module__])}
    sys.settrace(lambda frame, _event, _argument: count if frame.f_code.co_filename in kept else None)
    draw(folder, num=4 * NUM)
    os._exit(0)


def leftovers(folder):
    return [p for p in Path(folder).rglob(".*") if p.is_file()]


# --- killed


def test_twenty_kills_at_random_points_leave_the_digests_of_a_calm_run(processes, tmp_path):
    rng, drawn = random.Random(0), []
    for _ in range(20):
        child = processes.Process(target=work_until_killed, args=(tmp_path / "run", rng.randrange(1, 900)))
        child.start()
        child.join(300)
        assert child.exitcode == -signal.SIGKILL
        drawn.append(len(list((tmp_path / "run").glob("chunks/*.json"))))
    assert 0 < drawn[4] < drawn[-1] < NUM  # every kill struck in the middle of the work
    calm = draw(tmp_path / "calm", num=4 * NUM)
    resumed = draw(tmp_path / "run", num=4 * NUM)
    assert resumed.run.digests() == calm.run.digests()
    assert resumed.num_drawn < calm.num_drawn
    assert not list((tmp_path / "run" / "claims").glob("0*"))


@pytest.mark.parametrize("function", ["replace", "link"])
def test_a_kill_between_any_two_renames_leaves_the_digests_of_a_calm_run(calm, tmp_path, monkeypatch, function):
    """The run dies at its first, second, third, ... rename: what it leaves is whole or not there."""

    class Killed(BaseException):
        pass

    real = getattr(os, function)
    for fatal in range(8):
        count = iter(range(1000))

        def die(*arguments, count=count, fatal=fatal):
            if next(count) == fatal:
                raise Killed
            return real(*arguments)

        with monkeypatch.context() as patch:
            patch.setattr(os, function, die)
            try:
                draw(tmp_path / "run")
            except Killed:
                continue
    assert draw(tmp_path / "run").run.digests() == calm


# --- shared


def test_two_processes_share_a_run_and_draw_what_one_draws(calm, processes, tmp_path):
    children = [processes.Process(target=work, args=(tmp_path / "run", 0.02)) for _ in range(2)]
    for child in children:
        child.start()
    for child in children:
        child.join(300)
        assert child.exitcode == 0
    again = draw(tmp_path / "run")
    assert again.num_drawn == 0
    assert again.run.digests() == calm
    assert again.decode_record()["images"] == NUM


def test_chunks_of_a_slow_process_are_waited_for_and_those_of_a_dead_one_drawn(calm, tmp_path, monkeypatch):
    monkeypatch.setattr("vargen.evaluation.drawing.generate._POLL", 0.01)
    folder = tmp_path / "run" / "claims"
    folder.mkdir(parents=True)
    dead = subprocess.Popen([sys.executable, "-c", ""])
    dead.wait()
    owner = {"host": os.uname().nodename, "pid": dead.pid, "started": "1"}
    (folder / "00000004").write_text(json.dumps(owner))  # died without letting go
    (folder / "00000008").write_text("")  # died before it had signed, an hour ago
    os.utime(folder / "00000008", (0, time.time() - 3600))
    pipe, result = Noise(), {}
    with Claims(folder).hold("00000012") as ours:
        assert ours
        thread = threading.Thread(target=lambda: result.update(drawn=draw(tmp_path / "run", pipe)))
        thread.start()
        for _ in range(1000):
            if pipe.num_calls == len(calm) - 1:
                break
            time.sleep(0.01)
        assert pipe.num_calls == len(calm) - 1
        assert thread.is_alive()  # waits for the chunk that we hold
    thread.join(60)
    assert result["drawn"].run.digests() == calm


def test_a_process_that_hangs_ends_the_wait_with_one_line(tmp_path, monkeypatch):
    monkeypatch.setattr("vargen.evaluation.drawing.generate._POLL", 0.01)
    folder = tmp_path / "run" / "claims"
    folder.mkdir(parents=True)
    (folder / "00000008").write_text(json.dumps({"host": "elsewhere", "pid": 12, "started": "3"}))
    with pytest.raises(
        ValueError, match=r"nothing was finished .* process 12 on elsewhere draws the images from 8"
    ) as error:
        draw(tmp_path / "run", timeout=0.05)
    assert "\n" not in str(error.value)
    assert len(list((tmp_path / "run" / "chunks").iterdir())) == math.ceil(NUM / CHUNK) - 1


def test_a_silent_claim_of_another_machine_is_free_after_a_while(tmp_path, monkeypatch):
    held = Claims(tmp_path / "claims", stale_after=0.2)
    path = tmp_path / "claims" / "a"
    path.write_text(json.dumps({"host": "elsewhere", "pid": 12, "started": "3"}))
    with held.hold("a") as ours:
        assert not ours
    time.sleep(0.3)
    with held.hold("a") as ours:
        assert ours
        monkeypatch.setattr(claims.socket, "gethostname", lambda: "third")
        time.sleep(0.5)  # heartbeats keep it
        with held.hold("a") as theirs:
            assert not theirs
    assert not path.exists()


@pytest.mark.slow
def test_launched_processes_give_the_report_of_one(tmp_path):
    pytest.importorskip("timm")
    from tests.tiny import NUM_CLASSES, tiny_pipeline

    tiny_pipeline().save_pretrained(tmp_path / "model")
    np.savez(tmp_path / "real.npz", np.random.default_rng(0).integers(0, 256, (9, 8, 8, 3), dtype=np.uint8))
    command = ["-m", "vargen", "eval", "fid", "-m", str(tmp_path / "model"), "--classes", str(NUM_CLASSES), "-n", "9"]
    command += ["--reference", str(tmp_path / "real.npz"), "--tap", "low", "--device", "cpu"]
    environment = {**os.environ, "PYTHONPATH": str(ROOT), "XDG_CACHE_HOME": str(tmp_path), "OMP_NUM_THREADS": "1"}
    launch = ["-m", "torch.distributed.run", "--nproc_per_node", "2", "--master_port", "29631"]
    for name, start in (("one", []), ("two", launch)):
        subprocess.run([sys.executable, *start, *command, "--out", str(tmp_path / name)], check=True, env=environment)
    one, two = (json.loads((tmp_path / name / "report.json").read_text()) for name in ("one", "two"))
    assert one["protocol"] == two["protocol"]
    assert one["results"] == two["results"]


# --- damaged


def test_a_damaged_chunk_is_found_and_drawn_again_and_no_other(calm, tmp_path):
    first = draw(tmp_path / "run")
    damages = {
        "images/00000004.npy": lambda data: data[:-1] + bytes([data[-1] ^ 1]),
        "images/00000008.npy": lambda data: data[: len(data) // 2],
        "measured/means/00000012.npy": lambda data: data[:-4] + b"\0\0\0\1",
        "chunks/00000016.json": lambda data: data[:20],
        "chunks/00000020.json": lambda _: b"[]",
        "images/00000024.npy": lambda _: None,
    }
    for name, damage in damages.items():
        path = tmp_path / "run" / name
        changed = damage(path.read_bytes())
        path.unlink() if changed is None else path.write_bytes(changed)
    pipe = Noise()
    again = draw(tmp_path / "run", pipe)
    assert pipe.num_calls == len(damages)
    assert again.run.digests() == first.run.digests() == calm
    assert np.array_equal(again.measured("means"), first.measured("means"))
    assert draw(tmp_path / "run").num_drawn == 0


def test_images_without_a_measurement_are_measured_and_not_drawn_again(tmp_path):
    draw(tmp_path / "run", measures={})
    pipe = Noise()
    second = draw(tmp_path / "run", pipe)
    assert pipe.num_calls == 0
    images = ordered_images(tmp_path / "run")
    assert np.allclose(second.measured("means"), images.float().mean((2, 3)).numpy())
    assert second.measured("means").shape == (NUM, 3)


def test_without_images_only_the_first_chunk_and_the_measurements_are_kept(calm, tmp_path):
    drawn = draw(tmp_path / "run", keep_images=False)
    assert drawn.run.digests() == calm
    assert len(list((tmp_path / "run" / "images").iterdir())) == 1
    pipe = Noise()
    assert np.array_equal(draw(tmp_path / "run", pipe, keep_images=False).measured("means"), drawn.measured("means"))
    assert pipe.num_calls == 0
    draw(tmp_path / "run", pipe, keep_images=False, measures={"other": means})  # nothing to measure it on
    assert pipe.num_calls == len(calm) - 1
    with pytest.raises(ValueError, match=r"another run .different keep_images"):
        draw(tmp_path / "run")
    with pytest.raises(ValueError, match="4 of 50 images: finish the run first"):
        ordered_images(tmp_path / "run")


# --- out of disk


def test_a_full_disk_is_one_line_and_nothing_is_damaged(calm, tmp_path, monkeypatch):
    count, header = iter(range(1000)), np.lib.format.write_array_header_1_0

    def full(stream, fields):
        if next(count) >= 7:
            stream.write(b"half a head")
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
        header(stream, fields)

    with monkeypatch.context() as patch:
        patch.setattr(run_folder.np.lib.format, "write_array_header_1_0", full)
        with pytest.raises(ValueError, match=r"No space left on device; 12 of 50 images are kept: make room") as error:
            draw(tmp_path / "run")
    assert "\n" not in str(error.value)
    assert not leftovers(tmp_path / "run")
    pipe = Noise()
    assert draw(tmp_path / "run", pipe).run.digests() == calm
    assert pipe.num_calls == len(calm) - 3


@pytest.mark.skipif(not hasattr(os, "geteuid") or os.geteuid() != 0, reason="mounting a small disk needs root")
def test_a_small_disk_fills_up_and_the_run_goes_on_elsewhere(tmp_path):
    disk = tmp_path / "disk"
    disk.mkdir()
    made = subprocess.run(["mount", "-t", "tmpfs", "-o", "size=256k", "tmpfs", str(disk)], capture_output=True)
    if made.returncode:
        pytest.skip("mounting is not allowed here")
    try:
        with pytest.raises(ValueError, match=r"No space left on device; .* of 60 images are kept"):
            draw(disk / "run", Noise(side=64), num=60)
        kept = len(list((disk / "run" / "chunks").iterdir()))
        assert 0 < kept < 15
        subprocess.run(["mount", "-o", "remount,size=4m", str(disk)], check=True)
        pipe = Noise(side=64)
        resumed = draw(disk / "run", pipe, num=60)
        assert pipe.num_calls == 15 - kept
        assert resumed.run.digests() == draw(tmp_path / "other", Noise(side=64), num=60).run.digests()
    finally:
        subprocess.run(["umount", str(disk)], check=True)


# --- memory


class Pool(nn.Module):
    num_features = 192

    def forward(self, images):
        return nn.functional.adaptive_avg_pool2d(images, 8).flatten(1)


class Hoarder(Noise):
    """Keeps every picture that it drew."""

    def __call__(self, **arguments):
        output = super().__call__(**arguments)
        self.kept = [*getattr(self, "kept", []), (output.images * 255).to(torch.uint8)]
        return output


def peak_memory(folder, num, pipe, queue):
    """Put by how many KiB the process grew, pages of mapped files left out: the system takes those back at any time."""
    network, seen = feature_network(Pool()), []
    threading.Thread(
        target=lambda: [seen.append(own_memory()) or time.sleep(0.005) for _ in iter(int, 1)], daemon=True
    ).start()
    before = own_memory()
    arguments = {
        "reference": folder.parent / "moments.npz",
        "network": network,
        "conditions": class_conditions(10, num),
    }
    report = evaluate_fid(pipe, folder, num=num, infinity=True, interval=True, **arguments)
    queue.put((max(seen) - before, report.results[0]["value"]))


def own_memory():
    return int(re.search(r"RssAnon:\s+(\d+)", Path("/proc/self/status").read_text())[1])


@pytest.mark.slow
@pytest.mark.skipif(not Path("/proc/self/status").exists(), reason="reads the memory of a process from /proc")
def test_memory_does_not_grow_with_the_number_of_images(processes, tmp_path):
    features = torch.randn(500, 192, generator=torch.Generator().manual_seed(0))
    GaussianStatistics.from_features(features).save(tmp_path / "moments.npz")
    grown = {}
    for name, num, pipe in (("few", 1000, Noise(16)), ("many", 50_000, Noise(16)), ("hoarded", 50_000, Hoarder(16))):
        queue = processes.Queue()
        child = processes.Process(target=peak_memory, args=(tmp_path / name, num, pipe, queue))
        child.start()
        grown[name], value = queue.get(timeout=900)
        child.join(60)
        assert math.isfinite(value)
    # The pixels of 50,000 images are 37 MiB and so are their features. Seeds, labels, permutations and records are 4 MiB; the
    # interpreter's table of names, which may double for the names of 2,300 files, 8 MiB.
    assert grown["many"] - grown["few"] < 28 * 1024 < grown["hoarded"] - grown["few"], grown


# --- numbers


def test_streamed_split_scores_are_those_of_the_formula():
    logits = torch.randn(2307, 11, generator=torch.Generator().manual_seed(0)).double() * 2
    order = torch.randperm(len(logits), generator=torch.Generator().manual_seed(4))
    expected = []
    for split in logits[order].softmax(1).tensor_split(7):
        marginal = split.mean(0)
        expected.append((split * (split / marginal).log()).sum(1).mean().exp())
    torch.testing.assert_close(split_scores(logits, 7, 4), torch.stack(expected), rtol=1e-12, atol=0)


def test_the_standard_error_is_the_spread_of_independent_sets():
    generator = torch.Generator().manual_seed(0)
    mix = torch.randn(4, 4, generator=generator)
    reference = GaussianStatistics.from_features(torch.randn(20_000, 4, generator=generator) @ mix + 0.2)
    sets = [torch.randn(400, 4, generator=generator) @ mix for _ in range(60)]
    spread = np.std([statistics_distance(GaussianStatistics.from_features(x), reference) for x in sets], ddof=1)
    errors = [frechet_error(x, reference) for x in sets]
    assert 0.75 < np.mean(errors) / spread < 1.35  # the spread of 60 sets is itself known to 9 % only
    with pytest.raises(ValueError, match="at least 40 images, got 39"):
        frechet_error(sets[0][:39], reference)


def test_features_on_disk_give_the_numbers_of_features_in_memory(tmp_path):
    generator = torch.Generator().manual_seed(1)
    features, other = torch.randn(2, 5000, 6, generator=generator)
    np.save(tmp_path / "f.npy", features.numpy())
    stored = torch.from_numpy(np.load(tmp_path / "f.npy", mmap_mode="c"))
    reference = GaussianStatistics.from_features(other)
    assert frechet_infinity(stored, reference) == frechet_infinity(features, reference)
    assert frechet_error(stored, reference) == frechet_error(features, reference)
    sums, whole = GaussianStatistics.from_features(stored), features.double()
    assert torch.allclose(sums.outer, whole.T @ whole, rtol=1e-12)
    rows = torch.tensor([3, 1, 4])
    assert torch.allclose(sums.without(GaussianStatistics.from_features(stored, rows)).total,
                          whole.sum(0) - whole[rows].sum(0))  # fmt: skip


def test_hero_images_are_the_drawn_heroes():
    heroes = draw_heroes(70, "floor").images
    lazy = HeroImages(70, "floor")
    assert torch.equal(torch.cat(list(lazy.batches(32))), heroes)
    assert lazy.digest() == HeroImages(70, "floor").digest()
    assert len({lazy.digest(), HeroImages(71, "floor").digest(), HeroImages(70, "reference").digest()}) == 3


def test_the_spatial_layer_is_the_first_seven_channels_before_the_last_blocks():
    torch.manual_seed(0)
    body = InceptionBody(tap="spatial").eval()
    kept = {}
    body.network.Mixed_6d.branch1x1.register_forward_hook(lambda _m, _i, output: kept.update(branch=output))
    with torch.no_grad():
        features = body(torch.rand(2, 3, 32, 32) * 255)
    assert features.shape == (2, 2023)
    assert torch.equal(features.view(2, 7, 17, 17), kept["branch"][:, :7])


def test_a_run_folder_is_an_image_set_and_reports_intervals(tmp_path):
    draw(tmp_path / "a", num=90)
    draw(tmp_path / "b", num=90, seed=500)
    network = feature_network(Pool())
    report = compare(tmp_path / "a", tmp_path / "b", network=network, infinity=True, interval=True)
    row = report.results[0]
    assert row["error"] > 0
    assert row["infinity_error"] > 0
    assert math.isfinite(row["infinity"])
    report.write(tmp_path / "report")
    assert "95 % interval" in (tmp_path / "report" / "report.md").read_text()

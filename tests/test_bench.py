"""`vargen bench`: every number of the table comes from a run, ratios are to the first row, a stopped bench goes on."""

import json

import numpy as np
import pytest
from torch import nn
from typer.testing import CliRunner

from tests.tiny import NUM_CLASSES, tiny_pipeline
from vargen.cli.main import app
from vargen.evaluation.benchmark import read_sampler
from vargen.evaluation.conditions import class_conditions
from vargen.metrics import bench, bench_table, feature_network, read_bench


class Means(nn.Module):
    num_features = 12

    def forward(self, images):
        return nn.functional.adaptive_avg_pool2d(images, 2).flatten(1)


@pytest.fixture(scope="module")
def pipe():
    return tiny_pipeline()


@pytest.fixture(scope="module")
def real(tmp_path_factory):
    path = tmp_path_factory.mktemp("real") / "real.npz"
    np.savez(path, np.random.default_rng(0).integers(0, 256, (12, 8, 8, 3), dtype=np.uint8))
    return path


def run(pipe, out, real, **arguments):
    arguments = {
        "samplers": ["next-token", "jacobi:window=4"],
        "num": 6,
        "repeats": 1,
        "batch_sizes": (2, 1),
        **arguments,
    }
    shared = {"conditions": class_conditions(NUM_CLASSES, 6), "reference": real, "network": feature_network(Means())}
    return bench(pipe, out, model="tiny", **shared, **arguments)


def test_rows_hold_what_was_measured(pipe, real, tmp_path):
    own = pipe.sampler
    report = run(pipe, tmp_path / "out", real)
    first, second = report.rows
    assert pipe.sampler is own
    assert (first.name, second.name) == ("next-token", "jacobi:window=4")
    assert first.forwards == pipe.backbone.num_codes
    assert second.forwards < first.forwards
    assert second.sampler["window"] == 4
    assert first.distance == second.distance  # shared noise: the very same images
    assert first.metric == "FD-Means-12"
    assert first.guarantee == second.guarantee == "exact"
    assert {1, 2} == first.seconds.keys() == second.seconds.keys()
    assert all(value > 0 for row in report.rows for value in row.seconds.values())
    assert read_bench(tmp_path / "out") == report
    page = (tmp_path / "out" / "bench.md").read_text()
    assert f"| {first.forwards / second.forwards:.1f}x |" in page
    assert "| 1.0x |" in page
    assert (tmp_path / "out" / "bench.png").stat().st_size > 5000
    before = sorted((tmp_path / "out" / "runs").rglob("*.npy"))
    run(pipe, tmp_path / "out", real)  # goes on where it was: nothing is drawn again
    assert sorted((tmp_path / "out" / "runs").rglob("*.npy")) == before


def test_times_alone_need_no_reference(pipe, tmp_path):
    report = bench(pipe, tmp_path / "out", conditions=class_conditions(3, 2), num=0, repeats=1, batch_sizes=[1])
    assert "next-token" in [row.name for row in report.rows]
    assert "draft-model" in report.skipped  # the pipeline has no drafter
    assert "draft-model" in (tmp_path / "out" / "bench.md").read_text()
    assert all(row.distance is None for row in report.rows)
    lines = bench_table([report, report])
    assert len(lines) == 2 + 2 * len(report.rows)
    assert len({line.count("|") for line in lines}) == 1


def test_bad_requests_are_one_line(pipe, real, tmp_path):
    for arguments, message in (
        ({"samplers": ["jacoby"]}, "unknown sampler 'jacoby'"),
        ({"samplers": ["next-scale"]}, "does not fit LlamaGenTransformer"),
        ({"samplers": ["draft-model"]}, "drafter"),
        ({"samplers": ["jacobi:window"]}, "name=value"),
        ({"batch_sizes": [0]}, "at least 1"),
        ({"num": 1}, "num must be 0 or at least 2"),
    ):
        with pytest.raises(ValueError, match=message) as error:
            run(pipe, tmp_path / "out", real, **arguments)
        assert "\n" not in str(error.value)
    assert not (tmp_path / "out").exists()
    (tmp_path / "bench.json").write_text(json.dumps({"rows": []}))
    with pytest.raises(ValueError, match="not a report of vargen bench"):
        read_bench(tmp_path)


def test_settings_are_read_from_the_name(pipe):
    sampler = read_sampler("jacobi:window=5,carry=maximal", pipe)
    assert (sampler.window, sampler.rule) == (5, "maximal")


def test_command_prints_a_table_of_reports(pipe, real, tmp_path):
    run(pipe, tmp_path / "a", real, num=0)
    result = CliRunner().invoke(app, ["bench", "--table", str(tmp_path / "a"), "--table", str(tmp_path / "a")])
    assert result.exit_code == 0, result.output
    assert result.output.count("| tiny | next-token |") == 2
    refused = CliRunner().invoke(app, ["bench"])
    assert refused.exit_code == 2
    assert "name a folder" in refused.stderr

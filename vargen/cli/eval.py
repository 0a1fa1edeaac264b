"""`vargen eval`: quality of models, tokenizers and image folders."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Any

import typer

from vargen.cli import _common

DEFAULT_MODEL = "heroes32-llamagen"

app = typer.Typer(
    help="Measure quality: distances to real images, reconstruction, prompt adherence, likelihood.",
    no_args_is_help=True,
    rich_markup_mode=None,
)

Network = Annotated[str, typer.Option(help="Feature network: lite0 or inception.")]
Tap = Annotated[str | None, typer.Option(help="Layer: lite0 low, mid, pool, logits; inception 64, 192, 768, 2048.")]
Weights = Annotated[Path | None, typer.Option(help="Weights of the feature network; never downloaded.")]
Rounding = Annotated[str, typer.Option(help="How pixels become 8 bits: nearest, llamagen or truncate.")]
Infinity = Annotated[bool, typer.Option("--infinity", help="Also extrapolate to infinitely many images.")]
Interval = Annotated[bool, typer.Option("--interval", help="Also compute a 95 % interval of the distance.")]
Rotate = Annotated[
    bool, typer.Option("--exif-rotation", help="Folders: apply EXIF rotation; the field's habit is not to.")
]
Background = Annotated[str | None, typer.Option(help="Folders: colour behind transparent pixels: white, #ffffff, ...")]
Score = Annotated[bool, typer.Option("--inception-score", help="Also compute the score from the network's logits.")]


@app.command("fid")
@_common.one_line_errors
def fid(
    out: Annotated[Path, typer.Option("-o", "--out", help="Folder for samples and report; a stopped run goes on.")],
    model: _common.Model = DEFAULT_MODEL,
    sampler: Annotated[str | None, typer.Option("-s", "--sampler", help="Sampler; default: the model's own.")] = None,
    settings: Annotated[
        list[str] | None, typer.Option("--set", metavar="NAME=VALUE", help="Sampler setting; repeatable.")
    ] = None,
    num: Annotated[int, typer.Option("-n", "--num", help="Images to draw.")] = 2000,
    reference: Annotated[str, typer.Option(help="heroes, a folder, or an npz (images, or mu and sigma).")] = "heroes",
    prompts: Annotated[Path | None, typer.Option(help="File with one prompt a line, used in turn.")] = None,
    classes: Annotated[int | None, typer.Option(help="Number of classes, used in turn.")] = None,
    held_out: Annotated[bool, typer.Option("--held-out", help="Heroes: only pairs never seen in training.")] = False,
    full_captions: Annotated[
        bool, typer.Option("--full-captions", help="Heroes: captions also say which slots are empty.")
    ] = False,
    network: Network = "lite0",
    tap: Tap = None,
    weights: Weights = None,
    seed: Annotated[int, typer.Option(help="Image i uses seed + i.")] = 0,
    rounding: Rounding = "nearest",
    infinity: Infinity = False,
    interval: Interval = False,
    inception_score: Score = False,
    no_images: Annotated[bool, typer.Option("--no-images", help="Keep features and digests, not the images.")] = False,
    npz: Annotated[bool, typer.Option("--npz", help="Also write samples.npz for ADM's evaluator.")] = False,
    exif_rotation: Rotate = False,
    background: Background = None,
    timeout: Annotated[float, typer.Option(help="Seconds to wait for a process that hangs.")] = 1800.0,
    device: _common.Device = None,
    dtype: _common.Dtype = "float32",
) -> None:
    """Draw images and compare them with real ones.

    Start it under accelerate launch or torchrun, or several times on one folder, and the processes share the work; kill
    it at any point, and the same command goes on. The images do not depend on either.

    \b
    Examples:
      vargen eval fid --model heroes32-llamagen --num 2000 --out eval-heroes
      vargen eval fid --sampler jacobi --set window=16 --out eval-jacobi
      accelerate launch --num_processes 8 -m vargen eval fid --num 50000 --out eval-50k
      vargen eval fid -m ./llamagen-b --classes 1000 -n 50000 --reference stats.npz --network inception --out eval-c2i
    """
    from vargen.evaluation import conditions as given
    from vargen.evaluation.drawing.generate import MAX_TIMEOUT
    from vargen.evaluation.evaluate import evaluate_fid

    _check_counts(num, classes)
    _common.check_number("--timeout", timeout, 0.001, MAX_TIMEOUT)
    if prompts is not None and classes is not None:
        raise ValueError("give either --prompts or --classes, got both")
    if (held_out or full_captions) and (prompts is not None or classes is not None):
        option = "--held-out" if held_out else "--full-captions"
        raise ValueError(f"{option} draws its own captions; leave --prompts and --classes out")
    chosen = None
    if prompts is not None:
        chosen = given.prompt_file(prompts, num)
    elif classes is not None:
        chosen = given.class_conditions(classes, num)
    elif held_out or full_captions:
        chosen = given.hero_conditions(num, held_out=held_out, full=full_captions)
    features = open_network(network, weights, tap, device)
    pipe = open_pipeline(model, sampler, device, dtype)
    with _common.progress() as progress:
        report = evaluate_fid(
            pipe,
            out,
            num=num,
            reference=_images(reference, exif_rotation, background),
            conditions=chosen,
            network=features,
            seed=seed,
            rounding=rounding,  # type: ignore[arg-type]
            settings=_common.read_settings(settings or []),
            model=model,
            infinity=infinity,
            interval=interval,
            inception_score=inception_score,
            keep_images=not no_images,
            npz=npz,
            timeout=timeout,
            progress=progress,
        )
    if report is not None:
        _show(report, out)


@app.command("compare")
@_common.one_line_errors
def compare(
    a: Annotated[Path, typer.Argument(metavar="A", help="Folder or npz of images.")],
    b: Annotated[Path, typer.Argument(metavar="B", help="Reference: folder, npz of images, or npz of mu and sigma.")],
    out: Annotated[Path | None, typer.Option("-o", "--out", help="Folder for the report.")] = None,
    network: Network = "lite0",
    tap: Tap = None,
    weights: Weights = None,
    infinity: Infinity = False,
    interval: Interval = False,
    inception_score: Score = False,
    exif_rotation: Rotate = False,
    background: Background = None,
    device: _common.Device = None,
) -> None:
    """Compare two image sets.

    \b
    Examples:
      vargen eval compare samples/ real/
      vargen eval compare samples.npz VIRTUAL_imagenet256_labeled.npz --network inception
    """
    from vargen.evaluation.evaluate import compare as run

    with _common.progress() as progress:
        report = run(
            _images(a, exif_rotation, background),
            _images(b, exif_rotation, background),
            network=open_network(network, weights, tap, device),
            infinity=infinity,
            interval=interval,
            inception_score=inception_score,
            progress=progress,
        )
    if out is not None:
        report.write(out)
    _show(report, out)


@app.command("reconstruction")
@_common.one_line_errors
def reconstruction(
    model: _common.Model = DEFAULT_MODEL,
    out: Annotated[Path | None, typer.Option("-o", "--out", help="Folder for report and sheet.")] = None,
    num: Annotated[int, typer.Option("-n", "--num", help="Images.")] = 2000,
    reference: Annotated[str, typer.Option(help="heroes, a folder, or an npz.")] = "heroes",
    network: Network = "lite0",
    tap: Tap = None,
    weights: Weights = None,
    rounding: Rounding = "nearest",
    exif_rotation: Rotate = False,
    background: Background = None,
    device: _common.Device = None,
) -> None:
    """Encode and decode real images: PSNR and rFD of a model's tokenizer."""
    from vargen.evaluation.reconstruction import evaluate_reconstruction

    _check_counts(num)
    features = open_network(network, weights, tap, device)
    tokenizer = open_pipeline(model, None, device).tokenizer
    with _common.progress() as progress:
        report = evaluate_reconstruction(
            tokenizer,
            out,
            num=num,
            reference=_images(reference, exif_rotation, background),
            network=features,
            rounding=rounding,  # type: ignore[arg-type]
            model=model,
            progress=progress,
        )
    _show(report, out)


@app.command("likelihood")
@_common.one_line_errors
def likelihood(
    model: _common.Model = DEFAULT_MODEL,
    out: Annotated[Path | None, typer.Option("-o", "--out", help="Folder for the report.")] = None,
    num: Annotated[int, typer.Option("-n", "--num", help="Heroes of each kind.")] = 512,
    device: _common.Device = None,
) -> None:
    """Score fresh heroes: nats per token of a causal or next-scale model."""
    from vargen.evaluation.likelihood import evaluate_likelihood

    _check_counts(num)
    pipe = open_pipeline(model, None, device)
    with _common.progress() as progress:
        report = evaluate_likelihood(pipe, out, num=num, model=model, progress=progress)
    _show(report, out)


@app.command("card")
@_common.one_line_errors
def card(
    results: Annotated[list[Path], typer.Argument(metavar="REPORT...", help="report.json files, or their folders.")],
    model: _common.Model = DEFAULT_MODEL,
    recipe: Annotated[Path | None, typer.Option(help="Training recipe; default: the record beside the model.")] = None,
) -> None:
    """Write a model's README.md from reports."""
    from vargen.evaluation.card import write_card

    _common.say(write_card(model, [*results], recipe=recipe))


@app.command("classifier")
@_common.one_line_errors
def classifier(
    out: Annotated[Path | None, typer.Option("-o", "--out", help="Folder; default: the shipped classifier.")] = None,
    steps: Annotated[int, typer.Option(help="Optimiser steps of 128 fresh heroes.")] = 3000,
    seed: Annotated[int, typer.Option(help="Of heroes, weights and noise.")] = 0,
) -> None:
    """Train the hero classifier that attribute accuracy is measured with (ten minutes on one core)."""
    from vargen.metrics.attribute_accuracy import accuracy_on_real_heroes
    from vargen.metrics.networks.attributes import CLASSIFIER_FOLDER, train_classifier

    _common.check_number("--steps", steps, 1, 10**6)
    _common.check_number("--seed", seed, 0, 2**63 - 1)
    with _common.progress() as progress:
        model = train_classifier(
            num_steps=steps, seed=seed, on_step=lambda step, loss: progress(f"loss {loss:.3f}", step, steps)
        )
    model.half().float()  # measured as it is stored
    model.real_accuracy = accuracy_on_real_heroes(model)
    folder = out or CLASSIFIER_FOLDER
    model.save_pretrained(folder)
    _common.say(f"{folder}: " + ", ".join(f"{slot} {value:.1%}" for slot, value in model.real_accuracy.items()))


def _images(source: str | Path, rotate: bool, background: str | None) -> Any:
    """A folder read as the options say; anything else as it is."""
    from vargen.evaluation.images import read_images

    plain = not rotate and background is None
    return source if plain or not Path(source).is_dir() else read_images(source, rotate=rotate, background=background)


def _check_counts(num: int, classes: int | None = None) -> None:
    """Raise ``ValueError`` before a network or a model is loaded."""
    from vargen.evaluation.conditions import MAX_IMAGES

    _common.check_number("--num", num, 2, MAX_IMAGES)
    _common.check_number("--classes", classes, 1, 10**9)


def open_network(network: str, weights: Path | None, tap: str | None, device: str | None) -> Any:
    """The network whose features a command measures in."""
    from vargen.metrics.networks.registry import feature_network

    where = _common.pick_device(device)  # checked before anything is loaded
    return feature_network(network, weights, tap=tap).to(where)


def open_pipeline(model: str, sampler: str | None, device: str | None, dtype: str = "float32") -> Any:
    """The pipeline that a command draws with, its sampler swapped where one is named."""
    from diffusers.utils import logging

    from vargen.pipelines.image import ImagePipeline
    from vargen.registry import swap_sampler

    where = _common.pick_device(device)
    logging.disable_progress_bar()
    pipe = ImagePipeline.from_pretrained(model, torch_dtype=_common.pick_dtype(dtype)).to(where)
    pipe.set_progress_bar_config(disable=True)
    if sampler is not None:
        pipe.sampler = swap_sampler(pipe.sampler, sampler, pipe.backbone)
    return pipe


def _show(report: Any, out: Path | None) -> None:
    from vargen.evaluation.report import markdown

    _common.show_markdown(markdown(report.to_dict(), has_grid=False))
    if out is not None:
        _common.say(f"report: {out / 'report.md'}")

"""`vargen generate`: images from prompts or class labels."""

from __future__ import annotations

import json
import time
from pathlib import Path
from typing import Annotated, Any

import typer

import vargen
from vargen.cli import _common, _drawing

DEFAULT_MODEL = "heroes32-llamagen"


@_common.one_line_errors
def generate(
    prompts: Annotated[
        list[str] | None, typer.Argument(metavar="PROMPT...", help="What to draw, one text an image set.")
    ] = None,
    num_images: Annotated[int, typer.Option("-n", "--num-images", help="Images of each prompt.")] = 1,
    model: _common.Model = DEFAULT_MODEL,
    class_label: _drawing.ClassLabels = None,
    sampler: Annotated[
        str | None, typer.Option("-s", "--sampler", help="Sampler, see `vargen models`; default: the model's own.")
    ] = None,
    settings: _drawing.Settings = None,
    seed: Annotated[int | None, typer.Option(help="Image i uses seed + i; default: drawn, and shown.")] = None,
    guidance_scale: _drawing.Guidance = None,
    temperature: _drawing.Temperature = None,
    top_k: _drawing.TopK = None,
    top_p: _drawing.TopP = None,
    output: Annotated[
        Path | None,
        typer.Option("-o", "--output", help="File for the grid (out.png), or folder with --separate (out)."),
    ] = None,
    separate: Annotated[bool, typer.Option("--separate", help="One PNG an image instead of a grid.")] = False,
    columns: Annotated[int | None, typer.Option(help="Images in a row of the grid.")] = None,
    scale: _drawing.Scale = None,
    labels: Annotated[
        bool, typer.Option("--labels", help="Write prompt and seed under every image of the grid.")
    ] = False,
    overwrite: _drawing.Overwrite = False,
    batch_size: Annotated[
        int | None, typer.Option(help="Images decoded at a time; the images do not depend on it.")
    ] = None,
    device: _common.Device = None,
    dtype: _common.Dtype = "float32",
    threads: _drawing.Threads = None,
) -> None:
    """Draw images from prompts or class labels.

    Every PNG carries its prompts, seeds and settings in its text fields.

    \b
    Examples:
      vargen generate "deep elf with a red cloak, wizard hat and great sword" -n 16 --seed 7 -o heroes.png
      vargen generate "minotaur" "mermaid with a trident" -n 4 --labels
      vargen generate "orc" -n 64 --sampler jacobi --set window=16 --separate -o orcs
      vargen generate -m ./llamagen-b --class-label 207 --class-label 360 -g 4 --top-k 2000
    """
    target = output or Path("out" if separate else "out.png")
    _check(prompts, class_label, target, separate, overwrite)
    sets = len(prompts or class_label or [])
    _drawing.check_numbers(num_images, sets, batch_size, columns, scale, threads)
    overrides = _common.read_settings(settings or [])
    start = time.perf_counter()
    pipe = _load(model, sampler, device, dtype)
    shared = {"guidance_scale": guidance_scale, "temperature": temperature, "top_k": top_k, "top_p": top_p}
    changes = _drawing.merge_settings(pipe, overrides, **shared)
    _check_sheet(pipe, num_images * sets, separate, columns, scale, labels)
    _drawing.set_threads(pipe, threads)
    loaded = time.perf_counter()
    result = pipe(
        prompt=list(prompts) if prompts else None,
        class_labels=[_drawing.read_label(text) for text in class_label] if class_label else None,
        num_images_per_prompt=num_images,
        seed=seed,
        batch_size=batch_size,
        **changes,
    )
    seconds = time.perf_counter() - loaded
    used = pipe.sampler.replace(**changes)
    named = [text for text in (prompts or class_label or []) for _ in range(num_images)]
    record = {"vargen": vargen.__version__, "model": model, "sampler": type(used).__name__, "settings": _plain(used)}
    if separate:
        _write_each(target, result, named, record, scale, overwrite)
    else:
        _write_grid(target, result, named, record, columns, scale, labels, overwrite)
    _drawing.print_table(result, target, used, seconds, loaded - start)


def _check(
    prompts: list[str] | None,
    class_label: list[str] | None,
    target: Path,
    separate: bool,
    overwrite: bool,
) -> None:
    if bool(prompts) == bool(class_label):
        raise ValueError(
            f"give prompts or --class-label, got {'both' if prompts else 'neither'}; see vargen generate --help"
        )
    if not separate and target.suffix.lower() != ".png":
        raise ValueError(f"the output must be a .png file, got {target}; add --separate for a folder of images")
    _common.check_output(target, overwrite=overwrite, folder=separate)


def _check_sheet(pipe: Any, count: int, separate: bool, columns: int | None, scale: int | None, labels: bool) -> None:
    """Raise ``ValueError`` for a sheet that is too large, before the images on it are drawn."""
    from vargen.pipelines.grid import sheet_size

    size = _drawing.picture_size(pipe)
    if size is not None and not separate:
        sheet_size(count, size, columns, scale, labels)
    elif size is not None:
        sheet_size(1, size, scale=scale or 1)


def _load(model: str, sampler: str | None, device: str | None, dtype: str) -> Any:
    from vargen.pipelines.image import ImagePipeline
    from vargen.registry import sampler_class, swap_sampler

    if sampler is not None:
        sampler_class(sampler)  # an unknown name fails before the model is read
    pipe = _drawing.load_pipeline(ImagePipeline, model, device, dtype)
    if sampler is not None:
        pipe.sampler = swap_sampler(pipe.sampler, sampler, pipe.backbone)
    return pipe


def _plain(sampler: Any) -> dict[str, Any]:
    return {name: value for name, value in sampler.config.items() if not name.startswith("_")}


def _metadata(record: dict[str, Any]) -> Any:
    from PIL.PngImagePlugin import PngInfo

    info = PngInfo()
    for name, value in record.items():
        info.add_text(name, value if isinstance(value, str) else json.dumps(value))
    return info


def _write_grid(
    target: Path,
    result: Any,
    named: list[str],
    record: dict[str, Any],
    columns: int | None,
    scale: int | None,
    labels: bool,
    overwrite: bool,
) -> None:
    from vargen.files import atomic_write
    from vargen.pipelines.grid import image_grid

    texts = [f"{text} #{seed}" for text, seed in zip(named, result.seeds, strict=True)] if labels else None
    sheet = image_grid(result.images, columns, scale, texts)
    info = _metadata({**record, "prompts": list(dict.fromkeys(named)), "seeds": result.seeds})
    with atomic_write(target, overwrite=overwrite) as beside:
        sheet.save(beside, pnginfo=info)


def _write_each(
    folder: Path, result: Any, named: list[str], record: dict[str, Any], scale: int | None, overwrite: bool
) -> None:
    from PIL import Image

    from vargen.files import atomic_dir, writing

    with atomic_dir(folder, overwrite=overwrite) as beside:
        for index, (image, text, seed) in enumerate(zip(result.images, named, result.seeds, strict=True)):
            factor = scale or 1
            large = image.resize((image.width * factor, image.height * factor), Image.Resampling.NEAREST)
            info = _metadata({**record, "prompt": text, "seed": seed})
            file = beside / f"{index:04d}-seed{seed}.png"
            with writing(file):
                large.save(file, pnginfo=info)

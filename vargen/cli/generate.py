"""`vargen generate`: images from prompts or class labels."""

from __future__ import annotations

import json
import time
from pathlib import Path
from typing import Annotated, Any

import typer

import vargen
from vargen.cli import _common

DEFAULT_MODEL = "heroes32-llamagen"
# Parameters below which one CPU thread is used: the layers are too small to share, and where another program has a core,
# threads that wait for one another took six times as long as one thread alone (measured with the shipped models).
SMALL_MODEL = 20_000_000


@_common.one_line_errors
def generate(
    prompts: Annotated[
        list[str] | None, typer.Argument(metavar="PROMPT...", help="What to draw, one text an image set.")
    ] = None,
    num_images: Annotated[int, typer.Option("-n", "--num-images", help="Images of each prompt.")] = 1,
    model: Annotated[
        str, typer.Option("-m", "--model", help="Shipped model, pipeline folder, or Hub id.")
    ] = DEFAULT_MODEL,
    class_label: Annotated[
        list[str] | None, typer.Option("-c", "--class-label", help="Class id or name instead of a prompt; repeatable.")
    ] = None,
    sampler: Annotated[
        str | None, typer.Option("-s", "--sampler", help="Sampler, see `vargen models`; default: the model's own.")
    ] = None,
    settings: Annotated[
        list[str] | None,
        typer.Option("--set", metavar="NAME=VALUE", help="Another sampler setting, such as window=16; repeatable."),
    ] = None,
    seed: Annotated[int | None, typer.Option(help="Image i uses seed + i; default: drawn, and shown.")] = None,
    guidance_scale: Annotated[float | None, typer.Option("-g", "--guidance-scale", help="1 is off.")] = None,
    temperature: Annotated[float | None, typer.Option(help="0 is greedy.")] = None,
    top_k: Annotated[int | None, typer.Option(help="Keep so many codes; 0 is off.")] = None,
    top_p: Annotated[float | None, typer.Option(help="Keep so much probability; 1 is off.")] = None,
    output: Annotated[
        Path | None,
        typer.Option("-o", "--output", help="File for the grid (out.png), or folder with --separate (out)."),
    ] = None,
    separate: Annotated[bool, typer.Option("--separate", help="One PNG an image instead of a grid.")] = False,
    columns: Annotated[int | None, typer.Option(help="Images in a row of the grid.")] = None,
    scale: Annotated[int | None, typer.Option(help="Whole-number enlargement, pixels stay sharp.")] = None,
    labels: Annotated[
        bool, typer.Option("--labels", help="Write prompt and seed under every image of the grid.")
    ] = False,
    overwrite: Annotated[bool, typer.Option("--overwrite", help="Replace existing files.")] = False,
    batch_size: Annotated[
        int | None, typer.Option(help="Images decoded at a time; the images do not depend on it.")
    ] = None,
    device: Annotated[str | None, typer.Option(help="cpu, cuda, ...; default: a GPU where there is one.")] = None,
    dtype: Annotated[str, typer.Option(help="float32, bfloat16 or float16.")] = "float32",
    threads: Annotated[
        int | None, typer.Option(help="CPU threads; default: 1 for models under 20M parameters, else torch's choice.")
    ] = None,
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
    _check(prompts, class_label, target, separate, overwrite, {"columns": columns, "scale": scale, "threads": threads})
    overrides = _common.read_settings(settings or [])
    start = time.perf_counter()
    pipe = _load(model, sampler, device, dtype)
    _set_threads(pipe, threads)
    loaded = time.perf_counter()
    result = pipe(
        prompt=list(prompts) if prompts else None,
        class_labels=[_label(text) for text in class_label] if class_label else None,
        num_images_per_prompt=num_images,
        guidance_scale=guidance_scale,
        temperature=temperature,
        top_k=top_k,
        top_p=top_p,
        seed=seed,
        batch_size=batch_size,
        **overrides,
    )
    seconds = time.perf_counter() - loaded
    shared = {"guidance_scale": guidance_scale, "temperature": temperature, "top_k": top_k, "top_p": top_p}
    used = pipe.sampler.replace(**overrides, **{name: value for name, value in shared.items() if value is not None})
    named = [text for text in (prompts or class_label or []) for _ in range(num_images)]
    record = {"vargen": vargen.__version__, "model": model, "sampler": type(used).__name__, "settings": _plain(used)}
    if separate:
        _write_each(target, result, named, record, scale, overwrite)
    else:
        _write_grid(target, result, named, record, columns, scale, labels, overwrite)
    _print_table(result, target, used, seconds, loaded - start)


def _check(
    prompts: list[str] | None,
    class_label: list[str] | None,
    target: Path,
    separate: bool,
    overwrite: bool,
    counts: dict[str, int | None],
) -> None:
    if bool(prompts) == bool(class_label):
        raise ValueError(
            f"give prompts or --class-label, got {'both' if prompts else 'neither'}; see vargen generate --help"
        )
    for name, value in counts.items():
        if value is not None and value < 1:
            raise ValueError(f"--{name} must be at least 1, got {value}")
    if not separate and target.suffix.lower() != ".png":
        raise ValueError(f"the output must be a .png file, got {target}; add --separate for a folder of images")
    _common.check_output(target, overwrite=overwrite, folder=separate)


def _load(model: str, sampler: str | None, device: str | None, dtype: str) -> Any:
    from vargen.pipelines.image import ImagePipeline
    from vargen.registry import sampler_class, swap_sampler

    if sampler is not None:
        sampler_class(sampler)  # an unknown name fails before the model is read
    where, kind = _common.pick_device(device), _common.pick_dtype(dtype)
    _quiet_libraries()
    pipe = ImagePipeline.from_pretrained(model, dtype=kind).to(where)
    pipe.set_progress_bar_config(disable=not _common.is_terminal(), unit="code", leave=False)
    if sampler is not None:
        pipe.sampler = swap_sampler(pipe.sampler, sampler, pipe.backbone)
    return pipe


def _set_threads(pipe: Any, threads: int | None) -> None:
    import torch

    if threads is None and pipe.backbone.num_parameters() < SMALL_MODEL:
        threads = 1
    if threads is not None:
        torch.set_num_threads(threads)


def _quiet_libraries() -> None:
    from diffusers.utils import logging

    logging.disable_progress_bar()  # "Loading pipeline components..." takes a tenth of a second


def _label(text: str) -> int | str:
    return int(text) if text.lstrip("-").isdigit() else text


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
    from vargen.hub import atomic_write
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

    from vargen.hub import atomic_dir

    with atomic_dir(folder, overwrite=overwrite) as beside:
        for index, (image, text, seed) in enumerate(zip(result.images, named, result.seeds, strict=True)):
            factor = scale or 1
            large = image.resize((image.width * factor, image.height * factor), Image.Resampling.NEAREST)
            info = _metadata({**record, "prompt": text, "seed": seed})
            large.save(beside / f"{index:04d}-seed{seed}.png", pnginfo=info)


def _print_table(
    result: Any, target: Path, sampler: Any, seconds: float, loading: float, what: str = "images"
) -> None:
    from rich.console import Console
    from rich.table import Table

    stats, count = result.stats, len(result.seeds)
    codes = result.codes if isinstance(result.codes, list) else [result.codes]  # next-scale: one tensor a scale
    num_codes = sum(part.shape[1] for part in codes)
    consecutive = result.seeds == list(range(result.seeds[0], result.seeds[0] + count))
    seeds = (
        f"{result.seeds[0]}..{result.seeds[-1]}" if consecutive and count > 1 else ", ".join(map(str, result.seeds))
    )
    table = Table(show_header=False)
    rows = {
        what: f"{count}, {num_codes} codes each",
        "seeds": seeds,
        "sampler": f"{type(sampler).__name__} ({stats.guarantee})",
        "forward passes": f"{stats.num_forwards} ({stats.tokens_per_forward(num_codes):.2f} codes each)",
        "seconds": f"{seconds:.1f} (and {loading:.1f} to load)",
        "written to": str(target),
    }
    for name, value in rows.items():
        table.add_row(name, value)
    console = Console()
    console.print(table)
    for note in stats.notes:
        console.print(f"note: {note}", markup=False)

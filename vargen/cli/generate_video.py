"""`vargen generate-video`: clips from prompts, class labels or first frames."""

from __future__ import annotations

import time
from pathlib import Path
from typing import Annotated, Any

import typer

from vargen.cli import _common
from vargen.cli.generate import _label, _print_table, _set_threads

DEFAULT_MODEL = "heroes-video-nbp"
SHOWN_SIDE = 256  # pixels that automatic enlargement brings small clips near


@_common.one_line_errors
def generate_video(
    prompts: Annotated[
        list[str] | None, typer.Argument(metavar="PROMPT...", help="What moves how, one text a clip set.")
    ] = None,
    num_videos: Annotated[int, typer.Option("-n", "--num-videos", help="Clips of each prompt.")] = 1,
    model: Annotated[
        str, typer.Option("-m", "--model", help="Shipped model, pipeline folder, or Hub id.")
    ] = DEFAULT_MODEL,
    class_label: Annotated[
        list[str] | None, typer.Option("-c", "--class-label", help="Class id or name instead of a prompt; repeatable.")
    ] = None,
    frames: Annotated[
        Path | None, typer.Option(help="Image or GIF whose frames begin every clip; they are held and continued.")
    ] = None,
    num_frames: Annotated[int | None, typer.Option(help="Stop after so many frames.")] = None,
    settings: Annotated[
        list[str] | None, typer.Option("--set", metavar="NAME=VALUE", help="Another sampler setting; repeatable.")
    ] = None,
    seed: Annotated[int | None, typer.Option(help="Clip i uses seed + i; default: drawn, and shown.")] = None,
    guidance_scale: Annotated[float | None, typer.Option("-g", "--guidance-scale", help="1 is off.")] = None,
    temperature: Annotated[float | None, typer.Option(help="0 is greedy.")] = None,
    top_k: Annotated[int | None, typer.Option(help="Keep so many codes; 0 is off.")] = None,
    top_p: Annotated[float | None, typer.Option(help="Keep so much probability; 1 is off.")] = None,
    output: Annotated[
        Path, typer.Option("-o", "--output", "--out", help="File for all clips side by side: .gif or .mp4.")
    ] = Path("out.gif"),
    fps: Annotated[int | None, typer.Option(help="Frames a second; default: the model's.")] = None,
    columns: Annotated[int | None, typer.Option(help="Clips in a row.")] = None,
    scale: Annotated[int | None, typer.Option(help="Whole-number enlargement, pixels stay sharp.")] = None,
    overwrite: Annotated[bool, typer.Option("--overwrite", help="Replace existing files.")] = False,
    batch_size: Annotated[int | None, typer.Option(help="Clips decoded at a time; they do not depend on it.")] = None,
    device: Annotated[str | None, typer.Option(help="cpu, cuda, ...; default: a GPU where there is one.")] = None,
    dtype: Annotated[str, typer.Option(help="float32, bfloat16 or float16.")] = "float32",
    threads: Annotated[int | None, typer.Option(help="CPU threads; default: 1 for small models.")] = None,
) -> None:
    """Draw clips from prompts, class labels or first frames.

    \b
    Examples:
      vargen generate-video "deep elf with a red cloak walking left" --seed 7 --out clip.gif
      vargen generate-video "minotaur jumping" "mummy walking right" -n 4 -o heroes.mp4 --scale 4
    """
    from vargen.pipelines.video_frames import check_video_path, save_video

    check_video_path(output)
    _common.check_output(output, overwrite=overwrite)
    if prompts and class_label:
        raise ValueError("give prompts or --class-label, got both; see vargen generate-video --help")
    if not (prompts or class_label or frames):
        raise ValueError("give prompts, --class-label or --frames, got none; see vargen generate-video --help")
    first = _read_frames(frames)
    overrides = _common.read_settings(settings or [])
    start = time.perf_counter()
    pipe = _load(model, device, dtype)
    _set_threads(pipe, threads)
    loaded = time.perf_counter()
    shared = {"guidance_scale": guidance_scale, "temperature": temperature, "top_k": top_k, "top_p": top_p}
    result = pipe(
        prompt=list(prompts) if prompts else None,
        class_labels=[_label(text) for text in class_label] if class_label else None,
        frames=first,
        num_frames=num_frames,
        num_videos_per_prompt=num_videos,
        fps=fps,
        seed=seed,
        batch_size=batch_size,
        **shared,
        **overrides,
    )
    seconds = time.perf_counter() - loaded
    used = pipe.sampler.replace(**overrides, **{name: value for name, value in shared.items() if value is not None})
    save_video(_side_by_side(result.frames, columns, scale), output, fps=result.fps, overwrite=overwrite)
    result.codes = result.codes.flatten(1)
    _print_table(result, output, used, seconds, loaded - start, what="clips")


def _load(model: str, device: str | None, dtype: str) -> Any:
    from diffusers.utils import logging

    from vargen.pipelines.video import VideoPipeline

    where, kind = _common.pick_device(device), _common.pick_dtype(dtype)
    logging.disable_progress_bar()
    pipe = VideoPipeline.from_pretrained(model, dtype=kind).to(where)
    pipe.set_progress_bar_config(disable=not _common.is_terminal(), unit="code", leave=False)
    return pipe


def _read_frames(path: Path | None) -> list[Any] | None:
    if path is None:
        return None
    from PIL import Image, ImageSequence, UnidentifiedImageError

    try:
        with Image.open(path) as file:
            return [frame.convert("RGB") for frame in ImageSequence.Iterator(file)]
    except (OSError, UnidentifiedImageError) as error:
        raise ValueError(f"cannot read {path} as an image: {error}") from None


def _side_by_side(clips: list[list[Any]], columns: int | None, scale: int | None) -> list[Any]:
    from vargen.pipelines.grid import image_grid

    factor = scale or max(1, SHOWN_SIDE // max(clips[0][0].size))
    return [image_grid(list(images), columns, factor, gap=2 * (len(clips) > 1)) for images in zip(*clips, strict=True)]

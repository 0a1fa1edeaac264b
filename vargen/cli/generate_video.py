"""`vargen generate-video`: clips from prompts, class labels or first frames."""

from __future__ import annotations

import time
from pathlib import Path
from typing import Annotated, Any

import typer

from vargen.cli import _common, _drawing

DEFAULT_MODEL = "heroes-video-nbp"
SHOWN_SIDE = 256  # pixels that automatic enlargement brings small clips near


@_common.one_line_errors
def generate_video(
    prompts: Annotated[
        list[str] | None, typer.Argument(metavar="PROMPT...", help="What moves how, one text a clip set.")
    ] = None,
    num_videos: Annotated[int, typer.Option("-n", "--num-videos", help="Clips of each prompt.")] = 1,
    model: _common.Model = DEFAULT_MODEL,
    class_label: _drawing.ClassLabels = None,
    frames: Annotated[
        Path | None, typer.Option(help="Image or GIF whose frames begin every clip; they are held and continued.")
    ] = None,
    background: Annotated[
        str | None, typer.Option(help="Colour behind transparent pixels of --frames: white, #ffffff, ...")
    ] = None,
    num_frames: Annotated[int | None, typer.Option(help="Stop after so many frames.")] = None,
    settings: _drawing.Settings = None,
    seed: Annotated[int | None, typer.Option(help="Clip i uses seed + i; default: drawn, and shown.")] = None,
    guidance_scale: _drawing.Guidance = None,
    temperature: _drawing.Temperature = None,
    top_k: _drawing.TopK = None,
    top_p: _drawing.TopP = None,
    output: Annotated[
        Path, typer.Option("-o", "--output", "--out", help="File for all clips side by side: .gif or .mp4.")
    ] = Path("out.gif"),
    fps: Annotated[int | None, typer.Option(help="Frames a second; default: the model's.")] = None,
    columns: Annotated[int | None, typer.Option(help="Clips in a row.")] = None,
    scale: _drawing.Scale = None,
    overwrite: _drawing.Overwrite = False,
    batch_size: Annotated[int | None, typer.Option(help="Clips decoded at a time; they do not depend on it.")] = None,
    device: _common.Device = None,
    dtype: _common.Dtype = "float32",
    threads: _drawing.Threads = None,
) -> None:
    """Draw clips from prompts, class labels or first frames.

    \b
    Examples:
      vargen generate-video "deep elf with a red cloak walking left" --seed 7 --out clip.gif
      vargen generate-video "minotaur jumping" "mummy walking right" -n 4 -o heroes.mp4 --scale 4
    """
    from vargen.pipelines.video import VideoPipeline
    from vargen.pipelines.video_frames import check_video_path, save_video

    check_video_path(output)
    _common.check_output(output, overwrite=overwrite)
    if prompts and class_label:
        raise ValueError("give prompts or --class-label, got both; see vargen generate-video --help")
    if not (prompts or class_label or frames):
        raise ValueError("give prompts, --class-label or --frames, got none; see vargen generate-video --help")
    _drawing.check_numbers(num_videos, len(prompts or class_label or []), batch_size, columns, scale, threads)
    first = _read_frames(frames, background)
    overrides = _common.read_settings(settings or [])
    start = time.perf_counter()
    pipe = _drawing.load_pipeline(VideoPipeline, model, device, dtype)
    shared = {"guidance_scale": guidance_scale, "temperature": temperature, "top_k": top_k, "top_p": top_p}
    changes = _drawing.merge_settings(pipe, overrides, **shared)
    _check_sheet(pipe, num_videos * max(1, len(prompts or class_label or [])), columns, scale)
    _drawing.set_threads(pipe, threads)
    loaded = time.perf_counter()
    result = pipe(
        prompt=list(prompts) if prompts else None,
        class_labels=[_drawing.read_label(text) for text in class_label] if class_label else None,
        frames=first,
        num_frames=num_frames,
        num_videos_per_prompt=num_videos,
        fps=fps,
        seed=seed,
        batch_size=batch_size,
        **changes,
    )
    seconds = time.perf_counter() - loaded
    used = pipe.sampler.replace(**changes)
    save_video(_side_by_side(result.frames, columns, scale), output, fps=result.fps, overwrite=overwrite)
    result.codes = result.codes.flatten(1)
    _drawing.print_table(result, output, used, seconds, loaded - start, what="clips")


def _read_frames(path: Path | None, background: str | None) -> list[Any] | None:
    if path is None:
        return None
    from vargen.validation.pictures import open_frames

    return open_frames(path, background=background)


def _check_sheet(pipe: Any, count: int, columns: int | None, scale: int | None) -> None:
    """Raise ``ValueError`` for frames that are too large together, before they are drawn."""
    from vargen.pipelines.grid import MAX_SHEET, sheet_size

    size, length = _drawing.picture_size(pipe), pipe.num_frames
    if size is None:
        return
    width, height = sheet_size(count, size, columns, _factor(size, scale), gap=_gap(count))
    if width * height * length > MAX_SHEET:
        raise ValueError(
            f"{length} frames of {width}x{height} pixels are more than {MAX_SHEET:,} pixels; lower --scale or -n"
        )


def _factor(size: tuple[int, int], scale: int | None) -> int:
    return scale or max(1, SHOWN_SIDE // max(size))


def _gap(count: int) -> int:
    return 2 * (count > 1)


def _side_by_side(clips: list[list[Any]], columns: int | None, scale: int | None) -> list[Any]:
    from vargen.pipelines.grid import image_grid

    factor, gap = _factor(clips[0][0].size, scale), _gap(len(clips))
    return [image_grid(list(images), columns, factor, gap=gap) for images in zip(*clips, strict=True)]

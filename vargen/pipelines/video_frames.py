"""Frames in and out of a video pipeline: given frames, frames that are shown while later ones are drawn, files.

Letters: P prompts, B clips, T frames, H W pixels, t h w code grid.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from html import escape
from importlib.util import find_spec
from os import PathLike
from pathlib import Path
from typing import Any, cast

import numpy as np
import torch
from diffusers.utils import BaseOutput, export_to_video
from PIL import Image
from torch import Tensor

from vargen.display.notebook import as_images, clips_html, frame_times, stats_line
from vargen.files import atomic_write
from vargen.images import from_pil
from vargen.outputs import DecodeStats
from vargen.pipelines.progress import DecodeInterrupted, Watch
from vargen.samplers.state import DecodeState
from vargen.tokenizers.video_fsq.layers import StreamState
from vargen.validation.checks import shown
from vargen.validation.pictures import all_frames
from vargen.validation.reading import local_path
from vargen.validation.rgb import Background, is_animation, upright_size

FILE_TYPES = (".gif", ".mp4")


@dataclass(repr=False)
class VideoPipelineOutput(BaseOutput):
    """Result of ``VideoPipeline.__call__``; as the last line of a notebook cell it plays its clips.

    ``frames``: for each clip a list of PIL images, ``[B, T, H, W, 3]`` float array in [0, 1] (``"np"``),
    ``[B, T, 3, H, W]`` float tensor in [0, 1] (``"pt"``), or ``None`` for ``output_type="codes"``.
    """

    frames: list[list[Image.Image]] | np.ndarray | Tensor | None
    codes: Tensor  # [B, t, h, w] int64, -1 where an interrupted call drew none
    seeds: list[int]
    stats: DecodeStats
    fps: int = 8

    def save(
        self,
        path: str | PathLike[str],
        *,
        index: int = 0,
        fps: int | None = None,
        scale: int = 1,
        overwrite: bool = True,
    ) -> Path:
        """Write clip ``index`` as ``.gif`` or ``.mp4``; see ``save_video``."""
        if self.frames is None:
            raise ValueError("this output holds codes only; call the pipeline with output_type='pil'")
        if not 0 <= index < len(self.frames):
            raise ValueError(f"index must be in 0..{len(self.frames) - 1}, got {index}")
        return save_video(self.frames[index], path, fps=fps or self.fps, scale=scale, overwrite=overwrite)

    def __repr__(self) -> str:
        kind = "codes only" if self.frames is None else f"{len(self.frames[0])} frames each, {self.fps} a second"
        return f"VideoPipelineOutput({len(self.seeds)} clips, {kind}, seeds={self.seeds}, {self.stats.num_forwards} forwards)"

    def _repr_html_(self) -> str:
        line = stats_line(self.stats, len(self.seeds), self.codes[0].numel(), self.seeds, what="clip")
        text = "".join(f"<div><small>{escape(one)}</small></div>" for one in [line, *self.stats.notes])
        if self.frames is None:
            return f"<div>codes {tuple(self.codes.shape)}</div>{text}"
        return clips_html(list(self.frames), self.fps) + text


def enlarge(clip: Sequence[Image.Image], factor: int) -> list[Image.Image]:
    """Enlarge frames by a whole factor, nearest neighbour."""
    if factor == 1:
        return list(clip)
    return [image.resize((image.width * factor, image.height * factor), Image.Resampling.NEAREST) for image in clip]


def save_video(
    frames: Any, path: str | PathLike[str], *, fps: int = 8, scale: int = 1, overwrite: bool = True
) -> Path:
    """Write one clip to a file, with diffusers' helpers.

    Args:
        frames: PIL images, ``[T, H, W, 3]`` array or ``[T, 3, H, W]`` tensor in [0, 1].
        path: ends in ``.gif`` or ``.mp4``; MP4 needs the packages imageio and imageio-ffmpeg.
        fps: frames a second, 1 to 100.
        scale: enlargement by a whole factor, pixels stay sharp.
        overwrite: whether an existing file may be replaced; it stays whole if writing fails.

    Returns:
        The path.

    Raises:
        ValueError: another ending, fps or scale out of range, packages for MP4 missing.
    """
    target = check_video_path(path)
    check_fps(fps)
    if scale < 1:
        raise ValueError(f"scale must be at least 1, got {scale}")
    clip = enlarge(as_images(frames), scale)
    with atomic_write(target, overwrite=overwrite) as beside:
        if target.suffix.lower() == ".gif":
            times = frame_times(len(clip), fps)
            clip[0].save(beside, "GIF", save_all=True, append_images=clip[1:], optimize=False, duration=times, loop=0)
        else:  # without the block size ffmpeg stretches frames to multiples of 16; H.264 needs even sides
            export_to_video([_even(image) for image in clip], str(beside), fps=fps, macro_block_size=1)
    return target


def _even(image: Image.Image) -> Image.Image:
    width, height = image.size
    return image.crop((0, 0, width + width % 2, height + height % 2)) if width % 2 or height % 2 else image


def check_video_path(path: str | PathLike[str]) -> Path:
    """Raise ``ValueError`` unless clips can be written under this name."""
    target = local_path(path)
    if target.suffix.lower() not in FILE_TYPES:
        raise ValueError(f"the output must be a .gif or .mp4 file, got {target}")
    if target.suffix.lower() == ".mp4" and not (find_spec("imageio") and find_spec("imageio_ffmpeg")):
        raise ValueError("writing .mp4 needs imageio and imageio-ffmpeg; pip install them, or write a .gif")
    return target


def check_fps(fps: Any) -> None:
    """Raise ``ValueError`` for a rate that GIF players cannot show."""
    if isinstance(fps, bool) or not isinstance(fps, int) or not 1 <= fps <= 100:
        raise ValueError(f"fps must be an integer in 1..100, got {shown(fps)}")


def read_frames(frames: Any, sides: tuple[int, int], background: Background | None = None) -> Tensor | None:
    """Given first frames as ``[P, T0, 3, H, W]`` in [-1, 1].

    Args:
        frames: PIL image or images of one clip, a list of such lists, or a float tensor ``[T0, 3, H, W]`` or
            ``[P, T0, 3, H, W]`` (array: channels last) in [0, 1]. An animation is a clip.
        sides: (H, W) of the model.
        background: colour behind transparent pixels.

    Raises:
        ValueError: another type or shape, other sides than the model's, clips of different lengths, values out of range.
    """
    if frames is None:
        return None
    if isinstance(frames, Image.Image):
        frames = all_frames(frames, background=background, name="frames")
    if isinstance(frames, np.ndarray):
        if frames.ndim not in (4, 5) or frames.dtype not in (np.float16, np.float32, np.float64):
            raise ValueError(
                f"frames must be float [P, T, H, W, 3] in [0, 1], got {frames.dtype} {list(frames.shape)}"
            )
        frames = torch.from_numpy(np.ascontiguousarray(frames)).movedim(-1, -3)
    if isinstance(frames, Tensor):
        right = frames.ndim in (4, 5) and frames.is_floating_point() and not frames.is_meta
        if not right or frames.shape[-3] != 3 or not len(frames):
            raise ValueError(
                f"frames must be float [P, T, 3, H, W] in [0, 1], got {frames.dtype} {list(frames.shape)}"
            )
        _check_sides(frames.shape[-2:], sides)
        if not bool(((frames >= 0) & (frames <= 1)).all()):
            raise ValueError("frames must lie in [0, 1], as output_type='pt' returns them; got values beyond, or NaN")
        return (frames if frames.ndim == 5 else frames[None]).float() * 2 - 1
    if not isinstance(frames, list | tuple) or not frames:
        raise ValueError(f"frames must be PIL images, lists of them or a tensor, got {type(frames).__name__}")
    clips: list[Any]
    if all(isinstance(one, Image.Image) and is_animation(one) for one in frames):
        clips = [all_frames(one, background=background, name="frames") for one in frames]
    else:
        clips = [frames] if isinstance(frames[0], Image.Image) else list(frames)
    for clip in clips:
        if not isinstance(clip, list | tuple) or not clip or not all(isinstance(one, Image.Image) for one in clip):
            raise ValueError(f"frames must be PIL images, lists of them or a tensor, got a list of {shown(clip)}")
        for image in clip:
            _check_sides(upright_size(image)[::-1], sides)
    if len({len(clip) for clip in clips}) != 1:
        raise ValueError("frames must hold clips of one length; cut them to the shortest")
    return torch.stack([from_pil(clip, background=background, name="frame") for clip in clips])


def _check_sides(found: Sequence[int], sides: tuple[int, int]) -> None:
    if tuple(found) != sides:
        got = "x".join(map(str, found))
        raise ValueError(f"frames must have {sides[0]}x{sides[1]} pixels (height x width), got {got}")


def given_codes(tokenizer: Any, clips: Tensor, grid_size: tuple[int, ...], num_prompts: int, times: int) -> Tensor:
    """Codes that a call holds: ``[B, N]``, -1 where free.

    Raises:
        ValueError: a number of frames that is no prefix, not one clip a prompt.
    """
    t, h, w = grid_size
    allowed = [tokenizer.num_frames(k) for k in range(1, t)]
    if clips.shape[1] not in allowed:
        raise ValueError(f"frames must hold {', '.join(map(str, allowed))} frames, got {clips.shape[1]}")
    if len(clips) not in (1, num_prompts):
        raise ValueError(f"frames must hold 1 or {num_prompts} clips, one a prompt, got {len(clips)}")
    codes = tokenizer.encode(clips.transpose(1, 2).to(tokenizer.device)).codes
    held = torch.full((len(codes), t, h, w), -1, device=codes.device)
    held[:, : codes.shape[1]] = codes
    return held.flatten(1).expand(num_prompts, -1).repeat_interleave(times, dim=0)


def complete_frames(codes: Tensor) -> int:
    """Leading code frames that are drawn in every clip of ``codes [B, t, h, w]``."""
    return int((codes >= 0).flatten(2).all(-1).all(0).long().cumprod(0).sum())


@dataclass(eq=False)
class VideoWatch(Watch):
    """Also hands over frames as soon as their code frame is complete, and stops when enough of them are."""

    wanted: int = 0  # code frames
    _stream: StreamState = field(default_factory=StreamState, init=False)
    _shown_frames: int = field(default=0, init=False)

    def __call__(self, step: int, state: DecodeState) -> None:
        """Do what is to be done after a forward pass."""
        if step == 0:
            self._stream, self._shown_frames, self.stopped = StreamState(), 0, False
        grid = state.codes.unflatten(1, tuple(self.pipe.backbone.grid_size))
        complete = min(complete_frames(grid), self.wanted)
        new = None
        if "frames" in self.tensors and complete > self._shown_frames:
            codes = grid[:, self._shown_frames : complete]
            new = self.pipe.decode_codes(codes.flatten(1), state=self._stream)
            new = (new.float() / 2 + 0.5).clamp(0, 1).transpose(1, 2)
            self._shown_frames = complete
        super().__call__(step, cast(DecodeState, _WithFrames(state, new)))
        if complete == self.wanted and not state.done:
            self.stopped = True
            raise DecodeInterrupted(state)


class _WithFrames:
    """A sampler's state with the frames that are new in this step: [b, T_new, 3, H, W] in [0, 1], or None."""

    def __init__(self, state: DecodeState, frames: Tensor | None) -> None:
        self.state, self.frames = state, frames

    def __getattr__(self, name: str) -> Any:
        return getattr(self.state, name)

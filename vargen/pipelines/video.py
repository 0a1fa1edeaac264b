"""Prompts, class labels or first frames to videos: a diffusers pipeline over a video tokenizer and a block-wise backbone.

Letters: P prompts, B = P * num_videos_per_prompt clips, prompt-major, T frames, H W pixels, t h w code grid, N = t h w.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from numbers import Integral
from typing import Any, cast

import torch
from torch import Tensor

from vargen.conditioners.base import Conditioner
from vargen.images import to_pil
from vargen.outputs import SamplerOutput
from vargen.pipelines import inputs
from vargen.pipelines.components import register_pipeline
from vargen.pipelines.drafters import StoredDrafters
from vargen.pipelines.guided import negative_rows
from vargen.pipelines.image import UNDRAWN, ImagePipeline
from vargen.pipelines.progress import Watch
from vargen.pipelines.types import LabelInput, PromptInput, Rows, SeedInput
from vargen.pipelines.video_frames import VideoPipelineOutput, VideoWatch, check_fps, given_codes, read_frames
from vargen.protocols import ConditionInput, Model, Tokenizer
from vargen.random import image_seeds
from vargen.samplers.base import Sampler
from vargen.tokenizers.video_fsq.layers import StreamState
from vargen.validation.checks import shown
from vargen.validation.rgb import Background


class VideoPipeline(ImagePipeline):
    """Generate clips.

    Loading, saving, components, seeds and settings are those of ``ImagePipeline``.

    Args:
        tokenizer: turns codes into frames, causally (``VideoFSQTokenizer``).
        backbone: scores codes of a (t, h, w) grid.
        sampler: draws codes from the backbone (``NextBlockSampler``).
        conditioner: turns prompts into what the backbone reads; without one, class labels are ids.
        fps: frames a second at which clips are meant to be played.

    Raises:
        ValueError: tokenizer and backbone have different codebook sizes, or are not for videos.

    Example:
        >>> from vargen import VideoPipeline  # doctest: +SKIP
        >>> pipe = VideoPipeline.from_pretrained("heroes-video-nbp")  # doctest: +SKIP
        >>> pipe("deep elf with a red cloak walking left", seed=7).save("elf.gif", scale=8)  # doctest: +SKIP
    """

    _optional_components = ["conditioner"]  # noqa: RUF012 - diffusers reads a list
    _callback_tensor_inputs: tuple[str, ...] = ("codes", "num_committed", "frames")  # type: ignore[assignment]
    _stored_class = "VideoPipeline"
    drafter = None
    eagle = None  # type: ignore[assignment]

    def __init__(
        self,
        tokenizer: Tokenizer | None,
        backbone: Model,
        sampler: Sampler,
        conditioner: Conditioner | None = None,
        fps: int = 8,
    ) -> None:
        super(ImagePipeline, self).__init__()
        self.register_modules(tokenizer=tokenizer, backbone=backbone, sampler=sampler, conditioner=conditioner)
        self._stored_drafters = StoredDrafters()
        check_fps(fps)
        self.register_to_config(fps=fps)
        self._check_components()

    @classmethod
    def _check_settings(cls, index: dict[str, Any]) -> None:
        check_fps(index.get("fps", 8))

    @property
    def num_frames(self) -> int:
        """T, frames of a whole clip."""
        return int(self.tokenizer.num_frames(self.backbone.grid_size[0]))

    @torch.no_grad()
    def __call__(  # type: ignore[override]
        self,
        prompt: PromptInput = None,
        class_labels: LabelInput = None,
        frames: Any = None,
        negative_prompt: PromptInput = None,
        num_frames: int | None = None,
        num_videos_per_prompt: int = 1,
        guidance_scale: float | None = None,
        temperature: float | None = None,
        top_k: int | None = None,
        top_p: float | None = None,
        fps: int | None = None,
        seed: SeedInput = None,
        generator: torch.Generator | list[torch.Generator] | None = None,
        output_type: str = "pil",
        return_dict: bool = True,
        callback_on_step_end: Callable[..., Any] | None = None,
        callback_on_step_end_tensor_inputs: Sequence[str] = ("codes",),
        batch_size: int | None = None,
        background: Background | None = None,
        **sampler_overrides: Any,
    ) -> VideoPipelineOutput | tuple[Any, ...]:
        """Generate ``num_videos_per_prompt`` clips for every prompt or class label, prompt-major.

        Args:
            prompt: one text or several; give either prompts or class labels, or only frames where the model needs no more.
            class_labels: ids, or names where the conditioner knows names.
            frames: first frames to continue, for all prompts or one clip each: PIL images (of an
                animation, all frames), ``[P, T0, 3, H, W]`` or
                ``[P, T0, H, W, 3]`` (array) in [0, 1]. They are encoded and held; T0 = 1 + k * f, shorter than a clip.
            negative_prompt: as in ``ImagePipeline``.
            num_frames: stop after so many frames, 1 + k * f; None is a whole clip.
            num_videos_per_prompt: clips of each prompt.
            guidance_scale, temperature, top_k, top_p: as in ``ImagePipeline``.
            fps: of the output; None is the model's.
            seed, generator: as in ``ImagePipeline``; clip i uses ``seed + i``.
            output_type: ``"pil"`` (a list of images a clip), ``"pt"`` ([B, T, 3, H, W] in [0, 1]), ``"np"``
                ([B, T, H, W, 3]) or ``"codes"``.
            return_dict: ``False`` returns the tuple ``(frames, codes, seeds, stats)``.
            callback_on_step_end: called after every forward pass as ``callback(pipe, step, num_forwards, tensors)``.
            callback_on_step_end_tensor_inputs: what ``tensors`` holds: ``"codes"`` ([b, N], -1 where not drawn),
                ``"num_committed"`` ([b]), ``"frames"`` ([b, T_new, 3, H, W] in [0, 1]: frames that became complete in
                this pass, decoded while later ones are still to be drawn, or None).
            batch_size: clips decoded at a time; less memory, the same clips.
            background: colour behind transparent pixels of ``frames``: a name, ``"#rrggbb"`` or three integers.
            sampler_overrides: other settings of the sampler for this call.

        Returns:
            Frames, codes [B, t, h, w], the seed of every clip, the statistics of the decode, and fps.

        Raises:
            ValueError: an argument out of range, before any work; see each one.
        """
        # 1. Check everything
        known, wanted = self._callback_tensor_inputs, callback_on_step_end_tensor_inputs
        inputs.check_options(output_type, 1, batch_size, callback_on_step_end, wanted, known, return_dict)
        inputs.check_count("num_videos_per_prompt", num_videos_per_prompt, inputs.MAX_IMAGES)
        self._check_components()
        inputs.check_dtype(self.components)
        fps = self.config.fps if fps is None else fps
        check_fps(fps)
        length = self._code_frames(num_frames)
        shared = {"guidance_scale": guidance_scale, "temperature": temperature, "top_k": top_k, "top_p": top_p}
        changes = {name: value for name, value in shared.items() if value is not None} | sampler_overrides
        sampler = self.sampler.replace(**changes) if changes else self.sampler
        sampler.check_backbone(self.backbone)
        clips = read_frames(frames, self._frame_size(), background)
        given = prompt if prompt is not None else class_labels if class_labels is not None else clips
        inputs.check_rows(given, num_videos_per_prompt, seed, generator)

        with inputs.evaluating(self._modules()):
            # 2. Conditions and seeds, one row a clip
            rows = self._condition(prompt, class_labels, clips)
            kept = None
            if clips is not None:
                grid = tuple(self.backbone.grid_size)
                kept = given_codes(self.tokenizer, clips, grid, inputs.condition_rows(rows), num_videos_per_prompt)
            away = negative_rows(self, negative_prompt, sampler, inputs.condition_rows(rows))
            away = None if away is None else inputs.repeat_condition(away, num_videos_per_prompt)
            condition = inputs.repeat_condition(rows, num_videos_per_prompt)
            seeds = image_seeds(seed, generator, inputs.condition_rows(condition))
            if clips is None and prompt is not None:  # given frames say the rest themselves
                condition = inputs.complete_condition(self.conditioner, condition, seeds)

            # 3. Draw codes, 4. decode them
            watch = VideoWatch(self, callback_on_step_end, tuple(wanted), wanted=length)
            at_once = min(batch_size or len(seeds), len(seeds))
            drawn = self._draw(sampler, (condition, kept, away), seeds, at_once, watch)
            codes = cast(Tensor, drawn.codes).unflatten(1, tuple(self.backbone.grid_size))[:, :length]
            videos = None if output_type == "codes" else self._to_frames(codes, output_type, at_once)
        self.maybe_free_model_hooks()
        output = VideoPipelineOutput(frames=videos, codes=codes, seeds=seeds, stats=drawn.stats, fps=fps)
        return output if return_dict else (videos, codes, seeds, drawn.stats)

    @torch.no_grad()
    def decode_codes(self, codes: Tensor, state: StreamState | None = None) -> Tensor:
        """Turn codes ``[B, n h w]``, -1 where not drawn, into clips ``[B, 3, T, H, W]`` around [-1, 1], grey where not drawn.

        Args:
            codes: whole code frames.
            state: of a stream, see ``VideoFSQTokenizer.decode``.
        """
        grid = codes.unflatten(1, (-1, *self.backbone.grid_size[1:]))
        videos = self.tokenizer.decode(grid.clamp(min=0), state=state)
        if bool((grid < 0).any()):
            (fh, fw), f = self.tokenizer.downsample, self.tokenizer.temporal_factor
            missing = (grid < 0).repeat_interleave(f, 1).repeat_interleave(fh, 2).repeat_interleave(fw, 3)
            videos = videos.masked_fill(missing[:, None, -videos.shape[2] :], UNDRAWN)
        return videos

    def _condition(self, prompt: PromptInput, class_labels: LabelInput, clips: Tensor | None) -> ConditionInput:
        if not getattr(self.backbone, "needs_frames", False):
            return self.encode_condition(prompt, class_labels)
        if prompt is not None or class_labels is not None:
            raise ValueError(
                "this model only continues frames and reads no prompts or class labels; give frames alone"
            )
        if clips is None:
            raise ValueError("this model continues given frames; pass them as frames=...")
        return torch.empty(len(clips), 0, dtype=torch.int64, device=self.backbone.device)

    def _frame_size(self) -> tuple[int, int]:
        (h, w), (fh, fw) = self.backbone.grid_size[1:], self.tokenizer.downsample
        return h * fh, w * fw

    def _code_frames(self, num_frames: int | None) -> int:
        """Code frames that a call shows."""
        allowed = [self.tokenizer.num_frames(k + 1) for k in range(self.backbone.grid_size[0])]
        if num_frames is None:
            return len(allowed)
        if isinstance(num_frames, bool) or not isinstance(num_frames, Integral) or num_frames not in allowed:
            raise ValueError(f"num_frames must be one of {', '.join(map(str, allowed))}, got {shown(num_frames)}")
        return allowed.index(num_frames) + 1

    def _draw_rows(self, sampler: Sampler, given: Rows, seeds: list[int], watch: Watch, drafter: Any) -> SamplerOutput:
        part = super()._draw_rows(sampler, given, seeds, watch, drafter)
        if watch.stopped:  # enough frames: nothing was cut off that the caller asked for
            part.stats.notes.clear()
        return part

    def _to_frames(self, codes: Tensor, output_type: str, batch_size: int) -> Any:
        videos = torch.cat([self.decode_codes(part.flatten(1)) for part in codes.split(batch_size)])
        if output_type == "pil":
            return [to_pil(clip.transpose(0, 1)) for clip in videos]
        pixels = (videos.float() / 2 + 0.5).clamp(0, 1).transpose(1, 2).cpu()  # B T 3 H W
        return pixels if output_type == "pt" else pixels.permute(0, 1, 3, 4, 2).numpy()

    def _check_components(self) -> None:
        if len(getattr(self.backbone, "grid_size", ())) != 3 or not hasattr(self.tokenizer, "num_frames"):
            names = f"{type(self.tokenizer).__name__} and {type(self.backbone).__name__}"
            raise ValueError(
                f"a VideoPipeline needs a video tokenizer and a backbone with a (t, h, w) grid, got {names}; "
                "images: ImagePipeline"
            )
        super()._check_components()


register_pipeline(VideoPipeline)

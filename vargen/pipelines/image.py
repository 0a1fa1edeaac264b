"""Prompts or class labels to images: one diffusers pipeline for every tokenizer, backbone and sampler.

Letters: P prompts, B = P * num_images_per_prompt images, prompt-major, N code positions, h w code grid, H W pixels.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from os import PathLike
from pathlib import Path
from typing import Any, Self, cast

import torch
from diffusers import DiffusionPipeline
from torch import Tensor, nn

from vargen.conditioners.base import Conditioner
from vargen.images import to_pil
from vargen.outputs import DecodeStats, SamplerOutput
from vargen.pipelines import inputs
from vargen.pipelines.components import (
    INDEX_FILE,
    check_class,
    check_complete,
    check_index,
    check_options,
    dtype_argument,
    index_entry,
    load_shared,
    read_index,
    register_library,
)
from vargen.pipelines.continuous import check_autoencoder, decode_tokens, is_continuous, undrawn_tokens
from vargen.pipelines.drafters import EARLIER, StoredDrafters, warn_of_other_target
from vargen.pipelines.editing import forced_codes, read_edit
from vargen.pipelines.outputs import ImagePipelineOutput
from vargen.pipelines.progress import DecodeInterrupted, Watch
from vargen.pipelines.scales import decode_scales, flatten_codes, split_codes
from vargen.pipelines.types import DrafterInput, ImageInput, LabelInput, Pictures, PromptInput, Rows
from vargen.protocols import ConditionInput, Model, Tokenizer
from vargen.random import image_seeds
from vargen.registry import resolve_model
from vargen.samplers.base import Sampler
from vargen.samplers.scale.state import token_shape
from vargen.validation.folders import one_line, read_settings

register_library()

UNDRAWN = 0.0  # grey, in [-1, 1]: pixels of codes that an interrupted call did not draw


class ImagePipeline(DiffusionPipeline):
    """Generate images.

    Components swap like schedulers do in diffusers, for example
    ``pipe.sampler = SpeculativeJacobiSampler.from_config(pipe.sampler.config, window=16)``.

    Args:
        tokenizer: turns codes into pixels.
        backbone: scores codes; its codebook must have the tokenizer's size.
        sampler: draws codes from the backbone; a small frozen object that holds settings.
        conditioner: turns prompts or class names into what the backbone reads; without one, class labels are ids.
        drafter: for samplers that draft with a model: a small backbone over the same codes, or a drafter on the backbone's
            hidden states. Others may be stored by name: ``pipe.drafters`` lists them, ``pipe.load_drafter(name)`` puts one
            into the slot, ``pipe(..., drafter=name)`` takes it for one call.
        eagle: stored as the drafter of that name.

    Raises:
        ValueError: tokenizer and backbone have different codebook sizes.

    Example:
        >>> from vargen import ImagePipeline  # doctest: +SKIP
        >>> pipe = ImagePipeline.from_pretrained("heroes32-llamagen")  # doctest: +SKIP
        >>> pipe("deep elf with a red cloak", num_images_per_prompt=4, seed=7).images[0]  # doctest: +SKIP
    """

    model_cpu_offload_seq = "conditioner->drafter->backbone->tokenizer"
    _optional_components = ["conditioner", "drafter"]  # noqa: RUF012 - diffusers reads a list
    _callback_tensor_inputs = ("codes", "num_committed")
    _stored_class = "ImagePipeline"  # what an index may call such a folder, whatever a subclass is called

    def __init__(
        self,
        tokenizer: Tokenizer | None,
        backbone: Model,
        sampler: Sampler,
        conditioner: Conditioner | None = None,
        drafter: nn.Module | None = None,
        eagle: nn.Module | None = None,
    ) -> None:
        super().__init__()
        self.register_modules(
            tokenizer=tokenizer, backbone=backbone, sampler=sampler, conditioner=conditioner, drafter=drafter
        )
        self._stored_drafters = StoredDrafters()
        self._stored_drafters.put("eagle", eagle)
        self._interrupt = False
        self._check_components()

    def __setattr__(self, name: str, value: Any) -> None:
        super().__setattr__(name, value)
        if name in self._optional_components and name in self.config:
            # diffusers forgets the class of a component that was left out at first; saving would then drop it
            self.register_to_config(**{name: index_entry(value)})

    @classmethod
    def from_pretrained(cls, pretrained_model_name_or_path: str | PathLike[str], **kwargs: Any) -> Self:
        """Load a pipeline.

        Args:
            pretrained_model_name_or_path: name of a shipped model (``vargen models`` lists them), a folder, or the id
                of a repository on the Hugging Face Hub.
            kwargs: those of ``DiffusionPipeline.from_pretrained``; components given by name replace the stored ones.
                ``dtype`` (default float32, whatever the files hold) works with every version of diffusers. Options with
                which a folder would run code of its own (``custom_pipeline``, ``trust_remote_code``) are refused.

        Raises:
            ValueError: unknown name (the nearest are shown), incomplete or damaged folder, a folder that holds code or
                names a class that it may not (``vargen.validation.classes`` lists those it may); nothing was imported or loaded then.
        """
        check_options(kwargs)
        found = resolve_model(str(pretrained_model_name_or_path))
        folder = Path(found) if Path(found).is_dir() else Path(cls.download(found, **dtype_argument(kwargs)))
        with one_line(folder):
            index = read_index(folder, kwargs)
            check_class(folder, index, cls._stored_class)
            check_complete(folder, index, cls, kwargs)
            cls._check_settings(index)
            stored = StoredDrafters.of_folder(folder)
            kwargs |= load_shared(folder, index, kwargs)
            pipe = super().from_pretrained(str(folder), **dtype_argument(kwargs))
            for name, drafter in {name: kwargs[name] for name in EARLIER if name in kwargs}.items():
                stored.put(name, drafter)
            pipe._stored_drafters = stored
            return pipe

    def save_pretrained(self, save_directory: str | PathLike[str], *args: Any, **kwargs: Any) -> None:
        """Write the pipeline to a folder, drafters that are stored by name included; arguments as in diffusers."""
        super().save_pretrained(save_directory, *args, **kwargs)
        self._stored_drafters.save(Path(save_directory))

    @property
    def drafters(self) -> list[str]:
        """Names of the drafters that are stored beside the one in the slot."""
        return self._stored_drafters.names

    def load_drafter(self, name: str) -> None:
        """Put the drafter stored under ``name`` into the slot ``drafter``.

        Raises:
            ValueError: no drafter of that name; those that are stored are shown.
        """
        self.drafter = self._stored_drafters.load(name, self.backbone)
        self._check_components()

    @property
    def eagle(self) -> nn.Module | None:
        """The drafter stored as "eagle", or None; ``load_drafter`` and ``drafter=`` take any by name."""
        return self._stored_drafters.load("eagle", self.backbone) if "eagle" in self._stored_drafters else None

    @eagle.setter
    def eagle(self, drafter: nn.Module | None) -> None:
        self._stored_drafters.put("eagle", drafter)
        self._check_components()

    def _drafter_for(self, sampler: Sampler, wanted: DrafterInput) -> Any:
        """The drafter of one call: the one asked for, else one that the sampler prefers, else that of the slot."""
        if wanted is None:
            preferred = getattr(sampler, "preferred_drafter", None)
            found = preferred if preferred is not None and preferred in self._stored_drafters else self.drafter
        else:
            found = wanted
        found = self._stored_drafters.load(found, self.backbone) if isinstance(found, str) else found
        if found is not None:
            warn_of_other_target(found, self.backbone)
        return found

    @classmethod
    def _check_settings(cls, index: dict[str, Any]) -> None:
        """Raise ``ValueError`` for settings of the pipeline itself, before components are loaded."""

    @classmethod
    def _dict_from_json_file(cls, json_file: str | PathLike[str], dduf_entries: Any = None) -> dict[str, Any]:
        """What diffusers reads an index with, from folders and, before it downloads the rest, from the Hub.

        Older versions hand in archives too; ``check_options`` has refused them.
        """
        index = read_settings(Path(json_file))
        if Path(json_file).name == INDEX_FILE:
            check_index(Path(json_file), index)
            index = {name: entry for name, entry in index.items() if name not in EARLIER}  # found by StoredDrafters
        return index

    @classmethod
    def from_transformers(
        cls, model: nn.Module, processor: Any, *, sampler: Sampler | None = None, **options: Any
    ) -> Self:
        """Make a pipeline of a transformers image model; see ``vargen.wrap`` for models and options.

        Args:
            model: used as it is, never changed.
            processor: the model's own.
            sampler: default speculative Jacobi decoding (the law of next-token sampling in fewer forwards) with the
                guidance, temperature, top-k and top-p of the model's generation_config.
            options: of the adapter, such as ``grid_size=(h, w)`` in codes.
        """
        from vargen.adapters.wrap import pipeline_components  # transformers is needed here only

        return cls(**pipeline_components(model, processor, sampler, options))

    @property
    def interrupt(self) -> bool:
        """Set it to ``True`` (``pipe._interrupt = True``, from a callback or another thread) to stop after the current step."""
        return self._interrupt

    @torch.no_grad()
    def __call__(
        self,
        prompt: PromptInput = None,
        class_labels: LabelInput = None,
        image: ImageInput = None,
        mask_image: ImageInput = None,
        num_images_per_prompt: int = 1,
        guidance_scale: float | None = None,
        temperature: float | None = None,
        top_k: int | None = None,
        top_p: float | None = None,
        seed: int | list[int] | None = None,
        generator: torch.Generator | list[torch.Generator] | None = None,
        output_type: str = "pil",
        return_dict: bool = True,
        callback_on_step_end: Callable[..., Any] | None = None,
        callback_on_step_end_tensor_inputs: Sequence[str] = ("codes",),
        batch_size: int | None = None,
        drafter: DrafterInput = None,
        **sampler_overrides: Any,
    ) -> ImagePipelineOutput | tuple[Any, ...]:
        """Generate ``num_images_per_prompt`` images for every prompt or class label, prompt-major.

        Args:
            prompt: one text or several; give either prompts or class labels.
            class_labels: ids, or names where the conditioner knows names.
            image: to edit, with next-scale models: PIL images or [P, 3, H, W] in [0, 1], one for all prompts or one each.
                Without prompt and class labels the hole is filled in under the null condition.
            mask_image: where to draw anew (white, True), PIL image or [H, W] or [P, H, W]; codes elsewhere are kept.
            num_images_per_prompt: images of each prompt.
            guidance_scale: ``u + guidance_scale * (c - u)``, 1 is off; ``None`` keeps the sampler's own, as below.
            temperature: divides the logits; 0 is greedy.
            top_k: keep so many codes; 0 is off.
            top_p: keep so much probability, in (0, 1]; 1 is off.
            seed: image i uses ``seed + i``; a list holds one seed an image. ``None`` draws one from torch's global
                generator; the output tells which.
            generator: gives one 64-bit seed an image (a list: one generator an image); not together with ``seed``.
            output_type: ``"pil"``, ``"pt"`` ([B, 3, H, W] in [0, 1]), ``"np"`` ([B, H, W, 3] in [0, 1]) or ``"codes"``.
            return_dict: ``False`` returns the tuple ``(images, codes, seeds, stats)``.
            callback_on_step_end: called after every forward pass as ``callback(pipe, step, num_forwards, tensors)``.
                ``tensors`` is a dictionary; it can be looked at, not changed.
            callback_on_step_end_tensor_inputs: what ``tensors`` holds: ``"codes"`` ([b, N] of the images in work, -1
                where not drawn), ``"num_committed"`` ([b]).
            batch_size: images decoded at a time; less memory, the same images.
            drafter: for this call, in place of the one in the slot: a model, the name of a stored one (``pipe.drafters``), or of
                one that needs no model, such as ``"row-above"``.
            sampler_overrides: other settings of the sampler for this call, such as ``window=16``.

        Returns:
            Images, codes ([B, N] int64, a list over scales for next-scale models, tokens [B, N, D] for continuous ones), the seed of every image and the statistics of the decode.

        Raises:
            ValueError: an argument out of range, before any work; see each one.
        """
        # 1. Check everything
        inputs.check_options(
            output_type,
            num_images_per_prompt,
            batch_size,
            callback_on_step_end,
            callback_on_step_end_tensor_inputs,
            self._callback_tensor_inputs,
            return_dict,
        )
        self._check_components()
        if self.tokenizer is None and output_type != "codes":
            raise ValueError("this pipeline has no pixel decoder; use output_type='codes'")
        shared = {"guidance_scale": guidance_scale, "temperature": temperature, "top_k": top_k, "top_p": top_p}
        changes = {name: value for name, value in shared.items() if value is not None} | sampler_overrides
        sampler = self.sampler.replace(**changes) if changes else self.sampler
        sampler.check_backbone(self.backbone)
        drafting = self._drafter_for(sampler, drafter)
        edit = read_edit(self.tokenizer, image, mask_image)
        given = prompt if prompt is not None else class_labels if class_labels is not None else edit and edit[0]
        inputs.check_rows(given, num_images_per_prompt, seed, generator)

        with inputs.evaluating(self._modules()):
            # 2. Conditions and seeds, one row an image
            if edit is not None and prompt is None and class_labels is None:
                rows = self.backbone.null_condition(len(edit[0]))
            else:
                rows = self.encode_condition(prompt, class_labels)
            kept = edit and forced_codes(self.tokenizer, edit, inputs.condition_rows(rows), num_images_per_prompt)
            condition = inputs.repeat_condition(rows, num_images_per_prompt)
            seeds = image_seeds(seed, generator, inputs.condition_rows(condition))
            if edit is None and prompt is not None:  # a given image says the rest itself
                condition = inputs.complete_condition(self.conditioner, condition, seeds)

            # 3. Draw codes, 4. decode them
            watch = Watch(self, callback_on_step_end, tuple(callback_on_step_end_tensor_inputs))
            at_once = min(batch_size or len(seeds), len(seeds))
            drawn = self._draw(sampler, (condition, kept), seeds, at_once, watch, drafting)
            images = None if output_type == "codes" else self._to_images(drawn, output_type, at_once)
        tokens = drawn.latents if is_continuous(self.backbone) else drawn.codes
        codes = split_codes(cast(Tensor, tokens), self.backbone)
        output = ImagePipelineOutput(images=images, codes=codes, seeds=seeds, stats=drawn.stats)
        return output if return_dict else (images, codes, seeds, drawn.stats)

    def encode_condition(self, prompt: PromptInput = None, class_labels: LabelInput = None) -> ConditionInput:
        """Turn prompts or class labels into the condition of the backbone, one row a prompt, on its device.

        Raises:
            ValueError: neither or both given, empty prompt, unknown words, labels out of range.
        """
        if (prompt is None) == (class_labels is None):
            got = "neither" if prompt is None else "both"
            raise ValueError(f"give either prompt or class_labels, got {got}")
        prompts = None if prompt is None else inputs.read_prompts(prompt)
        labels = None if class_labels is None else inputs.read_class_labels(class_labels)
        if self.conditioner is not None:
            condition = self.conditioner.encode(prompts=prompts, class_labels=labels)
        elif labels is None:
            raise ValueError("this pipeline has no conditioner and so reads no prompts; give class_labels")
        else:
            condition = inputs.class_ids(labels, getattr(self.backbone.config, "num_classes", None))
        return inputs.move_condition(condition, self.backbone.device)

    @torch.no_grad()
    def decode_codes(self, codes: Tensor) -> Tensor:
        """Turn codes ``[B, N]``, -1 where not drawn, into images ``[B, 3, H, W]`` around [-1, 1], grey where not drawn.

        Useful inside a callback to watch an image grow. Codes of next-scale models give the picture of the scales drawn.
        """
        if is_continuous(self.backbone):
            return decode_tokens(self.tokenizer, self.backbone, codes, UNDRAWN)
        if hasattr(self.tokenizer, "decode_partial"):
            return decode_scales(self.tokenizer, codes, UNDRAWN)
        grid = codes.unflatten(1, tuple(self.backbone.grid_size))
        images = self.tokenizer.decode(grid.clamp(min=0))
        if bool((grid < 0).any()):
            side = self.tokenizer.downsample
            missing = (grid < 0).repeat_interleave(side, dim=1).repeat_interleave(side, dim=2)
            images = images.masked_fill(missing[:, None], UNDRAWN)
        return images

    def _draw(
        self, sampler: Sampler, given: Rows, seeds: list[int], batch_size: int, watch: Watch, drafter: Any = None
    ) -> SamplerOutput:
        parts: list[SamplerOutput] = []
        self._interrupt = False
        watch.open(len(seeds))
        try:
            for start in range(0, len(seeds), batch_size):
                rows = slice(start, start + batch_size)
                part = self._draw_rows(sampler, inputs.take_condition(given, rows), seeds[rows], watch, drafter)
                parts.append(part)
        finally:
            watch.close()
        whole = [flatten_codes(part.codes, self.backbone.num_codes) for part in parts if part.codes is not None]
        codes = torch.cat(whole) if whole else None
        drawn = [part.latents for part in parts if part.latents is not None]
        latents = torch.cat(drawn) if len(drawn) == len(parts) else None
        return SamplerOutput(codes, seeds, inputs.merge_stats([part.stats for part in parts]), latents)

    def _draw_rows(self, sampler: Sampler, given: Rows, seeds: list[int], watch: Watch, drafter: Any) -> SamplerOutput:
        if self._interrupt:
            return self._undrawn(seeds)
        condition, kept = given
        try:
            return sampler.sample(
                self.backbone,
                condition,
                seeds=seeds,
                tokenizer=self.tokenizer,
                drafter=drafter,
                callback=watch,
                **({} if kept is None else {"forced_codes": kept}),
            )
        except DecodeInterrupted as stop:
            note = f"interrupted after {stop.state.num_forwards} forward passes"
            stats = DecodeStats(num_forwards=stop.state.num_forwards, guarantee=sampler.guarantee, notes=[note])
            return self._part(stop.state.codes.clone(), seeds, stats)
        except torch.OutOfMemoryError:
            raise torch.OutOfMemoryError(
                f"out of GPU memory while drawing {len(seeds)} images at a time; lower batch_size below {len(seeds)}, "
                "or use pipe.to(torch.bfloat16)"
            ) from None

    def _undrawn(self, seeds: list[int]) -> SamplerOutput:
        stats = DecodeStats(notes=["interrupted before some images were begun"])
        if is_continuous(self.backbone):
            return self._part(undrawn_tokens(self.backbone, len(seeds)), seeds, stats)
        return self._part(
            torch.full(
                (len(seeds), self.backbone.num_codes, *token_shape(self.backbone)), -1, device=self.backbone.device
            ),
            seeds,
            stats,
        )

    def _part(self, tokens: Tensor, seeds: list[int], stats: DecodeStats) -> SamplerOutput:
        if is_continuous(self.backbone):
            return SamplerOutput(None, seeds, stats, tokens)
        return SamplerOutput(tokens, seeds, stats)

    def _to_images(self, drawn: SamplerOutput, output_type: str, batch_size: int) -> Pictures:
        decode, rows = self.decode_codes, drawn.codes
        if drawn.latents is not None:  # what was summed or drawn itself: codes need not tell all of it
            decode = decode if is_continuous(self.backbone) else self.tokenizer.decode_latents
            rows = drawn.latents
        assert isinstance(rows, Tensor)
        images = torch.cat([decode(part) for part in rows.split(batch_size)])
        if output_type == "pil":
            return to_pil(images)
        pixels = (images.float() / 2 + 0.5).clamp(0, 1).cpu()
        return pixels if output_type == "pt" else pixels.permute(0, 2, 3, 1).numpy()

    def _modules(self) -> list[nn.Module]:
        return [component for component in self.components.values() if isinstance(component, nn.Module)]

    def _check_components(self) -> None:
        over_codes = ("tokenizer", "backbone", "drafter")
        bits = [getattr(getattr(self, name), "num_bits", None) for name in over_codes[:2]]
        if self.tokenizer is not None and bits[0] != bits[1]:
            got = " and ".join("codes" if count is None else f"{count} bits" for count in bits)
            raise ValueError(
                f"tokenizer and backbone must have the same tokens, got {got} a position; take both from one model"
            )
        sizes = {name: getattr(getattr(self, name), "codebook_size", None) for name in over_codes}
        for name in ("tokenizer", "drafter"):
            if None not in (sizes[name], sizes["backbone"]) and sizes[name] != sizes["backbone"]:
                raise ValueError(
                    f"{name} and backbone must have the same codebook size, got {sizes[name]} and {sizes['backbone']}; "
                    "take both from one model"
                )
        check_autoencoder(self.tokenizer, self.backbone)
        inputs.check_dtype({name: value for name, value in self.components.items() if isinstance(value, nn.Module)})

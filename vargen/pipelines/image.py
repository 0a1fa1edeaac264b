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
    check_saved,
    dtype_argument,
    hub_folder,
    index_entry,
    load_shared,
    read_index,
    register_library,
    register_pipeline,
)
from vargen.pipelines.continuous import check_autoencoder, decode_tokens, is_continuous, undrawn_tokens
from vargen.pipelines.drafters import EARLIER, StoredDrafters, warn_of_other_target
from vargen.pipelines.editing import forced_codes, read_edit
from vargen.pipelines.guided import negative_rows, sized
from vargen.pipelines.outputs import ImagePipelineOutput
from vargen.pipelines.progress import DecodeInterrupted, Watch, interrupt_calls, is_interrupted
from vargen.pipelines.scales import decode_scales, flatten_codes, split_codes
from vargen.pipelines.types import DrafterInput, ImageInput, LabelInput, Pictures, PromptInput, Rows, SeedInput
from vargen.protocols import ConditionInput, Model, Tokenizer
from vargen.random import image_seeds
from vargen.registry import resolve_model
from vargen.samplers.base import Sampler
from vargen.samplers.scale.state import token_shape
from vargen.validation.checks import check_names
from vargen.validation.folders import one_line, read_settings
from vargen.validation.reading import local_path
from vargen.validation.rgb import Background

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
        self._check_components()

    def __setattr__(self, name: str, value: Any) -> None:
        if name in ("guidance_scale", "_guidance_scale"):
            raise ValueError(
                f"{name} of a pipeline is not read: guidance is a setting of its sampler; pass guidance_scale=... to the call, "
                "and guidance_schedule or guidance_interval where it should change while codes are drawn"
            )
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
        folder = Path(found) if Path(found).is_dir() else hub_folder(cls, found, dtype_argument(kwargs))
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
        """Write the pipeline to a folder, drafters that are stored by name included; arguments as in diffusers.

        Raises:
            ValueError: a model of transformers, which is saved by its own ``save_pretrained``.
        """
        folder = local_path(save_directory)
        check_saved(self.components)
        self._stored_drafters.save(folder)  # first, so that push_to_hub=True finds them
        super().save_pretrained(str(folder), *args, **kwargs)

    def push_to_hub(self, *args: Any, **kwargs: Any) -> str:
        """Upload the pipeline to the Hub, drafters that are stored by name included; arguments as in diffusers."""
        check_saved(self.components)
        return str(super().push_to_hub(*args, **kwargs))

    @classmethod
    def from_pipe(cls, pipeline: DiffusionPipeline, **kwargs: Any) -> Self:
        """Make another pipeline over the same components; nothing is copied.

        Args:
            pipeline: of vargen.
            kwargs: components and settings that replace those of ``pipeline``, such as ``sampler``; ``dtype`` (``torch_dtype``)
                casts the components, those of ``pipeline`` too.

        Raises:
            ValueError: a pipeline of another library, components that do not fit, or an unknown name.
        """
        if not isinstance(pipeline, ImagePipeline):
            raise ValueError(
                f"from_pipe takes a pipeline of vargen, got {type(pipeline).__name__}; build it from components"
            )
        dtype = kwargs.pop("dtype", kwargs.pop("torch_dtype", None))
        required, optional = cls._get_signature_keys(cls)
        known = [name for name in (*required, *optional) if name not in EARLIER]
        check_names(kwargs, [*known, "dtype"], f"{cls.__name__}.from_pipe")
        taken = {
            **pipeline.components,
            **{name: pipeline.config[name] for name in optional if name in pipeline.config},
        }
        given = {name: value for name, value in taken.items() if name in known} | kwargs
        pipe = cls(**given)
        pipe._stored_drafters.update(pipeline._stored_drafters)
        pipe._progress_bar_config = dict(getattr(pipeline, "_progress_bar_config", {}))
        return pipe if dtype is None else pipe.to(dtype)

    def register_to_config(self, **kwargs: Any) -> None:
        """Keep settings; of a folder that diffusers has loaded the stored drafters are found here."""
        super().register_to_config(**kwargs)
        folder = Path(str(kwargs.get("_name_or_path") or ""))
        if kwargs.get("_name_or_path") and folder.is_dir() and hasattr(self, "_stored_drafters"):
            self._stored_drafters.update(StoredDrafters.of_folder(folder))

    @classmethod
    def extract_init_dict(cls, config_dict: dict[str, Any], **kwargs: Any) -> Any:
        """Check the names of an index before diffusers imports what they name; see ``vargen.validation.classes``."""
        check_index(Path(INDEX_FILE), {"_class_name": cls._stored_class, **config_dict})
        return super().extract_init_dict(config_dict, **kwargs)

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

    @classmethod
    def from_original(cls, path: str | PathLike[str], *, sampler: Sampler | None = None, **options: Any) -> Self:
        """Make a pipeline of Janus, Janus-Pro or Emu3 as their authors publish them; nothing of theirs is run.

        The components are those of ``from_transformers``: the model is transformers' own class around the tensors of the
        files, the processor is made of the vocabulary beside them. Without one, prompts are token ids.

        Args:
            path: a local folder (weights in shards with an index or in one file, ``config.json``, vocabulary), or one file.
            sampler: as in ``from_transformers``.
            options: ``dtype`` (default that of the file), ``device_map`` and other options of loading in transformers; of
                Janus ``roles`` (``("User", "Assistant")`` for Janus-1.3B) and ``token_ids``; of Emu3
                ``vision_tokenizer``, the folder of ``BAAI/Emu3-VisionTokenizer``; ``config``, for what neither shapes nor
                ``config.json`` tell; of the adapter, such as ``grid_size=(h, w)`` in codes.

        Raises:
            CheckpointError: a ``ValueError``: missing or extra keys, other shapes, another family, pickled code.
            ValueError: no such file, unknown options, settings that nothing tells.

        Example:
            >>> pipe = ImagePipeline.from_original("Janus-Pro-1B", dtype=torch.bfloat16)  # doctest: +SKIP
            >>> pipe("a red fox in the snow", seed=0).images[0]  # doctest: +SKIP
        """
        from vargen.adapters.original import original_components  # transformers is needed here only

        return cls(**original_components(Path(path), sampler, options))

    @property
    def model_cpu_offload_seq(self) -> str:  # type: ignore[override]
        """The order in which ``enable_model_cpu_offload`` has one model after the other on the device.

        Models that work in turn with the backbone (a drafter, the tokenizer of a next-scale model) are left out, and so stay
        on the device until the call ends: they would be moved in every step.
        """
        return (
            "conditioner->backbone" if hasattr(self.tokenizer, "scale_inputs") else "conditioner->backbone->tokenizer"
        )

    @property
    def guidance_scale(self) -> float:
        """That of the sampler, which a call may replace."""
        return float(self.sampler.guidance_scale)

    @property
    def interrupt(self) -> bool:
        """Whether a call is to stop after its current step: this thread's, or for a thread without one any.

        ``pipe._interrupt = True`` in a callback stops the call that runs it and no other. From a thread that runs no call of
        this pipeline it stops all that run, since none is meant more than the others. It does not outlast them.
        """
        return is_interrupted(self)

    @property
    def _interrupt(self) -> bool:
        return is_interrupted(self)

    @_interrupt.setter
    def _interrupt(self, stop: bool) -> None:
        interrupt_calls(self, bool(stop))

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
        seed: SeedInput = None,
        generator: torch.Generator | list[torch.Generator] | None = None,
        output_type: str = "pil",
        return_dict: bool = True,
        callback_on_step_end: Callable[..., Any] | None = None,
        callback_on_step_end_tensor_inputs: Sequence[str] = ("codes",),
        batch_size: int | None = None,
        drafter: DrafterInput = None,
        background: Background | None = None,
        negative_prompt: PromptInput = None,
        height: int | None = None,
        width: int | None = None,
        aspect_ratio: str | None = None,
        pixels: str | None = None,
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
            seed: image i uses ``seed + i``; a list, array or tensor holds one seed an image. ``None`` draws one from torch's global
                generator; the output tells which.
            generator: gives one 64-bit seed an image (a list: one generator an image); not together with ``seed``.
            output_type: ``"pil"``, ``"pt"`` ([B, 3, H, W] in [0, 1]), ``"np"`` ([B, H, W, 3] in [0, 1]) or ``"codes"``.
            return_dict: ``False`` returns the tuple ``(images, codes, seeds, stats)``.
            callback_on_step_end: called after every forward pass as ``callback(pipe, step, num_forwards, tensors)``. ``step``
                counts forward passes of the backbone from 0, over all chunks of ``batch_size``, the pass over the condition
                included; under speculation a step makes several codes permanent, of every image another number
                (``"num_committed"``), and passes of a drafter are no steps. ``tensors`` is a dictionary; it can be looked
                at, not changed, and may be returned as diffusers' callbacks do.
            callback_on_step_end_tensor_inputs: what ``tensors`` holds: ``"codes"`` ([b, N] of the images in work, -1
                where not drawn), ``"num_committed"`` ([b]).
            batch_size: images decoded at a time; less memory, the same images.
            background: colour behind transparent pixels of ``image``: a name, ``"#rrggbb"`` or three integers.
            drafter: for this call, in place of the one in the slot: a model, the name of a stored one (``pipe.drafters``), or of
                one that needs no model, such as ``"row-above"``.
            negative_prompt: what guidance leads away from, one text or one a prompt, for models that read prompts.
            height: of the images in pixels, for models of many picture sizes (Infinity), with
            width: theirs; a pair that the model does not know is refused with the nearest.
            aspect_ratio: height to width in place of both, such as ``"3:2"``.
            pixels: about how many, ``"0.06M"``, ``"0.25M"``, ``"0.6M"`` or ``"1M"``, with ``aspect_ratio``; ``None`` is ``"1M"``.
            sampler_overrides: other settings of the sampler for this call, such as ``window=16``.

        Returns:
            Images, codes ([B, N] int64, a list over scales for next-scale models, tokens [B, N, D] for continuous ones), the seed of every image and the statistics of the decode.

        Raises:
            ValueError: an argument out of range, before any work; see each one.
        """
        size = {"height": height, "width": width, "aspect_ratio": aspect_ratio, "pixels": pixels}
        size = {name: value for name, value in size.items() if value is not None}
        if size and not hasattr(self.backbone, "with_size"):
            sampler_overrides |= size  # refused there, with what to use instead
        elif size:
            return cast(Any, sized(self, height, width, aspect_ratio, pixels))(
                prompt,
                class_labels,
                image,
                mask_image,
                num_images_per_prompt,
                guidance_scale,
                temperature,
                top_k,
                top_p,
                seed,
                generator,
                output_type,
                return_dict,
                callback_on_step_end,
                callback_on_step_end_tensor_inputs,
                batch_size,
                drafter,
                background,
                negative_prompt,
                **sampler_overrides,
            )
        if negative_prompt is not None and self.conditioner is None:
            sampler_overrides["negative_prompt"] = negative_prompt
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
        inputs.check_dtype(self.components)
        if self.tokenizer is None and output_type != "codes":
            raise ValueError("this pipeline has no pixel decoder; use output_type='codes'")
        shared = {"guidance_scale": guidance_scale, "temperature": temperature, "top_k": top_k, "top_p": top_p}
        changes = {name: value for name, value in shared.items() if value is not None} | sampler_overrides
        sampler = self.sampler.replace(**changes) if changes else self.sampler
        sampler.check_backbone(self.backbone)
        drafting = self._drafter_for(sampler, drafter)
        edit = read_edit(self.tokenizer, image, mask_image, background)
        given = prompt if prompt is not None else class_labels if class_labels is not None else edit and edit[0]
        inputs.check_rows(given, num_images_per_prompt, seed, generator)

        with inputs.evaluating(self._modules()):
            # 2. Conditions and seeds, one row an image
            if edit is not None and prompt is None and class_labels is None:
                rows = self._null_rows(len(edit[0]))
            else:
                rows = self.encode_condition(prompt, class_labels)
            kept = edit and forced_codes(self.tokenizer, edit, inputs.condition_rows(rows), num_images_per_prompt)
            away = negative_rows(self, negative_prompt, sampler, inputs.condition_rows(rows))
            away = None if away is None else inputs.repeat_condition(away, num_images_per_prompt)
            condition = inputs.repeat_condition(rows, num_images_per_prompt)
            seeds = image_seeds(seed, generator, inputs.condition_rows(condition))
            if edit is None and prompt is not None:  # a given image says the rest itself
                condition = inputs.complete_condition(self.conditioner, condition, seeds)

            # 3. Draw codes, 4. decode them
            watch = Watch(self, callback_on_step_end, tuple(callback_on_step_end_tensor_inputs))
            at_once = min(batch_size or len(seeds), len(seeds))
            drawn = self._draw(sampler, (condition, kept, away), seeds, at_once, watch, drafting)
            images = None if output_type == "codes" else self._to_images(drawn, output_type, at_once)
        self.maybe_free_model_hooks()
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

    def _null_rows(self, num_rows: int) -> ConditionInput:
        """The condition that says nothing: the backbone's own, or the encoded empty text."""
        if not getattr(self.backbone, "needs_negative", False) or self.conditioner is None:
            return self.backbone.null_condition(num_rows)
        return inputs.move_condition(self.conditioner.encode_negative([""] * num_rows), self.backbone.device)

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
        if watch.interrupted:
            return self._undrawn(seeds)
        condition, kept, away = given
        try:
            return sampler.sample(
                self.backbone,
                condition,
                seeds=seeds,
                tokenizer=self.tokenizer,
                drafter=drafter,
                callback=watch,
                **({} if kept is None else {"forced_codes": kept}),
                **({} if away is None else {"negative": away}),
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


register_pipeline(ImagePipeline)

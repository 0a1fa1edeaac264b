"""What the user gave to a pipeline call, checked and spread over the images, before any work is done.

Letters: P prompts (or class labels), B = P * num_images_per_prompt images, prompt-major.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from numbers import Integral
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from vargen.conditioners.base import MAX_ROWS, Conditioner, check_prompt
from vargen.hooks import execution_device
from vargen.outputs import DecodeStats, Guarantee
from vargen.pipelines.types import LabelInput, PromptInput, Rows
from vargen.protocols import ConditionInput
from vargen.random import check_seeds
from vargen.validation.checks import check_flag, shown

OUTPUT_TYPES = ("pil", "pt", "np", "codes")
MAX_IMAGES = MAX_ROWS  # of one call: more than FID's 50,000, and few enough that conditions and seeds are no burden
_INTEGERS = (torch.uint8, torch.int8, torch.int16, torch.int32, torch.int64)
_WEAKEST_LAST: tuple[Guarantee, ...] = ("exact", "relaxed", "heuristic")


def check_options(
    output_type: str,
    num_images_per_prompt: int,
    batch_size: int | None,
    callback: Callable[..., Any] | None,
    callback_inputs: Sequence[str],
    known_callback_inputs: Sequence[str],
    return_dict: bool = True,
) -> None:
    """Raise ``ValueError`` for options of a pipeline call that are out of range."""
    if not isinstance(output_type, str) or output_type not in OUTPUT_TYPES:
        raise ValueError(f"output_type must be one of {', '.join(map(repr, OUTPUT_TYPES))}, got {shown(output_type)}")
    check_flag("return_dict", return_dict)
    check_count("num_images_per_prompt", num_images_per_prompt, MAX_IMAGES)
    if batch_size is not None:
        check_count("batch_size", batch_size)
    if callback is not None and not callable(callback):
        raise ValueError(f"callback_on_step_end must be callable, got {type(callback).__name__}")
    if not isinstance(callback_inputs, list | tuple):
        raise ValueError(f"callback_on_step_end_tensor_inputs must be a list of names, got {shown(callback_inputs)}")
    unknown = [name for name in callback_inputs if not isinstance(name, str) or name not in known_callback_inputs]
    if unknown:
        known = ", ".join(known_callback_inputs)
        raise ValueError(f"callback_on_step_end_tensor_inputs must be among {known}, got {shown(unknown)}")


def check_count(name: str, value: Any, most: int | None = None) -> None:
    """Raise ``ValueError`` unless a number is an integer of at least 1, and at most so many."""
    if isinstance(value, bool) or not isinstance(value, Integral) or int(value) < 1:
        raise ValueError(f"{name} must be an integer of at least 1, got {shown(value)}")
    if most is not None and int(value) > most:
        raise ValueError(f"{name} must be at most {most}, got {shown(value)}; call the pipeline several times")


def check_rows(given: Any, times: int, seed: Any, generator: Any) -> None:
    """Raise ``ValueError`` for more images than one call draws, or seeds that are not theirs.

    Args:
        given: prompts, class labels or whatever the call has one of for each row; of another type it is passed over,
            its own check refuses it.
        times: images of each.
        seed, generator: those of the call.
    """
    if isinstance(given, str | Integral | None):
        rows = 1
    elif isinstance(given, list | tuple) or (isinstance(given, Tensor | np.ndarray) and given.ndim):
        rows = len(given)
    elif isinstance(given, range):
        rows = len(given[: MAX_IMAGES + 1])
    else:
        return
    if rows * times > MAX_IMAGES:
        raise ValueError(
            f"one call draws at most {MAX_IMAGES} images, got {rows} times {times}; call it several times"
        )
    if rows:
        check_seeds(seed, generator, rows * times)


def check_dtype(components: dict[str, Any]) -> None:
    """Raise ``ValueError`` for float16 weights that would work on a CPU, where torch has no float16 arithmetic worth the name.

    They may be loaded and lie there: a GPU may follow, by ``to`` or by offloading.
    """
    for name, module in components.items():
        weight = next(module.parameters(), None) if isinstance(module, nn.Module) else None
        if weight is None or weight.dtype != torch.float16:
            continue
        if execution_device(module).type == "cpu":
            raise ValueError(
                f"{name} has float16 weights on the CPU, which is not supported; use pipe.to(torch.float32) or "
                "pipe.to(torch.bfloat16)"
            )


def read_prompts(prompt: PromptInput) -> list[str]:
    """Return the prompts as a list of non-empty strings."""
    listed = prompt.tolist() if isinstance(prompt, np.ndarray | np.generic) else prompt
    prompts = [listed] if isinstance(listed, str) else listed
    if not isinstance(prompts, (list, tuple)) or not all(isinstance(text, str) for text in prompts):
        raise ValueError(f"prompt must be a string or a list of strings, got {_described(prompt)}")
    if not prompts:
        raise ValueError("prompt is an empty list; give at least one prompt")
    for index, text in enumerate(prompts):
        where = f"prompt {index} of {len(prompts)}" if len(prompts) > 1 else "the prompt"
        check_prompt(text, where)
        if not text.strip():
            raise ValueError(f"{where} is empty; describe the image in words")
    return list(prompts)


def read_class_labels(labels: LabelInput) -> list[int | str]:
    """Return class labels (ids, or names for conditioners that know names) as a list."""
    if isinstance(labels, Tensor | np.ndarray):
        words = isinstance(labels, np.ndarray) and labels.dtype.kind in "iuU"  # integers or texts
        whole = (words or labels.dtype in _INTEGERS) and labels.ndim <= 1
        if not whole or getattr(labels, "is_meta", False) or (labels.ndim and len(labels) > MAX_IMAGES):
            raise ValueError(f"class_labels must be integers [P], got {labels.dtype} {tuple(labels.shape)}")
        labels = labels.tolist()
    listed = [labels] if isinstance(labels, (str, Integral)) else labels
    if isinstance(listed, range):
        listed = listed[: MAX_IMAGES + 1]  # its length may be beyond len()
    if not isinstance(listed, (list, tuple, range)) or not len(listed):
        raise ValueError(f"class_labels must be an integer, a name, or a list of them, got {_described(labels)}")
    if len(listed) > MAX_IMAGES:
        raise ValueError(f"one call draws at most {MAX_IMAGES} images, got more class_labels; call it several times")
    for label in listed:
        if isinstance(label, bool) or not isinstance(label, (str, Integral)):
            raise ValueError(f"class_labels must be integers or names, got {shown(label)}")
    return [label if isinstance(label, str) else int(label) for label in listed]


def class_ids(labels: Sequence[int | str], num_classes: int | None) -> Tensor:
    """Turn integer class labels into ``[P]`` int64, for pipelines without a conditioner."""
    for label in labels:
        if isinstance(label, str):
            raise ValueError(
                f"class_labels must be integers for this pipeline (it has no conditioner), got {shown(label)}"
            )
        if not 0 <= label < (2**63 if num_classes is None else num_classes):
            allowed = "at least 0" if num_classes is None else f"in 0..{num_classes - 1}"
            raise ValueError(f"class_labels must be {allowed}, got {shown(label)}")
    return torch.tensor(labels, dtype=torch.int64)


def repeat_condition(condition: Rows, times: int) -> Rows:
    """Repeat every row ``times`` times, prompt-major; conditions are tensors or tuples of tensors (P first)."""
    check_count("the number of images", condition_rows(condition) * times, MAX_IMAGES)
    return _map(condition, lambda rows: rows.repeat_interleave(times, dim=0))


def take_condition(condition: Rows, rows: slice) -> Rows:
    """Return some rows of a condition."""
    return _map(condition, lambda tensor: tensor[rows])


def move_condition(condition: Rows, device: torch.device) -> Rows:
    """Return the condition on a device."""
    return _map(condition, lambda tensor: tensor.to(device))


def complete_condition(conditioner: Conditioner | None, condition: ConditionInput, seeds: list[int]) -> ConditionInput:
    """Let a conditioner that can decide what prompts leave open, row i by ``seeds[i]``."""
    complete = getattr(conditioner, "complete", None)
    return condition if complete is None else complete(condition, seeds)


def condition_rows(condition: ConditionInput) -> int:
    """P, the number of rows."""
    return len(condition) if isinstance(condition, Tensor) else len(condition[0])


def _map(condition: Rows, function: Callable[[Tensor], Tensor]) -> Rows:
    if isinstance(condition, Tensor):
        return function(condition)
    parts: list[Any] = [None if part is None else _map(part, function) for part in condition]
    return type(condition)(*parts) if hasattr(condition, "_fields") else tuple(parts)  # named tuples keep their names


@contextmanager
def evaluating(modules: Sequence[nn.Module]) -> Iterator[None]:
    """Switch dropout off for the time of a call, so that a model in training can be sampled from."""
    training = [part for module in modules for part in module.modules() if part.training]
    for part in training:
        part.training = False  # one by one: .eval() and .train() would forget that a part was frozen
    try:
        yield
    finally:
        for part in training:
            part.training = True


def merge_stats(parts: Sequence[DecodeStats]) -> DecodeStats:
    """Join the statistics of chunks that were decoded one after the other."""
    if len(parts) == 1:
        return parts[0]
    extra: dict[str, Any] = {}
    for part in parts:
        for name, value in part.extra.items():
            extra[name] = extra[name] + value if name in extra else value
    return DecodeStats(
        num_forwards=sum(part.num_forwards for part in parts),
        num_drafter_forwards=sum(part.num_drafter_forwards for part in parts),
        num_head_rows=sum(part.num_head_rows for part in parts),
        forwards_per_image=_join([part.forwards_per_image for part in parts]),
        commit_trace=_join([part.commit_trace for part in parts]),
        guarantee=max((part.guarantee for part in parts), key=_WEAKEST_LAST.index),
        notes=list(dict.fromkeys(note for part in parts for note in part.notes)),
        widths=[width for part in parts for width in part.widths],
        peak_memory=max((part.peak_memory for part in parts if part.peak_memory is not None), default=None),
        extra=extra,
    )


def _join(tensors: Sequence[Tensor | None]) -> Tensor | None:
    present = [tensor for tensor in tensors if tensor is not None]
    return torch.cat(present) if len(present) == len(tensors) else None


def _described(value: Any) -> str:
    return f"{type(value).__name__} {shown(value)}"

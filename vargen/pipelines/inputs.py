"""What the user gave to a pipeline call, checked and spread over the images, before any work is done.

Letters: P prompts (or class labels), B = P * num_images_per_prompt images, prompt-major.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from numbers import Integral
from typing import Any

import torch
from torch import Tensor, nn

from vargen.outputs import DecodeStats, Guarantee

OUTPUT_TYPES = ("pil", "pt", "np", "codes")
_WEAKEST_LAST: tuple[Guarantee, ...] = ("exact", "relaxed", "heuristic")


def check_options(
    output_type: str,
    num_images_per_prompt: int,
    batch_size: int | None,
    callback: Callable[..., Any] | None,
    callback_inputs: Sequence[str],
    known_callback_inputs: Sequence[str],
) -> None:
    """Raise ``ValueError`` for options of a pipeline call that are out of range."""
    if output_type not in OUTPUT_TYPES:
        raise ValueError(f"output_type must be one of {', '.join(map(repr, OUTPUT_TYPES))}, got {output_type!r}")
    check_count("num_images_per_prompt", num_images_per_prompt)
    if batch_size is not None:
        check_count("batch_size", batch_size)
    if callback is not None and not callable(callback):
        raise ValueError(f"callback_on_step_end must be callable, got {type(callback).__name__}")
    unknown = [name for name in callback_inputs if name not in known_callback_inputs]
    if unknown:
        known = ", ".join(known_callback_inputs)
        raise ValueError(f"callback_on_step_end_tensor_inputs must be among {known}, got {', '.join(unknown)}")


def check_count(name: str, value: Any) -> None:
    """Raise ``ValueError`` unless a number is an integer of at least 1."""
    if isinstance(value, bool) or not isinstance(value, Integral) or value < 1:
        raise ValueError(f"{name} must be an integer of at least 1, got {value!r}")


def check_dtype(modules: dict[str, nn.Module]) -> None:
    """Raise ``ValueError`` for float16 weights on a CPU, where torch has no float16 arithmetic worth the name."""
    for name, module in modules.items():
        weight = next(module.parameters(), None)
        if weight is not None and weight.device.type == "cpu" and weight.dtype == torch.float16:
            raise ValueError(
                f"{name} has float16 weights on the CPU, which is not supported; use pipe.to(torch.float32) or "
                "pipe.to(torch.bfloat16)"
            )


def read_prompts(prompt: Any) -> list[str]:
    """Return the prompts as a list of non-empty strings."""
    prompts = [prompt] if isinstance(prompt, str) else prompt
    if not isinstance(prompts, (list, tuple)) or not all(isinstance(text, str) for text in prompts):
        raise ValueError(f"prompt must be a string or a list of strings, got {_brief(prompt)}")
    if not prompts:
        raise ValueError("prompt is an empty list; give at least one prompt")
    for index, text in enumerate(prompts):
        if not text.strip():
            where = f"prompt {index} of {len(prompts)}" if len(prompts) > 1 else "the prompt"
            raise ValueError(f"{where} is empty; describe the image in words")
    return list(prompts)


def read_class_labels(labels: Any) -> list[int | str]:
    """Return class labels (ids, or names for conditioners that know names) as a list."""
    if isinstance(labels, Tensor):
        if labels.is_floating_point() or labels.dtype == torch.bool or labels.ndim > 1:
            raise ValueError(f"class_labels must be integers [P], got {labels.dtype} {tuple(labels.shape)}")
        labels = labels.tolist()
    listed = [labels] if isinstance(labels, (str, Integral)) else labels
    if not isinstance(listed, (list, tuple, range)) or not len(listed):
        raise ValueError(f"class_labels must be an integer, a name, or a list of them, got {_brief(labels)}")
    for label in listed:
        if isinstance(label, bool) or not isinstance(label, (str, Integral)):
            raise ValueError(f"class_labels must be integers or names, got {label!r}")
    return [label if isinstance(label, str) else int(label) for label in listed]


def class_ids(labels: Sequence[int | str], num_classes: int | None) -> Tensor:
    """Turn integer class labels into ``[P]`` int64, for pipelines without a conditioner."""
    for label in labels:
        if isinstance(label, str):
            raise ValueError(f"class_labels must be integers for this pipeline (it has no conditioner), got {label!r}")
        if label < 0 or (num_classes is not None and label >= num_classes):
            allowed = "at least 0" if num_classes is None else f"in 0..{num_classes - 1}"
            raise ValueError(f"class_labels must be {allowed}, got {label}")
    return torch.tensor(labels, dtype=torch.int64)


def repeat_condition(condition: Any, times: int) -> Any:
    """Repeat every row ``times`` times, prompt-major; conditions are tensors or tuples of tensors (P first)."""
    return _map(condition, lambda rows: rows.repeat_interleave(times, dim=0))


def take_condition(condition: Any, rows: slice) -> Any:
    """Return some rows of a condition."""
    return _map(condition, lambda tensor: tensor[rows])


def move_condition(condition: Any, device: torch.device) -> Any:
    """Return the condition on a device."""
    return _map(condition, lambda tensor: tensor.to(device))


def complete_condition(conditioner: Any, condition: Any, seeds: list[int]) -> Any:
    """Let a conditioner that can decide what prompts leave open, row i by ``seeds[i]``."""
    complete = getattr(conditioner, "complete", None)
    return condition if complete is None else complete(condition, seeds)


def condition_rows(condition: Any) -> int:
    """P, the number of rows."""
    return len(condition) if isinstance(condition, Tensor) else len(condition[0])


def _map(condition: Any, function: Callable[[Tensor], Tensor]) -> Any:
    if condition is None:
        return None
    if isinstance(condition, Tensor):
        return function(condition)
    parts = [_map(part, function) for part in condition]
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
        extra=extra,
    )


def _join(tensors: Sequence[Tensor | None]) -> Tensor | None:
    present = [tensor for tensor in tensors if tensor is not None]
    return torch.cat(present) if len(present) == len(tensors) else None


def _brief(value: Any) -> str:
    text = repr(value)
    return f"{type(value).__name__} {text if len(text) <= 60 else text[:57] + '...'}"

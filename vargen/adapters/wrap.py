"""``vargen.wrap``: pick the adapter of a transformers model, and make a pipeline of it."""

from __future__ import annotations

from functools import cache
from importlib import import_module
from typing import Any

from torch import nn

from vargen.adapters.base import TransformersBackbone, cache_argument
from vargen.adapters.prompts import PromptIds
from vargen.samplers.window.jacobi import SpeculativeJacobiSampler

# config.model_type, or an explicit family -> (module below vargen.adapters, class)
ADAPTERS = {
    "janus": ("janus", "JanusBackbone"),
    "emu3": ("emu3", "Emu3Backbone"),
    "chameleon": ("chameleon", "ChameleonBackbone"),
    "glm_image": ("glm_image", "GlmImageBackbone"),
    "emu3.5": ("emu3_5", "Emu35Backbone"),
}
NEEDS_FAMILY = {"qwen3": "emu3.5"}  # text models that may be the body of an image model


def wrap(model: nn.Module, processor: Any = None, *, family: str | None = None, **options: Any) -> Any:
    """Make a backbone of a transformers image model, so that every window sampler runs on it.

    The model is used as it is (device_map, quantised and LoRA layers, its attention implementation) and still runs its
    own ``generate``.

    Args:
        model: Janus / Janus-Pro, Emu3, Chameleon / Anole / Lumina-mGPT, GLM-Image, or Emu3.5 loaded as Qwen3; PEFT-
            wrapped and ``torch.compile``-d models are unwrapped.
        processor: needed for prompts given as text.
        family: only where ``model.config.model_type`` does not tell: ``"emu3.5"`` for Qwen3.
        options: of the family's backbone, such as ``grid_size=(h, w)`` in codes.

    Returns:
        A backbone (``vargen.protocols.Backbone``).

    Raises:
        ValueError: a model of another family, or of a version of transformers without the needed cache interface.

    Example:
        >>> backbone = vargen.wrap(model, processor)  # doctest: +SKIP
        >>> NextTokenSampler(guidance_scale=5.0).sample(backbone, ["a red fox"], seeds=[0]).codes  # doctest: +SKIP
    """
    model = unwrap(model)
    found = getattr(getattr(model, "config", None), "model_type", None)
    name = found if family is None else family.lower()
    if name in NEEDS_FAMILY:
        raise ValueError(
            f"a {name} model is text only unless it holds {NEEDS_FAMILY[name]}; say family={NEEDS_FAMILY[name]!r}"
        )
    if name not in ADAPTERS:
        known = ", ".join(repr(known) for known in ADAPTERS)
        raise ValueError(f"no adapter for {type(model).__name__} (model_type {name!r}); adapters: {known}")
    check_version()
    module, class_name = ADAPTERS[name]
    adapter: type[TransformersBackbone] = getattr(import_module(f"vargen.adapters.families.{module}"), class_name)
    return adapter(model, processor, **options)


def unwrap(model: Any) -> Any:
    """The model inside PEFT and ``torch.compile`` wrappers; LoRA layers stay, they sit inside it."""
    while True:
        if hasattr(model, "_orig_mod"):
            model = model._orig_mod
        elif hasattr(model, "get_base_model"):
            model = model.get_base_model()
        else:
            return model


class PromptConditioner:
    """Texts to token ids, for pipelines: the backbone's processor does the work.

    Args:
        backbone: from ``wrap``, with a processor.
        unreadable: what to say of texts where there is no processor.
    """

    def __init__(self, backbone: TransformersBackbone, unreadable: str = "") -> None:
        self.backbone, self.unreadable = backbone, unreadable

    def encode(self, prompts: list[str] | None = None, class_labels: Any = None) -> PromptIds:
        """Tokenise prompts; these models know no class labels."""
        if prompts is None:
            raise ValueError("this pipeline reads prompts, not class_labels")
        if self.backbone.processor is None and self.unreadable:
            raise ValueError(self.unreadable)
        return self.backbone.encode(prompts)

    def save_pretrained(self, save_directory: Any, **_: Any) -> None:
        """Refuse: the processor saves itself."""
        raise ValueError("save the model and the processor with their own save_pretrained(folder)")


def pipeline_components(
    model: nn.Module, processor: Any, sampler: Any, options: dict[str, Any], *, unreadable: str = ""
) -> dict[str, Any]:
    """Components of ``ImagePipeline.from_transformers``.

    Args:
        model, processor, sampler, options: as there.
        unreadable: allow that there is no processor, and say this of prompts.
    """
    if processor is None and not unreadable:
        raise ValueError("a pipeline reads prompts, so it needs the model's processor")
    backbone = wrap(model, processor, **options)
    if sampler is None:
        sampler = SpeculativeJacobiSampler(**backbone.sampler_settings())
    return {
        "tokenizer": backbone.pixels(),
        "backbone": backbone,
        "sampler": sampler,
        "conditioner": PromptConditioner(backbone, unreadable),
    }


@cache
def check_version() -> None:
    """Raise ``ValueError`` unless transformers has the interfaces that the adapters write to."""
    import inspect

    import torch
    import transformers
    from transformers.cache_utils import CacheLayerMixin
    from transformers.masking_utils import create_causal_mask

    parameters = inspect.signature(CacheLayerMixin.get_mask_sizes).parameters
    if "query_length" not in parameters:  # older versions pass cache_position there
        raise ValueError(f"the adapters need transformers 5.10 or newer, found {transformers.__version__}")
    config = transformers.LlamaConfig(attn_implementation="sdpa")
    mask = torch.tensor([[[[True, False], [False, True]]]])  # no causal order, so a rebuilt one would differ
    embeddings = torch.zeros(1, 2, 1)
    options = {"attention_mask": mask, cache_argument(create_causal_mask): None, "position_ids": None}
    passed = create_causal_mask(config=config, inputs_embeds=embeddings, **options)
    if passed is None or not torch.equal(passed, mask):
        raise ValueError(
            f"transformers {transformers.__version__} changes given 4-D masks, the adapters need them whole"
        )

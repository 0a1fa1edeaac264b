"""FLAN-T5 features of captions as LlamaGen and NAR read them (arXiv:2406.06525, 2503.10696).

Cleaned captions, 120 positions, end token counted, padding moved to the left and zeroed. transformers is imported when
the first caption is encoded.

Letters: P prompts, T positions, C feature width.
"""

from __future__ import annotations

from collections.abc import Sequence
from functools import partial
from importlib.util import find_spec
from os import PathLike
from pathlib import Path
from typing import Any, ClassVar, Self

import torch
from diffusers.configuration_utils import register_to_config
from torch import Tensor, nn

from vargen.conditioners.base import Conditioner, check_prompt, one_of, warn_of_cut
from vargen.conditioners.captions import clean_caption
from vargen.conditioners.encoders import load_text_encoder, load_text_tokenizer
from vargen.hooks import execution_device, runs_as_forward
from vargen.validation.checks import MAX_POSITIONS, Settings, anything, check_flag, check_integer, check_text, checked
from vargen.validation.extras import install
from vargen.validation.folders import check_component, one_line
from vargen.validation.reading import local_path

MAX_CHARACTERS = 2000  # of a caption, of which 120 tokens are read; cleaning takes time with the square


def _together(c: Any) -> None:
    if (c.text_encoder is None) != (c.tokenizer is None):
        raise ValueError("text_encoder and tokenizer belong together; give both or neither")


T5 = Settings(
    {
        "text_encoder": anything,
        "tokenizer": anything,
        "model_name": check_text,
        "max_length": partial(check_integer, low=1, high=MAX_POSITIONS),
        "clean": check_flag,
        "lower_case": check_flag,
        "trim": check_flag,
        "batch_size": partial(check_integer, low=1, high=MAX_POSITIONS),
    },
    (_together,),
)


class T5CaptionConditioner(nn.Module, Conditioner):  # nn.Module first: ConfigMixin's __getattr__ would hide weights
    """Turn captions into (features [P, T, C], mask [P, T] bool), real tokens at the last positions.

    Args:
        text_encoder: a ``transformers.T5EncoderModel``; None = load ``model_name`` at the first use.
        tokenizer: its tokenizer.
        model_name: Hub id or folder of encoder and tokenizer.
        max_length: T; longer captions are cut.
        clean: clean captions twice, see ``clean_caption``; False only lowers their case and strips them.
        lower_case: without cleaning, lower their case (cleaning always does).
        trim: leave positions out that are padding in every caption of a call, so that T is the length of the longest. Infinity
            reads captions with ``max_length=512, clean=False, lower_case=False, trim=True``.
        batch_size: captions encoded at a time.

    Raises:
        ImportError: transformers is missing, or what cleaning needs.
    """

    ignore_for_config: ClassVar[list[str]] = ["text_encoder", "tokenizer"]
    config: Any
    where: Tensor

    @checked(T5)
    @register_to_config
    def __init__(
        self,
        *,
        text_encoder: Any = None,
        tokenizer: Any = None,
        model_name: str = "google/flan-t5-xl",
        max_length: int = 120,  # the length of LlamaGen's null caption
        clean: bool = True,
        lower_case: bool = True,
        trim: bool = False,
        batch_size: int = 32,
    ) -> None:
        super().__init__()
        self.text_encoder, self.tokenizer = text_encoder, tokenizer
        self.stored = text_encoder is not None  # an encoder given as an object is saved with the pipeline
        # follows .to() until an encoder is there to follow
        self.register_buffer("where", torch.zeros(()), persistent=False)

    @property
    def device(self) -> torch.device:
        """Where captions are encoded."""
        return execution_device(self)

    @property
    def dtype(self) -> torch.dtype:
        """Dtype of encoder and features."""
        return self.where.dtype

    def encode(
        self, prompts: Sequence[str] | None = None, class_labels: Sequence[int | str] | None = None
    ) -> tuple[Tensor, Tensor]:
        """Encode captions.

        Returns:
            features [P, T, C], zero where padded, and mask [P, T] bool, both on the encoder's device.

        Raises:
            ValueError: an empty or too long caption, mark-up that cannot be read, class labels instead of captions.
        """
        captions = self._clean_all(prompts, class_labels)
        size = self.config.batch_size
        self._load()  # before the hooks around ``_encode_batch``, which ask for weights
        parts = [self._encode_batch(captions[i : i + size]) for i in range(0, len(captions), size)]
        features, masks = zip(*parts, strict=True)
        whole, mask = torch.cat(features), torch.cat(masks)
        longest = int(mask.sum(1).max()) if self.config.trim else mask.shape[1]
        return whole[:, mask.shape[1] - longest :], mask[:, mask.shape[1] - longest :]

    def check(self, prompts: Sequence[str] | None = None, class_labels: Sequence[int | str] | None = None) -> None:
        """Clean the captions, without encoding them."""
        self._clean_all(prompts, class_labels)

    def forward(self, items: Any) -> tuple[Tensor, Tensor]:
        """Encode one caption or several."""
        return Conditioner.__call__(self, items)

    def clean(self, prompt: str) -> str:
        """Prepare one caption for the tokenizer.

        Raises:
            ValueError: an empty caption, more than 2000 characters, mark-up that cannot be read.
        """
        check_prompt(prompt, "a caption", MAX_CHARACTERS)
        if not prompt.strip():
            raise ValueError("a caption is empty; describe the image in words")
        if self.config.clean:
            return clean_caption(prompt)
        return (prompt.lower() if self.config.lower_case else prompt).strip()

    def _clean_all(self, prompts: Any, class_labels: Any) -> list[str]:
        if class_labels is not None:
            raise ValueError("this model reads captions, not class labels; give prompt='...'")
        return [self.clean(prompt) for prompt in one_of(prompts, None)]

    @runs_as_forward
    @torch.no_grad()
    def _encode_batch(self, captions: list[str]) -> tuple[Tensor, Tensor]:
        tokens = self.tokenizer(
            captions,
            max_length=self.config.max_length,
            padding="max_length",
            truncation=True,
            add_special_tokens=True,
            return_attention_mask=True,
            return_tensors="pt",
        ).to(self.device)
        warn_of_cut(self.tokenizer, captions, tokens.attention_mask)
        features = self.text_encoder(input_ids=tokens.input_ids, attention_mask=tokens.attention_mask)[0]
        return left_pad(features, tokens.attention_mask.bool())

    def _load(self) -> None:
        if self.text_encoder is not None:
            return
        if find_spec("transformers") is None:
            raise ImportError(f"encoding captions needs transformers; {install('transformers')}")
        name = self.config.model_name
        try:
            self.tokenizer = load_text_tokenizer(name)
            encoder = load_text_encoder(name, dtype=self.dtype)
        except (OSError, ValueError) as error:
            raise OSError(f"cannot load the text encoder {name}: {str(error).splitlines()[0]}") from error
        self.text_encoder = encoder.to(self.device).eval()

    def save_pretrained(self, save_directory: str | PathLike[str], **kwargs: Any) -> None:
        """Write the configuration, and encoder and tokenizer where they were given as objects, to a folder."""
        folder = local_path(save_directory)
        if self.stored:
            self.text_encoder.save_pretrained(folder / "text_encoder")
            self.tokenizer.save_pretrained(folder / "tokenizer")
        super().save_pretrained(folder, **kwargs)

    @classmethod
    def from_pretrained(cls, folder: str | PathLike[str], **kwargs: Any) -> Self:  # type: ignore[override]
        """Read a conditioner from a folder; ``torch_dtype`` or ``dtype`` sets the dtype of its encoder.

        Raises:
            ValueError: as every conditioner; the same for encoder and tokenizer in the folder.
        """
        dtype = kwargs.get("torch_dtype") or kwargs.get("dtype")
        parts = {}
        place, _ = cls.find_component(folder, subfolder=kwargs.get("subfolder"))
        with one_line(place):
            check_component(place, cls)
            config = cls.load_config(place)
            if (Path(place) / "text_encoder").is_dir():
                parts["text_encoder"] = load_text_encoder(Path(place) / "text_encoder").eval()
                parts["tokenizer"] = load_text_tokenizer(Path(place) / "tokenizer")
            settings, _, _ = cls.extract_init_dict(config)  # from_config would drop the objects
            conditioner = cls(**settings, **parts)
        return conditioner if dtype is None else conditioner.to(dtype)


def left_pad(features: Tensor, mask: Tensor) -> tuple[Tensor, Tensor]:
    """Move right padding to the left and zero it.

    Args:
        features: [P, T, C], real tokens first.
        mask: [P, T] bool, True = real.

    Returns:
        features [P, T, C] and mask [P, T] with the real tokens last, in their order.
    """
    length = mask.sum(1, keepdim=True)  # P 1
    index = (torch.arange(mask.shape[1], device=mask.device) + length) % mask.shape[1]  # P T
    mask = mask.flip(1)
    features = features.gather(1, index[..., None].expand_as(features))
    return features * mask[..., None], mask

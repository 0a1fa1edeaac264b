"""Features of captions by two CLIP text encoders, as Switti reads them (arXiv:2412.01819).

77 positions, end token counted, padding behind the words. transformers is imported when the first caption is encoded.

Letters: P prompts, T positions, C width of both encoders together, C_2 width of the second.
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
from vargen.conditioners.encoders import load_text_encoder, load_text_tokenizer
from vargen.hooks import execution_device, runs_as_forward
from vargen.validation.checks import MAX_POSITIONS, Settings, anything, check_integer, check_text, checked
from vargen.validation.extras import install
from vargen.validation.folders import check_component, one_line
from vargen.validation.reading import local_path

PARTS = ("text_encoder", "tokenizer", "text_encoder_2", "tokenizer_2")
Features = tuple[Tensor, Tensor, Tensor]


def _together(c: Any) -> None:
    if len({getattr(c, name) is None for name in PARTS}) > 1:
        raise ValueError(f"{', '.join(PARTS)} belong together; give all four or none")


CLIP = Settings(
    {
        **dict.fromkeys(PARTS, anything),
        "model_name": check_text,
        "model_name_2": check_text,
        "max_length": partial(check_integer, low=2, high=MAX_POSITIONS),
        "batch_size": partial(check_integer, low=1, high=MAX_POSITIONS),
    },
    (_together,),
)


class CLIPCaptionConditioner(nn.Module, Conditioner):  # nn.Module first: ConfigMixin's __getattr__ would hide weights
    """Turn captions into (features [P, T, C], pooled [P, C_2], mask [P, T] bool), padding behind the words.

    Features are the last hidden states of the first encoder and, behind them, of the second; pooled is that of the second, without
    its text projection; the mask is the second's.

    Args:
        text_encoder: a ``transformers.CLIPTextModel``; None = load ``model_name`` and ``model_name_2`` at the first use.
        tokenizer: its tokenizer.
        text_encoder_2: the second, and
        tokenizer_2: its tokenizer.
        model_name: Hub id or folder of the first encoder and its tokenizer.
        model_name_2: of the second.
        max_length: T; longer captions are cut, with a warning.
        batch_size: captions encoded at a time.

    Raises:
        ImportError: transformers is missing.
    """

    ignore_for_config: ClassVar[list[str]] = list(PARTS)
    config: Any
    where: Tensor

    @checked(CLIP)
    @register_to_config
    def __init__(
        self,
        *,
        text_encoder: Any = None,
        tokenizer: Any = None,
        text_encoder_2: Any = None,
        tokenizer_2: Any = None,
        model_name: str = "openai/clip-vit-large-patch14",
        model_name_2: str = "laion/CLIP-ViT-bigG-14-laion2B-39B-b160k",
        max_length: int = 77,
        batch_size: int = 32,
    ) -> None:
        super().__init__()
        self.text_encoder, self.tokenizer = text_encoder, tokenizer
        self.text_encoder_2, self.tokenizer_2 = text_encoder_2, tokenizer_2
        self.stored = text_encoder is not None  # encoders given as objects are saved with the pipeline
        # follows .to() until encoders are there to follow
        self.register_buffer("where", torch.zeros(()), persistent=False)

    @property
    def device(self) -> torch.device:
        """Where captions are encoded."""
        return execution_device(self)

    @property
    def dtype(self) -> torch.dtype:
        """Dtype of encoders and features."""
        return self.where.dtype

    def encode(
        self, prompts: Sequence[str] | None = None, class_labels: Sequence[int | str] | None = None
    ) -> Features:
        """Encode captions; the empty one too, from which guidance leads away.

        Returns:
            features [P, T, C], pooled [P, C_2] and mask [P, T] bool, on the encoders' device.

        Raises:
            ValueError: no text or too long a one, class labels instead of captions.
        """
        captions = self._check_all(prompts, class_labels)
        size = self.config.batch_size
        self._load()  # before the hooks around ``_encode_batch``, which ask for weights
        parts = [self._encode_batch(captions[i : i + size]) for i in range(0, len(captions), size)]
        features, pooled, mask = (torch.cat(column) for column in zip(*parts, strict=True))
        return features, pooled, mask

    def check(self, prompts: Sequence[str] | None = None, class_labels: Sequence[int | str] | None = None) -> None:
        """Check the captions, without encoding them."""
        self._check_all(prompts, class_labels)

    def forward(self, items: Any) -> Features:
        """Encode one caption or several."""
        found: Features = Conditioner.__call__(self, items)
        return found

    def _check_all(self, prompts: Any, class_labels: Any) -> list[str]:
        if class_labels is not None:
            raise ValueError("this model reads captions, not class labels; give prompt='...'")
        captions = list(one_of(prompts, None))
        for caption in captions:
            check_prompt(caption, "a caption")
        return captions

    @runs_as_forward
    @torch.no_grad()
    def _encode_batch(self, captions: list[str]) -> Features:
        first, _, _ = self._read(self.text_encoder, self.tokenizer, captions)
        second, pooled, mask = self._read(self.text_encoder_2, self.tokenizer_2, captions)
        warn_of_cut(self.tokenizer_2, captions, mask)
        return torch.cat([first, second], dim=-1), pooled, mask

    def _read(self, encoder: Any, tokenizer: Any, captions: list[str]) -> Features:
        """Hidden states, pooled output and mask of one encoder."""
        tokens = tokenizer(
            captions,
            max_length=self.config.max_length,
            padding="max_length",
            truncation=True,
            return_attention_mask=True,
            return_tensors="pt",
        ).to(self.device)
        out = encoder(input_ids=tokens.input_ids, attention_mask=tokens.attention_mask)
        return out.last_hidden_state, out.pooler_output, tokens.attention_mask.bool()

    def _load(self) -> None:
        if self.text_encoder is not None:
            return
        if find_spec("transformers") is None:
            raise ImportError(f"encoding captions needs transformers; {install('transformers')}")
        found = []
        for name in (self.config.model_name, self.config.model_name_2):
            try:
                tokenizer = load_text_tokenizer(name)
                encoder = load_text_encoder(name, "CLIPTextModel", dtype=self.dtype)
            except (OSError, ValueError) as error:
                raise OSError(f"cannot load the text encoder {name}: {str(error).splitlines()[0]}") from error
            found += [encoder.to(self.device).eval(), tokenizer]
        self.text_encoder, self.tokenizer, self.text_encoder_2, self.tokenizer_2 = found

    def save_pretrained(self, save_directory: str | PathLike[str], **kwargs: Any) -> None:
        """Write the configuration, and encoders and tokenizers where they were given as objects, to a folder."""
        folder = local_path(save_directory)
        if self.stored:
            for name in PARTS:
                getattr(self, name).save_pretrained(folder / name)
        super().save_pretrained(folder, **kwargs)

    @classmethod
    def from_pretrained(cls, folder: str | PathLike[str], **kwargs: Any) -> Self:  # type: ignore[override]
        """Read a conditioner from a folder; ``torch_dtype`` or ``dtype`` sets the dtype of its encoders.

        Raises:
            ValueError: as every conditioner; the same for encoders and tokenizers in the folder.
        """
        dtype = kwargs.get("torch_dtype") or kwargs.get("dtype")
        parts: dict[str, Any] = {}
        place, _ = cls.find_component(folder, subfolder=kwargs.get("subfolder"))
        with one_line(place):
            check_component(place, cls)
            config = cls.load_config(place)
            if (Path(place) / "text_encoder").is_dir():
                for name in PARTS:
                    read = load_text_tokenizer if name.startswith("tokenizer") else _load_clip
                    parts[name] = read(Path(place) / name)
            settings, _, _ = cls.extract_init_dict(config)  # from_config would drop the objects
            conditioner = cls(**settings, **parts)
        return conditioner if dtype is None else conditioner.to(dtype)


def _load_clip(folder: Path) -> Any:
    return load_text_encoder(folder, "CLIPTextModel").eval()

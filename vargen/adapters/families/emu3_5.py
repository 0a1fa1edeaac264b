"""Emu3.5 (BAAI; arXiv:2510.26583): its body is Qwen3's, so the weights run in ``Qwen3ForCausalLM`` unchanged.

Stream behind the header ``BOI h*w wrapper``: h rows of w codes, an end-of-line token behind each but the last, end of
image behind that. The header is forced here (the model would write text, then begin the image by itself). The second
guidance branch reads another template with the same header.

The authors' remote code does not import under transformers 5; ``load_emu35`` reads their checkpoint.
"""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from vargen.adapters.base import TransformersBackbone
from vargen.adapters.layouts import fill, lines
from vargen.adapters.pixels import TamingPixels
from vargen.checkpoints.bounds import read_shape
from vargen.checkpoints.reader import load_original
from vargen.protocols import Layout
from vargen.validation.folders import REFUSED_SETTINGS, read_settings

TEMPLATE = "<|extra_203|>You are a helpful assistant for t2i task. USER: {text} ASSISTANT: <|extra_100|>"
UNCONDITIONAL = "<|extra_203|>You are a helpful assistant. USER:  ASSISTANT: <|extra_100|>"
NAMES = {
    "bos": "<|extra_203|>",
    "eol": "<|extra_200|>",
    "boi": "<|image start|>",
    "eoi": "<|image end|>",
    "wrapper": "<|image token|>",
    "first_code": "<|visual token 000000|>",
}
PUBLIC_IDS = {"bos": 151849, "eol": 151846, "boi": 151852, "eoi": 151853, "wrapper": 151851, "first_code": 151854}


class Emu35Backbone(TransformersBackbone):
    """Emu3.5 in a ``Qwen3ForCausalLM``, text to image; see ``TransformersBackbone``.

    Args:
        processor: the tokenizer.
        token_ids: ids of the tokens in ``NAMES``; default the tokenizer's, without one the public tokenizer's.
        vq_decoder: weights of the IBQ tokenizer (codebook, ``post_quant_conv``, ``decoder.*``); None = codes only.
    """

    model_types = ("emu3.5",)
    guidance_scale = 5.0  # of Emu3.5-Image; Emu3.5 itself is sampled with 2
    top_k = 5120
    default_grid = (55, 73)

    def __init__(
        self,
        model: nn.Module,
        processor: Any = None,
        *,
        token_ids: Mapping[str, int] | None = None,
        vq_decoder: str | Path | Mapping[str, Tensor] | None = None,
        **options: Any,
    ) -> None:
        super().__init__(model, processor, **options)
        if token_ids is None:
            token_ids = PUBLIC_IDS
            if processor is not None:
                token_ids = {name: processor.convert_tokens_to_ids(text) for name, text in NAMES.items()}
        self.tokens, self.vq_decoder = dict(token_ids), vq_decoder
        if self.tokens["first_code"] >= int(self.config.vocab_size):
            raise ValueError(
                f"the vocabulary of {self.config.vocab_size} tokens holds no codes (they begin at "
                f"{self.tokens['first_code']}); is this an Emu3.5 checkpoint?"
            )

    @property
    def body(self) -> nn.Module:
        """The Qwen3 body."""
        return self.model.model

    @property
    def head(self) -> nn.Module:
        """Head over the whole vocabulary."""
        return self.model.lm_head

    def code_ids(self) -> Tensor:
        """[V]: the codes are the end of the vocabulary."""
        return torch.arange(self.tokens["first_code"], int(self.config.vocab_size))

    def layout(self, height: int | None = None, width: int | None = None) -> Layout:
        """Lines of codes; end of image stands where the last end of line would."""
        size = self._check_grid((height or self.grid_size[0], width or self.grid_size[1]))
        return lines(size, eol=self.tokens["eol"], tail=(self.tokens["eoi"],))

    def to_stream(self, codes: Tensor) -> Tensor:
        """Codes [B, N] as token ids with ends of lines and end of image: [B, h (w + 1)]."""
        ids = self._ids()
        assert ids is not None
        return fill(self.layout(), codes, ids)

    def header(self) -> list[int]:
        """Begin of image, the digits of ``h*w``, wrapper; needs the tokenizer."""
        h, w = self.grid_size
        return [self.tokens["boi"], *self._tokenise(f"{h}*{w}"), self.tokens["wrapper"]]

    def unconditional(self, rows: list[Tensor]) -> list[Tensor]:
        """The other template, and the header of each prompt; needs the tokenizer."""
        if self.processor is None:
            raise ValueError(
                "guidance needs the unconditional template as tokens; use vargen.wrap(model, tokenizer, "
                "family='emu3.5') or give negative"
            )
        start = torch.tensor(self._tokenise(UNCONDITIONAL))
        boi = self.tokens["boi"]
        return [torch.cat([start.to(row.device), row[int((row == boi).nonzero()[-1]) :]]) for row in rows]

    def check_prompts(self, rows: list[Tensor], given: Any) -> None:
        """A prompt ends with the header."""
        for i, row in enumerate(rows):
            if int(row[-1]) != self.tokens["wrapper"] or not bool((row == self.tokens["boi"]).any()):
                raise ValueError(f"prompt {i} must end with the image header; append backbone.header()")

    def encode_text(self, texts: list[str]) -> list[Tensor]:
        """The authors' template for text to image, and the header."""
        return [torch.tensor(self._tokenise(TEMPLATE.format(text=text)) + self.header()) for text in texts]

    def pixels(self) -> nn.Module | None:
        """The IBQ decoder whose weights were given."""
        if self.vq_decoder is None:
            return None
        weights = load_original(self.vq_decoder)
        read_shape(weights, "quantize.embedding.weight", 2)
        read_shape(weights, "post_quant_conv.weight", 4)
        read_shape(weights, "post_quant_conv.bias", 1)
        table, kernel = weights["quantize.embedding.weight"], weights["post_quant_conv.weight"]
        codebook = nn.Embedding.from_pretrained(table)
        conv = nn.Conv2d(kernel.shape[1], kernel.shape[0], 1)
        conv.load_state_dict({"weight": kernel, "bias": weights["post_quant_conv.bias"]})
        return TamingPixels(codebook, conv.requires_grad_(False), weights)

    def _tokenise(self, text: str) -> list[int]:
        return [int(token) for token in self.processor(text, add_special_tokens=False)["input_ids"]]


def emu35_config(stored: Mapping[str, Any]) -> Any:
    """A ``Qwen3Config`` from the ``config.json`` of the authors' checkpoint (``rope_theta`` has moved)."""
    from transformers import Qwen3Config

    dropped = ("architectures", "model_type", *REFUSED_SETTINGS)
    kept = {key: value for key, value in stored.items() if key not in dropped}
    theta = kept.pop("rope_theta", None)
    kept.pop("rope_scaling", None)
    if theta is not None and "rope_parameters" not in kept:
        kept["rope_parameters"] = {"rope_type": "default", "rope_theta": theta}
    return Qwen3Config(**kept)


def load_emu35(folder: str | Path, **options: Any) -> Any:
    """Load an Emu3.5 checkpoint folder into ``Qwen3ForCausalLM``, without its remote code.

    Args:
        folder: a local snapshot with ``config.json`` and the safetensors shards.
        options: of ``from_pretrained``, such as ``dtype`` and ``device_map``.

    Raises:
        ValueError: no config.json there, or one with scaled rotary positions, which the authors do not use.
    """
    from transformers import Qwen3ForCausalLM

    path = Path(folder) / "config.json"
    if not path.is_file():
        raise ValueError(f"{folder} holds no config.json; download the snapshot of BAAI/Emu3.5-Image first")
    stored = read_settings(path)
    if stored.get("rope_scaling"):
        raise ValueError(f"{path} scales rotary positions ({stored['rope_scaling']}), which this adapter does not map")
    return Qwen3ForCausalLM.from_pretrained(folder, config=emu35_config(stored), **options)

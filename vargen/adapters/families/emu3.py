"""Emu3 (BAAI; arXiv:2409.18869): codes and text share one vocabulary; a line of codes ends with a token.

Stream behind the header ``BOI h*w wrapper``: h rows of w codes, each followed by an end-of-line token, then end of frame,
end of image, EOS. The second guidance branch reads a negative text with the same header (the authors' form).
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor, nn

from vargen.adapters.base import TransformersBackbone
from vargen.adapters.family import name_ids
from vargen.adapters.layouts import fill, lines
from vargen.adapters.pixels import PixelDecoder
from vargen.protocols import Layout

# of the authors' demo; the suffix is theirs too and goes behind the user's text if the user wants it
QUALITY_SUFFIX = " masterpiece, film grained, best quality."
NEGATIVE_PROMPT = (
    "lowres, bad anatomy, bad hands, text, error, missing fingers, extra digit, fewer digits, cropped, worst quality, "
    "low quality, normal quality, jpeg artifacts, signature, watermark, username, blurry."
)


class Emu3Backbone(TransformersBackbone):
    """``Emu3ForConditionalGeneration`` (the Gen weights); see ``TransformersBackbone``.

    Args:
        negative_prompt: text of the second branch, where the call gives none and there is a processor to read it.
        negative_header: end the second branch's prompt with the image header, as the authors do; False = BOS and text
            alone, as in the example of transformers.
    """

    model_types = ("emu3",)
    guidance_scale = 3.0
    top_k = 2048
    default_grid = (90, 90)  # 720 x 720 pixels

    def __init__(
        self,
        model: nn.Module,
        processor: Any = None,
        *,
        negative_prompt: str = NEGATIVE_PROMPT,
        negative_header: bool = True,
        **options: Any,
    ) -> None:
        super().__init__(model, processor, **options)
        self.negative_prompt, self.negative_header = negative_prompt, negative_header
        names = ["<|extra_200|>", "<|extra_201|>", "<|extra_203|>", "<|extra_204|>"]
        names += ["<|image start|>", "<|image end|>", "<|image token|>"]
        ids = name_ids(self.config.vocabulary_map, names)
        self.eol, self.eof, self.bos, self.eos, self.boi, self.eoi, self.wrapper = ids

    @property
    def body(self) -> nn.Module:
        """The Llama-shaped body."""
        return self.model.model.text_model

    @property
    def head(self) -> nn.Module:
        """Head over the whole vocabulary."""
        return self.model.lm_head

    def code_ids(self) -> Tensor:
        """[V] token ids of ``<|visual token 000000|>`` and so on."""
        return self.model.model.vocabulary_mapping.img2bpe_mapping_tensor.long()

    def layout(self, height: int | None = None, width: int | None = None) -> Layout:
        """Lines of codes; the end of the last one is never run."""
        size = self._check_grid((height or self.grid_size[0], width or self.grid_size[1]))
        return lines(size, eol=self.eol, tail=(self.eol, self.eof, self.eoi, self.eos))

    def to_stream(self, codes: Tensor) -> Tensor:
        """Codes [B, N] as ``generate`` returns them behind the prompt: [B, h (w + 1) + 3]."""
        ids = self._ids()
        assert ids is not None
        return fill(self.layout(), codes, ids)

    def unconditional(self, rows: list[Tensor]) -> list[Tensor]:
        """The negative text with the header; without a processor BOS and the header of each prompt."""
        if self.processor is not None:
            row = self.read([self.negative_prompt])[0]
            return [row if self.negative_header else row[: _last(row, self.boi)]] * len(rows)
        bos = torch.tensor([self.bos])
        return [torch.cat([bos.to(row.device), row[_last(row, self.boi) :]]) for row in rows]

    def check_prompts(self, rows: list[Tensor], given: Any) -> None:
        """A prompt ends with the header of this grid."""
        for i, row in enumerate(rows):
            if int(row[-1]) != self.wrapper or not bool((row == self.boi).any()):
                raise ValueError(
                    f"prompt {i} must end with the image header (begin-of-image, height*width, <|image token|>); call "
                    "the processor with return_for_image_generation=True"
                )
        sizes = given.get("image_sizes") if isinstance(given, Mapping) else None
        if sizes is not None and any(tuple(int(side) for side in size) != self.grid_size for size in sizes):
            raise ValueError(
                f"the prompts ask for images of {[int(side) for side in sizes[0]]} codes, the backbone makes "
                f"{list(self.grid_size)}; use backbone.with_grid(height, width)"
            )

    def encode_text(self, texts: list[str]) -> Any:
        """BOS, text, header of this grid; left padding."""
        h, w = self.grid_size
        area = h * w * self.processor.downsample_ratio**2
        options = {"return_for_image_generation": True, "ratio": f"{w}:{h}", "image_area": area}
        return self.processor(text=texts, padding=True, padding_side="left", return_tensors="pt", **options)

    def pixels(self) -> nn.Module | None:
        """The model's VQ decoder; None where the authors' files were loaded without it."""
        vq = self.model.model.vqmodel
        if vq is None:
            return None
        return PixelDecoder(vq, self.codebook_size, 2 ** (len(vq.config.channel_multiplier) - 1))


def _last(row: Tensor, token: int) -> int:
    return int((row == token).nonzero()[-1])

"""Emu3: text to a 720 x 720 picture; guidance in one batch, visual rows of the head only, a window of codes a forward.

Weights: BAAI/Emu3-Gen-hf (text to image; the Chat weights are another model), Apache-2.0.
"""

import torch
from common import Checkpoint, arguments, ready, report
from transformers import Emu3ForConditionalGeneration, Emu3Processor

import vargen
from vargen.adapters.families.emu3 import QUALITY_SUFFIX

CHECKPOINT = Checkpoint(
    repo="BAAI/Emu3-Gen-hf", licence="Apache-2.0", parameters=8.8, layers=32, kv_heads=8, head_dim=128, slots=8300
)
PROMPT = 110  # slots that text and header take, about


def main() -> None:
    """Draw one picture of height x width codes (8 pixels each)."""
    options = arguments(__doc__, height=90, width=90)
    name = ready(CHECKPOINT, options.model, slots=PROMPT + options.height * (options.width + 1))
    model = Emu3ForConditionalGeneration.from_pretrained(name, dtype="auto", device_map="auto").eval()
    processor = Emu3Processor.from_pretrained(name)

    grid = (options.height, options.width)
    pipe = vargen.ImagePipeline.from_transformers(model, processor, grid_size=grid)
    with torch.inference_mode():
        output = pipe(options.prompt + QUALITY_SUFFIX, seed=options.seed, window=options.window)
    output.images[0].save(options.output)
    report(output, options.output)


if __name__ == "__main__":
    main()

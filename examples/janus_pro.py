"""Janus-Pro: text to a 384 x 384 picture with the law of its own sampler, in fewer forwards.

Weights: deepseek-community/Janus-Pro-1B (or -7B), DeepSeek model licence; code MIT. In 4 or 8 bits leave the image head out
of quantisation: BitsAndBytesConfig(..., llm_int8_skip_modules=["lm_head", "generation_head", "generation_aligner"]).
"""

import torch
from common import Checkpoint, arguments, ready, report
from transformers import AutoProcessor, JanusForConditionalGeneration

import vargen

CHECKPOINT = Checkpoint(
    repo="deepseek-community/Janus-Pro-1B",
    licence="DeepSeek model licence (commercial use allowed, with use restrictions)",
    parameters=2.1,
    layers=24,
    kv_heads=16,
    head_dim=128,
    slots=640,
)


def main() -> None:
    """Draw one picture."""
    options = arguments(__doc__)
    name = ready(CHECKPOINT, options.model)
    model = JanusForConditionalGeneration.from_pretrained(name, dtype="auto", device_map="auto").eval()
    processor = AutoProcessor.from_pretrained(name)

    pipe = vargen.ImagePipeline.from_transformers(model, processor)
    with torch.inference_mode():
        output = pipe(options.prompt, seed=options.seed, window=options.window)
    output.images[0].save(options.output)
    report(output, options.output)


if __name__ == "__main__":
    main()

"""GLM-Image: the autoregressive stage through vargen, the diffusion stage by diffusers, nothing patched in either.

Weights: zai-org/GLM-Image, 9B autoregressive and 7B diffusion; the repository is Apache-2.0.
"""

import torch
from common import Checkpoint, arguments, ready, report
from diffusers import GlmImagePipeline

import vargen
from vargen.adapters.families.glm_image import CELL

CHECKPOINT = Checkpoint(
    repo="zai-org/GLM-Image",
    licence="Apache-2.0",
    parameters=18.0,
    layers=40,
    kv_heads=2,
    head_dim=128,
    slots=1400,
    branches=1,
)
PROMPT, PREVIEW = 110, 256  # slots that the text takes, about, and the preview grid


def main() -> None:
    """Draw one picture of height x width pixels, both multiples of 32."""
    options = arguments(__doc__, height=1024, width=1024)
    grid = (options.height // CELL, options.width // CELL)
    name = ready(CHECKPOINT, options.model, slots=PROMPT + PREVIEW + grid[0] * grid[1])
    pipe = GlmImagePipeline.from_pretrained(name, dtype=torch.bfloat16)
    pipe.enable_model_cpu_offload()

    model = pipe.vision_language_encoder.to("cuda" if torch.cuda.is_available() else "cpu")
    prior = vargen.ImagePipeline.from_transformers(model, pipe.processor, grid_size=grid)
    output = prior(options.prompt, seed=options.seed, window=options.window, output_type="codes")

    images = pipe(
        prompt=options.prompt,
        height=options.height,
        width=options.width,
        prior_token_ids=prior.backbone.prior_token_ids(output.codes),
    ).images
    images[0].save(options.output)
    report(output, options.output)


if __name__ == "__main__":
    main()

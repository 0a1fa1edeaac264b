"""Arguments of other libraries' pipelines and ``generate`` calls, and what to use instead of them here: the one table.

Importing this module is cheap.
"""

from __future__ import annotations

_STEPS = "forward passes follow from the sampler: set num_steps where it has that, or take a sampler that needs fewer"
_SIZE = "images have the model's own size; wrapped models of free size take grid_size=(h, w) in vargen.wrap"
_GREEDY = "temperature=0 is greedy, any other temperature samples"
_LENGTH = "an image always has all codes of the model's grid"
_COUNT = "use num_images_per_prompt"
_NEGATIVE = "guidance is away from the model's empty condition; sampler.sample(..., negative=...) takes another one where the backbone can"
_SCALE = "use guidance_scale"
_BEAMS = "codes are drawn, not searched for; draw several images with num_images_per_prompt"
_CALLBACK = "use callback_on_step_end"
_EMBEDS = "give the text as prompt; sampler.sample takes conditions that are encoded already"

INSTEAD = {
    "num_inference_steps": _STEPS,
    "steps": _STEPS,
    "timesteps": _STEPS,
    "sigmas": _STEPS,
    "height": _SIZE,
    "width": _SIZE,
    "aspect_ratio": _SIZE,
    "pixels": _SIZE,
    "eta": "there is no such noise in the drawing of codes; temperature says how random it is",
    "strength": "give image and mask_image to a next-scale model; codes outside the mask are kept, those inside drawn anew",
    "do_sample": _GREEDY,
    "greedy": _GREEDY,
    "negative_prompt": _NEGATIVE,
    "negative_prompt_embeds": _NEGATIVE,
    "prompt_embeds": _EMBEDS,
    "inputs_embeds": _EMBEDS,
    "input_ids": _EMBEDS,
    "max_new_tokens": _LENGTH,
    "min_new_tokens": _LENGTH,
    "max_length": _LENGTH,
    "num_return_sequences": _COUNT,
    "num_images": _COUNT,
    "num_samples": _COUNT,
    "cfg": _SCALE,
    "cfg_scale": _SCALE,
    "guidance": _SCALE,
    "num_beams": _BEAMS,
    "repetition_penalty": _BEAMS,
    "callback": _CALLBACK,
    "callback_steps": _CALLBACK,
    "streamer": _CALLBACK,
    "latents": "codes follow from the seed; forced_codes of sampler.sample fixes some of them",
    "guidance_rescale": "use guidance_schedule, guidance_interval or a lower guidance_scale",
    "random_state": "use seed",
    "mask": "use mask_image",
    "init_image": "use image and mask_image, with a next-scale model",
}

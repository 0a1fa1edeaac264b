"""From training runs to a pipeline folder: averaged weights, half precision on disk, everything a prompt needs."""

from __future__ import annotations

import json
import shutil
from functools import partial
from pathlib import Path
from typing import Any

import torch
from diffusers import AutoencoderKL
from safetensors.torch import load_file, save_file

from vargen.backbones.llamagen.model import LlamaGenTransformer
from vargen.conditioners.attributes import AttributeConditioner
from vargen.conditioners.base import Conditioner
from vargen.conditioners.class_labels import ClassConditioner
from vargen.draft_models.eagle import EagleDrafter
from vargen.draft_models.row import RowDrafter
from vargen.files import atomic_dir, atomic_write, writing
from vargen.pipelines.components import SHARED_KEY, read_index
from vargen.pipelines.drafters import DRAFTERS_FOLDER, record_target, weights_digest
from vargen.pipelines.image import ImagePipeline
from vargen.pipelines.video import VideoPipeline
from vargen.samplers.scale.next_scale import NextScaleSampler
from vargen.samplers.schedule.masked_continuous import ContinuousMaskedSampler
from vargen.samplers.schedule.neighboring import NeighboringSampler
from vargen.samplers.schedule.next_block import NextBlockSampler
from vargen.samplers.window.continuous_jacobi import ContinuousJacobiSampler
from vargen.samplers.window.continuous_speculative import ContinuousSpeculativeSampler
from vargen.samplers.window.jacobi import SpeculativeJacobiSampler
from vargen.tokenizers.multiscale_vq.model import MultiScaleVQTokenizer
from vargen.tokenizers.video_fsq.model import VideoFSQTokenizer
from vargen.tokenizers.vq.model import VQTokenizer
from vargen.training.checkpoints import checkpoint_folders, load_newest, load_state, load_weights
from vargen.training.data import open_dataset
from vargen.training.recipe import Recipe
from vargen.training.sources import load_tokenizer, load_transformer, read_run, stored_recipe
from vargen.training.tasks.base import make_task
from vargen.training.tasks.kl import load_autoencoder
from vargen.validation.reading import read_json

TRAINING_FILE = "training.json"
COMPANIONS: dict[str, tuple[Any, Any]] = {  # task of a transformer -> tokenizer and sampler of its pipeline
    "llamagen": (VQTokenizer, SpeculativeJacobiSampler),
    "var": (MultiScaleVQTokenizer, NextScaleSampler),
    "nar": (VQTokenizer, NeighboringSampler),
    "mar": (AutoencoderKL, ContinuousMaskedSampler),
    "causal-mar": (AutoencoderKL, partial(ContinuousJacobiSampler, window="by-batch", tolerance=1e-5)),
    "nbp": (VideoFSQTokenizer, NextBlockSampler),
    "mar-draft": (AutoencoderKL, ContinuousSpeculativeSampler),
}


def export_pipeline(
    run: str | Path,
    folder: str | Path,
    *,
    tokenizer: str | Path | None = None,
    drafter: str | Path | None = None,
    overwrite: bool = False,
    **sampler_settings: Any,
) -> Path:
    """Write a transformer's run and its tokenizer as a pipeline folder, weights as float16 safetensors.

    Args:
        run: folder of a finished (or running) "llamagen", "var", "nar", "nbp", "mar" or "causal-mar" run; the averaged weights of its
            newest checkpoint are taken.
        folder: pipeline folder to write; ``ImagePipeline.from_pretrained`` reads it (``VideoPipeline`` for "nbp").
        tokenizer: run or model folder; default: the one named in the run's recipe.
        drafter: run of a smaller "llamagen" model over the same tokenizer, or a "mar-draft" run for a "causal-mar" one.
        overwrite: allow replacing an existing folder.
        sampler_settings: of the stored sampler, for example ``guidance_scale=2.0``.

    Returns:
        The folder.

    Raises:
        ValueError: not a run of this task, no checkpoint yet, unknown sampler setting, the folder exists.
    """
    backbone = load_transformer(run)
    recipe = stored_recipe(Path(run))
    source = tokenizer if tokenizer is not None else recipe.options["tokenizer"]
    tokenizer_kind, sampler_kind = COMPANIONS[recipe.task]
    components: dict[str, Any] = {
        "tokenizer": load_autoencoder(source)
        if tokenizer_kind is AutoencoderKL
        else load_tokenizer(source, tokenizer_kind),
        "backbone": backbone,
        "sampler": sampler_kind(**sampler_settings),
    }
    pipe: ImagePipeline
    if tokenizer_kind is VideoFSQTokenizer:
        if drafter is not None:
            raise ValueError("pipelines for videos have no drafter; leave drafter out")
        pipe = VideoPipeline(**components, conditioner=_conditioner(recipe, fill=True))
    else:
        drafted = None if drafter is None else load_transformer(drafter)
        # continuous tokens are drawn at low temperatures, at which a model leaves open slots empty every time
        conditioner = _conditioner(recipe, fill=tokenizer_kind is AutoencoderKL)
        pipe = ImagePipeline(**components, conditioner=conditioner, drafter=drafted)
    facts = {"backbone": _facts(run), "tokenizer": _facts(source), "drafter": _facts(drafter)}
    with atomic_dir(folder, overwrite=overwrite) as beside:
        pipe.save_pretrained(beside)
        for file in beside.rglob("*.safetensors"):
            halve_weights(file)
        for file in beside.rglob("config.json"):
            forget_origin(file)
        text = json.dumps({name: fact for name, fact in facts.items() if fact}, indent=1)
        (beside / TRAINING_FILE).write_text(text + "\n", encoding="utf-8")
    return Path(folder)


def export_drafter(run: str | Path, folder: str | Path, *, overwrite: bool = False) -> Path:
    """Write an "eagle" or "row" run as ``drafters/<task>`` of a pipeline folder, weights as float16 safetensors.

    Args:
        run: folder of the run; the averaged weights of its newest checkpoint are taken.
        folder: pipeline folder of the backbone that the drafter was trained on.
        overwrite: allow replacing the folder's drafter.

    Returns:
        The drafter's folder.

    Raises:
        ValueError: not such a run, no checkpoint yet, not a pipeline folder, it has such a drafter already, or its backbone is
            another one.
    """
    folder = Path(folder)
    read_index(folder)
    drafter, name = load_drafter(run), read_run(run)[0].task
    backbone = LlamaGenTransformer.from_pretrained(folder / "backbone")
    drafter.check_backbone(backbone)
    place = folder / DRAFTERS_FOLDER / name
    place.parent.mkdir(exist_ok=True)
    with atomic_dir(place, overwrite=overwrite) as beside:
        drafter.save_pretrained(beside)
        for file in beside.glob("*.safetensors"):
            halve_weights(file)
        forget_origin(beside / "config.json")
        record_target(beside, weights_digest(backbone))
    record = folder / TRAINING_FILE
    facts = read_json(record) if record.is_file() else {}
    facts[name] = _facts(run)
    with atomic_write(record, overwrite=True) as beside:
        beside.write_text(json.dumps(facts, indent=1) + "\n", encoding="utf-8")
    return place


def share_component(folder: str | Path, name: str, other: str) -> None:
    """Take a component out of a pipeline folder that the folder ``other`` beside it holds too.

    Args:
        folder: pipeline folder.
        name: component.
        other: name of the pipeline folder beside it that lends the component from now on.

    Raises:
        ValueError: not a pipeline folder, or the two folders hold different weights or settings.
    """
    folder = Path(folder)
    index, lender = read_index(folder), folder.parent / other / name
    for file in sorted((folder / name).iterdir()):
        if not (lender / file.name).is_file() or (lender / file.name).read_bytes() != file.read_bytes():
            raise ValueError(f"{folder / name} and {lender} differ in {file.name}; export both from the same runs")
    index[SHARED_KEY] = {**index.get(SHARED_KEY, {}), name: other}
    with atomic_write(folder / "model_index.json", overwrite=True) as beside:
        beside.write_text(json.dumps(dict(sorted(index.items())), indent=2) + "\n", encoding="utf-8")
    shutil.rmtree(folder / name)


def forget_origin(file: Path) -> None:
    """Take out of a configuration where the model was loaded from: diffusers stores the path on this machine."""
    config = read_json(file)
    if config.pop("_name_or_path", None) is not None:
        file.write_text(json.dumps(config, indent=2, sort_keys=True) + "\n", encoding="utf-8")


def load_drafter(run: str | Path) -> EagleDrafter | RowDrafter:
    """Build the drafter of an "eagle" or "row" run with its averaged weights, in evaluation mode.

    Raises:
        ValueError: not a run of this task, or no checkpoint yet.
    """
    recipe, weights = read_run(run)
    if recipe.task not in ("eagle", "row"):
        raise ValueError(
            f"{run} is a run of task {recipe.task!r}, an EAGLE drafter needs a run of task 'eagle', a row drafter one of 'row'"
        )
    model: EagleDrafter | RowDrafter = make_task(recipe).build(initialize=False)  # type: ignore[assignment]
    model.load_state_dict(weights)
    return model.eval()


def halve_weights(file: Path) -> None:
    """Rewrite a safetensors file with its float32 tensors as float16."""
    tensors = load_file(file)
    halves = {name: value.half() if value.dtype == torch.float32 else value for name, value in tensors.items()}
    with writing(file):
        save_file(halves, file, metadata={"format": "pt"})
    file.chmod(0o644)  # safetensors writes for the owner alone; an installed package is read by everyone


def _conditioner(recipe: Recipe, fill: bool) -> Conditioner:
    """What reads prompts for the data set of a run; ``fill`` whether open attributes are drawn before decoding."""
    words = open_dataset(recipe).words
    return AttributeConditioner(words, fill=fill) if isinstance(words, str) else ClassConditioner(words)


def exported_step(run: Path) -> int:
    """Finished steps of the checkpoint that ``read_run`` reads."""
    return int(
        load_newest(run, lambda checkpoint: (load_weights(checkpoint, "ema"), load_state(checkpoint)))[1]["step"]
    )


def _facts(source: str | Path | None) -> dict[str, Any]:
    """What trained a component: its recipe and the step that was exported."""
    if source is None or not checkpoint_folders(Path(source)):
        return {}
    return {"step": exported_step(Path(source)), "recipe": stored_recipe(Path(source)).to_dict()}

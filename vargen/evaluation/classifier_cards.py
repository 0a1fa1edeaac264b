"""Cards of the two classifiers that the reports stand on: what they are for, what they cannot do, how to make them again."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from vargen.datasets.heroes.atlas import ATLAS_FOLDER
from vargen.evaluation.card import component_lines
from vargen.files import atomic_write
from vargen.validation.places import MODELS_FOLDER
from vargen.validation.printable import printable
from vargen.validation.reading import read_json

_HERO = {
    "what": "Says which of the named parts a picture of a pixel hero (32 x 32) shows, slot by slot. Load it with "
    "`AttributeClassifier.from_pretrained()`.",
    "use": "Measuring whether generated heroes show what their captions asked for (`AttributeAccuracy`, `vargen eval fid`): quote "
    "the share, accuracy on generated pictures over accuracy on real heroes of the same captions.",
    "limits": "It knows the parts of the atlas and nothing else: for any other picture its answer means nothing. It was trained on real "
    "heroes with light noise, blur and colour shifts, so it may forgive faults that a person sees, and a model could be made to "
    "please it. Parts that are hidden behind others are not asked for. Slots differ: see the table.",
    "measured": "Share of what is right on fresh heroes of the test split, visible parts and empty slots (*all*), empty slots (*empty*) and "
    "visible parts of each slot:",
    "commands": (
        "vargen eval classifier --out heroes32-classifier   # from random weights, ten minutes on one core",
        'python -c "from vargen.metrics.attribute_accuracy import accuracy_on_real_heroes as measure; '
        'from vargen.metrics.networks.attributes import AttributeClassifier as C; print(measure(C.from_pretrained()))"',
    ),
}
_MOTION = {
    "what": "Says which of seven motions a clip of a moving hero (17 frames of 32 x 32) shows. Load it with "
    "`MotionClassifier.from_pretrained()`.",
    "use": "Measuring whether generated clips move as asked (`vargen.metrics.networks.motion.measure_motion`), beside real clips of the same "
    "labels and the labels of other clips.",
    "limits": "It knows these heroes, these motions and clips of this length. All its training clips are without faults, so a clip that "
    "flickers or falls apart can still be counted as right; it says nothing about quality.",
    "measured": "Share of fresh clips of the test split that it names rightly:",
    "commands": (
        'python -c "from vargen.metrics.networks.motion import train_motion_classifier as train; '
        "train().save_pretrained('heroes-video-classifier')\"",
        'python -c "from vargen.metrics.networks.motion import MotionClassifier as C, real_accuracy; '
        'print(real_accuracy(C.from_pretrained()))"',
    ),
}
_CARDS: dict[str, dict[str, Any]] = {"heroes32-classifier": _HERO, "heroes-video-classifier": _MOTION}


def write_classifier_card(name: str | Path, *, training: Sequence[str] = ()) -> Path:
    """Write ``README.md`` beside a shipped classifier, its accuracy from ``classifier.json``.

    Args:
        name: of a shipped classifier, or a folder called like one.
        training: what made these weights, a sentence each, where it was not the command of the card alone.

    Raises:
        ValueError: not a classifier of a known name.
    """
    folder = MODELS_FOLDER / name if str(name) in _CARDS else Path(name)
    if folder.name not in _CARDS or not folder.is_dir():
        raise ValueError(f"{printable(name)} is no classifier with a card; known: {', '.join(_CARDS)}")
    text = _card(folder, _CARDS[folder.name], training)
    with atomic_write(folder / "README.md", overwrite=True) as beside:
        beside.write_text(text, encoding="utf-8")
    return folder / "README.md"


def _card(folder: Path, card: dict[str, Any], training: Sequence[str]) -> str:
    source = read_json(ATLAS_FOLDER / "atlas.json")["source"]
    accuracy = read_json(folder / "classifier.json")["real_accuracy"]
    accuracy = accuracy if isinstance(accuracy, dict) else {"motions": accuracy}
    lines = ["---", "library_name: vargen", "license: apache-2.0", "---", "", f"# {folder.name}", "", card["what"], ""]
    lines += ["## Intended use", "", card["use"], "", "## Limits", "", card["limits"], ""]
    lines += ["## Components", "", *component_lines(folder), ""]
    lines += ["## Data", "", f"Composed at random from {source['title']} ({source['licence']}). {source['note']}", ""]
    lines += ["## Licence", "", "The weights: Apache-2.0, as the library.", ""]
    if training:
        lines += ["## Training", "", *training, ""]
    lines += ["## Measurements", "", card["measured"], "", "| | right |", "|---|---|"]
    lines += [f"| {slot} | {share:.2%} |" for slot, share in accuracy.items()]
    lines += ["", "Made and measured again by", "", "```bash", *card["commands"], "```"]
    return "\n".join(lines) + "\n"

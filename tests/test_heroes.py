"""Pixel heroes: atlas, law, prompts, stream, folders."""

from __future__ import annotations

import hashlib
import io
import json
import re
import subprocess
import sys
import tarfile
from itertools import islice
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from torch.utils.data import DataLoader

from vargen.datasets.heroes import build_atlas as crawl
from vargen.datasets.heroes.atlas import ATLAS_FOLDER
from vargen.datasets.heroes.compose import (
    MIN_VISIBLE_PIXELS,
    HeroAtlas,
    HeroesDataset,
    caption,
    complete,
    compose,
    is_held_out,
    parse_prompt,
    sample_attributes,
    sample_hero,
    sample_heroes,
)
from vargen.datasets.philox import philox_words

ATLAS = HeroAtlas.load()


def ids(**slots: str) -> np.ndarray:
    attributes = np.array([ATLAS.none_id(slot) for slot in ATLAS.slots])
    for slot, name in slots.items():
        attributes[ATLAS.slots.index(slot)] = ATLAS.id(name)
    return attributes


def named(attributes: np.ndarray) -> set[str]:
    none_ids = {ATLAS.none_id(slot) for slot in ATLAS.slots}
    return {ATLAS.part(i).name for i in attributes if i != 0 and i not in none_ids}


def test_philox_gives_the_published_vectors() -> None:
    zero = np.zeros(1, dtype=np.uint64)
    assert [hex(int(w)) for w in philox_words(zero, zero, 0, 4)[0]] == [
        "0x6627e8d5",
        "0xe169c58d",
        "0xbc57ac4c",
        "0x9b00dbd8",
    ]


def test_atlas_ids_are_dense_and_names_are_unique() -> None:
    every = [i for slot in ATLAS.slots for i in ATLAS.slot_ids(slot)]
    assert every == list(range(1, ATLAS.num_attributes))
    names = [part.name for part in ATLAS.parts]
    assert len(set(names)) == len(names)
    phrases = [phrase for part in ATLAS.parts for phrase in (part.name, *part.aliases)]
    assert len(set(phrases)) == len(phrases)
    assert all(ATLAS.part(part.id) is part and ATLAS.id(part.name) == part.id for part in ATLAS.parts)


def test_atlas_ids_never_move() -> None:
    """Checkpoints store rows by id; a change here breaks every trained model."""
    vocabulary = "\n".join(f"{part.id} {part.slot} {part.name}" for part in ATLAS.parts)
    assert ATLAS.num_attributes == 272
    assert hashlib.sha256(vocabulary.encode()).hexdigest()[:16] == "058d931d078617d7"


def test_atlas_files_are_small_and_name_their_source() -> None:
    assert sum(file.stat().st_size for file in ATLAS_FOLDER.iterdir()) < 500_000
    source = ATLAS.record["source"]
    assert source["licence"] == "CC0 1.0"
    assert len(source["sha256"]) == 64


def test_every_tile_is_cleared_and_the_note_counts_them() -> None:
    cleared = json.loads((ATLAS_FOLDER / "cleared.json").read_text())
    groups = {name: set(cleared[name]) for name in ("export", "export_other", "newer")}
    files = [part["file"] for part in ATLAS.record["parts"]]
    assert sum(map(len, groups.values())) == len(set().union(*groups.values()))  # no tile in two groups
    assert set(files) == set().union(*groups.values())
    assert len(groups["newer"]) == 12
    assert all(entry["reason"] for entry in cleared["newer"].values())
    counts = [sum(file in group for file in files) for group in groups.values()]
    derived = sum("derived" in part for part in ATLAS.record["parts"])
    note = ATLAS.record["source"]["note"]
    assert [
        int(number) for number in re.findall(r"\b(\d+) (?:are made of|of tiles|of newer|parts are cut)", note)
    ] == [
        *counts,
        derived,
    ]


def test_derived_parts_follow_their_recipes() -> None:
    shipped = {part["file"]: part["id"] for part in ATLAS.record["parts"] if "derived" not in part}
    checked = 0
    for part in ATLAS.record["parts"]:
        if "derived" in part and part["file"] in shipped:
            source = shipped[part["file"]]
            tile = np.zeros((1024, 4), dtype=np.uint8)
            tile[:, :3] = ATLAS.pixels[source][:, None].view(np.uint8)[:, :3]
            tile[:, 3] = ATLAS.masks[source] * 255
            derived = crawl._derive(tile.reshape(32, 32, 4), part["derived"]).reshape(-1, 4)
            assert (derived[:, 3] == ATLAS.masks[part["id"]] * 255).all()
            assert (derived[:, :3] == ATLAS.pixels[part["id"]][:, None].view(np.uint8)[:, :3]).all()
            checked += 1
    assert checked >= 3  # skins and hair; the beards are cut from tiles that are no parts


def test_cutting_keeps_only_the_named_colours_in_the_named_window() -> None:
    tile = np.zeros((32, 32, 4), dtype=np.uint8)
    tile[4:8, 4:8] = (255, 0, 0, 255)
    tile[8:10, 4:8] = (0, 0, 255, 255)
    recipe = {"keep_rest": False, "rows": [6, 12], "columns": [5, 32], "colours": {"ff0000": "00ff00"}}
    cut = crawl._derive(tile, recipe)
    expected = np.zeros_like(tile)
    expected[6:8, 5:8] = (0, 255, 0, 255)
    assert (cut == expected).all()
    recoloured = crawl._derive(tile, {"keep_rest": True, "colours": {"ff0000": "00ff00"}})
    assert (recoloured[4:8, 4:8] == (0, 255, 0, 255)).all()
    assert (recoloured[8:] == tile[8:]).all()


def test_every_part_shows_enough_pixels_on_its_own_and_no_two_look_alike() -> None:
    assert ATLAS.masks[[part.id for part in ATLAS.parts]].sum(1).min() >= MIN_VISIBLE_PIXELS
    tiles = {ATLAS.pixels[part.id].tobytes() + ATLAS.masks[part.id].tobytes() for part in ATLAS.parts}
    assert len(tiles) == len(ATLAS.parts)


@pytest.mark.parametrize(
    ("seed", "digest"),
    [(0, "85a43bfe253cdbdf"), (1, "9bc6478c9d06245f"), (12345, "3fe05b8cd8e4eaad"), (2**63 + 5, "357bb204dc045122")],
)
def test_heroes_of_these_seeds_never_change(seed: int, digest: str) -> None:
    hero = sample_hero(seed)
    content = hero.image.tobytes() + hero.attributes.tobytes() + hero.visible.tobytes()
    assert hashlib.sha256(content).hexdigest()[:16] == digest


def test_hero_does_not_depend_on_its_batch() -> None:
    seeds = np.arange(100, 171)
    batch = sample_heroes(seeds)
    shuffled = sample_heroes(seeds[::-1])
    assert (batch.images == shuffled.images[::-1]).all()
    for row in (0, 63, 64, 70):
        hero = sample_hero(int(seeds[row]))
        assert (hero.image == batch.images[row]).all()
        assert (hero.attributes == batch.attributes[row]).all()
        assert (hero.visible == batch.visible[row]).all()
        assert hero.caption == caption(batch.attributes[row])


def test_law_has_the_stated_frequencies() -> None:
    attributes = sample_attributes(np.arange(40_000))
    for index, slot in enumerate(ATLAS.slots):
        none, *parts = ATLAS.slot_ids(slot)
        present = attributes[:, index] != none
        assert abs(present.mean() - ATLAS.presence[index]) < 0.0125  # five standard errors at worst
        counts = np.bincount(attributes[present, index], minlength=ATLAS.num_attributes)[parts]
        expected = counts.sum() / len(parts)
        statistic = ((counts - expected) ** 2 / expected).sum()  # chi-square, len(parts) - 1 degrees of freedom
        assert statistic < len(parts) + 6 * np.sqrt(2 * len(parts))


def reference_compose(attributes: np.ndarray) -> np.ndarray:
    """Plain alpha compositing, layer after layer, from the files."""
    record = json.loads((ATLAS_FOLDER / "atlas.json").read_text())
    sheet = Image.open(ATLAS_FOLDER / "atlas.png").convert("RGBA")
    entries = {entry["id"]: entry for entry in record["parts"]}
    canvas = Image.new("RGBA", (32, 32), (*record["background"], 255))
    for step in record["draw_order"]:
        slot, _, when = step.partition(":")
        entry = entries.get(int(attributes[ATLAS.slots.index(slot)]))
        legs = entries.get(int(attributes[ATLAS.slots.index("legs")]), {})
        if entry is None or (when in ("back", "front") and (entry.get("layer") == "front") != (when == "front")):
            continue
        if slot == "boots" and (when == "over") != (legs.get("layer") == "under boots"):
            continue
        row, column = divmod(entry["tile"], record["columns"])
        canvas.alpha_composite(sheet.crop((column * 32, row * 32, column * 32 + 32, row * 32 + 32)))
    return np.asarray(canvas.convert("RGB"))


def test_pictures_equal_plain_alpha_compositing() -> None:
    heroes = sample_heroes(np.arange(200))
    for image, attributes in zip(heroes.images, heroes.attributes, strict=True):
        assert (image == reference_compose(attributes)).all()
        assert (image == compose(attributes)).all()


def test_boots_go_over_trousers_and_under_skirts() -> None:
    boots, skirt = ids(base="human", boots="long red boots"), ids(base="human", legs="red skirt")
    both = ids(base="human", boots="long red boots", legs="red skirt")
    drawn = ATLAS.masks[ATLAS.id("red skirt")].reshape(32, 32)
    assert (compose(both)[drawn] == compose(skirt)[drawn]).all()
    trousers = ids(base="human", boots="long red boots", legs="blue trousers")
    drawn = ATLAS.masks[ATLAS.id("long red boots")].reshape(32, 32)
    assert (compose(trousers)[drawn] == compose(boots)[drawn]).all()


def test_invisible_parts_can_be_removed_almost_unnoticed() -> None:
    heroes = sample_heroes(np.arange(500))
    none = np.array([ATLAS.none_id(slot) for slot in ATLAS.slots])
    seen = {True: 0, False: 0}
    for slot, index in ((slot, i) for i, slot in enumerate(ATLAS.slots) if slot != "legs"):  # legs decide on boots
        present = heroes.attributes[:, index] != none[index]
        without = heroes.attributes.copy()
        without[:, index] = none[index]
        owner_free = compose(without)
        changed = (owner_free != heroes.images).any(-1).sum((1, 2))
        hidden = present & ~heroes.visible[:, index]
        assert (changed[hidden] < MIN_VISIBLE_PIXELS).all(), slot
        assert not heroes.visible[~present, index].any(), slot
        seen[True] += int((present & ~hidden).sum())
        seen[False] += int(hidden.sum())
    assert min(seen.values()) > 20


def test_compose_takes_another_background_and_unspecified_slots() -> None:
    nothing = np.zeros(len(ATLAS.slots), dtype=np.int64)
    assert (compose(nothing) == (70, 74, 86)).all()
    assert (compose(nothing, background=(1, 2, 3)) == (1, 2, 3)).all()
    assert compose(nothing[None].repeat(3, 0)).shape == (3, 32, 32, 3)


@pytest.mark.parametrize(
    ("attributes", "message"),
    [
        (np.zeros(3, dtype=np.int64), "must be"),
        (np.zeros(11), "integers"),
        (np.full(11, 5), "not an attribute id of slot 'base'"),
        (np.full(11, 272), "not an attribute id"),
        (np.full(11, -1), "not an attribute id"),
    ],
)
def test_wrong_attributes_are_refused(attributes: np.ndarray, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        compose(attributes)


@pytest.mark.parametrize("seeds", [[-1], [0.5], 3, [[1]]])
def test_wrong_seeds_are_refused(seeds: object) -> None:
    with pytest.raises(ValueError, match="seeds must be"):
        sample_heroes(seeds)  # type: ignore[arg-type]


def test_unknown_names_are_refused() -> None:
    with pytest.raises(ValueError, match="pairs must be one of"):
        sample_hero(0, pairs="some")  # type: ignore[arg-type]
    with pytest.raises(ValueError, match="unknown slot"):
        ATLAS.none_id("tail")
    with pytest.raises(ValueError, match="no hero part"):
        ATLAS.id("tail")
    with pytest.raises(ValueError, match="is not a part"):
        ATLAS.part(ATLAS.none_id("hair"))


def test_complete_keeps_what_is_given_and_fills_the_rest() -> None:
    wish = parse_prompt("deep elf with a red cloak and no hat")
    filled = complete(wish, np.arange(50))
    assert (filled[:, wish != 0] == wish[wish != 0]).all()
    assert (filled != 0).all()
    free = complete(np.zeros(11, dtype=np.int64), np.arange(50))
    assert (free == sample_attributes(np.arange(50))).all()


# prompts


def test_every_name_and_alias_means_its_part() -> None:
    for part in ATLAS.parts:
        plural = part.name if part.name.endswith("s") else part.name + "s"
        for phrase in (part.name, *part.aliases, plural, part.name.upper(), f"  a {part.name}, "):
            attributes = parse_prompt(phrase)
            assert attributes[ATLAS.slots.index(part.slot)] == part.id, phrase
            assert (attributes != 0).sum() == 1, phrase


def test_captions_of_all_parts_are_understood() -> None:
    for part in ATLAS.parts:
        attributes = ids(**{"base": "orc", part.slot: part.name})
        parsed = parse_prompt(caption(attributes))
        assert named(parsed) == named(attributes), caption(attributes)


def test_captions_of_random_heroes_are_understood() -> None:
    for attributes in sample_attributes(np.arange(1000)):
        parsed = parse_prompt(caption(attributes))
        assert named(parsed) == named(attributes), caption(attributes)
        assert np.isin(parsed[parsed != 0], attributes).all()


def test_full_captions_leave_nothing_open() -> None:
    for attributes in sample_attributes(np.arange(1000)):
        assert (parse_prompt(caption(attributes, empty=True)) == attributes).all(), caption(attributes, empty=True)
    assert caption(parse_prompt("orc"), empty=True) == "an orc"  # unspecified is not empty
    assert caption(ids(base="orc"), empty=True).startswith("an orc, no cloak, barefoot")


def test_caption_reads_naturally() -> None:
    hero = ids(base="deep elf", cloak="red cloak", head="wizard hat", hand1="great sword")
    assert caption(hero) == "a deep elf with a wizard hat, a red cloak and a great sword"
    assert caption(ids(base="orc", hair="long red hair")) == "an orc with long red hair"
    assert caption(ids(hand2="unicorn shield")) == "a hero with a unicorn shield"
    assert caption(np.zeros(11, dtype=np.int64)) == "a hero"


@pytest.mark.parametrize(
    ("text", "names"),
    [
        ("Deep elf with a red cloak and a great sword", {"deep elf", "red cloak", "great sword"}),
        ("elf", {"elf"}),
        ("a dwarf holding a sword and a shield", {"deep dwarf", "long sword", "knight shield"}),
        ("dwarves, hats", {"deep dwarf", "wizard hat"}),
        ("PLATE ARMOR!", {"plate armour"}),
        ("gray robe; blonde pigtail", {"grey robe", "blond pigtails"}),
        ("orc warrior wielding a battle-axe", {"orc", "battle axe"}),
        ("greatsword in his right hand, spellbook in the left", {"great sword", "red book"}),
        ("the pirate's rapier", {"rapier"}),
        ("black and gold armour", {"gilded black armour"}),
        ("red cape and a red cloak", {"red cloak"}),
        ("a hero", set()),
    ],
)
def test_free_text_is_understood(text: str, names: set[str]) -> None:
    assert named(parse_prompt(text)) == names


@pytest.mark.parametrize(
    ("text", "empty"),
    [
        ("no hat", {"head"}),
        ("orc without a beard", {"beard"}),
        ("orc without a hat or gloves, with a red cloak", {"head", "gloves"}),
        ("not wearing any boots and a green robe", {"boots"}),
        ("no weapon nor shield", {"hand1", "hand2"}),
        ("a bald, unarmed, barefoot lizard man", {"hair", "hand1", "boots"}),
        ("clean-shaven human", {"beard"}),
    ],
)
def test_negations_ask_for_an_empty_slot(text: str, empty: set[str]) -> None:
    attributes = parse_prompt(text)
    found = {slot for slot, i in zip(ATLAS.slots, attributes, strict=True) if i == ATLAS.none_id(slot)}
    assert found == empty


@pytest.mark.parametrize("text", ["", "   ", " , . "])
def test_empty_prompt_is_refused(text: str) -> None:
    with pytest.raises(ValueError, match="prompt is empty"):
        parse_prompt(text)


@pytest.mark.parametrize(
    ("text", "messages"),
    [
        ("a wizzard hat", ["unknown word in the prompt: 'wizzard'", "'wizard hat'"]),
        ("orc with a gray fish and a kat", ["unknown words", "'gray', 'fish', 'kat'", "'katana'"]),
        ("yellow hat", ["unknown word", "'yellow'", "nearest known"]),
        ("qqqqqq", ["unknown word in the prompt: 'qqqqqq'"]),
        ("with a", ["names no part"]),
        ("no, a red cloak", ["negation"]),
        ("orc without", ["negation"]),
        ("no orc", ["say what the hero is"]),
        ("red cloak and a blue cloak", ["two parts for one place (cloak)", "'red cloak'", "'blue cloak'"]),
        ("a hat, no hat", ["two parts for one place (head)", "'no hat'"]),
        ("elf orc", ["(base)", "'elf'", "'orc'"]),
    ],
)
def test_bad_prompts_say_what_is_wrong_in_one_line(text: str, messages: list[str]) -> None:
    with pytest.raises(ValueError) as error:  # noqa: PT011 - the text is checked below
        parse_prompt(text)
    assert "\n" not in str(error.value)
    for message in messages:
        assert message in str(error.value)


# held-out pairs and the stream


def test_training_never_shows_a_held_out_pair() -> None:
    stream = islice(HeroesDataset(seed=3, batch_size=500), 40)
    attributes = torch.cat([batch["attributes"] for batch in stream]).numpy()
    assert len(attributes) == 20_000
    assert not is_held_out(attributes).any()
    assert 0.03 < is_held_out(sample_attributes(np.arange(20_000))).mean() < 0.06


def test_held_out_split_shows_every_held_out_pair_and_nothing_else() -> None:
    batch = next(iter(HeroesDataset(batch_size=3000, split="test", held_out=True)))
    attributes = batch["attributes"].numpy()
    assert is_held_out(attributes).all()
    base, hand1 = ATLAS.slots.index("base"), ATLAS.slots.index("hand1")
    pairs = {(int(a[base]), int(a[hand1])) for a in attributes}
    every = [(b, w) for b in ATLAS.slot_ids("base")[1:] for w in ATLAS.slot_ids("hand1")[1:]]
    grid = np.zeros((len(every), len(ATLAS.slots)), dtype=np.int64)
    grid[:, [base, hand1]] = every
    assert pairs == {pair for pair, held in zip(every, is_held_out(grid), strict=True) if held}
    assert {b for b, _ in pairs} == set(ATLAS.slot_ids("base")[1:])
    assert 0.04 < len(pairs) / len(every) < 0.06


def test_examples_have_the_stated_types_and_come_from_sample_hero() -> None:
    dataset = HeroesDataset(seed=1)
    for example in islice(dataset, 3):
        assert set(example) == {"image", "attributes", "visible", "seed"}
        assert type(example["seed"]) is int
        hero = sample_hero(example["seed"], pairs=dataset.pairs)
        expected = torch.from_numpy(hero.image).permute(2, 0, 1).float() / 127.5 - 1
        assert torch.allclose(example["image"], expected, atol=1e-6)
        assert example["image"].dtype == torch.float32
        assert example["attributes"].dtype == torch.int64
        assert example["attributes"].tolist() == hero.attributes.tolist()
        assert example["visible"].tolist() == hero.visible.tolist()


def seeds_of(dataset: HeroesDataset, batches: int) -> list[int]:
    return [seed for batch in islice(dataset, batches) for seed in batch["seed"].tolist()]


def test_stream_resumes_from_start() -> None:
    options = {"seed": 5, "batch_size": 7, "attribute_dropout": 0.7, "null_dropout": 0.1}
    whole = list(islice(HeroesDataset(**options), 5))  # type: ignore[arg-type]
    rest = list(islice(HeroesDataset(start=21, **options), 2))  # type: ignore[arg-type]
    for a, b in zip(whole[3:], rest, strict=True):
        assert all(torch.equal(a[key], b[key]) for key in a)


def test_single_examples_equal_batched_ones() -> None:
    single = [example["seed"] for example in islice(HeroesDataset(seed=5), 130)]
    assert single == seeds_of(HeroesDataset(seed=5, batch_size=65), 2)


def test_ranks_and_workers_share_the_stream_without_overlap() -> None:
    whole = seeds_of(HeroesDataset(batch_size=48), 4)
    ranks = [seeds_of(HeroesDataset(batch_size=16, rank=r, world_size=3), 4) for r in range(3)]
    assert [ranks[i % 3][i // 3] for i in range(192)] == whole
    assert len(set(whole)) == 192
    loader = DataLoader(HeroesDataset(batch_size=48), batch_size=None, num_workers=2)
    assert seeds_of(loader, 4) == whole  # type: ignore[arg-type]


def test_splits_and_seeds_give_different_heroes() -> None:
    train = set(seeds_of(HeroesDataset(batch_size=1000), 2))
    test = set(seeds_of(HeroesDataset(batch_size=1000, split="test"), 2))
    assert not train & test
    assert {seed % 2 for seed in train} == {0}
    assert {seed % 2 for seed in test} == {1}
    assert not train & set(seeds_of(HeroesDataset(seed=1, batch_size=1000), 2))


def test_dropout_forgets_attributes_at_the_stated_rates() -> None:
    plain = next(iter(HeroesDataset(batch_size=4000)))
    dropped = next(iter(HeroesDataset(batch_size=4000, attribute_dropout=0.5, null_dropout=0.1)))
    gone = dropped["attributes"] == 0
    assert torch.equal(plain["image"], dropped["image"])
    assert torch.equal(plain["visible"], dropped["visible"])
    assert torch.equal(plain["attributes"][~gone], dropped["attributes"][~gone])
    # all: 0.1 + 0.9 * 0.5 * E[u^11] = 0.1 + 0.45 / 12; any slot: 0.1 + 0.9 * 0.5 / 2
    assert abs(gone.all(1).double().mean() - 0.1375) < 0.03
    assert abs(gone.double().mean() - 0.325) < 0.03
    nothing = next(iter(HeroesDataset(batch_size=64, null_dropout=1.0)))
    assert (nothing["attributes"] == 0).all()


@pytest.mark.parametrize(
    "options",
    [
        {"seed": -1},
        {"start": -1},
        {"batch_size": 0},
        {"split": "validation"},
        {"held_out": True},
        {"attribute_dropout": 1.5},
        {"null_dropout": float("nan")},
        {"rank": 2, "world_size": 2},
        {"world_size": 0},
    ],
)
def test_wrong_dataset_arguments_are_refused(options: dict) -> None:
    name = next(iter(options))
    with pytest.raises(ValueError, match=name if name != "world_size" else "rank"):
        HeroesDataset(**options)


def test_numpy_side_does_not_import_torch() -> None:
    code = "import sys, vargen.datasets.heroes.compose as h; h.sample_hero(0); h.parse_prompt('orc'); print('torch' in sys.modules)"
    result = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert result.stdout.strip() == "False"


# folders and rebuilding


def test_compose_folder_writes_pictures_and_captions(tmp_path: Path) -> None:
    folder = crawl.compose_folder(5, tmp_path / "heroes", seed=40)
    lines = [json.loads(line) for line in (folder / "captions.jsonl").read_text().splitlines()]
    assert [line["seed"] for line in lines] == [40, 41, 42, 43, 44]
    for line in lines:
        hero = sample_hero(line["seed"])
        assert (np.asarray(Image.open(folder / line["file"])) == hero.image).all()
        assert line["caption"] == hero.caption
        assert line["attributes"] == hero.attributes.tolist()
    assert sorted(p.name for p in tmp_path.iterdir()) == ["heroes"]


def test_compose_folder_can_show_only_held_out_pairs(tmp_path: Path) -> None:
    crawl.compose_folder(9, tmp_path / "heroes", held_out=True)
    lines = (tmp_path / "heroes" / "captions.jsonl").read_text().splitlines()
    assert is_held_out([json.loads(line)["attributes"] for line in lines]).all()


def test_compose_folder_damages_nothing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    folder = tmp_path / "mine"
    folder.mkdir()
    (folder / "note.txt").write_text("keep")
    with pytest.raises(ValueError, match="exists"):
        crawl.compose_folder(2, folder, seed=0)
    assert [p.name for p in folder.iterdir()] == ["note.txt"]
    crawl.compose_folder(2, folder, seed=0, overwrite=True)
    before = {p.name: p.read_bytes() for p in folder.iterdir()}
    assert set(before) == {"note.txt", "captions.jsonl", "000000.png", "000001.png"}

    def fail(*_: object) -> str:
        raise RuntimeError("disk full")

    monkeypatch.setattr(crawl, "caption", fail)
    with pytest.raises(RuntimeError, match="disk full"):
        crawl.compose_folder(2, folder, seed=9, overwrite=True)
    assert {p.name: p.read_bytes() for p in folder.iterdir()} == before
    assert [p.name for p in tmp_path.iterdir()] == ["mine"]


@pytest.mark.parametrize(("n", "seed"), [(0, 0), (-3, 0), (1, -1), (2, 2**63 - 1)])
def test_compose_folder_refuses_wrong_numbers(tmp_path: Path, n: int, seed: int) -> None:
    with pytest.raises(ValueError, match="must be"):
        crawl.compose_folder(n, tmp_path / "heroes", seed=seed)
    assert not list(tmp_path.iterdir())


@pytest.fixture
def package(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Write a stand-in tarball made of the shipped tiles, and records that expect its digests."""
    record, cleared = (json.loads((ATLAS_FOLDER / name).read_text()) for name in ("atlas.json", "cleared.json"))
    for part in record["parts"]:
        if part.pop("derived", None):  # its source need not be a part: stand-ins are whole tiles
            part["file"] = f"derived/{part['id']}.png"
    sheet = Image.open(ATLAS_FOLDER / "atlas.png")
    path = tmp_path / "crawl.tar.xz"
    with tarfile.open(path, "w:xz", preset=1) as archive:
        for part in record["parts"]:
            row, column = divmod(part["tile"], record["columns"])
            data = io.BytesIO()
            tile = sheet.crop((column * 32, row * 32, column * 32 + 32, row * 32 + 32)).convert("RGBA")
            tile.save(data, "PNG")
            if part["file"].startswith("derived/"):
                cleared["export"][part["file"]] = hashlib.sha256(tile.tobytes()).hexdigest()
            member = tarfile.TarInfo(f"{record['source']['folder']}/{part['file']}")
            member.size = data.tell()
            archive.addfile(member, io.BytesIO(data.getvalue()))
    record["source"]["sha256"] = hashlib.sha256(path.read_bytes()).hexdigest()
    folder = tmp_path / "record"
    folder.mkdir()
    (folder / "atlas.json").write_text(json.dumps(record))
    (folder / "cleared.json").write_text(json.dumps(cleared))
    monkeypatch.setattr(crawl, "ATLAS_FOLDER", folder)
    return path


def test_rebuilt_atlas_equals_the_shipped_one(package: Path, tmp_path: Path) -> None:
    out = crawl.rebuild_atlas(package, tmp_path / "atlas")
    shipped, rebuilt = (np.asarray(Image.open(folder / "atlas.png")) for folder in (ATLAS_FOLDER, out))
    assert (shipped == rebuilt).all()
    assert HeroAtlas(out).parts == ATLAS.parts


@pytest.mark.parametrize("group", ["export", "export_other", "newer"])
def test_rebuild_refuses_tiles_that_are_not_cleared(package: Path, tmp_path: Path, group: str) -> None:
    file = tmp_path / "record" / "cleared.json"
    cleared = json.loads(file.read_text())
    name = next(iter(cleared[group]))
    del cleared[group][name]
    file.write_text(json.dumps(cleared))
    with pytest.raises(ValueError, match=rf"1 of \d+ tiles are neither .* first {name}; use tiles whose licence is"):
        crawl.rebuild_atlas(package, tmp_path / "atlas")
    assert not (tmp_path / "atlas").exists()


def test_rebuild_refuses_missing_and_foreign_tarballs(package: Path, tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="there is no file"):
        crawl.rebuild_atlas(tmp_path / "absent.tar.xz", tmp_path / "atlas")
    package.write_bytes(package.read_bytes()[:-1])
    with pytest.raises(ValueError, match="SHA-256"):
        crawl.rebuild_atlas(package, tmp_path / "atlas")
    assert not (tmp_path / "atlas").exists()


def test_rebuild_says_what_to_do_without_apt(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PATH", str(tmp_path))
    with pytest.raises(ValueError, match=r"apt-get is not available.*pass its path"):
        crawl.rebuild_atlas(None, tmp_path / "atlas")
    apt = tmp_path / "apt-get"
    apt.write_text("#!/bin/sh\necho 'E: You must put some deb-src URIs in your sources.list' >&2\nexit 100\n")
    apt.chmod(0o755)
    with pytest.raises(ValueError, match=r"You must put.*add the line 'deb-src"):
        crawl.rebuild_atlas(None, tmp_path / "atlas")
    apt.write_text("#!/bin/sh\n: > crawl_0.30.0.orig.tar.xz\n")
    with pytest.raises(ValueError, match=r"delivered crawl_0\.30\.0.*instead of"):
        crawl.rebuild_atlas(None, tmp_path / "atlas")


def test_rebuild_accepts_a_tarball_although_apt_reports_failure(
    package: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    binaries = tmp_path / "bin"
    binaries.mkdir()
    apt = binaries / "apt-get"
    apt.write_text(f"#!/bin/sh\n/bin/cp '{package}' crawl_0.28.0.orig.tar.xz\nexit 100\n")
    apt.chmod(0o755)
    monkeypatch.setenv("PATH", str(binaries))
    assert (crawl.rebuild_atlas(None, tmp_path / "atlas") / "atlas.png").is_file()

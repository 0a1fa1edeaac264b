"""Training recipes: shipped ones, overrides, and what is refused."""

import json
from dataclasses import replace

import pytest

from vargen.training.recipe import RECIPES_FOLDER, ScheduleConfig, load_recipe, parse_recipe


@pytest.mark.parametrize("file", sorted(RECIPES_FOLDER.glob("*.toml")), ids=lambda p: p.stem)
def test_shipped_recipe_is_readable_under_its_name(file):
    recipe = load_recipe(file.stem)
    assert recipe.name == file.stem
    assert parse_recipe(json.loads(json.dumps(recipe.to_dict()))) == recipe


def test_overrides_reach_nested_values():
    overrides = ["schedule.num_steps=7", "optimizer.name=adamw", "model.dim=64", "data.attribute_dropout=0.25"]
    recipe = load_recipe("heroes32-llamagen", overrides)
    assert recipe.schedule.num_steps == 7
    assert recipe.optimizer.name == "adamw"
    assert recipe.model["dim"] == 64
    assert recipe.data.attribute_dropout == 0.25


@pytest.mark.parametrize(
    ("overrides", "message"),
    [
        (["schedul.num_steps=7"], "unknown key 'schedul'.*did you mean 'schedule'"),
        (["schedule.num_step=7"], "unknown key 'schedule.num_step'.*did you mean 'num_steps'"),
        (["schedule.num_steps=many"], "schedule.num_steps must be int, got 'many'"),
        (["schedule.num_steps=0"], "num_steps must be > 0"),
        (["optimizer.name=sgd"], "optimizer.name must be 'adamw' or 'muon'"),
        (["ema_decay=1.5"], "ema_decay must lie in"),
        (["data=heroes"], r"\[data\] must be a table"),
        (["num_steps"], "must look like section.key=value"),
    ],
)
def test_bad_setting_is_named(overrides, message):
    with pytest.raises(ValueError, match=message):
        load_recipe("heroes32-vq", overrides)


def test_missing_and_broken_recipe_files_are_named(tmp_path):
    with pytest.raises(ValueError, match="heroes32-llamagen"):
        load_recipe("heroes32-lamagen")
    with pytest.raises(ValueError, match="does not exist"):
        load_recipe(tmp_path / "none.toml")
    (tmp_path / "broken.toml").write_text("name = ")
    with pytest.raises(ValueError, match=r"cannot read the recipe .*broken.toml"):
        load_recipe(tmp_path / "broken.toml")


def test_schedule_warms_up_stays_and_decays():
    schedule = ScheduleConfig(num_steps=100, warmup_steps=9, decay_steps=19)
    factors = [schedule.factor(step) for step in range(100)]
    assert factors[0] == pytest.approx(0.1)
    assert factors[9:81] == [1.0] * 72
    assert factors[99] == pytest.approx(0.05)
    assert factors[80:] == sorted(factors[80:], reverse=True)
    longer = replace(schedule, num_steps=200)  # extending a run before its decay changes nothing behind it
    assert [longer.factor(step) for step in range(81)] == factors[:81]

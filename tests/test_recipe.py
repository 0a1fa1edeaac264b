"""Training recipes: shipped ones, overrides, and what is refused."""

import json
from dataclasses import replace

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from tests.outside import read_or_refused, refusal
from vargen.training.recipe import RECIPES_FOLDER, Recipe, ScheduleConfig, load_recipe, parse_recipe
from vargen.training.run import train
from vargen.training.tasks.base import make_task


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


def test_an_option_under_its_older_name_is_read_as_todays():
    """Stored recipes of runs and models keep the names that they were written with."""
    table = load_recipe("heroes32-eagle").to_dict()
    old = {("law_weight" if key == "distribution_weight" else key): value for key, value in table["options"].items()}
    assert "law_weight" in old
    assert parse_recipe({**table, "options": old}) == load_recipe("heroes32-eagle")
    with pytest.raises(ValueError, match=r"unknown key 'options\.law_weight'"):
        make_task(parse_recipe({**table, "options": {**table["options"], "law_weight": 0.5}}))


def test_missing_and_broken_recipe_files_are_named(tmp_path):
    with pytest.raises(ValueError, match="heroes32-llamagen"):
        load_recipe("heroes32-lamagen")
    with pytest.raises(ValueError, match="does not exist"):
        load_recipe(tmp_path / "none.toml")
    (tmp_path / "broken.toml").write_text("name = ")
    with pytest.raises(ValueError, match=r"cannot read the recipe .*broken.toml"):
        load_recipe(tmp_path / "broken.toml")


@pytest.mark.parametrize(
    "name", ["/tmp/x", "../x", "a/b", "..", ".", "", "a\\b", "x\x1b[31m", "x\n", "x" * 101, " x", "\u202ex"]
)
def test_name_that_leaves_the_runs_folder_is_refused(name, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    table = load_recipe("heroes32-vq").to_dict() | {"name": name}
    assert "name must be the plain name of a folder" in refusal(lambda: train(parse_recipe(table)))
    assert list(tmp_path.iterdir()) == []
    assert parse_recipe(table | {"name": "my run_2.b+c"}).name == "my run_2.b+c"


@pytest.mark.parametrize(
    ("override", "part"),
    [
        ("schedule.num_steps=1" + "0" * 400, "integer of about 400 digits"),
        ("optimizer.lr=1" + "0" * 400, "integer of about 400 digits"),
        ("seed=1" + "0" * 900, "integer of about 900 digits"),
        ("seed=1" + "0" * 5000, "too long"),
        ("optimizer.lr=nan", "must be a finite number"),
        ("optimizer.lr=1e999", "must be a finite number"),
        ("optimizer.weight_decay=-1", "weight_decay must be in 0..1000000"),
        ("optimizer.betas=[0.9, '0.95']", "betas must be a list of float"),
        ("optimizer.betas=0.9", "betas must be a list of float"),
        ("data.batch_size=99999999", "batch_size must be in 1..65536"),
        ("data.num_eval_images=99999999", "num_eval_images must be in"),
        ("schedule.num_steps=99999999999", "num_steps must be in"),
        ("schedule.warmup_steps=true", "must be int, got True"),
        ("log.log_every=0", "log_every must be > 0"),
        ("model=" + "[" * 400 + "]" * 400, "nests"),
        ("a" + ".a" * 5000 + "=1", "nests"),
        ("x\x1b[31m=1", r"\x1b"),
    ],
)
def test_number_or_nesting_beyond_use_is_one_line(override, part):
    assert part in refusal(lambda: load_recipe("heroes32-vq", [override]))


@pytest.mark.parametrize(("key", "value"), [("grid_size", 0), ("grid_size", 10**6), ("num_kmeans_images", 10**12)])
def test_option_out_of_range_is_refused_before_work(key, value):
    recipe = load_recipe("heroes32-vq", [f"options.{key}={value}"])
    assert f"options.{key}" in refusal(lambda: make_task(recipe))


SHIPPED = [load_recipe(file.stem).to_dict() for file in sorted(RECIPES_FOLDER.glob("*.toml"))]
scalars = st.one_of(
    st.integers(-(10**30), 10**30),
    st.sampled_from([10**400, -(10**400), 2**127, 0, -1, True, "", "x\x1b[2J", "\u202e", "../x", "no", "adamw"]),
    st.floats(),
    st.text(max_size=8),
    st.dates(),
    st.none(),
)
values = st.recursive(
    scalars, lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=5), inner, max_size=3)
)
keys = [(k,) for k in SHIPPED[0]] + [(s, k) for s, t in SHIPPED[0].items() if isinstance(t, dict) for k in t]
changes = st.dictionaries(st.sampled_from(keys) | st.tuples(st.text(max_size=5)), values, max_size=4)


@settings(max_examples=50, deadline=None)
@given(st.sampled_from(SHIPPED), changes)
def test_any_table_is_a_recipe_or_refused_in_one_line(shipped, changed):
    table = {key: dict(value) if isinstance(value, dict) else value for key, value in shipped.items()}
    for (*sections, key), value in changed.items():
        section = table.get(sections[0]) if sections else table
        if isinstance(section, dict):
            section[key] = value
    recipe = read_or_refused(lambda: parse_recipe(table))
    if recipe is not None:
        assert isinstance(recipe, Recipe)
        json.dumps(recipe.to_dict(), default=str)
        assert 0 < recipe.optimizer.lr < 1e308
        assert 0 < recipe.schedule.num_steps <= 10**9


@settings(max_examples=50, deadline=None)
@given(
    st.text(max_size=60) | st.text(alphabet="abn[]{}=.'\"\n0e+-", max_size=60),
    st.sampled_from(["", "x.", "model.", "options."]),
)
def test_any_text_is_a_recipe_or_refused_in_one_line(tmp_path_factory, text, section):
    file = tmp_path_factory.getbasetemp() / "any.toml"
    file.write_bytes(text.encode("utf-8", "surrogatepass"))
    read_or_refused(lambda: load_recipe(file))
    read_or_refused(lambda: load_recipe("heroes32-vq", [f"{section}{text}"]))


def test_schedule_warms_up_stays_and_decays():
    schedule = ScheduleConfig(num_steps=100, warmup_steps=9, decay_steps=19)
    factors = [schedule.factor(step) for step in range(100)]
    assert factors[0] == pytest.approx(0.1)
    assert factors[9:81] == [1.0] * 72
    assert factors[99] == pytest.approx(0.05)
    assert factors[80:] == sorted(factors[80:], reverse=True)
    longer = replace(schedule, num_steps=200)  # extending a run before its decay changes nothing behind it
    assert [longer.factor(step) for step in range(81)] == factors[:81]

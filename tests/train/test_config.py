"""The recipe: defaults < file < command line, and what is said of a wrong one."""

import contextlib
import re
from collections.abc import Iterator
from pathlib import Path
from typing import get_args

import pytest
import yaml
from hypothesis import given
from hypothesis import strategies as st
from pydantic import BaseModel

from diffusion.errors import GazeError
from tests.train.tiny import tiny_recipe
from train.config import Recipe, _override, load_recipe

CONFIGS = Path(__file__).resolve().parents[2] / "configs"
RECIPES = sorted(path for path in CONFIGS.rglob("*.yaml") if path.parent.name != "accelerate")
EXPERIMENTS = [CONFIGS.parent / "benchmarks" / name for name in ("kinds.yaml", "ladder.yaml")]
MINIMAL = {"phase": "diffusion", "out": "runs/x", "pictures": 100, "data": {"folder": "pictures"}}


@pytest.fixture
def minimal(tmp_path: Path) -> Path:
    path = tmp_path / "recipe.yaml"
    path.write_text(yaml.safe_dump(MINIMAL))
    return path


@pytest.mark.parametrize(
    "override, key, guess",
    [
        ("optimizer.learning_rat=1", "optimizer.learning_rat", "learning_rate"),
        ("optimiser.learning_rate=1", "optimiser", "optimizer"),
        ("model.text.window_size=8", "model.text.window_size", "window"),
        ("epochs=3", "epochs", ""),
        ("model.defaults.guidence_scale=3", "model.defaults.guidence_scale", "guidance_scale"),
    ],
)
def test_an_unknown_key_is_answered_with_the_nearest_right_one(minimal, override, key, guess):
    with pytest.raises(GazeError) as error:
        load_recipe(minimal, [override])
    assert f"{key} (on the command line): there is no such key" in error.value.problem
    assert str(minimal) in error.value.problem
    assert f"did you mean {guess!r}" in error.value.hint if guess else "choices: " in error.value.hint


@pytest.mark.parametrize(
    "section, says",
    [
        ("sede: 1", "sede (line 6): there is no such key"),
        ("optimizer: {\n  betas: [0.9, 0.99],\n  learning_rat: 1}", "optimizer.learning_rat (line 8): there is"),
        ("model:\n  # sizes\n  text:\n    width: [1]", "model.text.width (line 9): Input should be a valid integer"),
        ("optimizer:\n  betas:\n  - 0.9\n  - 1", "optimizer.betas.1 (line 7): Input should be less than 1"),
        ("seed: x\nkeep: 1", "seed (line 6): Input should be a valid integer, unable to parse string as an integer; "
         "keep (line 7): Input should be greater than or equal to 2"),
        ("seed: 1\nout: y", "line 7: 'out' was given before"),
        ("data: {folder: x}", "line 6: 'data' was given before"),
        ("optimizer:\n  clip: 1\n  warmup: 2\n  clip: 1", "line 9: 'clip' was given before"),
        ("model:\n  unet: &a\n    again: *a", "Circular reference"),
        ("model:\n  unet:\n    layers_per_blok: 1", "model.unet.layers_per_blok (line 8): there is no such key"),
        ("model:\n  autoencoder: {norm_groups: 1}", "model.autoencoder.norm_groups (line 7): there is no such key"),
        ("model:\n  scheduler:\n    beta_ned: 1", "model.scheduler.beta_ned (line 8): there is no such key"),
    ],
)  # fmt: skip
def test_what_is_wrong_in_the_file_is_named_with_its_line(minimal, section, says):
    minimal.write_text(minimal.read_text() + section)
    with pytest.raises(GazeError) as error:
        load_recipe(minimal)
    assert says in error.value.problem
    assert str(minimal) in error.value.problem


def test_an_override_is_named_where_it_replaces_a_line(minimal):
    minimal.write_text(minimal.read_text() + "optimizer: {learning_rat: 1}\nseed: 5")
    with pytest.raises(GazeError) as error:
        load_recipe(minimal, ["seed=x", "model.text=small"])
    for says in ("optimizer.learning_rat (line 6)", "seed (on the command line)", "model.text (on the command line)"):
        assert says in error.value.problem


@pytest.mark.parametrize(
    "override, key",
    [
        ("pictures=many", "pictures"),
        ("pictures=0", "pictures"),
        ("pictures=3", "pictures 3 is less than batch_size 64"),
        ("pictures=99999999999999999999", "pictures"),
        ("seed=99999999999999999999", "seed"),
        ("validation.seed=99999999999999999999", "validation.seed"),
        ("data.size=1000000", "data.size"),
        ("data.workers=100000", "data.workers"),
        ("model.text.vocab_size=5", "model.text.vocab_size"),
        ("model.text.vocab_size=100000000000", "model.text.vocab_size"),
        ("validation.bins=1000000", "validation.bins"),
        ("trackers=tensorboard", "trackers (on the command line): give a list, as [a, b]"),
        ("batch_size=2.5", "batch_size"),
        ("optimizer.learning_rate=-1", "optimizer.learning_rate"),
        ("optimizer.learning_rate=.nan", "optimizer.learning_rate"),
        ("optimizer.betas=[0.9, 1.0]", "optimizer.betas"),
        ("data.caption_dropout=1.5", "data.caption_dropout"),
        ("mixed_precision=fp8", "mixed_precision"),
        ("model.text.heads=5", "192 does not divide into 5"),
        ("validation.every=100", "validation.prompts is empty"),
        ("data.drawn=5", "give one of folder"),
        ("data=pictures", "data (on the command line): give its keys"),
        ("optimizer=", "optimizer (on the command line): give its keys"),
        ("model.unet=3", "model.unet (on the command line): give its keys"),
        ("ema={snapshots_every: 8, widths: []}", "widths is empty"),
    ],
)
def test_a_wrong_value_is_named(minimal, override, key):
    with pytest.raises(GazeError, match=re.escape(key)):
        load_recipe(minimal, [override])


def test_no_is_a_precision_though_yaml_takes_it_for_false(minimal):
    assert load_recipe(minimal, ["mixed_precision=no"]).mixed_precision == "no"
    minimal.write_text(minimal.read_text() + "mixed_precision: no\n")
    assert load_recipe(minimal).mixed_precision == "no"
    with pytest.raises(GazeError, match="mixed_precision"):
        load_recipe(minimal, ["mixed_precision=yes"])


def numbers(section: type[BaseModel], prefix: str = "") -> Iterator[str]:
    """The keys whose values are numbers."""
    for name, field in section.model_fields.items():
        kind = field.annotation
        if isinstance(kind, type) and issubclass(kind, BaseModel):
            yield from numbers(kind, f"{prefix}{name}.")
        elif kind in (int, float) or float in get_args(kind):
            yield prefix + name


@pytest.mark.parametrize("key", [*numbers(Recipe), "optimizer.betas.1", "ema.widths.0"])
def test_true_is_no_number(minimal, key):
    value = "[0.1, true]" if key.endswith(".1") else "[true]" if key.endswith(".0") else "true"
    with pytest.raises(GazeError, match=rf"{re.escape(key)} .*true is no number"):
        load_recipe(minimal, [f"{key.rstrip('.01')}={value}"])


@pytest.mark.parametrize("text", ["pictures", "=3", "phase.kind=3", "pictures=[1", "seed=2001-99-99", "seed=!!int ''"])
def test_an_override_of_another_form_is_refused(minimal, text):
    with pytest.raises(GazeError):
        load_recipe(minimal, [text])


@pytest.mark.parametrize("content", ["", "- 1", "a: [", "\x00", "3", "1: 2"])
def test_a_file_that_is_no_recipe_is_refused(tmp_path, content):
    (tmp_path / "recipe.yaml").write_text(content)
    with pytest.raises(GazeError, match=r"recipe\.yaml"):
        load_recipe(tmp_path / "recipe.yaml")
    with pytest.raises(GazeError, match="cannot be read"):
        load_recipe(tmp_path / "none.yaml")


def test_defaults_then_file_then_command_line(minimal):
    recipe = load_recipe(minimal, ["optimizer.learning_rate=3e-4", "model.text.width=64", "seed=7", "out=runs/a=b"])
    assert (recipe.batch_size, recipe.pictures, recipe.seed) == (64, 100, 7)
    assert recipe.optimizer.learning_rate == 3e-4
    assert (recipe.model.text.width, recipe.model.text.layers) == (64, 3)
    assert recipe.out == Path("runs/a=b")
    assert load_recipe(minimal, ["model.unet.block_out_channels=[8, 16]"]).model.unet == {"block_out_channels": [8, 16]}
    assert load_recipe(minimal, ["validation.prompts=[]"]).validation.prompts == ()


def test_zero_is_a_value(minimal):
    zeros = ["seed=0", "ema.half_life=0", "optimizer.warmup=0", "optimizer.weight_decay=0", "data.caption_dropout=0"]
    recipe = load_recipe(minimal, [*zeros, "objective.kl_weight=0", "optimizer.betas=[0, 0]", "validation.every=0"])
    assert recipe.seed == recipe.ema.half_life == recipe.optimizer.warmup == recipe.validation.every == 0
    assert recipe.optimizer.weight_decay == recipe.data.caption_dropout == recipe.objective.kl_weight == 0.0
    assert recipe.optimizer.betas == (0.0, 0.0)


def test_the_saved_recipe_is_the_recipe(tmp_path):
    recipe = tiny_recipe(tmp_path, tmp_path, tmp_path, validation={"every": 8, "prompts": ["a 'red' é: 1", "off"]})
    path = tmp_path / "recipe.yaml"
    path.write_text(yaml.safe_dump(recipe.model_dump(mode="json"), sort_keys=False))
    assert load_recipe(path) == recipe
    assert load_recipe(path).identity() == recipe.identity()


@pytest.mark.parametrize("recipe", RECIPES, ids=str)
def test_the_recipes_of_the_repository_are_valid(recipe):
    load_recipe(recipe)


@pytest.mark.parametrize("experiment", EXPERIMENTS, ids=lambda path: path.stem)
def test_the_arms_of_the_repositorys_experiments_are_valid_and_differ(experiment):
    asked = yaml.safe_load(experiment.read_text())
    recipe = CONFIGS.parent / asked["recipe"]
    arms = {name: load_recipe(recipe, [*asked.get("set", []), *arm["set"]]) for name, arm in asked["arms"].items()}
    assert len({arm.identity() for arm in arms.values()}) == len(arms) > 1


def test_identity_is_of_what_a_checkpoint_depends_on():
    recipe = Recipe.model_validate(MINIMAL)
    other_place = {"out": "y", "keep": 3, "data": {"folder": "moved", "workers": 2}, "log_every": 7, "resume": "never"}
    assert Recipe.model_validate(MINIMAL | other_place).identity() == recipe.identity()
    for change in ({"seed": 1}, {"pictures": 101}, {"data": {"folder": "pictures", "size": 32}}, {"batch_size": 32}):
        assert Recipe.model_validate(MINIMAL | change).identity() != recipe.identity()


KEYS = st.lists(st.text(st.characters(categories=["Ll"]), min_size=1), min_size=1, max_size=4)
VALUES = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats(allow_nan=False) | st.text(),
    lambda inner: st.lists(inner) | st.dictionaries(st.text(), inner),
    max_leaves=5,
)


@given(KEYS, VALUES)
def test_any_value_can_be_given_under_any_key(keys, value):
    values: dict = {"other": 1}
    _override(values, f"{'.'.join(keys)}={yaml.safe_dump(value, default_flow_style=True)}")
    for key in keys:
        values = values[key]
    assert values == value


@given(st.text())
def test_any_text_is_an_override_or_a_clear_error(text):
    with contextlib.suppress(GazeError):
        _override({"a": 1, "b": {}}, text)

"""Whatever a recipe holds, it is a recipe or one clear sentence, never another exception."""

import string
from contextlib import suppress

import pytest
from hypothesis import given
from hypothesis import strategies as st

from prunus.errors import UserError
from prunus.recipe import KEYS, STEPS, Recipe, load_recipe, parse_recipe
from prunus.sparsity import parse_pattern

SETTING_NAMES = [*sorted({name for settings in STEPS.values() for name in settings.model_fields}), "cls", "self"]
WORDS = ["admm", "wanda", "uniform", "owl", "2:4", "0.5", "16x16:0.8", "*.o_proj", "dense", "self", "cls", "builtin"]
LEAVES = st.one_of(
    st.none(), st.booleans(), st.integers(), st.floats(), st.text(max_size=8), st.dates(), st.sampled_from(WORDS)
)
KEYS_OF_MAPPINGS = st.one_of(
    st.sampled_from([*KEYS, *STEPS, *SETTING_NAMES, *WORDS]), st.text(max_size=4), st.integers(), st.booleans()
)
DATA = st.recursive(
    LEAVES, lambda inner: st.lists(inner, max_size=4) | st.dictionaries(KEYS_OF_MAPPINGS, inner, max_size=4)
)
STEP = st.dictionaries(
    st.sampled_from(list(STEPS)), st.dictionaries(st.sampled_from(SETTING_NAMES), DATA, max_size=3), max_size=2
)
NEARLY_A_RECIPE = st.fixed_dictionaries(
    {"version": st.just(1), "model": st.just("model"), "steps": st.lists(STEP | DATA, max_size=3)}
)


@given(DATA | NEARLY_A_RECIPE)
def test_any_data_is_a_recipe_or_a_user_error(content):
    with suppress(UserError):
        assert isinstance(parse_recipe(content), Recipe)


@given(DATA)
def test_any_data_is_a_pattern_or_a_user_error(content):
    with suppress(UserError):
        pattern = parse_pattern(content)
        assert parse_pattern(str(pattern)) == pattern


PIECES = [
    "!!int",
    "!!timestamp",
    "!!bool",
    "!!python/object:os.system",
    "&a",
    "*a",
    "- ",
    ": ",
    "? ",
    "[",
    "]",
    "{",
    "}",
]
YAML_TEXT = st.lists(st.sampled_from(PIECES) | st.text(string.printable, max_size=5), max_size=8).map("".join)


@given(YAML_TEXT)
def test_any_text_is_a_recipe_or_a_user_error(tmp_path_factory, content):
    file = tmp_path_factory.getbasetemp() / "fuzzed.yaml"
    file.write_text(content, encoding="utf-8")
    with suppress(UserError):
        assert isinstance(load_recipe(file), Recipe)


@pytest.mark.parametrize("content", ["!!timestamp x", "!!int ''", "!!bool x", "a: b: c", "&a [*a]", "[" * 5000])
def test_yaml_that_cannot_be_read_is_refused(tmp_path, content):
    file = tmp_path / "recipe.yaml"
    file.write_text(content)
    with pytest.raises(UserError):
        load_recipe(file)


def test_a_recipe_holds_what_was_written():
    steps = [{"sparsify": {"method": "wanda", "pattern": "2:4", "protect": ["*.o_proj"]}}, "report", {"bench": None}]
    recipe = parse_recipe({"version": 1, "model": "org/model", "steps": steps})
    assert [step.verb for step in recipe.steps] == ["sparsify", "report", "bench"]
    assert recipe.steps[0].settings.model_dump(exclude_unset=True) == {
        "method": "wanda",
        "pattern": "2:4",
        "protect": ("*.o_proj",),
    }


@pytest.mark.parametrize(
    ("steps", "message"),
    [
        (
            [{"export": {}}, {"shrink": {"ffn": 0.5}}],
            "has shrink after export: what an engine loads",
        ),
        ([{"quantize": {"scheme": "int8"}}, {"export": {}}], "has export after quantize: the full-precision weights"),
        ([{"export": {}}, {"evaluate": {"prompts": ["A vine"], "against": "dense"}}], "prompts or tasks after export"),
    ],
)
def test_what_ends_a_recipe_comes_last(steps, message):
    with pytest.raises(UserError, match=message):
        parse_recipe({"version": 1, "model": "org/model", "steps": steps})


def test_text_is_evaluated_after_an_export():
    steps = [{"export": {}}, {"evaluate": {"text": ["builtin"], "against": "dense"}}, {"bench": {"against": "dense"}}]
    assert len(parse_recipe({"version": 1, "model": "org/model", "steps": steps}).steps) == 3

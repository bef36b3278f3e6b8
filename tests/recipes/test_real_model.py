"""Every shipped recipe on the model that it names, with so little text and training that each takes a minute or less.

What comes out is worth nothing; that the steps of the recipe go through on a real model is what is tested.
"""

import shutil
from pathlib import Path

import pytest
import yaml

import prunus
from prunus.cache import cache_dir
from prunus.demo_model import fetch_demo_model
from prunus.engines import LLAMA_CPP, find
from prunus.errors import UserError
from prunus.recipe import Recipe, load_recipe, parse_recipe

pytestmark = pytest.mark.slow
RECIPES = sorted((Path(__file__).parents[2] / "recipes").glob("*.yaml"))
LITTLE = {
    "sparsify": {"samples": 4, "length": 32, "options": {"stages": 1, "iterations": 1, "polish": 0}},
    "shrink": {"samples": 16, "length": 64},  # more tokens than inputs of a matrix
    "recover": {"tokens": 64, "length": 64, "batch_tokens": 64, "held_out": 1},
    "evaluate": {"length": 64, "windows": 2},
    "bench": {"prompt_tokens": 8, "new_tokens": 4, "repetitions": 1},
    "export": {"to": "gguf:f32"},  # so little training leaves a model that no 4-bit type can be proved on
    "report": {},
}
WIDE = {"kl": 1e9}  # so little calibration text costs too much for any envelope


@pytest.fixture(scope="module")
def model(tmp_path_factory):
    """The model; what it samples for itself is made once for all recipes, and not kept."""
    try:
        directory = fetch_demo_model()
    except UserError as error:
        pytest.skip(f"the recipes' model cannot be fetched: {error}")
    with pytest.MonkeyPatch.context() as patch:
        cache = tmp_path_factory.mktemp("cache")
        (cache / "engines").symlink_to(cache_dir() / "engines")
        patch.setenv("PRUNUS_CACHE", str(cache))
        yield directory


def little(path: Path, model: Path) -> Recipe:
    """The recipe's own steps in their order, with small numbers; a third time shows nothing that the second did not."""
    content = yaml.safe_load(path.read_text(encoding="utf-8"))
    steps = [{verb: settings | LITTLE[verb]} for step in content["steps"] for verb, settings in step.items()]
    steps = [step for place, step in enumerate(steps) if steps[:place].count(step) < 2]
    envelope = {"envelope": WIDE} if "envelope" in content else {}
    return parse_recipe({**content, **envelope, "model": str(model), "steps": steps})


@pytest.mark.parametrize("path", RECIPES, ids=lambda path: path.stem)
def test_a_shipped_recipe_on_its_own_model(path, model, tmp_path):
    assert load_recipe(path).model.endswith(model.name)
    recipe = little(path, model)
    if "export" in [step.verb for step in recipe.steps] and find(LLAMA_CPP) is None:
        pytest.skip("needs llama.cpp: prunus engines install llama.cpp")
    try:
        run = prunus.run(recipe, tmp_path / "out")
        assert [step["step"] for step in run.steps] == [step.verb for step in recipe.steps]
        evaluated = [step["results"][0] for step in run.steps if step["step"] == "evaluate"]
        assert all(0 < result["against"]["kl"] < 20 for result in evaluated)
        assert (run.path / "report.html").stat().st_size > 100_000
    finally:
        shutil.rmtree(tmp_path)  # several models of half a gigabyte

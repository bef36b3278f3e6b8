"""The tier of layers that differ, on disk: an ordinary directory whose config.json plain transformers refuses.

No config of transformers can say that layers differ, so that of such a model carries a list under `KEY`: for each
layer, the fields in which it differs from the rest of the config, and the sublayers that it lacks. In config.json all
of it stands one level down, under a model type that nobody knows: AutoConfig refuses it, and with it every engine that
asks transformers. A model class that is told to read it all the same looks inside for its own model type and finds
none; the size of its vocabulary is then a sentence, which no config takes. So nothing is ever filled up with random
weights.
"""

from typing import Any

from transformers import PretrainedConfig

from prunus.errors import UserError

KEY = "prunus_layers"
WITHOUT = "without"  # in the fields of a layer: the sublayers that it has not, by kind
MODEL_TYPE = "prunus_per_layer"
OPENED_BY = "transformers and engines do not open it; open it with prunus.load, and measure it with prunus"

Fields = dict[str, Any]


def layer_fields(config: PretrainedConfig) -> list[Fields] | None:
    """What each layer has of its own, by the names of config fields; None for an ordinary model."""
    found: list[Fields] | None = getattr(config.get_text_config(decoder=True), KEY, None)
    return found


def stored_config(raw: Fields) -> Fields:
    """The content of config.json: that of an ordinary model is what it was."""
    parts = [raw, *(value for value in raw.values() if isinstance(value, dict))]
    if not any(KEY in part for part in parts):
        return raw
    inside = {name: value for name, value in raw.items() if name != "model_type"}
    about = f"the layers of this model differ: {OPENED_BY}."
    return {"model_type": MODEL_TYPE, "vocab_size": about, "family": raw["model_type"], "config": inside}


def unwrapped(stored: Fields, file: object) -> Fields:
    """The inverse. Raises UserError when the directory says that it is of this tier and lacks what belongs to it."""
    if stored.get("model_type") != MODEL_TYPE:
        return stored
    family, inside = stored.get("family"), stored.get("config")
    if not isinstance(family, str) or not isinstance(inside, dict):
        raise UserError(f"{file} says {MODEL_TYPE} and lacks its family or its config; restore it from the run.")
    return {**inside, "model_type": family}


def check_layers(config: PretrainedConfig, file: object) -> None:
    """Raises UserError when the list does not say what every layer is."""
    fields, depth = layer_fields(config), config.get_text_config(decoder=True).num_hidden_layers
    whole = isinstance(fields, list) and all(isinstance(entry, dict) and _names_modules(entry) for entry in fields)
    if not whole or len(fields or ()) != depth:
        raise UserError(f"{file} says {MODEL_TYPE}, but {KEY} does not describe its {depth} layers; restore it.")


def _names_modules(entry: Fields) -> bool:
    """Whether what a layer is without is named as this tier names it."""
    without = entry.get(WITHOUT, {})
    return isinstance(without, dict) and all(
        isinstance(one, dict) and isinstance(one.get("module"), str) and isinstance(one.get("outputs"), int)
        for one in without.values()
    )

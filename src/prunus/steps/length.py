"""How long windows are where the user did not say."""

from typing import TypeVar, cast

from transformers import PretrainedConfig

from prunus.models.limits import max_length
from prunus.progress import say
from prunus.settings import CalibratedSettings, EvaluateSettings, RecoverSettings

Windowed = TypeVar("Windowed", bound=CalibratedSettings | EvaluateSettings | RecoverSettings)

SHORTER = "windows are {} tokens long, the model's maximum, and not the usual {}; --length says otherwise."


def fit_length(settings: Windowed, *configs: PretrainedConfig, says_so: bool = True) -> Windowed:
    """The settings with windows that all these models can take, where no length was asked for.

    A length that was asked for stays; text for it is refused where it is too long.
    """
    longest = min((most for config in configs if (most := max_length(config)) is not None), default=None)
    if "length" in settings.model_fields_set or longest is None or longest >= settings.length:
        return settings
    if says_so:
        say([SHORTER.format(longest, settings.length)])
    return cast(Windowed, settings.model_copy(update={"length": longest}))

"""transformers: where every result of prunus opens as it is, and what all others are compared with."""

from prunus.engines.engine import Engine

TRANSFORMERS = Engine(
    name="transformers",
    title="the library prunus itself runs with",
    takes="every directory that prunus makes, as it is",
    zeros="nothing: it multiplies zeros like any other number",
    shapes="memory and time, as the shapes go",
    tested={"transformers": "5.23.*", "torch": "2.13.*"},
    together=True,
)

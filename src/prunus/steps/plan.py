"""What a sparsify step will do to every matrix, decided from names and shapes before any weight is read."""

import fnmatch
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from prunus.errors import UserError
from prunus.models.spec import BlockSpec, LinearSpec, ModelSpec
from prunus.sparsity import Method, Pattern, parse_pattern

DENSE = "dense"


@dataclass(frozen=True, slots=True)
class Plan:
    """The pattern of every matrix by full name; a matrix that is not listed stays dense."""

    patterns: Mapping[str, Pattern]

    def pattern_of(self, block: BlockSpec, linear: LinearSpec) -> Pattern | None:
        return self.patterns.get(block.full_name(linear))

    def num_pruned(self, spec: ModelSpec) -> int:
        """Zeros that were asked for, over all matrices."""
        shapes = {block.full_name(linear): linear.shape for block, linear in candidates(spec, head=True)}
        return sum(pattern.num_pruned(shapes[name]) for name, pattern in self.patterns.items())


def candidates(spec: ModelSpec, head: bool) -> list[tuple[BlockSpec, LinearSpec]]:
    """Every matrix that can be pruned, with or without the output head."""
    if not head or spec.head is None:
        return spec.matrices
    return [*spec.matrices, *((spec.head, linear) for linear in spec.head.linears)]


def make_plan(
    spec: ModelSpec,
    method: Method,
    pattern: str,
    overrides: Mapping[str, str],
    protect: Sequence[str],
    head: bool = False,
) -> Plan:
    """Decide the pattern of every matrix: `overrides` maps a glob over full names to a pattern or "dense".

    Later overrides win over earlier ones, `protect` wins over all. Raises UserError for a glob that matches nothing
    and for a pattern that does not fit a matrix.
    """
    if head and spec.head is None:
        raise UserError(
            "the output head is tied to the embedding, so it cannot be pruned on its own; leave --head out."
        )
    matrices = candidates(spec, head)
    wishes = {block.full_name(linear): pattern for block, linear in matrices}
    for glob, wish in [*overrides.items(), *((glob, DENSE) for glob in protect)]:
        wishes |= dict.fromkeys(_matching(glob, wishes), wish)
    shapes = {block.full_name(linear): linear.shape for block, linear in matrices}
    parsed = {wish: method.resolve(parse_pattern(wish)) for wish in set(wishes.values()) if wish != DENSE}
    patterns = {name: parsed[wish] for name, wish in wishes.items() if wish != DENSE}
    for name, wanted in patterns.items():
        wanted.check(shapes[name], name)
    if not patterns:
        raise UserError("every matrix is protected or dense, so there is nothing to sparsify; loosen --protect.")
    return Plan(patterns)


def _matching(glob: str, names: Mapping[str, str]) -> list[str]:
    found = fnmatch.filter(names, glob)
    if not found:
        example = next(iter(names))
        raise UserError(f"{glob!r} matches no matrix; names look like {example!r}, so try a glob such as '*.o_proj'.")
    return found

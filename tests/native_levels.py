"""The instruction sets of this processor, for tests that go through all of them."""

from collections.abc import Iterator

import pytest

from prunus.runtime.native import Kernels, kernels, library_file

BUILT = library_file() is not None
NATIVE = kernels().levels if BUILT else []  # type: ignore[union-attr]
needs_kernels = pytest.mark.skipif(not BUILT, reason="prunus was installed without its kernels: no C++ compiler")


def native() -> Kernels:
    found = kernels()
    assert found is not None
    return found


@pytest.fixture(autouse=True)
def the_best_level_afterwards() -> Iterator[None]:
    """Of whoever imports it."""
    yield
    native().use_level(NATIVE[0])

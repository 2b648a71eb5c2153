"""The process of the engines."""

from __future__ import annotations

from collections.abc import Iterator

import pytest
from engines import Engines


@pytest.fixture(scope="session")
def engines() -> Iterator[Engines]:
    with Engines() as process:
        yield process

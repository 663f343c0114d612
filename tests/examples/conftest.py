"""Everything here that is not marked `smoke` is marked `examples`, and left to `make test-examples`."""

from pathlib import Path

import pytest

HERE = Path(__file__).parent


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    for item in items:
        if HERE in item.path.parents and item.get_closest_marker("smoke") is None:
            item.add_marker("examples")

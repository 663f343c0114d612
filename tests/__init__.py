"""The test suite; a package so that ``from tests.reference import ...`` works from the repository root."""

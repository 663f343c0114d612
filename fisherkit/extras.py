"""Packages that only some of fisherkit needs: what is said where one is missing. Imports none of them."""

from __future__ import annotations


def missing(call: str, package: str, extra: str, error: ImportError) -> dict[str, str]:
    """What a MissingPackageError says of a package that cannot be imported: the command that installs it too.

    Args:
        call: what needs it.
        package: by the name of its distribution.
        extra: of fisherkit's, which brings it.
        error: as Python raised it.
    """
    return {
        "call": call,
        "got": f"no {package} ({error})",
        "expected": f"{package}, which only this part of fisherkit needs",
        "try_": f'pip install "fisherkit[{extra}]"',
    }

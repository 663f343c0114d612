"""placeholder"""

from typing import Any


def report(tasks: Any, pictures: str) -> str:
    return ""

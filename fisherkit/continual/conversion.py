"""Other libraries' strength of EWC in ours."""

from __future__ import annotations


def convert_strength(strength: float) -> float:
    """Provisional."""
    return strength

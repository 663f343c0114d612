"""What common code makes of a Fisher's scale: the factors that it is off by, and which of them a scale is near.

Owns the factors and how near is near; knows numbers only.
"""

from __future__ import annotations

CLOSE = 0.3
"""A factor explains a scale if it is within this part of it."""

ALIGNED = 0.9
"""Below this cosine no factor explains anything. Squared gradients that are averaged over K batches scatter about the
Fisher: where the entries of a batch's gradient are normal and of like size, their cosine with it is 1/√(1 + 2/K), 0.91
for ten batches. Another structure or kind is as a rule farther away, and is no multiple of the exact one."""


def explanations(cosine: float, scale: float, examples: int, batch_size: int | None) -> tuple[str, ...]:
    """The candidates for a scale, the nearest first; several may fit one number, and none is more than a candidate.

    Args:
        cosine: ⟨A, F⟩/(‖A‖‖F‖).
        scale: ⟨A, F⟩/⟨F, F⟩.
        examples: N; 0 if it is not known.
        batch_size: B; None if it is not known.
    """
    if not cosine >= ALIGNED:
        return ()
    near = [
        (abs(scale / factor - 1), f"{name}: {text}")
        for name, factor, text in [*_of_examples(examples), *_of_batches(examples, batch_size)]
        if abs(scale / factor - 1) <= CLOSE
    ]
    return tuple(text for _, text in sorted(near, key=lambda pair: pair[0]))


def _of_examples(N: int) -> list[tuple[str, float, str]]:
    found = [("1", 1.0, "the same normalization"), ("½", 0.5, "half the Fisher"), ("2", 2.0, "twice the Fisher")]
    if N > 1:
        found += [
            (f"N = {N:,}", float(N), "a sum over examples"),
            (f"1/N = 1/{N:,}", 1 / N, "divided by N once too often"),
        ]
    return found


def _of_batches(N: int, B: int | None) -> list[tuple[str, float, str]]:
    """Of N/B batches, whose mean losses' squared gradients are F/B each where single ones are independent of mean 0."""
    if B is None or B == 1:
        return []
    mean, summed = (f"squared gradients of batches (of {how} losses)" for how in ("mean", "summed"))
    found = [
        (f"1/B = 1/{B}", 1 / B, f"{mean}, averaged over batches"),
        (f"1/B² = 1/{B}²", 1 / B**2, f"{mean}, summed and divided by N"),
        (f"B = {B}", float(B), f"{summed}, averaged over batches"),
        ("1", 1.0, f"{summed}, summed and divided by N"),
    ]
    if N > B:
        found += [
            (f"N/B² = {N:,}/{B}²", N / B**2, f"{mean}, summed"),
            (f"N = {N:,}", float(N), f"{summed}, summed"),
            (f"N/B = {N:,}/{B}", N / B, "squared gradients of examples, averaged in batches and summed over them"),
        ]
    return found

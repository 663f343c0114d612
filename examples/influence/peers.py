"""Scores by other libraries, where they are installed. Knows which methods need which; runs none.

Each is run as its documentation says, in batches as large as memory allows, with the same meaning of damping:
multiples of the mean eigenvalue over everything that is inverted.
"""

from __future__ import annotations

import importlib.util
from collections.abc import Mapping
from functools import partial

from examples.influence.dattri_peer import dattri_ekfac, dattri_trak
from examples.influence.kronfluence_peer import kronfluence
from examples.influence.scorer import Method
from examples.influence.traker_peer import traker

METHODS: Mapping[str, Mapping[str, Method]] = {
    "kronfluence": {
        "kronfluence KFAC": partial(kronfluence, "kfac", own=False),
        "kronfluence EKFAC": partial(kronfluence, "ekfac", own=False),
        "kronfluence KFAC, its own damping": partial(kronfluence, "kfac", own=True),
        "kronfluence EKFAC, its own damping": partial(kronfluence, "ekfac", own=True),
    },
    "dattri": {
        "dattri EKFAC": dattri_ekfac,
        "dattri TRAK, unprojected": partial(dattri_trak, None),
        "dattri TRAK, 512 dimensions": partial(dattri_trak, 512),
    },
    "traker": {
        "traker, unprojected": partial(traker, None),
        "traker, 256 dimensions": partial(traker, 256),
        "traker, 2048 dimensions": partial(traker, 2048),
    },
}
"""By library, as it is installed."""

MODULES = {"kronfluence": "kronfluence", "dattri": "dattri", "traker": "trak"}
"""What a library is imported as."""

UNDAMPED = (
    "kronfluence KFAC, its own damping", "kronfluence EKFAC, its own damping", "dattri TRAK, 512 dimensions",
    "traker, 256 dimensions", "traker, 2048 dimensions",
)  # fmt: skip
"""Where kronfluence chooses, 0.1 × the mean eigenvalue of each layer, and where TRAK's projection takes its place."""


def missing() -> list[str]:
    """Libraries that are not installed."""
    return [name for name, module in MODULES.items() if importlib.util.find_spec(module) is None]


def peers() -> Mapping[str, Method]:
    """Methods by name; those of a library that is not installed are left out."""
    left_out = missing()
    return {name: m for library, own in METHODS.items() if library not in left_out for name, m in own.items()}

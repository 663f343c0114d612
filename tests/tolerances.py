"""The one table of tolerances: largest accepted relative error, norm-wise, of each comparison in these tests."""

import torch

from fisherkit.testing import TOLERANCES

CONFORMANCE: dict[torch.dtype, float] = TOLERANCES
"""A Fisher of the package against the reference, whatever the operation; `test_testing` pins the numbers."""

EIGENBASIS: dict[torch.dtype, float] = {torch.float64: 1e-10, torch.float32: 1e-5}
"""Off-diagonal remainder of a Kronecker factor in what should be its eigenbasis."""

SEPARATE_EIGENVALUES = 1e-6
"""Relative gap from which on eigenvectors are determined well enough to compare what is made of them."""

ROUNDING = 1e-12
"""A sum this small relative to its terms may be zero."""

HALF: dict[torch.dtype, float] = {torch.bfloat16: 3e-2, torch.float16: 4e-3}
"""A Fisher of a model in half precision against float64 at the same weights: what the model's own passes round."""

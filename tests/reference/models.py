"""The zoo: every model family by name, in the order in which they were registered."""

from tests.reference import models_conv, models_dense, models_sequence
from tests.reference.zoo import FAMILIES, Family

__all__ = ["EVERY_FORM", "FAMILIES", "Family", "models_conv", "models_dense", "models_sequence"]

EVERY_FORM = (
    "mlp", "conv2d_groups", "layernorm", "bare_parameters", "hf_conv1d", "embedding", "tied_head_parameter", "lstm",
    "masked_weight", "token_mlp", "token_attention_by_token", "gaussian_vector", "gaussian_tokens", "bernoulli_scalar",
    "bernoulli_by_token",
)  # fmt: skip
"""Families that together have every form of rows and every shape of outputs and labels."""

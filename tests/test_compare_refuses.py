"""What `compare` refuses, and what it says."""

from __future__ import annotations

import math
import re
from typing import Any

import pytest
import torch
from torch import nn

import fisherkit as fk
from fisherkit.evaluation import compare
from tests.test_compare import data, network


@pytest.mark.parametrize(
    ("options", "error", "message"),
    [
        ({"kinds": ("newton",)}, fk.InvalidArgumentError, "expected one of ['sgd', 'ef'"),
        ({"kinds": ("ef:2",)}, fk.InvalidArgumentError, "'ef' has no setting"),
        ({"kinds": ("sf:0",)}, fk.InvalidArgumentError, "draws=0, not 1 or more"),
        ({"kinds": ("truncated:0",)}, fk.InvalidArgumentError, "rank=0, not 1 or more"),
        ({"kinds": ("truncated:1.5",)}, fk.InvalidArgumentError, "tolerance=1.5, not a number from 0 to below 1"),
        ({"kinds": ("truncated:",)}, fk.InvalidArgumentError, "got kind='truncated:'"),
        ({"kinds": ("ief:2",)}, fk.InvalidArgumentError, "power=2, not a number from 0 to 1"),
        ({"kinds": "ef"}, fk.InvalidTypeError, 'kinds=("...",)'),
        ({"kinds": ("ef", "ief", "ef")}, fk.InvalidArgumentError, "kinds with 'ef' twice"),
        ({"gram_dampings": (1e-3, 1e-3)}, fk.InvalidArgumentError, "gram_dampings with 0.001 twice"),
        ({"kinds": ()}, fk.InvalidArgumentError, "got no kinds"),
        ({"kinds": (1,)}, fk.InvalidTypeError, "a kind of type int"),
        ({"structures": ("dense",)}, fk.InvalidArgumentError, "structure='dense'"),
        ({"gram_dampings": (0.0,)}, fk.InvalidArgumentError, "gram damping 0.0"),
        ({"gram_dampings": (math.inf,)}, fk.InvalidArgumentError, "gram damping inf"),
        ({"gram_dampings": ("1",)}, fk.InvalidTypeError, "a damping of type str"),
        ({"gram_dampings": 1e-3}, fk.InvalidTypeError, "gram_dampings of type float"),
        ({"gram_dampings": ()}, fk.InvalidArgumentError, "no gram_dampings"),
        ({"drop_duplicates": 1.0}, fk.InvalidArgumentError, "a cosine between 0 and 1"),
        ({"drop_duplicates": "yes"}, fk.InvalidTypeError, "drop_duplicates of type str"),
        ({"seed": 0.5}, fk.InvalidTypeError, "seed of type float"),
        ({"likelihood": "weibull"}, fk.InvalidArgumentError, "weibull"),
        ({"example": "word"}, fk.InvalidArgumentError, "example='word'"),
    ],
    ids=str,
)
def test_compare__refuses(options: dict[str, Any], error: type[Exception], message: str) -> None:
    with pytest.raises(error, match=re.escape(message)):
        compare(network(), data(), **options)


def test_compare__refuses_other_models_and_batches() -> None:
    model, (x, y) = network(), data()
    stranger: Any = model.forward
    with pytest.raises(fk.InvalidTypeError, match="as model"):
        compare(stranger, (x, y))
    with pytest.raises(fk.InvalidTypeError, match="a batch of type"):
        compare(model, x)
    with pytest.raises(fk.DataError, match="no targets"):
        compare(model, (x, None))
    with pytest.raises(fk.ModelError):
        compare(nn.Sequential(model, nn.Dropout(0.5)), (x, y))
    with pytest.raises(fk.DataError, match="no example with a label"):
        compare(model, (x, torch.full_like(y, -100)))


def test_compare__refuses_duplicate_tokens_in_structures_built_from_data() -> None:
    x, y = data(12)
    batch = x.reshape(4, 3, 5), y.reshape(4, 3)
    with pytest.raises(fk.InvalidArgumentError, match="tokens cannot be taken out"):
        compare(network(), batch, structures=("kfac",), example="token", drop_duplicates=0.9)


def test_compare__takes_one_batch_and_says_so() -> None:
    x, y = data(12)
    for batches in ([(x, y)], [(x, y), (x, y)]):
        with pytest.raises(fk.InvalidTypeError, match=r"a list of \d batches; expected one batch"):
            compare(network(), batches)


def test_compare__says_which_kind_a_loss_does_not_have() -> None:
    """SF is among the default kinds, and a weighted loss has no labels to draw."""
    x, y = data()
    weighted = nn.CrossEntropyLoss(weight=torch.tensor([1.0, 2.0, 3.0], dtype=x.dtype))
    with pytest.raises(
        fk.InvalidArgumentError, match=r"^compare, kind 'sf', structure 'full': .*kinds= or structures="
    ):
        compare(network(), (x, y), likelihood=weighted)
    assert len(compare(network(), (x, y), likelihood=weighted, kinds=("sgd", "ef"), gram_dampings=(0.1,)).rows) == 2

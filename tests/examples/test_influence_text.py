"""The text model of the influence experiments is the end of the whole encoder, and its inputs are the beginning."""

from __future__ import annotations

import pytest
import torch

from examples.influence import text
from examples.influence.settings import Pair
from examples.shared.tasks import docstring_text, minilm


@pytest.fixture(scope="module")
def data() -> tuple[Pair, Pair, int]:
    return text.data()


def test_data__is_what_the_task_has(data: tuple[Pair, Pair, int]) -> None:
    train, queries, classes = data
    for (inputs, labels), count in ((train, text.TRAIN), (queries, text.QUERIES)):
        assert inputs.shape == (count, text.TOKENS, 385)
        assert len(labels) == count
        assert set(inputs[..., -1].unique().tolist()) == {0.0, 1.0}
    assert classes == 10


def test_build__is_the_rest_of_the_encoder(data: tuple[Pair, Pair, int]) -> None:
    inputs, labels = (tensor[:6] for tensor in data[0])
    task = docstring_text(tokens=text.TOKENS)
    tokens = task.train.inputs
    assert isinstance(tokens, dict)
    assert torch.equal(labels, task.train.labels[:6])
    model, encoder = text.build(0, data[2]), minilm().eval()
    assert isinstance(model, text.Tail)
    with torch.no_grad():
        hidden = encoder(**{name: tensor[:6] for name, tensor in tokens.items()}).last_hidden_state
        real = tokens["attention_mask"][:6, :, None]
        expected = model.head((hidden * real).sum(1) / real.sum(1))  # LoRA begins as nothing
        torch.testing.assert_close(model(inputs), expected, rtol=1e-4, atol=1e-5)


def test_build__trains_lora_and_the_head(data: tuple[Pair, Pair, int]) -> None:
    model = text.build(3, data[2])
    trained = {name: p.shape for name, p in model.named_parameters() if p.requires_grad}
    assert sum(shape.numel() for shape in trained.values()) == 2 * 2 * text.RANK * (384 + 384) + 385 * 10
    assert all("lora" in name or name.startswith("head.") for name in trained)
    again = text.build(3, data[2])
    assert all(torch.equal(p, q) for p, q in zip(model.parameters(), again.parameters(), strict=True))

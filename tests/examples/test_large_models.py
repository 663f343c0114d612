"""`examples.large_models` counts what fisherkit builds for a small model of the same shape."""

import pytest
import torch

import fisherkit as fk
from examples.large_models import block_layers, main, numbers, operations, owners, parts

transformers = pytest.importorskip("transformers")
pytestmark = pytest.mark.examples

HIDDEN, FEEDFORWARD, LAYERS, HEADS, KEYS = 16, 24, 2, 4, 2


@pytest.mark.parametrize("structure", ["diagonal", "kfac", "ekfac"])
def test_numbers_are_those_of_a_built_fisher(structure: str) -> None:
    torch.manual_seed(0)
    config = transformers.LlamaConfig(
        vocab_size=30, hidden_size=HIDDEN, intermediate_size=FEEDFORWARD, num_hidden_layers=LAYERS,
        num_attention_heads=HEADS, num_key_value_heads=KEYS,
    )  # fmt: skip
    model = transformers.LlamaForCausalLM(config).eval()
    tokens = torch.randint(30, (40, 12))
    body = [name for name, _ in model.named_parameters() if "proj" in name]
    fisher = fk.EmpiricalFisher(model, {"input_ids": tokens, "labels": tokens}, params=body, structure=structure)
    block = block_layers(HIDDEN, FEEDFORWARD, HEADS, KEYS)
    plan = fk.plan(
        model, {"input_ids": tokens, "labels": tokens}, "ef", params=body, structure=structure, memory_budget=10**9
    )
    assert fisher.size == LAYERS * numbers(block, "diagonal")
    assert plan.result_bytes == pytest.approx(4 * LAYERS * numbers(block, structure), rel=0.01)


def test_numbers_of_llama_by_hand() -> None:
    block = block_layers(4096, 14336, 32, 8)
    by_hand = 9 * 4096**2 + 3 * 14336**2 + 2 * 1024**2 + 0
    assert 32 * numbers(block, "kfac") == 32 * by_hand
    assert numbers(block, "kfac") - numbers(block, "kfac", shared=True) == 3 * 4096**2
    assert operations(block, "diagonal") == pytest.approx(1)


def test_loads_and_parts() -> None:
    assert sorted(owners([5, 4, 3, 3, 3], 2)) == [8, 10]
    assert parts([5, 4, 3, 3, 3], 9) == 2
    assert parts([5, 4], 4) == 2


def test_prints_a_table(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    monkeypatch.setattr("sys.argv", ["large_models"])
    main()
    printed = capsys.readouterr().out
    assert "24.63" in printed
    # What a part adds up while it is made is float32, whatever is kept of it: 98.5 GB of kfac do not fit in 66.
    assert "| kfac | bfloat16 | 24.63 | 49.3 | 2 |" in printed

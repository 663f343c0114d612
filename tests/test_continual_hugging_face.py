"""EWC under transformers' Trainer: once for each step, whatever is accumulated, and logs that say so."""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import accelerate
import pytest
import torch
import transformers
from torch import Tensor, nn

import fisherkit as fk
from fisherkit.continual import EWC
from fisherkit.continual.hf_trainer import EWCTrainerMixin
from fisherkit.errors import InvalidArgumentError, InvalidTypeError
from tests.optim_loops import flat
from tests.test_optim_trainer import bert, examples, llama

BATCH = 5


class EWCTrainer(EWCTrainerMixin, transformers.Trainer):
    pass


@pytest.fixture(autouse=True)
def fresh_accelerator() -> Iterator[None]:
    yield
    accelerate.state.AcceleratorState._reset_state(reset_partial_state=True)
    accelerate.state.GradientState._reset_state()


def still(make: Callable[[], Any]) -> Any:
    """In float64, without dropout: its masks would depend on the cuts into batches."""
    model = make().double()
    for module in model.modules():
        if isinstance(module, nn.Dropout):
            module.p = 0.0
    model.config._attn_implementation = "eager"
    return model


def consolidated(make: Callable[[], Any], data: list[dict[str, Any]], strength: float = 5.0) -> EWC:
    """Of a model that has moved a little since, so that the penalty is not 0."""
    model = still(make)
    batch = {
        "input_ids": torch.stack([one["input_ids"] for one in data[:BATCH]]),
        "attention_mask": torch.stack([one["attention_mask"] for one in data[:BATCH]]),
        "labels": torch.stack([torch.as_tensor(one["labels"]) for one in data[:BATCH]]),
    }
    ewc = EWC(model, strength)
    ewc.consolidate(fk.EmpiricalFisher(model, [batch], structure="diagonal"))
    with torch.no_grad():
        for i, p in enumerate(model.parameters()):
            p += 0.02 * torch.randn(p.shape, generator=torch.Generator().manual_seed(i)).to(p)
    return ewc


def arguments(folder: Path, batch: int, accumulate: int, **options: Any) -> Any:
    return transformers.TrainingArguments(
        output_dir=str(folder), per_device_train_batch_size=batch, gradient_accumulation_steps=accumulate,
        num_train_epochs=2, use_cpu=True, report_to=[], save_strategy="no", disable_tqdm=True,
        lr_scheduler_type="constant", **({"max_grad_norm": 0.0, "logging_strategy": "no"} | options),
    )  # fmt: skip


def sgd(model: nn.Module) -> Any:
    return torch.optim.SGD(model.parameters(), 0.1), None


def added_by_hand(ewc: EWC, data: list[dict[str, Any]], folder: Path, batch: int, accumulate: int) -> Tensor:
    """A plain Trainer whose optimizer gets the penalty's gradient right before its step."""
    optimizers = sgd(ewc.model)

    def add(*_: Any) -> None:
        ewc.penalty().backward()

    optimizers[0].register_step_pre_hook(torch.enable_grad()(add))
    transformers.Trainer(
        ewc.model, arguments(folder, batch, accumulate), train_dataset=data, optimizers=optimizers
    ).train()  # fmt: skip
    return flat(ewc.model)


@pytest.mark.parametrize(
    ("make", "batch", "accumulate"),
    [(bert, 4, 1), (bert, 4, 3), (llama, 2, 2), (bert, 1, 4)],
    ids=lambda value: getattr(value, "__name__", str(value)),
)
def test_trainer__the_penalty_counts_once_a_step(
    make: Callable[[], Any], batch: int, accumulate: int, tmp_path: Path
) -> None:
    """Ten examples: the last step of an epoch is a part of one."""
    data = examples(causal=make is llama)
    expected = added_by_hand(consolidated(make, data), data, tmp_path, batch, accumulate)
    ewc = consolidated(make, data)
    start = flat(ewc.model)
    trainer = EWCTrainer(
        ewc.model, arguments(tmp_path, batch, accumulate), train_dataset=data, optimizers=sgd(ewc.model), ewc=ewc
    )
    trainer.train()
    error = (flat(ewc.model) - expected).norm() / (expected - start).norm()
    assert float(error) < 1e-5


def test_trainer__the_gradient_is_clipped_with_the_penalty(tmp_path: Path) -> None:
    data = examples(causal=False)
    ewc = consolidated(bert, data, strength=1e4)
    start = flat(ewc.model)
    trainer = EWCTrainer(
        ewc.model, arguments(tmp_path, 10, 1, max_grad_norm=1e-3, max_steps=1), train_dataset=data,
        optimizers=sgd(ewc.model), ewc=ewc,
    )  # fmt: skip
    trainer.train()
    assert float((flat(ewc.model) - start).norm()) < 1.01e-4


def test_trainer__logs_the_penalty_beside_the_loss_that_contains_it(tmp_path: Path) -> None:
    data = examples(causal=True)
    ewc = consolidated(llama, data)
    frozen = copy.deepcopy(ewc.model)
    expected = ewc.penalty().item()
    options = {
        "logging_strategy": "steps",
        "logging_steps": 1,
        "eval_strategy": "steps",
        "eval_steps": 1,
        "max_steps": 1,
    }
    found = []
    for model, trainer in (
        (frozen, transformers.Trainer), (ewc.model, lambda *a, **k: EWCTrainer(*a, ewc=ewc, **k))
    ):  # fmt: skip
        run = trainer(
            model, arguments(tmp_path, 5, 2, **options), train_dataset=data, eval_dataset=data,
            optimizers=(torch.optim.SGD(model.parameters(), 0.0), None),
        )  # fmt: skip
        run.train()
        training = next(log for log in run.state.log_history if "loss" in log)
        evaluation = next(log for log in run.state.log_history if "eval_loss" in log)
        found.append((training["loss"], training.get("ewc_penalty"), evaluation["eval_loss"]))
    (plain, nothing, eval_plain), (loss, penalty, eval_loss) = found
    assert nothing is None
    assert penalty == pytest.approx(expected)
    assert loss == pytest.approx(plain + expected, rel=1e-5)
    assert eval_loss == pytest.approx(eval_plain)


def test_trainer__refuses_another_models_ewc(tmp_path: Path) -> None:
    with pytest.raises(InvalidArgumentError, match="an EWC of another model"):
        EWCTrainer(bert(), arguments(tmp_path, 2, 1), ewc=EWC(bert()))
    with pytest.raises(InvalidTypeError, match="a float as ewc"):
        EWCTrainer(bert(), arguments(tmp_path, 2, 1), ewc=0.1)  # type: ignore[arg-type]

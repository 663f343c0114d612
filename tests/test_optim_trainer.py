"""Optimizers and EWC under transformers' Trainer, Accelerate, and closures as in Lightning."""

import copy
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import accelerate
import pytest
import torch
import torch.nn.functional as F
import transformers
from torch import Tensor, nn
from torch.utils.data import DataLoader, TensorDataset

import fisherkit as fk
from fisherkit.continual import EWC
from fisherkit.continual.hf_trainer import EWCTrainerMixin
from fisherkit.errors import InvalidArgumentError, InvalidTypeError, ModelError
from tests.bad_input import X, Y, mlp
from tests.optim_cases import close
from tests.optim_loops import flat, natural

SIZES = {"vocab_size": 9, "num_hidden_layers": 1, "num_attention_heads": 2, "hidden_size": 4, "intermediate_size": 6}


@pytest.fixture(autouse=True)
def fresh_accelerator() -> Iterator[None]:
    """The library keeps its state in the process."""
    yield
    accelerate.state.AcceleratorState._reset_state(reset_partial_state=True)
    accelerate.state.GradientState._reset_state()


def bert() -> Any:
    torch.manual_seed(0)
    config = transformers.BertConfig(**SIZES, num_labels=3, max_position_embeddings=6)
    return transformers.BertForSequenceClassification(config)


def gpt2(dropout: float = 0.0) -> Any:
    torch.manual_seed(0)
    rates = {"resid_pdrop": dropout, "embd_pdrop": dropout, "attn_pdrop": dropout}
    return transformers.GPT2LMHeadModel(
        transformers.GPT2Config(vocab_size=9, n_positions=6, n_embd=4, n_layer=1, n_head=2, n_inner=6, **rates)
    )


def llama() -> Any:
    torch.manual_seed(0)
    return transformers.LlamaForCausalLM(
        transformers.LlamaConfig(**SIZES, num_key_value_heads=1, max_position_embeddings=6)
    )


def examples(causal: bool, number: int = 10) -> list[dict[str, Any]]:
    tokens = torch.randint(1, 9, (number, 5), generator=torch.Generator().manual_seed(1))
    return [
        {"input_ids": own, "attention_mask": torch.ones(5).long(), "labels": own if causal else int(own.sum()) % 3}
        for own in tokens
    ]


def run(
    model: Any, optimizer: Any, data: list[dict[str, Any]], folder: Path, batch: int = 2, accumulate: int = 2,
    **options: Any,
) -> Tensor:  # fmt: skip
    """Two epochs of the Trainer, with evaluation in between; the parameters at the end."""
    arguments = transformers.TrainingArguments(
        output_dir=str(folder), per_device_train_batch_size=batch, gradient_accumulation_steps=accumulate,
        num_train_epochs=2, max_grad_norm=0.0, use_cpu=True, report_to=[], save_strategy="no", disable_tqdm=True,
        logging_strategy="no", lr_scheduler_type="constant", **({"eval_strategy": "steps", "eval_steps": 1} | options),
    )  # fmt: skip
    trainer = transformers.Trainer(
        model, arguments, train_dataset=data, eval_dataset=data[:3], optimizers=(optimizer, None)
    )
    trainer.train()
    return flat(model)


GRAM, KFAC = {"kind": "ief", "gram_damping": 1e-2}, {"kind": "ief", "damping": 1e-1, "structure": "kfac"}


@pytest.mark.parametrize(("make", "setting"), [(bert, GRAM), (gpt2, GRAM), (gpt2, KFAC), (llama, KFAC)])
def test_trainer__trains_with_accumulation_evaluation_and_dropout(
    make: Callable[[], Any], setting: dict[str, Any], tmp_path: Path
) -> None:
    model, data = make(), examples(causal=make is not bert)
    before = flat(model)
    after = run(model, fk.optim.NaturalGradient(model, 1e-2, **setting), data, tmp_path)
    assert bool(torch.isfinite(after).all())
    assert not torch.equal(before, after)


@pytest.mark.parametrize("make", [bert, llama])
def test_trainer__accumulation_does_not_change_the_steps(make: Callable[[], Any], tmp_path: Path) -> None:
    """Ten examples in batches of four: the last is partial. No dropout, whose masks depend on the cuts."""
    found = []
    for batch, accumulate in ((4, 1), (2, 2)):
        model, data = make().double(), examples(causal=make is llama)
        for module in model.modules():
            if isinstance(module, nn.Dropout):
                module.p = 0.0
        model.config._attn_implementation = "eager"
        found.append(run(model, natural(model, 1e-2), data, tmp_path, batch, accumulate))
    close(found[1], found[0], 1e-4)


def test_trainer__a_tied_head_beside_dropout_trains(tmp_path: Path) -> None:
    model = gpt2(dropout=0.1)
    before = flat(model)
    after = run(model, natural(model), examples(causal=True), tmp_path)
    assert bool(torch.isfinite(after).all())
    assert not torch.equal(before, after)


def test_trainer__label_smoothing_is_refused(tmp_path: Path) -> None:
    model = bert()
    with pytest.raises(ModelError, match="without label smoothing"):
        run(model, natural(model), examples(causal=False), tmp_path, label_smoothing_factor=0.1)


def test_trainer__resumes_from_its_checkpoint(tmp_path: Path) -> None:
    data, found = examples(causal=False), []
    for resume in (False, True):
        model = bert()
        optimizer = natural(model, 1e-2, momentum=0.9)
        arguments = transformers.TrainingArguments(
            output_dir=str(tmp_path), per_device_train_batch_size=2, max_steps=6, use_cpu=True, report_to=[],
            disable_tqdm=True, logging_strategy="no", save_strategy="steps", save_steps=4, max_grad_norm=0.0,
        )  # fmt: skip
        trainer = transformers.Trainer(model, arguments, train_dataset=data, optimizers=(optimizer, None))
        trainer.train(resume_from_checkpoint=str(tmp_path / "checkpoint-4") if resume else None)
        found.append(flat(model))
    assert torch.equal(found[0], found[1])


@pytest.mark.parametrize("precision", ["no", "bf16"])
def test_accelerate__loops_with_accumulation(precision: str) -> None:
    """`prepare` puts the optimizer's state through load_state_dict and wraps the model's forward."""
    model = mlp().float()
    optimizer: Any = natural(model, 0.1)
    start = flat(model)
    accelerator = accelerate.Accelerator(cpu=True, gradient_accumulation_steps=2, mixed_precision=precision)
    loader: Any = DataLoader(TensorDataset(X.float(), Y), batch_size=3)
    prepared, optimizer, loader = accelerator.prepare(model, optimizer, loader)
    for x, y in loader:
        with accelerator.accumulate(prepared):
            accelerator.backward(F.cross_entropy(prepared(x), y))
            optimizer.step()
            optimizer.zero_grad()
    twin = mlp().float()
    plain = natural(twin, 0.1)
    F.cross_entropy(twin(X.float()), Y).backward()
    plain.step()
    close(flat(model) - start, flat(twin) - start, 1e-4 if precision == "no" else 0.05)


def test_lightning__style_closures_with_hooks_between() -> None:
    """The optimizer is handed a closure that does forward, zero_grad and backward; validation runs in between."""
    model = mlp(nn.Dropout(0.0)).train()
    optimizer = natural(model, 0.1)

    def training_step() -> Tensor:
        return F.cross_entropy(model(X), Y)

    def closure() -> Tensor:
        loss = training_step()
        optimizer.zero_grad()
        loss.backward()
        return loss

    scheduler = torch.optim.lr_scheduler.ExponentialLR(optimizer, 0.9)
    losses = []
    for _ in range(3):
        with torch.no_grad():
            model.eval()
            losses.append(training_step().item())
            model.train()
        optimizer.step(closure=closure)
        scheduler.step()
    twin = mlp(nn.Dropout(0.0)).train()
    plain = natural(twin, 0.1)
    for step in range(3):
        plain.param_groups[0]["lr"] = 0.1 * 0.9**step
        plain.zero_grad()
        F.cross_entropy(twin(X), Y).backward()
        plain.step()
    close(flat(model), flat(twin))
    assert losses == sorted(losses, reverse=True)


# -- eWC under transformers' Trainer -----------------------------------------------------------------------------------


BATCH = 5


class EWCTrainer(EWCTrainerMixin, transformers.Trainer):
    pass


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
    for model, trainer in ((frozen, transformers.Trainer), (ewc.model, lambda *a, **k: EWCTrainer(*a, ewc=ewc, **k))):
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

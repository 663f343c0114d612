"""EWC in Lightning, against loops written out: accumulation, clipping, precision, manual optimization, checkpoints."""

import copy
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.data import DataLoader, TensorDataset

import fisherkit as fk
from fisherkit.continual import EWC
from fisherkit.errors import InvalidTypeError
from tests.test_continual import flat, mlp, move, task

lightning = pytest.importorskip("lightning", reason="Lightning is not installed")

from fisherkit.continual.lightning import EWCCallback  # noqa: E402

X, Y = task(1, torch.float32, number=16)


class Classifier(lightning.LightningModule):  # type: ignore[misc, name-defined]
    def __init__(self, net: nn.Module, by_hand: bool = False) -> None:
        super().__init__()
        self.net, self.automatic_optimization, self.losses = net, not by_hand, []

    def training_step(self, batch: Any, index: int) -> Any:
        loss = F.cross_entropy(self.net(batch[0]), batch[1])
        self.losses.append(loss.detach())
        if self.automatic_optimization:
            return loss
        optimizers = self.optimizers()
        for optimizer in optimizers:
            optimizer.zero_grad()
        self.manual_backward(loss)
        for optimizer in optimizers:
            optimizer.step()
        return None

    def configure_optimizers(self) -> Any:
        if self.automatic_optimization:
            return torch.optim.SGD(self.net.parameters(), 0.1)
        return [torch.optim.SGD(self.net[i].parameters(), 0.1) for i in (0, 2)]


def consolidated(strength: float = 3.0) -> EWC:
    model = mlp().float()
    ewc = EWC(model, strength)
    ewc.consolidate(fk.EmpiricalFisher(model, task(0, torch.float32), structure="kfac"))
    move(model, 1)
    return ewc


def fit(module: Any, ewc: EWC | None, folder: Path, batch: int = 4, **options: Any) -> Any:
    trainer = lightning.Trainer(
        max_epochs=2, accelerator="cpu", logger=False, enable_checkpointing=False, enable_progress_bar=False,
        enable_model_summary=False, default_root_dir=folder, callbacks=[] if ewc is None else [EWCCallback(ewc)],
        **options,
    )  # fmt: skip
    trainer.fit(module, DataLoader(TensorDataset(X, Y), batch))
    return trainer


def written_out(ewc: EWC, batch: int, accumulate: int, clip: float | None = None) -> Tensor:
    """The same two epochs in a plain loop."""
    model = ewc.model
    optimizer = torch.optim.SGD(model.parameters(), 0.1)
    for _ in range(2):
        pairs = list(zip(X.split(batch), Y.split(batch), strict=True))
        for start in range(0, len(pairs), accumulate):
            optimizer.zero_grad()
            for x, y in pairs[start : start + accumulate]:
                (F.cross_entropy(model(x), y) / accumulate).backward()
            ewc.penalty().backward()
            if clip is not None:
                nn.utils.clip_grad_norm_(model.parameters(), clip)
            optimizer.step()
    return flat(model)


@pytest.mark.parametrize(("batch", "accumulate", "clip"), [(4, 1, None), (4, 2, None), (2, 4, 0.1), (16, 1, 0.01)])
def test_fit__adds_the_gradient_once_a_step_and_before_clipping(
    batch: int, accumulate: int, clip: float | None, tmp_path: Path
) -> None:
    expected = written_out(consolidated(), batch, accumulate, clip)
    ewc = consolidated()
    options: dict[str, Any] = {} if clip is None else {"gradient_clip_val": clip}
    fit(Classifier(ewc.model), ewc, tmp_path, batch, accumulate_grad_batches=accumulate, **options)
    torch.testing.assert_close(flat(ewc.model), expected, rtol=1e-5, atol=1e-6)


def test_fit__logs_the_penalty_and_leaves_the_loss_alone(tmp_path: Path) -> None:
    ewc = consolidated()
    expected, module = ewc.penalty().item(), Classifier(ewc.model)
    first = F.cross_entropy(ewc.model(X), Y).item()
    trainer = fit(module, ewc, tmp_path, 16, max_steps=1)
    assert float(trainer.callback_metrics["ewc_penalty"]) == pytest.approx(expected)
    assert float(module.losses[0]) == pytest.approx(first)


def test_fit__in_bfloat16_takes_the_whole_gradient(tmp_path: Path) -> None:
    """The penalty itself is not rounded to half precision."""
    ewc = consolidated(strength=1e6)
    before = flat(ewc.model)
    ewc.penalty().backward()
    expected = before - 1e-7 * torch.cat([p.grad.reshape(-1) for p in ewc.model.parameters()])  # type: ignore[union-attr]
    ewc.model.zero_grad()
    module = Classifier(ewc.model)
    module.configure_optimizers = lambda: torch.optim.SGD(ewc.model.parameters(), 1e-7)
    fit(module, ewc, tmp_path, 16, max_steps=1, precision="bf16-mixed")
    torch.testing.assert_close(flat(ewc.model), expected, rtol=1e-6, atol=1e-6)


def test_fit__with_two_optimizers_by_hand_gives_each_its_own_part(tmp_path: Path) -> None:
    """The second steps after the first has moved: its part of the penalty is taken there."""
    expected = consolidated()
    optimizers = Classifier(expected.model, by_hand=True).configure_optimizers()
    for _ in range(2):
        for x, y in zip(X.split(4), Y.split(4), strict=True):
            expected.model.zero_grad()
            F.cross_entropy(expected.model(x), y).backward()
            for optimizer in optimizers:
                own = optimizer.param_groups[0]["params"]
                for p, gradient in zip(own, torch.autograd.grad(expected.penalty(), own), strict=True):
                    p.grad += gradient
                optimizer.step()
    ewc = consolidated()
    fit(Classifier(ewc.model, by_hand=True), ewc, tmp_path)
    torch.testing.assert_close(flat(ewc.model), flat(expected.model), rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("terms", [False, True], ids=["before the first consolidation", "all its terms frozen"])
def test_fit__with_a_penalty_that_has_no_gradient_only_logs_it(terms: bool, tmp_path: Path) -> None:
    ewc = EWC(mlp().float(), 3.0)
    if terms:
        fisher = fk.EmpiricalFisher(ewc.model, task(0, torch.float32), structure="kfac", params=["0.weight", "0.bias"])
        ewc.consolidate(fisher, uncovered="free")
    move(ewc.model, 1)
    ewc.model[0].requires_grad_(False)  # type: ignore[operator]
    plain = copy.deepcopy(ewc.model)
    fit(Classifier(plain), None, tmp_path)
    trainer = fit(Classifier(ewc.model), ewc, tmp_path)
    assert torch.equal(flat(ewc.model), flat(plain))
    assert float(trainer.callback_metrics["ewc_penalty"]) == pytest.approx(ewc.penalty().item())


def test_fit__with_an_optimizer_whose_parameters_are_frozen(tmp_path: Path) -> None:
    ewc = consolidated()
    ewc.model[0].requires_grad_(False)  # type: ignore[operator]
    before = flat(ewc.model)
    fit(Classifier(ewc.model, by_hand=True), ewc, tmp_path)
    kept = sum(p.numel() for p in ewc.model[0].parameters())  # type: ignore[union-attr]
    assert torch.equal(flat(ewc.model)[:kept], before[:kept])
    assert not torch.equal(flat(ewc.model), before)


def test_checkpoint__has_the_terms(tmp_path: Path) -> None:
    ewc = consolidated()
    trainer = fit(Classifier(ewc.model), ewc, tmp_path)
    trainer.save_checkpoint(tmp_path / "c.ckpt")
    fresh = EWC(copy.deepcopy(ewc.model), 3.0)
    again = lightning.Trainer(
        max_epochs=2, accelerator="cpu", logger=False, enable_checkpointing=False, enable_progress_bar=False,
        enable_model_summary=False, callbacks=[EWCCallback(fresh)],
    )  # fmt: skip
    again.fit(
        Classifier(fresh.model), DataLoader(TensorDataset(X, Y), 4), ckpt_path=tmp_path / "c.ckpt", weights_only=True
    )
    assert torch.equal(fresh.penalty(), ewc.penalty())


def test_callback__refuses_what_is_no_ewc() -> None:
    with pytest.raises(InvalidTypeError, match="EWCCallback: got a float"):
        EWCCallback(0.1)  # type: ignore[arg-type]

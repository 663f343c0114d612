"""EWC in Avalanche, against a loop written out."""

from importlib.util import find_spec
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.data import DataLoader

import fisherkit as fk
from fisherkit.continual import EWC
from fisherkit.errors import InvalidTypeError
from tests.test_continual import flat, mlp, task

if find_spec("avalanche") is None:
    pytest.skip("Avalanche is not installed", allow_module_level=True)
try:
    import torchvision  # noqa: F401
except RuntimeError:
    # Beside a torch build of another kind it fails for two operators, which Avalanche's strategies do not use.
    OPERATORS = torch.library.Library("torchvision", "FRAGMENT")
    for operator in ("nms", "qnms"):
        OPERATORS.define(f"{operator}(Tensor dets, Tensor scores, float iou_threshold) -> Tensor")

training = pytest.importorskip("avalanche.training")
plugins = pytest.importorskip("avalanche.training.plugins")
benchmarks = pytest.importorskip("avalanche.benchmarks")

from fisherkit.continual.avalanche import EWCPlugin  # noqa: E402

pytestmark = pytest.mark.filterwarnings("ignore:No loggers specified:UserWarning")
TASKS = [task(seed, torch.float32, number=16) for seed in range(3)]


def pairs(batch: Any) -> tuple[Tensor, Tensor]:
    """A batch without its third part, the task labels."""
    x, y, *_ = zip(*batch, strict=True)
    return torch.stack(x), torch.as_tensor(y)


def fisher(strategy: Any) -> fk.FisherOperator:
    data = DataLoader(strategy.experience.dataset, 8, collate_fn=pairs)
    return fk.EmpiricalFisher(strategy.model.eval(), data, structure="kfac")


def strategy(model: nn.Module, *added: Any) -> Any:
    return training.Naive(
        model=model, optimizer=torch.optim.SGD(model.parameters(), 0.1), criterion=nn.CrossEntropyLoss(),
        train_mb_size=8, train_epochs=2, plugins=list(added), evaluator=plugins.EvaluationPlugin(),
    )  # fmt: skip


def stream(tasks: list[tuple[Tensor, Tensor]]) -> Any:
    return benchmarks.tensors_benchmark(
        train_tensors=tasks, test_tensors=tasks[:1], task_labels=[0] * len(tasks), complete_test_set_only=True
    ).train_stream


def test_strategy__trains_like_a_loop_with_the_penalty() -> None:
    model = mlp().float()
    ewc = EWC(model, 3.0, decay=0.5)
    by_hand = EWC(mlp().float(), 3.0, decay=0.5)
    optimizer = torch.optim.SGD(by_hand.model.parameters(), 0.1)
    run = strategy(model, EWCPlugin(ewc, fisher))
    for experience, (x, y) in zip(stream(TASKS), TASKS, strict=True):
        run.train(experience, shuffle=False)
        for _ in range(2):
            for batch in zip(x.split(8), y.split(8), strict=True):
                optimizer.zero_grad()
                (F.cross_entropy(by_hand.model(batch[0]), batch[1]) + by_hand.penalty()).backward()
                optimizer.step()
        by_hand.consolidate(fk.EmpiricalFisher(by_hand.model, (x, y), structure="kfac"))
        torch.testing.assert_close(flat(model), flat(by_hand.model), rtol=1e-5, atol=1e-6)
    assert ewc.consolidations == 3
    torch.testing.assert_close(ewc.penalty(), by_hand.penalty())
    assert ewc.penalty().item() > 0


def test_strategy__with_a_classifier_that_grows() -> None:
    """Avalanche's incremental classifier gets a row for each new class; the old rows are held."""
    models = pytest.importorskip("avalanche.models")
    tasks = [(TASKS[t][0], torch.arange(16) % 2 + 2 * t) for t in range(2)]
    moved = {}
    for strength in (0.0, 0.3):
        torch.manual_seed(0)
        model = nn.Sequential(nn.Linear(4, 5), nn.Tanh(), models.IncrementalClassifier(5, 2, masking=False))
        ewc = EWC(model, strength, grown="leading")
        run, (first, second) = strategy(model, EWCPlugin(ewc, fisher)), stream(tasks)
        run.train(first, shuffle=False)
        old = model[2].classifier.weight.detach().clone()
        run.train(second, shuffle=False)
        new = model[2].classifier.weight.detach()
        assert (tuple(old.shape), tuple(new.shape)) == ((2, 5), (4, 5))
        assert ewc.consolidations == 2
        moved[strength] = float((new[:2] - old).norm())
    assert moved[0.3] < moved[0.0]


def test_plugin__refuses_what_it_cannot_use() -> None:
    with pytest.raises(InvalidTypeError, match="EWCPlugin: got a float as ewc"):
        EWCPlugin(0.1, fisher)  # type: ignore[arg-type]
    with pytest.raises(InvalidTypeError, match=r"as fisher.*a Fisher of its own"):
        EWCPlugin(EWC(mlp()), None)  # type: ignore[arg-type]

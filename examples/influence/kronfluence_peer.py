"""Scores by kronfluence. Knows its interface, no other library and no Fisher of this package."""

from __future__ import annotations

import copy
import importlib
import logging
import tempfile
from collections.abc import Callable, Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.data import TensorDataset

from examples.influence.scorer import Scorer
from examples.influence.settings import Pair


def kronfluence(
    strategy: str,
    model: nn.Module,
    train: Pair,
    *,
    own: bool,
    empirical: bool = False,
    modules: Sequence[str] | None = None,
    batch: int | None = None,
) -> Scorer:
    """kronfluence's KFAC or EKFAC, from one sampled label an example.

    Args:
        strategy: "kfac" or "ekfac".
        model: a trained one.
        train: its data.
        own: the library's own choice of damping.
        empirical: observed labels instead of sampled ones.
        modules: layers that are tracked; None for all that the library knows and that are trained.
        batch: training examples in a batch; None for all. Queries are one batch.
    """
    asking = importlib.import_module("kronfluence.arguments")
    batch = batch or len(train[1])
    analyzer = prepared(copy.deepcopy(model), _layers(model) if modules is None else modules, train[1].device.type)
    fit(analyzer.fit_all_factors, train, strategy=strategy, empirical=empirical, batch=batch)

    def scores(queries: Pair, damping: float | None) -> Tensor:
        if own == (damping is not None):
            raise ValueError("a damping where the library does not choose, and only there")
        factor = None if damping is None else damping * _mean_eigenvalue(analyzer, strategy)
        analyzer.compute_pairwise_scores(
            "scores",
            "factors",
            query_dataset=TensorDataset(*queries),
            train_dataset=TensorDataset(*train),
            per_device_query_batch_size=len(queries[1]),
            per_device_train_batch_size=batch,
            score_args=asking.ScoreArguments(damping_factor=factor),
            overwrite_output_dir=True,
        )
        return analyzer.load_pairwise_scores("scores")["all_modules"] / len(train[1])

    return scores


def prepared(model: nn.Module, layers: Sequence[str], device: str) -> Any:
    """An analyzer of a model, which is wrapped in place; its results lie in a folder that lives as long."""
    # By name: a library that need not be there has no types to check.
    analyzing = importlib.import_module("kronfluence.analyzer")
    folder, task = tempfile.TemporaryDirectory(), _task(list(layers))
    # What is not tracked no longer requires grad.
    wrapped = analyzing.prepare_model(model.eval(), task)
    logging.getLogger("kronfluence").setLevel(logging.ERROR)
    analyzer = analyzing.Analyzer(
        "influence", wrapped, task, cpu=device == "cpu", disable_tqdm=True, log_level=logging.ERROR,
        output_dir=folder.name,
    )  # fmt: skip
    analyzer.folder = folder
    return analyzer


def fit(method: Callable[..., Any], train: Pair, *, strategy: str, empirical: bool, batch: int) -> None:
    """Call one of an analyzer's methods that fit factors; labels are drawn by a fixed seed.

    Args:
        method: of the analyzer.
        train: the data.
        strategy: "diagonal", "kfac" or "ekfac".
        empirical: observed labels instead of drawn ones.
        batch: examples in a batch.
    """
    asking = importlib.import_module("kronfluence.arguments")
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        method(
            "factors", dataset=TensorDataset(*train), per_device_batch_size=batch, overwrite_output_dir=True,
            factor_args=asking.FactorArguments(strategy=strategy, use_empirical_fisher=empirical),
        )  # fmt: skip


def _mean_eigenvalue(analyzer: Any, strategy: str) -> float:
    """Over all layers, of what the library inverts."""
    if strategy == "ekfac":
        found = analyzer.load_lambda_matrices("factors")
        values = [m.double() / found["num_lambda_processed"][name] for name, m in found["lambda_matrix"].items()]
    else:
        found = analyzer.load_eigendecomposition("factors")
        left, right = found["activation_eigenvalues"], found["gradient_eigenvalues"]
        values = [torch.outer(right[name].double(), left[name].double()) for name in left]
    return float(torch.cat([v.flatten() for v in values]).mean())


def _layers(model: nn.Module) -> list[str]:
    """Layers that the library knows and that are trained."""
    known = (nn.Linear, nn.Conv2d)
    return [name for name, m in model.named_modules() if isinstance(m, known) and m.weight.requires_grad]


def _task(layers: list[str]) -> Any:
    base: Any = importlib.import_module("kronfluence.task").Task

    class Classification(base):  # type: ignore[misc]
        def compute_train_loss(self, batch: Any, model: nn.Module, sample: bool = False) -> Tensor:
            inputs, labels = batch
            outputs = model(inputs)
            if sample:
                with torch.no_grad():
                    labels = torch.distributions.Categorical(logits=outputs).sample()
            return F.cross_entropy(outputs.flatten(0, -2), labels.flatten(), reduction="sum")

        def compute_measurement(self, batch: Any, model: nn.Module) -> Tensor:
            return F.cross_entropy(model(batch[0]), batch[1], reduction="sum")

        def get_influence_tracked_modules(self) -> list[str]:
            return layers

    return Classification()

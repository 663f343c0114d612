"""Scores by other libraries, where they are installed. Knows their interfaces and no Fisher of this package.

Each is run as its documentation says, in batches as large as memory allows, with the same meaning of damping:
multiples of the mean eigenvalue over all layers.
"""

from __future__ import annotations

import copy
import importlib
import importlib.util
import logging
import tempfile
from collections.abc import Callable, Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.data import TensorDataset

from examples.influence.settings import Pair

PEERS = ("kronfluence",)
"""Libraries that are compared where they are installed."""

Scorer = Callable[[Pair, float | None], Tensor]


def missing() -> list[str]:
    """Those that are not."""
    return [name for name in PEERS if importlib.util.find_spec(name) is None]


def peers() -> Mapping[str, Callable[[nn.Module, Pair], Scorer]]:
    """Methods by name; those of a library that is not installed are left out."""
    if missing():
        return {}
    return {
        "kronfluence KFAC": partial(kronfluence, "kfac", own=False),
        "kronfluence EKFAC": partial(kronfluence, "ekfac", own=False),
        "kronfluence KFAC, its own damping": partial(kronfluence, "kfac", own=True),
        "kronfluence EKFAC, its own damping": partial(kronfluence, "ekfac", own=True),
    }


UNDAMPED = ("kronfluence KFAC, its own damping", "kronfluence EKFAC, its own damping")
"""Where the library chooses: 0.1 × the mean eigenvalue of each layer."""


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
        modules: layers that are tracked; None for all that the library knows.
        batch: training examples in a batch; None for all. Queries are one batch.
    """
    # By name: a library that need not be there has no types to check.
    analyzing = importlib.import_module("kronfluence.analyzer")
    asking = importlib.import_module("kronfluence.arguments")
    folder = tempfile.TemporaryDirectory()
    task, batch = _task(modules), batch or len(train[1])
    # Prepared models are wrapped in place.
    prepared = analyzing.prepare_model(copy.deepcopy(model).eval(), task)
    logging.getLogger("kronfluence").setLevel(logging.ERROR)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        analyzer = analyzing.Analyzer(
            "influence",
            prepared,
            task,
            cpu=train[1].device.type == "cpu",
            disable_tqdm=True,
            log_level=logging.ERROR,
            output_dir=folder.name,
        )
        analyzer.fit_all_factors(
            "factors",
            dataset=TensorDataset(*train),
            per_device_batch_size=batch,
            factor_args=asking.FactorArguments(strategy=strategy, use_empirical_fisher=empirical),
            overwrite_output_dir=True,
        )

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

    # The factors lie in the folder: it lives as long as the scorer.
    scores.folder = Path(folder.name), folder  # type: ignore[attr-defined]
    return scores


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


def _task(modules: Sequence[str] | None) -> Any:
    base: Any = importlib.import_module("kronfluence.task").Task

    class Classification(base):  # type: ignore[misc]
        def compute_train_loss(self, batch: Any, model: nn.Module, sample: bool = False) -> Tensor:
            inputs, labels = batch
            outputs = model(inputs)
            if sample:
                with torch.no_grad():
                    labels = torch.distributions.Categorical(logits=outputs).sample()
            return F.cross_entropy(outputs, labels, reduction="sum")

        def compute_measurement(self, batch: Any, model: nn.Module) -> Tensor:
            return F.cross_entropy(model(batch[0]), batch[1], reduction="sum")

        def get_influence_tracked_modules(self) -> list[str] | None:
            return None if modules is None else list(modules)

    return Classification()

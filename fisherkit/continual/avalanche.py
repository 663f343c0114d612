"""EWC in Avalanche: a plugin that adds the penalty to a strategy's loss and consolidates after each experience.

Owns the two hooks. Imports Avalanche.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from fisherkit.continual.ewc import EWC, check_ewc
from fisherkit.errors import InvalidTypeError, MissingPackageError
from fisherkit.operators import FisherOperator

try:
    from avalanche.training.plugins import SupervisedPlugin
except ImportError as error:
    raise MissingPackageError.of(__name__, "avalanche-lib", "avalanche", error) from error


class EWCPlugin(SupervisedPlugin):  # type: ignore[misc]  # Any where Avalanche is not installed
    """``ewc.penalty()`` in the loss of each batch, ``ewc.consolidate(...)`` after each experience.

        def fisher(strategy):
            data = DataLoader(strategy.experience.dataset, 32, collate_fn=lambda batch: ...)  # pairs (x, y)
            return fk.ImprovedEmpiricalFisher(strategy.model.eval(), data, structure="kfac", power=0.75)

        strategy = Naive(model=model, ..., plugins=[EWCPlugin(ewc, fisher)])

    Args:
        ewc: of the strategy's model; ``grown="leading"`` for models that add outputs with each experience.
        fisher: makes the Fisher of the experience just learned. Avalanche's batches have a third part, the task labels.
        consolidate: further keywords of `EWC.consolidate`, such as ``uncovered="free"`` for multi-head models.

    Raises:
        InvalidTypeError: no EWC, or a ``fisher`` that cannot be called.
    """

    def __init__(self, ewc: EWC, fisher: Callable[[Any], FisherOperator], **consolidate: Any) -> None:
        super().__init__()
        if not callable(fisher):
            raise InvalidTypeError(
                "EWCPlugin", f"a {type(fisher).__name__} as fisher", "a function of the strategy",
                why="each experience needs a Fisher of its own",
            )  # fmt: skip
        self.ewc, self._fisher, self._consolidate = check_ewc(ewc, "EWCPlugin"), fisher, consolidate

    def before_backward(self, strategy: Any, *args: Any, **kwargs: Any) -> None:
        """Add the penalty to the batch's loss."""
        strategy.loss = strategy.loss + self.ewc.penalty()

    def after_training_exp(self, strategy: Any, *args: Any, **kwargs: Any) -> None:
        """Consolidate the experience."""
        self.ewc.consolidate(self._fisher(strategy), **self._consolidate)

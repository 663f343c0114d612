"""EWC in Lightning: a callback that adds the penalty's gradient to each optimizer step.

Owns the hook. Imports Lightning: ``lightning``, or else ``pytorch_lightning``.
"""

from __future__ import annotations

from typing import Any

import torch

from fisherkit.continual.ewc import EWC, check_ewc
from fisherkit.errors import MissingPackageError

try:
    from lightning.pytorch import Callback
except ImportError:
    try:
        from pytorch_lightning import Callback
    except ImportError as error:
        raise MissingPackageError.of(__name__, "lightning", "lightning", error) from error


class EWCCallback(Callback):  # type: ignore[misc]  # Any where Lightning is not installed
    """The gradient of ``ewc.penalty()``, added once for each optimizer step.

        trainer = lightning.Trainer(callbacks=[EWCCallback(ewc)])

    It is added after all batches of the step are accumulated and gradients are unscaled, and before they are clipped;
    so the loss that you log stays that of the data, and the penalty is logged as ``ewc_penalty``. In manual
    optimization too. With several optimizers each gets the part of its own parameters. Consolidating is yours, after
    ``fit``. The terms are part of the trainer's checkpoints.

    Args:
        ewc: of the module, or of a part of it, that is trained; its terms are moved to that model's device.

    Raises:
        InvalidTypeError: no EWC.
    """

    def __init__(self, ewc: EWC) -> None:
        self.ewc = check_ewc(ewc, "EWCCallback")

    def on_fit_start(self, trainer: Any, pl_module: Any) -> None:
        """Terms go where the model is."""
        self.ewc.to(next(self.ewc.model.parameters()).device)

    def on_before_optimizer_step(self, trainer: Any, pl_module: Any, optimizer: Any) -> None:
        """Add the gradient to what the optimizer is about to use."""
        own = [p for group in optimizer.param_groups for p in group["params"] if p.requires_grad]
        with torch.enable_grad():
            penalty = self.ewc.penalty()
        if own and penalty.requires_grad:  # not where nothing is consolidated yet, or all of it is frozen
            gradients = torch.autograd.grad(penalty, own, allow_unused=True)
            for parameter, gradient in zip(own, gradients, strict=True):
                if gradient is not None:
                    parameter.grad = gradient if parameter.grad is None else parameter.grad + gradient
        pl_module.log("ewc_penalty", penalty.detach())

    def state_dict(self) -> dict[str, Any]:
        """The terms, for the trainer's checkpoints."""
        return dict(self.ewc.state_dict())

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """The terms from a checkpoint."""
        self.ewc.load_state_dict(state_dict)

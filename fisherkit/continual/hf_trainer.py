"""EWC in Hugging Face's ``Trainer``: a mix-in that adds the penalty to the training loss.

Owns the place and the share of the penalty in an accumulated step. Imports nothing of transformers.
"""

from __future__ import annotations

from typing import Any

from torch import Tensor

from fisherkit.continual.ewc import EWC, check_ewc
from fisherkit.errors import InvalidArgumentError
from fisherkit.wrappers import unwrapped

CALL = "EWCTrainerMixin"


class EWCTrainerMixin:
    """Put before ``transformers.Trainer`` or a subclass: its training loss gets ``ewc.penalty()``.

        class EWCTrainer(EWCTrainerMixin, transformers.Trainer): ...

        trainer = EWCTrainer(model, args, train_dataset=second_task, ewc=ewc)

    The penalty counts once for each optimizer step, however many batches are accumulated and however the loss is
    averaged over them. The logged ``loss`` contains it, and ``ewc_penalty`` beside it is the part that it is; the loss
    in evaluation does not. Consolidating is yours, after ``train()``; so is saving ``ewc.state_dict()``, which training
    does not change.

    Args:
        ewc: of the very model that is trained; its terms are moved to the model's device.
        *args: the Trainer's.
        **kwargs: the Trainer's.

    Raises:
        InvalidTypeError: no EWC.
        InvalidArgumentError: it is of another model.
    """

    def __init__(self, *args: Any, ewc: EWC, **kwargs: Any) -> None:
        check_ewc(ewc, CALL)
        super().__init__(*args, **kwargs)
        trained: Any = getattr(self, "model")  # noqa: B009 - the Trainer's attribute
        if ewc.model is not unwrapped(trained):
            raise InvalidArgumentError(
                CALL, "an EWC of another model", "the model that is trained", why="the penalty would stay constant",
                try_="Trainer(model, ..., ewc=EWC(model, ...))",
            )  # fmt: skip
        self.ewc = ewc.to(next(trained.parameters()).device)
        self._penalties: list[Tensor] = []

    def compute_loss(
        self, model: Any, inputs: Any, return_outputs: bool = False, num_items_in_batch: Any = None
    ) -> Any:
        """The Trainer's loss, and in training the penalty's share of this batch."""
        trainer: Any = super()
        result = trainer.compute_loss(
            model, inputs, return_outputs=return_outputs, num_items_in_batch=num_items_in_batch
        )
        if not model.training:
            return result
        penalty = self.ewc.penalty()
        self._penalties.append(penalty.detach())
        loss, *outputs = result if return_outputs else (result,)
        # A Trainer that divides by the number of a step's batches afterwards has the penalty in each.
        scaled = getattr(self, "loss_is_scaled_for_ga", None)
        if scaled is None:
            by_items = getattr(self, "model_accepts_loss_kwargs", False) and num_items_in_batch is not None
            scaled = by_items or getattr(self, "compute_loss_func", None) is not None
        summed = int(getattr(self, "current_gradient_accumulation_steps", 1)) if scaled else 1
        return (loss + penalty / summed, *outputs) if return_outputs else loss + penalty / summed

    def log(self, logs: dict[str, float], *args: Any, **kwargs: Any) -> None:
        """The Trainer's log of training, with the mean penalty since the last one."""
        if "loss" in logs and self._penalties:
            logs["ewc_penalty"] = float(sum(self._penalties) / len(self._penalties))
            self._penalties.clear()
        trainer: Any = super()
        trainer.log(logs, *args, **kwargs)

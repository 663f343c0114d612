"""`Preconditioner`: gradients seen through a Fisher, for any torch optimizer to follow."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch import Tensor, nn

from fisherkit.arguments import check_number
from fisherkit.arithmetic import without_autocast
from fisherkit.errors import InvalidArgumentError
from fisherkit.likelihoods import Likelihood
from fisherkit.operators import Damping
from fisherkit.optim.averages import LayerDamping
from fisherkit.optim.curvature import Curvature, Watching
from fisherkit.optim.sample_space import with_layer_rms
from fisherkit.optim.settings import StepSettings, check_trust_region, whole_model
from fisherkit.outputs import OutputRule
from fisherkit.processes import Group, in_all
from fisherkit.space import Selection
from fisherkit.structures import structure_named
from fisherkit.wrappers import local, shard_like

CALL = "Preconditioner"

EMA = 0.95
USUAL: dict[str, Any] = {
    "damping": LayerDamping(0.3), "gradient_momentum": 0.9, "layer_rms": 0.2, "update_every": 5, "refresh_every": 2,
}  # fmt: skip
"""Of layers' structures where no damping is passed."""
PLAIN: dict[str, Any] = {"gradient_momentum": 0.0, "layer_rms": None, "update_every": 1, "refresh_every": 1}
"""Of all others."""


class Preconditioner(Watching):
    """Replaces each gradient by (F + λI)⁻¹ ∇L, between ``loss.backward()`` and the step of any optimizer.

        preconditioner = fk.optim.Preconditioner(model, kind="ief", structure="ekfac")
        optimizer = torch.optim.SGD(model.parameters(), lr=0.03)
        loss.backward(); preconditioner.step(); optimizer.step(); optimizer.zero_grad()

    Without ``damping=`` and ``gram_damping=``, for structures of layers, all that is left to choose is the optimizer's
    learning rate, on the scale of AdamW's and Muon's: ``damping`` is ``LayerDamping(0.3)``, ``gradient_momentum`` 0.9,
    ``layer_rms`` 0.2, ``ema`` 0.95, ``update_every`` 5 and ``refresh_every`` 2, each unless you pass your own. The
    optimizer that follows needs no momentum then (``OneCycleLR`` gives it some unless ``cycle_momentum=False``), and
    its learning rate must fall while you train, since steps get shorter by nothing else.

    With ``kind="ief"`` and Kronecker factors this is the paper's ieKFAC (Wu, Yu, Zhang, Woodland, arXiv 2406.06420,
    eq. 43): each example's output gradient is divided by the norm of its logit gradient, activations are as in KFAC.
    Rows are captured as `NaturalGradient` does, in the steps in which an update is due, and at no cost in others.

    With a gradient scaler: ``scaler.unscale_(optimizer); preconditioner.step(); scaler.step(optimizer)``; gradients
    with infinite entries are left as they are, and the scaler skips them. Clip before or after, as you mean it. If
    parameters are not finite either, the loss has diverged, and a warning says so.

    Args:
        model: the model; call this very object.
        kind: a name such as "ief" or "truncated:2", or an object of `fisherkit.OutputRule`.
        structure: "kfac", "ekfac", "nkp", "diagonal", "block" or "full".
        damping: λ beside F, or `fisherkit.RelativeDamping`, or for structures of layers `LayerDamping`.
        gram_damping: λ beside the sum over examples instead of the mean; for EF and iEF in the full and block
            structures, the paper's update, which ``.grad`` is then replaced by.
        ema: decay of running averages of F: the batch of k updates ago has emaᵏ times the weight of the newest. None
            for 0.95, and for 0 with full and block, whose rows are those of one batch.
        update_every: steps between updates, more than 1 for structures of layers; 1 beside a damping of yours.
        refresh_every: updates between eigen-decompositions; 1 beside a damping of yours.
        trust_region: δ: gradients are shortened by one factor so that (lr · Δ)ᵀ F (lr · Δ) <= δ (KL clipping).
        gradient_momentum: μ of m ← μ m + ∇L, with ∇L + μ m in the place of ∇L *before* the product with the inverse
            (Nesterov's, as Muon's), for structures of layers; None for 0 beside a damping of yours. The ``momentum`` of
            `NaturalGradient`, and of the optimizer that follows, adds up what comes *after* it.
        layer_rms: root mean square that each module's gradients are scaled to, as a last step (grafting of the norm:
            0.2 is that of AdamW's updates, and of Muon's with ``adjust_lr_fn="match_rms_adamw"``), so that the learning
            rate alone says how long steps are. A module whose gradient is 0 stays where it is, whatever its momentum.
            Not beside ``trust_region``. None for no scaling beside a damping or a trust region of yours.
        lr: used by ``trust_region``. With 1 the gradients themselves are clipped, and a schedule of the learning rate
            then shortens steps. With the following optimizer's learning rate, a number or a function without arguments,
            the steps are clipped.
        likelihood: the loss module that you train with, or a name or object; see `NaturalGradient`.
        reduction: of your loss over examples, "mean" or "sum".
        params: names, or a predicate; other gradients are left as they are.
        kfac_positions: "expand" or "reduce".
        max_rank: leading eigenpairs of a Kronecker factor that are kept; None for all.
        group: the processes whose batches a step is made of, as for `fisherkit.FisherApproximation`; for models that
            `DistributedDataParallel` or `fully_shard` trains, whose gradients are the mean over processes. All of
            them make the optimizer, or pass False.
        options: of the kind.

    Raises:
        FisherkitError: as for `NaturalGradient`.

    Cost: an update costs what the structure's build costs without its passes over the data; a step one product with the
        inverse. Of a model in shards, for updates, your passes once more on a copy with all weights.
    """

    @in_all(CALL)
    def __init__(
        self,
        model: nn.Module,
        *,
        kind: str | OutputRule = "ief",
        structure: str = "kfac",
        damping: Damping | LayerDamping | None = None,
        gram_damping: float | None = None,
        likelihood: str | Likelihood | nn.Module = "categorical",
        reduction: str = "mean",
        params: Selection = None,
        ema: float | None = None,
        update_every: int | None = None,
        refresh_every: int | None = None,
        trust_region: float | None = None,
        gradient_momentum: float | None = None,
        layer_rms: float | None = None,
        lr: float | Callable[[], float] = 1.0,
        kfac_positions: str = "expand",
        max_rank: int | None = None,
        group: Group = None,
        **options: Any,
    ) -> None:
        model, params = whole_model(model, params)
        rows = structure_named(structure, CALL).keeps_rows
        usual = USUAL if damping is None and gram_damping is None and not rows else PLAIN
        own = {**usual, "ema": 0.0 if rows else EMA}
        if trust_region is not None:
            own["layer_rms"] = None
        given = dict(locals())  # all arguments by name, which the signature alone has to list
        given |= {name: value for name, value in own.items() if given[name] is None}
        settings = StepSettings.of(CALL, given)
        rms = given["layer_rms"]
        check_number(CALL, "layer_rms", rms, above=True, optional=True)
        if rms is not None and trust_region is not None:
            raise InvalidArgumentError(
                CALL, f"layer_rms={rms!r} and trust_region={trust_region!r}", "one of them",
                why="each decides how long a step is",
            )  # fmt: skip
        self.damping: Damping | LayerDamping = given["damping"] if gram_damping is None else gram_damping
        self.trust_region, self.layer_rms, self._lr = trust_region, rms, lr
        self._curvature = Curvature(model, params, settings, group)

    def __repr__(self) -> str:
        """Kind, structure and what decides about a step."""
        own = self._curvature.settings
        return (
            f"Preconditioner(kind={own.kind.kind_name!r}, structure={own.structure.name!r}, damping={self.damping}, "
            f"trust_region={self.trust_region}, gradient_momentum={own.gradient_momentum}, "
            f"layer_rms={self.layer_rms}, update_every={own.update_every})"
        )

    @torch.no_grad()
    @without_autocast()
    def step(self) -> None:
        """Put (F + λI)⁻¹ ∇L in the place of ``.grad``; see the class.

        Raises:
            ModelError: an update is due, and no forward and backward pass of the model was seen.
            NonFiniteError: NaN or infinite numbers in a pass whose gradients are finite; averages stay as they were.
            SingularMatrixError: the damping is too small.
            InvalidTypeError, InvalidArgumentError: ``lr`` gives no finite number, 0 or more, or ``damping``,
                ``trust_region`` or ``layer_rms`` were set to what the class does not take.
        """
        curvature = self._curvature
        own = curvature.capture.parameters()
        gradients = curvature.gradients(own)
        if not gradients:
            return
        with curvature.explaining():
            settings = curvature.agreed(gradients, self._settings)
            if settings is None:
                curvature.say_if_diverged(own)
                curvature.capture.forget()
                return
            space, direction = curvature.direction(own, gradients, self.damping)
        update = direction.within(self.trust_region, settings.get("lr", 1.0))
        deltas, strided = space.unflatten(update), []
        if self.layer_rms is not None:
            deltas = with_layer_rms(deltas, gradients, self.layer_rms)
        for name, delta in deltas.items():
            gradient = own[name].grad
            if gradient is not None and gradient.layout == torch.strided:
                strided.append((local(gradient), local(shard_like(delta, gradient))))
            elif gradient is not None:  # an update has entries where a sparse gradient has none
                own[name].grad = delta.clone()
        if strided:
            torch._foreach_copy_([gradient for gradient, _ in strided], [delta for _, delta in strided])

    def _settings(self) -> dict[str, Any]:
        """What decides about a step."""
        settings = {"damping": self.damping, "trust_region": self.trust_region, "layer_rms": self.layer_rms}
        check_trust_region(self.trust_region, f"{CALL}.step")
        check_number(f"{CALL}.step", "layer_rms", self.layer_rms, above=True, optional=True)
        if self.trust_region is not None:
            rate: Any = self._lr() if callable(self._lr) else self._lr
            settings["lr"] = check_number(f"{CALL}.step", "lr", rate.item() if isinstance(rate, Tensor) else rate)
        return settings

    def state_dict(self) -> dict[str, Any]:
        """Running averages and counters."""
        return self._curvature.state_dict()

    def load_state_dict(self, state_dict: Mapping[str, Any]) -> None:
        """The inverse of `state_dict`; steps go on bit for bit, with the same arguments.

        The sum of gradients of ``gradient_momentum`` is left out where that is 0 here, and begins with the next
        gradient where the state has none.

        Raises:
            InvalidArgumentError: it is of another kind, likelihood, structure, damping or model, `NaturalGradient`'s,
                damaged, or has numbers that are not finite; nothing is changed.
        """
        self._curvature.loading(state_dict)()

"""`NaturalGradient`: a torch optimizer whose steps go along (F + λI)⁻¹ ∇L, or along the iEF paper's update."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Mapping
from typing import Any

import torch
from torch import Tensor, nn

from fisherkit.arguments import check_number, check_type
from fisherkit.arithmetic import all_finite, without_autocast
from fisherkit.errors import FisherkitError, InvalidArgumentError, InvalidTypeError, ModelError, NonFiniteError, listed
from fisherkit.likelihoods import Likelihood
from fisherkit.model_state import check_hash, state_hash
from fisherkit.operators import Damping, RelativeDamping
from fisherkit.optim.averages import LayerDamping, require_finite
from fisherkit.optim.curvature import Curvature, Watching, check_has
from fisherkit.optim.settings import StepSettings, check_damping_choice, check_trust_region, whole_model
from fisherkit.outputs import OutputRule
from fisherkit.processes import Group, in_all
from fisherkit.space import ParameterSpace, Selection
from fisherkit.wrappers import full, local, shard_like

CALL = "NaturalGradient"
STATE_CHECKSUM = "state_checksum"


class NaturalGradient(Watching, torch.optim.Optimizer):
    """θ ← θ − lr · Δ with Δ the gradient seen through a Fisher of the very examples of the step.

        optimizer = fk.optim.NaturalGradient(model, lr=0.5, kind="ief", gram_damping=1e-3)
        loss = F.cross_entropy(model(x), y); loss.backward(); optimizer.step(); optimizer.zero_grad()

    The rows of EF, iEF and the truncated kind of rank 1 are captured by the ordinary forward and backward passes; other
    kinds make a backward pass of their own while yours runs. The damping decides the update:

    - ``gram_damping=λ`` with EF and iEF is the paper's (Wu, Yu, Zhang, Woodland, arXiv 2406.06420, eq. 5 and 8):
      Δ = Jᵀ(JJᵀ + λI)⁻¹ t, J the unreduced gradients of the step's examples, t_n = ‖∂ℓ_n/∂z_n‖^2p with the power p of
      iEF, 1 for EF. It is made of the examples alone: what was done to ``.grad`` (clipping, penalties in the loss) does
      not enter. With other kinds, and in other structures than full and block, it is (Σ rows rowsᵀ + λI)⁻¹ Σ_n ∇ℓ_n.
    - ``damping=λ`` is (F + λI)⁻¹ g with F = (1/N) Σ and g the mean gradient as it stands in ``.grad``, clipped or not.

    Neither depends on how a batch was cut for accumulation, nor, once ``reduction`` says it, on the loss's reduction.
    For EF and iEF in the full and block structures ``gram_damping`` takes no part of the loss but its examples: weights
    of examples, penalties and auxiliary losses are warned of and have no effect.

    Dropout may be active: rows come from the same forward pass. Batch norm in train mode: see `Warns`. Several forward
    passes before a step are as many parts of its batch. Passes under ``torch.no_grad``, in `paused`, or without a
    backward pass leave nothing behind.

    Args:
        model: the model; call this very object.
        lr: learning rate.
        kind: "ef", "ief", "sf", "exact" or "truncated", its setting after a colon as in `fk.evaluation.compare`
            ("truncated:2") or among ``options``; or an object of `fisherkit.OutputRule`.
        damping: λ beside F, or `fisherkit.RelativeDamping`, or for structures of layers `LayerDamping`.
        gram_damping: λ beside the Gram matrix of unreduced gradients.
        weight_decay: decoupled: θ ← (1 − lr · weight_decay) θ before the step.
        momentum: μ of m ← μ m + Δ, which takes Δ's place: *after* the product with the inverse, where the
            ``gradient_momentum`` of `Preconditioner` is before it.
        likelihood: the loss module that you train with, or a name or object as for `fisherkit.FisherApproximation`.
            Your loss must be its loss, times anything that is the same for all positions of an example. With "gaussian"
            and "poisson" its factor cannot be seen: for "gaussian" the loss must be
            ``((z - y) ** 2).sum(1).mean() / 2``, or the sum for ``reduction="sum"``; with a module, that module's.
        reduction: of your loss over examples, "mean" or "sum".
        normalize_update: Δ / ‖Δ‖ takes Δ's place.
        trust_region: δ: Δ is shortened so that (lr · Δ)ᵀ F (lr · Δ) <= δ, in the kind's own F, where it would be more.
            With momentum, what is added to the buffer is.
        structure: "full" (the batch's rows, in sample space), "block" (the same by module), "kfac", "ekfac",
            "nkp", "diagonal", or a structure of layers of your own.
        params: None for all parameters, names, a predicate ``(name, parameter) -> bool``, or parameter groups in
            torch's form. Parameters that do not require a gradient are left alone until they do.
        ema: for structures of layers, the decay of running averages of F: the batch of k updates ago has emaᵏ times the
            weight of the newest. 0 for the newest batch alone.
        update_every: for these, steps between updates.
        refresh_every: updates between eigen-decompositions.
        kfac_positions: "expand" or "reduce".
        max_rank: leading eigenpairs of a Kronecker factor that are kept; all others get their mean eigenvalue. Makes
            wide layers cheap, and the inverse approximate. None for all.
        group: the processes whose batches a step is made of, as for `fisherkit.FisherApproximation`; for models that
            `DistributedDataParallel` or `fully_shard` trains, whose gradients are the mean over processes. All of
            them make the optimizer, or pass False.
        options: of the kind: ``power=`` (ief), ``draws=, seed=`` (sf), ``rank=`` or ``tolerance=`` (truncated).

    Raises:
        FisherkitError: in one of its forms, for arguments that do not fit; at the first forward pass, for a model whose
            per-example gradients do not exist; in a backward pass, for a loss that is not the likelihood's.

    Warns:
        UserWarning: once, naming batch norms in train mode: for the rows, the batch's statistics are constants, which
            takes one more forward and backward pass a step. Once, if the loss reaches layers in other ways than through
            the outputs (auxiliary losses on features): rows are those of the outputs, at one more backward pass.
            Once, of a step without gradients after a forward pass, which changes nothing: a forgotten ``backward()``.

    Cost: beside your own passes, N²D for the Gram matrix (full and block), or the products of `fisherkit.operators`. Of
    a model in shards, for steps that take rows, your passes once more on a copy with all weights.
    """

    @in_all(CALL)
    def __init__(
        self,
        model: nn.Module,
        lr: float,
        *,
        kind: str | OutputRule = "ief",
        damping: Damping | LayerDamping | None = None,
        gram_damping: float | None = None,
        weight_decay: float = 0.0,
        momentum: float = 0.0,
        likelihood: str | Likelihood | nn.Module = "categorical",
        reduction: str = "mean",
        normalize_update: bool = False,
        trust_region: float | None = None,
        structure: str = "full",
        params: Selection | Iterable[Mapping[str, Any]] = None,
        ema: float = 0.0,
        update_every: int = 1,
        refresh_every: int = 1,
        kfac_positions: str = "expand",
        max_rank: int | None = None,
        group: Group = None,
        **options: Any,
    ) -> None:
        model, params = whole_model(model, params)
        given = dict(locals())  # all arguments by name, which the signature alone has to list
        settings = StepSettings.of(CALL, given)
        for name in _OF_ONE:
            check_number(CALL, name, given[name])
        groups, selection = _groups(model, params)
        self._curvature = Curvature(model, selection, settings, group)
        shared = {name: given[name] for name in (*_OF_ONE, *_OF_ALL)}
        super().__init__(groups, {**shared, "kind": settings.kind.kind_name})

    @torch.no_grad()
    def step(self, closure: Callable[[], Any] | None = None) -> Any:
        """One update; see the class.

        Args:
            closure: zeroes the gradients, computes the loss, calls backward and returns the loss; run once, before.

        Returns:
            What the closure returned.

        Raises:
            ModelError: gradients without a forward pass of the model, or of parameters that were replaced since.
            NonFiniteError: NaN or infinite gradients; nothing is changed.
            InvalidTypeError, InvalidArgumentError: ``closure`` is no function, or a group has a setting that no step
                can take, as an lr of NaN.
            SingularMatrixError: the damping is too small.
        """
        loss = None
        if closure is not None:
            check_type(
                f"{CALL}.step", "closure", closure, Callable, "a function that computes the loss, or nothing",
                why="gradients are in .grad by the time of the step", try_="loss.backward(), then step()",
            )  # fmt: skip
            with torch.enable_grad():
                loss = closure()
        own = self._curvature.capture.parameters()
        gradients = self._curvature.gradients(own)
        if not gradients:
            return loss
        first = self.param_groups[0]

        def settings() -> dict[str, Any]:
            self._refuse_others(own, gradients)
            _check_groups(f"{CALL}.step", self.param_groups)
            return {
                f"{name} of group {i}": value
                for i, group in enumerate(self.param_groups)
                for name, value in group.items()
                if name in (*_OF_ONE, *_OF_ALL)
            }

        with without_autocast(), self._curvature.explaining():  # the closure above is the user's own
            if self._curvature.agreed(gradients, settings) is None:
                bad = listed(repr(name) for name, gradient in gradients.items() if not all_finite(gradient))
                raise NonFiniteError(
                    f"{CALL}.step", f"gradients with NaN or infinite entries of {bad}", "finite gradients",
                    try_="skipping the step, as torch.amp.GradScaler does, or a smaller lr",
                )  # fmt: skip
            damping = first["damping"] if first["gram_damping"] is None else first["gram_damping"]
            space, direction = self._curvature.direction(own, gradients, damping)
            if first["normalize_update"]:
                direction = direction.normalized()
            longest = max(group["lr"] for group in self.param_groups)
            self._apply(own, space, direction.within(first["trust_region"], longest))
        return loss

    def _refuse_others(self, own: Mapping[str, nn.Parameter], gradients: Mapping[str, Tensor]) -> None:
        """Refuse gradients of parameters that the model or the optimizer has no more, in whose place others are."""
        held, mine = {p for group in self.param_groups for p in group["params"]}, set(own.values())
        odd = [name for name in gradients if own[name] not in held]
        gone = [p for p in held - mine if p.grad is not None and bool(p.grad.to_dense().any())]
        if odd or gone:
            model = self._curvature.capture.owner
            odd += [name for name, p in model.named_parameters() if any(p is one for one in gone)]
            raise ModelError(
                f"{CALL}.step", f"parameters that were replaced or renamed: {listed(map(repr, odd), 4)}",
                "those that the optimizer was made for", why="a step would leave them as they are",
                try_=f"a new {CALL} after layers are replaced or parametrized",
            )  # fmt: skip

    def _apply(self, own: Mapping[str, nn.Parameter], space: ParameterSpace, update: Tensor) -> None:
        pieces = {own[name]: shard_like(delta, own[name]) for name, delta in space.unflatten(update).items()}
        for group in self.param_groups:
            # Those without a gradient were frozen since the last update.
            chosen = [p for p in group["params"] if p in pieces and p.grad is not None]
            if not chosen:
                continue
            deltas = [pieces[p] for p in chosen]
            if group["momentum"]:
                deltas = [self._buffered(p, delta, group["momentum"]) for p, delta in zip(chosen, deltas, strict=True)]
            weights = [local(p) for p in chosen]
            if group["weight_decay"]:
                torch._foreach_mul_(weights, 1 - group["lr"] * group["weight_decay"])
            torch._foreach_add_(weights, [local(delta) for delta in deltas], alpha=-group["lr"])

    def _buffered(self, p: nn.Parameter, delta: Tensor, momentum: float) -> Tensor:
        """The parameter's m with Δ added, in its dtype, in which torch loads it."""
        state = self.state[p]
        known = state.get("momentum_buffer")
        state["momentum_buffer"] = (
            delta.to(p.dtype, copy=True) if known is None else known.mul_(momentum).add_(delta.to(p.dtype))
        )
        return state["momentum_buffer"]

    def zero_grad(self, set_to_none: bool = True) -> None:
        """As in torch; what was captured for the gradients goes with them."""
        super().zero_grad(set_to_none)
        self._curvature.capture.forget()

    def add_param_group(self, param_group: dict[str, Any]) -> None:
        """As in torch; the parameters must be the model's.

        Raises:
            ModelError: they are not.
            InvalidTypeError: no group with parameters.
            InvalidArgumentError: a setting that all groups share, or one that no step can take.
        """
        call, capture = f"{CALL}.add_param_group", self._curvature.capture
        names = {id(p): n for n, p in capture.owner.named_parameters()}
        param_group = _with_parameters(param_group, names, call)
        odd = sorted(set(_OF_ALL) & set(param_group))
        if odd:
            raise InvalidArgumentError(
                call, f"{odd} in a parameter group", f"some of {sorted(_OF_ONE)}",
                why="one Fisher and one direction belong to all groups", try_=f"{odd[0]}= of {CALL} itself",
            )  # fmt: skip
        _check_groups(call, [{**self.defaults, **param_group}], len(self.param_groups))
        super().add_param_group(param_group)
        chosen = [p for group in self.param_groups for p in group["params"]]
        capture.space = ParameterSpace.of(capture.model, [names[id(p)] for p in chosen])

    def state_dict(self) -> dict[str, Any]:
        """Torch's, and running averages and counters under "curvature"; of tensors, numbers and strings alone.

        There are checksums of "curvature" and of "state"; groups have none, so that a learning rate may be changed.
        Of a model in shards, every process must ask, and has the whole state.
        """
        own = super().state_dict()
        own["state"] = {key: {name: full(value) for name, value in one.items()} for key, one in own["state"].items()}
        state = {**own, "curvature": self._curvature.state_dict(), STATE_CHECKSUM: state_hash(own["state"])}
        for group in state["param_groups"]:
            for name, cls in _RELATIVE.items():
                if isinstance(group["damping"], cls):
                    group["damping"] = {name: group["damping"].scale}
        return state

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """The inverse of `state_dict`; steps go on bit for bit.

        Raises:
            InvalidArgumentError: it is of another kind, likelihood, structure, damping or model, another optimizer's,
                damaged, or has numbers that are not finite; nothing is changed.
            FisherkitError: in another of its forms, for settings of another type.
        """
        check_has(state_dict, ("param_groups", "curvature"), CALL)
        # torch.distributed.checkpoint leaves out what is empty, and writes every key as a string.
        check_has(found := state_dict.get("state", {}), (), CALL)
        numbered = {int(k) if isinstance(k, str) and k.isdecimal() else k: v for k, v in found.items()}
        state_dict = {**state_dict, "state": numbered}
        if STATE_CHECKSUM in state_dict:
            check_hash(state_dict["state"], state_dict[STATE_CHECKSUM], STATE_CHECKSUM, f"{CALL}.load_state_dict")
        finish = self._curvature.loading(state_dict["curvature"])
        try:
            groups = [dict(group) for group in state_dict["param_groups"]]
            for group in groups:
                if isinstance(group.get("damping"), Mapping):
                    ((name, scale),) = group["damping"].items()
                    group["damping"] = _RELATIVE[name](scale)
            _check_groups(f"{CALL}.load_state_dict", groups)
            _check_state(groups, self.param_groups, numbered)
            super().load_state_dict({**state_dict, "param_groups": groups})
        except FisherkitError:
            raise
        except (LookupError, TypeError, ValueError, AttributeError, RuntimeError) as error:
            raise InvalidArgumentError(
                f"{CALL}.load_state_dict", f"a state that torch.optim.Optimizer refuses ({error})",
                f"one that {CALL}.state_dict() made of the same parameters in the same groups",
            ) from error  # fmt: skip
        for p, held in self.state.items():
            held.update({name: shard_like(value, p) for name, value in held.items()})
        finish()

    def __getstate__(self) -> dict[str, Any]:
        """Refused: see `Capture`."""
        return self._curvature.capture.__getstate__()


_RELATIVE: dict[str, type[RelativeDamping | LayerDamping]] = {"relative": RelativeDamping, "layer": LayerDamping}
"""Dampings that are no numbers, by what states name them."""

_OF_ONE = ("lr", "weight_decay", "momentum")
_OF_ALL = ("damping", "gram_damping", "kind", "structure", "normalize_update", "trust_region")


def _check_groups(call: str, groups: Iterable[Mapping[str, Any]], first: int = 0) -> None:
    """Refuse groups, the ``first`` of that number, that lack a setting or have one that no step can take."""
    for place, group in ((f"param_groups[{i}]", group) for i, group in enumerate(groups, first)):
        if missing := [name for name in ("params", *_OF_ONE, *_OF_ALL) if name not in group]:
            raise InvalidArgumentError(call, f"{place} without {missing}", "all settings of a group")
        for name in _OF_ONE:  # schedules round below 0, and may be of tensors
            value = group[name].item() if isinstance(group[name], Tensor) else group[name]
            check_number(call, f"{place}[{name!r}]", value, least=-math.inf)
        check_damping_choice(group["damping"], group["gram_damping"], f"{call}, {place}")
        check_trust_region(group["trust_region"], f"{call}, {place}")


def _check_state(groups: Any, own: Any, state: Mapping[Any, Mapping[str, Tensor]]) -> None:
    """ValueError if a state has tensors of other shapes than the parameters, which it has by numbers, or not finite."""
    numbers, parameters = ([p for group in some for p in group["params"]] for some in (groups, own))
    pairs = zip(numbers, parameters, strict=False)  # of another number, torch says it
    if odd := [number for number, p in pairs if any(m.shape != p.shape for m in state.get(number, {}).values())]:
        raise ValueError(f"momentum of other shapes than those of the parameters {odd}")
    require_finite("momentum", (m for one in state.values() for m in one.values()))


def _with_parameters(group: Any, names: Mapping[int, str], call: str) -> dict[str, Any]:
    """A group with its parameters, which must be some of these, in a list."""
    check_type(call, "parameter group", group, Mapping, 'a dict with "params"')
    own = group.get("params")
    if not isinstance(own, Iterable):
        raise InvalidTypeError(call, f"a group with params of type {type(own).__name__}", "parameters of the model")
    params = [own] if isinstance(own, Tensor) else list(own)
    if any(id(p) not in names for p in params):
        raise ModelError(call, "a parameter that is not the model's", "the model's own")
    return {**group, "params": params}


def _groups(model: nn.Module, params: Any) -> tuple[list[dict[str, Any]], Selection]:
    """Parameter groups in torch's form, and the selection that they make."""
    names = {id(p): n for n, p in model.named_parameters()}
    own = dict(model.named_parameters())
    if isinstance(params, (list, tuple)) and params and isinstance(params[0], Mapping):
        groups = [_with_parameters(group, names, CALL) for group in params]
        return groups, [names[id(p)] for group in groups for p in group["params"]]
    space = ParameterSpace.of(model, params)
    return [{"params": [own[name] for name in space.names]}], list(space.names)

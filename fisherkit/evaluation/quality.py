"""γ, the quality of an update as an approximation of the natural gradient, and ∇L with a Fisher's own conventions.

γ is after Wu, Yu, Zhang and Woodland, "An Improved Empirical Fisher Approximation for Natural Gradient Descent"
(NeurIPS 2024, arXiv 2406.06420, eq. 15), and knows operators only by their products and solves. The gradient has the
Fisher's loss, count N, masks and flat order: one loop over the data that knows no Fisher matrix.
"""

from __future__ import annotations

from collections.abc import Mapping

import torch
from jaxtyping import Float
from torch import Tensor, nn

from fisherkit import likelihoods
from fisherkit.arguments import check_choice, check_type
from fisherkit.arithmetic import all_finite, without_autocast
from fisherkit.data import Batch, Data, Source, check_finite, model_device
from fisherkit.errors import DataError, InvalidArgumentError, ModelError, NonFiniteError, listed
from fisherkit.fisher import within_wrappers
from fisherkit.likelihood import Likelihood, prepared
from fisherkit.model_inputs import is_causal
from fisherkit.operators import Damping, FisherOperator
from fisherkit.randomness import untouched_rng
from fisherkit.rows.differentiable import differentiable, pulled_back
from fisherkit.rows.generic import dense_gradient
from fisherkit.rows.record import refuse_train_mode
from fisherkit.rows.verified import explained_errors
from fisherkit.rows.watched import refuse_hidden
from fisherkit.space import ParameterSpace, Selection

Direction = Tensor | Mapping[str, Tensor]
"""A vector over the parameters, in either form; update and gradient need not have the same."""


@without_autocast()
def approximation_quality(
    update: Direction, exact_fisher: FisherOperator, gradient: Direction
) -> Float[Tensor, ""] | Float[Tensor, " K"]:
    """γ(Δ) = √(ΔᵀFΔ) / abs(Δᵀ∇L): lower is better, and the natural gradient F⁻¹∇L has the least (eq. 15).

    Along Δ the quadratic model of the loss can fall by 1/(2γ²) at most, so γ ranks directions and ignores their length
    and sign. F and ∇L must belong to the same loss: the same data, likelihood, example and normalization. γ under
    ``normalization="mean"`` is √N times γ under ``"sum"``; a ratio such as γ/γ_SGD, with γ_SGD that of
    ``update=gradient``, depends on neither N nor the scale of the loss.

    Args:
        update: Δ, flat ``[D]``, a dict of named tensors, or K updates as columns ``[D, K]``.
        exact_fisher: F, usually a `fisherkit.ExactFisher` in the full structure; any operator will do.
        gradient: ∇L, flat ``[D]`` or a dict; `loss_gradient` computes it.

    Returns:
        γ as a float64 scalar on the operator's device, or ``[K]`` for columns.

    Raises:
        InvalidTypeError: the operator is not a `FisherOperator`, or a vector's dtype is not the operator's.
        InvalidArgumentError: a wrong shape; a zero update or gradient; an update orthogonal to the gradient.

    Cost: one product with F.
    """
    call = "approximation_quality"
    g = _gradient(gradient, exact_fisher, call)
    flat = _flat(update, exact_fisher, call)
    if not bool(flat.any(0).all()):
        raise InvalidArgumentError(call, "a zero update", "a direction", why="γ would be 0/0")
    terms = flat.double() * (g.double() if flat.ndim == 1 else g.double().unsqueeze(1))
    inner = terms.sum(0).abs()
    # Below this a sum of D products is rounding alone, and so would γ be.
    if bool((inner <= torch.finfo(torch.float64).eps * terms.abs().sum(0)).any()):
        raise InvalidArgumentError(
            call, "an update orthogonal to the gradient", "Δᵀ∇L ≠ 0",
            why="to first order the update does not change the loss, so γ is infinite",
            try_="an update made from this gradient, such as fisher.solve(gradient, damping)",
        )  # fmt: skip
    return exact_fisher.quadratic_form(flat).clamp_min(0).sqrt() / inner


@without_autocast()
def quality_floor(exact_fisher: FisherOperator, gradient: Direction, damping: Damping = 1e-3) -> Float[Tensor, ""]:
    """1/√(∇Lᵀ(F + λI)⁻¹∇L), the least γ that any update has where F + λI takes F's place.

    It falls as λ does, and at λ = 0 it is the least `approximation_quality` of all updates. For λ > 0 it is thus an
    upper bound of that least value, and an update's own γ, which knows no damping, may lie below it.

    Args:
        exact_fisher: F.
        gradient: ∇L, flat ``[D]`` or a dict.
        damping: λ, or `fisherkit.RelativeDamping`.

    Returns:
        A float64 scalar on the operator's device.

    Raises:
        InvalidTypeError: the operator is not a `FisherOperator`, or the gradient's dtype is not the operator's.
        InvalidArgumentError: a wrong shape; a zero gradient.
        SingularMatrixError: F + λI is singular.

    Cost: one solve with F.
    """
    g = _gradient(gradient, exact_fisher, "quality_floor")
    solution = exact_fisher.factorize(damping).matvec(g)
    return (g.double() @ solution.double()).rsqrt()


def _gradient(gradient: Direction, fisher: FisherOperator, call: str) -> Float[Tensor, " D"]:
    """The gradient as one flat vector that is not zero."""
    check_type(call, "exact_fisher", fisher, FisherOperator, "a FisherOperator", try_="fk.ExactFisher(model, data)")
    flat = _flat(gradient, fisher, f"{call}, gradient")
    if flat.ndim != 1:
        raise InvalidArgumentError(call, f"{flat.shape[1]} gradients", "one, flat [D] or a dict")
    if not bool(flat.any()):
        raise InvalidArgumentError(call, "a zero gradient", "∇L ≠ 0", why="at a stationary point γ is infinite")
    return flat


def _flat(vector: Direction, fisher: FisherOperator, call: str) -> Float[Tensor, " D"] | Float[Tensor, "D K"]:
    """The vector as one tensor, once it is known to fit the operator."""
    flat = fisher.space.flatten(vector) if isinstance(vector, Mapping) else vector
    columns, _ = fisher.space.to_columns(flat, call, dtype=fisher.dtype, device=fisher.device)
    return columns.reshape(flat.shape)


# -- the gradient that belongs to a Fisher -----------------------------------------------------------------------------


CALL = "loss_gradient"


@without_autocast()
def loss_gradient(
    model: nn.Module,
    data: Data,
    *,
    likelihood: str | Likelihood | nn.Module = "categorical",
    params: Selection = None,
    example: str = "sequence",
    normalization: str = "mean",
    shift_labels: bool | None = None,
) -> Float[Tensor, " D"]:
    """∇L = (1/N) Σ_n ∂ℓ_n/∂θ, the gradient that belongs to a Fisher built with the same arguments.

    N counts what the Fisher counts: batch elements with a label that counts, or such positions for ``example="token"``.
    The loss is the likelihood's own, summed over an example's positions. The model is read, never changed.

    Args:
        model: any module whose outputs the likelihood reads.
        data: one batch or a re-iterable of batches, with targets.
        likelihood: the loss module that you train with, as ``nn.CrossEntropyLoss(...)``, or a name, "categorical",
            "gaussian", "bernoulli" or "poisson", or an object of `fisherkit.likelihoods`.
        params: which parameters: None for all that require grad, names, or a predicate ``(name, parameter) -> bool``.
        example: "sequence" or "token": what N counts.
        normalization: "mean" for 1/N, "sum" for no factor.
        shift_labels: labels belong to the outputs one position before them; None: as the model says of itself.

    Returns:
        ``[D]`` in flat order, in the parameters' dtype and on their device.

    Raises:
        InvalidTypeError: an argument of the wrong type.
        InvalidArgumentError: an argument that is none of the allowed ones.
        DataError: no example, no targets, or targets that do not fit.
        NonFiniteError: NaN or infinity in a batch's outputs or gradient.
        ModelError: dropout or batch statistics in train mode, or outputs that do not depend on the parameters.

    Cost: one forward and one backward pass over the data.
    """
    check_type(CALL, "model", model, nn.Module, "a torch.nn.Module")
    check_choice(CALL, "example", example, ("sequence", "token"))
    check_choice(CALL, "normalization", normalization, ("mean", "sum"))
    model, params = within_wrappers(model, params)
    resolved = likelihoods.resolve(likelihood, model)
    space = ParameterSpace.of(model, params)
    device, dtype = model_device(model, space.names)
    refuse_train_mode(model)
    shift = is_causal(model) if shift_labels is None else shift_labels
    own = dict(model.named_parameters())
    parameters = {name: own[name] for name in space.names}
    total = torch.zeros(space.size, dtype=torch.float64, device=device)
    examples = 0
    for number, raw in enumerate(Source(data, model).once()):
        batch = raw.to(device)
        call = f"data, batch {number}"
        with explained_errors(model, space, batch):
            gradient, mask = _batch_gradient(model, batch, resolved, parameters, shift, call)
        if not all_finite(gradient):
            parts = space.unflatten(gradient)
            bad = listed(repr(name) for name, part in parts.items() if not all_finite(part))
            raise NonFiniteError(
                call, f"gradients with NaN or infinite entries of {bad}", "finite gradients",
                why="outputs that are finite may hide infinite activations",
                try_="torch.isfinite of this batch's inputs",
            )  # fmt: skip
        total += gradient
        examples += int((mask if example == "token" else mask.any(1)).sum())
    if examples == 0:
        raise DataError("data", "no example with a label that counts", "at least one")
    return (total / examples if normalization == "mean" else total).to(dtype)


def _batch_gradient(
    model: nn.Module, batch: Batch, likelihood: Likelihood, chosen: dict[str, nn.Parameter], shift: bool, call: str
) -> tuple[Float[Tensor, " D"], Tensor]:
    """Σ_n ∂ℓ_n/∂θ of one batch in float64, and which positions count."""
    names, parameters = list(chosen), list(chosen.values())
    # Only the model's own code runs in here: outside, flags and random generators are the caller's.
    with untouched_rng([parameters[0].device]), differentiable(model, parameters):
        raw = batch.call(model)
        if not raw.requires_grad:
            raise ModelError(
                call, "outputs that do not depend on the parameters", "a forward pass that autograd can follow",
                try_="a forward without torch.no_grad, detach or NumPy",
            )  # fmt: skip
        batch = batch.aligned(model, raw, shift=shift, ignore_index=likelihood.ignore_index)
        known = raw.detach()
        check_finite(known, call)
        known = known if known.dtype in {torch.float32, torch.float64} else known.float()
        likelihood.check_reading(known, batch.targets, batch.batched, call)
        z, target, mask = prepared(likelihood, known, batch.targets, call)
        if target is None:
            raise DataError(call, "no targets", "targets", why="the loss is that of the observed labels")
        v = torch.where(mask.unsqueeze(-1), likelihood.gradient(z, target), torch.zeros_like(z))
        found = pulled_back(raw, parameters, likelihood.as_outputs(v, raw.shape))
        unused = {names[i]: parameters[i] for i, g in enumerate(found) if g is None}
        if unused:
            refuse_hidden(model, unused, batch, raw)
    flat = [dense_gradient(p, g) for p, g in zip(parameters, found, strict=True)]
    return torch.cat([g.detach().reshape(-1).double() for g in flat]), mask

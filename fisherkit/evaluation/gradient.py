"""∇L with the same conventions as a Fisher: the loss, the count N, the masks and the flat order.

Owns one loop over the data. Knows likelihoods and batches, and no Fisher matrix.
"""

from __future__ import annotations

import torch
from jaxtyping import Float
from torch import Tensor, nn

from fisherkit import likelihoods
from fisherkit.arguments import check_choice
from fisherkit.arithmetic import all_finite, without_autocast
from fisherkit.data import Batch, Data, Source, check_finite, model_device
from fisherkit.errors import DataError, InvalidTypeError, ModelError, NonFiniteError, listed
from fisherkit.fisher import within_wrappers
from fisherkit.likelihoods import Likelihood
from fisherkit.model_inputs import is_causal
from fisherkit.randomness import untouched_rng
from fisherkit.rows.differentiable import differentiable, pulled_back
from fisherkit.rows.generic import dense_gradient
from fisherkit.rows.hidden import refuse_hidden
from fisherkit.rows.record import refuse_train_mode
from fisherkit.space import ParameterSpace, Selection

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
    if not isinstance(model, nn.Module):
        raise InvalidTypeError(call=CALL, got=f"a {type(model).__name__} as model", expected="a torch.nn.Module")
    check_choice(CALL, "example", example, ("sequence", "token"))
    check_choice(CALL, "normalization", normalization, ("mean", "sum"))
    model, params = within_wrappers(model, params)
    resolved = likelihoods.resolve(likelihood)
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
        gradient, mask = _batch_gradient(model, batch, resolved, parameters, shift, call)
        if not all_finite(gradient):
            parts = space.unflatten(gradient)
            bad = listed(repr(name) for name, part in parts.items() if not all_finite(part))
            raise NonFiniteError(
                call=call, got=f"gradients with NaN or infinite entries of {bad}", expected="finite gradients",
                why="outputs that are finite may hide infinite activations",
                try_="torch.isfinite of this batch's inputs",
            )  # fmt: skip
        total += gradient
        examples += int((mask if example == "token" else mask.any(1)).sum())
    if examples == 0:
        raise DataError(call="data", got="no example with a label that counts", expected="at least one")
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
                call=call, got="outputs that do not depend on the parameters",
                expected="a forward pass that autograd can follow",
                try_="a forward without torch.no_grad, detach or NumPy",
            )  # fmt: skip
        batch = batch.aligned(model, raw, shift=shift, ignore_index=likelihood.ignore_index)
        known = raw.detach()
        check_finite(known, call)
        known = known if known.dtype in {torch.float32, torch.float64} else known.float()
        likelihood.check_reading(known, batch.targets, batch.batched, call)
        z, target, mask = likelihood.prepare(known, batch.targets, call)
        if target is None:
            raise DataError(
                call=call, got="no targets", expected="targets", why="the loss is that of the observed labels"
            )
        v = torch.where(mask.unsqueeze(-1), likelihood.gradient(z, target), torch.zeros_like(z))
        found = pulled_back(raw, parameters, likelihood.as_outputs(v, raw.shape))
        unused = {names[i]: parameters[i] for i, g in enumerate(found) if g is None}
        if unused:
            refuse_hidden(model, unused, batch, raw)
    flat = [dense_gradient(p, g) for p, g in zip(parameters, found, strict=True)]
    return torch.cat([g.detach().reshape(-1).double() for g in flat]), mask

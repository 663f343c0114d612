"""RegMean: linear layers merged so that their outputs on all tasks' inputs change least.

W = (Σ_t w_t A_t)⁻¹ Σ_t w_t A_t W_t for a layer's weight and bias together, A_t the second moment of its inputs on task
t: the merge with the Fishers I ⊗ A_t. Owns the choice of these factors; solved as every merge is.

Jin, Ren, Preotiuc-Pietro and Cheng, "Dataless knowledge fusion by merging weights of language models" (arXiv
2212.09849).
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch

from fisherkit.errors import FisherkitError, InvalidArgumentError
from fisherkit.merging.assembly import Target
from fisherkit.merging.checkpoints import Model
from fisherkit.merging.merge import merge_by
from fisherkit.merging.policies import Policies
from fisherkit.merging.sources import Fisher, FisherSource, Names
from fisherkit.merging.systems import Solver
from fisherkit.operators import Damping, FisherOperator, KroneckerOperator, RelativeDamping

DEFAULT_DAMPING = RelativeDamping(1e-6)


def regmean(
    models: Sequence[Model],
    fishers: Sequence[Fisher],
    weights: Sequence[float] | str | None = None,
    *,
    shrink: float = 0.9,
    damping: Damping = DEFAULT_DAMPING,
    buffers: str = "refuse",
    integers: str = "refuse",
    mismatched: str = "refuse",
    other_weights: str = "refuse",
    dtype: torch.dtype | None = None,
    device: torch.device | str | None = None,
    tolerance: float = 1e-12,
    max_steps: int = 2000,
    out: str | Path | None = None,
    max_shard_size: int | None = None,
    overwrite: bool = False,
    return_info: bool = False,
    progress: bool = False,
) -> Any:
    """The model whose linear layers reproduce the models' outputs on their own inputs, in the least squares sense.

    Layers that all Fishers have as a Kronecker product are merged with A_t, of which only the share ``shrink`` of the
    entries off the diagonal is kept; everything else is averaged. Convolutions count, with A_t over their patches.

    Args:
        models: as in `merge`.
        fishers: of the structure "kfac", whatever the kind: their activation factors are the A_t.
        weights: as in `merge`.
        shrink: α of A_t ← α A_t + (1 − α) diag(A_t); 1 for none, 0.9 the paper's usual choice.
        damping: as in `merge`; towards the average. By default so little that it only decides what no input reaches.
        buffers: as in `merge`.
        integers: as in `merge`.
        mismatched: as in `merge`.
        other_weights: as in `merge`.
        dtype: as in `merge`.
        device: as in `merge`.
        tolerance: as in `merge`.
        max_steps: as in `merge`.
        out: as in `merge`.
        max_shard_size: as in `merge`.
        overwrite: as in `merge`.
        return_info: as in `merge`.
        progress: as in `merge`.

    Returns:
        As `merge`.

    Raises:
        InvalidArgumentError: as in `merge`; or a Fisher has no Kronecker products.
        FisherkitError: whatever `merge` raises.

    Cost: as `merge` with Kronecker products, of which these converge in a step or two, and one more reading of every
        Fisher, to know which blocks are such products.
    """
    call = "regmean"
    if not 0 <= shrink <= 1:
        raise InvalidArgumentError(call=call, got=f"shrink={shrink}", expected="a number from 0 to 1")
    try:
        return merge_by(
            models, fishers, weights, Policies("average", buffers, integers, mismatched, dtype, other_weights),
            Solver("auto", tolerance, max_steps), Target(out, max_shard_size, overwrite), damping=damping,
            device=device, return_info=return_info, progress=progress, call=call,
            seen_as=lambda source: ActivationSource(source, shrink),
        )  # fmt: skip
    except FisherkitError as error:
        if not error.call.startswith("merge"):
            raise
        raise error.at(call + error.call.removeprefix("merge")) from error


class ActivationSource(FisherSource):
    """The Kronecker products of a Fisher with I in the place of their gradient factors; its other blocks left out.

    Args:
        source: the Fisher.
        shrink: the share of A's entries off the diagonal that is kept.

    Raises:
        InvalidArgumentError: it has no Kronecker product.
    """

    def __init__(self, source: FisherSource, shrink: float) -> None:
        self._source, self._shrink = source, shrink
        blocks = tuple(names for names in source.blocks if source.read(names).factors is not None)
        names = tuple(name for block in blocks for name in block)
        if not names:
            raise InvalidArgumentError(
                call="regmean", got="a Fisher without a Kronecker product", expected="activation factors",
                why="RegMean merges linear layers by the second moments of their inputs", try_='structure="kfac"',
            )  # fmt: skip
        super().__init__(source.space.restrict(names), source.metadata, blocks, source.device)

    def read(self, names: Names) -> FisherOperator:
        """I ⊗ A over one layer."""
        layer = self._source.read(names)
        if layer.factors is None or layer.layout is None:
            raise InvalidArgumentError(
                call="regmean", got=f"layers joined into {list(names)}", expected="Fishers of one structure",
                try_='structure="kfac" for all',
            )  # fmt: skip
        activation, layout = layer.factors[0], layer.layout
        diagonal = activation.diagonal().diag()
        kept = diagonal + self._shrink * (activation - diagonal)
        identity = torch.eye(layout.outputs, dtype=layer.dtype, device=layer.device)
        return KroneckerOperator(layer.space, kept, identity, layout.transposed, symmetric=True)

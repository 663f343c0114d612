"""The structures: symmetric positive semi-definite matrices over a parameter space that answer one list of operations.

`FisherOperator` is the contract. Its public methods are final and its hooks are what a structure supplies:

| structure | F | solve and log det | eigenvalues and what is made of them | draw from N(0, F) | folds in a sum with |
|---|---|---|---|---|---|
| `DiagonalOperator` | diag(d) | 1/(d + λ) | d | √d ε | diagonal |
| `DenseOperator` | the matrix | Cholesky | eigh | U √w ε | dense, diagonal |
| `LowRankOperator` | scale · JᵀJ | Woodbury, or the smaller of two Grams | its Gram's | √scale Jᵀε | rows of its form |
| `KroneckerOperator` | G ⊗ A | eigh of G and of A | products of theirs | as the next | one with an equal factor |
| `EigenKroneckerOperator` | U diag(e) Uᵀ, U = U_G ⊗ U_A | 1/(e + λ) | e | U √e ε | one of the same bases |
| `BlockDiagonalOperator` | blocks | the blocks' | the blocks' | the blocks' | block by block |
| `ShardedOperator` | blocks of several processes | each its own | the blocks' | the blocks' | one shared out alike |
| `PackedOperator` | one of these | its own, in the wide form | its own | its own | its own |
| `SumOperator` | F₁ + F₂ + ... | conjugate gradients, no log det | no closed form | the terms' | term by term |

All supply `_matmat`, `_diagonal`, `_draw`, `_scaled`, `_state` and `_from_state`. Every other hook has a default that
is right for any matrix, if slow, or that refuses: what an application asks of an operator is a hook, and nobody asks
for its class. `split` takes an operator apart into independent blocks; `open_file` reads them one by one from a file.
"""

from fisherkit.operators.base import FisherOperator
from fisherkit.operators.composite import BlockDiagonalOperator, SumOperator, add, split
from fisherkit.operators.damping import Damping, RelativeDamping
from fisherkit.operators.dense import DenseOperator
from fisherkit.operators.diagonal import DiagonalOperator
from fisherkit.operators.factorization import Factorization, IterativeFactorization
from fisherkit.operators.files import FisherFile, load, open_file
from fisherkit.operators.forwarding import ForwardingOperator, PackedOperator, unwrap
from fisherkit.operators.kronecker import EigenKroneckerOperator, KroneckerOperator
from fisherkit.operators.low_rank import LowRankOperator
from fisherkit.operators.normalization import normalize, usual_damping
from fisherkit.operators.persistence import state_of
from fisherkit.operators.quadratic import Quadratic
from fisherkit.operators.sharded import ShardedOperator

__all__ = [
    "BlockDiagonalOperator", "Damping", "DenseOperator", "DiagonalOperator", "EigenKroneckerOperator",
    "Factorization", "FisherFile", "FisherOperator", "ForwardingOperator", "IterativeFactorization",
    "KroneckerOperator", "LowRankOperator", "PackedOperator", "Quadratic", "RelativeDamping", "ShardedOperator",
    "SumOperator", "add", "load", "normalize", "open_file", "split", "state_of", "unwrap", "usual_damping",
]  # fmt: skip

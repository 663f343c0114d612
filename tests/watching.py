"""What kernels make."""

from typing import Any

from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves


class Largest(TorchDispatchMode):
    """Notes the most entries of a tensor that is made; `expanded` says whether one number seen many times counts."""

    entries, expanded = 0, True

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        made = func(*args, **(kwargs or {}))
        for one in tree_leaves(made):
            if isinstance(one, Tensor) and (self.expanded or 0 not in one.stride()):
                self.entries = max(self.entries, one.numel())
        return made

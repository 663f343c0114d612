"""One model from several: merging with Fishers, and the ways to merge that it is compared with.

Knows operators by their blocks and solves, models by their tensors; no other application.
"""

from fisherkit.merging.assembly import BlockInfo, MergeInfo
from fisherkit.merging.export import to_mergekit
from fisherkit.merging.merge import average, line_search, merge, merge_layers, regmean, task_arithmetic
from fisherkit.merging.policy import MergePolicy
from fisherkit.merging.second_moment import from_optimizer

__all__ = [
    "BlockInfo", "MergeInfo", "MergePolicy", "average", "from_optimizer", "line_search", "merge", "merge_layers",
    "regmean", "task_arithmetic", "to_mergekit",
]  # fmt: skip

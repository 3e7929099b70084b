"""Reductions of rows that share an index: atoms of a crystal, edges of an atom.

Shapes: ``M`` rows, ``B`` groups.
"""

from __future__ import annotations

from typing import Literal

from torch import Tensor


def scatter(values: Tensor, index: Tensor, groups: int, reduce: Literal["sum", "mean"]) -> Tensor:
    """Reduce the rows of each group.

    Args:
        values: [M, …].
        index: [M] group of each row, 0 … ``groups`` − 1.
        groups: B.
        reduce: ``sum`` or ``mean``; either is 0 for a group without rows.

    Returns:
        [B, …].
    """
    place = index.view(-1, *[1] * (values.dim() - 1)).expand_as(values)
    total = values.new_zeros(groups, *values.shape[1:]).scatter_add_(0, place, values)
    if reduce == "sum":
        return total
    count = values.new_zeros(groups).scatter_add_(0, index, values.new_ones(index.shape[0])).clamp(min=1)
    return total / count.view(-1, *[1] * (values.dim() - 1))


def softmax(values: Tensor, index: Tensor, groups: int) -> Tensor:
    """Normalize values to weights that sum to one within each group.

    Args:
        values: [M, …].
        index: [M] group of each row.
        groups: B.
    """
    place = index.view(-1, *[1] * (values.dim() - 1)).expand_as(values)
    largest = values.new_zeros(groups, *values.shape[1:])
    largest = largest.scatter_reduce_(0, place, values.detach(), reduce="amax", include_self=False)
    weight = (values - largest.index_select(0, index)).exp()
    return weight / (scatter(weight, index, groups, "sum") + 1e-16).index_select(0, index)

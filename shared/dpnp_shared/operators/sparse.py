"""A sparse matrix for batches of vectors, on any device and twice differentiable."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional


class SparseMatrix(nn.Module):
    """A constant matrix ``(m, n)`` and its transpose, each kept row by row (compressed sparse rows).

    A product is a weighted sum of rows of the batch, ``torch.nn.functional.embedding_bag``: it needs no sparse tensors, which
    some devices lack (MPS has the sum from PyTorch 2.10 on). In float32 it is as fast as the sparse product or faster for a
    few vectors and more. The gradient of a product is a product with the transpose, and so on.

    Args:
        pointers: ``(m + 1,)``, where each row's entries start, and their number at the end.
        columns: ``(entries,)``, the column of each.
        weights: ``(entries,)``, the value of each.
        width: ``n``.
    """

    pointers: Tensor
    columns: Tensor
    weights: Tensor
    transposed_pointers: Tensor
    transposed_columns: Tensor
    transposed_weights: Tensor

    def __init__(self, pointers: Tensor, columns: Tensor, weights: Tensor, width: int) -> None:
        super().__init__()
        rows = torch.repeat_interleave(torch.arange(len(pointers) - 1, dtype=torch.int32), pointers.diff())
        order = columns.int().argsort(stable=True)
        counts = torch.bincount(columns, minlength=width)
        matrix = {
            "pointers": pointers.int(),
            "columns": columns.int(),
            "weights": weights,
            "transposed_pointers": functional.pad(counts.cumsum(0), (1, 0)).int(),
            "transposed_columns": rows[order],
            "transposed_weights": weights[order],
        }
        for name, values in matrix.items():
            self.register_buffer(name, values)

    def forward(self, x: Tensor) -> Tensor:
        """``A x``, ``(B, m)``, of ``x`` ``(B, n)``."""
        y: Tensor = _Product.apply(x, self, False)
        return y

    def transpose(self, y: Tensor) -> Tensor:
        """``A^T y``, ``(B, n)``, of ``y`` ``(B, m)``."""
        x: Tensor = _Product.apply(y, self, True)
        return x

    def product(self, x: Tensor, transposed: bool) -> Tensor:
        """``A x`` or ``A^T x`` of a batch of vectors, without derivatives."""
        pointers, columns, weights = (
            (self.transposed_pointers, self.transposed_columns, self.transposed_weights)
            if transposed
            else (self.pointers, self.columns, self.weights)
        )
        table = x.expand(2, -1) if len(x) == 1 else x  # two vectors take a faster way than one, and round as many do
        sums = functional.embedding_bag(
            columns,
            table.T.contiguous(),
            pointers,
            mode="sum",
            per_sample_weights=weights.to(x.dtype),
            include_last_offset=True,
        )
        return sums.T[: len(x)].contiguous()


class _Product(torch.autograd.Function):
    """A product with a constant matrix; its gradient is one with the transpose."""

    @staticmethod
    def forward(x: Tensor, matrix: SparseMatrix, transposed: bool) -> Tensor:
        return matrix.product(x, transposed)

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Tensor, SparseMatrix, bool], output: Tensor) -> None:
        _, ctx.matrix, ctx.transposed = inputs

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor, None, None]:
        product: Tensor = _Product.apply(gradients[0], ctx.matrix, not ctx.transposed)
        return product, None, None

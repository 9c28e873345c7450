"""The gradient of a linear layer's weight, added to its buffer in one product, or written there by the first one."""

from collections.abc import Iterable

import torch
from torch import Tensor


class UnwrittenBuffers:
    """Gradient buffers that count as zeros, whatever is in them, until a product is written or `fill` is called.

    An iteration's first product then needs neither zeros written before it nor a buffer read: 8 bytes a parameter.
    """

    def __init__(self) -> None:
        # By address: whose zeros are this object's matter, what products have been added to, what counts as zeros.
        self._owned: set[int] = set()
        self._known: set[int] = set()
        self._unwritten: set[int] = set()

    def __bool__(self) -> bool:
        """Whether any buffer counts as zeros."""
        return bool(self._unwritten)

    def own(self, buffers: Iterable[Tensor]) -> None:
        """Take note that each iteration begins with zeros in these buffers, or with what counts as zeros."""
        self._owned.update([buffer.data_ptr() for buffer in buffers])

    def owns(self, buffer: Tensor) -> bool:
        """Whether an iteration's gradients are summed in the buffer, from zeros on."""
        return buffer.data_ptr() in self._owned

    def mark(self, buffer: Tensor) -> bool:
        """Let the buffer count as zeros; False, and nothing done, where no product was ever added to it."""
        address = buffer.data_ptr()
        if address not in self._known:
            return False
        self._unwritten.add(address)
        return True

    def take(self, buffer: Tensor) -> bool:
        """Whether the buffer counts as zeros, before a product is written to it."""
        address = buffer.data_ptr()
        if address not in self._known:
            # A CUDA graph goes on adding if it is captured before any product: its buffer must be zeroed.
            if not torch.cuda.is_current_stream_capturing():
                self._known.add(address)
            return False
        if address not in self._unwritten:
            return False
        self._unwritten.discard(address)
        return True

    def fill(self, buffer: Tensor) -> None:
        """Write the zeros that the buffer counts as, if it does: before anything else reads or adds to it."""
        address = buffer.data_ptr()
        if address in self._unwritten:
            self._unwritten.discard(address)
            buffer.zero_()


unwritten = UnwrittenBuffers()


def add_product(rows: Tensor, d_out: Tensor, total: Tensor) -> None:
    """total += d_out^T @ rows, with sums in float32; total = d_out^T @ rows where it counts as zeros (`unwritten`).

    Args:
        rows: [..., n], inputs of a linear layer.
        d_out: [..., m], gradients of its outputs, in rows' dtype.
        total: [m, n], float32 or rows' dtype.
    """
    rows, d_out = rows.flatten(0, -2), d_out.flatten(0, -2)
    first = unwritten.take(total)
    if total.dtype == rows.dtype:
        torch.mm(d_out.t(), rows, out=total) if first else total.addmm_(d_out.t(), rows)
    elif not rows.is_cuda:
        total.copy_(d_out.t() @ rows) if first else total.add_(d_out.t() @ rows)
    elif first:
        torch.mm(d_out.t(), rows, out_dtype=total.dtype, out=total)
    else:
        torch.addmm(total, d_out.t(), rows, out_dtype=total.dtype, out=total)

"""Bytes of the tensors that are alive, counted where the device has no statistics: on a CPU, and of fake tensors."""

import weakref
from collections.abc import Callable, Iterable
from typing import Any

from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves


class LiveMemory(TorchDispatchMode):
    """Counts the storages of all results of torch's operations while it is active, in the backward pass too.

    Not counted is what one operation allocates and frees again within itself.

    Attributes:
        live: bytes of the storages that are alive.
        peak: the most of them at once since the phase began.
    """

    def __init__(self) -> None:
        super().__init__()
        self.live = self.peak = 0
        # Storage -> what lives on with it; the reference's callback takes its bytes off again.
        self._known: dict[int, tuple[weakref.ref, int]] = {}

    def begin_phase(self) -> None:
        """Let `peak` begin again at what is alive."""
        self.peak = self.live

    def count(self, tensors: Iterable[Tensor], *, free: bool = False) -> None:
        """Count tensors that were made before; with `free` they are known and weigh nothing."""
        for tensor in tensors:
            self._add(tensor, 0 if free else None)

    def _add(self, tensor: Tensor, size: int | None = None) -> None:
        storage = tensor.untyped_storage()
        key = storage._cdata
        size = storage.nbytes() if size is None else size
        known = self._known.get(key)
        if known is not None and known[0]() is not None:
            return
        self._known[key] = weakref.ref(storage, lambda _: self._remove(key)), size
        self.live += size
        if self.live > self.peak:
            self._forget_resized()
            self.peak = max(self.peak, self.live)

    def _forget_resized(self) -> None:
        """Take off what storages have given up (Megatron's `CheckpointWithoutOutput` resizes them to 0)."""
        for key, (reference, size) in self._known.items():
            storage = reference()
            if storage is not None and storage.nbytes() < size:
                self.live -= size - storage.nbytes()
                self._known[key] = reference, storage.nbytes()

    def _remove(self, key: int) -> None:
        self.live -= self._known.pop(key)[1]

    def __torch_dispatch__(
        self, function: Callable, types: Any, args: tuple = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        result = function(*args, **(kwargs or {}))
        for tensor in tree_leaves(result):
            if isinstance(tensor, Tensor):
                self._add(tensor)
        return result

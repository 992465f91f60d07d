"""Counts the bytes of tensors, on any device, by the operations that make and take them."""

from __future__ import annotations

import weakref
from typing import Any

import torch
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves


class Held(TorchDispatchMode):
    """The most bytes that tensors made inside have held at a time, NumPy's among them once an operation takes one."""

    def __init__(self) -> None:
        super().__init__()
        self.now = self.most = 0
        self._seen: dict[int, int] = {}

    def ignore(self, tensors: Any) -> None:
        self._seen |= {t.untyped_storage()._cdata: 0 for t in tensors}

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        made = func(*args, **(kwargs or {}))
        for tensor in (t for t in tree_leaves((args, kwargs, made)) if isinstance(t, torch.Tensor)):
            storage = tensor.untyped_storage()
            if storage._cdata not in self._seen:
                self._seen[storage._cdata] = storage.nbytes()
                self.now += storage.nbytes()
                self.most = max(self.most, self.now)
                weakref.finalize(storage, self._freed, storage._cdata)
        return made

    def is_new(self, tensor: torch.Tensor) -> bool:
        """Whether its memory was made inside."""
        return self._seen.get(tensor.untyped_storage()._cdata, 0) > 0

    def _freed(self, key: int) -> None:
        self.now -= self._seen.pop(key, 0)

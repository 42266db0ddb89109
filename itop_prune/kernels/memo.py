"""Values that are remembered for a tensor until it changes."""

import weakref
from typing import Any, Generic, NamedTuple, TypeVar

from torch import Tensor

T = TypeVar("T")


class _Known(NamedTuple):
    tensor: Any
    """A weak reference to it."""
    version: int
    key: object
    value: Any


class Memo(Generic[T]):
    """Remembers one value for each tensor; it is forgotten with the tensor."""

    def __init__(self) -> None:
        self._known: dict[int, _Known] = {}

    def __len__(self) -> int:
        return len(self._known)

    def get(self, tensor: Tensor, key: object) -> T | None:
        """Find the value, if the tensor has not changed since and the key is equal; else None."""
        known = self._known.get(id(tensor))
        if known is None or known.tensor() is not tensor or known.version != tensor._version:
            return None
        return known.value if known.key == key else None

    def put(self, tensor: Tensor, key: object, value: T) -> T:
        """Remember a value in place of the one before, and return it."""
        if not tensor.is_inference():  # changes of such tensors can't be seen
            place = id(tensor)
            reference = weakref.ref(tensor, lambda _: self._known.pop(place, None))
            self._known[place] = _Known(reference, tensor._version, key, value)
        return value

"""Functions that write the parameters they are differentiated by: no graph gives their derivatives."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

from torch import Tensor
from torch._ops import OpOverload
from torch.utils._python_dispatch import TorchDispatchMode


class WritesParameter(RuntimeError):
    """An operator would write the memory of a parameter.

    Args:
        operator: its name.
        number: of the parameter.
    """

    def __str__(self) -> str:
        operator, number = self.args
        return (
            f"{operator} writes parameter {number}, of whose value before or after that a graph may take the "
            "derivatives; write parameters before the step (an embedding with max_norm does, in each forward pass)"
        )


class RefusingWrites(TorchDispatchMode):
    """Where operators that would write memory of ``params``, by number, raise :class:`WritesParameter` instead.

    By memory, since ``detach()``, ``.data`` and views of a parameter lead to it as well. That holds for what a compiler
    traces with, too: such tensors' views share what they have in place of a storage.
    """

    supports_higher_order_operators = True

    def __init__(self, params: Mapping[int, Tensor]) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self._params = params  # or another storage might get the address of one of theirs
        self._numbers = {_storage(param): number for number, param in params.items()}

    def __torch_dispatch__(
        self, func: Callable[..., Any], types: Any, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        kwargs = kwargs or {}
        if isinstance(func, OpOverload) and func._schema.is_mutable:
            for argument, value in zip(func._schema.arguments, args, strict=False):
                self._check(func, argument, value)
            for argument in func._schema.arguments[len(args) :]:
                self._check(func, argument, kwargs.get(argument.name))
        return func(*args, **kwargs)

    def _check(self, func: OpOverload, argument: Any, value: Any) -> None:
        if argument.alias_info is None or not argument.alias_info.is_write:
            return
        for tensor in value if isinstance(value, (list, tuple)) else [value]:
            if isinstance(tensor, Tensor) and (number := self._numbers.get(_storage(tensor))) is not None:
                raise WritesParameter(str(func), number)


def _storage(tensor: Tensor) -> int:
    return tensor.untyped_storage()._cdata

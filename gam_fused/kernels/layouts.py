"""How tensors lie in memory: kernels that walk over memory want no gaps, and tensors of equal index laid out alike."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from itertools import compress

import torch
from torch import Tensor


def is_dense(tensor: Tensor) -> bool:
    """Whether the elements fill a block of memory, each of its places once, in any order of the dimensions."""
    run = 1
    for stride, size in sorted(zip(tensor.stride(), tensor.shape, strict=True)):
        if size != 1 and stride != run and tensor.numel():
            return False
        run *= size
    return True


def are_laid_out_alike(tensors: Sequence[Tensor]) -> bool:
    """Whether tensors of one shape are dense and have their elements in the same order in memory."""
    if not is_dense(tensors[0]):
        return False
    strides = tensors[0].stride()
    if all(tensor.stride() == strides for tensor in tensors):
        return True
    # The stride of a dimension of size 1 means nothing.
    matters = [size != 1 for size in tensors[0].shape]
    return tensors[0].numel() == 0 or all(
        list(compress(tensor.stride(), matters)) == list(compress(strides, matters)) for tensor in tensors
    )


def dense_copies(
    lists: Mapping[str, Sequence[Tensor]], *, element_by_element: bool = True
) -> dict[str, Sequence[Tensor]]:
    """The lists with contiguous copies in place of the tensors that a kernel cannot take as they lie.

    Nothing at all where it can take every tensor. With ``element_by_element``, all lists have tensors of one shape at
    each index, and get copies at every index where one has gaps or another layout than the rest.
    """
    if element_by_element:
        at_index = [not are_laid_out_alike(tensors) for tensors in zip(*lists.values(), strict=True)]
        odd = dict.fromkeys(lists, at_index)
    else:
        odd = {key: [not is_dense(tensor) for tensor in tensors] for key, tensors in lists.items()}
    if not any(map(any, odd.values())):
        return {}
    return {
        key: [_contiguous(tensor) if is_odd else tensor for tensor, is_odd in zip(tensors, odd[key], strict=True)]
        for key, tensors in lists.items()
    }


def copy_back(
    lists: Mapping[str, Sequence[Tensor]], copies: Mapping[str, Sequence[Tensor]], keys: Sequence[str]
) -> None:
    """Write what a kernel has left in :func:`dense_copies` into the tensors they are copies of.

    ``keys`` backwards: backups are complete before the first parameter is written.
    """
    for key in reversed(keys):
        for tensor, copy in zip(lists[key], copies.get(key, ()), strict=False):
            if copy is not tensor:
                tensor.copy_(copy)


def _contiguous(tensor: Tensor) -> Tensor:
    return torch.empty(tensor.shape, dtype=tensor.dtype, device=tensor.device).copy_(tensor)

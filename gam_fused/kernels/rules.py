"""Base rules that a back end may fuse with restoring and combining: what one launch needs to know of them."""

from __future__ import annotations

from dataclasses import dataclass

from torch import Tensor


@dataclass(frozen=True)
class SGDRule:
    """``torch.optim.SGD``. ``lr`` may be a 0-d tensor, on the parameters' device if the host is not to wait for it."""

    lr: float | Tensor
    momentum: float = 0.0
    dampening: float = 0.0
    weight_decay: float = 0.0
    nesterov: bool = False
    maximize: bool = False


@dataclass(frozen=True)
class AdamWRule:
    """``torch.optim.AdamW``; without ``decoupled_weight_decay``, ``torch.optim.Adam``. ``lr`` as in SGD's."""

    lr: float | Tensor
    betas: tuple[float, float] = (0.9, 0.999)
    eps: float = 1e-8
    weight_decay: float = 0.0
    decoupled_weight_decay: bool = True
    amsgrad: bool = False
    maximize: bool = False

"""How GAM steps, apart from the numbers that may differ by param group."""

from __future__ import annotations

from dataclasses import dataclass

from gam_fused import arguments

DEFAULT_FD_EPSILON = 1e-2
DEFAULT_ASCENT_INTERVAL = 4


@dataclass(frozen=True, kw_only=True)
class Options:
    """What :class:`gam_fused.GAM` is given, under the same names; checked.

    Raises:
        TypeError, ValueError: one is not as its documentation says.
    """

    hvp: str = "exact"
    fd_epsilon: float = DEFAULT_FD_EPSILON
    ascent: str = "exact"
    ascent_interval: int = DEFAULT_ASCENT_INTERVAL
    batch_fraction: float = 1.0
    interval: int = 1
    interval_scaling: str = "none"
    rounding: str = "nearest"
    second_order: str = "auto"

    def __post_init__(self) -> None:
        arguments.check_choice("hvp", self.hvp, ("exact", "finite_difference", "auto"))
        arguments.check_positive("fd_epsilon", self.fd_epsilon)
        arguments.check_choice("ascent", self.ascent, ("exact", "finite_difference", "reuse"))
        arguments.check_interval("ascent_interval", self.ascent_interval)
        arguments.check_fraction("batch_fraction", self.batch_fraction)
        arguments.check_interval("interval", self.interval)
        arguments.check_choice("interval_scaling", self.interval_scaling, ("none", "unbiased"))
        arguments.check_choice("rounding", self.rounding, ("nearest", "stochastic"))
        arguments.check_choice("second_order", self.second_order, ("auto", "off"))

"""Layers whose double backward is a native call, or few, where PyTorch's is a composite, slow or missing.

:func:`layers` puts them in the place of PyTorch's own functions, for any model and any loss;
``GAM(second_order="auto")`` does so by itself.
"""

from gam_fused.second_order.rerouting import layers

__all__ = ["layers"]

"""GAM, Gradient norm Aware Minimization, for PyTorch: flatter minima from a drop-in optimizer."""

from gam_fused._version import __version__

__all__ = ["__version__"]

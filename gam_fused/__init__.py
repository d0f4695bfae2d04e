"""GAM, Gradient norm Aware Minimization, for PyTorch: flatter minima from a drop-in optimizer."""

from gam_fused._version import __version__
from gam_fused.accelerated import AcceleratedGAM
from gam_fused.gam import GAM
from gam_fused.memory import keep_freed_memory

__all__ = ["GAM", "AcceleratedGAM", "__version__", "keep_freed_memory"]

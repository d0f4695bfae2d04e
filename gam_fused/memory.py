"""What becomes of memory that is freed between two passes."""

from __future__ import annotations

import ctypes

# Of glibc's malloc.h: numbers of its own parameters.
_M_TRIM_THRESHOLD = -1
_M_MMAP_MAX = -4


def keep_freed_memory() -> bool:
    """Have the C library keep the CPU memory that tensors give back, for the tensors that come next. For CPU training.

    By default glibc returns large pieces of memory to the operating system as soon as they are free, and the system
    hands them out again page by page, each page zeroed and mapped anew. A training step frees all of its activations
    and allocates them again in the next; the larger the step's memory, the more of its time goes there, and a step
    that differentiates twice holds more than an ordinary one. (PyTorch's allocator for CUDA keeps freed memory by
    itself.)

    It concerns the whole process from here on, which then holds on to the most memory it has ever used; so no part of
    this package but its command line calls it by itself. Preloading jemalloc or tcmalloc, as PyTorch's tuning guide
    has it, does the same.

    Returns:
        Whether it took effect: ``False`` where the C library is not glibc.
    """
    libc = ctypes.CDLL(None)
    if not hasattr(libc, "gnu_get_libc_version"):
        return False
    return bool(libc.mallopt(_M_TRIM_THRESHOLD, -1) and libc.mallopt(_M_MMAP_MAX, 0))

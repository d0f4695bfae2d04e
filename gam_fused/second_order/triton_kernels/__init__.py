"""The double backward of normalization layers in Triton kernels: sums first, then results, without atomics.

``rules`` has the arithmetic and ``tiles`` how tensors are read and written. Each other module has the kernels
for one way in which sets of elements lie in memory:

* ``channels``: a set for each channel (batch and instance normalization), and sums for ``groups``;
* ``groups``: a set for some channels of one sample (group normalization);
* ``rows``: a set for each row, with a weight of its own for each place in it (layer and RMS normalization).

A program works on tiles of the tensors. Where their rows are whole packs of 16 bytes, ``PACKED``, a thread reads and
writes one at once, behind a mask too: Triton is told enough of sizes to know that a mask is the same for all of a pack.
Numbers never make it compile a kernel again; the powers of two of which tiles are made are few.

mypy cannot read Triton's language: these modules are checked by the tests alone.
"""

# mypy: ignore-errors

from gam_fused.second_order.triton_kernels.channels import batch_norm_kernel, channel_sums_kernel
from gam_fused.second_order.triton_kernels.groups import group_norm_kernel
from gam_fused.second_order.triton_kernels.rows import add_partials_kernel, long_rows_kernel, short_rows_kernel

__all__ = [
    "add_partials_kernel",
    "batch_norm_kernel",
    "channel_sums_kernel",
    "group_norm_kernel",
    "long_rows_kernel",
    "short_rows_kernel",
]

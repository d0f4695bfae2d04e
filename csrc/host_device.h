// Marks functions that are compiled for the host and for CUDA devices.

#pragma once

#if defined(__CUDACC__)
#define GAM_FUSED_HD __host__ __device__ __forceinline__
#else
// Inlined without exception: the CPU kernels of one instruction set must not call code compiled for another one.
#define GAM_FUSED_HD inline __attribute__((always_inline))
#endif

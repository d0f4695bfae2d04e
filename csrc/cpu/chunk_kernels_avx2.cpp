// x86-64 processors with AVX2 and half-precision conversions.

#include "chunk_kernels.h"

#if defined(__x86_64__)

#include <immintrin.h>

#if defined(__clang__)
#pragma clang attribute push(__attribute__((target("avx2,f16c"))), apply_to = function)
#else
#pragma GCC push_options
#pragma GCC target("avx2,f16c")
#endif

#define GAM_FUSED_SET avx2
#define GAM_FUSED_HAS_F16C 1
#define GAM_FUSED_STREAM_BYTES 32
#include "chunk_kernels.inl"

#if defined(__clang__)
#pragma clang attribute pop
#else
#pragma GCC pop_options
#endif

namespace gam_fused::cpu {

const ChunkKernels kAVX2 = {
    "avx2",
    [] { return __builtin_cpu_supports("avx2") && __builtin_cpu_supports("f16c"); },
    avx2::sum_of_squares,
    avx2::sum_of_squared_differences,
    avx2::perturb,
    avx2::shift,
    avx2::copy_chunk,
    avx2::combine,
    avx2::mixed_sums,
    avx2::decompose,
    avx2::sgd_step,
    avx2::adamw_step,
};

}  // namespace gam_fused::cpu

#endif

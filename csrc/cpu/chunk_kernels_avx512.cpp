// x86-64 processors with AVX-512.

#include "chunk_kernels.h"

#if defined(__x86_64__)

#include <immintrin.h>

#if defined(__clang__)
#pragma clang attribute push(__attribute__((target("avx512f,avx512bw,avx512dq,avx512vl,avx2,f16c"))), \
                             apply_to = function)
#else
#pragma GCC push_options
#pragma GCC target("avx512f,avx512bw,avx512dq,avx512vl,avx2,f16c,prefer-vector-width=512")
#endif

#define GAM_FUSED_SET avx512
#define GAM_FUSED_HAS_F16C 1
#define GAM_FUSED_STREAM_BYTES 64
#include "chunk_kernels.inl"

#if defined(__clang__)
#pragma clang attribute pop
#else
#pragma GCC pop_options
#endif

namespace gam_fused::cpu {

const ChunkKernels kAVX512 = {
    "avx512",
    [] {
        return __builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512bw") &&
               __builtin_cpu_supports("avx512dq") && __builtin_cpu_supports("avx512vl") && kAVX2.is_supported();
    },
    avx512::sum_of_squares,
    avx512::sum_of_squared_differences,
    avx512::perturb,
    avx512::shift,
    avx512::copy_chunk,
    avx512::combine,
    avx512::mixed_sums,
    avx512::decompose,
    avx512::sgd_step,
    avx512::adamw_step,
};

}  // namespace gam_fused::cpu

#endif

// x86-64 processors with AVX-512.

#include "activation_kernels.h"
#include "norm_kernels.h"

#if defined(__x86_64__)

#if defined(__clang__)
#pragma clang attribute push(__attribute__((target("avx512f,avx512bw,avx512dq,avx512vl,avx2,f16c"))), \
                             apply_to = function)
#else
#pragma GCC push_options
#pragma GCC target("avx512f,avx512bw,avx512dq,avx512vl,avx2,f16c,prefer-vector-width=512")
#endif

#define GAM_FUSED_SET avx512
#include "activation_kernels.inl"
#include "norm_kernels.inl"

#if defined(__clang__)
#pragma clang attribute pop
#else
#pragma GCC pop_options
#endif

namespace gam_fused::cpu {

const ActivationKernels kActivationAVX512 = GAM_FUSED_ACTIVATION_KERNELS(avx512);
const NormKernels kNormAVX512 = GAM_FUSED_NORM_KERNELS(avx512);

}  // namespace gam_fused::cpu

#endif

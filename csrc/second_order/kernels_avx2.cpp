// x86-64 processors with AVX2 and half-precision conversions.

#include "activation_kernels.h"
#include "norm_kernels.h"

#if defined(__x86_64__)

#if defined(__clang__)
#pragma clang attribute push(__attribute__((target("avx2,f16c"))), apply_to = function)
#else
#pragma GCC push_options
#pragma GCC target("avx2,f16c")
#endif

#define GAM_FUSED_SET avx2
#include "activation_kernels.inl"
#include "norm_kernels.inl"

#if defined(__clang__)
#pragma clang attribute pop
#else
#pragma GCC pop_options
#endif

namespace gam_fused::cpu {

const ActivationKernels kActivationAVX2 = GAM_FUSED_ACTIVATION_KERNELS(avx2);
const NormKernels kNormAVX2 = GAM_FUSED_NORM_KERNELS(avx2);

}  // namespace gam_fused::cpu

#endif

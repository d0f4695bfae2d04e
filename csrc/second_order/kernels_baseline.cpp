// Any processor: what the compiler may use without being told more.

#include "activation_kernels.h"
#include "norm_kernels.h"

#define GAM_FUSED_SET baseline
#include "activation_kernels.inl"
#include "norm_kernels.inl"

namespace gam_fused::cpu {

const ActivationKernels kActivationBaseline = GAM_FUSED_ACTIVATION_KERNELS(baseline);
const NormKernels kNormBaseline = GAM_FUSED_NORM_KERNELS(baseline);

}  // namespace gam_fused::cpu

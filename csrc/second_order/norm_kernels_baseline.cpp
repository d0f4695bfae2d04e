// Any processor: what the compiler may use without being told more.

#include "norm_kernels.h"

#define GAM_FUSED_SET baseline
#include "norm_kernels.inl"

namespace gam_fused::cpu {

const NormKernels kNormBaseline = GAM_FUSED_NORM_KERNELS(baseline);

}  // namespace gam_fused::cpu

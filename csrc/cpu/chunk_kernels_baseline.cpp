// Any processor: what the compiler may use without being told more.

#include "chunk_kernels.h"

#if defined(__SSE2__)
#include <emmintrin.h>
#endif

#define GAM_FUSED_SET baseline
#if defined(__SSE2__)
#define GAM_FUSED_STREAM_BYTES 16
#else
#define GAM_FUSED_STREAM_BYTES 0
#endif
#include "chunk_kernels.inl"

namespace gam_fused::cpu {

const ChunkKernels kBaseline = {
    "baseline",           [] { return true; }, baseline::sum_of_squares, baseline::sum_of_squared_differences,
    baseline::perturb,    baseline::shift,     baseline::copy_chunk,     baseline::combine,
    baseline::mixed_sums, baseline::decompose, baseline::sgd_step,       baseline::adamw_step,
};

}  // namespace gam_fused::cpu

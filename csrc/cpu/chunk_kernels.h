// What the CPU does with one chunk: the innermost loops, compiled once per instruction set.
//
// Numbers are handed over as doubles that hold values of the accumulation type, so that one signature serves all dtypes
// and nothing is rounded on the way. All instruction sets give the same bits.

#pragma once

#include <cstdint>

#include "../dtype.h"
#include "../rounding.h"
#include "../update_rules.h"

namespace gam_fused::cpu {

// Elements that a thread works on at a time: six lists of them fit in a core's second-level cache.
constexpr int64_t kChunk = 16384;

// Restore and combine: `penalty_scale` multiplies the Hessian-vector product; the sum is multiplied by `factor`, the
// inverse of a gradient scaler's scale, and may be left in the gradient. The base rule is given its negative to
// maximize.
struct Combination {
    double penalty_scale;
    double factor;
    bool write_grads;
    bool maximize;
    bool is_streaming;  // see ChunkKernels::copy
};

struct SGDLaunch {
    Combination combination;
    SGD<double> sgd;
    SGDTerms terms;
};

struct AdamWLaunch {
    Combination combination;
    AdamW<double> adamw;
    AdamWTerms terms;
};

// Addresses of a chunk of each list, by role.
struct SGDChunk {
    void* param;
    const void* backup;
    void* grad;
    const void* hvp;
    void* momentum_buffer;
};

struct AdamWChunk {
    void* param;
    const void* backup;
    void* grad;
    const void* hvp;
    void* exp_avg;
    void* exp_avg_sq;
    void* max_exp_avg_sq;
};

// Addresses of a chunk of the four gradients of an accelerated step.
struct GradientsChunk {
    void* grad;
    void* grad_ahead;
    const void* adversarial_grad;
    const void* adversarial_grad_ahead;
};

// Sums over a chunk.
struct MixedSums {
    double dot;            // of h⁻ and h⁺
    double plus_squared;   // of h⁺ and h⁺
    double minus_squared;  // of h⁻ and h⁻
};

// One instruction set.
struct ChunkKernels {
    const char* name;
    bool (*is_supported)();
    // Sum of squares, in double; of float32 and narrower dtypes, each square is exact.
    double (*sum_of_squares)(Dtype dtype, const void* tensor, int64_t size);
    // The same of end - start, taken in the accumulation type.
    double (*sum_of_squared_differences)(Dtype dtype, const void* end, const void* start, int64_t size);
    // param <-> direction, then param += scale * old direction unless `moves` is false. `random`, here and below: the
    // bits that narrow parameters are rounded with, null where they are rounded to nearest.
    void (*perturb)(Dtype dtype, void* param, void* direction, int64_t size, double scale, bool moves,
                    const RandomChunk* random);
    // param <- origin + scale * (end - start); `origin` may be param itself, `start` null.
    void (*shift)(Dtype dtype, void* param, const void* origin, const void* end, const void* start, int64_t size,
                  double scale, const RandomChunk* random);
    // With `is_streaming`, `to` is written past the caches, which it would not fit in: that spares reading it first.
    void (*copy)(void* to, const void* from, int64_t bytes, bool is_streaming);
    // param <- backup, grad <- grad + scale * hvp
    void (*combine)(Dtype dtype, void* param, const void* backup, void* grad, const void* hvp, int64_t size,
                    double scale, bool is_streaming);
    // In double, of h⁺ and h⁻ in the accumulation type; of float, each product is exact.
    MixedSums (*mixed_sums)(Dtype dtype, const GradientsChunk& chunk, int64_t size, const Weights<double>& weights);
    // grad <- h⁺, grad_ahead <- h⁻ - scale * h⁺
    void (*decompose)(Dtype dtype, const GradientsChunk& chunk, int64_t size, const Weights<double>& weights,
                      double scale);
    void (*sgd_step)(Dtype dtype, const SGDChunk& chunk, int64_t size, const SGDLaunch& launch,
                     const RandomChunk* random);
    void (*adamw_step)(Dtype dtype, const AdamWChunk& chunk, int64_t size, const AdamWLaunch& launch,
                       const BiasCorrections<double>& corrections, const RandomChunk* random);
};

extern const ChunkKernels kBaseline;
extern const ChunkKernels kAVX2;
extern const ChunkKernels kAVX512;

// The best set that this processor has, or the one that the environment variable GAM_FUSED_CPU_CAPABILITY names
// ("baseline", "avx2", "avx512"). Raises std::runtime_error where that one does not exist or cannot run here.
const ChunkKernels& chunk_kernels();

}  // namespace gam_fused::cpu

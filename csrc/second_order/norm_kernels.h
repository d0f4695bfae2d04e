// The innermost loops of the double backward of normalization layers, compiled once per instruction set.
//
// Tensors are runs of elements of one dtype; sums are made in the accumulation type over blocks of at most a thousand
// elements and in double beyond. All instruction sets give the same bits.

#pragma once

#include <cstdint>

#include "../dtype.h"
#include "norm_rules.h"

namespace gam_fused::cpu {

// u, x and v of norm_rules.h.
struct NormInputs {
    Dtype dtype;
    const void* grad_output;
    const void* input;
    const void* gg_input;  // null where it is zero
};

// Null for what nobody asked for.
struct NormOutputs {
    void* grad_grad_output;
    void* grad_input;
};

// In the accumulation type, one number for each element of a row.
struct LayerWeights {
    const void* weight;
    const void* gg_weight;  // null where it is zero
    const void* gg_bias;
};

struct NormKernels {
    const char* name;

    // `begin` and `size` in elements: a run of one channel.
    void (*plane_sums)(const NormInputs& inputs, int64_t begin, int64_t size, double mean, NormSums& sums);
    void (*plane_outputs)(const NormInputs& inputs, const NormOutputs& outputs, int64_t begin, int64_t size,
                          double mean, const NormCoefficients& coefficients);

    // `rows` times all channels, which lie beside each other; one mean, sum and coefficient for each channel.
    void (*channel_sums)(const NormInputs& inputs, int64_t begin, int64_t rows, int64_t channels, const double* mean,
                         NormSums* sums);
    void (*channel_outputs)(const NormInputs& inputs, const NormOutputs& outputs, int64_t begin, int64_t rows,
                            int64_t channels, const double* mean, const NormCoefficients* coefficients);

    // `rows` sets of `size` elements, each element of a row with a weight of its own: sums, then results, which takes
    // the row from the cache the second time. `mean` is null where the layer subtracts none. What the rows add to the
    // gradient of the weight is added to `grad_weight`, in the accumulation type, unless that is null.
    void (*layer_rows)(const NormInputs& inputs, const NormOutputs& outputs, int64_t begin, int64_t rows, int64_t size,
                       const double* mean, const double* invstd, const LayerWeights& weights, void* grad_weight);
};

extern const NormKernels kNormBaseline;
extern const NormKernels kNormAVX2;
extern const NormKernels kNormAVX512;

// Of the instruction set that chunk_kernels() chooses.
const NormKernels& norm_kernels();

}  // namespace gam_fused::cpu

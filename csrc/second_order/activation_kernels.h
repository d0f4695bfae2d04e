// The innermost loops of the double backward of activations, compiled once per instruction set. The same bits on each.

#pragma once

#include <cstdint>

#include "../dtype.h"
#include "activation_rules.h"

namespace gam_fused::cpu {

struct ActivationLists {
    Dtype dtype;
    const void* grad_output;
    const void* input;
    const void* double_grad;
    void* of_grad_output;  // null for what nobody asked for
    void* of_input;
};

struct ActivationKernels {
    const char* name;

    // Elements `begin` to `begin + size`.
    void (*gelu)(const ActivationLists& lists, int64_t begin, int64_t size);
    void (*gelu_tanh)(const ActivationLists& lists, int64_t begin, int64_t size);
    void (*silu)(const ActivationLists& lists, int64_t begin, int64_t size);
};

extern const ActivationKernels kActivationBaseline;
extern const ActivationKernels kActivationAVX2;
extern const ActivationKernels kActivationAVX512;

// Of the instruction set that chunk_kernels() chooses.
const ActivationKernels& activation_kernels();

}  // namespace gam_fused::cpu

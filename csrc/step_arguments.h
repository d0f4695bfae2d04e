// What an operator with many arguments is given beside its lists, on any device; free of torch and of CUDA.
//
// Pointers point to memory of the tensors' device. Those of type void* have the accumulation dtype of the tensors'
// dtype.

#pragma once

#include <cstdint>
#include <optional>
#include <vector>

#include "update_rules.h"

namespace gam_fused {

// α ρ / (‖g_adv‖ + ξ), the factor of the Hessian-vector product.
struct Penalty {
    const void* adversarial_norm;
    double rho;
    double alpha;
    double xi;
};

// What the four gradients of an accelerated step are multiplied by, and what is to be known of their two sums.
struct Decomposition {
    const void* projection;
    const void* plus_norm;
    Weights<double> weights;
    double xi;
};

// What fused steps have in common, as schemas.h describes it. Pointers may be null where it says `Tensor?`.
struct StepArguments {
    Penalty penalty;
    const std::vector<const void*>& guards;
    const float* grad_scale;
    const float* found_inf;
    const void* lr_tensor;
    double lr;
    bool maximize;
    bool write_grads;
    std::optional<uint64_t> rounding_seed;
};

struct SGDArguments {
    double momentum;
    double dampening;
    double weight_decay;
    bool nesterov;
    bool first_step;
};

struct AdamWArguments {
    double beta1;
    double beta2;
    double eps;
    double weight_decay;
    bool decoupled_weight_decay;
    bool amsgrad;
};

}  // namespace gam_fused

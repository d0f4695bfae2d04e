// What every launch after the adversarial point does before a base rule: restore, decide, combine.

#pragma once

#include "../update_rules.h"
#include "multi_tensor.cuh"
#include "rounding.cuh"

namespace gam_fused::cuda {

// The first rows of their tables.
enum RestoredList { kParam, kBackup, kGrad, kHvp, kRestoredLists };

template <typename T>
struct RestoreRule {
    static constexpr int kLists = kBackup + 1;
    static constexpr uint32_t reads = bit(kBackup);
    static constexpr uint32_t writes = bit(kParam);
    static constexpr int kBlocks = blocks_per_multiprocessor(1);

    __device__ __forceinline__ void operator()(T (&x)[kLists], int) const { x[kParam] = x[kBackup]; }
};

template <typename T, int kRows>
__device__ __forceinline__ void restore_all(const TensorTable<kRows>& table) {
    for_each_element<T>(table, [](const ChunkOfTensor&) { return RestoreRule<T>{}; });
}

template <typename A>
struct PenaltyScalars {
    explicit PenaltyScalars(const Penalty& penalty)
        : adversarial_norm(static_cast<const A*>(penalty.adversarial_norm)),
          rho(static_cast<A>(penalty.rho)),
          alpha(static_cast<A>(penalty.alpha)),
          xi(static_cast<A>(penalty.xi)) {}

    __device__ __forceinline__ A scale() const { return penalty_scale(*adversarial_norm, rho, alpha, xi); }

    const A* adversarial_norm;
    A rho;
    A alpha;
    A xi;
};

template <typename A>
struct StepScalars {
    explicit StepScalars(const StepArguments& step)
        : penalty(step.penalty),
          grad_scale(step.grad_scale),
          found_inf(step.found_inf),
          lr_tensor(static_cast<const A*>(step.lr_tensor)),
          lr(static_cast<A>(step.lr)),
          guard_count(static_cast<int>(step.guards.size())),
          maximize(step.maximize),
          write_grads(step.write_grads) {
        if (step.guards.size() > kMaxGuards) {
            throw std::runtime_error("guards: " + std::to_string(step.guards.size()) + " tensors, expected at most " +
                                     std::to_string(kMaxGuards));
        }
        for (size_t i = 0; i < step.guards.size(); ++i) {
            guards[i] = static_cast<const A*>(step.guards[i]);
        }
    }

    // Whether the step is taken at all.
    __device__ __forceinline__ bool holds() const {
        bool holds = is_finite(*penalty.adversarial_norm) && (found_inf == nullptr || *found_inf == 0.0f);
        for (int i = 0; i < guard_count; ++i) {
            holds = holds && is_finite(*guards[i]);
        }
        return holds;
    }

    __device__ __forceinline__ A learning_rate() const { return lr_tensor == nullptr ? lr : *lr_tensor; }

    PenaltyScalars<A> penalty;
    const A* guards[kMaxGuards];
    const float* grad_scale;
    const float* found_inf;
    const A* lr_tensor;
    A lr;
    int guard_count;
    bool maximize;
    bool write_grads;
};

// The combined gradient, and what a base rule makes of it. As in torch.optim, `maximize` leaves the gradient itself
// alone.
template <typename A>
struct Combination {
    __device__ __forceinline__ explicit Combination(const StepScalars<A>& step)
        : penalty_scale(step.penalty.scale()),
          factor(step.grad_scale == nullptr ? A(1) : A(1) / A(*step.grad_scale)),
          maximize(step.maximize) {}

    __device__ __forceinline__ A operator()(A grad, A hvp) const { return combined(grad, hvp, penalty_scale) * factor; }

    __device__ __forceinline__ A downhill(A combined_grad) const { return maximize ? -combined_grad : combined_grad; }

    A penalty_scale;
    A factor;
    bool maximize;
};

}  // namespace gam_fused::cuda

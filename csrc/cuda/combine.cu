// params <- backups and, for base optimizers without a fused rule, grads <- g + α h, in one pass.

#include "step.cuh"

namespace gam_fused::cuda {
namespace {

struct NoScalars {};

template <typename T>
__global__ void __launch_bounds__(kThreads, RestoreRule<T>::kBlocks)
    restore_kernel(const __grid_constant__ TensorTable<RestoreRule<T>::kLists> table, NoScalars) {
    restore_all<T>(table);
}

template <typename T>
struct CombineRule {
    using A = accumulation_t<T>;
    static constexpr int kLists = kRestoredLists;
    static constexpr uint32_t reads = bit(kBackup) | bit(kGrad) | bit(kHvp);
    static constexpr uint32_t writes = bit(kParam) | bit(kGrad);
    static constexpr int kBlocks = blocks_per_multiprocessor(3);

    A scale;

    __device__ __forceinline__ void operator()(T (&x)[kLists], int) const {
        x[kParam] = x[kBackup];
        x[kGrad] = narrow<T>(combined(widen(x[kGrad]), widen(x[kHvp]), scale));
    }
};

template <typename T>
__global__ void __launch_bounds__(kThreads, CombineRule<T>::kBlocks)
    combine_kernel(const __grid_constant__ TensorTable<CombineRule<T>::kLists> table,
                   const __grid_constant__ PenaltyScalars<accumulation_t<T>> penalty) {
    const CombineRule<T> rule = {penalty.scale()};
    for_each_element<T>(table, [&](const ChunkOfTensor&) { return rule; });
}

}  // namespace

void restore(const Target& target, const Elements& elements, const Addresses& params, const Addresses& backups) {
    with_type(elements.dtype, [&](auto zero) {
        using T = decltype(zero);
        using Rule = RestoreRule<T>;
        launch_over_tensors<Rule::kLists, Rule::kBlocks>(target, elements.numels, {&params, &backups},
                                                         restore_kernel<T>, NoScalars{});
    });
}

void combine(const Target& target, const Elements& elements, const Restored& lists, const Penalty& penalty) {
    with_type(elements.dtype, [&](auto zero) {
        using T = decltype(zero);
        using Rule = CombineRule<T>;
        launch_over_tensors<Rule::kLists, Rule::kBlocks>(target, elements.numels,
                                                         {&lists.params, &lists.backups, &lists.grads, &lists.hvps},
                                                         combine_kernel<T>, PenaltyScalars<accumulation_t<T>>(penalty));
    });
}

}  // namespace gam_fused::cuda

// params <- θ_adv, directions <- θ: reads θ and u, writes both, in one pass.

#include "../update_rules.h"
#include "multi_tensor.cuh"

namespace gam_fused::cuda {
namespace {

template <typename A>
struct PerturbScalars {
    const A* direction_norm;
    const A* grad_norm;
    A rho;
    A xi;
};

template <typename T>
struct PerturbRule {
    using A = accumulation_t<T>;
    enum List { kParam, kDirection, kLists };
    static constexpr uint32_t reads = bit(kParam) | bit(kDirection);
    static constexpr uint32_t writes = reads;
    static constexpr int kBlocks = blocks_per_multiprocessor(2);

    A scale;
    bool does_move;

    __device__ __forceinline__ void operator()(T (&x)[kLists]) const {
        const T theta = x[kParam];
        if (does_move) {
            x[kParam] = narrow<T>(perturbed(widen(theta), widen(x[kDirection]), scale));
        }
        x[kDirection] = theta;
    }
};

template <typename T>
__global__ void __launch_bounds__(kThreads, PerturbRule<T>::kBlocks)
    perturb_kernel(const __grid_constant__ TensorTable<PerturbRule<T>::kLists> table,
                   const __grid_constant__ PerturbScalars<accumulation_t<T>> scalars) {
    const accumulation_t<T> direction_norm = *scalars.direction_norm;
    const accumulation_t<T> grad_norm = *scalars.grad_norm;
    const accumulation_t<T> scale = perturbation_scale(direction_norm, grad_norm, scalars.rho, scalars.xi);
    const PerturbRule<T> rule = {scale, moves(direction_norm, grad_norm, scale)};
    for_each_element<T>(table, [&](uint32_t) { return rule; });
}

}  // namespace

void perturb(const Target& target, const Elements& elements, const Addresses& params, const Addresses& directions,
             const void* direction_norm, const void* grad_norm, double rho, double xi) {
    with_type(elements.dtype, [&](auto zero) {
        using T = decltype(zero);
        using A = accumulation_t<T>;
        const PerturbScalars<A> scalars = {static_cast<const A*>(direction_norm), static_cast<const A*>(grad_norm),
                                           static_cast<A>(rho), static_cast<A>(xi)};
        using Rule = PerturbRule<T>;
        launch_over_tensors<Rule::kLists, Rule::kBlocks>(target, elements.numels, {&params, &directions},
                                                         perturb_kernel<T>, scalars);
    });
}

}  // namespace gam_fused::cuda

// params <- θ_adv, directions <- θ: reads θ and u, writes both, in one pass.

#include "../update_rules.h"
#include "multi_tensor.cuh"
#include "rounding.cuh"

namespace gam_fused::cuda {
namespace {

template <typename A, typename Rounding>
struct PerturbScalars {
    const A* direction_norm;
    const A* grad_norm;
    A rho;
    A xi;
    Rounding rounding;
};

template <typename T, typename Rounding>
struct PerturbRule {
    using A = accumulation_t<T>;
    enum List { kParam, kDirection, kLists };
    static constexpr uint32_t reads = bit(kParam) | bit(kDirection);
    static constexpr uint32_t writes = reads;
    // Fewer for the registers that stochastic rounding takes: none may spill.
    static constexpr int kBlocks = blocks_per_multiprocessor(2) - Rounding::kIsStochastic;

    A scale;
    bool does_move;
    typename Rounding::OfChunk rounding;

    __device__ __forceinline__ void operator()(T (&x)[kLists], int element) const {
        const T theta = x[kParam];
        if (does_move) {
            const A moved = perturbed(widen(theta), widen(x[kDirection]), scale);
            x[kParam] = rounding.template round<T>(moved, element);
        }
        x[kDirection] = theta;
    }
};

template <typename T, typename Rounding>
__global__ void __launch_bounds__(kThreads, PerturbRule<T, Rounding>::kBlocks)
    perturb_kernel(const __grid_constant__ TensorTable<PerturbRule<T, Rounding>::kLists> table,
                   const __grid_constant__ PerturbScalars<accumulation_t<T>, Rounding> scalars) {
    const accumulation_t<T> direction_norm = *scalars.direction_norm;
    const accumulation_t<T> grad_norm = *scalars.grad_norm;
    const accumulation_t<T> scale = perturbation_scale(direction_norm, grad_norm, scalars.rho, scalars.xi);
    const bool does_move = moves(direction_norm, grad_norm, scale);
    for_each_element<T>(table, [&](const ChunkOfTensor& chunk) {
        return PerturbRule<T, Rounding>{scale, does_move, scalars.rounding.of_chunk(chunk)};
    });
}

}  // namespace

void perturb(const Target& target, const Elements& elements, const Addresses& params, const Addresses& directions,
             const void* direction_norm, const void* grad_norm, double rho, double xi,
             const std::optional<uint64_t>& rounding_seed) {
    with_type(elements.dtype, [&](auto zero) {
        using T = decltype(zero);
        using A = accumulation_t<T>;
        with_rounding<T>(rounding_seed, [&](auto rounding) {
            using Rounding = decltype(rounding);
            const PerturbScalars<A, Rounding> scalars = {static_cast<const A*>(direction_norm),
                                                         static_cast<const A*>(grad_norm), static_cast<A>(rho),
                                                         static_cast<A>(xi), rounding};
            using Rule = PerturbRule<T, Rounding>;
            launch_over_tensors<Rule::kLists, Rule::kBlocks>(target, elements.numels, {&params, &directions},
                                                             perturb_kernel<T, Rounding>, scalars);
        });
    });
}

}  // namespace gam_fused::cuda

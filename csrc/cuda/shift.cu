// params <- origins + ρ (ends − starts) / (norm + ξ), in one pass over the lists that there are.

#include "../update_rules.h"
#include "multi_tensor.cuh"
#include "rounding.cuh"

namespace gam_fused::cuda {
namespace {

template <typename A, typename Rounding>
struct ShiftScalars {
    const A* norm;
    A rho;
    A xi;
    bool has_origins;
    bool has_starts;
    Rounding rounding;
};

template <typename T, typename Rounding>
struct ShiftRule {
    using A = accumulation_t<T>;
    enum List { kParam, kOrigin, kEnd, kStart, kLists };
    // Fewer for the registers that stochastic rounding takes: none may spill.
    static constexpr int kBlocks = blocks_per_multiprocessor(kLists) - Rounding::kIsStochastic;

    __device__ __forceinline__ explicit ShiftRule(const ShiftScalars<A, Rounding>& scalars)
        : reads(bit(scalars.has_origins ? kOrigin : kParam) | bit(kEnd) | (scalars.has_starts ? bit(kStart) : 0)),
          writes(bit(kParam)),
          has_origins(scalars.has_origins),
          has_starts(scalars.has_starts) {
        const A norm = *scalars.norm;
        scale = shift_scale(norm, scalars.rho, scalars.xi);
        does_move = is_finite(norm) && is_finite(scale);
    }

    __device__ __forceinline__ void operator()(T (&x)[kLists], int element) const {
        const T origin = has_origins ? x[kOrigin] : x[kParam];
        x[kParam] = origin;
        if (does_move) {
            const A end = widen(x[kEnd]);
            const A direction = has_starts ? end - widen(x[kStart]) : end;
            x[kParam] = rounding.template round<T>(perturbed(widen(origin), direction, scale), element);
        }
    }

    uint32_t reads;
    uint32_t writes;
    bool has_origins;
    bool has_starts;
    bool does_move;
    A scale;
    typename Rounding::OfChunk rounding;
};

template <typename T, typename Rounding>
__global__ void __launch_bounds__(kThreads, ShiftRule<T, Rounding>::kBlocks)
    shift_kernel(const __grid_constant__ TensorTable<ShiftRule<T, Rounding>::kLists> table,
                 const __grid_constant__ ShiftScalars<accumulation_t<T>, Rounding> scalars) {
    ShiftRule<T, Rounding> rule(scalars);
    for_each_element<T>(table, [&](const ChunkOfTensor& chunk) {
        rule.rounding = scalars.rounding.of_chunk(chunk);
        return rule;
    });
}

}  // namespace

void shift(const Target& target, const Elements& elements, const Addresses& params, const Addresses& origins,
           const Addresses& ends, const Addresses& starts, const void* norm, double rho, double xi,
           const std::optional<uint64_t>& rounding_seed) {
    with_type(elements.dtype, [&](auto zero) {
        using T = decltype(zero);
        using A = accumulation_t<T>;
        with_rounding<T>(rounding_seed, [&](auto rounding) {
            using Rounding = decltype(rounding);
            using Rule = ShiftRule<T, Rounding>;
            const ShiftScalars<A, Rounding> scalars = {static_cast<const A*>(norm),
                                                       static_cast<A>(rho),
                                                       static_cast<A>(xi),
                                                       !origins.empty(),
                                                       !starts.empty(),
                                                       rounding};
            // In the place of a list that is left out stands one that is aligned as the others are; it is not read.
            launch_over_tensors<Rule::kLists, Rule::kBlocks>(
                target, elements.numels,
                {&params, origins.empty() ? &params : &origins, &ends, starts.empty() ? &ends : &starts},
                shift_kernel<T, Rounding>, scalars);
        });
    });
}

}  // namespace gam_fused::cuda

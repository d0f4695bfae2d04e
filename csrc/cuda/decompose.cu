// The end of an accelerated step, in two operators over its four gradients. projection reads them once, for ⟨h⁻, h⁺⟩ /
// ‖h⁺‖, ‖h⁺‖ and ‖h⁻‖, in two stages as the norms of l2_norm.cu. decompose reads them once more and writes grads <- h⁺
// and grads_ahead <- h⊥.

#include "../update_rules.h"
#include "multi_tensor.cuh"
#include "scaled_sum.cuh"

namespace gam_fused::cuda {
namespace {

enum List { kGrad, kGradAhead, kAdversarialGrad, kAdversarialGradAhead, kLists };

// ---------------------------------------------------------------- projection

template <typename A>
struct MixedSums {
    ScaledSum<A> dot;  // of h⁻ and h⁺
    ScaledSum<A> plus_squared;
    ScaledSum<A> minus_squared;

    __device__ __forceinline__ static MixedSums nothing() {
        return {ScaledSum<A>::nothing(), ScaledSum<A>::nothing(), ScaledSum<A>::nothing()};
    }

    template <int kCount>
    __device__ __forceinline__ void add_elements(const A (&plus)[kCount], const A (&minus)[kCount]) {
        plus_squared.template add_squares<false>(plus);
        minus_squared.template add_squares<false>(minus);
        // Scaled as the squares are, so that a product is out of range only where one of these is.
        const int plus_exponent = plus_squared.exponent / 2;
        const int minus_exponent = minus_squared.exponent / 2;
        dot.raise_exponent(plus_exponent + minus_exponent);
        const A plus_scale = power_of_two<A>(-plus_exponent);
        const A minus_scale = power_of_two<A>(-minus_exponent);
#pragma unroll
        for (int i = 0; i < kCount; ++i) {
            dot.template add_scaled_product<false>(plus[i] * plus_scale, minus[i] * minus_scale);
        }
    }

    __device__ __forceinline__ void add(const MixedSums& other) {
        dot.add(other.dot);
        plus_squared.add(other.plus_squared);
        minus_squared.add(other.minus_squared);
    }

    __device__ __forceinline__ A projection() const {
        const A root = square_root(plus_squared.significand());
        const A quotient = root == A(0) ? root : dot.significand() / root;
        return scaled_by_two_to(quotient, dot.exponent - plus_squared.exponent / 2);
    }
};

// In thread 0 the sums over the block.
template <typename A, unsigned kBlock>
__device__ __forceinline__ MixedSums<A> sums_over_block(const MixedSums<A>& mine) {
    return {sum_over_block<A, kBlock>(mine.dot), sum_over_block<A, kBlock>(mine.plus_squared),
            sum_over_block<A, kBlock>(mine.minus_squared)};
}

template <typename A>
struct MixedScalars {
    Weights<A> weights;
    MixedSums<A>* of_chunks;
};

constexpr int kBlocks = blocks_per_multiprocessor(kLists);

template <typename T>
__global__ void __launch_bounds__(kThreads, kBlocks)
    sum_mixed_kernel(const __grid_constant__ TensorTable<kLists> table,
                     const __grid_constant__ MixedScalars<accumulation_t<T>> scalars) {
    using A = accumulation_t<T>;
    constexpr int kLanes = Pack<T>::kLanes;
    const Weights<A> weights = scalars.weights;
    for_each_chunk(table, [&](const ChunkOfTensor& chunk) {
        const T* elements[kLists];
        bool aligned = true;
#pragma unroll
        for (int list = 0; list < kLists; ++list) {
            elements[list] = static_cast<const T*>(table.address[list][chunk.tensor]) + chunk.begin;
            aligned = aligned && is_aligned(elements[list]);
        }
        MixedSums<A> mine = MixedSums<A>::nothing();
        for (int first = threadIdx.x * kLanes; first < chunk.count; first += kThreads * kLanes) {
            const bool whole = aligned && first + kLanes <= chunk.count;
            Pack<T> packs[kLists];
#pragma unroll
            for (int list = 0; list < kLists; ++list) {
                packs[list] = whole ? load_pack(elements[list], first) : load_lanes(elements[list], first, chunk.count);
            }
            A plus[kLanes];
            A minus[kLanes];
#pragma unroll
            for (int lane = 0; lane < kLanes; ++lane) {
                plus[lane] = mixed(widen(packs[kGradAhead].lane[lane]), widen(packs[kAdversarialGradAhead].lane[lane]),
                                   weights.w1, weights.w3);
                minus[lane] = mixed(widen(packs[kGrad].lane[lane]), widen(packs[kAdversarialGrad].lane[lane]),
                                    weights.w0, weights.w2);
            }
            mine.add_elements(plus, minus);
        }
        const MixedSums<A> sums = sums_over_block<A, kThreads>(mine);
        if (threadIdx.x == 0) {
            scalars.of_chunks[table.chunks_before + chunk.number] = sums;
        }
    });
}

constexpr int kFinishThreads = 512;

template <typename A>
struct Finish {
    const MixedSums<A>* of_chunks;
    int64_t chunks;
    A* projection;
    A* plus_norm;
    A* minus_norm;
};

template <typename A>
__global__ void __launch_bounds__(kFinishThreads) finish_projection_kernel(const __grid_constant__ Finish<A> finish) {
    MixedSums<A> mine = MixedSums<A>::nothing();
    for (int64_t i = threadIdx.x; i < finish.chunks; i += kFinishThreads) {
        mine.add(finish.of_chunks[i]);
    }
    const MixedSums<A> sums = sums_over_block<A, kFinishThreads>(mine);
    if (threadIdx.x == 0) {
        *finish.projection = sums.projection();
        *finish.plus_norm = sums.plus_squared.root();
        *finish.minus_norm = sums.minus_squared.root();
    }
}

// ---------------------------------------------------------------- decompose

template <typename A>
struct DecompositionScalars {
    explicit DecompositionScalars(const Decomposition& decomposition)
        : projection(static_cast<const A*>(decomposition.projection)),
          plus_norm(static_cast<const A*>(decomposition.plus_norm)),
          weights(weights_in<A>(decomposition.weights)),
          xi(static_cast<A>(decomposition.xi)) {}

    __device__ __forceinline__ A scale() const { return parallel_scale(*projection, *plus_norm, xi); }

    const A* projection;
    const A* plus_norm;
    Weights<A> weights;
    A xi;
};

template <typename T>
struct DecomposeRule {
    using A = accumulation_t<T>;
    static constexpr int kLists = List::kLists;
    static constexpr uint32_t reads = bit(kLists) - 1;
    static constexpr uint32_t writes = bit(kGrad) | bit(kGradAhead);
    static constexpr int kBlocks = blocks_per_multiprocessor(kLists);

    Weights<A> weights;
    A scale;

    __device__ __forceinline__ void operator()(T (&x)[kLists], int) const {
        const A plus = mixed(widen(x[kGradAhead]), widen(x[kAdversarialGradAhead]), weights.w1, weights.w3);
        const A minus = mixed(widen(x[kGrad]), widen(x[kAdversarialGrad]), weights.w0, weights.w2);
        x[kGrad] = narrow<T>(plus);
        x[kGradAhead] = narrow<T>(perpendicular(minus, plus, scale));
    }
};

template <typename T>
__global__ void __launch_bounds__(kThreads, DecomposeRule<T>::kBlocks)
    decompose_kernel(const __grid_constant__ TensorTable<DecomposeRule<T>::kLists> table,
                     const __grid_constant__ DecompositionScalars<accumulation_t<T>> scalars) {
    const DecomposeRule<T> rule = {scalars.weights, scalars.scale()};
    for_each_element<T>(table, [&](const ChunkOfTensor&) { return rule; });
}

}  // namespace

size_t projection_scratch_bytes(const Elements& elements) {
    const auto chunks = static_cast<size_t>(ChunkPlan(elements.numels, kCudaChunk).size());
    return chunks * (elements.dtype == Dtype::float64 ? sizeof(MixedSums<double>) : sizeof(MixedSums<float>));
}

void projection(const Target& target, const Elements& elements, const Gradients& lists, const Weights<double>& weights,
                void* scratch, const ProjectionResults& results) {
    with_type(elements.dtype, [&](auto zero) {
        using T = decltype(zero);
        using A = accumulation_t<T>;
        const MixedScalars<A> scalars = {weights_in<A>(weights), static_cast<MixedSums<A>*>(scratch)};
        launch_over_tensors<kLists, kBlocks>(
            target, elements.numels,
            {&lists.grads, &lists.grads_ahead, &lists.adversarial_grads, &lists.adversarial_grads_ahead},
            sum_mixed_kernel<T>, scalars);
        const Finish<A> finish = {scalars.of_chunks, ChunkPlan(elements.numels, kCudaChunk).size(),
                                  static_cast<A*>(results.projection), static_cast<A*>(results.plus_norm),
                                  static_cast<A*>(results.minus_norm)};
        launch_kernel(target.stream, 1, kFinishThreads, finish_projection_kernel<A>, finish);
    });
}

void decompose(const Target& target, const Elements& elements, const Gradients& lists,
               const Decomposition& decomposition) {
    with_type(elements.dtype, [&](auto zero) {
        using T = decltype(zero);
        using Rule = DecomposeRule<T>;
        launch_over_tensors<Rule::kLists, Rule::kBlocks>(
            target, elements.numels,
            {&lists.grads, &lists.grads_ahead, &lists.adversarial_grads, &lists.adversarial_grads_ahead},
            decompose_kernel<T>, DecompositionScalars<accumulation_t<T>>(decomposition));
    });
}

}  // namespace gam_fused::cuda

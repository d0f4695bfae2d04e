// Restore, combine and torch.optim.Adam or AdamW in one pass: reads backup, g, h and the moments, writes θ, the moments
// and, if asked to, the combined gradient. The steps are counted by a second kernel after all launches of the first,
// which read the count.

#include <cmath>

#include "step.cuh"

namespace gam_fused::cuda {
namespace {

template <bool kHasAmsgrad>
struct Rows {
    static constexpr int kExpAvg = kRestoredLists;
    static constexpr int kExpAvgSq = kExpAvg + 1;
    static constexpr int kMaxExpAvgSq = kExpAvgSq + 1;  // where there is one
    static constexpr int kLists = kExpAvgSq + 1 + kHasAmsgrad;
    static constexpr int kStateStep = kLists;  // one float for each tensor
    static constexpr int kRows = kLists + 1;
    static constexpr int kBlocks = blocks_per_multiprocessor(kLists - 1);  // parameters are not read
};

template <bool kHasAmsgrad>
struct Terms {
    static constexpr bool amsgrad = kHasAmsgrad;
    bool weight_decay;
    bool decoupled;
};

template <typename A, bool kHasAmsgrad, typename Rounding>
struct AdamWScalars {
    StepScalars<A> step;
    AdamW<A> adamw;
    A log_beta1;
    A log_beta2;
    Terms<kHasAmsgrad> terms;
    Rounding rounding;
};

__device__ __forceinline__ float minus_expm1(float x) {
    return -expm1f(x);
}

__device__ __forceinline__ double minus_expm1(double x) {
    return -expm1(x);
}

template <typename T, bool kHasAmsgrad, typename Rounding>
struct AdamWRule : Rows<kHasAmsgrad> {
    using A = accumulation_t<T>;
    using R = Rows<kHasAmsgrad>;
    using R::kLists;
    static constexpr uint32_t moments = bit(R::kExpAvg) | bit(R::kExpAvgSq) | (kHasAmsgrad ? bit(R::kMaxExpAvgSq) : 0u);
    static constexpr uint32_t reads = bit(kBackup) | bit(kGrad) | bit(kHvp) | moments;

    // `state_step` counts the steps before this one.
    __device__ __forceinline__ AdamWRule(const AdamWScalars<A, kHasAmsgrad, Rounding>& scalars,
                                         const ChunkOfTensor& chunk, float state_step)
        : writes(bit(kParam) | moments | (scalars.step.write_grads ? bit(kGrad) : 0u)),
          combination(scalars.step),
          adamw(scalars.adamw),
          terms(scalars.terms),
          rounding(scalars.rounding.of_chunk(chunk)) {
        adamw.lr = scalars.step.learning_rate();
        const A step = state_step + 1;
        corrections = {minus_expm1(step * scalars.log_beta1), square_root(minus_expm1(step * scalars.log_beta2))};
    }

    __device__ __forceinline__ void operator()(T (&x)[kLists], int element) const {
        const A grad = combination(widen(x[kGrad]), widen(x[kHvp]));
        A theta = widen(x[kBackup]);
        A exp_avg = widen(x[R::kExpAvg]);
        A exp_avg_sq = widen(x[R::kExpAvgSq]);
        A max_exp_avg_sq = 0;
        if constexpr (kHasAmsgrad) {
            max_exp_avg_sq = widen(x[R::kMaxExpAvgSq]);
        }
        gam_fused::adamw_step(theta, exp_avg, exp_avg_sq, max_exp_avg_sq, combination.downhill(grad), adamw,
                              corrections, terms);
        x[kParam] = rounding.template round<T>(theta, element);
        x[kGrad] = narrow<T>(grad);
        x[R::kExpAvg] = narrow<T>(exp_avg);
        x[R::kExpAvgSq] = narrow<T>(exp_avg_sq);
        if constexpr (kHasAmsgrad) {
            x[R::kMaxExpAvgSq] = narrow<T>(max_exp_avg_sq);
        }
    }

    uint32_t writes;
    Combination<A> combination;
    AdamW<A> adamw;
    BiasCorrections<A> corrections;
    Terms<kHasAmsgrad> terms;
    typename Rounding::OfChunk rounding;
};

template <typename T, bool kHasAmsgrad, typename Rounding>
__global__ void __launch_bounds__(kThreads, Rows<kHasAmsgrad>::kBlocks)
    adamw_kernel(const __grid_constant__ TensorTable<Rows<kHasAmsgrad>::kRows> table,
                 const __grid_constant__ AdamWScalars<accumulation_t<T>, kHasAmsgrad, Rounding> scalars) {
    if (!scalars.step.holds()) {
        restore_all<T>(table);
        return;
    }
    for_each_element<T>(table, [&](const ChunkOfTensor& chunk) {
        const void* const state_step = table.address[Rows<kHasAmsgrad>::kStateStep][chunk.tensor];
        return AdamWRule<T, kHasAmsgrad, Rounding>(scalars, chunk, *static_cast<const float*>(state_step));
    });
}

// One thread for each tensor's count.
template <typename A>
__global__ void __launch_bounds__(kThreads)
    count_step_kernel(const __grid_constant__ TensorTable<1> state_steps, const __grid_constant__ StepScalars<A> step) {
    if (!step.holds()) {
        return;
    }
    for (uint32_t i = blockIdx.x * kThreads + threadIdx.x; i < state_steps.tensors; i += gridDim.x * kThreads) {
        *static_cast<float*>(state_steps.address[0][i]) += 1.0f;
    }
}

template <typename T, bool kHasAmsgrad>
void launch(const Target& target, const std::vector<int64_t>& numels,
            const std::array<const Addresses*, Rows<kHasAmsgrad>::kRows>& rows, const StepArguments& step,
            const AdamWArguments& adamw) {
    using A = accumulation_t<T>;
    const StepScalars<A> common(step);
    with_rounding<T>(step.rounding_seed, [&](auto rounding) {
        using Rounding = decltype(rounding);
        const AdamWScalars<A, kHasAmsgrad, Rounding> scalars = {
            common,
            {common.lr, static_cast<A>(adamw.beta2), static_cast<A>(1 - adamw.beta1), static_cast<A>(1 - adamw.beta2),
             static_cast<A>(adamw.eps), static_cast<A>(adamw.weight_decay)},
            static_cast<A>(std::log(adamw.beta1)),
            static_cast<A>(std::log(adamw.beta2)),
            {adamw.weight_decay != 0, adamw.decoupled_weight_decay},
            rounding};
        launch_over_tensors<Rows<kHasAmsgrad>::kRows, Rows<kHasAmsgrad>::kBlocks>(
            target, numels, rows, adamw_kernel<T, kHasAmsgrad, Rounding>, scalars);
    });

    const Addresses& state_steps = *rows[Rows<kHasAmsgrad>::kStateStep];
    const std::vector<int64_t> one_each(state_steps.size(), 1);
    launch_over_tensors<1, 1>(target, one_each, {&state_steps}, count_step_kernel<A>, common);
}

}  // namespace

void adamw_step(const Target& target, const Elements& elements, const Restored& lists, const AdamWState& state,
                const StepArguments& step, const AdamWArguments& adamw) {
    with_type(elements.dtype, [&](auto zero) {
        using T = decltype(zero);
        if (state.max_exp_avg_sqs.empty()) {
            launch<T, false>(target, elements.numels,
                             {&lists.params, &lists.backups, &lists.grads, &lists.hvps, &state.exp_avgs,
                              &state.exp_avg_sqs, &state.state_steps},
                             step, adamw);
        } else {
            launch<T, true>(target, elements.numels,
                            {&lists.params, &lists.backups, &lists.grads, &lists.hvps, &state.exp_avgs,
                             &state.exp_avg_sqs, &state.max_exp_avg_sqs, &state.state_steps},
                            step, adamw);
        }
    });
}

}  // namespace gam_fused::cuda

// Restore, combine and torch.optim.SGD in one pass: reads backup, g, h and the momentum buffer, writes θ, the buffer
// and, if asked to, the combined gradient.

#include "step.cuh"

namespace gam_fused::cuda {
namespace {

constexpr int kMomentum = kRestoredLists;

template <bool kHasMomentum>
struct Terms {
    static constexpr bool momentum = kHasMomentum;
    bool weight_decay;
    bool nesterov;
    bool first_step;
};

template <typename A, bool kHasMomentum, typename Rounding>
struct SGDScalars {
    StepScalars<A> step;
    SGD<A> sgd;
    Terms<kHasMomentum> terms;
    Rounding rounding;
};

template <typename T, bool kHasMomentum, typename Rounding>
struct SGDRule {
    using A = accumulation_t<T>;
    static constexpr int kLists = kHasMomentum ? kMomentum + 1 : kRestoredLists;
    static constexpr int kBlocks = blocks_per_multiprocessor(kLists - 1);  // parameters are not read

    __device__ __forceinline__ explicit SGDRule(const SGDScalars<A, kHasMomentum, Rounding>& scalars)
        : reads(bit(kBackup) | bit(kGrad) | bit(kHvp)),
          writes(bit(kParam)),
          combination(scalars.step),
          sgd(scalars.sgd),
          terms(scalars.terms) {
        sgd.lr = scalars.step.learning_rate();
        if (scalars.step.write_grads) {
            writes |= bit(kGrad);
        }
        if (kHasMomentum) {
            writes |= bit(kMomentum);
            if (!terms.first_step) {
                reads |= bit(kMomentum);
            }
        }
    }

    __device__ __forceinline__ void operator()(T (&x)[kLists], int element) const {
        const A grad = combination(widen(x[kGrad]), widen(x[kHvp]));
        A theta = widen(x[kBackup]);
        A buffer = 0;
        if constexpr (kHasMomentum) {
            buffer = widen(x[kMomentum]);
        }
        sgd_step(theta, buffer, combination.downhill(grad), sgd, terms);
        x[kParam] = rounding.template round<T>(theta, element);
        x[kGrad] = narrow<T>(grad);
        if constexpr (kHasMomentum) {
            x[kMomentum] = narrow<T>(buffer);
        }
    }

    uint32_t reads;
    uint32_t writes;
    Combination<A> combination;
    SGD<A> sgd;
    Terms<kHasMomentum> terms;
    typename Rounding::OfChunk rounding;
};

template <typename T, bool kHasMomentum, typename Rounding>
__global__ void __launch_bounds__(kThreads, SGDRule<T, kHasMomentum, Rounding>::kBlocks)
    sgd_kernel(const __grid_constant__ TensorTable<SGDRule<T, kHasMomentum, Rounding>::kLists> table,
               const __grid_constant__ SGDScalars<accumulation_t<T>, kHasMomentum, Rounding> scalars) {
    if (!scalars.step.holds()) {
        restore_all<T>(table);
        return;
    }
    SGDRule<T, kHasMomentum, Rounding> rule(scalars);
    for_each_element<T>(table, [&](const ChunkOfTensor& chunk) {
        rule.rounding = scalars.rounding.of_chunk(chunk);
        return rule;
    });
}

}  // namespace

void sgd_step(const Target& target, const Elements& elements, const Restored& lists, const Addresses& momentum_buffers,
              const StepArguments& step, const SGDArguments& sgd) {
    with_type(elements.dtype, [&](auto zero) {
        using T = decltype(zero);
        using A = accumulation_t<T>;
        const StepScalars<A> common(step);
        const SGD<A> numbers = {common.lr, static_cast<A>(sgd.weight_decay), static_cast<A>(sgd.momentum),
                                static_cast<A>(1 - sgd.dampening)};
        const bool has_decay = sgd.weight_decay != 0;
        with_rounding<T>(step.rounding_seed, [&](auto rounding) {
            using Rounding = decltype(rounding);
            if (sgd.momentum != 0) {
                using Rule = SGDRule<T, true, Rounding>;
                const SGDScalars<A, true, Rounding> scalars = {
                    common, numbers, {has_decay, sgd.nesterov, sgd.first_step}, rounding};
                launch_over_tensors<Rule::kLists, Rule::kBlocks>(
                    target, elements.numels,
                    {&lists.params, &lists.backups, &lists.grads, &lists.hvps, &momentum_buffers},
                    sgd_kernel<T, true, Rounding>, scalars);
            } else {
                using Rule = SGDRule<T, false, Rounding>;
                const SGDScalars<A, false, Rounding> scalars = {common, numbers, {has_decay, false, false}, rounding};
                launch_over_tensors<Rule::kLists, Rule::kBlocks>(
                    target, elements.numels, {&lists.params, &lists.backups, &lists.grads, &lists.hvps},
                    sgd_kernel<T, false, Rounding>, scalars);
            }
        });
    });
}

}  // namespace gam_fused::cuda

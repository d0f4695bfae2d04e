// The loops of chunk_kernels.h, included once per instruction set by files that define GAM_FUSED_SET (a namespace) and
// have told the compiler which instructions it may use, and this file by GAM_FUSED_HAS_F16C and GAM_FUSED_STREAM_BYTES
// (the width of a streaming store, 0 for none): g++ does not define __F16C__ and the like for a target set by a pragma.
// No function of the standard library is called here: compiled for a newer processor, it might replace the same
// function in other files.
//
// Elements are widened into blocks that stay in the first-level cache, computed there in the accumulation type by the
// rules of update_rules.h, and rounded once on the way back. Every loop is one that compilers vectorise. Lanes are
// added up in an order that is the same for every set.

namespace gam_fused::cpu::GAM_FUSED_SET {

// Lists of large tensors lie at equal places within their pages, so that all of their elements of an index, and a block
// of theirs, compete for the same lines of a first-level cache: blocks are a small part of one.
constexpr int64_t kBlock = 256;

// Before a loop in which no element depends on another of another index, which a compiler could not know. Two names may
// stand for one list.
#if defined(__clang__)
#define GAM_FUSED_INDEPENDENT _Pragma("clang loop vectorize(assume_safety)")
#else
#define GAM_FUSED_INDEPENDENT _Pragma("GCC ivdep")
#endif

template <typename T>
void load(accumulation_t<T>* __restrict block, const T* __restrict from, int64_t size) {
    for (int64_t i = 0; i < size; ++i) {
        block[i] = widen(from[i]);
    }
}

template <typename T>
void store(T* __restrict to, const accumulation_t<T>* __restrict block, int64_t size) {
    for (int64_t i = 0; i < size; ++i) {
        to[i] = narrow<T>(block[i]);
    }
}

// Not inlined: one loop serves all rules. Its counter is as wide as the numbers it is mixed into.
template <typename T>
__attribute__((noinline)) void draw_block(float* __restrict block, const RandomChunk& chunk, int64_t begin,
                                          int64_t size) {
    const RandomChunk random = chunk;
    const auto first = static_cast<uint32_t>(begin), count = static_cast<uint32_t>(size);
    for (uint32_t i = 0; i < count; ++i) {
        block[i] = draw<T>(block[i], random[first + i]);
    }
}

#if defined(GAM_FUSED_HAS_F16C)
template <>
void load<float16>(float* __restrict block, const float16* __restrict from, int64_t size) {
    int64_t i = 0;
    for (; i + 8 <= size; i += 8) {
        const __m128i halves = _mm_loadu_si128(reinterpret_cast<const __m128i*>(from + i));
        _mm256_storeu_ps(block + i, _mm256_cvtph_ps(halves));
    }
    for (; i < size; ++i) {
        block[i] = widen(from[i]);
    }
}

template <>
void store<float16>(float16* __restrict to, const float* __restrict block, int64_t size) {
    int64_t i = 0;
    for (; i + 8 <= size; i += 8) {
        const __m128i halves = _mm256_cvtps_ph(_mm256_loadu_ps(block + i), _MM_FROUND_TO_NEAREST_INT);
        _mm_storeu_si128(reinterpret_cast<__m128i*>(to + i), halves);
    }
    for (; i < size; ++i) {
        to[i] = narrow<float16>(block[i]);
    }
}
#endif

// Elements in the accumulation type: themselves where they have it, otherwise widened into the block.
template <typename T>
inline __attribute__((always_inline)) const accumulation_t<T>* view(accumulation_t<T>* block, const T* from,
                                                                    int64_t size) {
    if constexpr (sizeof(T) == sizeof(accumulation_t<T>)) {
        return from;
    } else {
        load(block, from, size);
        return block;
    }
}

// The same for elements that are read and written, or only written; put_back() ends it.
template <typename T>
inline __attribute__((always_inline)) accumulation_t<T>* editable(accumulation_t<T>* block, T* from, int64_t size,
                                                                  bool is_read = true) {
    if constexpr (sizeof(T) == sizeof(accumulation_t<T>)) {
        return from;
    } else {
        if (is_read) {
            load(block, from, size);
        }
        return block;
    }
}

template <typename T>
inline __attribute__((always_inline)) void put_back(T* to, const accumulation_t<T>* block, int64_t size) {
    if constexpr (sizeof(T) != sizeof(accumulation_t<T>)) {
        store(to, block, size);
    }
}

#if GAM_FUSED_STREAM_BYTES == 64
typedef __m512i Line;
inline __attribute__((always_inline)) void stream_line(void* to, const void* from) {
    _mm512_stream_si512(static_cast<__m512i*>(to), _mm512_loadu_si512(from));
}
#elif GAM_FUSED_STREAM_BYTES == 32
typedef __m256i Line;
inline __attribute__((always_inline)) void stream_line(void* to, const void* from) {
    _mm256_stream_si256(static_cast<__m256i*>(to), _mm256_loadu_si256(static_cast<const __m256i*>(from)));
}
#elif GAM_FUSED_STREAM_BYTES == 16
typedef __m128i Line;
inline __attribute__((always_inline)) void stream_line(void* to, const void* from) {
    _mm_stream_si128(static_cast<__m128i*>(to), _mm_loadu_si128(static_cast<const __m128i*>(from)));
}
#endif

// Bit for bit: a copy through the accumulation type would make a signalling NaN quiet.
void copy(void* __restrict to, const void* __restrict from, int64_t bytes, bool is_streaming) {
    auto* target = static_cast<char*>(to);
    const auto* source = static_cast<const char*>(from);
#if GAM_FUSED_STREAM_BYTES
    if (is_streaming) {
        constexpr auto kLine = static_cast<int64_t>(sizeof(Line));
        const auto misalignment = static_cast<int64_t>(reinterpret_cast<uintptr_t>(to) % sizeof(Line));
        const int64_t head = misalignment == 0 ? 0 : kLine - misalignment;
        if (head + kLine <= bytes) {
            __builtin_memcpy(target, source, static_cast<size_t>(head));
            int64_t i = head;
            for (; i + kLine <= bytes; i += kLine) {
                stream_line(target + i, source + i);
            }
            __builtin_memcpy(target + i, source + i, static_cast<size_t>(bytes - i));
            return;
        }
    }
#endif
    (void)is_streaming;
    __builtin_memcpy(target, source, static_cast<size_t>(bytes));
}

// Streaming stores are ordered among themselves and everything else only by this.
inline __attribute__((always_inline)) void finish_streaming(bool is_streaming) {
#if GAM_FUSED_STREAM_BYTES
    if (is_streaming) {
        _mm_sfence();
    }
#endif
    (void)is_streaming;
}

// One whole chunk.
void copy_chunk(void* to, const void* from, int64_t bytes, bool is_streaming) {
    copy(to, from, bytes, is_streaming);
    finish_streaming(is_streaming);
}

template <typename T>
inline __attribute__((always_inline)) void store_param(T* __restrict to, const accumulation_t<T>* __restrict block,
                                                       int64_t size, bool is_streaming) {
    if (!is_streaming) {
        store(to, block, size);
    } else if constexpr (sizeof(T) == sizeof(accumulation_t<T>)) {
        copy(to, block, size * static_cast<int64_t>(sizeof(T)), true);
    } else {
        T narrowed[kBlock];
        store(narrowed, block, size);
        copy(to, narrowed, size * static_cast<int64_t>(sizeof(T)), true);
    }
}

// Before a block of parameters is stored: what stochastic rounding makes of them, if it is asked for. `begin` counts
// through the chunk.
template <typename T>
inline __attribute__((always_inline)) void draw_params(accumulation_t<T>* block, const RandomChunk* random,
                                                       int64_t begin, int64_t size) {
    if constexpr (sizeof(T) < sizeof(accumulation_t<T>)) {
        if (random != nullptr) {
            draw_block<T>(block, *random, begin, size);
        }
    }
}

// function(begin, size) for the blocks of a chunk.
template <typename Function>
inline __attribute__((always_inline)) void for_each_block(int64_t size, const Function& function) {
    for (int64_t begin = 0; begin < size; begin += kBlock) {
        function(begin, size - begin < kBlock ? size - begin : kBlock);
    }
}

// ---------------------------------------------------------------- norm

constexpr int kLanes = 8;
typedef double Lanes __attribute__((vector_size(kLanes * sizeof(double))));
typedef float FloatLanes __attribute__((vector_size(kLanes * sizeof(float))));

// By reference: how a vector is returned depends on the instruction set.
inline __attribute__((always_inline)) void load_lanes(Lanes& lanes, const double* from) {
    __builtin_memcpy(&lanes, from, sizeof lanes);
}

inline __attribute__((always_inline)) void load_lanes(Lanes& lanes, const float* from) {
    FloatLanes narrow_lanes;
    __builtin_memcpy(&narrow_lanes, from, sizeof narrow_lanes);
    lanes = __builtin_convertvector(narrow_lanes, Lanes);
}

template <typename A>
inline __attribute__((always_inline)) void add_products(Lanes& sum, const A* a, const A* b) {
    Lanes first, second;
    load_lanes(first, a);
    load_lanes(second, b);
    sum += first * second;
}

// function(k, a + i, b + i) for eight numbers after another, k from 0 to 3 in turns; zeros follow the last.
template <typename A, typename Function>
inline __attribute__((always_inline)) void for_each_lanes(const A* a, const A* b, int64_t size,
                                                          const Function& function) {
    int64_t i = 0;
    for (; i + 4 * kLanes <= size; i += 4 * kLanes) {
        function(0, a + i, b + i);
        function(1, a + i + kLanes, b + i + kLanes);
        function(2, a + i + 2 * kLanes, b + i + 2 * kLanes);
        function(3, a + i + 3 * kLanes, b + i + 3 * kLanes);
    }
    for (; i < size; i += kLanes) {
        A rest_of_a[kLanes] = {}, rest_of_b[kLanes] = {};
        const auto bytes = sizeof(A) * static_cast<size_t>(size - i < kLanes ? size - i : kLanes);
        __builtin_memcpy(rest_of_a, a + i, bytes);
        __builtin_memcpy(rest_of_b, b + i, bytes);
        function(0, rest_of_a, rest_of_b);
    }
}

// Four accumulators of eight lanes each, so that additions need not wait for one another.
struct SumOfProducts {
    Lanes sums[4] = {};

    // a[i] * b[i], of squares where both are the same
    template <typename A>
    inline __attribute__((always_inline)) void add(const A* a, const A* b, int64_t size) {
        SumOfProducts local = *this;
        for_each_lanes(a, b, size, [&](int k, const A* x, const A* y) { add_products(local.sums[k], x, y); });
        *this = local;
    }

    double total() const {
        const Lanes lanes = (sums[0] + sums[1]) + (sums[2] + sums[3]);
        return ((lanes[0] + lanes[4]) + (lanes[1] + lanes[5])) + ((lanes[2] + lanes[6]) + (lanes[3] + lanes[7]));
    }
};

template <typename T>
double sum_of_squares_of(const T* tensor, int64_t size) {
    SumOfProducts sum;
    for_each_block(size, [&](int64_t begin, int64_t block_size) {
        accumulation_t<T> block[kBlock];
        const accumulation_t<T>* const values = view(block, tensor + begin, block_size);
        sum.add(values, values, block_size);
    });
    return sum.total();
}

double sum_of_squares(Dtype dtype, const void* tensor, int64_t size) {
    return with_type(dtype,
                     [&](auto type) { return sum_of_squares_of(static_cast<const decltype(type)*>(tensor), size); });
}

template <typename T>
double sum_of_squared_differences_of(const T* end, const T* start, int64_t size) {
    using A = accumulation_t<T>;
    SumOfProducts sum;
    for_each_block(size, [&](int64_t begin, int64_t block_size) {
        A end_block[kBlock], start_block[kBlock], differences[kBlock];
        const A* const e = view(end_block, end + begin, block_size);
        const A* const s = view(start_block, start + begin, block_size);
        for (int64_t i = 0; i < block_size; ++i) {
            differences[i] = e[i] - s[i];
        }
        sum.add(differences, differences, block_size);
    });
    return sum.total();
}

double sum_of_squared_differences(Dtype dtype, const void* end, const void* start, int64_t size) {
    return with_type(dtype, [&](auto type) {
        using T = decltype(type);
        return sum_of_squared_differences_of(static_cast<const T*>(end), static_cast<const T*>(start), size);
    });
}

// ---------------------------------------------------------------- perturb, shift and combine

template <typename T>
void perturb_of(T* __restrict param, T* __restrict direction, int64_t size, accumulation_t<T> scale, bool moves,
                const RandomChunk* random) {
    using A = accumulation_t<T>;
    if (!moves) {
        copy(direction, param, size * static_cast<int64_t>(sizeof(T)), false);
        return;
    }
    for_each_block(size, [&](int64_t begin, int64_t block_size) {
        A theta_block[kBlock], u_block[kBlock], moved[kBlock];
        const A* theta = view(theta_block, param + begin, block_size);
        const A* u = view(u_block, direction + begin, block_size);
        for (int64_t i = 0; i < block_size; ++i) {
            moved[i] = perturbed(theta[i], u[i], scale);
        }
        copy(direction + begin, param + begin, block_size * static_cast<int64_t>(sizeof(T)), false);
        draw_params<T>(moved, random, begin, block_size);
        store(param + begin, moved, block_size);
    });
}

void perturb(Dtype dtype, void* param, void* direction, int64_t size, double scale, bool moves,
             const RandomChunk* random) {
    with_type(dtype, [&](auto type) {
        using T = decltype(type);
        perturb_of(static_cast<T*>(param), static_cast<T*>(direction), size, static_cast<accumulation_t<T>>(scale),
                   moves, random);
    });
}

template <typename T>
void shift_of(T* param, const T* origin, const T* end, const T* start, int64_t size, accumulation_t<T> scale,
              const RandomChunk* random) {
    using A = accumulation_t<T>;
    for_each_block(size, [&](int64_t begin, int64_t block_size) {
        A origin_block[kBlock], end_block[kBlock], start_block[kBlock], moved[kBlock];
        const A* const from = view(origin_block, origin + begin, block_size);
        const A* const e = view(end_block, end + begin, block_size);
        if (start == nullptr) {
            for (int64_t i = 0; i < block_size; ++i) {
                moved[i] = perturbed(from[i], e[i], scale);
            }
        } else {
            const A* const s = view(start_block, start + begin, block_size);
            for (int64_t i = 0; i < block_size; ++i) {
                moved[i] = perturbed(from[i], e[i] - s[i], scale);
            }
        }
        draw_params<T>(moved, random, begin, block_size);
        store(param + begin, moved, block_size);
    });
}

void shift(Dtype dtype, void* param, const void* origin, const void* end, const void* start, int64_t size, double scale,
           const RandomChunk* random) {
    with_type(dtype, [&](auto type) {
        using T = decltype(type);
        shift_of(static_cast<T*>(param), static_cast<const T*>(origin), static_cast<const T*>(end),
                 static_cast<const T*>(start), size, static_cast<accumulation_t<T>>(scale), random);
    });
}

template <typename T>
void combine_of(T* __restrict grad, const T* __restrict hvp, int64_t size, accumulation_t<T> scale) {
    using A = accumulation_t<T>;
    for_each_block(size, [&](int64_t begin, int64_t block_size) {
        A g_block[kBlock], h_block[kBlock];
        A* __restrict g = editable(g_block, grad + begin, block_size);
        const A* __restrict h = view(h_block, hvp + begin, block_size);
        for (int64_t i = 0; i < block_size; ++i) {
            g[i] = combined(g[i], h[i], scale);
        }
        put_back(grad + begin, g, block_size);
    });
}

void combine(Dtype dtype, void* param, const void* backup, void* grad, const void* hvp, int64_t size, double scale,
             bool is_streaming) {
    with_type(dtype, [&](auto type) {
        using T = decltype(type);
        copy(param, backup, size * static_cast<int64_t>(sizeof(T)), is_streaming);
        combine_of(static_cast<T*>(grad), static_cast<const T*>(hvp), size, static_cast<accumulation_t<T>>(scale));
    });
    finish_streaming(is_streaming);
}

// ---------------------------------------------------------------- decompose

// h⁺ and h⁻ of a block that begins there.
template <typename T>
inline __attribute__((always_inline)) void mix_block(accumulation_t<T>* __restrict plus,
                                                     accumulation_t<T>* __restrict minus, const GradientsChunk& chunk,
                                                     int64_t begin, int64_t size,
                                                     const Weights<accumulation_t<T>>& weights) {
    using A = accumulation_t<T>;
    A block0[kBlock], block1[kBlock], block2[kBlock], block3[kBlock];
    const A* const g0 = view(block0, static_cast<const T*>(chunk.grad) + begin, size);
    const A* const g1 = view(block1, static_cast<const T*>(chunk.grad_ahead) + begin, size);
    const A* const g2 = view(block2, static_cast<const T*>(chunk.adversarial_grad) + begin, size);
    const A* const g3 = view(block3, static_cast<const T*>(chunk.adversarial_grad_ahead) + begin, size);
    for (int64_t i = 0; i < size; ++i) {
        plus[i] = mixed(g1[i], g3[i], weights.w1, weights.w3);
    }
    for (int64_t i = 0; i < size; ++i) {
        minus[i] = mixed(g0[i], g2[i], weights.w0, weights.w2);
    }
}

// What a SumOfProducts each of minus · plus, plus · plus and minus · minus would add up, to the bit, but every number
// is loaded and widened once: conversions are most of the work.
struct SumsOfProducts {
    SumOfProducts dot, plus_squared, minus_squared;

    template <typename A>
    inline __attribute__((always_inline)) void add(const A* plus, const A* minus, int64_t size) {
        SumsOfProducts local = *this;
        for_each_lanes(plus, minus, size, [&](int k, const A* p, const A* m) {
            Lanes plus_lanes, minus_lanes;
            load_lanes(plus_lanes, p);
            load_lanes(minus_lanes, m);
            local.dot.sums[k] += minus_lanes * plus_lanes;
            local.plus_squared.sums[k] += plus_lanes * plus_lanes;
            local.minus_squared.sums[k] += minus_lanes * minus_lanes;
        });
        *this = local;
    }
};

template <typename T>
MixedSums mixed_sums_of(const GradientsChunk& chunk, int64_t size, const Weights<double>& exact_weights) {
    const auto weights = weights_in<accumulation_t<T>>(exact_weights);
    SumsOfProducts sums;
    for_each_block(size, [&](int64_t begin, int64_t block_size) {
        accumulation_t<T> plus[kBlock], minus[kBlock];
        mix_block<T>(plus, minus, chunk, begin, block_size, weights);
        sums.add(plus, minus, block_size);
    });
    return {sums.dot.total(), sums.plus_squared.total(), sums.minus_squared.total()};
}

MixedSums mixed_sums(Dtype dtype, const GradientsChunk& chunk, int64_t size, const Weights<double>& weights) {
    return with_type(dtype, [&](auto type) { return mixed_sums_of<decltype(type)>(chunk, size, weights); });
}

template <typename T>
void decompose_of(const GradientsChunk& chunk, int64_t size, const Weights<double>& exact_weights,
                  accumulation_t<T> scale) {
    const auto weights = weights_in<accumulation_t<T>>(exact_weights);
    for_each_block(size, [&](int64_t begin, int64_t block_size) {
        accumulation_t<T> plus[kBlock], minus[kBlock];
        mix_block<T>(plus, minus, chunk, begin, block_size, weights);
        for (int64_t i = 0; i < block_size; ++i) {
            minus[i] = perpendicular(minus[i], plus[i], scale);
        }
        store(static_cast<T*>(chunk.grad) + begin, plus, block_size);
        store(static_cast<T*>(chunk.grad_ahead) + begin, minus, block_size);
    });
}

void decompose(Dtype dtype, const GradientsChunk& chunk, int64_t size, const Weights<double>& weights, double scale) {
    with_type(dtype, [&](auto type) {
        using T = decltype(type);
        decompose_of<T>(chunk, size, weights, static_cast<accumulation_t<T>>(scale));
    });
}

// The gradient that a base rule steps along, element by element; left in `result` as well.
template <typename A>
struct CombinedGrad {
    const A* grad;
    const A* hvp;
    A* result;
    A scale;
    A factor;
    bool maximize;

    inline __attribute__((always_inline)) A operator()(int64_t i) const {
        const A d = combined(grad[i], hvp[i], scale) * factor;
        result[i] = d;
        return maximize ? -d : d;
    }
};

// Of a block that begins there. The results end up in the gradients, if they are asked for, or nowhere.
template <typename T>
struct CombinedBlock {
    using A = accumulation_t<T>;

    template <typename Chunk>
    inline __attribute__((always_inline)) CombinedGrad<A> open(const Chunk& chunk, int64_t begin, int64_t size,
                                                               const Combination& combination) {
        A* const g = editable(g_block, static_cast<T*>(chunk.grad) + begin, size);
        const A* const h = view(h_block, static_cast<const T*>(chunk.hvp) + begin, size);
        return {g,
                h,
                combination.write_grads ? g : d_block,
                static_cast<A>(combination.penalty_scale),
                static_cast<A>(combination.factor),
                combination.maximize};
    }

    template <typename Chunk>
    inline __attribute__((always_inline)) void close(const Chunk& chunk, int64_t begin, int64_t size,
                                                     const Combination& combination) {
        if (combination.write_grads) {
            put_back(static_cast<T*>(chunk.grad) + begin, g_block, size);
        }
    }

    A g_block[kBlock], h_block[kBlock], d_block[kBlock];
};

// ---------------------------------------------------------------- base rules

// Which terms there are, known while compiling, so that loops hold no branch.
template <bool kWeightDecay, bool kMomentum, bool kNesterov, bool kFirstStep>
struct ConstantSGDTerms {
    static constexpr bool weight_decay = kWeightDecay, momentum = kMomentum, nesterov = kNesterov;
    static constexpr bool first_step = kFirstStep;
};

template <bool kWeightDecay, bool kDecoupled, bool kAmsgrad>
struct ConstantAdamWTerms {
    static constexpr bool weight_decay = kWeightDecay, decoupled = kDecoupled, amsgrad = kAmsgrad;
};

// function(constant terms) for terms known only now.
template <typename Function>
inline __attribute__((always_inline)) void with_constants(const SGDTerms& terms, const Function& function) {
    const auto with_weight_decay = [&](auto decays) {
        constexpr bool kDecays = decltype(decays)::weight_decay;
        if (!terms.momentum) {
            function(ConstantSGDTerms<kDecays, false, false, false>{});
        } else if (terms.first_step) {
            terms.nesterov ? function(ConstantSGDTerms<kDecays, true, true, true>{})
                           : function(ConstantSGDTerms<kDecays, true, false, true>{});
        } else {
            terms.nesterov ? function(ConstantSGDTerms<kDecays, true, true, false>{})
                           : function(ConstantSGDTerms<kDecays, true, false, false>{});
        }
    };
    terms.weight_decay ? with_weight_decay(ConstantSGDTerms<true, false, false, false>{})
                       : with_weight_decay(ConstantSGDTerms<false, false, false, false>{});
}

template <typename Function>
inline __attribute__((always_inline)) void with_constants(const AdamWTerms& terms, const Function& function) {
    const auto with_amsgrad = [&](auto has) {
        constexpr bool kAmsgrad = decltype(has)::amsgrad;
        if (!terms.weight_decay) {
            function(ConstantAdamWTerms<false, false, kAmsgrad>{});
        } else {
            terms.decoupled ? function(ConstantAdamWTerms<true, true, kAmsgrad>{})
                            : function(ConstantAdamWTerms<true, false, kAmsgrad>{});
        }
    };
    terms.amsgrad ? with_amsgrad(ConstantAdamWTerms<false, false, true>{})
                  : with_amsgrad(ConstantAdamWTerms<false, false, false>{});
}

// The loops of base rules go over their lists once, where elements need not be widened: a block in between costs more
// than the arithmetic. The constants are made within, where no list can overlap them.

template <typename T, typename Terms>
void sgd_step_of(const SGDChunk& chunk, int64_t size, const SGDLaunch& launch, const RandomChunk* random, Terms terms) {
    using A = accumulation_t<T>;
    for_each_block(size, [&](int64_t begin, int64_t block_size) {
        const SGD<A> sgd = {static_cast<A>(launch.sgd.lr), static_cast<A>(launch.sgd.weight_decay),
                            static_cast<A>(launch.sgd.momentum), static_cast<A>(launch.sgd.one_minus_dampening)};
        A theta[kBlock], backup_block[kBlock], buffer_block[kBlock];
        T* const buffers = Terms::momentum ? static_cast<T*>(chunk.momentum_buffer) + begin : nullptr;
        const A* const backup = view(backup_block, static_cast<const T*>(chunk.backup) + begin, block_size);
        CombinedBlock<T> block;
        const CombinedGrad<A> grad = block.open(chunk, begin, block_size, launch.combination);
        A* const buffer =
            Terms::momentum ? editable(buffer_block, buffers, block_size, !Terms::first_step) : buffer_block;
        GAM_FUSED_INDEPENDENT
        for (int64_t i = 0; i < block_size; ++i) {
            A stepped = backup[i];
            sgd_step(stepped, buffer[i], grad(i), sgd, terms);
            theta[i] = stepped;
        }
        if constexpr (Terms::momentum) {
            put_back(buffers, buffer, block_size);
        }
        block.close(chunk, begin, block_size, launch.combination);
        draw_params<T>(theta, random, begin, block_size);
        store_param(static_cast<T*>(chunk.param) + begin, theta, block_size, launch.combination.is_streaming);
    });
}

void sgd_step(Dtype dtype, const SGDChunk& chunk, int64_t size, const SGDLaunch& launch, const RandomChunk* random) {
    with_type(dtype, [&](auto type) {
        with_constants(launch.terms,
                       [&](auto terms) { sgd_step_of<decltype(type)>(chunk, size, launch, random, terms); });
    });
    finish_streaming(launch.combination.is_streaming);
}

template <typename T, typename Terms>
void adamw_step_of(const AdamWChunk& chunk, int64_t size, const AdamWLaunch& launch,
                   const BiasCorrections<double>& exact_corrections, const RandomChunk* random, Terms terms) {
    using A = accumulation_t<T>;
    for_each_block(size, [&](int64_t begin, int64_t block_size) {
        const AdamW<A> adamw = {static_cast<A>(launch.adamw.lr),
                                static_cast<A>(launch.adamw.beta2),
                                static_cast<A>(launch.adamw.one_minus_beta1),
                                static_cast<A>(launch.adamw.one_minus_beta2),
                                static_cast<A>(launch.adamw.eps),
                                static_cast<A>(launch.adamw.weight_decay)};
        const BiasCorrections<A> corrections = {static_cast<A>(exact_corrections.first),
                                                static_cast<A>(exact_corrections.second_root)};
        A theta[kBlock], backup_block[kBlock], mean_block[kBlock], square_block[kBlock], largest_block[kBlock];
        T* const means = static_cast<T*>(chunk.exp_avg) + begin;
        T* const squares = static_cast<T*>(chunk.exp_avg_sq) + begin;
        T* const maxima = Terms::amsgrad ? static_cast<T*>(chunk.max_exp_avg_sq) + begin : nullptr;
        const A* const backup = view(backup_block, static_cast<const T*>(chunk.backup) + begin, block_size);
        A* const mean = editable(mean_block, means, block_size);
        A* const square = editable(square_block, squares, block_size);
        CombinedBlock<T> block;
        const CombinedGrad<A> grad = block.open(chunk, begin, block_size, launch.combination);
        A* const largest = Terms::amsgrad ? editable(largest_block, maxima, block_size) : largest_block;
        GAM_FUSED_INDEPENDENT
        for (int64_t i = 0; i < block_size; ++i) {
            // In variables, or compilers read back from memory what the rule has just written there.
            A stepped = backup[i], first_moment = mean[i], second_moment = square[i];
            adamw_step(stepped, first_moment, second_moment, largest[i], grad(i), adamw, corrections, terms);
            mean[i] = first_moment;
            square[i] = second_moment;
            theta[i] = stepped;
        }
        if constexpr (Terms::amsgrad) {
            put_back(maxima, largest, block_size);
        }
        put_back(means, mean, block_size);
        put_back(squares, square, block_size);
        block.close(chunk, begin, block_size, launch.combination);
        draw_params<T>(theta, random, begin, block_size);
        store_param(static_cast<T*>(chunk.param) + begin, theta, block_size, launch.combination.is_streaming);
    });
}

void adamw_step(Dtype dtype, const AdamWChunk& chunk, int64_t size, const AdamWLaunch& launch,
                const BiasCorrections<double>& corrections, const RandomChunk* random) {
    with_type(dtype, [&](auto type) {
        with_constants(launch.terms, [&](auto terms) {
            adamw_step_of<decltype(type)>(chunk, size, launch, corrections, random, terms);
        });
    });
    finish_streaming(launch.combination.is_streaming);
}

}  // namespace gam_fused::cpu::GAM_FUSED_SET

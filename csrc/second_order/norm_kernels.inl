// The loops of norm_kernels.h, included once per instruction set by files that define GAM_FUSED_SET (a namespace) and
// have told the compiler which instructions it may use. As in cpu/chunk_kernels.inl, no function of the standard
// library is called here, and every loop is one that compilers vectorise, in an order that is the same for every set.

#include "blocks.inl"

namespace gam_fused::cpu::GAM_FUSED_SET {

namespace {

constexpr int64_t kTile = 256;  // channels beside each other
constexpr int64_t kRowBlock = 64;
constexpr int64_t kRowsAtATime = 4;

template <typename A>
struct Lanes {
    static constexpr int kCount = 64 / static_cast<int>(sizeof(A));
    typedef A type __attribute__((vector_size(64)));
};

template <typename A>
GAM_FUSED_INLINE void load_lanes(typename Lanes<A>::type& lanes, const A* from) {
    __builtin_memcpy(&lanes, from, sizeof lanes);
}

// compute(results, elements), of one vector or one number of each list, for all of a block. Spelled out in vectors:
// compilers do not vectorise loops over this many lists that might overlap.
template <typename A, int kResults, int kLists, typename Compute>
GAM_FUSED_INLINE void map(A* const (&results)[kResults], const A* const (&lists)[kLists], int64_t size,
                          const Compute& compute) {
    using Vector = typename Lanes<A>::type;
    constexpr int64_t kCount = Lanes<A>::kCount;
    int64_t i = 0;
    for (; i + kCount <= size; i += kCount) {
        Vector computed[kResults], elements[kLists];
        for (int k = 0; k < kLists; ++k) {
            load_lanes<A>(elements[k], lists[k] + i);
        }
        compute(computed, elements);
        for (int k = 0; k < kResults; ++k) {
            __builtin_memcpy(results[k] + i, &computed[k], sizeof(Vector));
        }
    }
    for (; i < size; ++i) {
        A computed[kResults], elements[kLists];
        for (int k = 0; k < kLists; ++k) {
            elements[k] = lists[k][i];
        }
        compute(computed, elements);
        for (int k = 0; k < kResults; ++k) {
            results[k][i] = computed[k];
        }
    }
}

// ---------------------------------------------------------------- sums over a run

template <typename A>
GAM_FUSED_INLINE double total(const typename Lanes<A>::type& lanes) {
    constexpr int kCount = Lanes<A>::kCount;
    A each[kCount];
    __builtin_memcpy(each, &lanes, sizeof each);
    for (int half = kCount / 2; half > 0; half /= 2) {
        for (int i = 0; i < half; ++i) {
            each[i] += each[i + half];
        }
    }
    return static_cast<double>(each[0]);
}

// Two accumulators for each sum, so that additions need not wait for one another.
template <typename A, int kSums>
struct Accumulators {
    using Vector = typename Lanes<A>::type;
    Vector even[kSums] = {};
    Vector odd[kSums] = {};

    GAM_FUSED_INLINE double operator[](int sum) const {
        const Vector both = even[sum] + odd[sum];
        return total<A>(both);
    }
};

// add(sums, addresses of one vector's elements in each list), for all vectors of a block; zeros fill up the last one.
template <typename A, int kSums, int kLists, typename Add>
GAM_FUSED_INLINE void accumulate(Accumulators<A, kSums>& sums, const A* const (&lists)[kLists], int64_t size,
                                 const Add& add) {
    constexpr int64_t kCount = Lanes<A>::kCount;
    typename Lanes<A>::type elements[kLists];
    int64_t i = 0;
    for (; i + 2 * kCount <= size; i += 2 * kCount) {
        for (int k = 0; k < kLists; ++k) {
            load_lanes<A>(elements[k], lists[k] + i);
        }
        add(sums.even, elements);
        for (int k = 0; k < kLists; ++k) {
            load_lanes<A>(elements[k], lists[k] + i + kCount);
        }
        add(sums.odd, elements);
    }
    for (; i < size; i += kCount) {
        const int64_t rest = size - i < kCount ? size - i : kCount;
        for (int k = 0; k < kLists; ++k) {
            A filled[kCount] = {};
            __builtin_memcpy(filled, lists[k] + i, sizeof(A) * static_cast<size_t>(rest));
            load_lanes<A>(elements[k], filled);
        }
        add(sums.even, elements);
    }
}

template <typename T>
void plane_sums_of(const NormInputs& inputs, int64_t begin, int64_t size, double mean, NormSums& sums) {
    using A = accumulation_t<T>;
    using Vector = typename Lanes<A>::type;
    const A center = static_cast<A>(mean);
    NormSums result;
    for_each_block(size, kBlock, [&](int64_t from, int64_t block_size) {
        A u_block[kBlock], x_block[kBlock], v_block[kBlock];
        const A* const lists[] = {view<T>(u_block, inputs.grad_output, begin + from, block_size),
                                  view<T>(x_block, inputs.input, begin + from, block_size),
                                  view<T>(v_block, inputs.gg_input, begin + from, block_size)};
        Accumulators<A, 5> block;
        accumulate(block, lists, block_size, [&](Vector(&to)[5], const Vector(&elements)[3]) {
            const Vector u = elements[0], d = elements[1] - center, v = elements[2];
            to[0] += u;
            to[1] += u * d;
            to[2] += v;
            to[3] += v * d;
            to[4] += v * u;
        });
        result.u += block[0];
        result.u_d += block[1];
        result.v += block[2];
        result.v_d += block[3];
        result.v_u += block[4];
    });
    sums = result;
}

void plane_sums(const NormInputs& inputs, int64_t begin, int64_t size, double mean, NormSums& sums) {
    with_type(inputs.dtype, [&](auto type) { plane_sums_of<decltype(type)>(inputs, begin, size, mean, sums); });
}

// ---------------------------------------------------------------- results of a run

template <typename A>
struct Coefficients {
    A ggo_v, ggo_d, ggo_1, gx_v, gx_u, gx_d, gx_1;
};

template <typename A>
GAM_FUSED_INLINE Coefficients<A> rounded(const NormCoefficients& exact) {
    return {static_cast<A>(exact.ggo_v), static_cast<A>(exact.ggo_d), static_cast<A>(exact.ggo_1),
            static_cast<A>(exact.gx_v),  static_cast<A>(exact.gx_u),  static_cast<A>(exact.gx_d),
            static_cast<A>(exact.gx_1)};
}

template <typename T>
void plane_outputs_of(const NormInputs& inputs, const NormOutputs& outputs, int64_t begin, int64_t size, double mean,
                      const NormCoefficients& exact) {
    using A = accumulation_t<T>;
    const Coefficients<A> k = rounded<A>(exact);
    const A center = static_cast<A>(mean);
    for_each_block(size, kBlock, [&](int64_t from, int64_t block_size) {
        A u_block[kBlock], x_block[kBlock], v_block[kBlock], ggo_block[kBlock], gx_block[kBlock];
        const int64_t at = begin + from;
        A* const ggo = target<T>(ggo_block, outputs.grad_grad_output, at);
        A* const gx = target<T>(gx_block, outputs.grad_input, at);
        A* const results[] = {ggo, gx};
        const A* const lists[] = {view<T>(u_block, inputs.grad_output, at, block_size),
                                  view<T>(x_block, inputs.input, at, block_size),
                                  view<T>(v_block, inputs.gg_input, at, block_size)};
        map(results, lists, block_size, [&](auto& computed, const auto& elements) {
            const auto u = elements[0], d = elements[1] - center, v = elements[2];
            computed[0] = v * k.ggo_v + (d * k.ggo_d + k.ggo_1);
            computed[1] = (v * k.gx_v + u * k.gx_u) + (d * k.gx_d + k.gx_1);
        });
        put_back<T>(ggo, outputs.grad_grad_output, at, block_size);
        put_back<T>(gx, outputs.grad_input, at, block_size);
    });
}

void plane_outputs(const NormInputs& inputs, const NormOutputs& outputs, int64_t begin, int64_t size, double mean,
                   const NormCoefficients& coefficients) {
    with_type(inputs.dtype,
              [&](auto type) { plane_outputs_of<decltype(type)>(inputs, outputs, begin, size, mean, coefficients); });
}

// ---------------------------------------------------------------- channels beside each other

// One number for each channel of a tile.
template <typename A>
struct TileSums {
    A u[kTile] = {}, u_d[kTile] = {}, v[kTile] = {}, v_d[kTile] = {}, v_u[kTile] = {};
};

template <typename A, int kRows>
GAM_FUSED_INLINE void add_rows(TileSums<A>& sums, const A* const (&u)[kRowsAtATime], const A* const (&x)[kRowsAtATime],
                               const A* const (&v)[kRowsAtATime], const A* center, int64_t size) {
    A* const results[] = {sums.u, sums.u_d, sums.v, sums.v_d, sums.v_u};
    const A* lists[6 + 3 * kRows] = {sums.u, sums.u_d, sums.v, sums.v_d, sums.v_u, center};
    for (int row = 0; row < kRows; ++row) {
        lists[6 + 3 * row] = u[row];
        lists[7 + 3 * row] = x[row];
        lists[8 + 3 * row] = v[row];
    }
    map<A, 5, 6 + 3 * kRows>(results, lists, size, [](auto& computed, const auto& of) {
        for (int k = 0; k < 5; ++k) {
            computed[k] = of[k];
        }
        for (int row = 0; row < kRows; ++row) {
            const auto each_u = of[6 + 3 * row], d = of[7 + 3 * row] - of[5], each_v = of[8 + 3 * row];
            computed[0] += each_u;
            computed[1] += each_u * d;
            computed[2] += each_v;
            computed[3] += each_v * d;
            computed[4] += each_v * each_u;
        }
    });
}

template <typename T>
void channel_sums_of(const NormInputs& inputs, int64_t begin, int64_t rows, int64_t channels, const double* mean,
                     NormSums* sums) {
    using A = accumulation_t<T>;
    for_each_block(channels, kTile, [&](int64_t first, int64_t tile) {
        A center[kTile];
        for (int64_t c = 0; c < tile; ++c) {
            center[c] = static_cast<A>(mean[first + c]);
            sums[first + c] = NormSums{};
        }
        for_each_block(rows, kRowBlock, [&](int64_t first_row, int64_t block_rows) {
            TileSums<A> block;
            A u_blocks[kRowsAtATime][kTile], x_blocks[kRowsAtATime][kTile], v_blocks[kRowsAtATime][kTile];
            for_each_block(block_rows, kRowsAtATime, [&](int64_t row, int64_t some) {
                const A *u[kRowsAtATime], *x[kRowsAtATime], *v[kRowsAtATime];
                for (int64_t k = 0; k < some; ++k) {
                    const int64_t at = begin + (first_row + row + k) * channels + first;
                    u[k] = view<T>(u_blocks[k], inputs.grad_output, at, tile);
                    x[k] = view<T>(x_blocks[k], inputs.input, at, tile);
                    v[k] = view<T>(v_blocks[k], inputs.gg_input, at, tile);
                }
                if (some == kRowsAtATime) {
                    add_rows<A, kRowsAtATime>(block, u, x, v, center, tile);
                    return;
                }
                for (int64_t k = 0; k < some; ++k) {
                    u[0] = u[k], x[0] = x[k], v[0] = v[k];
                    add_rows<A, 1>(block, u, x, v, center, tile);
                }
            });
            for (int64_t c = 0; c < tile; ++c) {
                NormSums& sum = sums[first + c];
                sum.u += static_cast<double>(block.u[c]);
                sum.u_d += static_cast<double>(block.u_d[c]);
                sum.v += static_cast<double>(block.v[c]);
                sum.v_d += static_cast<double>(block.v_d[c]);
                sum.v_u += static_cast<double>(block.v_u[c]);
            }
        });
    });
}

void channel_sums(const NormInputs& inputs, int64_t begin, int64_t rows, int64_t channels, const double* mean,
                  NormSums* sums) {
    with_type(inputs.dtype,
              [&](auto type) { channel_sums_of<decltype(type)>(inputs, begin, rows, channels, mean, sums); });
}

template <typename A>
struct TileCoefficients {
    A center[kTile], ggo_v[kTile], ggo_d[kTile], ggo_1[kTile], gx_v[kTile], gx_u[kTile], gx_d[kTile], gx_1[kTile];
};

template <typename T>
void channel_outputs_of(const NormInputs& inputs, const NormOutputs& outputs, int64_t begin, int64_t rows,
                        int64_t channels, const double* mean, const NormCoefficients* exact) {
    using A = accumulation_t<T>;
    for_each_block(channels, kTile, [&](int64_t first, int64_t tile) {
        TileCoefficients<A> k;
        for (int64_t c = 0; c < tile; ++c) {
            const Coefficients<A> of_channel = rounded<A>(exact[first + c]);
            k.center[c] = static_cast<A>(mean[first + c]);
            k.ggo_v[c] = of_channel.ggo_v, k.ggo_d[c] = of_channel.ggo_d, k.ggo_1[c] = of_channel.ggo_1;
            k.gx_v[c] = of_channel.gx_v, k.gx_u[c] = of_channel.gx_u;
            k.gx_d[c] = of_channel.gx_d, k.gx_1[c] = of_channel.gx_1;
        }
        A u_block[kTile], x_block[kTile], v_block[kTile], ggo_block[kTile], gx_block[kTile];
        for (int64_t row = 0; row < rows; ++row) {
            const int64_t at = begin + row * channels + first;
            A* const ggo = target<T>(ggo_block, outputs.grad_grad_output, at);
            A* const gx = target<T>(gx_block, outputs.grad_input, at);
            A* const results[] = {ggo, gx};
            const A* const lists[] = {view<T>(u_block, inputs.grad_output, at, tile),
                                      view<T>(x_block, inputs.input, at, tile),
                                      view<T>(v_block, inputs.gg_input, at, tile),
                                      k.center,
                                      k.ggo_v,
                                      k.ggo_d,
                                      k.ggo_1,
                                      k.gx_v,
                                      k.gx_u,
                                      k.gx_d,
                                      k.gx_1};
            map(results, lists, tile, [&](auto& computed, const auto& of) {
                const auto u = of[0], d = of[1] - of[3], v = of[2];
                computed[0] = v * of[4] + (d * of[5] + of[6]);
                computed[1] = (v * of[7] + u * of[8]) + (d * of[9] + of[10]);
            });
            put_back<T>(ggo, outputs.grad_grad_output, at, tile);
            put_back<T>(gx, outputs.grad_input, at, tile);
        }
    });
}

void channel_outputs(const NormInputs& inputs, const NormOutputs& outputs, int64_t begin, int64_t rows,
                     int64_t channels, const double* mean, const NormCoefficients* coefficients) {
    with_type(inputs.dtype, [&](auto type) {
        channel_outputs_of<decltype(type)>(inputs, outputs, begin, rows, channels, mean, coefficients);
    });
}

// ---------------------------------------------------------------- a weight for each element of a row

template <typename T>
SetSums row_sums(const NormInputs& inputs, int64_t begin, int64_t size, accumulation_t<T> center,
                 const accumulation_t<T>* weight, const accumulation_t<T>* gg_weight) {
    using A = accumulation_t<T>;
    using Vector = typename Lanes<A>::type;
    SetSums result;
    for_each_block(size, kBlock, [&](int64_t from, int64_t block_size) {
        A u_block[kBlock], x_block[kBlock], v_block[kBlock];
        const A* const u = view<T>(u_block, inputs.grad_output, begin + from, block_size);
        const A* const x = view<T>(x_block, inputs.input, begin + from, block_size);
        const A* const v = view<T>(v_block, inputs.gg_input, begin + from, block_size);
        Accumulators<A, 5> block;
        const A* const lists[] = {u, x, v, weight + from};
        accumulate(block, lists, block_size, [&](Vector(&to)[5], const Vector(&elements)[4]) {
            const Vector g = elements[0] * elements[3], d = elements[1] - center, each_v = elements[2];
            to[0] += g;
            to[1] += g * d;
            to[2] += each_v;
            to[3] += each_v * d;
            to[4] += each_v * g;
        });
        result.g += block[0];
        result.g_x += block[1];
        result.v += block[2];
        result.v_x += block[3];
        result.v_g += block[4];
        if (gg_weight != nullptr) {
            Accumulators<A, 2> more;
            const A* const others[] = {u, x, gg_weight + from};
            accumulate(more, others, block_size, [&](Vector(&to)[2], const Vector(&elements)[3]) {
                const Vector a = elements[0] * elements[2], d = elements[1] - center;
                to[0] += a;
                to[1] += a * d;
            });
            result.a += more[0];
            result.a_x += more[1];
        }
    });
    return result;  // over d where x^ is meant
}

template <typename A>
struct RowTerms {
    A center, invstd;
    A p_v, p_d, p_1;  // invstd * P(v)
    A gx_v, gx_g;     // of v and of g = weight * u
    A gx_d, gx_1;
};

template <typename T>
void layer_rows_of(const NormInputs& inputs, const NormOutputs& outputs, int64_t begin, int64_t rows, int64_t size,
                   const double* mean, const double* invstd, const LayerWeights& weights, void* grad_weight) {
    using A = accumulation_t<T>;
    const A* const weight = static_cast<const A*>(weights.weight);
    const A* const gg_weight = static_cast<const A*>(weights.gg_weight);
    const A* const gg_bias = static_cast<const A*>(weights.gg_bias);
    const bool is_centered = mean != nullptr;
    A unwanted[kBlock] = {};
    for (int64_t row = 0; row < rows; ++row) {
        const int64_t first = begin + row * size;
        const double r = invstd[row];
        const A center = static_cast<A>(is_centered ? mean[row] : 0);
        SetSums sums = row_sums<T>(inputs, first, size, center, weight, gg_weight);
        sums.g_x *= r, sums.v_x *= r, sums.a_x *= r;
        if (!is_centered) {  // P subtracts no mean either
            sums.g = sums.v = sums.a = 0;
        }
        const SetTerms terms = set_terms(sums, static_cast<double>(size), r);
        const RowTerms<A> k = {center,
                               static_cast<A>(r),
                               static_cast<A>(r),
                               static_cast<A>(-r * r * terms.mean_v_x),
                               static_cast<A>(-r * terms.mean_v),
                               static_cast<A>(r * terms.h_v),
                               static_cast<A>(r * terms.h_g),
                               static_cast<A>(-r * terms.gx_x),
                               static_cast<A>(-terms.gx_1)};
        for_each_block(size, kBlock, [&](int64_t from, int64_t block_size) {
            A u_block[kBlock], x_block[kBlock], v_block[kBlock], ggo_block[kBlock], gx_block[kBlock];
            const int64_t at = first + from;
            A* const ggo = target<T>(ggo_block, outputs.grad_grad_output, at);
            A* const gx = target<T>(gx_block, outputs.grad_input, at);
            A* const gw = grad_weight == nullptr ? unwanted : static_cast<A*>(grad_weight) + from;
            A* const results[] = {ggo, gx, gw};
            const A* const lists[] = {view<T>(u_block, inputs.grad_output, at, block_size),
                                      view<T>(x_block, inputs.input, at, block_size),
                                      view<T>(v_block, inputs.gg_input, at, block_size),
                                      gw,
                                      weight + from,
                                      gg_weight == nullptr ? kZeros<A> : gg_weight + from,
                                      gg_bias == nullptr ? kZeros<A> : gg_bias + from};
            map(results, lists, block_size, [&](auto& computed, const auto& of) {
                const auto u = of[0], d = of[1] - k.center, v = of[2], w = of[4], a = of[5], b = of[6];
                const auto p = v * k.p_v + (d * k.p_d + k.p_1);
                computed[0] = w * p + (a * (d * k.invstd) + b);
                computed[1] = (v * k.gx_v + u * (w * k.gx_g + a * k.invstd)) + (d * k.gx_d + k.gx_1);
                computed[2] = of[3] + u * p;
            });
            put_back<T>(ggo, outputs.grad_grad_output, at, block_size);
            put_back<T>(gx, outputs.grad_input, at, block_size);
        });
    }
}

void layer_rows(const NormInputs& inputs, const NormOutputs& outputs, int64_t begin, int64_t rows, int64_t size,
                const double* mean, const double* invstd, const LayerWeights& weights, void* grad_weight) {
    with_type(inputs.dtype, [&](auto type) {
        layer_rows_of<decltype(type)>(inputs, outputs, begin, rows, size, mean, invstd, weights, grad_weight);
    });
}

}  // namespace

}  // namespace gam_fused::cpu::GAM_FUSED_SET

#define GAM_FUSED_NORM_KERNELS(set) \
    {#set, set::plane_sums, set::plane_outputs, set::channel_sums, set::channel_outputs, set::layer_rows}

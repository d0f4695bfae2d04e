// Sums of products over a block, of any magnitude.
//
// Sums are compensated: every rounding error of a product or sum is computed exactly and added up beside it, so that
// float results are as good as those of double arithmetic, which most GPUs do at a small fraction of the speed. They
// are scaled by powers of two, so that no product overflows or underflows that matters.

#pragma once

#include "../update_rules.h"
#include "multi_tensor.cuh"

namespace gam_fused::cuda {

// ---------------------------------------------------------------- powers of two

template <typename A>
struct Format;

template <>
struct Format<float> {
    using Bits = uint32_t;
    static constexpr int kMantissaBits = 23;
    static constexpr int kBias = 127;
};

template <>
struct Format<double> {
    using Bits = uint64_t;
    static constexpr int kMantissaBits = 52;
    static constexpr int kBias = 1023;
};

// The exponent of a finite number, -kBias for subnormal ones and 0. For the largest numbers, infinity and NaN it is
// kBias - 1, so that power_of_two of its negative is a normal number.
template <typename A>
__device__ __forceinline__ int exponent_of(A magnitude) {
    typename Format<A>::Bits bits;
    memcpy(&bits, &magnitude, sizeof bits);
    const int exponent = static_cast<int>(bits >> Format<A>::kMantissaBits) - Format<A>::kBias;
    return exponent < Format<A>::kBias ? exponent : Format<A>::kBias - 1;
}

// 2^exponent; 0 where that is not a normal number.
template <typename A>
__device__ __forceinline__ A power_of_two(int exponent) {
    using Bits = typename Format<A>::Bits;
    const int biased = exponent + Format<A>::kBias;
    const Bits bits = static_cast<Bits>(biased > 0 ? biased : 0) << Format<A>::kMantissaBits;
    A power;
    memcpy(&power, &bits, sizeof power);
    return power;
}

// value · 2^exponent, also where that power alone is out of range.
template <typename A>
__device__ __forceinline__ A scaled_by_two_to(A value, int exponent) {
    const int half = exponent / 2;
    return value * power_of_two<A>(half) * power_of_two<A>(exponent - half);
}

// ---------------------------------------------------------------- sums

__device__ __forceinline__ float absolute(float x) {
    return fabsf(x);
}

__device__ __forceinline__ double absolute(double x) {
    return fabs(x);
}

// Not NaN if one of the two is a number.
__device__ __forceinline__ float larger(float a, float b) {
    return fmaxf(a, b);
}

__device__ __forceinline__ double larger(double a, double b) {
    return fmax(a, b);
}

__device__ __forceinline__ float multiply_add(float a, float b, float c) {
    return fmaf(a, b, c);
}

__device__ __forceinline__ double multiply_add(double a, double b, double c) {
    return fma(a, b, c);
}

// (sum + error) · 2^exponent. An infinity or NaN among the terms is in `sum`; `error` then means nothing.
template <typename A>
struct ScaledSum {
    A sum;
    A error;
    int32_t exponent;  // of sums of squares, even

    __device__ __forceinline__ static ScaledSum nothing() { return {0, 0, -2 * Format<A>::kBias}; }

    // The exponent only grows, to that of the largest term so far: what is scaled away is too small to matter.
    __device__ __forceinline__ void raise_exponent(int to) {
        const int raised = exponent < to ? to : exponent;
        const A factor = power_of_two<A>(exponent - raised);
        sum *= factor;
        error *= factor;
        exponent = raised;
    }

    // Adds a number that is scaled by 2^-exponent, and what rounding it took off (Knuth's TwoSum).
    __device__ __forceinline__ void add_scaled(A term, A term_error) {
        const A total = sum + term;
        const A added = total - sum;
        error += ((sum - (total - added)) + (term - added)) + term_error;
        sum = total;
    }

    // Adds a product of numbers that are scaled by powers of two whose product is 2^-exponent. `kExact`: exact in A.
    template <bool kExact>
    __device__ __forceinline__ void add_scaled_product(A a, A b) {
        const A product = a * b;
        add_scaled(product, kExact ? A(0) : multiply_add(a, b, -product));
    }

    // `kExact`: their squares are exact in A.
    template <bool kExact, int kCount>
    __device__ __forceinline__ void add_squares(const A (&values)[kCount]) {
        A largest = 0;
#pragma unroll
        for (int i = 0; i < kCount; ++i) {
            largest = larger(largest, absolute(values[i]));
        }
        raise_exponent(2 * exponent_of(largest));
        const A scale = power_of_two<A>(-exponent / 2);
#pragma unroll
        for (int i = 0; i < kCount; ++i) {
            const A scaled = values[i] * scale;
            add_scaled_product<kExact>(scaled, scaled);
        }
    }

    __device__ __forceinline__ void add(ScaledSum other) {
        raise_exponent(other.exponent);
        other.raise_exponent(exponent);
        add_scaled(other.sum, other.error);
    }

    // All but the power of two.
    __device__ __forceinline__ A significand() const { return is_finite(sum) ? sum + error : sum; }

    // Of a sum of squares.
    __device__ __forceinline__ A root() const { return scaled_by_two_to(square_root(significand()), exponent / 2); }
};

constexpr unsigned kWarp = 32;
constexpr unsigned kAllLanes = 0xffffffffu;

// In lane 0 the sum over the warp.
template <typename A>
__device__ __forceinline__ ScaledSum<A> sum_over_warp(ScaledSum<A> mine) {
    int exponent = mine.exponent;
#pragma unroll
    for (unsigned distance = kWarp / 2; distance > 0; distance /= 2) {
        const int other = __shfl_xor_sync(kAllLanes, exponent, distance);
        exponent = exponent < other ? other : exponent;
    }
    mine.raise_exponent(exponent);
#pragma unroll
    for (unsigned distance = kWarp / 2; distance > 0; distance /= 2) {
        const A sum = __shfl_down_sync(kAllLanes, mine.sum, distance);
        const A error = __shfl_down_sync(kAllLanes, mine.error, distance);
        mine.add_scaled(sum, error);
    }
    return mine;
}

// In thread 0 the sum over the block.
template <typename A, unsigned kBlock>
__device__ __forceinline__ ScaledSum<A> sum_over_block(ScaledSum<A> mine) {
    constexpr unsigned kWarps = kBlock / kWarp;
    static_assert(kBlock % kWarp == 0 && kWarps <= kWarp);
    __shared__ ScaledSum<A> of_warps[kWarps];
    const unsigned warp = threadIdx.x / kWarp;
    const unsigned lane = threadIdx.x % kWarp;
    mine = sum_over_warp(mine);
    if (lane == 0) {
        of_warps[warp] = mine;
    }
    __syncthreads();
    if (warp == 0) {
        mine = sum_over_warp(lane < kWarps ? of_warps[lane] : ScaledSum<A>::nothing());
    }
    __syncthreads();  // before the next chunk's sums take the place of these
    return mine;
}

}  // namespace gam_fused::cuda

// First and second derivatives of activations, one element at a time.
//
// y = f(x) has the gradient u f'(x) for an incoming u; given the double gradient v of that, u's gradient is v f'(x) and
// x's is u v f''(x).
//
// float: exponentials and the error function by polynomials, in operations that vectorise and round alike on every
// processor; double: by the C library. Where an activation has become 0 or x to within rounding, x is taken to be no
// larger: nothing overflows, and infinity has the derivatives of its limit.

#pragma once

#include <cmath>
#include <cstdint>

#include "../host_device.h"
#include "../narrow_floats.h"

namespace gam_fused {

template <typename A>
struct Derivatives {
    A first;
    A second;
};

// Signs are taken apart as bits: compilers make jumps of choices that depend on one, and loops with jumps stay scalar.

GAM_FUSED_HD float sign(float x) {
    return float_of((bits_of(x) & 0x80000000u) | 0x3f800000u);
}

GAM_FUSED_HD double sign(double x) {
    return copysign(1.0, x);
}

// |x|, at most `limit`; NaN stays NaN.
template <typename A>
GAM_FUSED_HD A magnitude(A x, A limit) {
    const A absolute = x * sign(x);
    return absolute > limit ? limit : absolute;
}

// 1 for positive numbers, 0 for negative ones.
template <typename A>
GAM_FUSED_HD A step(A x) {
    return A(0.5) + A(0.5) * sign(x);
}

// e^x for -87 <= x <= 0: 2^n e^r with |r| <= ln(2) / 2, and Taylor's polynomial of degree 7 for e^r, whose first
// neglected term is 5e-9.
GAM_FUSED_HD float exponential(float x) {
    const float kRound = 12582912.0f;  // 1.5 * 2^23: adding it rounds to an integer, which is left in the lowest bits
    const float shifted = x * 1.44269504f + kRound;
    const float n = shifted - kRound;
    const float r = (x - n * 0.693359375f) - n * -2.12194440e-4f;  // ln(2) in two parts, the first one short
    float p = 1.0f / 5040;
    p = p * r + 1.0f / 720;
    p = p * r + 1.0f / 120;
    p = p * r + 1.0f / 24;
    p = p * r + 1.0f / 6;
    p = p * r + 0.5f;
    p = p * r + 1.0f;
    p = p * r + 1.0f;
    const uint32_t exponent = bits_of(shifted) - bits_of(kRound) + 127u;
    return p * float_of(exponent << 23);
}

GAM_FUSED_HD double exponential(double x) {
    return exp(x);
}

// 1 - Phi(z) for z >= 0, of the normal distribution, given e^(-z^2/2): Abramowitz and Stegun, Handbook of Mathematical
// Functions, 7.1.26, which is within 1.5e-7 for erf. PyTorch's vectorised erf is the same formula.
GAM_FUSED_HD float upper_tail(float z, float exponential_of_half_square) {
    const float t = 1.0f / (1.0f + 0.3275911f * 0.707106781f * z);
    float p = 1.061405429f;
    p = p * t - 1.453152027f;
    p = p * t + 1.421413741f;
    p = p * t - 0.284496736f;
    p = p * t + 0.254829592f;
    return 0.5f * p * t * exponential_of_half_square;
}

GAM_FUSED_HD double upper_tail(double z, double) {
    return 0.5 * erfc(z * 0.70710678118654752440);
}

// f = x Phi(x): f' = Phi + x phi, f'' = phi (2 - x^2).
struct Gelu {
    template <typename A>
    static GAM_FUSED_HD Derivatives<A> at(A given) {
        const A z = magnitude(given, A(13)), x = sign(given) * z;
        const A e = exponential(A(-0.5) * z * z);
        const A phi = A(0.39894228040143267794) * e;
        const A cdf = step(given) - sign(given) * upper_tail(z, e);
        return {cdf + x * phi, phi * (A(2) - z * z)};
    }
};

// f = x (1 + t) / 2 with t = tanh(u), u = k (x + c x^3), Hendrycks and Gimpel, arXiv 1606.08415:
// f' = (1 + t) / 2 + x (1 - t^2) u' / 2, f'' = (1 - t^2) (u' + x u'' / 2 - x t u'^2).
struct GeluTanh {
    template <typename A>
    static GAM_FUSED_HD Derivatives<A> at(A given) {
        const A k = A(0.79788456080286535588), c = A(0.044715);
        const A z = magnitude(given, A(9.5)), x = sign(given) * z;
        const A square = z * z;
        const A u = k * z * (A(1) + c * square);         // |u|
        const A slope = k * (A(1) + A(3) * c * square);  // u'
        const A a = exponential(A(-2) * u), inverse = A(1) / (A(1) + a);
        const A t = (A(1) - a) * inverse;                         // |t|
        const A one_minus_square = A(4) * a * inverse * inverse;  // 1 - t^2
        const A half_1_minus_t = a * inverse;                     // (1 - |t|) / 2
        const A half_1_plus_t = step(given) - sign(given) * half_1_minus_t;
        const A bend = slope + A(3) * k * c * square - z * t * slope * slope;
        return {half_1_plus_t + A(0.5) * x * one_minus_square * slope, one_minus_square * bend};
    }
};

// f = x s with s = 1 / (1 + e^-x): f' = s + x s (1 - s), f'' = s (1 - s) (2 + x (1 - 2 s)).
struct Silu {
    template <typename A>
    static GAM_FUSED_HD Derivatives<A> at(A given) {
        const A z = magnitude(given, A(87)), x = sign(given) * z;
        const A a = exponential(-z), inverse = A(1) / (A(1) + a);
        const A s = step(given) + sign(given) * -a * inverse;
        const A slope = a * inverse * inverse;  // s (1 - s)
        return {s + x * slope, slope * (A(2) - z * (A(1) - a) * inverse)};
    }
};

}  // namespace gam_fused

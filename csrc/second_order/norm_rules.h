// The double backward of normalization layers, as numbers.
//
// A layer normalizes sets of elements: with d = x - mean and x^ = d * invstd over a set of `count` elements, its
// backward is, for u = grad_output and g = weight * u,
//
//     grad_input  = invstd * P(g),  P(g) = g - mean(g) - x^ * mean(g * x^)
//     grad_weight = sum of u * x^, grad_bias = sum of u, over the elements that share a weight.
//
// Differentiating <gg_input, grad_input> + <gg_weight, grad_weight> + <gg_bias, grad_bias>, with P symmetric and
// d(invstd)/dx = -invstd^2 * x^ / count, gives, with v = gg_input,
//
//     for grad_output   weight * invstd * P(v) + gg_weight * x^ + gg_bias
//     for weight        sum of u * invstd * P(v)
//     for input         invstd * P(h) - invstd^2 * x^ / count * sum of v * P(g)
//                       with h = gg_weight * u - invstd / count * (v * sum(g * x^) + g * sum(v * x^)).
//
// So five sums per channel of a set, over u, u * d, v, v * d and v * u, say all there is to know, and what is asked for
// is linear in v, u and d with coefficients that are the same for all elements of a channel.

#pragma once

#include <cstdint>

#include "../host_device.h"

namespace gam_fused {

// Over the elements of one set that share a weight.
struct NormSums {
    double u = 0;
    double u_d = 0;
    double v = 0;
    double v_d = 0;
    double v_u = 0;
};

// For grad_output: v * ggo_v + d * ggo_d + ggo_1; for input: v * gx_v + u * gx_u + d * gx_d + gx_1.
struct NormCoefficients {
    double ggo_v;
    double ggo_d;
    double ggo_1;
    double gx_v;
    double gx_u;
    double gx_d;
    double gx_1;
};

// Sums over a whole set, with the weights in them.
struct SetSums {
    double g = 0;
    double g_x = 0;  // g * x^
    double v = 0;
    double v_x = 0;  // v * x^
    double v_g = 0;
    double a = 0;    // gg_weight * u
    double a_x = 0;  // gg_weight * u * x^
};

// What follows for a whole set: P(v) = v - mean_v - x^ * mean_v_x; h = gg_weight * u + h_v * v + h_g * g; the result
// for input is invstd * h - gx_1 - x^ * gx_x.
struct SetTerms {
    double mean_v;
    double mean_v_x;
    double h_v;
    double h_g;
    double gx_1;
    double gx_x;
};

GAM_FUSED_HD SetTerms set_terms(const SetSums& sums, double count, double invstd) {
    const double h_v = -invstd * sums.g_x / count;
    const double h_g = -invstd * sums.v_x / count;
    const double sum_h = h_v * sums.v + h_g * sums.g + sums.a;
    const double sum_h_x = h_v * sums.v_x + h_g * sums.g_x + sums.a_x;
    const double v_p_g = sums.v_g - sums.v * sums.g / count - sums.v_x * sums.g_x / count;
    return {sums.v / count,
            sums.v_x / count,
            h_v,
            h_g,
            invstd * sum_h / count,
            (invstd * sum_h_x + invstd * invstd * v_p_g) / count};
}

// The channels of one set: each with its sums, weight, gg_weight and gg_bias; writes coefficients and what the set adds
// to the gradient of each weight.
GAM_FUSED_HD void norm_coefficients(const NormSums* sums, const double* weight, const double* gg_weight,
                                    const double* gg_bias, int64_t channels, double count, double invstd,
                                    NormCoefficients* coefficients, double* grad_weight) {
    SetSums set;
    for (int64_t c = 0; c < channels; ++c) {
        set.g += weight[c] * sums[c].u;
        set.g_x += weight[c] * sums[c].u_d * invstd;
        set.v += sums[c].v;
        set.v_x += sums[c].v_d * invstd;
        set.v_g += weight[c] * sums[c].v_u;
        set.a += gg_weight[c] * sums[c].u;
        set.a_x += gg_weight[c] * sums[c].u_d * invstd;
    }
    const SetTerms terms = set_terms(set, count, invstd);
    for (int64_t c = 0; c < channels; ++c) {
        const double scale = weight[c] * invstd;
        coefficients[c] = {scale,
                           invstd * (gg_weight[c] - scale * terms.mean_v_x),
                           gg_bias[c] - scale * terms.mean_v,
                           invstd * terms.h_v,
                           invstd * (weight[c] * terms.h_g + gg_weight[c]),
                           -invstd * terms.gx_x,
                           -terms.gx_1};
        grad_weight[c] = invstd * (sums[c].v_u - terms.mean_v * sums[c].u - terms.mean_v_x * sums[c].u_d * invstd);
    }
}

// The same where mean and invstd are constants, as in evaluation of batch normalization.
GAM_FUSED_HD void constant_norm_coefficients(const NormSums* sums, const double* weight, const double* gg_weight,
                                             const double* gg_bias, int64_t channels, double invstd,
                                             NormCoefficients* coefficients, double* grad_weight) {
    for (int64_t c = 0; c < channels; ++c) {
        coefficients[c] = {weight[c] * invstd, gg_weight[c] * invstd, gg_bias[c], 0, gg_weight[c] * invstd, 0, 0};
        grad_weight[c] = invstd * sums[c].v_u;
    }
}

}  // namespace gam_fused

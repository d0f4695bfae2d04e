// The arithmetic of one element, once for the host and for devices.
//
// A is the accumulation type of the tensors' dtype (narrow_floats.h): operands are widened to it, every rule is
// computed in it, and results are rounded once on the way back. Factors that are the same for all elements are computed
// once per launch or block and handed over in the structs below. Everything here is compiled without contraction into
// fused multiply-adds, so that a vector lane, a scalar tail and a CUDA thread round alike.
//
// To add a fused base rule: one struct and one function here, one kernel and one line of registration per back end.

#pragma once

#include <cmath>

#include "host_device.h"

namespace gam_fused {

template <typename A>
GAM_FUSED_HD bool is_finite(A value) {
    return value - value == A(0);
}

GAM_FUSED_HD float square_root(float value) {
    return sqrtf(value);
}

GAM_FUSED_HD double square_root(double value) {
    return sqrt(value);
}

// ---------------------------------------------------------------- perturb

// ρ / (‖u‖ + ξ (‖g‖ + ξ)): what the ascent direction u is multiplied by.
template <typename A>
GAM_FUSED_HD A perturbation_scale(A direction_norm, A grad_norm, A rho, A xi) {
    return rho / (direction_norm + xi * (grad_norm + xi));
}

// Whether parameters move at all: not to a point that is none.
template <typename A>
GAM_FUSED_HD bool moves(A direction_norm, A grad_norm, A scale) {
    return is_finite(direction_norm) && is_finite(grad_norm) && is_finite(scale);
}

// θ_adv = θ + scale · u
template <typename A>
GAM_FUSED_HD A perturbed(A theta, A direction, A scale) {
    return theta + scale * direction;
}

// ---------------------------------------------------------------- shift

// ρ / (‖d‖ + ξ): what the direction d is multiplied by.
template <typename A>
GAM_FUSED_HD A shift_scale(A norm, A rho, A xi) {
    return rho / (norm + xi);
}

// ---------------------------------------------------------------- combine

// α ρ / (‖g_adv‖ + ξ): what the Hessian-vector product is multiplied by.
template <typename A>
GAM_FUSED_HD A penalty_scale(A adversarial_norm, A rho, A alpha, A xi) {
    return alpha * rho / (adversarial_norm + xi);
}

// g + scale · H(θ_adv) g_adv
template <typename A>
GAM_FUSED_HD A combined(A grad, A hvp, A scale) {
    return grad + scale * hvp;
}

// ---------------------------------------------------------------- decompose (the paper's Algorithm 2)

// Of the gradients g0 at θ, g1 ahead of θ, g2 at θ_adv and g3 ahead of θ_adv.
template <typename A>
struct Weights {
    A w0;
    A w1;
    A w2;
    A w3;
};

template <typename A>
Weights<A> weights_in(const Weights<double>& weights) {
    return {static_cast<A>(weights.w0), static_cast<A>(weights.w1), static_cast<A>(weights.w2),
            static_cast<A>(weights.w3)};
}

// h⁺ = w1 g1 + w3 g3, of the gradients ahead; h⁻ = w0 g0 + w2 g2, of those where the steps ahead begin.
template <typename A>
GAM_FUSED_HD A mixed(A first, A second, A first_weight, A second_weight) {
    return first_weight * first + second_weight * second;
}

// ⟨h⁻, h⁺⟩ / (‖h⁺‖ + ξ)², out of ⟨h⁻, h⁺⟩ / ‖h⁺‖: how much of h⁺ there is in h⁻.
template <typename A>
GAM_FUSED_HD A parallel_scale(A projection, A plus_norm, A xi) {
    const A norm = plus_norm + xi;
    return projection / norm * (plus_norm / norm);
}

// h⊥ = h⁻ − scale · h⁺
template <typename A>
GAM_FUSED_HD A perpendicular(A minus, A plus, A scale) {
    return minus - scale * plus;
}

// ---------------------------------------------------------------- SGD (torch.optim.SGD)

template <typename A>
struct SGD {
    A lr;
    A weight_decay;
    A momentum;
    A one_minus_dampening;
};

// Which terms of SGD there are. Kernels that know at compile time pass a type with the same names as constants.
struct SGDTerms {
    bool weight_decay;
    bool momentum;
    bool nesterov;
    bool first_step;  // the momentum buffer holds nothing yet
};

// θ ← θ − lr · d with d the gradient after weight decay and momentum. `theta` and `buffer` are read and written.
template <typename A, typename Terms>
GAM_FUSED_HD void sgd_step(A& theta, A& buffer, A grad, const SGD<A>& sgd, const Terms& terms) {
    A d = grad;
    if (terms.weight_decay) {
        d = d + sgd.weight_decay * theta;
    }
    if (terms.momentum) {
        buffer = terms.first_step ? d : sgd.momentum * buffer + sgd.one_minus_dampening * d;
        d = terms.nesterov ? d + sgd.momentum * buffer : buffer;
    }
    theta = theta - sgd.lr * d;
}

// ---------------------------------------------------------------- Adam and AdamW (torch.optim.Adam, torch.optim.AdamW)

template <typename A>
struct AdamW {
    A lr;
    A beta2;
    A one_minus_beta1;
    A one_minus_beta2;
    A eps;
    A weight_decay;
};

// 1 − β₁ᵗ and √(1 − β₂ᵗ) after t steps.
template <typename A>
struct BiasCorrections {
    A first;
    A second_root;
};

struct AdamWTerms {
    bool weight_decay;
    bool decoupled;  // AdamW: shrinks the parameter instead of adding to the gradient
    bool amsgrad;
};

// `theta`, `exp_avg`, `exp_avg_sq` and, with amsgrad, `max_exp_avg_sq` are read and written.
template <typename A, typename Terms>
GAM_FUSED_HD void adamw_step(A& theta, A& exp_avg, A& exp_avg_sq, A& max_exp_avg_sq, A grad, const AdamW<A>& adamw,
                             const BiasCorrections<A>& corrections, const Terms& terms) {
    A d = grad;
    if (terms.weight_decay) {
        if (terms.decoupled) {
            theta = theta - adamw.lr * adamw.weight_decay * theta;
        } else {
            d = d + adamw.weight_decay * theta;
        }
    }
    exp_avg = exp_avg + adamw.one_minus_beta1 * (d - exp_avg);
    exp_avg_sq = adamw.beta2 * exp_avg_sq + adamw.one_minus_beta2 * d * d;
    A second_moment = exp_avg_sq;
    if (terms.amsgrad) {
        // NaN counts as larger than any number, as in torch.maximum.
        max_exp_avg_sq = exp_avg_sq <= max_exp_avg_sq ? max_exp_avg_sq : exp_avg_sq;
        second_moment = max_exp_avg_sq;
    }
    const A denominator = square_root(second_moment) / corrections.second_root + adamw.eps;
    theta = theta - adamw.lr / corrections.first * exp_avg / denominator;
}

}  // namespace gam_fused

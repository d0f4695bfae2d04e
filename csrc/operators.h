// The operators of schemas.h as far as they are the same on every device: check the arguments, then launch.
//
// Each is a template over what a device does with checked arguments. None that writes calls it for lists without
// tensors.

#pragma once

#include <torch/csrc/stable/tensor.h>

#include <cstdint>
#include <optional>
#include <tuple>
#include <vector>

#include "boxing.h"
#include "operands.h"
#include "step_arguments.h"

namespace gam_fused {

using OptionalTensor = std::optional<Tensor>;

// As PyTorch hands over an integer; taken modulo 2^64.
using OptionalSeed = std::optional<int64_t>;

inline std::optional<uint64_t> unsigned_seed(const OptionalSeed& seed) {
    return seed ? std::optional(static_cast<uint64_t>(*seed)) : std::nullopt;
}

// launch(operands, direction_norm, grad_norm, rho, xi, rounding seed)
template <auto launch>
void perturb_(const TensorList& params, const TensorList& directions, const Tensor& direction_norm,
              const Tensor& grad_norm, double rho, double xi, const OptionalSeed& rounding_seed) {
    const Operands operands({{"params", params, true}, {"directions", directions, true}});
    if (!operands.is_empty()) {
        launch(operands, operands.scalar("direction_norm", direction_norm), operands.scalar("grad_norm", grad_norm),
               rho, xi, unsigned_seed(rounding_seed));
    }
}

// launch(operands, norm, rho, xi, rounding seed)
template <auto launch>
void shift_(const TensorList& params, const TensorList& origins, const TensorList& ends, const TensorList& starts,
            const Tensor& norm, double rho, double xi, const OptionalSeed& rounding_seed) {
    const Operands operands({{"params", params, true},
                             {"origins", origins, false, /*is_optional=*/true},
                             {"ends", ends},
                             {"starts", starts, false, /*is_optional=*/true}});
    if (!operands.is_empty()) {
        launch(operands, operands.scalar("norm", norm), rho, xi, unsigned_seed(rounding_seed));
    }
}

// launch(operands)
template <auto launch>
void restore_(const TensorList& params, const TensorList& backups) {
    const Operands operands({{"params", params, true}, {"backups", backups}});
    if (!operands.is_empty()) {
        launch(operands);
    }
}

// launch(operands, penalty)
template <auto launch>
void combine_(const TensorList& params, const TensorList& backups, const TensorList& grads, const TensorList& hvps,
              const Tensor& adversarial_norm, double rho, double alpha, double xi) {
    const Operands operands({{"params", params, true}, {"backups", backups}, {"grads", grads, true}, {"hvps", hvps}});
    if (!operands.is_empty()) {
        launch(operands, Penalty{operands.scalar("adversarial_norm", adversarial_norm), rho, alpha, xi});
    }
}

inline Operands four_gradients(const TensorList& grads, const TensorList& grads_ahead,
                               const TensorList& adversarial_grads, const TensorList& adversarial_grads_ahead,
                               bool are_written) {
    return Operands({{"grads", grads, are_written},
                     {"grads_ahead", grads_ahead, are_written},
                     {"adversarial_grads", adversarial_grads},
                     {"adversarial_grads_ahead", adversarial_grads_ahead}});
}

// launch(operands, weights) -> projection, norm of h⁺, norm of h⁻
template <auto launch>
std::tuple<Tensor, Tensor, Tensor> projection(const TensorList& grads, const TensorList& grads_ahead,
                                              const TensorList& adversarial_grads,
                                              const TensorList& adversarial_grads_ahead, double weight0, double weight1,
                                              double weight2, double weight3) {
    const Operands operands = four_gradients(grads, grads_ahead, adversarial_grads, adversarial_grads_ahead, false);
    return launch(operands, Weights<double>{weight0, weight1, weight2, weight3});
}

// launch(operands, decomposition)
template <auto launch>
void decompose_(const TensorList& grads, const TensorList& grads_ahead, const TensorList& adversarial_grads,
                const TensorList& adversarial_grads_ahead, const Tensor& projection, const Tensor& plus_norm,
                double weight0, double weight1, double weight2, double weight3, double xi) {
    const Operands operands = four_gradients(grads, grads_ahead, adversarial_grads, adversarial_grads_ahead, true);
    if (!operands.is_empty()) {
        launch(operands, Decomposition{operands.scalar("projection", projection),
                                       operands.scalar("plus_norm", plus_norm),
                                       {weight0, weight1, weight2, weight3},
                                       xi});
    }
}

namespace detail {

inline const float* float_or_null(const Operands& operands, const char* name, const OptionalTensor& tensor) {
    return tensor ? static_cast<const float*>(operands.scalar(name, *tensor, Dtype::float32)) : nullptr;
}

}  // namespace detail

// What fused steps have in common, with its guards' addresses.
class Step {
 public:
    Step(const Operands& operands, const Tensor& adversarial_norm, const TensorList& guards, double rho, double alpha,
         double xi, double lr, const OptionalTensor& lr_tensor, bool maximize, bool write_grads,
         const OptionalTensor& grad_scale, const OptionalTensor& found_inf, const OptionalSeed& rounding_seed)
        : guards_(operands.scalars("guards", guards)),
          arguments_{{operands.scalar("adversarial_norm", adversarial_norm), rho, alpha, xi},
                     guards_,
                     detail::float_or_null(operands, "grad_scale", grad_scale),
                     detail::float_or_null(operands, "found_inf", found_inf),
                     lr_tensor ? operands.scalar("lr_tensor", *lr_tensor) : nullptr,
                     lr,
                     maximize,
                     write_grads,
                     unsigned_seed(rounding_seed)} {}

    Step(const Step&) = delete;
    Step& operator=(const Step&) = delete;

    const StepArguments& arguments() const { return arguments_; }

 private:
    std::vector<const void*> guards_;
    StepArguments arguments_;
};

// launch(operands, step, sgd)
template <auto launch>
void sgd_step_(const TensorList& params, const TensorList& backups, const TensorList& grads, const TensorList& hvps,
               const TensorList& momentum_buffers, const Tensor& adversarial_norm, const TensorList& guards, double rho,
               double alpha, double xi, double lr, const OptionalTensor& lr_tensor, double momentum, double dampening,
               double weight_decay, bool nesterov, bool maximize, bool first_step, bool write_grads,
               const OptionalTensor& grad_scale, const OptionalTensor& found_inf, const OptionalSeed& rounding_seed) {
    const Operands operands({{"params", params, true},
                             {"backups", backups},
                             {"grads", grads, true},
                             {"hvps", hvps},
                             {"momentum_buffers", momentum_buffers, true, /*is_optional=*/momentum == 0}});
    if (!operands.is_empty()) {
        const Step step(operands, adversarial_norm, guards, rho, alpha, xi, lr, lr_tensor, maximize, write_grads,
                        grad_scale, found_inf, rounding_seed);
        launch(operands, step.arguments(), SGDArguments{momentum, dampening, weight_decay, nesterov, first_step});
    }
}

// launch(operands, addresses of the step counts, step, adamw)
template <auto launch>
void adamw_step_(const TensorList& params, const TensorList& backups, const TensorList& grads, const TensorList& hvps,
                 const TensorList& exp_avgs, const TensorList& exp_avg_sqs, const TensorList& max_exp_avg_sqs,
                 const TensorList& state_steps, const Tensor& adversarial_norm, const TensorList& guards, double rho,
                 double alpha, double xi, double lr, const OptionalTensor& lr_tensor, double beta1, double beta2,
                 double eps, double weight_decay, bool decoupled_weight_decay, bool amsgrad, bool maximize,
                 bool write_grads, const OptionalTensor& grad_scale, const OptionalTensor& found_inf,
                 const OptionalSeed& rounding_seed) {
    const Operands operands({{"params", params, true},
                             {"backups", backups},
                             {"grads", grads, true},
                             {"hvps", hvps},
                             {"exp_avgs", exp_avgs, true},
                             {"exp_avg_sqs", exp_avg_sqs, true},
                             {"max_exp_avg_sqs", max_exp_avg_sqs, true, /*is_optional=*/!amsgrad}});
    const Operands steps = checked_steps(state_steps, operands);
    if (!operands.is_empty()) {
        const Step step(operands, adversarial_norm, guards, rho, alpha, xi, lr, lr_tensor, maximize, write_grads,
                        grad_scale, found_inf, rounding_seed);
        launch(operands, steps.data[0], step.arguments(),
               AdamWArguments{beta1, beta2, eps, weight_decay, decoupled_weight_decay, amsgrad});
    }
}

}  // namespace gam_fused

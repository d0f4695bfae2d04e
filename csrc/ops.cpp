// The operators of schemas.h, and their CPU implementations.

#include <torch/csrc/stable/library.h>
#include <torch/csrc/stable/ops.h>

#include <cmath>
#include <numeric>
#include <optional>
#include <tuple>
#include <vector>

#include "boxing.h"
#include "cpu/chunk_kernels.h"
#include "cpu/parallel.h"
#include "operands.h"
#include "schemas.h"

namespace gam_fused::cpu {

namespace {

// Of one list; a step reads and writes several.
constexpr int64_t kStreamedBytes = int64_t{16} << 20;

using OptionalTensor = std::optional<Tensor>;

// An address in the list, `begin` elements into its tensor.
void* at(const Operands& operands, size_t list, const Chunk& chunk) {
    const std::vector<void*>& addresses = operands.data[list];
    return addresses.empty() ? nullptr
                             : static_cast<char*>(addresses[static_cast<size_t>(chunk.tensor)]) +
                                   chunk.begin * static_cast<int64_t>(size_of(operands.dtype));
}

template <typename Function>
void for_each_chunk_of(const Operands& operands, const Function& function) {
    const ChunkPlan plan(operands.numels, kChunk);
    for_each_chunk(operands.numels, plan, kChunk,
                   [&](int64_t, const Chunk& chunk) { function(chunk, chunk.end - chunk.begin); });
}

double value_at(Dtype dtype, const void* scalar) {
    return dtype == Dtype::float64 ? *static_cast<const double*>(scalar) : *static_cast<const float*>(scalar);
}

double scalar_value(const Operands& operands, const char* name, const Tensor& tensor) {
    return value_at(operands.dtype, operands.scalar(name, tensor));
}

// A rule of update_rules.h for numbers that are the same for all elements, in the lists' accumulation type.
template <typename Function>
double in_accumulation_type(Dtype dtype, const Function& function) {
    return with_type(dtype, [&](auto type) { return static_cast<double>(function(accumulation_t<decltype(type)>{})); });
}

// ---------------------------------------------------------------- norms

Tensor new_scalar(Dtype dtype, double value) {
    using torch::headeronly::ScalarType;
    const auto scalar_type = dtype == Dtype::float64 ? ScalarType::Double : ScalarType::Float;
    const torch::stable::Device cpu(torch::headeronly::DeviceType::CPU);
    Tensor result = torch::stable::empty({}, scalar_type, std::nullopt, cpu);
    if (dtype == Dtype::float64) {
        *static_cast<double*>(result.data_ptr()) = value;
    } else {
        *static_cast<float*>(result.data_ptr()) = static_cast<float>(value);
    }
    return result;
}

// Of one list, whose tensors have these numbers of elements.
double norm_of(const Operands& operands, size_t list, const std::vector<int64_t>& numels) {
    const ChunkKernels& kernels = chunk_kernels();
    const ChunkPlan plan(numels, kChunk);
    std::vector<double> partials(static_cast<size_t>(plan.size()));
    for_each_chunk(numels, plan, kChunk, [&](int64_t number, const Chunk& chunk) {
        partials[static_cast<size_t>(number)] =
            kernels.sum_of_squares(operands.dtype, at(operands, list, chunk), chunk.end - chunk.begin);
    });
    // In the order of chunks, whichever thread made them.
    return std::sqrt(std::accumulate(partials.begin(), partials.end(), 0.0));
}

Tensor l2_norm(const TensorList& tensors) {
    const Operands operands({{"tensors", tensors}}, /*same_shape=*/false);
    return new_scalar(operands.dtype, norm_of(operands, 0, operands.numels));
}

std::tuple<Tensor, Tensor> l2_norm_pair(const TensorList& first, const TensorList& second) {
    const Operands operands({{"first", first}, {"second", second}}, /*same_shape=*/false);
    const auto middle = operands.numels.begin() + static_cast<std::ptrdiff_t>(first.size());
    return {new_scalar(operands.dtype, norm_of(operands, 0, {operands.numels.begin(), middle})),
            new_scalar(operands.dtype, norm_of(operands, 1, {middle, operands.numels.end()}))};
}

// ---------------------------------------------------------------- perturb, restore, combine

void perturb_(const TensorList& params, const TensorList& directions, const Tensor& direction_norm,
              const Tensor& grad_norm, double rho, double xi) {
    const Operands operands({{"params", params, true}, {"directions", directions, true}});
    if (operands.is_empty()) {
        return;
    }
    const double norm_u = scalar_value(operands, "direction_norm", direction_norm);
    const double norm_g = scalar_value(operands, "grad_norm", grad_norm);
    const double scale = in_accumulation_type(operands.dtype, [&](auto zero) {
        using A = decltype(zero);
        return perturbation_scale<A>(A(norm_u), A(norm_g), A(rho), A(xi));
    });
    const bool is_moving = moves(norm_u, norm_g, scale);
    const ChunkKernels& kernels = chunk_kernels();
    for_each_chunk_of(operands, [&](const Chunk& chunk, int64_t size) {
        kernels.perturb(operands.dtype, at(operands, 0, chunk), at(operands, 1, chunk), size, scale, is_moving);
    });
}

// Whether parameters, which these launches write without reading, are too large for the caches to be of use.
bool is_streaming(const Operands& operands) {
    const int64_t elements = std::accumulate(operands.numels.begin(), operands.numels.end(), int64_t{0});
    return elements * static_cast<int64_t>(size_of(operands.dtype)) >= kStreamedBytes;
}

void copy_all(const Operands& operands, size_t to, size_t from) {
    const ChunkKernels& kernels = chunk_kernels();
    const bool streaming = is_streaming(operands);
    for_each_chunk_of(operands, [&](const Chunk& chunk, int64_t size) {
        kernels.copy(at(operands, to, chunk), at(operands, from, chunk),
                     size * static_cast<int64_t>(size_of(operands.dtype)), streaming);
    });
}

void restore_(const TensorList& params, const TensorList& backups) {
    const Operands operands({{"params", params, true}, {"backups", backups}});
    copy_all(operands, 0, 1);
}

double penalty_scale_of(const Operands& operands, const Tensor& adversarial_norm, double rho, double alpha, double xi) {
    const double norm = scalar_value(operands, "adversarial_norm", adversarial_norm);
    return in_accumulation_type(operands.dtype, [&](auto zero) {
        using A = decltype(zero);
        return penalty_scale<A>(A(norm), A(rho), A(alpha), A(xi));
    });
}

void combine_(const TensorList& params, const TensorList& backups, const TensorList& grads, const TensorList& hvps,
              const Tensor& adversarial_norm, double rho, double alpha, double xi) {
    const Operands operands({{"params", params, true}, {"backups", backups}, {"grads", grads, true}, {"hvps", hvps}});
    if (operands.is_empty()) {
        return;
    }
    const double scale = penalty_scale_of(operands, adversarial_norm, rho, alpha, xi);
    const bool streaming = is_streaming(operands);
    const ChunkKernels& kernels = chunk_kernels();
    for_each_chunk_of(operands, [&](const Chunk& chunk, int64_t size) {
        kernels.combine(operands.dtype, at(operands, 0, chunk), at(operands, 1, chunk), at(operands, 2, chunk),
                        at(operands, 3, chunk), size, scale, streaming);
    });
}

// ---------------------------------------------------------------- base rules

// Whether the launch steps at all; otherwise it only restores.
bool holds(const Operands& operands, const Tensor& adversarial_norm, const TensorList& guards,
           const OptionalTensor& found_inf) {
    bool finite = is_finite(scalar_value(operands, "adversarial_norm", adversarial_norm));
    for (const void* guard : operands.scalars("guards", guards)) {
        finite = is_finite(value_at(operands.dtype, guard)) && finite;
    }
    if (found_inf) {
        const void* const found = operands.scalar("found_inf", *found_inf, Dtype::float32);
        finite = *static_cast<const float*>(found) == 0.0f && finite;
    }
    return finite;
}

Combination combination_of(const Operands& operands, const Tensor& adversarial_norm, double rho, double alpha,
                           double xi, bool maximize, bool write_grads, const OptionalTensor& grad_scale) {
    double factor = 1;
    if (grad_scale) {
        const float scale = *static_cast<const float*>(operands.scalar("grad_scale", *grad_scale, Dtype::float32));
        factor =
            in_accumulation_type(operands.dtype, [&](auto one) { return decltype(one)(1) / decltype(one)(scale); });
    }
    return {penalty_scale_of(operands, adversarial_norm, rho, alpha, xi), factor, write_grads, maximize,
            is_streaming(operands)};
}

double learning_rate(const Operands& operands, double lr, const OptionalTensor& lr_tensor) {
    return lr_tensor ? scalar_value(operands, "lr_tensor", *lr_tensor) : lr;
}

void sgd_step_(const TensorList& params, const TensorList& backups, const TensorList& grads, const TensorList& hvps,
               const TensorList& momentum_buffers, const Tensor& adversarial_norm, const TensorList& guards, double rho,
               double alpha, double xi, double lr, const OptionalTensor& lr_tensor, double momentum, double dampening,
               double weight_decay, bool nesterov, bool maximize, bool first_step, bool write_grads,
               const OptionalTensor& grad_scale, const OptionalTensor& found_inf) {
    const Operands operands({{"params", params, true},
                             {"backups", backups},
                             {"grads", grads, true},
                             {"hvps", hvps},
                             {"momentum_buffers", momentum_buffers, true, /*is_optional=*/momentum == 0}});
    if (operands.is_empty()) {
        return;
    }
    const SGDLaunch launch = {
        combination_of(operands, adversarial_norm, rho, alpha, xi, maximize, write_grads, grad_scale),
        {learning_rate(operands, lr, lr_tensor), weight_decay, momentum, 1 - dampening},
        {weight_decay != 0, momentum != 0, nesterov, first_step}};
    if (!holds(operands, adversarial_norm, guards, found_inf)) {
        copy_all(operands, 0, 1);
        return;
    }
    const ChunkKernels& kernels = chunk_kernels();
    for_each_chunk_of(operands, [&](const Chunk& chunk, int64_t size) {
        const SGDChunk addresses = {at(operands, 0, chunk), at(operands, 1, chunk), at(operands, 2, chunk),
                                    at(operands, 3, chunk), at(operands, 4, chunk)};
        kernels.sgd_step(operands.dtype, addresses, size, launch);
    });
}

void adamw_step_(const TensorList& params, const TensorList& backups, const TensorList& grads, const TensorList& hvps,
                 const TensorList& exp_avgs, const TensorList& exp_avg_sqs, const TensorList& max_exp_avg_sqs,
                 const TensorList& state_steps, const Tensor& adversarial_norm, const TensorList& guards, double rho,
                 double alpha, double xi, double lr, const OptionalTensor& lr_tensor, double beta1, double beta2,
                 double eps, double weight_decay, bool decoupled_weight_decay, bool amsgrad, bool maximize,
                 bool write_grads, const OptionalTensor& grad_scale, const OptionalTensor& found_inf) {
    const Operands operands({{"params", params, true},
                             {"backups", backups},
                             {"grads", grads, true},
                             {"hvps", hvps},
                             {"exp_avgs", exp_avgs, true},
                             {"exp_avg_sqs", exp_avg_sqs, true},
                             {"max_exp_avg_sqs", max_exp_avg_sqs, true, /*is_optional=*/!amsgrad}});
    const Operands steps = checked_steps(state_steps, operands);
    if (operands.is_empty()) {
        return;
    }
    const AdamWLaunch launch = {
        combination_of(operands, adversarial_norm, rho, alpha, xi, maximize, write_grads, grad_scale),
        {learning_rate(operands, lr, lr_tensor), beta2, 1 - beta1, 1 - beta2, eps, weight_decay},
        {weight_decay != 0, decoupled_weight_decay, amsgrad}};
    if (!holds(operands, adversarial_norm, guards, found_inf)) {
        copy_all(operands, 0, 1);
        return;
    }
    std::vector<BiasCorrections<double>> corrections;
    corrections.reserve(state_steps.size());
    for (void* const step : steps.data[0]) {
        const double count = *static_cast<float*>(step) += 1;
        corrections.push_back({1 - std::pow(beta1, count), std::sqrt(1 - std::pow(beta2, count))});
    }
    const ChunkKernels& kernels = chunk_kernels();
    for_each_chunk_of(operands, [&](const Chunk& chunk, int64_t size) {
        const AdamWChunk addresses = {at(operands, 0, chunk), at(operands, 1, chunk), at(operands, 2, chunk),
                                      at(operands, 3, chunk), at(operands, 4, chunk), at(operands, 5, chunk),
                                      at(operands, 6, chunk)};
        kernels.adamw_step(operands.dtype, addresses, size, launch, corrections[static_cast<size_t>(chunk.tensor)]);
    });
}

}  // namespace

}  // namespace gam_fused::cpu

STABLE_TORCH_LIBRARY(gam_fused, library) {
    using namespace gam_fused;
    for (const char* schema : {schemas::l2_norm, schemas::l2_norm_pair, schemas::perturb_, schemas::restore_,
                               schemas::combine_, schemas::sgd_step_, schemas::adamw_step_}) {
        library.def(schema);
    }
}

STABLE_TORCH_LIBRARY_IMPL(gam_fused, CPU, library) {
    using namespace gam_fused::cpu;
    using gam_fused::boxed;
    library.impl("l2_norm", boxed<&l2_norm>);
    library.impl("l2_norm_pair", boxed<&l2_norm_pair>);
    library.impl("perturb_", boxed<&perturb_>);
    library.impl("restore_", boxed<&restore_>);
    library.impl("combine_", boxed<&combine_>);
    library.impl("sgd_step_", boxed<&sgd_step_>);
    library.impl("adamw_step_", boxed<&adamw_step_>);
}

// The operators of schemas.h, and their CPU implementations.

#include <torch/csrc/stable/library.h>
#include <torch/csrc/stable/ops.h>

#include <cmath>
#include <cstring>
#include <numeric>
#include <optional>
#include <string>
#include <tuple>
#include <vector>

#include "boxing.h"
#include "cpu/chunk_kernels.h"
#include "cpu/parallel.h"
#include "direct/python_calls.h"
#include "operands.h"
#include "operators.h"
#include "rounding.h"
#include "schemas.h"

namespace gam_fused::cpu {

namespace {

// Of one list; a step reads and writes several.
constexpr int64_t kStreamedBytes = int64_t{16} << 20;

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

// function(chunk, its size, its random bits or, where parameters are rounded to nearest, null)
template <typename Function>
void for_each_chunk_of(const Operands& operands, const std::optional<uint64_t>& rounding_seed,
                       const Function& function) {
    static_assert(kElementsPerKey % kChunk == 0, "a chunk has one key");
    const uint64_t key = launch_key(rounding_seed.value_or(0));
    for_each_chunk_of(operands, [&](const Chunk& chunk, int64_t size) {
        const RandomChunk random(key, static_cast<uint64_t>(chunk.tensor), chunk.begin);
        function(chunk, size, rounding_seed ? &random : nullptr);
    });
}

double value_at(Dtype dtype, const void* scalar) {
    return dtype == Dtype::float64 ? *static_cast<const double*>(scalar) : *static_cast<const float*>(scalar);
}

// A rule of update_rules.h for numbers that are the same for all elements, in the lists' accumulation type.
template <typename Function>
double in_accumulation_type(Dtype dtype, const Function& function) {
    return with_type(dtype, [&](auto type) { return static_cast<double>(function(accumulation_t<decltype(type)>{})); });
}

// ---------------------------------------------------------------- norms

// Called after the last tensor of a list has been read: this one asks PyTorch for memory, which may run any code, and
// lists may be borrowed (direct/tensor_access.h).
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

// Of tensors with these numbers of elements: the root of all sum_of_squares(chunk, its size).
template <typename Function>
double norm_of(const std::vector<int64_t>& numels, const Function& sum_of_squares) {
    const ChunkPlan plan(numels, kChunk);
    std::vector<double> partials(static_cast<size_t>(plan.size()));
    for_each_chunk(numels, plan, kChunk, [&](int64_t number, const Chunk& chunk) {
        partials[static_cast<size_t>(number)] = sum_of_squares(chunk, chunk.end - chunk.begin);
    });
    // In the order of chunks, whichever thread made them.
    return std::sqrt(std::accumulate(partials.begin(), partials.end(), 0.0));
}

// Of one list, whose tensors have these numbers of elements.
double norm_of(const Operands& operands, size_t list, const std::vector<int64_t>& numels) {
    const ChunkKernels& kernels = chunk_kernels();
    return norm_of(numels, [&](const Chunk& chunk, int64_t size) {
        return kernels.sum_of_squares(operands.dtype, at(operands, list, chunk), size);
    });
}

Tensor l2_norm(const TensorList& tensors) {
    const Operands operands({{"tensors", tensors}}, /*same_shape=*/false);
    return new_scalar(operands.dtype, norm_of(operands, 0, operands.numels));
}

std::tuple<Tensor, Tensor> l2_norm_pair(const TensorList& first, const TensorList& second) {
    const Operands operands({{"first", first}, {"second", second}}, /*same_shape=*/false);
    const auto middle = operands.numels.begin() + static_cast<std::ptrdiff_t>(first.size());
    const double norm_of_first = norm_of(operands, 0, {operands.numels.begin(), middle});
    const double norm_of_second = norm_of(operands, 1, {middle, operands.numels.end()});
    return {new_scalar(operands.dtype, norm_of_first), new_scalar(operands.dtype, norm_of_second)};
}

Tensor difference_norm(const TensorList& ends, const TensorList& starts) {
    const Operands operands({{"ends", ends}, {"starts", starts}});
    const ChunkKernels& kernels = chunk_kernels();
    return new_scalar(operands.dtype, norm_of(operands.numels, [&](const Chunk& chunk, int64_t size) {
                          return kernels.sum_of_squared_differences(operands.dtype, at(operands, 0, chunk),
                                                                    at(operands, 1, chunk), size);
                      }));
}

// ---------------------------------------------------------------- perturb, shift, restore, combine

void launch_perturb(const Operands& operands, const void* direction_norm, const void* grad_norm, double rho, double xi,
                    const std::optional<uint64_t>& rounding_seed) {
    const double norm_u = value_at(operands.dtype, direction_norm);
    const double norm_g = value_at(operands.dtype, grad_norm);
    const double scale = in_accumulation_type(operands.dtype, [&](auto zero) {
        using A = decltype(zero);
        return perturbation_scale<A>(A(norm_u), A(norm_g), A(rho), A(xi));
    });
    const bool is_moving = moves(norm_u, norm_g, scale);
    const ChunkKernels& kernels = chunk_kernels();
    for_each_chunk_of(operands, rounding_seed, [&](const Chunk& chunk, int64_t size, const RandomChunk* random) {
        kernels.perturb(operands.dtype, at(operands, 0, chunk), at(operands, 1, chunk), size, scale, is_moving, random);
    });
}

void launch_shift(const Operands& operands, const void* norm, double rho, double xi,
                  const std::optional<uint64_t>& rounding_seed) {
    const double length = value_at(operands.dtype, norm);
    const double scale = in_accumulation_type(operands.dtype, [&](auto zero) {
        using A = decltype(zero);
        return shift_scale<A>(A(length), A(rho), A(xi));
    });
    const bool is_moving = is_finite(length) && is_finite(scale);
    const size_t from = operands.data[1].empty() ? 0 : 1;
    const ChunkKernels& kernels = chunk_kernels();
    for_each_chunk_of(operands, rounding_seed, [&](const Chunk& chunk, int64_t size, const RandomChunk* random) {
        if (is_moving) {
            kernels.shift(operands.dtype, at(operands, 0, chunk), at(operands, from, chunk), at(operands, 2, chunk),
                          at(operands, 3, chunk), size, scale, random);
        } else if (from != 0) {
            kernels.copy(at(operands, 0, chunk), at(operands, from, chunk),
                         size * static_cast<int64_t>(size_of(operands.dtype)), false);
        }
    });
}

// Whether parameters, which these launches write without reading, are too large for the caches to be of use.
bool is_streaming(const Operands& operands) {
    const int64_t elements = std::accumulate(operands.numels.begin(), operands.numels.end(), int64_t{0});
    return elements * static_cast<int64_t>(size_of(operands.dtype)) >= kStreamedBytes;
}

// Parameters and backups are the first two lists of every launch that restores.
void launch_restore(const Operands& operands) {
    const ChunkKernels& kernels = chunk_kernels();
    const bool streaming = is_streaming(operands);
    for_each_chunk_of(operands, [&](const Chunk& chunk, int64_t size) {
        kernels.copy(at(operands, 0, chunk), at(operands, 1, chunk),
                     size * static_cast<int64_t>(size_of(operands.dtype)), streaming);
    });
}

double scale_of(const Operands& operands, const Penalty& penalty) {
    return in_accumulation_type(operands.dtype, [&](auto zero) {
        using A = decltype(zero);
        const auto norm = static_cast<A>(value_at(operands.dtype, penalty.adversarial_norm));
        return penalty_scale<A>(norm, A(penalty.rho), A(penalty.alpha), A(penalty.xi));
    });
}

void launch_combine(const Operands& operands, const Penalty& penalty) {
    const double scale = scale_of(operands, penalty);
    const bool streaming = is_streaming(operands);
    const ChunkKernels& kernels = chunk_kernels();
    for_each_chunk_of(operands, [&](const Chunk& chunk, int64_t size) {
        kernels.combine(operands.dtype, at(operands, 0, chunk), at(operands, 1, chunk), at(operands, 2, chunk),
                        at(operands, 3, chunk), size, scale, streaming);
    });
}

// ---------------------------------------------------------------- decompose

GradientsChunk gradients_at(const Operands& operands, const Chunk& chunk) {
    return {at(operands, 0, chunk), at(operands, 1, chunk), at(operands, 2, chunk), at(operands, 3, chunk)};
}

std::tuple<Tensor, Tensor, Tensor> launch_projection(const Operands& operands, const Weights<double>& weights) {
    const ChunkKernels& kernels = chunk_kernels();
    const ChunkPlan plan(operands.numels, kChunk);
    std::vector<MixedSums> partials(static_cast<size_t>(plan.size()));
    for_each_chunk(operands.numels, plan, kChunk, [&](int64_t number, const Chunk& chunk) {
        partials[static_cast<size_t>(number)] =
            kernels.mixed_sums(operands.dtype, gradients_at(operands, chunk), chunk.end - chunk.begin, weights);
    });
    MixedSums sums = {};
    for (const MixedSums& partial : partials) {  // in the order of chunks, whichever thread made them
        sums.dot += partial.dot;
        sums.plus_squared += partial.plus_squared;
        sums.minus_squared += partial.minus_squared;
    }
    const double plus_norm = std::sqrt(sums.plus_squared);
    return {new_scalar(operands.dtype, plus_norm == 0 ? 0 : sums.dot / plus_norm),
            new_scalar(operands.dtype, plus_norm), new_scalar(operands.dtype, std::sqrt(sums.minus_squared))};
}

void launch_decompose(const Operands& operands, const Decomposition& decomposition) {
    const double scale = in_accumulation_type(operands.dtype, [&](auto zero) {
        using A = decltype(zero);
        return parallel_scale<A>(A(value_at(operands.dtype, decomposition.projection)),
                                 A(value_at(operands.dtype, decomposition.plus_norm)), A(decomposition.xi));
    });
    const ChunkKernels& kernels = chunk_kernels();
    for_each_chunk_of(operands, [&](const Chunk& chunk, int64_t size) {
        kernels.decompose(operands.dtype, gradients_at(operands, chunk), size, decomposition.weights, scale);
    });
}

// ---------------------------------------------------------------- base rules

// Whether the launch steps at all; otherwise it only restores.
bool holds(const Operands& operands, const StepArguments& step) {
    bool finite = is_finite(value_at(operands.dtype, step.penalty.adversarial_norm));
    for (const void* guard : step.guards) {
        finite = is_finite(value_at(operands.dtype, guard)) && finite;
    }
    return finite && (step.found_inf == nullptr || *step.found_inf == 0.0f);
}

Combination combination_of(const Operands& operands, const StepArguments& step) {
    double factor = 1;
    if (step.grad_scale != nullptr) {
        factor = in_accumulation_type(operands.dtype, [&](auto zero) {
            using A = decltype(zero);
            return A(1) / A(*step.grad_scale);
        });
    }
    return {scale_of(operands, step.penalty), factor, step.write_grads, step.maximize, is_streaming(operands)};
}

double learning_rate(const Operands& operands, const StepArguments& step) {
    return step.lr_tensor == nullptr ? step.lr : value_at(operands.dtype, step.lr_tensor);
}

void launch_sgd_step(const Operands& operands, const StepArguments& step, const SGDArguments& sgd) {
    if (!holds(operands, step)) {
        launch_restore(operands);
        return;
    }
    const SGDLaunch launch = {combination_of(operands, step),
                              {learning_rate(operands, step), sgd.weight_decay, sgd.momentum, 1 - sgd.dampening},
                              {sgd.weight_decay != 0, sgd.momentum != 0, sgd.nesterov, sgd.first_step}};
    const ChunkKernels& kernels = chunk_kernels();
    for_each_chunk_of(operands, step.rounding_seed, [&](const Chunk& chunk, int64_t size, const RandomChunk* random) {
        const SGDChunk addresses = {at(operands, 0, chunk), at(operands, 1, chunk), at(operands, 2, chunk),
                                    at(operands, 3, chunk), at(operands, 4, chunk)};
        kernels.sgd_step(operands.dtype, addresses, size, launch, random);
    });
}

void launch_adamw_step(const Operands& operands, const std::vector<void*>& state_steps, const StepArguments& step,
                       const AdamWArguments& adamw) {
    if (!holds(operands, step)) {
        launch_restore(operands);
        return;
    }
    const AdamWLaunch launch = {
        combination_of(operands, step),
        {learning_rate(operands, step), adamw.beta2, 1 - adamw.beta1, 1 - adamw.beta2, adamw.eps, adamw.weight_decay},
        {adamw.weight_decay != 0, adamw.decoupled_weight_decay, adamw.amsgrad}};
    std::vector<BiasCorrections<double>> corrections;
    corrections.reserve(state_steps.size());
    for (void* const state_step : state_steps) {
        const double count = *static_cast<const float*>(state_step) + 1.0f;
        corrections.push_back({1 - std::pow(adamw.beta1, count), std::sqrt(1 - std::pow(adamw.beta2, count))});
    }
    const ChunkKernels& kernels = chunk_kernels();
    for_each_chunk_of(operands, step.rounding_seed, [&](const Chunk& chunk, int64_t size, const RandomChunk* random) {
        const AdamWChunk addresses = {at(operands, 0, chunk), at(operands, 1, chunk), at(operands, 2, chunk),
                                      at(operands, 3, chunk), at(operands, 4, chunk), at(operands, 5, chunk),
                                      at(operands, 6, chunk)};
        kernels.adamw_step(operands.dtype, addresses, size, launch, corrections[static_cast<size_t>(chunk.tensor)],
                           random);
    });
    for (void* const state_step : state_steps) {  // last: above, memory may run out before anything is written
        *static_cast<float*>(state_step) += 1;
    }
}

// visit(an Operator, its schema) for each.
template <auto kFunction>
struct Operator {
    static constexpr auto function = kFunction;
};

template <typename Visit>
void for_each_operator(const Visit& visit) {
    visit(Operator<&l2_norm>{}, schemas::l2_norm);
    visit(Operator<&l2_norm_pair>{}, schemas::l2_norm_pair);
    visit(Operator<&difference_norm>{}, schemas::difference_norm);
    visit(Operator<&perturb_<&launch_perturb>>{}, schemas::perturb_);
    visit(Operator<&shift_<&launch_shift>>{}, schemas::shift_);
    visit(Operator<&restore_<&launch_restore>>{}, schemas::restore_);
    visit(Operator<&combine_<&launch_combine>>{}, schemas::combine_);
    visit(Operator<&projection<&launch_projection>>{}, schemas::projection);
    visit(Operator<&decompose_<&launch_decompose>>{}, schemas::decompose_);
    visit(Operator<&sgd_step_<&launch_sgd_step>>{}, schemas::sgd_step_);
    visit(Operator<&adamw_step_<&launch_adamw_step>>{}, schemas::adamw_step_);
}

}  // namespace

}  // namespace gam_fused::cpu

PyObject* gam_fused::direct::python_calls(const TensorAccess* access) {
    tensor_access = access;
    PyObject* calls = PyDict_New();
    bool is_whole = calls != nullptr;
    cpu::for_each_operator([&](auto each, const char* schema) {
        is_whole = is_whole && add_python_call<decltype(each)::function>(calls, schema);
    });
    if (!is_whole) {
        Py_CLEAR(calls);
    }
    return calls;
}

STABLE_TORCH_LIBRARY(gam_fused, library) {
    gam_fused::cpu::for_each_operator([&](auto, const char* schema) { library.def(schema); });
}

STABLE_TORCH_LIBRARY_IMPL(gam_fused, CPU, library) {
    using namespace gam_fused;
    cpu::for_each_operator([&](auto each, const char* schema) {
        const std::string name(schema, std::strchr(schema, '('));
        library.impl(name.c_str(), boxed<decltype(each)::function>);
    });
}

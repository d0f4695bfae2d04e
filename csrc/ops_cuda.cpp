// The operators of schemas.h on CUDA devices: checks as on the CPU, then the launches of cuda/launches.h on the current
// stream. Nothing here waits for the device.

#include <cuda_runtime_api.h>
#include <torch/csrc/inductor/aoti_torch/c/shim.h>
#include <torch/csrc/stable/accelerator.h>
#include <torch/csrc/stable/library.h>
#include <torch/csrc/stable/ops.h>
#include <torch/csrc/stable/tensor.h>

#include <array>
#include <atomic>
#include <initializer_list>
#include <optional>
#include <string>
#include <tuple>
#include <vector>

#include "boxing.h"
#include "cuda/launches.h"
#include "operands.h"
#include "schemas.h"

namespace gam_fused::cuda {

namespace {

using OptionalTensor = std::optional<Tensor>;
using torch::headeronly::ScalarType;

// Asked for once: the driver takes microseconds to answer. Two threads that both ask get the same answer.
int multiprocessors_of(int32_t device) {
    constexpr size_t kCached = 64;
    static std::array<std::atomic<int>, kCached> cache{};
    const auto slot = static_cast<size_t>(device);
    int count = slot < kCached ? cache[slot].load(std::memory_order_relaxed) : 0;
    if (count == 0) {
        const cudaError_t error = cudaDeviceGetAttribute(&count, cudaDevAttrMultiProcessorCount, device);
        if (error != cudaSuccess) {
            fail("CUDA device ", device, ": ", cudaGetErrorString(error));
        }
        if (slot < kCached) {
            cache[slot].store(count, std::memory_order_relaxed);
        }
    }
    return count;
}

// Makes the lists' device the current one while it lives.
class OnDevice {
 public:
    explicit OnDevice(const Operands& operands) : guard_(operands.device_index), device_(operands.device_index) {}

    Target target() const {
        void* stream = nullptr;
        STABLE_TORCH_ERROR_CODE_CHECK(aoti_torch_get_current_cuda_stream(device_, &stream));
        return {static_cast<Stream>(stream), multiprocessors_of(device_)};
    }

    Tensor empty(std::initializer_list<int64_t> sizes, ScalarType dtype) const {
        const torch::stable::Device device(torch::headeronly::DeviceType::CUDA,
                                           static_cast<torch::stable::accelerator::DeviceIndex>(device_));
        return torch::stable::empty(sizes, dtype, std::nullopt, device);
    }

 private:
    torch::stable::accelerator::DeviceGuard guard_;
    int32_t device_;
};

Elements elements_of(const Operands& operands) {
    return {operands.dtype, operands.numels};
}

// ---------------------------------------------------------------- norms

// One norm of all tensors, or one of the first `first_list` and one of the others.
std::vector<Tensor> norms_of(const Operands& operands, const Addresses& tensors, size_t first_list, size_t count) {
    const OnDevice device(operands);
    const ScalarType wide = operands.dtype == Dtype::float64 ? ScalarType::Double : ScalarType::Float;
    std::vector<Tensor> norms;
    std::vector<void*> addresses;
    for (size_t i = 0; i < count; ++i) {
        norms.push_back(device.empty({}, wide));
        addresses.push_back(norms.back().data_ptr());
    }
    // Freed on return, while kernels may still run: the allocator hands it out again only behind them on this stream.
    const auto bytes = static_cast<int64_t>(l2_norm_scratch_bytes(elements_of(operands)));
    const Tensor scratch = device.empty({bytes}, ScalarType::Byte);
    l2_norms(device.target(), elements_of(operands), tensors, first_list, scratch.data_ptr(), addresses);
    return norms;
}

Tensor l2_norm(const TensorList& tensors) {
    const Operands operands({{"tensors", tensors}}, /*same_shape=*/false);
    return norms_of(operands, operands.data[0], tensors.size(), 1)[0];
}

std::tuple<Tensor, Tensor> l2_norm_pair(const TensorList& first, const TensorList& second) {
    const Operands operands({{"first", first}, {"second", second}}, /*same_shape=*/false);
    Addresses tensors = operands.data[0];
    tensors.insert(tensors.end(), operands.data[1].begin(), operands.data[1].end());
    const std::vector<Tensor> norms = norms_of(operands, tensors, first.size(), 2);
    return {norms[0], norms[1]};
}

// ---------------------------------------------------------------- perturb, restore, combine

void perturb_(const TensorList& params, const TensorList& directions, const Tensor& direction_norm,
              const Tensor& grad_norm, double rho, double xi) {
    const Operands operands({{"params", params, true}, {"directions", directions, true}});
    if (operands.is_empty()) {
        return;
    }
    const void* const norm_u = operands.scalar("direction_norm", direction_norm);
    const void* const norm_g = operands.scalar("grad_norm", grad_norm);
    const OnDevice device(operands);
    perturb(device.target(), elements_of(operands), operands.data[0], operands.data[1], norm_u, norm_g, rho, xi);
}

void restore_(const TensorList& params, const TensorList& backups) {
    const Operands operands({{"params", params, true}, {"backups", backups}});
    if (operands.is_empty()) {
        return;
    }
    const OnDevice device(operands);
    restore(device.target(), elements_of(operands), operands.data[0], operands.data[1]);
}

Restored restored_of(const Operands& operands) {
    return {operands.data[0], operands.data[1], operands.data[2], operands.data[3]};
}

void combine_(const TensorList& params, const TensorList& backups, const TensorList& grads, const TensorList& hvps,
              const Tensor& adversarial_norm, double rho, double alpha, double xi) {
    const Operands operands({{"params", params, true}, {"backups", backups}, {"grads", grads, true}, {"hvps", hvps}});
    if (operands.is_empty()) {
        return;
    }
    const Penalty penalty = {operands.scalar("adversarial_norm", adversarial_norm), rho, alpha, xi};
    const OnDevice device(operands);
    combine(device.target(), elements_of(operands), restored_of(operands), penalty);
}

// ---------------------------------------------------------------- base rules

const float* float_or_null(const Operands& operands, const char* name, const OptionalTensor& tensor) {
    return tensor ? static_cast<const float*>(operands.scalar(name, *tensor, Dtype::float32)) : nullptr;
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
    const std::vector<const void*> guard_addresses = operands.scalars("guards", guards);
    const StepArguments step = {{operands.scalar("adversarial_norm", adversarial_norm), rho, alpha, xi},
                                guard_addresses,
                                float_or_null(operands, "grad_scale", grad_scale),
                                float_or_null(operands, "found_inf", found_inf),
                                lr_tensor ? operands.scalar("lr_tensor", *lr_tensor) : nullptr,
                                lr,
                                maximize,
                                write_grads};
    const OnDevice device(operands);
    sgd_step(device.target(), elements_of(operands), restored_of(operands), operands.data[4], step,
             {momentum, dampening, weight_decay, nesterov, first_step});
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
    const std::vector<const void*> guard_addresses = operands.scalars("guards", guards);
    const StepArguments step = {{operands.scalar("adversarial_norm", adversarial_norm), rho, alpha, xi},
                                guard_addresses,
                                float_or_null(operands, "grad_scale", grad_scale),
                                float_or_null(operands, "found_inf", found_inf),
                                lr_tensor ? operands.scalar("lr_tensor", *lr_tensor) : nullptr,
                                lr,
                                maximize,
                                write_grads};
    const Addresses no_maxima;
    const OnDevice device(operands);
    adamw_step(device.target(), elements_of(operands), restored_of(operands),
               {operands.data[4], operands.data[5], amsgrad ? operands.data[6] : no_maxima, steps.data[0]}, step,
               {beta1, beta2, eps, weight_decay, decoupled_weight_decay});
}

}  // namespace

}  // namespace gam_fused::cuda

STABLE_TORCH_LIBRARY_IMPL(gam_fused, CUDA, library) {
    using namespace gam_fused::cuda;
    using gam_fused::boxed;
    library.impl("l2_norm", boxed<&l2_norm>);
    library.impl("l2_norm_pair", boxed<&l2_norm_pair>);
    library.impl("perturb_", boxed<&perturb_>);
    library.impl("restore_", boxed<&restore_>);
    library.impl("combine_", boxed<&combine_>);
    library.impl("sgd_step_", boxed<&sgd_step_>);
    library.impl("adamw_step_", boxed<&adamw_step_>);
}

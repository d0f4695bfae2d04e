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
#include "operators.h"
#include "schemas.h"

namespace gam_fused::cuda {

namespace {

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

Tensor difference_norm(const TensorList& ends, const TensorList& starts) {
    const Operands operands({{"ends", ends}, {"starts", starts}});
    const OnDevice device(operands);
    const Tensor norm = device.empty({}, operands.dtype == Dtype::float64 ? ScalarType::Double : ScalarType::Float);
    const Tensor scratch =
        device.empty({static_cast<int64_t>(l2_norm_scratch_bytes(elements_of(operands)))}, ScalarType::Byte);
    l2_norm_of_difference(device.target(), elements_of(operands), operands.data[0], operands.data[1],
                          scratch.data_ptr(), norm.data_ptr());
    return norm;
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

// ---------------------------------------------------------------- decompose

Gradients gradients_of(const Operands& operands) {
    return {operands.data[0], operands.data[1], operands.data[2], operands.data[3]};
}

std::tuple<Tensor, Tensor, Tensor> launch_projection(const Operands& operands, const Weights<double>& weights) {
    const OnDevice device(operands);
    const ScalarType wide = operands.dtype == Dtype::float64 ? ScalarType::Double : ScalarType::Float;
    const Tensor found = device.empty({}, wide), plus_norm = device.empty({}, wide),
                 minus_norm = device.empty({}, wide);
    // Freed on return, as in norms_of.
    const auto bytes = static_cast<int64_t>(projection_scratch_bytes(elements_of(operands)));
    const Tensor scratch = device.empty({bytes}, ScalarType::Byte);
    projection(device.target(), elements_of(operands), gradients_of(operands), weights, scratch.data_ptr(),
               {found.data_ptr(), plus_norm.data_ptr(), minus_norm.data_ptr()});
    return {found, plus_norm, minus_norm};
}

void launch_decompose(const Operands& operands, const Decomposition& decomposition) {
    const OnDevice device(operands);
    decompose(device.target(), elements_of(operands), gradients_of(operands), decomposition);
}

// ---------------------------------------------------------------- all others, with checked arguments

Restored restored_of(const Operands& operands) {
    return {operands.data[0], operands.data[1], operands.data[2], operands.data[3]};
}

void launch_perturb(const Operands& operands, const void* direction_norm, const void* grad_norm, double rho, double xi,
                    const std::optional<uint64_t>& rounding_seed) {
    const OnDevice device(operands);
    perturb(device.target(), elements_of(operands), operands.data[0], operands.data[1], direction_norm, grad_norm, rho,
            xi, rounding_seed);
}

void launch_shift(const Operands& operands, const void* norm, double rho, double xi,
                  const std::optional<uint64_t>& rounding_seed) {
    const OnDevice device(operands);
    shift(device.target(), elements_of(operands), operands.data[0], operands.data[1], operands.data[2],
          operands.data[3], norm, rho, xi, rounding_seed);
}

void launch_restore(const Operands& operands) {
    const OnDevice device(operands);
    restore(device.target(), elements_of(operands), operands.data[0], operands.data[1]);
}

void launch_combine(const Operands& operands, const Penalty& penalty) {
    const OnDevice device(operands);
    combine(device.target(), elements_of(operands), restored_of(operands), penalty);
}

void launch_sgd_step(const Operands& operands, const StepArguments& step, const SGDArguments& sgd) {
    const OnDevice device(operands);
    sgd_step(device.target(), elements_of(operands), restored_of(operands), operands.data[4], step, sgd);
}

void launch_adamw_step(const Operands& operands, const Addresses& state_steps, const StepArguments& step,
                       const AdamWArguments& adamw) {
    const Addresses none;
    const Addresses& maxima = adamw.amsgrad ? operands.data[6] : none;
    const OnDevice device(operands);
    adamw_step(device.target(), elements_of(operands), restored_of(operands),
               {operands.data[4], operands.data[5], maxima, state_steps}, step, adamw);
}

}  // namespace

}  // namespace gam_fused::cuda

STABLE_TORCH_LIBRARY_IMPL(gam_fused, CUDA, library) {
    using namespace gam_fused;
    using namespace gam_fused::cuda;
    library.impl("l2_norm", boxed<&l2_norm>);
    library.impl("l2_norm_pair", boxed<&l2_norm_pair>);
    library.impl("difference_norm", boxed<&difference_norm>);
    library.impl("perturb_", boxed<&perturb_<&launch_perturb>>);
    library.impl("shift_", boxed<&shift_<&launch_shift>>);
    library.impl("restore_", boxed<&restore_<&launch_restore>>);
    library.impl("combine_", boxed<&combine_<&launch_combine>>);
    library.impl("projection", boxed<&gam_fused::projection<&launch_projection>>);
    library.impl("decompose_", boxed<&decompose_<&launch_decompose>>);
    library.impl("sgd_step_", boxed<&sgd_step_<&launch_sgd_step>>);
    library.impl("adamw_step_", boxed<&adamw_step_<&launch_adamw_step>>);
}

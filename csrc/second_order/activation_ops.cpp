// The double backward of activations under torch.ops.gam_fused, and its CPU kernels.

#include <cstdint>
#include <string>
#include <tuple>

#include "../cpu/chunk_kernels.h"
#include "../cpu/parallel.h"
#include "activation_kernels.h"
#include "norm_tensors.h"

namespace gam_fused::cpu {

const ActivationKernels& activation_kernels() {
    static const ActivationKernels& chosen = []() -> const ActivationKernels& {
#if defined(__x86_64__)
        const std::string name = chunk_kernels().name;
        if (name == kActivationAVX512.name) {
            return kActivationAVX512;
        }
        if (name == kActivationAVX2.name) {
            return kActivationAVX2;
        }
#endif
        return kActivationBaseline;
    }();
    return chosen;
}

namespace {

using Kernel = void (*)(const ActivationLists& lists, int64_t begin, int64_t size);

std::tuple<Tensor, Tensor> double_backward(Kernel kernel, const Tensor& grad_output, const Tensor& input,
                                           const Tensor& double_grad, bool needs_grad_output, bool needs_input) {
    const Activations activations(grad_output, input, double_grad);
    if (!activations.is_contiguous() && !activations.is_channels_last()) {
        fail("input: expected a tensor that is contiguous or channels_last");
    }
    Tensor of_grad_output = activations.new_result(needs_grad_output);
    Tensor of_input = activations.new_result(needs_input);
    const NormInputs& inputs = activations.inputs;
    const ActivationLists lists = {inputs.dtype,
                                   inputs.grad_output,
                                   inputs.input,
                                   inputs.gg_input,
                                   needs_grad_output ? of_grad_output.mutable_data_ptr() : nullptr,
                                   needs_input ? of_input.mutable_data_ptr() : nullptr};
    const auto run = [&](int64_t begin, int64_t end) { kernel(lists, begin, end - begin); };
    // A quarter of the grain of other kernels: an exponential is worth some ten of their operations.
    constexpr int64_t kFewElements = kGrain / 4;
    if (activations.numel() < 2 * kFewElements) {
        run(0, activations.numel());
    } else {
        torch::stable::parallel_for(0, activations.numel(), kFewElements, run);
    }
    return {of_grad_output, of_input};
}

std::tuple<Tensor, Tensor> gelu_double_backward(const Tensor& grad_output, const Tensor& input,
                                                const Tensor& double_grad, bool tanh, bool needs_grad_output,
                                                bool needs_input) {
    const ActivationKernels& kernels = activation_kernels();
    return double_backward(tanh ? kernels.gelu_tanh : kernels.gelu, grad_output, input, double_grad, needs_grad_output,
                           needs_input);
}

std::tuple<Tensor, Tensor> silu_double_backward(const Tensor& grad_output, const Tensor& input,
                                                const Tensor& double_grad, bool needs_grad_output, bool needs_input) {
    return double_backward(activation_kernels().silu, grad_output, input, double_grad, needs_grad_output, needs_input);
}

}  // namespace

}  // namespace gam_fused::cpu

// Given the gradient of what the activation's backward returned, the gradients of its incoming gradient and of the
// input. All three tensors alike in dtype, shape and strides. Results not asked for have no elements.
STABLE_TORCH_LIBRARY_FRAGMENT(gam_fused, library) {
    library.def(
        "gelu_double_backward(Tensor grad_output, Tensor input, Tensor double_grad, bool tanh, "
        "bool needs_grad_output, bool needs_input) -> (Tensor, Tensor)");
    library.def(
        "silu_double_backward(Tensor grad_output, Tensor input, Tensor double_grad, bool needs_grad_output, "
        "bool needs_input) -> (Tensor, Tensor)");
}

STABLE_TORCH_LIBRARY_IMPL(gam_fused, CPU, library) {
    using namespace gam_fused;
    using namespace gam_fused::cpu;
    library.impl("gelu_double_backward", boxed<&gelu_double_backward>);
    library.impl("silu_double_backward", boxed<&silu_double_backward>);
}

// The Python module `gam_fused._C_direct`: the one file that uses PyTorch's own C++ interface, which changes with every
// release. build_info() says which one it was built for; beside any other, nothing else of it is called (extension.py).

#include <torch/csrc/autograd/python_variable.h>

#include <ATen/PythonTorchFunctionTLS.h>
#include <ATen/record_function.h>
#include <c10/core/DispatchKeySet.h>
#include <c10/core/impl/LocalDispatchKeySet.h>
#include <torch/csrc/inductor/aoti_torch/utils.h>

#include "../build_info.h"
#include "tensor_access.h"

namespace gam_fused::direct {

namespace {

// Backend bits count, which DispatchKeySet's own operators leave out.
bool is_within(c10::DispatchKeySet keys, c10::DispatchKeySet others) {
    return (keys.raw_repr() & ~others.raw_repr()) == 0;
}

bool is_unobserved() {
    return is_within(c10::impl::tls_local_dispatch_key_set().included_, c10::default_included_set) &&
           !at::impl::torch_function_mode_enabled() && !at::hasCallbacks();
}

AtenTensorHandle borrow(PyObject* object, int64_t* numel) {
    static const c10::DispatchKeySet plain({c10::DispatchKey::CPU, c10::DispatchKey::AutogradCPU,
                                            c10::DispatchKey::ADInplaceOrView, c10::DispatchKey::AutocastCPU});
    if (!THPVariable_CheckExact(object)) {
        return nullptr;
    }
    const at::Tensor& tensor = THPVariable_Unpack(object);
    if (!tensor.defined() || !is_within(tensor.key_set(), plain)) {
        return nullptr;
    }
    *numel = tensor.numel();
    // Handles point to tensors; what is done with this one leaves the tensor object as it is.
    return torch::aot_inductor::tensor_pointer_to_tensor_handle(const_cast<at::Tensor*>(&tensor));
}

const at::Tensor& behind(AtenTensorHandle handle) {
    return *torch::aot_inductor::tensor_handle_to_tensor_pointer(handle);
}

// Tensors that borrow() gives are strided and on the CPU.
Description describe(AtenTensorHandle handle) {
    static const int32_t cpu = aoti_torch_device_type_cpu();
    const c10::TensorImpl& tensor = *behind(handle).unsafeGetTensorImpl();
    Description description;
    description.is_strided = true;
    description.dtype_code = static_cast<int32_t>(c10::typeMetaToScalarType(tensor.dtype()));
    description.device_type = cpu;
    description.numel = tensor.numel();
    description.dim = tensor.dim();
    description.sizes = tensor.sizes().data();
    description.strides = tensor.strides().data();
    return description;
}

Memory find_memory(AtenTensorHandle handle) {
    const at::Tensor& tensor = behind(handle);
    return {tensor.mutable_data_ptr(), tensor.storage_offset(), static_cast<int64_t>(tensor.storage().nbytes())};
}

void count_mutation(AtenTensorHandle handle) {
    const at::Tensor& tensor = behind(handle);
    if (!tensor.is_inference()) {  // one has no version, and says so outside of inference mode
        torch::autograd::impl::bump_version(tensor);
    }
}

PyObject* to_python(AtenTensorHandle handle) {
    return THPVariable_Wrap(behind(handle));
}

const TensorAccess kAccess = {&is_unobserved, &borrow, {&describe, &find_memory}, &count_mutation, &to_python};

}  // namespace

}  // namespace gam_fused::direct

PYBIND11_MODULE(_C_direct, module) {
    using namespace gam_fused;
    module.def("build_info", &build_info);
    module.attr("tensor_access") = pybind11::capsule(&direct::kAccess, direct::kTensorAccess);
}

// The Python module `gam_fused._C`. Its operators register themselves when it is loaded (ops.cpp).

#include "build_info.h"
#include "direct/python_calls.h"

PYBIND11_MODULE(_C, module) {
    module.def("build_info", &gam_fused::build_info);
    // The operators as functions that are called past PyTorch's dispatcher, given gam_fused._C_direct.tensor_access.
    module.def("python_calls", [](const pybind11::capsule& access) {
        using namespace gam_fused::direct;
        const void* const pointer = PyCapsule_GetPointer(access.ptr(), kTensorAccess);
        PyObject* const calls = pointer ? python_calls(static_cast<const TensorAccess*>(pointer)) : nullptr;
        if (calls == nullptr) {
            throw pybind11::error_already_set();
        }
        return pybind11::reinterpret_steal<pybind11::dict>(calls);
    });
}

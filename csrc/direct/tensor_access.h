// What the stable ABI has no function for: taking tensors from Python's objects and giving them back.
//
// Implemented in tensor_access.cpp, against one release of PyTorch, as the extension `gam_fused._C_direct`. Whoever
// calls these functions keeps Python's global interpreter lock from borrow() to the last use of what it gave, and until
// then calls nothing that may run Python's code: the tensors are not referenced, and others could take them out of
// their objects.

#pragma once

#include <Python.h>

#include <torch/csrc/inductor/aoti_torch/c/shim.h>

#include "../description.h"

namespace gam_fused::direct {

struct TensorAccess {
    // Whether a call past the dispatcher differs from one through it in nothing but time: no mode, transform or
    // profiler is there that would see the call.
    bool (*is_unobserved)();

    // The tensor within the object, and how many elements it has. Null for anything but a CPU tensor (or Parameter)
    // that is nothing more: no other subclass, no other layout, no negated view, nothing that a transform has wrapped.
    AtenTensorHandle (*borrow)(PyObject* object, int64_t* numel);

    // How what was borrowed is read.
    TensorReader reader;

    // As torch.autograd.graph.increment_version.
    void (*count_mutation)(AtenTensorHandle tensor);

    // A new reference to a Python object of the tensor, or null with an exception set.
    PyObject* (*to_python)(AtenTensorHandle tensor);
};

// Of the capsule that holds one.
constexpr const char* kTensorAccess = "gam_fused._C_direct.tensor_access";

}  // namespace gam_fused::direct

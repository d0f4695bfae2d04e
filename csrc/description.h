// What is checked of a tensor before its elements are touched, and how it is read: through the stable ABI, or as an
// extension that was built for one release of PyTorch does it (direct/tensor_access.h).

#pragma once

#include <torch/csrc/stable/tensor.h>

#include <algorithm>
#include <cstddef>
#include <cstdint>
#include <functional>
#include <numeric>
#include <optional>
#include <sstream>
#include <string>
#include <vector>

#include "dtype.h"

namespace gam_fused {

class Description {
 public:
    // Of the dtypes that tensors may have. Comparing with all others as well, as Tensor::scalar_type() does, would cost
    // more than all other checks together.
    std::optional<Dtype> dtype() const {
        static const int32_t codes[] = {aoti_torch_dtype_float64(), aoti_torch_dtype_float32(),
                                        aoti_torch_dtype_bfloat16(), aoti_torch_dtype_float16()};
        for (uint8_t i = 0; i < 4; ++i) {
            if (dtype_code == codes[i]) {
                return static_cast<Dtype>(i);
            }
        }
        return std::nullopt;
    }

    // Whether the elements fill a run of memory without gap or overlap, whatever the order of dimensions.
    bool is_dense() const {
        int64_t run = 1;
        bool is_contiguous = true;
        for (int64_t i = dim - 1; i >= 0 && is_contiguous; --i) {
            is_contiguous = sizes[i] == 1 || strides[i] == run;
            run *= sizes[i];
        }
        return is_contiguous || numel < 2 || is_permuted();
    }

    bool has_sizes_of(const Description& other) const {
        return dim == other.dim && std::equal(sizes, sizes + dim, other.sizes);
    }

    // Of tensors with equal sizes: whether equal elements stand at equal places.
    bool has_strides_of(const Description& other) const {
        for (int64_t i = 0; i < dim; ++i) {
            if (strides[i] != other.strides[i] && sizes[i] != 1) {
                return numel == 0;
            }
        }
        return true;
    }

    std::string shape() const {
        std::ostringstream out;
        out << "(";
        for (int64_t i = 0; i < dim; ++i) {
            out << sizes[i] << (i + 1 < dim ? ", " : dim == 1 ? "," : "");
        }
        out << ")";
        return out.str();
    }

    bool is_strided = false;  // if not, nothing below the device is known
    int32_t dtype_code = 0;
    int32_t device_type = 0;
    int32_t device_index = 0;
    int64_t numel = 0;
    int64_t dim = 0;
    const int64_t* sizes = nullptr;
    const int64_t* strides = nullptr;

 private:
    // Dimensions by ascending stride: each has to begin where the smaller ones end.
    bool is_permuted() const {
        std::vector<int64_t> order;
        for (int64_t i = 0; i < dim; ++i) {
            if (sizes[i] != 1) {
                order.push_back(i);
            }
        }
        std::sort(order.begin(), order.end(), [this](int64_t a, int64_t b) { return strides[a] < strides[b]; });
        int64_t run = 1;
        for (const int64_t i : order) {
            if (strides[i] != run) {
                return false;
            }
            run *= sizes[i];
        }
        return true;
    }
};

// Of a tensor's elements.
struct Memory {
    void* address = nullptr;
    int64_t storage_offset = 0;  // in elements
    int64_t storage_bytes = 0;

    // Whether the storage holds that many elements. One that was freed or resized does not.
    bool holds(int64_t numel, size_t element_size) const {
        return address != nullptr && storage_bytes / static_cast<int64_t>(element_size) >= storage_offset + numel;
    }
};

// How a tensor is read: once, and in few calls. What they cost per tensor is most of what a launch over hundreds of
// small ones does.
struct TensorReader {
    Description (*describe)(AtenTensorHandle tensor);
    Memory (*find_memory)(AtenTensorHandle tensor);  // of a strided tensor
};

namespace detail {

inline Description describe(AtenTensorHandle handle) {
    Description tensor;
    STABLE_TORCH_ERROR_CODE_CHECK(aoti_torch_get_dtype(handle, &tensor.dtype_code));
    STABLE_TORCH_ERROR_CODE_CHECK(aoti_torch_get_device_type(handle, &tensor.device_type));
    static const int32_t cpu = aoti_torch_device_type_cpu();
    if (tensor.device_type != cpu) {  // of which there is one
        STABLE_TORCH_ERROR_CODE_CHECK(aoti_torch_get_device_index(handle, &tensor.device_index));
    }
    int64_t* strides = nullptr;
    tensor.is_strided = aoti_torch_get_strides(handle, &strides) == TORCH_SUCCESS;  // others have none to give
    if (tensor.is_strided) {
        int64_t* sizes = nullptr;
        STABLE_TORCH_ERROR_CODE_CHECK(aoti_torch_get_dim(handle, &tensor.dim));
        STABLE_TORCH_ERROR_CODE_CHECK(aoti_torch_get_sizes(handle, &sizes));
        tensor.sizes = sizes;
        tensor.strides = strides;
        tensor.numel = std::accumulate(sizes, sizes + tensor.dim, int64_t{1}, std::multiplies<>());
    }
    return tensor;
}

inline Memory find_memory(AtenTensorHandle handle) {
    Memory memory;
    STABLE_TORCH_ERROR_CODE_CHECK(aoti_torch_get_data_ptr(handle, &memory.address));
    STABLE_TORCH_ERROR_CODE_CHECK(aoti_torch_get_storage_offset(handle, &memory.storage_offset));
    STABLE_TORCH_ERROR_CODE_CHECK(aoti_torch_get_storage_size(handle, &memory.storage_bytes));
    return memory;
}

}  // namespace detail

inline constexpr TensorReader kStableReader = {&detail::describe, &detail::find_memory};

// The address of a tensor's elements, or nothing where its storage does not hold them.
inline std::optional<void*> address_of(AtenTensorHandle handle, int64_t numel, size_t element_size,
                                       const TensorReader& reader = kStableReader) {
    if (numel == 0) {
        return nullptr;
    }
    const Memory memory = reader.find_memory(handle);
    return memory.holds(numel, element_size) ? std::optional(memory.address) : std::nullopt;
}

}  // namespace gam_fused

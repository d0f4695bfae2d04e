// What a double backward of a normalization layer is given, checked, and as plain addresses and numbers.

#pragma once

#include <torch/csrc/stable/library.h>
#include <torch/csrc/stable/ops.h>
#include <torch/csrc/stable/tensor.h>

#include <cstdint>
#include <optional>
#include <vector>

#include "../boxing.h"
#include "../description.h"
#include "../operands.h"
#include "norm_kernels.h"

namespace gam_fused::cpu {

using OptionalTensor = std::optional<Tensor>;

inline const void* address(const char* name, const Tensor& tensor, int64_t numel, Dtype dtype) {
    const auto found = address_of(tensor.get(), numel, size_of(dtype));
    if (!found) {
        fail(name, ": its storage is smaller than the tensor; it was freed or resized");
    }
    return *found;
}

// The tensors that have one element for each of the layer's input: alike in dtype, shape and strides, without gaps.
class Activations {
 public:
    Activations(const Tensor& grad_output, const Tensor& input, const OptionalTensor& gg_input)
        : input_(input), description_(kStableReader.describe(input.get())) {
        if (!description_.is_strided || !description_.dtype()) {
            fail("input: expected a strided tensor of float64, float32, bfloat16 or float16");
        }
        if (description_.dim < 1) {
            fail("input: expected at least 1 dimension");
        }
        const Dtype dtype = *description_.dtype();
        check_like_input("grad_output", grad_output);
        inputs = {dtype, address("grad_output", grad_output, numel(), dtype), address("input", input, numel(), dtype),
                  nullptr};
        if (gg_input) {
            check_like_input("gg_input", *gg_input);
            inputs.gg_input = address("gg_input", *gg_input, numel(), dtype);
        }
    }

    int64_t numel() const { return description_.numel; }
    int64_t dim() const { return description_.dim; }
    int64_t size(int64_t dimension) const { return description_.sizes[dimension]; }

    bool is_contiguous() const {
        if (numel() == 0) {
            return true;
        }
        int64_t run = 1;
        for (int64_t i = dim() - 1; i >= 0; --i) {
            if (!is_next(i, run)) {
                return false;
            }
        }
        return true;
    }

    // (batch, spatial dimensions, channels) in memory.
    bool is_channels_last() const {
        int64_t run = 1;
        bool is_so = dim() >= 2 && is_next(1, run);
        for (int64_t i = dim() - 1; i >= 2 && is_so; --i) {
            is_so = is_next(i, run);
        }
        return is_so && is_next(0, run);
    }

    // A result laid out like the input, or one without elements for what nobody asked for.
    Tensor new_result(bool is_wanted) const {
        return is_wanted ? torch::stable::empty_like(input_) : torch::stable::new_empty(input_, {0});
    }

    NormInputs inputs;

 private:
    bool is_next(int64_t dimension, int64_t& run) const {
        const int64_t size = description_.sizes[dimension];
        const bool is_so = size == 1 || description_.strides[dimension] == run;
        run *= size;
        return is_so;
    }

    void check_like_input(const char* name, const Tensor& tensor) const {
        const Description other = kStableReader.describe(tensor.get());
        if (!other.is_strided || other.dtype_code != description_.dtype_code ||
            other.device_type != description_.device_type || !other.has_sizes_of(description_)) {
            fail(name, ": dtype, device or shape differs from that of input");
        }
        if (!other.has_strides_of(description_)) {
            fail(name, ": strides differ from those of input");
        }
    }

    const Tensor& input_;
    Description description_;
};

// A small tensor as numbers; `otherwise`, `size` times, where it is left out.
inline std::vector<double> numbers(const char* name, const OptionalTensor& tensor, int64_t size, double otherwise) {
    std::vector<double> result(static_cast<size_t>(size), otherwise);
    if (!tensor) {
        return result;
    }
    const Description description = kStableReader.describe(tensor->get());
    const auto dtype = description.dtype();
    if (!description.is_strided || !dtype || description.numel != size || !tensor->is_contiguous()) {
        fail(name, ": expected a contiguous floating point tensor of ", size, " elements");
    }
    const void* const from = address(name, *tensor, size, *dtype);
    with_type(*dtype, [&](auto type) {
        const auto* const elements = static_cast<const decltype(type)*>(from);
        for (size_t i = 0; i < result.size(); ++i) {
            result[i] = static_cast<double>(widen(elements[i]));
        }
    });
    return result;
}

// Numbers as a tensor like `like`, rounded once to the accumulation type and once more to the tensor's.
inline void write_numbers(const std::vector<double>& from, Tensor& to) {
    const auto dtype = kStableReader.describe(to.get()).dtype();
    if (!dtype) {
        fail("weight: expected float64, float32, bfloat16 or float16");
    }
    if (static_cast<size_t>(to.numel()) != from.size()) {
        fail("weight: expected ", from.size(), " numbers, got ", to.numel());
    }
    void* const data = to.mutable_data_ptr();
    with_type(*dtype, [&](auto type) {
        using T = decltype(type);
        for (size_t i = 0; i < from.size(); ++i) {
            static_cast<T*>(data)[i] = narrow<T>(static_cast<accumulation_t<T>>(from[i]));
        }
    });
}

// The gradient of the weight, or a tensor without elements where nobody asked for it.
inline Tensor weight_result(const OptionalTensor& weight, const Tensor& input, bool is_wanted,
                            const std::vector<double>& values) {
    if (!is_wanted) {
        return torch::stable::new_empty(input, {0});
    }
    if (!weight) {
        fail("needs_weight: there is no weight");
    }
    Tensor result = torch::stable::empty_like(*weight);
    write_numbers(values, result);
    return result;
}

}  // namespace gam_fused::cpu

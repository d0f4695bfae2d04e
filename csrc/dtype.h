// The dtypes that tensors may have, and calling a template with the one that a list of tensors has.

#pragma once

#include <cstddef>
#include <cstdint>

#include "narrow_floats.h"

namespace gam_fused {

enum class Dtype : uint8_t { float64, float32, bfloat16, float16 };

constexpr size_t size_of(Dtype dtype) {
    return dtype == Dtype::float64 ? sizeof(double) : dtype == Dtype::float32 ? sizeof(float) : sizeof(uint16_t);
}

// function(T{}) with T the element type of the dtype.
template <typename Function>
decltype(auto) with_type(Dtype dtype, Function&& function) {
    switch (dtype) {
        case Dtype::float64:
            return function(double{});
        case Dtype::float32:
            return function(float{});
        case Dtype::bfloat16:
            return function(bfloat16{});
        default:
            return function(float16{});
    }
}

}  // namespace gam_fused

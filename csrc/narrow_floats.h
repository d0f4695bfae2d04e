// bfloat16 and float16 as they lie in memory, and the accumulation type that arithmetic on each dtype is done in.
//
// Conversions are exact one way and round to nearest, ties to even, the other way; a NaN becomes a quiet NaN. On the
// device they are the hardware's, on the host they are integer arithmetic without a branch, which compilers vectorise.

#pragma once

#include <cstdint>
#include <cstring>

#include "host_device.h"

#if defined(__CUDACC__)
#include <cuda_bf16.h>
#include <cuda_fp16.h>
#endif

namespace gam_fused {

struct bfloat16 {
    uint16_t bits;
};

struct float16 {
    uint16_t bits;
};

template <typename T>
struct accumulation {
    using type = float;
};

template <>
struct accumulation<double> {
    using type = double;
};

// float for float, bfloat16 and float16; double for double.
template <typename T>
using accumulation_t = typename accumulation<T>::type;

GAM_FUSED_HD uint32_t bits_of(float value) {
    uint32_t bits;
    memcpy(&bits, &value, sizeof bits);
    return bits;
}

GAM_FUSED_HD float float_of(uint32_t bits) {
    float value;
    memcpy(&value, &bits, sizeof value);
    return value;
}

GAM_FUSED_HD double widen(double value) {
    return value;
}

GAM_FUSED_HD float widen(float value) {
    return value;
}

GAM_FUSED_HD float widen(bfloat16 value) {
    return float_of(static_cast<uint32_t>(value.bits) << 16);
}

GAM_FUSED_HD float widen(float16 value) {
#if defined(__CUDA_ARCH__)
    return __half2float(__ushort_as_half(value.bits));
#else
    // Shifted into place, exponent and mantissa are those of a float 2^112 times too small; the multiplication is exact
    // and turns subnormals into normal numbers. Infinity and NaN need the largest exponent, which it cannot give.
    const uint32_t magnitude = (value.bits & 0x7fffu) << 13;
    const uint32_t scaled = bits_of(float_of(magnitude) * 0x1p112f);
    const uint32_t special = magnitude | 0x7f800000u;
    const uint32_t sign = (value.bits & 0x8000u) << 16;
    return float_of(sign | ((value.bits & 0x7fffu) >= 0x7c00u ? special : scaled));
#endif
}

template <typename T>
GAM_FUSED_HD T narrow(accumulation_t<T> value) {
    return value;
}

template <>
GAM_FUSED_HD bfloat16 narrow<bfloat16>(float value) {
#if defined(__CUDA_ARCH__)
    return {__bfloat16_as_ushort(__float2bfloat16_rn(value))};
#else
    const uint32_t bits = bits_of(value);
    const uint32_t rounded = (bits + 0x7fffu + ((bits >> 16) & 1u)) >> 16;
    const uint32_t quiet = (bits >> 16) | 0x40u;
    return {static_cast<uint16_t>((bits & 0x7fffffffu) > 0x7f800000u ? quiet : rounded)};
#endif
}

template <>
GAM_FUSED_HD float16 narrow<float16>(float value) {
#if defined(__CUDA_ARCH__)
    return {__half_as_ushort(__float2half_rn(value))};
#else
    const uint32_t bits = bits_of(value);
    const uint32_t sign = (bits >> 16) & 0x8000u;
    const uint32_t magnitude = bits & 0x7fffffffu;
    // Normal results: rebias the exponent by 112 and round off 13 bits of the mantissa; a carry goes into the exponent.
    const uint32_t normal = (magnitude - 0x38000000u + 0xfffu + ((magnitude >> 13) & 1u)) >> 13;
    // Subnormal results: adding 0.5 leaves their bits at the bottom of the mantissa, rounded by the addition itself.
    const uint32_t subnormal = bits_of(float_of(magnitude) + 0.5f) - 0x3f000000u;
    const uint32_t finite = magnitude < 0x38800000u ? subnormal : normal;
    const uint32_t special = magnitude > 0x7f800000u ? (0x7e00u | ((magnitude >> 13) & 0x3ffu)) : 0x7c00u;
    return {static_cast<uint16_t>(sign | (magnitude >= 0x477ff000u ? special : finite))};
#endif
}

}  // namespace gam_fused

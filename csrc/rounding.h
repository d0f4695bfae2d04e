// Stochastic rounding to bfloat16 and float16: a number between two neighbours becomes either, in proportion.
//
// gam_fused/kernels/rounding.py says what for and where the constants come from; its functions have the same names and
// give the same bits. Nothing here branches: compilers vectorise it.

#pragma once

#include <cstdint>

#include "host_device.h"
#include "narrow_floats.h"

namespace gam_fused {

// A bijection of 64-bit integers: SplitMix64's step and finaliser.
GAM_FUSED_HD uint64_t mix64(uint64_t x) {
    x += 0x9e3779b97f4a7c15u;
    x = (x ^ (x >> 30)) * 0xbf58476d1ce4e5b9u;
    x = (x ^ (x >> 27)) * 0x94d049bb133111ebu;
    return x ^ (x >> 31);
}

// What all tensors of a launch share.
GAM_FUSED_HD uint64_t launch_key(uint64_t seed) {
    return mix64(seed);
}

// Elements of a tensor that share a key.
constexpr int64_t kElementsPerKey = int64_t{1} << 32;

// For the elements of number `block` of a tensor, by its place in the list of the launch.
GAM_FUSED_HD uint64_t tensor_key(uint64_t launch_key, uint64_t tensor, uint64_t block) {
    return mix64(launch_key + (tensor << 32) + block);
}

GAM_FUSED_HD uint32_t mix32(uint32_t x) {
    x = (x ^ (x >> 16)) * 0x7feb352du;
    x = (x ^ (x >> 15)) * 0x846ca68bu;
    return x ^ (x >> 16);
}

// Of the element at this place among those of its key.
GAM_FUSED_HD uint32_t random_bits(uint64_t tensor_key, uint32_t place) {
    return mix32(mix32(place ^ static_cast<uint32_t>(tensor_key)) ^ static_cast<uint32_t>(tensor_key >> 32));
}

// The random bits of a chunk of a tensor, one that does not reach across a multiple of kElementsPerKey.
class RandomChunk {
 public:
    RandomChunk() = default;

    // `begin`: the chunk's first element, counted through the tensor.
    GAM_FUSED_HD RandomChunk(uint64_t launch_key, uint64_t tensor, int64_t begin)
        : key_(tensor_key(launch_key, tensor, static_cast<uint64_t>(begin) / kElementsPerKey)),
          first_(static_cast<uint32_t>(begin)) {}

    // Of the chunk's i-th element.
    GAM_FUSED_HD uint32_t operator[](uint32_t i) const { return random_bits(key_, first_ + i); }

 private:
    uint64_t key_ = 0;
    uint32_t first_ = 0;
};

namespace detail {

// Up if what is cut off carries into the last bit that stays: random bits as many as are cut off, added to them.
template <int kCutOff>
GAM_FUSED_HD float drawn(float value, uint32_t random) {
    return float_of((bits_of(value) + (random >> (32 - kCutOff))) & ~((1u << kCutOff) - 1));
}

}  // namespace detail

// One of the two numbers of type T that `value` lies between, still as a float, for narrow() to be exact. Beyond the
// largest number lies infinity; infinities and NaN stay what they are.
template <typename T>
GAM_FUSED_HD float draw(float value, uint32_t random);

template <>
GAM_FUSED_HD float draw<bfloat16>(float value, uint32_t random) {
    const bool is_number = (bits_of(value) & 0x7f800000u) != 0x7f800000u;
    return is_number ? detail::drawn<16>(value, random) : value;
}

template <>
GAM_FUSED_HD float draw<float16>(float value, uint32_t random) {
    const uint32_t sign = bits_of(value) & 0x80000000u;
    const float magnitude = float_of(bits_of(value) & 0x7fffffffu);
    // Subnormal numbers are whole multiples of 2^-24, of which there are few: small enough for an int.
    const bool is_subnormal = magnitude < 0x1p-14f;
    const float multiple = (is_subnormal ? magnitude : 0.0f) * 0x1p24f;
    const auto below = static_cast<float>(static_cast<int32_t>(multiple));
    const float threshold = static_cast<float>(static_cast<int32_t>(random >> 8)) * 0x1p-24f;
    const float subnormal = (below + (threshold < multiple - below ? 1.0f : 0.0f)) * 0x1p-24f;
    const bool is_number = magnitude < float_of(0x7f800000u);
    const float normal = is_number ? detail::drawn<13>(value, random) : value;
    return is_subnormal ? float_of(sign | bits_of(subnormal)) : normal;
}

template <typename T>
GAM_FUSED_HD T round_stochastically(float value, uint32_t random) {
    return narrow<T>(draw<T>(value, random));
}

}  // namespace gam_fused

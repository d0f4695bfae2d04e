// How a kernel rounds the parameters that it writes: a type that it is compiled for, so that rounding to nearest costs
// nothing else. An object is made for each launch; of_chunk() is called for each chunk, and round() for its elements.

#pragma once

#include <optional>

#include "../rounding.h"
#include "multi_tensor.cuh"

namespace gam_fused::cuda {

struct ToNearest {
    static constexpr bool kIsStochastic = false;

    struct OfChunk {
        template <typename T>
        __device__ __forceinline__ T round(accumulation_t<T> value, int) const {
            return narrow<T>(value);
        }
    };

    __device__ __forceinline__ OfChunk of_chunk(const ChunkOfTensor&) const { return {}; }
};

struct Stochastically {
    static constexpr bool kIsStochastic = true;

    struct OfChunk {
        RandomChunk random;

        template <typename T>
        __device__ __forceinline__ T round(float value, int element) const {
            return round_stochastically<T>(value, random[static_cast<uint32_t>(element)]);
        }
    };

    __device__ __forceinline__ OfChunk of_chunk(const ChunkOfTensor& chunk) const {
        return {RandomChunk(key, chunk.place_in_list, chunk.begin)};
    }

    uint64_t key;  // launch_key
};

static_assert(kElementsPerKey % kCudaChunk == 0, "a chunk has one key");

// function(ToNearest or Stochastically): only numbers narrower than those computed with are rounded at all.
template <typename T, typename Function>
void with_rounding(const std::optional<uint64_t>& seed, const Function& function) {
    if constexpr (sizeof(T) < sizeof(accumulation_t<T>)) {
        if (seed) {
            function(Stochastically{launch_key(*seed)});
            return;
        }
    }
    function(ToNearest{});
}

}  // namespace gam_fused::cuda

// Runs of elements as blocks in the accumulation type: what the loops of this folder have in common. Included once per
// instruction set by the files with these loops.

#pragma once

namespace gam_fused::cpu::GAM_FUSED_SET {

namespace {

#define GAM_FUSED_INLINE inline __attribute__((always_inline))

constexpr int64_t kBlock = 1024;  // elements; eight of them fit in the first-level cache

template <typename A>
alignas(64) constexpr A kZeros[kBlock] = {};

// Elements in the accumulation type: themselves where they have it, otherwise widened into the block.
template <typename T>
GAM_FUSED_INLINE const accumulation_t<T>* view(accumulation_t<T>* __restrict block, const void* tensor, int64_t begin,
                                               int64_t size) {
    using A = accumulation_t<T>;
    const T* const from = static_cast<const T*>(tensor) + begin;
    if (tensor == nullptr) {
        return kZeros<A>;
    }
    if constexpr (sizeof(T) == sizeof(A)) {
        return from;
    } else {
        for (int64_t i = 0; i < size; ++i) {
            block[i] = widen(from[i]);
        }
        return block;
    }
}

// Where to compute results: in place where the dtype allows it and somebody asked for them.
template <typename T>
GAM_FUSED_INLINE accumulation_t<T>* target(accumulation_t<T>* block, void* tensor, int64_t begin) {
    if constexpr (sizeof(T) == sizeof(accumulation_t<T>)) {
        return tensor == nullptr ? block : static_cast<T*>(tensor) + begin;
    } else {
        return block;
    }
}

template <typename T>
GAM_FUSED_INLINE void put_back(const accumulation_t<T>* __restrict block, void* tensor, int64_t begin, int64_t size) {
    if constexpr (sizeof(T) != sizeof(accumulation_t<T>)) {
        if (tensor != nullptr) {
            T* __restrict to = static_cast<T*>(tensor) + begin;
            for (int64_t i = 0; i < size; ++i) {
                to[i] = narrow<T>(block[i]);
            }
        }
    }
}

// function(begin, size) for the blocks of a run.
template <typename Function>
GAM_FUSED_INLINE void for_each_block(int64_t size, int64_t block_size, const Function& function) {
    for (int64_t begin = 0; begin < size; begin += block_size) {
        function(begin, size - begin < block_size ? size - begin : block_size);
    }
}

}  // namespace

}  // namespace gam_fused::cpu::GAM_FUSED_SET

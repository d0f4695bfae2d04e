// The one skeleton that every multi-tensor kernel here is written and launched with.
//
// A launch takes as many tensors as fit into the kernel's parameters, by value: no table in device memory, so nothing
// to copy or to keep alive. Tensors are cut into chunks (chunk_plan.h). A block takes every gridDim.x-th chunk, finds
// its tensor by binary search, and its threads take every blockDim.x-th pack of 16 bytes. Packs of a tensor that is
// aligned to 16 bytes in all lists move in one load or store; those of other tensors, and a pack that the tensor's end
// cuts short, move element by element. Which thread works on which element is the same either way.

#pragma once

#include <algorithm>
#include <array>
#include <cstdint>
#include <stdexcept>
#include <string>

#include "../chunk_plan.h"
#include "../narrow_floats.h"
#include "launches.h"

namespace gam_fused::cuda {

constexpr int kThreads = 256;

// Blocks that a grid has for each multiprocessor, when every thread has this many packs of 16 bytes in flight.
// Saturating 8 TB/s at a latency of 800 ns takes 48 KiB in flight on each of 148 multiprocessors, which is 12 packs a
// thread over all blocks. Kernels bound their registers so that as many blocks are resident: a grid is one wave.
constexpr int blocks_per_multiprocessor(int packs_in_flight) {
    return std::clamp((12 + packs_in_flight - 1) / packs_in_flight, 2, 6);
}

struct ChunkOfTensor {
    uint32_t number;         // among all chunks of the launch
    uint32_t tensor;         // in the table
    uint32_t place_in_list;  // of the tensor
    int64_t begin;
    int count;  // of elements
};

// The tensors of one launch; each has an address in every row.
template <int kRows>
struct TensorTable {
    static constexpr int kCapacity = static_cast<int>(tensors_per_launch(kRows));

    void* address[kRows][kCapacity];
    int64_t numel[kCapacity];
    int64_t chunks_before;    // in earlier launches
    uint32_t tensors_before;  // in the list, before the first of this launch
    uint32_t tensors;
    uint32_t first_chunk[kCapacity + 1];

    __device__ __forceinline__ uint32_t chunks() const { return first_chunk[tensors]; }

    __device__ __forceinline__ ChunkOfTensor chunk(uint32_t number) const {
        uint32_t low = 0;
        uint32_t high = tensors;
        // first_chunk[low] <= number < first_chunk[high]: never a tensor without elements
        while (high - low > 1) {
            const uint32_t middle = (low + high) / 2;
            if (first_chunk[middle] <= number) {
                low = middle;
            } else {
                high = middle;
            }
        }
        const int64_t begin = (number - first_chunk[low]) * kCudaChunk;
        const int64_t left = numel[low] - begin;
        return {number, low, tensors_before + low, begin, static_cast<int>(left < kCudaChunk ? left : kCudaChunk)};
    }
};

// ---------------------------------------------------------------- on the device

// What a thread loads or stores at once.
template <typename T>
struct alignas(16) Pack {
    static constexpr int kLanes = 16 / sizeof(T);
    T lane[kLanes];
};

static_assert(kCudaChunk % Pack<bfloat16>::kLanes == 0, "a chunk of an aligned tensor has to begin aligned");

template <typename T>
__device__ __forceinline__ bool is_aligned(const T* address) {
    return reinterpret_cast<uintptr_t>(address) % sizeof(Pack<T>) == 0;
}

// Elements [first, first + lanes) of `count`, zeros beyond.
template <typename T>
__device__ __forceinline__ Pack<T> load_lanes(const T* elements, int first, int count) {
    Pack<T> pack{};
#pragma unroll
    for (int lane = 0; lane < Pack<T>::kLanes; ++lane) {
        if (first + lane < count) {
            pack.lane[lane] = elements[first + lane];
        }
    }
    return pack;
}

template <typename T>
__device__ __forceinline__ Pack<T> load_pack(const T* elements, int first) {
    return *reinterpret_cast<const Pack<T>*>(elements + first);
}

template <typename T>
__device__ __forceinline__ void store_lanes(T* elements, int first, int count, const Pack<T>& pack) {
#pragma unroll
    for (int lane = 0; lane < Pack<T>::kLanes; ++lane) {
        if (first + lane < count) {
            elements[first + lane] = pack.lane[lane];
        }
    }
}

template <typename T>
__device__ __forceinline__ void store_pack(T* elements, int first, const Pack<T>& pack) {
    *reinterpret_cast<Pack<T>*>(elements + first) = pack;
}

// visit(ChunkOfTensor) for each chunk of this block.
template <int kRows, typename Visit>
__device__ __forceinline__ void for_each_chunk(const TensorTable<kRows>& table, Visit visit) {
    for (uint32_t number = blockIdx.x; number < table.chunks(); number += gridDim.x) {
        visit(table.chunk(number));
    }
}

// A bit for each list that a rule reads or writes.
constexpr GAM_FUSED_HD uint32_t bit(int list) {
    return uint32_t{1} << list;
}

// Applies a rule to each element of this block. A rule has
//     kLists           how many rows of the table hold tensors, counted from the first
//     reads, writes    bits of the lists that it reads and writes: constants, or variables equal in all threads
//     operator()(x, i) x[list] is the i-th element of the chunk in each list
// and rule_for(ChunkOfTensor) makes it, once for each chunk.
template <typename T, int kRows, typename RuleFor>
__device__ __forceinline__ void for_each_element(const TensorTable<kRows>& table, RuleFor rule_for) {
    constexpr int kLists = decltype(rule_for(ChunkOfTensor{}))::kLists;
    static_assert(kLists <= kRows);
    for_each_chunk(table, [&](const ChunkOfTensor& chunk) {
        const auto rule = rule_for(chunk);
        T* elements[kLists];
        bool aligned = true;
#pragma unroll
        for (int list = 0; list < kLists; ++list) {
            elements[list] = static_cast<T*>(table.address[list][chunk.tensor]) + chunk.begin;
            aligned = aligned && is_aligned(elements[list]);
        }
        for (int first = threadIdx.x * Pack<T>::kLanes; first < chunk.count; first += kThreads * Pack<T>::kLanes) {
            const bool whole = aligned && first + Pack<T>::kLanes <= chunk.count;
            Pack<T> packs[kLists];
            if (whole) {
#pragma unroll
                for (int list = 0; list < kLists; ++list) {
                    if (rule.reads & bit(list)) {
                        packs[list] = load_pack(elements[list], first);
                    }
                }
            } else {
#pragma unroll
                for (int list = 0; list < kLists; ++list) {
                    if (rule.reads & bit(list)) {
                        packs[list] = load_lanes(elements[list], first, chunk.count);
                    }
                }
            }
#pragma unroll
            for (int lane = 0; lane < Pack<T>::kLanes; ++lane) {
                T x[kLists];
#pragma unroll
                for (int list = 0; list < kLists; ++list) {
                    x[list] = packs[list].lane[lane];
                }
                rule(x, first + lane);
#pragma unroll
                for (int list = 0; list < kLists; ++list) {
                    packs[list].lane[lane] = x[list];
                }
            }
            if (whole) {
#pragma unroll
                for (int list = 0; list < kLists; ++list) {
                    if (rule.writes & bit(list)) {
                        store_pack(elements[list], first, packs[list]);
                    }
                }
            } else {
#pragma unroll
                for (int list = 0; list < kLists; ++list) {
                    if (rule.writes & bit(list)) {
                        store_lanes(elements[list], first, chunk.count, packs[list]);
                    }
                }
            }
        }
    });
}

// ---------------------------------------------------------------- on the host

template <typename... Parameters, typename... Arguments>
void launch_kernel(Stream stream, uint32_t blocks, uint32_t threads, void (*kernel)(Parameters...),
                   const Arguments&... arguments) {
    cudaLaunchConfig_t config = {};
    config.gridDim = dim3(blocks);
    config.blockDim = dim3(threads);
    config.stream = stream;
    const cudaError_t error = cudaLaunchKernelEx(&config, kernel, arguments...);
    if (error != cudaSuccess) {
        cudaGetLastError();  // the next call that asks for it is not to find this error
        throw std::runtime_error(std::string("CUDA kernel launch failed: ") + cudaGetErrorString(error));
    }
}

// Launches a kernel over all tensors, as often as it takes. `rows[r]` holds their addresses in row r of the table.
template <int kRows, int kBlocksPerMultiprocessor, typename Scalars>
void launch_over_tensors(const Target& target, const std::vector<int64_t>& numels,
                         const std::array<const Addresses*, kRows>& rows, void (*kernel)(TensorTable<kRows>, Scalars),
                         const Scalars& scalars) {
    static_assert(sizeof(TensorTable<kRows>) % alignof(Scalars) == 0, "parameters would not lie side by side");
    static_assert(sizeof(TensorTable<kRows>) + sizeof(Scalars) <= kKernelParameterBytes);
    int64_t chunks_before = 0;
    for (const Launch& launch : plan_launches(numels, kRows)) {
        TensorTable<kRows> table;
        table.chunks_before = chunks_before;
        table.tensors_before = static_cast<uint32_t>(launch.begin);
        table.tensors = 0;
        uint32_t chunks = 0;
        for (size_t i = launch.begin; i < launch.end; ++i) {
            for (int row = 0; row < kRows; ++row) {
                table.address[row][table.tensors] = (*rows[row])[i];
            }
            table.numel[table.tensors] = numels[i];
            table.first_chunk[table.tensors] = chunks;
            chunks += static_cast<uint32_t>(chunks_of(numels[i], kCudaChunk));
            ++table.tensors;
        }
        table.first_chunk[table.tensors] = chunks;
        const auto wave = static_cast<uint32_t>(target.multiprocessors * kBlocksPerMultiprocessor);
        launch_kernel(target.stream, std::min(chunks, wave), kThreads, kernel, table, scalars);
        chunks_before += chunks;
    }
}

}  // namespace gam_fused::cuda

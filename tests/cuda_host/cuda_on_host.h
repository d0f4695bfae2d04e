// As much of CUDA as csrc/cuda uses, on CPU threads, so that its very sources compile with a C++20 compiler and run.
//
// A CUDA thread is an operating system's thread; the blocks of a grid run one at a time in a random order. Barriers and
// shuffles wait for exactly the threads that they wait for on a device, and nothing else orders memory accesses within
// a block: a missing __syncthreads() is a data race that ThreadSanitizer reports. Shuffles order the accesses of a
// warp, which on a device they do not; kernels must not rely on it.

#pragma once

#include <algorithm>
#include <barrier>
#include <cmath>
#include <cstdint>
#include <cstring>
#include <memory>
#include <numeric>
#include <random>
#include <thread>
#include <vector>

#define __global__
#define __device__
#define __host__
#define __forceinline__ inline
#define __shared__ static  // one block at a time, so one of each
#define __launch_bounds__(...)
#define __grid_constant__

struct dim3 {
    constexpr dim3(unsigned x = 1, unsigned y = 1, unsigned z = 1) : x(x), y(y), z(z) {}
    unsigned x, y, z;
};

inline thread_local dim3 threadIdx;
inline thread_local dim3 blockIdx;
inline thread_local dim3 blockDim;
inline thread_local dim3 gridDim;

struct CUstream_st;
using cudaStream_t = CUstream_st*;

enum cudaError_t { cudaSuccess, cudaErrorInvalidConfiguration = 9 };

struct cudaLaunchConfig_t {
    dim3 gridDim;
    dim3 blockDim;
    size_t dynamicSmemBytes;
    cudaStream_t stream;
};

inline cudaError_t cudaGetLastError() {
    return cudaSuccess;
}

inline const char* cudaGetErrorString(cudaError_t error) {
    return error == cudaSuccess ? "no error" : "invalid configuration argument";
}

namespace cuda_on_host {

constexpr unsigned kWarp = 32;

// What the threads of the running block share.
struct Block {
    explicit Block(unsigned threads) : all(threads), end(threads), exchanged(threads) {
        for (unsigned first = 0; first < threads; first += kWarp) {
            warps.push_back(std::make_unique<std::barrier<>>(std::min(kWarp, threads - first)));
        }
    }

    std::barrier<> all;
    std::barrier<> end;  // not `all`: a thread that leaves the kernel early must not let others past a barrier in it
    std::vector<std::unique_ptr<std::barrier<>>> warps;
    std::vector<uint64_t> exchanged;
};

inline thread_local Block* block = nullptr;
inline std::mt19937 random_order{0};

// The value that a lane of the same warp hands over at the same time.
template <typename T>
T from_lane(unsigned lane, T value) {
    static_assert(sizeof(T) <= sizeof(uint64_t));
    const unsigned warp = threadIdx.x / kWarp;
    std::memcpy(&block->exchanged[threadIdx.x], &value, sizeof value);
    block->warps[warp]->arrive_and_wait();
    T theirs;
    std::memcpy(&theirs, &block->exchanged[warp * kWarp + lane], sizeof theirs);
    block->warps[warp]->arrive_and_wait();
    return theirs;
}

template <typename Kernel>
void run(unsigned blocks, unsigned threads, const Kernel& kernel) {
    std::vector<unsigned> order(blocks);
    std::iota(order.begin(), order.end(), 0u);
    std::shuffle(order.begin(), order.end(), random_order);
    Block shared(threads);
    std::vector<std::thread> running;
    for (unsigned thread = 0; thread < threads; ++thread) {
        running.emplace_back([&, thread] {
            block = &shared;
            gridDim = dim3(blocks);
            blockDim = dim3(threads);
            threadIdx = dim3(thread, 0, 0);
            for (const unsigned number : order) {
                blockIdx = dim3(number, 0, 0);
                kernel();
                shared.end.arrive_and_wait();
            }
        });
    }
    for (std::thread& thread : running) {
        thread.join();
    }
}

}  // namespace cuda_on_host

inline void __syncthreads() {
    cuda_on_host::block->all.arrive_and_wait();
}

template <typename T>
T __shfl_xor_sync(unsigned, T value, unsigned lane_bits) {
    return cuda_on_host::from_lane(threadIdx.x % cuda_on_host::kWarp ^ lane_bits, value);
}

template <typename T>
T __shfl_down_sync(unsigned, T value, unsigned distance) {
    const unsigned lane = threadIdx.x % cuda_on_host::kWarp;
    const unsigned source = lane + distance < cuda_on_host::kWarp ? lane + distance : lane;
    return cuda_on_host::from_lane(source, value);
}

template <typename... Parameters, typename... Arguments>
cudaError_t cudaLaunchKernelEx(const cudaLaunchConfig_t* config, void (*kernel)(Parameters...),
                               Arguments&&... arguments) {
    const unsigned blocks = config->gridDim.x;
    const unsigned threads = config->blockDim.x;
    if (blocks == 0 || threads == 0 || threads > 1024) {
        return cudaErrorInvalidConfiguration;
    }
    cuda_on_host::run(blocks, threads, [&] { kernel(arguments...); });
    return cudaSuccess;
}

// Global 2-norms in two stages: each chunk leaves a partial sum of squares, one block for each norm adds them up. There
// are no atomics and every sum has a fixed order, which depends on the tensors' sizes only.
//
// Sums are compensated: every rounding error of a product or sum is computed exactly and added up beside it, so that
// float results are as good as those of double arithmetic, which most GPUs do at a small fraction of the speed. They
// are scaled by powers of two, so that no square overflows or underflows that matters.

#include "../update_rules.h"
#include "multi_tensor.cuh"

namespace gam_fused::cuda {
namespace {

// ---------------------------------------------------------------- powers of two

template <typename A>
struct Format;

template <>
struct Format<float> {
    using Bits = uint32_t;
    static constexpr int kMantissaBits = 23;
    static constexpr int kBias = 127;
};

template <>
struct Format<double> {
    using Bits = uint64_t;
    static constexpr int kMantissaBits = 52;
    static constexpr int kBias = 1023;
};

// The exponent of a finite number, -kBias for subnormal ones and 0. For the largest numbers, infinity and NaN it is
// kBias - 1, so that power_of_two of its negative is a normal number.
template <typename A>
__device__ __forceinline__ int exponent_of(A magnitude) {
    typename Format<A>::Bits bits;
    memcpy(&bits, &magnitude, sizeof bits);
    const int exponent = static_cast<int>(bits >> Format<A>::kMantissaBits) - Format<A>::kBias;
    return exponent < Format<A>::kBias ? exponent : Format<A>::kBias - 1;
}

// 2^exponent; 0 where that is not a normal number.
template <typename A>
__device__ __forceinline__ A power_of_two(int exponent) {
    using Bits = typename Format<A>::Bits;
    const int biased = exponent + Format<A>::kBias;
    const Bits bits = static_cast<Bits>(biased > 0 ? biased : 0) << Format<A>::kMantissaBits;
    A power;
    memcpy(&power, &bits, sizeof power);
    return power;
}

// ---------------------------------------------------------------- sums of squares

__device__ __forceinline__ float absolute(float x) {
    return fabsf(x);
}

__device__ __forceinline__ double absolute(double x) {
    return fabs(x);
}

// Not NaN if one of the two is a number.
__device__ __forceinline__ float larger(float a, float b) {
    return fmaxf(a, b);
}

__device__ __forceinline__ double larger(double a, double b) {
    return fmax(a, b);
}

__device__ __forceinline__ float multiply_add(float a, float b, float c) {
    return fmaf(a, b, c);
}

__device__ __forceinline__ double multiply_add(double a, double b, double c) {
    return fma(a, b, c);
}

// (sum + error) · 4^exponent. An infinity or NaN among the squares is in `sum`; `error` then means nothing.
template <typename A>
struct SumOfSquares {
    A sum;
    A error;
    int32_t exponent;

    __device__ __forceinline__ static SumOfSquares nothing() { return {0, 0, -Format<A>::kBias}; }

    // The exponent only grows, to that of the largest operand so far: what is scaled away is too small to matter.
    __device__ __forceinline__ void raise_exponent(int to) {
        const int raised = exponent < to ? to : exponent;
        const A factor = power_of_two<A>(2 * (exponent - raised));
        sum *= factor;
        error *= factor;
        exponent = raised;
    }

    // Adds a number that is scaled by 4^-exponent, and what rounding it took off (Knuth's TwoSum).
    __device__ __forceinline__ void add_scaled(A term, A term_error) {
        const A total = sum + term;
        const A added = total - sum;
        error += ((sum - (total - added)) + (term - added)) + term_error;
        sum = total;
    }

    // `kExact`: their squares are exact in A.
    template <bool kExact, int kCount>
    __device__ __forceinline__ void add_squares(const A (&values)[kCount]) {
        A largest = 0;
#pragma unroll
        for (int i = 0; i < kCount; ++i) {
            largest = larger(largest, absolute(values[i]));
        }
        raise_exponent(exponent_of(largest));
        const A scale = power_of_two<A>(-exponent);
#pragma unroll
        for (int i = 0; i < kCount; ++i) {
            const A scaled = values[i] * scale;
            const A square = scaled * scaled;
            add_scaled(square, kExact ? A(0) : multiply_add(scaled, scaled, -square));
        }
    }

    __device__ __forceinline__ void add(SumOfSquares other) {
        raise_exponent(other.exponent);
        other.raise_exponent(exponent);
        add_scaled(other.sum, other.error);
    }

    __device__ __forceinline__ A root() const {
        const A scaled = is_finite(sum) ? square_root(sum + error) : sum;
        const int half = exponent / 2;  // the whole may be out of the range of powers
        return scaled * power_of_two<A>(half) * power_of_two<A>(exponent - half);
    }
};

constexpr unsigned kWarp = 32;
constexpr unsigned kAllLanes = 0xffffffffu;

// In lane 0 the sum over the warp.
template <typename A>
__device__ __forceinline__ SumOfSquares<A> sum_over_warp(SumOfSquares<A> mine) {
    int exponent = mine.exponent;
#pragma unroll
    for (unsigned distance = kWarp / 2; distance > 0; distance /= 2) {
        const int other = __shfl_xor_sync(kAllLanes, exponent, distance);
        exponent = exponent < other ? other : exponent;
    }
    mine.raise_exponent(exponent);
#pragma unroll
    for (unsigned distance = kWarp / 2; distance > 0; distance /= 2) {
        const A sum = __shfl_down_sync(kAllLanes, mine.sum, distance);
        const A error = __shfl_down_sync(kAllLanes, mine.error, distance);
        mine.add_scaled(sum, error);
    }
    return mine;
}

// In thread 0 the sum over the block.
template <typename A, unsigned kBlock>
__device__ __forceinline__ SumOfSquares<A> sum_over_block(SumOfSquares<A> mine) {
    constexpr unsigned kWarps = kBlock / kWarp;
    static_assert(kBlock % kWarp == 0 && kWarps <= kWarp);
    __shared__ SumOfSquares<A> of_warps[kWarps];
    const unsigned warp = threadIdx.x / kWarp;
    const unsigned lane = threadIdx.x % kWarp;
    mine = sum_over_warp(mine);
    if (lane == 0) {
        of_warps[warp] = mine;
    }
    __syncthreads();
    if (warp == 0) {
        mine = sum_over_warp(lane < kWarps ? of_warps[lane] : SumOfSquares<A>::nothing());
    }
    __syncthreads();  // before the next chunk's sums take the place of these
    return mine;
}

// ---------------------------------------------------------------- the two stages

constexpr int kBatch = 4;   // packs that a thread has in flight
constexpr int kBlocks = 4;  // for each multiprocessor: one more than memory asks for, to cover the end of each chunk

template <typename T>
__global__ void __launch_bounds__(kThreads, kBlocks)
    sum_chunks_kernel(const __grid_constant__ TensorTable<1> table, SumOfSquares<accumulation_t<T>>* of_chunks) {
    using A = accumulation_t<T>;
    constexpr int kLanes = Pack<T>::kLanes;
    for_each_chunk(table, [&](const ChunkOfTensor& chunk) {
        const T* const elements = static_cast<const T*>(table.address[0][chunk.tensor]) + chunk.begin;
        const bool aligned = is_aligned(elements);
        SumOfSquares<A> mine = SumOfSquares<A>::nothing();
        for (int first = threadIdx.x * kLanes; first < chunk.count; first += kThreads * kLanes * kBatch) {
            Pack<T> packs[kBatch];
#pragma unroll
            for (int i = 0; i < kBatch; ++i) {
                const int begin = first + i * kThreads * kLanes;
                const bool whole = aligned && begin + kLanes <= chunk.count;
                packs[i] = whole ? load_pack(elements, begin) : load_lanes(elements, begin, chunk.count);
            }
            A values[kBatch * kLanes];
#pragma unroll
            for (int i = 0; i < kBatch * kLanes; ++i) {
                values[i] = widen(packs[i / kLanes].lane[i % kLanes]);
            }
            mine.template add_squares<sizeof(T) < sizeof(A)>(values);
        }
        const SumOfSquares<A> sum = sum_over_block<A, kThreads>(mine);
        if (threadIdx.x == 0) {
            of_chunks[table.chunks_before + chunk.number] = sum;
        }
    });
}

// A block for each norm: with few bytes for each, a block's latency counts, hence more threads.
constexpr int kFinishThreads = 512;
constexpr int kMaxNorms = 2;

template <typename A>
struct Norms {
    const SumOfSquares<A>* of_chunks;
    int64_t begin[kMaxNorms + 1];  // of each norm's chunks
    A* result[kMaxNorms];
};

template <typename A>
__global__ void __launch_bounds__(kFinishThreads) finish_norms_kernel(const __grid_constant__ Norms<A> norms) {
    SumOfSquares<A> mine = SumOfSquares<A>::nothing();
    for (int64_t i = norms.begin[blockIdx.x] + threadIdx.x; i < norms.begin[blockIdx.x + 1]; i += kFinishThreads) {
        mine.add(norms.of_chunks[i]);
    }
    const SumOfSquares<A> sum = sum_over_block<A, kFinishThreads>(mine);
    if (threadIdx.x == 0) {
        *norms.result[blockIdx.x] = sum.root();
    }
}

}  // namespace

size_t l2_norm_scratch_bytes(const Elements& elements) {
    const auto chunks = static_cast<size_t>(ChunkPlan(elements.numels, kCudaChunk).size());
    return chunks * (elements.dtype == Dtype::float64 ? sizeof(SumOfSquares<double>) : sizeof(SumOfSquares<float>));
}

void l2_norms(const Target& target, const Elements& elements, const Addresses& tensors, size_t first_list,
              void* scratch, const std::vector<void*>& results) {
    with_type(elements.dtype, [&](auto zero) {
        using T = decltype(zero);
        using A = accumulation_t<T>;
        auto* const of_chunks = static_cast<SumOfSquares<A>*>(scratch);
        launch_over_tensors<1, kBlocks>(target, elements.numels, {&tensors}, sum_chunks_kernel<T>, of_chunks);

        const ChunkPlan chunks(elements.numels, kCudaChunk);
        Norms<A> norms = {of_chunks, {0, chunks.first_chunk(first_list), chunks.size()}, {}};
        for (size_t i = 0; i < results.size(); ++i) {
            norms.result[i] = static_cast<A*>(results[i]);
        }
        launch_kernel(target.stream, static_cast<uint32_t>(results.size()), kFinishThreads, finish_norms_kernel<A>,
                      norms);
    });
}

}  // namespace gam_fused::cuda

// Global 2-norms in two stages: each chunk leaves a partial sum of squares, one block for each norm adds them up. There
// are no atomics and every sum has a fixed order, which depends on the tensors' sizes only.

#include "scaled_sum.cuh"

namespace gam_fused::cuda {
namespace {

// ---------------------------------------------------------------- the two stages

constexpr int kBatch = 4;   // packs that a thread has in flight
constexpr int kBlocks = 4;  // for each multiprocessor: one more than memory asks for, to cover the end of each chunk

template <typename T>
__global__ void __launch_bounds__(kThreads, kBlocks)
    sum_chunks_kernel(const __grid_constant__ TensorTable<1> table, ScaledSum<accumulation_t<T>>* of_chunks) {
    using A = accumulation_t<T>;
    constexpr int kLanes = Pack<T>::kLanes;
    for_each_chunk(table, [&](const ChunkOfTensor& chunk) {
        const T* const elements = static_cast<const T*>(table.address[0][chunk.tensor]) + chunk.begin;
        const bool aligned = is_aligned(elements);
        ScaledSum<A> mine = ScaledSum<A>::nothing();
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
        const ScaledSum<A> sum = sum_over_block<A, kThreads>(mine);
        if (threadIdx.x == 0) {
            of_chunks[table.chunks_before + chunk.number] = sum;
        }
    });
}

// Of the second list from the first.
template <typename T>
__global__ void __launch_bounds__(kThreads, kBlocks)
    sum_differences_kernel(const __grid_constant__ TensorTable<2> table, ScaledSum<accumulation_t<T>>* of_chunks) {
    using A = accumulation_t<T>;
    constexpr int kLanes = Pack<T>::kLanes;
    constexpr int kPairs = kBatch / 2;
    for_each_chunk(table, [&](const ChunkOfTensor& chunk) {
        const T* const ends = static_cast<const T*>(table.address[0][chunk.tensor]) + chunk.begin;
        const T* const starts = static_cast<const T*>(table.address[1][chunk.tensor]) + chunk.begin;
        const bool aligned = is_aligned(ends) && is_aligned(starts);
        ScaledSum<A> mine = ScaledSum<A>::nothing();
        for (int first = threadIdx.x * kLanes; first < chunk.count; first += kThreads * kLanes * kPairs) {
            Pack<T> e[kPairs];
            Pack<T> s[kPairs];
#pragma unroll
            for (int i = 0; i < kPairs; ++i) {
                const int begin = first + i * kThreads * kLanes;
                const bool whole = aligned && begin + kLanes <= chunk.count;
                e[i] = whole ? load_pack(ends, begin) : load_lanes(ends, begin, chunk.count);
                s[i] = whole ? load_pack(starts, begin) : load_lanes(starts, begin, chunk.count);
            }
            A values[kPairs * kLanes];
#pragma unroll
            for (int i = 0; i < kPairs * kLanes; ++i) {
                values[i] = widen(e[i / kLanes].lane[i % kLanes]) - widen(s[i / kLanes].lane[i % kLanes]);
            }
            mine.template add_squares<false>(values);
        }
        const ScaledSum<A> sum = sum_over_block<A, kThreads>(mine);
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
    const ScaledSum<A>* of_chunks;
    int64_t begin[kMaxNorms + 1];  // of each norm's chunks
    A* result[kMaxNorms];
};

template <typename A>
__global__ void __launch_bounds__(kFinishThreads) finish_norms_kernel(const __grid_constant__ Norms<A> norms) {
    ScaledSum<A> mine = ScaledSum<A>::nothing();
    for (int64_t i = norms.begin[blockIdx.x] + threadIdx.x; i < norms.begin[blockIdx.x + 1]; i += kFinishThreads) {
        mine.add(norms.of_chunks[i]);
    }
    const ScaledSum<A> sum = sum_over_block<A, kFinishThreads>(mine);
    if (threadIdx.x == 0) {
        *norms.result[blockIdx.x] = sum.root();
    }
}

// The norms of the chunks before number `middle`, and of the others where there are two results.
template <typename A>
void finish(const Target& target, const ScaledSum<A>* of_chunks, int64_t middle, int64_t end,
            const std::vector<void*>& results) {
    Norms<A> norms = {of_chunks, {0, middle, end}, {}};
    for (size_t i = 0; i < results.size(); ++i) {
        norms.result[i] = static_cast<A*>(results[i]);
    }
    launch_kernel(target.stream, static_cast<uint32_t>(results.size()), kFinishThreads, finish_norms_kernel<A>, norms);
}

}  // namespace

size_t l2_norm_scratch_bytes(const Elements& elements) {
    const auto chunks = static_cast<size_t>(ChunkPlan(elements.numels, kCudaChunk).size());
    return chunks * (elements.dtype == Dtype::float64 ? sizeof(ScaledSum<double>) : sizeof(ScaledSum<float>));
}

void l2_norms(const Target& target, const Elements& elements, const Addresses& tensors, size_t first_list,
              void* scratch, const std::vector<void*>& results) {
    with_type(elements.dtype, [&](auto zero) {
        using T = decltype(zero);
        using A = accumulation_t<T>;
        auto* const of_chunks = static_cast<ScaledSum<A>*>(scratch);
        launch_over_tensors<1, kBlocks>(target, elements.numels, {&tensors}, sum_chunks_kernel<T>, of_chunks);

        const ChunkPlan chunks(elements.numels, kCudaChunk);
        finish(target, of_chunks, chunks.first_chunk(first_list), chunks.size(), results);
    });
}

void l2_norm_of_difference(const Target& target, const Elements& elements, const Addresses& ends,
                           const Addresses& starts, void* scratch, void* result) {
    with_type(elements.dtype, [&](auto zero) {
        using T = decltype(zero);
        auto* const of_chunks = static_cast<ScaledSum<accumulation_t<T>>*>(scratch);
        launch_over_tensors<2, kBlocks>(target, elements.numels, {&ends, &starts}, sum_differences_kernel<T>,
                                        of_chunks);
        const int64_t chunks = ChunkPlan(elements.numels, kCudaChunk).size();
        finish(target, of_chunks, chunks, chunks, {result});
    });
}

}  // namespace gam_fused::cuda

// Which elements of which tensor a unit of work covers. Free of torch and of CUDA.
//
// Tensors are cut into chunks of a fixed number of elements, the last chunk of a tensor being shorter. A chunk never
// spans two tensors, and how chunks are cut depends on nothing but the sizes, so that results do not depend on how many
// threads, blocks or launches share them out.

#pragma once

#include <algorithm>
#include <cstddef>
#include <cstdint>
#include <vector>

namespace gam_fused {

struct Chunk {
    int64_t tensor;
    int64_t begin;  // in elements
    int64_t end;
};

// Of a tensor of this size.
constexpr int64_t chunks_of(int64_t numel, int64_t chunk_size) {
    return numel / chunk_size + (numel % chunk_size != 0);
}

// The chunks of a list of tensors, numbered from 0 in the order of the list.
class ChunkPlan {
 public:
    ChunkPlan(const std::vector<int64_t>& numels, int64_t chunk_size) : numels_(numels), chunk_size_(chunk_size) {
        first_chunk_.reserve(numels.size() + 1);
        first_chunk_.push_back(0);
        for (const int64_t numel : numels) {
            first_chunk_.push_back(first_chunk_.back() + chunks_of(numel, chunk_size));
        }
    }

    int64_t size() const { return first_chunk_.back(); }

    // Chunk number of the first chunk of a tensor; of the list's length: size().
    int64_t first_chunk(size_t tensor) const { return first_chunk_[tensor]; }

    Chunk operator[](int64_t index) const {
        // The last tensor that starts at or before the chunk; tensors without elements have no chunks.
        const auto after = std::upper_bound(first_chunk_.begin(), first_chunk_.end(), index);
        const int64_t tensor = after - first_chunk_.begin() - 1;
        const int64_t begin = (index - first_chunk_[tensor]) * chunk_size_;
        return {tensor, begin, std::min(begin + chunk_size_, numels_[tensor])};
    }

 private:
    const std::vector<int64_t>& numels_;
    int64_t chunk_size_;
    std::vector<int64_t> first_chunk_;
};

// ---------------------------------------------------------------- CUDA launches

// Kernel parameters, from CUDA 12.1 on (devices of compute capability 7.0 and newer).
constexpr size_t kKernelParameterBytes = 32764;

// What is left of them for the tensors of one launch, after a kernel's own scalars.
constexpr size_t kTableBytes = kKernelParameterBytes - 512;

// Elements that a block works on before it looks for more work.
constexpr int64_t kCudaChunk = 8192;

// Chunk numbers are 32-bit on the device; this many chunks hold more elements than any device does.
constexpr int64_t kMaxChunksPerLaunch = int64_t{1} << 31;

// How many tensors one launch takes when each has an address in `lists` lists: addresses, a 64-bit number of elements
// and the number of its first chunk, and one more of the latter at the end.
constexpr int64_t tensors_per_launch(int64_t lists) {
    return static_cast<int64_t>((kTableBytes - sizeof(uint32_t)) /
                                (lists * sizeof(void*) + sizeof(int64_t) + sizeof(uint32_t)));
}

// Tensors [begin, end) of a list go into one launch; each has a place in its table, with elements or without.
struct Launch {
    size_t begin;
    size_t end;
};

// The launches for tensors of these sizes. Each begins and ends with a tensor that has elements.
inline std::vector<Launch> plan_launches(const std::vector<int64_t>& numels, int64_t lists,
                                         int64_t chunk_size = kCudaChunk) {
    std::vector<Launch> launches;
    const auto capacity = static_cast<size_t>(tensors_per_launch(lists));
    int64_t chunks = 0;  // of the launch being filled
    for (size_t i = 0; i < numels.size(); ++i) {
        if (numels[i] == 0) {
            continue;
        }
        const int64_t more = chunks_of(numels[i], chunk_size);
        if (launches.empty() || i - launches.back().begin >= capacity || chunks + more > kMaxChunksPerLaunch) {
            launches.push_back({i, i});
            chunks = 0;
        }
        launches.back().end = i + 1;
        chunks += more;
    }
    return launches;
}

}  // namespace gam_fused

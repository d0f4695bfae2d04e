// Sharing out chunks among PyTorch's threads.

#pragma once

#include <torch/csrc/stable/ops.h>

#include <algorithm>
#include <vector>

#include "../chunk_plan.h"

namespace gam_fused::cpu {

// Elements per thread at least, as in PyTorch's own operators: waking another thread for less costs more than it saves.
constexpr int64_t kGrain = 32768;

// function(chunk number, chunk) for every chunk, each exactly once, on any thread. Threads take ranges of elements of
// about equal length, not of chunks, since small tensors make small chunks; a chunk belongs to the range that holds its
// first element.
template <typename Function>
void for_each_chunk(const std::vector<int64_t>& numels, const ChunkPlan& plan, int64_t chunk_size,
                    const Function& function) {
    std::vector<int64_t> first_element = {0};  // of each tensor, counted through the list
    for (const int64_t numel : numels) {
        first_element.push_back(first_element.back() + numel);
    }
    const auto run = [&](int64_t begin, int64_t end) {
        auto after = std::upper_bound(first_element.begin(), first_element.end(), begin);
        auto tensor = static_cast<size_t>(after - first_element.begin() - 1);
        int64_t chunk = (begin - first_element[tensor] + chunk_size - 1) / chunk_size;  // within the tensor
        for (; tensor < numels.size() && first_element[tensor] < end; ++tensor, chunk = 0) {
            for (int64_t at = chunk * chunk_size; at < numels[tensor] && first_element[tensor] + at < end;
                 at += chunk_size, ++chunk) {
                const int64_t chunk_end = std::min(at + chunk_size, numels[tensor]);
                function(plan.first_chunk(tensor) + chunk, Chunk{static_cast<int64_t>(tensor), at, chunk_end});
            }
        }
    };
    const int64_t total = first_element.back();
    if (total < 2 * kGrain) {
        run(0, total);
    } else {
        torch::stable::parallel_for(0, total, kGrain, run);
    }
}

}  // namespace gam_fused::cpu

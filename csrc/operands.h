// What an operator is given, checked before the first byte is written, as plain pointers and sizes.
//
// A kernel sees each tensor as a run of elements in memory, so tensors of equal index must be laid out alike and
// without gaps (in any order of dimensions: contiguous, channels_last, transposed). Every check raises with the list's
// name and the tensor's index; the Python back end makes dense copies of tensors that are laid out otherwise.

#pragma once

#include <torch/csrc/stable/tensor.h>

#include <algorithm>
#include <cstdint>
#include <initializer_list>
#include <optional>
#include <sstream>
#include <stdexcept>
#include <string>
#include <vector>

#include "boxing.h"
#include "description.h"
#include "dtype.h"

namespace gam_fused {

// One argument of an operator. A list that may be left out is left out by being empty.
struct ListArgument {
    const char* name;
    const TensorList& tensors;
    bool is_written = false;
    bool is_optional = false;
};

template <typename... Parts>
[[noreturn]] void fail(const Parts&... parts) {
    std::ostringstream message;
    (message << ... << parts);
    throw std::runtime_error(message.str());
}

// Checked lists of tensors. `data[i]` holds the addresses of the i-th list given; empty for one that was left out.
class Operands {
 public:
    Operands(std::initializer_list<ListArgument> lists, bool same_shape = true);

    bool is_empty() const { return numels.empty(); }

    // The address of a tensor of one element of the accumulation dtype, or of `expected`, on the lists' device.
    const void* scalar(const char* name, AtenTensorHandle handle, std::optional<Dtype> expected = {}) const;

    const void* scalar(const char* name, const Tensor& tensor, std::optional<Dtype> expected = {}) const {
        return scalar(name, tensor.get(), expected);
    }

    std::vector<const void*> scalars(const char* name, const TensorList& tensors) const;

    Dtype dtype = Dtype::float32;
    int32_t device_type = 0;
    int32_t device_index = 0;
    std::vector<int64_t> numels;
    std::vector<std::vector<void*>> data;

 private:
    struct Range {
        uintptr_t begin;
        uintptr_t end;
        uint32_t list;
        uint32_t index;
    };

    void check_disjoint(const std::vector<ListArgument>& lists, std::vector<Range>& ranges) const;
};

inline Operands::Operands(std::initializer_list<ListArgument> arguments, bool same_shape) {
    const std::vector<ListArgument> lists(arguments);
    const ListArgument& first = lists.front();
    for (const ListArgument& list : lists) {
        if (same_shape && list.tensors.size() != first.tensors.size() && !(list.is_optional && list.tensors.empty())) {
            fail(list.name, ": ", list.tensors.size(), " tensors, expected ", first.tensors.size(), " as in ",
                 first.name);
        }
    }

    bool is_first_tensor = true;  // its dtype and device are the ones expected
    int32_t dtype_code = 0;
    std::vector<Description> models;  // of the first list, for the shapes of the others
    std::vector<Range> ranges;
    bool any_written = false;
    size_t count = 0;
    for (const ListArgument& list : lists) {
        any_written = any_written || list.is_written;
        count += list.tensors.size();
    }
    if (any_written) {
        ranges.reserve(count);
    }
    models.reserve(same_shape ? first.tensors.size() : 0);
    numels.reserve(same_shape ? first.tensors.size() : count);
    data.resize(lists.size());
    for (size_t l = 0; l < lists.size(); ++l) {
        const ListArgument& list = lists[l];
        const TensorReader& reader = list.tensors.reader();
        data[l].reserve(list.tensors.size());
        for (size_t i = 0; i < list.tensors.size(); ++i) {
            const Description tensor = reader.describe(list.tensors[i]);
            if (!tensor.is_strided) {
                fail(list.name, "[", i, "]: a sparse or other special layout, expected a strided tensor");
            }
            if (is_first_tensor) {
                is_first_tensor = false;
                const auto found = tensor.dtype();
                if (!found) {
                    fail(list.name, "[", i, "]: expected float64, float32, bfloat16 or float16");
                }
                dtype = *found;
                dtype_code = tensor.dtype_code;
                device_type = tensor.device_type;
                device_index = tensor.device_index;
            } else if (tensor.dtype_code != dtype_code) {
                fail(list.name, "[", i, "]: dtype differs from that of ", first.name, "[0]");
            } else if (tensor.device_type != device_type || tensor.device_index != device_index) {
                fail(list.name, "[", i, "]: device differs from that of ", first.name, "[0]");
            }

            if (l == 0 || !same_shape) {
                if (!tensor.is_dense()) {
                    fail(list.name, "[", i, "]: has gaps or repeats elements in memory, expected a dense tensor");
                }
                numels.push_back(tensor.numel);
                if (same_shape) {
                    models.push_back(tensor);
                }
            } else {
                if (!tensor.has_sizes_of(models[i])) {
                    fail(list.name, "[", i, "]: shape ", tensor.shape(), ", expected ", models[i].shape(), " as ",
                         first.name, "[", i, "]");
                }
                if (!tensor.has_strides_of(models[i])) {
                    fail(list.name, "[", i, "]: strides differ from those of ", first.name, "[", i, "]");
                }
            }

            const auto address = address_of(list.tensors[i], tensor.numel, size_of(dtype), reader);
            if (!address) {
                fail(list.name, "[", i, "]: its storage is smaller than the tensor; it was freed or resized");
            }
            data[l].push_back(*address);
            if (any_written && tensor.numel > 0) {
                const auto begin = reinterpret_cast<uintptr_t>(*address);
                const auto bytes = static_cast<uintptr_t>(tensor.numel) * size_of(dtype);
                ranges.push_back({begin, begin + bytes, static_cast<uint32_t>(l), static_cast<uint32_t>(i)});
            }
        }
    }
    if (any_written) {
        check_disjoint(lists, ranges);
    }
}

// Dense tensors share an element exactly where their ranges of memory do. Those that are only read may.
inline void Operands::check_disjoint(const std::vector<ListArgument>& lists, std::vector<Range>& ranges) const {
    std::sort(ranges.begin(), ranges.end(), [](const Range& a, const Range& b) { return a.begin < b.begin; });
    const Range* furthest = nullptr;          // of all ranges so far
    const Range* furthest_written = nullptr;  // of the written ones so far
    for (const Range& range : ranges) {
        const bool is_written = lists[range.list].is_written;
        const Range* const other = is_written ? furthest : furthest_written;
        if (other != nullptr && other->end > range.begin) {
            const Range& later = std::max(range.list, other->list) == range.list ? range : *other;
            const Range& earlier = &later == other ? range : *other;
            fail(lists[later.list].name, "[", later.index, "]: overlaps ", lists[earlier.list].name, "[", earlier.index,
                 "] in memory, expected separate memory as one is written");
        }
        if (furthest == nullptr || range.end > furthest->end) {
            furthest = &range;
        }
        if (is_written && (furthest_written == nullptr || range.end > furthest_written->end)) {
            furthest_written = &range;
        }
    }
}

inline const void* Operands::scalar(const char* name, AtenTensorHandle handle, std::optional<Dtype> expected) const {
    const Dtype wide = expected.value_or(dtype == Dtype::float64 ? Dtype::float64 : Dtype::float32);
    const Description tensor = kStableReader.describe(handle);
    if (!tensor.is_strided || tensor.numel != 1) {
        fail(name, ": expected a tensor of one element");
    }
    if (tensor.dtype() != wide) {
        fail(name, ": expected ", wide == Dtype::float64 ? "float64" : "float32");
    }
    if (tensor.device_type != device_type || tensor.device_index != device_index) {
        fail(name, ": expected a tensor on the device of the lists");
    }
    const auto address = address_of(handle, 1, size_of(wide));
    if (!address) {
        fail(name, ": its storage is smaller than the tensor; it was freed or resized");
    }
    return *address;
}

inline std::vector<const void*> Operands::scalars(const char* name, const TensorList& tensors) const {
    std::vector<const void*> addresses;
    addresses.reserve(tensors.size());
    for (size_t i = 0; i < tensors.size(); ++i) {
        addresses.push_back(scalar(name, tensors[i]));
    }
    return addresses;
}

// Adam's step counts: one float32 number for each tensor, on its device, each in memory of its own.
inline Operands checked_steps(const TensorList& state_steps, const Operands& operands) {
    if (state_steps.size() != operands.numels.size()) {
        fail("state_steps: ", state_steps.size(), " tensors, expected ", operands.numels.size(), " as in params");
    }
    Operands steps({{"state_steps", state_steps, /*is_written=*/true}});
    for (size_t i = 0; i < steps.numels.size(); ++i) {
        if (steps.numels[i] != 1 || steps.dtype != Dtype::float32) {
            fail("state_steps[", i, "]: expected a float32 tensor of one element");
        }
    }
    if (!steps.is_empty() &&
        (steps.device_type != operands.device_type || steps.device_index != operands.device_index)) {
        fail("state_steps[0]: device differs from that of params[0]");
    }
    return steps;
}

}  // namespace gam_fused

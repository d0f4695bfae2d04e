// From PyTorch's calling convention to functions that take lists of tensors.
//
// TORCH_BOX of the stable ABI makes a shared pointer for each tensor of a list, and most of what a launch over hundreds
// of small tensors costs is what is done per tensor. Here a list is the handles themselves.

#pragma once

#include <Python.h>

#include <torch/csrc/stable/library.h>
#include <torch/csrc/stable/tensor.h>

#include <cstddef>
#include <tuple>
#include <type_traits>
#include <utility>
#include <vector>

#include "description.h"

namespace gam_fused {

using torch::stable::Tensor;

// The handles of a list's tensors: of one that PyTorch hands over, or borrowed from whoever keeps the tensors.
class TensorList {
 public:
    TensorList() = default;

    explicit TensorList(StableListHandle list) : list_(list) {
        size_t size = 0;
        STABLE_TORCH_ERROR_CODE_CHECK(torch_list_size(list, &size));
        handles_.reserve(size);
        for (size_t i = 0; i < size; ++i) {
            StableIValue item = 0;
            STABLE_TORCH_ERROR_CODE_CHECK(torch_list_get_item(list, i, &item));
            handles_.push_back(torch::stable::detail::to<AtenTensorHandle>(item));
        }
    }

    TensorList(TensorList&& other) noexcept
        : list_(std::exchange(other.list_, nullptr)), reader_(other.reader_), handles_(std::move(other.handles_)) {
        other.handles_.clear();
    }

    TensorList(const TensorList&) = delete;
    TensorList& operator=(const TensorList&) = delete;
    TensorList& operator=(TensorList&&) = delete;

    ~TensorList() {
        if (list_ != nullptr) {
            for (const AtenTensorHandle handle : handles_) {
                aoti_torch_delete_tensor_object(handle);
            }
            torch_delete_list(list_);
        }
    }

    // Tensors that are to be borrowed: how many, and how they are read.
    void expect(size_t size, const TensorReader& reader) {
        handles_.reserve(size);
        reader_ = &reader;
    }

    void borrow(AtenTensorHandle handle) { handles_.push_back(handle); }

    size_t size() const { return handles_.size(); }
    bool empty() const { return handles_.empty(); }
    AtenTensorHandle operator[](size_t index) const { return handles_[index]; }
    const TensorReader& reader() const { return *reader_; }

 private:
    StableListHandle list_ = nullptr;  // null where handles are borrowed
    const TensorReader* reader_ = &kStableReader;
    std::vector<AtenTensorHandle> handles_;
};

namespace detail {

// Operators run without Python's global interpreter lock. But letting go of a tensor that then only Python holds takes
// the lock, for each tensor of a list; if this thread has it already, that is twenty times as fast. So it is taken
// once, before the arguments are destroyed, and given back after that:
//
//     InterpreterLock lock;
//     <arguments>
//     const InterpreterLock::TakenAtEnd taken(lock);
class InterpreterLock {
 public:
    InterpreterLock() = default;
    InterpreterLock(const InterpreterLock&) = delete;
    InterpreterLock& operator=(const InterpreterLock&) = delete;

    ~InterpreterLock() {
        if (is_taken_) {
            PyGILState_Release(state_);
        }
    }

    class TakenAtEnd {
     public:
        explicit TakenAtEnd(InterpreterLock& lock) : lock_(lock) {}
        TakenAtEnd(const TakenAtEnd&) = delete;
        TakenAtEnd& operator=(const TakenAtEnd&) = delete;

        ~TakenAtEnd() {
            if (Py_IsInitialized() != 0) {
                lock_.state_ = PyGILState_Ensure();
                lock_.is_taken_ = true;
            }
        }

     private:
        InterpreterLock& lock_;
    };

 private:
    bool is_taken_ = false;
    PyGILState_STATE state_{};
};

template <typename T>
T unboxed(StableIValue value) {
    if constexpr (std::is_same_v<T, TensorList>) {
        return TensorList(torch::stable::detail::to<StableListHandle>(value));
    } else {
        return torch::stable::detail::to<T>(value);
    }
}

template <typename T>
void box(StableIValue* stack, const T& result) {
    stack[0] = torch::stable::detail::from(result);
}

template <typename... Ts>
void box(StableIValue* stack, const std::tuple<Ts...>& results) {
    std::apply([&](const Ts&... each) { (void)((*stack++ = torch::stable::detail::from(each)), ...); }, results);
}

template <auto function>
struct Boxed;

template <typename Result, typename... Arguments, Result (*function)(Arguments...)>
struct Boxed<function> {
    static void call(StableIValue* stack, uint64_t, uint64_t) { call(stack, std::index_sequence_for<Arguments...>{}); }

    template <size_t... kIndices>
    static void call(StableIValue* stack, std::index_sequence<kIndices...>) {
        InterpreterLock lock;
        // Braces: every argument is taken over from the stack, in order, before any check can raise.
        const std::tuple<std::decay_t<Arguments>...> arguments{unboxed<std::decay_t<Arguments>>(stack[kIndices])...};
        const InterpreterLock::TakenAtEnd taken(lock);
        if constexpr (std::is_void_v<Result>) {
            std::apply(function, arguments);
        } else {
            box(stack, std::apply(function, arguments));
        }
    }
};

}  // namespace detail

// What StableLibrary::impl takes for `function`, one that takes `const TensorList&` for a list.
template <auto function>
constexpr auto boxed = static_cast<void (*)(StableIValue*, uint64_t, uint64_t)>(&detail::Boxed<function>::call);

}  // namespace gam_fused

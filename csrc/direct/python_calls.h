// Operators as Python functions that take tensors where they lie in Python's objects.
//
// A call through PyTorch's dispatcher costs 150 to 200 ns for each tensor of its lists, in references counted up and
// down and handles made and deleted; hundreds of small tensors take longer to pass than to compute with. These
// functions borrow them instead, and keep Python's global interpreter lock, so that no other thread can take them away.
// They take the arguments that the schema names, make the same checks, and count the mutations of the lists that the
// schema marks. One that finds anything that is for the dispatcher to deal with, an argument left out that is not None
// by default, or more elements than the lock should be kept for, returns NotImplemented before anything is done.

#pragma once

#include <Python.h>

#include <torch/csrc/stable/tensor.h>

#include <algorithm>
#include <cstddef>
#include <cstdint>
#include <exception>
#include <new>
#include <optional>
#include <string>
#include <tuple>
#include <type_traits>
#include <utility>
#include <vector>

#include "../boxing.h"
#include "tensor_access.h"

namespace gam_fused::direct {

inline const TensorAccess* tensor_access = nullptr;  // set before the first call

// In all lists of a call. The lock is kept for a millisecond or two, seldom for longer than the five that Python lets a
// thread keep it anyway. More elements take so long to compute with that the dispatcher's time for their tensors is a
// small part.
constexpr int64_t kMostElements = int64_t{1} << 22;

// What a schema calls an operator and its arguments, and which of them the operator writes.
class Signature {
 public:
    // "name(Type a, Type! b, *, Type c=default) -> result", without a comma inside of a type or default.
    explicit Signature(const std::string& schema) : name_(schema.substr(0, schema.find('('))) {
        const size_t end = schema.find(") -> ");
        for (size_t begin = schema.find('(') + 1; begin < end;) {
            const size_t comma = std::min(schema.find(", ", begin), end);
            const std::string argument = schema.substr(begin, comma - begin);
            begin = comma + 2;
            if (argument == "*") {
                positional_ = names_.size();
                continue;
            }
            const size_t name = argument.find(' ') + 1;
            names_.push_back(PyUnicode_InternFromString(argument.substr(name, argument.find('=') - name).c_str()));
            is_written_.push_back(argument.find('!') < name);
        }
        positional_ = std::min(positional_, names_.size());
    }

    const char* name() const { return name_.c_str(); }
    size_t size() const { return names_.size(); }
    bool is_written(size_t argument) const { return is_written_[argument]; }

    // Each argument that is given at its place in `values`. False where one is given that there is none of, or twice,
    // or without the name that it has to be given by.
    bool place(PyObject* const* given, size_t count, PyObject* keywords, PyObject** values) const {
        if (count > positional_) {
            return false;
        }
        std::copy(given, given + count, values);
        const Py_ssize_t by_name = keywords == nullptr ? 0 : PyTuple_GET_SIZE(keywords);
        for (Py_ssize_t i = 0; i < by_name; ++i) {
            const size_t at = place_of(PyTuple_GET_ITEM(keywords, i));
            if (at == names_.size() || values[at] != nullptr) {
                return false;
            }
            values[at] = given[count + static_cast<size_t>(i)];
        }
        return true;
    }

 private:
    size_t place_of(PyObject* name) const {
        auto found = std::find(names_.begin(), names_.end(), name);
        if (found == names_.end()) {  // interned, as names of keywords mostly are, it would be the same object
            found = std::find_if(names_.begin(), names_.end(),
                                 [name](PyObject* each) { return PyUnicode_Compare(each, name) == 0; });
        }
        return static_cast<size_t>(found - names_.begin());
    }

    std::string name_;
    size_t positional_ = SIZE_MAX;  // how many arguments may be given without their names
    std::vector<PyObject*> names_;  // of arguments, for as long as the process lives
    std::vector<bool> is_written_;
};

// ---------------------------------------------------------------- from Python's objects

// take(value, into): whether the value is one that can be taken. `value` is null where none is given. Lists are also
// told how many elements there is room for.

inline bool take(PyObject* value, int64_t& room, TensorList& into) {
    if (value == nullptr || !(PyList_CheckExact(value) || PyTuple_CheckExact(value))) {
        return false;
    }
    const auto size = static_cast<size_t>(PySequence_Fast_GET_SIZE(value));
    PyObject** const items = PySequence_Fast_ITEMS(value);
    into.expect(size, tensor_access->reader);
    for (size_t i = 0; i < size; ++i) {
        int64_t numel = 0;
        const AtenTensorHandle handle = tensor_access->borrow(items[i], &numel);
        room -= numel;
        if (handle == nullptr || room < 0) {
            return false;
        }
        into.borrow(handle);
    }
    return true;
}

inline bool take(PyObject* value, std::optional<Tensor>& into) {
    if (value == nullptr || value == Py_None) {
        return true;
    }
    int64_t numel = 0;
    const AtenTensorHandle borrowed = tensor_access->borrow(value, &numel);
    AtenTensorHandle owned = nullptr;
    if (borrowed == nullptr || aoti_torch_new_tensor_handle(borrowed, &owned) != TORCH_SUCCESS) {
        return false;
    }
    into.emplace(owned);
    return true;
}

inline bool take(PyObject* value, double& into) {
    if (value == nullptr || !(PyFloat_Check(value) || PyLong_CheckExact(value))) {
        return false;
    }
    into = PyFloat_AsDouble(value);
    if (PyErr_Occurred() != nullptr) {  // an integer beyond all of them
        PyErr_Clear();
        return false;
    }
    return true;
}

inline bool take(PyObject* value, bool& into) {
    into = value == Py_True;
    return value == Py_True || value == Py_False;
}

inline bool take(PyObject* value, std::optional<int64_t>& into) {
    if (value == nullptr || value == Py_None) {
        return true;
    }
    int overflow = 0;
    into = PyLong_CheckExact(value) ? PyLong_AsLongLongAndOverflow(value, &overflow) : 0;
    return PyLong_CheckExact(value) && overflow == 0;
}

// An argument as it is taken: one that has to be given may be missing until then.
template <typename T>
struct Taken {
    T value{};
    const T& get() const { return value; }
};

template <>
struct Taken<Tensor> {
    std::optional<Tensor> value;
    const Tensor& get() const { return *value; }
};

template <typename T>
bool take(PyObject* value, int64_t&, Taken<T>& into) {
    return take(value, into.value);
}

inline bool take(PyObject* value, int64_t& room, Taken<TensorList>& into) {
    return take(value, room, into.value);
}

inline bool take(PyObject* value, int64_t&, Taken<Tensor>& into) {
    return value != Py_None && value != nullptr && take(value, into.value);
}

// ---------------------------------------------------------------- back to them

inline PyObject* to_python(const Tensor& tensor) {
    return tensor_access->to_python(tensor.get());
}

template <typename... Ts>
PyObject* to_python(const std::tuple<Ts...>& results) {
    return std::apply(
        [](const Ts&... each) -> PyObject* {
            PyObject* const tuple = PyTuple_New(sizeof...(Ts));
            if (tuple == nullptr) {
                return nullptr;
            }
            Py_ssize_t at = 0;
            (PyTuple_SET_ITEM(tuple, at++, to_python(each)), ...);
            if (PyErr_Occurred() != nullptr) {
                Py_DECREF(tuple);
                return nullptr;
            }
            return tuple;
        },
        results);
}

// ---------------------------------------------------------------- calls

template <auto function>
struct Call;

template <typename Result, typename... Arguments, Result (*function)(Arguments...)>
struct Call<function> {
    static inline const Signature* signature = nullptr;  // set before the first call, with as many arguments
    static constexpr size_t kArguments = sizeof...(Arguments);

    static PyObject* entry(PyObject*, PyObject* const* given, Py_ssize_t count, PyObject* keywords) {
        return call(given, static_cast<size_t>(count), keywords, std::index_sequence_for<Arguments...>{});
    }

 private:
    template <size_t... kIndices>
    static PyObject* call(PyObject* const* given, size_t count, PyObject* keywords, std::index_sequence<kIndices...>) {
        try {
            PyObject* values[kArguments] = {};
            std::tuple<Taken<std::decay_t<Arguments>>...> arguments;
            int64_t room = kMostElements;
            if (!tensor_access->is_unobserved() || !signature->place(given, count, keywords, values) ||
                !(take(values[kIndices], room, std::get<kIndices>(arguments)) && ...)) {
                Py_RETURN_NOTIMPLEMENTED;
            }
            if constexpr (std::is_void_v<Result>) {
                function(std::get<kIndices>(arguments).get()...);
                (count_mutations(signature->is_written(kIndices), std::get<kIndices>(arguments)), ...);
                Py_RETURN_NONE;
            } else {  // those that have a result write nothing
                return to_python(function(std::get<kIndices>(arguments).get()...));
            }
        } catch (const std::bad_alloc&) {
            return PyErr_NoMemory();
        } catch (const std::exception& error) {
            PyErr_SetString(PyExc_RuntimeError, error.what());
            return nullptr;
        }
    }

    template <typename T>
    static void count_mutations(bool is_written, const Taken<T>& argument) {
        if constexpr (std::is_same_v<T, TensorList>) {
            for (size_t i = 0; is_written && i < argument.value.size(); ++i) {
                tensor_access->count_mutation(argument.value[i]);
            }
        }
    }
};

// Puts a Python function for `function`, which has this schema, into the dict under the operator's name. False with an
// exception set.
template <auto function>
bool add_python_call(PyObject* calls, const char* schema) {
    static const Signature signature(schema);
    if (signature.size() != Call<function>::kArguments) {
        PyErr_Format(PyExc_RuntimeError, "%s: %zu arguments, its schema names %zu", signature.name(),
                     Call<function>::kArguments, signature.size());
        return false;
    }
    // Through void*: the flags say which kind of function it is.
    static PyMethodDef definition = {signature.name(),
                                     reinterpret_cast<PyCFunction>(reinterpret_cast<void*>(&Call<function>::entry)),
                                     METH_FASTCALL | METH_KEYWORDS, nullptr};
    Call<function>::signature = &signature;
    PyObject* const call = PyCFunction_New(&definition, nullptr);
    const bool is_added = call != nullptr && PyDict_SetItemString(calls, signature.name(), call) == 0;
    Py_XDECREF(call);
    return is_added;
}

// A new reference to a dict of all operators' functions by name; null with an exception set.
PyObject* python_calls(const TensorAccess* access);

}  // namespace gam_fused::direct

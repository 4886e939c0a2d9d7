// Reads PyTorch's tensors without linking PyTorch: through the table of C functions that PyTorch's tensor type carries
// (DLPack's exchange API, from torch 2.10 or so on). That takes 20 ns a tensor, where its Python attributes take a
// microsecond. For a torch without the table, a Python function describes the tensor.
#pragma once

#define PY_SSIZE_T_CLEAN
#include <Python.h>

#include <initializer_list>
#include <stdexcept>
#include <string>

#include "attention/plan.h"

namespace farshore {

// Types of elements; the first three have the numbers of Format. `_ELEMENTS` in kernels/cpu/native_module.py has the
// same numbers.
enum class Element : int { f32, bf16, f16, u8, i16, i32, i64 };

template <class T>
constexpr Element ELEMENT_OF = Element::f32;
template <>
inline constexpr Element ELEMENT_OF<uint8_t> = Element::u8;
template <>
inline constexpr Element ELEMENT_OF<int16_t> = Element::i16;
template <>
inline constexpr Element ELEMENT_OF<int32_t> = Element::i32;
template <>
inline constexpr Element ELEMENT_OF<int64_t> = Element::i64;

constexpr int MAX_DIMS = 3;

// A tensor on the CPU.
struct View {
    void* data;
    int dims;
    int64_t shape[MAX_DIMS];
    int64_t strides[MAX_DIMS];  // in elements
    Element element;

    // Only for f32, bf16 and f16.
    Format format() const { return static_cast<Format>(element); }
};

// Views a tensor of float32, bfloat16 or float16 with any strides. Throws std::invalid_argument, whose text begins
// with `name`, for any other object, another device, or more than MAX_DIMS dimensions.
View float_view(PyObject* tensor, const char* name);

// Views a contiguous tensor of `dims` dimensions; errors as float_view.
View contiguous_view(PyObject* tensor, const char* name, Element element, int dims);

// "`name` of shape ..., expected ...".
std::string mismatch(const char* name, const View& given, std::initializer_list<int64_t> expected);

// The elements of a contiguous tensor of one dimension; errors as float_view.
template <class T>
const T* vector_of(PyObject* tensor, const char* name, int64_t count) {
    const View view = contiguous_view(tensor, name, ELEMENT_OF<T>, 1);
    if (view.shape[0] != count) throw std::invalid_argument(mismatch(name, view, {count}));
    return static_cast<const T*>(view.data);
}

// `type` is torch.Tensor. `capsule` is its `__dlpack_c_exchange_api__`, or None. describe(tensor) returns
// (address, *shape, *strides, number of the Element); the number is negative for elements that are not listed and for
// another device. Throws std::invalid_argument for a `type` that is no type, PythonError for another capsule.
void set_tensors(PyObject* type, PyObject* capsule, PyObject* describe);

}  // namespace farshore

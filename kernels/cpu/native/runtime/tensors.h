// PyTorch's tensors, read without PyTorch: through the table of C functions that its tensor type carries (DLPack's
// exchange API, torch 2.10 or so), in 20 ns a tensor, where its Python attributes take a microsecond. Where there is
// no table a Python function describes them.
#pragma once

#include <Python.h>

#include <initializer_list>
#include <string>

#include "attention/plan.h"

namespace farshore {

struct View {
    void* data;
    int dims;  // at most 3
    int64_t shape[3];
    int64_t strides[3];  // in elements
    Format format;       // f32, bf16 or f16
};

// Of a tensor on the CPU in float32, bfloat16 or float16. Throws std::invalid_argument for any other, by `name`.
View view_of(PyObject* tensor, const char* name);

// "`name` of shape ..., expected ...".
std::string mismatch(const char* name, const View& given, std::initializer_list<int64_t> expected);

// type: torch.Tensor; capsule: its `__dlpack_c_exchange_api__`, or None; describe(tensor) -> (address, *shape,
// *strides, format), format negative for one that we do not read.
void set_tensors(PyObject* type, PyObject* capsule, PyObject* describe);

}  // namespace farshore

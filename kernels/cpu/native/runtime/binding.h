// What the two binding.cpp files of the kernels' module share.
#pragma once

#include <string>

#include "attention/plan.h"
#include "runtime/arguments.h"
#include "runtime/module.h"
#include "runtime/tensors.h"

namespace farshore {

// A tensor [rows, heads, dim] whose last dimension is contiguous. Throws std::invalid_argument for other tensors.
inline RowArray rows_of(PyObject* tensor, const char* name, int64_t rows, int64_t heads, int64_t dim) {
    const View view = float_view(tensor, name);
    const bool fits = view.dims == 3 && view.shape[0] == rows && view.shape[1] == heads && view.shape[2] == dim;
    if (!fits) throw std::invalid_argument(mismatch(name, view, {rows, heads, dim}));
    if (dim > 1 && view.strides[2] != 1)
        throw std::invalid_argument(std::string(name) + ": the last dimension must be contiguous");
    return {view.data, view.strides[0], view.strides[1], view.format()};
}

// An attention state: o [rows, heads, dim] and lse float32 [rows, heads]; errors as rows_of.
inline StateArray state_of(PyObject* o, PyObject* lse, int64_t rows, int64_t heads, int64_t dim) {
    StateArray out;
    out.o = rows_of(o, "o", rows, heads, dim);
    const View view = float_view(lse, "lse");
    if (view.dims != 2 || view.shape[0] != rows || view.shape[1] != heads)
        throw std::invalid_argument(mismatch("lse", view, {rows, heads}));
    if (view.format() != Format::f32) throw std::invalid_argument("lse must be float32");
    out.lse = static_cast<float*>(view.data);
    out.lse_row_stride = view.strides[0], out.lse_head_stride = view.strides[1];
    return out;
}

// The kernels of the instruction set in use.
const Kernels& kernels();

// The module's functions that dense/binding.cpp defines.
extern PyMethodDef dense_methods[];

}  // namespace farshore

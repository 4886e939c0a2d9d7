// Python's arguments, errors and lock, for the files that bind functions.
#pragma once

#define PY_SSIZE_T_CLEAN
#include <Python.h>

#include <climits>
#include <exception>
#include <new>
#include <stdexcept>
#include <string>

#include "attention/plan.h"
#include "runtime/tensors.h"

namespace farshore {

// Reads integers from left to right; a float where one is due. The launchers give the right number.
struct Arguments {
    PyObject* const* next;
    PyObject* const* end;

    int64_t integer() {
        if (next == end) throw std::runtime_error("too few arguments");
        const long long value = PyLong_AsLongLong(*next++);
        if (value == -1 && PyErr_Occurred()) throw std::runtime_error("not an integer");
        return value;
    }
    // Python's integers have no bound; what does not fit must not lose its upper bits.
    int small() {
        const int64_t value = integer();
        if (value < INT_MIN || value > INT_MAX)
            throw std::invalid_argument(std::to_string(value) + " does not fit into 32 bits");
        return static_cast<int>(value);
    }
    float real() {
        if (next == end) throw std::runtime_error("too few arguments");
        return static_cast<float>(PyFloat_AsDouble(*next++));
    }
    template <class T>
    T* pointer() {
        return reinterpret_cast<T*>(integer());
    }
    RowArray array() {
        RowArray a;
        a.data = pointer<void>();
        a.row_stride = integer();
        a.head_stride = integer();
        a.format = static_cast<Format>(small());
        return a;
    }
    StateArray out() {
        StateArray o;
        o.o = array();
        o.lse = pointer<float>();
        o.lse_row_stride = integer();
        o.lse_head_stride = integer();
        return o;
    }
    // A tensor [rows, heads, dim] on the CPU whose last dimension is contiguous.
    RowArray rows(const char* name, int64_t rows, int64_t heads, int64_t dim) {
        const View x = tensor(name);
        const bool fits = x.dims == 3 && x.shape[0] == rows && x.shape[1] == heads && x.shape[2] == dim;
        if (!fits) throw std::invalid_argument(mismatch(name, x, {rows, heads, dim}));
        if (dim > 1 && x.strides[2] != 1)
            throw std::invalid_argument(std::string(name) + ": the last dimension must be contiguous");
        return {x.data, x.strides[0], x.strides[1], x.format};
    }
    // A state, two tensors: o [rows, heads, dim] and lse float32 [rows, heads].
    StateArray state(int64_t rows, int64_t heads, int64_t dim) {
        StateArray out;
        out.o = this->rows("o", rows, heads, dim);
        const View lse = tensor("lse");
        if (lse.dims != 2 || lse.shape[0] != rows || lse.shape[1] != heads)
            throw std::invalid_argument(mismatch("lse", lse, {rows, heads}));
        if (lse.format != Format::f32) throw std::invalid_argument("lse must be float32");
        out.lse = static_cast<float*>(lse.data);
        out.lse_row_stride = lse.strides[0], out.lse_head_stride = lse.strides[1];
        return out;
    }
    View tensor(const char* name) {
        if (next == end) throw std::runtime_error("too few arguments");
        return view_of(*next++, name);
    }
    Shape shape() {
        Shape s;
        s.q_heads = small();
        s.k_heads = small();
        s.v_heads = small();
        s.k_dim = small();
        s.v_dim = small();
        s.scale = real();
        s.soft_cap = real();
        return s;
    }
    int64_t window() {
        const int64_t tokens = integer();
        return tokens > 0 ? tokens : INT64_MAX;
    }
};

template <class Call>
PyObject* guarded(Call&& call) {
    try {
        return call();
    } catch (const std::bad_alloc&) {
        if (!PyErr_Occurred()) PyErr_NoMemory();
        return nullptr;
    } catch (const std::invalid_argument& error) {
        if (!PyErr_Occurred()) PyErr_SetString(PyExc_ValueError, error.what());
        return nullptr;
    } catch (const std::exception& error) {
        if (!PyErr_Occurred()) PyErr_SetString(PyExc_RuntimeError, error.what());
        return nullptr;
    }
}

// A reference that is given back.
struct Owned {
    explicit Owned(PyObject* object) : it(object) {}
    ~Owned() { Py_XDECREF(it); }
    Owned(const Owned&) = delete;
    Owned& operator=(const Owned&) = delete;
    PyObject* it;
};

struct WithoutGil {
    WithoutGil() : state(PyEval_SaveThread()) {}
    ~WithoutGil() { PyEval_RestoreThread(state); }
    PyThreadState* state;
};

template <class F>
PyMethodDef method(const char* name, F function, const char* text) {
    return {name, reinterpret_cast<PyCFunction>(reinterpret_cast<void (*)()>(function)), METH_FASTCALL, text};
}

// Those in use.
const Kernels& kernels();

extern PyMethodDef dense_methods[];

}  // namespace farshore

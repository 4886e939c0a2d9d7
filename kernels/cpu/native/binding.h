// Python's arguments, errors and lock, for the files that bind functions.
#pragma once

#define PY_SSIZE_T_CLEAN
#include <Python.h>

#include <climits>
#include <exception>
#include <stdexcept>

#include "plan.h"

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
    int small() { return static_cast<int>(integer()); }
    float real() {
        if (next == end) throw std::runtime_error("too few arguments");
        return static_cast<float>(PyFloat_AsDouble(*next++));
    }
    template <class T>
    T* pointer() {
        return reinterpret_cast<T*>(integer());
    }
    Array array() {
        Array a;
        a.data = pointer<void>();
        a.row_stride = integer();
        a.head_stride = integer();
        a.format = static_cast<Format>(small());
        return a;
    }
    Out out() {
        Out o;
        o.o = array();
        o.lse = pointer<float>();
        o.lse_row_stride = integer();
        o.lse_head_stride = integer();
        return o;
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
    } catch (const std::exception& error) {
        if (!PyErr_Occurred()) PyErr_SetString(PyExc_RuntimeError, error.what());
        return nullptr;
    }
}

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

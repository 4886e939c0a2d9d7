// Python's arguments, errors and lock, for the files that bind functions.
#pragma once

#define PY_SSIZE_T_CLEAN
#include <Python.h>

#include <cstdarg>
#include <exception>

#include "runtime/api.h"
#include "wire/wire.h"

namespace farshore::wire {

inline constexpr const char* WIRE_CAPSULE = "farshore.wire";

// Python's exception for one of ours.
inline PyObject* type_of(const std::exception& error) {
    if (dynamic_cast<const Late*>(&error)) return PyExc_TimeoutError;
    if (dynamic_cast<const Broken*>(&error)) return PyExc_ConnectionError;
    if (dynamic_cast<const Refused*>(&error)) return PyExc_ValueError;
    return PyExc_RuntimeError;
}

template <class Call>
PyObject* guarded(Call&& call) {
    try {
        return call();
    } catch (const std::exception& error) {
        if (!PyErr_Occurred()) PyErr_SetString(type_of(error), error.what());
    }
    return nullptr;
}

// Of a Python call that failed; the exception is set already.
struct Raised : std::exception {};

inline void parse(PyObject* args, const char* format, ...) {
    va_list out;
    va_start(out, format);
    const int ok = PyArg_VaParse(args, format, out);
    va_end(out);
    if (!ok) throw Raised();
}

struct WithoutGil {
    WithoutGil() : state(PyEval_SaveThread()) {}
    ~WithoutGil() { PyEval_RestoreThread(state); }
    PyThreadState* state;
};

inline Wire& wire_of(PyObject* capsule) {
    void* it = PyCapsule_GetPointer(capsule, WIRE_CAPSULE);
    if (!it) throw Raised();
    return *static_cast<Wire*>(it);
}

// Of the native kernels' module, which must be there.
inline const Api& kernels_api() {
    const auto* api = static_cast<const Api*>(PyCapsule_Import(API_CAPSULE, 0));
    if (!api) throw Raised();
    return *api;
}

// What each end is called by; see the methods' texts in binding.cpp.
PyObject* begin(PyObject*, PyObject* args);
PyObject* again(PyObject*, PyObject* args);
PyObject* under_way(PyObject*, PyObject* args);
PyObject* is_open(PyObject*, PyObject* args);
PyObject* drain(PyObject*, PyObject* args);
PyObject* send(PyObject*, PyObject* args);
PyObject* wait(PyObject*, PyObject* args);
PyObject* make_exchange(PyObject*, PyObject* args);
PyObject* send_all(PyObject*, PyObject* args);
PyObject* wait_all(PyObject*, PyObject* args);
PyObject* give_way(PyObject*, PyObject*);
PyObject* times(PyObject*, PyObject* args);
PyObject* serve(PyObject*, PyObject* args);
PyObject* share_cores(PyObject*, PyObject*);
PyObject* fail(PyObject*, PyObject* args);

}  // namespace farshore::wire

// Definitions of Python modules and their functions. Header only: used by all three native modules.
#pragma once

#define PY_SSIZE_T_CLEAN
#include <Python.h>

#include <cstddef>
#include <exception>
#include <new>
#include <stdexcept>
#include <type_traits>

#include "runtime/arguments.h"
#include "runtime/capsule.h"

namespace farshore {

// Chooses the Python exception for a C++ one.
using ExceptionType = PyObject* (*)(const std::exception&);

inline PyObject* exception_type(const std::exception& error) {
    if (dynamic_cast<const std::bad_alloc*>(&error)) return PyExc_MemoryError;
    if (dynamic_cast<const std::invalid_argument*>(&error)) return PyExc_ValueError;
    return PyExc_RuntimeError;
}

// A string constant as a template argument.
template <size_t N>
struct MethodName {
    char text[N];
    consteval MethodName(const char (&name)[N]) {
        for (size_t i = 0; i < N; i++) text[i] = name[i];
    }
};

// The C function behind a Python function: calls FUNCTION(Arguments&), whose result is a new reference, or void for
// None, and turns C++ exceptions into Python's.
template <MethodName NAME, auto FUNCTION, ExceptionType TYPE_OF>
PyObject* call_function(PyObject*, PyObject* const* values, Py_ssize_t count, PyObject* keywords) {
    try {
        Arguments arguments(NAME.text, values, count, keywords);
        if constexpr (std::is_void_v<decltype(FUNCTION(arguments))>) {
            FUNCTION(arguments);
            Py_RETURN_NONE;
        } else {
            return FUNCTION(arguments);
        }
    } catch (const std::exception& error) {
        if (!PyErr_Occurred()) PyErr_SetString(TYPE_OF(error), error.what());
        return nullptr;
    }
}

// An entry of a module's table of functions. `text`: the Python function's documentation.
template <MethodName NAME, auto FUNCTION, ExceptionType TYPE_OF = exception_type>
PyMethodDef method(const char* text) {
    const _PyCFunctionFastWithKeywords function = call_function<NAME, FUNCTION, TYPE_OF>;
    // A template argument's characters have static storage.
    return {NAME.text, reinterpret_cast<PyCFunction>(reinterpret_cast<void (*)()>(function)),
            METH_FASTCALL | METH_KEYWORDS, text};
}

inline constexpr PyMethodDef NO_MORE_METHODS{nullptr, nullptr, 0, nullptr};

// Every native module is called `_native`. The definition must be static, and in an unnamed namespace: the linker may
// unify what has a name across modules.
inline PyModuleDef module_definition(const char* text, PyMethodDef* methods) {
    return {PyModuleDef_HEAD_INIT, "_native", text, -1, methods, nullptr, nullptr, nullptr, nullptr};
}

// Makes a module and calls fill(module) to add what is not in the table of functions; fill may throw PythonError.
// Returns null with a Python exception on failure, as PyInit functions do.
template <class Fill>
PyObject* make_module(PyModuleDef& definition, Fill&& fill) {
    try {
        Reference module = Reference::owned(PyModule_Create(&definition));
        fill(module.get());
        return module.release();
    } catch (const PythonError&) {
        return nullptr;
    }
}

inline PyObject* make_module(PyModuleDef& definition) { return PyModule_Create(&definition); }

}  // namespace farshore

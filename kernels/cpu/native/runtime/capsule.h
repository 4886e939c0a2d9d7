// Ownership across the Python border: references to Python objects, and native objects in capsules. Header only:
// used by all three native modules.
#pragma once

#define PY_SSIZE_T_CLEAN
#include <Python.h>

#include <memory>
#include <utility>

#include "runtime/arguments.h"

namespace farshore {

// Owns one reference to a Python object, or none. Needs the GIL.
class Reference {
  public:
    Reference() = default;
    // Takes over a new reference. Throws PythonError for null, with which the C API reports an exception.
    static Reference owned(PyObject* object) {
        if (!object) throw PythonError();
        return Reference(object);
    }
    static Reference borrowed(PyObject* object) { return Reference(Py_NewRef(object)); }

    Reference(Reference&& other) noexcept : object_(std::exchange(other.object_, nullptr)) {}
    Reference& operator=(Reference&& other) noexcept {
        std::swap(object_, other.object_);
        return *this;
    }
    ~Reference() { Py_XDECREF(object_); }

    PyObject* get() const { return object_; }
    // Gives the reference to the caller.
    PyObject* release() { return std::exchange(object_, nullptr); }

  private:
    explicit Reference(PyObject* object) : object_(object) {}

    PyObject* object_ = nullptr;
};

// A capsule that owns `content`. `kind` must be a constant: the capsule keeps the pointer.
template <class T>
PyObject* capsule_of(std::unique_ptr<T> content, const char* kind) {
    PyObject* capsule = PyCapsule_New(content.get(), kind, [](PyObject* object) {
        delete static_cast<T*>(PyCapsule_GetPointer(object, PyCapsule_GetName(object)));
    });
    if (!capsule) throw PythonError();
    content.release();
    return capsule;
}

}  // namespace farshore

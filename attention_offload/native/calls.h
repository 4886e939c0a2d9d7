// What the files that define Python functions share: conversions of arguments and errors, and the functions' names.
#pragma once

#include "runtime/api.h"
#include "runtime/arguments.h"
#include "runtime/gil.h"
#include "runtime/module.h"
#include "wire/connection.h"

namespace farshore::wire {

inline constexpr const char* CONNECTION_CAPSULE = "farshore.connection";

// The Python exception for an error of a connection. FrameStream (transport/native_stream.py) maps TimeoutError,
// ConnectionError and ValueError to errors of the package; any other is a defect of the calling module.
inline PyObject* connection_exception(const std::exception& error) {
    if (dynamic_cast<const Late*>(&error)) return PyExc_TimeoutError;
    if (dynamic_cast<const Broken*>(&error)) return PyExc_ConnectionError;
    if (dynamic_cast<const Refused*>(&error)) return PyExc_ValueError;
    return PyExc_RuntimeError;
}

inline Connection& connection_of(Arguments& arguments) {
    return arguments.content<Connection>("connection", CONNECTION_CAPSULE);
}

// The kernels' C++ interface. Throws PythonError if the kernels' module cannot be imported.
inline const Api& kernels_api() {
    const auto* api = static_cast<const Api*>(PyCapsule_Import(API_CAPSULE, 0));
    if (!api) throw PythonError();
    return *api;
}

// Python functions of the engine's end (engine/engine.cpp); binding.cpp documents all functions.
void begin(Arguments& arguments);
void repeat_step(Arguments& arguments);
void send(Arguments& arguments);
PyObject* wait(Arguments& arguments);
PyObject* under_way(Arguments& arguments);
PyObject* is_open(Arguments& arguments);
void drain(Arguments& arguments);
PyObject* make_fanout(Arguments& arguments);
PyObject* send_all(Arguments& arguments);
PyObject* wait_all(Arguments& arguments);
PyObject* times(Arguments& arguments);
void give_way(Arguments& arguments);

// Python functions of the shard's end (shard/shard.cpp).
PyObject* serve(Arguments& arguments);
void question(Arguments& arguments);
void answer(Arguments& arguments);
void fail(Arguments& arguments);
void share_cores(Arguments& arguments);

}  // namespace farshore::wire

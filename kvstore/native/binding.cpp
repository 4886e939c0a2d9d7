// The Python module farshore.kvstore._native. Pointers and strides come as integers from kvstore/blocks.py and
// kvstore/tail.py, which check shapes and dtypes and keep the memory alive; nothing here knows PyTorch.

#define PY_SSIZE_T_CLEAN
#include <Python.h>

#include <climits>
#include <exception>
#include <memory>
#include <new>
#include <stdexcept>
#include <string>

#include "bulk.h"
#include "copy.h"

using namespace farshore::kv;

namespace {

// Reads integers from left to right. The callers give the right number.
struct Arguments {
    PyObject* const* next;
    PyObject* const* end;

    PyObject* object() {
        if (next == end) throw std::runtime_error("too few arguments");
        return *next++;
    }
    int64_t integer() {
        const long long value = PyLong_AsLongLong(object());
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
    uint8_t* pointer() { return reinterpret_cast<uint8_t*>(integer()); }
    // A list of integers.
    Arguments list() {
        PyObject* it = object();
        if (!PyList_Check(it)) throw std::runtime_error("not a list");
        PyObject** items = reinterpret_cast<PyListObject*>(it)->ob_item;
        return {items, items + PyList_GET_SIZE(it)};
    }
    Side side() {
        Side s;
        s.heads = small();
        s.dim = small();
        s.row_bytes = integer();
        s.scales = small();
        s.run_bytes = integer();
        s.offset = integer();
        return s;
    }
    Places places() {
        Places p;
        p.layout.format = static_cast<Format>(small());
        p.layout.block_tokens = small();
        p.layout.layer_bytes = integer();
        p.layout.k = side();
        p.layout.v = side();
        uint8_t* memory = pointer();
        for (Arguments at = list(); at.next != at.end;) {
            Stretch s;
            s.block = memory + at.integer();
            s.slot = at.small();
            s.count = at.small();
            p.stretches.push_back(s);
        }
        return p;
    }
    Rows rows() {
        Rows r;
        r.data = pointer();
        r.layer_stride = integer();
        r.head_stride = integer();
        r.token_stride = integer();
        return r;
    }
};

template <class Call>
PyObject* guarded(Call&& call) {
    try {
        return call();
    } catch (const std::bad_alloc&) {
        return PyErr_NoMemory();
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

template <class Copy>
PyObject* copied(PyObject* const* args, Py_ssize_t count, Copy copy) {
    return guarded([&]() -> PyObject* {
        Arguments a{args, args + count};
        const int first_layer = a.small(), last_layer = a.small(), threads = a.small();
        const Type type = static_cast<Type>(a.small());
        const Rows k = a.rows(), v = a.rows();
        const Places places = a.places();
        {
            WithoutGil released;
            copy(places, first_layer, last_layer, type, k, v, threads);
        }
        Py_RETURN_NONE;
    });
}

PyObject* run_scatter(PyObject*, PyObject* const* args, Py_ssize_t count) { return copied(args, count, scatter); }

PyObject* run_gather(PyObject*, PyObject* const* args, Py_ssize_t count) { return copied(args, count, gather); }

PyObject* make_batch(PyObject*, PyObject* const* args, Py_ssize_t count) {
    return guarded([&]() -> PyObject* {
        Arguments a{args, args + count};
        auto batch = std::make_unique<Batch>();
        for (Arguments at = a.list(); at.next != at.end;) {
            Growth g;
            g.marks = reinterpret_cast<int64_t*>(at.pointer());
            g.freed = g.marks[Growth::FREED];
            g.first = at.integer();
            g.last = at.integer();
            batch->growths.push_back(g);
        }
        batch->places = a.places();
        return PyCapsule_New(batch.release(), "farshore.batch", [](PyObject* capsule) {
            delete static_cast<Batch*>(PyCapsule_GetPointer(capsule, "farshore.batch"));
        });
    });
}

// The GIL stays: a batch takes some 10 µs, and to get it back from another thread may take 5 ms. It also keeps
// the marks from moving meanwhile.
PyObject* run_append(PyObject*, PyObject* const* args, Py_ssize_t count) {
    return guarded([&]() -> PyObject* {
        Arguments a{args, args + count};
        void* batch = PyCapsule_GetPointer(a.object(), "farshore.batch");
        if (!batch) throw std::runtime_error("not a batch");
        const int layer = a.small();
        const Type type = static_cast<Type>(a.small());
        const Rows k = a.rows(), v = a.rows();
        const int refused = append(*static_cast<Batch*>(batch), layer, type, k, v);
        if (refused >= 0) return PyLong_FromLong(refused);
        Py_RETURN_NONE;
    });
}

PyObject* run_xor(PyObject*, PyObject* const* args, Py_ssize_t count) {
    return guarded([&]() -> PyObject* {
        Arguments a{args, args + count};
        uint8_t* const to = a.pointer();
        std::vector<const uint8_t*> sources;
        for (Arguments at = a.list(); at.next != at.end;) sources.push_back(at.pointer());
        const int64_t bytes = a.integer();
        {
            WithoutGil released;
            exclusive_or(to, sources, bytes);
        }
        Py_RETURN_NONE;
    });
}

PyObject* run_stream(PyObject*, PyObject* const* args, Py_ssize_t count) {
    return guarded([&]() -> PyObject* {
        Arguments a{args, args + count};
        uint8_t* const to = a.pointer();
        const uint8_t* const from = a.pointer();
        const int64_t bytes = a.integer();
        {
            WithoutGil released;
            stream_copy(to, from, bytes);
            fence();
        }
        Py_RETURN_NONE;
    });
}

template <class F>
PyMethodDef method(const char* name, F function, const char* text) {
    return {name, reinterpret_cast<PyCFunction>(reinterpret_cast<void (*)()>(function)), METH_FASTCALL, text};
}

PyMethodDef methods[] = {
    method("scatter", run_scatter, "Copy rows into blocks."),
    method("gather", run_gather, "Copy rows out of blocks."),
    method("batch", make_batch, "Where a step's rows go; returns a capsule."),
    method("append", run_append, "append(batch, layer, k, v); None, or the tail that refuses it."),
    method("xor", run_xor, "xor(to, [source, ...], bytes)"),
    method("stream", run_stream, "stream(to, from, bytes): a copy past the caches"),
    {nullptr, nullptr, 0, nullptr},
};

PyModuleDef module{
    PyModuleDef_HEAD_INIT, "_native", "Copies of KV, natively.", -1, methods, nullptr, nullptr, nullptr, nullptr};

}  // namespace

PyMODINIT_FUNC PyInit__native() { return PyModule_Create(&module); }

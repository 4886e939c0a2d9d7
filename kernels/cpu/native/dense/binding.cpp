// The dense slices' part of farshore.kernels.cpu._native; kernels/cpu/dense.py checks what comes in.

#include "runtime/binding.h"

#include <cstring>
#include <memory>

#include "dense/gguf.h"
#include "dense/dense.h"
#include "runtime/pool.h"

using namespace farshore;

namespace {

template <class T>
const T& held(PyObject* capsule, const char* name) {
    void* it = PyCapsule_GetPointer(capsule, name);
    if (!it) throw std::runtime_error("not what was made for this");
    return *static_cast<T*>(it);
}

template <class T>
PyObject* hold(std::unique_ptr<T> it, const char* name) {
    return PyCapsule_New(it.release(), name, [](PyObject* capsule) {
        delete static_cast<T*>(PyCapsule_GetPointer(capsule, PyCapsule_GetName(capsule)));
    });
}

constexpr const char* LAYER = "farshore.dense.layer";
constexpr const char* HEAD = "farshore.dense.head";

Linear linear(Arguments& a) {
    Linear l;
    l.weight = a.pointer<const void>();
    l.bias = a.pointer<const void>();
    l.out = a.small();
    l.in = a.small();
    l.packed = a.pointer<const uint8_t>();
    l.storage = static_cast<Storage>(a.small());
    return l;
}

PyObject* make_layer(PyObject*, PyObject* const* args, Py_ssize_t count) {
    return guarded([&]() -> PyObject* {
        Arguments a{args, args + count};
        auto d = std::make_unique<DecoderLayer>();
        d->format = static_cast<Format>(a.small());
        d->threads = a.small();
        d->eps = a.real();
        d->head_dim = a.small();
        d->positions = a.integer();
        d->cos = a.pointer<const void>();
        d->sin = a.pointer<const void>();
        d->attention_norm = a.pointer<const void>();
        d->mlp_norm = a.pointer<const void>();
        for (Linear* l : {&d->q, &d->k, &d->v, &d->o, &d->gate, &d->up, &d->down}) *l = linear(a);
        return hold(std::move(d), LAYER);
    });
}

PyObject* make_head(PyObject*, PyObject* const* args, Py_ssize_t count) {
    return guarded([&]() -> PyObject* {
        Arguments a{args, args + count};
        auto head = std::make_unique<LmHead>();
        head->format = static_cast<Format>(a.small());
        head->threads = a.small();
        head->eps = a.real();
        head->norm = a.pointer<const void>();
        head->vocabulary = linear(a);
        return hold(std::move(head), HEAD);
    });
}

// What every slice takes: (layer, rows, pointers...).
struct Call {
    const DecoderLayer& layer;
    Arguments rest;
    int rows;
};

template <class Run>
PyObject* on_layer(PyObject* const* args, Py_ssize_t count, Run&& run) {
    return guarded([&]() -> PyObject* {
        if (count < 1) throw std::runtime_error("too few arguments");
        Call call{held<DecoderLayer>(args[0], LAYER), {args + 1, args + count}, 0};
        call.rows = call.rest.small();
        if (!run(call)) return nullptr;
        Py_RETURN_NONE;
    });
}

// The rotation table's rows for these positions exist, or an IndexError says which does not.
bool inside(const DecoderLayer& layer, const int64_t* positions, int rows) {
    for (int r = 0; r < rows; r++)
        if (positions[r] < 0 || positions[r] >= layer.positions) {
            PyErr_Format(PyExc_IndexError, "position %lld of %lld", static_cast<long long>(positions[r]),
                         static_cast<long long>(layer.positions));
            return false;
        }
    return true;
}

PyObject* run_input(PyObject*, PyObject* const* args, Py_ssize_t count) {
    return on_layer(args, count, [](Call& call) {
        const void* h = call.rest.pointer<const void>();
        void* out = call.rest.pointer<void>();
        WithoutGil released;
        kernels().dense.input(call.layer, h, call.rows, out);
        return true;
    });
}

PyObject* run_query(PyObject*, PyObject* const* args, Py_ssize_t count) {
    return on_layer(args, count, [](Call& call) {
        const void* x = call.rest.pointer<const void>();
        const int64_t* positions = call.rest.pointer<const int64_t>();
        void* q = call.rest.pointer<void>();
        if (!inside(call.layer, positions, call.rows)) return false;
        WithoutGil released;
        kernels().dense.query(call.layer, x, call.rows, positions, q);
        return true;
    });
}

PyObject* run_key_value(PyObject*, PyObject* const* args, Py_ssize_t count) {
    return on_layer(args, count, [](Call& call) {
        const void* x = call.rest.pointer<const void>();
        const int64_t* positions = call.rest.pointer<const int64_t>();
        void* k = call.rest.pointer<void>();
        void* v = call.rest.pointer<void>();
        if (!inside(call.layer, positions, call.rows)) return false;
        WithoutGil released;
        kernels().dense.key_value(call.layer, x, call.rows, positions, k, v);
        return true;
    });
}

PyObject* run_project(PyObject*, PyObject* const* args, Py_ssize_t count) {
    return on_layer(args, count, [](Call& call) {
        const void* h = call.rest.pointer<const void>();
        const int64_t* positions = call.rest.pointer<const int64_t>();
        void* q = call.rest.pointer<void>();
        void* k = call.rest.pointer<void>();
        void* v = call.rest.pointer<void>();
        if (!inside(call.layer, positions, call.rows)) return false;
        WithoutGil released;
        kernels().dense.project(call.layer, h, call.rows, positions, q, k, v);
        return true;
    });
}

PyObject* run_finish(PyObject*, PyObject* const* args, Py_ssize_t count) {
    return on_layer(args, count, [](Call& call) {
        const void* h = call.rest.pointer<const void>();
        const void* o = call.rest.pointer<const void>();
        void* out = call.rest.pointer<void>();
        WithoutGil released;
        kernels().dense.finish(call.layer, h, o, call.rows, out);
        return true;
    });
}

PyObject* run_logits(PyObject*, PyObject* const* args, Py_ssize_t count) {
    return guarded([&]() -> PyObject* {
        if (count < 1) throw std::runtime_error("too few arguments");
        const LmHead& head = held<LmHead>(args[0], HEAD);
        Arguments a{args + 1, args + count};
        const int rows = a.small();
        const void* h = a.pointer<const void>();
        float* out = a.pointer<float>();
        {
            WithoutGil released;
            kernels().dense.logits(head, h, rows, out);
        }
        Py_RETURN_NONE;
    });
}

PyObject* run_wait_awake(PyObject*, PyObject* const* args, Py_ssize_t count) {
    return guarded([&]() -> PyObject* {
        Arguments a{args, args + count};
        wait_awake(a.small());
        Py_RETURN_NONE;
    });
}

// Rows of a table by number: an embedding.
PyObject* gather(PyObject*, PyObject* const* args, Py_ssize_t count) {
    return guarded([&]() -> PyObject* {
        Arguments a{args, args + count};
        const uint8_t* table = a.pointer<const uint8_t>();
        const int64_t table_rows = a.integer(), row_bytes = a.integer();
        const int64_t* ids = a.pointer<const int64_t>();
        const int rows = a.small();
        uint8_t* out = a.pointer<uint8_t>();
        for (int r = 0; r < rows; r++) {
            if (ids[r] < 0 || ids[r] >= table_rows)
                return PyErr_Format(PyExc_IndexError, "token id %lld of %lld", static_cast<long long>(ids[r]),
                                    static_cast<long long>(table_rows));
            std::memcpy(out + r * row_bytes, table + ids[r] * row_bytes, row_bytes);
        }
        Py_RETURN_NONE;
    });
}

PyObject* unpack(PyObject*, PyObject* const* args, Py_ssize_t count) {
    return guarded([&]() -> PyObject* {
        Arguments a{args, args + count};
        const Storage storage = static_cast<Storage>(a.small());
        const uint8_t* from = a.pointer<const uint8_t>();
        const int64_t rows = a.integer(), blocks = a.integer();
        const Format format = static_cast<Format>(a.small());
        void* to = a.pointer<void>();
        const int threads = a.small();
        {
            WithoutGil released;
            unpack_blocks(storage, from, rows, blocks, format, to, threads);
        }
        Py_RETURN_NONE;
    });
}

PyObject* pack(PyObject*, PyObject* const* args, Py_ssize_t count) {
    return guarded([&]() -> PyObject* {
        Arguments a{args, args + count};
        const Storage storage = static_cast<Storage>(a.small());
        const uint8_t* from = a.pointer<const uint8_t>();
        const int64_t rows = a.integer(), blocks = a.integer();
        uint8_t* to = a.pointer<uint8_t>();
        const int threads = a.small();
        {
            WithoutGil released;
            pack_blocks(storage, from, rows, blocks, to, threads);
        }
        Py_RETURN_NONE;
    });
}

}  // namespace

PyMethodDef farshore::dense_methods[] = {
    method("dense_layer", make_layer, "A decoder layer's weights; returns a capsule."),
    method("dense_head", make_head, "The last norm and the vocabulary; returns a capsule."),
    method("dense_input", run_input, "dense_input(layer, rows, h, out)"),
    method("dense_query", run_query, "dense_query(layer, rows, normed, positions, q)"),
    method("dense_key_value", run_key_value, "dense_key_value(layer, rows, normed, positions, k, v)"),
    method("dense_project", run_project, "dense_project(layer, rows, h, positions, q, k, v)"),
    method("dense_finish", run_finish, "dense_finish(layer, rows, h, o, out)"),
    method("dense_logits", run_logits, "dense_logits(head, rows, h, out)"),
    method("wait_awake", run_wait_awake, "wait_awake(microseconds): how long threads wait before they sleep."),
    method("dense_gather", gather, "dense_gather(table, table_rows, row_bytes, ids, rows, out)"),
    method("dense_unpack", unpack, "dense_unpack(storage, from, rows, blocks, format, to, threads)"),
    method("dense_pack", pack, "dense_pack(storage, from, rows, blocks, to, threads)"),
    {nullptr, nullptr, 0, nullptr},
};

// The Python module farshore.attention_offload._native: both ends of a connection for hot frames. Pointers and
// sizes come as integers from attention_offload/frames.py and shard.py, which keep the memory alive.

#define PY_SSIZE_T_CLEAN
#include <Python.h>

#include <sys/syscall.h>
#include <unistd.h>

#include <algorithm>
#include <atomic>
#include <cstdarg>
#include <cstring>

#include "../../kernels/cpu/native/api.h"
#include "bulk.h"
#include "wire.h"

using namespace farshore;
using namespace farshore::wire;

namespace {

constexpr const char* WIRE_CAPSULE = "farshore.wire";

template <class Call>
PyObject* guarded(Call&& call) {
    try {
        return call();
    } catch (const Late& error) {
        PyErr_SetString(PyExc_TimeoutError, error.what());
    } catch (const Broken& error) {
        PyErr_SetString(PyExc_ConnectionError, error.what());
    } catch (const Refused& error) {
        PyErr_SetString(PyExc_ValueError, error.what());
    } catch (const std::exception& error) {
        if (!PyErr_Occurred()) PyErr_SetString(PyExc_RuntimeError, error.what());
    }
    return nullptr;
}

// Of a Python call that failed; the exception is set already.
struct Raised : std::exception {};

void parse(PyObject* args, const char* format, ...) {
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

Wire& wire_of(PyObject* capsule) {
    void* it = PyCapsule_GetPointer(capsule, WIRE_CAPSULE);
    if (!it) throw Raised();
    return *static_cast<Wire*>(it);
}

PyObject* capsule_of(std::unique_ptr<Wire> wire) {
    return PyCapsule_New(wire.release(), WIRE_CAPSULE, [](PyObject* capsule) {
        delete static_cast<Wire*>(PyCapsule_GetPointer(capsule, WIRE_CAPSULE));
    });
}

PyObject* make_stream(PyObject*, PyObject* args) {
    return guarded([&] {
        int fd, near, awake_us;
        double frame_s;
        parse(args, "idpi", &fd, &frame_s, &near, &awake_us);
        return capsule_of(std::make_unique<Stream>(fd, frame_s, near, std::chrono::microseconds(awake_us)));
    });
}

PyObject* make_shared_memory(PyObject*, PyObject* args) {
    return guarded([&] {
        int fd, awake_us;
        double frame_s;
        parse(args, "idi", &fd, &frame_s, &awake_us);
        return capsule_of(shared_memory(fd, frame_s, std::chrono::microseconds(awake_us)));
    });
}

// -- the engine's end --------------------------------------------------------------------------------------

PyObject* begin(PyObject*, PyObject* args) {
    return guarded([&]() -> PyObject* {
        PyObject* capsule;
        unsigned step, max_layer_bytes;
        Py_buffer message;
        parse(args, "OIy*I", &capsule, &step, &message, &max_layer_bytes);
        const std::unique_ptr<Py_buffer, void (*)(Py_buffer*)> owned(&message, PyBuffer_Release);
        if (message.len > MAX_CONTROL_BYTES) throw Refused("a step of more than 16 MiB of reads");
        Wire& wire = wire_of(capsule);
        {
            WithoutGil released;
            wire.begin({step, 0, 0, BEGIN, static_cast<uint32_t>(message.len)}, message.buf, max_layer_bytes);
        }
        Py_RETURN_NONE;
    });
}

// `rows` rows of `row_bytes`, `stride_bytes` from one to the next.
struct Rows {
    uint8_t* data;
    Py_ssize_t row_bytes, stride_bytes;
};

PyObject* send(PyObject*, PyObject* args) {
    return guarded([&]() -> PyObject* {
        PyObject* capsule;
        unsigned step, layer, micro_batch;
        unsigned long long address;
        Py_ssize_t rows;
        Rows q;
        parse(args, "OIIInKnn", &capsule, &step, &layer, &micro_batch, &rows, &address, &q.row_bytes,
              &q.stride_bytes);
        q.data = reinterpret_cast<uint8_t*>(address);
        Wire& wire = wire_of(capsule);
        const auto bytes = static_cast<uint32_t>(rows * q.row_bytes);
        {
            WithoutGil released;
            uint8_t* out = wire.reserve(bytes);
            for (Py_ssize_t row = 0; row < rows; row++)
                std::memcpy(out + row * q.row_bytes, q.data + row * q.stride_bytes, q.row_bytes);
            try {
                wire.publish({step, static_cast<uint16_t>(layer), static_cast<uint8_t>(micro_batch), LAYER, bytes});
            } catch (const HungUp&) {
                // Why is in a failure that may have come before; who waits for the answer reads it.
            }
        }
        Py_RETURN_NONE;
    });
}

void check_answer(const Header& got, const Header& due) {
    if (std::memcmp(&got, &due, sizeof got) == 0) return;
    throw Broken("reordered or garbage: an answer to step " + std::to_string(got.step) + ", layer " +
                 std::to_string(got.layer) + ", micro-batch " + std::to_string(got.micro_batch) + " of " +
                 std::to_string(got.bytes) + " bytes; due is step " + std::to_string(due.step) + ", layer " +
                 std::to_string(due.layer) + ", micro-batch " + std::to_string(due.micro_batch) + ", " +
                 std::to_string(due.bytes) + " bytes");
}

PyObject* wait(PyObject*, PyObject* args) {
    return guarded([&]() -> PyObject* {
        PyObject* capsule;
        unsigned step, layer, micro_batch;
        unsigned long long lse_address, o_address;
        Py_ssize_t rows;
        Rows lse, o;
        double deadline_s;
        parse(args, "OIIInKnnKnnd", &capsule, &step, &layer, &micro_batch, &rows, &lse_address, &lse.row_bytes,
              &lse.stride_bytes, &o_address, &o.row_bytes, &o.stride_bytes, &deadline_s);
        lse.data = reinterpret_cast<uint8_t*>(lse_address);
        o.data = reinterpret_cast<uint8_t*>(o_address);
        Wire& wire = wire_of(capsule);
        Frame frame;
        {
            WithoutGil released;
            frame = wire.receive(after(deadline_s));
            if (frame.header.kind != FAILURE) {
                const auto bytes = static_cast<uint32_t>(rows * (lse.row_bytes + o.row_bytes));
                check_answer(frame.header, {step, static_cast<uint16_t>(layer),
                                            static_cast<uint8_t>(micro_batch), LAYER, bytes});
                const uint8_t* from = frame.payload;
                for (const Rows& part : {lse, o})
                    for (Py_ssize_t row = 0; row < rows; row++, from += part.row_bytes)
                        std::memcpy(part.data + row * part.stride_bytes, from, part.row_bytes);
            }
        }
        if (frame.header.kind == FAILURE)
            return PyBytes_FromStringAndSize(reinterpret_cast<const char*>(frame.payload), frame.header.bytes);
        Py_RETURN_NONE;
    });
}

// -- the shard's end ---------------------------------------------------------------------------------------

// One layer frame of the step under way, by its layer class and micro-batch.
struct Work {
    void* plan;
    uint32_t q_bytes, lse_bytes, o_bytes;
    long long read_bytes;
};

struct Layer {
    unsigned layer_class, stored_layer;
};

struct Step {
    long long number = -1;  // none
    int format = 0;
    std::vector<Layer> layers;
    std::vector<std::vector<Work>> work;  // [layer class][micro-batch]
    int64_t* attended_bytes = nullptr;

    uint32_t max_layer_bytes() const {
        uint32_t most = 0;
        for (const auto& batches : work)
            for (const Work& it : batches) most = std::max({most, it.q_bytes, it.lse_bytes + it.o_bytes});
        return most;
    }
};

Work work_of(PyObject* description) {
    Work it;
    PyObject* capsule;
    parse(description, "OIIIL", &capsule, &it.q_bytes, &it.lse_bytes, &it.o_bytes, &it.read_bytes);
    it.plan = PyCapsule_GetPointer(capsule, PLAN_CAPSULE);
    if (!it.plan) throw Raised();
    return it;
}

Step step_of(PyObject* description) {
    Step step;
    if (description == Py_None) return step;
    PyObject *layers, *classes;
    unsigned long long counter;
    parse(description, "LiO!O!K", &step.number, &step.format, &PyTuple_Type, &layers, &PyTuple_Type, &classes,
          &counter);
    step.attended_bytes = reinterpret_cast<int64_t*>(counter);
    for (Py_ssize_t i = 0; i < PyTuple_GET_SIZE(classes); i++) {
        PyObject* batches = PyTuple_GET_ITEM(classes, i);
        step.work.emplace_back();
        for (Py_ssize_t j = 0; j < PyTuple_Size(batches); j++)
            step.work.back().push_back(work_of(PyTuple_GET_ITEM(batches, j)));
    }
    for (Py_ssize_t i = 0; i < PyTuple_GET_SIZE(layers); i++) {
        Layer it;
        parse(PyTuple_GET_ITEM(layers, i), "II", &it.layer_class, &it.stored_layer);
        if (it.layer_class >= step.work.size()) throw std::out_of_range("a layer of no class");
        step.layers.push_back(it);
    }
    return step;
}

const Work& work_for(const Step& step, const Header& header) {
    if (step.number != header.step)
        throw Refused("frame of step " + std::to_string(header.step) + ", but step " +
                      (step.number < 0 ? "None" : std::to_string(step.number)) + " is under way");
    if (header.layer >= step.layers.size())
        throw Refused("layer " + std::to_string(header.layer) + " of a model of " +
                      std::to_string(step.layers.size()) + " layers");
    const auto& batches = step.work[step.layers[header.layer].layer_class];
    if (header.micro_batch >= batches.size())
        throw Refused("micro-batch " + std::to_string(header.micro_batch) + " of a step of " +
                      std::to_string(batches.size()));
    const Work& it = batches[header.micro_batch];
    if (header.bytes != it.q_bytes)
        throw Refused("q of " + std::to_string(header.bytes) + " bytes, expected " + std::to_string(it.q_bytes));
    return it;
}

// Answers layer frames until the next step begins, or the engine hangs up: then false.
bool answer(Wire& wire, const Step& step, const Api& api, Frame& frame) {
    wire.expect(step.max_layer_bytes());
    for (;;) {
        try {
            frame = wire.receive(NEVER);
        } catch (const HungUp&) {
            return false;
        }
        if (frame.header.kind == BEGIN) return true;
        if (frame.header.kind != LAYER) throw Broken("garbage: a shard was sent a failure");
        Header header = frame.header;
        const Work& it = work_for(step, header);
        header.bytes = it.lse_bytes + it.o_bytes;
        uint8_t* out = wire.reserve(header.bytes);
        api.partial(it.plan, static_cast<int>(step.layers[header.layer].stored_layer), frame.payload, step.format,
                    out + it.lse_bytes, reinterpret_cast<float*>(out));
        std::atomic_ref(*step.attended_bytes).fetch_add(it.read_bytes, std::memory_order_relaxed);
        wire.publish(header);
    }
}

const Api& kernels_api() {
    const auto* api = static_cast<const Api*>(PyCapsule_Import(API_CAPSULE, 0));
    if (!api) throw Raised();
    return *api;
}

PyObject* serve(PyObject*, PyObject* args) {
    return guarded([&]() -> PyObject* {
        PyObject *capsule, *description;
        parse(args, "OO", &capsule, &description);
        Wire& wire = wire_of(capsule);
        const Api& api = kernels_api();
        const Step step = step_of(description);
        Frame frame;
        bool more;
        {
            WithoutGil released;
            more = answer(wire, step, api, frame);
        }
        if (!more) Py_RETURN_NONE;
        return PyBytes_FromStringAndSize(reinterpret_cast<const char*>(frame.payload), frame.header.bytes);
    });
}

// Linux's struct sched_attr, as far as it is needed; see sched_setattr(2).
struct Turns {
    uint32_t bytes, policy;
    uint64_t flags;
    int32_t nice;
    uint32_t priority;
    uint64_t runtime_ns, deadline_ns, period_ns;
};
static_assert(sizeof(Turns) == 48);

// A slice shorter than the others' (3 ms) has a thread that wakes run at once (Linux 6.12 and later), rather than
// when an engine's thread that waits awake on its core has given up. What the kernel doesn't grant is not needed.
constexpr uint64_t TURN_NS = 100'000;
// An engine on this host needs the cores as soon as the answer is out.
constexpr int POOL_AWAKE_US = 5;

PyObject* share_cores(PyObject*, PyObject*) {
    return guarded([&]() -> PyObject* {
        Turns turns{};
        if (syscall(SYS_sched_getattr, 0, &turns, sizeof turns, 0) == 0) {
            turns.runtime_ns = TURN_NS;
            syscall(SYS_sched_setattr, 0, &turns, 0);
        }
        kernels_api().wait_awake(POOL_AWAKE_US);
        Py_RETURN_NONE;
    });
}

PyObject* fail(PyObject*, PyObject* args) {
    return guarded([&]() -> PyObject* {
        PyObject* capsule;
        Py_buffer message;
        parse(args, "Oy*", &capsule, &message);
        const std::unique_ptr<Py_buffer, void (*)(Py_buffer*)> owned(&message, PyBuffer_Release);
        Wire& wire = wire_of(capsule);
        {
            WithoutGil released;
            wire.fail(message.buf, static_cast<uint32_t>(std::min<Py_ssize_t>(message.len, MAX_CONTROL_BYTES)));
        }
        Py_RETURN_NONE;
    });
}

PyObject* shut_down(PyObject*, PyObject* args) {
    return guarded([&]() -> PyObject* {
        PyObject* capsule;
        parse(args, "O", &capsule);
        wire_of(capsule).shut_down();
        Py_RETURN_NONE;
    });
}

// -- bulk KV, both ends ------------------------------------------------------------------------------------

std::vector<iovec> pieces_of(PyObject* list) {
    if (!PyList_Check(list) || PyList_GET_SIZE(list) % 2) throw std::invalid_argument("not a list of pairs");
    std::vector<iovec> pieces;
    for (Py_ssize_t i = 0; i < PyList_GET_SIZE(list); i += 2) {
        void* address = PyLong_AsVoidPtr(PyList_GET_ITEM(list, i));
        const size_t bytes = PyLong_AsSize_t(PyList_GET_ITEM(list, i + 1));
        if (PyErr_Occurred()) throw Raised();
        pieces.push_back({address, bytes});
    }
    return pieces;
}

template <void (*MOVE)(int, std::vector<iovec>, Deadline)>
PyObject* move_pieces(PyObject*, PyObject* args) {
    return guarded([&]() -> PyObject* {
        int fd;
        PyObject* list;
        double deadline_s;
        parse(args, "iOd", &fd, &list, &deadline_s);
        std::vector<iovec> pieces = pieces_of(list);
        {
            WithoutGil released;
            MOVE(fd, std::move(pieces), deadline_s < 0 ? NEVER : after(deadline_s));
        }
        Py_RETURN_NONE;
    });
}

PyMethodDef methods[] = {
    {"stream", make_stream, METH_VARARGS,
     "stream(fd, frame_s, near, awake_us): frames on a socket, which it owns from now on. near: the other end is on"
     " this host. It waits for a frame awake for so long, where they come that soon."},
    {"shared_memory", make_shared_memory, METH_VARARGS,
     "shared_memory(fd, frame_s, awake_us): as `stream`, layer frames in shared memory; Unix sockets."},
    {"begin", begin, METH_VARARGS, "begin(wire, step, message, max_layer_bytes)"},
    {"send", send, METH_VARARGS, "send(wire, step, layer, micro_batch, rows, q, row_bytes, stride_bytes)"},
    {"wait", wait, METH_VARARGS,
     "wait(wire, step, layer, micro_batch, rows, lse, row_bytes, stride_bytes, o, row_bytes, stride_bytes, s);"
     " returns None, or a message Failure"},
    {"serve", serve, METH_VARARGS,
     "serve(wire, step): answers its layer frames. step: None, or (number, format, layers, work, counter) with layers"
     " (class, stored layer) and work[class][micro-batch] (plan, bytes of q, lse, o, and attended to). Returns the"
     " next step's message, or None when the engine has hung up"},
    {"share_cores", share_cores, METH_NOARGS,
     "share_cores(): this thread, and those it starts, run at once when they wake, and give their core up as soon as"
     " they have nothing to do. For the process of an attention worker, which an engine may be beside."},
    {"fail", fail, METH_VARARGS, "fail(wire, message): the shard's last frame; ends the connection."},
    {"shut_down", shut_down, METH_VARARGS, "From any thread: whoever waits finds the connection closed."},
    {"send_pieces", move_pieces<send_pieces>, METH_VARARGS,
     "send_pieces(fd, [address, bytes, ...], s): all of them, in order; s < 0: without a deadline."},
    {"receive_pieces", move_pieces<receive_pieces>, METH_VARARGS, "receive_pieces(fd, [address, bytes, ...], s)"},
    {nullptr, nullptr, 0, nullptr},
};

PyModuleDef module{PyModuleDef_HEAD_INIT, "_native", "Connections for hot frames.", -1, methods, nullptr, nullptr,
                   nullptr, nullptr};

}  // namespace

PyMODINIT_FUNC PyInit__native() {
    PyObject* it = PyModule_Create(&module);
    if (it && PyModule_AddIntConstant(it, "MAX_UNDER_WAY", MAX_UNDER_WAY) < 0) {
        Py_DECREF(it);
        return nullptr;
    }
    return it;
}

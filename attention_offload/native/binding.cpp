// The Python module farshore.attention_offload._native: both ends of a connection for hot frames. Pointers and
// sizes come as integers from attention_offload/frame_stream.py and shard.py, which keep the memory alive.

#include "wire/bulk.h"
#include "calls.h"

using namespace farshore;
using namespace farshore::wire;

namespace {

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

template <void (*MOVE)(int, std::vector<iovec>, double)>
PyObject* move_pieces(PyObject*, PyObject* args) {
    return guarded([&]() -> PyObject* {
        int fd;
        PyObject* list;
        double idle_s;
        parse(args, "iOd", &fd, &list, &idle_s);
        std::vector<iovec> pieces = pieces_of(list);
        {
            WithoutGil released;
            MOVE(fd, std::move(pieces), idle_s);
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
    {"begin", begin, METH_VARARGS,
     "begin(wire, step, message, max_layer_bytes, frame_s): frame_s bounds each send from now on, and the rest of a"
     " frame that has begun."},
    {"again", again, METH_VARARGS, "again(wire, step, frame_s): a step that reads what the one begun last does."},
    {"send", send, METH_VARARGS, "send(wire, step, layer, micro_batch, rows, q, row_bytes, stride_bytes)"},
    {"wait", wait, METH_VARARGS,
     "wait(wire, step, layer, micro_batch, rows, lse, row_bytes, stride_bytes, o, row_bytes, stride_bytes, s);"
     " returns None, or a message Failure"},
    {"under_way", under_way, METH_VARARGS, "under_way(wire): layer frames that were sent and not answered"},
    {"is_open", is_open, METH_VARARGS,
     "is_open(wire): whether the other end has not closed the connection. From any thread."},
    {"drain", drain, METH_VARARGS,
     "drain(wire, s): reads the answers that are owed, and forgets them."},
    {"exchange", make_exchange, METH_VARARGS,
     "exchange(lanes, awake_us): one micro-batch's frames to several shards. lanes: a tuple of (wire, rows, q offset,"
     " row_bytes, stride_bytes, lse, row_bytes, stride_bytes, o, row_bytes, stride_bytes), lse and o of all rows"},
    {"send_all", send_all, METH_VARARGS,
     "send_all(exchange, step, layer, micro_batch, q): returns None, or what lanes failed with, while all others were"
     " sent it: [(lane, type of an exception, its text), or (lane, None, a message Failure), ...]"},
    {"wait_all", wait_all, METH_VARARGS,
     "wait_all(exchange, step, layer, micro_batch, (s, ...), passed_s): until each lane has answered, or its deadline,"
     " of which passed_s are over; returns as `send_all` does, when all others have answered"},
    {"times", times, METH_VARARGS,
     "times(exchange): since it was asked last, (seconds waited, [(answers, [seconds from sending to one that was seen"
     " coming, ...]), ...])"},
    {"give_way", give_way, METH_NOARGS,
     "give_way(): the kernels' threads, not this one, leave their cores to others that wake there. For an engine that"
     " shares its cores with an attention worker."},
    {"serve", serve, METH_VARARGS,
     "serve(wire, step, shares_cores): answers its layer frames. step: None, or (number, format, layers, work, counter,"
     " removals, seen removals, repeats) with layers (class, stored layer), work[class][micro-batch] (plan, bytes of q,"
     " lse, o, and attended to), and whether the step may be repeated. Returns what is to be looked up before it goes"
     " on: a step's message; the number of one that repeats the last; (number,): the step under way, once more, since"
     " removals has changed; None when the engine has hung up"},
    {"share_cores", share_cores, METH_NOARGS,
     "share_cores(): this thread, and those it starts, run at once when they wake, and give their core up as soon as"
     " they have nothing to do. For the process of an attention worker, which an engine may be beside."},
    {"fail", fail, METH_VARARGS, "fail(wire, message): the shard's last frame; ends the connection."},
    {"shut_down", shut_down, METH_VARARGS, "From any thread: whoever waits finds the connection closed."},
    {"send_pieces", move_pieces<send_pieces>, METH_VARARGS,
     "send_pieces(fd, [address, bytes, ...], s): all of them, in order; TimeoutError when no byte has moved for s"
     " seconds, unless s < 0."},
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

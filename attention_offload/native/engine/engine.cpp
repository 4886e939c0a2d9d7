// The engine's end, as Python calls it: steps and layer frames out, answers in.

#include <memory>
#include <numeric>
#include <utility>

#include "calls.h"
#include "fanout/fanout.h"

namespace farshore::wire {
namespace {

constexpr const char* EXCHANGE_CAPSULE = "farshore.exchange";

Header layer_header(unsigned step, unsigned layer, unsigned micro_batch) {
    return {step, static_cast<uint16_t>(layer), static_cast<uint8_t>(micro_batch), LAYER, 0};
}

// Until the next call on the connection; None: there is none.
PyObject* message_of(const std::optional<Frame>& failure) {
    if (!failure) Py_RETURN_NONE;
    return PyBytes_FromStringAndSize(reinterpret_cast<const char*>(failure->payload), failure->header.bytes);
}

std::vector<uint32_t> all_rows(Py_ssize_t count) {
    std::vector<uint32_t> rows(count);
    std::iota(rows.begin(), rows.end(), 0);
    return rows;
}

// An exchange, and the connections that it uses.
struct Held {
    ~Held() {
        for (PyObject* wire : wires) Py_DECREF(wire);
    }
    std::vector<PyObject*> wires;
    std::optional<Exchange> exchange;
};

Exchange& exchange_of(PyObject* capsule) {
    void* it = PyCapsule_GetPointer(capsule, EXCHANGE_CAPSULE);
    if (!it) throw Raised();
    return *static_cast<Held*>(it)->exchange;
}

Lane lane_of(PyObject* description, Held& held) {
    PyObject *wire, *rows;
    unsigned long long lse, o;
    Lane it{};
    parse(description, "OO!nnnKnnKnn", &wire, &PyTuple_Type, &rows, &it.q_offset, &it.q_row_bytes, &it.q_stride_bytes,
          &lse, &it.lse.row_bytes, &it.lse.stride_bytes, &o, &it.o.row_bytes, &it.o.stride_bytes);
    it.wire = &wire_of(wire);
    it.lse.data = reinterpret_cast<uint8_t*>(lse);
    it.o.data = reinterpret_cast<uint8_t*>(o);
    for (Py_ssize_t i = 0; i < PyTuple_GET_SIZE(rows); i++) {
        it.rows.push_back(static_cast<uint32_t>(PyLong_AsUnsignedLong(PyTuple_GET_ITEM(rows, i))));
        if (PyErr_Occurred()) throw Raised();
    }
    Py_INCREF(wire);
    held.wires.push_back(wire);
    return it;
}

// (lane, type of the exception, its text), or (lane, None, the shard's Failure).
PyObject* tuple_of(const Failed& failed) {
    const auto lane = static_cast<Py_ssize_t>(failed.lane);
    if (!failed.error) return Py_BuildValue("nON", lane, Py_None, message_of(failed.refusal));
    try {
        std::rethrow_exception(failed.error);
    } catch (const std::exception& error) {
        return Py_BuildValue("nOs", lane, type_of(error), error.what());
    }
}

// None where no lane failed.
PyObject* list_of(const std::vector<Failed>& failed) {
    if (failed.empty()) Py_RETURN_NONE;
    PyObject* list = PyList_New(0);
    if (!list) throw Raised();
    for (const Failed& it : failed) {
        PyObject* tuple = tuple_of(it);
        const bool added = tuple && PyList_Append(list, tuple) == 0;
        Py_XDECREF(tuple);
        if (!added) {
            Py_DECREF(list);
            throw Raised();
        }
    }
    return list;
}

}  // namespace

PyObject* begin(PyObject*, PyObject* args) {
    return guarded([&]() -> PyObject* {
        PyObject* capsule;
        unsigned step, max_layer_bytes;
        Py_buffer message;
        double frame_s;
        parse(args, "OIy*Id", &capsule, &step, &message, &max_layer_bytes, &frame_s);
        const std::unique_ptr<Py_buffer, void (*)(Py_buffer*)> owned(&message, PyBuffer_Release);
        if (message.len > MAX_CONTROL_BYTES) throw Refused("a step of more than 16 MiB of reads");
        Wire& wire = wire_of(capsule);
        wire.allow(frame_s);
        {
            WithoutGil released;
            wire.begin({step, 0, 0, BEGIN, static_cast<uint32_t>(message.len)}, message.buf, max_layer_bytes);
        }
        Py_RETURN_NONE;
    });
}

PyObject* again(PyObject*, PyObject* args) {
    return guarded([&]() -> PyObject* {
        PyObject* capsule;
        unsigned step;
        double frame_s;
        parse(args, "OId", &capsule, &step, &frame_s);
        Wire& wire = wire_of(capsule);
        wire.allow(frame_s);
        {
            WithoutGil released;
            wire.again(step);
        }
        Py_RETURN_NONE;
    });
}

PyObject* under_way(PyObject*, PyObject* args) {
    return guarded([&]() -> PyObject* {
        PyObject* capsule;
        parse(args, "O", &capsule);
        return PyLong_FromUnsignedLong(wire_of(capsule).under_way);
    });
}

PyObject* is_open(PyObject*, PyObject* args) {
    return guarded([&]() -> PyObject* {
        PyObject* capsule;
        parse(args, "O", &capsule);
        return PyBool_FromLong(wire_of(capsule).is_open());
    });
}

PyObject* drain(PyObject*, PyObject* args) {
    return guarded([&]() -> PyObject* {
        PyObject* capsule;
        double deadline_s;
        parse(args, "Od", &capsule, &deadline_s);
        Wire& wire = wire_of(capsule);
        {
            WithoutGil released;
            drain(wire, after(deadline_s));
        }
        Py_RETURN_NONE;
    });
}

PyObject* send(PyObject*, PyObject* args) {
    return guarded([&]() -> PyObject* {
        PyObject* capsule;
        unsigned step, layer, micro_batch;
        Py_ssize_t rows;
        unsigned long long q;
        Lane lane{};
        parse(args, "OIIInKnn", &capsule, &step, &layer, &micro_batch, &rows, &q, &lane.q_row_bytes,
              &lane.q_stride_bytes);
        lane.wire = &wire_of(capsule);
        lane.rows = all_rows(rows);
        {
            WithoutGil released;
            send_frame(lane, layer_header(step, layer, micro_batch), reinterpret_cast<const uint8_t*>(q));
        }
        Py_RETURN_NONE;
    });
}

PyObject* wait(PyObject*, PyObject* args) {
    return guarded([&]() -> PyObject* {
        PyObject* capsule;
        unsigned step, layer, micro_batch;
        Py_ssize_t rows;
        unsigned long long lse, o;
        Lane lane{};
        double deadline_s;
        parse(args, "OIIInKnnKnnd", &capsule, &step, &layer, &micro_batch, &rows, &lse, &lane.lse.row_bytes,
              &lane.lse.stride_bytes, &o, &lane.o.row_bytes, &lane.o.stride_bytes, &deadline_s);
        lane.wire = &wire_of(capsule);
        lane.rows = all_rows(rows);
        lane.lse.data = reinterpret_cast<uint8_t*>(lse);
        lane.o.data = reinterpret_cast<uint8_t*>(o);
        std::optional<Frame> failure;
        {
            WithoutGil released;
            const Frame answer = lane.wire->receive(after(deadline_s));
            if (!take_answer(lane, layer_header(step, layer, micro_batch), answer)) failure = answer;
        }
        return message_of(failure);
    });
}

PyObject* make_exchange(PyObject*, PyObject* args) {
    return guarded([&]() -> PyObject* {
        PyObject* descriptions;
        int awake_us;
        parse(args, "O!i", &PyTuple_Type, &descriptions, &awake_us);
        auto held = std::make_unique<Held>();
        std::vector<Lane> lanes;
        for (Py_ssize_t i = 0; i < PyTuple_GET_SIZE(descriptions); i++)
            lanes.push_back(lane_of(PyTuple_GET_ITEM(descriptions, i), *held));
        held->exchange.emplace(std::move(lanes), std::chrono::microseconds(awake_us));
        return PyCapsule_New(held.release(), EXCHANGE_CAPSULE, [](PyObject* capsule) {
            delete static_cast<Held*>(PyCapsule_GetPointer(capsule, EXCHANGE_CAPSULE));
        });
    });
}

PyObject* send_all(PyObject*, PyObject* args) {
    return guarded([&]() -> PyObject* {
        PyObject* capsule;
        unsigned step, layer, micro_batch;
        unsigned long long q;
        parse(args, "OIIIK", &capsule, &step, &layer, &micro_batch, &q);
        Exchange& exchange = exchange_of(capsule);
        std::vector<Failed> failed;
        {
            WithoutGil released;
            failed = exchange.send(layer_header(step, layer, micro_batch), reinterpret_cast<const uint8_t*>(q));
        }
        return list_of(failed);
    });
}

PyObject* wait_all(PyObject*, PyObject* args) {
    return guarded([&]() -> PyObject* {
        PyObject *capsule, *deadlines_s;
        unsigned step, layer, micro_batch;
        double passed_s;
        parse(args, "OIIIO!d", &capsule, &step, &layer, &micro_batch, &PyTuple_Type, &deadlines_s, &passed_s);
        Exchange& exchange = exchange_of(capsule);
        if (PyTuple_GET_SIZE(deadlines_s) != static_cast<Py_ssize_t>(exchange.lanes.size()))
            throw std::invalid_argument("a deadline for each lane");
        std::vector<Deadline> until;
        for (Py_ssize_t i = 0; i < PyTuple_GET_SIZE(deadlines_s); i++) {
            until.push_back(after(PyFloat_AsDouble(PyTuple_GET_ITEM(deadlines_s, i)) - passed_s));
            if (PyErr_Occurred()) throw Raised();
        }
        std::vector<Failed> failed;
        {
            WithoutGil released;
            failed = exchange.wait(layer_header(step, layer, micro_batch), until);
        }
        return list_of(failed);
    });
}

PyObject* give_way(PyObject*, PyObject*) {
    return guarded([&]() -> PyObject* {
        kernels_api().give_way();
        Py_RETURN_NONE;
    });
}

PyObject* times(PyObject*, PyObject* args) {
    return guarded([&]() -> PyObject* {
        PyObject* capsule;
        parse(args, "O", &capsule);
        Exchange& exchange = exchange_of(capsule);
        PyObject* lanes = PyList_New(0);
        for (Lane& lane : exchange.lanes) {
            PyObject* taken = PyList_New(0);
            for (const double seconds : std::exchange(lane.taken_s, {})) {
                PyObject* it = PyFloat_FromDouble(seconds);
                PyList_Append(taken, it);
                Py_DECREF(it);
            }
            PyObject* of_lane = Py_BuildValue("IN", std::exchange(lane.answers, 0), taken);
            PyList_Append(lanes, of_lane);
            Py_DECREF(of_lane);
        }
        return Py_BuildValue("dN", std::exchange(exchange.waited_s, 0), lanes);
    });
}

}  // namespace farshore::wire

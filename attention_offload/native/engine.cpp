// The engine's end, as Python calls it: steps and layer frames out, answers in.

#include <cstring>
#include <memory>

#include "calls.h"

namespace farshore::wire {
namespace {

// `rows` rows of `row_bytes`, `stride_bytes` from one to the next.
struct Rows {
    uint8_t* data;
    Py_ssize_t row_bytes, stride_bytes;
};

void check_answer(const Header& got, const Header& due) {
    if (std::memcmp(&got, &due, sizeof got) == 0) return;
    throw Broken("reordered or garbage: an answer to step " + std::to_string(got.step) + ", layer " +
                 std::to_string(got.layer) + ", micro-batch " + std::to_string(got.micro_batch) + " of " +
                 std::to_string(got.bytes) + " bytes; due is step " + std::to_string(due.step) + ", layer " +
                 std::to_string(due.layer) + ", micro-batch " + std::to_string(due.micro_batch) + ", " +
                 std::to_string(due.bytes) + " bytes");
}

}  // namespace

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

PyObject* again(PyObject*, PyObject* args) {
    return guarded([&]() -> PyObject* {
        PyObject* capsule;
        unsigned step;
        parse(args, "OI", &capsule, &step);
        Wire& wire = wire_of(capsule);
        {
            WithoutGil released;
            wire.again(step);
        }
        Py_RETURN_NONE;
    });
}

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

}  // namespace farshore::wire

// The Python module farshore.attention_offload._native: both ends of hot connections, and bulk KV. Called by
// transport/native_stream.py, transport/bulk.py, fanout/native_fanout.py and shard/frame_loop.py, which keep the memory
// behind addresses alive. The functions themselves are in engine/ and shard/.

#include "calls.h"
#include "wire/bulk.h"

using namespace farshore;
using namespace farshore::wire;

namespace {

PyObject* make_stream(Arguments& arguments) {
    const int fd = arguments.count("fd");
    const double frame_s = arguments.real("frame_s");
    const bool near = arguments.boolean("near");
    const std::chrono::microseconds busy{arguments.count("busy_us")};
    arguments.end();
    return capsule_of<Connection>(std::make_unique<SocketConnection>(fd, frame_s, near, busy), CONNECTION_CAPSULE);
}

PyObject* make_shared_memory(Arguments& arguments) {
    const int fd = arguments.count("fd");
    const double frame_s = arguments.real("frame_s");
    const std::chrono::microseconds busy{arguments.count("busy_us")};
    arguments.end();
    return capsule_of(shared_memory_connection(fd, frame_s, busy), CONNECTION_CAPSULE);
}

void shut_down(Arguments& arguments) {
    Connection& connection = connection_of(arguments);
    arguments.end();
    connection.shut_down();
}

template <void (*MOVE)(int, std::vector<iovec>, double)>
void move_pieces(Arguments& arguments) {
    const int fd = arguments.count("fd");
    std::vector<iovec> pieces;
    {
        Arguments items = arguments.items("pieces");
        pieces.reserve(items.left() / 2);
        while (items.left()) {
            void* address = items.address_or_null<void>("address");
            pieces.push_back({address, static_cast<size_t>(items.integer<int64_t>("bytes", 0))});
        }
    }
    const double idle_s = arguments.real("idle_s");
    arguments.end();
    without_gil([&] { MOVE(fd, std::move(pieces), idle_s); });
}

template <MethodName NAME, auto FUNCTION>
PyMethodDef connection_method(const char* text) {
    return method<NAME, FUNCTION, connection_exception>(text);
}

PyMethodDef methods[] = {
    connection_method<"stream", make_stream>(
        "stream(fd, frame_s, near, busy_us)\n\nMakes a connection of a socket, which it takes over, and returns a"
        " capsule. frame_s: time limit of one send and of the rest of a frame that has begun. near: the other end is on"
        " this host. busy_us: for how long to wait busily for a frame, where frames come that soon."),
    connection_method<"shared_memory", make_shared_memory>(
        "shared_memory(fd, frame_s, busy_us)\n\nAs stream, for a Unix socket; layer frames go through shared memory."),
    connection_method<"begin", begin>(
        "begin(connection, step, message, max_layer_bytes, frame_s)\n\nAnnounces a step: a message Step, and the most"
        " bytes of its layer frames and answers. frame_s replaces the connection's."),
    connection_method<"repeat_step", repeat_step>(
        "repeat_step(connection, step, frame_s)\n\nAnnounces a step with the reads of the last one."),
    connection_method<"send", send>(
        "send(connection, step, layer, micro_batch, rows, q)\n\nSends a layer frame. q: (address, row_bytes,"
        " stride_bytes) of `rows` rows."),
    connection_method<"wait", wait>(
        "wait(connection, step, layer, micro_batch, rows, lse, o, deadline_s)\n\nWaits for the answer and writes it to"
        " lse and o, each as q of send. Returns None, or the shard's message Failure."),
    connection_method<"under_way", under_way>(
        "under_way(connection)\n\nThe number of layer frames that are sent and not answered."),
    connection_method<"is_open", is_open>(
        "is_open(connection)\n\nWhether the other end has not closed the connection. Thread-safe."),
    connection_method<"drain", drain>("drain(connection, deadline_s)\n\nReads and drops the answers that are owed."),
    connection_method<"native_fanout", make_fanout>(
        "native_fanout(requests, busy_us)\n\nPrepares layer frames of one micro-batch to several shards and returns a"
        " capsule. Each request is (connection, rows, q, lse, o): the rows of the micro-batch that it reads, q as"
        " (offset, row_bytes, stride_bytes) and lse, o as (address, row_bytes, stride_bytes), of all rows."),
    connection_method<"send_all", send_all>(
        "send_all(fanout, step, layer, micro_batch, q)\n\nSends the layer frame to all shards; q is an address. Returns"
        " None, or the requests that failed: [(index, exception type, text) or (index, None, message Failure), ...]."
        " All others were sent."),
    connection_method<"wait_all", wait_all>(
        "wait_all(fanout, step, layer, micro_batch, deadlines_s, passed_s)\n\nWaits for each shard's answer until its"
        " deadline, of which passed_s are over. Returns as send_all; all others have answered."),
    connection_method<"times", times>(
        "times(fanout)\n\nSince its last call: (seconds in wait_all, [(answers, [exact latency in s, ...]), ...])."),
    connection_method<"give_way", give_way>(
        "give_way()\n\nLowers the priority of the kernels' threads, not of this one: give_way in runtime/pool.h. For an"
        " engine that shares its cores with an attention worker."),
    connection_method<"serve", serve>(
        "serve(connection, step, shares_cores)\n\n"
        "Answers layer frames of a step. step: None, or (number, format, layers, frames, attended_bytes, removals,"
        " seen_removals, repeatable): layers ((layer class, stored layer), ...); frames[layer class][micro-batch]"
        " (plan, q_bytes, lse_bytes, o_bytes, read_bytes); addresses of the int64 counters attended_bytes and removals."
        " Returns what Python must look up: a new step's message; the number of a step that repeats the last; (number,)"
        " if spans of the current step were removed; None if the engine has hung up. Where a plan is None, it returns"
        " (number, layer, micro_batch) of each layer frame, which Python answers before the next call."),
    connection_method<"question", question>(
        "question(connection, q, q_bytes)\n\nCopies q of the layer frame that Python answers to an address."),
    connection_method<"answer", answer>(
        "answer(connection, lse, lse_bytes, o, o_bytes)\n\nSends the answer to that frame, from addresses."),
    connection_method<"share_cores", share_cores>(
        "share_cores()\n\n"
        "This thread, and those that it starts, run as soon as they wake and give their core up as soon as they are"
        " idle. For an attention worker's process beside an engine."),
    connection_method<"fail", fail>(
        "fail(connection, message)\n\nSends a message Failure as the connection's last frame."),
    connection_method<"shut_down", shut_down>(
        "shut_down(connection)\n\nMakes all waits at both ends find the connection closed. Thread-safe."),
    connection_method<"send_pieces", move_pieces<send_pieces>>(
        "send_pieces(fd, pieces, idle_s)\n\nSends memory given as a flat list (address, bytes, ...), in order. Raises"
        " TimeoutError when no byte has moved for idle_s seconds; below 0: no limit."),
    connection_method<"receive_pieces", move_pieces<receive_pieces>>(
        "receive_pieces(fd, pieces, idle_s)\n\nReceives into memory; as send_pieces."),
    NO_MORE_METHODS,
};

PyModuleDef definition = module_definition("Hot connections and bulk KV.", methods);

}  // namespace

PyMODINIT_FUNC PyInit__native() {
    return make_module(definition, [](PyObject* module) {
        if (PyModule_AddIntConstant(module, "MAX_UNDER_WAY", MAX_UNDER_WAY) < 0) throw PythonError();
    });
}

// The Python functions of the engine's end: send steps and layer frames, wait for answers.

#include <memory>
#include <numeric>
#include <utility>

#include "calls.h"
#include "fanout/fanout.h"

namespace farshore::wire {
namespace {

constexpr const char* FANOUT_CAPSULE = "farshore.fanout";

// What identifies a layer frame and its answer: `step`, `layer` and `micro_batch`.
Header layer_header(Arguments& arguments) {
    Header header{};
    header.step = arguments.integer<uint32_t>("step");
    header.layer = arguments.integer<uint16_t>("layer");
    header.micro_batch = arguments.integer<uint8_t>("micro_batch");
    header.kind = LAYER;
    return header;
}

// (address, row_bytes, stride_bytes).
StridedRows rows_of(Arguments& arguments, const char* name) {
    Arguments items = arguments.items(name);
    StridedRows rows;
    rows.data = items.address_or_null<uint8_t>("address");  // null: no rows
    rows.row_bytes = items.integer<uint32_t>("row_bytes");
    rows.stride_bytes = items.integer<int64_t>("stride_bytes", 0);
    items.end();
    return rows;
}

// A request of the rows 0 .. rows.
ShardRequest request_of_all_rows(Connection& connection, int rows) {
    ShardRequest request{};
    request.connection = &connection;
    request.rows.resize(rows);
    std::iota(request.rows.begin(), request.rows.end(), 0);
    return request;
}

// The message of a FAILURE, or None.
PyObject* failure_message(const std::optional<Frame>& failure) {
    if (!failure) Py_RETURN_NONE;
    return PyBytes_FromStringAndSize(reinterpret_cast<const char*>(failure->payload), failure->header.bytes);
}

// A fan-out, and references that keep its connections.
struct FanoutContent {
    std::vector<Reference> connections;
    std::optional<Fanout> fanout;
};

Fanout& fanout_of(Arguments& arguments) { return *arguments.content<FanoutContent>("fanout", FANOUT_CAPSULE).fanout; }

// (connection, rows, q, lse, o); q is (offset, row_bytes, stride_bytes), lse and o as for rows_of.
ShardRequest request_of(Arguments& requests, FanoutContent& content) {
    Arguments items = requests.items("request");
    ShardRequest request{};
    PyObject* capsule = items.object("connection");
    void* connection = PyCapsule_GetPointer(capsule, CONNECTION_CAPSULE);
    if (!connection) items.wrong_kind("connection", CONNECTION_CAPSULE, capsule);
    request.connection = static_cast<Connection*>(connection);
    content.connections.push_back(Reference::borrowed(capsule));
    Arguments rows = items.items("rows");
    request.rows.reserve(rows.left());
    while (rows.left()) request.rows.push_back(rows.integer<uint32_t>("row"));
    Arguments q = items.items("q");
    request.q_offset = q.integer<int64_t>("offset", 0);
    request.q_row_bytes = q.integer<uint32_t>("row_bytes");
    request.q_stride_bytes = q.integer<int64_t>("stride_bytes", 0);
    q.end();
    request.lse = rows_of(items, "lse");
    request.o = rows_of(items, "o");
    items.end();
    return request;
}

// (index of the request, type of the exception, its text), or (index, None, the shard's message Failure).
PyObject* failure_tuple(const RequestFailure& failed) {
    const auto index = static_cast<Py_ssize_t>(failed.request);
    if (!failed.error) return Py_BuildValue("nON", index, Py_None, failure_message(failed.failure));
    try {
        std::rethrow_exception(failed.error);
    } catch (const std::exception& error) {
        return Py_BuildValue("nOs", index, connection_exception(error), error.what());
    }
}

// None if no request failed.
PyObject* failure_list(const std::vector<RequestFailure>& failures) {
    if (failures.empty()) Py_RETURN_NONE;
    Reference list = Reference::owned(PyList_New(0));
    for (const RequestFailure& failed : failures) {
        const Reference tuple = Reference::owned(failure_tuple(failed));
        if (PyList_Append(list.get(), tuple.get()) != 0) throw PythonError();
    }
    return list.release();
}

}  // namespace

// -- one connection ----------------------------------------------------------------------------------------

void begin(Arguments& arguments) {
    Connection& connection = connection_of(arguments);
    const auto step = arguments.integer<uint32_t>("step");
    const Bytes message = arguments.bytes("message");
    const auto max_layer_bytes = arguments.integer<uint32_t>("max_layer_bytes");
    const double frame_s = arguments.real("frame_s");
    arguments.end();
    if (message.size() > MAX_CONTROL_BYTES) throw Refused("a step of more than 16 MiB of reads");
    connection.allow(frame_s);
    const Header header{step, 0, 0, BEGIN, static_cast<uint32_t>(message.size())};
    without_gil([&] { connection.begin(header, message.data(), max_layer_bytes); });
}

void repeat_step(Arguments& arguments) {
    Connection& connection = connection_of(arguments);
    const auto step = arguments.integer<uint32_t>("step");
    const double frame_s = arguments.real("frame_s");
    arguments.end();
    connection.allow(frame_s);
    without_gil([&] { connection.repeat_step(step); });
}

void send(Arguments& arguments) {
    Connection& connection = connection_of(arguments);
    const Header header = layer_header(arguments);
    ShardRequest request = request_of_all_rows(connection, arguments.count("rows"));
    const StridedRows q = rows_of(arguments, "q");
    arguments.end();
    request.q_row_bytes = q.row_bytes, request.q_stride_bytes = q.stride_bytes;
    without_gil([&] { send_frame(request, header, q.data); });
}

PyObject* wait(Arguments& arguments) {
    Connection& connection = connection_of(arguments);
    const Header header = layer_header(arguments);
    ShardRequest request = request_of_all_rows(connection, arguments.count("rows"));
    request.lse = rows_of(arguments, "lse");
    request.o = rows_of(arguments, "o");
    const double deadline_s = arguments.real("deadline_s");
    arguments.end();
    std::optional<Frame> failure;
    without_gil([&] {
        const Frame answer = connection.receive(after(deadline_s));
        if (!take_answer(request, header, answer)) failure = answer;
    });
    return failure_message(failure);
}

PyObject* under_way(Arguments& arguments) {
    const Connection& connection = connection_of(arguments);
    arguments.end();
    return PyLong_FromUnsignedLong(connection.under_way);
}

PyObject* is_open(Arguments& arguments) {
    const Connection& connection = connection_of(arguments);
    arguments.end();
    return PyBool_FromLong(connection.is_open());
}

void drain(Arguments& arguments) {
    Connection& connection = connection_of(arguments);
    const double deadline_s = arguments.real("deadline_s");
    arguments.end();
    without_gil([&] { drain(connection, after(deadline_s)); });
}

// -- fan-out -----------------------------------------------------------------------------------------------

PyObject* make_fanout(Arguments& arguments) {
    auto content = std::make_unique<FanoutContent>();
    std::vector<ShardRequest> requests;
    {
        Arguments items = arguments.items("requests");
        while (items.left()) requests.push_back(request_of(items, *content));
    }
    const std::chrono::microseconds busy{arguments.count("busy_us")};
    arguments.end();
    if (requests.empty()) throw std::invalid_argument("a fan-out of no requests: give 1 or more");
    content->fanout.emplace(std::move(requests), busy);
    return capsule_of(std::move(content), FANOUT_CAPSULE);
}

PyObject* send_all(Arguments& arguments) {
    Fanout& fanout = fanout_of(arguments);
    const Header header = layer_header(arguments);
    const auto* q = arguments.address_or_null<const uint8_t>("q");
    arguments.end();
    std::vector<RequestFailure> failures;
    without_gil([&] { failures = fanout.send(header, q); });
    return failure_list(failures);
}

PyObject* wait_all(Arguments& arguments) {
    Fanout& fanout = fanout_of(arguments);
    const Header header = layer_header(arguments);
    Arguments deadlines_s = arguments.items("deadlines_s");
    const double passed_s = arguments.real("passed_s");
    arguments.end();
    if (deadlines_s.left() != static_cast<Py_ssize_t>(fanout.requests.size()))
        throw std::invalid_argument("deadlines_s: give one for each request");
    std::vector<Deadline> deadlines;
    deadlines.reserve(fanout.requests.size());
    while (deadlines_s.left()) deadlines.push_back(after(deadlines_s.real("deadline_s") - passed_s));
    std::vector<RequestFailure> failures;
    without_gil([&] { failures = fanout.wait(header, deadlines); });
    return failure_list(failures);
}

PyObject* times(Arguments& arguments) {
    Fanout& fanout = fanout_of(arguments);
    arguments.end();
    Reference requests = Reference::owned(PyList_New(0));
    for (ShardRequest& request : fanout.requests) {
        Reference latencies = Reference::owned(PyList_New(0));
        for (const double seconds : std::exchange(request.latencies_s, {})) {
            const Reference latency = Reference::owned(PyFloat_FromDouble(seconds));
            if (PyList_Append(latencies.get(), latency.get()) != 0) throw PythonError();
        }
        const Reference tuple =
            Reference::owned(Py_BuildValue("IO", std::exchange(request.answers, 0), latencies.get()));
        if (PyList_Append(requests.get(), tuple.get()) != 0) throw PythonError();
    }
    return Py_BuildValue("dO", std::exchange(fanout.waited_s, 0), requests.get());
}

void give_way(Arguments& arguments) {
    arguments.end();
    kernels_api().give_way();
}

}  // namespace farshore::wire

#include "fanout/fanout.h"

#include <cstring>
#include <utility>

namespace farshore::wire {
namespace {

using Clock = std::chrono::steady_clock;

double seconds_since(Clock::time_point start) { return std::chrono::duration<double>(Clock::now() - start).count(); }

void check_answer(const Header& got, const Header& due) {
    if (std::memcmp(&got, &due, sizeof got) == 0) return;
    throw Broken("reordered or garbage: an answer to step " + std::to_string(got.step) + ", layer " +
                 std::to_string(got.layer) + ", micro-batch " + std::to_string(got.micro_batch) + " of " +
                 std::to_string(got.bytes) + " bytes; due is step " + std::to_string(due.step) + ", layer " +
                 std::to_string(due.layer) + ", micro-batch " + std::to_string(due.micro_batch) + ", " +
                 std::to_string(due.bytes) + " bytes");
}

}  // namespace

void send_frame(const ShardRequest& request, Header header, const uint8_t* q) {
    Connection& connection = *request.connection;
    if (connection.under_way == MAX_UNDER_WAY)
        throw Refused(std::to_string(MAX_UNDER_WAY) + " frames are under way: wait for one before the next");
    header.bytes = request.q_bytes();
    uint8_t* out = connection.reserve(header.bytes);
    for (const uint32_t row : request.rows) {
        std::memcpy(out, q + request.q_offset + row * request.q_stride_bytes, request.q_row_bytes);
        out += request.q_row_bytes;
    }
    connection.under_way++;
    try {
        connection.publish(header);
    } catch (const HungUp&) {
    }
}

bool take_answer(const ShardRequest& request, Header header, const Frame& answer) {
    if (answer.header.kind == FAILURE) return false;
    header.bytes = request.answer_bytes();
    check_answer(answer.header, header);
    const uint8_t* from = answer.payload;
    for (const StridedRows& to : {request.lse, request.o})
        for (const uint32_t row : request.rows) {
            std::memcpy(to.data + row * to.stride_bytes, from, to.row_bytes);
            from += to.row_bytes;
        }
    request.connection->under_way--;
    return true;
}

void drain(Connection& connection, Deadline deadline) {
    for (; connection.under_way > 0; connection.under_way--) {
        const uint8_t kind = connection.next(deadline).header.kind;
        if (kind == FAILURE) throw Broken("the shard refused a step that was dropped, and ended the connection");
        if (kind != LAYER) throw Broken("garbage: a frame of kind " + std::to_string(kind) + " for an answer");
    }
}

std::vector<RequestFailure> Fanout::send(const Header& header, const uint8_t* q) {
    for (ShardRequest& request : requests) request.sent = false;
    failures_.clear();
    sent_ = Clock::now();
    // A shard that last ran on this core is sent its frame last. It runs here as soon as it wakes; the other shards
    // would get their frames only after its attention, and the layer would take the time of two.
    const uint32_t core = this_core();
    for (const bool with_this_core : {false, true})
        for (size_t i = 0; i < requests.size(); i++) {
            ShardRequest& request = requests[i];
            if (request.sent || (!with_this_core && request.connection->other_core() == core)) continue;
            try {
                send_frame(request, header, q);
            } catch (const std::exception&) {
                failures_.push_back({i, std::current_exception(), {}});
            }
            request.sent = true;
        }
    return std::exchange(failures_, {});
}

std::vector<RequestFailure> Fanout::wait(const Header& header, const std::vector<Deadline>& deadlines) {
    const auto start = Clock::now();
    for (ShardRequest& request : requests) request.answered = false;
    failures_.clear();
    // An answer that was there before the first wait may have arrived long ago, so the time until now is only an
    // upper bound of its latency. It is recorded for one request of each call, in turn.
    const size_t recorded = waits_++ % requests.size();
    bool waited = false;
    for (size_t left = requests.size(); left > 0;) {
        for (size_t i = 0; i < requests.size(); i++) {
            if (requests[i].answered || !requests[i].connection->ready()) continue;
            take(i, header, deadlines[i], waited || i == recorded);
            left--;
        }
        if (left == 0) break;
        waited = true;
        // Sleeps on one shard, preferably one that shares this core and needs it to answer: to wake for each answer
        // costs context switches.
        size_t next = on_this_core();
        const bool shares_core = next < requests.size();
        if (!shares_core) {
            if (wait_.wait([&] { return any_ready(); }, [&] { return on_this_core() < requests.size(); })) continue;
            for (next = 0; requests[next].answered;) next++;
        }
        // The reply arrives during this wait, so its latency is exact.
        take(next, header, deadlines[next], true);
        left--;
        if (!shares_core) wait_.slept();
    }
    waited_s += seconds_since(start);
    return std::exchange(failures_, {});
}

// Waits for the answer of a request, writes it or records the failure. `exact`: records the latency.
void Fanout::take(size_t index, const Header& header, Deadline deadline, bool exact) {
    ShardRequest& request = requests[index];
    request.answered = true;
    try {
        const Frame frame = request.connection->next(deadline);
        if (!take_answer(request, header, frame)) {
            failures_.push_back({index, nullptr, frame});
            return;
        }
    } catch (const std::exception&) {
        failures_.push_back({index, std::current_exception(), {}});
        return;
    }
    request.answers++;
    if (exact && sent_) request.latencies_s.push_back(seconds_since(*sent_));
}

bool Fanout::any_ready() const {
    for (const ShardRequest& request : requests)
        if (!request.answered && request.connection->ready()) return true;
    return false;
}

size_t Fanout::on_this_core() const {
    const uint32_t core = this_core();
    for (size_t i = 0; i < requests.size(); i++)
        if (!requests[i].answered && requests[i].connection->other_core() == core) return i;
    return requests.size();
}

}  // namespace farshore::wire

// Sends a micro-batch's queries of one layer to several shards at once and collects the states: the engine's end of its
// connections. Called by engine/engine.cpp. It does not know Python.
#pragma once

#include <exception>
#include <optional>
#include <vector>

#include "wire/connection.h"

namespace farshore::wire {

// Rows of `row_bytes` each, `stride_bytes` apart.
struct StridedRows {
    uint8_t* data;
    size_t row_bytes, stride_bytes;
};

// One shard's request: of the micro-batch it reads some rows, and of each row a range of heads.
struct ShardRequest {
    Connection* connection;
    std::vector<uint32_t> rows;
    size_t q_offset, q_row_bytes, q_stride_bytes;
    StridedRows lse, o;                   // of all rows of the micro-batch; the shard's heads
    bool sent = false, answered = false;  // in the current call of Fanout
    uint32_t answers = 0;                 // since the caller last reset it
    std::vector<double> latencies_s;      // from sending to answer, where that is exact; since the caller last reset it

    uint32_t q_bytes() const { return static_cast<uint32_t>(rows.size() * q_row_bytes); }
    uint32_t answer_bytes() const { return static_cast<uint32_t>(rows.size() * (lse.row_bytes + o.row_bytes)); }
};

// Sends the request's rows of q. Ignores a connection that the shard has closed: a FAILURE may have arrived first, and
// the wait for the answer reports it. Throws Refused if MAX_UNDER_WAY frames are under way.
void send_frame(const ShardRequest& request, Header header, const uint8_t* q);
// Writes an answer's lse and o to their rows. Returns false if the frame is the shard's FAILURE; throws Broken for any
// other frame.
bool take_answer(const ShardRequest& request, Header header, const Frame& answer);
// Reads and drops the answers that the connection still owes. Throws Broken if the shard refused one of their steps.
void drain(Connection& connection, Deadline deadline);

// What the request with the index `request` failed with: an exception, or, if that is null, the shard's FAILURE.
struct RequestFailure {
    size_t request;
    std::exception_ptr error;
    Frame failure;
};

// Not thread-safe. The connections must be distinct and outlive the fan-out.
class Fanout {
  public:
    // `busy`: the bound of a busy wait, as for Connection.
    Fanout(std::vector<ShardRequest> requests, std::chrono::nanoseconds busy)
        : requests(std::move(requests)), wait_(busy) {}

    // Sends the layer frame to every shard. Returns the requests that failed; all others were sent.
    std::vector<RequestFailure> send(const Header& header, const uint8_t* q);
    // Waits for every shard's answer, each until its own deadline. Returns the requests that failed; all others have
    // their answers.
    std::vector<RequestFailure> wait(const Header& header, const std::vector<Deadline>& deadlines);

    std::vector<ShardRequest> requests;
    double waited_s = 0;  // time in `wait` since the caller last reset it

  private:
    void take(size_t request, const Header& header, Deadline deadline, bool exact);
    bool any_ready() const;
    // A request that is not answered and whose shard last ran on this core; requests.size() if there is none.
    size_t on_this_core() const;

    AdaptiveWait wait_;
    size_t waits_ = 0;                                           // calls of `wait`
    std::optional<std::chrono::steady_clock::time_point> sent_;  // none if another Fanout sent the frame
    std::vector<RequestFailure> failures_;                       // of the current call
};

}  // namespace farshore::wire

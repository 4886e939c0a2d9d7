// Layer frames of one micro-batch to several shards at once: the engine's end of its connections.
#pragma once

#include <exception>
#include <optional>
#include <vector>

#include "wire/wire.h"

namespace farshore::wire {

// `row_bytes` of each row, `stride_bytes` from one row to the next.
struct Rows {
    uint8_t* data;
    size_t row_bytes, stride_bytes;
};

// One shard's part. Of the micro-batch it sees some rows, and of each a stretch of heads.
struct Lane {
    Wire* wire;
    std::vector<uint32_t> rows;
    size_t q_offset, q_row_bytes, q_stride_bytes;
    Rows lse, o;  // of the whole micro-batch
    bool sent = false, done = false;  // in the call under way
    uint32_t answers = 0;         // until somebody asks
    std::vector<double> taken_s;  // from q's leaving to the answer, of those seen coming; until somebody asks

    uint32_t q_bytes() const { return static_cast<uint32_t>(rows.size() * q_row_bytes); }
    uint32_t answer_bytes() const { return static_cast<uint32_t>(rows.size() * (lse.row_bytes + o.row_bytes)); }
};

// The lane's part of q leaves. A connection that the shard has closed is no error yet: why may have come before, and
// who waits for the answer reads it.
void send_frame(const Lane& lane, Header header, const uint8_t* q);
// An answer's values go where they belong. False: it is the shard's FAILURE.
bool take_answer(const Lane& lane, Header header, const Frame& answer);
// Reads the answers that a connection still owes, and forgets them.
void drain(Wire& wire, Deadline until);

// What a lane failed with: an exception, or, where that is null, the shard's FAILURE.
struct Failed {
    size_t lane;
    std::exception_ptr error;
    Frame refusal;
};

class Exchange {
  public:
    Exchange(std::vector<Lane> lanes, std::chrono::nanoseconds awake) : lanes(std::move(lanes)), patience_(awake) {}

    // To every shard. The lanes that failed are returned; all others were sent it.
    std::vector<Failed> send(const Header& header, const uint8_t* q);
    // Waits for every shard, for each until its own deadline. The lanes that failed are returned; all others have
    // answered.
    std::vector<Failed> wait(const Header& header, const std::vector<Deadline>& until);

    std::vector<Lane> lanes;
    double waited_s = 0;  // until somebody asks

  private:
    void take(size_t lane, const Header& header, Deadline deadline, bool timed);
    bool any_ready() const;
    // A shard that is due and was seen on this core; lanes.size() if there is none.
    size_t on_this_core() const;

    Patience patience_;
    size_t turns_ = 0;
    std::optional<std::chrono::steady_clock::time_point> sent_;  // none: another exchange sent the frame
    std::vector<Failed> failed_;                                 // in the call under way
};

}  // namespace farshore::wire

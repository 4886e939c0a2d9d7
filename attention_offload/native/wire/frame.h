// Frames: what travels between an engine and a shard, whatever carries it.
#pragma once

#include <chrono>
#include <cstdint>
#include <stdexcept>
#include <string>

namespace farshore::wire {

// A frame is this header, little-endian, then `bytes` of payload.
struct Header {
    uint32_t step;
    uint16_t layer;
    uint8_t micro_batch;
    uint8_t kind;
    uint32_t bytes;
};
static_assert(sizeof(Header) == 12);

enum Kind : uint8_t {
    LAYER = 0,    // q to the shard; lse and o back
    BEGIN = 1,    // a step: the protobuf message Step
    FAILURE = 2,  // to the engine, the last frame of a connection: the protobuf message Failure
    WAKE = 3,     // look into the shared memory
    AGAIN = 4,    // a step that reads what the last one did
};

// A frame received; the payload is valid until the next one is asked for.
struct Frame {
    Header header;
    const uint8_t* payload;
};

// More than any step of ours (64 rows of 1,000 spans); a garbage length must not allocate what it says.
constexpr uint32_t MAX_CONTROL_BYTES = 16 << 20;

// The connection is of no more use.
struct Broken : std::runtime_error {
    using std::runtime_error::runtime_error;
};
// The other end closed it between two frames.
struct HungUp : Broken {
    using Broken::Broken;
};
struct Late : std::runtime_error {
    using std::runtime_error::runtime_error;
};
// The other end asked for something that makes no sense, in well-formed frames.
struct Refused : std::runtime_error {
    using std::runtime_error::runtime_error;
};

using Deadline = std::chrono::steady_clock::time_point;
constexpr Deadline NEVER = Deadline::max();

inline Deadline after(double seconds) {
    return std::chrono::steady_clock::now() +
           std::chrono::duration_cast<std::chrono::nanoseconds>(std::chrono::duration<double>(seconds));
}

}  // namespace farshore::wire

// Frames: the messages between an engine and a shard, the same on every transport.
#pragma once

#include <chrono>
#include <cstdint>
#include <stdexcept>
#include <string>

namespace farshore::wire {

// A frame is this header, little-endian, followed by `bytes` bytes of payload.
struct Header {
    uint32_t step;
    uint16_t layer;
    uint8_t micro_batch;
    uint8_t kind;
    uint32_t bytes;
};
static_assert(sizeof(Header) == 12);

enum Kind : uint8_t {
    LAYER = 0,        // to the shard: q; to the engine: lse, then o
    BEGIN = 1,        // a new step: the protobuf message Step
    FAILURE = 2,      // to the engine, the last frame of a connection: the protobuf message Failure
    WAKE = 3,         // there are new frames in the shared memory
    REPEAT_STEP = 4,  // a step with the reads of the last one
};

// A received frame. The payload stays valid until the next frame of the connection is asked for.
struct Frame {
    Header header;
    const uint8_t* payload;
};

// The largest payload of frames that are not LAYER. No step of ours is larger (64 rows of 1,000 spans); a garbage
// length must not make the receiver allocate memory.
constexpr uint32_t MAX_CONTROL_BYTES = 16 << 20;

// The connection cannot be used any more.
struct Broken : std::runtime_error {
    using std::runtime_error::runtime_error;
};
// The other end closed the connection between two frames.
struct HungUp : Broken {
    using Broken::Broken;
};
// A deadline passed.
struct Late : std::runtime_error {
    using std::runtime_error::runtime_error;
};
// The other end's frames are well formed, but what they ask for is invalid.
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

// One connection for hot frames. Both ends use the same class; an engine begins steps, a shard answers.
#pragma once

#include <memory>
#include <optional>
#include <vector>

#include "wire/adaptive_wait.h"
#include "wire/socket.h"

namespace farshore::wire {

// Layer frames under way at most. Every one is answered in order, so the engine alone keeps the count, and
// neither end can wait for the other to read.
constexpr uint32_t MAX_UNDER_WAY = 16;

// One thread uses it, save for shut_down and is_open.
class Wire {
  public:
    // `near`: the other end is on this host. `awake`: how long to wait awake for a frame, where that is of any use.
    Wire(int fd, double frame_s, bool near, std::chrono::nanoseconds awake)
        : socket_(fd), reader_(frame_s), patience_(awake), near_(near), frame_s_(frame_s) {}
    virtual ~Wire() = default;

    // Engine: announces a step whose layer frames and answers take at most `max_layer_bytes`.
    virtual void begin(const Header& header, const void* step, uint32_t max_layer_bytes) = 0;
    // Engine: another step of the same reads.
    virtual void again(uint32_t step) = 0;
    // Where the payload of the next layer frame goes. Refused beyond the step's `max_layer_bytes`.
    virtual uint8_t* reserve(uint32_t bytes) = 0;
    // Sends it. A shard's header is the one it answers, with the answer's size.
    virtual void publish(const Header& header) = 0;
    // Whether `next` would not wait.
    virtual bool ready() = 0;
    // The next frame; sleeps until it is there.
    virtual Frame next(Deadline deadline) = 0;
    // The same, awake at first.
    Frame receive(Deadline deadline);
    // The core that the other end was on when it sent last, from 1; 0: not known, or on another host.
    virtual uint32_t other_core() = 0;

    // Shard: frames of the step will not be longer. Known after the step was looked at.
    void expect(uint32_t max_layer_bytes) { max_layer_bytes_ = max_layer_bytes; }
    // Shard: the last frame; at most MAX_CONTROL_BYTES.
    void fail(const void* failure, uint32_t bytes);
    void shut_down() { socket_.shut_down(); }
    // Whether the other end has not closed the connection. From any thread.
    bool is_open() const { return socket_.is_open(); }
    // How long sending may take from now on, and the rest of a frame that has begun.
    void allow(double frame_s) { frame_s_ = reader_.frame_s = frame_s; }

    // Shard: a layer frame that is to be answered when the step's spans were looked up again.
    std::optional<Frame> unanswered;

    // Engine: layer frames sent and not answered.
    uint32_t under_way = 0;

  protected:
    void send_control(const Header& header, const void* payload, int passed = -1);
    Deadline soon() const { return after(frame_s_); }

    Socket socket_;
    Reader reader_;
    Patience patience_;
    bool near_;
    double frame_s_;
    uint32_t max_layer_bytes_ = 0;
};

// Frames one after another on a socket.
class Stream : public Wire {
  public:
    using Wire::Wire;
    void begin(const Header& header, const void* step, uint32_t max_layer_bytes) override;
    void again(uint32_t step) override;
    uint8_t* reserve(uint32_t bytes) override;
    void publish(const Header& header) override;
    bool ready() override { return reader_.has_begun(socket_); }
    Frame next(Deadline deadline) override;
    uint32_t other_core() override { return other_core_; }

  private:
    static constexpr size_t START = 64 - sizeof(Header);  // see Reader
    uint32_t other_core_ = 0;
    std::vector<uint8_t> out_ = std::vector<uint8_t>(64 << 10);
};

// Layer frames in slots of memory that both ends have mapped; everything else, and the wake-up of an end that
// sleeps, on a Unix socket. The engine makes the memory (a memfd: it has no name, and goes with its last
// user) and passes it with the first step that needs it, or more of it.
std::unique_ptr<Wire> shared_memory(int fd, double frame_s, std::chrono::nanoseconds awake);

}  // namespace farshore::wire

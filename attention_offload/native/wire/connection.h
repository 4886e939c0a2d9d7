// One connection between an engine and a shard. Both ends use the same class: an engine begins steps and sends layer
// frames, a shard answers them.
#pragma once

#include <memory>
#include <optional>
#include <vector>

#include "wire/adaptive_wait.h"
#include "wire/socket.h"

namespace farshore::wire {

// The most layer frames of a connection that are sent and not answered. Answers come in order, so the engine alone
// counts, and neither end can block because the other does not read.
constexpr uint32_t MAX_UNDER_WAY = 16;

// Not thread-safe, except shut_down and is_open. Every call may throw Late, HungUp or Broken (frame.h).
class Connection {
  public:
    // Takes over the socket. `frame_s`: the time limit of one send, and of receiving a frame that has begun. `near`:
    // the other end is on this host. `busy`: for how long to wait busily for a frame, where that pays.
    Connection(int fd, double frame_s, bool near, std::chrono::nanoseconds busy)
        : socket_(fd), reader_(frame_s), wait_(busy), near_(near), frame_s_(frame_s) {}
    virtual ~Connection() = default;

    // Engine: announces a step. Its layer frames and their answers have at most `max_layer_bytes` of payload.
    virtual void begin(const Header& header, const void* step, uint32_t max_layer_bytes) = 0;
    // Engine: announces a step with the reads of the last one.
    virtual void repeat_step(uint32_t step) = 0;
    // Returns the memory for the payload of the next layer frame. Throws Refused if `bytes` is above the step's
    // `max_layer_bytes`.
    virtual uint8_t* reserve(uint32_t bytes) = 0;
    // Sends the frame whose payload was written to reserve(). A shard passes the header of the frame that it answers,
    // with `bytes` changed to the answer's.
    virtual void publish(const Header& header) = 0;
    // Whether `next` would return without waiting.
    virtual bool ready() = 0;
    // Returns the next frame; sleeps until it is there. Throws Late at the deadline.
    virtual Frame next(Deadline deadline) = 0;
    // As `next`, but first waits busily.
    Frame receive(Deadline deadline);
    // The core on which the other end ran when it last sent, counted from 1; 0: not known, or on another host.
    virtual uint32_t other_core() = 0;

    // Shard: sets the most bytes of the layer frames of the step that was looked up.
    void expect(uint32_t max_layer_bytes) { max_layer_bytes_ = max_layer_bytes; }
    // Shard: sends the last frame, a message Failure of at most MAX_CONTROL_BYTES.
    void fail(const void* failure, uint32_t bytes);
    // Makes all waits at both ends find the connection closed. Thread-safe.
    void shut_down() { socket_.shut_down(); }
    // Whether the other end has not closed the connection. Thread-safe.
    bool is_open() const { return socket_.is_open(); }
    // Replaces `frame_s`.
    void allow(double frame_s) { frame_s_ = reader_.frame_s = frame_s; }

    // Shard: a layer frame that waits for a new look-up of the step's spans.
    std::optional<Frame> unanswered;

    // Engine: layer frames sent and not answered.
    uint32_t under_way = 0;

  protected:
    void send_control(const Header& header, const void* payload, int passed = -1);
    Deadline frame_deadline() const { return after(frame_s_); }

    Socket socket_;
    Reader reader_;
    AdaptiveWait wait_;
    bool near_;
    double frame_s_;
    uint32_t max_layer_bytes_ = 0;
};

// All frames go over the socket.
class SocketConnection : public Connection {
  public:
    using Connection::Connection;
    void begin(const Header& header, const void* step, uint32_t max_layer_bytes) override;
    void repeat_step(uint32_t step) override;
    uint8_t* reserve(uint32_t bytes) override;
    void publish(const Header& header) override;
    bool ready() override { return reader_.has_begun(socket_); }
    Frame next(Deadline deadline) override;
    uint32_t other_core() override { return other_core_; }

  private:
    static constexpr size_t START = 64 - sizeof(Header);  // aligns the payload to 64 bytes
    uint32_t other_core_ = 0;
    std::vector<uint8_t> out_ = std::vector<uint8_t>(64 << 10);
};

// Layer frames go through slots of memory that both ends have mapped. Steps, failures and wake-ups of a sleeping end
// go over the socket, which is a Unix socket. The engine makes the memory, a memfd (it has no name and disappears with
// its last user), and passes it with the first step that needs memory, or more memory.
std::unique_ptr<Connection> shared_memory_connection(int fd, double frame_s, std::chrono::nanoseconds busy);

}  // namespace farshore::wire

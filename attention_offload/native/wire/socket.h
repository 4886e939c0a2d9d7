// A stream socket on which every wait has a deadline, and a reader of frames from it.
#pragma once

#include <poll.h>

#include <vector>

#include "wire/frame.h"

namespace farshore::wire {

// Blocks until the socket is ready for `events` (of poll). Throws Late at the deadline, HungUp or Broken on errors.
void wait_for(int fd, short events, Deadline deadline);
// Throws the error that errno holds, as HungUp or Broken; `what` names the failed call.
[[noreturn]] void throw_errno(const char* what);

class Socket {
  public:
    // Takes over the descriptor.
    explicit Socket(int fd) : fd_(fd) {}
    Socket(const Socket&) = delete;
    ~Socket();

    // Sends all bytes, and with them the file descriptor `passed` (-1: none), which stays the caller's. Throws Late at
    // the deadline, HungUp or Broken.
    void send(const void* data, size_t bytes, Deadline deadline, int passed = -1);
    // Sends all bytes if the socket's buffer has room for them, and nothing otherwise. Errors are ignored: the next
    // wait on this socket reports them.
    void try_send(const void* data, size_t bytes);
    // Receives at least one byte and returns how many. Throws Late at the deadline, HungUp at the stream's end. A file
    // descriptor that comes along goes to `passed` and is then the caller's. Throws Broken if `passed` is null or
    // already holds one.
    size_t receive(void* data, size_t bytes, Deadline deadline, int* passed);
    // Receives what is there without waiting and returns how many bytes. `over`: whether the stream ended or failed;
    // the next `receive` reports which.
    size_t try_receive(void* data, size_t bytes, bool* over);
    // The core on which the other end ran when it last sent, counted from 1; 0 if not known. Only for an end on this
    // host.
    uint32_t other_core() const;
    // Throws HungUp if there is anything to read, which includes the stream's end.
    void expect_silence();
    // Whether the other end has not closed the connection, whatever there is to read. Thread-safe.
    bool is_open() const;
    // Throws HungUp unless is_open().
    void expect_open();
    // Sends the stream's end, then reads and drops bytes until the other end closes, or the deadline. Closing a socket
    // with unread bytes would discard what was sent last.
    void finish(Deadline deadline);
    // Makes all waits at both ends find the connection closed. Thread-safe.
    void shut_down();

  private:
    int fd_;
};

// The core that the calling thread runs on, counted from 1.
uint32_t this_core();

// Reads frames from a socket. It reads ahead, so that a small frame takes one system call.
class Reader {
  public:
    explicit Reader(double frame_s) : frame_s(frame_s) {}

    // Returns the next frame. The whole frame must be there by `first`; if that is NEVER, within `frame_s` of its first
    // byte; and also within `frame_s` of this call if some of its bytes had been read ahead. Throws Late at these
    // deadlines, HungUp at the stream's end, and Broken for bytes that are no frame. An excessive length is refused
    // before memory is allocated for it. `passed` as in Socket::receive.
    Frame next(Socket& socket, Deadline first, uint32_t max_layer_bytes, int* passed);
    // Whether the first byte of a frame, or the stream's end, is there. Never waits.
    bool has_begun(Socket& socket);

    double frame_s;

  private:
    // Frames start at this offset, so that payloads are aligned to 64 bytes.
    static constexpr size_t START = 64 - sizeof(Header);
    static constexpr size_t READ_AHEAD = 4096;  // bytes

    void fill(Socket& socket, size_t bytes, int* passed);
    size_t available() const { return end_ - begin_; }

    std::vector<uint8_t> data_ = std::vector<uint8_t>(64 << 10);
    size_t begin_ = START, end_ = START;
    size_t last_bytes_ = 0;  // of the frame returned last, its header included
    Deadline deadline_ = NEVER;
};

}  // namespace farshore::wire

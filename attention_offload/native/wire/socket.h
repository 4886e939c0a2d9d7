// A stream socket whose every wait has a deadline, and frames read from it.
#pragma once

#include <poll.h>

#include <vector>

#include "wire/frame.h"

namespace farshore::wire {

// Until the socket is ready for the events; Late at the deadline.
void wait_for(int fd, short events, Deadline deadline);
// Throws what errno says: HungUp or Broken.
[[noreturn]] void broken(const char* what);

class Socket {
  public:
    explicit Socket(int fd) : fd_(fd) {}
    Socket(const Socket&) = delete;
    ~Socket();

    // All of it, with a file descriptor passed along (-1: none).
    void send(const void* data, size_t bytes, Deadline deadline, int passed = -1);
    // Sends if that takes no waiting; otherwise nothing.
    void try_send(const void* data, size_t bytes);
    // At least one byte; HungUp at the end. A file descriptor that comes along is put into `passed`, the
    // caller's from then on; Broken where none is due (null), or one was there already.
    size_t receive(void* data, size_t bytes, Deadline deadline, int* passed);
    // The same of what is there; it never waits. `over`: there is the end, or an error, which `receive` will tell.
    size_t try_receive(void* data, size_t bytes, bool* over);
    // Where the other end, on this host too, was when it sent last, from 1; 0: not known.
    uint32_t other_core() const;
    // HungUp if there is anything to read, its end included.
    void expect_silence();
    // Whether the other end has not closed it, whatever there is to read. From any thread.
    bool is_open() const;
    // HungUp if it is not.
    void expect_open();
    // No more will be sent; reads what still comes until the other end closes, or the deadline. Without this,
    // closing with something unread would throw away what was sent last.
    void finish(Deadline deadline);
    // From any thread: whoever waits here, at either end, finds the connection closed.
    void shut_down();

  private:
    int fd_;
};

// The core that this thread is on, from 1.
uint32_t this_core();

// Reads ahead, so that a small frame takes one system call.
class Reader {
  public:
    explicit Reader(double frame_s) : frame_s(frame_s) {}

    // Waits until `first` for a frame, or, where that is NEVER, `frame_s` from its first byte on. Broken for what
    // cannot be a frame; its length is refused before memory is taken for it.
    Frame next(Socket& socket, Deadline first, uint32_t max_layer_bytes, int* passed);
    // Whether `next` would not wait for a frame's first byte: reads what is there, never waits.
    bool has_begun(Socket& socket);

    double frame_s;

  private:
    // A frame starts here, so that its payload is aligned to 64 bytes.
    static constexpr size_t START = 64 - sizeof(Header), ROOM = 4096;

    void fill(Socket& socket, size_t until, int* passed);
    size_t held() const { return end_ - begin_; }

    std::vector<uint8_t> data_ = std::vector<uint8_t>(64 << 10);
    size_t begin_ = START, end_ = START;
    size_t last_bytes_ = 0;  // of the frame given out last, header included
    Deadline deadline_ = NEVER;
};

}  // namespace farshore::wire

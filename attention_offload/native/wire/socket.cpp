#include "wire/socket.h"

#include <sched.h>
#include <sys/socket.h>
#include <sys/uio.h>
#include <unistd.h>

#include <algorithm>
#include <cerrno>
#include <cstring>

namespace farshore::wire {
namespace {

using std::chrono::nanoseconds;
using std::chrono::steady_clock;

// Room for two descriptors, so that an unexpected second one is received and closed.
constexpr size_t CONTROL_BYTES = CMSG_SPACE(2 * sizeof(int));

void take_passed(msghdr& message, int* passed) {
    bool stray = message.msg_flags & MSG_CTRUNC;
    for (cmsghdr* control = CMSG_FIRSTHDR(&message); control; control = CMSG_NXTHDR(&message, control)) {
        if (control->cmsg_level != SOL_SOCKET || control->cmsg_type != SCM_RIGHTS) continue;
        int fds[2];
        const size_t count = std::min<size_t>(2, (control->cmsg_len - CMSG_LEN(0)) / sizeof(int));
        std::memcpy(fds, CMSG_DATA(control), count * sizeof(int));
        for (size_t i = 0; i < count; i++) {
            if (passed && *passed < 0) {
                *passed = fds[i];
            } else {
                close(fds[i]);
                stray = true;
            }
        }
    }
    if (stray) throw Broken("unexpected file descriptors");
}

}  // namespace

void throw_errno(const char* what) {
    const int code = errno;
    const std::string text = std::string(what) + ": " + std::strerror(code);
    if (code == EPIPE || code == ECONNRESET) throw HungUp(text);
    throw Broken(text);
}

void wait_for(int fd, short events, Deadline deadline) {
    for (;;) {
        timespec left{};
        if (deadline != NEVER) {
            const auto ns = std::chrono::duration_cast<nanoseconds>(deadline - steady_clock::now()).count();
            if (ns <= 0) throw Late("the deadline passed");
            left = {ns / 1'000'000'000, ns % 1'000'000'000};
        }
        pollfd entry{fd, events, 0};
        const int ready = ppoll(&entry, 1, deadline == NEVER ? nullptr : &left, nullptr);
        if (ready > 0) return;
        if (ready < 0 && errno != EINTR) throw_errno("poll");
    }
}

Socket::~Socket() { close(fd_); }

void Socket::shut_down() { shutdown(fd_, SHUT_RDWR); }

uint32_t Socket::other_core() const {
    // On loopback, a packet is received on the core that sent it.
    int core = -1;
    socklen_t bytes = sizeof core;
    return getsockopt(fd_, SOL_SOCKET, SO_INCOMING_CPU, &core, &bytes) == 0 ? static_cast<uint32_t>(core + 1) : 0;
}

uint32_t this_core() { return static_cast<uint32_t>(sched_getcpu() + 1); }

void Socket::expect_silence() {
    char byte;
    const ssize_t received = recv(fd_, &byte, 1, MSG_DONTWAIT | MSG_PEEK);
    if (received >= 0 || (errno != EAGAIN && errno != EWOULDBLOCK))
        throw HungUp("the other end closed the connection between two steps");
}

bool Socket::is_open() const {
    pollfd entry{fd_, POLLRDHUP, 0};
    return poll(&entry, 1, 0) == 0;
}

void Socket::expect_open() {
    if (!is_open()) throw HungUp("the other end closed the connection between two steps");
}

void Socket::finish(Deadline deadline) {
    shutdown(fd_, SHUT_WR);
    uint8_t unread[4096];
    try {
        for (;;) receive(unread, sizeof unread, deadline, nullptr);
    } catch (const std::runtime_error&) {
        // Closed, late or broken: the connection ends in any case.
    }
}

void Socket::send(const void* data, size_t bytes, Deadline deadline, int passed) {
    auto* next = static_cast<const uint8_t*>(data);
    while (bytes > 0) {
        iovec unsent{const_cast<uint8_t*>(next), bytes};
        msghdr message{};
        message.msg_iov = &unsent;
        message.msg_iovlen = 1;
        alignas(cmsghdr) char control[CMSG_SPACE(sizeof(int))];
        if (passed >= 0) {
            message.msg_control = control;
            message.msg_controllen = sizeof control;
            cmsghdr* header = CMSG_FIRSTHDR(&message);
            header->cmsg_level = SOL_SOCKET;
            header->cmsg_type = SCM_RIGHTS;
            header->cmsg_len = CMSG_LEN(sizeof(int));
            std::memcpy(CMSG_DATA(header), &passed, sizeof(int));
        }
        const ssize_t sent = sendmsg(fd_, &message, MSG_DONTWAIT | MSG_NOSIGNAL);
        if (sent >= 0) {
            passed = -1;
            next += sent;
            bytes -= sent;
        } else if (errno == EAGAIN || errno == EWOULDBLOCK) {
            wait_for(fd_, POLLOUT, deadline);
        } else if (errno != EINTR) {
            throw_errno("send");
        }
    }
}

void Socket::try_send(const void* data, size_t bytes) {
    const ssize_t sent = ::send(fd_, data, bytes, MSG_DONTWAIT | MSG_NOSIGNAL);
    // A full buffer already holds bytes that wake the other end. The next wait notices a closed connection.
    if (sent > 0 && static_cast<size_t>(sent) != bytes) throw Broken("a frame was cut");
}

size_t Socket::receive(void* data, size_t bytes, Deadline deadline, int* passed) {
    for (;;) {
        iovec room{data, bytes};
        msghdr message{};
        message.msg_iov = &room;
        message.msg_iovlen = 1;
        alignas(cmsghdr) char control[CONTROL_BYTES];
        message.msg_control = control;
        message.msg_controllen = sizeof control;
        const ssize_t received = recvmsg(fd_, &message, MSG_DONTWAIT | MSG_CMSG_CLOEXEC);
        if (received > 0) {
            if (message.msg_controllen || message.msg_flags & MSG_CTRUNC) take_passed(message, passed);
            return received;
        }
        if (received == 0) throw HungUp("the other end closed the connection");
        if (errno == EAGAIN || errno == EWOULDBLOCK) {
            wait_for(fd_, POLLIN, deadline);
        } else if (errno != EINTR) {
            throw_errno("receive");
        }
    }
}

size_t Socket::try_receive(void* data, size_t bytes, bool* over) {
    const ssize_t received = recv(fd_, data, bytes, MSG_DONTWAIT);
    *over = received == 0 || (received < 0 && errno != EAGAIN && errno != EWOULDBLOCK && errno != EINTR);
    return received > 0 ? received : 0;
}

bool Reader::has_begun(Socket& socket) {
    if (available() > last_bytes_) return true;
    bool over;
    end_ += socket.try_receive(&data_[end_], data_.size() - end_, &over);
    return over || available() > last_bytes_;
}

Frame Reader::next(Socket& socket, Deadline first, uint32_t max_layer_bytes, int* passed) {
    begin_ += last_bytes_;
    last_bytes_ = 0;
    std::memmove(&data_[START], &data_[begin_], available());
    end_ = START + available();
    begin_ = START;
    deadline_ = available() ? std::min(first, after(frame_s)) : first;
    fill(socket, sizeof(Header), passed);
    Frame frame;
    std::memcpy(&frame.header, &data_[START], sizeof(Header));
    const Header& header = frame.header;
    if (header.kind > REPEAT_STEP) throw Broken("garbage: a frame of kind " + std::to_string(header.kind));
    const uint32_t limit = header.kind == LAYER ? max_layer_bytes : header.kind >= WAKE ? 0 : MAX_CONTROL_BYTES;
    if (header.bytes > limit)
        throw Broken("oversized: a frame of " + std::to_string(header.bytes) + " bytes, kind " +
                     std::to_string(header.kind) + ", where " + std::to_string(limit) + " are the most");
    last_bytes_ = sizeof(Header) + header.bytes;
    // has_begun reads into the room after the frame.
    if (data_.size() < START + last_bytes_ + READ_AHEAD) data_.resize(START + last_bytes_ + READ_AHEAD);
    fill(socket, last_bytes_, passed);
    frame.payload = &data_[START + sizeof(Header)];
    return frame;
}

// Reads until `bytes` bytes from the frame's start are available.
void Reader::fill(Socket& socket, size_t bytes, int* passed) {
    while (available() < bytes) {
        try {
            end_ += socket.receive(&data_[end_], data_.size() - end_, deadline_, passed);
        } catch (const HungUp&) {
            if (available() == 0) throw;
            throw Broken("truncated: the connection ended inside a frame");
        }
        if (available() < bytes && deadline_ == NEVER) deadline_ = after(frame_s);
    }
}

}  // namespace farshore::wire

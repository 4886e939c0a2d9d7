#include <cstring>

#include "wire/connection.h"

namespace farshore::wire {

void Connection::fail(const void* failure, uint32_t bytes) {
    send_control({0, 0, 0, FAILURE, bytes}, failure);
    socket_.finish(frame_deadline());
}

Frame Connection::receive(Deadline deadline) {
    const bool arrived = wait_.wait([&] { return ready(); }, [&] { return other_core() == this_core(); });
    const Frame frame = next(deadline);
    if (!arrived) wait_.slept();
    return frame;
}

void Connection::send_control(const Header& header, const void* payload, int passed) {
    std::vector<uint8_t> frame(sizeof header + header.bytes);
    std::memcpy(frame.data(), &header, sizeof header);
    if (header.bytes) std::memcpy(frame.data() + sizeof header, payload, header.bytes);
    socket_.send(frame.data(), frame.size(), frame_deadline(), passed);
}

void SocketConnection::begin(const Header& header, const void* step, uint32_t max_layer_bytes) {
    socket_.expect_silence();
    expect(max_layer_bytes);
    send_control(header, step);
}

void SocketConnection::repeat_step(uint32_t step) {
    socket_.expect_silence();
    send_control({step, 0, 0, REPEAT_STEP, 0}, nullptr);
}

uint8_t* SocketConnection::reserve(uint32_t bytes) {
    const size_t needed = START + sizeof(Header) + bytes;
    if (out_.size() < needed) out_.resize(needed);
    return &out_[START + sizeof(Header)];
}

void SocketConnection::publish(const Header& header) {
    std::memcpy(&out_[START], &header, sizeof header);
    socket_.send(&out_[START], sizeof header + header.bytes, frame_deadline());
}

Frame SocketConnection::next(Deadline deadline) {
    Frame frame = reader_.next(socket_, deadline, max_layer_bytes_, nullptr);
    if (near_) other_core_ = socket_.other_core();
    if (frame.header.kind == WAKE) throw Broken("garbage: a wake-up where no memory is shared");
    return frame;
}

}  // namespace farshore::wire

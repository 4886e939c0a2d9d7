#include <cstring>

#include "wire/wire.h"

namespace farshore::wire {

void Wire::fail(const void* failure, uint32_t bytes) {
    send_control({0, 0, 0, FAILURE, bytes}, failure);
    socket_.finish(soon());
}

Frame Wire::receive(Deadline deadline) {
    const bool is_there = patience_.wait([&] { return ready(); }, [&] { return other_core() == this_core(); });
    const Frame frame = next(deadline);
    if (!is_there) patience_.slept();
    return frame;
}

void Wire::send_control(const Header& header, const void* payload, int passed) {
    std::vector<uint8_t> frame(sizeof header + header.bytes);
    std::memcpy(frame.data(), &header, sizeof header);
    if (header.bytes) std::memcpy(frame.data() + sizeof header, payload, header.bytes);
    socket_.send(frame.data(), frame.size(), soon(), passed);
}

void Stream::begin(const Header& header, const void* step, uint32_t max_layer_bytes) {
    socket_.expect_silence();
    expect(max_layer_bytes);
    send_control(header, step);
}

void Stream::again(uint32_t step) {
    socket_.expect_silence();
    send_control({step, 0, 0, AGAIN, 0}, nullptr);
}

uint8_t* Stream::reserve(uint32_t bytes) {
    const size_t needed = START + sizeof(Header) + bytes;
    if (out_.size() < needed) out_.resize(needed);
    return &out_[START + sizeof(Header)];
}

void Stream::publish(const Header& header) {
    std::memcpy(&out_[START], &header, sizeof header);
    socket_.send(&out_[START], sizeof header + header.bytes, soon());
}

Frame Stream::next(Deadline deadline) {
    Frame frame = reader_.next(socket_, deadline, max_layer_bytes_, nullptr);
    if (near_) other_core_ = socket_.other_core();
    if (frame.header.kind == WAKE) throw Broken("garbage: a wake-up where no memory is shared");
    return frame;
}

}  // namespace farshore::wire

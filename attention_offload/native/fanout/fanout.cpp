#include "fanout/fanout.h"

#include <cstring>
#include <utility>

namespace farshore::wire {
namespace {

using Clock = std::chrono::steady_clock;

double seconds_since(Clock::time_point start) { return std::chrono::duration<double>(Clock::now() - start).count(); }

void check_answer(const Header& got, const Header& due) {
    if (std::memcmp(&got, &due, sizeof got) == 0) return;
    throw Broken("reordered or garbage: an answer to step " + std::to_string(got.step) + ", layer " +
                 std::to_string(got.layer) + ", micro-batch " + std::to_string(got.micro_batch) + " of " +
                 std::to_string(got.bytes) + " bytes; due is step " + std::to_string(due.step) + ", layer " +
                 std::to_string(due.layer) + ", micro-batch " + std::to_string(due.micro_batch) + ", " +
                 std::to_string(due.bytes) + " bytes");
}

}  // namespace

void send_frame(const Lane& lane, Header header, const uint8_t* q) {
    if (lane.wire->under_way == MAX_UNDER_WAY)
        throw Refused(std::to_string(MAX_UNDER_WAY) + " frames are under way: wait for one before the next");
    header.bytes = lane.q_bytes();
    uint8_t* out = lane.wire->reserve(header.bytes);
    for (const uint32_t row : lane.rows) {
        std::memcpy(out, q + lane.q_offset + row * lane.q_stride_bytes, lane.q_row_bytes);
        out += lane.q_row_bytes;
    }
    lane.wire->under_way++;
    try {
        lane.wire->publish(header);
    } catch (const HungUp&) {
    }
}

bool take_answer(const Lane& lane, Header header, const Frame& answer) {
    if (answer.header.kind == FAILURE) return false;
    header.bytes = lane.answer_bytes();
    check_answer(answer.header, header);
    const uint8_t* from = answer.payload;
    for (const Rows& part : {lane.lse, lane.o})
        for (const uint32_t row : lane.rows) {
            std::memcpy(part.data + row * part.stride_bytes, from, part.row_bytes);
            from += part.row_bytes;
        }
    lane.wire->under_way--;
    return true;
}

void drain(Wire& wire, Deadline until) {
    for (; wire.under_way > 0; wire.under_way--) {
        const uint8_t kind = wire.next(until).header.kind;
        if (kind == FAILURE) throw Broken("the shard refused a step that was dropped, and ended the connection");
        if (kind != LAYER) throw Broken("garbage: a frame of kind " + std::to_string(kind) + " for an answer");
    }
}

std::vector<Failed> Exchange::send(const Header& header, const uint8_t* q) {
    for (Lane& lane : lanes) lane.sent = false;
    failed_.clear();
    sent_ = Clock::now();
    // Who was on this core comes last: woken, it runs here at once, and if the others waited for their frames
    // meanwhile, a layer would take a second attention's time.
    const uint32_t here = this_core();
    for (const bool on_this_core : {false, true})
        for (size_t i = 0; i < lanes.size(); i++) {
            Lane& lane = lanes[i];
            if (lane.sent || (!on_this_core && lane.wire->other_core() == here)) continue;
            try {
                send_frame(lane, header, q);
            } catch (const std::exception&) {
                failed_.push_back({i, std::current_exception(), {}});
            }
            lane.sent = true;
        }
    return std::exchange(failed_, {});
}

std::vector<Failed> Exchange::wait(const Header& header, const std::vector<Deadline>& until) {
    const auto start = Clock::now();
    for (Lane& lane : lanes) lane.done = false;
    failed_.clear();
    // An answer that is there may have come long ago: its time counts for one shard only, in turns.
    const size_t turn = turns_++ % lanes.size();
    bool waited = false;
    for (size_t due = lanes.size(); due > 0;) {
        for (size_t i = 0; i < lanes.size(); i++) {
            if (lanes[i].done || !lanes[i].wire->ready()) continue;
            take(i, header, until[i], waited || i == turn);
            due--;
        }
        if (due == 0) break;
        waited = true;
        // Asleep for one of them, who needs this core if there is such a one: to wake for each costs switches.
        size_t next = on_this_core();
        const bool in_the_way = next < lanes.size();
        if (!in_the_way) {
            if (patience_.wait([&] { return any_ready(); }, [&] { return on_this_core() < lanes.size(); })) continue;
            for (next = 0; lanes[next].done;) next++;
        }
        take(next, header, until[next], true);
        due--;
        if (!in_the_way) patience_.slept();
    }
    waited_s += seconds_since(start);
    return std::exchange(failed_, {});
}

void Exchange::take(size_t lane, const Header& header, Deadline deadline, bool timed) {
    Lane& it = lanes[lane];
    it.done = true;
    try {
        const Frame frame = it.wire->next(deadline);
        if (!take_answer(it, header, frame)) {
            failed_.push_back({lane, nullptr, frame});
            return;
        }
    } catch (const std::exception&) {
        failed_.push_back({lane, std::current_exception(), {}});
        return;
    }
    it.answers++;
    if (timed && sent_) it.taken_s.push_back(seconds_since(*sent_));
}

bool Exchange::any_ready() const {
    for (const Lane& lane : lanes)
        if (!lane.done && lane.wire->ready()) return true;
    return false;
}

size_t Exchange::on_this_core() const {
    const uint32_t here = this_core();
    for (size_t i = 0; i < lanes.size(); i++)
        if (!lanes[i].done && lanes[i].wire->other_core() == here) return i;
    return lanes.size();
}

}  // namespace farshore::wire

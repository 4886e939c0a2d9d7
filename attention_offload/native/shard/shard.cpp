// The Python functions of the shard's end. One native call answers the layer frames of a step and of its repetitions,
// or, where Python runs the kernels (on a device), returns for each of them.

#include <sched.h>
#include <sys/syscall.h>
#include <unistd.h>

#include <algorithm>
#include <atomic>
#include <cstring>
#include <optional>

#include "calls.h"

namespace farshore::wire {
namespace {

// What answers the layer frames of one layer class and micro-batch.
struct PreparedFrame {
    void* plan;  // a kernel plan; null: Python answers
    uint32_t q_bytes, lse_bytes, o_bytes;
    int64_t read_bytes;  // of stored KV
};

struct Layer {
    uint32_t layer_class;
    int stored_layer;  // its index among the layers of its class
};

// A step whose spans were looked up, in Python.
struct PreparedStep {
    std::optional<uint32_t> number;  // none before the first step
    int format = 0;                  // of q and o, as in runtime/api.h
    std::vector<Layer> layers;
    std::vector<std::vector<PreparedFrame>> frames;  // [layer class][micro-batch]
    int64_t* attended_bytes = nullptr;
    // How often a sequence of the step gave back holds, and that count at the look-up. While it is unchanged, no
    // memory that the plans read was given to another span.
    int64_t* removals = nullptr;
    int64_t seen_removals = 0;
    bool repeatable = false;  // positions do not matter, so the plans serve the next step too

    bool still_holds() const { return std::atomic_ref(*removals).load(std::memory_order_acquire) == seen_removals; }

    uint32_t max_layer_bytes() const {
        uint32_t most = 0;
        for (const auto& batches : frames)
            for (const PreparedFrame& frame : batches)
                most = std::max({most, frame.q_bytes, frame.lse_bytes + frame.o_bytes});
        return most;
    }
};

// The most bytes of a layer frame or of its answer. attention_offload/shard/checks.py allows a step less; the limit
// keeps lengths and their sums within a header's 32 bits.
constexpr int64_t MAX_LAYER_BYTES = 1 << 30;

uint32_t checked_bytes(int64_t bytes) {
    if (bytes < 0 || bytes > MAX_LAYER_BYTES)
        throw std::out_of_range(std::to_string(bytes) +
                                " bytes in a layer's frame: " + std::to_string(MAX_LAYER_BYTES) + " are the most");
    return static_cast<uint32_t>(bytes);
}

// (plan, q_bytes, lse_bytes, o_bytes, read_bytes).
PreparedFrame prepared_frame(Arguments& batches) {
    Arguments items = batches.items("frame");
    PyObject* plan = items.object("plan");
    PreparedFrame frame;
    frame.q_bytes = checked_bytes(items.integer<int64_t>("q_bytes"));
    frame.lse_bytes = checked_bytes(items.integer<int64_t>("lse_bytes"));
    frame.o_bytes = checked_bytes(items.integer<int64_t>("o_bytes"));
    checked_bytes(int64_t{frame.lse_bytes} + frame.o_bytes);
    frame.read_bytes = items.integer<int64_t>("read_bytes", 0);
    items.end();
    frame.plan = plan == Py_None ? nullptr : PyCapsule_GetPointer(plan, PLAN_CAPSULE);
    if (!frame.plan && plan != Py_None) items.wrong_kind("plan", PLAN_CAPSULE, plan);
    return frame;
}

// (layer class, stored layer), checked against the step's classes and the number of layers before it.
Layer layer_of(Arguments& layers, size_t classes, size_t layers_before) {
    Arguments items = layers.items("layer");
    const auto layer_class = items.integer<int64_t>("layer_class"), stored = items.integer<int64_t>("stored_layer");
    items.end();
    if (layer_class < 0 || layer_class >= static_cast<int64_t>(classes)) throw std::out_of_range("a layer of no class");
    if (stored < 0 || stored > static_cast<int64_t>(layers_before))
        throw std::out_of_range("a layer of its class that is not there");
    return {static_cast<uint32_t>(layer_class), static_cast<int>(stored)};
}

// None, or a step as `serve` of binding.cpp describes it.
PreparedStep prepared_step(Arguments& arguments) {
    PreparedStep step;
    PyObject* description = arguments.object("step");
    if (description == Py_None) return step;
    if (!PyTuple_Check(description)) arguments.wrong_kind("step", "a tuple or None", description);
    Arguments items("serve: step", reinterpret_cast<PyTupleObject*>(description)->ob_item,
                    PyTuple_GET_SIZE(description), nullptr);
    step.number = items.integer<uint32_t>("number");
    step.format = items.integer<int>("format", 0, 2);
    Arguments layers = items.items("layers");
    Arguments classes = items.items("frames");
    while (classes.left()) {
        Arguments batches = classes.items("layer_class");
        std::vector<PreparedFrame>& frames = step.frames.emplace_back();
        while (batches.left()) frames.push_back(prepared_frame(batches));
    }
    while (layers.left()) step.layers.push_back(layer_of(layers, step.frames.size(), step.layers.size()));
    step.attended_bytes = items.address<int64_t>("attended_bytes");
    step.removals = items.address<int64_t>("removals");
    step.seen_removals = items.integer<int64_t>("seen_removals");
    step.repeatable = items.boolean("repeatable");
    items.end();
    return step;
}

// What answers a layer frame. Throws Refused if the step has no such frame.
const PreparedFrame& frame_for(const PreparedStep& step, const Header& header) {
    if (step.number != header.step)
        throw Refused("frame of step " + std::to_string(header.step) + ", but step " +
                      (step.number ? std::to_string(*step.number) : "None") + " is under way");
    if (header.layer >= step.layers.size())
        throw Refused("layer " + std::to_string(header.layer) + " of a model of " + std::to_string(step.layers.size()) +
                      " layers");
    const auto& batches = step.frames[step.layers[header.layer].layer_class];
    if (header.micro_batch >= batches.size())
        throw Refused("micro-batch " + std::to_string(header.micro_batch) + " of a step of " +
                      std::to_string(batches.size()));
    const PreparedFrame& frame = batches[header.micro_batch];
    if (header.bytes != frame.q_bytes)
        throw Refused("q of " + std::to_string(header.bytes) + " bytes, expected " + std::to_string(frame.q_bytes));
    return frame;
}

// Keeps this thread on the engine's core where the two share cores. The engine sleeps there while the shard computes,
// and to wake a thread takes 2 us on the same core, 11 to 20 us on another.
class CoreFollower {
  public:
    CoreFollower() {
        if (sched_getaffinity(0, sizeof usable_, &usable_) != 0) CPU_ZERO(&usable_);
    }

    // Called for each frame. `core`: the engine's, counted from 1; 0: not known.
    void follow(uint32_t core) {
        if (core == 0 || core == this_core() || core > CPU_SETSIZE || !CPU_ISSET(core - 1, &usable_)) {
            frames_apart_ = 0;
        } else if (++frames_apart_ == MOVE_AFTER) {
            cpu_set_t only;
            CPU_ZERO(&only);
            CPU_SET(core - 1, &only);
            sched_setaffinity(0, sizeof only, &only);
            frames_apart_ = 0;
        }
    }

  private:
    static constexpr int MOVE_AFTER = 2;  // frames in a row from another core
    cpu_set_t usable_;
    int frames_apart_ = 0;
};

// What Python must do.
enum class Event {
    END,      // the engine has hung up
    STEP,     // look up the spans of the step in `frame`
    RECHECK,  // look up the current step's spans, of which some were removed; its layer frame is unanswered
    ANSWER,   // answer the layer frame, which is unanswered
};

// Answers layer frames until there is an event; an unanswered frame is in connection.unanswered too.
Event answer_frames(Connection& connection, PreparedStep& step, const Api& api, bool shares_cores, Frame& frame) {
    thread_local CoreFollower follower;
    connection.expect(step.max_layer_bytes());
    for (;;) {
        if (connection.unanswered) {
            frame = *connection.unanswered;
            connection.unanswered.reset();
        } else {
            try {
                frame = connection.receive(NEVER);
            } catch (const HungUp&) {
                return Event::END;
            }
        }
        if (frame.header.kind == REPEAT_STEP && step.repeatable && step.still_holds()) {
            step.number = frame.header.step;
            continue;
        }
        if (frame.header.kind == BEGIN || frame.header.kind == REPEAT_STEP) return Event::STEP;
        if (frame.header.kind != LAYER) throw Broken("garbage: a shard was sent a failure");
        if (shares_cores) follower.follow(connection.other_core());
        Header header = frame.header;
        const PreparedFrame& prepared = frame_for(step, header);
        if (!prepared.plan) {
            connection.unanswered = frame;
            return Event::ANSWER;
        }
        header.bytes = prepared.lse_bytes + prepared.o_bytes;
        uint8_t* out = connection.reserve(header.bytes);
        if (step.still_holds())
            api.partial(prepared.plan, step.layers[header.layer].stored_layer, frame.payload, step.format,
                        out + prepared.lse_bytes, reinterpret_cast<float*>(out));
        // If a span was removed meanwhile, its memory may already hold another span: such an answer must not be sent.
        std::atomic_thread_fence(std::memory_order_acquire);
        if (!step.still_holds()) {
            connection.unanswered = frame;
            return Event::RECHECK;
        }
        std::atomic_ref(*step.attended_bytes).fetch_add(prepared.read_bytes, std::memory_order_relaxed);
        connection.publish(header);
    }
}

// The layer frame that Python answers.
const Frame& unanswered_frame(const Connection& connection) {
    if (!connection.unanswered) throw std::logic_error("no layer frame waits for an answer");
    return *connection.unanswered;
}

// The fields of Linux's struct sched_attr that exist in all versions; see sched_setattr(2).
struct SchedulingAttributes {
    uint32_t bytes, policy;
    uint64_t flags;
    int32_t nice;
    uint32_t priority;
    uint64_t runtime_ns, deadline_ns, period_ns;
};
static_assert(sizeof(SchedulingAttributes) == 48);

// A time slice shorter than that of other threads (3 ms) lets a thread run as soon as it wakes (Linux 6.12 and later),
// rather than when an engine's thread that waits busily on its core has given up. Kernels without it ignore it.
constexpr uint64_t SLICE_NS = 100'000;

// Slices of threads that serve long frames are as long as a frame, so that the threads of another engine's short frames
// run first on a shared core, but shorter than those of engines. (Measured with threads that wake every 660 us for
// 60 us beside one that never sleeps: 99% ran within 720 us with equal slices, within 100 to 150 us with a longer one.)
constexpr uint64_t MAX_FRAME_SLICE_NS = 2'000'000;
constexpr int64_t READ_BYTES_PER_NS = 16;

// Asks the scheduler for time slices of `ns` for the calling thread.
void set_slice(uint64_t ns) {
    SchedulingAttributes attributes{};
    if (syscall(SYS_sched_getattr, 0, &attributes, sizeof attributes, 0) == 0) {
        attributes.runtime_ns = ns;
        syscall(SYS_sched_setattr, 0, &attributes, 0);
    }
}

uint64_t slice_ns(const PreparedStep& step) {
    int64_t most_bytes = 0;
    for (const auto& batches : step.frames)
        for (const PreparedFrame& frame : batches) most_bytes = std::max(most_bytes, frame.read_bytes);
    return std::clamp<uint64_t>(most_bytes / READ_BYTES_PER_NS, SLICE_NS, MAX_FRAME_SLICE_NS);
}

}  // namespace

PyObject* serve(Arguments& arguments) {
    Connection& connection = connection_of(arguments);
    PreparedStep step = prepared_step(arguments);
    const bool shares_cores = arguments.boolean("shares_cores");
    arguments.end();
    const Api& api = kernels_api();
    thread_local uint64_t slice = 0;
    if (step.number && slice != slice_ns(step)) set_slice(slice = slice_ns(step));
    Frame frame;
    const Header& header = frame.header;
    switch (without_gil([&] { return answer_frames(connection, step, api, shares_cores, frame); })) {
        case Event::END: Py_RETURN_NONE;
        case Event::RECHECK:  // Only frames of a step stay unanswered, so the step has a number.
            return Py_BuildValue("(I)", *step.number);
        case Event::ANSWER:
            return Py_BuildValue("(III)", *step.number, unsigned{header.layer}, unsigned{header.micro_batch});
        case Event::STEP: break;
    }
    if (header.kind == REPEAT_STEP) return PyLong_FromUnsignedLong(header.step);
    return PyBytes_FromStringAndSize(reinterpret_cast<const char*>(frame.payload), header.bytes);
}

void question(Arguments& arguments) {
    Connection& connection = connection_of(arguments);
    uint8_t* q = arguments.address<uint8_t>("q");
    const auto q_bytes = arguments.integer<int64_t>("q_bytes", 0);
    arguments.end();
    const Frame& frame = unanswered_frame(connection);
    if (q_bytes != frame.header.bytes)
        throw std::out_of_range(std::to_string(q_bytes) + " bytes for q of " + std::to_string(frame.header.bytes));
    std::memcpy(q, frame.payload, frame.header.bytes);
}

void answer(Arguments& arguments) {
    Connection& connection = connection_of(arguments);
    const auto* lse = arguments.address<uint8_t>("lse");
    const uint32_t lse_bytes = checked_bytes(arguments.integer<int64_t>("lse_bytes"));
    const auto* o = arguments.address<uint8_t>("o");
    const uint32_t o_bytes = checked_bytes(arguments.integer<int64_t>("o_bytes"));
    arguments.end();
    without_gil([&] {
        Header header = unanswered_frame(connection).header;
        header.bytes = checked_bytes(int64_t{lse_bytes} + o_bytes);
        uint8_t* out = connection.reserve(header.bytes);
        std::memcpy(out, lse, lse_bytes);
        std::memcpy(out + lse_bytes, o, o_bytes);
        connection.unanswered.reset();
        connection.publish(header);
    });
}

void share_cores(Arguments& arguments) {
    arguments.end();
    set_slice(SLICE_NS);
    // An engine on this host needs the cores as soon as the answer is sent.
    kernels_api().set_spin_us(0);
}

void fail(Arguments& arguments) {
    Connection& connection = connection_of(arguments);
    const Bytes message = arguments.bytes("message");
    arguments.end();
    const auto bytes = static_cast<uint32_t>(std::min<Py_ssize_t>(message.size(), MAX_CONTROL_BYTES));
    without_gil([&] { connection.fail(message.data(), bytes); });
}

}  // namespace farshore::wire

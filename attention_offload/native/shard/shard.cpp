// The shard's end, as Python calls it: one call answers the layer frames of a step and of all that read the same.

#include <sched.h>
#include <sys/syscall.h>
#include <unistd.h>

#include <algorithm>
#include <atomic>

#include "calls.h"

namespace farshore::wire {
namespace {

// One layer frame of the step under way, by its layer class and micro-batch.
struct Work {
    void* plan;
    uint32_t q_bytes, lse_bytes, o_bytes;
    long long read_bytes;
};

struct Layer {
    unsigned layer_class;
    int stored_layer;
};

struct Step {
    long long number = -1;  // none
    int format = 0;
    std::vector<Layer> layers;
    std::vector<std::vector<Work>> work;  // [layer class][micro-batch]
    int64_t* attended_bytes = nullptr;
    // The store's count, and what it was when the spans were looked up: memory is another span's only after it rose.
    int64_t* removals = nullptr;
    long long seen_removals = 0;
    bool repeats = false;

    bool still_holds() const { return std::atomic_ref(*removals).load(std::memory_order_acquire) == seen_removals; }

    uint32_t max_layer_bytes() const {
        uint32_t most = 0;
        for (const auto& batches : work)
            for (const Work& it : batches) most = std::max({most, it.q_bytes, it.lse_bytes + it.o_bytes});
        return most;
    }
};

// Of a frame or of an answer: more than attention_offload/door.py lets a step have, and lengths and their sums fit
// into a header's 32 bits.
constexpr long long MAX_LAYER_BYTES = 1 << 30;

// PyArg's own "I" drops the upper bits of what is longer.
uint32_t checked_bytes(long long bytes) {
    if (bytes < 0 || bytes > MAX_LAYER_BYTES)
        throw std::out_of_range(std::to_string(bytes) + " bytes in a layer's frame: " +
                                std::to_string(MAX_LAYER_BYTES) + " are the most");
    return static_cast<uint32_t>(bytes);
}

Work work_of(PyObject* description) {
    Work it;
    PyObject* capsule;
    long long q_bytes, lse_bytes, o_bytes;
    parse(description, "OLLLL", &capsule, &q_bytes, &lse_bytes, &o_bytes, &it.read_bytes);
    it.q_bytes = checked_bytes(q_bytes);
    it.lse_bytes = checked_bytes(lse_bytes);
    it.o_bytes = checked_bytes(o_bytes);
    checked_bytes(lse_bytes + o_bytes);
    it.plan = PyCapsule_GetPointer(capsule, PLAN_CAPSULE);
    if (!it.plan) throw Raised();
    return it;
}

Step step_of(PyObject* description) {
    Step step;
    if (description == Py_None) return step;
    PyObject *layers, *classes;
    unsigned long long counter, removals;
    int repeats;
    parse(description, "LiO!O!KKLp", &step.number, &step.format, &PyTuple_Type, &layers, &PyTuple_Type, &classes,
          &counter, &removals, &step.seen_removals, &repeats);
    step.attended_bytes = reinterpret_cast<int64_t*>(counter);
    step.removals = reinterpret_cast<int64_t*>(removals);
    step.repeats = repeats;
    for (Py_ssize_t i = 0; i < PyTuple_GET_SIZE(classes); i++) {
        PyObject* batches = PyTuple_GET_ITEM(classes, i);
        step.work.emplace_back();
        for (Py_ssize_t j = 0; j < PyTuple_Size(batches); j++)
            step.work.back().push_back(work_of(PyTuple_GET_ITEM(batches, j)));
    }
    for (Py_ssize_t i = 0; i < PyTuple_GET_SIZE(layers); i++) {
        long long layer_class, stored_layer;
        parse(PyTuple_GET_ITEM(layers, i), "LL", &layer_class, &stored_layer);
        if (layer_class < 0 || layer_class >= static_cast<long long>(step.work.size()))
            throw std::out_of_range("a layer of no class");
        if (stored_layer < 0 || stored_layer > i) throw std::out_of_range("a layer of its class that is not there");
        step.layers.push_back({static_cast<unsigned>(layer_class), static_cast<int>(stored_layer)});
    }
    return step;
}

const Work& work_for(const Step& step, const Header& header) {
    if (step.number != header.step)
        throw Refused("frame of step " + std::to_string(header.step) + ", but step " +
                      (step.number < 0 ? "None" : std::to_string(step.number)) + " is under way");
    if (header.layer >= step.layers.size())
        throw Refused("layer " + std::to_string(header.layer) + " of a model of " +
                      std::to_string(step.layers.size()) + " layers");
    const auto& batches = step.work[step.layers[header.layer].layer_class];
    if (header.micro_batch >= batches.size())
        throw Refused("micro-batch " + std::to_string(header.micro_batch) + " of a step of " +
                      std::to_string(batches.size()));
    const Work& it = batches[header.micro_batch];
    if (header.bytes != it.q_bytes)
        throw Refused("q of " + std::to_string(header.bytes) + " bytes, expected " + std::to_string(it.q_bytes));
    return it;
}

// Where an engine shares its cores with this thread, this thread stays on the engine's: the engine sleeps there
// meanwhile, and to wake a thread on one's own core takes 2 us, on another 11 to 20.
class Follower {
  public:
    Follower() {
        if (sched_getaffinity(0, sizeof usable_, &usable_) != 0) CPU_ZERO(&usable_);
    }

    // `core`: the engine's, from 1; 0: not known.
    void follow(uint32_t core) {
        if (core == 0 || core == this_core() || core > CPU_SETSIZE || !CPU_ISSET(core - 1, &usable_)) {
            apart_ = 0;
        } else if (++apart_ == PATIENCE) {
            cpu_set_t there;
            CPU_ZERO(&there);
            CPU_SET(core - 1, &there);
            sched_setaffinity(0, sizeof there, &there);
            apart_ = 0;
        }
    }

  private:
    static constexpr int PATIENCE = 2;  // frames
    cpu_set_t usable_;
    int apart_ = 0;
};

// Answers layer frames until a step comes whose reads are to be looked up, or until those of the step under way are
// to be looked up again: its layer frame is then `wire.unanswered`. False: the engine has hung up.
bool answer(Wire& wire, Step& step, const Api& api, bool shares_cores, Frame& frame) {
    thread_local Follower follower;
    wire.expect(step.max_layer_bytes());
    for (;;) {
        if (wire.unanswered) {
            frame = *wire.unanswered;
            wire.unanswered.reset();
        } else {
            try {
                frame = wire.receive(NEVER);
            } catch (const HungUp&) {
                return false;
            }
        }
        if (frame.header.kind == AGAIN && step.repeats && step.still_holds()) {
            step.number = frame.header.step;
            continue;
        }
        if (frame.header.kind == BEGIN || frame.header.kind == AGAIN) return true;
        if (frame.header.kind != LAYER) throw Broken("garbage: a shard was sent a failure");
        if (shares_cores) follower.follow(wire.other_core());
        Header header = frame.header;
        const Work& it = work_for(step, header);
        header.bytes = it.lse_bytes + it.o_bytes;
        uint8_t* out = wire.reserve(header.bytes);
        if (step.still_holds())
            api.partial(it.plan, step.layers[header.layer].stored_layer, frame.payload, step.format,
                        out + it.lse_bytes, reinterpret_cast<float*>(out));
        // Memory that was given back meanwhile may be another span's by now: such an answer must not leave.
        std::atomic_thread_fence(std::memory_order_acquire);
        if (!step.still_holds()) {
            wire.unanswered = frame;
            return true;
        }
        std::atomic_ref(*step.attended_bytes).fetch_add(it.read_bytes, std::memory_order_relaxed);
        wire.publish(header);
    }
}

// Linux's struct sched_attr, as far as it is needed; see sched_setattr(2).
struct Turns {
    uint32_t bytes, policy;
    uint64_t flags;
    int32_t nice;
    uint32_t priority;
    uint64_t runtime_ns, deadline_ns, period_ns;
};
static_assert(sizeof(Turns) == 48);

// A slice shorter than the others' (3 ms) has a thread that wakes run at once (Linux 6.12 and later), rather than
// when an engine's thread that waits awake on its core has given up. What the kernel doesn't grant is not needed.
constexpr uint64_t TURN_NS = 100'000;

}  // namespace

PyObject* serve(PyObject*, PyObject* args) {
    return guarded([&]() -> PyObject* {
        PyObject *capsule, *description;
        int shares_cores;
        parse(args, "OOp", &capsule, &description, &shares_cores);
        Wire& wire = wire_of(capsule);
        const Api& api = kernels_api();
        Step step = step_of(description);
        Frame frame;
        bool more;
        {
            WithoutGil released;
            more = answer(wire, step, api, shares_cores, frame);
        }
        if (!more) Py_RETURN_NONE;
        if (wire.unanswered) return Py_BuildValue("(L)", step.number);
        if (frame.header.kind == AGAIN) return PyLong_FromUnsignedLong(frame.header.step);
        return PyBytes_FromStringAndSize(reinterpret_cast<const char*>(frame.payload), frame.header.bytes);
    });
}

PyObject* share_cores(PyObject*, PyObject*) {
    return guarded([&]() -> PyObject* {
        Turns turns{};
        if (syscall(SYS_sched_getattr, 0, &turns, sizeof turns, 0) == 0) {
            turns.runtime_ns = TURN_NS;
            syscall(SYS_sched_setattr, 0, &turns, 0);
        }
        // An engine on this host needs the cores as soon as the answer is out.
        kernels_api().wait_awake(0);
        Py_RETURN_NONE;
    });
}

PyObject* fail(PyObject*, PyObject* args) {
    return guarded([&]() -> PyObject* {
        PyObject* capsule;
        Py_buffer message;
        parse(args, "Oy*", &capsule, &message);
        const std::unique_ptr<Py_buffer, void (*)(Py_buffer*)> owned(&message, PyBuffer_Release);
        Wire& wire = wire_of(capsule);
        {
            WithoutGil released;
            wire.fail(message.buf, static_cast<uint32_t>(std::min<Py_ssize_t>(message.len, MAX_CONTROL_BYTES)));
        }
        Py_RETURN_NONE;
    });
}

}  // namespace farshore::wire

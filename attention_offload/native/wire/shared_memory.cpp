#include <fcntl.h>
#include <sys/mman.h>
#include <sys/stat.h>
#include <unistd.h>

#include <atomic>
#include <cerrno>
#include <cstring>
#include <thread>

#include "wire/connection.h"

namespace farshore::wire {
namespace {

constexpr size_t PAGE = 4096;
constexpr size_t SLOT_HEADER = 64;  // bytes before the payload: the frame's header, and padding to align the payload
// Slots of one direction. A power of two, so that counters may wrap around; above MAX_UNDER_WAY, since a step's BEGIN
// takes a slot ahead of its frames.
constexpr uint32_t SLOTS = 2 * MAX_UNDER_WAY;
constexpr std::chrono::microseconds NAP{50};  // between two checks for a free slot

// The counters of one direction. Frame n lies in slot n % SLOTS.
struct alignas(128) Ring {
    std::atomic<uint32_t> published;  // number of frames sent; written by the sender
    std::atomic<uint32_t> sleeping;   // 1: the receiver needs a WAKE on the socket; the sender of the WAKE sets 0
    std::atomic<uint32_t> core;       // of the sender, at its last frame, counted from 1; a hint
    // Number of frames taken; written by the receiver, so on a cache line that the sender does not write.
    alignas(64) std::atomic<uint32_t> taken;
};
static_assert(std::atomic<uint32_t>::is_always_lock_free);

// The mapped memory: a page with the two rings, then the slots of each direction.
class Mapping {
  public:
    Mapping() = default;
    Mapping(const Mapping&) = delete;
    ~Mapping() { unmap(); }

    // Makes and maps memory. Returns its descriptor, which the caller passes to the other end and closes.
    int create(uint32_t slot_bytes) {
        const int fd = memfd_create("farshore-frames", MFD_CLOEXEC | MFD_ALLOW_SEALING);
        if (fd < 0) throw_errno("memfd_create");
        const size_t bytes = PAGE + 2 * SLOTS * static_cast<size_t>(slot_bytes);
        // Sealed against shrinking, which would cause a bus error at the other end in the middle of a frame.
        if (ftruncate(fd, bytes) != 0 || fcntl(fd, F_ADD_SEALS, F_SEAL_SHRINK | F_SEAL_GROW | F_SEAL_SEAL) != 0) {
            close(fd);
            throw_errno("shared memory");
        }
        map(fd, bytes);
        return fd;
    }

    // Maps memory of the other end, after checks of its seals and size.
    void attach(int fd) {
        struct stat status;
        const int seals = fcntl(fd, F_GET_SEALS);
        if (seals < 0 || !(seals & F_SEAL_SHRINK) || fstat(fd, &status) != 0)
            throw Broken("shared memory that may shrink");
        const size_t bytes = status.st_size;
        if (bytes <= PAGE || (bytes - PAGE) % (2 * SLOTS * PAGE) != 0 || (bytes - PAGE) / 2 > UINT32_MAX)
            throw Broken("shared memory of " + std::to_string(bytes) + " bytes");
        map(fd, bytes);
    }

    explicit operator bool() const { return memory_ != nullptr; }
    uint32_t slot_bytes() const { return slot_bytes_; }
    Ring& ring(int direction) { return reinterpret_cast<Ring*>(memory_)[direction]; }
    uint8_t* slot(int direction, uint32_t frame) {
        const size_t index = direction * SLOTS + frame % SLOTS;
        return memory_ + PAGE + index * slot_bytes_;
    }

  private:
    void map(int fd, size_t bytes) {
        void* memory = mmap(nullptr, bytes, PROT_READ | PROT_WRITE, MAP_SHARED, fd, 0);
        if (memory == MAP_FAILED) throw_errno("mmap");
        unmap();
        memory_ = static_cast<uint8_t*>(memory);
        bytes_ = bytes;
        slot_bytes_ = static_cast<uint32_t>((bytes - PAGE) / (2 * SLOTS));
    }
    void unmap() {
        if (memory_) munmap(memory_, bytes_);
    }

    uint8_t* memory_ = nullptr;
    size_t bytes_ = 0;
    uint32_t slot_bytes_ = 0;
};

// Messages that are not layer frames go over the socket. For a step, a slot of kind BEGIN keeps its order among the
// layer frames; a FAILURE comes after all of them.
class SharedMemoryConnection : public Connection {
  public:
    using Connection::Connection;
    ~SharedMemoryConnection() override {
        if (passed_ >= 0) close(passed_);
    }

    void begin(const Header& header, const void* step, uint32_t max_layer_bytes) override {
        out_ = 0;
        in_ = 1;
        if (map_ && max_layer_bytes + SLOT_HEADER <= map_.slot_bytes()) {
            send_control(header, step);
        } else {
            begin_in_new_memory(header, step, max_layer_bytes);
        }
        publish({header.step, 0, 0, BEGIN, 0});
    }

    void repeat_step(uint32_t step) override {
        socket_.expect_open();
        publish({step, 0, 0, REPEAT_STEP, 0});
    }

    uint8_t* reserve(uint32_t bytes) override {
        if (!map_ || bytes + SLOT_HEADER > map_.slot_bytes())
            throw Refused("a frame of " + std::to_string(bytes) + " bytes is longer than this step's memory");
        await_room();
        return map_.slot(out_, sent_) + SLOT_HEADER;
    }

    void publish(const Header& header) override {
        await_room();
        std::memcpy(map_.slot(out_, sent_), &header, sizeof header);
        Ring& ring = map_.ring(out_);
        ring.core.store(this_core(), std::memory_order_relaxed);
        ring.published.store(++sent_);
        if (ring.sleeping.load() && ring.sleeping.exchange(0)) {
            const Header wake{0, 0, 0, WAKE, 0};
            socket_.try_send(&wake, sizeof wake);
        }
    }

    bool ready() override { return map_ && map_.ring(in_).published.load() != taken_; }

    Frame next(Deadline deadline) override {
        for (;;) {
            if (ready()) {
                const Frame frame = take();
                if (frame.header.kind != BEGIN) return frame;
                while (!message_ || message_->kind != BEGIN) read_socket(frame_deadline());
                return message();
            }
            if (map_) {
                // Either the sender sees this flag, or this thread sees the sender's frame.
                map_.ring(in_).sleeping.store(1);
                if (ready()) continue;
            }
            try {
                read_socket(deadline);
                // Wake-ups without a frame must not extend the wait.
                if (deadline != NEVER && std::chrono::steady_clock::now() >= deadline && !ready())
                    throw Late("the deadline passed");
            } catch (const HungUp&) {
                if (ready()) continue;
                if (message_ && message_->kind == FAILURE) return message();
                throw;
            }
        }
    }

    uint32_t other_core() override { return map_ ? map_.ring(in_).core.load(std::memory_order_relaxed) : 0; }

  private:
    // Engine: waits for a free slot. Layer frames always find one, but an engine may announce steps without frames
    // faster than the shard takes them.
    void await_room() {
        if (out_ != 0 || sent_ - other_taken_ < SLOTS) return;
        for (const Deadline deadline = frame_deadline();; std::this_thread::sleep_for(NAP)) {
            other_taken_ = map_.ring(0).taken.load(std::memory_order_acquire);
            if (sent_ - other_taken_ < SLOTS) return;
            if (std::chrono::steady_clock::now() >= deadline) throw Late("the deadline passed");
        }
    }

    void begin_in_new_memory(const Header& header, const void* step, uint32_t max_layer_bytes) {
        // Twice the size asked for, so that a batch that grows by a sequence a step rarely needs new memory.
        const size_t slot = (2 * static_cast<size_t>(max_layer_bytes) + SLOT_HEADER + PAGE - 1) / PAGE * PAGE;
        const int fd = map_.create(static_cast<uint32_t>(slot));
        sent_ = taken_ = other_taken_ = 0;
        try {
            send_control(header, step, fd);
        } catch (...) {
            close(fd);
            throw;
        }
        close(fd);
    }

    // Returns the frame in the next slot.
    Frame take() {
        const uint32_t waiting = map_.ring(in_).published.load() - taken_;
        if (waiting > SLOTS)
            throw Broken("garbage: " + std::to_string(waiting) + " frames in " + std::to_string(SLOTS) + " slots");
        const uint8_t* slot = map_.slot(in_, taken_);
        Frame frame;
        std::memcpy(&frame.header, slot, sizeof frame.header);
        frame.payload = slot + SLOT_HEADER;
        const Header& header = frame.header;
        const bool is_step = in_ == 0 && (header.kind == BEGIN || header.kind == REPEAT_STEP);
        if ((header.kind != LAYER && !is_step) || header.bytes > map_.slot_bytes() - SLOT_HEADER)
            throw Broken("garbage: a slot with a frame of kind " + std::to_string(header.kind) + ", " +
                         std::to_string(header.bytes) + " bytes");
        map_.ring(in_).taken.store(++taken_, std::memory_order_release);
        return frame;
    }

    // Reads one message or wake-up.
    void read_socket(Deadline deadline) {
        const Frame frame = reader_.next(socket_, deadline, 0, &passed_);
        if (frame.header.kind == WAKE) return;
        if (message_) throw Broken("reordered: a message before the last one was taken");
        if (passed_ >= 0) attach(frame);
        if (!map_ && frame.header.kind == BEGIN) throw Broken("a step without memory to share");
        message_ = frame.header;
        payload_.assign(frame.payload, frame.payload + frame.header.bytes);
    }

    // Returns the message that was read.
    Frame message() {
        const Frame frame{*message_, payload_.data()};
        message_.reset();
        return frame;
    }

    // Maps the memory that came with a step.
    void attach(const Frame& frame) {
        if (frame.header.kind != BEGIN || out_ == 0) throw Broken("shared memory without a step");
        map_.attach(passed_);
        close(passed_);
        passed_ = -1;
        sent_ = taken_ = 0;
    }

    Mapping map_;
    int out_ = 1, in_ = 0;  // directions of a shard; `begin` makes them an engine's
    uint32_t sent_ = 0, taken_ = 0;
    uint32_t other_taken_ = 0;       // engine: frames that the shard had taken at the last check
    int passed_ = -1;                // a descriptor that came with a message not yet read
    std::optional<Header> message_;  // from the socket, not yet returned
    std::vector<uint8_t> payload_;   // of message_
};

}  // namespace

std::unique_ptr<Connection> shared_memory_connection(int fd, double frame_s, std::chrono::nanoseconds busy) {
    return std::make_unique<SharedMemoryConnection>(fd, frame_s, true, busy);
}

}  // namespace farshore::wire

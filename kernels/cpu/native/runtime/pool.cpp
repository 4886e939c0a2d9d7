#include "runtime/pool.h"

#include <pthread.h>
#include <sched.h>

#if defined(__linux__)
#include <linux/futex.h>
#include <sys/resource.h>
#include <sys/syscall.h>
#include <unistd.h>
#endif

#include <atomic>
#include <chrono>
#include <climits>
#include <cstdint>
#include <cstdlib>
#include <exception>
#include <mutex>
#include <new>
#include <system_error>
#include <thread>
#include <utility>
#include <vector>

#include "runtime/spin_wait.h"

namespace farshore {
namespace {

// How long a worker waits awake for the next task. Longer takes the core from others.
std::atomic<int> spin_us{SPIN_US};

// Whether workers add this to their niceness, once, before they wait next.
std::atomic<bool> giving_way{false};
constexpr int GIVING_WAY_NICE = 3;

static_assert(sizeof(std::atomic<uint32_t>) == sizeof(uint32_t) && std::atomic<uint32_t>::is_always_lock_free);

// Sleeps until `word` is woken, unless it is no longer `seen`. Not std::atomic::wait, which yields before it sleeps:
// see awake.h.
void sleep_while(std::atomic<uint32_t>& word, uint32_t seen) {
#if defined(__linux__)
    syscall(SYS_futex, &word, FUTEX_WAIT_PRIVATE, seen, nullptr, nullptr, 0);
#else
    word.wait(seen, std::memory_order_acquire);
#endif
}

void wake_all(std::atomic<uint32_t>& word) {
#if defined(__linux__)
    syscall(SYS_futex, &word, FUTEX_WAKE_PRIVATE, INT_MAX, nullptr, nullptr, 0);
#else
    word.notify_all();
#endif
}

// One task at a time. A worker joins the task only by incrementing `inside` while it is open, so that the
// owner knows when the last one has left and the task's memory may go.
class Pool {
  public:
    void run(int count, int threads, void (*body)(void*, int), void* context) {
        while (static_cast<int>(workers_.size()) < threads - 1) {
            try {
                workers_.emplace_back([this, id = static_cast<int>(workers_.size())] { work(id); });
            } catch (const std::system_error&) {
                break;  // The machine gives no more threads: those there are do the work.
            }
            caller_core_ = -1;
        }
#if defined(__linux__)
        leave_to(sched_getcpu());
#endif
        open(count, threads - 1, body, context);
        if (asleep_.load() > 0) wake_all(generation_);
        close();
    }

    // For whoever is awake.
    void open(int count, int helpers, void (*body)(void*, int), void* context) {
        body_ = body;
        context_ = context;
        count_ = count;
        helpers_ = helpers;
        error_ = nullptr;
        failed_.store(false, std::memory_order_relaxed);
        next_.store(0, std::memory_order_relaxed);
        inside_.store(OPEN, std::memory_order_release);
        generation_.fetch_add(1);
    }

    void close() {
        take();
        // Closed: who comes now stays out. Then wait for those inside; they have at most one item left.
        inside_.fetch_sub(OPEN, std::memory_order_acq_rel);
        while (inside_.load(std::memory_order_acquire) != 0) relax();
        if (error_) std::rethrow_exception(std::exchange(error_, nullptr));
    }

    std::mutex busy;

  private:
    static constexpr int OPEN = 1 << 20;

#if defined(__linux__)
    // Keeps the workers off the caller's core. Woken from sleep they often start on it, and it takes the
    // scheduler milliseconds to move one of two running threads away. (Measured on 2 cores after 100 ms of
    // rest: a 5.6 ms task took a median of 11.)
    void leave_to(int core) {
        if (core == caller_core_ || core < 0) return;
        caller_core_ = core;
        cpu_set_t others;
        // The process's: the caller itself may be kept on one core (attention_offload/native/shard.cpp).
        if (sched_getaffinity(getpid(), sizeof others, &others) != 0) return;
        CPU_CLR(core, &others);
        if (CPU_COUNT(&others) == 0) return;
        for (std::thread& worker : workers_)
            pthread_setaffinity_np(worker.native_handle(), sizeof others, &others);
    }
#endif

    // What a body throws (scratch that cannot be had) is kept for the caller, and no further item starts.
    void take() noexcept {
        try {
            for (int i; (i = next_.fetch_add(1, std::memory_order_relaxed)) < count_;) body_(context_, i);
        } catch (...) {
            next_.store(count_, std::memory_order_relaxed);
            if (!failed_.exchange(true)) error_ = std::current_exception();
        }
    }

    void work(int id) {
        uint32_t seen = 0;
        [[maybe_unused]] bool gives_way = false;
        for (;;) {
#if defined(__linux__)
            // This thread's alone: Linux has it so.
            if (!gives_way && giving_way.load(std::memory_order_relaxed)) {
                gives_way = true;
                setpriority(PRIO_PROCESS, 0, getpriority(PRIO_PROCESS, 0) + GIVING_WAY_NICE);
            }
#endif
            Awake awake{std::chrono::microseconds(spin_us.load(std::memory_order_relaxed))};
            uint32_t now;
            while ((now = generation_.load()) == seen) {
                if (awake.once_more()) continue;
                // Either the caller sees this, or the new generation is seen here.
                asleep_.fetch_add(1);
                sleep_while(generation_, seen);
                asleep_.fetch_sub(1);
            }
            seen = now;
            int inside = inside_.load(std::memory_order_acquire);
            while (inside >= OPEN && !inside_.compare_exchange_weak(inside, inside + 1)) relax();
            if (inside < OPEN) continue;
            if (id < helpers_) take();
            inside_.fetch_sub(1, std::memory_order_acq_rel);
        }
    }

    std::atomic<uint32_t> generation_{0};
    std::atomic<int> asleep_{0};
    std::atomic<int> inside_{0};
    std::atomic<int> next_{0};
    std::atomic<bool> failed_{false};
    std::exception_ptr error_;
    void (*body_)(void*, int) = nullptr;
    void* context_ = nullptr;
    int count_ = 0;
    int helpers_ = 0;
    int caller_core_ = -1;
    std::vector<std::thread> workers_;
};

std::atomic<Pool*> current{nullptr};

Pool& pool() {
    static std::once_flag once;
    std::call_once(once, [] {
        current = new Pool;
        // A forked child has none of the threads: it starts over.
        pthread_atfork(nullptr, nullptr, [] { current = new Pool; });
    });
    return *current;
}

struct Scratch {
    ~Scratch() { std::free(memory); }
    void* memory = nullptr;
    long bytes = 0;
};

// Held from `offer` to `complete`.
thread_local std::unique_lock<std::mutex> offering;

}  // namespace

void parallel_for(int count, int threads, void (*body)(void*, int), void* context) {
    complete();
    if (count > 1 && threads > 1) {
        Pool& it = pool();
        std::unique_lock lock(it.busy, std::try_to_lock);
        if (lock) return it.run(count, threads < count ? threads : count, body, context);
    }
    for (int i = 0; i < count; i++) body(context, i);
}

void offer(void (*body)(void*, int), void* context) {
    complete();
    Pool& it = pool();
    std::unique_lock lock(it.busy, std::try_to_lock);
    if (!lock) return body(context, 0);
    it.open(1, 1, body, context);
    offering = std::move(lock);
}

void complete() {
    if (!offering.owns_lock()) return;
    const std::unique_lock lock = std::move(offering);
    pool().close();
}

void wait_awake(int microseconds) { spin_us.store(microseconds, std::memory_order_relaxed); }

void give_way() { giving_way.store(true, std::memory_order_relaxed); }

void* scratch(long bytes, int which) {
    thread_local Scratch kept[3];
    Scratch& own = kept[which];
    if (own.bytes < bytes) {
        std::free(own.memory);
        own.memory = nullptr, own.bytes = 0;
        const long rounded = (bytes + 4095) / 4096 * 4096;
        own.memory = std::aligned_alloc(4096, rounded);
        if (!own.memory) throw std::bad_alloc();
        own.bytes = rounded;
    }
    return own.memory;
}

}  // namespace farshore

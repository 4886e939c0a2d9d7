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

// For how long a pool thread waits busily for the next task. A longer wait takes the core from other threads.
std::atomic<int> spin_us{SPIN_US};

// Whether each pool thread adds GIVING_WAY_NICE to its nice value, once, before its next wait.
std::atomic<bool> giving_way{false};
constexpr int GIVING_WAY_NICE = 3;

static_assert(sizeof(std::atomic<uint32_t>) == sizeof(uint32_t) && std::atomic<uint32_t>::is_always_lock_free);

// Sleeps until wake_all(word). Returns at once if `word` is not `seen`. std::atomic::wait is not used on Linux, since
// it yields before it sleeps; spin_wait.h says why that is slow.
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

// Runs one task at a time. A pool thread joins a task by incrementing `inside_` while the task is open, so that the
// owner knows when the last thread has left the task and its memory may be freed.
class Pool {
  public:
    void run(int count, int threads, void (*body)(void*, int), void* context) {
        while (static_cast<int>(threads_.size()) < threads - 1) {
            try {
                threads_.emplace_back([this, id = static_cast<int>(threads_.size())] { run_thread(id); });
            } catch (const std::system_error&) {
                break;  // The system starts no more threads: the existing ones do the work.
            }
            caller_core_ = -1;
        }
#if defined(__linux__)
        keep_off(sched_getcpu());
#endif
        open(count, threads - 1, body, context);
        if (asleep_.load() > 0) wake_all(generation_);
        close();
    }

    // Publishes a task. Threads that wait busily join it; sleeping threads are not woken.
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

    // Works on the task, then ends it. Throws what a body threw.
    void close() {
        take_items();
        // Closed: no further thread joins. Threads inside have at most one item left each.
        inside_.fetch_sub(OPEN, std::memory_order_acq_rel);
        while (inside_.load(std::memory_order_acquire) != 0) relax();
        if (error_) std::rethrow_exception(std::exchange(error_, nullptr));
    }

    std::mutex busy;

  private:
    static constexpr int OPEN = 1 << 20;

#if defined(__linux__)
    // Keeps the pool's threads off the caller's core. A thread woken from sleep often starts on that core, and the
    // scheduler takes milliseconds to move one of two running threads away. (Measured on 2 cores after 100 ms of
    // idling: a task of 5.6 ms took a median of 11 ms.)
    void keep_off(int core) {
        if (core == caller_core_ || core < 0) return;
        caller_core_ = core;
        cpu_set_t others;
        // The affinity of the process, since that of the caller may be a single core: CoreFollower in
        // attention_offload/native/shard/shard.cpp sets it.
        if (sched_getaffinity(getpid(), sizeof others, &others) != 0) return;
        CPU_CLR(core, &others);
        if (CPU_COUNT(&others) == 0) return;
        for (std::thread& thread : threads_) pthread_setaffinity_np(thread.native_handle(), sizeof others, &others);
    }
#endif

    // Runs items until none is left. Keeps the first exception of a body (scratch memory may run out) for the caller;
    // no further item starts after it.
    void take_items() noexcept {
        try {
            for (int i; (i = next_.fetch_add(1, std::memory_order_relaxed)) < count_;) body_(context_, i);
        } catch (...) {
            next_.store(count_, std::memory_order_relaxed);
            if (!failed_.exchange(true)) error_ = std::current_exception();
        }
    }

    void run_thread(int id) {
        uint32_t seen = 0;
        [[maybe_unused]] bool gave_way = false;
        for (;;) {
#if defined(__linux__)
            // On Linux this changes the calling thread only.
            if (!gave_way && giving_way.load(std::memory_order_relaxed)) {
                gave_way = true;
                setpriority(PRIO_PROCESS, 0, getpriority(PRIO_PROCESS, 0) + GIVING_WAY_NICE);
            }
#endif
            SpinWait spin{std::chrono::microseconds(spin_us.load(std::memory_order_relaxed))};
            uint32_t generation;
            while ((generation = generation_.load()) == seen) {
                if (spin.keep_spinning()) continue;
                // Either the caller of run sees this increment, or this thread sees the new generation.
                asleep_.fetch_add(1);
                sleep_while(generation_, seen);
                asleep_.fetch_sub(1);
            }
            seen = generation;
            int inside = inside_.load(std::memory_order_acquire);
            while (inside >= OPEN && !inside_.compare_exchange_weak(inside, inside + 1)) relax();
            if (inside < OPEN) continue;
            if (id < helpers_) take_items();
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
    std::vector<std::thread> threads_;
};

std::atomic<Pool*> current{nullptr};

Pool& pool() {
    static std::once_flag once;
    std::call_once(once, [] {
        current = new Pool;
        // A forked child has none of the threads: it gets a new pool.
        pthread_atfork(nullptr, nullptr, [] { current = new Pool; });
    });
    return *current;
}

struct Scratch {
    ~Scratch() { std::free(memory); }
    void* memory = nullptr;
    long bytes = 0;
};

// The pool's lock from start_async to wait_async.
thread_local std::unique_lock<std::mutex> async_lock;

}  // namespace

void parallel_for(int count, int threads, void (*body)(void*, int), void* context) {
    wait_async();
    if (count > 1 && threads > 1) {
        Pool& shared = pool();
        std::unique_lock lock(shared.busy, std::try_to_lock);
        if (lock) return shared.run(count, threads < count ? threads : count, body, context);
    }
    for (int i = 0; i < count; i++) body(context, i);
}

void start_async(void (*body)(void*, int), void* context) {
    wait_async();
    Pool& shared = pool();
    std::unique_lock lock(shared.busy, std::try_to_lock);
    if (!lock) return body(context, 0);
    shared.open(1, 1, body, context);
    async_lock = std::move(lock);
}

void wait_async() {
    if (!async_lock.owns_lock()) return;
    const std::unique_lock lock = std::move(async_lock);
    pool().close();
}

void set_spin_us(int microseconds) { spin_us.store(microseconds, std::memory_order_relaxed); }

void give_way() { giving_way.store(true, std::memory_order_relaxed); }

void* scratch(long bytes, int buffer) {
    thread_local Scratch buffers[3];
    Scratch& kept = buffers[buffer];
    if (kept.bytes < bytes) {
        std::free(kept.memory);
        kept.memory = nullptr, kept.bytes = 0;
        const long rounded = (bytes + 4095) / 4096 * 4096;
        kept.memory = std::aligned_alloc(4096, rounded);
        if (!kept.memory) throw std::bad_alloc();
        kept.bytes = rounded;
    }
    return kept.memory;
}

}  // namespace farshore

// Busy waiting for a bounded time. It spares the wake-up from sleep, and takes a core meanwhile. Header only: used by
// the kernels' thread pool and by the connections of attention_offload.
#pragma once

#include <algorithm>
#include <chrono>

namespace farshore {

// A pause inside a loop that waits for another thread.
inline void relax() {
#if defined(__x86_64__)
    __builtin_ia32_pause();
#elif defined(__aarch64__)
    asm volatile("yield");
#endif
}

// The time left of one busy wait. Counts only the time in which the waiting thread ran: while another thread has the
// core, this thread could not have seen the event anyway.
//
// Never yields: a thread that yields to one of low priority may wait for that thread's whole time slice, which is
// milliseconds. (Where the two shared the cores, a step of SmolLM2 took a third longer.)
class SpinWait {
  public:
    explicit SpinWait(std::chrono::nanoseconds longest) : left_(longest) {}

    // Pauses briefly. Returns whether time is left: the caller then checks its condition once more.
    bool keep_spinning() {
        relax();
        const auto now = std::chrono::steady_clock::now();
        gap_ = now - last_;
        last_ = now;
        left_ -= std::min<std::chrono::nanoseconds>(gap_, LONGEST_CHECK);
        return left_.count() > 0;
    }

    // Whether another thread had the core between the last two calls of keep_spinning.
    bool interrupted() const { return gap_ > INTERRUPTION; }

  private:
    static constexpr std::chrono::nanoseconds LONGEST_CHECK{2'000}, INTERRUPTION{20'000};
    std::chrono::nanoseconds left_, gap_{0};
    std::chrono::steady_clock::time_point last_ = std::chrono::steady_clock::now();
};

}  // namespace farshore

// Waiting awake, for a bounded time: it spares the wake-up, and takes a core.
#pragma once

#include <algorithm>
#include <chrono>

namespace farshore {

inline void relax() {
#if defined(__x86_64__)
    __builtin_ia32_pause();
#elif defined(__aarch64__)
    asm volatile("yield");
#endif
}

// Counts only the time that the waiting thread itself had: not that of whoever took its core meanwhile, for
// which it need not have slept either. Never yields: who yields to a thread of low priority may wait for its whole
// time slice, milliseconds (where one shared the cores, a step of SmolLM2 took a third longer).
class Awake {
  public:
    explicit Awake(std::chrono::nanoseconds most) : left_(most) {}

    // Whether to look once more; after a short pause.
    bool once_more() {
        relax();
        const auto now = std::chrono::steady_clock::now();
        gap_ = now - last_;
        last_ = now;
        left_ -= std::min<std::chrono::nanoseconds>(gap_, LONGEST_LOOK);
        return left_.count() > 0;
    }

    // Somebody else had the core since the look before the last.
    bool interrupted() const { return gap_ > INTERRUPTED; }

  private:
    static constexpr std::chrono::nanoseconds LONGEST_LOOK{2'000}, INTERRUPTED{20'000};
    std::chrono::nanoseconds left_, gap_{0};
    std::chrono::steady_clock::time_point last_ = std::chrono::steady_clock::now();
};

}  // namespace farshore

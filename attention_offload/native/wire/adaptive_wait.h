// How one end of a connection waits for the next frame: busily for a bounded time, then asleep.
#pragma once

#include <algorithm>
#include <chrono>

#include "runtime/spin_wait.h"

namespace farshore::wire {

// Learns from past waits whether busy waiting pays, as the Linux kernel's haltpoll does. It sleeps at once where frames
// came later than the busy wait would have lasted, or where another thread had the core meanwhile. So neither an idle
// connection nor one whose ends share their cores costs any time.
class AdaptiveWait {
  public:
    // `longest`: the bound of a busy wait.
    explicit AdaptiveWait(std::chrono::nanoseconds longest) : longest_(longest) {}

    // Waits busily until `ready()` and returns true; or returns false: the caller then sleeps until the frame is there
    // and calls slept(). `needs_core()`: whether the sender of the frame needs the core of this thread, so that a busy
    // wait would delay it (measured: a hop took 61 us with a busy wait, 23 us asleep).
    template <class Ready, class NeedsCore>
    bool wait(Ready&& ready, NeedsCore&& needs_core) {
        if (ready()) return true;
        since_ = Clock::now();
        if (credit_ > 0) {
            for (SpinWait spin{longest_}; !needs_core() && spin.keep_spinning();) {
                if (ready()) {
                    credit_ = MAX_CREDIT;
                    return true;
                }
                if (spin.interrupted()) {
                    credit_ = 0;
                    break;
                }
            }
        }
        return false;
    }

    // The frame came after `wait` returned false.
    void slept() {
        const bool in_reach = Clock::now() - since_ <= longest_ + WAKING;
        credit_ = std::clamp(credit_ + (in_reach ? 1 : -1), 0, MAX_CREDIT);
    }

  private:
    using Clock = std::chrono::steady_clock;
    static constexpr int MAX_CREDIT = 4;
    // The time to wake a thread on an idle core of a virtual machine.
    static constexpr std::chrono::microseconds WAKING{50};

    std::chrono::nanoseconds longest_;
    int credit_ = 1;  // waits busily while above 0
    Clock::time_point since_;
};

}  // namespace farshore::wire

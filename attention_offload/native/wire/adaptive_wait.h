// How a connection's end waits for the next frame: awake for a bounded time, then asleep.
#pragma once

#include <algorithm>
#include <chrono>

#include "runtime/spin_wait.h"

namespace farshore::wire {

// Learns from a connection's own waits whether being awake is any use (as the kernel's haltpoll does): where
// frames come later than that, or somebody else had the core meanwhile, sleep comes at once. So an idle connection
// costs nothing, and neither does one whose ends share their cores.
class Patience {
  public:
    // `most`: how long to wait awake.
    explicit Patience(std::chrono::nanoseconds most) : most_(most) {}

    // Waits awake until `ready()`; or false: sleep, then call `slept`. `in_the_way()`: whether who is to send the
    // frame needs this very core (waiting awake for it took 61 us a hop, 23 asleep).
    template <class Ready, class InTheWay>
    bool wait(Ready&& ready, InTheWay&& in_the_way) {
        if (ready()) return true;
        since_ = Clock::now();
        if (hopes_ > 0) {
            for (Awake awake{most_}; !in_the_way() && awake.once_more();) {
                if (ready()) {
                    hopes_ = MOST_HOPES;
                    return true;
                }
                if (awake.interrupted()) {
                    hopes_ = 0;
                    break;
                }
            }
        }
        return false;
    }

    // A frame is there for which `wait` did not suffice.
    void slept() {
        const bool soon = Clock::now() - since_ <= most_ + WAKING;
        hopes_ = std::clamp(hopes_ + (soon ? 1 : -1), 0, MOST_HOPES);
    }

  private:
    using Clock = std::chrono::steady_clock;
    static constexpr int MOST_HOPES = 4;
    // What it takes to wake a thread on an idle core of a virtual machine.
    static constexpr std::chrono::microseconds WAKING{50};

    std::chrono::nanoseconds most_;
    int hopes_ = 1;
    Clock::time_point since_;
};

}  // namespace farshore::wire

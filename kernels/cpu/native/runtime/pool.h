// The thread pool of the kernels. Its threads wait busily for a short time between two tasks, then sleep.
#pragma once

namespace farshore {

// Calls body(context, i) once for each i in [0, count), on at most `threads` threads including the caller's, and
// returns when all calls are done. While another thread uses the pool, all calls run on the caller's thread: waiting
// for the pool would take longer. The first exception that a body throws is thrown here when all threads are done;
// items that have not started by then are left out.
void parallel_for(int count, int threads, void (*body)(void*, int), void* context);

template <class Body>
void parallel_for(int count, int threads, Body&& body) {
    parallel_for(count, threads, [](void* context, int i) { (*static_cast<Body*>(context))(i); }, &body);
}

// Offers body(context, 0) to a pool thread that is waiting busily, and returns at once. If the pool is in use, the
// body runs here instead. The task ends in wait_async, which every later use of the pool by this thread begins with.
void start_async(void (*body)(void*, int), void* context);
// Waits for this thread's task from start_async; runs it here if no pool thread took it. Throws what the body threw.
// Returns at once if there is no such task.
void wait_async();

// For how long pool threads wait busily for the next task (see spin_wait.h) before they sleep. The default bridges
// the gap between two calls of one native loop. It is too short where Python runs between two calls of a step, or
// where an attention worker shares the cores.
constexpr int SPIN_US = 20;
void set_spin_us(int microseconds);

// From now on the pool's threads, not their callers, have a lower priority (Linux only), so that a thread which wakes
// on the core of a busily waiting pool thread runs at once. Measured beside attention workers on the same two cores:
// the woken thread ran after 16 us, against 50 us in every second layer, in which the scheduler found that it had had
// its share. An unprivileged process cannot undo this.
void give_way();

// Scratch memory of the calling thread: at least `bytes`, aligned to 64. It is valid until the thread ends or asks
// the same buffer for more. A thread has three buffers: tasks use 0, the code that starts tasks uses 1 and 2.
void* scratch(long bytes, int buffer = 0);

}  // namespace farshore

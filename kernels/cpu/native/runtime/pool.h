// Threads that compute: they spin briefly for the next layer's work, then sleep.
#pragma once

namespace farshore {

// Calls body(context, i) once for each i in [0, count) on at most `threads` threads, the caller's included,
// and returns when all are done. When another caller has the pool, everything runs on this thread: waiting
// for the pool would take longer. What a body throws is thrown here, once all threads are done.
void parallel_for(int count, int threads, void (*body)(void*, int), void* context);

template <class Body>
void parallel_for(int count, int threads, Body&& body) {
    parallel_for(
        count, threads, [](void* context, int i) { (*static_cast<Body*>(context))(i); }, &body);
}

// Hands body(context, 0) to a worker that waits awake, if there is one, and returns. `complete` runs it if nobody does,
// and returns when it is done; so does whatever this thread gives the pool next. What it throws is thrown there.
void offer(void (*body)(void*, int), void* context);
void complete();

// Workers wait awake for the next task for that long (see awake.h), then sleep. At first SPIN_US, which bridges the
// gap between calls of one native loop. Where Python comes between two calls of a step, or an attention worker that
// shares the cores, that is too little.
constexpr int SPIN_US = 20;
void wait_awake(int microseconds);

// From now on workers, not their callers, have a somewhat lower priority (Linux): whoever wakes on the core where one
// waits awake runs at once. Measured beside attention workers on the same two cores: 16 us until it ran, or 50 in
// every second layer, when the kernel held that it had had its share. There is no way back without privileges.
void give_way();

// At least this many bytes of the thread's own scratch, aligned to 64; kept until the thread ends or more is
// asked for. A thread has three: a task takes 0, so that what runs it can hold 1 and 2.
void* scratch(long bytes, int which = 0);

}  // namespace farshore

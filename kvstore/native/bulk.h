// Whole ranges of bytes: what is too much to pass through the caches, and parity.
#pragma once

#include <cstdint>

namespace farshore::kv {

// memcpy past the caches: the lines written are not read first, which saves a third of the memory traffic of a
// bulk copy, and they push nothing out. For what is not read again soon. fence() before another thread reads it.
void stream_copy(uint8_t* to, const uint8_t* from, int64_t bytes);
void fence();

// to[i] ^= from[i]; the ranges do not overlap.
void exclusive_or(uint8_t* __restrict to, const uint8_t* __restrict from, int64_t bytes);

}  // namespace farshore::kv

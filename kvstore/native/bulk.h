// Whole ranges of bytes: what is too much to pass through the caches, and parity.
#pragma once

#include <cstdint>
#include <vector>

namespace farshore::kv {

// memcpy past the caches: the lines written are not read first, which saves a third of the memory traffic of a
// bulk copy, and they push nothing out. For what is not read again soon. fence() before another thread reads it.
void stream_copy(uint8_t* to, const uint8_t* from, int64_t bytes);
void fence();

// to[i] = sources[0][i] ^ sources[1][i] ^ ...; `to` overlaps none of them.
void exclusive_or(uint8_t* to, const std::vector<const uint8_t*>& sources, int64_t bytes);

}  // namespace farshore::kv

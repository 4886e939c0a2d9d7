// Operations on whole ranges of bytes: copies too large to pass through the caches, and parity.
#pragma once

#include <cstdint>
#include <vector>

namespace farshore::kv {

// A memcpy that writes past the caches. The lines written are not read first, which saves a third of the memory
// traffic of a large copy, and they evict nothing. Meant for memory that is not read again soon. Call
// flush_streamed() before another thread reads the target.
void stream_copy(uint8_t* to, const uint8_t* from, int64_t bytes);
void flush_streamed();

// to[i] = sources[0][i] ^ sources[1][i] ^ ... for i in [0, bytes). `to` must not overlap a source.
void exclusive_or(uint8_t* to, const std::vector<const uint8_t*>& sources, int64_t bytes);

}  // namespace farshore::kv

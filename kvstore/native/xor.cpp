#include "xor.h"

namespace farshore::kv {

// The compiler makes vectors of it, 16 bytes wide on any x86-64: faster than memory already.
void exclusive_or(uint8_t* __restrict to, const uint8_t* __restrict from, int64_t bytes) {
    for (int64_t i = 0; i < bytes; i++) to[i] ^= from[i];
}

}  // namespace farshore::kv

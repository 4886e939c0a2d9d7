// Parity: one range XORed into another.
#pragma once

#include <cstdint>

namespace farshore::kv {

// to[i] ^= from[i]; the ranges do not overlap.
void exclusive_or(uint8_t* __restrict to, const uint8_t* __restrict from, int64_t bytes);

}  // namespace farshore::kv

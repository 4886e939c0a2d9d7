#include "bulk.h"

#include <algorithm>
#include <cstring>

#ifdef __SSE2__
#include <emmintrin.h>
#endif

namespace farshore::kv {

#ifdef __SSE2__

void stream_copy(uint8_t* to, const uint8_t* from, int64_t bytes) {
    constexpr int64_t LINE = 64;
    const int64_t head = std::min<int64_t>(-reinterpret_cast<uintptr_t>(to) & (LINE - 1), bytes);
    std::memcpy(to, from, head);
    int64_t at = head;
    for (; at + LINE <= bytes; at += LINE) {
        const __m128i* source = reinterpret_cast<const __m128i*>(from + at);
        __m128i* target = reinterpret_cast<__m128i*>(to + at);
        const __m128i a = _mm_loadu_si128(source), b = _mm_loadu_si128(source + 1);
        const __m128i c = _mm_loadu_si128(source + 2), d = _mm_loadu_si128(source + 3);
        _mm_stream_si128(target, a);
        _mm_stream_si128(target + 1, b);
        _mm_stream_si128(target + 2, c);
        _mm_stream_si128(target + 3, d);
    }
    std::memcpy(to + at, from + at, bytes - at);
}

void fence() { _mm_sfence(); }

#else

void stream_copy(uint8_t* to, const uint8_t* from, int64_t bytes) { std::memcpy(to, from, bytes); }

void fence() {}

#endif

// The compiler makes vectors of it, 16 bytes wide on any x86-64: faster than memory already.
void exclusive_or(uint8_t* __restrict to, const uint8_t* __restrict from, int64_t bytes) {
    for (int64_t i = 0; i < bytes; i++) to[i] ^= from[i];
}

}  // namespace farshore::kv

#include "bytes.h"

#include <algorithm>
#include <cstring>

#ifdef __SSE2__
#include <emmintrin.h>
#endif

namespace farshore::kv {

#ifdef __SSE2__

void stream_copy(uint8_t* to, const uint8_t* from, int64_t bytes) {
    constexpr int64_t LINE = 64;
    const int64_t before_line = std::min<int64_t>(-reinterpret_cast<uintptr_t>(to) & (LINE - 1), bytes);
    std::memcpy(to, from, before_line);
    int64_t at = before_line;
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

void flush_streamed() { _mm_sfence(); }

#else

void stream_copy(uint8_t* to, const uint8_t* from, int64_t bytes) { std::memcpy(to, from, bytes); }

void flush_streamed() {}

#endif

// Reads all sources side by side: memory serves several streams in the time of one, and `to` is written once.
void exclusive_or(uint8_t* to, const std::vector<const uint8_t*>& sources, int64_t bytes) {
    typedef uint64_t Line __attribute__((vector_size(64)));  // the compiler splits it into registers
    int64_t at = 0;
    for (; at + int64_t{sizeof(Line)} <= bytes; at += sizeof(Line)) {
        Line sum = {};
        for (const uint8_t* source : sources) {
            Line line;
            std::memcpy(&line, source + at, sizeof line);
            sum ^= line;
        }
        std::memcpy(to + at, &sum, sizeof sum);
    }
    for (; at < bytes; at++) {
        uint8_t sum = 0;
        for (const uint8_t* source : sources) sum ^= source[at];
        to[at] = sum;
    }
}

}  // namespace farshore::kv

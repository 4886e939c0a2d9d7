#include "dense/gguf.h"

#include <algorithm>
#include <cstring>

#include "runtime/float16.h"
#include "runtime/pool.h"

namespace farshore {
namespace {

constexpr int BLOCK = 32;          // weights
constexpr int ROWS_PER_UNIT = 64;  // rows that a thread takes at a time

constexpr int Q4_BYTES = 20, Q8_BYTES = 34;  // of a GGUF block

// The float16 at p, which need not be aligned.
float float16_at(const uint8_t* p) {
    uint16_t value;
    std::memcpy(&value, p, 2);
    return float_of_float16(value);
}

// Writes the 32 weights of a block. d * integer is exact in float32, so only d * integer + m rounds: the
// values equal those of every other dequantiser in float32.
void dequantise(Storage storage, const uint8_t* block, float* to) {
    const float d = float16_at(block);
    if (storage == Storage::q8) {
        for (int i = 0; i < BLOCK; i++) to[i] = d * static_cast<int8_t>(block[2 + i]);
        return;
    }
    const float m = float16_at(block + 2);
    for (int i = 0; i < BLOCK / 2; i++) {
        to[i] = d * (block[4 + i] & 15) + m;
        to[i + BLOCK / 2] = d * (block[4 + i] >> 4) + m;
    }
}

template <class Body>
void over_rows(int64_t rows, int threads, Body&& body) {
    parallel_for(static_cast<int>((rows + ROWS_PER_UNIT - 1) / ROWS_PER_UNIT), threads, [&](int unit) {
        const int64_t first = int64_t{unit} * ROWS_PER_UNIT;
        for (int64_t row = first; row < std::min(rows, first + ROWS_PER_UNIT); row++) body(row);
    });
}

void pack_q4(const uint8_t* from, int64_t blocks, uint8_t* to) {
    const int64_t pairs = (blocks + 1) / 2;
    std::memset(to, 0, 40 * pairs);
    for (int64_t b = 0; b < blocks; b++) {
        const uint8_t* block = from + b * Q4_BYTES;
        // Four blocks share 16 words of 32 bits; two blocks that are left at the end share 16 words of 16
        // bits.
        const int word_bytes = b / 4 < pairs / 2 ? 4 : 2;
        uint8_t* bytes = to + b / 4 * 64 + b % 4;
        for (int l = 0; l < BLOCK / 2; l++) {
            const auto weight = [&](int i) {
                return i < BLOCK / 2 ? block[4 + i] & 15 : block[4 + i - BLOCK / 2] >> 4;
            };
            bytes[l * word_bytes] = weight(2 * l) | weight(2 * l + 1) << 4;
        }
        std::memcpy(to + 32 * pairs + 4 * b, block, 4);
    }
}

void pack_q8(const uint8_t* from, int64_t blocks, uint8_t* to) {
    for (int64_t b = 0; b < blocks; b++) {
        const uint8_t* block = from + b * Q8_BYTES + 2;
        for (int i = 0; i < BLOCK; i++) to[b * BLOCK + i % 2 * (BLOCK / 2) + i / 2] = block[i];
        std::memcpy(to + blocks * 32 + b * 2, from + b * Q8_BYTES, 2);
    }
}

}  // namespace

void unpack_blocks(Storage storage, const uint8_t* from, int64_t rows, int64_t blocks, Format format, void* to,
                   int threads) {
    const int size = storage == Storage::q8 ? Q8_BYTES : Q4_BYTES;
    over_rows(rows, threads, [&](int64_t row) {
        for (int64_t block = row * blocks; block < (row + 1) * blocks; block++) {
            float values[BLOCK];
            dequantise(storage, from + block * size, values);
            if (format == Format::f32) {
                std::memcpy(static_cast<float*>(to) + block * BLOCK, values, sizeof values);
            } else {
                uint16_t* out = static_cast<uint16_t*>(to) + block * BLOCK;
                for (int i = 0; i < BLOCK; i++) out[i] = bfloat16_of_float(values[i]);
            }
        }
    });
}

void pack_blocks(Storage storage, const uint8_t* from, int64_t rows, int64_t blocks, uint8_t* to, int threads) {
    over_rows(rows, threads, [&](int64_t row) {
        if (storage == Storage::q8)
            pack_q8(from + row * blocks * Q8_BYTES, blocks, to + row * blocks * Q8_BYTES);
        else
            pack_q4(from + row * blocks * Q4_BYTES, blocks, to + row * ((blocks + 1) / 2) * 40);
    });
}

}  // namespace farshore

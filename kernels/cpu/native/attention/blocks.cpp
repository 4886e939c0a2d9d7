#include "attention/blocks.h"

#include <algorithm>
#include <cstring>

#include "runtime/pool.h"

namespace farshore {
namespace {

constexpr int BLOCK = 32;
constexpr int ROWS_AT_A_TIME = 64;

constexpr int FOUR_BITS = 20, EIGHT_BITS = 34;  // bytes of a block: its scales, then its integers

// float16, by integers: exponent and mantissa in their place, then the exponents' bias by a product.
float half(const uint8_t* p) {
    uint16_t h;
    std::memcpy(&h, p, 2);
    uint32_t bits = (h & 0x7fffu) << 13;
    float f;
    std::memcpy(&f, &bits, 4);
    f *= 0x1p112f;
    std::memcpy(&bits, &f, 4);
    if ((h & 0x7c00) == 0x7c00) bits |= 0x7f800000;
    bits |= (h & 0x8000u) << 16;
    std::memcpy(&f, &bits, 4);
    return f;
}

// The 32 values; d i is exact in float32, so nothing is rounded but the last sum, as in any dequantiser.
void values_of(Storage storage, const uint8_t* block, float* to) {
    const float d = half(block);
    if (storage == Storage::q8) {
        for (int i = 0; i < BLOCK; i++) to[i] = d * static_cast<int8_t>(block[2 + i]);
        return;
    }
    const float m = half(block + 2);
    for (int i = 0; i < BLOCK / 2; i++) {
        to[i] = d * (block[4 + i] & 15) + m;
        to[i + BLOCK / 2] = d * (block[4 + i] >> 4) + m;
    }
}

uint16_t to_bf16(float x) {
    uint32_t bits;
    std::memcpy(&bits, &x, 4);
    return x == x ? (bits + 0x7fff + ((bits >> 16) & 1)) >> 16 : bits >> 16 | 0x40;
}

template <class Body>
void over_rows(int64_t rows, int threads, Body&& body) {
    parallel_for(static_cast<int>((rows + ROWS_AT_A_TIME - 1) / ROWS_AT_A_TIME), threads, [&](int unit) {
        const int64_t first = int64_t{unit} * ROWS_AT_A_TIME;
        for (int64_t row = first; row < std::min(rows, first + ROWS_AT_A_TIME); row++) body(row);
    });
}

void pack_four_bits(const uint8_t* from, int64_t blocks, uint8_t* to) {
    const int64_t pairs = (blocks + 1) / 2;
    std::memset(to, 0, 40 * pairs);
    for (int64_t b = 0; b < blocks; b++) {
        const uint8_t* block = from + b * FOUR_BITS;
        // Words of four blocks; at the end, where only two are left, half words.
        const int word_bytes = b / 4 < pairs / 2 ? 4 : 2;
        uint8_t* bytes = to + b / 4 * 64 + b % 4;
        for (int l = 0; l < BLOCK / 2; l++) {
            const auto weight = [&](int i) { return i < BLOCK / 2 ? block[4 + i] & 15 : block[4 + i - BLOCK / 2] >> 4; };
            bytes[l * word_bytes] = weight(2 * l) | weight(2 * l + 1) << 4;
        }
        std::memcpy(to + 32 * pairs + 4 * b, block, 4);
    }
}

void pack_eight_bits(const uint8_t* from, int64_t blocks, uint8_t* to) {
    for (int64_t b = 0; b < blocks; b++) {
        const uint8_t* block = from + b * EIGHT_BITS + 2;
        for (int i = 0; i < BLOCK; i++) to[b * BLOCK + i % 2 * (BLOCK / 2) + i / 2] = block[i];
        std::memcpy(to + blocks * 32 + b * 2, from + b * EIGHT_BITS, 2);
    }
}

}  // namespace

void unpack_blocks(Storage storage, const uint8_t* from, int64_t rows, int64_t blocks, Format format, void* to,
                   int threads) {
    const int size = storage == Storage::q8 ? EIGHT_BITS : FOUR_BITS;
    over_rows(rows, threads, [&](int64_t row) {
        for (int64_t at = row * blocks; at < (row + 1) * blocks; at++) {
            float values[BLOCK];
            values_of(storage, from + at * size, values);
            if (format == Format::f32) {
                std::memcpy(static_cast<float*>(to) + at * BLOCK, values, sizeof values);
            } else {
                uint16_t* out = static_cast<uint16_t*>(to) + at * BLOCK;
                for (int i = 0; i < BLOCK; i++) out[i] = to_bf16(values[i]);
            }
        }
    });
}

void pack_blocks(Storage storage, const uint8_t* from, int64_t rows, int64_t blocks, uint8_t* to, int threads) {
    over_rows(rows, threads, [&](int64_t row) {
        if (storage == Storage::q8)
            pack_eight_bits(from + row * blocks * EIGHT_BITS, blocks, to + row * blocks * EIGHT_BITS);
        else
            pack_four_bits(from + row * blocks * FOUR_BITS, blocks, to + row * ((blocks + 1) / 2) * 40);
    });
}

}  // namespace farshore

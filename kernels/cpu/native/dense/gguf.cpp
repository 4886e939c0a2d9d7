#include "dense/gguf.h"

#include <algorithm>
#include <cstring>

#include "runtime/float16.h"
#include "runtime/pool.h"

namespace farshore {
namespace {

constexpr int ROWS_PER_UNIT = 64;  // rows that a thread takes at a time

// The float16 at p, which need not be aligned.
float float16_at(const uint8_t* p) {
    uint16_t value;
    std::memcpy(&value, p, 2);
    return float_of_float16(value);
}

// -- GGUF's blocks -----------------------------------------------------------------------------------------

// Each `integers_` function writes a block's integers in the order of its weights.

void integers_q4(const uint8_t* block, uint8_t* to) {
    for (int i = 0; i < 16; i++) to[i] = block[4 + i] & 15, to[i + 16] = block[4 + i] >> 4;
}

void integers_q4_k(const uint8_t* block, uint8_t* to) {
    for (int pair = 0; pair < 4; pair++)
        for (int i = 0; i < 32; i++) {
            const uint8_t byte = block[16 + 32 * pair + i];
            to[64 * pair + i] = byte & 15, to[64 * pair + 32 + i] = byte >> 4;
        }
}

void integers_q6_k(const uint8_t* block, uint8_t* to) {
    for (int half = 0; half < 2; half++)
        for (int i = 0; i < 32; i++) {
            const uint8_t *low = block + 64 * half + i, *high = block + 128 + 32 * half + i;
            uint8_t* out = to + 128 * half + i;
            out[0] = (low[0] & 15) | (*high & 3) << 4;
            out[32] = (low[32] & 15) | (*high >> 2 & 3) << 4;
            out[64] = low[0] >> 4 | (*high >> 4 & 3) << 4;
            out[96] = low[32] >> 4 | *high >> 6 << 4;
        }
}

// Writes scale and minimum of the eight blocks of a q4_k block, alternately.
void scales_q4_k(const uint8_t* block, uint8_t* to) {
    const uint8_t* packed = block + 4;
    for (int i = 0; i < 4; i++) {
        to[2 * i] = packed[i] & 63;
        to[2 * i + 1] = packed[i + 4] & 63;
        to[2 * i + 8] = (packed[i + 8] & 15) | packed[i] >> 6 << 4;
        to[2 * i + 9] = packed[i + 8] >> 4 | packed[i + 4] >> 6 << 4;
    }
}

// Writes the weights of a block. Products of d, a scale and an integer are exact in float32, so only the sum with m
// rounds: the values equal those of every other dequantiser in float32.
void dequantise(Storage storage, const uint8_t* block, float* to) {
    uint8_t integers[256], scales[16];
    switch (storage) {
        case Storage::q4: {
            const float d = float16_at(block), m = float16_at(block + 2);
            integers_q4(block, integers);
            for (int i = 0; i < 32; i++) to[i] = d * integers[i] + m;
            return;
        }
        case Storage::q8: {
            const float d = float16_at(block);
            for (int i = 0; i < 32; i++) to[i] = d * static_cast<int8_t>(block[2 + i]);
            return;
        }
        case Storage::q4_k: {
            const float d = float16_at(block), m = float16_at(block + 2);
            integers_q4_k(block, integers);
            scales_q4_k(block, scales);
            for (int i = 0; i < 256; i++) to[i] = d * scales[i / 32 * 2] * integers[i] - m * scales[i / 32 * 2 + 1];
            return;
        }
        case Storage::q6_k: {
            const float d = float16_at(block + 208);
            integers_q6_k(block, integers);
            for (int i = 0; i < 256; i++) to[i] = d * static_cast<int8_t>(block[192 + i / 16]) * (integers[i] - 32);
            return;
        }
        case Storage::plain: return;
    }
}

// -- packed rows -------------------------------------------------------------------------------------------

// Where a chunk of a row lies: its integers, of WEIGHTS bytes, and its scales, of SCALES bytes.
struct Place {
    uint8_t *weights, *scales;
};
Place place(uint8_t* chunk, int slot, int weights, int scales) {
    return {chunk + slot * weights, chunk + PACKED_ROWS_TOGETHER * weights + slot * scales};
}

// Each `pack_` function packs a row of blocks as row `slot` of the rows that lie together at `to`.

void pack_q4(const uint8_t* from, int64_t blocks, uint8_t* to, int slot) {
    for (int64_t b = 0; b < blocks; b++, from += 20) {
        uint8_t integers[32];
        integers_q4(from, integers);
        // Four blocks share 16 words of 32 bits; two blocks that are left at the end share 16 words of 16
        // bits.
        const int count = b / 4 < (blocks + 1) / 4 ? 4 : 2;
        const Place at = place(to + b / 4 * PACKED_ROWS_TOGETHER * 80, slot, 16 * count, 4 * count);
        for (int l = 0; l < 16; l++) at.weights[l * count + b % 4] = integers[2 * l] | integers[2 * l + 1] << 4;
        std::memcpy(at.scales + b % 4 * 4, from, 4);
    }
}

void pack_q8(const uint8_t* from, int64_t blocks, uint8_t* to, int slot) {
    for (int64_t b = 0; b < blocks; b++, from += 34) {
        // Four blocks share a chunk; the blocks that are left at the end have one each.
        const bool four = b / 4 < blocks / 4;
        const int count = four ? 4 : 1, k = four ? b % 4 : 0;
        const int64_t before = b - k;
        const Place at = place(to + before * PACKED_ROWS_TOGETHER * 34, slot, 32 * count, 2 * count);
        for (int i = 0; i < 32; i++) at.weights[32 * k + i % 2 * 16 + i / 2] = from[2 + i];
        std::memcpy(at.scales + 2 * k, from, 2);
    }
}

void pack_q4_k(const uint8_t* from, int64_t blocks, uint8_t* to, int slot) {
    for (int64_t b = 0; b < blocks; b++, from += 144, to += PACKED_ROWS_TOGETHER * 148) {
        const Place at = place(to, slot, 128, 20);
        uint8_t integers[256];
        integers_q4_k(from, integers);
        for (int i = 0; i < 256; i += 2)
            at.weights[i / 128 * 64 + i / 32 % 4 + i % 32 * 2] = integers[i] | integers[i + 1] << 4;
        scales_q4_k(from, at.scales);
        std::memcpy(at.scales + 16, from, 4);
        at.scales[19] ^= 0x80;  // -dmin
    }
}

void pack_q6_k(const uint8_t* from, int64_t blocks, uint8_t* to, int slot) {
    for (int64_t b = 0; b < blocks; b++, from += 210, to += PACKED_ROWS_TOGETHER * 210) {
        const Place at = place(to, slot, 192, 18);
        uint8_t integers[256];
        uint32_t words[3][16] = {};
        integers_q6_k(from, integers);
        for (int l = 0; l < 16; l++) {
            const auto integer = [&](int field) { return uint32_t{integers[16 * field + l]}; };
            for (int field = 0; field < 15; field++) words[field / 5][l] |= integer(field) << 6 * (field % 5);
            for (int word = 0; word < 3; word++) words[word][l] |= (integer(15) >> 2 * word & 3) << 30;
        }
        std::memcpy(at.weights, words, sizeof words);
        std::memcpy(at.scales, from + 192, 18);
    }
}

template <class Body>
void over_rows(int64_t rows, int threads, Body&& body) {
    parallel_for(static_cast<int>((rows + ROWS_PER_UNIT - 1) / ROWS_PER_UNIT), threads, [&](int unit) {
        const int64_t first = int64_t{unit} * ROWS_PER_UNIT;
        for (int64_t row = first; row < std::min(rows, first + ROWS_PER_UNIT); row++) body(row);
    });
}

}  // namespace

BlockSize block_size(Storage storage) {
    switch (storage) {
        case Storage::q4: return {20, 32};
        case Storage::q8: return {34, 32};
        case Storage::q4_k: return {144, 256};
        case Storage::q6_k: return {210, 256};
        case Storage::plain: break;
    }
    return {};
}

void dequantise_blocks(Storage storage, const uint8_t* from, int64_t rows, int64_t blocks, float* to, int threads) {
    const BlockSize size = block_size(storage);
    over_rows(rows, threads, [&](int64_t row) {
        for (int64_t block = row * blocks; block < (row + 1) * blocks; block++)
            dequantise(storage, from + block * size.bytes, to + block * size.weights);
    });
}

void pack_blocks(Storage storage, const uint8_t* from, int64_t rows, int64_t blocks, uint8_t* to, int threads) {
    const BlockSize size = block_size(storage);
    const int64_t row_bytes = packed_row_bytes(storage, blocks * size.weights);
    // Zeros in the rows and blocks that pad it.
    std::memset(to, 0, packed_bytes(storage, rows, blocks * size.weights));
    over_rows(rows, threads, [&](int64_t row) {
        const uint8_t* blocks_of_row = from + row * blocks * size.bytes;
        const int slot = row % PACKED_ROWS_TOGETHER;
        uint8_t* packed = to + (row - slot) * row_bytes;
        switch (storage) {
            case Storage::q4: return pack_q4(blocks_of_row, blocks, packed, slot);
            case Storage::q8: return pack_q8(blocks_of_row, blocks, packed, slot);
            case Storage::q4_k: return pack_q4_k(blocks_of_row, blocks, packed, slot);
            case Storage::q6_k: return pack_q6_k(blocks_of_row, blocks, packed, slot);
            case Storage::plain: return;
        }
    });
}

}  // namespace farshore

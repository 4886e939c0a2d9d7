// How rows of K and V lie in blocks, and the copies of rows into and out of them.
#pragma once

#include <cstdint>

namespace farshore::kv {

constexpr int SCALE_ELEMENTS = 64;

// Formats and types have the numbers of CODES in kernels/formats.py.
enum class Format { FLOAT32, BFLOAT16, FLOAT16, INT8, INT4, FLOAT64 };

// Of the rows on the other side of a copy. STORED: the bytes of a stored row, its scales behind its payload.
enum class Type { FLOAT32 = 0, BFLOAT16 = 1, FLOAT16 = 2, FLOAT64 = 5, STORED = 6 };

// K or V of a layer: `heads` runs of [token][payload], then [token][scales].
struct Side {
    int heads;
    int dim;
    int64_t row_bytes;  // payload of one token
    int scales;         // of one token, in bfloat16
    int64_t run_bytes;
    int64_t offset;  // of the first run in the layer
};

struct Layout {
    Format format;
    int block_tokens;
    int64_t layer_bytes;
    Side k;
    Side v;  // no heads where V is the beginning of K
};

// `count` tokens from slot `slot` of the block at `block`.
struct Stretch {
    uint8_t* block;
    int slot;
    int count;
};

// Rows outside of blocks; strides in bytes, elements of a row adjacent.
struct Rows {
    uint8_t* data;
    int64_t layer_stride;
    int64_t head_stride;
    int64_t token_stride;
};

// Copies `count` rows at `rows`, `stride` bytes apart, to the slots from `slot` on of the run at `run`. `stream`:
// past the caches where it can be, see bulk.h.
void put(const Layout&, const Side&, Type, const uint8_t* rows, int64_t stride, uint8_t* run, int slot, int count,
         bool stream = false);

// The way back; a quantised run gives STORED rows or FLOAT32.
void take(const Layout&, const Side&, Type, uint8_t* rows, int64_t stride, const uint8_t* run, int slot, int count);

}  // namespace farshore::kv

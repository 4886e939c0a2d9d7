// The layout of K and V rows in blocks, and copies of rows into and out of one block.
#pragma once

#include <cstdint>

namespace farshore::kv {

constexpr int SCALE_ELEMENTS = 64;  // elements of a quantised row that share one bfloat16 scale

// Formats of blocks, with the numbers of CODES in kernels/formats.py. Elements of the float formats are copied as they
// are.
enum class Format { FLOAT32, BFLOAT16, FLOAT16, INT8, INT4, FLOAT64 };

// Rows outside of blocks have the numbers of DTYPE_CODES. STORED: the bytes of a stored row, its scales after its
// elements.
enum class RowType { FLOAT32 = 0, BFLOAT16 = 1, FLOAT16 = 2, FLOAT64 = 5, STORED = 6 };

// K or V of one layer in a block: a run for each head; a run holds the elements of all tokens, then all their scales.
struct Side {
    int heads;
    int dim;
    int64_t row_bytes;  // elements of one token
    int scales;         // of one token, bfloat16
    int64_t run_bytes;
    int64_t offset;  // of the first run in the layer
};

struct Layout {
    Format format;
    int block_tokens;
    int64_t layer_bytes;
    Side k;
    Side v;  // no heads if V is the beginning of K
};

// The tokens in slots [slot, slot + count) of the block at `block`.
struct BlockTokens {
    uint8_t* block;
    int slot;
    int count;
};

// Rows outside of blocks, [layers, heads, tokens]. Strides in bytes; the elements of a row are adjacent.
struct TokenRows {
    uint8_t* data;
    int64_t layer_stride;
    int64_t head_stride;
    int64_t token_stride;
};

// Copies `count` rows, `stride` bytes apart, to the slots from `slot` on of the run at `run`, and converts them to the
// layout's format. `stream`: past the caches where rows are adjacent in both places; see bytes.h.
void write_rows(const Layout&, const Side&, RowType, const uint8_t* rows, int64_t stride, uint8_t* run, int slot,
                int count, bool stream = false);

// The reverse copy. For a quantised format `rows` are STORED or FLOAT32.
void read_rows(const Layout&, const Side&, RowType, uint8_t* rows, int64_t stride, const uint8_t* run, int slot,
               int count);

}  // namespace farshore::kv

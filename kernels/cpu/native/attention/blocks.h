// A GGUF file's blocks of 32 weights, Q4_1 (q4) and Q8_0 (q8): to plain rows, and to the packed rows of
// kernels/cpu/packed.py.
#pragma once

#include "dense/dense.h"

namespace farshore {

// `rows` rows of `blocks` blocks each, one after the other on both sides; `format` f32 or bf16.
void unpack_blocks(Storage storage, const uint8_t* from, int64_t rows, int64_t blocks, Format format, void* to,
                   int threads);
void pack_blocks(Storage storage, const uint8_t* from, int64_t rows, int64_t blocks, uint8_t* to, int threads);

}  // namespace farshore

// Converts weights of a GGUF file: to float32, and to the packed rows that packed.h reads. Called by dense/binding.cpp
// for kernels/cpu/packed.py, whose docstring gives the packed layouts.
//
// A GGUF block of each Storage:
// - q4 (Q4_1), 32 weights: float16 d, float16 m, 16 bytes; byte i holds the integers of weight i (low nibble) and of
//   weight 16 + i; a weight is d * integer + m.
// - q8 (Q8_0), 32 weights: float16 d, 32 int8; a weight is d * integer.
// - q4_k (Q4_K), 256 weights: float16 d, float16 dmin, 12 bytes with eight scales and eight minima of six bits, 128
//   bytes; of each 32 bytes, byte i holds the integers of weight i of one block of 32 (low nibble) and of the next
//   block; a weight is d * scale * integer - dmin * minimum.
// - q6_k (Q6_K), 256 weights: 128 bytes with the low four bits of the integers, 64 with their high two bits, int8
// scales
//   of each 16 weights, float16 d; a weight is d * scale * (integer - 32).
#pragma once

#include "dense/dense.h"

namespace farshore {

// The bytes and the weights of a GGUF block.
struct BlockSize {
    int bytes, weights;
};
BlockSize block_size(Storage storage);

// Dequantises rows [rows][blocks] of GGUF blocks to float32 [rows][weights]. Runs on at most `threads` threads.
void dequantise_blocks(Storage storage, const uint8_t* from, int64_t rows, int64_t blocks, float* to, int threads);

// Reorders rows [rows][blocks] of GGUF blocks to a packed matrix at `to`, of packed_bytes. Keeps all bits.
void pack_blocks(Storage storage, const uint8_t* from, int64_t rows, int64_t blocks, uint8_t* to, int threads);

}  // namespace farshore

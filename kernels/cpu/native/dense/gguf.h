// Converts weights of a GGUF file: to plain rows, and to the packed rows that weights.h reads. Called by
// dense/binding.cpp for kernels/cpu/packed.py, whose docstring gives the packed layout.
//
// A GGUF block is 32 weights. Q4_1 (Storage::q4): float16 d, float16 m, 16 bytes; byte i holds the integers
// of weight i (low nibble) and of weight 16 + i; a weight is d * integer + m. Q8_0 (Storage::q8): float16 d,
// 32 int8; a weight is d * integer.
#pragma once

#include "dense/dense.h"

namespace farshore {

// Dequantises rows [rows][blocks] of GGUF blocks at `from` to [rows][32 * blocks] at `to`, in `format`, f32
// or bf16 (rounded to nearest even). Runs on at most `threads` threads.
void unpack_blocks(Storage storage, const uint8_t* from, int64_t rows, int64_t blocks, Format format, void* to,
                   int threads);

// Reorders rows [rows][blocks] of GGUF blocks to packed rows at `to`, which lie end to end. Keeps all bits.
void pack_blocks(Storage storage, const uint8_t* from, int64_t rows, int64_t blocks, uint8_t* to, int threads);

}  // namespace farshore

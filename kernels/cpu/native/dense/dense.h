// The types of the dense kernels: what a decoder layer computes outside of attention, that is, norms,
// projections, rotary embedding and the gated MLP. Called by dense/binding.cpp.
//
// All memory belongs to the caller and must outlive the call. Weights and activations have one format, f32 or
// bf16.
#pragma once

#include "attention/plan.h"

namespace farshore {

// How the rows of a matrix are stored: as values in the layer's format, or packed, with the integers and scales of
// GGUF's types Q4_1, Q8_0, Q4_K or Q6_K. kernels/cpu/packed.py gives the layouts of packed rows.
enum class Storage : int32_t { plain, q4, q8, q4_k, q6_k };

// Packed rows start a new chunk at every multiple of so many weights.
constexpr int PACKED_GROUP = 256;
// Rows whose chunks lie together, because kernels read so many rows at once: one stream of memory is read faster than
// several. The number of rows is padded to a multiple.
constexpr int PACKED_ROWS_TOGETHER = 8;

// Bytes that a packed row takes, of `in` weights, a multiple of 32, or of 256 for q4_k and q6_k.
constexpr int64_t packed_row_bytes(Storage storage, int64_t in) {
    switch (storage) {
        case Storage::q4: return (in + 63) / 64 * 40;
        case Storage::q8: return in / 32 * 34;
        case Storage::q4_k: return in / PACKED_GROUP * 148;
        case Storage::q6_k: return in / PACKED_GROUP * 210;
        case Storage::plain: break;
    }
    return 0;
}

// Bytes of a packed matrix.
constexpr int64_t packed_bytes(Storage storage, int64_t out, int64_t in) {
    const int64_t rows = (out + PACKED_ROWS_TOGETHER - 1) / PACKED_ROWS_TOGETHER * PACKED_ROWS_TOGETHER;
    return rows * packed_row_bytes(storage, in);
}

// A matrix. Packed weights stand for bfloat16 values, so a layer with packed matrices has the format bf16.
struct Linear {
    const void* rows;  // [out][in] values, or packed
    const void* bias;  // [out]; null: none
    int out, in;
    Storage storage;
};

// The weights of one decoder layer.
struct DecoderLayer {
    Format format;  // f32 or bf16
    int threads;
    float eps;
    int head_dim;
    int64_t positions;                      // rows of cos and sin
    const void *cos, *sin;                  // [positions][head_dim / 2]
    const void *attention_norm, *mlp_norm;  // [hidden]
    Linear q, k, v, o, gate, up, down;
};

// The final norm and the projection to the vocabulary.
struct LmHead {
    Format format;
    int threads;
    float eps;
    const void* norm;  // [hidden]
    Linear vocabulary;
};

// The dense kernels of one instruction set. Arrays are contiguous [rows][n], in the layer's format. Sums are
// float32; results are rounded to the format wherever PyTorch's operations round. The bits of a row depend on
// the other rows only through their number: whether it is above FEW_ROWS (dense/few_rows.h).
//   x            [rows][hidden], normalised (in `input`: not normalised)
//   h            [rows][hidden], the residual stream
//   positions    [rows], each < DecoderLayer::positions; q and k are rotated by them
//   q, k, v, o   [rows][heads * head_dim]
struct DenseKernels {
    // out = norm(x), by attention_norm.
    void (*input)(const DecoderLayer&, const void* x, int rows, void* out);
    // q from x.
    void (*query)(const DecoderLayer&, const void* x, int rows, const int64_t* positions, void* q);
    // k and v from x.
    void (*key_value)(const DecoderLayer&, const void* x, int rows, const int64_t* positions, void* k, void* v);
    // q, k and v from h: input, query and key_value together.
    void (*project)(const DecoderLayer&, const void* h, int rows, const int64_t* positions, void* q, void* k, void* v);
    // out = the layer's output, from its input h and the attention output o.
    void (*finish)(const DecoderLayer&, const void* h, const void* o, int rows, void* out);
    // out: float32 [rows][vocabulary], of values rounded to the format.
    void (*logits)(const LmHead&, const void* h, int rows, float* out);
    // out: bfloat16 [count][in], rows `numbers` [count] of a packed matrix. Each number is below matrix.out.
    void (*unpack)(const Linear& matrix, const int64_t* numbers, int64_t count, int threads, uint16_t* out);
};

}  // namespace farshore

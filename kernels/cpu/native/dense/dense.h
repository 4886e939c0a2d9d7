// The types of the dense kernels: what a decoder layer computes outside of attention, that is, norms,
// projections, rotary embedding and the gated MLP. Called by dense/binding.cpp.
//
// All memory belongs to the caller and must outlive the call. Weights and activations have one format, f32 or
// bf16.
#pragma once

#include "attention/plan.h"

namespace farshore {

// How packed weights are stored: not at all, or quantised to four or eight bits. kernels/cpu/packed.py gives
// the layout.
enum class Storage : int32_t { none, q4, q8 };

// A matrix, and the same matrix packed. Packed rows hold exactly the values of `weight` in fewer bytes;
// products with few rows read them instead.
struct Linear {
    const void* weight;  // [out][in]
    const void* bias;    // [out]; null: none
    int out, in;
    const uint8_t* packed;  // rows [out]; null if storage is none
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
};

}  // namespace farshore

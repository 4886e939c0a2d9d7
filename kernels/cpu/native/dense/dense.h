// What a decoder layer computes outside of attention: norms, projections, rotation, the gated MLP. Memory is the
// caller's; weights lie as PyTorch has them, [out][in], in one format with the activations.
#pragma once

#include "attention/plan.h"

namespace farshore {

// A matrix's second form, for few rows: `packed` in kernels/cpu/dense.py says how it lies.
enum class Storage : int32_t { none, q4, q8 };

struct Linear {
    const void* weight;
    const void* bias;  // null: none
    int out, in;
    const uint8_t* packed;  // the very values of `weight`, in fewer bytes; null where storage is none
    Storage storage;
};

struct Dense {
    Format format;  // f32 or bf16
    int threads;
    float eps;
    int head_dim;
    int64_t positions;  // rows of the rotation table
    const void *cos, *sin;
    const void *attention_norm, *mlp_norm;
    Linear q, k, v, o, gate, up, down;
};

// The last norm and the vocabulary.
struct Head {
    Format format;
    int threads;
    float eps;
    const void* norm;
    Linear vocabulary;
};

// Rows of x and out lie end to end. Values are rounded to the format where PyTorch's operations round them, and
// summed in float32. A row's bits depend on the other rows only through their number: up to FEW_ROWS, or more.
struct DenseKernels {
    void (*input)(const Dense&, const void* x, int rows, void* out);
    void (*query)(const Dense&, const void* x, int rows, const int64_t* positions, void* q);
    void (*key_value)(const Dense&, const void* x, int rows, const int64_t* positions, void* k, void* v);
    void (*project)(const Dense&, const void* h, int rows, const int64_t* positions, void* q, void* k, void* v);
    void (*finish)(const Dense&, const void* h, const void* o, int rows, void* out);
    void (*logits)(const Head&, const void* h, int rows, float* out);
};

}  // namespace farshore

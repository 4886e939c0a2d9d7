// What every instruction set's kernels share: a step's work, laid out as jobs before the first layer runs.
#pragma once

#include <cstdint>
#include <vector>

namespace farshore {

enum class Format : int32_t { f32, bf16, f16, i8, i4 };

constexpr int SCALE_ELEMENTS = 64;  // elements of a quantised row that share one bfloat16 scale

// Static shape of attention inside one head group.
struct Shape {
    int q_heads;  // per group, as k_heads and v_heads
    int k_heads;
    int v_heads;
    int k_dim;
    int v_dim;
    float scale;
    float soft_cap;  // 0: none
};

// Tokens of one head group that lie at a constant distance: a stretch of a block, or of a plain tensor.
struct Tokens {
    const uint8_t* k;
    const uint8_t* v;
    int64_t k_stride, v_stride;            // bytes from token to token
    int64_t k_head_stride, v_head_stride;  // bytes from head to head of the group
    const uint8_t* k_scales;               // of the first token and head; heads at the same stride
    const uint8_t* v_scales;
    int64_t k_scale_stride, v_scale_stride;
    int count;
    int64_t position;  // of the first token
};

// Tokens of one head group, in blocks at a constant stride.
struct Span {
    int64_t base;         // byte offset of the first block
    int64_t stride;       // bytes from block to block
    int64_t layer_bytes;  // inside a block
    int64_t k_offset;     // inside a layer: first K head of the group
    int64_t v_offset;
    int first;  // slot, counted from the first block
    int count;
    int64_t position;  // of the first token
};

// One state to compute: `rows` query rows, one head group, the spans [span0, span1) in this order.
struct Job {
    int row;
    int rows;
    int group;  // counted from the first group that q holds
    int span0;
    int span1;
    int64_t slot;  // of its first (row, head) state in the scratch; -1: the only state of its rows, goes out
};

// Merges the states of one (row, group) in work-list order.
struct Reduction {
    int row;
    int group;
    int part0;
    int part1;  // into Plan::parts
};

struct Plan {
    Shape shape;
    Format format;
    bool v_in_k;
    int64_t window;  // tokens; INT64_MAX: none
    int block_tokens;
    int64_t k_row_bytes, v_row_bytes, k_run_bytes, v_run_bytes;
    int k_scales, v_scales;  // per row
    const uint8_t* memory;
    std::vector<int64_t> positions;  // of query rows
    std::vector<Span> spans;
    std::vector<Job> jobs;
    std::vector<int> chunks;  // chunk c is jobs [chunks[c], chunks[c + 1])
    std::vector<Reduction> reductions;
    std::vector<int64_t> parts;   // slots
    std::vector<int> untouched;   // row * groups + group without work
    int rows, groups;             // of q and out
    int threads;
    std::vector<float> slot_o;    // [slots][v_dim], normalised
    std::vector<float> slot_lse;  // [slots]
};

// The work list as it comes from Python; see kernels/base.py for the meaning of each column.
struct WorkList {
    int items;
    const int32_t *row, *rows, *segment;
    const int16_t *group0, *group1;
    const int64_t *base, *stride;
    const int32_t *first, *count, *position;
    const int16_t *stored0, *stored1;
    int group0_of_q;
};

// Fills everything after `positions`. Splits over KV length so that `threads` threads have equal work.
void lay_out(Plan& plan, const WorkList& work);

// A strided array of attention rows: element (row, head, i) at data + row * row_stride + head * head_stride
// + i, strides in elements.
struct Array {
    void* data;
    int64_t row_stride, head_stride;
    Format format;  // f32, bf16 or f16
};

struct Out {
    Array o;
    float* lse;
    int64_t lse_row_stride, lse_head_stride;
};

// Causal attention of `rows` new tokens on `keys` plain keys; k_stride and so on in bytes.
struct Extension {
    Shape shape;
    int groups;
    Format format;
    int64_t window;
    Tokens tokens;  // of group 0
    int64_t k_group_stride, v_group_stride;
    int rows;
    const int64_t* positions;
    int threads;
};

struct Merge {
    int count;
    const Out* states;  // [count], read only
    const float* sink;  // [heads], or null
    int rows, heads, v_dim;
};

struct DenseKernels;

// The kernels of one instruction set.
struct Kernels {
    const char* name;
    void (*partial)(Plan&, int layer, const Array& q, const Out& out);
    void (*extend)(const Extension&, const Array& q, const Out& out);
    void (*merge)(const Merge&, const Out& out);
    const DenseKernels& dense;
};

const Kernels& portable_kernels();
#if defined(__x86_64__)
const Kernels& avx2_kernels();
const Kernels& avx512_kernels();
const Kernels& avx512_bf16_kernels();
const Kernels& amx_kernels();
#endif

}  // namespace farshore

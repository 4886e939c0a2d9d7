// The types of the attention kernels: what binding.cpp passes to them, and the kernel plan. Included by all
// kernel code; must not depend on an instruction set.
//
// A kernel plan is made once for one set of segments and rows, and used for all layers: it divides the work
// list into work units for the threads (lay_out), before the first layer runs.
//
// The logit of a query and a token is scale * q.k, or soft_cap * tanh(scale * q.k / soft_cap) if soft_cap is
// not 0. Every lse is a natural logarithm.
#pragma once

#include <cstdint>
#include <vector>

namespace farshore {

// How an element is stored. The launchers in kernels/cpu pass these numbers.
enum class Format : int32_t { f32, bf16, f16, i8, i4 };

constexpr int SCALE_ELEMENTS = 64;  // elements of a quantised row that share one bfloat16 scale

// The static shape of attention inside one KV-head group.
struct Shape {
    int q_heads;  // of one group, as k_heads and v_heads
    int k_heads;
    int v_heads;
    int k_dim;
    int v_dim;
    float scale;
    float soft_cap;  // 0: none
};

// K and V of one group for a run of tokens at a constant distance: a piece of a block, or plain tensors.
struct TokenRun {
    const uint8_t* k;  // first token, first head
    const uint8_t* v;
    int64_t k_stride, v_stride;            // bytes from token to token
    int64_t k_head_stride, v_head_stride;  // bytes from head to head of the group, of payload and of scales
    const uint8_t* k_scales;               // bfloat16, of the first token and head; read only if quantised
    const uint8_t* v_scales;
    int64_t k_scale_stride, v_scale_stride;  // bytes from token to token
    int count;                               // tokens
    int64_t position;                        // of the first token; the others follow it
};

// The tokens of a segment that a work unit reads, for one group: stored in blocks at a constant stride.
struct Segment {
    int64_t base;         // byte offset of the first block in Plan::memory
    int64_t stride;       // bytes from block to block
    int64_t layer_bytes;  // of one layer in a block
    int64_t k_offset;     // bytes from the layer's beginning to the group's first K head
    int64_t v_offset;
    int first;         // first token's place, counted from the first block's first token
    int count;         // tokens
    int64_t position;  // of the first token
};

// The state of `rows` query rows for one group over segments [segment0, segment1), in this order.
struct WorkUnit {
    int row;
    int rows;
    int group;  // counted from the first group that q holds
    int segment0;
    int segment1;
    // Where the states [head][row] go: from here on in Plan::state_o and state_lse, to be merged with those
    // of other units; or -1, straight to the output, if no other unit has these rows and this group.
    int64_t first_state;
};

// A merge of the states that several units computed for one row and group, in the work list's order.
struct StateMerge {
    int row;
    int group;
    int source0;  // range [source0, source1) of Plan::merge_sources, two numbers a unit
    int source1;
};

// A kernel plan. Serves one call at a time: a call writes state_o and state_lse. lay_out fills `segments` to
// `empty_states`, state_o and state_lse; its caller the other members.
struct Plan {
    Shape shape;
    Format format;   // of stored KV
    bool v_in_k;     // V is the beginning of each row of K
    int64_t window;  // tokens that a row sees, its own included; INT64_MAX: all
    int block_tokens;
    int64_t k_row_bytes, v_row_bytes;  // payload of one token of one head
    int64_t k_run_bytes, v_run_bytes;  // one head of one layer in one block
    int k_scales, v_scales;            // of one token of one head
    const uint8_t* memory;
    std::vector<int64_t> positions;  // of query rows
    std::vector<Segment> segments;
    std::vector<WorkUnit> units;
    std::vector<int> chunks;  // chunk c is units [chunks[c], chunks[c + 1]); a thread takes a chunk at a time
    std::vector<StateMerge> state_merges;
    // Two numbers for each unit of a merge: its state of the row's first head, and the distance to the next
    // head's.
    std::vector<int64_t> merge_sources;
    std::vector<int> empty_states;  // row * groups + group, for those that read no token
    int rows, groups;               // of q and of the output
    int threads;
    std::vector<float> state_o;    // [states][v_dim], normalised
    std::vector<float> state_lse;  // [states]
};

// The work list as Python passes it: one array per column. kernels/base.py gives the meaning of each column.
struct WorkList {
    int items;
    const int32_t *row, *rows, *segment;
    const int16_t *group0, *group1;
    const int64_t *base, *stride;
    const int32_t *first, *count, *position;
    const int16_t *stored0, *stored1;
    int group0_of_q;
};

// Divides the work list into the plan's units. Splits over KV length, so that `threads`
// threads get equal work.
void lay_out(Plan& plan, const WorkList& work);

// Rows [rows][heads][dim]: element (row, head, i) is at data + row * row_stride + head * head_stride + i.
// Strides in elements.
struct RowArray {
    void* data;
    int64_t row_stride, head_stride;
    Format format;  // f32, bf16 or f16
};

// Attention states: o [rows][heads][v_dim], lse float32 [rows][heads] (natural log). Strides in elements.
struct StateArray {
    RowArray o;
    float* lse;
    int64_t lse_row_stride, lse_head_stride;
};

// Arguments of extend: causal attention of `rows` new tokens over plain keys that contain them.
struct ExtendArguments {
    Shape shape;
    int groups;
    Format format;                           // of K and V
    int64_t window;                          // tokens; INT64_MAX: all
    TokenRun tokens;                         // of group 0
    int64_t k_group_stride, v_group_stride;  // bytes
    int rows;
    const int64_t* positions;  // [rows]
    int threads;
};

// Arguments of merge.
struct MergeArguments {
    int count;
    const StateArray* states;  // [count], of [rows][heads]; only read
    const float* sink;         // logits [heads]; null: none
    int rows, heads, v_dim;
};

struct DenseKernels;

// The kernels of one instruction set. q: [rows][heads][k_dim]; out: [rows][heads][v_dim] and [rows][heads].
struct Kernels {
    const char* name;
    // The state of each row over the plan's segments, of one layer; (0, -inf) where a row reads no token.
    void (*partial)(Plan&, int layer, const RowArray& q, const StateArray& out);
    // The state of each row over the keys at positions up to its own, and inside its window.
    void (*extend)(const ExtendArguments&, const RowArray& q, const StateArray& out);
    // Merges states of disjoint token sets, in the order given, and the sink.
    void (*merge)(const MergeArguments&, const StateArray& out);
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

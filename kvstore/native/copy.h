// The copies that Python calls: many ranges of tokens at once, and the appends of a decode step.
#pragma once

#include <vector>

#include "rows.h"

namespace farshore::kv {

// Where consecutive tokens lie: one range of slots per block, in token order.
struct StoredTokens {
    Layout layout;
    std::vector<BlockTokens> blocks;
};

// Copies the rows of layers [first_layer, last_layer) between k, v and the blocks, on at most `threads` threads:
// scatter writes the blocks, gather reads them. k and v hold the same layers, and as many tokens as the blocks' ranges.
void scatter(const StoredTokens&, int first_layer, int last_layer, RowType, const TokenRows& k, const TokenRows& v,
             int threads);
void gather(const StoredTokens&, int first_layer, int last_layer, RowType, const TokenRows& k, const TokenRows& v,
            int threads);

// What one step appends to one tail: tokens [first, last). kvstore/store/tail.py keeps the tail's marks.
struct TailAppend {
    enum { FREED, END, WRITTEN };  // indices into marks; WRITTEN + layer: one past the layer's last token
    int64_t* marks;
    int64_t freed;  // the mark FREED when the step's blocks were reserved
    int64_t first;
    int64_t last;
};

struct StepAppend {
    StoredTokens tokens;
    std::vector<TailAppend> tails;
};

// Writes one layer of all rows and moves the marks; returns -1. If a tail was truncated since, or would get a hole in
// this layer, nothing is written and the tail's index is returned. Not thread-safe for one tail.
int append(const StepAppend&, int layer, RowType, const TokenRows& k, const TokenRows& v);

}  // namespace farshore::kv

// Whole calls: many stretches of tokens at once, and a decode step's appends.
#pragma once

#include <vector>

#include "rows.h"

namespace farshore::kv {

// Where n tokens lie, in token order.
struct Places {
    Layout layout;
    std::vector<Stretch> stretches;
};

// The k and v of layers [first_layer, last_layer), heads and tokens at the strides given.
void scatter(const Places&, int first_layer, int last_layer, Type, const Rows& k, const Rows& v, int threads);
void gather(const Places&, int first_layer, int last_layer, Type, const Rows& k, const Rows& v, int threads);

// A tail's marks, as kvstore/tail.py keeps them, and what one step appends to it.
struct Growth {
    enum { FREED, END, WRITTEN };  // indices into marks; WRITTEN + layer: one past the layer's last token
    int64_t* marks;
    int64_t freed;  // as it was when the places were taken
    int64_t first;
    int64_t last;
};

struct Batch {
    Places places;
    std::vector<Growth> growths;
};

// One token of each row in one layer, and the marks moved. Or, where a tail's marks forbid it, nothing is done
// and its index in `growths` returned; -1 if done.
int append(const Batch&, int layer, Type, const Rows& k, const Rows& v);

}  // namespace farshore::kv

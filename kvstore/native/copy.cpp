#include "copy.h"

#include <algorithm>
#include <system_error>
#include <thread>

#include "bulk.h"

namespace farshore::kv {
namespace {

// Less than this a thread: starting one takes as long as copying it. (20 µs at 10 GB/s.)
constexpr int64_t LEAST_BYTES_A_THREAD = 256 << 10;

// From here on a write goes past the caches: half of a core's own, and who reads it comes after the other layers.
constexpr int64_t LEAST_BYTES_STREAMED = 1 << 20;

// Calls body(i) for each i in [0, count), cut into `threads` equal parts. Plain threads: a bulk copy takes
// milliseconds, and a pool would have to sleep between two of them anyway.
template <class Body>
void parallel(int64_t count, int64_t bytes, int threads, const Body& body) {
    const int64_t parts = std::clamp<int64_t>(std::min(bytes / LEAST_BYTES_A_THREAD, count), 1, std::max(threads, 1));
    auto part = [&](int64_t i) {
        for (int64_t at = count * i / parts; at < count * (i + 1) / parts; at++) body(at);
    };
    std::vector<std::jthread> helpers;
    int64_t started = 1;
    try {
        for (; started < parts; started++) helpers.emplace_back(part, started);
    } catch (const std::system_error&) {
        // The machine gives no more threads: what they would have copied is this one's.
    }
    part(0);
    for (int64_t i = started; i < parts; i++) part(i);
}

int64_t bytes_of(const Places& places, int layers) {
    int64_t tokens = 0;
    for (const Stretch& it : places.stretches) tokens += it.count;
    return layers * tokens * places.layout.layer_bytes / places.layout.block_tokens;
}

// Calls copy(side, rows of the stretch's first token, run, stretch) for each run of each stretch and layer.
template <class Copy>
void each_run(const Places& places, int first_layer, int last_layer, const Rows& k, const Rows& v, int threads,
              const Copy& copy) {
    const Layout& layout = places.layout;
    std::vector<int64_t> before;  // tokens before each stretch
    int64_t tokens = 0;
    for (const Stretch& it : places.stretches) {
        before.push_back(tokens);
        tokens += it.count;
    }
    const int64_t heads = layout.k.heads + layout.v.heads, stretches = places.stretches.size();
    const int64_t layers = last_layer - first_layer;
    // A layer's stretches outermost: what one thread copies is adjacent in each block.
    parallel(layers * stretches * heads, bytes_of(places, layers), threads, [&](int64_t item) {
        const int64_t layer = item / (stretches * heads), i = item / heads % stretches, head = item % heads;
        const bool is_k = head < layout.k.heads;
        const Side& side = is_k ? layout.k : layout.v;
        const Rows& rows = is_k ? k : v;
        const int64_t own = is_k ? head : head - layout.k.heads;
        const Stretch& to = places.stretches[i];
        copy(side, rows.data + layer * rows.layer_stride + own * rows.head_stride + before[i] * rows.token_stride,
             rows.token_stride, to.block + (first_layer + layer) * layout.layer_bytes + side.offset + own * side.run_bytes,
             to);
    });
}

}  // namespace

void scatter(const Places& places, int first_layer, int last_layer, Type type, const Rows& k, const Rows& v, int threads) {
    const bool stream = bytes_of(places, last_layer - first_layer) >= LEAST_BYTES_STREAMED;
    each_run(places, first_layer, last_layer, k, v, threads,
             [&](const Side& side, const uint8_t* rows, int64_t stride, uint8_t* run, const Stretch& to) {
                 put(places.layout, side, type, rows, stride, run, to.slot, to.count, stream);
                 if (stream) fence();
             });
}

void gather(const Places& places, int first_layer, int last_layer, Type type, const Rows& k, const Rows& v, int threads) {
    each_run(places, first_layer, last_layer, k, v, threads,
             [&](const Side& side, uint8_t* rows, int64_t stride, const uint8_t* run, const Stretch& from) {
                 take(places.layout, side, type, rows, stride, run, from.slot, from.count);
             });
}

int append(const Batch& batch, int layer, Type type, const Rows& k, const Rows& v) {
    for (size_t i = 0; i < batch.growths.size(); i++) {
        const Growth& it = batch.growths[i];
        const int64_t* marks = it.marks;
        if (marks[Growth::FREED] != it.freed || it.first < marks[Growth::END] || it.first > marks[Growth::WRITTEN + layer])
            return static_cast<int>(i);
    }
    const Layout& layout = batch.places.layout;
    const auto one = [&](const Side& side, const Rows& rows) {
        const uint8_t* from = rows.data;
        for (const Stretch& to : batch.places.stretches) {
            uint8_t* run = to.block + layer * layout.layer_bytes + side.offset;
            for (int head = 0; head < side.heads; head++)
                put(layout, side, type, from + head * rows.head_stride, rows.token_stride, run + head * side.run_bytes,
                    to.slot, to.count);
            from += to.count * rows.token_stride;
        }
    };
    one(layout.k, k);
    one(layout.v, v);
    for (const Growth& it : batch.growths) {
        int64_t& written = it.marks[Growth::WRITTEN + layer];
        written = std::max(written, it.last);
    }
    return -1;
}

}  // namespace farshore::kv

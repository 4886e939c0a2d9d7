#include "copy.h"

#include <algorithm>
#include <system_error>
#include <thread>

#include "bytes.h"

namespace farshore::kv {
namespace {

// A thread copies at least this much: to start it takes as long as to copy this (20 us at 10 GB/s).
constexpr int64_t LEAST_BYTES_A_THREAD = 256 << 10;

// Writes of at least this much go past the caches: it is half of a core's own cache, and the reader comes after the
// other layers were written.
constexpr int64_t LEAST_BYTES_STREAMED = 1 << 20;

// Calls body(i) for each i in [0, count), in equal shares on `threads` threads. The threads are started for each call:
// a large copy takes milliseconds, and a pool's threads would sleep between two copies anyway.
template <class Body>
void parallel(int64_t count, int64_t bytes, int threads, const Body& body) {
    const int64_t shares = std::clamp<int64_t>(std::min(bytes / LEAST_BYTES_A_THREAD, count), 1, std::max(threads, 1));
    auto run_share = [&](int64_t share) {
        for (int64_t i = count * share / shares; i < count * (share + 1) / shares; i++) body(i);
    };
    std::vector<std::jthread> helpers;
    int64_t started = 1;
    try {
        for (; started < shares; started++) helpers.emplace_back(run_share, started);
    } catch (const std::system_error&) {
        // The system starts no more threads: this thread runs the remaining shares.
    }
    run_share(0);
    for (int64_t share = started; share < shares; share++) run_share(share);
}

int64_t bytes_of(const StoredTokens& stored, int layers) {
    int64_t tokens = 0;
    for (const BlockTokens& range : stored.blocks) tokens += range.count;
    return layers * tokens * stored.layout.layer_bytes / stored.layout.block_tokens;
}

// Calls copy(side, rows, stride of rows, run, range) for each range of tokens, layer and head; `rows` is the row of the
// range's first token.
template <class Copy>
void each_run(const StoredTokens& stored, int first_layer, int last_layer, const TokenRows& k, const TokenRows& v,
              int threads, const Copy& copy) {
    const Layout& layout = stored.layout;
    std::vector<int64_t> tokens_before;  // of each range
    int64_t tokens = 0;
    for (const BlockTokens& range : stored.blocks) {
        tokens_before.push_back(tokens);
        tokens += range.count;
    }
    const int64_t heads = layout.k.heads + layout.v.heads, ranges = stored.blocks.size();
    const int64_t layers = last_layer - first_layer;
    // Heads vary fastest, so that a thread's share is adjacent memory in each block.
    parallel(layers * ranges * heads, bytes_of(stored, layers), threads, [&](int64_t item) {
        const int64_t layer = item / (ranges * heads), i = item / heads % ranges, head = item % heads;
        const bool is_k = head < layout.k.heads;
        const Side& side = is_k ? layout.k : layout.v;
        const TokenRows& rows = is_k ? k : v;
        const int64_t head_of_side = is_k ? head : head - layout.k.heads;
        const BlockTokens& range = stored.blocks[i];
        uint8_t* run =
            range.block + (first_layer + layer) * layout.layer_bytes + side.offset + head_of_side * side.run_bytes;
        copy(side,
             rows.data + layer * rows.layer_stride + head_of_side * rows.head_stride +
                 tokens_before[i] * rows.token_stride,
             rows.token_stride, run, range);
    });
}

}  // namespace

void scatter(const StoredTokens& stored, int first_layer, int last_layer, RowType type, const TokenRows& k,
             const TokenRows& v, int threads) {
    const bool stream = bytes_of(stored, last_layer - first_layer) >= LEAST_BYTES_STREAMED;
    each_run(stored, first_layer, last_layer, k, v, threads,
             [&](const Side& side, const uint8_t* rows, int64_t stride, uint8_t* run, const BlockTokens& range) {
                 write_rows(stored.layout, side, type, rows, stride, run, range.slot, range.count, stream);
                 if (stream) flush_streamed();
             });
}

void gather(const StoredTokens& stored, int first_layer, int last_layer, RowType type, const TokenRows& k,
            const TokenRows& v, int threads) {
    each_run(stored, first_layer, last_layer, k, v, threads,
             [&](const Side& side, uint8_t* rows, int64_t stride, const uint8_t* run, const BlockTokens& range) {
                 read_rows(stored.layout, side, type, rows, stride, run, range.slot, range.count);
             });
}

int append(const StepAppend& step, int layer, RowType type, const TokenRows& k, const TokenRows& v) {
    for (size_t i = 0; i < step.tails.size(); i++) {
        const TailAppend& tail = step.tails[i];
        const int64_t* marks = tail.marks;
        if (marks[TailAppend::FREED] != tail.freed || tail.first < marks[TailAppend::END] ||
            tail.first > marks[TailAppend::WRITTEN + layer])
            return static_cast<int>(i);
    }
    const Layout& layout = step.tokens.layout;
    const auto write_side = [&](const Side& side, const TokenRows& rows) {
        const uint8_t* from = rows.data;
        for (const BlockTokens& range : step.tokens.blocks) {
            uint8_t* run = range.block + layer * layout.layer_bytes + side.offset;
            for (int head = 0; head < side.heads; head++)
                write_rows(layout, side, type, from + head * rows.head_stride, rows.token_stride,
                           run + head * side.run_bytes, range.slot, range.count);
            from += range.count * rows.token_stride;
        }
    };
    write_side(layout.k, k);
    write_side(layout.v, v);
    for (const TailAppend& tail : step.tails) {
        int64_t& written = tail.marks[TailAppend::WRITTEN + layer];
        written = std::max(written, tail.last);
    }
    return -1;
}

}  // namespace farshore::kv

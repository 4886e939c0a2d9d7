#include "attention/plan.h"

#include <algorithm>
#include <tuple>

namespace farshore {
namespace {

// Below this a second thread saves less than it costs to be told, which is little where it waits awake (a tail of
// 100 KiB: 8.5 us on one thread, 6.4 on two).
constexpr int64_t MIN_CHUNK_BYTES = 48 << 10;
// Chunks per thread: a thread that the host slows down leaves the rest of its share to the others.
constexpr int CHUNKS_PER_THREAD = 4;
constexpr int SPLIT_TOKENS = 64;  // cuts fall on multiples of half the kernels' tile

struct Item {
    int row, rows, group, segment, order;
};

// Jobs are for at most this many rows x heads: bounds the scratch, and gives threads something to share. Whole panels
// of lanes.h.
constexpr int MAX_JOB_QUERIES = 240;

std::vector<Item> items_of(const WorkList& work, int q_heads) {
    const int most_rows = std::max(1, MAX_JOB_QUERIES / q_heads);
    std::vector<Item> items;
    for (int i = 0; i < work.items; i++)
        for (int group = work.group0[i]; group < work.group1[i]; group++)
            for (int at = 0; at < work.rows[i]; at += most_rows)
                items.push_back({work.row[i] + at, std::min(most_rows, work.rows[i] - at), group,
                                 work.segment[i], i});
    // What belongs to one state comes together, in work-list order.
    std::stable_sort(items.begin(), items.end(), [](const Item& a, const Item& b) {
        return std::tie(a.row, a.rows, a.group, a.order) < std::tie(b.row, b.rows, b.group, b.order);
    });
    return items;
}

// The item's tokens, less those that no row of it may see. count 0: none.
Span span_of(const Plan& plan, const WorkList& work, const Item& item) {
    const int s = item.segment;
    const auto first_row = plan.positions.begin() + item.row;
    const auto [lowest, highest] = std::minmax_element(first_row, first_row + item.rows);
    const int64_t position = work.position[s];
    int64_t end = std::min<int64_t>(work.count[s], *highest - position + 1);
    int64_t begin = 0;
    if (plan.window != INT64_MAX) begin = std::max<int64_t>(0, *lowest - plan.window + 1 - position);
    const int64_t stored = work.stored1[s] - work.stored0[s];
    const int64_t at = item.group - work.stored0[s];
    const int64_t k_bytes = stored * plan.shape.k_heads * plan.k_run_bytes;
    const int64_t v_bytes = plan.v_in_k ? 0 : stored * plan.shape.v_heads * plan.v_run_bytes;
    Span span;
    span.base = work.base[s];
    span.stride = work.stride[s];
    span.layer_bytes = k_bytes + v_bytes;
    span.k_offset = at * plan.shape.k_heads * plan.k_run_bytes;
    span.v_offset = plan.v_in_k ? span.k_offset : k_bytes + at * plan.shape.v_heads * plan.v_run_bytes;
    span.first = work.first[s] + static_cast<int>(begin);
    span.count = static_cast<int>(std::max<int64_t>(0, end - begin));
    span.position = position + begin;
    return span;
}

bool same_state(const Item& a, const Item& b) {
    return a.row == b.row && a.rows == b.rows && a.group == b.group;
}

}  // namespace

void lay_out(Plan& plan, const WorkList& work) {
    const Shape& shape = plan.shape;
    const std::vector<Item> items = items_of(work, shape.q_heads);
    std::vector<Span> whole;
    for (const Item& item : items) whole.push_back(span_of(plan, work, item));

    const int64_t token_bytes = shape.k_heads * plan.k_row_bytes + shape.v_heads * plan.v_row_bytes;
    int64_t tokens = 0;
    for (const Span& span : whole) tokens += span.count;
    const int64_t wanted = std::min<int64_t>(
        plan.threads > 1 ? plan.threads * CHUNKS_PER_THREAD : 1,
        std::max<int64_t>(1, tokens * token_bytes / MIN_CHUNK_BYTES));
    const int64_t chunk_tokens =
        (tokens / wanted + SPLIT_TOKENS) / SPLIT_TOKENS * SPLIT_TOKENS;

    // Walk all tokens once, cutting where a chunk is full and where the state changes.
    plan.chunks = {0};
    int64_t room = chunk_tokens;
    bool open = false;
    for (size_t i = 0; i < items.size(); i++) {
        const Item& item = items[i];
        Span rest = whole[i];
        open = open && i > 0 && same_state(items[i - 1], item);
        while (rest.count > 0) {
            if (room <= 0) {
                plan.chunks.push_back(static_cast<int>(plan.jobs.size()));
                room = chunk_tokens;
                open = false;
            }
            if (!open) {
                const int at = static_cast<int>(plan.spans.size());
                plan.jobs.push_back({item.row, item.rows, item.group - work.group0_of_q, at, at, -1});
                open = true;
            }
            Span piece = rest;
            if (piece.count > room) {
                // The cut is at a tile's end, counted in slots: later tiles then start aligned.
                const int cut = static_cast<int>((rest.first + room) / SPLIT_TOKENS * SPLIT_TOKENS - rest.first);
                piece.count = cut > 0 ? cut : static_cast<int>(room);
            }
            plan.spans.push_back(piece);
            plan.jobs.back().span1++;
            room -= piece.count;
            if (piece.count < rest.count) room = 0;
            rest.first += piece.count;
            rest.position += piece.count;
            rest.count -= piece.count;
        }
    }
    plan.chunks.push_back(static_cast<int>(plan.jobs.size()));

    // Who contributes to each (row, group), in order.
    std::vector<std::vector<std::pair<int, int>>> of(static_cast<size_t>(plan.rows) * plan.groups);
    for (size_t j = 0; j < plan.jobs.size(); j++) {
        const Job& job = plan.jobs[j];
        for (int r = 0; r < job.rows; r++)
            of[static_cast<size_t>(job.row + r) * plan.groups + job.group].push_back({static_cast<int>(j), r});
    }
    std::vector<bool> alone(plan.jobs.size(), true);
    for (const auto& parts : of)
        if (parts.size() > 1)
            for (const auto& [job, row] : parts) alone[job] = false;
    int64_t slots = 0;
    for (size_t j = 0; j < plan.jobs.size(); j++)
        if (!alone[j]) {
            plan.jobs[j].slot = slots;
            slots += static_cast<int64_t>(plan.jobs[j].rows) * shape.q_heads;
        }
    for (size_t at = 0; at < of.size(); at++) {
        const int row = static_cast<int>(at) / plan.groups, group = static_cast<int>(at) % plan.groups;
        if (of[at].empty()) {
            plan.untouched.push_back(static_cast<int>(at));
        } else if (plan.jobs[of[at][0].first].slot >= 0) {
            const int part0 = static_cast<int>(plan.parts.size());
            // A slot holds [head][row] of its job; a part names the first head's.
            for (const auto& [job, r] : of[at]) {
                plan.parts.push_back(plan.jobs[job].slot + r);
                plan.parts.push_back(plan.jobs[job].rows);
            }
            plan.reductions.push_back({row, group, part0, static_cast<int>(plan.parts.size())});
        }
    }
    plan.slot_o.resize(static_cast<size_t>(slots) * shape.v_dim);
    plan.slot_lse.resize(static_cast<size_t>(slots));
}

}  // namespace farshore

#include "attention/plan.h"

#include <algorithm>
#include <tuple>

namespace farshore {
namespace {

// With less work, a second thread saves less than handing it over costs. That cost is small if the thread
// spins (a tail of 100 KiB: 8.5 us on one thread, 6.4 on two).
constexpr int64_t MIN_CHUNK_BYTES = 48 << 10;
// Chunks per thread: if the host slows a thread down, the other threads take the chunks that it has not
// begun.
constexpr int CHUNKS_PER_THREAD = 4;
constexpr int SPLIT_TOKENS = 64;  // chunks end on multiples of this, half of DECODE_TILE_TOKENS

// Most rows x heads of a work unit: bounds the scratch memory, and gives the threads units to share. A
// multiple of the panels of prefill_f32.h (48 queries).
constexpr int MAX_UNIT_QUERIES = 240;

// A piece of the work list: one group and at most MAX_UNIT_QUERIES rows x heads.
struct Item {
    int row, rows, group;
    int segment;  // index into the work list's segment columns
    int order;    // index of the work list's item
};

// Splits the work list into items, sorted so that the items of one state are adjacent and in the work list's
// order.
std::vector<Item> split_items(const WorkList& work, int q_heads) {
    const int max_rows = std::max(1, MAX_UNIT_QUERIES / q_heads);
    std::vector<Item> items;
    for (int i = 0; i < work.items; i++)
        for (int group = work.group0[i]; group < work.group1[i]; group++)
            for (int done = 0; done < work.rows[i]; done += max_rows)
                items.push_back(
                    {work.row[i] + done, std::min(max_rows, work.rows[i] - done), group, work.segment[i], i});
    std::stable_sort(items.begin(), items.end(), [](const Item& a, const Item& b) {
        return std::tie(a.row, a.rows, a.group, a.order) < std::tie(b.row, b.rows, b.group, b.order);
    });
    return items;
}

// The item's tokens, less those at its ends that no row of it may see. count is 0 if none is left.
Segment visible_tokens(const Plan& plan, const WorkList& work, const Item& item) {
    const int s = item.segment;
    const auto first_row = plan.positions.begin() + item.row;
    const auto [lowest, highest] = std::minmax_element(first_row, first_row + item.rows);
    const int64_t position = work.position[s];
    int64_t end = std::min<int64_t>(work.count[s], *highest - position + 1);
    int64_t begin = 0;
    if (plan.window != INT64_MAX) begin = std::max<int64_t>(0, *lowest - plan.window + 1 - position);
    const int64_t stored_groups = work.stored1[s] - work.stored0[s];
    const int64_t group = item.group - work.stored0[s];
    const int64_t k_bytes = stored_groups * plan.shape.k_heads * plan.k_run_bytes;
    const int64_t v_bytes = plan.v_in_k ? 0 : stored_groups * plan.shape.v_heads * plan.v_run_bytes;
    Segment segment;
    segment.base = work.base[s];
    segment.stride = work.stride[s];
    segment.layer_bytes = k_bytes + v_bytes;
    segment.k_offset = group * plan.shape.k_heads * plan.k_run_bytes;
    segment.v_offset = plan.v_in_k ? segment.k_offset : k_bytes + group * plan.shape.v_heads * plan.v_run_bytes;
    segment.first = work.first[s] + static_cast<int>(begin);
    segment.count = static_cast<int>(std::max<int64_t>(0, end - begin));
    segment.position = position + begin;
    return segment;
}

bool same_state(const Item& a, const Item& b) { return a.row == b.row && a.rows == b.rows && a.group == b.group; }

// Tokens of a chunk, if all chunks are to be equal.
int64_t tokens_per_chunk(const Plan& plan, const std::vector<Segment>& visible) {
    const int64_t token_bytes = plan.shape.k_heads * plan.k_row_bytes + plan.shape.v_heads * plan.v_row_bytes;
    int64_t tokens = 0;
    for (const Segment& segment : visible) tokens += segment.count;
    const int64_t chunks = std::min<int64_t>(plan.threads > 1 ? plan.threads * CHUNKS_PER_THREAD : 1,
                                             std::max<int64_t>(1, tokens * token_bytes / MIN_CHUNK_BYTES));
    return (tokens / chunks + SPLIT_TOKENS) / SPLIT_TOKENS * SPLIT_TOKENS;
}

// Fills segments, units and chunks: walks the visible tokens once. A new chunk begins where one is full, and
// a new unit begins with each chunk and each state.
void fill_units(Plan& plan, const WorkList& work) {
    const std::vector<Item> items = split_items(work, plan.shape.q_heads);
    std::vector<Segment> visible;
    for (const Item& item : items) visible.push_back(visible_tokens(plan, work, item));
    const int64_t chunk_tokens = tokens_per_chunk(plan, visible);
    plan.chunks = {0};
    int64_t room = chunk_tokens;  // tokens left in the chunk
    bool open = false;            // whether the last unit may take more tokens
    for (size_t i = 0; i < items.size(); i++) {
        const Item& item = items[i];
        Segment rest = visible[i];
        open = open && i > 0 && same_state(items[i - 1], item);
        while (rest.count > 0) {
            if (room <= 0) {
                plan.chunks.push_back(static_cast<int>(plan.units.size()));
                room = chunk_tokens;
                open = false;
            }
            if (!open) {
                const int segment = static_cast<int>(plan.segments.size());
                plan.units.push_back({item.row, item.rows, item.group - work.group0_of_q, segment, segment, -1});
                open = true;
            }
            Segment piece = rest;
            if (piece.count > room) {
                // Ends at a multiple of SPLIT_TOKENS in the segment, so that later tiles start aligned.
                const int aligned = static_cast<int>((rest.first + room) / SPLIT_TOKENS * SPLIT_TOKENS - rest.first);
                piece.count = aligned > 0 ? aligned : static_cast<int>(room);
            }
            plan.segments.push_back(piece);
            plan.units.back().segment1++;
            room -= piece.count;
            if (piece.count < rest.count) room = 0;
            rest.first += piece.count;
            rest.position += piece.count;
            rest.count -= piece.count;
        }
    }
    plan.chunks.push_back(static_cast<int>(plan.units.size()));
}

// Fills what follows from the units: where their states go, which are merged, and which stay empty.
void fill_merges(Plan& plan) {
    struct Source {
        int unit;
        int row;  // inside the unit
    };
    // Of each (row, group), in the work list's order.
    std::vector<std::vector<Source>> sources(static_cast<size_t>(plan.rows) * plan.groups);
    for (size_t u = 0; u < plan.units.size(); u++) {
        const WorkUnit& unit = plan.units[u];
        for (int r = 0; r < unit.rows; r++)
            sources[static_cast<size_t>(unit.row + r) * plan.groups + unit.group].push_back({static_cast<int>(u), r});
    }
    std::vector<bool> merged(plan.units.size(), false);
    for (const auto& of_state : sources)
        if (of_state.size() > 1)
            for (const Source& source : of_state) merged[source.unit] = true;
    int64_t states = 0;
    for (size_t u = 0; u < plan.units.size(); u++)
        if (merged[u]) {
            plan.units[u].first_state = states;
            states += static_cast<int64_t>(plan.units[u].rows) * plan.shape.q_heads;
        }
    for (size_t i = 0; i < sources.size(); i++) {
        const int row = static_cast<int>(i) / plan.groups, group = static_cast<int>(i) % plan.groups;
        if (sources[i].empty()) {
            plan.empty_states.push_back(static_cast<int>(i));
        } else if (plan.units[sources[i][0].unit].first_state >= 0) {
            const int source0 = static_cast<int>(plan.merge_sources.size());
            for (const Source& source : sources[i]) {
                const WorkUnit& unit = plan.units[source.unit];
                plan.merge_sources.push_back(unit.first_state + source.row);
                plan.merge_sources.push_back(unit.rows);
            }
            plan.state_merges.push_back({row, group, source0, static_cast<int>(plan.merge_sources.size())});
        }
    }
    plan.state_o.resize(static_cast<size_t>(states) * plan.shape.v_dim);
    plan.state_lse.resize(static_cast<size_t>(states));
}

}  // namespace

void lay_out(Plan& plan, const WorkList& work) {
    fill_units(plan, work);
    fill_merges(plan);
}

}  // namespace farshore

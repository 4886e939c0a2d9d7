// The entry points partial() and extend() of one instruction set: they choose the algorithm for a format and
// a number of queries, and run a kernel plan's work units on the thread pool. Included by simd/isa_kernels.h
// after decode.h, prefill_f32.h and prefill_bf16.h. merge() is in merge.h.

namespace farshore {
namespace ISA {

// The arithmetic that dispatch() chooses for units with more queries than decode.h takes. This one is
// float32.
struct F32Arithmetic {
    template <Format F>
    using Prefill = PrefillF32<F>;
    struct TileScope {};  // no state of the CPU to set up
};
#if defined(HAS_BF16_DOT)
#if defined(HAS_AMX)
typedef AmxTiles Products;
#else
typedef Bf16Pairs Products;
#endif
// bfloat16 products with float32 sums.
struct Bf16Arithmetic {
    template <Format F>
    using Prefill = PrefillBf16<Products, F>;
    typedef Products::TileScope TileScope;
};
#endif

// The tile of a segment, of at most `tile` tokens, that begins `done` tokens behind its first. Tiles end on
// multiples of `tile` and at the ends of blocks, so the first tile of an unaligned segment is short.
inline TokenRun tile_of(const Plan& plan, const Segment& segment, int done, int tile, int layer) {
    const int in_block = (segment.first + done) % plan.block_tokens;
    const uint8_t* in_layer = plan.memory + segment.base + (segment.first + done) / plan.block_tokens * segment.stride +
                              layer * segment.layer_bytes;
    const uint8_t* k = in_layer + segment.k_offset;
    const uint8_t* v = in_layer + segment.v_offset;
    TokenRun t;
    t.k = k + in_block * plan.k_row_bytes;
    t.v = v + in_block * plan.v_row_bytes;
    t.k_stride = plan.k_row_bytes;
    t.v_stride = plan.v_row_bytes;
    t.k_head_stride = plan.k_run_bytes;
    t.v_head_stride = plan.v_run_bytes;
    t.k_scale_stride = 2 * plan.k_scales;
    t.v_scale_stride = 2 * plan.v_scales;
    t.k_scales = k + plan.block_tokens * plan.k_row_bytes + in_block * t.k_scale_stride;
    t.v_scales = v + plan.block_tokens * plan.v_row_bytes + in_block * t.v_scale_stride;
    t.count = std::min(std::min(tile - in_block % tile, plan.block_tokens - in_block), segment.count - done);
    t.position = segment.position + done;
    return t;
}

// Adds the segment's tokens, of one layer, to the state of a DecodeAttention or of a Prefill*.
template <Format F, bool INTEGERS>
void update_from_segment(DecodeAttention<F, INTEGERS>& attention, const Plan& plan, const Segment& segment, int layer) {
    TokenRun tile{};
    if (segment.count) tile = tile_of(plan, segment, 0, attention.tile_tokens, layer);
    for (int done = 0; done < segment.count;) {
        done += tile.count;
        TokenRun next{};
        if (done < segment.count) next = tile_of(plan, segment, done, attention.tile_tokens, layer);
        attention.update(tile, next);
        tile = next;
    }
}

template <class Prefill>
void update_from_segment(Prefill& attention, const Plan& plan, const Segment& segment, int layer) {
    for (int done = 0; done < segment.count;) {
        const TokenRun tile = tile_of(plan, segment, done, attention.tile_tokens, layer);
        done += tile.count;
        Prefetch prefetch;
        if (done < segment.count) {
            const TokenRun next = tile_of(plan, segment, done, attention.tile_tokens, layer);
            prefetch = Prefetch(next.k, next.count * next.k_stride, next.v, next.count * next.v_stride);
        }
        attention.update(tile, prefetch);
    }
}

// Stores the state of one query of a unit: to the output, or for merging; see WorkUnit::first_state. o:
// float32 [v_dim].
inline void write_state(Plan& plan, const WorkUnit& unit, const StateArray& out, int head, int row, const float* o,
                        float lse) {
    if (unit.first_state < 0) {
        write_row(out.o, unit.row + row, unit.group * plan.shape.q_heads + head, o, plan.shape.v_dim);
        write_lse(out, unit.row + row, unit.group * plan.shape.q_heads + head, lse);
    } else {
        const int64_t state = unit.first_state + head * unit.rows + row;
        std::memcpy(&plan.state_o[state * plan.shape.v_dim], o, 4L * plan.shape.v_dim);
        plan.state_lse[state] = lse;
    }
}

// Units of up to this many tokens are computed token by token: setting up tiles takes 0.7 us, and they would
// be mostly padding.
constexpr int FEW_TOKENS = 4;

// Computes a unit of up to FEW_TOKENS tokens in float32.
template <Format F>
void run_few_tokens(Plan& plan, const WorkUnit& unit, int layer, const RowArray& q, const StateArray& out) {
    const Shape& s = plan.shape;
    const int k_pad = round_up(s.k_dim, WIDTH), v_pad = round_up(s.v_dim, WIDTH);
    float* query = static_cast<float*>(scratch(4L * (k_pad + v_pad)));
    float* o = query + k_pad;
    TokenRun tokens[FEW_TOKENS];
    int n = 0;
    for (int i = unit.segment0; i < unit.segment1; i++)
        for (int j = 0; j < plan.segments[i].count; j++) tokens[n++] = tile_of(plan, plan.segments[i], j, 1, layer);
    for (int head = 0; head < s.q_heads; head++)
        for (int row = 0; row < unit.rows; row++) {
            const int64_t position = plan.positions[unit.row + row];
            std::memset(query, 0, 4L * k_pad);
            add_scaled(query, q, unit.row + row, (int64_t)unit.group * s.q_heads + head, 1.0f, s.k_dim);
            const auto logit = [&](int i) {
                const int64_t distance = position - tokens[i].position;
                if (distance < 0 || distance >= plan.window) return -INFINITY;
                const int64_t offset = head / (s.q_heads / s.k_heads) * tokens[i].k_head_stride;
                vf sum{};
                for (int d = 0; d < s.k_dim; d += WIDTH)
                    sum += elements<F>(tokens[i].k + offset, tokens[i].k_scales + offset, d, s.k_dim) * load(query + d);
                const float x = hsum(sum) * s.scale;
                return s.soft_cap ? std::tanh(x / s.soft_cap) * s.soft_cap : x;
            };
            float logits[FEW_TOKENS], lse;
            for (int i = 0; i < n; i++) logits[i] = logit(i);
            const auto add_values = [&](const int* states, const float* weights, int count) {
                for (int c = 0; c < count; c++) {
                    const TokenRun& t = tokens[states[c]];
                    const int64_t offset = head / (s.q_heads / s.v_heads) * t.v_head_stride;
                    for (int d = 0; d < s.v_dim; d += WIDTH)
                        store(o + d,
                              load(o + d) + weights[c] * elements<F>(t.v + offset, t.v_scales + offset, d, s.v_dim));
                }
            };
            // The state of one token is (its V, its logit).
            merge_states(n, [&](int i) { return logits[i]; }, add_values, s.v_dim, o, &lse);
            write_state(plan, unit, out, head, row, o, lse);
        }
}

// Computes one work unit of one layer.
template <class Arithmetic, Format F>
void run_unit(Plan& plan, const WorkUnit& unit, int layer, const RowArray& q, const StateArray& out) {
    int tokens = 0;
    for (int s = unit.segment0; s < unit.segment1; s++) tokens += plan.segments[s].count;
    if (tokens <= FEW_TOKENS) return run_few_tokens<F>(plan, unit, layer, q, out);
    RowArray first = q;
    first.data = row_address(q, unit.row, (int64_t)unit.group * plan.shape.q_heads);
    const auto attend = [&](auto&& attention) {
        attention.begin(first, plan.positions.data() + unit.row, plan.window);
        for (int s = unit.segment0; s < unit.segment1; s++)
            update_from_segment(attention, plan, plan.segments[s], layer);
        attention.finish(
            [&](int head, int row, const float* o, float lse) { write_state(plan, unit, out, head, row, o, lse); });
    };
    if (unit.rows * plan.shape.q_heads <= DECODE_QUERIES * plan.shape.k_heads) {
#if defined(HAS_INTEGERS)
        if constexpr (F == Format::i8 || F == Format::i4)
            if (DecodeAttention<F>::supports_integers(plan.shape, q.format))
                return attend(DecodeAttention<F, true>(plan.shape, unit.rows));
#endif
        return attend(DecodeAttention<F>(plan.shape, unit.rows));
    }
    [[maybe_unused]] typename Arithmetic::TileScope tile_scope;
    attend(typename Arithmetic::template Prefill<F>(plan.shape, unit.rows));
}

// Merges the states that several units computed for one row and group.
inline void merge_unit_states(const Plan& plan, const StateMerge& m, const StateArray& out) {
    const int heads = plan.shape.q_heads, v_dim = plan.shape.v_dim;
    float* o = static_cast<float*>(scratch(4L * round_up(v_dim, WIDTH)));
    const int n = (m.source1 - m.source0) / 2;
    for (int head = 0; head < heads; head++) {
        auto state_of = [&](int i) {
            return plan.merge_sources[m.source0 + 2 * i] + head * plan.merge_sources[m.source0 + 2 * i + 1];
        };
        float lse;
        merge_states(
            n, [&](int i) { return plan.state_lse[state_of(i)]; },
            [&](const int* states, const float* weights, int count) {
                const float* rows[WIDTH];
                for (int i = 0; i < count; i++) rows[i] = &plan.state_o[state_of(states[i]) * v_dim];
                weighted_sum<true>(o, rows, weights, count, v_dim);
            },
            v_dim, o, &lse);
        write_row(out.o, m.row, m.group * heads + head, o, v_dim);
        write_lse(out, m.row, m.group * heads + head, lse);
    }
}

// Computes all units of one layer, then merges.
template <class Arithmetic, Format F>
void run_plan(Plan& plan, int layer, const RowArray& q, const StateArray& out) {
    parallel_for((int)plan.chunks.size() - 1, plan.threads, [&](int chunk) {
        for (int j = plan.chunks[chunk]; j < plan.chunks[chunk + 1]; j++)
            run_unit<Arithmetic, F>(plan, plan.units[j], layer, q, out);
    });
    // On this thread: all merges take a few microseconds, as long as handing them to other threads would.
    for (const StateMerge& m : plan.state_merges) merge_unit_states(plan, m, out);
    for (const int state : plan.empty_states)
        for (int head = 0; head < plan.shape.q_heads; head++) {
            const int row = state / plan.groups, h = state % plan.groups * plan.shape.q_heads + head;
            std::memset(row_address(out.o, row, h), 0, (long)plan.shape.v_dim * element_size(out.o.format));
            write_lse(out, row, h, -INFINITY);
        }
}

// Most rows x heads of a unit of extend. Many, because each unit converts or packs all keys that it sees; a
// multiple of the panels of prefill_f32.h (48 queries).
constexpr int EXTEND_UNIT_QUERIES = 480;

// Divides rows and groups into units for the threads, and computes them.
template <class Arithmetic, Format F>
void run_extend(const ExtendArguments& e, const RowArray& q, const StateArray& out) {
    const int max_rows = std::max(1, EXTEND_UNIT_QUERIES / e.shape.q_heads);
    const int blocks = (e.rows + max_rows - 1) / max_rows;
    // Equal units: a shorter last one left a thread idle for a tenth of the time (256 rows, 2 threads).
    const int rows_per_unit = (e.rows + blocks - 1) / std::max(1, blocks);
    // The last rows see the most keys. Their units are long and come first, so that the threads end together.
    parallel_for(blocks * e.groups, e.threads, [&](int i) {
        const int group = i % e.groups, row = (blocks - 1 - i / e.groups) * rows_per_unit;
        const int rows = std::min(rows_per_unit, e.rows - row);
        const auto [lowest, highest] = std::minmax_element(e.positions + row, e.positions + row + rows);
        const int64_t end = std::min<int64_t>(e.tokens.count, *highest - e.tokens.position + 1);
        int64_t begin = 0;
        if (e.window != INT64_MAX) begin = std::max<int64_t>(0, *lowest - e.window + 1 - e.tokens.position);
        [[maybe_unused]] typename Arithmetic::TileScope tile_scope;
        typename Arithmetic::template Prefill<F> attention(e.shape, rows);
        RowArray first = q;
        first.data = row_address(q, row, (int64_t)group * e.shape.q_heads);
        attention.begin(first, e.positions + row, e.window);
        for (int64_t done = begin; done < end; done += attention.tile_tokens) {
            TokenRun t = e.tokens;
            t.k += group * e.k_group_stride + done * t.k_stride;
            t.v += group * e.v_group_stride + done * t.v_stride;
            t.position += done;
            t.count = (int)std::min<int64_t>(attention.tile_tokens, end - done);
            attention.update(t);
        }
        attention.finish([&](int head, int r, const float* o, float lse) {
            write_row(out.o, row + r, group * e.shape.q_heads + head, o, e.shape.v_dim);
            write_lse(out, row + r, group * e.shape.q_heads + head, lse);
        });
    });
}

// Calls run.operator()<Arithmetic, F>() for the format of stored KV and that of q.
template <class Run>
void dispatch([[maybe_unused]] const Shape& shape, Format stored, [[maybe_unused]] Format q, Run&& run) {
#if defined(HAS_BF16_DOT)
    // AMX tiles store 16 rows at a time, which would overwrite the next head's rows if a group had several.
    bool use_bf16 = q == Format::bf16;
#if defined(HAS_AMX)
    use_bf16 = use_bf16 && shape.k_heads == 1 && shape.v_heads == 1;
#endif
    if (use_bf16) switch (stored) {
            case Format::bf16: return run.template operator()<Bf16Arithmetic, Format::bf16>();
            case Format::i8: return run.template operator()<Bf16Arithmetic, Format::i8>();
            case Format::i4: return run.template operator()<Bf16Arithmetic, Format::i4>();
            default: break;
        }
#endif
    switch (stored) {
        case Format::f32: return run.template operator()<F32Arithmetic, Format::f32>();
        case Format::f16: return run.template operator()<F32Arithmetic, Format::f16>();
        case Format::i8: return run.template operator()<F32Arithmetic, Format::i8>();
        case Format::i4: return run.template operator()<F32Arithmetic, Format::i4>();
        case Format::bf16: return run.template operator()<F32Arithmetic, Format::bf16>();
    }
}

// See Kernels::partial.
void partial(Plan& plan, int layer, const RowArray& q, const StateArray& out) {
    dispatch(plan.shape, plan.format, q.format,
             [&]<class Arithmetic, Format F>() { run_plan<Arithmetic, F>(plan, layer, q, out); });
}

// See Kernels::extend.
void extend(const ExtendArguments& e, const RowArray& q, const StateArray& out) {
    dispatch(e.shape, e.format, q.format, [&]<class Arithmetic, Format F>() { run_extend<Arithmetic, F>(e, q, out); });
}

}  // namespace ISA
}  // namespace farshore

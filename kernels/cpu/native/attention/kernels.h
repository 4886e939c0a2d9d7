// The entry points partial() and extend() of one instruction set. Included by simd/isa_kernels.h after the
// attention headers.

namespace farshore {
namespace ISA {

// How many queries are attended for. Arithmetic is float32,
struct Floats {
    template <Format F>
    using Attend = Lanes<F>;
    struct Session {};
};
#if defined(HAS_BF16_DOT)
// or bfloat16 products, summed in float32.
#if defined(HAS_AMX)
typedef Tiles Products;
#else
typedef Pairs Products;
#endif
struct Bf16 {
    template <Format F>
    using Attend = ISA::Attend<Products, F>;
    typedef Products::Session Session;
};
#endif

// The tile of a span that starts at its token `done`. Tiles end on multiples of their size and at blocks' ends:
// a span that starts unaligned has one short tile.
inline Tokens tile_of(const Plan& plan, const Span& span, int done, int tile, int layer) {
    const int slot = (span.first + done) % plan.block_tokens;
    const uint8_t* in_layer = plan.memory + span.base +
                              (span.first + done) / plan.block_tokens * span.stride + layer * span.layer_bytes;
    const uint8_t* k = in_layer + span.k_offset;
    const uint8_t* v = in_layer + span.v_offset;
    Tokens t;
    t.k = k + slot * plan.k_row_bytes;
    t.v = v + slot * plan.v_row_bytes;
    t.k_stride = plan.k_row_bytes;
    t.v_stride = plan.v_row_bytes;
    t.k_head_stride = plan.k_run_bytes;
    t.v_head_stride = plan.v_run_bytes;
    t.k_scale_stride = 2 * plan.k_scales;
    t.v_scale_stride = 2 * plan.v_scales;
    t.k_scales = k + plan.block_tokens * plan.k_row_bytes + slot * t.k_scale_stride;
    t.v_scales = v + plan.block_tokens * plan.v_row_bytes + slot * t.v_scale_stride;
    t.count = std::min(std::min(tile - slot % tile, plan.block_tokens - slot), span.count - done);
    t.position = span.position + done;
    return t;
}

template <Format F, bool INTEGERS>
void absorb_span(Stream<F, INTEGERS>& stream, const Plan& plan, const Span& span, int layer) {
    Tokens now{};
    if (span.count) now = tile_of(plan, span, 0, stream.tile, layer);
    for (int done = 0; done < span.count;) {
        done += now.count;
        Tokens next{};
        if (done < span.count) next = tile_of(plan, span, done, stream.tile, layer);
        stream.absorb(now, next);
        now = next;
    }
}

template <class Attend>
void absorb_span(Attend& attend, const Plan& plan, const Span& span, int layer) {
    for (int done = 0; done < span.count;) {
        const Tokens now = tile_of(plan, span, done, attend.tile, layer);
        done += now.count;
        Prefetch prefetch;
        if (done < span.count) {
            const Tokens next = tile_of(plan, span, done, attend.tile, layer);
            prefetch = Prefetch(next.k, next.count * next.k_stride, next.v, next.count * next.v_stride);
        }
        attend.absorb(now, prefetch);
    }
}

// A finished state of one query of a job: straight out, or into its slot.
inline void put_state(Plan& plan, const Job& job, const Out& out, int head, int row, const float* o, float lse) {
    if (job.slot < 0) {
        put_row(out.o, job.row + row, job.group * plan.shape.q_heads + head, o, plan.shape.v_dim);
        put_lse(out, job.row + row, job.group * plan.shape.q_heads + head, lse);
    } else {
        const int64_t slot = job.slot + head * job.rows + row;
        std::memcpy(&plan.slot_o[slot * plan.shape.v_dim], o, 4L * plan.shape.v_dim);
        plan.slot_lse[slot] = lse;
    }
}

// Up to this many tokens go one by one: tiles would take 0.7 us to set up and compute mostly padding.
constexpr int FEW_TOKENS = 4;

template <Format F>
void run_few(Plan& plan, const Job& job, int layer, const Array& q, const Out& out) {
    const Shape& s = plan.shape;
    const int k_pad = round_up(s.k_dim, WIDTH), v_pad = round_up(s.v_dim, WIDTH);
    float* query = static_cast<float*>(scratch(4L * (k_pad + v_pad)));
    float* o = query + k_pad;
    Tokens tokens[FEW_TOKENS];
    int n = 0;
    for (int i = job.span0; i < job.span1; i++)
        for (int j = 0; j < plan.spans[i].count; j++) tokens[n++] = tile_of(plan, plan.spans[i], j, 1, layer);
    for (int head = 0; head < s.q_heads; head++)
        for (int row = 0; row < job.rows; row++) {
            const int64_t position = plan.positions[job.row + row];
            std::memset(query, 0, 4L * k_pad);
            add_scaled(query, q, job.row + row, (int64_t)job.group * s.q_heads + head, 1.0f, s.k_dim);
            const auto logit = [&](int i) {
                const int64_t distance = position - tokens[i].position;
                if (distance < 0 || distance >= plan.window) return -INFINITY;
                const int64_t at = head / (s.q_heads / s.k_heads) * tokens[i].k_head_stride;
                vf sum{};
                for (int d = 0; d < s.k_dim; d += WIDTH)
                    sum += elements<F>(tokens[i].k + at, tokens[i].k_scales + at, d, s.k_dim) * load(query + d);
                const float x = hsum(sum) * s.scale;
                return s.soft_cap ? std::tanh(x / s.soft_cap) * s.soft_cap : x;
            };
            float logits[FEW_TOKENS], lse;
            for (int i = 0; i < n; i++) logits[i] = logit(i);
            const auto add_values = [&](const int* which, const float* weights, int count) {
                for (int c = 0; c < count; c++) {
                    const Tokens& t = tokens[which[c]];
                    const int64_t at = head / (s.q_heads / s.v_heads) * t.v_head_stride;
                    for (int d = 0; d < s.v_dim; d += WIDTH)
                        store(o + d, load(o + d) + weights[c] * elements<F>(t.v + at, t.v_scales + at, d, s.v_dim));
                }
            };
            // One token's state is (its value, its logit): these merge like any others.
            merge_one(n, [&](int i) { return logits[i]; }, add_values, s.v_dim, o, &lse);
            put_state(plan, job, out, head, row, o, lse);
        }
}

template <class Math, Format F>
void run_job(Plan& plan, const Job& job, int layer, const Array& q, const Out& out) {
    int tokens = 0;
    for (int s = job.span0; s < job.span1; s++) tokens += plan.spans[s].count;
    if (tokens <= FEW_TOKENS) return run_few<F>(plan, job, layer, q, out);
    Array first = q;
    first.data = at(q, job.row, (int64_t)job.group * plan.shape.q_heads);
    const auto attend_to_all = [&](auto&& attend) {
        attend.begin(first, plan.positions.data() + job.row, plan.window);
        for (int s = job.span0; s < job.span1; s++) absorb_span(attend, plan, plan.spans[s], layer);
        attend.finish([&](int head, int row, const float* o, float lse) {
            put_state(plan, job, out, head, row, o, lse);
        });
    };
    if (job.rows * plan.shape.q_heads <= STREAM_QUERIES * plan.shape.k_heads) {
#if defined(HAS_INTEGERS)
        if constexpr (F == Format::i8 || F == Format::i4)
            if (Stream<F>::of_integers(plan.shape, q.format))
                return attend_to_all(Stream<F, true>(plan.shape, job.rows));
#endif
        return attend_to_all(Stream<F>(plan.shape, job.rows));
    }
    [[maybe_unused]] typename Math::Session session;
    attend_to_all(typename Math::template Attend<F>(plan.shape, job.rows));
}

inline void reduce(const Plan& plan, const Reduction& r, const Out& out) {
    const int heads = plan.shape.q_heads, v_dim = plan.shape.v_dim;
    float* o = static_cast<float*>(scratch(4L * round_up(v_dim, WIDTH)));
    const int n = (r.part1 - r.part0) / 2;
    for (int head = 0; head < heads; head++) {
        auto slot = [&](int i) { return plan.parts[r.part0 + 2 * i] + head * plan.parts[r.part0 + 2 * i + 1]; };
        float lse;
        merge_one(
            n, [&](int i) { return plan.slot_lse[slot(i)]; },
            [&](const int* which, const float* weights, int count) {
                const float* rows[WIDTH];
                for (int i = 0; i < count; i++) rows[i] = &plan.slot_o[slot(which[i]) * v_dim];
                weigh_floats<true>(o, rows, weights, count, v_dim);
            },
            v_dim, o, &lse);
        put_row(out.o, r.row, r.group * heads + head, o, v_dim);
        put_lse(out, r.row, r.group * heads + head, lse);
    }
}

template <class Math, Format F>
void run_plan(Plan& plan, int layer, const Array& q, const Out& out) {
    parallel_for((int)plan.chunks.size() - 1, plan.threads, [&](int chunk) {
        for (int j = plan.chunks[chunk]; j < plan.chunks[chunk + 1]; j++)
            run_job<Math, F>(plan, plan.jobs[j], layer, q, out);
    });
    // A few microseconds in all: handing them out would take as long.
    for (const Reduction& r : plan.reductions) reduce(plan, r, out);
    for (const int it : plan.untouched)
        for (int head = 0; head < plan.shape.q_heads; head++) {
            const int row = it / plan.groups, h = it % plan.groups * plan.shape.q_heads + head;
            std::memset(at(out.o, row, h), 0, (long)plan.shape.v_dim * element_size(out.o.format));
            put_lse(out, row, h, -INFINITY);
        }
}

// Query rows x heads per job of extend: many, since each job widens all keys it sees once; whole panels of lanes.h.
constexpr int EXTEND_QUERIES = 480;

template <class Math, Format F>
void run_extend(const Extension& e, const Array& q, const Out& out) {
    const int most_rows = std::max(1, EXTEND_QUERIES / e.shape.q_heads);
    const int blocks = (e.rows + most_rows - 1) / most_rows;
    // Even jobs: the short last one of uneven ones left a thread idle for a tenth of the time (256 rows, 2 threads).
    const int rows_per_job = (e.rows + blocks - 1) / std::max(1, blocks);
    // The last rows see the most keys: first come the long jobs, so that the threads end together.
    parallel_for(blocks * e.groups, e.threads, [&](int i) {
        const int group = i % e.groups, row = (blocks - 1 - i / e.groups) * rows_per_job;
        const int rows = std::min(rows_per_job, e.rows - row);
        const auto [lowest, highest] = std::minmax_element(e.positions + row, e.positions + row + rows);
        const int64_t end = std::min<int64_t>(e.tokens.count, *highest - e.tokens.position + 1);
        int64_t begin = 0;
        if (e.window != INT64_MAX) begin = std::max<int64_t>(0, *lowest - e.window + 1 - e.tokens.position);
        [[maybe_unused]] typename Math::Session session;
        typename Math::template Attend<F> attend(e.shape, rows);
        Array first = q;
        first.data = at(q, row, (int64_t)group * e.shape.q_heads);
        attend.begin(first, e.positions + row, e.window);
        for (int64_t done = begin; done < end; done += attend.tile) {
            Tokens t = e.tokens;
            t.k += group * e.k_group_stride + done * t.k_stride;
            t.v += group * e.v_group_stride + done * t.v_stride;
            t.position += done;
            t.count = (int)std::min<int64_t>(attend.tile, end - done);
            attend.absorb(t);
        }
        attend.finish([&](int head, int r, const float* o, float lse) {
            put_row(out.o, row + r, group * e.shape.q_heads + head, o, e.shape.v_dim);
            put_lse(out, row + r, group * e.shape.q_heads + head, lse);
        });
    });
}

// Calls run.operator()<Math, F>() for a stored format and q's.
template <class Run>
void choose([[maybe_unused]] const Shape& shape, Format stored, [[maybe_unused]] Format q, Run&& run) {
#if defined(HAS_BF16_DOT)
    // Tiles store rows 16 at a time, over the next head's where a group has several.
    bool products = q == Format::bf16;
#if defined(HAS_AMX)
    products = products && shape.k_heads == 1 && shape.v_heads == 1;
#endif
    if (products) switch (stored) {
            case Format::bf16: return run.template operator()<Bf16, Format::bf16>();
            case Format::i8: return run.template operator()<Bf16, Format::i8>();
            case Format::i4: return run.template operator()<Bf16, Format::i4>();
            default: break;
        }
#endif
    switch (stored) {
        case Format::f32: return run.template operator()<Floats, Format::f32>();
        case Format::f16: return run.template operator()<Floats, Format::f16>();
        case Format::i8: return run.template operator()<Floats, Format::i8>();
        case Format::i4: return run.template operator()<Floats, Format::i4>();
        case Format::bf16: return run.template operator()<Floats, Format::bf16>();
    }
}

void partial(Plan& plan, int layer, const Array& q, const Out& out) {
    choose(plan.shape, plan.format, q.format, [&]<class Math, Format F>() { run_plan<Math, F>(plan, layer, q, out); });
}

void extend(const Extension& e, const Array& q, const Out& out) {
    choose(e.shape, e.format, q.format, [&]<class Math, Format F>() { run_extend<Math, F>(e, q, out); });
}

}  // namespace ISA
}  // namespace farshore

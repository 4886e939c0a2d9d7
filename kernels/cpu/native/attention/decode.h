// Attention of few queries over stored KV, which is bound by memory bandwidth. Included by simd/isa_kernels.h
// after vector_pair.h.
//
// Reads each row of K and V once, in the order in which they are stored, converts it in registers and
// multiplies it with all queries that share its head. Nothing is packed: for few queries packing costs more
// than the products. Computes in float32 for every format, or with integer_products.h.
//
// A query is one row of one head; queries are ordered [head of group][row]. The running state of a query is
// row_max (the largest q.k, or soft-capped logit), row_sum (the sum of the softmax weights
// relative to it) and o, the weighted sum of V, not yet divided by row_sum.

namespace farshore {
namespace ISA {

constexpr int DECODE_TILE_TOKENS = 128;  // between two updates of the softmax: their logits stay in L1
constexpr int DECODE_QUERIES = 16;       // most that share a K head; for more, packing (prefill_*.h) pays
constexpr int TOKENS_AT_ONCE = 4;
#if WIDTH == 16
constexpr int QUERIES_AT_ONCE = 4;  // TOKENS_AT_ONCE * QUERIES_AT_ONCE sums live in registers
#else
constexpr int QUERIES_AT_ONCE = 2;
#endif
// How often multiply_integers calls `prefetch` in one scale group of WIDTH tokens.
template <Format F>
constexpr int FETCHES_PER_GROUP = F == Format::i8 ? 4 : 2;

// INTEGERS: multiplies with integer_products.h; see supports_integers. Its memory is the thread's scratch
// memory, so a thread has one object at a time. Call begin, update for each tile, then finish.
template <Format F, bool INTEGERS = false>
class DecodeAttention {
  public:
    static constexpr bool SCALED = F == Format::i8 || F == Format::i4;

    // For `rows` query rows of one head group.
    DecodeAttention(const Shape& shape, int rows) : s_(shape), rows_(rows), queries_(rows * shape.q_heads) {
        k_whole_ = whole_pair_elements<F>(s_.k_dim), v_whole_ = whole_pair_elements<F>(s_.v_dim);
        k_pad_ = round_up(s_.k_dim, VECTOR_PAIR), v_pad_ = round_up(s_.v_dim, VECTOR_PAIR);
        k_scale_count_ = SCALED ? (s_.k_dim + SCALE_ELEMENTS - 1) / SCALE_ELEMENTS : 0;
        v_scale_count_ = SCALED ? (s_.v_dim + SCALE_ELEMENTS - 1) / SCALE_ELEMENTS : 0;
        const long q = (long)queries_ * k_pad_, o = (long)queries_ * v_pad_,
                   logits = (long)queries_ * DECODE_TILE_TOKENS,
                   scales =
                       (long)(s_.k_heads * k_scale_count_ + s_.v_heads * v_scale_count_ + queries_ * v_scale_count_) *
                       DECODE_TILE_TOKENS,
                   states = round_up(queries_, WIDTH), fixed = (long)states * (1 + k_scale_count_ + 2 * v_scale_count_);
        float* next_float =
            static_cast<float*>(scratch(4 * (q + o + logits + scales + (1 + WIDTH) * states + v_pad_ + fixed)));
        const auto take = [&](long floats) { return std::exchange(next_float, next_float + floats); };
        q_ = take(q), o_ = take(o), logits_ = take(logits);
        k_scales_ = take((long)s_.k_heads * k_scale_count_ * DECODE_TILE_TOKENS);
        v_scales_ = take((long)s_.v_heads * v_scale_count_ * DECODE_TILE_TOKENS);
        weights_ = SCALED ? take((long)queries_ * v_scale_count_ * DECODE_TILE_TOKENS) : logits_;
        row_max_ = take(states), row_sum_ = take((long)WIDTH * states), output_row_ = take(v_pad_);
        q_int_scale_ = take(states), w_int_scale_ = take(states * v_scale_count_);
        q_sum_ = reinterpret_cast<int32_t*>(take(states * k_scale_count_));
        w_sum_ = reinterpret_cast<int32_t*>(take(states * v_scale_count_));
    }

    // The most tokens of a tile.
    static constexpr int tile_tokens = DECODE_TILE_TOKENS;

    // Whether INTEGERS may be used: for bfloat16 q, whose precision int16 covers, and dims of whole scale
    // groups.
    static bool supports_integers(const Shape& shape, Format q) {
        return SCALED && q == Format::bf16 && shape.k_dim % SCALE_ELEMENTS == 0 && shape.v_dim % SCALE_ELEMENTS == 0;
    }

    // Sets the queries.
    //   q          [rows][q_heads][k_dim], beginning at the first row and the group's first head
    //   positions  [rows]; must stay valid
    //   window     tokens that a row sees, its own included
    void begin(const RowArray& q, const int64_t* positions, int64_t window) {
        positions_ = positions, window_ = window;
        for (int i = 0; i < queries_; i++) row_max_[i] = -INFINITY;
        std::memset(row_sum_, 0, 4L * WIDTH * queries_);
        std::memset(o_, 0, 4L * queries_ * v_pad_);
        alignas(64) float row[WIDTH];
        for (int i = 0; i < queries_; i++) {
            const int64_t offset = i % rows_ * q.row_stride + i / rows_ * q.head_stride;
            const auto value = [&](int d) {
                return q.format == Format::f32    ? static_cast<const float*>(q.data)[offset + d]
                       : q.format == Format::bf16 ? from_bf16(static_cast<const uint16_t*>(q.data)[offset + d])
                                                  : from_f16(static_cast<const uint16_t*>(q.data)[offset + d]);
            };
#if defined(HAS_INTEGERS)
            if constexpr (INTEGERS) {
                float* row = q_ + (long)i * k_pad_;
                for (int d = 0; d < s_.k_dim; d++) row[d] = value(d);
                int32_t sum;
                q_int_scale_[i] = quantise_int16(row, s_.k_dim, int_query(i), &sum);
                for (int g = 0; g < k_scale_count_; g++) {
                    int16_t in_order[SCALE_ELEMENTS], *group = int_query(i) + g * SCALE_ELEMENTS;
                    std::memcpy(in_order, group, sizeof in_order);
                    q_sum_[i * k_scale_count_ + g] = std::accumulate(in_order, in_order + SCALE_ELEMENTS, 0);
                    order_query<F>(in_order, group);
                }
                continue;
            }
#endif
            float* to = q_ + (long)i * k_pad_;
            for (int from = 0; from < k_pad_; from += WIDTH) {
                for (int l = 0; l < WIDTH; l++) {
                    const int d = from < k_whole_
                                      ? element_in_lane<F, false>(from / VECTOR_PAIR * VECTOR_PAIR, from / WIDTH % 2, l)
                                      : from + l;
                    row[l] = d < s_.k_dim ? value(d) : 0.0f;
                }
                store(to + from, load(row));
            }
        }
    }

    // Adds one tile of at most tile_tokens tokens to the state. While K of the tile is multiplied its V is
    // prefetched into L2, and while V is multiplied K of `next` is: the hardware prefetcher stops at the
    // end of a page and at each change between K and V. (Measured, k_dim 64, 2 cores, GB/s of 27:
    // neither 16.0, V into L1 19.0, both into L1 20.6, both into L2 20.8.)
    void update(const TokenRun& tile, const TokenRun& next) {
        if constexpr (SCALED) {
            const int n_pad = round_up(tile.count, WIDTH);
            for (int head = 0; head < s_.k_heads; head++)
                unpack_scales(k_scales_ + (long)head * k_scale_count_ * DECODE_TILE_TOKENS, DECODE_TILE_TOKENS,
                              tile.k_scales + head * tile.k_head_stride, k_scale_count_, tile.k_scale_stride,
                              tile.count, n_pad);
            for (int head = 0; head < s_.v_heads; head++)
                unpack_scales(v_scales_ + (long)head * v_scale_count_ * DECODE_TILE_TOKENS, DECODE_TILE_TOKENS,
                              tile.v_scales + head * tile.v_head_stride, v_scale_count_, tile.v_scale_stride,
                              tile.count, n_pad);
        }
        for_query_blocks(s_.k_heads,
                         [&](int head, int first, auto size) { compute_logits<size()>(tile, head, first); });
        for (int i = 0; i < queries_; i++) softmax_update(i, tile);
        for_query_blocks(s_.v_heads,
                         [&](int head, int first, auto size) { accumulate_output<size()>(tile, next, head, first); });
    }

    // Calls write(head of group, row, o, lse) for each query: o float32 [v_dim], normalised; lse natural log,
    // -inf where the query saw no token.
    template <class Write>
    void finish(Write&& write) {
        const float to_natural_log = s_.soft_cap ? 1.0f : s_.scale;
        for (int i = 0; i < queries_; i++) {
            const float* o = o_ + (long)i * v_pad_;
            const float row_sum = hsum(load(row_sum_ + i * WIDTH));
            const float inverse = row_sum == 0 ? 0.0f : 1.0f / row_sum;
            for (int from = 0; from < v_pad_; from += WIDTH)
                for (int l = 0; l < WIDTH; l++) {
                    const int d = from < v_whole_ ? element_in_lane<F, INTEGERS>(from / VECTOR_PAIR * VECTOR_PAIR,
                                                                                 from / WIDTH % 2, l)
                                                  : from + l;
                    output_row_[d] = o[from + l] * inverse;
                }
            write(i / rows_, i % rows_, output_row_,
                  row_sum == 0 ? -INFINITY : row_max_[i] * to_natural_log + std::log(row_sum));
        }
    }

  private:
    // The int16 form of query i (INTEGERS).
    int16_t* int_query(int i) { return reinterpret_cast<int16_t*>(q_ + (long)i * k_pad_); }

    // Calls body(head, first query, size) for blocks of `size` <= QUERIES_AT_ONCE queries that share one of
    // `heads` heads.
    template <class Body>
    void for_query_blocks(int heads, Body&& body) {
        const int per_head = queries_ / heads;
        for (int head = 0; head < heads; head++)
            for (int i = 0; i < per_head; i += QUERIES_AT_ONCE) {
                const int first = head * per_head + i;
                switch (std::min(QUERIES_AT_ONCE, per_head - i)) {
                    case 1: body(head, first, std::integral_constant<int, 1>{}); break;
                    case 2: body(head, first, std::integral_constant<int, 2>{}); break;
#if WIDTH == 16
                    case 3: body(head, first, std::integral_constant<int, 3>{}); break;
                    case 4: body(head, first, std::integral_constant<int, 4>{}); break;
#endif
                }
            }
    }

    // Logits of queries [first, first + Q), which share the K head `head`: q.k.
    template <int Q>
    void compute_logits(const TokenRun& tile, int head, int first) {
        const float* q = q_ + (long)first * k_pad_;
        const float* scales = k_scales_ + (long)head * k_scale_count_ * DECODE_TILE_TOKENS;
        float* out = logits_ + (long)first * DECODE_TILE_TOKENS;
        const uint8_t* k = tile.k + head * tile.k_head_stride;
        if (first % (queries_ / s_.k_heads) == 0)
            start_prefetch(tile.v + head * tile.v_head_stride, head < s_.v_heads ? tile.count * tile.v_stride : 0,
                           query_blocks(s_.k_heads) *
                               (INTEGERS ? (tile.count + WIDTH - 1) / WIDTH * k_scale_count_ * FETCHES_PER_GROUP<F>
                                         : (tile.count + TOKENS_AT_ONCE - 1) / TOKENS_AT_ONCE));
#if defined(HAS_INTEGERS)
        if constexpr (INTEGERS) {
            for (int j = 0; j < tile.count; j += WIDTH) {
                const uint8_t* row[WIDTH];
                for (int i = 0; i < WIDTH; i++) row[i] = k + std::min(j + i, tile.count - 1) * tile.k_stride;
                multiply_integers<F, Q>(row, int_query(first), k_pad_ * 2, q_sum_ + first * k_scale_count_,
                                        q_int_scale_ + first, k_scale_count_, scales + j, DECODE_TILE_TOKENS, out + j,
                                        [&] { prefetch(); });
            }
            return;
        }
#endif
        for (int j = 0; j < tile.count; j += TOKENS_AT_ONCE) {
            prefetch();
            const uint8_t* row[TOKENS_AT_ONCE];  // the last token again, beyond the end of the tile
            for (int i = 0; i < TOKENS_AT_ONCE; i++) row[i] = k + std::min(j + i, tile.count - 1) * tile.k_stride;
            if (k_whole_ != k_pad_)
                multiply_rows<Q, false, false>(row, q, scales + j, out + j);
            else if (k_scale_count_ == 1)
                multiply_rows<Q, true, true>(row, q, scales + j, out + j);
            else
                multiply_rows<Q, true, false>(row, q, scales + j, out + j);
        }
    }

    // out[Q][DECODE_TILE_TOKENS]: q.k of TOKENS_AT_ONCE tokens. WHOLE_PAIRS: rows are whole vector pairs; a
    // test of that inside the loop would make gcc spill registers. ONE_GROUP: a row has one scale, which is
    // applied to the logit.
    template <int Q, bool WHOLE_PAIRS, bool ONE_GROUP>
    __attribute__((always_inline)) void multiply_rows(const uint8_t* const* row, const float* q, const float* scales,
                                                      float* out) const {
        vf sum[TOKENS_AT_ONCE][Q];
        // Unrolled: otherwise gcc 12 turns this into a memset, and keeps the sums in memory.
#pragma GCC unroll 4
        for (int i = 0; i < TOKENS_AT_ONCE; i++)
#pragma GCC unroll 4
            for (int query = 0; query < Q; query++) sum[i][query] = vf{};
        for (int from = 0; from < k_pad_; from += VECTOR_PAIR) {
            vf a[TOKENS_AT_ONCE], b[TOKENS_AT_ONCE];
            for (int i = 0; i < TOKENS_AT_ONCE; i++)
                if (WHOLE_PAIRS || from < k_whole_)
                    load_vector_pair<F>(row[i], from, a[i], b[i]);
                else
                    load_last_pair(row[i], from, s_.k_dim, a[i], b[i]);
            if constexpr (SCALED && !ONE_GROUP)
                for (int i = 0; i < TOKENS_AT_ONCE; i++) {
                    const float scale = scales[from / SCALE_ELEMENTS * DECODE_TILE_TOKENS + i];
                    a[i] *= scale, b[i] *= scale;
                }
#pragma GCC unroll 4
            for (int query = 0; query < Q; query++) {
                const vf qa = load(q + query * k_pad_ + from), qb = load(q + query * k_pad_ + from + WIDTH);
#pragma GCC unroll 4
                for (int i = 0; i < TOKENS_AT_ONCE; i++) sum[i][query] = sum[i][query] + a[i] * qa + b[i] * qb;
            }
        }
#pragma GCC unroll 4
        for (int query = 0; query < Q; query++) {
            vf4 all = lane_sums(sum[0][query], sum[1][query], sum[2][query], sum[3][query]);
            if constexpr (ONE_GROUP) all *= load_as<vf4>(scales);
            store_as(out + query * DECODE_TILE_TOKENS, all);
        }
    }

    // o += weights * V for queries [first, first + Q), which share the V head `head`.
    template <int Q>
    void accumulate_output(const TokenRun& tile, const TokenRun& next, int head, int first) {
        const uint8_t* v = tile.v + head * tile.v_head_stride;
        if (first % (queries_ / s_.v_heads) == 0)
            start_prefetch(
                next.k + head * next.k_head_stride, head < s_.k_heads ? next.count * next.k_stride : 0,
                query_blocks(s_.v_heads) * ((v_pad_ + 2 * VECTOR_PAIR - 1) / (2 * VECTOR_PAIR)) * tile.count);
        float* o = o_ + (long)first * v_pad_;
#if defined(HAS_INTEGERS)
        if constexpr (INTEGERS) {
            for (int g = 0; g < v_scale_count_; g++) {
                const long index = (long)g * queries_ + first;
                accumulate_integers<F, Q>(v + g * SCALE_GROUP_BYTES<F>, tile.v_stride, tile.count,
                                          reinterpret_cast<const int16_t*>(weights_ + index * DECODE_TILE_TOKENS),
                                          2 * DECODE_TILE_TOKENS, w_sum_ + index, w_int_scale_ + index,
                                          o + g * SCALE_ELEMENTS, v_pad_, [&] { prefetch(); });
            }
            return;
        }
#endif
        const auto add = [&](int from, auto pairs, auto&& load_pair) __attribute__((always_inline)) {
            constexpr int N = pairs();
            const float* w =
                weights_ + ((long)(SCALED ? from / SCALE_ELEMENTS * queries_ : 0) + first) * DECODE_TILE_TOKENS;
            vf sum[Q][2 * N];
            for (int query = 0; query < Q; query++)
                for (int i = 0; i < 2 * N; i++) sum[query][i] = load(o + query * v_pad_ + from + i * WIDTH);
            for (int j = 0; j < tile.count; j++) {
                prefetch();
                vf x[2 * N];
                for (int i = 0; i < N; i++)
                    load_pair(v + j * tile.v_stride, from + i * VECTOR_PAIR, x[2 * i], x[2 * i + 1]);
                for (int query = 0; query < Q; query++)
                    for (int i = 0; i < 2 * N; i++) sum[query][i] += x[i] * w[query * DECODE_TILE_TOKENS + j];
            }
            for (int query = 0; query < Q; query++)
                for (int i = 0; i < 2 * N; i++) store(o + query * v_pad_ + from + i * WIDTH, sum[query][i]);
        };
        const auto load_whole = [](const uint8_t* row, int from, vf& a, vf& b) {
            load_vector_pair<F>(row, from, a, b);
        };
        int from = 0;
        for (; from + 2 * VECTOR_PAIR <= v_whole_; from += 2 * VECTOR_PAIR)
            add(from, std::integral_constant<int, 2>{}, load_whole);
        for (; from < v_whole_; from += VECTOR_PAIR) add(from, std::integral_constant<int, 1>{}, load_whole);
        for (; from < v_pad_; from += VECTOR_PAIR)
            add(from, std::integral_constant<int, 1>{},
                [&](const uint8_t* row, int from, vf& a, vf& b) { load_last_pair(row, from, s_.v_dim, a, b); });
    }

    // As load_vector_pair for a pair that does not lie whole inside the row, in order; zeros beyond dim.
    static void load_last_pair(const uint8_t* row, int from, int dim, vf& a, vf& b) {
        std::tie(a, b) = last_elements(row, from, dim);
    }
    __attribute__((noinline)) static std::pair<vf, vf> last_elements(const uint8_t* row, int from, int dim) {
        return {from < dim ? elements<F>(row, nullptr, from, dim) : vf{},
                from + WIDTH < dim ? elements<F>(row, nullptr, from + WIDTH, dim) : vf{}};
    }
    // Blocks of for_query_blocks for one of `heads` heads.
    int query_blocks(int heads) const { return (queries_ / heads + QUERIES_AT_ONCE - 1) / QUERIES_AT_ONCE; }
    // Spreads the prefetch of [from, from + bytes) over the next `calls` calls of prefetch().
    void start_prefetch(const uint8_t* from, int64_t bytes, int calls) {
        fetch_next_ = from, fetch_end_ = from + bytes, fetch_step_ = (bytes / std::max(calls, 1) + 63) / 64 * 64;
    }
    __attribute__((always_inline)) void prefetch() {
        if (fetch_next_ >= fetch_end_) return;
        for (int64_t i = 0; i < fetch_step_; i += 64) __builtin_prefetch(fetch_next_ + i, 0, 2);
        fetch_next_ += fetch_step_;
    }

    // Turns the logits of query i into softmax weights, with V's scales applied, and updates its row_max and
    // row_sum. Rescales its o if row_max grows.
    void softmax_update(int i, const TokenRun& tile) {
        float* x = logits_ + (long)i * DECODE_TILE_TOKENS;
        const int n_pad = round_up(tile.count, WIDTH);
        // The query sees token j of the tile if lowest <= j < end.
        const int64_t reach = positions_[i % rows_] - tile.position + 1;
        const int end = (int)std::clamp<int64_t>(reach, 0, tile.count);
        const int lowest = window_ < reach ? (int)std::min<int64_t>(reach - window_, end) : 0;
        if (s_.soft_cap)
            for (int j = 0; j < n_pad; j += WIDTH)
                store(x + j, tanh(load(x + j) * (s_.scale / s_.soft_cap)) * s_.soft_cap);
        for (int j = 0; j < lowest; j++) x[j] = -INFINITY;
        for (int j = end; j < n_pad; j++) x[j] = -INFINITY;
        vf tile_max = load(x);
        for (int j = WIDTH; j < n_pad; j += WIDTH) tile_max = max(tile_max, load(x + j));
        const float to_log2 = (s_.soft_cap ? 1.0f : s_.scale) * LOG2_E, old_max = row_max_[i];
        vf row_sum = load(row_sum_ + i * WIDTH);
        if (any_above(tile_max, old_max)) {
            row_max_[i] = hmax(tile_max);
            const float rescale = std::exp2((old_max - row_max_[i]) * to_log2);
            row_sum = row_sum * rescale;
            float* o = o_ + (long)i * v_pad_;
            for (int d = 0; d < v_pad_; d += WIDTH) store(o + d, load(o + d) * rescale);
        } else if (old_max == -INFINITY &&
                   std::any_of(x + lowest, x + end, [](float logit) { return logit != logit; })) {
            row_max_[i] = 0;  // NaN must reach the output
        }
        const float* v_scales = v_scales_ + (long)(i / (queries_ / s_.v_heads)) * v_scale_count_ * DECODE_TILE_TOKENS;
        for (int j = 0; j < n_pad; j += WIDTH) {
            const vf logits = load(x + j);
            vf p = exp2<true>(logits, row_max_[i], to_log2);
            p = logits == -INFINITY ? vf{} : p;
            row_sum += p;
            if (!SCALED) store(x + j, p);
            for (int g = 0; g < v_scale_count_; g++)
                store(weights_ + ((long)g * queries_ + i) * DECODE_TILE_TOKENS + j,
                      p * load(v_scales + g * DECODE_TILE_TOKENS + j));
        }
        store(row_sum_ + i * WIDTH, row_sum);
#if defined(HAS_INTEGERS)
        for (int g = 0; g < v_scale_count_ && INTEGERS; g++) {
            const long index = (long)g * queries_ + i;
            float* w = weights_ + index * DECODE_TILE_TOKENS;
            w_int_scale_[index] = quantise_int16(w, n_pad, reinterpret_cast<int16_t*>(w), w_sum_ + index);
        }
#endif
    }

    Shape s_;
    int rows_, queries_, k_whole_, v_whole_, k_pad_, v_pad_, k_scale_count_, v_scale_count_;
    float *q_, *o_, *logits_, *k_scales_, *v_scales_, *weights_, *row_max_, *row_sum_, *output_row_;
    float *q_int_scale_, *w_int_scale_;  // INTEGERS: [queries], [scale group][query]
    int32_t *q_sum_, *w_sum_;            // INTEGERS: [query][scale group], [scale group][query]
    const int64_t* positions_ = nullptr;
    int64_t window_ = 0;
    const uint8_t *fetch_next_ = nullptr, *fetch_end_ = nullptr;
    int64_t fetch_step_ = 0;
};

}  // namespace ISA
}  // namespace farshore

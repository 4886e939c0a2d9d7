// Attention of many queries in float32, for every stored format; bound by arithmetic. Used by extend, and by
// partial where more than DECODE_QUERIES share a K head. Included by simd/isa_kernels.h after pack.h.
//
// A query is one row of one head; queries are ordered [head of group][row], so those that share a K or a V
// head are adjacent. A panel is up to PANEL_VECTORS vectors of queries, one query a lane: q is [dim][query],
// logits and weights are [token][query], o is [dim][query]. The mask, maximum, sum and scaling of a panel are
// then plain vector operations, and both products are the same loop (multiply): it broadcasts an element of K
// or V and multiplies it with the panel's vectors. K and V of a tile are converted to float32 once for all
// panels.
//
// The running state of a query is row_max (the largest logit, scaled or soft-capped, times log2(e)),
// row_sum (the sum of the softmax weights relative to it) and o, the weighted sum of V, not yet divided by
// row_sum.

namespace farshore {
namespace ISA {

constexpr int F32_TILE_TOKENS = 64;  // their K and V in float32, and a panel's weights, fit into L1
constexpr int PANEL_VECTORS = 3;
// Elements of K or V that are broadcast together: BROADCASTS * PANEL_VECTORS sums live in registers.
#if WIDTH == 16
constexpr int BROADCASTS = 8;
#else
constexpr int BROADCASTS = 4;
#endif
// Dims of q that are multiplied together; those of a panel take half of L1.
constexpr int Q_DIMS_AT_ONCE = 128;

// Computes sum[i][v] = sum over p of a(i, p) * b[p][v], for i < BROADCASTS, v < V and p < times * STEPS, and
// calls use(i, sum[i]) for each i.
//   a     a(i, p) is at a[i * A_ROW + p % STEPS * A_STEP + p / STEPS * jump]
//   b     vectors [times * STEPS][V]
template <int V, int A_ROW, int A_STEP, int STEPS, class Use>
__attribute__((always_inline)) inline void multiply(const float* a, int jump, const float* b, int times,
                                                    Prefetch& prefetch, Use&& use) {
    vf sum[BROADCASTS][V];
#pragma GCC unroll 8
    for (int i = 0; i < BROADCASTS; i++)
#pragma GCC unroll 3
        for (int v = 0; v < V; v++) sum[i][v] = vf{};
    for (; times > 0; times--, a += jump, b += STEPS * V * WIDTH) {
#pragma GCC unroll 16
        for (int p = 0; p < STEPS; p++) {
            vf x[V];
#pragma GCC unroll 3
            for (int v = 0; v < V; v++) x[v] = load(b + (p * V + v) * WIDTH);
#pragma GCC unroll 8
            for (int i = 0; i < BROADCASTS; i++) {
                const vf y = splat(a[i * A_ROW + p * A_STEP]);
#pragma GCC unroll 3
                for (int v = 0; v < V; v++) sum[i][v] += y * x[v];
            }
        }
        prefetch.tick(1);
    }
#pragma GCC unroll 8
    for (int i = 0; i < BROADCASTS; i++) use(i, sum[i]);
}

// F: the stored format. Its memory is the thread's scratch memory, so a thread has one object at a time. Call
// begin, update for each tile, then finish.
template <Format F>
class PrefillF32 {
  public:
    // For `rows` query rows of one head group.
    PrefillF32(const Shape& shape, int rows) : s_(shape), rows_(rows), queries_(rows * shape.q_heads) {
        k_pad_ = round_up(s_.k_dim, WIDTH), v_pad_ = round_up(s_.v_dim, WIDTH);
        const int max_columns = round_up(queries_ + (s_.k_heads + s_.v_heads) * WIDTH, WIDTH);
        const long q = (long)max_columns * k_pad_, o = (long)max_columns * v_pad_,
                   k = (long)s_.k_heads * k_pad_ * F32_TILE_TOKENS, v = (long)s_.v_heads * v_pad_ * F32_TILE_TOKENS,
                   logits = PANEL_VECTORS * WIDTH * F32_TILE_TOKENS, out = (long)WIDTH * v_pad_;
        const long panels = (sizeof(Panel) * (max_columns / WIDTH) + 63) / 64 * 16;
        float* next_float =
            static_cast<float*>(scratch(4 * (panels + q + o + k + v + logits + out + 2L * max_columns)));
        const auto take = [&](long floats) { return std::exchange(next_float, next_float + floats); };
        panels_ = reinterpret_cast<Panel*>(take(panels));
        q_ = take(q), o_ = take(o), k_ = take(k), v_ = take(v), logits_ = take(logits), out_ = take(out);
        row_max_ = take(max_columns), row_sum_ = take(max_columns);
    }

    // The most tokens of a tile.
    static constexpr int tile_tokens = F32_TILE_TOKENS;

    // Sets the queries.
    //   q          [rows][q_heads][k_dim], beginning at the first row and the group's first head
    //   positions  [rows]; must stay valid
    //   window     tokens that a row sees, its own included
    void begin(const RowArray& q, const int64_t* positions, int64_t window) {
        positions_ = positions, window_ = window;
        make_panels();
        for (int i = 0; i < columns_; i++) row_max_[i] = -INFINITY;
        std::memset(row_sum_, 0, 4L * columns_);
        std::memset(o_, 0, 4L * columns_ * v_pad_);
        switch (q.format) {
            case Format::f32: return transpose_query<Format::f32>(q);
            case Format::bf16: return transpose_query<Format::bf16>(q);
            default: return transpose_query<Format::f16>(q);
        }
    }

    // Adds one tile of at most tile_tokens tokens to the state. prefetch: of the tile after it.
    void update(const TokenRun& tile, Prefetch prefetch = {}) {
        prefetch.expect(ticks_);
        for (int head = 0; head < s_.k_heads; head++)
            widen_rows(k_ + (long)head * k_pad_ * tile_tokens, tile.k + head * tile.k_head_stride, tile.k_stride,
                       tile.k_scales + head * tile.k_head_stride, tile.k_scale_stride, tile.count, s_.k_dim);
        values_ = v_;
        if (tile.v == tile.k && tile.v_stride == tile.k_stride && s_.k_heads == 1 && s_.v_heads == 1 &&
            s_.v_dim <= s_.k_dim)
            values_ = k_;  // V is the beginning of each row of K (MLA)
        else
            for (int head = 0; head < s_.v_heads; head++)
                widen_rows(v_ + (long)head * v_pad_ * tile_tokens, tile.v + head * tile.v_head_stride, tile.v_stride,
                           tile.v_scales + head * tile.v_head_stride, tile.v_scale_stride, tile.count, s_.v_dim);
        for (int i = 0; i < panel_count_; i++) switch (panels_[i].vectors) {
                case 1: update_panel<1>(panels_[i], tile, prefetch); break;
                case 2: update_panel<2>(panels_[i], tile, prefetch); break;
                case 3: update_panel<3>(panels_[i], tile, prefetch); break;
            }
        ticks_ = prefetch.ticks();
    }

    // Calls write(head of group, row, o, lse) for each query: o float32 [v_dim], normalised; lse natural log,
    // -inf where the query saw no token.
    template <class Write>
    void finish(Write&& write) {
        const double scale = s_.soft_cap ? 1.0 : s_.scale;
        for (int p = 0; p < panel_count_; p++) {
            const Panel& panel = panels_[p];
            const int ld = panel.vectors * WIDTH;
            for (int first = 0; first < panel.query_count; first += WIDTH) {
                const float* o = o_ + (long)panel.first_column * v_pad_ + first;
                const vf row_sum = load(row_sum_ + panel.first_column + first);
                const vf inverse = row_sum == 0.0f ? vf{} : 1.0f / row_sum;
                for (int d = 0; d < v_pad_; d += WIDTH) {
                    vu r[WIDTH];
                    for (int l = 0; l < WIDTH; l++) r[l] = (vu)(load(o + (long)(d + l) * ld) * inverse);
                    transpose(r);
                    for (int l = 0; l < WIDTH; l++) store_as(out_ + (long)l * v_pad_ + d, r[l]);
                }
                for (int l = 0; l < WIDTH && first + l < panel.query_count; l++) {
                    const int i = panel.first_query + first + l;
                    // float64: the rounding of a float32 product would show in the lse of logits in the
                    // thousands.
                    const double max_logit = row_max_[panel.first_column + first + l] / (double)to_log2() * scale;
                    const float lse = row_sum[l] == 0 ? -INFINITY : (float)(max_logit + std::log(row_sum[l]));
                    write(i / rows_, i % rows_, out_ + (long)l * v_pad_, lse);
                }
            }
        }
    }

  private:
    // Queries that share a K head and a V head, one a lane. A column is the place of a query in q_, o_,
    // row_max_ and row_sum_; each panel has whole vectors of columns.
    struct Panel {
        int first_query, query_count;
        int vectors, first_column;
        int k_head, v_head;
        int64_t lowest_position, highest_position;  // of its rows
    };

    float to_log2() const { return (s_.soft_cap ? 1.0f : s_.scale) * LOG2_E; }

    // Divides the queries among panels of about equal size.
    void make_panels() {
        panel_count_ = 0, columns_ = 0;
        const int by_k = queries_ / s_.k_heads, by_v = queries_ / s_.v_heads;
        for (int first = 0; first < queries_;) {
            const int k_head = first / by_k, v_head = first / by_v;
            const int last = std::min((k_head + 1) * by_k, (v_head + 1) * by_v);
            int vectors = (last - first + WIDTH - 1) / WIDTH;
            for (int left = (vectors + PANEL_VECTORS - 1) / PANEL_VECTORS; left > 0; left--) {
                const int panel_vectors = (vectors + left - 1) / left,
                          count = std::min(panel_vectors * WIDTH, last - first);
                Panel& panel = panels_[panel_count_++];
                panel = {first, count, panel_vectors, columns_, k_head, v_head, INT64_MAX, INT64_MIN};
                for (int i = first; i < first + count; i++) {
                    panel.lowest_position = std::min(panel.lowest_position, positions_[i % rows_]);
                    panel.highest_position = std::max(panel.highest_position, positions_[i % rows_]);
                }
                first += count, columns_ += panel_vectors * WIDTH, vectors -= panel_vectors;
            }
        }
    }

    // Writes q_: [dim][column] of each panel; zeros beyond its last query and beyond k_dim.
    template <Format Q>
    void transpose_query(const RowArray& q) {
        constexpr int size = Q == Format::f32 ? 4 : 2;
        for (int p = 0; p < panel_count_; p++) {
            const Panel& panel = panels_[p];
            float* to = q_ + (long)panel.first_column * k_pad_;
            const int ld = panel.vectors * WIDTH;
            for (int first = 0; first < ld; first += WIDTH)
                for (int d = 0; d < k_pad_; d += WIDTH) {
                    vu r[WIDTH];
                    for (int l = 0; l < WIDTH; l++) {
                        const int i = panel.first_query + first + l;
                        const int64_t from = i % rows_ * q.row_stride + i / rows_ * q.head_stride;
                        r[l] = first + l < panel.query_count
                                   ? (vu)elements<Q>(static_cast<const uint8_t*>(q.data) + from * size, nullptr, d,
                                                     s_.k_dim)
                                   : vu{};
                    }
                    transpose(r);
                    for (int l = 0; l < WIDTH; l++) store_as(to + (long)(d + l) * ld + first, r[l]);
                }
        }
    }

    // Converts `count` rows of one head to float32 [dim / WIDTH][tile_tokens][WIDTH]; zeros beyond the last
    // dim, and beyond the last token up to a multiple of BROADCASTS.
    static void widen_rows(float* to, const uint8_t* from, int64_t stride, const uint8_t* scales, int64_t scale_stride,
                           int count, int dim) {
        const int padded = round_up(count, BROADCASTS);
        for (int d = 0; d < dim; d += WIDTH, to += tile_tokens * WIDTH) {
            for (int j = 0; j < count; j++)
                store(to + j * WIDTH, elements<F>(from + j * stride, scales + j * scale_stride, d, dim));
            for (int j = count; j < padded; j++) store(to + j * WIDTH, vf{});
        }
    }

    template <int V>
    void update_panel(const Panel& panel, const TokenRun& tile, Prefetch& prefetch) {
        // Newest tokens, counted from the tile's first, that some query sees and that all queries see.
        const int64_t newest = panel.highest_position - tile.position, oldest = panel.lowest_position - tile.position;
        const int to = (int)std::clamp<int64_t>(newest + 1, 0, tile.count), end = round_up(to, BROADCASTS);
        const int64_t first = window_ < oldest + 1 ? oldest + 1 - window_ : 0;
        if (first >= to) return;
        const int from = (int)first / BROADCASTS * BROADCASTS;
        compute_logits<V>(panel, from, end, prefetch);
        if (s_.soft_cap)
            for (int i = from * V * WIDTH; i < end * V * WIDTH; i += WIDTH)
                store(logits_ + i, tanh(load(logits_ + i) * (s_.scale / s_.soft_cap)) * s_.soft_cap);
        bool ragged = end > tile.count || oldest < end - 1 || newest - from >= window_;
        if (ragged) mask<V>(panel, tile, from, end);
        vf rescale[V];
        ragged |= raise_row_max<V>(panel, from, end, rescale);
        ragged ? compute_weights<V, true>(panel, from, end, rescale)
               : compute_weights<V, false>(panel, from, end, rescale);
        accumulate_output<V>(panel, from, end, rescale, prefetch);
    }

    // Logits of tokens [from, end): q.k.
    template <int V>
    void compute_logits(const Panel& panel, int from, int end, Prefetch& prefetch) {
        const float* k = k_ + (long)panel.k_head * k_pad_ * tile_tokens;
        const float* q = q_ + (long)panel.first_column * k_pad_;
        for (int d = 0; d < k_pad_; d += Q_DIMS_AT_ONCE)
            for (int j = from; j < end; j += BROADCASTS) {
                float* out = logits_ + j * V * WIDTH;
                multiply<V, WIDTH, 1, WIDTH>(k + (long)d * tile_tokens + j * WIDTH, tile_tokens * WIDTH,
                                             q + (long)d * V * WIDTH, std::min(Q_DIMS_AT_ONCE, k_pad_ - d) / WIDTH,
                                             prefetch, [&](int i, const vf* sum) {
                                                 for (int v = 0; v < V; v++) {
                                                     float* x = out + (i * V + v) * WIDTH;
                                                     store(x, d ? load(x) + sum[v] : sum[v]);
                                                 }
                                             });
            }
    }

    // Sets logits to -inf where a query may not see a token, and beyond the tile's end.
    template <int V>
    void mask(const Panel& panel, const TokenRun& tile, int from, int end) {
        alignas(64) int32_t lowest[V * WIDTH], reach[V * WIDTH];
        for (int l = 0; l < V * WIDTH; l++) {
            const int i = panel.first_query + std::min(l, panel.query_count - 1);
            const int64_t seen = positions_[i % rows_] - tile.position + 1;
            reach[l] = (int)std::clamp<int64_t>(seen, 0, tile.count);
            lowest[l] = window_ < seen ? (int)std::min<int64_t>(seen - window_, tile.count) : 0;
        }
        for (int j = from; j < end; j++)
            for (int v = 0; v < V; v++) {
                float* x = logits_ + (j * V + v) * WIDTH;
                const vi low = load_as<vi>(lowest + v * WIDTH), high = load_as<vi>(reach + v * WIDTH);
                vf logit = load(x);
                logit = low > j ? splat(-INFINITY) : logit;
                logit = high <= j ? splat(-INFINITY) : logit;
                store(x, logit);
            }
    }

    // Updates row_max_ with the tile. rescale: the factor that brings o and row_sum to the new row_max.
    // Returns whether some query has seen only logits of -inf so far.
    template <int V>
    bool raise_row_max(const Panel& panel, int from, int end, vf* rescale) {
        constexpr int CHAINS = 4;
        vf tile_max[CHAINS][V];
        for (int c = 0; c < CHAINS; c++)
            for (int v = 0; v < V; v++) tile_max[c][v] = splat(-INFINITY);
        for (int j = from; j < end; j += CHAINS)
            for (int c = 0; c < CHAINS; c++)
                for (int v = 0; v < V; v++)  // this operand order skips NaN; its weight is NaN
                    tile_max[c][v] = max(load(logits_ + ((j + c) * V + v) * WIDTH), tile_max[c][v]);
        bool unseen = false;
        for (int v = 0; v < V; v++) {
            float* row_max = row_max_ + panel.first_column + v * WIDTH;
            const vf old_max = load(row_max);
            const vf new_max =
                max(max(max(tile_max[0][v], tile_max[1][v]), max(tile_max[2][v], tile_max[3][v])) * to_log2(), old_max);
            store(row_max, new_max);
            const vf base = new_max == -INFINITY ? vf{} : new_max;
            unseen |= any_above(-new_max, 0x1.fffffep127f);
            rescale[v] = exp2<true>(old_max, base, 1.0f);
        }
        return unseen;
    }

    // Turns logits into softmax weights, and adds them to row_sum_. RAGGED: some logits are -inf.
    template <int V, bool RAGGED>
    void compute_weights(const Panel& panel, int from, int end, const vf* rescale) {
        vf base[V], sum[V];
        for (int v = 0; v < V; v++) {
            base[v] = load(row_max_ + panel.first_column + v * WIDTH);
            if (RAGGED) base[v] = base[v] == -INFINITY ? vf{} : base[v];
            sum[v] = vf{};
        }
        const float scale = to_log2();
        for (int j = from; j < end; j++)
            for (int v = 0; v < V; v++) {
                float* x = logits_ + (j * V + v) * WIDTH;
                const vf logit = load(x);
                vf p = exp2_near(logit * scale - base[v]);
                if (RAGGED) p = logit == -INFINITY ? vf{} : p;
                sum[v] += p;
                store(x, p);
            }
        for (int v = 0; v < V; v++) {
            float* row_sum = row_sum_ + panel.first_column + v * WIDTH;
            store(row_sum, load(row_sum) * rescale[v] + sum[v]);
        }
    }

    // o = o * rescale + weights * V.
    template <int V>
    void accumulate_output(const Panel& panel, int from, int end, const vf* rescale, Prefetch& prefetch) {
        const float* values = values_ + (long)panel.v_head * v_pad_ * tile_tokens + from * WIDTH;
        float* o = o_ + (long)panel.first_column * v_pad_;
        for (int d = 0; d < v_pad_; d += BROADCASTS)
            multiply<V, 1, WIDTH, BROADCASTS>(values + d / WIDTH * WIDTH * tile_tokens + d % WIDTH, BROADCASTS * WIDTH,
                                              logits_ + from * V * WIDTH, (end - from) / BROADCASTS, prefetch,
                                              [&](int i, const vf* sum) {
                                                  for (int v = 0; v < V; v++) {
                                                      float* to = o + ((long)(d + i) * V + v) * WIDTH;
                                                      store(to, load(to) * rescale[v] + sum[v]);
                                                  }
                                              });
    }

    Shape s_;
    int rows_, queries_, k_pad_, v_pad_, columns_ = 0, panel_count_ = 0;
    Panel* panels_;
    float *q_, *o_, *k_, *v_, *values_ = nullptr, *logits_, *out_, *row_max_, *row_sum_;
    const int64_t* positions_ = nullptr;
    int64_t window_ = 0;
    int ticks_ = 1000;  // of the last tile; see Prefetch
};

}  // namespace ISA
}  // namespace farshore

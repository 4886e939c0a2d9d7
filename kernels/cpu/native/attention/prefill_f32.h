// Attention of many queries, bound by arithmetic, float32 in every format. A panel of queries lies across the lanes
// of three vectors: q is [dim][query], logits and weights are [token][query], o is [dim][query]. So the mask,
// maximum, sum and scaling of 48 queries are plain vector operations, and both products are one loop: an element
// of K or of V is broadcast and multiplied with three vectors that lie in a row. K and V of a tile are widened once
// for all panels. Included after pack.h.
//
// Queries are ordered [head of group][row], so those that share a K head, and those that share a V head, are
// contiguous. The running state of each: peak (log2 of what its weights are relative to), mass, and o not yet
// divided by it.

namespace farshore {
namespace ISA {

constexpr int LANES_TILE = 64;     // tokens: their K and V, widened, and a panel's weights lie in L1
constexpr int PANEL_VECTORS = 3;   // ELEMENTS x PANEL_VECTORS sums live in registers
#if WIDTH == 16
constexpr int ELEMENTS = 8;
#else
constexpr int ELEMENTS = 4;
#endif
constexpr int Q_DIMS = 128;        // of q are multiplied at a time: a panel of them takes half of L1

// sum[i][v] = a(i, p) b[p][v], summed over p < times * STEPS, b [][V] vectors; then use(i, sum[i]). Element (i, p) of
// a lies at i * A_ROW + p % STEPS * A_STEP + p / STEPS * jump.
template <int V, int A_ROW, int A_STEP, int STEPS, class Use>
__attribute__((always_inline)) inline void multiply(const float* a, int jump, const float* b, int times,
                                                    Prefetch& next, Use&& use) {
    vf sum[ELEMENTS][V];
#pragma GCC unroll 8
    for (int i = 0; i < ELEMENTS; i++)
#pragma GCC unroll 3
        for (int v = 0; v < V; v++) sum[i][v] = vf{};
    for (; times > 0; times--, a += jump, b += STEPS * V * WIDTH) {
#pragma GCC unroll 16
        for (int p = 0; p < STEPS; p++) {
            vf x[V];
#pragma GCC unroll 3
            for (int v = 0; v < V; v++) x[v] = load(b + (p * V + v) * WIDTH);
#pragma GCC unroll 8
            for (int i = 0; i < ELEMENTS; i++) {
                const vf y = splat(a[i * A_ROW + p * A_STEP]);
#pragma GCC unroll 3
                for (int v = 0; v < V; v++) sum[i][v] += y * x[v];
            }
        }
        next.tick(1);
    }
#pragma GCC unroll 8
    for (int i = 0; i < ELEMENTS; i++) use(i, sum[i]);
}

template <Format F>
class Lanes {
  public:
    // Everything lies in the thread's scratch.
    Lanes(const Shape& shape, int rows) : s_(shape), rows_(rows), queries_(rows * shape.q_heads) {
        k_pad_ = round_up(s_.k_dim, WIDTH), v_pad_ = round_up(s_.v_dim, WIDTH);
        const int most_lanes = round_up(queries_ + (s_.k_heads + s_.v_heads) * WIDTH, WIDTH);
        const long q = (long)most_lanes * k_pad_, o = (long)most_lanes * v_pad_,
                   k = (long)s_.k_heads * k_pad_ * LANES_TILE, v = (long)s_.v_heads * v_pad_ * LANES_TILE,
                   logits = PANEL_VECTORS * WIDTH * LANES_TILE, out = (long)WIDTH * v_pad_;
        const long panels = (sizeof(Panel) * (most_lanes / WIDTH) + 63) / 64 * 16;
        float* at = static_cast<float*>(scratch(4 * (panels + q + o + k + v + logits + out + 2L * most_lanes)));
        const auto take = [&](long floats) { return std::exchange(at, at + floats); };
        panels_ = reinterpret_cast<Panel*>(take(panels));
        q_ = take(q), o_ = take(o), k_ = take(k), v_ = take(v), logits_ = take(logits), out_ = take(out);
        peak_ = take(most_lanes), mass_ = take(most_lanes);
    }

    static constexpr int tile = LANES_TILE;

    // q: of the first row and the group's first head.
    void begin(const Array& q, const int64_t* positions, int64_t window) {
        positions_ = positions, window_ = window;
        lay_out();
        for (int i = 0; i < lanes_; i++) peak_[i] = -INFINITY;
        std::memset(mass_, 0, 4L * lanes_);
        std::memset(o_, 0, 4L * lanes_ * v_pad_);
        switch (q.format) {
            case Format::f32: return turn<Format::f32>(q);
            case Format::bf16: return turn<Format::bf16>(q);
            default: return turn<Format::f16>(q);
        }
    }

    // One tile of at most `tile` tokens; `next` is what comes after it.
    void absorb(const Tokens& t, Prefetch next = {}) {
        next.expect(units_);
        for (int head = 0; head < s_.k_heads; head++)
            widen_rows(k_ + (long)head * k_pad_ * tile, t.k + head * t.k_head_stride, t.k_stride,
                       t.k_scales + head * t.k_head_stride, t.k_scale_stride, t.count, s_.k_dim);
        values_ = v_;
        if (t.v == t.k && t.v_stride == t.k_stride && s_.k_heads == 1 && s_.v_heads == 1 && s_.v_dim <= s_.k_dim)
            values_ = k_;  // V is the first part of K (MLA)
        else
            for (int head = 0; head < s_.v_heads; head++)
                widen_rows(v_ + (long)head * v_pad_ * tile, t.v + head * t.v_head_stride, t.v_stride,
                           t.v_scales + head * t.v_head_stride, t.v_scale_stride, t.count, s_.v_dim);
        for (int i = 0; i < panel_count_; i++) switch (panels_[i].vectors) {
                case 1: absorb_panel<1>(panels_[i], t, next); break;
                case 2: absorb_panel<2>(panels_[i], t, next); break;
                case 3: absorb_panel<3>(panels_[i], t, next); break;
            }
        units_ = next.units();
    }

    // put(head of group, row, o / mass as f32[v_pad], lse), for every query.
    template <class Put>
    void finish(Put&& put) {
        const double scale = s_.soft_cap ? 1.0 : s_.scale;
        for (int at = 0; at < panel_count_; at++) {
            const Panel& panel = panels_[at];
            const int ld = panel.vectors * WIDTH;
            for (int first = 0; first < panel.count; first += WIDTH) {
                const float* o = o_ + (long)panel.lane * v_pad_ + first;
                const vf mass = load(mass_ + panel.lane + first);
                const vf share = mass == 0.0f ? vf{} : 1.0f / mass;
                for (int d = 0; d < v_pad_; d += WIDTH) {
                    vu r[WIDTH];
                    for (int l = 0; l < WIDTH; l++) r[l] = (vu)(load(o + (long)(d + l) * ld) * share);
                    transpose(r);
                    for (int l = 0; l < WIDTH; l++) store_as(out_ + (long)l * v_pad_ + d, r[l]);
                }
                for (int l = 0; l < WIDTH && first + l < panel.count; l++) {
                    const int i = panel.first + first + l;
                    // In float64: of logits in the thousands, float32 products would show in the lse.
                    const double peak = peak_[panel.lane + first + l] / (double)to_log2() * scale;
                    const float lse = mass[l] == 0 ? -INFINITY : (float)(peak + std::log(mass[l]));
                    put(i / rows_, i % rows_, out_ + (long)l * v_pad_, lse);
                }
            }
        }
    }

  private:
    // Up to PANEL_VECTORS vectors of queries that share a K head and a V head.
    struct Panel {
        int first, count;  // queries
        int vectors, lane;  // lanes before it
        int k_head, v_head;
        int64_t lowest, highest;  // position
    };

    float to_log2() const { return (s_.soft_cap ? 1.0f : s_.scale) * LOG2_E; }

    void lay_out() {
        panel_count_ = 0, lanes_ = 0;
        const int by_k = queries_ / s_.k_heads, by_v = queries_ / s_.v_heads;
        for (int first = 0; first < queries_;) {
            const int k_head = first / by_k, v_head = first / by_v;
            const int last = std::min((k_head + 1) * by_k, (v_head + 1) * by_v);
            int vectors = (last - first + WIDTH - 1) / WIDTH;
            for (int left = (vectors + PANEL_VECTORS - 1) / PANEL_VECTORS; left > 0; left--) {
                const int mine = (vectors + left - 1) / left, count = std::min(mine * WIDTH, last - first);
                Panel& panel = panels_[panel_count_++];
                panel = {first, count, mine, lanes_, k_head, v_head, INT64_MAX, INT64_MIN};
                for (int i = first; i < first + count; i++) {
                    panel.lowest = std::min(panel.lowest, positions_[i % rows_]);
                    panel.highest = std::max(panel.highest, positions_[i % rows_]);
                }
                first += count, lanes_ += mine * WIDTH, vectors -= mine;
            }
        }
    }

    // q -> [dim][query] of each panel, zeros beyond its end.
    template <Format Q>
    void turn(const Array& q) {
        constexpr int size = Q == Format::f32 ? 4 : 2;
        for (int at = 0; at < panel_count_; at++) {
            const Panel& panel = panels_[at];
            float* to = q_ + (long)panel.lane * k_pad_;
            const int ld = panel.vectors * WIDTH;
            for (int first = 0; first < ld; first += WIDTH)
                for (int d = 0; d < k_pad_; d += WIDTH) {
                    vu r[WIDTH];
                    for (int l = 0; l < WIDTH; l++) {
                        const int i = panel.first + first + l;
                        const int64_t from = i % rows_ * q.row_stride + i / rows_ * q.head_stride;
                        r[l] = first + l < panel.count ? (vu)elements<Q>(static_cast<const uint8_t*>(q.data) + from * size,
                                                                         nullptr, d, s_.k_dim)
                                                       : vu{};
                    }
                    transpose(r);
                    for (int l = 0; l < WIDTH; l++) store_as(to + (long)(d + l) * ld + first, r[l]);
                }
        }
    }

    // Rows of one head -> float32 [dim / WIDTH][tile][WIDTH], zeros beyond the last dim, and beyond the last token
    // up to a multiple of ELEMENTS.
    static void widen_rows(float* to, const uint8_t* from, int64_t stride, const uint8_t* scales, int64_t scale_stride,
                           int count, int dim) {
        const int padded = round_up(count, ELEMENTS);
        for (int d = 0; d < dim; d += WIDTH, to += tile * WIDTH) {
            for (int j = 0; j < count; j++)
                store(to + j * WIDTH, elements<F>(from + j * stride, scales + j * scale_stride, d, dim));
            for (int j = count; j < padded; j++) store(to + j * WIDTH, vf{});
        }
    }

    template <int V>
    void absorb_panel(const Panel& panel, const Tokens& t, Prefetch& next) {
        // Relative to the tile: the newest token that any query sees, and that all see.
        const int64_t newest = panel.highest - t.position, oldest = panel.lowest - t.position;
        const int to = (int)std::clamp<int64_t>(newest + 1, 0, t.count), end = round_up(to, ELEMENTS);
        const int64_t first = window_ < oldest + 1 ? oldest + 1 - window_ : 0;
        if (first >= to) return;
        const int from = (int)first / ELEMENTS * ELEMENTS;
        score<V>(panel, from, end, next);
        if (s_.soft_cap)
            for (int at = from * V * WIDTH; at < end * V * WIDTH; at += WIDTH)
                store(logits_ + at, tanh(load(logits_ + at) * (s_.scale / s_.soft_cap)) * s_.soft_cap);
        bool ragged = end > t.count || oldest < end - 1 || newest - from >= window_;
        if (ragged) mask<V>(panel, t, from, end);
        vf fade[V];
        ragged |= raise_peaks<V>(panel, from, end, fade);
        ragged ? weigh<V, true>(panel, from, end, fade) : weigh<V, false>(panel, from, end, fade);
        gather<V>(panel, from, end, fade, next);
    }

    // Logits of tokens [from, end).
    template <int V>
    void score(const Panel& panel, int from, int end, Prefetch& next) {
        const float* k = k_ + (long)panel.k_head * k_pad_ * tile;
        const float* q = q_ + (long)panel.lane * k_pad_;
        for (int d = 0; d < k_pad_; d += Q_DIMS)
            for (int j = from; j < end; j += ELEMENTS) {
                float* out = logits_ + j * V * WIDTH;
                multiply<V, WIDTH, 1, WIDTH>(k + (long)d * tile + j * WIDTH, tile * WIDTH, q + (long)d * V * WIDTH,
                                             std::min(Q_DIMS, k_pad_ - d) / WIDTH, next, [&](int i, const vf* sum) {
                                                 for (int v = 0; v < V; v++) {
                                                     float* x = out + (i * V + v) * WIDTH;
                                                     store(x, d ? load(x) + sum[v] : sum[v]);
                                                 }
                                             });
            }
    }

    // -inf where a query may not see a token.
    template <int V>
    void mask(const Panel& panel, const Tokens& t, int from, int end) {
        alignas(64) int32_t lowest[V * WIDTH], reach[V * WIDTH];
        for (int l = 0; l < V * WIDTH; l++) {
            const int i = panel.first + std::min(l, panel.count - 1);
            const int64_t seen = positions_[i % rows_] - t.position + 1;
            reach[l] = (int)std::clamp<int64_t>(seen, 0, t.count);
            lowest[l] = window_ < seen ? (int)std::min<int64_t>(seen - window_, t.count) : 0;
        }
        for (int j = from; j < end; j++)
            for (int v = 0; v < V; v++) {
                float* x = logits_ + (j * V + v) * WIDTH;
                const vi low = load_as<vi>(lowest + v * WIDTH), high = load_as<vi>(reach + v * WIDTH);
                vf it = load(x);
                it = low > j ? splat(-INFINITY) : it;
                it = high <= j ? splat(-INFINITY) : it;
                store(x, it);
            }
    }

    // fade: what o so far must be multiplied by. True if some query has seen nothing but logits of -inf.
    template <int V>
    bool raise_peaks(const Panel& panel, int from, int end, vf* fade) {
        constexpr int CHAINS = 4;
        vf top[CHAINS][V];
        for (int c = 0; c < CHAINS; c++)
            for (int v = 0; v < V; v++) top[c][v] = splat(-INFINITY);
        for (int j = from; j < end; j += CHAINS)
            for (int c = 0; c < CHAINS; c++)
                for (int v = 0; v < V; v++)  // in this order a NaN is passed over; its weight will be one
                    top[c][v] = max(load(logits_ + ((j + c) * V + v) * WIDTH), top[c][v]);
        bool nothing = false;
        for (int v = 0; v < V; v++) {
            float* peak = peak_ + panel.lane + v * WIDTH;
            const vf before = load(peak);
            const vf now = max(max(max(top[0][v], top[1][v]), max(top[2][v], top[3][v])) * to_log2(), before);
            store(peak, now);
            const vf base = now == -INFINITY ? vf{} : now;
            nothing |= any_above(-now, 0x1.fffffep127f);
            fade[v] = exp2<true>(before, base, 1.0f);
        }
        return nothing;
    }

    // Logits -> weights, summed into the mass.
    template <int V, bool RAGGED>
    void weigh(const Panel& panel, int from, int end, const vf* fade) {
        vf base[V], sum[V];
        for (int v = 0; v < V; v++) {
            base[v] = load(peak_ + panel.lane + v * WIDTH);
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
            float* mass = mass_ + panel.lane + v * WIDTH;
            store(mass, load(mass) * fade[v] + sum[v]);
        }
    }

    // o = o fade + weights V.
    template <int V>
    void gather(const Panel& panel, int from, int end, const vf* fade, Prefetch& next) {
        const float* values = values_ + (long)panel.v_head * v_pad_ * tile + from * WIDTH;
        float* o = o_ + (long)panel.lane * v_pad_;
        for (int d = 0; d < v_pad_; d += ELEMENTS)
            multiply<V, 1, WIDTH, ELEMENTS>(values + d / WIDTH * WIDTH * tile + d % WIDTH, ELEMENTS * WIDTH,
                                            logits_ + from * V * WIDTH, (end - from) / ELEMENTS, next,
                                            [&](int i, const vf* sum) {
                                                for (int v = 0; v < V; v++) {
                                                    float* at = o + ((long)(d + i) * V + v) * WIDTH;
                                                    store(at, load(at) * fade[v] + sum[v]);
                                                }
                                            });
    }

    Shape s_;
    int rows_, queries_, k_pad_, v_pad_, lanes_ = 0, panel_count_ = 0;
    Panel* panels_;
    float *q_, *o_, *k_, *v_, *values_ = nullptr, *logits_, *out_, *peak_, *mass_;
    const int64_t* positions_ = nullptr;
    int64_t window_ = 0;
    int units_ = 1000;  // of work in the last tile; see Prefetch
};

}  // namespace ISA
}  // namespace farshore

// Attention of many queries with bfloat16 products (see lanes.h for float32): the state of a block of queries, tile
// by tile of tokens. Included after gemm.h.
//
// Queries are ordered [head of group][row], so those that share a K head, and those that share a V head, are
// contiguous. The running state per query: peak (of unscaled logits), mass, and o not yet divided by it.

namespace farshore {
namespace ISA {

constexpr int PANEL = 32;          // queries whose logits stay in L1 between the two products
constexpr int ROWS_AT_A_TIME = 4;  // of these, between slices of the next panel's logits
constexpr int SMALL_TILE = 32;     // tokens; few queries: K, V and their packed copies fit into L1
constexpr int LARGE_TILE = 256;    // many queries: amortises packing and the loads and stores of o

template <class Math, Format F>
class Attend {
  public:
    typedef typename Math::Element Element;

    // Everything lies in the thread's scratch.
    Attend(const Shape& shape, int rows) : s_(shape), rows_(rows), queries_(rows * shape.q_heads) {
        by_rows_ = Math::by_rows(queries_, s_);
        tile = queries_ > PANEL ? LARGE_TILE : SMALL_TILE;
        k_pad_ = round_up(s_.k_dim, Math::STEP);
        v_pad_ = round_up(s_.v_dim, Math::STEP);
        constexpr bool scaled = F == Format::i8 || F == Format::i4;
        k_groups_ = scaled ? (s_.k_dim + SCALE_ELEMENTS - 1) / SCALE_ELEMENTS : 0;
        v_groups_ = scaled ? (s_.v_dim + SCALE_ELEMENTS - 1) / SCALE_ELEMENTS : 0;
        const int k_parts = k_groups_ ? k_groups_ : 1, v_parts = v_groups_ ? v_groups_ : 1;
        const long padded = round_up(queries_, 16), element = sizeof(Element);
        long total = 0;
        const auto take = [&](long bytes) {
            const long at = total;
            total += (bytes + 63) / 64 * 64;
            return at;
        };
        const long peak = take(4 * padded), mass = take(4L * WIDTH * padded), o = take(4 * padded * v_pad_),
                   q = take(element * padded * k_pad_), k = take(element * s_.k_heads * k_pad_ * tile),
                   v = take(element * s_.v_heads * v_pad_ * tile), logits = take(4L * k_parts * PANEL * tile),
                   ahead = take(4L * k_parts * PANEL * tile),
                   weights = take(element * v_parts * PANEL * tile), factor = take(4L * PANEL),
                   k_scale = take(4L * s_.k_heads * k_groups_ * tile),
                   v_scale = take(4L * s_.v_heads * v_groups_ * tile);
        uint8_t* memory = static_cast<uint8_t*>(scratch(total));
        const auto floats = [&](long at) { return reinterpret_cast<float*>(memory + at); };
        const auto elements = [&](long at) { return reinterpret_cast<Element*>(memory + at); };
        peak_ = floats(peak), mass_ = floats(mass), o_ = floats(o), logits_ = floats(logits), ahead_ = floats(ahead);
        factor_ = floats(factor), k_scale_ = floats(k_scale), v_scale_ = floats(v_scale);
        q_ = elements(q), k_ = elements(k), v_ = elements(v), weights_ = elements(weights);
    }

    int tile;

    // q: bfloat16, of the first row and the group's first head.
    void begin(const Array& q, const int64_t* positions, int64_t window) {
        positions_ = positions;
        lowest_position_ = positions[0];
        for (int row = 1; row < rows_; row++) lowest_position_ = std::min(lowest_position_, positions[row]);
        window_ = window;
        const int padded = round_up(queries_, 16);
        for (int i = 0; i < padded; i++) peak_[i] = -INFINITY;
        std::memset(mass_, 0, 4L * WIDTH * padded);
        std::memset(o_, 0, 4L * padded * v_pad_);
        std::memset(q_, 0, sizeof(Element) * padded * k_pad_);
        for (int head = 0, i = 0; head < s_.q_heads; head++)
            for (int row = 0; row < rows_; row++, i++) {
                const uint8_t* from =
                    static_cast<const uint8_t*>(q.data) + (row * q.row_stride + head * q.head_stride) * 2;
                if (by_rows_)  // as the right operand: pairs down, queries across
                    for (int d = 0; d < s_.k_dim; d++)
                        std::memcpy(q_ + (d / 2 * 16 + i) * 2 + d % 2, from + 2 * d, 2);
                else
                    std::memcpy(q_ + (long)i * k_pad_, from, 2L * s_.k_dim);
            }
    }

    // One tile of at most `tile` tokens; `next` is what comes after it.
    void absorb(const Tokens& t, Prefetch next = {}) {
        const int n_pad = round_up(t.count, Math::STEP);
        unpack_scales(t, n_pad);
        next.expect(units_);
        const uint8_t* k_rows = t.k;
        int64_t k_stride = t.k_stride;
        if constexpr (requires { Math::template rows_k<F>; }) {
            if (by_rows_) k_rows = Math::template rows_k<F>(k_, t.k, &k_stride, t.count, s_.k_dim, k_pad_);
        }
        for (int head = 0; head < s_.k_heads && !by_rows_; head++)
            Math::template pack_k<F>(k_ + (long)head * k_pad_ * tile, n_pad, t.k + head * t.k_head_stride,
                                     t.k_stride, t.k_scales + head * t.k_head_stride, t.k_scale_stride, t.count,
                                     n_pad, s_.k_dim, k_pad_);
        for (int head = 0; head < s_.v_heads; head++)
            Math::template pack_v<F>(v_ + (long)head * v_pad_ * tile, v_pad_, t.v + head * t.v_head_stride,
                                     t.v_stride, t.v_scales + head * t.v_head_stride, t.v_scale_stride, t.count,
                                     n_pad, s_.v_dim, v_pad_);
        if (by_rows_)
            score_rows(k_rows, k_stride, n_pad);
        else
            score(0, std::min(PANEL, queries_), 0, seen(0, t, n_pad), n_pad, next);
        for (int first = 0; first < queries_; first += PANEL) {
            const int last = std::min(first + PANEL, queries_);
            std::swap(logits_, ahead_);
            // The next panel's logits between this one's rows: products and exponentials use different units.
            const int after = std::min(last + PANEL, queries_);
            const int to_score = last < queries_ ? seen(last, t, n_pad) : 0;
            const int slice = round_up((n_pad * ROWS_AT_A_TIME + PANEL - 1) / PANEL, Math::STEP);
            const int columns = seen(first, t, n_pad);
            int scored = 0;
            for (int i = first; i < last; i++) {
                if (columns) factor_[i - first] = soften(i, first, t, columns, n_pad, next);
                if ((i - first) % ROWS_AT_A_TIME == 0 && scored < to_score) {
                    const int to = std::min(scored + slice, to_score);
                    score(last, after, scored, to, n_pad, next);
                    scored = to;
                }
            }
            if (!columns) continue;
            for (int i = first; i < last; i++)
                if (factor_[i - first] != 1.0f)
                    for (int d = 0; d < v_pad_; d += WIDTH) {
                        float* o = o_ + (long)i * v_pad_ + d;
                        store(o, load(o) * factor_[i - first]);
                    }
            each_head(first, last, s_.v_heads, [&](int head, int a, int b) {
                each_part(v_groups_, v_pad_, [&](int part, int from, int size) {
                    gemm<Math>(weights_ + (long)(part * PANEL + a - first) * n_pad, n_pad,
                               v_ + (long)head * v_pad_ * tile + from * PER_COLUMN, v_pad_,
                               o_ + (long)a * v_pad_ + from, v_pad_, b - a, size, columns, true, next);
                });
            });
        }
        units_ = next.units();
    }

    // put(head of group, row, o / mass as f32[v_pad], lse), for every query.
    template <class Put>
    void finish(Put&& put) {
        const float to_natural = s_.soft_cap ? 1.0f : s_.scale;
        for (int head = 0, i = 0; head < s_.q_heads; head++)
            for (int row = 0; row < rows_; row++, i++) {
                float* o = o_ + (long)i * v_pad_;
                const float mass = hsum(load(mass_ + i * WIDTH));
                const float share = mass == 0 ? 0.0f : 1.0f / mass;
                for (int d = 0; d < v_pad_; d += WIDTH) store(o + d, load(o + d) * share);
                Math::order_columns(o, v_pad_);
                put(head, row, o, mass == 0 ? -INFINITY : peak_[i] * to_natural + std::log(mass));
            }
    }

  private:
    static constexpr int PER_COLUMN = 4 / Math::element_bytes;  // elements of a packed operand per column

    // Tokens of the tile that some query of the panel at `first` sees, rounded up.
    int seen(int first, const Tokens& t, int n_pad) const {
        if (t.position + t.count - 1 <= lowest_position_) return n_pad;
        int64_t most = 0;
        for (int i = first; i < first + PANEL && i < queries_; i++)
            most = std::max(most, positions_[i % rows_] - t.position + 1);
        return (int)std::min<int64_t>(n_pad, round_up((int)std::min<int64_t>(most, n_pad), Math::STEP));
    }

    // do_it(head, a, b) for each K or V head's stretch of the queries [first, last).
    template <class Do>
    void each_head(int first, int last, int heads, Do&& do_it) {
        const int per_head = queries_ / heads;
        for (int a = first; a < last;) {
            const int head = a / per_head;
            const int b = (head + 1) * per_head < last ? (head + 1) * per_head : last;
            do_it(head, a, b);
            a = b;
        }
    }

    // do_it(part, first element, elements) for each scale's stretch of a row; all of it if there are none.
    template <class Do>
    static void each_part(int groups, int padded, Do&& do_it) {
        if (!groups) return do_it(0, 0, padded);
        for (int g = 0; g < groups; g++) {
            const int from = g * SCALE_ELEMENTS;
            do_it(g, from, padded - from < SCALE_ELEMENTS ? padded - from : SCALE_ELEMENTS);
        }
    }

    // Scales of a tile as float32 [head][group][token], zero beyond its end.
    void unpack_scales(const Tokens& t, int n_pad) {
        for (int head = 0; head < s_.k_heads && k_groups_; head++)
            farshore::ISA::unpack_scales(k_scale_ + (long)head * k_groups_ * n_pad, n_pad,
                                         t.k_scales + head * t.k_head_stride, k_groups_, t.k_scale_stride, t.count, n_pad);
        for (int head = 0; head < s_.v_heads && v_groups_; head++)
            farshore::ISA::unpack_scales(v_scale_ + (long)head * v_groups_ * n_pad, n_pad,
                                         t.v_scales + head * t.v_head_stride, v_groups_, t.v_scale_stride, t.count, n_pad);
    }

    // Logits of all queries, [part][query][token], from K's rows.
    void score_rows(const uint8_t* rows, int64_t stride, int n_pad) {
        if constexpr (requires { Math::template rows_k<F>; })
            each_part(k_groups_, k_pad_, [&](int part, int from, int size) {
                Math::scores(q_ + from * 16, rows + 2 * from, stride, n_pad, queries_,
                             ahead_ + (long)part * PANEL * n_pad, n_pad, size);
            });
    }

    // Logits of queries [first, last) and tokens [t0, t1), from packed K.
    void score(int first, int last, int t0, int t1, int n_pad, Prefetch& next) {
        each_head(first, last, s_.k_heads, [&](int head, int a, int b) {
            each_part(k_groups_, k_pad_, [&](int part, int from, int size) {
                gemm<Math>(q_ + (long)a * k_pad_ + from, k_pad_,
                           k_ + (long)head * k_pad_ * tile + (long)from * n_pad + t0 * PER_COLUMN, n_pad,
                           ahead_ + (long)(part * PANEL + a - first) * n_pad + t0, n_pad, b - a, t1 - t0, size,
                           false, next);
            });
        });
    }

    // Logits of query i -> weights relative to the new peak; returns what its o so far must be multiplied by.
    // n_pad is the distance of rows.
    float soften(int i, int first, const Tokens& t, int columns, int n_pad, Prefetch& next) {
        float* x = logits_ + (long)(i - first) * n_pad;
        Element* w = weights_ + (long)(i - first) * n_pad;
        const int v_parts = v_groups_ ? v_groups_ : 1;
        const int64_t position = positions_[rows_ == 1 ? 0 : i % rows_];
        // Token j of the tile counts if lowest <= j < end.
        const int64_t reach = position - t.position + 1;
        const int end = reach < t.count ? (reach > 0 ? (int)reach : 0) : t.count;
        const int lowest = window_ < reach ? (int)(reach - window_) : 0;
        const bool ragged = lowest > 0 || end < columns;
        const auto nothing = [&] {
            for (int part = 0; part < v_parts; part++)
                std::memset(w + (long)part * PANEL * n_pad, 0, sizeof(Element) * columns);
            return 1.0f;
        };
        if (end <= lowest) return nothing();
        if (k_groups_) {
            const float* scale = k_scale_ + (long)(i / (queries_ / s_.k_heads)) * k_groups_ * n_pad;
            for (int j = 0; j < columns; j += WIDTH) {
                vf sum = load(x + j) * load(scale + j);
                for (int g = 1; g < k_groups_; g++)
                    sum += load(x + (long)g * PANEL * n_pad + j) * load(scale + g * n_pad + j);
                store(x + j, sum);
            }
        }
        if (s_.soft_cap)
            for (int j = 0; j < columns; j += WIDTH)
                store(x + j, tanh(load(x + j) * (s_.scale / s_.soft_cap)) * s_.soft_cap);
        if (ragged) {
            for (int j = 0; j < lowest; j++) x[j] = -INFINITY;
            for (int j = end; j < columns; j++) x[j] = -INFINITY;
        }
        vf tops[Math::VECTORS];
        for (vf& it : tops) it = splat(-INFINITY);
        for (int j = 0; j < columns; j += Math::STEP)
            for (int v = 0; v < Math::VECTORS; v++) tops[v] = max(tops[v], load(x + j + v * WIDTH));
        vf top = tops[0];
        for (int v = 1; v < Math::VECTORS; v++) top = max(top, tops[v]);
        const float before = peak_[i];
        const float to_log2 = (s_.soft_cap ? 1.0f : s_.scale) * LOG2_E;
        float factor = 1.0f;
        if (any_above(top, before)) {
            peak_[i] = hmax(top);
            factor = std::exp2((before - peak_[i]) * to_log2);
        } else if (before == -INFINITY) {
            // Overflowed logits only; or a NaN, which must come out.
            if (std::none_of(x + lowest, x + end, [](float it) { return it != it; })) return nothing();
            peak_[i] = 0;
        }
        const vf before_mass = load(mass_ + i * WIDTH) * factor;
        const float* v_scale =
            v_groups_ ? v_scale_ + (long)(i / (queries_ / s_.v_heads)) * v_groups_ * n_pad : nullptr;
        const vf mass = ragged ? weigh<true>(x, w, v_scale, columns, n_pad, peak_[i], to_log2)
                               : weigh<false>(x, w, v_scale, columns, n_pad, peak_[i], to_log2);
        store(mass_ + i * WIDTH, before_mass + mass);
        next.tick(columns / 8);
        return factor;
    }

    // w = exp2((x - peak) to_log2), times V's scales where there are any; returns the sum without these.
    template <bool RAGGED>
    vf weigh(const float* x, Element* w, const float* v_scale, int columns, int n_pad, float peak, float to_log2) const {
        vf sum[Math::VECTORS] = {};
        for (int j = 0; j < columns; j += Math::STEP) {
            vf p[Math::VECTORS];
            for (int v = 0; v < Math::VECTORS; v++) {
                const vf logits = load(x + j + v * WIDTH);
                p[v] = exp2<false>(logits, peak, to_log2);
                if (RAGGED) p[v] = logits == -INFINITY ? vf{} : p[v];
                sum[v] += p[v];
            }
            if (!v_groups_) Math::store_weights(w + j, p);
            for (int g = 0; g < v_groups_; g++) {
                vf scaled[Math::VECTORS];
                for (int v = 0; v < Math::VECTORS; v++)
                    scaled[v] = p[v] * load(v_scale + g * n_pad + j + v * WIDTH);
                Math::store_weights(w + (long)g * PANEL * n_pad + j, scaled);
            }
        }
        for (int v = 1; v < Math::VECTORS; v++) sum[0] += sum[v];
        return sum[0];
    }

    Shape s_;
    int rows_, queries_, k_pad_, v_pad_, k_groups_, v_groups_;
    bool by_rows_;
    float *peak_, *mass_, *o_, *logits_, *ahead_, *factor_, *k_scale_, *v_scale_;
    Element *q_, *k_, *v_, *weights_;
    const int64_t* positions_ = nullptr;
    int64_t lowest_position_ = 0;
    int64_t window_ = 0;
    int units_ = 1000;  // of work in the last tile; see Prefetch
};

}  // namespace ISA
}  // namespace farshore

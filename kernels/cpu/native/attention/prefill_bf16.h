// Attention of many bfloat16 queries with bfloat16 products and float32 sums. Used as prefill_f32.h is, where
// the instruction set has such products. Included by simd/isa_kernels.h after amx.h.
//
// A query is one row of one head; queries are ordered [head of group][row], so those that share a K or a V
// head are adjacent. A panel is PANEL_QUERIES of them. K and V of a tile are packed once for all panels
// (pack.h). For each panel: logits = q K (gemm), softmax weights, o += weights V (gemm).
//
// Quantised K and V are packed as integers. Their scales belong to scale groups along the summed dimension of
// q K and along the columns of weights V. So there is one plane of logits for each scale group of K, which
// softmax_update scales and adds, and one plane of weights for each scale group of V, with its scales
// applied. Other formats have one plane.
//
// The running state of a query is row_max (the largest q.k, or soft-capped logit), row_sum (the
// sum of the softmax weights relative to it) and o, the weighted sum of V, not yet divided by row_sum.

namespace farshore {
namespace ISA {

constexpr int PANEL_QUERIES = 32;       // their logits stay in L1 between the two products
constexpr int ROWS_PER_SLICE = 4;       // queries between two slices of the next panel's logits
constexpr int SMALL_TILE_TOKENS = 32;   // for up to a panel: K, V and their packed copies fit into L1
constexpr int LARGE_TILE_TOKENS = 256;  // for more: amortises packing and the loads and stores of o

// Products: Bf16Pairs or AmxTiles. F: the stored format. Its memory is the thread's scratch memory, so a
// thread has one object at a time. Call begin, update for each tile, then finish.
template <class Products, Format F>
class PrefillBf16 {
  public:
    typedef typename Products::Element Element;

    // For `rows` query rows of one head group.
    PrefillBf16(const Shape& shape, int rows) : s_(shape), rows_(rows), queries_(rows * shape.q_heads) {
        k_by_rows_ = Products::uses_k_rows(queries_, s_);
        tile_tokens = queries_ > PANEL_QUERIES ? LARGE_TILE_TOKENS : SMALL_TILE_TOKENS;
        k_pad_ = round_up(s_.k_dim, Products::STEP);
        v_pad_ = round_up(s_.v_dim, Products::STEP);
        constexpr bool scaled = F == Format::i8 || F == Format::i4;
        k_scale_count_ = scaled ? (s_.k_dim + SCALE_ELEMENTS - 1) / SCALE_ELEMENTS : 0;
        v_scale_count_ = scaled ? (s_.v_dim + SCALE_ELEMENTS - 1) / SCALE_ELEMENTS : 0;
        const int k_planes = k_scale_count_ ? k_scale_count_ : 1, v_planes = v_scale_count_ ? v_scale_count_ : 1;
        const long padded = round_up(queries_, 16), element = sizeof(Element);
        long total = 0;
        const auto take = [&](long bytes) {
            const long offset = total;
            total += (bytes + 63) / 64 * 64;
            return offset;
        };
        const long row_max = take(4 * padded), row_sum = take(4L * WIDTH * padded), o = take(4 * padded * v_pad_),
                   q = take(element * padded * k_pad_), k = take(element * s_.k_heads * k_pad_ * tile_tokens),
                   v = take(element * s_.v_heads * v_pad_ * tile_tokens),
                   logits = take(4L * k_planes * PANEL_QUERIES * tile_tokens),
                   next_logits = take(4L * k_planes * PANEL_QUERIES * tile_tokens),
                   weights = take(element * v_planes * PANEL_QUERIES * tile_tokens), rescale = take(4L * PANEL_QUERIES),
                   k_scales = take(4L * s_.k_heads * k_scale_count_ * tile_tokens),
                   v_scales = take(4L * s_.v_heads * v_scale_count_ * tile_tokens);
        uint8_t* memory = static_cast<uint8_t*>(scratch(total));
        const auto floats = [&](long offset) { return reinterpret_cast<float*>(memory + offset); };
        const auto elements = [&](long offset) { return reinterpret_cast<Element*>(memory + offset); };
        row_max_ = floats(row_max), row_sum_ = floats(row_sum), o_ = floats(o), logits_ = floats(logits),
        next_logits_ = floats(next_logits);
        rescale_ = floats(rescale), k_scales_ = floats(k_scales), v_scales_ = floats(v_scales);
        q_ = elements(q), k_ = elements(k), v_ = elements(v), weights_ = elements(weights);
    }

    int tile_tokens;  // the most tokens of a tile

    // Sets the queries.
    //   q          bfloat16 [rows][q_heads][k_dim], beginning at the first row and the group's first head
    //   positions  [rows]; must stay valid
    //   window     tokens that a row sees, its own included
    void begin(const RowArray& q, const int64_t* positions, int64_t window) {
        positions_ = positions;
        lowest_position_ = positions[0];
        for (int row = 1; row < rows_; row++) lowest_position_ = std::min(lowest_position_, positions[row]);
        window_ = window;
        const int padded = round_up(queries_, 16);
        for (int i = 0; i < padded; i++) row_max_[i] = -INFINITY;
        std::memset(row_sum_, 0, 4L * WIDTH * padded);
        std::memset(o_, 0, 4L * padded * v_pad_);
        std::memset(q_, 0, sizeof(Element) * padded * k_pad_);
        for (int head = 0, i = 0; head < s_.q_heads; head++)
            for (int row = 0; row < rows_; row++, i++) {
                const uint8_t* from =
                    static_cast<const uint8_t*>(q.data) + (row * q.row_stride + head * q.head_stride) * 2;
                if (k_by_rows_)  // q is the right operand: words [k_dim / 2][16]
                    for (int d = 0; d < s_.k_dim; d++) std::memcpy(q_ + (d / 2 * 16 + i) * 2 + d % 2, from + 2 * d, 2);
                else
                    std::memcpy(q_ + (long)i * k_pad_, from, 2L * s_.k_dim);
            }
    }

    // Adds one tile of at most tile_tokens tokens to the state. prefetch: of the tile after it.
    void update(const TokenRun& tile, Prefetch prefetch = {}) {
        const int n_pad = round_up(tile.count, Products::STEP);
        unpack_scales(tile, n_pad);
        prefetch.expect(ticks_);
        const uint8_t* k_rows = tile.k;
        int64_t k_stride = tile.k_stride;
        if constexpr (requires { Products::template k_rows_bf16<F>; }) {
            if (k_by_rows_)
                k_rows = Products::template k_rows_bf16<F>(k_, tile.k, &k_stride, tile.count, s_.k_dim, k_pad_);
        }
        for (int head = 0; head < s_.k_heads && !k_by_rows_; head++)
            Products::template pack_k<F>(
                k_ + (long)head * k_pad_ * tile_tokens, n_pad, tile.k + head * tile.k_head_stride, tile.k_stride,
                tile.k_scales + head * tile.k_head_stride, tile.k_scale_stride, tile.count, n_pad, s_.k_dim, k_pad_);
        for (int head = 0; head < s_.v_heads; head++)
            Products::template pack_v<F>(
                v_ + (long)head * v_pad_ * tile_tokens, v_pad_, tile.v + head * tile.v_head_stride, tile.v_stride,
                tile.v_scales + head * tile.v_head_stride, tile.v_scale_stride, tile.count, n_pad, s_.v_dim, v_pad_);
        if (k_by_rows_)
            logits_from_k_rows(k_rows, k_stride, n_pad);
        else
            logits_from_packed_k(0, std::min(PANEL_QUERIES, queries_), 0, visible_columns(0, tile, n_pad), n_pad,
                                 prefetch);
        for (int first = 0; first < queries_; first += PANEL_QUERIES) {
            const int last = std::min(first + PANEL_QUERIES, queries_);
            std::swap(logits_, next_logits_);
            // The next panel's logits are computed between this one's rows: products and exponentials use
            // different execution units.
            const int after = std::min(last + PANEL_QUERIES, queries_);
            const int columns_ahead = last < queries_ ? visible_columns(last, tile, n_pad) : 0;
            const int slice = round_up((n_pad * ROWS_PER_SLICE + PANEL_QUERIES - 1) / PANEL_QUERIES, Products::STEP);
            const int columns = visible_columns(first, tile, n_pad);
            int done = 0;
            for (int i = first; i < last; i++) {
                if (columns) rescale_[i - first] = softmax_update(i, first, tile, columns, n_pad, prefetch);
                if ((i - first) % ROWS_PER_SLICE == 0 && done < columns_ahead) {
                    const int to = std::min(done + slice, columns_ahead);
                    logits_from_packed_k(last, after, done, to, n_pad, prefetch);
                    done = to;
                }
            }
            if (!columns) continue;
            for (int i = first; i < last; i++)
                if (rescale_[i - first] != 1.0f)
                    for (int d = 0; d < v_pad_; d += WIDTH) {
                        float* o = o_ + (long)i * v_pad_ + d;
                        store(o, load(o) * rescale_[i - first]);
                    }
            for_head_ranges(first, last, s_.v_heads, [&](int head, int a, int b) {
                for_scale_groups(v_scale_count_, v_pad_, [&](int plane, int from, int size) {
                    gemm<Products>(weights_ + (long)(plane * PANEL_QUERIES + a - first) * n_pad, n_pad,
                                   v_ + (long)head * v_pad_ * tile_tokens + from * PER_COLUMN, v_pad_,
                                   o_ + (long)a * v_pad_ + from, v_pad_, b - a, size, columns, true, prefetch);
                });
            });
        }
        ticks_ = prefetch.ticks();
    }

    // Calls write(head of group, row, o, lse) for each query: o float32 [v_dim], normalised; lse natural log,
    // -inf where the query saw no token.
    template <class Write>
    void finish(Write&& write) {
        const float to_natural_log = s_.soft_cap ? 1.0f : s_.scale;
        for (int head = 0, i = 0; head < s_.q_heads; head++)
            for (int row = 0; row < rows_; row++, i++) {
                float* o = o_ + (long)i * v_pad_;
                const float row_sum = hsum(load(row_sum_ + i * WIDTH));
                const float inverse = row_sum == 0 ? 0.0f : 1.0f / row_sum;
                for (int d = 0; d < v_pad_; d += WIDTH) store(o + d, load(o + d) * inverse);
                Products::order_columns(o, v_pad_);
                write(head, row, o, row_sum == 0 ? -INFINITY : row_max_[i] * to_natural_log + std::log(row_sum));
            }
    }

  private:
    static constexpr int PER_COLUMN = 4 / Products::element_bytes;  // elements in one column of packed words

    // Columns of logits that the panel at query `first` needs: the tile's tokens up to the last one that any
    // of its queries sees, rounded up to Products::STEP.
    int visible_columns(int first, const TokenRun& tile, int n_pad) const {
        if (tile.position + tile.count - 1 <= lowest_position_) return n_pad;
        int64_t most = 0;
        for (int i = first; i < first + PANEL_QUERIES && i < queries_; i++)
            most = std::max(most, positions_[i % rows_] - tile.position + 1);
        return (int)std::min<int64_t>(n_pad, round_up((int)std::min<int64_t>(most, n_pad), Products::STEP));
    }

    // Divides queries [first, last) by the K or V head that they share, and calls body(head, a, b) for
    // queries [a, b) of each.
    template <class Body>
    void for_head_ranges(int first, int last, int heads, Body&& body) {
        const int per_head = queries_ / heads;
        for (int a = first; a < last;) {
            const int head = a / per_head;
            const int b = (head + 1) * per_head < last ? (head + 1) * per_head : last;
            body(head, a, b);
            a = b;
        }
    }

    // Calls body(plane, first element, elements) for each scale group of a row; once for the whole row if it
    // has no scales.
    template <class Body>
    static void for_scale_groups(int groups, int padded, Body&& body) {
        if (!groups) return body(0, 0, padded);
        for (int g = 0; g < groups; g++) {
            const int from = g * SCALE_ELEMENTS;
            body(g, from, padded - from < SCALE_ELEMENTS ? padded - from : SCALE_ELEMENTS);
        }
    }

    // Converts the tile's scales to float32 [head][scale group][n_pad]; zero beyond its end.
    void unpack_scales(const TokenRun& tile, int n_pad) {
        for (int head = 0; head < s_.k_heads && k_scale_count_; head++)
            farshore::ISA::unpack_scales(k_scales_ + (long)head * k_scale_count_ * n_pad, n_pad,
                                         tile.k_scales + head * tile.k_head_stride, k_scale_count_, tile.k_scale_stride,
                                         tile.count, n_pad);
        for (int head = 0; head < s_.v_heads && v_scale_count_; head++)
            farshore::ISA::unpack_scales(v_scales_ + (long)head * v_scale_count_ * n_pad, n_pad,
                                         tile.v_scales + head * tile.v_head_stride, v_scale_count_, tile.v_scale_stride,
                                         tile.count, n_pad);
    }

    // Logits of all queries, [plane][query][token], from K as rows (AMX, up to 16 queries).
    void logits_from_k_rows(const uint8_t* rows, int64_t stride, int n_pad) {
        if constexpr (requires { Products::template k_rows_bf16<F>; })
            for_scale_groups(k_scale_count_, k_pad_, [&](int plane, int from, int size) {
                Products::multiply_k_rows(q_ + from * 16, rows + 2 * from, stride, n_pad, queries_,
                                          next_logits_ + (long)plane * PANEL_QUERIES * n_pad, n_pad, size);
            });
    }

    // Logits of queries [first, last) and tokens [t0, t1), [plane][query][token], from packed K.
    void logits_from_packed_k(int first, int last, int t0, int t1, int n_pad, Prefetch& prefetch) {
        for_head_ranges(first, last, s_.k_heads, [&](int head, int a, int b) {
            for_scale_groups(k_scale_count_, k_pad_, [&](int plane, int from, int size) {
                gemm<Products>(q_ + (long)a * k_pad_ + from, k_pad_,
                               k_ + (long)head * k_pad_ * tile_tokens + (long)from * n_pad + t0 * PER_COLUMN, n_pad,
                               next_logits_ + (long)(plane * PANEL_QUERIES + a - first) * n_pad + t0, n_pad, b - a,
                               t1 - t0, size, false, prefetch);
            });
        });
    }

    // Turns the logits of query i into bfloat16 softmax weights, and updates its row_max and row_sum. Returns
    // the factor that brings its o to the new row_max. n_pad: row stride of logits and weights.
    float softmax_update(int i, int first, const TokenRun& tile, int columns, int n_pad, Prefetch& prefetch) {
        float* x = logits_ + (long)(i - first) * n_pad;
        Element* w = weights_ + (long)(i - first) * n_pad;
        const int v_planes = v_scale_count_ ? v_scale_count_ : 1;
        const int64_t position = positions_[rows_ == 1 ? 0 : i % rows_];
        // The query sees token j of the tile if lowest <= j < end.
        const int64_t reach = position - tile.position + 1;
        const int end = reach < tile.count ? (reach > 0 ? (int)reach : 0) : tile.count;
        const int lowest = window_ < reach ? (int)(reach - window_) : 0;
        const bool ragged = lowest > 0 || end < columns;
        const auto no_weights = [&] {
            for (int plane = 0; plane < v_planes; plane++)
                std::memset(w + (long)plane * PANEL_QUERIES * n_pad, 0, sizeof(Element) * columns);
            return 1.0f;
        };
        if (end <= lowest) return no_weights();
        if (k_scale_count_) {
            const float* scale = k_scales_ + (long)(i / (queries_ / s_.k_heads)) * k_scale_count_ * n_pad;
            for (int j = 0; j < columns; j += WIDTH) {
                vf sum = load(x + j) * load(scale + j);
                for (int g = 1; g < k_scale_count_; g++)
                    sum += load(x + (long)g * PANEL_QUERIES * n_pad + j) * load(scale + g * n_pad + j);
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
        vf maxima[Products::WEIGHT_VECTORS];
        for (vf& maximum : maxima) maximum = splat(-INFINITY);
        for (int j = 0; j < columns; j += Products::STEP)
            for (int v = 0; v < Products::WEIGHT_VECTORS; v++) maxima[v] = max(maxima[v], load(x + j + v * WIDTH));
        vf tile_max = maxima[0];
        for (int v = 1; v < Products::WEIGHT_VECTORS; v++) tile_max = max(tile_max, maxima[v]);
        const float old_max = row_max_[i];
        const float to_log2 = (s_.soft_cap ? 1.0f : s_.scale) * LOG2_E;
        float rescale = 1.0f;
        if (any_above(tile_max, old_max)) {
            row_max_[i] = hmax(tile_max);
            rescale = std::exp2((old_max - row_max_[i]) * to_log2);
        } else if (old_max == -INFINITY) {
            // All logits are -inf, or some are NaN; NaN must reach the output.
            if (std::none_of(x + lowest, x + end, [](float logit) { return logit != logit; })) return no_weights();
            row_max_[i] = 0;
        }
        const vf old_sum = load(row_sum_ + i * WIDTH) * rescale;
        const float* v_scales =
            v_scale_count_ ? v_scales_ + (long)(i / (queries_ / s_.v_heads)) * v_scale_count_ * n_pad : nullptr;
        const vf row_sum = ragged ? compute_weights<true>(x, w, v_scales, columns, n_pad, row_max_[i], to_log2)
                                  : compute_weights<false>(x, w, v_scales, columns, n_pad, row_max_[i], to_log2);
        store(row_sum_ + i * WIDTH, old_sum + row_sum);
        prefetch.tick(columns / 8);
        return rescale;
    }

    // w = 2^((x - row_max) * to_log2), times V's scales if it has any. Returns the sum without scales.
    // RAGGED: some x are -inf.
    template <bool RAGGED>
    vf compute_weights(const float* x, Element* w, const float* v_scales, int columns, int n_pad, float row_max,
                       float to_log2) const {
        vf sum[Products::WEIGHT_VECTORS] = {};
        for (int j = 0; j < columns; j += Products::STEP) {
            vf p[Products::WEIGHT_VECTORS];
            for (int v = 0; v < Products::WEIGHT_VECTORS; v++) {
                const vf logits = load(x + j + v * WIDTH);
                p[v] = exp2<false>(logits, row_max, to_log2);
                if (RAGGED) p[v] = logits == -INFINITY ? vf{} : p[v];
                sum[v] += p[v];
            }
            if (!v_scale_count_) Products::store_weights(w + j, p);
            for (int g = 0; g < v_scale_count_; g++) {
                vf scaled[Products::WEIGHT_VECTORS];
                for (int v = 0; v < Products::WEIGHT_VECTORS; v++)
                    scaled[v] = p[v] * load(v_scales + g * n_pad + j + v * WIDTH);
                Products::store_weights(w + (long)g * PANEL_QUERIES * n_pad + j, scaled);
            }
        }
        for (int v = 1; v < Products::WEIGHT_VECTORS; v++) sum[0] += sum[v];
        return sum[0];
    }

    Shape s_;
    int rows_, queries_, k_pad_, v_pad_, k_scale_count_, v_scale_count_;
    bool k_by_rows_;
    float *row_max_, *row_sum_, *o_, *logits_, *next_logits_, *rescale_, *k_scales_, *v_scales_;
    Element *q_, *k_, *v_, *weights_;
    const int64_t* positions_ = nullptr;
    int64_t lowest_position_ = 0;
    int64_t window_ = 0;
    int ticks_ = 1000;  // of the last tile; see Prefetch
};

}  // namespace ISA
}  // namespace farshore

// Attention of few queries, bound by memory: every row of K and of V is read once, where it lies, in the order it
// lies in, converted in registers and multiplied with all queries that share it. No tile is packed: packing costs
// more than the products. Arithmetic is float32 in every format, or that of integers.h. Included after that.
//
// Queries are ordered as in attend.h, [head of group][row], and so is the running state of each: peak (of unscaled
// logits), mass, and o not yet divided by it.

namespace farshore {
namespace ISA {

constexpr int STREAM_TILE = 128;     // tokens between two updates of the softmax: their logits stay in L1
constexpr int STREAM_QUERIES = 16;  // more that share a K head pay for packing
constexpr int TOKENS_AT_ONCE = 4;
#if WIDTH == 16
constexpr int QUERIES_AT_ONCE = 4;  // TOKENS_AT_ONCE x QUERIES_AT_ONCE sums live in registers
#else
constexpr int QUERIES_AT_ONCE = 2;
#endif
template <Format F>
constexpr int FETCHES_OF_GROUP = F == Format::i8 ? 4 : 2;  // of integers.h, while it multiplies WIDTH tokens
constexpr int CHUNK = 2 * WIDTH;  // elements that are converted together, to two vectors

// The chunk at element `from` of a row (a multiple of CHUNK, the whole chunk inside of the row), unscaled. Which
// element lies in which lane depends on the format: see element_of.
template <Format F>
__attribute__((always_inline)) inline void load_chunk(const uint8_t* row, int from, vf& a, vf& b) {
    if constexpr (F == Format::f32) {
        a = load_as<vf>(row + 4 * from), b = load_as<vf>(row + 4 * (from + WIDTH));
    } else if constexpr (F == Format::f16) {
        const uint16_t* h = reinterpret_cast<const uint16_t*>(row) + from;
        a = from_f16(h), b = from_f16(h + WIDTH);
    } else if constexpr (F == Format::bf16) {
        // Even and odd elements: one instruction each, where widening takes two.
        const vu words = load_as<vu>(row + 2 * from);
        a = bits_to_float(words << 16), b = bits_to_float(words & 0xffff0000);
    } else if constexpr (F == Format::i8) {
        a = __builtin_convertvector(widen(load_as<vb>(row + from)), vf);
        b = __builtin_convertvector(widen(load_as<vb>(row + from + WIDTH)), vf);
    } else {
        constexpr int HALF = SCALE_ELEMENTS / 2;
        const vi bytes = widen(load_as<vc>(row + from / SCALE_ELEMENTS * HALF + from % SCALE_ELEMENTS / 2));
#if WIDTH == 16
        const vf table{-8, -7, -6, -5, -4, -3, -2, -1, 0, 1, 2, 3, 4, 5, 6, 7};
        a = (vf)_mm512_permutexvar_ps((__m512i)bytes, (__m512)table);
        b = (vf)_mm512_permutexvar_ps((__m512i)(bytes >> 4), (__m512)table);
#else
        a = __builtin_convertvector((bytes & 15) - 8, vf), b = __builtin_convertvector((bytes >> 4) - 8, vf);
#endif
    }
}

// Which element of a row lies in lane l of the chunk's first (half 0) or second vector.
template <Format F, bool INTEGERS>
inline int element_of(int from, int half, int l) {
    if (INTEGERS) return from + l / 4 * 8 + half * 4 + l % 4;  // of o; see integers.h
    if (F == Format::bf16) return from + 2 * l + half;
    if (F == Format::i4)
        return from / SCALE_ELEMENTS * SCALE_ELEMENTS + from % SCALE_ELEMENTS / 2 + half * (SCALE_ELEMENTS / 2) + l;
    return from + half * WIDTH + l;
}

// Elements of a row that are in whole chunks; what is left is read element by element, in order.
template <Format F>
inline int whole_chunks(int dim) {
    return dim / (F == Format::i4 ? SCALE_ELEMENTS : CHUNK) * (F == Format::i4 ? SCALE_ELEMENTS : CHUNK);
}

// INTEGERS: products are those of integers.h.
template <Format F, bool INTEGERS = false>
class Stream {
  public:
    static constexpr bool SCALED = F == Format::i8 || F == Format::i4;

    // Everything lies in the thread's scratch.
    Stream(const Shape& shape, int rows) : s_(shape), rows_(rows), queries_(rows * shape.q_heads) {
        k_whole_ = whole_chunks<F>(s_.k_dim), v_whole_ = whole_chunks<F>(s_.v_dim);
        k_pad_ = round_up(s_.k_dim, CHUNK), v_pad_ = round_up(s_.v_dim, CHUNK);
        k_groups_ = SCALED ? (s_.k_dim + SCALE_ELEMENTS - 1) / SCALE_ELEMENTS : 0;
        v_groups_ = SCALED ? (s_.v_dim + SCALE_ELEMENTS - 1) / SCALE_ELEMENTS : 0;
        const long q = (long)queries_ * k_pad_, o = (long)queries_ * v_pad_, logits = (long)queries_ * STREAM_TILE,
                   scales = (long)(s_.k_heads * k_groups_ + s_.v_heads * v_groups_ + queries_ * v_groups_) * STREAM_TILE,
                   states = round_up(queries_, WIDTH),
                   fixed = (long)states * (1 + k_groups_ + 2 * v_groups_);
        float* at = static_cast<float*>(scratch(4 * (q + o + logits + scales + (1 + WIDTH) * states + v_pad_ + fixed)));
        const auto take = [&](long floats) { return std::exchange(at, at + floats); };
        q_ = take(q), o_ = take(o), logits_ = take(logits);
        k_scale_ = take((long)s_.k_heads * k_groups_ * STREAM_TILE);
        v_scale_ = take((long)s_.v_heads * v_groups_ * STREAM_TILE);
        weights_ = SCALED ? take((long)queries_ * v_groups_ * STREAM_TILE) : logits_;
        peak_ = take(states), mass_ = take((long)WIDTH * states), row_ = take(v_pad_);
        q_unit_ = take(states), w_unit_ = take(states * v_groups_);
        q_sum_ = reinterpret_cast<int32_t*>(take(states * k_groups_));
        w_sum_ = reinterpret_cast<int32_t*>(take(states * v_groups_));
    }

    static constexpr int tile = STREAM_TILE;

    // Whether INTEGERS will do: whole groups, and a q that has no more than 16 bits.
    static bool of_integers(const Shape& shape, Format q) {
        return SCALED && q == Format::bf16 && shape.k_dim % SCALE_ELEMENTS == 0 && shape.v_dim % SCALE_ELEMENTS == 0;
    }

    // q: of the first row and the group's first head.
    void begin(const Array& q, const int64_t* positions, int64_t window) {
        positions_ = positions, window_ = window;
        for (int i = 0; i < queries_; i++) peak_[i] = -INFINITY;
        std::memset(mass_, 0, 4L * WIDTH * queries_);
        std::memset(o_, 0, 4L * queries_ * v_pad_);
        alignas(64) float row[WIDTH];
        for (int i = 0; i < queries_; i++) {
            const int64_t at = i % rows_ * q.row_stride + i / rows_ * q.head_stride;
            const auto value = [&](int d) {
                return q.format == Format::f32    ? static_cast<const float*>(q.data)[at + d]
                       : q.format == Format::bf16 ? from_bf16(static_cast<const uint16_t*>(q.data)[at + d])
                                                  : from_f16(static_cast<const uint16_t*>(q.data)[at + d]);
            };
#if defined(HAS_INTEGERS)
            if constexpr (INTEGERS) {
                float* row = q_ + (long)i * k_pad_;
                for (int d = 0; d < s_.k_dim; d++) row[d] = value(d);
                int32_t sum;
                q_unit_[i] = to_integers(row, s_.k_dim, integers_of(i), &sum);
                for (int g = 0; g < k_groups_; g++) {
                    int16_t some[SCALE_ELEMENTS], *group = integers_of(i) + g * SCALE_ELEMENTS;
                    std::memcpy(some, group, sizeof some);
                    q_sum_[i * k_groups_ + g] = std::accumulate(some, some + SCALE_ELEMENTS, 0);
                    order_query<F>(some, group);
                }
                continue;
            }
#endif
            float* to = q_ + (long)i * k_pad_;
            for (int from = 0; from < k_pad_; from += WIDTH) {
                for (int l = 0; l < WIDTH; l++) {
                    const int d = from < k_whole_ ? element_of<F, false>(from / CHUNK * CHUNK, from / WIDTH % 2, l) : from + l;
                    row[l] = d < s_.k_dim ? value(d) : 0.0f;
                }
                store(to + from, load(row));
            }
        }
    }

    // One tile of at most `tile` tokens. While its K is multiplied its V is fetched into L2, and while its V is, the K
    // of `next`: the hardware's prefetcher stops at pages' ends and at each change between the two. (Measured, d 64,
    // 2 cores, GB/s of 27: neither 16.0, V into L1 19.0, both into L1 20.6, both into L2 20.8.)
    void absorb(const Tokens& t, const Tokens& next) {
        if constexpr (SCALED) {
            const int n_pad = round_up(t.count, WIDTH);
            for (int head = 0; head < s_.k_heads; head++)
                unpack_scales(k_scale_ + (long)head * k_groups_ * STREAM_TILE, STREAM_TILE,
                              t.k_scales + head * t.k_head_stride, k_groups_, t.k_scale_stride, t.count, n_pad);
            for (int head = 0; head < s_.v_heads; head++)
                unpack_scales(v_scale_ + (long)head * v_groups_ * STREAM_TILE, STREAM_TILE,
                              t.v_scales + head * t.v_head_stride, v_groups_, t.v_scale_stride, t.count, n_pad);
        }
        each_block(s_.k_heads, [&](int head, int first, auto size) { score<size()>(t, head, first); });
        for (int i = 0; i < queries_; i++) soften(i, t);
        each_block(s_.v_heads, [&](int head, int first, auto size) { gather<size()>(t, next, head, first); });
    }

    // put(head of group, row, o / mass as f32[v_dim], lse), for every query.
    template <class Put>
    void finish(Put&& put) {
        const float to_natural = s_.soft_cap ? 1.0f : s_.scale;
        for (int i = 0; i < queries_; i++) {
            const float* o = o_ + (long)i * v_pad_;
            const float mass = hsum(load(mass_ + i * WIDTH));
            const float share = mass == 0 ? 0.0f : 1.0f / mass;
            for (int from = 0; from < v_pad_; from += WIDTH)
                for (int l = 0; l < WIDTH; l++) {
                    const int d = from < v_whole_ ? element_of<F, INTEGERS>(from / CHUNK * CHUNK, from / WIDTH % 2, l)
                                                  : from + l;
                    row_[d] = o[from + l] * share;
                }
            put(i / rows_, i % rows_, row_, mass == 0 ? -INFINITY : peak_[i] * to_natural + std::log(mass));
        }
    }

  private:
    int16_t* integers_of(int i) { return reinterpret_cast<int16_t*>(q_ + (long)i * k_pad_); }

    // do_it(head, first, size) for blocks of at most QUERIES_AT_ONCE queries that share one of `heads` heads.
    template <class Do>
    void each_block(int heads, Do&& do_it) {
        const int per_head = queries_ / heads;
        for (int head = 0; head < heads; head++)
            for (int i = 0; i < per_head; i += QUERIES_AT_ONCE) {
                const int first = head * per_head + i;
                switch (std::min(QUERIES_AT_ONCE, per_head - i)) {
                    case 1: do_it(head, first, std::integral_constant<int, 1>{}); break;
                    case 2: do_it(head, first, std::integral_constant<int, 2>{}); break;
#if WIDTH == 16
                    case 3: do_it(head, first, std::integral_constant<int, 3>{}); break;
                    case 4: do_it(head, first, std::integral_constant<int, 4>{}); break;
#endif
                }
            }
    }

    // Logits of Q queries from `first` on.
    template <int Q>
    void score(const Tokens& t, int head, int first) {
        const float* q = q_ + (long)first * k_pad_;
        const float* scales = k_scale_ + (long)head * k_groups_ * STREAM_TILE;
        float* out = logits_ + (long)first * STREAM_TILE;
        const uint8_t* k = t.k + head * t.k_head_stride;
        if (first % (queries_ / s_.k_heads) == 0)
            expect(t.v + head * t.v_head_stride, head < s_.v_heads ? t.count * t.v_stride : 0,
                   blocks(s_.k_heads) * (INTEGERS ? (t.count + WIDTH - 1) / WIDTH * k_groups_ * FETCHES_OF_GROUP<F>
                                                  : (t.count + TOKENS_AT_ONCE - 1) / TOKENS_AT_ONCE));
#if defined(HAS_INTEGERS)
        if constexpr (INTEGERS) {
            for (int j = 0; j < t.count; j += WIDTH) {
                const uint8_t* row[WIDTH];
                for (int i = 0; i < WIDTH; i++) row[i] = k + std::min(j + i, t.count - 1) * t.k_stride;
                multiply_integers<F, Q>(row, integers_of(first), k_pad_ * 2, q_sum_ + first * k_groups_, q_unit_ + first,
                                        k_groups_, scales + j, STREAM_TILE, out + j, [&] { fetch(); });
            }
            return;
        }
#endif
        for (int j = 0; j < t.count; j += TOKENS_AT_ONCE) {
            fetch();
            const uint8_t* row[TOKENS_AT_ONCE];  // beyond the last token: that one again
            for (int i = 0; i < TOKENS_AT_ONCE; i++) row[i] = k + std::min(j + i, t.count - 1) * t.k_stride;
            if (k_whole_ != k_pad_)
                products<Q, false, false>(row, q, scales + j, out + j);
            else if (k_groups_ == 1)
                products<Q, true, true>(row, q, scales + j, out + j);
            else
                products<Q, true, false>(row, q, scales + j, out + j);
        }
    }

    // WHOLE: rows are whole chunks. (Telling that apart inside of the loop would cost it its registers.)
    template <int Q, bool WHOLE, bool ONE>
    __attribute__((always_inline)) void products(const uint8_t* const* row, const float* q, const float* scales,
                                                 float* out) const {
        vf sum[TOKENS_AT_ONCE][Q];
        // Unrolled by force: else gcc 12 makes a memset of it, and the sums live in memory.
#pragma GCC unroll 4
        for (int i = 0; i < TOKENS_AT_ONCE; i++)
#pragma GCC unroll 4
            for (int at = 0; at < Q; at++) sum[i][at] = vf{};
        for (int from = 0; from < k_pad_; from += CHUNK) {
            vf a[TOKENS_AT_ONCE], b[TOKENS_AT_ONCE];
            for (int i = 0; i < TOKENS_AT_ONCE; i++)
                if (WHOLE || from < k_whole_)
                    load_chunk<F>(row[i], from, a[i], b[i]);
                else
                    load_rest(row[i], from, s_.k_dim, a[i], b[i]);
            if constexpr (SCALED && !ONE)
                for (int i = 0; i < TOKENS_AT_ONCE; i++) {
                    const float scale = scales[from / SCALE_ELEMENTS * STREAM_TILE + i];
                    a[i] *= scale, b[i] *= scale;
                }
#pragma GCC unroll 4
            for (int at = 0; at < Q; at++) {
                const vf qa = load(q + at * k_pad_ + from), qb = load(q + at * k_pad_ + from + WIDTH);
#pragma GCC unroll 4
                for (int i = 0; i < TOKENS_AT_ONCE; i++) sum[i][at] = sum[i][at] + a[i] * qa + b[i] * qb;
            }
        }
#pragma GCC unroll 4
        for (int at = 0; at < Q; at++)
        {
            four all = sums(sum[0][at], sum[1][at], sum[2][at], sum[3][at]);
            if constexpr (ONE) all *= load_as<four>(scales);
            store_as(out + at * STREAM_TILE, all);
        }
    }

    // o of Q queries from `first` on += weights V.
    template <int Q>
    void gather(const Tokens& t, const Tokens& next, int head, int first) {
        const uint8_t* v = t.v + head * t.v_head_stride;
        if (first % (queries_ / s_.v_heads) == 0)
            expect(next.k + head * next.k_head_stride, head < s_.k_heads ? next.count * next.k_stride : 0,
                   blocks(s_.v_heads) * ((v_pad_ + 2 * CHUNK - 1) / (2 * CHUNK)) * t.count);
        float* o = o_ + (long)first * v_pad_;
#if defined(HAS_INTEGERS)
        if constexpr (INTEGERS) {
            for (int g = 0; g < v_groups_; g++) {
                const long at = (long)g * queries_ + first;
                gather_integers<F, Q>(v + g * GROUP_BYTES<F>, t.v_stride, t.count,
                                      reinterpret_cast<const int16_t*>(weights_ + at * STREAM_TILE), 2 * STREAM_TILE,
                                      w_sum_ + at, w_unit_ + at, o + g * SCALE_ELEMENTS, v_pad_, [&] { fetch(); });
            }
            return;
        }
#endif
        const auto add = [&](int from, auto chunks, auto&& chunk) __attribute__((always_inline)) {
            constexpr int N = chunks();
            const float* w = weights_ + ((long)(SCALED ? from / SCALE_ELEMENTS * queries_ : 0) + first) * STREAM_TILE;
            vf sum[Q][2 * N];
            for (int at = 0; at < Q; at++)
                for (int i = 0; i < 2 * N; i++) sum[at][i] = load(o + at * v_pad_ + from + i * WIDTH);
            for (int j = 0; j < t.count; j++) {
                fetch();
                vf x[2 * N];
                for (int i = 0; i < N; i++) chunk(v + j * t.v_stride, from + i * CHUNK, x[2 * i], x[2 * i + 1]);
                for (int at = 0; at < Q; at++)
                    for (int i = 0; i < 2 * N; i++) sum[at][i] += x[i] * w[at * STREAM_TILE + j];
            }
            for (int at = 0; at < Q; at++)
                for (int i = 0; i < 2 * N; i++) store(o + at * v_pad_ + from + i * WIDTH, sum[at][i]);
        };
        const auto whole = [](const uint8_t* row, int from, vf& a, vf& b) { load_chunk<F>(row, from, a, b); };
        int from = 0;
        for (; from + 2 * CHUNK <= v_whole_; from += 2 * CHUNK) add(from, std::integral_constant<int, 2>{}, whole);
        for (; from < v_whole_; from += CHUNK) add(from, std::integral_constant<int, 1>{}, whole);
        for (; from < v_pad_; from += CHUNK)
            add(from, std::integral_constant<int, 1>{},
                [&](const uint8_t* row, int from, vf& a, vf& b) { load_rest(row, from, s_.v_dim, a, b); });
    }

    __attribute__((noinline)) static std::pair<vf, vf> rest(const uint8_t* row, int from, int dim) {
        return {from < dim ? elements<F>(row, nullptr, from, dim) : vf{},
                from + WIDTH < dim ? elements<F>(row, nullptr, from + WIDTH, dim) : vf{}};
    }
    int blocks(int heads) const { return (queries_ / heads + QUERIES_AT_ONCE - 1) / QUERIES_AT_ONCE; }
    // `bytes` from `from` on are fetched in the course of the next `calls` of fetch.
    void expect(const uint8_t* from, int64_t bytes, int calls) {
        fetch_at_ = from, fetch_end_ = from + bytes, fetch_step_ = (bytes / std::max(calls, 1) + 63) / 64 * 64;
    }
    __attribute__((always_inline)) void fetch() {
        if (fetch_at_ >= fetch_end_) return;
        for (int64_t at = 0; at < fetch_step_; at += 64) __builtin_prefetch(fetch_at_ + at, 0, 2);
        fetch_at_ += fetch_step_;
    }

    static void load_rest(const uint8_t* row, int from, int dim, vf& a, vf& b) { std::tie(a, b) = rest(row, from, dim); }

    // Logits of query i -> weights relative to its new peak; its o so far is brought to that, too.
    void soften(int i, const Tokens& t) {
        float* x = logits_ + (long)i * STREAM_TILE;
        const int n_pad = round_up(t.count, WIDTH);
        // Token j of the tile counts if lowest <= j < end.
        const int64_t reach = positions_[i % rows_] - t.position + 1;
        const int end = (int)std::clamp<int64_t>(reach, 0, t.count);
        const int lowest = window_ < reach ? (int)std::min<int64_t>(reach - window_, end) : 0;
        if (s_.soft_cap)
            for (int j = 0; j < n_pad; j += WIDTH) store(x + j, tanh(load(x + j) * (s_.scale / s_.soft_cap)) * s_.soft_cap);
        for (int j = 0; j < lowest; j++) x[j] = -INFINITY;
        for (int j = end; j < n_pad; j++) x[j] = -INFINITY;
        vf top = load(x);
        for (int j = WIDTH; j < n_pad; j += WIDTH) top = max(top, load(x + j));
        const float to_log2 = (s_.soft_cap ? 1.0f : s_.scale) * LOG2_E, before = peak_[i];
        vf mass = load(mass_ + i * WIDTH);
        if (any_above(top, before)) {
            peak_[i] = hmax(top);
            const float fade = std::exp2((before - peak_[i]) * to_log2);
            mass = mass * fade;
            float* o = o_ + (long)i * v_pad_;
            for (int d = 0; d < v_pad_; d += WIDTH) store(o + d, load(o + d) * fade);
        } else if (before == -INFINITY && std::any_of(x + lowest, x + end, [](float it) { return it != it; })) {
            peak_[i] = 0;  // a NaN must come out
        }
        const float* v_scale = v_scale_ + (long)(i / (queries_ / s_.v_heads)) * v_groups_ * STREAM_TILE;
        for (int j = 0; j < n_pad; j += WIDTH) {
            const vf logits = load(x + j);
            vf p = exp2<true>(logits, peak_[i], to_log2);
            p = logits == -INFINITY ? vf{} : p;
            mass += p;
            if (!SCALED) store(x + j, p);
            for (int g = 0; g < v_groups_; g++)
                store(weights_ + ((long)g * queries_ + i) * STREAM_TILE + j, p * load(v_scale + g * STREAM_TILE + j));
        }
        store(mass_ + i * WIDTH, mass);
#if defined(HAS_INTEGERS)
        for (int g = 0; g < v_groups_ && INTEGERS; g++) {
            const long at = (long)g * queries_ + i;
            float* w = weights_ + at * STREAM_TILE;
            w_unit_[at] = to_integers(w, n_pad, reinterpret_cast<int16_t*>(w), w_sum_ + at);
        }
#endif
    }

    Shape s_;
    int rows_, queries_, k_whole_, v_whole_, k_pad_, v_pad_, k_groups_, v_groups_;
    float *q_, *o_, *logits_, *k_scale_, *v_scale_, *weights_, *peak_, *mass_, *row_;
    float *q_unit_, *w_unit_;  // of INTEGERS: what their ones stand for
    int32_t *q_sum_, *w_sum_;
    const int64_t* positions_ = nullptr;
    int64_t window_ = 0;
    const uint8_t *fetch_at_ = nullptr, *fetch_end_ = nullptr;
    int64_t fetch_step_ = 0;
};

}  // namespace ISA
}  // namespace farshore

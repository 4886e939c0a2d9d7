// Rows of q and o, and the merging of states. Included after pack.h.

namespace farshore {
namespace ISA {

inline int element_size(Format f) { return f == Format::f32 ? 4 : 2; }

inline void* at(const Array& a, int64_t row, int64_t head) {
    return static_cast<uint8_t*>(a.data) + (row * a.row_stride + head * a.head_stride) * element_size(a.format);
}

// x f32[n] -> out row, cast; x may be read up to n rounded up to WIDTH.
inline void put_row(const Array& out, int64_t row, int64_t head, const float* x, int n) {
    void* to = at(out, row, head);
    int i = 0;
    if (out.format == Format::f32) {
        std::memcpy(to, x, 4L * n);
        return;
    }
    uint16_t* h = static_cast<uint16_t*>(to);
    const bool bf16 = out.format == Format::bf16;
    for (; i + WIDTH <= n; i += WIDTH) store_as(h + i, bf16 ? to_bf16(load(x + i)) : to_f16(load(x + i)));
    for (; i < n; i++) h[i] = bf16 ? to_bf16(x[i]) : to_f16(x[i]);
}

inline void put_lse(const Out& out, int64_t row, int64_t head, float lse) {
    out.lse[row * out.lse_row_stride + head * out.lse_head_stride] = lse;
}

inline void add_scaled(float* o, const Array& a, int64_t row, int64_t head, float weight, int n) {
    const void* from = at(a, row, head);
    const float* f = static_cast<const float*>(from);
    const uint16_t* h = static_cast<const uint16_t*>(from);
    int i = 0;
    for (; i + WIDTH <= n; i += WIDTH) {
        const vf x = a.format == Format::f32    ? load(f + i)
                     : a.format == Format::bf16 ? from_bf16(h + i)
                                                : from_f16(h + i);
        store(o + i, load(o + i) + x * weight);
    }
    for (; i < n; i++)
        o[i] += weight * (a.format == Format::f32 ? f[i] : a.format == Format::bf16 ? from_bf16(h[i]) : from_f16(h[i]));
}

// Merges n states of one (row, head): lse of state i is lse(i), and add_rows(which, weights, count) adds each of
// these states' o, times its weight, to `o`; there are at most WIDTH of them.
template <class Lse, class Rows>
void merge_one(int n, Lse&& lse, Rows&& add_rows, int v_dim, float* o, float* out_lse) {
    float peak = -INFINITY;
    for (int i = 0; i < n; i++) {
        const float x = lse(i);
        if (x > peak) peak = x;
    }
    std::memset(o, 0, 4L * round_up(v_dim, WIDTH));
    *out_lse = -INFINITY;
    if (peak == -INFINITY) {
        bool broken = false;  // no comparison is true of a NaN, which must come out
        for (int i = 0; i < n; i++) broken |= std::isnan(lse(i));
        if (!broken) return;
        peak = NAN;
    }
    alignas(64) float some[WIDTH];
    int which[WIDTH];
    if (n == 1 && !std::isnan(peak)) {
        which[0] = 0, some[0] = 1.0f;
        add_rows(which, some, 1);
        *out_lse = peak;
        return;
    }
    float mass = 0.0f;
    for (int i = 0; i < n; i += WIDTH) {
        for (int l = 0; l < WIDTH; l++) some[l] = i + l < n ? lse(i + l) : -INFINITY;
        const vf lses = load(some);
        vf weights = exp2<true>(lses, peak, LOG2_E);
        weights = lses == -INFINITY ? vf{} : weights;
        mass += hsum(weights);
        // An empty state's o carries no information, so not even a NaN in it may count.
        int count = 0;
        for (int l = 0; l < WIDTH && i + l < n; l++)
            if (some[l] != -INFINITY) which[count] = i + l, some[count++] = weights[l];
        add_rows(which, some, count);
    }
    *out_lse = peak + std::log(mass);
    for (int d = 0; d < v_dim; d += WIDTH) store(o + d, load(o + d) * (1.0f / mass));
}

// to = (ADD: +=) the sum of weights[i] rows[i], n elements of each, float32: what is summed stays in registers.
template <bool ADD>
inline void weigh_floats(float* to, const float* const* rows, const float* weights, int count, int n) {
    const auto before = [&](int d) { return ADD ? load(to + d) : vf{}; };
    int d = 0;
    for (; d + 4 * WIDTH <= n; d += 4 * WIDTH) {  // four sums, none of which waits for another
        vf a = before(d), b = before(d + WIDTH), c = before(d + 2 * WIDTH), e = before(d + 3 * WIDTH);
        for (int i = 0; i < count; i++) {
            const float* row = rows[i] + d;
            a += load(row) * weights[i], b += load(row + WIDTH) * weights[i];
            c += load(row + 2 * WIDTH) * weights[i], e += load(row + 3 * WIDTH) * weights[i];
        }
        store(to + d, a), store(to + d + WIDTH, b), store(to + d + 2 * WIDTH, c), store(to + d + 3 * WIDTH, e);
    }
    for (; d + WIDTH <= n; d += WIDTH) {
        vf a = before(d);
        for (int i = 0; i < count; i++) a += load(rows[i] + d) * weights[i];
        store(to + d, a);
    }
    for (; d < n; d++) {
        float a = ADD ? to[d] : 0.0f;
        for (int i = 0; i < count; i++) a += rows[i][d] * weights[i];
        to[d] = a;
    }
}

// The first `lanes` of a vector of numbers `stride` apart; the others are -inf.
inline vf lses_of(const float* from, int64_t stride, int lanes) {
#if WIDTH == 16
    if (stride == 1) return (vf)_mm512_mask_loadu_ps(_mm512_set1_ps(-INFINITY), (1u << lanes) - 1, from);
#endif
    alignas(64) float some[WIDTH];
    for (int l = 0; l < WIDTH; l++) some[l] = l < lanes ? from[l * stride] : -INFINITY;
    return load(some);
}

// What one merge works with, in the thread's scratch: any number of states.
struct MergeScratch {
    explicit MergeScratch(const Merge& m) {
        const int64_t o_bytes = 4L * round_up(m.v_dim, WIDTH);
        const int64_t state_bytes = sizeof *weights + sizeof *here + sizeof *rows + sizeof *some + sizeof *which;
        uint8_t* next = static_cast<uint8_t*>(scratch(o_bytes + state_bytes * m.count));
        o = reinterpret_cast<float*>(next);
        weights = reinterpret_cast<float(*)[WIDTH]>(next += o_bytes);
        here = reinterpret_cast<const float**>(next += sizeof *weights * m.count);
        rows = reinterpret_cast<const float**>(next += sizeof *here * m.count);
        some = reinterpret_cast<float*>(next += sizeof *rows * m.count);
        which = reinterpret_cast<int*>(next + sizeof *some * m.count);
    }

    float* o;                   // of one row and head
    float (*weights)[WIDTH];    // of each state, by head
    const float **here, **rows; // o of each state, of the first head and of one head's states that weigh something
    float* some;                // those states' weights
    int* which;                 // and their numbers
};

// The o of `lanes` heads of a row; `floats`: so are all states'.
inline void merge_heads(const Merge& m, const Out& out, int row, int head0, int lanes, bool floats, MergeScratch s) {
    for (int i = 0; i < m.count; i++) s.here[i] = static_cast<const float*>(at(m.states[i].o, row, head0));
    for (int l = 0; l < lanes; l++) {
        int count = 0;
        // An empty state's o carries no information, so not even a NaN in it may count.
        for (int i = 0; i < m.count; i++) {
            const float weight = s.weights[i][l];
            if (weight == 0.0f) continue;
            s.which[count] = i, s.some[count] = weight;
            s.rows[count++] = s.here[i] + l * m.states[i].o.head_stride;
        }
        if (floats) {
            const bool there = out.o.format == Format::f32;
            float* to = there ? static_cast<float*>(at(out.o, row, head0 + l)) : s.o;
            weigh_floats<false>(to, s.rows, s.some, count, m.v_dim);
            if (there) continue;
        } else {
            std::memset(s.o, 0, 4L * round_up(m.v_dim, WIDTH));
            for (int i = 0; i < count; i++)
                add_scaled(s.o, m.states[s.which[i]].o, row, head0 + l, s.some[i], m.v_dim);
        }
        put_row(out.o, row, head0 + l, s.o, m.v_dim);
    }
}

// Weights of WIDTH heads at a time: one by one, each would wait for its own sum, logarithm and division.
void merge(const Merge& m, const Out& out) {
    const MergeScratch s(m);
    bool floats = true;
    for (int i = 0; i < m.count; i++) floats = floats && m.states[i].o.format == Format::f32;
    alignas(64) float lses[WIDTH];
    for (int row = 0; row < m.rows; row++)
        for (int head0 = 0; head0 < m.heads; head0 += WIDTH) {
            const int lanes = std::min(WIDTH, m.heads - head0);
            const vf sink = m.sink ? lses_of(m.sink + head0, 1, lanes) : splat(-INFINITY);
            vf peak = sink;
            for (int i = 0; i < m.count; i++) {
                const Out& state = m.states[i];
                const int64_t stride = state.lse_head_stride;
                const vf lse = lses_of(state.lse + row * state.lse_row_stride + head0 * stride, stride, lanes);
                store(s.weights[i], lse);
                peak = max(lse, peak);  // in this order a NaN is passed over; its weight will be one
            }
            const auto weigh = [&](vf lse) {
                const vf weight = exp2<true>(lse, peak, LOG2_E);
                return lse == -INFINITY ? vf{} : weight;
            };
            vf mass = weigh(sink);
            for (int i = 0; i < m.count; i++) {
                const vf weight = weigh(load(s.weights[i]));
                store(s.weights[i], weight);
                mass += weight;
            }
            const vf share = mass == 0.0f ? vf{} : 1.0f / mass;
            store(lses, mass == 0.0f ? splat(-INFINITY) : log(mass) + peak);
            for (int i = 0; i < m.count; i++) store(s.weights[i], load(s.weights[i]) * share);
            merge_heads(m, out, row, head0, lanes, floats, s);
            for (int l = 0; l < lanes; l++) put_lse(out, row, head0 + l, lses[l]);
        }
}

}  // namespace ISA
}  // namespace farshore

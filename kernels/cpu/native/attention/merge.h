// Access to rows of q and o, and the merge of attention states. Included by simd/isa_kernels.h after pack.h.
//
// An attention state over a set of tokens is (o, lse): o is the softmax-weighted mean of V, lse the natural
// logarithm of the sum of exp(logit). States of disjoint sets merge as
//   lse = ln(sum_i exp(lse_i)),  o = sum_i o_i exp(lse_i - lse),
// and a state with lse = -inf (no tokens) has weight 0, whatever its o holds.

namespace farshore {
namespace ISA {

inline int element_size(Format f) { return f == Format::f32 ? 4 : 2; }

inline void* row_address(const RowArray& a, int64_t row, int64_t head) {
    return static_cast<uint8_t*>(a.data) + (row * a.row_stride + head * a.head_stride) * element_size(a.format);
}

// Converts x, float32 [n], to out's format and stores it as row (row, head) of out.
inline void write_row(const RowArray& out, int64_t row, int64_t head, const float* x, int n) {
    void* to = row_address(out, row, head);
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

// Stores lse (natural log) of (row, head).
inline void write_lse(const StateArray& out, int64_t row, int64_t head, float lse) {
    out.lse[row * out.lse_row_stride + head * out.lse_head_stride] = lse;
}

// o[i] += weight * a[row, head, i] for i < n. o: float32 [n].
inline void add_scaled(float* o, const RowArray& a, int64_t row, int64_t head, float weight, int n) {
    const void* from = row_address(a, row, head);
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

// Merges n states of one (row, head).
//   lse       lse(i) is the lse of state i, natural log
//   add_rows  add_rows(states, weights, count), count <= WIDTH, adds weights[c] * (o of states[c]) to `o`
//   o         float32 [v_dim rounded up to WIDTH], written; 0 if all states are empty
//   out_lse   natural log, written; -inf if all states are empty
// A NaN in any lse makes the result NaN.
template <class Lse, class AddRows>
void merge_states(int n, Lse&& lse, AddRows&& add_rows, int v_dim, float* o, float* out_lse) {
    float max_lse = -INFINITY;
    for (int i = 0; i < n; i++) {
        const float x = lse(i);
        if (x > max_lse) max_lse = x;
    }
    std::memset(o, 0, 4L * round_up(v_dim, WIDTH));
    *out_lse = -INFINITY;
    if (max_lse == -INFINITY) {
        bool has_nan = false;  // comparisons with a NaN are false, so max_lse does not show it
        for (int i = 0; i < n; i++) has_nan |= std::isnan(lse(i));
        if (!has_nan) return;
        max_lse = NAN;
    }
    alignas(64) float weights_of[WIDTH];
    int states[WIDTH];
    if (n == 1 && !std::isnan(max_lse)) {
        states[0] = 0, weights_of[0] = 1.0f;
        add_rows(states, weights_of, 1);
        *out_lse = max_lse;
        return;
    }
    float weight_sum = 0.0f;
    for (int i = 0; i < n; i += WIDTH) {
        for (int l = 0; l < WIDTH; l++) weights_of[l] = i + l < n ? lse(i + l) : -INFINITY;
        const vf lses = load(weights_of);
        vf weights = exp2<true>(lses, max_lse, LOG2_E);
        weights = lses == -INFINITY ? vf{} : weights;
        weight_sum += hsum(weights);
        // The o of an empty state is skipped, not multiplied by 0: it may hold NaN.
        int count = 0;
        for (int l = 0; l < WIDTH && i + l < n; l++)
            if (weights_of[l] != -INFINITY) states[count] = i + l, weights_of[count++] = weights[l];
        add_rows(states, weights_of, count);
    }
    *out_lse = max_lse + std::log(weight_sum);
    for (int d = 0; d < v_dim; d += WIDTH) store(o + d, load(o + d) * (1.0f / weight_sum));
}

// to[d] = (ADD: to[d] +) sum_i weights[i] * rows[i][d] for d < n and i < count; all float32. Runs over the
// rows inside and over the elements outside, so that the sums stay in registers.
template <bool ADD>
inline void weighted_sum(float* to, const float* const* rows, const float* weights, int count, int n) {
    const auto before = [&](int d) { return ADD ? load(to + d) : vf{}; };
    int d = 0;
    for (; d + 4 * WIDTH <= n; d += 4 * WIDTH) {  // four independent sums hide the latency of the adds
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

// Loads `heads` <= WIDTH values that lie `stride` elements apart, one head a lane; the other lanes are -inf.
inline vf load_lses(const float* from, int64_t stride, int heads) {
#if WIDTH == 16
    if (stride == 1) return (vf)_mm512_mask_loadu_ps(_mm512_set1_ps(-INFINITY), (1u << heads) - 1, from);
#endif
    alignas(64) float lses[WIDTH];
    for (int l = 0; l < WIDTH; l++) lses[l] = l < heads ? from[l * stride] : -INFINITY;
    return load(lses);
}

// The working memory of one merge, in the thread's scratch memory; the number of states has no limit.
struct MergeScratch {
    explicit MergeScratch(const MergeArguments& m) {
        const int64_t o_bytes = 4L * round_up(m.v_dim, WIDTH);
        const int64_t state_bytes =
            sizeof *weights + sizeof *head0_o + sizeof *head_o + sizeof *head_weights + sizeof *head_states;
        uint8_t* next = static_cast<uint8_t*>(scratch(o_bytes + state_bytes * m.count));
        o = reinterpret_cast<float*>(next);
        weights = reinterpret_cast<float (*)[WIDTH]>(next += o_bytes);
        head0_o = reinterpret_cast<const float**>(next += sizeof *weights * m.count);
        head_o = reinterpret_cast<const float**>(next += sizeof *head0_o * m.count);
        head_weights = reinterpret_cast<float*>(next += sizeof *head_o * m.count);
        head_states = reinterpret_cast<int*>(next + sizeof *head_weights * m.count);
    }

    float* o;                 // [v_dim], of one row and head
    float (*weights)[WIDTH];  // [states][head], of up to WIDTH heads
    const float** head0_o;    // [states], o of the first of these heads
    // The states of one head whose weight is not 0:
    const float** head_o;
    float* head_weights;
    int* head_states;  // their indices in MergeArguments::states
};

// Writes o of the heads [head0, head0 + heads) of a row, from the weights in s. all_f32: every state's o is
// float32.
inline void merge_heads(const MergeArguments& m, const StateArray& out, int row, int head0, int heads, bool all_f32,
                        MergeScratch s) {
    for (int i = 0; i < m.count; i++) s.head0_o[i] = static_cast<const float*>(row_address(m.states[i].o, row, head0));
    for (int l = 0; l < heads; l++) {
        int count = 0;
        // The o of an empty state is skipped, not multiplied by 0: it may hold NaN.
        for (int i = 0; i < m.count; i++) {
            const float weight = s.weights[i][l];
            if (weight == 0.0f) continue;
            s.head_states[count] = i, s.head_weights[count] = weight;
            s.head_o[count++] = s.head0_o[i] + l * m.states[i].o.head_stride;
        }
        if (all_f32) {
            const bool in_place = out.o.format == Format::f32;
            float* to = in_place ? static_cast<float*>(row_address(out.o, row, head0 + l)) : s.o;
            weighted_sum<false>(to, s.head_o, s.head_weights, count, m.v_dim);
            if (in_place) continue;
        } else {
            std::memset(s.o, 0, 4L * round_up(m.v_dim, WIDTH));
            for (int i = 0; i < count; i++)
                add_scaled(s.o, m.states[s.head_states[i]].o, row, head0 + l, s.head_weights[i], m.v_dim);
        }
        write_row(out.o, row, head0 + l, s.o, m.v_dim);
    }
}

// Merges m.states into `out`, and adds m.sink, a logit without a value, to each head's sum. Computes the
// weights of WIDTH heads at a time, one head a lane: head by head, each sum, logarithm and division would
// wait for the one before. See Kernels::merge.
void merge(const MergeArguments& m, const StateArray& out) {
    const MergeScratch s(m);
    bool all_f32 = true;
    for (int i = 0; i < m.count; i++) all_f32 = all_f32 && m.states[i].o.format == Format::f32;
    alignas(64) float lses[WIDTH];
    for (int row = 0; row < m.rows; row++)
        for (int head0 = 0; head0 < m.heads; head0 += WIDTH) {
            const int heads = std::min(WIDTH, m.heads - head0);
            const vf sink = m.sink ? load_lses(m.sink + head0, 1, heads) : splat(-INFINITY);
            vf max_lse = sink;
            for (int i = 0; i < m.count; i++) {
                const StateArray& state = m.states[i];
                const int64_t stride = state.lse_head_stride;
                const vf lse = load_lses(state.lse + row * state.lse_row_stride + head0 * stride, stride, heads);
                store(s.weights[i], lse);
                max_lse = max(lse, max_lse);  // this operand order skips NaN; its weight is NaN below
            }
            const auto weight_of = [&](vf lse) {
                const vf weight = exp2<true>(lse, max_lse, LOG2_E);
                return lse == -INFINITY ? vf{} : weight;
            };
            vf weight_sum = weight_of(sink);
            for (int i = 0; i < m.count; i++) {
                const vf weight = weight_of(load(s.weights[i]));
                store(s.weights[i], weight);
                weight_sum += weight;
            }
            const vf inverse = weight_sum == 0.0f ? vf{} : 1.0f / weight_sum;
            store(lses, weight_sum == 0.0f ? splat(-INFINITY) : log(weight_sum) + max_lse);
            for (int i = 0; i < m.count; i++) store(s.weights[i], load(s.weights[i]) * inverse);
            merge_heads(m, out, row, head0, heads, all_f32, s);
            for (int l = 0; l < heads; l++) write_lse(out, row, head0 + l, lses[l]);
        }
}

}  // namespace ISA
}  // namespace farshore

// Reads rows of weights in the layer's format as vectors. Included by simd/isa_kernels.h after values.h; packed.h
// reads packed rows.
//
// A word is 32 bits of a row: one float32 or two bfloat16.

namespace farshore {
namespace ISA {
namespace dense_ops {

// Whether many_rows.h multiplies words of two bfloat16 with a dot product instruction. If not, they are split
// into float32 vectors of the even and of the odd elements.
#if defined(HAS_BF16_DOT)
template <Format F>
constexpr bool PAIRS = F == Format::bf16;
#else
template <Format F>
constexpr bool PAIRS = false;
#endif

// Elements in a vector of words.
template <Format F>
constexpr int STEP = F == Format::f32 ? WIDTH : 2 * WIDTH;

inline vf even(vu words) { return (vf)(words << 16); }
inline vf odd(vu words) { return (vf)(words & 0xffff0000); }

// sum + a[2l] * b[2l] + a[2l + 1] * b[2l + 1] in each lane l, of bfloat16 elements.
inline vf dot_pairs(vf sum, vu a, vu b) {
#if defined(HAS_BF16_DOT)
    return (vf)_mm512_dpbf16_ps((__m512)sum, (__m512bh)a, (__m512bh)b);
#else
    return sum + even(a) * even(b) + odd(a) * odd(b);
#endif
}

// Elements [i, i + STEP) of a row of n as words; zeros beyond its end.
template <Format F>
inline vu words_at(const void* row, int i, int n) {
    if (i + STEP<F> <= n) return load_as<vu>(address<F>(row, i));
    uint8_t padded[4 * WIDTH] = {};
    std::memcpy(padded, address<F>(row, i), (n - i) * size_of(F));
    return load_as<vu>(padded);
}

// Reads rows of weights for few_rows.h, from `row` on. for_vectors<N> walks N rows together and calls
// multiply(values[N]) for each vector of their elements, in the order in which `spread` stores x: of each STEP of
// bfloat16 elements the even ones, then the odd ones.
template <Format F>
struct Plain {
    // Elements [first, end) of rows from `row` on: whole rows.
    Plain(const Linear& w, int row, int, int)
        : in(w.in), row_bytes(in * size_of(F)), first(static_cast<const uint8_t*>(w.rows) + row * row_bytes) {}

    template <int N, class Multiply>
    INLINE void for_vectors(Multiply&& multiply) const {
        const int64_t ahead = N * row_bytes < 16384 ? N * row_bytes : 1024;
        for (int i = 0; i < in; i += STEP<F>) {
            vu words[N];
            vf values[N];
            unrolled<N>([&](auto j) INLINE {
                words[j] = words_at<F>(first + j * row_bytes, i, in);
                values[j] = F == Format::f32 ? (vf)words[j] : even(words[j]);
                __builtin_prefetch(address<F>(first + j * row_bytes, i) + ahead);
            });
            multiply(values);
            if (F == Format::f32) continue;
            unrolled<N>([&](auto j) INLINE { values[j] = odd(words[j]); });
            multiply(values);
        }
    }

    int in;
    int64_t row_bytes;
    const uint8_t* first;
};

}  // namespace dense_ops
}  // namespace ISA
}  // namespace farshore

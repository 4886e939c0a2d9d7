// Reads rows of weights as vectors of float32, whatever they are stored in. Included by simd/isa_kernels.h
// after values.h.
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

// Plain, Q4 and Q8 read rows of weights for few_rows.h, from `row` on. for_vectors<N> walks N rows together
// and calls multiply(values[N]) for each vector of their elements, in the order in which `spread` stores x:
// of each STEP of bfloat16 elements the even ones, then the odd ones.

// Weights in the layer's format.
template <Format F>
struct Plain {
    Plain(const Linear& w, int row)
        : in(w.in), row_bytes(in * size_of(F)), first(static_cast<const uint8_t*>(w.weight) + row * row_bytes) {}

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

#if WIDTH == 16

// x rounded to bfloat16, ties to even, for |x| up to 2^110. Veltkamp's splitting: rounding the product with
// 2^16 + 1 to float32 rounds x at the last bit of a bfloat16. In a tie all bits behind that are 0, so the
// product's parity is that of the bfloat16.
inline vf nearest_bf16(vf x) {
    vf p = x * 65537.0f;
    asm("" : "+v"(p));  // keeps the compiler from contracting this product into an fma
    return p + (x - p);
}

// Converts 8, 4 or 1 float16 to float32 in `to`. The empty asm makes gcc read them from memory: a broadcast
// is then a load, which is free beside the arithmetic, and not a shuffle.
template <int COUNT>
inline void load_scales(const uint8_t* from, float* to) {
    if constexpr (COUNT == 8) _mm256_store_ps(to, _mm256_cvtph_ps(load_as<__m128i>(from)));
    if constexpr (COUNT == 4) _mm_store_ps(to, _mm_cvtph_ps(_mm_loadl_epi64((const __m128i*)from)));
    if constexpr (COUNT == 1) *to = _cvtsh_ss(load_as<uint16_t>(from));
    asm("" : "+m"(*(float (*)[COUNT])to));
}

// Packed four-bit weights. The 16 possible values d * i + m of a block make a table, rounded to bfloat16,
// which is looked up by the nibbles. d * i is exact in float32, so the values equal those of dequantising the
// file (gguf.h).
struct Q4 {
    Q4(const Linear& w, int row) : pairs((w.in + 63) / 64), row_bytes(40L * pairs), first(w.packed + row * row_bytes) {}

    template <int N, class Multiply>
    INLINE void for_vectors(Multiply&& multiply) const {
        const uint8_t *line = first, *scales = first + 32L * pairs;
        for (int pair = 0; pair + 2 <= pairs; pair += 2, line += 64, scales += 16) blocks<N, 4>(line, scales, multiply);
        if (pairs % 2) blocks<N, 2>(line, scales, multiply);
    }

    // COUNT blocks of N rows. Nibble 2k of word l is weight 2l of block k, nibble 2k + 1 is weight 2l + 1.
    // The look-up ignores the bits above a nibble.
    //   line    the integers of the first row's blocks
    //   from    their scales: float16 d, m of each block
    template <int N, int COUNT, class Multiply>
    INLINE void blocks(const uint8_t* line, const uint8_t* from, Multiply&& multiply) const {
        alignas(32) float scales[N][2 * COUNT];
        for (int j = 0; j < N; j++) {
            load_scales<2 * COUNT>(from + j * row_bytes, scales[j]);
            __builtin_prefetch(line + j * row_bytes + AHEAD);
        }
        unrolled<COUNT>([&](auto k) INLINE {
            const vf i = {0, 1, 2, 3, 4, 5, 6, 7, 8, 9, 10, 11, 12, 13, 14, 15};
            __m512i index[N];
            __m512 table[N];
            vf values[N];
            unrolled<N>([&](auto j) INLINE {
                table[j] = (__m512)nearest_bf16(i * scales[j][2 * k] + scales[j][2 * k + 1]);
                const uint8_t* integers = line + j * row_bytes;
                index[j] = COUNT == 4 ? load_as<__m512i>(integers + k)
                                      : _mm512_srli_epi32((__m512i)widen(load_as<vh>(integers)), 8 * k);
                values[j] = (vf)_mm512_permutexvar_ps(index[j], table[j]);
            });
            multiply(values);
            unrolled<N>([&](auto j) INLINE {
                values[j] = (vf)_mm512_permutexvar_ps(_mm512_srli_epi32(index[j], 4), table[j]);
            });
            multiply(values);
        });
    }

    static constexpr int AHEAD = 2048;  // bytes to prefetch ahead

    int pairs;
    int64_t row_bytes;
    const uint8_t* first;
};

// Packed eight-bit weights: d * i, in blocks of 32.
struct Q8 {
    Q8(const Linear& w, int row)
        : blocks((w.in + 31) / 32), row_bytes(34L * blocks), first(w.packed + row * row_bytes) {}

    template <int N, class Multiply>
    INLINE void for_vectors(Multiply&& multiply) const {
        const uint8_t *line = first, *scales = first + 32L * blocks;
        int b = 0;
        for (; b + 4 <= blocks; b += 4, line += 128, scales += 8) some_blocks<N, 4>(line, scales, multiply);
        for (; b < blocks; b++, line += 32, scales += 2) some_blocks<N, 1>(line, scales, multiply);
    }

    // COUNT blocks of N rows: of each block the 16 even weights, then the 16 odd ones.
    template <int N, int COUNT, class Multiply>
    INLINE void some_blocks(const uint8_t* line, const uint8_t* from, Multiply&& multiply) const {
        alignas(16) float scales[N][COUNT];
        for (int j = 0; j < N; j++) {
            load_scales<COUNT>(from + j * row_bytes, scales[j]);
            for (int b = 0; b < 32 * COUNT; b += 64) __builtin_prefetch(line + j * row_bytes + b + AHEAD);
        }
        unrolled<2 * COUNT>([&](auto half) INLINE {
            vf values[N];
            unrolled<N>([&](auto j) INLINE {
                const vi integers = widen(load_as<vb>((const int8_t*)line + j * row_bytes + 16 * half));
                values[j] = nearest_bf16(__builtin_convertvector(integers, vf) * scales[j][half / 2]);
            });
            multiply(values);
        });
    }

    static constexpr int AHEAD = 4096;  // bytes to prefetch ahead

    int blocks;
    int64_t row_bytes;
    const uint8_t* first;
};

#endif

}  // namespace dense_ops
}  // namespace ISA
}  // namespace farshore

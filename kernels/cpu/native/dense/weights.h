// Rows of weights as vectors of words, or of float32s from whatever they are stored in.
// Included after dense_values.h.

namespace farshore {
namespace ISA {
namespace slices {

// Whether words of two bfloat16 are multiplied as they are. Else their products run over the even ones, then the
// odd ones.
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

// sum + a[2i] b[2i] + a[2i + 1] b[2i + 1], for PAIRS.
inline vf dot_pairs(vf sum, vu a, vu b) {
#if defined(HAS_BF16_DOT)
    return (vf)_mm512_dpbf16_ps((__m512)sum, (__m512bh)a, (__m512bh)b);
#else
    return sum + even(a) * even(b) + odd(a) * odd(b);
#endif
}

// Elements [i, i + STEP) of a row of n, as words, zeros beyond its end.
template <Format F>
inline vu words_at(const void* row, int i, int n) {
    if (i + STEP<F> <= n) return load_as<vu>(at<F>(row, i));
    uint8_t some[4 * WIDTH] = {};
    std::memcpy(some, at<F>(row, i), (n - i) * size_of(F));
    return load_as<vu>(some);
}

// What few rows of x are multiplied by: rows of weights from `row` on, as float32. `each<N>` gives N rows' vectors
// to `use`, in the order of `spread`: of each step of bfloat16s the even ones, then the odd ones.
template <Format F>
struct Plain {
    Plain(const Linear& w, int row)
        : in(w.in), row_bytes(in * size_of(F)), first(static_cast<const uint8_t*>(w.weight) + row * row_bytes) {}

    template <int N, class Use>
    INLINE void each(Use&& use) const {
        const int64_t ahead = N * row_bytes < 16384 ? N * row_bytes : 1024;
        for (int i = 0; i < in; i += STEP<F>) {
            vu words[N];
            vf of[N];
            unrolled<N>([&](auto j) INLINE {
                words[j] = words_at<F>(first + j * row_bytes, i, in);
                of[j] = F == Format::f32 ? (vf)words[j] : even(words[j]);
                __builtin_prefetch(at<F>(first + j * row_bytes, i) + ahead);
            });
            use(of);
            if (F == Format::f32) continue;
            unrolled<N>([&](auto j) INLINE { of[j] = odd(words[j]); });
            use(of);
        }
    }

    int in;
    int64_t row_bytes;
    const uint8_t* first;
};

#if WIDTH == 16

// The nearest bfloat16, ties to even, by Veltkamp's splitting: the product with 2^16 + 1 is rounded where a bfloat16
// ends. Of a tie all later bits are 0, so that the product's parity is the bfloat16's. Up to 2^110.
inline vf nearest_bf16(vf x) {
    vf p = x * 65537.0f;
    asm("" : "+v"(p));  // Rounded here, whatever may be contracted.
    return p + (x - p);
}

// Eight, four or one float16s as float32s that the compiler takes for memory: broadcasts are then loads, which
// cost nothing beside the arithmetic, and not shuffles.
template <int COUNT>
inline void load_scales(const uint8_t* from, float* to) {
    if constexpr (COUNT == 8) _mm256_store_ps(to, _mm256_cvtph_ps(load_as<__m128i>(from)));
    if constexpr (COUNT == 4) _mm_store_ps(to, _mm_cvtph_ps(_mm_loadl_epi64((const __m128i*)from)));
    if constexpr (COUNT == 1) *to = _cvtsh_ss(load_as<uint16_t>(from));
    asm("" : "+m"(*(float(*)[COUNT])to));
}

// Four-bit weights: a block's values d i + m for i = 0 .. 15 make a table. Rounding that rounds the weights: d i is
// exact in float32, so nothing depends on the order.
struct Q4 {
    Q4(const Linear& w, int row)
        : pairs((w.in + 63) / 64), row_bytes(40L * pairs), first(w.packed + row * row_bytes) {}

    template <int N, class Use>
    INLINE void each(Use&& use) const {
        const uint8_t *line = first, *scales = first + 32L * pairs;
        for (int pair = 0; pair + 2 <= pairs; pair += 2, line += 64, scales += 16) blocks<N, 4>(line, scales, use);
        if (pairs % 2) blocks<N, 2>(line, scales, use);
    }

    // COUNT blocks of N rows: nibble 2k of word l is weight 2l of block k, nibble 2k + 1 the next one. What lies
    // above a nibble does not matter to a table of 16.
    template <int N, int COUNT, class Use>
    INLINE void blocks(const uint8_t* line, const uint8_t* from, Use&& use) const {
        alignas(32) float scales[N][2 * COUNT];
        for (int j = 0; j < N; j++) {
            load_scales<2 * COUNT>(from + j * row_bytes, scales[j]);
            __builtin_prefetch(line + j * row_bytes + AHEAD);
        }
        unrolled<COUNT>([&](auto k) INLINE {
            const vf i = {0, 1, 2, 3, 4, 5, 6, 7, 8, 9, 10, 11, 12, 13, 14, 15};
            __m512i index[N];
            __m512 table[N];
            vf of[N];
            unrolled<N>([&](auto j) INLINE {
                table[j] = (__m512)nearest_bf16(i * scales[j][2 * k] + scales[j][2 * k + 1]);
                const uint8_t* at = line + j * row_bytes;
                index[j] = COUNT == 4 ? load_as<__m512i>(at + k)
                                      : _mm512_srli_epi32((__m512i)widen(load_as<vh>(at)), 8 * k);
                of[j] = (vf)_mm512_permutexvar_ps(index[j], table[j]);
            });
            use(of);
            unrolled<N>([&](auto j) INLINE {
                of[j] = (vf)_mm512_permutexvar_ps(_mm512_srli_epi32(index[j], 4), table[j]);
            });
            use(of);
        });
    }

    static constexpr int AHEAD = 2048;

    int pairs;
    int64_t row_bytes;
    const uint8_t* first;
};

// Eight-bit weights d i, in blocks of 32.
struct Q8 {
    Q8(const Linear& w, int row)
        : blocks((w.in + 31) / 32), row_bytes(34L * blocks), first(w.packed + row * row_bytes) {}

    template <int N, class Use>
    INLINE void each(Use&& use) const {
        const uint8_t *line = first, *scales = first + 32L * blocks;
        int b = 0;
        for (; b + 4 <= blocks; b += 4, line += 128, scales += 8) some<N, 4>(line, scales, use);
        for (; b < blocks; b++, line += 32, scales += 2) some<N, 1>(line, scales, use);
    }

    template <int N, int COUNT, class Use>
    INLINE void some(const uint8_t* line, const uint8_t* from, Use&& use) const {
        alignas(16) float scales[N][COUNT];
        for (int j = 0; j < N; j++) {
            load_scales<COUNT>(from + j * row_bytes, scales[j]);
            for (int b = 0; b < 32 * COUNT; b += 64) __builtin_prefetch(line + j * row_bytes + b + AHEAD);
        }
        unrolled<2 * COUNT>([&](auto half) INLINE {
            vf of[N];
            unrolled<N>([&](auto j) INLINE {
                const vi whole = widen(load_as<vb>((const int8_t*)line + j * row_bytes + 16 * half));
                of[j] = nearest_bf16(__builtin_convertvector(whole, vf) * scales[j][half / 2]);
            });
            use(of);
        });
    }

    static constexpr int AHEAD = 4096;

    int blocks;
    int64_t row_bytes;
    const uint8_t* first;
};

#endif

}  // namespace slices
}  // namespace ISA
}  // namespace farshore

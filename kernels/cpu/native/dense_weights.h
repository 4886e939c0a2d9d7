// Rows of weights as words of float32s or of bfloat16 pairs, from whatever they are stored in.
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

// What `dots` reads N rows through: `steps` times `read` of row j gives VECTORS vectors of words.
template <Format F>
struct Plain {
    static constexpr int VECTORS = 1;

    Plain(const Linear& w, int row)
        : in(w.in), steps((in + STEP<F> - 1) / STEP<F>), row_bytes(in * size_of(F)),
          first(static_cast<const uint8_t*>(w.weight) + row * row_bytes) {}

    template <int N>
    struct Scales {
        void load(const Plain&, int) {}
    };
    template <int N>
    void read(const Scales<N>&, int j, int step, vu (&words)[1]) const {
        words[0] = words_at<F>(first + j * row_bytes, step * STEP<F>, in);
    }
    const uint8_t* line(int j, int step) const { return first + j * row_bytes + step * 4 * WIDTH; }

    int in, steps;
    int64_t row_bytes;
    const uint8_t* first;
};

#if defined(HAS_BF16_DOT)

// Four-bit weights: 64 at a time are two blocks, whose values d i + m for i = 0 .. 15 make a table each. Rounding
// those rounds the weights: d i is exact in float32, so nothing depends on the order.
struct Q4 {
    static constexpr int VECTORS = 2;
    static constexpr int SCALED = 4;  // steps whose scales are one vector

    Q4(const Linear& w, int row)
        : steps((w.in + 63) / 64), row_bytes(40L * steps), first(w.packed + row * row_bytes) {}

    template <int N>
    struct Scales {
        alignas(64) float of[N][16];

        void load(const Q4& w, int step) {
            if (step % SCALED) return;
            const int left = 4 * (w.steps - step);
            const __mmask16 some = left < 16 ? (1u << left) - 1 : 0xffff;
            for (int j = 0; j < N; j++) {
                const uint8_t* from = w.first + j * w.row_bytes + 32L * w.steps + 8L * step;
                _mm512_store_ps(of[j], _mm512_cvtph_ps(_mm256_maskz_loadu_epi16(some, from)));
            }
        }
    };
    template <int N>
    void read(const Scales<N>& scales, int j, int step, vu (&words)[2]) const {
        const __m256i bytes = load_as<__m256i>(first + j * row_bytes + 32L * step);
        const __m512i both = _mm512_cvtepu8_epi16(bytes);
        const float* of = scales.of[j] + 4 * (step % SCALED);
        const auto values = [&](const float* d, __m512i index) {
            const vf i = {0, 1, 2, 3, 4, 5, 6, 7, 8, 9, 10, 11, 12, 13, 14, 15};
            const __m256i table = (__m256i)to_bf16(i * d[0] + d[1]);
            return (vu)_mm512_permutexvar_epi16(index, _mm512_castsi256_si512(table));
        };
        words[0] = values(of, _mm512_and_si512(both, _mm512_set1_epi16(15)));
        words[1] = values(of + 2, _mm512_srli_epi16(both, 4));
    }
    const uint8_t* line(int j, int step) const { return first + j * row_bytes + 40L * step; }

    int steps;
    int64_t row_bytes;
    const uint8_t* first;
};

// Eight-bit weights d i, in blocks of 32.
struct Q8 {
    static constexpr int VECTORS = 1;
    static constexpr int SCALED = 16;

    Q8(const Linear& w, int row)
        : steps((w.in + 31) / 32), row_bytes(34L * steps), first(w.packed + row * row_bytes) {}

    template <int N>
    struct Scales {
        alignas(64) float of[N][16];

        void load(const Q8& w, int step) {
            if (step % SCALED) return;
            const int left = w.steps - step;
            const __mmask16 some = left < 16 ? (1u << left) - 1 : 0xffff;
            for (int j = 0; j < N; j++) {
                const uint8_t* from = w.first + j * w.row_bytes + 32L * w.steps + 2L * step;
                _mm512_store_ps(of[j], _mm512_cvtph_ps(_mm256_maskz_loadu_epi16(some, from)));
            }
        }
    };
    template <int N>
    void read(const Scales<N>& scales, int j, int step, vu (&words)[1]) const {
        const int8_t* from = reinterpret_cast<const int8_t*>(first + j * row_bytes + 32L * step);
        const float d = scales.of[j][step % SCALED];
        const vf low = (vf)_mm512_cvtepi32_ps((__m512i)widen(load_as<vb>(from))) * d;
        const vf high = (vf)_mm512_cvtepi32_ps((__m512i)widen(load_as<vb>(from + 16))) * d;
        words[0] = (vu)_mm512_cvtne2ps_pbh((__m512)high, (__m512)low);
    }
    const uint8_t* line(int j, int step) const { return first + j * row_bytes + 34L * step; }

    int steps;
    int64_t row_bytes;
    const uint8_t* first;
};

#endif

}  // namespace slices
}  // namespace ISA
}  // namespace farshore

// Vectors of WIDTH float32 lanes and what the kernels compute with them. Included first by
// simd/isa_kernels.h; see simd/isa.h for ISA, WIDTH and HAS_*.
//
// It uses the compiler's vector types, so that one source compiles to AVX-512, AVX2, SSE or NEON. Only
// conversions, reductions and table look-ups name instructions.

namespace farshore {
namespace ISA {

// float32, int32, uint32; of half the size uint16; of a quarter int8 and uint8.
typedef float vf __attribute__((vector_size(4 * WIDTH)));
typedef int32_t vi __attribute__((vector_size(4 * WIDTH)));
typedef uint32_t vu __attribute__((vector_size(4 * WIDTH)));
typedef uint16_t vh __attribute__((vector_size(2 * WIDTH)));
typedef int8_t vb __attribute__((vector_size(WIDTH)));
typedef uint8_t vc __attribute__((vector_size(WIDTH)));

template <class V, class T>
inline V load_as(const T* p) {
    V v;
    std::memcpy(&v, p, sizeof v);
    return v;
}
template <class V, class T>
inline void store_as(T* p, V v) {
    std::memcpy(p, &v, sizeof v);
}
inline vf load(const float* p) { return load_as<vf>(p); }
inline void store(float* p, vf v) { store_as(p, v); }
inline vf splat(float x) { return x - vf{}; }
inline vf bits_to_float(vu v) { return (vf)v; }
inline vf max(vf a, vf b) { return a > b ? a : b; }

inline float hmax(vf v) {
#if WIDTH == 16
    return _mm512_reduce_max_ps((__m512)v);
#else
    float m = v[0];
    for (int i = 1; i < WIDTH; i++) m = v[i] > m ? v[i] : m;
    return m;
#endif
}
inline bool any_above(vf v, float x) {
#if WIDTH == 16
    return _mm512_cmp_ps_mask((__m512)v, _mm512_set1_ps(x), _CMP_GT_OQ) != 0;
#else
    return hmax(v) > x;
#endif
}
inline float hsum(vf v) {
#if WIDTH == 16
    return _mm512_reduce_add_ps((__m512)v);
#else
    float s = 0;
    for (int i = 0; i < WIDTH; i++) s += v[i];
    return s;
#endif
}

// Prefetches the bytes that the next tile will read, spread over the work on this tile. Loops call tick(n)
// after work of about n * 2 ns; expect(n) announces how many ticks the tile will have, which is the number
// that the last tile had.
//
// Only loops on data in L1 tick: a line on its way from memory holds one of the core's 16 line buffers, and
// while all are taken a load from L2 waits for memory too. (Measured, in GB/s of 32: no prefetch 18, ticks in
// every loop 21, this 26.)
class Prefetch {
  public:
    Prefetch() = default;  // of nothing
    // Two ranges of memory, `a` first.
    Prefetch(const uint8_t* a, int64_t a_bytes, const uint8_t* b, int64_t b_bytes)
        : next_(a),
          end_(a + a_bytes),
          second_(b),
          second_end_(b + b_bytes),
          lines_((int)((a_bytes + b_bytes) / 64) + 2) {}

    void expect(int ticks) { lines_per_tick_ = lines_ * 256 / (ticks + 1) + 1; }
    int ticks() const { return ticks_; }
    void tick(int ticks) {
        ticks_ += ticks;
        for (due_ += ticks * lines_per_tick_; due_ >= 256; due_ -= 256) {
            if (next_ >= end_) {
                if (second_ >= second_end_) return;
                next_ = second_, end_ = second_end_;
                second_ = second_end_;
            }
            __builtin_prefetch(next_, 0, 2);
            next_ += 64;
        }
    }

  private:
    const uint8_t *next_ = nullptr, *end_ = nullptr, *second_ = nullptr, *second_end_ = nullptr;
    int lines_ = 0, lines_per_tick_ = 0, due_ = 0, ticks_ = 0;
};

// -- widening --------------------------------------------------------------------------------
// Named instructions: gcc 12 converts these vectors element by element.

inline vi widen(vb v) {
#if WIDTH == 16
    return (vi)_mm512_cvtepi8_epi32((__m128i)v);
#elif WIDTH == 8
    long long low;
    std::memcpy(&low, &v, 8);
    return (vi)_mm256_cvtepi8_epi32(_mm_cvtsi64_si128(low));
#else
    return __builtin_convertvector(v, vi);
#endif
}
inline vi widen(vc v) {
#if WIDTH == 16
    return (vi)_mm512_cvtepu8_epi32((__m128i)v);
#elif WIDTH == 8
    long long low;
    std::memcpy(&low, &v, 8);
    return (vi)_mm256_cvtepu8_epi32(_mm_cvtsi64_si128(low));
#else
    return __builtin_convertvector(v, vi);
#endif
}
inline vu widen(vh v) {
#if WIDTH == 16
    return (vu)_mm512_cvtepu16_epi32((__m256i)v);
#elif WIDTH == 8
    return (vu)_mm256_cvtepu16_epi32((__m128i)v);
#else
    return __builtin_convertvector(v, vu);
#endif
}

// -- 16-bit floats ---------------------------------------------------------------------------

inline vf from_bf16(const uint16_t* p) { return bits_to_float(widen(load_as<vh>(p)) << 16); }
inline float from_bf16(uint16_t x) {
    const uint32_t bits = uint32_t{x} << 16;
    float f;
    std::memcpy(&f, &bits, 4);
    return f;
}
// Rounds to nearest even. NaN stays NaN.
inline vh to_bf16(vf x) {
#if defined(HAS_BF16_DOT)
    return (vh)_mm512_cvtneps_pbh((__m512)x);
#else
    const vu bits = (vu)x;
    const vu rounded = (bits + 0x7fff + ((bits >> 16) & 1)) >> 16;
    return __builtin_convertvector(x == x ? rounded : (bits >> 16) | 0x40, vh);
#endif
}
inline uint16_t to_bf16(float x) {
    uint32_t bits;
    std::memcpy(&bits, &x, 4);
    return x == x ? (bits + 0x7fff + ((bits >> 16) & 1)) >> 16 : bits >> 16 | 0x40;
}

// Converts float16 with integer operations, for CPUs without an instruction for it: shifts exponent and
// mantissa into place, then multiplies by 2^112, which corrects the exponent's bias and normalises denormals.
inline float from_f16(uint16_t h) {
    const uint32_t magnitude = (h & 0x7fffu) << 13;
    float f;
    std::memcpy(&f, &magnitude, 4);
    f *= 0x1p112f;
    uint32_t bits;
    std::memcpy(&bits, &f, 4);
    if ((h & 0x7c00) == 0x7c00) bits |= 0x7f800000;
    bits |= (h & 0x8000u) << 16;
    std::memcpy(&f, &bits, 4);
    return f;
}
inline uint16_t to_f16(float x) {
    uint32_t bits;
    std::memcpy(&bits, &x, 4);
    const uint32_t sign = bits >> 16 & 0x8000;
    bits &= 0x7fffffff;
    if (bits > 0x7f800000) return sign | 0x7e00;
    if (bits >= 0x477ff000) return sign | 0x7c00;  // rounds to 65536 or more
    if (bits < 0x38800000) {                       // denormal: let the adder round
        float f, magic = 0.5f;
        std::memcpy(&f, &bits, 4);
        f += magic;
        std::memcpy(&bits, &f, 4);
        return sign | (bits - 0x3f000000);
    }
    return sign | ((bits - 0x38000000 + 0xfff + (bits >> 13 & 1)) >> 13);
}
inline vf from_f16(const uint16_t* p) {
#if WIDTH == 16
    return (vf)_mm512_cvtph_ps((__m256i)load_as<vh>(p));
#elif defined(HAS_F16C)
    return (vf)_mm256_cvtph_ps((__m128i)load_as<vh>(p));
#else
    vf v;
    for (int i = 0; i < WIDTH; i++) v[i] = from_f16(p[i]);
    return v;
#endif
}
inline vh to_f16(vf x) {
#if WIDTH == 16
    return (vh)_mm512_cvtps_ph((__m512)x, _MM_FROUND_TO_NEAREST_INT | _MM_FROUND_NO_EXC);
#elif defined(HAS_F16C)
    return (vh)_mm256_cvtps_ph((__m256)x, _MM_FROUND_TO_NEAREST_INT | _MM_FROUND_NO_EXC);
#else
    vh h;
    for (int i = 0; i < WIDTH; i++) h[i] = to_f16(x[i]);
    return h;
#endif
}

constexpr float LOG2_E = 1.44269504f;

// -- exp2, log and tanh ----------------------------------------------------------------------

// 2^((x - row_max) * scale) for x <= row_max. row_max: a float, or a vf with one value a lane. For softmax
// weights, scale is log2(e) times the factor of the logits. Relative error: 2e-7 if EXACT; otherwise 1e-4
// plus the rounding of x * scale in float32, which is less than the rounding of the result to bfloat16.
// Results below 2^-126 become about 2^-126. NaN stays NaN.
template <bool EXACT, class Max>
inline vf exp2(vf x, Max row_max, float scale) {
    const float magic = 12582912.0f;  // 1.5 * 2^23: the sum is rounded to an integer
    x = EXACT ? (x - row_max) * scale : x * scale - row_max * scale;
    x = max(splat(-126.0f), x);  // this operand order keeps NaN
    const vf t = x + magic;
    const vf r = x - (t - magic);
    vf p;
    if (EXACT) {
        p = splat(1.5403530e-4f);
        p = p * r + 1.3333558e-3f;
        p = p * r + 9.6181291e-3f;
        p = p * r + 5.5504109e-2f;
        p = p * r + 2.4022651e-1f;
        p = p * r + 6.9314718e-1f;
        p = p * r + 1.0f;
    } else {
        p = splat(5.5857e-2f);
        p = p * r + 2.4264e-1f;
        p = p * r + 6.93012e-1f;
        p = p * r + 9.99925e-1f;
    }
    return bits_to_float((vu)p + ((vu)t << 23));
}

// 2^y for y <= 0. Relative error 1e-7, besides what the rounding of y itself causes. Results below 2^-126
// become 2^-126.
inline vf exp2_near(vf y) {
    const float magic = 12582912.0f;
    y = max(splat(-126.0f), y);
    const vf t = y + magic;
    const vf r = y - (t - magic);
    vf p = splat(1.32647266e-3f);
    p = p * r + 9.67151296e-3f;
    p = p * r + 5.55073375e-2f;
    p = p * r + 2.40222421e-1f;
    p = p * r + 6.93146978e-1f;
    p = p * r + 1.0f;
    return bits_to_float((vu)p + ((vu)t << 23));
}

// ln(x) of a normal x > 0. NaN stays NaN. Relative error 2e-7; near x = 1, absolute error 2e-7.
inline vf log(vf x) {
    // x = 2^e (1 + f), 1 + f within a factor of sqrt 2 of 1; ln(1 + f) = 2 atanh(f / (2 + f)).
    const vi e = ((vi)x - 0x3f3504f3) >> 23;
    const vf f = (vf)((vi)x - (e << 23)) - 1.0f;
    const vf s = f / (2.0f + f), z = s * s;
    const vf series = s * (2.0f + z * (2.0f / 3 + z * (2.0f / 5 + z * (2.0f / 7 + z * (2.0f / 9)))));
    return x == x ? __builtin_convertvector(e, vf) * 0.693147181f + series : x;
}

inline vf tanh(vf x) {
    const vf size = max(x, -x);
    const vf e = exp2<true>(size, 0.0f, -2.0f * LOG2_E);
    const vf far = (1.0f - e) / (1.0f + e);
    // Near 0, 1 - e cancels; a series is used there.
    const vf s = x * x;
    const vf near = size * (1.0f + s * (-1.0f / 3 + s * (2.0f / 15 + s * (-17.0f / 315 + s * (62.0f / 2835)))));
    const vf y = size < 0.25f ? near : far;
    return x < 0.0f ? -y : y;
}

// -- transposition ---------------------------------------------------------------------------

// Transposes WIDTH vectors of 32-bit lanes: r[i][j] <-> r[j][i]. A stage exchanges lanes and vectors whose
// numbers differ in bit H, for N vectors.
template <int H, int N = WIDTH>
inline void transpose_stage(vu* r) {
    vi low, high;
    for (int l = 0; l < WIDTH; l++) {
        low[l] = l & H ? l - H + WIDTH : l;
        high[l] = l & H ? l + WIDTH : l + H;
    }
    for (int i = 0; i < N; i++) {
        if (i & H) continue;
        const vu a = r[i], b = r[i | H];
        r[i] = __builtin_shuffle(a, b, low);
        r[i | H] = __builtin_shuffle(a, b, high);
    }
}
inline void transpose(vu* r) {
#if WIDTH == 16
    transpose_stage<8>(r);
#endif
#if WIDTH >= 8
    transpose_stage<4>(r);
#endif
    transpose_stage<2>(r);
    transpose_stage<1>(r);
}

// -- horizontal sums -------------------------------------------------------------------------

typedef float vf4 __attribute__((vector_size(16)));

// {sum of a's lanes, sum of b's lanes, of c's, of d's}.
inline vf4 lane_sums(vf a, vf b, vf c, vf d) {
    vi low, high, even, odd;
    for (int l = 0; l < WIDTH; l += 4) {
        low[l] = l, low[l + 1] = WIDTH + l, low[l + 2] = l + 1, low[l + 3] = WIDTH + l + 1;
        high[l] = l + 2, high[l + 1] = WIDTH + l + 2, high[l + 2] = l + 3, high[l + 3] = WIDTH + l + 3;
        even[l] = l, even[l + 1] = l + 1, even[l + 2] = WIDTH + l, even[l + 3] = WIDTH + l + 1;
        odd[l] = l + 2, odd[l + 1] = l + 3, odd[l + 2] = WIDTH + l + 2, odd[l + 3] = WIDTH + l + 3;
    }
    const vf ab = __builtin_shuffle(a, b, low) + __builtin_shuffle(a, b, high);
    const vf cd = __builtin_shuffle(c, d, low) + __builtin_shuffle(c, d, high);
    const vf all = __builtin_shuffle(ab, cd, even) + __builtin_shuffle(ab, cd, odd);
#if WIDTH == 16
    const __m256 half = _mm256_add_ps(_mm512_castps512_ps256((__m512)all), _mm512_extractf32x8_ps((__m512)all, 1));
    return (vf4)_mm_add_ps(_mm256_castps256_ps128(half), _mm256_extractf128_ps(half, 1));
#elif WIDTH == 8
    return (vf4)_mm_add_ps(_mm256_castps256_ps128((__m256)all), _mm256_extractf128_ps((__m256)all, 1));
#else
    return all;
#endif
}

}  // namespace ISA
}  // namespace farshore

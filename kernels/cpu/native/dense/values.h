// Loads and stores of rows in the layer's format as float32 vectors, with PyTorch's rounding. Included by
// simd/isa_kernels.h after the attention headers.

namespace farshore {
namespace ISA {
namespace dense_ops {

// Bytes of an element.
constexpr int64_t size_of(Format f) { return f == Format::f32 ? 4 : 2; }

// x rounded to F, to nearest even. NaN stays NaN.
template <Format F>
inline vf rounded(vf x) {
    if (F == Format::f32) return x;
    const vu bits = (vu)x;
    const vu up = (bits + 0x7fff + ((bits >> 16) & 1)) & 0xffff0000;
    return (vf)(x == x ? up : bits | 0x400000);
}

// The address of element i of a row.
template <Format F>
inline const uint8_t* address(const void* row, int64_t i) {
    return static_cast<const uint8_t*>(row) + i * size_of(F);
}
template <Format F>
inline uint8_t* address(void* row, int64_t i) {
    return static_cast<uint8_t*>(row) + i * size_of(F);
}

// Elements [i, i + WIDTH) of a row of n; zeros beyond its end.
template <Format F>
inline vf get(const void* row, int i, int n) {
    const uint8_t* from = address<F>(row, i);
    uint8_t padded[4 * WIDTH] = {};
    if (i + WIDTH > n) {
        std::memcpy(padded, from, (n - i) * size_of(F));
        from = padded;
    }
    if (F == Format::f32) return load_as<vf>(from);
    return from_bf16(reinterpret_cast<const uint16_t*>(from));
}

// Stores x, rounded, as elements [i, i + WIDTH) of a row of n, up to its end.
template <Format F>
inline void put(void* row, int i, int n, vf x) {
    uint8_t* to = address<F>(row, i);
    if (F == Format::f32) {
        if (i + WIDTH <= n) return store_as(to, x);
        std::memcpy(to, &x, 4L * (n - i));
    } else {
        const vh half = to_bf16(x);
        if (i + WIDTH <= n) return store_as(to, half);
        std::memcpy(to, &half, 2L * (n - i));
    }
}

// I as an argument whose value the callee knows while it compiles.
template <int I>
constexpr std::integral_constant<int, I> number{};

// Calls body(i) for i = 0 .. N - 1, with i a compile-time constant, so that arrays indexed by it live in
// registers.
template <int N, class Body>
__attribute__((always_inline)) inline void unrolled(Body&& body) {
    [&]<int... I>(std::integer_sequence<int, I...>) __attribute__((always_inline)) {
        (body(std::integral_constant<int, I>{}), ...);
    }(std::make_integer_sequence<int, N>{});
}
#define INLINE __attribute__((always_inline))

// The sum of v's lanes. Adds in another order than hsum.
inline float lane_sum(vf v) {
#if WIDTH == 16
    return _mm512_reduce_add_ps((__m512)v);
#elif WIDTH == 8
    const __m128 four = _mm_add_ps(_mm256_castps256_ps128((__m256)v), _mm256_extractf128_ps((__m256)v, 1));
    const __m128 two = _mm_add_ps(four, _mm_movehl_ps(four, four));
    return _mm_cvtss_f32(_mm_add_ss(two, _mm_movehdup_ps(two)));
#else
    return (v[0] + v[2]) + (v[1] + v[3]);
#endif
}

// x / (1 + e^-x), computed from e^-|x|, which cannot overflow. NaN stays NaN.
inline vf silu(vf x) {
    const vf magnitude = (vf)((vu)x & 0x7fffffff);
    const vf e = exp2<true>(-magnitude, 0.0f, LOG2_E);
    return x * (x < 0 ? e : splat(1.0f)) / (1.0f + e);
}

}  // namespace dense_ops
}  // namespace ISA
}  // namespace farshore

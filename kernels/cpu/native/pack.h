// Stored KV -> operands of the matrix products. K comes out transposed, [dim][token], V as [token][dim]; both
// zero-padded, so that what lies beyond a tile never counts. Two arithmetics:
//   Floats: float32 elements, any format (quantised values times their scale, as `dequantise` gives them);
//   Pairs:  bfloat16, two neighbours along the summed dimension in one 32-bit word, K [dim/2][token] and
//           V [token/2][dim], the layout of bfloat16 dot products and of AMX.
// Included after simd.h.

namespace farshore {
namespace ISA {

constexpr int round_up(int n, int to) { return (n + to - 1) / to * to; }

// One row of a stored head: element i's value, scaled.
template <Format F>
inline float element(const uint8_t* row, const uint8_t* scales, int i, int dim) {
    uint16_t h;
    if (F == Format::f32) {
        float f;
        std::memcpy(&f, row + 4 * i, 4);
        return f;
    }
    if (F == Format::bf16 || F == Format::f16) {
        std::memcpy(&h, row + 2 * i, 2);
        return F == Format::bf16 ? from_bf16(h) : from_f16(h);
    }
    std::memcpy(&h, scales + i / SCALE_ELEMENTS * 2, 2);
    const float scale = from_bf16(h);
    if (F == Format::i8) return static_cast<int8_t>(row[i]) * scale;
    // int4: of a group of w elements, the first half are low nibbles, the second high ones.
    const int group = i / SCALE_ELEMENTS, at = i % SCALE_ELEMENTS;
    const int left = dim - group * SCALE_ELEMENTS;
    const int half = ((left < SCALE_ELEMENTS ? left : SCALE_ELEMENTS) + 1) / 2;
    const uint8_t* bytes = row + group * (SCALE_ELEMENTS / 2);
    return ((at < half ? bytes[at] & 15 : bytes[at - half] >> 4) - 8) * scale;
}

// Elements [i, i + WIDTH) of a row, zeros beyond dim.
template <Format F>
inline vf elements(const uint8_t* row, const uint8_t* scales, int i, int dim) {
    const int group = i / SCALE_ELEMENTS, at = i % SCALE_ELEMENTS;
    const bool whole_group = (group + 1) * SCALE_ELEMENTS <= dim;
    if (i + WIDTH > dim || (F == Format::i4 && !whole_group)) {
        float some[WIDTH] = {};
        for (int l = 0; l < WIDTH && i + l < dim; l++) some[l] = element<F>(row, scales, i + l, dim);
        return load(some);
    }
    if (F == Format::f32) return load_as<vf>(row + 4 * i);
    if (F == Format::bf16) return from_bf16(reinterpret_cast<const uint16_t*>(row + 2 * i));
    if (F == Format::f16) return from_f16(reinterpret_cast<const uint16_t*>(row + 2 * i));
    uint16_t h;
    std::memcpy(&h, scales + group * 2, 2);
    const float scale = from_bf16(h);
    if (F == Format::i8) {
        const vi v = widen(load_as<vb>(row + i));
        return __builtin_convertvector(v, vf) * scale;
    }
    constexpr int HALF = SCALE_ELEMENTS / 2;
    const uint8_t* bytes = row + group * HALF + at % HALF;
    const vi v = widen(load_as<vc>(bytes));
    return __builtin_convertvector((at < HALF ? v & 15 : v >> 4) - 8, vf) * scale;
}

struct Floats {
    typedef float Element;
    static constexpr int STEP = WIDTH;       // every dimension is padded to multiples of this
    static constexpr bool EXACT = true;
    static constexpr int element_bytes = 4;  // of one summed element

    // dst [k_pad][ld], tokens beyond n and dims beyond dim zero; n_pad and k_pad multiples of WIDTH.
    template <Format F>
    static void pack_k(float* dst, int ld, const uint8_t* k, int64_t stride, const uint8_t* scales,
                       int64_t scale_stride, int n, int n_pad, int dim, int k_pad) {
        for (int t = 0; t < n_pad; t += WIDTH)
            for (int i = 0; i < k_pad; i += WIDTH) {
                vu r[WIDTH];
                for (int l = 0; l < WIDTH; l++)
                    r[l] = t + l < n && i < dim
                               ? (vu)elements<F>(k + (t + l) * stride, scales + (t + l) * scale_stride, i, dim)
                               : vu{};
                transpose(r);
                for (int l = 0; l < WIDTH; l++) store_as(dst + (i + l) * ld + t, r[l]);
            }
    }
    // dst [n_pad][ld]
    template <Format F>
    static void pack_v(float* dst, int ld, const uint8_t* v, int64_t stride, const uint8_t* scales,
                       int64_t scale_stride, int n, int n_pad, int dim, int dim_pad) {
        for (int t = 0; t < n_pad; t++) {
            for (int i = 0; i < dim_pad; i += WIDTH)
                store(dst + t * ld + i,
                      t < n && i < dim ? elements<F>(v + t * stride, scales + t * scale_stride, i, dim) : vf{});
        }
    }
    static void store_row(float* dst, vf x) { store(dst, x); }
    static void order_columns(float*, int) {}
    static constexpr bool INTEGERS = false;
    static bool by_rows(int, const Shape&) { return false; }
    struct Session {};
};

#if defined(HAS_BF16_DOT)
// Quantised values enter as the integers they are, exact in bfloat16; their scales are applied to logits and
// weights.
struct Pairs {
    typedef uint16_t Element;
    static constexpr int STEP = 32;
    static constexpr bool EXACT = false;
    static constexpr int element_bytes = 2;
    static constexpr bool INTEGERS = true;
    static bool by_rows(int, const Shape&) { return false; }

    // The 32 elements of a row from i on, unscaled, zeros beyond dim: 16 words of two neighbours.
    template <Format F>
    static vu words(const uint8_t* row, int i, int dim) {
        const int left = dim - i;
        if (F == Format::bf16)
            return left >= 32 ? load_as<vu>(row + 2 * i)
                              : (vu)_mm512_maskz_loadu_epi16(left > 0 ? (1u << left) - 1 : 0, row + 2 * i);
        const int group = i / SCALE_ELEMENTS;
        if (left < 32 || (F == Format::i4 && (group + 1) * SCALE_ELEMENTS > dim)) {
            uint16_t one = 0x3f80, some[32] = {};
            uint16_t ones[16];
            for (uint16_t& it : ones) it = one;  // scales of 1
            for (int l = 0; l < 32 && l < left; l++)
                some[l] = to_bf16(
                    element<F>(row, reinterpret_cast<const uint8_t*>(ones), i + l, dim));
            return load_as<vu>(some);
        }
        if (F == Format::i8) {
            // An integer up to 127 as float32 has all its bits in the upper half: that is its bfloat16.
            const vu a = (vu)__builtin_convertvector(widen(load_as<vb>(row + i)), vf);
            const vu b = (vu)__builtin_convertvector(widen(load_as<vb>(row + i + 16)), vf);
            alignas(64) static constexpr uint16_t upper[32] = {1,  3,  5,  7,  9,  11, 13, 15, 17, 19, 21,
                                                               23, 25, 27, 29, 31, 33, 35, 37, 39, 41, 43,
                                                               45, 47, 49, 51, 53, 55, 57, 59, 61, 63};
            return (vu)_mm512_permutex2var_epi16((__m512i)a, _mm512_load_si512(upper), (__m512i)b);
        }
        // Nibble n is element n - 8: looked up, in bfloat16.
        alignas(64) static constexpr uint16_t table[32] = {
            0xc100, 0xc0e0, 0xc0c0, 0xc0a0, 0xc080, 0xc040, 0xc000, 0xbf80, 0x0000, 0x3f80, 0x4000,
            0x4040, 0x4080, 0x40a0, 0x40c0, 0x40e0, 0xc100, 0xc0e0, 0xc0c0, 0xc0a0, 0xc080, 0xc040,
            0xc000, 0xbf80, 0x0000, 0x3f80, 0x4000, 0x4040, 0x4080, 0x40a0, 0x40c0, 0x40e0};
        const __m512i bytes =
            _mm512_cvtepu8_epi16(load_as<__m256i>(row + group * (SCALE_ELEMENTS / 2)));
        const __m512i nibbles = i % SCALE_ELEMENTS ? _mm512_srli_epi16(bytes, 4)
                                                   : _mm512_and_si512(bytes, _mm512_set1_epi16(15));
        return (vu)_mm512_permutexvar_epi16(nibbles, _mm512_load_si512(table));
    }

    // dst: [k_pad / 2][ld] words.
    template <Format F>
    static void pack_k(uint16_t* dst, int ld, const uint8_t* k, int64_t stride, const uint8_t*, int64_t, int n,
                       int n_pad, int dim, int k_pad) {
        uint32_t* out = reinterpret_cast<uint32_t*>(dst);
        for (int t = 0; t < n_pad; t += WIDTH)
            for (int i = 0; i < k_pad; i += 32) {
                vu r[WIDTH];
                for (int l = 0; l < WIDTH; l++) r[l] = t + l < n ? words<F>(k + (t + l) * stride, i, dim) : vu{};
                transpose(r);
                for (int l = 0; l < WIDTH; l++) store_as(out + (i / 2 + l) * ld + t, r[l]);
            }
    }
    // dst: [n_pad / 2][ld] words; word (t, i) holds element i of tokens 2t and 2t + 1.
    template <Format F>
    static void pack_v(uint16_t* dst, int ld, const uint8_t* v, int64_t stride, const uint8_t*, int64_t, int n,
                       int n_pad, int dim, int dim_pad) {
        uint32_t* out = reinterpret_cast<uint32_t*>(dst);
        for (int t = 0; t < n_pad; t += 2) {
            for (int i = 0; i < dim_pad; i += 32) {
                const __m512i a = (__m512i)(t < n ? words<F>(v + t * stride, i, dim) : vu{});
                const __m512i b = (__m512i)(t + 1 < n ? words<F>(v + (t + 1) * stride, i, dim) : vu{});
                store_as(out + t / 2 * ld + i, _mm512_unpacklo_epi16(a, b));
                store_as(out + t / 2 * ld + i + 16, _mm512_unpackhi_epi16(a, b));
            }

        }
    }
    static void store_row(uint16_t* dst, vf x) { store_as(dst, to_bf16(x)); }

    // Interleaving works inside 128-bit lanes, so pack_v leaves the columns of each 32 in another order; this
    // puts a finished row right.
    static void order_columns(float* row, int dim_pad) {
        const vi low{0, 1, 2, 3, 16, 17, 18, 19, 4, 5, 6, 7, 20, 21, 22, 23};
        const vi high{8, 9, 10, 11, 24, 25, 26, 27, 12, 13, 14, 15, 28, 29, 30, 31};
        for (int i = 0; i < dim_pad; i += 32) {
            const vf a = load(row + i), b = load(row + i + 16);
            store(row + i, __builtin_shuffle(a, b, low));
            store(row + i + 16, __builtin_shuffle(a, b, high));
        }
    }
    struct Session {};
};
#endif

}  // namespace ISA
}  // namespace farshore

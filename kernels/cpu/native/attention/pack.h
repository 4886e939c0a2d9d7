// Stored KV -> operands of the matrix products. K comes out transposed, [dim][token], V as [token][dim]; both
// zero-padded, so that what lies beyond a tile never counts: bfloat16, two neighbours along the summed dimension in
// one 32-bit word, K [dim/2][token] and V [token/2][dim], the layout of bfloat16 dot products and of AMX.
// Included after simd.h.

namespace farshore {
namespace ISA {

constexpr int round_up(int n, int to) { return (n + to - 1) / to * to; }

// One row of a stored head: element i's value, scaled; scales null: unscaled.
template <Format F>
inline float element(const uint8_t* row, const uint8_t* scales, int i, int dim) {
    uint16_t h = 0x3f80;
    if (F == Format::f32) {
        float f;
        std::memcpy(&f, row + 4 * i, 4);
        return f;
    }
    if (F == Format::bf16 || F == Format::f16) {
        std::memcpy(&h, row + 2 * i, 2);
        return F == Format::bf16 ? from_bf16(h) : from_f16(h);
    }
    if (scales) std::memcpy(&h, scales + i / SCALE_ELEMENTS * 2, 2);
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
    uint16_t h = 0x3f80;
    if (scales) std::memcpy(&h, scales + group * 2, 2);
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

// Scales of n tokens as float32 [group][token], rows `pitch` apart, zero from n to n_pad.
inline void unpack_scales(float* to, int pitch, const uint8_t* from, int groups, int64_t stride, int n, int n_pad) {
    for (int j = 0; j < n_pad; j++) {
        // All of the usual rows' one or two scales at a time.
        if (groups <= 2 && stride == 2 * groups && j % WIDTH == 0 && j + WIDTH <= n) {
            if (groups == 1) {
                store(to + j, from_bf16(reinterpret_cast<const uint16_t*>(from + j * stride)));
            } else {
                const vu both = load_as<vu>(from + j * stride);
                store(to + j, bits_to_float(both << 16));
                store(to + pitch + j, bits_to_float(both & 0xffff0000));
            }
            j += WIDTH - 1;
            continue;
        }
        for (int g = 0; g < groups; g++) {
            uint16_t h = 0;
            if (j < n) std::memcpy(&h, from + j * stride + 2 * g, 2);
            to[g * pitch + j] = from_bf16(h);
        }
    }
}

#if defined(HAS_BF16_DOT)
// Quantised values enter as the integers they are, exact in bfloat16; their scales are applied to logits and
// weights.
struct Pairs {
    typedef uint16_t Element;
    static constexpr int STEP = 32;
    static constexpr int element_bytes = 2;
    static bool by_rows(int, const Shape&) { return false; }

    // A row's last elements, or those of its last, shorter group: one by one.
    template <Format F>
    __attribute__((noinline)) static vu last_words(const uint8_t* row, int i, int dim) {
        uint16_t some[32] = {};
        for (int l = 0; l < 32 && i + l < dim; l++) some[l] = to_bf16(element<F>(row, nullptr, i + l, dim));
        return load_as<vu>(some);
    }

    // The 32 elements of a row from i on, unscaled, zeros beyond dim: 16 words of two neighbours.
    template <Format F>
    __attribute__((always_inline)) static vu words(const uint8_t* row, int i, int dim) {
        const int left = dim - i;
        if (F == Format::bf16)
            return left >= 32 ? load_as<vu>(row + 2 * i)
                              : (vu)_mm512_maskz_loadu_epi16(left > 0 ? (1u << left) - 1 : 0, row + 2 * i);
        const int group = i / SCALE_ELEMENTS;
        if (left < 32 || (F == Format::i4 && (group + 1) * SCALE_ELEMENTS > dim))
            return last_words<F>(row, i, dim);
        if (F == Format::i8) {
            // An integer up to 127 as float32 has all its bits in the upper half: that is its bfloat16.
            const vu a = (vu)__builtin_convertvector(widen(load_as<vb>(row + i)), vf);
            const vu b = (vu)__builtin_convertvector(widen(load_as<vb>(row + i + 16)), vf);
            alignas(64) static constexpr uint16_t upper[32] = {1,  3,  5,  7,  9,  11, 13, 15, 17, 19, 21,
                                                               23, 25, 27, 29, 31, 33, 35, 37, 39, 41, 43,
                                                               45, 47, 49, 51, 53, 55, 57, 59, 61, 63};
            return (vu)_mm512_permutex2var_epi16((__m512i)a, _mm512_load_si512(upper), (__m512i)b);
        }
        // Nibble n is element n - 8: both bytes of its bfloat16 are looked up, in one table of 16 + 16.
        alignas(64) static constexpr uint8_t table[64] = {
            0x00, 0xe0, 0xc0, 0xa0, 0x80, 0x40, 0x00, 0x80, 0x00, 0x80, 0x00, 0x40, 0x80, 0xa0, 0xc0, 0xe0,
            0xc1, 0xc0, 0xc0, 0xc0, 0xc0, 0xc0, 0xc0, 0xbf, 0x00, 0x3f, 0x40, 0x40, 0x40, 0x40, 0x40, 0x40};
        alignas(64) static constexpr uint8_t twice[64] = {
            0,  0,  1,  1,  2,  2,  3,  3,  4,  4,  5,  5,  6,  6,  7,  7,  8,  8,  9,  9,  10, 10,
            11, 11, 12, 12, 13, 13, 14, 14, 15, 15, 16, 16, 17, 17, 18, 18, 19, 19, 20, 20, 21, 21,
            22, 22, 23, 23, 24, 24, 25, 25, 26, 26, 27, 27, 28, 28, 29, 29, 30, 30, 31, 31};
        const __m512i bytes = _mm512_castsi256_si512(load_as<__m256i>(row + group * (SCALE_ELEMENTS / 2)));
        __m512i nibbles = _mm512_permutexvar_epi8(_mm512_load_si512(twice), bytes);
        if (i % SCALE_ELEMENTS) nibbles = _mm512_srli_epi16(nibbles, 4);
        nibbles = (nibbles & _mm512_set1_epi16(0x0f0f)) | _mm512_set1_epi16(0x1000);
        return (vu)_mm512_permutexvar_epi8(nibbles, _mm512_load_si512(table));
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
    // dst: [n_pad / 2][ld] words; of each 32 tokens, word (l, i) holds element i of tokens l and 16 + l.
    template <Format F>
    static void pack_v(uint16_t* dst, int ld, const uint8_t* v, int64_t stride, const uint8_t*, int64_t, int n,
                       int n_pad, int dim, int dim_pad) {
        uint32_t* out = reinterpret_cast<uint32_t*>(dst);
        for (int pair = 0; pair < n_pad / 2; pair++, out += ld) {
            const int t = pair / 16 * 32 + pair % 16;
            for (int i = 0; i < dim_pad; i += 32) {
                const __m512i a = (__m512i)(t < n ? words<F>(v + t * stride, i, dim) : vu{});
                const __m512i b = (__m512i)(t + 16 < n ? words<F>(v + (t + 16) * stride, i, dim) : vu{});
                store_as(out + i, _mm512_unpacklo_epi16(a, b));
                store_as(out + i + 16, _mm512_unpackhi_epi16(a, b));
            }
        }
    }
    // 32 weights, token l beside token 16 + l as in pack_v: rounded and joined in four instructions.
    static constexpr int VECTORS = 2;
    static void store_weights(uint16_t* dst, const vf* p) {
        store_as(dst, (((vu)p[0] + 0x8000) >> 16) | (((vu)p[1] + 0x8000) & 0xffff0000));
    }

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

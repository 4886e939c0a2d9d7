// Reads stored KV rows and packs them into operands of matrix products. Included by simd/isa_kernels.h after
// simd.h.
//
// Packed operands are bfloat16: two neighbours along the summed dimension share a 32-bit word, as bfloat16
// dot products and AMX take them. K is transposed, words [dim / 2][token]; V is words [token / 2][dim]. Both
// are padded with zeros, so that padding adds nothing to a product.
//
// A scale group is SCALE_ELEMENTS adjacent elements of an int8 or int4 row, which share one bfloat16 scale.
// In int4, the bytes of a scale group of w elements hold the first half of them in the low nibbles and the
// second half in the high nibbles.

namespace farshore {
namespace ISA {

constexpr int round_up(int n, int to) { return (n + to - 1) / to * to; }

// Element i of a stored row of `dim` elements, times its scale. scales: bfloat16, one a scale group; null:
// factor 1.
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
    const int group = i / SCALE_ELEMENTS, in_group = i % SCALE_ELEMENTS;
    const int left = dim - group * SCALE_ELEMENTS;
    const int half = ((left < SCALE_ELEMENTS ? left : SCALE_ELEMENTS) + 1) / 2;
    const uint8_t* bytes = row + group * (SCALE_ELEMENTS / 2);
    return ((in_group < half ? bytes[in_group] & 15 : bytes[in_group - half] >> 4) - 8) * scale;
}

// Elements [i, i + WIDTH) of a stored row, as element() gives them; zeros at and beyond dim. i is a multiple
// of WIDTH.
template <Format F>
inline vf elements(const uint8_t* row, const uint8_t* scales, int i, int dim) {
    const int group = i / SCALE_ELEMENTS, in_group = i % SCALE_ELEMENTS;
    const bool whole_group = (group + 1) * SCALE_ELEMENTS <= dim;
    if (i + WIDTH > dim || (F == Format::i4 && !whole_group)) {
        float values[WIDTH] = {};
        for (int l = 0; l < WIDTH && i + l < dim; l++) values[l] = element<F>(row, scales, i + l, dim);
        return load(values);
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
    const uint8_t* bytes = row + group * HALF + in_group % HALF;
    const vi v = widen(load_as<vc>(bytes));
    return __builtin_convertvector((in_group < HALF ? v & 15 : v >> 4) - 8, vf) * scale;
}

// Converts the scales of n tokens to float32.
//   to      [groups][pitch], of which [n, n_pad) is set to 0
//   from    bfloat16 [groups] of the first token; the next token's lie `stride` bytes behind
//   groups  scales of one token: scale groups of a row
inline void unpack_scales(float* to, int pitch, const uint8_t* from, int groups, int64_t stride, int n, int n_pad) {
    for (int j = 0; j < n_pad; j++) {
        // Rows with one or two scales that lie end to end (dim up to 128): WIDTH tokens at a time.
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
// Packing for AVX512-BF16 dot products. int8 and int4 elements are packed as integers, which bfloat16 holds
// exactly; the caller applies their scales to logits and weights.
struct Bf16Pairs {
    typedef uint16_t Element;
    static constexpr int STEP = 32;  // dims and tokens are padded to multiples of this
    static constexpr int element_bytes = 2;
    // Whether K is used as rows, unpacked; only AmxTiles does this.
    static bool uses_k_rows(int, const Shape&) { return false; }

    // As words(), element by element: for the end of a row and for a last, shorter scale group.
    template <Format F>
    __attribute__((noinline)) static vu last_words(const uint8_t* row, int i, int dim) {
        uint16_t values[32] = {};
        for (int l = 0; l < 32 && i + l < dim; l++) values[l] = to_bf16(element<F>(row, nullptr, i + l, dim));
        return load_as<vu>(values);
    }

    // Elements [i, i + 32) of a row as 16 words of two neighbours, without scale; zeros at and beyond dim.
    template <Format F>
    __attribute__((always_inline)) static vu words(const uint8_t* row, int i, int dim) {
        const int left = dim - i;
        if (F == Format::bf16)
            return left >= 32 ? load_as<vu>(row + 2 * i)
                              : (vu)_mm512_maskz_loadu_epi16(left > 0 ? (1u << left) - 1 : 0, row + 2 * i);
        const int group = i / SCALE_ELEMENTS;
        if (left < 32 || (F == Format::i4 && (group + 1) * SCALE_ELEMENTS > dim)) return last_words<F>(row, i, dim);
        if (F == Format::i8) {
            // float32 of an integer of 8 bits has zeros in its lower half, so the upper half is its bfloat16.
            const vu a = (vu) __builtin_convertvector(widen(load_as<vb>(row + i)), vf);
            const vu b = (vu) __builtin_convertvector(widen(load_as<vb>(row + i + 16)), vf);
            alignas(64) static constexpr uint16_t upper[32] = {1,  3,  5,  7,  9,  11, 13, 15, 17, 19, 21,
                                                               23, 25, 27, 29, 31, 33, 35, 37, 39, 41, 43,
                                                               45, 47, 49, 51, 53, 55, 57, 59, 61, 63};
            return (vu)_mm512_permutex2var_epi16((__m512i)a, _mm512_load_si512(upper), (__m512i)b);
        }
        // Nibble n stands for n - 8. `table` holds the low and the high bytes of these 16 bfloat16s.
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

    // Packs K of n tokens, transposed.
    //   dst     words [k_pad / 2][ld], zeros for tokens [n, n_pad) and dims [dim, k_pad)
    //   k       the first token's row; the next lies `stride` bytes behind
    // The unnamed parameters, scales and their stride, are not used.
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
    // Packs V of n tokens.
    //   dst     words [n_pad / 2][ld]: of each 32 tokens, word (l, i) holds element i of tokens l and 16 + l.
    //           Zeros for tokens [n, n_pad) and dims [dim, dim_pad). Columns are permuted: see order_columns.
    //   v       the first token's row; the next lies `stride` bytes behind
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
    static constexpr int WEIGHT_VECTORS = 2;
    // Stores the weights of 32 tokens, p[0] and p[1], as words of tokens l and 16 + l, the order of pack_v.
    // Rounds to nearest, ties away from zero, which takes fewer instructions than ties to even.
    static void store_weights(uint16_t* dst, const vf* p) {
        store_as(dst, (((vu)p[0] + 0x8000) >> 16) | (((vu)p[1] + 0x8000) & 0xffff0000));
    }

    // Puts the columns of a finished row of o in order. AVX-512 interleaves inside of 128-bit parts of a
    // vector, which permutes each 32 columns that pack_v writes.
    static void order_columns(float* row, int dim_pad) {
        const vi low{0, 1, 2, 3, 16, 17, 18, 19, 4, 5, 6, 7, 20, 21, 22, 23};
        const vi high{8, 9, 10, 11, 24, 25, 26, 27, 12, 13, 14, 15, 28, 29, 30, 31};
        for (int i = 0; i < dim_pad; i += 32) {
            const vf a = load(row + i), b = load(row + i + 16);
            store(row + i, __builtin_shuffle(a, b, low));
            store(row + i + 16, __builtin_shuffle(a, b, high));
        }
    }
    struct TileScope {};  // no state of the CPU to set up
};
#endif

}  // namespace ISA
}  // namespace farshore

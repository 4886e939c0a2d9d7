// Reads packed rows of weights, whose layouts kernels/cpu/packed.py gives. Included by simd/isa_kernels.h after
// weights.h.
//
// Q4, Q8, Q4K and Q6K read weights [first, end) of rows of a matrix as Plain does, from `row` on. `first` is a multiple
// of PACKED_GROUP, and so is `end` unless it is the row's end. N is 1, 2, 4 or 8, and `row` a multiple of it. The
// values equal those of dequantising the file in float32 (gguf.h) and rounding them to bfloat16.

namespace farshore {
namespace ISA {
namespace dense_ops {

// x rounded to bfloat16, ties to even, for |x| up to 2^110. On AVX-512 by Veltkamp's splitting: rounding the product
// with 2^16 + 1 to float32 rounds x at the last bit of a bfloat16. In a tie all bits behind that are 0, so the
// product's parity is that of the bfloat16.
inline vf nearest_bf16(vf x) {
#if WIDTH == 16
    vf p = x * 65537.0f;
    asm("" : "+v"(p));  // keeps the compiler from contracting this product into an fma
    return p + (x - p);
#else
    return rounded<Format::bf16>(x);
#endif
}

// Words of the bfloat16 elements of a and b, rounded as above.
inline vu nearest_bf16(vf a, vf b) {
#if defined(HAS_BF16_DOT)
    return (vu)_mm512_cvtne2ps_pbh((__m512)b, (__m512)a);
#else
    vi evens, odds;
    for (int l = 0; l < WIDTH; l++) evens[l] = 2 * l, odds[l] = 2 * l + 1;
    const vu even = (vu)nearest_bf16(__builtin_shuffle(a, b, evens));
    const vu odd = (vu)nearest_bf16(__builtin_shuffle(a, b, odds));
    return even >> 16 | (odd & 0xffff0000);
#endif
}

// A chunk of rows that lie together: WEIGHTS bytes of integers of each row, then SCALES bytes of scales of each.
template <int WEIGHTS_, int SCALES_>
struct Chunk {
    static constexpr int WEIGHTS = WEIGHTS_, SCALES = SCALES_;
    static constexpr int BYTES = PACKED_ROWS_TOGETHER * (WEIGHTS + SCALES);
    // Bytes to prefetch ahead. Chunks of the same rows lie end to end.
    static constexpr int AHEAD = 2048;

    // The chunk, from row `slot` on.
    Chunk(const uint8_t* chunk, int slot)
        : weights(chunk + slot * WEIGHTS), scales(chunk + PACKED_ROWS_TOGETHER * WEIGHTS + slot * SCALES) {}

    template <int N>
    INLINE void fetch_ahead() const {
        for (int b = 0; b < N * WEIGHTS; b += 64) __builtin_prefetch(weights + AHEAD + b);
        for (int b = 0; b < N * SCALES; b += 64) __builtin_prefetch(scales + AHEAD + b);
    }

    const uint8_t *weights, *scales;
};

// What the readers have in common: where their rows begin.
struct PackedRows {
    PackedRows(const Linear& w, int row, int first, int end)
        : slot(row % PACKED_ROWS_TOGETHER),
          weights(end - first),
          begin(static_cast<const uint8_t*>(w.rows) + (row - slot) * packed_row_bytes(w.storage, w.in) +
                first / PACKED_GROUP * PACKED_ROWS_TOGETHER * packed_row_bytes(w.storage, PACKED_GROUP)) {}

    int slot, weights;
    const uint8_t* begin;
};

// Converts 8, 4, 2 or 1 float16 to float32 in `to`.
template <int COUNT>
inline void load_scales(const uint8_t* from, float* to) {
#if WIDTH == 16
    if constexpr (COUNT == 8) _mm256_store_ps(to, _mm256_cvtph_ps(load_as<__m128i>(from)));
    if constexpr (COUNT == 4) _mm_store_ps(to, _mm_cvtph_ps(_mm_loadl_epi64((const __m128i*)from)));
    if constexpr (COUNT == 1) *to = _cvtsh_ss(load_as<uint16_t>(from));
    // Makes gcc read the scales from memory: a broadcast is then a load, which is free beside the arithmetic, and not
    // a shuffle.
    asm("" : "+m"(*(float (*)[COUNT])to));
#else
    for (int i = 0; i < COUNT; i++) to[i] = from_f16(load_as<uint16_t>(from + 2 * i));
#endif
}

// COUNT blocks of 32 four-bit weights of N rows, which share a line of 16 words. Nibble 2k of word l is weight 2l of
// block k, nibble 2k + 1 is weight 2l + 1.
//   line    the words of the first row, 32 bits each for four blocks, 16 bits for two; rows are LINE bytes apart
//   scales  [N][SCALES]: d and m of each block; a weight is d * integer + m, and d * integer is exact
template <int N, int COUNT, int LINE, int SCALES, class Multiply>
INLINE inline void four_bit_blocks(const uint8_t* line, const float* scales, Multiply&& multiply) {
    unrolled<COUNT>([&](auto k) INLINE {
#if WIDTH == 16
        // The 16 possible values of a block make a table. The look-up ignores the bits above a nibble.
        const vf i = {0, 1, 2, 3, 4, 5, 6, 7, 8, 9, 10, 11, 12, 13, 14, 15};
        __m512i index[N];
        __m512 table[N];
        vf values[N];
        unrolled<N>([&](auto j) INLINE {
            table[j] = (__m512)nearest_bf16(i * scales[j * SCALES + 2 * k] + scales[j * SCALES + 2 * k + 1]);
            const uint8_t* integers = line + j * LINE;
            index[j] = COUNT == 4 ? load_as<__m512i>(integers + k)
                                  : _mm512_srli_epi32((__m512i)widen(load_as<vh>(integers)), 8 * k);
            values[j] = (vf)_mm512_permutexvar_ps(index[j], table[j]);
        });
        multiply(values);
        unrolled<N>([&](auto j)
                        INLINE { values[j] = (vf)_mm512_permutexvar_ps(_mm512_srli_epi32(index[j], 4), table[j]); });
        multiply(values);
#else
        for (int l = 0; l < 16; l += WIDTH)
            for (int nibble = 2 * k; nibble < 2 * k + 2; nibble++) {
                vf values[N];
                for (int j = 0; j < N; j++) {
                    const uint8_t* words = line + j * LINE + l * COUNT;
                    const vu word = COUNT == 4 ? load_as<vu>(words) : widen(load_as<vh>(words));
                    const vf integers = __builtin_convertvector((vi)(word >> 4 * nibble & 15), vf);
                    values[j] = nearest_bf16(integers * scales[j * SCALES + 2 * k] + scales[j * SCALES + 2 * k + 1]);
                }
                multiply(values);
            }
#endif
    });
}

// Storage::q4.
struct Q4 : PackedRows {
    using PackedRows::PackedRows;

    template <int N, class Multiply>
    INLINE void for_vectors(Multiply&& multiply) const {
        const uint8_t* chunk = begin;
        int left = weights;
        for (; left > 64; left -= 128, chunk += Chunk<64, 16>::BYTES)
            blocks<N, 4>(Chunk<64, 16>(chunk, slot), multiply);
        if (left > 0) blocks<N, 2>(Chunk<32, 8>(chunk, slot), multiply);
    }

    template <int N, int COUNT, class Bytes, class Multiply>
    INLINE void blocks(const Bytes& chunk, Multiply&& multiply) const {
        alignas(32) float scales[N][2 * COUNT];
        chunk.template fetch_ahead<N>();
        for (int j = 0; j < N; j++) load_scales<2 * COUNT>(chunk.scales + j * Bytes::SCALES, scales[j]);
        four_bit_blocks<N, COUNT, Bytes::WEIGHTS, 2 * COUNT>(chunk.weights, scales[0], multiply);
    }
};

// Storage::q8.
struct Q8 : PackedRows {
    using PackedRows::PackedRows;

    template <int N, class Multiply>
    INLINE void for_vectors(Multiply&& multiply) const {
        const uint8_t* chunk = begin;
        int left = weights;
        for (; left >= 128; left -= 128, chunk += Chunk<128, 8>::BYTES)
            some_blocks<N, 4>(Chunk<128, 8>(chunk, slot), multiply);
        for (; left > 0; left -= 32, chunk += Chunk<32, 2>::BYTES)
            some_blocks<N, 1>(Chunk<32, 2>(chunk, slot), multiply);
    }

    // COUNT blocks of N rows: of each block the 16 even weights, then the 16 odd ones.
    template <int N, int COUNT, class Bytes, class Multiply>
    INLINE void some_blocks(const Bytes& chunk, Multiply&& multiply) const {
        alignas(16) float scales[N][COUNT];
        chunk.template fetch_ahead<N>();
        for (int j = 0; j < N; j++) load_scales<COUNT>(chunk.scales + j * Bytes::SCALES, scales[j]);
        unrolled<COUNT * (32 / WIDTH)>([&](auto vector) INLINE {
            constexpr int block = vector / (32 / WIDTH), odd = vector % 2, l = vector % (32 / WIDTH) / 2 * WIDTH;
            vf values[N];
            unrolled<N>([&](auto j) INLINE {
                const uint8_t* integers = chunk.weights + j * Bytes::WEIGHTS + 32 * block + 16 * odd + l;
                values[j] = nearest_bf16(__builtin_convertvector(widen(load_as<vb>(integers)), vf) * scales[j][block]);
            });
            multiply(values);
        });
    }
};

// Storage::q4_k: as Q4, but d and m of a block are products of integers with the super-block's d and m.
struct Q4K : PackedRows {
    using PackedRows::PackedRows;
    using Bytes = Chunk<128, 20>;

    template <int N, class Multiply>
    INLINE void for_vectors(Multiply&& multiply) const {
        const uint8_t* at = begin;
        for (int left = weights; left > 0; left -= PACKED_GROUP, at += Bytes::BYTES) {
            const Bytes chunk(at, slot);
            alignas(64) float scales[N][16];
            chunk.fetch_ahead<N>();
            for (int j = 0; j < N; j++) load_products(chunk.scales + j * Bytes::SCALES, scales[j]);
            four_bit_blocks<N, 4, Bytes::WEIGHTS, 16>(chunk.weights, scales[0], multiply);
            four_bit_blocks<N, 4, Bytes::WEIGHTS, 16>(chunk.weights + 64, scales[0] + 8, multiply);
        }
    }

    // d and m of the eight blocks. The products are exact.
    static void load_products(const uint8_t* from, float* to) {
#if WIDTH == 16
        const __m128 pair = _mm_cvtph_ps(_mm_loadu_si32(from + 16));
        const __m512 both = _mm512_castpd_ps(_mm512_broadcastsd_pd(_mm_castps_pd(pair)));
        store(to, __builtin_convertvector(widen(load_as<vc>(from)), vf) * (vf)both);
        asm("" : "+m"(*(float (*)[16])to));  // as in load_scales
#else
        float both[2];
        load_scales<2>(from + 16, both);
        for (int i = 0; i < 16; i++) to[i] = both[i % 2] * from[i];
#endif
    }
};

// Storage::q6_k.
struct Q6K : PackedRows {
    using PackedRows::PackedRows;
    using Bytes = Chunk<192, 18>;

    template <int N, class Multiply>
    INLINE void for_vectors(Multiply&& multiply) const {
        const uint8_t* at = begin;
        for (int left = weights; left > 0; left -= PACKED_GROUP, at += Bytes::BYTES) {
            const Bytes chunk(at, slot);
            alignas(64) float scales[N][32];
            chunk.fetch_ahead<N>();
            for (int j = 0; j < N; j++) load_products(chunk.scales + j * Bytes::SCALES, scales[j]);
            unrolled<PACKED_GROUP / (2 * WIDTH)>([&](auto pair) INLINE {
                vu words[N];
                vf values[N];
                unrolled<N>([&](auto j) INLINE {
                    const uint8_t* integers = chunk.weights + j * Bytes::WEIGHTS;
                    words[j] = nearest_bf16(vector_of<2 * pair>(integers, scales[j]),
                                            vector_of<2 * pair + 1>(integers, scales[j]));
                    values[j] = even(words[j]);
                });
                multiply(values);
                unrolled<N>([&](auto j) INLINE { values[j] = odd(words[j]); });
                multiply(values);
            });
        }
    }

    // Of each 16 weights: 64 d s, and -1.5 of that.
    static void load_products(const uint8_t* from, float* to) {
        float d;
        load_scales<1>(from + 16, &d);
        for (int i = 0; i < 16; i += WIDTH) {
            const vf scales = __builtin_convertvector(widen(load_as<vb>(from + i)), vf) * (64 * d);
            store(to + i, scales);
            store(to + 16 + i, -1.5f * scales);
        }
#if WIDTH == 16
        asm("" : "+m"(*(float (*)[32])to));  // as in load_scales
#endif
    }

    // Weights [WIDTH * VECTOR, WIDTH * (VECTOR + 1)) of a super-block. An integer u in the bits below those of the
    // float32 1 is 1 + u / 64, so that d s (u - 32) = 64 d s (1 + u / 64 - 1.5). All of these are exact.
    template <int VECTOR>
    static vf vector_of(const uint8_t* integers, const float* scales) {
        constexpr int FIELD = VECTOR * WIDTH / 16;
        const vf u = (vf)(field<FIELD>(integers + VECTOR * WIDTH % 16 * 4) | 0x3f800000);
#if WIDTH == 16
        return (vf)_mm512_fmadd_ps((__m512)u, _mm512_set1_ps(scales[FIELD]), _mm512_set1_ps(scales[16 + FIELD]));
#else
        return (u - 1.5f) * scales[FIELD];
#endif
    }

    // Six bits of each word: field FIELD, in bits 17 to 22.
    template <int FIELD>
    static vu field(const uint8_t* words) {
        if constexpr (FIELD == 15)
            return (load_as<vu>(words) >> 13 & 3 << 17) | (load_as<vu>(words + 64) >> 11 & 3 << 19) |
                   (load_as<vu>(words + 128) >> 9 & 3 << 21);
        constexpr int shift = 17 - 6 * (FIELD % 5);
        const vu word = load_as<vu>(words + FIELD / 5 * 64);
        return (shift > 0 ? word << shift : word >> -shift) & 63 << 17;
    }
};

// Calls body(reader of weights [first, end) from `row` on) for a packed matrix.
template <class Body>
INLINE inline void with_reader(const Linear& w, int row, int first, int end, Body&& body) {
    switch (w.storage) {
        case Storage::q4: return body(Q4(w, row, first, end));
        case Storage::q8: return body(Q8(w, row, first, end));
        case Storage::q4_k: return body(Q4K(w, row, first, end));
        case Storage::q6_k: return body(Q6K(w, row, first, end));
        case Storage::plain: return;
    }
}

// Writes weights [first, first + n) of a row of a packed matrix as bfloat16. `first` and n as for the readers.
inline void unpack_row(const Linear& w, int row, int first, int n, uint16_t* to) {
    const uint16_t* const end = to + n;
    with_reader(w, row, first, first + n, [&](const auto& reader) {
        vu evens{};
        bool odd = false;
        reader.template for_vectors<1>([&](const vf(&values)[1]) INLINE {
            if (odd && to < end) {  // the readers go on behind the end of a row, to a pair of blocks
                store_as(to, evens | ((vu)values[0] & 0xffff0000));
                to += 2 * WIDTH;
            }
            evens = (vu)values[0] >> 16;
            odd = !odd;
        });
    });
}

}  // namespace dense_ops
}  // namespace ISA
}  // namespace farshore

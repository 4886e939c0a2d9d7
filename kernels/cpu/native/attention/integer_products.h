// Integer products of int8 and int4 rows for decode.h, if q is bfloat16. Included by simd/isa_kernels.h after
// pack.h.
//
// q, and the softmax weights of a tile, are rounded to int16: value = integer * int_scale, with int_scale =
// largest magnitude / 32767. There is one int_scale for each query, and for the weights one for each query
// and scale group of V. A multiply-add then takes two elements a lane, and a stored element needs neither
// conversion nor scale, which halves the instructions of the float32 products. Not compiled for four lanes,
// where plain C++ would be slower than float32.
//
// An int16 is called a word here; a lane holds two. A scale group is SCALE_ELEMENTS adjacent elements with
// one scale.
#if WIDTH >= 8
#define HAS_INTEGERS

namespace farshore {
namespace ISA {

typedef int16_t vw __attribute__((vector_size(4 * WIDTH)));
typedef uint16_t vuw __attribute__((vector_size(4 * WIDTH)));

template <Format F>
constexpr int SCALE_GROUP_BYTES = F == Format::i8 ? SCALE_ELEMENTS : SCALE_ELEMENTS / 2;
constexpr int WORDS = 2 * WIDTH;  // int16 in a vector

// sum + a[2l] * b[2l] + a[2l + 1] * b[2l + 1] in each lane l.
inline vi dot(vi sum, vw a, vw b) {
#if WIDTH == 16
    return (vi)_mm512_dpwssd_epi32((__m512i)sum, (__m512i)a, (__m512i)b);
#else
    return sum + (vi)_mm256_madd_epi16((__m256i)a, (__m256i)b);
#endif
}

// Widens WORDS bytes to words: an int8 element each, or a byte of two int4 elements.
template <Format F>
inline vw words_at(const uint8_t* from) {
#if WIDTH == 16
    const __m256i bytes = load_as<__m256i>(from);
    return (vw)(F == Format::i8 ? _mm512_cvtepi8_epi16(bytes) : _mm512_cvtepu8_epi16(bytes));
#else
    const __m128i bytes = load_as<__m128i>(from);
    return (vw)(F == Format::i8 ? _mm256_cvtepi8_epi16(bytes) : _mm256_cvtepu8_epi16(bytes));
#endif
}

// Interleaves the words of two tokens: lane l of the result holds one element of both. Of each eight words,
// low_words takes the first four, high_words the others; element_in_lane<F, true> gives the order.
inline vw low_words(vw a, vw b) {
#if WIDTH == 16
    return (vw)_mm512_unpacklo_epi16((__m512i)a, (__m512i)b);
#else
    return (vw)_mm256_unpacklo_epi16((__m256i)a, (__m256i)b);
#endif
}
inline vw high_words(vw a, vw b) {
#if WIDTH == 16
    return (vw)_mm512_unpackhi_epi16((__m512i)a, (__m512i)b);
#else
    return (vw)_mm256_unpackhi_epi16((__m256i)a, (__m256i)b);
#endif
}

// Rounds `n` floats, a multiple of WIDTH, to int16 at `to`, which may be equal to `from`. Returns int_scale:
// from[j] is about to[j] * int_scale. *sum becomes the sum of the integers. If a float is infinite or NaN,
// all integers are 0 and int_scale is NaN.
inline float quantise_int16(const float* from, int n, int16_t* to, int32_t* sum) {
    vf largest_lanes{}, all{};
    for (int j = 0; j < n; j += WIDTH) {
        const vf x = load(from + j);
        largest_lanes = max(max(x, -x), largest_lanes), all += x;
    }
    const float largest = hmax(largest_lanes);
    const bool finite = largest <= 0x1.fffffep127f && std::isfinite(hsum(all));
    const float scale = finite && largest > 0 ? 32767.0f / largest : 0.0f;
    vi total{};
    for (int j = 0; j < n; j += WIDTH) {
        const float magic = 12582912.0f;  // 1.5 * 2^23: the sum is rounded to an integer
        const vi x = (vi)(load(from + j) * scale + magic) - 0x4b400000;
        const vi kept = finite ? x : vi{};
        total += kept;
        typedef int16_t half __attribute__((vector_size(2 * WIDTH)));
        store_as(to + j, __builtin_convertvector(kept, half));
    }
    *sum = 0;
    for (int l = 0; l < WIDTH; l++) *sum += total[l];
    return finite ? largest / 32767.0f : NAN;
}

// Word vectors that four bytes of a row give: two elements in each lane.
template <Format F>
constexpr int PAIRS_OF_FOUR = F == Format::i8 ? 2 : 4;
// Splits bytes 4e .. 4e + 3 of one token a lane into words: pair[0] holds elements 4e and 4e + 2, pair[1]
// elements 4e + 1 and 4e + 3; for int4, pair[2] and pair[3] hold those half a scale group further.
template <Format F>
__attribute__((always_inline)) inline void split_pairs(vu bytes, vw* pair) {
    const vuw x = (vuw)bytes;
    if constexpr (F == Format::i8)
        pair[0] = (vw)(x << 8) >> 8, pair[1] = (vw)x >> 8;
    else
        pair[0] = (vw)(x & 15), pair[1] = (vw)(x >> 8 & 15), pair[2] = (vw)(x >> 4 & 15), pair[3] = (vw)(x >> 12);
}
// Orders one scale group of q as split_pairs orders a row, so that the products match word by word.
template <Format F>
inline void order_query(const int16_t* q, int16_t* to) {
    for (int four = 0; four < SCALE_GROUP_BYTES<F>; four += 4)
        for (int k = 0; k < PAIRS_OF_FOUR<F>; k++) {
            const int first = four + k % 2 + k / 2 * (SCALE_ELEMENTS / 2);
            *to++ = q[first], *to++ = q[first + 2];
        }
}

// Transposes 4 * N bytes of WIDTH rows, from byte `offset` on: r[i] holds bytes 4i .. 4i + 3, one row a lane.
template <int N>
inline void transpose_rows(const uint8_t* const* row, int64_t offset, vu* r) {
    if constexpr (N == WIDTH) {
        for (int l = 0; l < WIDTH; l++) r[l] = load_as<vu>(row[l] + offset);
        transpose(r);
    } else {
#if WIDTH == 16
        for (int l = 0; l < 8; l++)
            r[l] = (vu)_mm512_inserti64x4(_mm512_castsi256_si512(load_as<__m256i>(row[l] + offset)),
                                          load_as<__m256i>(row[l + 8] + offset), 1);
        transpose_stage<4, 8>(r);
        transpose_stage<2, 8>(r);
        transpose_stage<1, 8>(r);
#endif
    }
}

// Dot products of Q queries with K of WIDTH tokens.
//   row          K rows of the tokens
//   q            int16 [Q][ldq], in the order of order_query
//   sums_of_q    [Q][scale_count], sums of q over each scale group
//   int_scales   [Q], of q
//   scale_count  scale groups of a row
//   scales       float32 [scale_count][pitch], by token
//   out          float32 [Q][pitch], by token: q.k
//   prefetch     called FETCHES_PER_GROUP times in each scale group
template <Format F, int Q, class Prefetch>
void multiply_integers(const uint8_t* const* row, const int16_t* q, int ldq, const int32_t* sums_of_q,
                       const float* int_scales, int scale_count, const float* scales, int pitch, float* out,
                       Prefetch&& prefetch) {
    constexpr int N = SCALE_GROUP_BYTES<F> / 4 < WIDTH ? SCALE_GROUP_BYTES<F> / 4 : WIDTH, PAIRS = PAIRS_OF_FOUR<F>;
    vf all[Q];
    for (int g = 0; g < scale_count; g++, q += SCALE_ELEMENTS) {
        vi sum[Q][2];  // two sums, which do not wait for each other
#pragma GCC unroll 4
        for (int query = 0; query < Q; query++) sum[query][0] = sum[query][1] = vi{};
        for (int byte = 0; byte < SCALE_GROUP_BYTES<F>; byte += 4 * N) {
            vu r[N];
            transpose_rows<N>(row, g * SCALE_GROUP_BYTES<F> + byte, r);
            for (int i = 0; i < N; i++) {
                if (i % 4 == 0) prefetch();
                vw pair[PAIRS];
                split_pairs<F>(r[i], pair);
                const int16_t* from = q + (byte / 4 + i) * PAIRS * 2;
#pragma GCC unroll 4
                for (int query = 0; query < Q; query++)
#pragma GCC unroll 4
                    for (int k = 0; k < PAIRS; k++) {
                        int32_t q_words;
                        std::memcpy(&q_words, from + query * ldq + 2 * k, 4);
                        sum[query][k % 2] = dot(sum[query][k % 2], pair[k], (vw)(q_words + vi{}));
                    }
            }
        }
#pragma GCC unroll 4
        for (int query = 0; query < Q; query++) {
            // The products took int4 nibbles n, which stand for n - 8.
            const vi total =
                sum[query][0] + sum[query][1] - (F == Format::i4 ? 8 * sums_of_q[query * scale_count + g] : 0);
            const vf product = __builtin_convertvector(total, vf) * (load(scales + g * pitch) * int_scales[query]);
            all[query] = g ? all[query] + product : product;
        }
    }
    for (int query = 0; query < Q; query++) store(out + query * pitch, all[query]);
}

// o += weights * V for Q queries and one scale group of V.
//   v            the group's bytes of the first token; the next token's lie `stride` bytes behind
//   count        tokens
//   w            int16 weights [Q][ldw], by token, with V's scales applied; w[count] is 0 if count is odd
//   sums_of_w    [Q], sums of the weights
//   int_scales   [Q], of w
//   o            float32 [Q][ldo], elements in the order of element_in_lane<F, true>
//   prefetch     called once a token, rounded up to two
template <Format F, int Q, class Prefetch>
void accumulate_integers(const uint8_t* v, int64_t stride, int count, const int16_t* w, int ldw,
                         const int32_t* sums_of_w, const float* int_scales, float* o, int ldo, Prefetch&& prefetch) {
    constexpr int LOADS = F == Format::i8 ? (WIDTH == 16 ? 2 : 1) : 1, N = F == Format::i8 ? 2 * LOADS : 4;
    for (int from = 0; from < SCALE_GROUP_BYTES<F>; from += LOADS * WORDS) {
        vi sum[Q][N];
        for (int query = 0; query < Q; query++)
            for (int n = 0; n < N; n++) sum[query][n] = vi{} - (F == Format::i4 ? 8 * sums_of_w[query] : 0);
        for (int j = 0; j < count; j += 2) {
            prefetch();
            prefetch();
            const uint8_t* a = v + j * stride + from;
            const uint8_t* b = j + 1 < count ? a + stride : a;  // with weight 0
            vw x[N];
            if constexpr (F == Format::i8) {
                for (int c = 0; c < LOADS; c++) {
                    const vw first = words_at<F>(a + c * WORDS), second = words_at<F>(b + c * WORDS);
                    x[2 * c] = low_words(first, second), x[2 * c + 1] = high_words(first, second);
                }
            } else {
                const vw first = words_at<F>(a), second = words_at<F>(b);
                const vw low = low_words(first, second), high = high_words(first, second);
                x[0] = low & 15, x[1] = high & 15, x[2] = (vw)((vuw)low >> 4), x[3] = (vw)((vuw)high >> 4);
            }
            for (int query = 0; query < Q; query++) {
                int32_t pair;
                std::memcpy(&pair, w + query * ldw + j, 4);
                for (int n = 0; n < N; n++) sum[query][n] = dot(sum[query][n], x[n], (vw)(pair + vi{}));
            }
        }
        for (int query = 0; query < Q; query++)
            for (int n = 0; n < N; n++) {
                const int element = F == Format::i8 ? from : n / 2 * (SCALE_ELEMENTS / 2) + from;
                float* to = o + query * ldo + element + n % (F == Format::i8 ? N : 2) * WIDTH;
                store(to, load(to) + __builtin_convertvector(sum[query][n], vf) * int_scales[query]);
            }
    }
}

}  // namespace ISA
}  // namespace farshore
#endif

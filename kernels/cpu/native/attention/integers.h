// Products of int8 and int4 rows as integers, for queries of 16 bits: q, and the weights of a tile, are rounded to
// int16 with one scale for each query (and group of V), a 2^-16th of the largest. A multiply-add takes two
// elements a lane, and an element needs neither conversion nor scale: half of the instructions of float32.
// Not for four lanes, where plain C++ would be slower. Included after pack.h.
#if WIDTH >= 8
#define HAS_INTEGERS

namespace farshore {
namespace ISA {

typedef int16_t vw __attribute__((vector_size(4 * WIDTH)));
typedef uint16_t vuw __attribute__((vector_size(4 * WIDTH)));

template <Format F>
constexpr int GROUP_BYTES = F == Format::i8 ? SCALE_ELEMENTS : SCALE_ELEMENTS / 2;
constexpr int WORDS = 2 * WIDTH;  // in a vector

// sum + the products of a's and b's words, two to a lane.
inline vi dot(vi sum, vw a, vw b) {
#if WIDTH == 16
    return (vi)_mm512_dpwssd_epi32((__m512i)sum, (__m512i)a, (__m512i)b);
#else
    return sum + (vi)_mm256_madd_epi16((__m256i)a, (__m256i)b);
#endif
}

// Bytes -> words: elements, or for int4 pairs of them.
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

// Words of two tokens, side by side: four of each eight in the low vector, four in the high one (see element_of).
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

// n numbers (a multiple of WIDTH) -> int16 at `to`, which may be where they lie, times what is returned. Sets the sum.
inline float to_integers(const float* from, int n, int16_t* to, int32_t* sum) {
    vf most{}, all{};
    for (int j = 0; j < n; j += WIDTH) {
        const vf x = load(from + j);
        most = max(max(x, -x), most), all += x;
    }
    const float largest = hmax(most);
    const bool finite = largest <= 0x1.fffffep127f && std::isfinite(hsum(all));
    const float times = finite && largest > 0 ? 32767.0f / largest : 0.0f;
    vi total{};
    for (int j = 0; j < n; j += WIDTH) {
        const float magic = 12582912.0f;  // rounds to an integer; NaN -> whatever: the factor will be one
        const vi x = (vi)(load(from + j) * times + magic) - 0x4b400000;
        const vi kept = finite ? x : vi{};
        total += kept;
        typedef int16_t half __attribute__((vector_size(2 * WIDTH)));
        store_as(to + j, __builtin_convertvector(kept, half));
    }
    *sum = 0;
    for (int l = 0; l < WIDTH; l++) *sum += total[l];
    return finite ? largest / 32767.0f : NAN;
}

// Words of four bytes of WIDTH tokens: of elements 4e and 4e + 2, 4e + 1 and 4e + 3, and for int4 of those half a group
// on. Pair k of them is word by word multiplied with pair k of order_query's.
template <Format F>
constexpr int PAIRS_OF_FOUR = F == Format::i8 ? 2 : 4;
template <Format F>
__attribute__((always_inline)) inline void pairs_of(vu bytes, vw* pair) {
    const vuw x = (vuw)bytes;
    if constexpr (F == Format::i8)
        pair[0] = (vw)(x << 8) >> 8, pair[1] = (vw)x >> 8;
    else
        pair[0] = (vw)(x & 15), pair[1] = (vw)(x >> 8 & 15), pair[2] = (vw)(x >> 4 & 15), pair[3] = (vw)(x >> 12);
}
template <Format F>
inline void order_query(const int16_t* q, int16_t* to) {
    for (int four = 0; four < GROUP_BYTES<F>; four += 4)
        for (int k = 0; k < PAIRS_OF_FOUR<F>; k++) {
            const int first = four + k % 2 + k / 2 * (SCALE_ELEMENTS / 2);
            *to++ = q[first], *to++ = q[first + 2];
        }
}

// Four bytes of each of WIDTH tokens in a vector: r[i] holds those from 4 i on, of N times four in a row.
template <int N>
inline void turn_rows(const uint8_t* const* row, int64_t at, vu* r) {
    if constexpr (N == WIDTH) {
        for (int l = 0; l < WIDTH; l++) r[l] = load_as<vu>(row[l] + at);
        transpose(r);
    } else {
#if WIDTH == 16
        for (int l = 0; l < 8; l++)
            r[l] = (vu)_mm512_inserti64x4(_mm512_castsi256_si512(load_as<__m256i>(row[l] + at)),
                                          load_as<__m256i>(row[l + 8] + at), 1);
        transpose_stage<4, 8>(r);
        transpose_stage<2, 8>(r);
        transpose_stage<1, 8>(r);
#endif
    }
}

// out[q] = the products of Q queries (see order_query) with the rows of WIDTH tokens; scales [group][token], `pitch`
// apart as the rows of out. `each` is called a few times on the way.
template <Format F, int Q, class Each>
void multiply_integers(const uint8_t* const* row, const int16_t* q, int ldq, const int32_t* sums_of_q, const float* unit,
                       int groups, const float* scales, int pitch, float* out, Each&& each) {
    constexpr int N = GROUP_BYTES<F> / 4 < WIDTH ? GROUP_BYTES<F> / 4 : WIDTH, PAIRS = PAIRS_OF_FOUR<F>;
    vf all[Q];
    for (int g = 0; g < groups; g++, q += SCALE_ELEMENTS) {
        vi sum[Q][2];  // neither waits for the other
#pragma GCC unroll 4
        for (int at = 0; at < Q; at++) sum[at][0] = sum[at][1] = vi{};
        for (int part = 0; part < GROUP_BYTES<F>; part += 4 * N) {
            vu r[N];
            turn_rows<N>(row, g * GROUP_BYTES<F> + part, r);
            for (int i = 0; i < N; i++) {
                if (i % 4 == 0) each();
                vw pair[PAIRS];
                pairs_of<F>(r[i], pair);
                const int16_t* from = q + (part / 4 + i) * PAIRS * 2;
#pragma GCC unroll 4
                for (int at = 0; at < Q; at++)
#pragma GCC unroll 4
                    for (int k = 0; k < PAIRS; k++) {
                        int32_t two;
                        std::memcpy(&two, from + at * ldq + 2 * k, 4);
                        sum[at][k % 2] = dot(sum[at][k % 2], pair[k], (vw)(two + vi{}));
                    }
            }
        }
#pragma GCC unroll 4
        for (int at = 0; at < Q; at++) {
            // A nibble n is element n - 8.
            const vi total = sum[at][0] + sum[at][1] - (F == Format::i4 ? 8 * sums_of_q[at * groups + g] : 0);
            const vf some = __builtin_convertvector(total, vf) * (load(scales + g * pitch) * unit[at]);
            all[at] = g ? all[at] + some : some;
        }
    }
    for (int at = 0; at < Q; at++) store(out + at * pitch, all[at]);
}

// o of Q queries += weights V, one group of V; in the order of element_of. w: [query][token], `ldw` apart.
template <Format F, int Q, class Each>
void gather_integers(const uint8_t* v, int64_t stride, int count, const int16_t* w, int ldw, const int32_t* sums_of_w,
                     const float* unit, float* o, int ldo, Each&& each_token) {
    constexpr int LOADS = F == Format::i8 ? (WIDTH == 16 ? 2 : 1) : 1, N = F == Format::i8 ? 2 * LOADS : 4;
    for (int from = 0; from < GROUP_BYTES<F>; from += LOADS * WORDS) {
        vi sum[Q][N];
        for (int at = 0; at < Q; at++)
            for (int n = 0; n < N; n++) sum[at][n] = vi{} - (F == Format::i4 ? 8 * sums_of_w[at] : 0);
        for (int j = 0; j < count; j += 2) {
            each_token();
            each_token();
            const uint8_t* a = v + j * stride + from;
            const uint8_t* b = j + 1 < count ? a + stride : a;  // its weight is 0
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
            for (int at = 0; at < Q; at++) {
                int32_t pair;
                std::memcpy(&pair, w + at * ldw + j, 4);
                for (int n = 0; n < N; n++) sum[at][n] = dot(sum[at][n], x[n], (vw)(pair + vi{}));
            }
        }
        for (int at = 0; at < Q; at++)
            for (int n = 0; n < N; n++) {
                const int element = F == Format::i8 ? from : n / 2 * (SCALE_ELEMENTS / 2) + from;
                float* to = o + at * ldo + element + n % (F == Format::i8 ? N : 2) * WIDTH;
                store(to, load(to) + __builtin_convertvector(sum[at][n], vf) * unit[at]);
            }
    }
}

}  // namespace ISA
}  // namespace farshore
#endif

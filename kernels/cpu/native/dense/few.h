// x W^T for few rows of x: dot products along the rows of W, which are read once, at memory's speed. In float32,
// whatever the format: a bfloat16 dot product takes an Intel CPU twice the time of two float32 ones.
// Included after dense_weights.h.

namespace farshore {
namespace ISA {
namespace slices {

constexpr int FEW_ROWS = 32;
// More rows than these are multiplied by plain weights: their bytes are more, and unpacking costs instructions for
// each of the blocks that the rows are cut into.
constexpr int PACKED_ROWS = 8;

// Columns whose sums, of M rows, fit into the registers with their weights.
template <int M>
constexpr int columns_at_once() {
#if WIDTH == 16
    return M <= 2 ? 8 : M == 3 ? 6 : M == 4 ? 4 : M <= 8 ? 3 : 2;
#else
    return M <= 2 ? 6 : M == 3 ? 4 : 3;
#endif
}

// A multiple of all of these.
constexpr int COLUMNS = 24;

// Elements of a row of x, padded with zeros to a multiple of what any weights are read in.
constexpr int padded(int in) { return round_up(in, 64); }

// x as [padded(in) / WIDTH][rows][WIDTH] float32s, of each step of bfloat16s the even elements first.
template <Format F>
void spread(const void* x, int rows, int in, float* to) {
    for (int p = 0; p < padded(in); p += STEP<F>)
        for (int r = 0; r < rows; r++, to += WIDTH) {
            const vu words = p < in ? words_at<F>(at<F>(x, (int64_t)r * in), p, in) : vu{};
            if constexpr (F == Format::f32) {
                store(to, (vf)words);
            } else {
                store(to, even(words));
                store(to + rows * WIDTH, odd(words));
                if (r == rows - 1) to += rows * WIDTH;
            }
        }
}

// c[M][N] = the lanes' sums, added in an order that depends on neither M nor N.
template <int M, int N>
inline void put_lane_sums(const vf (&sums)[M][N], float* c, int ldc) {
#if WIDTH == 16
    unrolled<(M * N + 3) / 4>([&](auto group) INLINE {
        constexpr int at = 4 * group;
        const auto sum = [&](auto i) INLINE {
            constexpr int k = at + i;
            if constexpr (k < M * N)
                return (__m512)sums[k / N][k % N];
            else
                return _mm512_setzero_ps();
        };
        const auto folded = [](__m512 a, __m512 b) {
            return _mm512_add_ps(_mm512_shuffle_f32x4(a, b, 0x44), _mm512_shuffle_f32x4(a, b, 0xee));
        };
        const __m512 ab = folded(sum(number<0>), sum(number<1>)), cd = folded(sum(number<2>), sum(number<3>));
        __m512 four = _mm512_add_ps(_mm512_shuffle_f32x4(ab, cd, 0x88), _mm512_shuffle_f32x4(ab, cd, 0xdd));
        four = _mm512_add_ps(four, _mm512_permute_ps(four, 0x4e));
        four = _mm512_add_ps(four, _mm512_permute_ps(four, 0xb1));
        unrolled<4>([&](auto i) INLINE {
            constexpr int k = at + i;
            if constexpr (k < M * N)
                _mm_store_ss(c + (int64_t)(k / N) * ldc + k % N, _mm512_extractf32x4_ps(four, i));
        });
    });
#else
    for (int i = 0; i < M; i++)
        for (int j = 0; j < N; j++) c[(int64_t)i * ldc + j] = lane_sum(sums[i][j]);
#endif
}

// c[M][N] = x[M] . w[N], where x lies among `rows` rows.
template <class Weights, int M, int N>
void dots(const float* x, int rows, const Weights& w, float* c, int ldc) {
    vf sums[M][N] = {};
    w.template each<N>([&](const vf(&of)[N]) INLINE {
        unrolled<M>([&](auto i) INLINE {
            vf a = load(x + i * WIDTH);
#if WIDTH == 16
            asm("" : "+v"(a));  // Loaded once, not once for each column.
#endif
            unrolled<N>([&](auto j) INLINE { sums[i][j] += a * of[j]; });
        });
        x += rows * WIDTH;
    });
    put_lane_sums<M, N>(sums, c, ldc);
}

// All rows by n columns from `col` on: the rows in blocks of M, then of M - 1, for each few columns.
template <class Weights, int M>
void dot_columns(const float* x, int rows, const Linear& w, int col, int n, float* c, int ldc) {
    constexpr int N = columns_at_once<M>();
    constexpr int LESS = M > 1 ? M - 1 : 1;
    const int blocks = (rows + M - 1) / M;
    const int large = rows - blocks * (M - 1);
    const auto columns = [&](auto width, int j) {
        constexpr int WIDE = decltype(width)::value;
        const Weights from(w, col + j);
        int i = 0;
        for (int b = 0; b < blocks; b++) {
            const float* a = x + i * WIDTH;
            float* to = c + (int64_t)i * ldc + j;
            if (b < large) {
                dots<Weights, M, WIDE>(a, rows, from, to, ldc);
                i += M;
            } else {
                dots<Weights, LESS, WIDE>(a, rows, from, to, ldc);
                i += LESS;
            }
        }
    };
    int j = 0;
    for (; j + N <= n; j += N) columns(std::integral_constant<int, N>{}, j);
    for (; j < n; j++) columns(std::integral_constant<int, 1>{}, j);
}

// The rows in as few blocks of at most MOST as can be, of about one size.
template <class Weights, int MOST, int M = 1>
void in_blocks(const float* x, int rows, const Linear& w, int col, int n, float* c, int ldc) {
    const int blocks = (rows + MOST - 1) / MOST;
    if constexpr (M < MOST)
        if (M * blocks < rows) return in_blocks<Weights, MOST, M + 1>(x, rows, w, col, n, c, ldc);
    dot_columns<Weights, M>(x, rows, w, col, n, c, ldc);
}

// c[rows][n] = x . rows [col, col + n) of w.
template <Format F>
void few_rows(const float* x, int rows, const Linear& w, int col, int n, float* c, int ldc) {
#if WIDTH == 16
    const Storage storage = F == Format::f32 || rows > PACKED_ROWS ? Storage::none : w.storage;
    if (storage == Storage::q4) return in_blocks<Q4, PACKED_ROWS>(x, rows, w, col, n, c, ldc);
    if (storage == Storage::q8) return in_blocks<Q8, PACKED_ROWS>(x, rows, w, col, n, c, ldc);
    // Twelve rows by two columns take more loads than eight by three, but fewer instructions than twice six.
    if (rows <= 12) return in_blocks<Plain<F>, 12>(x, rows, w, col, n, c, ldc);
    in_blocks<Plain<F>, 8>(x, rows, w, col, n, c, ldc);
#else
    in_blocks<Plain<F>, 4>(x, rows, w, col, n, c, ldc);
#endif
}

}  // namespace slices
}  // namespace ISA
}  // namespace farshore

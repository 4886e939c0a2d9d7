// x W^T for up to FEW_ROWS rows of x: dot products along the rows of W. Included by simd/isa_kernels.h after
// packed.h.
//
// W is read once, which is bound by memory bandwidth. Computes in float32 for every format: on Intel CPUs a
// bfloat16 dot product instruction takes twice the time of the two float32 ones that it replaces.

namespace farshore {
namespace ISA {
namespace dense_ops {

constexpr int FEW_ROWS = 32;
// Most rows that are multiplied with packed weights as these are read. For more rows, which take several blocks, a few
// rows of weights are unpacked to memory and read from the cache for each block; so are they where a table of the
// values does not fit into a register.
#if WIDTH == 16 && !defined(__SANITIZE_ADDRESS__)
constexpr int PACKED_ROWS = 8;
#elif WIDTH == 16
constexpr int PACKED_ROWS = 2;  // a sanitised file with all numbers of rows compiles for eight minutes
#else
constexpr int PACKED_ROWS = 0;
#endif
// Rows of weights that are unpacked at a time: a multiple of columns_at_once of most numbers of rows.
constexpr int UNPACKED = 12;

// Columns of W whose sums with M rows of x, and whose weights, fit into the registers. Packed columns also divide
// PACKED_ROWS_TOGETHER.
template <class Weights, int M>
constexpr int columns_at_once() {
#if WIDTH == 16
    if (std::is_base_of_v<PackedRows, Weights>) return M <= 2 ? 8 : M <= 5 ? 4 : 2;
    return M <= 2 ? 8 : M == 3 ? 6 : M == 4 ? 4 : M <= 8 ? 3 : 2;
#else
    return M <= 2 ? 6 : M == 3 ? 4 : 3;
#endif
}

// A common multiple of them.
constexpr int COLUMNS = 24;

// Elements of a row of x with padding, to a multiple of the elements that every kind of weights is read in.
constexpr int padded(int in) { return round_up(in, 64); }

// Converts x [rows][in] to float32 [padded(in) / WIDTH][rows][WIDTH], padded with zeros; of each STEP of
// bfloat16 elements the even ones come first, then the odd ones.
template <Format F>
void spread(const void* x, int rows, int in, float* to) {
    for (int p = 0; p < padded(in); p += STEP<F>)
        for (int r = 0; r < rows; r++, to += WIDTH) {
            const vu words = p < in ? words_at<F>(address<F>(x, (int64_t)r * in), p, in) : vu{};
            if constexpr (F == Format::f32) {
                store(to, (vf)words);
            } else {
                store(to, even(words));
                store(to + rows * WIDTH, odd(words));
                if (r == rows - 1) to += rows * WIDTH;
            }
        }
}

// c[M][ldc] = sums of the lanes of sums[M][N]. The order of additions does not depend on M or N, so that the
// bits of a row do not depend on the number of rows.
template <int M, int N>
inline void store_lane_sums(const vf (&sums)[M][N], float* c, int ldc) {
#if WIDTH == 16
    unrolled<(M * N + 3) / 4>([&](auto quad) INLINE {
        constexpr int first = 4 * quad;
        const auto sum = [&](auto i) INLINE {
            constexpr int k = first + i;
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
            constexpr int k = first + i;
            if constexpr (k < M * N) _mm_store_ss(c + (int64_t)(k / N) * ldc + k % N, _mm512_extractf32x4_ps(four, i));
        });
    });
#else
    for (int i = 0; i < M; i++)
        for (int j = 0; j < N; j++) c[(int64_t)i * ldc + j] = lane_sum(sums[i][j]);
#endif
}

// c[i][j] = x_i . w_j for M rows of x, which is spread with `rows` rows, and N rows of weights.
template <class Weights, int M, int N>
void dots(const float* x, int rows, const Weights& w, float* c, int ldc) {
    vf sums[M][N] = {};
    w.template for_vectors<N>([&](const vf(&weights)[N]) INLINE {
        unrolled<M>([&](auto i) INLINE {
            vf a = load(x + i * WIDTH);
#if WIDTH == 16
            asm("" : "+v"(a));  // keeps it in a register; gcc would load it again for each column
#endif
            unrolled<N>([&](auto j) INLINE { sums[i][j] += a * weights[j]; });
        });
        x += rows * WIDTH;
    });
    store_lane_sums<M, N>(sums, c, ldc);
}

// c[rows][ldc] = x . rows [col, col + n) of w: for each few columns all rows, in blocks of M rows and then of
// one less.
template <class Weights, int M>
void dot_columns(const float* x, int rows, const Linear& w, int col, int n, float* c, int ldc) {
    constexpr int N = columns_at_once<Weights, M>();
    constexpr int FEWER = M > 1 ? M - 1 : 1;
    const int blocks = (rows + M - 1) / M;
    const int large = rows - blocks * (M - 1);
    const auto columns = [&](auto count, int j) {
        constexpr int COUNT = decltype(count)::value;
        const Weights from(w, col + j, 0, w.in);
        int i = 0;
        for (int b = 0; b < blocks; b++) {
            const float* a = x + i * WIDTH;
            float* to = c + (int64_t)i * ldc + j;
            if (b < large) {
                dots<Weights, M, COUNT>(a, rows, from, to, ldc);
                i += M;
            } else {
                dots<Weights, FEWER, COUNT>(a, rows, from, to, ldc);
                i += FEWER;
            }
        }
    };
    int j = 0;
    for (; j + N <= n; j += N) columns(std::integral_constant<int, N>{}, j);
    for (; j < n; j++) columns(std::integral_constant<int, 1>{}, j);
}

// As dot_columns, with the smallest M that gives the fewest blocks of at most MAX_ROWS rows.
template <class Weights, int MAX_ROWS, int M = 1>
void multiply_in_blocks(const float* x, int rows, const Linear& w, int col, int n, float* c, int ldc) {
    const int blocks = (rows + MAX_ROWS - 1) / MAX_ROWS;
    if constexpr (M < MAX_ROWS)
        if (M * blocks < rows) return multiply_in_blocks<Weights, MAX_ROWS, M + 1>(x, rows, w, col, n, c, ldc);
    dot_columns<Weights, M>(x, rows, w, col, n, c, ldc);
}

// c[i][j] = x_i . w_(col + j) for i < rows <= FEW_ROWS, j < n, where w is not packed.
//   x    as `spread` stores it
//   c    float32 [rows][ldc]
template <Format F>
void few_plain_rows(const float* x, int rows, const Linear& w, int col, int n, float* c, int ldc) {
#if WIDTH == 16
    // 12 rows by 2 columns need more loads than 8 by 3, but fewer instructions than two blocks of 6 rows.
    if (rows <= 12) return multiply_in_blocks<Plain<F>, 12>(x, rows, w, col, n, c, ldc);
    multiply_in_blocks<Plain<F>, 8>(x, rows, w, col, n, c, ldc);
#else
    multiply_in_blocks<Plain<F>, 4>(x, rows, w, col, n, c, ldc);
#endif
}

// Words of scratch memory that few_rows needs.
inline int64_t few_rows_words(const Linear& w) { return w.storage == Storage::plain ? 0 : UNPACKED / 2L * w.in; }

// As few_plain_rows, for any w. `memory` has few_rows_words.
template <Format F>
void few_rows(const float* x, int rows, const Linear& w, int col, int n, float* c, int ldc, void* memory) {
    if (w.storage == Storage::plain) return few_plain_rows<F>(x, rows, w, col, n, c, ldc);
    if constexpr (F == Format::bf16) {
#if WIDTH == 16
        if (rows <= PACKED_ROWS)
            return with_reader(w, 0, 0, 0, [&]<class Weights>(const Weights&) {
                multiply_in_blocks<Weights, PACKED_ROWS>(x, rows, w, col, n, c, ldc);
            });
#endif
        uint16_t* unpacked = static_cast<uint16_t*>(memory);
        const Linear plain{unpacked, nullptr, UNPACKED, w.in, Storage::plain};
        for (int j = 0; j < n; j += UNPACKED) {
            const int count = std::min(UNPACKED, n - j);
            for (int row = 0; row < count; row++) unpack_row(w, col + j + row, 0, w.in, unpacked + (int64_t)row * w.in);
            few_plain_rows<F>(x, rows, plain, 0, count, c + j, ldc);
        }
    }
}

}  // namespace dense_ops
}  // namespace ISA
}  // namespace farshore

// x W^T for few rows of x: dot products along the rows of W, which are read once, at memory's speed.
// Included after dense_weights.h.

namespace farshore {
namespace ISA {
namespace slices {

constexpr int FEW_ROWS = 12;
// More rows than these are multiplied by plain weights, whose bytes are more and whose instructions fewer.
// (Measured where AVX-512 ran at half speed, ms for SmolLM2's weights, packed and plain: 1 row 11.4 and 15.5,
// 2 rows 14.6 and 17.5, 4 rows 19.8 and 19.3, 8 rows 31.6 and 25.5.)
constexpr int PACKED_ROWS = 3;

// What rows of x are multiplied as.
template <Format F>
using Factor = std::conditional_t<PAIRS<F>, uint16_t, float>;

// x is padded with zeros to a multiple of what any reader gives at once.
constexpr int PADDED = 64;

// Rows for `dots`: pairs as they are; else float32, where of bfloat16 each step's even elements come first.
template <Format F>
void spread(const void* x, int rows, int k, Factor<F>* to, int ld) {
    for (int r = 0; r < rows; r++) {
        const uint8_t* row = at<F>(x, (int64_t)r * k);
        Factor<F>* out = to + (int64_t)r * ld;
        for (int p = 0; p < ld; p += STEP<F>) {
            const vu words = p < k ? words_at<F>(row, p, k) : vu{};
            if constexpr (PAIRS<F> || F == Format::f32) {
                store_as(out + p, words);
            } else {
                store_as(out + p, even(words));
                store_as(out + p + WIDTH, odd(words));
            }
        }
    }
}

template <Format F, int M, int N>
inline void dot_step(const vu (&words)[N], const Factor<F>* x, int ldx, vf (&sums)[M][N]) {
    if constexpr (PAIRS<F>) {
        for (int i = 0; i < M; i++) {
            const vu a = load_as<vu>(x + (int64_t)i * ldx);
            for (int j = 0; j < N; j++) sums[i][j] = dot_pairs(sums[i][j], a, words[j]);
        }
    } else {
        for (int half = 0; half < STEP<F> / WIDTH; half++) {
            vf w[N];
            for (int j = 0; j < N; j++)
                w[j] = F == Format::f32 ? (vf)words[j] : half ? odd(words[j]) : even(words[j]);
            for (int i = 0; i < M; i++) {
                const vf a = load(x + (int64_t)i * ldx + half * WIDTH);
                for (int j = 0; j < N; j++) sums[i][j] += a * w[j];
            }
        }
    }
}

// c[M][N] = x[M] . w[N]; fetches what lies `ahead` bytes further.
template <Format F, class Rows, int M, int N>
inline void dots(const Factor<F>* x, int ldx, const Rows& w, int64_t ahead, float* c, int ldc) {
    vf sums[M][N] = {};
    typename Rows::template Scales<N> scales;
    for (int step = 0; step < w.steps; step++) {
        vu words[Rows::VECTORS][N];
        scales.load(w, step);
        for (int j = 0; j < N; j++) {
            vu of_row[Rows::VECTORS];
            w.read(scales, j, step, of_row);
            for (int v = 0; v < Rows::VECTORS; v++) words[v][j] = of_row[v];
            __builtin_prefetch(w.line(j, step) + ahead);
        }
        for (int v = 0; v < Rows::VECTORS; v++)
            dot_step<F, M, N>(words[v], x + (step * Rows::VECTORS + v) * STEP<F>, ldx, sums);
    }
    for (int i = 0; i < M; i++)
        for (int j = 0; j < N; j++) c[(int64_t)i * ldc + j] = lane_sum(sums[i][j]);
}

// Columns whose sums, of M rows, fit into the registers.
template <Format F, class Rows, int M>
constexpr int columns_at_once() {
    if (Rows::VECTORS == 2) return M == 1 ? 4 : 2;  // the tables take registers, too
    if (PAIRS<F>) return M <= 2 ? 6 : M <= 5 ? 4 : 3;
    return M <= 2 ? 6 : M == 3 ? 4 : 3;
}

// All rows by n columns from `col` on: the rows in blocks of M, then of M - 1, for each few columns.
template <Format F, class Rows, int M>
void dot_columns(const Factor<F>* x, int ldx, int rows, const Linear& w, int col, int n, float* c, int ldc) {
    constexpr int N = columns_at_once<F, Rows, M>();
    constexpr int LESS = M > 1 ? M - 1 : 1;
    const int blocks = (rows + M - 1) / M;
    const int large = rows - blocks * (M - 1);
    const auto columns = [&](auto width, int j) {
        constexpr int WIDE = decltype(width)::value;
        const Rows from(w, col + j);
        const int64_t ahead = WIDE * from.row_bytes < 16384 ? WIDE * from.row_bytes : 1024;
        int i = 0;
        for (int b = 0; b < blocks; b++) {
            const Factor<F>* a = x + (int64_t)i * ldx;
            float* to = c + (int64_t)i * ldc + j;
            if (b < large) {
                dots<F, Rows, M, WIDE>(a, ldx, from, ahead, to, ldc);
                i += M;
            } else {
                dots<F, Rows, LESS, WIDE>(a, ldx, from, ahead, to, ldc);
                i += LESS;
            }
        }
    };
    int j = 0;
    for (; j + N <= n; j += N) columns(std::integral_constant<int, N>{}, j);
    for (; j < n; j++) columns(std::integral_constant<int, 1>{}, j);
}

// The rows in as few blocks as the registers allow, of about one size.
template <Format F, class Rows, int MOST, int M = 1>
void in_blocks(const Factor<F>* x, int ldx, int rows, const Linear& w, int col, int n, float* c, int ldc) {
    const int blocks = (rows + MOST - 1) / MOST;
    if constexpr (M < MOST)
        if (M * blocks < rows) return in_blocks<F, Rows, MOST, M + 1>(x, ldx, rows, w, col, n, c, ldc);
    dot_columns<F, Rows, M>(x, ldx, rows, w, col, n, c, ldc);
}

// c[rows][n] = x . rows [col, col + n) of w.
template <Format F>
void few_rows(const Factor<F>* x, int ldx, int rows, const Linear& w, int col, int n, float* c, int ldc) {
#if defined(HAS_BF16_DOT)
    if constexpr (PAIRS<F>) {
        const Storage storage = rows > PACKED_ROWS ? Storage::none : w.storage;
        if (storage == Storage::q4) return in_blocks<F, Q4, PACKED_ROWS>(x, ldx, rows, w, col, n, c, ldc);
        if (storage == Storage::q8) return in_blocks<F, Q8, PACKED_ROWS>(x, ldx, rows, w, col, n, c, ldc);
    }
#endif
    in_blocks<F, Plain<F>, PAIRS<F> ? 8 : 4>(x, ldx, rows, w, col, n, c, ldc);
}

}  // namespace slices
}  // namespace ISA
}  // namespace farshore

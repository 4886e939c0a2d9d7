// x W^T for weights as they lie, [out][in]. Few rows: dot products along the weights' rows, which are read once, at
// memory's speed. Many rows: blocks of W turned into float32 panels [in][PANEL], multiplied from L1 and L2.
// Included after dense_values.h.

namespace farshore {
namespace ISA {
namespace slices {

constexpr int FEW_ROWS = 12;

// bfloat16 comes in words of two neighbours; its products run over the even ones, then the odd ones.
template <Format F>
constexpr int STEP = F == Format::f32 ? WIDTH : 2 * WIDTH;

inline vf even(vu words) { return (vf)(words << 16); }
inline vf odd(vu words) { return (vf)(words & 0xffff0000); }

// Elements [i, i + STEP) of a row of n, as words, zeros beyond its end.
template <Format F>
inline vu words_at(const void* row, int i, int n) {
    if (i + STEP<F> <= n) return load_as<vu>(at<F>(row, i));
    uint8_t some[4 * WIDTH] = {};
    std::memcpy(some, at<F>(row, i), (n - i) * size_of(F));
    return load_as<vu>(some);
}

// -- few rows ----------------------------------------------------------------------------------------------

// Rows for `dots`: float32, padded to STEP with zeros; of bfloat16 each step's even elements come first.
template <Format F>
void spread(const void* x, int rows, int k, float* to, int ld) {
    for (int r = 0; r < rows; r++) {
        const uint8_t* row = at<F>(x, (int64_t)r * k);
        float* out = to + (int64_t)r * ld;
        for (int p = 0; p < k; p += STEP<F>) {
            const vu words = words_at<F>(row, p, k);
            if (F == Format::f32) {
                store(out + p, (vf)words);
            } else {
                store(out + p, even(words));
                store(out + p + WIDTH, odd(words));
            }
        }
    }
}

template <Format F, int M, int N>
inline void dot_step(const vu* words, const float* x, int ldx, vf (&sums)[M][N]) {
    for (int half = 0; half < STEP<F> / WIDTH; half++) {
        vf w[N];
        for (int j = 0; j < N; j++) w[j] = F == Format::f32 ? (vf)words[j] : half ? odd(words[j]) : even(words[j]);
        for (int i = 0; i < M; i++) {
            const vf a = load(x + (int64_t)i * ldx + half * WIDTH);
            for (int j = 0; j < N; j++) sums[i][j] += a * w[j];
        }
    }
}

// c[M][N] = x[M] . w[N]; fetches what lies `ahead` bytes further.
template <Format F, int M, int N>
inline void dots(const float* x, int ldx, const uint8_t* w, int k, int64_t ahead, float* c, int ldc) {
    const int64_t row = k * size_of(F);
    vf sums[M][N] = {};
    vu words[N];
    int p = 0;
    for (; p + STEP<F> <= k; p += STEP<F>) {
        for (int j = 0; j < N; j++) {
            const uint8_t* from = w + j * row + p * size_of(F);
            words[j] = load_as<vu>(from);
            __builtin_prefetch(from + ahead);
        }
        dot_step<F>(words, x + p, ldx, sums);
    }
    if (p < k) {
        for (int j = 0; j < N; j++) words[j] = words_at<F>(w + j * row, p, k);
        dot_step<F>(words, x + p, ldx, sums);
    }
    for (int i = 0; i < M; i++)
        for (int j = 0; j < N; j++) c[(int64_t)i * ldc + j] = lane_sum(sums[i][j]);
}

// All rows by n columns: the rows in blocks of M, then of M - 1, for each N columns.
template <Format F, int M, int N>
void dot_columns(const float* x, int ldx, int rows, const uint8_t* w, int k, int n, float* c, int ldc) {
    constexpr int LESS = M > 1 ? M - 1 : 1;
    const int64_t row = k * size_of(F);
    const int blocks = (rows + M - 1) / M;
    const int large = rows - blocks * (M - 1);
    const auto columns = [&](auto width, int j) {
        constexpr int WIDE = decltype(width)::value;
        const uint8_t* from = w + j * row;
        const int64_t ahead = WIDE * row < 16384 ? WIDE * row : 1024;
        int i = 0;
        for (int b = 0; b < blocks; b++) {
            const float* a = x + (int64_t)i * ldx;
            float* to = c + (int64_t)i * ldc + j;
            if (b < large) {
                dots<F, M, WIDE>(a, ldx, from, k, ahead, to, ldc);
                i += M;
            } else {
                dots<F, LESS, WIDE>(a, ldx, from, k, ahead, to, ldc);
                i += LESS;
            }
        }
    };
    int j = 0;
    for (; j + N <= n; j += N) columns(std::integral_constant<int, N>{}, j);
    for (; j < n; j++) columns(std::integral_constant<int, 1>{}, j);
}

template <Format F>
void few_rows(const float* x, int ldx, int rows, const uint8_t* w, int k, int n, float* c, int ldc) {
    const int blocks = (rows + 3) / 4;
    switch ((rows + blocks - 1) / blocks) {
        case 1: return dot_columns<F, 1, 6>(x, ldx, rows, w, k, n, c, ldc);
        case 2: return dot_columns<F, 2, 6>(x, ldx, rows, w, k, n, c, ldc);
        case 3: return dot_columns<F, 3, 4>(x, ldx, rows, w, k, n, c, ldc);
        default: return dot_columns<F, 4, 3>(x, ldx, rows, w, k, n, c, ldc);
    }
}

// -- many rows ---------------------------------------------------------------------------------------------

#if WIDTH == 16
constexpr int TILE_ROWS = 14, TILE_VECTORS = 2;
#elif WIDTH == 8
constexpr int TILE_ROWS = 6, TILE_VECTORS = 2;
#else
constexpr int TILE_ROWS = 3, TILE_VECTORS = 3;
#endif
constexpr int PANEL = TILE_VECTORS * WIDTH;
// A block of x, [BLOCK_ROWS][BLOCK_IN] float32, and the sums it adds to share L2; a panel of W lies in L1.
constexpr int BLOCK_ROWS = 144, BLOCK_IN = 320, BLOCK_OUT = 288;

template <int M>
inline void tile(const float* a, int lda, const float* b, int k, float* c, int ldc, bool add) {
    vf sums[M][TILE_VECTORS];
    for (int i = 0; i < M; i++)
        for (int j = 0; j < TILE_VECTORS; j++) sums[i][j] = add ? load(c + (int64_t)i * ldc + j * WIDTH) : vf{};
    for (int p = 0; p < k; p++) {
        vf w[TILE_VECTORS];
        for (int j = 0; j < TILE_VECTORS; j++) w[j] = load(b + p * PANEL + j * WIDTH);
        for (int i = 0; i < M; i++) {
            const vf x = splat(a[(int64_t)i * lda + p]);
            for (int j = 0; j < TILE_VECTORS; j++) sums[i][j] += x * w[j];
        }
    }
    for (int i = 0; i < M; i++)
        for (int j = 0; j < TILE_VECTORS; j++) store(c + (int64_t)i * ldc + j * WIDTH, sums[i][j]);
}

template <int M>
inline void last_tile(int m, const float* a, int lda, const float* b, int k, float* c, int ldc, bool add) {
    if constexpr (M > 0) {
        if (m == M) return tile<M>(a, lda, b, k, c, ldc, add);
        last_tile<M - 1>(m, a, lda, b, k, c, ldc, add);
    }
}

// Elements [p0, p0 + k) of `rows` rows of n -> float32 [rows][k], zeros beyond n.
template <Format F>
void widen_rows(const void* x, int rows, int n, int p0, int k, float* to) {
    for (int r = 0; r < rows; r++)
        for (int p = 0; p < k; p += WIDTH)
            store(to + r * k + p, p0 + p < n ? get<F>(at<F>(x, (int64_t)r * n), p0 + p, n) : vf{});
}

// Elements [p0, p0 + k) of `rows` <= PANEL rows of W -> float32 [k][PANEL], zeros where there are none.
template <Format F>
void pack_panel(const uint8_t* w, int rows, int n, int p0, int k, float* to) {
    for (int j = 0; j < PANEL; j += WIDTH)
        for (int p = 0; p < k; p += STEP<F>) {
            vu r[WIDTH];
            for (int l = 0; l < WIDTH; l++)
                r[l] = j + l < rows && p0 + p < n ? words_at<F>(at<F>(w, (int64_t)(j + l) * n), p0 + p, n) : vu{};
            transpose(r);
            float* out = to + p * PANEL + j;
            for (int l = 0; l < WIDTH; l++) {
                if (F == Format::f32) {
                    store_as(out + l * PANEL, r[l]);
                } else {
                    store(out + 2 * l * PANEL, even(r[l]));
                    store(out + (2 * l + 1) * PANEL, odd(r[l]));
                }
            }
        }
}

// Lines of rows [j0, j1) of W, elements [p0, p0 + k).
template <Format F>
inline void fetch(const uint8_t* w, int j0, int j1, int n, int p0, int k) {
    for (int j = j0; j < j1; j++)
        for (int64_t b = 0; b < k * size_of(F); b += 64) __builtin_prefetch(at<F>(w, (int64_t)j * n + p0) + b, 0, 2);
}

template <Format F>
void many_rows(const void* x, int rows, const Linear* const* w, int matrices, int col, int cols, float* c, int ldc) {
    const int in = w[0]->in;
    const int blocks = (in + BLOCK_IN - 1) / BLOCK_IN;
    const int k = round_up((in + blocks - 1) / blocks, STEP<F>);
    float* a = c + (int64_t)matrices * rows * ldc;
    float* b = a + (int64_t)rows * k;
    const int panels = (cols + PANEL - 1) / PANEL, tiles = (rows + TILE_ROWS - 1) / TILE_ROWS;
    for (int p0 = 0; p0 < in; p0 += k) {
        widen_rows<F>(x, rows, in, p0, k, a);
        for (int m = 0; m < matrices; m++)
            for (int panel = 0; panel < panels; panel++) {
                const int j = panel * PANEL;
                const uint8_t* from = at<F>(w[m]->weight, (int64_t)(col + j) * in);
                pack_panel<F>(from, std::min(PANEL, cols - j), in, p0, k, b);
                const int next = std::min(PANEL, cols - j - PANEL);
                float* to = c + (int64_t)m * rows * ldc + j;
                for (int t = 0; t < tiles; t++) {
                    const int i = t * TILE_ROWS;
                    if (next > 0)
                        fetch<F>(from + PANEL * in * size_of(F), t * next / tiles, (t + 1) * next / tiles, in, p0, k);
                    last_tile<TILE_ROWS>(std::min(TILE_ROWS, rows - i), a + i * k, k, b, k, to + (int64_t)i * ldc, ldc,
                                         p0 > 0);
                }
            }
    }
}

// -- both --------------------------------------------------------------------------------------------------

// Sums of rows [row, row + rows) and columns [col, col + cols): c[matrix] is [rows][ld].
struct Sums {
    int row, rows, col, cols;
    const float* c[2];
    int ld;
};

// x [rows][in] by one or two matrices of one shape; `use` gets every part of the sums once, on some thread.
template <Format F, int MATRICES, class Use>
void product(const void* x, int rows, const Linear* const (&w)[MATRICES], int threads, Use&& use) {
    const int in = w[0]->in, n = w[0]->out;
    const bool few = rows <= FEW_ROWS;
    float* spread_x = nullptr;
    const int ldx = round_up(in, STEP<F>);
    int row_blocks = 1, block_rows = rows, cols;
    if (few) {
        spread_x = static_cast<float*>(scratch(4L * rows * ldx, 1));
        spread<F>(x, rows, in, spread_x, ldx);
        cols = std::min(1024, round_up((n + 4 * threads - 1) / (4 * threads), 12));
    } else {
        row_blocks = (rows + BLOCK_ROWS - 1) / BLOCK_ROWS;
        block_rows = round_up((rows + row_blocks - 1) / row_blocks, TILE_ROWS);
        row_blocks = (rows + block_rows - 1) / block_rows;
        cols = std::min(BLOCK_OUT / MATRICES, round_up((n + threads - 1) / threads, PANEL));
    }
    const int ldc = round_up(cols, PANEL);
    const int col_blocks = (n + cols - 1) / cols;
    parallel_for(row_blocks * col_blocks, threads, [&](int unit) {
        Sums sums;
        sums.row = unit % row_blocks * block_rows;
        sums.rows = std::min(block_rows, rows - sums.row);
        sums.col = unit / row_blocks * cols;
        sums.cols = std::min(cols, n - sums.col);
        sums.ld = ldc;
        const int64_t more = few ? 0 : (int64_t)(sums.rows + PANEL) * (BLOCK_IN + STEP<F>);
        float* c = static_cast<float*>(scratch(4L * ((int64_t)MATRICES * sums.rows * ldc + more)));
        for (int m = 0; m < MATRICES; m++) sums.c[m] = c + (int64_t)m * sums.rows * ldc;
        if (!few)
            many_rows<F>(at<F>(x, (int64_t)sums.row * in), sums.rows, w, MATRICES, sums.col, sums.cols, c, ldc);
        else
            for (int m = 0; m < MATRICES; m++)
                few_rows<F>(spread_x, ldx, rows, at<F>(w[m]->weight, (int64_t)sums.col * in), in, sums.cols,
                            c + (int64_t)m * rows * ldc, ldc);
        use(sums);
    });
}

}  // namespace slices
}  // namespace ISA
}  // namespace farshore

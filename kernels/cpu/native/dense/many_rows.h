// x W^T for many rows of x: blocks of W are transposed into panels of words [in][PANEL] and multiplied from
// L1 and L2. Included by simd/isa_kernels.h after packed.h.

namespace farshore {
namespace ISA {
namespace dense_ops {

#if WIDTH == 16
constexpr int TILE_ROWS = 14, TILE_VECTORS = 2;
#elif WIDTH == 8
constexpr int TILE_ROWS = 6, TILE_VECTORS = 2;
#else
constexpr int TILE_ROWS = 3, TILE_VECTORS = 3;
#endif
constexpr int PANEL = TILE_VECTORS * WIDTH;  // columns
// A block of x, [BLOCK_ROWS][BLOCK_WORDS], and the sums that it adds to fit together into L2; a panel of W
// and the rows of x of a tile fit into L1. (Measured: 320 words, which do not fit into 48 KiB, are 4%
// slower.)
constexpr int BLOCK_ROWS = 280, BLOCK_WORDS = 192;
// Columns of a block: for one matrix, and for each of two.
constexpr int BLOCK_OUT[] = {288, 192};

// Elements that the inner loop multiplies at a time in each lane.
template <Format F>
constexpr int PER_WORD = PAIRS<F> ? 2 : 1;

// c[M][PANEL] (+)= a[M][words] b[words][PANEL]. lda in words. Prefetches the sums of the next M rows.
template <Format F, int M>
inline void tile(const uint32_t* a, int lda, const uint32_t* b, int words, float* c, int ldc, bool add) {
    vf sums[M][TILE_VECTORS];
    unrolled<M>([&](auto i) INLINE {
        float* row = c + (int64_t)i * ldc;
        unrolled<TILE_VECTORS>([&](auto j) INLINE {
            sums[i][j] = add ? load(row + j * WIDTH) : vf{};
            __builtin_prefetch(row + (int64_t)M * ldc + j * WIDTH, 1);
        });
    });
    for (int p = 0; p < words; p++) {
        vu w[TILE_VECTORS];
        unrolled<TILE_VECTORS>([&](auto j) INLINE { w[j] = load_as<vu>(b + p * PANEL + j * WIDTH); });
        unrolled<M>([&](auto i) INLINE {
            const vu x = a[(int64_t)i * lda + p] + vu{};
            unrolled<TILE_VECTORS>([&](auto j) INLINE {
                sums[i][j] = PAIRS<F> ? dot_pairs(sums[i][j], x, w[j]) : sums[i][j] + (vf)x * (vf)w[j];
            });
        });
    }
    unrolled<M>([&](auto i) INLINE {
        unrolled<TILE_VECTORS>([&](auto j) INLINE { store(c + (int64_t)i * ldc + j * WIDTH, sums[i][j]); });
    });
}

// tile for m <= M rows.
template <Format F, int M>
inline void tile_of_rows(int m, const uint32_t* a, int lda, const uint32_t* b, int words, float* c, int ldc, bool add) {
    if constexpr (M > 0) {
        if (m == M) return tile<F, M>(a, lda, b, words, c, ldc, add);
        tile_of_rows<F, M - 1>(m, a, lda, b, words, c, ldc, add);
    }
}

// Copies elements [p0, p0 + k) of x [rows][n] as words to `to`, row by row; zeros beyond n. k is a multiple
// of STEP.
template <Format F>
void block_of_rows(const void* x, int rows, int n, int p0, int k, uint32_t* to) {
    constexpr int AT_ONCE = WIDTH * PER_WORD<F>;
    for (int r = 0; r < rows; r++) {
        const uint8_t* row = address<F>(x, (int64_t)r * n);
        for (int p = p0; p < p0 + k; p += AT_ONCE, to += WIDTH) {
            if (p >= n)
                store_as(to, vu{});
            else if constexpr (PAIRS<F>)
                store_as(to, words_at<F>(row, p, n));
            else
                store_as(to, get<F>(row, p, n));
        }
    }
}

// Transposes elements [p0, p0 + k) of `rows` <= PANEL rows of w, [rows][n], to words [k / PER_WORD][PANEL];
// zeros beyond n and beyond `rows`.
template <Format F>
void pack_panel(const uint8_t* w, int rows, int n, int p0, int k, uint32_t* to) {
    for (int j = 0; j < PANEL; j += WIDTH)
        for (int p = 0; p < k; p += STEP<F>) {
            vu r[WIDTH];
            for (int l = 0; l < WIDTH; l++)
                r[l] = j + l < rows && p0 + p < n ? words_at<F>(address<F>(w, (int64_t)(j + l) * n), p0 + p, n) : vu{};
            transpose(r);
            uint32_t* out = to + p / PER_WORD<F> * PANEL + j;
            for (int l = 0; l < WIDTH; l++) {
                if constexpr (PAIRS<F> || F == Format::f32) {
                    store_as(out + l * PANEL, r[l]);
                } else {
                    store_as(out + 2 * l * PANEL, even(r[l]));
                    store_as(out + (2 * l + 1) * PANEL, odd(r[l]));
                }
            }
        }
}

// Prefetches elements [p0, p0 + k) of rows [j0, j1) of w.
template <Format F>
inline void fetch(const Linear& w, int j0, int j1, int p0, int k) {
    const bool packed = w.storage != Storage::plain;
    const int64_t row_bytes = packed ? packed_row_bytes(w.storage, w.in) : w.in * size_of(F);
    const int64_t begin = p0 * row_bytes / w.in, bytes = std::min(k, w.in - p0) * row_bytes / w.in;
    for (int j = j0; j < j1; j++) {
        // Packed rows that lie together are prefetched in equal parts.
        const int slot = packed ? j % PACKED_ROWS_TOGETHER : 0;
        const int64_t from =
            packed ? (j - slot) * row_bytes + PACKED_ROWS_TOGETHER * begin + slot * bytes : j * row_bytes + begin;
        for (int64_t b = 0; b < bytes; b += 64)
            __builtin_prefetch(static_cast<const uint8_t*>(w.rows) + from + b, 0, 2);
    }
}

// pack_panel of rows [row, row + rows) of any w. `memory` holds PANEL * PACKED_GROUP bfloat16. p0 is a multiple of
// PACKED_GROUP, and k at most that, if w is packed.
template <Format F>
void panel_of(const Linear& w, int row, int rows, int p0, int k, uint32_t* to, uint32_t* memory) {
    if (w.storage == Storage::plain)
        return pack_panel<F>(address<F>(w.rows, (int64_t)row * w.in), rows, w.in, p0, k, to);
    if constexpr (F == Format::bf16) {
        uint16_t* unpacked = reinterpret_cast<uint16_t*>(memory);
        const int n = std::min(k, w.in - p0);
        for (int j = 0; j < rows; j++) unpack_row(w, row + j, p0, n, unpacked + (int64_t)j * n);
        pack_panel<F>(reinterpret_cast<const uint8_t*>(unpacked), rows, n, 0, k, to);
    }
}

// Words of scratch memory that many_rows needs behind c.
inline int64_t many_rows_words(int rows) {
    return (int64_t)(rows + PANEL) * std::max(BLOCK_WORDS + WIDTH, PACKED_GROUP) + PANEL * PACKED_GROUP / 2;
}

// c[m][i][j] = x_i . (row col + j of matrix m), for i < rows, j < cols.
//   x    [rows][in], in format F
//   w    [matrices], all with the same `in`
//   c    float32 [matrices][rows][ldc], with many_rows_words(rows) words of scratch memory behind it
template <Format F>
void many_rows(const void* x, int rows, const Linear* const* w, int matrices, int col, int cols, float* c, int ldc) {
    constexpr int BLOCK_IN = BLOCK_WORDS * PER_WORD<F>;
    const int in = w[0]->in;
    const int blocks = (in + BLOCK_IN - 1) / BLOCK_IN;
    const bool packed = std::any_of(w, w + matrices, [](const Linear* m) { return m->storage != Storage::plain; });
    const int most = packed ? PACKED_GROUP : round_up((in + blocks - 1) / blocks, STEP<F>);
    uint32_t* a = reinterpret_cast<uint32_t*>(c + (int64_t)matrices * rows * ldc);
    uint32_t* b = a + (int64_t)rows * (most / PER_WORD<F>);
    uint32_t* memory = b + (int64_t)PANEL * (most / PER_WORD<F>);
    const int panels = (cols + PANEL - 1) / PANEL, tiles = (rows + TILE_ROWS - 1) / TILE_ROWS;
    for (int p0 = 0; p0 < in; p0 += most) {
        const int k = std::min(most, round_up(in - p0, STEP<F>)), words = k / PER_WORD<F>;
        block_of_rows<F>(x, rows, in, p0, k, a);
        for (int m = 0; m < matrices; m++)
            for (int panel = 0; panel < panels; panel++) {
                const int j = panel * PANEL;
                panel_of<F>(*w[m], col + j, std::min(PANEL, cols - j), p0, k, b, memory);
                const int next = std::min(PANEL, cols - j - PANEL);
                float* to = c + (int64_t)m * rows * ldc + j;
                for (int t = 0; t < tiles; t++) {
                    const int i = t * TILE_ROWS, ahead = col + j + PANEL;
                    if (next > 0) fetch<F>(*w[m], ahead + t * next / tiles, ahead + (t + 1) * next / tiles, p0, k);
                    tile_of_rows<F, TILE_ROWS>(std::min(TILE_ROWS, rows - i), a + (int64_t)i * words, words, b, words,
                                               to + (int64_t)i * ldc, ldc, p0 > 0);
                }
            }
    }
}

}  // namespace dense_ops
}  // namespace ISA
}  // namespace farshore

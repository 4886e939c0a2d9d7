// x W^T on several threads. Included by simd/isa_kernels.h after few_rows.h and many_rows.h.

namespace farshore {
namespace ISA {
namespace dense_ops {

// A unit's part of a product: rows [row, row + rows) and columns [col, col + cols). c[matrix]: float32
// [rows][ld].
struct SumBlock {
    int row, rows, col, cols;
    const float* c[2];
    int ld;
};

// How a product is divided into units: blocks of rows times blocks of columns.
struct UnitGrid {
    int row_blocks, block_rows, cols;
    int col_blocks(int n) const { return (n + cols - 1) / cols; }
    int units(int n) const { return row_blocks * col_blocks(n); }
};

// The grid for `rows` rows and n columns, if a unit multiplies the same columns of `matrices` matrices.
inline UnitGrid unit_grid(int rows, int n, int matrices, int threads) {
    if (rows <= FEW_ROWS)
        return {1, rows, std::min(42 * COLUMNS, round_up((n + 4 * threads - 1) / (4 * threads), COLUMNS))};
    UnitGrid grid;
    grid.row_blocks = (rows + BLOCK_ROWS - 1) / BLOCK_ROWS;
    grid.block_rows = round_up((rows + grid.row_blocks - 1) / grid.row_blocks, TILE_ROWS);
    grid.row_blocks = (rows + grid.block_rows - 1) / grid.block_rows;
    grid.cols = std::min(BLOCK_OUT[matrices - 1], round_up((n + threads - 1) / threads, PANEL));
    return grid;
}

// x [rows][in] and, for few_rows, its spread form, in the thread's scratch memory 1.
template <Format F>
struct InputRows {
    const void* x;
    int rows, in;
    const float* spread_rows = nullptr;

    InputRows(const void* x, int rows, int in) : x(x), rows(rows), in(in) {
        if (rows > FEW_ROWS) return;
        float* to = static_cast<float*>(scratch(4L * rows * padded(in), 1));
        spread<F>(x, rows, in, to);
        spread_rows = to;
    }
};

// Computes one unit and calls use(sums).
template <Format F, int MATRICES, class Use>
void run_unit(const InputRows<F>& x, const Linear* const (&w)[MATRICES], const UnitGrid& grid, int unit, Use&& use) {
    SumBlock sums;
    sums.row = unit % grid.row_blocks * grid.block_rows;
    sums.rows = std::min(grid.block_rows, x.rows - sums.row);
    sums.col = unit / grid.row_blocks * grid.cols;
    sums.cols = std::min(grid.cols, w[0]->out - sums.col);
    const int ld = sums.ld = round_up(grid.cols, PANEL);
    int64_t more = 0;
    if (!x.spread_rows)
        more = many_rows_words(sums.rows);
    else
        for (const Linear* matrix : w) more = std::max(more, few_rows_words(*matrix));
    float* c = static_cast<float*>(scratch(4L * ((int64_t)MATRICES * sums.rows * ld + more)));
    for (int m = 0; m < MATRICES; m++) sums.c[m] = c + (int64_t)m * sums.rows * ld;
    if (!x.spread_rows)
        many_rows<F>(address<F>(x.x, (int64_t)sums.row * x.in), sums.rows, w, MATRICES, sums.col, sums.cols, c, ld);
    else
        for (int m = 0; m < MATRICES; m++)
            few_rows<F>(x.spread_rows, x.rows, *w[m], sums.col, sums.cols, c + (int64_t)m * x.rows * ld, ld,
                        c + (int64_t)MATRICES * x.rows * ld);
    use(sums);
}

// x [rows][in] by one or two matrices of the same shape. Calls use(SumBlock) once for each unit, on any
// thread.
template <Format F, int MATRICES, class Use>
void product(const void* x, int rows, const Linear* const (&w)[MATRICES], int threads, Use&& use) {
    const InputRows<F> input(x, rows, w[0]->in);
    const UnitGrid grid = unit_grid(rows, w[0]->out, MATRICES, threads);
    parallel_for(grid.units(w[0]->out), threads, [&](int unit) { run_unit<F>(input, w, grid, unit, use); });
}

// x [rows][in] by three matrices with the same `in`. Calls use(matrix, SumBlock) once for each unit, on any
// thread.
template <Format F, class Use>
void products(const void* x, int rows, const Linear* const (&w)[3], int threads, Use&& use) {
    const InputRows<F> input(x, rows, w[0]->in);
    const UnitGrid grid = unit_grid(rows, w[0]->out + w[1]->out + w[2]->out, 1, threads);
    int first[4] = {};
    for (int m = 0; m < 3; m++) first[m + 1] = first[m] + grid.units(w[m]->out);
    parallel_for(first[3], threads, [&](int unit) {
        const int m = unit >= first[2] ? 2 : unit >= first[1] ? 1 : 0;
        run_unit<F>(input, {w[m]}, grid, unit - first[m], [&](const SumBlock& sums) { use(m, sums); });
    });
}

}  // namespace dense_ops
}  // namespace ISA
}  // namespace farshore

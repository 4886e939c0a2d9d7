// x W^T, in parts for the threads. Included after dense_few.h and dense_many.h.

namespace farshore {
namespace ISA {
namespace slices {

// Sums of rows [row, row + rows) and columns [col, col + cols): c[matrix] is [rows][ld].
struct Sums {
    int row, rows, col, cols;
    const float* c[2];
    int ld;
};

// How a product is cut into units.
struct Cut {
    int row_blocks, block_rows, cols;
    int col_blocks(int n) const { return (n + cols - 1) / cols; }
    int units(int n) const { return row_blocks * col_blocks(n); }
};

// For n columns in all, `matrices` of which are multiplied in one unit.
inline Cut cut_for(int rows, int n, int matrices, int threads) {
    if (rows <= FEW_ROWS) return {1, rows, std::min(42 * COLUMNS, round_up((n + 4 * threads - 1) / (4 * threads), COLUMNS))};
    Cut cut;
    cut.row_blocks = (rows + BLOCK_ROWS - 1) / BLOCK_ROWS;
    cut.block_rows = round_up((rows + cut.row_blocks - 1) / cut.row_blocks, TILE_ROWS);
    cut.row_blocks = (rows + cut.block_rows - 1) / cut.block_rows;
    cut.cols = std::min(BLOCK_OUT[matrices - 1], round_up((n + threads - 1) / threads, PANEL));
    return cut;
}

// Rows of x as the units take them.
template <Format F>
struct Rows {
    const void* x;
    int rows, in;
    const float* few = nullptr;

    Rows(const void* x, int rows, int in) : x(x), rows(rows), in(in) {
        if (rows > FEW_ROWS) return;
        float* to = static_cast<float*>(scratch(4L * rows * padded(in), 1));
        spread<F>(x, rows, in, to);
        few = to;
    }
};

template <Format F, int MATRICES, class Use>
void run_unit(const Rows<F>& x, const Linear* const (&w)[MATRICES], const Cut& cut, int unit, Use&& use) {
    Sums sums;
    sums.row = unit % cut.row_blocks * cut.block_rows;
    sums.rows = std::min(cut.block_rows, x.rows - sums.row);
    sums.col = unit / cut.row_blocks * cut.cols;
    sums.cols = std::min(cut.cols, w[0]->out - sums.col);
    const int ld = sums.ld = round_up(cut.cols, PANEL);
    const int64_t more = x.few ? 0 : many_rows_words(sums.rows);
    float* c = static_cast<float*>(scratch(4L * ((int64_t)MATRICES * sums.rows * ld + more)));
    for (int m = 0; m < MATRICES; m++) sums.c[m] = c + (int64_t)m * sums.rows * ld;
    if (!x.few)
        many_rows<F>(at<F>(x.x, (int64_t)sums.row * x.in), sums.rows, w, MATRICES, sums.col, sums.cols, c, ld);
    else
        for (int m = 0; m < MATRICES; m++)
            few_rows<F>(x.few, x.rows, *w[m], sums.col, sums.cols, c + (int64_t)m * x.rows * ld, ld);
    use(sums);
}

// x [rows][in] by one or two matrices of one shape; `use` gets every part of the sums once, on some thread.
template <Format F, int MATRICES, class Use>
void product(const void* x, int rows, const Linear* const (&w)[MATRICES], int threads, Use&& use) {
    const Rows<F> of(x, rows, w[0]->in);
    const Cut cut = cut_for(rows, w[0]->out, MATRICES, threads);
    parallel_for(cut.units(w[0]->out), threads, [&](int unit) { run_unit<F>(of, w, cut, unit, use); });
}

// x by three matrices, each for itself; `use` is told which.
template <Format F, class Use>
void products(const void* x, int rows, const Linear* const (&w)[3], int threads, Use&& use) {
    const Rows<F> of(x, rows, w[0]->in);
    const Cut cut = cut_for(rows, w[0]->out + w[1]->out + w[2]->out, 1, threads);
    int first[4] = {};
    for (int m = 0; m < 3; m++) first[m + 1] = first[m] + cut.units(w[m]->out);
    parallel_for(first[3], threads, [&](int unit) {
        const int m = unit >= first[2] ? 2 : unit >= first[1] ? 1 : 0;
        run_unit<F>(of, {w[m]}, cut, unit - first[m], [&](const Sums& sums) { use(m, sums); });
    });
}

}  // namespace slices
}  // namespace ISA
}  // namespace farshore

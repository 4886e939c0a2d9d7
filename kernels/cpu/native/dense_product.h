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

// x [rows][in] by one or two matrices of one shape; `use` gets every part of the sums once, on some thread.
template <Format F, int MATRICES, class Use>
void product(const void* x, int rows, const Linear* const (&w)[MATRICES], int threads, Use&& use) {
    const int in = w[0]->in, n = w[0]->out;
    const bool few = rows <= FEW_ROWS;
    Factor<F>* spread_x = nullptr;
    const int ldx = round_up(in, PADDED);
    int row_blocks = 1, block_rows = rows, cols;
    if (few) {
        spread_x = static_cast<Factor<F>*>(scratch((long)sizeof(Factor<F>) * rows * ldx, 1));
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
        const int64_t more = few ? 0 : many_rows_words(sums.rows);
        float* c = static_cast<float*>(scratch(4L * ((int64_t)MATRICES * sums.rows * ldc + more)));
        for (int m = 0; m < MATRICES; m++) sums.c[m] = c + (int64_t)m * sums.rows * ldc;
        if (!few)
            many_rows<F>(at<F>(x, (int64_t)sums.row * in), sums.rows, w, MATRICES, sums.col, sums.cols, c, ldc);
        else
            for (int m = 0; m < MATRICES; m++)
                few_rows<F>(spread_x, ldx, rows, *w[m], sums.col, sums.cols, c + (int64_t)m * rows * ldc, ldc);
        use(sums);
    });
}

}  // namespace slices
}  // namespace ISA
}  // namespace farshore

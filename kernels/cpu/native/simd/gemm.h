// C[m][n] (+)= A[m][k] B[k][n] on packed operands; every dimension but m is padded to its multiple. lda in
// elements, ldb and ldc in columns. Included after pack.h.

namespace farshore {
namespace ISA {

// Registers: ROWS x COLS accumulators, COLS vectors of B, and A by broadcast from memory.
constexpr int GEMM_ROWS = 6, GEMM_COLS = 4;

template <int ROWS, int COLS>
inline void block(Pairs, const uint16_t* a, int lda, const uint16_t* b, int ldb, float* c, int ldc, int k,
                  bool add, Prefetch& next) {
    const uint32_t* words = reinterpret_cast<const uint32_t*>(b);
    vf acc[ROWS][COLS];
    for (int i = 0; i < ROWS; i++)
        for (int j = 0; j < COLS; j++) acc[i][j] = add ? load(c + i * ldc + j * WIDTH) : vf{};
    for (int p = 0; p < k / 2; p++) {
        __m512bh bv[COLS];
        for (int j = 0; j < COLS; j++) bv[j] = load_as<__m512bh>(words + p * ldb + j * WIDTH);
        for (int i = 0; i < ROWS; i++) {
            int32_t pair;
            std::memcpy(&pair, a + i * lda + 2 * p, 4);
            const __m512bh av = (__m512bh)_mm512_set1_epi32(pair);
            for (int j = 0; j < COLS; j++) acc[i][j] = (vf)_mm512_dpbf16_ps((__m512)acc[i][j], av, bv[j]);
        }
        next.tick(1);
    }
    for (int i = 0; i < ROWS; i++)
        for (int j = 0; j < COLS; j++) store(c + i * ldc + j * WIDTH, acc[i][j]);
}

template <class Math, int ROWS>
inline void rows_of(const typename Math::Element* a, int lda, const typename Math::Element* b, int ldb, float* c,
                    int ldc, int n, int k, bool add, Prefetch& next) {
    constexpr int PER_COLUMN = 4 / Math::element_bytes;  // elements of B under one column
    int j = 0;
    for (; j + GEMM_COLS * WIDTH <= n; j += GEMM_COLS * WIDTH)
        block<ROWS, GEMM_COLS>(Math{}, a, lda, b + j * PER_COLUMN, ldb, c + j, ldc, k, add, next);
    for (; j < n; j += WIDTH) block<ROWS, 1>(Math{}, a, lda, b + j * PER_COLUMN, ldb, c + j, ldc, k, add, next);
}

template <class Math>
inline void gemm(const typename Math::Element* a, int lda, const typename Math::Element* b, int ldb, float* c,
                 int ldc, int m, int n, int k, bool add, Prefetch& next) {
    int i = 0;
    for (; i + GEMM_ROWS <= m; i += GEMM_ROWS)
        rows_of<Math, GEMM_ROWS>(a + i * lda, lda, b, ldb, c + i * ldc, ldc, n, k, add, next);
    a += i * lda;
    c += i * ldc;
    switch (m - i) {
        case 1: return rows_of<Math, 1>(a, lda, b, ldb, c, ldc, n, k, add, next);
        case 2: return rows_of<Math, 2>(a, lda, b, ldb, c, ldc, n, k, add, next);
        case 3: return rows_of<Math, 3>(a, lda, b, ldb, c, ldc, n, k, add, next);
        case 4: return rows_of<Math, 4>(a, lda, b, ldb, c, ldc, n, k, add, next);
        case 5: return rows_of<Math, 5>(a, lda, b, ldb, c, ldc, n, k, add, next);
    }
}

}  // namespace ISA
}  // namespace farshore

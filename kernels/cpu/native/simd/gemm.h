// C[m][n] (+)= A[m][k] B[k][n] with bfloat16 operands and float32 sums. Included by simd/isa_kernels.h after
// pack.h.
//   a    bfloat16 [m][lda]
//   b    packed by pack.h: words [k / 2][ldb], word (p, j) holding rows 2p and 2p + 1 of column j
//   c    float32 [m][ldc]
//   n, k are multiples of Products::STEP; lda counts elements, ldb and ldc columns.
//   add  adds to C; otherwise overwrites it

namespace farshore {
namespace ISA {

// The block of C that lives in registers, in rows x vectors. GEMM_COLS vectors of B, and A broadcast from
// memory, fit beside it into 32 registers.
constexpr int GEMM_ROWS = 6, GEMM_COLS = 4;

template <int ROWS, int COLS>
inline void gemm_block(Bf16Pairs, const uint16_t* a, int lda, const uint16_t* b, int ldb, float* c, int ldc, int k,
                       bool add, Prefetch& prefetch) {
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
        prefetch.tick(1);
    }
    for (int i = 0; i < ROWS; i++)
        for (int j = 0; j < COLS; j++) store(c + i * ldc + j * WIDTH, acc[i][j]);
}

template <class Products, int ROWS>
inline void gemm_rows(const typename Products::Element* a, int lda, const typename Products::Element* b, int ldb,
                      float* c, int ldc, int n, int k, bool add, Prefetch& prefetch) {
    constexpr int PER_COLUMN = 4 / Products::element_bytes;  // elements of B in one column of words
    int j = 0;
    for (; j + GEMM_COLS * WIDTH <= n; j += GEMM_COLS * WIDTH)
        gemm_block<ROWS, GEMM_COLS>(Products{}, a, lda, b + j * PER_COLUMN, ldb, c + j, ldc, k, add, prefetch);
    for (; j < n; j += WIDTH)
        gemm_block<ROWS, 1>(Products{}, a, lda, b + j * PER_COLUMN, ldb, c + j, ldc, k, add, prefetch);
}

template <class Products>
inline void gemm(const typename Products::Element* a, int lda, const typename Products::Element* b, int ldb, float* c,
                 int ldc, int m, int n, int k, bool add, Prefetch& prefetch) {
    int i = 0;
    for (; i + GEMM_ROWS <= m; i += GEMM_ROWS)
        gemm_rows<Products, GEMM_ROWS>(a + i * lda, lda, b, ldb, c + i * ldc, ldc, n, k, add, prefetch);
    a += i * lda;
    c += i * ldc;
    switch (m - i) {
        case 1: return gemm_rows<Products, 1>(a, lda, b, ldb, c, ldc, n, k, add, prefetch);
        case 2: return gemm_rows<Products, 2>(a, lda, b, ldb, c, ldc, n, k, add, prefetch);
        case 3: return gemm_rows<Products, 3>(a, lda, b, ldb, c, ldc, n, k, add, prefetch);
        case 4: return gemm_rows<Products, 4>(a, lda, b, ldb, c, ldc, n, k, add, prefetch);
        case 5: return gemm_rows<Products, 5>(a, lda, b, ldb, c, ldc, n, k, add, prefetch);
    }
}

}  // namespace ISA
}  // namespace farshore

// Matrix products on AMX tiles: the operands of Pairs, 16 x 32 or 32 x 32 of C at a time. Rows of C beyond m are computed and
// stored too: C has room for m rounded up to 16. Included after gemm.h.
#if defined(HAS_AMX)

namespace farshore {
namespace ISA {

struct alignas(64) TileConfig {
    uint8_t palette, start_row, reserved[14];
    uint16_t row_bytes[16];
    uint8_t rows[16];
};
const TileConfig config{
    1, 0, {}, {64, 64, 64, 64, 64, 64, 64, 64}, {16, 16, 16, 16, 16, 16, 16, 16}};

struct Tiles : Pairs {
    // Few queries: K's rows are used where they lie, as the left operand; see scores.
    static bool by_rows(int queries, const Shape&) { return queries <= 16; }

    // Every tile is 16 rows of 64 bytes, for as long as this lives. The configuration is static because the
    // compiler takes _tile_loadconfig to read 8 of its 64 bytes.
    struct Session {
        Session() { _tile_loadconfig(&config); }
        ~Session() { _tile_release(); }
        Session(const Session&) = delete;
        Session& operator=(const Session&) = delete;
    };

    // Row-major bfloat16 rows of K for scores, where they lie if that will do,
    // else converted into `dst` [n rounded up to 32][k_pad]. Returns the rows and sets their stride in bytes.
    template <Format F>
    static const uint8_t* rows_k(uint16_t* dst, const uint8_t* k, int64_t* stride, int n, int dim, int k_pad) {
        if (F == Format::bf16 && dim == k_pad && n % 32 == 0) return k;
        const int n_rows = round_up(n, 32);
        for (int t = 0; t < n_rows; t++) {
            for (int i = 0; i < k_pad; i += 32)
                store_as(dst + t * k_pad + i, t < n ? words<F>(k + t * *stride, i, dim) : vu{});
        }
        *stride = 2 * k_pad;
        return reinterpret_cast<const uint8_t*>(dst);
    }

    // logits[i][t] of up to 16 queries, k elements from `rows` on; q: [k / 2][16] words.
    static void scores(const uint16_t* q, const uint8_t* rows, int64_t stride, int n, int queries, float* logits,
                       int ld, int k) {
        alignas(64) float c[4][256];
        for (int t = 0; t < n; t += 64) {
            const int left = n - t;
            const uint8_t* a = rows + t * stride;
            _tile_zero(0);
            _tile_zero(1);
            _tile_zero(2);
            _tile_zero(3);
            for (int p = 0; p < k; p += 32) {
                _tile_loadd(4, q + p * 16, 64);
                _tile_loadd(5, a + 2 * p, stride);
                _tile_dpbf16ps(0, 5, 4);
                if (left > 16) {
                    _tile_loadd(6, a + 16 * stride + 2 * p, stride);
                    _tile_dpbf16ps(1, 6, 4);
                }
                if (left > 32) {
                    _tile_loadd(7, a + 32 * stride + 2 * p, stride);
                    _tile_dpbf16ps(2, 7, 4);
                }
                if (left > 48) {
                    _tile_loadd(5, a + 48 * stride + 2 * p, stride);
                    _tile_dpbf16ps(3, 5, 4);
                }

            }
            _tile_stored(0, c[0], 64);
            if (left > 16) _tile_stored(1, c[1], 64);
            if (left > 32) _tile_stored(2, c[2], 64);
            if (left > 48) _tile_stored(3, c[3], 64);
            for (int j = 0; j < 4 && 16 * j < left; j++) {
                vu r[WIDTH];
                for (int l = 0; l < WIDTH; l++) r[l] = load_as<vu>(c[j] + 16 * l);
                transpose(r);

                for (int i = 0; i < queries; i++) store_as(logits + i * ld + t + 16 * j, r[i]);
            }
        }
    }
};

// C [up to 16][n], n a multiple of 32.
inline void gemm_low(const uint16_t* a, long a_stride, const uint32_t* b, long ldb, float* c, long c_stride, int n,
                     int k, bool add, Prefetch& next) {
    for (int j = 0; j < n; j += 32, c += 32) {
        if (add) {
            _tile_loadd(0, c, c_stride);
            _tile_loadd(1, c + 16, c_stride);
        } else {
            _tile_zero(0);
            _tile_zero(1);
        }
        for (int p = 0; p < k; p += 32) {
            const uint32_t* b0 = b + p / 2 * ldb + j;
            _tile_loadd(4, a + p, a_stride);
            _tile_loadd(6, b0, 4 * ldb);
            _tile_dpbf16ps(0, 4, 6);
            _tile_loadd(7, b0 + 16, 4 * ldb);
            _tile_dpbf16ps(1, 4, 7);
            next.tick(5);
        }
        _tile_stored(0, c, c_stride);
        _tile_stored(1, c + 16, c_stride);
    }
}

// C [32][n]: two rows of tiles by two columns.
inline void gemm_high(const uint16_t* a, long lda, const uint32_t* b, long ldb, float* c, long ldc, int n, int k,
                      bool add) {
    const long a_stride = 2 * lda, b_stride = 4 * ldb, c_stride = 4 * ldc;
    for (int j = 0; j < n; j += 32, c += 32) {
        float* c1 = c + 16 * ldc;
        if (add) {
            _tile_loadd(0, c, c_stride);
            _tile_loadd(1, c + 16, c_stride);
            _tile_loadd(2, c1, c_stride);
            _tile_loadd(3, c1 + 16, c_stride);
        } else {
            _tile_zero(0);
            _tile_zero(1);
            _tile_zero(2);
            _tile_zero(3);
        }
        for (int p = 0; p < k; p += 32) {
            const uint32_t* b0 = b + p / 2 * ldb + j;
            _tile_loadd(4, a + p, a_stride);
            _tile_loadd(6, b0, b_stride);
            _tile_dpbf16ps(0, 4, 6);
            _tile_loadd(7, b0 + 16, b_stride);
            _tile_dpbf16ps(1, 4, 7);
            _tile_loadd(5, a + 16 * lda + p, a_stride);
            _tile_dpbf16ps(2, 5, 6);
            _tile_dpbf16ps(3, 5, 7);
        }
        _tile_stored(0, c, c_stride);
        _tile_stored(1, c + 16, c_stride);
        _tile_stored(2, c1, c_stride);
        _tile_stored(3, c1 + 16, c_stride);
    }
}

template <>
inline void gemm<Tiles>(const uint16_t* a, int lda, const uint16_t* b, int ldb, float* c, int ldc, int m, int n,
                        int k, bool add, Prefetch& next) {
    const uint32_t* words = reinterpret_cast<const uint32_t*>(b);
    int i = 0;
    for (; m - i > 16; i += 32) gemm_high(a + (long)i * lda, lda, words, ldb, c + (long)i * ldc, ldc, n, k, add);
    if (i < m)
        gemm_low(a + (long)i * lda, 2L * lda, words, ldb, c + (long)i * ldc, 4L * ldc, n, k, add, next);
}

}  // namespace ISA
}  // namespace farshore
#endif

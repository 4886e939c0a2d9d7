// Matrix products with AMX tiles, on the operands that Bf16Pairs packs. Included by simd/isa_kernels.h after
// gemm.h.
//
// A product computes 16 x 32 or 32 x 32 elements of C at a time. Rows of C beyond m are computed and stored
// too: A and C must have room for m rounded up to 16 rows.
#if defined(HAS_AMX)

namespace farshore {
namespace ISA {

// The operand of LDTILECFG: palette 1, eight tiles of 16 rows x 64 bytes.
struct alignas(64) TileConfig {
    uint8_t palette, start_row, reserved[14];
    uint16_t row_bytes[16];
    uint8_t rows[16];
};
const TileConfig config{1, 0, {}, {64, 64, 64, 64, 64, 64, 64, 64}, {16, 16, 16, 16, 16, 16, 16, 16}};

struct AmxTiles : Bf16Pairs {
    // Up to 16 queries fill one tile, so K's rows can be the left operand as they lie, and packing K is
    // saved.
    static bool uses_k_rows(int queries, const Shape&) { return queries <= 16; }

    // Configures the thread's tiles while it lives. `config` is a static constant because gcc assumes that
    // _tile_loadconfig reads only 8 of the 64 bytes, and would drop the stores to the others of a local one.
    struct TileScope {
        TileScope() { _tile_loadconfig(&config); }
        ~TileScope() { _tile_release(); }
        TileScope(const TileScope&) = delete;
        TileScope& operator=(const TileScope&) = delete;
    };

    // Returns K of n tokens as bfloat16 rows [n rounded up to 32][k_pad], and sets *stride, in bytes. These
    // are the stored rows if they need neither conversion nor padding; otherwise they are converted into
    // `dst`.
    template <Format F>
    static const uint8_t* k_rows_bf16(uint16_t* dst, const uint8_t* k, int64_t* stride, int n, int dim, int k_pad) {
        if (F == Format::bf16 && dim == k_pad && n % 32 == 0) return k;
        const int n_rows = round_up(n, 32);
        for (int t = 0; t < n_rows; t++) {
            for (int i = 0; i < k_pad; i += 32)
                store_as(dst + t * k_pad + i, t < n ? words<F>(k + t * *stride, i, dim) : vu{});
        }
        *stride = 2 * k_pad;
        return reinterpret_cast<const uint8_t*>(dst);
    }

    // logits[i][t] = q_i . row_t over k elements, for i < queries <= 16 and t < n.
    //   q       words [k / 2][16]: pairs of elements down, queries across
    //   rows    bfloat16, `stride` bytes apart, as k_rows_bf16 returns them
    //   logits  float32 [queries][ld]: q.k
    static void multiply_k_rows(const uint16_t* q, const uint8_t* rows, int64_t stride, int n, int queries,
                                float* logits, int ld, int k) {
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

// gemm for up to 16 rows of C. a_stride and c_stride in bytes.
inline void gemm_16_rows(const uint16_t* a, long a_stride, const uint32_t* b, long ldb, float* c, long c_stride, int n,
                         int k, bool add, Prefetch& prefetch) {
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
            prefetch.tick(5);
        }
        _tile_stored(0, c, c_stride);
        _tile_stored(1, c + 16, c_stride);
    }
}

// gemm for 17 to 32 rows of C: two rows of tiles by two columns.
inline void gemm_32_rows(const uint16_t* a, long lda, const uint32_t* b, long ldb, float* c, long ldc, int n, int k,
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
inline void gemm<AmxTiles>(const uint16_t* a, int lda, const uint16_t* b, int ldb, float* c, int ldc, int m, int n,
                           int k, bool add, Prefetch& prefetch) {
    const uint32_t* words = reinterpret_cast<const uint32_t*>(b);
    int i = 0;
    for (; m - i > 16; i += 32) gemm_32_rows(a + (long)i * lda, lda, words, ldb, c + (long)i * ldc, ldc, n, k, add);
    if (i < m) gemm_16_rows(a + (long)i * lda, 2L * lda, words, ldb, c + (long)i * ldc, 4L * ldc, n, k, add, prefetch);
}

}  // namespace ISA
}  // namespace farshore
#endif

// The dense kernels of one instruction set (DenseKernels). Included by simd/isa_kernels.h after product.h.
//
// Operations are fused with the product before them, so that its sums are still in the core's cache. Values
// are rounded operation by operation as in transformers' LlamaForCausalLM.

namespace farshore {
namespace ISA {
namespace dense_ops {

// Rows that a thread takes at a time in operations that are not products.
constexpr int ROWS_PER_UNIT = 16;

// Calls body(row) for each row, on any thread.
template <class Body>
void over_rows(int rows, int threads, Body&& body) {
    parallel_for((rows + ROWS_PER_UNIT - 1) / ROWS_PER_UNIT, threads, [&](int unit) {
        for (int r = unit * ROWS_PER_UNIT; r < std::min(rows, (unit + 1) * ROWS_PER_UNIT); r++) body(r);
    });
}

// RMS norm of x [rows][n]: out = x / sqrt(mean(x^2) + eps) * weight.
template <Format F>
void norm_rows(const void* weight, float eps, const void* x, int rows, int n, int threads, void* out) {
    over_rows(rows, threads, [&](int r) {
        const uint8_t* row = address<F>(x, (int64_t)r * n);
        uint8_t* to = address<F>(out, (int64_t)r * n);
        vf squares{};
        for (int i = 0; i < n; i += WIDTH) {
            const vf v = get<F>(row, i, n);
            squares += v * v;
        }
        const float scale = 1.0f / std::sqrt(lane_sum(squares) / n + eps);
        for (int i = 0; i < n; i += WIDTH)
            put<F>(to, i, n, rounded<F>(get<F>(row, i, n) * scale) * get<F>(weight, i, n));
    });
}

// Rotary embedding of x [rows][heads * head_dim], in place. Element i of a head's first half is paired with
// element i of its second half.
template <Format F>
void rotate(const DecoderLayer& d, void* x, int rows, int heads, const int64_t* positions) {
    const int half = d.head_dim / 2;
    over_rows(rows, d.threads, [&](int r) {
        const uint8_t* cos = address<F>(d.cos, positions[r] * half);
        const uint8_t* sin = address<F>(d.sin, positions[r] * half);
        for (int head = 0; head < heads; head++) {
            uint8_t* first = address<F>(x, ((int64_t)r * heads + head) * d.head_dim);
            uint8_t* second = address<F>(first, half);
            for (int i = 0; i < half; i += WIDTH) {
                const vf a = get<F>(first, i, half), b = get<F>(second, i, half);
                const vf c = get<F>(cos, i, half), s = get<F>(sin, i, half);
                put<F>(first, i, half, rounded<F>(a * c) - rounded<F>(b * s));
                put<F>(second, i, half, rounded<F>(b * c) + rounded<F>(a * s));
            }
        }
    });
}

// Elements [i, i + WIDTH) of a row of a product: sum plus bias, rounded. row and i count from the SumBlock's
// first.
template <Format F>
inline vf value(const SumBlock& sums, const Linear& w, int matrix, int row, int i) {
    vf x = load(sums.c[matrix] + (int64_t)row * sums.ld + i);
    if (w.bias) x += get<F>(address<F>(w.bias, sums.col), i, sums.cols);
    return rounded<F>(x);
}

// Stores element(row, i), a vector, as the SumBlock's part of out [rows][n].
template <Format F, class Value>
void put_sums(const SumBlock& sums, void* out, int n, Value&& element) {
    for (int r = 0; r < sums.rows; r++) {
        uint8_t* to = address<F>(out, (int64_t)(sums.row + r) * n + sums.col);
        for (int i = 0; i < sums.cols; i += WIDTH) put<F>(to, i, sums.cols, element(r, i));
    }
}

template <Format F>
void query_of(const DecoderLayer& d, const void* x, int rows, const int64_t* positions, void* q) {
    product<F>(x, rows, {&d.q}, d.threads, [&](const SumBlock& sums) {
        put_sums<F>(sums, q, d.q.out, [&](int r, int i) { return value<F>(sums, d.q, 0, r, i); });
    });
    rotate<F>(d, q, rows, d.q.out / d.head_dim, positions);
}

template <Format F>
void key_value_of(const DecoderLayer& d, const void* x, int rows, const int64_t* positions, void* k, void* v) {
    product<F>(x, rows, {&d.k, &d.v}, d.threads, [&](const SumBlock& sums) {
        put_sums<F>(sums, k, d.k.out, [&](int r, int i) { return value<F>(sums, d.k, 0, r, i); });
        put_sums<F>(sums, v, d.v.out, [&](int r, int i) { return value<F>(sums, d.v, 1, r, i); });
    });
    rotate<F>(d, k, rows, d.k.out / d.head_dim, positions);
}

template <Format F>
void project_of(const DecoderLayer& d, const void* h, int rows, const int64_t* positions, void* q, void* k, void* v) {
    void* normed = scratch(size_of(F) * rows * d.q.in, 2);
    norm_rows<F>(d.attention_norm, d.eps, h, rows, d.q.in, d.threads, normed);
    const Linear* const w[] = {&d.q, &d.k, &d.v};
    void* const out[] = {q, k, v};
    products<F>(normed, rows, w, d.threads, [&](int m, const SumBlock& sums) {
        put_sums<F>(sums, out[m], w[m]->out, [&](int r, int i) { return value<F>(sums, *w[m], 0, r, i); });
    });
    rotate<F>(d, q, rows, d.q.out / d.head_dim, positions);
    rotate<F>(d, k, rows, d.k.out / d.head_dim, positions);
}

// out = h + x W^T. Rounds the product and the sum, as PyTorch does.
template <Format F>
void add_product(const Linear& w, const void* x, const void* h, int rows, int threads, void* out) {
    product<F>(x, rows, {&w}, threads, [&](const SumBlock& sums) {
        put_sums<F>(sums, out, w.out, [&](int r, int i) {
            const uint8_t* row = address<F>(h, (int64_t)(sums.row + r) * w.out + sums.col);
            return get<F>(row, i, sums.cols) + value<F>(sums, w, 0, r, i);
        });
    });
}

template <Format F>
void finish_of(const DecoderLayer& d, const void* h, const void* o, int rows, void* out) {
    const int hidden = d.o.out, inner = d.gate.out;
    uint8_t* after = static_cast<uint8_t*>(scratch(size_of(F) * rows * (2L * hidden + inner), 2));
    uint8_t* normed = address<F>(after, (int64_t)rows * hidden);
    uint8_t* gated = address<F>(normed, (int64_t)rows * hidden);
    add_product<F>(d.o, o, h, rows, d.threads, after);
    norm_rows<F>(d.mlp_norm, d.eps, after, rows, hidden, d.threads, normed);
    product<F>(normed, rows, {&d.gate, &d.up}, d.threads, [&](const SumBlock& sums) {
        put_sums<F>(sums, gated, inner, [&](int r, int i) {
            return rounded<F>(silu(value<F>(sums, d.gate, 0, r, i))) * value<F>(sums, d.up, 1, r, i);
        });
    });
    add_product<F>(d.down, gated, after, rows, d.threads, out);
}

template <Format F>
void logits_of(const LmHead& head, const void* h, int rows, float* out) {
    const int hidden = head.vocabulary.in;
    void* normed = scratch(size_of(F) * rows * hidden, 2);
    norm_rows<F>(head.norm, head.eps, h, rows, hidden, head.threads, normed);
    product<F>(normed, rows, {&head.vocabulary}, head.threads, [&](const SumBlock& sums) {
        put_sums<Format::f32>(sums, out, head.vocabulary.out,
                              [&](int r, int i) { return value<F>(sums, head.vocabulary, 0, r, i); });
    });
}

void input(const DecoderLayer& d, const void* x, int rows, void* out) {
    const auto norm = d.format == Format::f32 ? norm_rows<Format::f32> : norm_rows<Format::bf16>;
    norm(d.attention_norm, d.eps, x, rows, d.q.in, d.threads, out);
}
void query(const DecoderLayer& d, const void* x, int rows, const int64_t* positions, void* q) {
    (d.format == Format::f32 ? query_of<Format::f32> : query_of<Format::bf16>)(d, x, rows, positions, q);
}
void key_value(const DecoderLayer& d, const void* x, int rows, const int64_t* positions, void* k, void* v) {
    (d.format == Format::f32 ? key_value_of<Format::f32> : key_value_of<Format::bf16>)(d, x, rows, positions, k, v);
}
void project(const DecoderLayer& d, const void* h, int rows, const int64_t* positions, void* q, void* k, void* v) {
    (d.format == Format::f32 ? project_of<Format::f32> : project_of<Format::bf16>)(d, h, rows, positions, q, k, v);
}
void finish(const DecoderLayer& d, const void* h, const void* o, int rows, void* out) {
    (d.format == Format::f32 ? finish_of<Format::f32> : finish_of<Format::bf16>)(d, h, o, rows, out);
}
void logits(const LmHead& head, const void* h, int rows, float* out) {
    (head.format == Format::f32 ? logits_of<Format::f32> : logits_of<Format::bf16>)(head, h, rows, out);
}

void unpack(const Linear& matrix, const int64_t* numbers, int64_t count, int threads, uint16_t* out) {
    over_rows(count, threads,
              [&](int r) { unpack_row(matrix, numbers[r], 0, matrix.in, out + (int64_t)r * matrix.in); });
}

}  // namespace dense_ops

constexpr DenseKernels dense{dense_ops::input,  dense_ops::query,  dense_ops::key_value, dense_ops::project,
                             dense_ops::finish, dense_ops::logits, dense_ops::unpack};

}  // namespace ISA
}  // namespace farshore

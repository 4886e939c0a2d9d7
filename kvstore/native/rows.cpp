#include "rows.h"

#include <algorithm>
#include <bit>
#include <cfloat>
#include <cstring>

#include "bytes.h"
#include "runtime/float16.h"

namespace farshore::kv {
namespace {

constexpr uint32_t INFINITY_BITS = 0x7f800000;

template <class T>
T element(const uint8_t* row, int i) {
    T x;
    std::memcpy(&x, row + i * sizeof(T), sizeof x);
    return x;
}

float load(RowType type, const uint8_t* row, int i) {
    switch (type) {
        case RowType::BFLOAT16: return float_of_bfloat16(element<uint16_t>(row, i));
        case RowType::FLOAT16: return float_of_float16(element<uint16_t>(row, i));
        case RowType::FLOAT64: return static_cast<float>(element<double>(row, i));
        default: return element<float>(row, i);
    }
}

// Quantises one group of n <= SCALE_ELEMENTS elements, with the bits that kernels/formats.py gives. Returns the scale
// as bfloat16. A group with an infinity or a NaN becomes zeros with a NaN scale.
uint16_t quantise(const float* x, int n, int largest, int8_t* q) {
    uint32_t largest_bits = 0;  // as integers, magnitudes are in order, infinity and NaN above all numbers
    for (int i = 0; i < n; i++) largest_bits = std::max(largest_bits, std::bit_cast<uint32_t>(x[i]) & 0x7fffffff);
    if (largest_bits >= INFINITY_BITS) {
        std::memset(q, 0, n);
        return 0x7fc0;
    }
    const uint16_t bits = bfloat16_of_float(std::max(std::bit_cast<float>(largest_bits) / largest, 0x1p-126f));
    const float scale = float_of_bfloat16(bits);
    // |x / scale| <= 127.5: adding 1.5 * 2^23 leaves the nearest integer, ties to even, in the low bits.
    constexpr float MAGIC = 0x1.8p23f;
    for (int i = 0; i < n; i++) q[i] = static_cast<int8_t>(std::bit_cast<uint32_t>(x[i] / scale + MAGIC));
    return bits;
}

template <RowType TYPE>
void quantise_row(Format format, int dim, const uint8_t* row, uint8_t* payload, uint8_t* scales) {
    float x[SCALE_ELEMENTS];
    int8_t q[SCALE_ELEMENTS + 1];
    for (int at = 0; at < dim; at += SCALE_ELEMENTS) {
        const int n = std::min(SCALE_ELEMENTS, dim - at);
        for (int i = 0; i < n; i++) x[i] = load(TYPE, row, at + i);
        const uint16_t scale = quantise(x, n, format == Format::INT8 ? 127 : 7, q);
        std::memcpy(scales + at / SCALE_ELEMENTS * 2, &scale, 2);
        if (format == Format::INT8) {
            std::memcpy(payload + at, q, n);
            continue;
        }
        const int bytes = (n + 1) / 2;
        q[n] = 0;  // the last high nibble of an odd group
        for (int i = 0; i < bytes; i++)
            payload[at / 2 + i] = static_cast<uint8_t>((q[i] + 8) | (q[bytes + i] + 8) << 4);
    }
}

void dequantise_row(Format format, int dim, const uint8_t* payload, const uint8_t* scales, uint8_t* row) {
    float x[SCALE_ELEMENTS + 1];
    for (int at = 0; at < dim; at += SCALE_ELEMENTS) {
        const int n = std::min(SCALE_ELEMENTS, dim - at);
        const float scale = float_of_bfloat16(element<uint16_t>(scales, at / SCALE_ELEMENTS));
        if (format == Format::INT8) {
            for (int i = 0; i < n; i++) x[i] = static_cast<int8_t>(payload[at + i]) * scale;
        } else {
            const int bytes = (n + 1) / 2;
            for (int i = 0; i < bytes; i++) {
                x[i] = ((payload[at / 2 + i] & 15) - 8) * scale;
                x[bytes + i] = ((payload[at / 2 + i] >> 4) - 8) * scale;
            }
        }
        // Unlike std::clamp, this keeps a NaN, which compares false.
        for (int i = 0; i < n; i++) x[i] = x[i] > FLT_MAX ? FLT_MAX : x[i] < -FLT_MAX ? -FLT_MAX : x[i];
        std::memcpy(row + at * sizeof(float), x, n * sizeof(float));
    }
}

// Where one token's elements and scales lie in a run.
struct Slot {
    uint8_t* payload;
    uint8_t* scales;
};

Slot slot_of(const Layout& layout, const Side& side, uint8_t* run, int slot) {
    return {run + slot * side.row_bytes, run + layout.block_tokens * side.row_bytes + slot * 2 * side.scales};
}

void plain_copy(uint8_t* to, const uint8_t* from, int64_t bytes) { std::memcpy(to, from, bytes); }

}  // namespace

void write_rows(const Layout& layout, const Side& side, RowType type, const uint8_t* rows, int64_t stride, uint8_t* run,
                int slot, int count, bool stream) {
    auto quantise_with = [&](auto quantise) {
        for (int i = 0; i < count; i++) {
            const Slot to = slot_of(layout, side, run, slot + i);
            quantise(layout.format, side.dim, rows + i * stride, to.payload, to.scales);
        }
    };
    switch (type) {
        case RowType::STORED: break;
        case RowType::FLOAT32: return quantise_with(quantise_row<RowType::FLOAT32>);
        case RowType::BFLOAT16: return quantise_with(quantise_row<RowType::BFLOAT16>);
        case RowType::FLOAT16: return quantise_with(quantise_row<RowType::FLOAT16>);
        case RowType::FLOAT64: return quantise_with(quantise_row<RowType::FLOAT64>);
    }
    if (!side.scales && stride == side.row_bytes) {
        (stream ? stream_copy : plain_copy)(run + slot * side.row_bytes, rows, count * side.row_bytes);
        return;
    }
    for (int i = 0; i < count; i++) {
        const Slot to = slot_of(layout, side, run, slot + i);
        std::memcpy(to.payload, rows + i * stride, side.row_bytes);
        if (side.scales) std::memcpy(to.scales, rows + i * stride + side.row_bytes, 2 * side.scales);
    }
}

void read_rows(const Layout& layout, const Side& side, RowType type, uint8_t* rows, int64_t stride, const uint8_t* run,
               int slot, int count) {
    if (type == RowType::STORED && !side.scales && stride == side.row_bytes) {
        std::memcpy(rows, run + slot * side.row_bytes, count * side.row_bytes);
        return;
    }
    for (int i = 0; i < count; i++) {
        const Slot from = slot_of(layout, side, const_cast<uint8_t*>(run), slot + i);
        uint8_t* row = rows + i * stride;
        if (type == RowType::FLOAT32) {
            dequantise_row(layout.format, side.dim, from.payload, from.scales, row);
            continue;
        }
        std::memcpy(row, from.payload, side.row_bytes);
        if (side.scales) std::memcpy(row + side.row_bytes, from.scales, 2 * side.scales);
    }
}

}  // namespace farshore::kv

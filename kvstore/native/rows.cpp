#include "rows.h"

#include <algorithm>
#include <bit>
#include <cfloat>
#include <cstring>

#include "bulk.h"

namespace farshore::kv {
namespace {

constexpr uint32_t INFINITE = 0x7f800000;

float widen(uint16_t bfloat16) { return std::bit_cast<float>(static_cast<uint32_t>(bfloat16) << 16); }

// Of a finite number: to nearest, ties to even.
uint16_t narrow(float x) {
    const uint32_t bits = std::bit_cast<uint32_t>(x);
    return static_cast<uint16_t>((bits + 0x7fff + (bits >> 16 & 1)) >> 16);
}

float half(uint16_t x) {
    // The exponent's bias differs by 112; denormals come out normal by the same product.
    const float magnitude = std::bit_cast<float>(static_cast<uint32_t>(x & 0x7fff) << 13) * 0x1p112f;
    const uint32_t special = (x & 0x7c00) == 0x7c00 ? INFINITE : 0;
    return std::bit_cast<float>(std::bit_cast<uint32_t>(magnitude) | special | static_cast<uint32_t>(x & 0x8000) << 16);
}

template <class T>
T element(const uint8_t* row, int i) {
    T x;
    std::memcpy(&x, row + i * sizeof(T), sizeof x);
    return x;
}

float load(Type type, const uint8_t* row, int i) {
    switch (type) {
        case Type::BFLOAT16: return widen(element<uint16_t>(row, i));
        case Type::FLOAT16: return half(element<uint16_t>(row, i));
        case Type::FLOAT64: return static_cast<float>(element<double>(row, i));
        default: return element<float>(row, i);
    }
}

// One group of n <= 64 elements, bit for bit as kernels/formats.py does it. Returns the scale's bits.
uint16_t quantise(const float* x, int n, int largest, int8_t* q) {
    uint32_t peak = 0;  // As integers, magnitudes are in order, with infinity and NaN above all numbers.
    for (int i = 0; i < n; i++) peak = std::max(peak, std::bit_cast<uint32_t>(x[i]) & 0x7fffffff);
    if (peak >= INFINITE) {
        std::memset(q, 0, n);
        return 0x7fc0;
    }
    const uint16_t bits = narrow(std::max(std::bit_cast<float>(peak) / largest, 0x1p-126f));
    const float scale = widen(bits);
    // |x / scale| <= 127.5: adding 1.5 * 2^23 leaves the nearest integer, ties to even, in the low bits.
    constexpr float MAGIC = 0x1.8p23f;
    for (int i = 0; i < n; i++) q[i] = static_cast<int8_t>(std::bit_cast<uint32_t>(x[i] / scale + MAGIC));
    return bits;
}

template <Type TYPE>
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
        q[n] = 0;  // an odd group's last high nibble
        for (int i = 0; i < bytes; i++)
            payload[at / 2 + i] = static_cast<uint8_t>((q[i] + 8) | (q[bytes + i] + 8) << 4);
    }
}

void dequantise_row(Format format, int dim, const uint8_t* payload, const uint8_t* scales, uint8_t* row) {
    float x[SCALE_ELEMENTS + 1];
    for (int at = 0; at < dim; at += SCALE_ELEMENTS) {
        const int n = std::min(SCALE_ELEMENTS, dim - at);
        const float scale = widen(element<uint16_t>(scales, at / SCALE_ELEMENTS));
        if (format == Format::INT8) {
            for (int i = 0; i < n; i++) x[i] = static_cast<int8_t>(payload[at + i]) * scale;
        } else {
            const int bytes = (n + 1) / 2;
            for (int i = 0; i < bytes; i++) {
                x[i] = ((payload[at / 2 + i] & 15) - 8) * scale;
                x[bytes + i] = ((payload[at / 2 + i] >> 4) - 8) * scale;
            }
        }
        // Not std::clamp's order: what compares false, a NaN, stays.
        for (int i = 0; i < n; i++) x[i] = x[i] > FLT_MAX ? FLT_MAX : x[i] < -FLT_MAX ? -FLT_MAX : x[i];
        std::memcpy(row + at * sizeof(float), x, n * sizeof(float));
    }
}

// Payload and scales of one slot.
struct Slot {
    uint8_t* payload;
    uint8_t* scales;
};

Slot slot_of(const Layout& layout, const Side& side, uint8_t* run, int slot) {
    return {run + slot * side.row_bytes, run + layout.block_tokens * side.row_bytes + slot * 2 * side.scales};
}

void plain_copy(uint8_t* to, const uint8_t* from, int64_t bytes) { std::memcpy(to, from, bytes); }

}  // namespace

void put(const Layout& layout, const Side& side, Type type, const uint8_t* rows, int64_t stride, uint8_t* run,
         int slot, int count, bool stream) {
    auto quantise_with = [&](auto quantise) {
        for (int i = 0; i < count; i++) {
            const Slot to = slot_of(layout, side, run, slot + i);
            quantise(layout.format, side.dim, rows + i * stride, to.payload, to.scales);
        }
    };
    switch (type) {
        case Type::STORED: break;
        case Type::FLOAT32: return quantise_with(quantise_row<Type::FLOAT32>);
        case Type::BFLOAT16: return quantise_with(quantise_row<Type::BFLOAT16>);
        case Type::FLOAT16: return quantise_with(quantise_row<Type::FLOAT16>);
        case Type::FLOAT64: return quantise_with(quantise_row<Type::FLOAT64>);
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

void take(const Layout& layout, const Side& side, Type type, uint8_t* rows, int64_t stride, const uint8_t* run,
          int slot, int count) {
    if (type == Type::STORED && !side.scales && stride == side.row_bytes) {
        std::memcpy(rows, run + slot * side.row_bytes, count * side.row_bytes);
        return;
    }
    for (int i = 0; i < count; i++) {
        const Slot from = slot_of(layout, side, const_cast<uint8_t*>(run), slot + i);
        uint8_t* row = rows + i * stride;
        if (type == Type::FLOAT32) {
            dequantise_row(layout.format, side.dim, from.payload, from.scales, row);
            continue;
        }
        std::memcpy(row, from.payload, side.row_bytes);
        if (side.scales) std::memcpy(row + side.row_bytes, from.scales, 2 * side.scales);
    }
}

}  // namespace farshore::kv

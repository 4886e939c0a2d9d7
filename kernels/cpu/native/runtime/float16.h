// Conversions of single values between float32 and the 16-bit formats, by their bits. Header only: used by the KV
// copies and by the unpacking of weights. Vectors are converted in simd/.
#pragma once

#include <bit>
#include <cstdint>

namespace farshore {

inline float float_of_bfloat16(uint16_t value) { return std::bit_cast<float>(static_cast<uint32_t>(value) << 16); }

// Rounds to nearest, ties to even. A NaN becomes a quiet NaN.
inline uint16_t bfloat16_of_float(float value) {
    const uint32_t bits = std::bit_cast<uint32_t>(value);
    if (value != value) return static_cast<uint16_t>(bits >> 16 | 0x40);
    return static_cast<uint16_t>((bits + 0x7fff + (bits >> 16 & 1)) >> 16);
}

// Exact, for denormals, infinities and NaN too.
inline float float_of_float16(uint16_t value) {
    // The exponents' biases differ by 112. Multiplying by 2^112 also normalises denormals.
    const float magnitude = std::bit_cast<float>(static_cast<uint32_t>(value & 0x7fff) << 13) * 0x1p112f;
    const uint32_t infinite_exponent = (value & 0x7c00) == 0x7c00 ? 0x7f800000 : 0;
    const uint32_t sign = static_cast<uint32_t>(value & 0x8000) << 16;
    return std::bit_cast<float>(std::bit_cast<uint32_t>(magnitude) | infinite_exponent | sign);
}

}  // namespace farshore

// Loads stored K or V elements two vectors at a time, for decode.h. Included by simd/isa_kernels.h after
// pack.h.
//
// A vector pair is 2 * WIDTH adjacent elements of a row, converted to two float32 vectors. Which element lies
// in which lane depends on the format (element_in_lane): the order is the one that takes the fewest
// instructions. Dot products do not depend on the order if q has the same order; o is put in order once, when
// the state is finished.

namespace farshore {
namespace ISA {

constexpr int VECTOR_PAIR = 2 * WIDTH;  // elements

// Loads the vector pair at element `from` of a row into a and b, without its scale. `from` is a multiple of
// VECTOR_PAIR, and the pair must end inside the row.
template <Format F>
__attribute__((always_inline)) inline void load_vector_pair(const uint8_t* row, int from, vf& a, vf& b) {
    if constexpr (F == Format::f32) {
        a = load_as<vf>(row + 4 * from), b = load_as<vf>(row + 4 * (from + WIDTH));
    } else if constexpr (F == Format::f16) {
        const uint16_t* h = reinterpret_cast<const uint16_t*>(row) + from;
        a = from_f16(h), b = from_f16(h + WIDTH);
    } else if constexpr (F == Format::bf16) {
        // Even elements in a, odd ones in b: one instruction each, where widening in order takes two.
        const vu words = load_as<vu>(row + 2 * from);
        a = bits_to_float(words << 16), b = bits_to_float(words & 0xffff0000);
    } else if constexpr (F == Format::i8) {
        a = __builtin_convertvector(widen(load_as<vb>(row + from)), vf);
        b = __builtin_convertvector(widen(load_as<vb>(row + from + WIDTH)), vf);
    } else {
        constexpr int HALF = SCALE_ELEMENTS / 2;
        const vi bytes = widen(load_as<vc>(row + from / SCALE_ELEMENTS * HALF + from % SCALE_ELEMENTS / 2));
#if WIDTH == 16
        const vf table{-8, -7, -6, -5, -4, -3, -2, -1, 0, 1, 2, 3, 4, 5, 6, 7};
        a = (vf)_mm512_permutexvar_ps((__m512i)bytes, (__m512)table);
        b = (vf)_mm512_permutexvar_ps((__m512i)(bytes >> 4), (__m512)table);
#else
        a = __builtin_convertvector((bytes & 15) - 8, vf), b = __builtin_convertvector((bytes >> 4) - 8, vf);
#endif
    }
}

// The element of a row that lies in lane l of the first (half 0) or second (half 1) vector of the pair at
// element `from`. INTEGERS: the lane order of o as integer_products.h accumulates it, the same for all
// formats.
template <Format F, bool INTEGERS>
inline int element_in_lane(int from, int half, int l) {
    if (INTEGERS) return from + l / 4 * 8 + half * 4 + l % 4;
    if (F == Format::bf16) return from + 2 * l + half;
    if (F == Format::i4)
        return from / SCALE_ELEMENTS * SCALE_ELEMENTS + from % SCALE_ELEMENTS / 2 + half * (SCALE_ELEMENTS / 2) + l;
    return from + half * WIDTH + l;
}

// Elements of a row of `dim` that lie in whole vector pairs (int4: in whole scale groups). The elements
// behind them are read one by one, in order.
template <Format F>
inline int whole_pair_elements(int dim) {
    return dim / (F == Format::i4 ? SCALE_ELEMENTS : VECTOR_PAIR) * (F == Format::i4 ? SCALE_ELEMENTS : VECTOR_PAIR);
}

}  // namespace ISA
}  // namespace farshore

// Kernels for any CPU: vectors of four float32 lanes, which the compiler maps to its default target (SSE2,
// NEON).
#include "simd/isa.h"

#define ISA portable
#define WIDTH 4
#include "simd/isa_kernels.h"

const farshore::Kernels& farshore::portable_kernels() {
    static const Kernels kernels{"portable", portable::partial, portable::extend, portable::merge, portable::dense};
    return kernels;
}

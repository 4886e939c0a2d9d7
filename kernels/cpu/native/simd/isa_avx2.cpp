// Kernels for AVX2.
#if defined(__x86_64__)
#include "simd/isa.h"

#pragma GCC target("avx2,fma,f16c,bmi2")
#define ISA avx2
#define WIDTH 8
#define HAS_F16C
#include "simd/isa_kernels.h"

const farshore::Kernels& farshore::avx2_kernels() {
    static const Kernels kernels{"avx2", avx2::partial, avx2::extend, avx2::merge, avx2::dense};
    return kernels;
}
#endif

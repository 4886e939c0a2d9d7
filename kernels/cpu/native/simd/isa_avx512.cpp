// Kernels for AVX-512 without bfloat16.
#if defined(__x86_64__)
#include "simd/isa.h"

#pragma GCC target("avx512f,avx512bw,avx512vl,avx512dq,avx512vnni,fma,f16c,bmi2")
#define ISA avx512
#define WIDTH 16
#define HAS_F16C
#include "simd/isa_kernels.h"

const farshore::Kernels& farshore::avx512_kernels() {
    static const Kernels kernels{"avx512", avx512::partial, avx512::extend, avx512::merge, avx512::dense};
    return kernels;
}
#endif

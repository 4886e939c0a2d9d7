// Kernels for AVX-512 with bfloat16.
#if defined(__x86_64__)
#include "simd/isa.h"

#pragma GCC target("avx512f,avx512bw,avx512vl,avx512dq,avx512bf16,avx512vbmi,avx512vnni,fma,f16c,bmi2")
#define ISA avx512_bf16
#define WIDTH 16
#define HAS_F16C
#define HAS_BF16_DOT
#include "simd/isa_kernels.h"

const farshore::Kernels& farshore::avx512_bf16_kernels() {
    static const Kernels kernels{"avx512-bf16", avx512_bf16::partial, avx512_bf16::extend, avx512_bf16::merge,
                                 avx512_bf16::dense};
    return kernels;
}
#endif

// Kernels for All of AVX-512 with bfloat16, and AMX.
#if defined(__x86_64__)
#include "simd/isa.h"

#pragma GCC target( \
    "avx512f,avx512bw,avx512vl,avx512dq,avx512bf16,avx512vbmi,avx512vnni,amx-tile,amx-bf16,fma,f16c,bmi2")
#define ISA amx
#define WIDTH 16
#define HAS_F16C
#define HAS_BF16_DOT
#define HAS_AMX
#include "simd/isa_kernels.h"

const farshore::Kernels& farshore::amx_kernels() {
    static const Kernels kernels{"amx", amx::partial, amx::extend, amx::merge, avx512_bf16_kernels().dense};
    return kernels;
}
#endif

// Every instruction of this file's kernels needs avx512-bf16; see dispatch in binding.cpp.
#if defined(__x86_64__)
#include <algorithm>
#include <cmath>
#include <cstdint>
#include <cstring>

#include "plan.h"
#include "pool.h"

#include <immintrin.h>

#pragma GCC target("avx512f,avx512bw,avx512vl,avx512dq,avx512bf16,avx512vbmi,fma,f16c,bmi2")
#define ISA avx512_bf16
#define WIDTH 16
#define HAS_F16C
#define HAS_BF16_DOT
#include "simd.h"
#include "pack.h"
#include "gemm.h"
#include "attend.h"
#include "kernels.h"

const farshore::Kernels& farshore::avx512_bf16_kernels() {
    static const Kernels kernels{"avx512-bf16", avx512_bf16::partial, avx512_bf16::extend, avx512_bf16::merge, avx512_bf16::sum};
    return kernels;
}
#endif

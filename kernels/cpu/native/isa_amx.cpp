// Every instruction of this file's kernels needs avx512-bf16; see dispatch in binding.cpp.
#if defined(__x86_64__)
#include <algorithm>
#include <cmath>
#include <cstdint>
#include <cstring>

#include "plan.h"
#include "pool.h"

#include <immintrin.h>

#pragma GCC target("avx512f,avx512bw,avx512vl,avx512dq,avx512bf16,avx512vbmi,amx-tile,amx-bf16,fma,f16c,bmi2")
#define ISA amx
#define WIDTH 16
#define HAS_F16C
#define HAS_BF16_DOT
#define HAS_AMX
#include "simd.h"
#include "pack.h"
#include "gemm.h"
#include "amx.h"
#include "attend.h"
#include "kernels.h"

const farshore::Kernels& farshore::amx_kernels() {
    static const Kernels kernels{"amx", amx::partial, amx::extend, amx::merge, amx::sum};
    return kernels;
}
#endif

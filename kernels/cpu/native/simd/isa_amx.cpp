// These kernels may use AMX and all of AVX-512 with bfloat16; binding.cpp asks the CPU first.
#if defined(__x86_64__)
#include <algorithm>
#include <cmath>
#include <cstdint>
#include <cstring>
#include <numeric>
#include <tuple>
#include <type_traits>
#include <utility>

#include "dense/dense.h"
#include "attention/plan.h"
#include "runtime/pool.h"

#include <immintrin.h>

#pragma GCC target("avx512f,avx512bw,avx512vl,avx512dq,avx512bf16,avx512vbmi,avx512vnni,amx-tile,amx-bf16,fma,f16c,bmi2")
#define ISA amx
#define WIDTH 16
#define HAS_F16C
#define HAS_BF16_DOT
#define HAS_AMX
#include "attention/kernels.h"

const farshore::Kernels& farshore::amx_kernels() {
    static const Kernels kernels{"amx", amx::partial, amx::extend, amx::merge, avx512_bf16_kernels().dense};
    return kernels;
}
#endif

// These kernels may use AVX-512 with bfloat16; binding.cpp asks the CPU first.
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

#pragma GCC target("avx512f,avx512bw,avx512vl,avx512dq,avx512bf16,avx512vbmi,avx512vnni,fma,f16c,bmi2")
#define ISA avx512_bf16
#define WIDTH 16
#define HAS_F16C
#define HAS_BF16_DOT
#include "attention/kernels.h"

const farshore::Kernels& farshore::avx512_bf16_kernels() {
    static const Kernels kernels{"avx512-bf16", avx512_bf16::partial, avx512_bf16::extend, avx512_bf16::merge, avx512_bf16::dense};
    return kernels;
}
#endif

// These kernels may use AVX-512; binding.cpp asks the CPU first.
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

#pragma GCC target("avx512f,avx512bw,avx512vl,avx512dq,avx512vnni,fma,f16c,bmi2")
#define ISA avx512
#define WIDTH 16
#define HAS_F16C
#include "attention/kernels.h"

const farshore::Kernels& farshore::avx512_kernels() {
    static const Kernels kernels{"avx512", avx512::partial, avx512::extend, avx512::merge, avx512::dense};
    return kernels;
}
#endif

// These kernels may use AVX2; binding.cpp asks the CPU first.
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

#pragma GCC target("avx2,fma,f16c,bmi2")
#define ISA avx2
#define WIDTH 8
#define HAS_F16C
#include "attention/kernels.h"

const farshore::Kernels& farshore::avx2_kernels() {
    static const Kernels kernels{"avx2", avx2::partial, avx2::extend, avx2::merge, avx2::dense};
    return kernels;
}
#endif

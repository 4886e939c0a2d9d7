// Compiles the kernels once for each instruction set.
//
// Files compiled several times: simd/isa_{portable,avx2,avx512,avx512_bf16,amx}.cpp are one translation unit
// each, and each includes the headers that simd/isa_kernels.h lists. Every function of those headers exists
// up to five times, in the namespace ISA of its instruction set (farshore::avx2 and so on). All other .cpp
// files are compiled once, for the compiler's default target.
//
// An isa_*.cpp does four things, in this order:
// - It includes this header, which must be compiled for the default target: if an inline function of the
//   standard library were compiled for AVX-512, the linker could take it for the whole module, and a CPU
//   without AVX-512 would crash.
// - It names the instructions that it may use, by `#pragma GCC target`.
// - It defines ISA (the namespace), WIDTH (float32 lanes of a vector) and what else the set has: HAS_F16C
//   (float16 conversion), HAS_BF16_DOT (AVX512-BF16 and AVX512-VBMI), HAS_AMX (bfloat16 tiles).
// - It includes simd/isa_kernels.h and defines its `const Kernels&` function.
//
// binding.cpp checks that the CPU has an instruction set before it calls these kernels.
#pragma once

#include <algorithm>
#include <cmath>
#include <cstdint>
#include <cstring>
#include <numeric>
#include <tuple>
#include <type_traits>
#include <utility>

#include "attention/plan.h"
#include "dense/dense.h"
#include "runtime/pool.h"

#if defined(__x86_64__)
#include <immintrin.h>
#endif

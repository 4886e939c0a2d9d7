// Four lanes, without naming an instruction: SSE2, NEON, or whatever the compiler has.
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

#define ISA portable
#define WIDTH 4
#include "attention/kernels.h"

const farshore::Kernels& farshore::portable_kernels() {
    static const Kernels kernels{"portable", portable::partial, portable::extend, portable::merge, portable::dense};
    return kernels;
}

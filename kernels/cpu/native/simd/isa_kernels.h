// The kernels of one instruction set. simd/isa.h says when and how often this header is compiled. Each header
// below uses declarations of those before it, so their order matters.
#include "simd/simd.h"

#include "attention/pack.h"
#include "attention/merge.h"
#include "attention/integer_products.h"
#include "attention/vector_pair.h"
#include "attention/decode.h"
#include "attention/prefill_f32.h"
#if defined(HAS_BF16_DOT)
#include "simd/gemm.h"
#include "simd/amx.h"
#include "attention/prefill_bf16.h"
#endif

// The dense kernels do not use AMX: amx_kernels() takes those of avx512_bf16_kernels().
#if !defined(HAS_AMX)
#include "dense/values.h"
#include "dense/weights.h"
#include "dense/packed.h"
#include "dense/few_rows.h"
#include "dense/many_rows.h"
#include "dense/product.h"
#include "dense/layer.h"
#endif

#include "attention/kernels.h"

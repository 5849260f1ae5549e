/* Stands in for the CUDA toolkit's header of this name. */
#ifndef LITEDETR_TESTS_CUDA_BF16_H
#define LITEDETR_TESTS_CUDA_BF16_H

#include "../problem.h"
#include "cuda_runtime.h"

struct __nv_bfloat16 {
  uint16_t bits;
};
struct __nv_bfloat162 {
  __nv_bfloat16 x, y;
};
inline float __bfloat162float(__nv_bfloat16 x) { return bfloat_to_float(x.bits); }
inline float2 __bfloat1622float2(__nv_bfloat162 pair) { return {__bfloat162float(pair.x), __bfloat162float(pair.y)}; }
inline __nv_bfloat162 __floats2bfloat162_rn(float x, float y) { return {{float_to_bfloat(x)}, {float_to_bfloat(y)}}; }

#endif /* LITEDETR_TESTS_CUDA_BF16_H */

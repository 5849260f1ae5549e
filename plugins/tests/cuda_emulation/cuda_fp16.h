/* Stands in for the CUDA toolkit's header of this name. */
#ifndef LITEDETR_TESTS_CUDA_FP16_H
#define LITEDETR_TESTS_CUDA_FP16_H

#include "../problem.h"
#include "cuda_runtime.h"

struct __half {
  uint16_t bits;
};
struct __half2 {
  __half x, y;
};
/* From a table: the kernels convert every channel of every corner. */
inline float __half2float(__half x) {
  static const std::vector<float> floats = [] {
    std::vector<float> all;
    for (int bits = 0; bits < 1 << 16; ++bits) all.push_back(half_to_float(static_cast<uint16_t>(bits)));
    return all;
  }();
  return floats[x.bits];
}
inline float2 __half22float2(__half2 pair) { return {__half2float(pair.x), __half2float(pair.y)}; }
inline __half2 __floats2half2_rn(float x, float y) { return {{float_to_half(x)}, {float_to_half(y)}}; }

#endif /* LITEDETR_TESTS_CUDA_FP16_H */

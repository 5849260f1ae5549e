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
inline __half2 __low2half2(__half2 pair) { return {pair.x, pair.x}; }
inline __half2 __high2half2(__half2 pair) { return {pair.y, pair.y}; }

/* A product of halves is exact in double, and so is all but the rarest sum: rounded once, as the device does. */
inline __half round_to_half(double x) {
  const float nearest = static_cast<float>(x);
  if (!(fabsf(nearest) >= 0x1p-14f && fabsf(nearest) < 65520)) return {float_to_half(nearest)};
  /* Normal halves are every 2^13th float; the sticky bit keeps ties apart that the float's own rounding made. */
  uint32_t bits;
  memcpy(&bits, &nearest, sizeof bits);
  const double lost = x - nearest;
  if (lost != 0 && !(bits & 0x1fff & 0xfff) && (bits & 0x1000)) bits += (lost > 0) == (nearest > 0) ? 1 : -1;
  bits += 0xfff + (bits >> 13 & 1);
  return {static_cast<uint16_t>((bits >> 16 & 0x8000) | ((bits >> 13 & 0x3ffff) - 0x1c000))};
}
inline __half2 __hmul2(__half2 x, __half2 y) {
  return {round_to_half(double{__half2float(x.x)} * __half2float(y.x)),
          round_to_half(double{__half2float(x.y)} * __half2float(y.y))};
}
inline __half2 __hfma2(__half2 x, __half2 y, __half2 z) {
  return {round_to_half(double{__half2float(x.x)} * __half2float(y.x) + __half2float(z.x)),
          round_to_half(double{__half2float(x.y)} * __half2float(y.y) + __half2float(z.y))};
}

#endif /* LITEDETR_TESTS_CUDA_FP16_H */

#include <cuda_bf16.h>

#include "cuda_two_bytes.cuh"

namespace kda {
namespace {

struct BFloat16 {
  typedef __nv_bfloat16 Number;
  typedef __nv_bfloat162 Pair;
  static __device__ float to_float(Number x) { return __bfloat162float(x); }
  static __device__ float2 to_floats(Pair pair) { return __bfloat1622float2(pair); }
  static __device__ Pair to_pair(float x, float y) { return __floats2bfloat162_rn(x, y); }

  static __device__ __forceinline__ void interpolate(const Corners& corners, __half2 upper, __half2 lower,
                                                     float* sampled) {
    const float2 above = __half22float2(upper), below = __half22float2(lower);
    const float weights[4] = {above.x, above.y, below.x, below.y};
#pragma unroll
    for (int c = 0; c < 4; ++c) {
      float channels[8];
      TwoBytes<BFloat16>::unpack(corners.piece[c], channels);
#pragma unroll
      for (int i = 0; i < 8; ++i) {
        sampled[i] = c == 0 ? weights[0] * channels[i] : fmaf(weights[c], channels[i], sampled[i]);
      }
    }
  }
};

}  // namespace

cudaError_t attend_bfloat16(const Launch& launch, const Attention& a) {
  return launch_kernel<TwoBytes<BFloat16>>(launch, a);
}

}  // namespace kda

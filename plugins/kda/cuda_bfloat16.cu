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
};

}  // namespace

cudaError_t attend_bfloat16(const Launch& launch, const Attention& a) {
  return launch_kernel<TwoBytes<BFloat16>>(launch, a);
}

}  // namespace kda

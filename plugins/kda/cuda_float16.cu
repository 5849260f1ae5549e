#include <cuda_fp16.h>

#include "cuda_two_bytes.cuh"

namespace kda {
namespace {

struct Float16 {
  typedef __half Number;
  typedef __half2 Pair;
  static __device__ float to_float(Number x) { return __half2float(x); }
  static __device__ float2 to_floats(Pair pair) { return __half22float2(pair); }
  static __device__ Pair to_pair(float x, float y) { return __floats2half2_rn(x, y); }
};

}  // namespace

cudaError_t attend_float16(const Launch& launch, const Attention& a) {
  return launch_kernel<TwoBytes<Float16>>(launch, a);
}

}  // namespace kda

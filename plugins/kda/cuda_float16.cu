#include "cuda_two_bytes.cuh"

namespace kda {
namespace {

struct Float16 {
  typedef __half Number;
  typedef __half2 Pair;
  static __device__ float to_float(Number x) { return __half2float(x); }
  static __device__ float2 to_floats(Pair pair) { return __half22float2(pair); }
  static __device__ Pair to_pair(float x, float y) { return __floats2half2_rn(x, y); }

  /* Two channels at a time in FP16, a quarter of the instructions of FP32. */
  static __device__ __forceinline__ void interpolate(const Corners& corners, Pair upper, Pair lower, float* sampled) {
    const Pair weights[4] = {__low2half2(upper), __high2half2(upper), __low2half2(lower), __high2half2(lower)};
    Pair pairs[4];
#pragma unroll
    for (int c = 0; c < 4; ++c) {
      const uint4 piece = corners.piece[c];
      const unsigned words[4] = {piece.x, piece.y, piece.z, piece.w};
#pragma unroll
      for (int i = 0; i < 4; ++i) {
        const Pair channels = with_bits_of<Pair>(words[i]);
        pairs[i] = c == 0 ? __hmul2(weights[0], channels) : __hfma2(weights[c], channels, pairs[i]);
      }
    }
#pragma unroll
    for (int i = 0; i < 4; ++i) {
      const float2 pair = to_floats(pairs[i]);
      sampled[2 * i] = pair.x;
      sampled[2 * i + 1] = pair.y;
    }
  }
};

}  // namespace

cudaError_t attend_float16(const Launch& launch, const Attention& a) {
  return launch_kernel<TwoBytes<Float16>>(launch, a);
}

}  // namespace kda

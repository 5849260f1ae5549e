#include "cuda_kernel.cuh"

namespace kda {
namespace {

struct Float32 {
  static constexpr int kChannels = 4; /* in 16 bytes */

  static __device__ const uint4* piece(const void* tensor, int64_t element) {
    return reinterpret_cast<const uint4*>(static_cast<const float*>(tensor) + element);
  }
  static __device__ float load(const void* tensor, int64_t element) {
    return __ldcs(static_cast<const float*>(tensor) + element);
  }
  static __device__ float2 load_pair(const void* tensor, int64_t pair) {
    return __ldcs(static_cast<const float2*>(tensor) + pair);
  }
  static __device__ void unpack(uint4 piece, float* channels) {
    channels[0] = __uint_as_float(piece.x);
    channels[1] = __uint_as_float(piece.y);
    channels[2] = __uint_as_float(piece.z);
    channels[3] = __uint_as_float(piece.w);
  }
  static __device__ uint4 pack(const float* channels) {
    return make_uint4(__float_as_uint(channels[0]), __float_as_uint(channels[1]), __float_as_uint(channels[2]),
                      __float_as_uint(channels[3]));
  }
};

}  // namespace

cudaError_t attend_float32(const Launch& launch, const Attention& a) { return launch_kernel<Float32>(launch, a); }

}  // namespace kda

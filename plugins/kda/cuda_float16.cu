#include <cuda_fp16.h>
#include <string.h>

#include "cuda_kernel.cuh"

namespace kda {
namespace {

struct Float16 {
  static constexpr int kChannels = 8; /* in 16 bytes */

  static __device__ const uint4 *piece(const void *tensor, int64_t element) {
    return reinterpret_cast<const uint4 *>(static_cast<const uint16_t *>(tensor) + element);
  }
  static __device__ float load(const void *tensor, int64_t element) {
    return __half2float(static_cast<const __half *>(tensor)[element]);
  }
  static __device__ float2 load_pair(const void *tensor, int64_t pair) {
    return floats(__ldcs(static_cast<const unsigned *>(tensor) + pair));
  }
  static __device__ void unpack(uint4 piece, float *channels) {
    const unsigned words[4] = {piece.x, piece.y, piece.z, piece.w};
#pragma unroll
    for (int i = 0; i < 4; ++i) {
      const float2 pair = floats(words[i]);
      channels[2 * i] = pair.x;
      channels[2 * i + 1] = pair.y;
    }
  }
  static __device__ uint4 pack(const float *channels) {
    return make_uint4(word(channels), word(channels + 2), word(channels + 4), word(channels + 6));
  }

 private:
  static __device__ float2 floats(unsigned word) {
    __half2 pair;
    memcpy(&pair, &word, sizeof pair);
    return __half22float2(pair);
  }
  static __device__ unsigned word(const float *channels) {
    const __half2 pair = __floats2half2_rn(channels[0], channels[1]);
    unsigned word;
    memcpy(&word, &pair, sizeof word);
    return word;
  }
};

}  // namespace

cudaError_t attend_float16(const Launch &launch, const Attention &a) { return launch_kernel<Float16>(launch, a); }

}  // namespace kda

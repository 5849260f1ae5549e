/* The storage types of two bytes for cuda_kernel.cuh; they differ in their conversions alone, which `Type` has. */
#ifndef LITEDETR_KDA_CUDA_TWO_BYTES_CUH
#define LITEDETR_KDA_CUDA_TWO_BYTES_CUH

#include <string.h>

#include "cuda_kernel.cuh"

namespace kda {

template <class Type>
struct TwoBytes {
  static constexpr int kChannels = 8; /* in 16 bytes */

  static __device__ const uint4* piece(const void* tensor, int64_t element) {
    return reinterpret_cast<const uint4*>(static_cast<const uint16_t*>(tensor) + element);
  }
  static __device__ float load(const void* tensor, int64_t element) {
    return Type::to_float(static_cast<const typename Type::Number*>(tensor)[element]);
  }
  static __device__ float2 load_pair(const void* tensor, int64_t pair) {
    return floats(__ldcs(static_cast<const unsigned*>(tensor) + pair));
  }
  static __device__ void unpack(uint4 piece, float* channels) {
    const unsigned words[4] = {piece.x, piece.y, piece.z, piece.w};
#pragma unroll
    for (int i = 0; i < 4; ++i) {
      const float2 pair = floats(words[i]);
      channels[2 * i] = pair.x;
      channels[2 * i + 1] = pair.y;
    }
  }
  static __device__ uint4 pack(const float* channels) {
    return make_uint4(word(channels), word(channels + 2), word(channels + 4), word(channels + 6));
  }

 private:
  static __device__ float2 floats(unsigned word) {
    typename Type::Pair pair;
    memcpy(&pair, &word, sizeof pair);
    return Type::to_floats(pair);
  }
  static __device__ unsigned word(const float* channels) {
    const typename Type::Pair pair = Type::to_pair(channels[0], channels[1]);
    unsigned word;
    memcpy(&word, &pair, sizeof word);
    return word;
  }
};

}  // namespace kda

#endif /* LITEDETR_KDA_CUDA_TWO_BYTES_CUH */

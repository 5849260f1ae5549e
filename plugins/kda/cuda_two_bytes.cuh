/* The storage types of two bytes for cuda_kernel.cuh.  `Type` has their conversions, and how corners are interpolated.
 */
#ifndef LITEDETR_KDA_CUDA_TWO_BYTES_CUH
#define LITEDETR_KDA_CUDA_TWO_BYTES_CUH

#include <cuda_fp16.h>
#include <string.h>

#include "cuda_kernel.cuh"

namespace kda {

template <class To, class From>
__device__ __forceinline__ To with_bits_of(From from) {
  static_assert(sizeof(To) == sizeof(From));
  To to;
  memcpy(&to, &from, sizeof to);
  return to;
}

template <class Type>
struct TwoBytes {
  static constexpr int kChannels = 8; /* in 16 bytes */
  static constexpr int kRecordPieces = 1;

  /* The weights are FP16 in BF16 too, where three more bits than the values have leave their rounding unseen. */
  struct Sample {
    unsigned token, steps;
    uint2 weights;
  };
  static __device__ void write_record(uint4* record, unsigned token, unsigned steps, const float* weights) {
    *record = make_uint4(token, steps, with_bits_of<unsigned>(__floats2half2_rn(weights[0], weights[1])),
                         with_bits_of<unsigned>(__floats2half2_rn(weights[2], weights[3])));
  }
  static __device__ Sample read_record(const uint4* record) {
    const uint4 words = *record;
    return {words.x, words.y, {words.z, words.w}};
  }
  static __device__ __forceinline__ void interpolate(const Corners& corners, uint2 weights, float* sampled) {
    Type::interpolate(corners, with_bits_of<__half2>(weights.x), with_bits_of<__half2>(weights.y), sampled);
  }

  static __device__ const uint4* piece(const void* tensor, int64_t element) {
    return reinterpret_cast<const uint4*>(static_cast<const uint16_t*>(tensor) + element);
  }
  static __device__ float read_number(const void* tensor, int64_t element) {
    return Type::to_float(__ldcs(static_cast<const typename Type::Number*>(tensor) + element));
  }
  template <int kCount>
  static __device__ void read_numbers(const void* tensor, int64_t element, float* numbers) {
    static_assert(kCount % 2 == 0);
    read_pairs<kCount / 2>(tensor, element / 2, reinterpret_cast<float2*>(numbers));
  }
  template <int kCount>
  static __device__ void read_offsets(const Attention& a, int64_t pair, float2* offsets) {
    if (a.float_offsets) {
      read_float_pairs<kCount>(a.sampling_offsets, pair, offsets);
    } else {
      read_pairs<kCount>(a.sampling_offsets, pair, offsets);
    }
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
  static __device__ float2 floats(unsigned word) { return Type::to_floats(with_bits_of<typename Type::Pair>(word)); }
  static __device__ unsigned word(const float* channels) {
    return with_bits_of<unsigned>(Type::to_pair(channels[0], channels[1]));
  }
  /* Neighbouring pairs in one load; `pair` is a multiple of kCount. */
  template <int kCount>
  static __device__ void read_pairs(const void* tensor, int64_t pair, float2* pairs) {
    static_assert(kCount == 1 || kCount == 2 || kCount == 4);
    const unsigned* const address = static_cast<const unsigned*>(tensor) + pair;
    if constexpr (kCount == 1) {
      pairs[0] = floats(__ldcs(address));
    } else if constexpr (kCount == 2) {
      const uint2 words = __ldcs(reinterpret_cast<const uint2*>(address));
      pairs[0] = floats(words.x);
      pairs[1] = floats(words.y);
    } else {
      const uint4 words = __ldcs(reinterpret_cast<const uint4*>(address));
      pairs[0] = floats(words.x);
      pairs[1] = floats(words.y);
      pairs[2] = floats(words.z);
      pairs[3] = floats(words.w);
    }
  }
};

}  // namespace kda

#endif /* LITEDETR_KDA_CUDA_TWO_BYTES_CUH */

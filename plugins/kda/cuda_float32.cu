#include "cuda_kernel.cuh"

namespace kda {
namespace {

struct Float32 {
  static constexpr int kChannels = 4;     /* in 16 bytes */
  static constexpr int kRecordPieces = 2; /* place and weights */

  struct Sample {
    unsigned token, steps;
    float4 weights;
  };
  static __device__ void write_record(uint4* record, unsigned token, unsigned steps, const float* weights) {
    record[0] = make_uint4(token, steps, 0, 0);
    record[1] = make_uint4(__float_as_uint(weights[0]), __float_as_uint(weights[1]), __float_as_uint(weights[2]),
                           __float_as_uint(weights[3]));
  }
  static __device__ Sample read_record(const uint4* record) {
    const uint4 weights = record[1];
    return {record[0].x,
            record[0].y,
            {__uint_as_float(weights.x), __uint_as_float(weights.y), __uint_as_float(weights.z),
             __uint_as_float(weights.w)}};
  }
  static __device__ void interpolate(const Corners& corners, float4 weights, float* sampled) {
    const float of_corner[4] = {weights.x, weights.y, weights.z, weights.w};
#pragma unroll
    for (int c = 0; c < 4; ++c) {
      float channels[kChannels];
      unpack(corners.piece[c], channels);
#pragma unroll
      for (int i = 0; i < kChannels; ++i) {
        sampled[i] = c == 0 ? of_corner[0] * channels[i] : fmaf(of_corner[c], channels[i], sampled[i]);
      }
    }
  }

  static __device__ const uint4* piece(const void* tensor, int64_t element) {
    return reinterpret_cast<const uint4*>(static_cast<const float*>(tensor) + element);
  }
  static __device__ float read_number(const void* tensor, int64_t element) {
    return __ldcs(static_cast<const float*>(tensor) + element);
  }
  template <int kCount>
  static __device__ void read_numbers(const void* tensor, int64_t element, float* numbers) {
    read_floats<kCount>(tensor, element, numbers);
  }
  template <int kCount>
  static __device__ void read_offsets(const Attention& a, int64_t pair, float2* offsets) {
    read_float_pairs<kCount>(a.sampling_offsets, pair, offsets);
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

/* What the host's half of the CUDA operator (cuda.cpp) hands to the kernels: one function a storage type, each compiled
 * from cuda_kernel.cuh in a file of its own. */
#ifndef LITEDETR_KDA_CUDA_KERNEL_H
#define LITEDETR_KDA_CUDA_KERNEL_H

#include <cuda_runtime.h>

#include "kda.h"

namespace kda {

constexpr int kMaxThreads = 256; /* in a block */
constexpr int kPieceBytes = 16;  /* what a thread loads at once */

/* The parameter of the kernels. */
struct Attention {
  const void* query; /* or attention logits */
  const void* key;   /* NULL: the key is the value */
  const void* value;
  const float* reference_points;
  const void* sampling_offsets;
  const void* spatial_shapes;
  void* output;
  int64_t num_tokens;
  int num_queries, num_heads, head_dim, num_levels, num_points;
  int lanes; /* threads that own a (query, head): a power of two, with a 16-byte piece of its channels each */
  bool key_aware, box_references, float_offsets, int32_shapes;
  float scale; /* of the logits: log2(e) / sqrt(D) */
};

struct Launch {
  dim3 grid; /* chunks of queries, heads, items */
  int threads;
  size_t shared_bytes;
  cudaStream_t stream;
};

/* 16-byte pieces of shared memory for what the cells of a block share: the levels, and an offset. */
constexpr int kBlockPieces = KDA_MAX_LEVELS + 1;

/* 16-byte pieces of shared memory for the records of a (query, head).  Samples come in pairs; and an odd number of
 * pieces puts the same record of 8 neighbours into different banks. */
inline __host__ __device__ int pieces_of_cell(int samples, int record_pieces) {
  return ((samples + 1) & ~1) * record_pieces + 1;
}

/* Whether heads of 32 or 64 channels have a kernel of their own, which reads neighbouring offsets in one load. */
inline bool is_usual(int levels, int points) { return levels == 4 && points == 4; }

cudaError_t attend_float32(const Launch& launch, const Attention& attention);
cudaError_t attend_float16(const Launch& launch, const Attention& attention);
cudaError_t attend_bfloat16(const Launch& launch, const Attention& attention);

}  // namespace kda

#endif /* LITEDETR_KDA_CUDA_KERNEL_H */

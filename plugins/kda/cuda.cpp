/* The host's half of the CUDA operator: checks, shape of the launch, choice of the storage type.  The arithmetic is in
 * cuda_kernel.cuh. */
#include <math.h>

#include "check.h"
#include "cuda_kernel.h"

namespace kda {
namespace {

constexpr int kMinThreads = 64;           /* in a block; shared memory can ask for 32 */
constexpr int64_t kMinBlocks = 8;         /* for a multiprocessor, of more than kMinThreads */
constexpr size_t kSharedBytes = 48 << 10; /* that a block has without asking for more */
constexpr int32_t kMaxHeadDim = 128;      /* a warp of 16-byte pieces of FP32 */
constexpr int64_t kMaxInt = (int64_t{1} << 31) - 1;
constexpr int64_t kMaxGrid = 65535; /* blocks along y and z */

int32_t element_bytes(int32_t dtype) { return dtype == KDA_FLOAT32 ? 4 : 2; }

size_t shared_bytes(const kda_arguments* a, int cells) {
  const int record_pieces = a->dtype == KDA_FLOAT32 ? 2 : 1;
  return (kBlockPieces + size_t(cells) * pieces_of_cell(a->num_levels * a->num_points, record_pieces)) * kPieceBytes;
}

int64_t chunks(const kda_arguments* a, int cells) { return (a->num_queries + cells - 1) / cells; }

/* Large blocks, whose queries share what they read in the L1 cache, but at least eight for every multiprocessor: where
 * there are few rounds of blocks, the last one leaves a multiprocessor without work for an eighth of the time at most.
 */
Launch shape_launch(const kda_arguments* a, int lanes, int multiprocessors) {
  Launch launch = {};
  launch.threads = kMaxThreads;
  const int64_t heads = a->batch * a->num_heads;
  while (launch.threads > kMinThreads && heads * chunks(a, launch.threads / lanes) < kMinBlocks * multiprocessors) {
    launch.threads /= 2;
  }
  while (shared_bytes(a, launch.threads / lanes) > kSharedBytes) launch.threads /= 2;
  launch.grid = dim3(static_cast<unsigned>(chunks(a, launch.threads / lanes)), static_cast<unsigned>(a->num_heads),
                     static_cast<unsigned>(a->batch));
  launch.shared_bytes = shared_bytes(a, launch.threads / lanes);
  return launch;
}

/* Of the loads that the kernels make: whole rows of 16 bytes, and neighbouring offsets where the shape is the usual. */
kda_status check_alignment(const kda_arguments* a, char* message, size_t message_size) {
  const bool usual = is_usual(a->num_levels, a->num_points);
  const auto bytes_or_piece = [&](int bytes) { return static_cast<uintptr_t>(usual ? kPieceBytes : bytes); };
  const struct {
    const char* name;
    const void* data;
    uintptr_t bytes; /* that a thread reads at once */
  } tensors[] = {
      {a->key_aware ? "query" : "attention_logits", a->query,
       a->key_aware ? uintptr_t{kPieceBytes} : bytes_or_piece(element_bytes(a->dtype))},
      {"key", a->key_aware ? a->key : nullptr, kPieceBytes},
      {"value", a->value, kPieceBytes},
      {"reference_points", a->reference_points, bytes_or_piece(sizeof(float))},
      {"sampling_offsets", a->sampling_offsets, bytes_or_piece(2 * element_bytes(a->offset_dtype))},
      {"spatial_shapes", a->spatial_shapes, a->int32_shapes ? sizeof(int32_t) : sizeof(int64_t)},
      {"output", a->output, kPieceBytes},
  };
  for (const auto& tensor : tensors) {
    if (reinterpret_cast<uintptr_t>(tensor.data) % tensor.bytes != 0) {
      print(message, message_size, "%s starts at address %p; it must be a multiple of %d: pass a copy", tensor.name,
            tensor.data, static_cast<int>(tensor.bytes));
      return KDA_INVALID_ARGUMENT;
    }
  }
  return KDA_OK;
}

}  // namespace
}  // namespace kda

using namespace kda;

extern "C" {

kda_status kda_cuda_check(const kda_arguments* a, char* message, size_t message_size) {
  const kda_status status = check_sizes(a, "CUDA", 8, message, message_size);
  if (status != KDA_OK) return status;
  if (a->head_dim > kMaxHeadDim) {
    print(message, message_size, "head_dim is %d; the CUDA kernels take at most %d", a->head_dim, kMaxHeadDim);
    return KDA_UNSUPPORTED;
  }
  const int64_t token_bytes = int64_t{a->num_heads} * a->head_dim * element_bytes(a->dtype);
  if (token_bytes > kMaxInt) {
    print(message, message_size, "value has tokens of %lld bytes; the CUDA kernels take at most %lld",
          (long long)token_bytes, (long long)kMaxInt);
    return KDA_UNSUPPORTED;
  }
  /* Heads and items are dimensions of the grid; and a (query, head) has a 32-bit index. */
  const struct {
    const char* name;
    int64_t count;
  } dimensions[] = {{"heads", a->num_heads}, {"items", a->batch}};
  for (const auto& dimension : dimensions) {
    if (dimension.count > kMaxGrid) {
      print(message, message_size, "query has %lld %s; the CUDA kernels take at most %lld", (long long)dimension.count,
            dimension.name, (long long)kMaxGrid);
      return KDA_UNSUPPORTED;
    }
  }
  if (a->num_queries > kMaxInt / a->num_heads || a->batch > kMaxInt / a->num_heads ||
      (a->num_queries > 0 && a->batch > kMaxInt / a->num_heads / a->num_queries)) {
    print(message, message_size, "query has %lld x %lld rows of %d heads; the CUDA kernels take at most %lld heads",
          (long long)a->batch, (long long)a->num_queries, a->num_heads, (long long)kMaxInt);
    return KDA_UNSUPPORTED;
  }
  return check_alignment(a, message, message_size);
}

kda_status kda_cuda_forward(const kda_arguments* a, void* stream, char* message, size_t message_size) {
  const kda_status status = kda_cuda_check(a, message, message_size);
  if (status != KDA_OK) return status;
  if (a->batch == 0 || a->num_queries == 0) return KDA_OK;

  int device = 0, multiprocessors = 0;
  cudaError_t error = cudaGetDevice(&device);
  if (error == cudaSuccess) error = cudaDeviceGetAttribute(&multiprocessors, cudaDevAttrMultiProcessorCount, device);
  if (error == cudaSuccess) {
    Attention attention = {};
    attention.query = a->query;
    attention.key = a->key;
    attention.value = a->value;
    attention.reference_points = a->reference_points;
    attention.sampling_offsets = a->sampling_offsets;
    attention.spatial_shapes = a->spatial_shapes;
    attention.output = a->output;
    attention.num_queries = static_cast<int>(a->num_queries);
    attention.num_tokens = a->num_tokens;
    attention.num_heads = a->num_heads;
    attention.head_dim = a->head_dim;
    attention.num_levels = a->num_levels;
    attention.num_points = a->num_points;
    attention.key_aware = a->key_aware != 0;
    attention.int32_shapes = a->int32_shapes != 0;
    attention.box_references = a->reference_width == 4;
    attention.float_offsets = a->offset_dtype == KDA_FLOAT32;
    attention.scale = 1.44269504f / sqrtf(static_cast<float>(a->head_dim));
    attention.lanes = 1;
    while (attention.lanes * kPieceBytes < a->head_dim * element_bytes(a->dtype)) attention.lanes *= 2;
    Launch launch = shape_launch(a, attention.lanes, multiprocessors);
    launch.stream = static_cast<cudaStream_t>(stream);
    error = a->dtype == KDA_FLOAT32   ? attend_float32(launch, attention)
            : a->dtype == KDA_FLOAT16 ? attend_float16(launch, attention)
                                      : attend_bfloat16(launch, attention);
  }
  if (error != cudaSuccess) {
    cudaGetLastError(); /* so that the caller's next check does not find this one again */
    print(message, message_size, "the CUDA runtime says %s: %s", cudaGetErrorName(error), cudaGetErrorString(error));
    return KDA_DEVICE_ERROR;
  }
  return KDA_OK;
}

}  // extern "C"

/* The CUDA kernel of both operators, a template over the storage type.  CUDA.md tells why it looks as it does.
 *
 * A cell is one (query, head).  `lanes` neighbouring threads of a warp own a cell, with 16 bytes of its channels each.
 *
 *   locate   the lanes share the cell's samples out among them, and leave for each a record in shared memory: where its
 *            four corners lie, which of them are inside the map, and how far the sample is from them
 *   attend   all lanes walk over the records two at a time, gather their own channels of the corners and interpolate;
 *            the logit is summed over the lanes, and the softmax is taken on the way (rescaling what was summed when a
 *            larger logit comes), so that a sample is gathered once for its logit and its value
 */
#include <math.h>

#include "check.h"
#include "cuda_kernel.h"

namespace kda {

/* Where the running maximum of the logits starts: finite, so that a logit of minus infinity gives e^-inf = 0 and not a
 * NaN. */
constexpr float kLowestLogit = -3.402823466e38f;
constexpr unsigned kWholeWarp = 0xffffffff;

/* ---- locate ------------------------------------------------------------------------------------------- */

/* A sample in shared memory: x the token of the upper left corner, y the map's width and below it a bit for each corner
 * inside the map (upper left, upper right, lower left, lower right), z and w the bits of the distances to the right of
 * and below that corner.  All zeros: outside. */
typedef uint4 Record;

__device__ inline int64_t read_side(const Attention& a, int index) {
  return a.int32_shapes ? static_cast<const int32_t*>(a.spatial_shapes)[index]
                        : static_cast<const int64_t*>(a.spatial_shapes)[index];
}

/* Height, width and first token of level `level`.  A level that does not fit into the tokens counts as empty, so that
 * wrong shapes, which the host cannot see, read nothing that is not there. */
__device__ inline int4 read_level(const Attention& a, int level) {
  int64_t first = 0;
  for (int l = 0;; ++l) {
    const int64_t height = read_side(a, 2 * l), width = read_side(a, 2 * l + 1);
    const bool sane = height >= 1 && height <= kMaxSide && width >= 1 && width <= kMaxSide;
    const int64_t area = sane ? height * width : 0;
    if (l == level) {
      if (!sane || first + area > a.num_tokens) return make_int4(0, 0, 0, 0);
      return make_int4(static_cast<int>(height), static_cast<int>(width), static_cast<int>(first), 0);
    }
    first += area;
  }
}

template <class Storage>
__device__ inline float2 read_offset(const Attention& a, int64_t pair) {
  return a.float_offsets ? __ldcs(static_cast<const float2*>(a.sampling_offsets) + pair)
                         : Storage::load_pair(a.sampling_offsets, pair);
}

/* `box` points to the reference of the sample's query and level. */
__device__ inline Record locate(const Attention& a, int4 map, const float* box, float2 offset, int points) {
  const float height = static_cast<float>(map.x), width = static_cast<float>(map.y);
  float x, y; /* in pixels */
  if (a.box_references) {
    const float scale = 0.5f / static_cast<float>(points);
    x = fmaf(fmaf(offset.x * scale, box[2], box[0]), width, -0.5f);
    y = fmaf(fmaf(offset.y * scale, box[3], box[1]), height, -0.5f);
  } else {
    x = fmaf(box[0], width, -0.5f) + offset.x;
    y = fmaf(box[1], height, -0.5f) + offset.y;
  }
  /* NaN fails the comparison and lies outside, like an infinity; what is left fits an integer. */
  if (!(x >= -1.0f && x < width && y >= -1.0f && y < height)) return make_uint4(0, 0, 0, 0);
  const float left = floorf(x), upper = floorf(y);
  const int column = static_cast<int>(left), row = static_cast<int>(upper);
  const unsigned in_left = column >= 0, in_right = column + 1 < map.y;
  const unsigned in_upper = row >= 0, in_lower = row + 1 < map.x;
  const unsigned corners =
      (in_upper & in_left) | (in_upper & in_right) << 1 | (in_lower & in_left) << 2 | (in_lower & in_right) << 3;
  const int token = map.z + row * map.y + column; /* of a corner that may lie outside, then not read */
  return make_uint4(static_cast<unsigned>(token), static_cast<unsigned>(map.y) << 4 | corners,
                    __float_as_uint(x - left), __float_as_uint(y - upper));
}

/* ---- attend ------------------------------------------------------------------------------------------- */

struct Corners {
  uint4 piece[4];
};

/* `map` is this lane's piece of token 0 and `pitch` the bytes from one token to the next.  A corner outside gives zeros
 * and is not read: not its neighbour times 0, which could be NaN. */
__device__ __forceinline__ Corners gather(const char* map, int pitch, Record sample, bool has_channels) {
  const unsigned inside = has_channels ? sample.y : 0;
  const int64_t upper = int64_t{static_cast<int>(sample.x)} * pitch;
  const int64_t lower = upper + int64_t{static_cast<int>(sample.y >> 4)} * pitch;
  const uint4 zeros = make_uint4(0, 0, 0, 0);
  Corners corners;
  corners.piece[0] = inside & 1 ? __ldg(reinterpret_cast<const uint4*>(map + upper)) : zeros;
  corners.piece[1] = inside & 2 ? __ldg(reinterpret_cast<const uint4*>(map + (upper + pitch))) : zeros;
  corners.piece[2] = inside & 4 ? __ldg(reinterpret_cast<const uint4*>(map + lower)) : zeros;
  corners.piece[3] = inside & 8 ? __ldg(reinterpret_cast<const uint4*>(map + (lower + pitch))) : zeros;
  return corners;
}

/* sum += weight * the sample between the corners */
template <class Storage>
__device__ __forceinline__ void interpolate(const Corners& corners, Record sample, float weight, float* sum) {
  const float x = __uint_as_float(sample.z), y = __uint_as_float(sample.w);
  const float upper = weight - weight * y, lower = weight * y;
  const float of_corner[4] = {upper - upper * x, upper * x, lower - lower * x, lower * x};
#pragma unroll
  for (int c = 0; c < 4; ++c) {
    float channels[Storage::kChannels];
    Storage::unpack(corners.piece[c], channels);
#pragma unroll
    for (int i = 0; i < Storage::kChannels; ++i) sum[i] = fmaf(of_corner[c], channels[i], sum[i]);
  }
}

/* The sum of `x` over a cell's lanes, the same bits in all of them. */
template <int kLanes>
__device__ __forceinline__ float sum_over_lanes(float x, int lanes) {
#pragma unroll
  for (int distance = (kLanes ? kLanes : lanes) / 2; distance > 0; distance /= 2) {
    x += __shfl_xor_sync(kWholeWarp, x, distance);
  }
  return x;
}

enum class Logit { kFromValue, kFromKey, kGiven };

/* Blocks that a multiprocessor should hold, which caps a thread's registers at 64 (4 blocks), 80 or 128: as many as the
 * compiler reaches without spilling. */
constexpr int min_blocks(Logit logit, int lanes) { return 4 - (logit == Logit::kFromKey) - (lanes == 0); }

/* kLanes: threads of a cell, all with channels; 0: ask `a`.  kLevels and kPoints: their numbers; 0: ask `a`. */
template <class Storage, Logit kLogit, int kLanes, int kLevels, int kPoints>
__global__ void __launch_bounds__(kMaxThreads, min_blocks(kLogit, kLanes)) attend(const __grid_constant__ Attention a) {
  constexpr int kChannels = Storage::kChannels;
  constexpr bool kEven = kLevels * kPoints > 0 && kLevels * kPoints % 2 == 0;
  const int lanes = kLanes ? kLanes : a.lanes, levels = kLevels ? kLevels : a.num_levels;
  const int points = kPoints ? kPoints : a.num_points, samples = levels * points;
  const int dim = kLanes ? kLanes * kChannels : a.head_dim;

  /* In shared memory: the levels, the cells' records, and the cells' logits where they are given. */
  extern __shared__ uint4 shared[];
  int4* const maps = reinterpret_cast<int4*>(shared);
  const int thread = static_cast<int>(threadIdx.x), cells = static_cast<int>(blockDim.x) / lanes;
  const int cell_in_block = thread / lanes, lane = thread % lanes;
  Record* const first_record = shared + KDA_MAX_LEVELS;
  Record* const records = first_record + cell_in_block * records_of(samples);
  float* const logits = reinterpret_cast<float*>(first_record + cells * records_of(samples)) + cell_in_block * samples;
  if (thread < levels) maps[thread] = read_level(a, thread);

  /* A block has one head and neighbouring queries, which mostly look at the same tokens. */
  const unsigned heads_and_items = blockIdx.x / a.chunks, chunk = blockIdx.x % a.chunks;
  const int head = static_cast<int>(heads_and_items % a.num_heads);
  const int64_t item = heads_and_items / a.num_heads;
  int64_t query_index = int64_t{chunk} * cells + cell_in_block;
  const bool in_range = query_index < a.num_queries;
  if (!in_range) query_index = a.num_queries - 1; /* works in vain: no thread may miss a shuffle */
  const int64_t row = item * a.num_queries + query_index;
  const int64_t cell = row * a.num_heads + head;
  const bool has_channels = kLanes || lane * kChannels < dim;
  const int64_t element = cell * dim + lane * kChannels; /* of query and output: this lane's first */

  float query[kChannels] = {};
  if (kLogit != Logit::kGiven && has_channels) {
    Storage::unpack(__ldcs(Storage::piece(a.query, element)), query);
#pragma unroll
    for (int i = 0; i < kChannels; ++i) query[i] *= a.scale;
  }

  const float* const references = a.reference_points + row * levels * (a.box_references ? 4 : 2);
  float highest = kLowestLogit;
  const auto locate_sample = [&](int i, float2 offset) {
    const int level = i / points;
    records[i] = locate(a, maps[level], references + level * (a.box_references ? 4 : 2), offset, points);
    if (kLogit == Logit::kGiven) {
      logits[i] = Storage::load(a.query, cell * samples + i);
      highest = fmaxf(highest, logits[i]);
    }
  };
  if constexpr (kLanes > 0 && kLevels * kPoints > 0) {
    /* This lane's offsets are on their way while the block waits for its levels. */
    constexpr int kShare = (kLevels * kPoints + kLanes - 1) / kLanes;
    float2 offsets[kShare];
#pragma unroll
    for (int i = 0; i < kShare; ++i) {
      if (lane + i * kLanes < samples) offsets[i] = read_offset<Storage>(a, cell * samples + lane + i * kLanes);
    }
    __syncthreads();
#pragma unroll
    for (int i = 0; i < kShare; ++i) {
      if (lane + i * kLanes < samples) locate_sample(lane + i * kLanes, offsets[i]);
    }
  } else {
    __syncthreads();
    for (int i = lane; i < samples; i += lanes) locate_sample(i, read_offset<Storage>(a, cell * samples + i));
    if (lane == 0) records[samples] = make_uint4(0, 0, 0, 0); /* the last one's partner where their number is odd */
  }
  __syncwarp();
  if (kLogit == Logit::kGiven) {
#pragma unroll
    for (int distance = lanes / 2; distance > 0; distance /= 2) {
      highest = fmaxf(highest, __shfl_xor_sync(kWholeWarp, highest, distance));
    }
  }

  const int pitch = a.num_heads * dim * static_cast<int>(kPieceBytes / kChannels);
  const int64_t first_element = (item * a.num_tokens * a.num_heads + head) * dim + lane * kChannels;
  const char* const value = reinterpret_cast<const char*>(Storage::piece(a.value, first_element));
  const char* const key =
      kLogit == Logit::kFromKey ? reinterpret_cast<const char*>(Storage::piece(a.key, first_element)) : value;

  float output[kChannels] = {}, sum = 0;
#pragma unroll 1
  for (int first = 0; first < samples; first += 2) {
    Record sample[2];
    Corners corners[2];
#pragma unroll
    for (int s = 0; s < 2; ++s) {
      sample[s] = records[first + s];
      corners[s] = gather(key, pitch, sample[s], has_channels);
    }
    if constexpr (kLogit == Logit::kGiven) {
#pragma unroll
      for (int s = 0; s < 2; ++s) {
        const bool is_sample = kEven || first + s < samples;
        const float weight = is_sample ? __expf(logits[first + s] - highest) : 0.0f;
        sum += weight;
        interpolate<Storage>(corners[s], sample[s], weight, output);
      }
    } else {
      float sampled[2][kChannels] = {}, logit[2] = {};
#pragma unroll
      for (int s = 0; s < 2; ++s) {
        interpolate<Storage>(corners[s], sample[s], 1.0f, sampled[s]);
#pragma unroll
        for (int i = 0; i < kChannels; ++i) logit[s] = fmaf(query[i], sampled[s][i], logit[s]);
      }
      Corners value_corners[2]; /* asked for when the key's registers are free */
      if constexpr (kLogit == Logit::kFromKey) {
#pragma unroll
        for (int s = 0; s < 2; ++s) value_corners[s] = gather(value, pitch, sample[s], has_channels);
      }
#pragma unroll
      for (int s = 0; s < 2; ++s) {
        logit[s] = sum_over_lanes<kLanes>(logit[s], lanes);
        if (!kEven && first + s >= samples) logit[s] = -INFINITY;
      }
      const float before = highest;
      highest = fmaxf(highest, fmaxf(logit[0], logit[1]));
      const float kept = __expf(before - highest);
      sum *= kept;
#pragma unroll
      for (int i = 0; i < kChannels; ++i) output[i] *= kept;
#pragma unroll
      for (int s = 0; s < 2; ++s) {
        const float weight = __expf(logit[s] - highest);
        sum += weight;
        if constexpr (kLogit == Logit::kFromKey) {
          interpolate<Storage>(value_corners[s], sample[s], weight, output);
        } else {
#pragma unroll
          for (int i = 0; i < kChannels; ++i) output[i] = fmaf(weight, sampled[s][i], output[i]);
        }
      }
    }
  }

  if (in_range && has_channels) {
    const float scale = 1.0f / sum;
#pragma unroll
    for (int i = 0; i < kChannels; ++i) output[i] *= scale;
    *const_cast<uint4*>(Storage::piece(a.output, element)) = Storage::pack(output);
  }
}

/* ---- the host's side ---------------------------------------------------------------------------------- */

template <class Storage, int kLanes, int kLevels, int kPoints>
cudaError_t launch_kernel(const Launch& launch, const Attention& a) {
  void (*const kernel)(Attention) = !a.key_aware ? attend<Storage, Logit::kGiven, kLanes, kLevels, kPoints>
                                    : a.key      ? attend<Storage, Logit::kFromKey, kLanes, kLevels, kPoints>
                                                 : attend<Storage, Logit::kFromValue, kLanes, kLevels, kPoints>;
  cudaLaunchConfig_t config = {};
  config.gridDim = dim3(static_cast<unsigned>(launch.blocks));
  config.blockDim = dim3(static_cast<unsigned>(launch.threads));
  config.dynamicSmemBytes = launch.shared_bytes;
  config.stream = launch.stream;
  return cudaLaunchKernelEx(&config, kernel, a);
}

/* The usual shapes, heads of 32 or 64 channels and four levels of four points, have kernels of their own. */
template <class Storage>
cudaError_t launch_kernel(const Launch& launch, const Attention& a) {
  constexpr int kLanes32 = 32 / Storage::kChannels, kLanes64 = 64 / Storage::kChannels;
  const bool four = a.num_levels == 4 && a.num_points == 4;
  if (a.head_dim == 32) {
    return four ? launch_kernel<Storage, kLanes32, 4, 4>(launch, a) : launch_kernel<Storage, kLanes32, 0, 0>(launch, a);
  }
  if (a.head_dim == 64 && four) return launch_kernel<Storage, kLanes64, 4, 4>(launch, a);
  return launch_kernel<Storage, 0, 0, 0>(launch, a);
}

}  // namespace kda

/* The CUDA kernel of both operators, a template over the storage type.  CUDA.md tells why it looks as it does.
 *
 * A cell is one (query, head).  `lanes` neighbouring threads of a warp own a cell, with 16 bytes of its channels each.
 *
 *   locate   the lanes share the cell's samples out among them, and leave for each a record in shared memory: where its
 *            four corners lie and what they weigh.  Given logits become part of the weights here
 *   attend   all lanes walk over the records two at a time, gather their own channels of the corners and interpolate;
 *            the logit is summed over the lanes, and the softmax is taken on the way (rescaling what was summed when a
 *            much larger logit comes), so that a sample is gathered once for its logit and its value
 */
#include <math.h>

#include "check.h"
#include "cuda_kernel.h"

namespace kda {

/* Where the running maximum of the logits starts: finite, so that a logit of minus infinity gives 2^-inf = 0 and not a
 * NaN. */
constexpr float kLowestLogit = -3.402823466e38f;
/* How far a logit may lie above the maximum that weights are relative to, in powers of two, before what was summed is
 * rescaled: FP32 has room for 2^8 times 64 samples, and most cells then rescale once. */
constexpr float kSlack = 8;
constexpr float kLog2E = 1.44269504f;
constexpr unsigned kWholeWarp = 0xffffffff;

/* 2^x; results below 2^-126 are 0.  The instruction itself: exp2f adds three for them. */
__device__ __forceinline__ float power_of_two(float x) {
#ifdef __CUDA_ARCH__
  float result;
  asm("ex2.approx.ftz.f32 %0, %1;" : "=f"(result) : "f"(x));
  return result;
#else
  return exp2f(x);
#endif
}

/* 1 / x to a unit or two, in one instruction; sums of weights, one of which is 1, are far from where it flushes to 0.
 */
__device__ __forceinline__ float reciprocal(float x) {
#ifdef __CUDA_ARCH__
  float result;
  asm("rcp.approx.ftz.f32 %0, %1;" : "=f"(result) : "f"(x));
  return result;
#else
  return 1.0f / x;
#endif
}

/* ---- levels ------------------------------------------------------------------------------------------- */

__device__ inline int64_t read_side(const Attention& a, int index) {
  return a.int32_shapes ? __ldg(static_cast<const int*>(a.spatial_shapes) + index)
                        : __ldg(static_cast<const long long*>(a.spatial_shapes) + index);
}

constexpr int kBandRows = 8; /* a power of two */

/* Height, width and first token of level `level`, and the bits of 1 / (8 widths).  A level that does not fit into the
 * tokens gets sides of -1, between which no sample lies: wrong shapes, which the host cannot see, read nothing that is
 * not there. */
template <int kLevels>
__device__ inline int4 read_level(const Attention& a, int level) {
  int64_t first = 0;
  int4 map = make_int4(-1, -1, 0, 0);
#pragma unroll
  for (int l = 0; l < (kLevels ? kLevels : a.num_levels); ++l) { /* all: their loads do not wait for one another */
    const int64_t height = read_side(a, 2 * l), width = read_side(a, 2 * l + 1);
    const bool sane = static_cast<uint64_t>(height - 1) < kMaxSide && static_cast<uint64_t>(width - 1) < kMaxSide;
    const int64_t area = sane ? int64_t{static_cast<int>(height)} * static_cast<int>(width) : 0;
    if (l == level && sane && first + area <= a.num_tokens) {
      map = make_int4(static_cast<int>(height), static_cast<int>(width), static_cast<int>(first), 0);
    }
    first += area;
  }
  map.w = __float_as_int(reciprocal(static_cast<float>(kBandRows * map.y)));
  return map;
}

/* The query that the kernel computes as its `index`-th.  An encoder's queries are the tokens of its last levels, row by
 * row: they are taken in bands of 8 rows, column by column, so that those of a block lie in a square and sample what
 * the others sample.  A permutation of the tokens of each level that the last num_queries tokens hold whole, whatever
 * the queries are. */
__device__ inline int order_query(const Attention& a, const int4* maps, int levels, int index) {
  const int start = static_cast<int>(a.num_tokens) - a.num_queries, token = start + index;
  int4 map = maps[0];
#pragma unroll
  for (int l = 1; l < levels; ++l) {
    if (token >= maps[l].z) map = maps[l];
  }
  const int in_map = token - map.z, band = kBandRows * map.y;
  /* Bands before it: at most 2^19, of which FP32 is off by one at most. */
  int bands = static_cast<int>(static_cast<float>(in_map) * __int_as_float(map.w)), in_band = in_map - bands * band;
  if (in_band < 0) --bands, in_band += band;
  if (in_band >= band) ++bands, in_band -= band;
  /* Only bands that have all their rows; a level that does not fit has none. */
  if (start < 0 || map.z < start || bands < 0 || kBandRows * (bands + 1) > map.x) return index;
  const unsigned i = static_cast<unsigned>(in_band);
  return index - in_band + static_cast<int>(i % kBandRows * static_cast<unsigned>(map.y) + i / kBandRows);
}

/* ---- locate ------------------------------------------------------------------------------------------- */

/* How a record packs the steps from a sample's upper left corner to the others: 1 if the right ones are a token
 * further, twice the tokens to the lower ones, and the sign where the sample is inside the map. */
constexpr unsigned kColumnStep = 1, kRowSteps = 0x7ffffffe, kInside = 0x80000000;

/* A sample's two pixels along one axis and their weights.  Where one of them lies outside the map the other stands in
 * for it, at half its weight each: what is read is then always inside, every load is made, and nothing that is not a
 * corner is multiplied by 0, which could make a NaN. */
struct Pixels {
  int first;
  bool step; /* the second pixel is the next one, and not the first again */
  float weights[2];
};

__device__ __forceinline__ Pixels locate_pixels(float x, float size) {
  const float first = floorf(x), to_second = x - first, to_first = 1.0f - to_second;
  const bool no_first = first < 0, no_second = first >= size - 1;
  const float half = 0.5f * (no_first ? to_second : to_first);
  const bool step = !(no_first || no_second);
  return {static_cast<int>(fmaxf(first, 0.0f)), step, {step ? to_first : half, step ? to_second : half}};
}

__device__ __forceinline__ bool is_inside(unsigned steps) { return static_cast<int>(steps) < 0; }

struct Reference {
  float x, y, width, height;
};

/* Neighbouring floats in one load, or two; `element` is a multiple of kCount, as is `pair`. */
template <int kCount>
__device__ __forceinline__ void read_floats(const void* tensor, int64_t element, float* floats) {
  const float* const address = static_cast<const float*>(tensor) + element;
  if constexpr (kCount == 1) {
    floats[0] = __ldcs(address);
  } else if constexpr (kCount == 2) {
    const float2 pair = __ldcs(reinterpret_cast<const float2*>(address));
    floats[0] = pair.x;
    floats[1] = pair.y;
  } else {
    static_assert(kCount % 4 == 0);
#pragma unroll
    for (int i = 0; i < kCount; i += 4) {
      const float4 four = __ldcs(reinterpret_cast<const float4*>(address + i));
      floats[i] = four.x;
      floats[i + 1] = four.y;
      floats[i + 2] = four.z;
      floats[i + 3] = four.w;
    }
  }
}

template <int kCount>
__device__ __forceinline__ void read_float_pairs(const void* tensor, int64_t pair, float2* pairs) {
  float floats[2 * kCount];
  read_floats<2 * kCount>(tensor, 2 * pair, floats);
#pragma unroll
  for (int i = 0; i < kCount; ++i) pairs[i] = {floats[2 * i], floats[2 * i + 1]};
}

/* A map as the samples of one reference see it: pixel = origin + offset * scale. */
struct Frame {
  float origin_x, origin_y, scale_x, scale_y, width, height;
  int pitch, first; /* tokens of a row; the map's first token */
};

__device__ __forceinline__ Frame make_frame(const Attention& a, int4 map, Reference reference, int points) {
  const float height = static_cast<float>(map.x), width = static_cast<float>(map.y);
  const float share = 0.5f / static_cast<float>(points);
  return {fmaf(reference.x, width, -0.5f),
          fmaf(reference.y, height, -0.5f),
          a.box_references ? reference.width * share * width : 1.0f,
          a.box_references ? reference.height * share * height : 1.0f,
          width,
          height,
          map.y,
          map.z};
}

/* `weight`: of all corners. */
template <class Storage>
__device__ __forceinline__ void locate(const Frame& frame, float2 offset, float weight, uint4* record) {
  float x = fmaf(offset.x, frame.scale_x, frame.origin_x), y = fmaf(offset.y, frame.scale_y, frame.origin_y);
  /* NaN fails the comparison and lies outside, like an infinity; what is left fits an integer. */
  const bool inside = x >= -1.0f && x < frame.width && y >= -1.0f && y < frame.height;
  x = inside ? x : 0.0f; /* the level's first token, or the first of all, then stands in for the corners */
  y = inside ? y : 0.0f;
  const Pixels columns = locate_pixels(x, frame.width), rows = locate_pixels(y, frame.height);
  const unsigned steps = (rows.step ? 2 * static_cast<unsigned>(frame.pitch) : 0u) | (columns.step ? kColumnStep : 0u) |
                         (inside ? kInside : 0u);
  const float upper = rows.weights[0] * weight, lower = rows.weights[1] * weight;
  const float weights[4] = {upper * columns.weights[0], upper * columns.weights[1], lower * columns.weights[0],
                            lower * columns.weights[1]};
  Storage::write_record(record, static_cast<unsigned>(frame.first + rows.first * frame.pitch + columns.first), steps,
                        weights);
}

/* ---- attend ------------------------------------------------------------------------------------------- */

struct Corners {
  uint4 piece[4];
};

/* `map` is this lane's piece of token 0 and `pitch` the bytes from one token to the next. */
__device__ __forceinline__ Corners gather(const char* map, unsigned pitch, unsigned token, unsigned steps) {
  const char* const upper = map + uint64_t{token} * pitch;
  const char* const lower = upper + uint64_t{steps & kRowSteps} * (pitch / 2);
  /* Signed, or the compiler takes it out of the wide multiply-adds that addresses are. */
  const int64_t to_right = int64_t{static_cast<int>(steps & kColumnStep)} * static_cast<int>(pitch);
  Corners corners;
  corners.piece[0] = __ldg(reinterpret_cast<const uint4*>(upper));
  corners.piece[1] = __ldg(reinterpret_cast<const uint4*>(upper + to_right));
  corners.piece[2] = __ldg(reinterpret_cast<const uint4*>(lower));
  corners.piece[3] = __ldg(reinterpret_cast<const uint4*>(lower + to_right));
  return corners;
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

template <int kLanes>
__device__ __forceinline__ float highest_of_lanes(float x, int lanes) {
#pragma unroll
  for (int distance = (kLanes ? kLanes : lanes) / 2; distance > 0; distance /= 2) {
    x = fmaxf(x, __shfl_xor_sync(kWholeWarp, x, distance));
  }
  return x;
}

enum class Logit { kFromValue, kFromKey, kGiven };

/* Blocks that a multiprocessor should hold, which caps a thread's registers at 80 (3 blocks) or 128: what the compiler
 * needs to ask for the eight corners of a pair of samples before it uses the first, without spilling. */
constexpr int min_blocks(Logit logit, int lanes) { return logit == Logit::kFromKey || lanes == 0 ? 2 : 3; }

/* kLanes: threads of a cell, all with channels; 0: ask `a`.  kLevels and kPoints: their numbers; 0: ask `a`. */
template <class Storage, Logit kLogit, int kLanes, int kLevels, int kPoints>
__global__ void __launch_bounds__(kMaxThreads, min_blocks(kLogit, kLanes)) attend(const __grid_constant__ Attention a) {
  constexpr int kChannels = Storage::kChannels, kRecord = Storage::kRecordPieces;
  constexpr bool kOwnShape = kLevels * kPoints > 0;
  constexpr bool kEven = kOwnShape && kLevels * kPoints % 2 == 0;
  const int lanes = kLanes ? kLanes : a.lanes, levels = kLevels ? kLevels : a.num_levels;
  const int points = kPoints ? kPoints : a.num_points, samples = levels * points;
  const int dim = kLanes ? kLanes * kChannels : a.head_dim;

  /* The levels, what the block's slice of value and key is away from their start, and the cells' records. */
  extern __shared__ uint4 shared[];
  int4* const maps = reinterpret_cast<int4*>(shared);
  int64_t* const slice = reinterpret_cast<int64_t*>(shared + KDA_MAX_LEVELS);
  /* Unsigned, for divisions that are shifts. */
  const int cells = static_cast<int>(blockDim.x / static_cast<unsigned>(lanes));
  const int cell_in_block = static_cast<int>(threadIdx.x / static_cast<unsigned>(lanes));
  const int lane = static_cast<int>(threadIdx.x % static_cast<unsigned>(lanes));
  uint4* const records = shared + kBlockPieces + cell_in_block * pieces_of_cell(samples, kRecord);
  /* A block has one head and neighbouring queries, which mostly look at the same tokens. */
  const int head = static_cast<int>(blockIdx.y);
  if (const int thread = static_cast<int>(threadIdx.x); thread < levels) maps[thread] = read_level<kLevels>(a, thread);
  if (threadIdx.x == 0) *slice = (int64_t{blockIdx.z} * a.num_tokens * a.num_heads + head) * dim;
  __syncthreads();

  int query_index = static_cast<int>(blockIdx.x) * cells + cell_in_block;
  const bool in_range = query_index < a.num_queries;
  if (!in_range) query_index = a.num_queries - 1; /* works in vain: no thread may miss a shuffle */
  query_index = order_query(a, maps, levels, query_index);
  const int row = static_cast<int>(blockIdx.z) * a.num_queries + query_index;
  const int64_t cell = row * a.num_heads + head; /* kda_cuda_check: fits 32 bits */
  /* A lane without channels reads what the first one reads, and neither adds to a logit nor writes. */
  const bool has_channels = kLanes || lane * kChannels < dim;
  const int first_channel = has_channels ? lane * kChannels : 0;
  const int64_t element = cell * dim + first_channel; /* of query and output */

  float query[kChannels] = {}, output[kChannels] = {}, sum = 0;
  if constexpr (kOwnShape) {
    /* A lane's samples are neighbours of one level: one load for their offsets, and one reference. */
    constexpr int kShare = kLevels * kPoints / kLanes;
    static_assert(kShare * kLanes == kLevels * kPoints && kPoints % kShare == 0);
    const int level = lane * kShare / kPoints, first_sample = lane * kShare;
    float2 offsets[kShare];
    float weights[kShare];
    Storage::template read_offsets<kShare>(a, cell * samples + first_sample, offsets);
    Reference reference = {};
    if (a.box_references) {
      const float4 box = __ldg(reinterpret_cast<const float4*>(a.reference_points) + (int64_t{row} * levels + level));
      reference = {box.x, box.y, box.z, box.w};
    } else {
      const float2 point = __ldg(reinterpret_cast<const float2*>(a.reference_points) + (int64_t{row} * levels + level));
      reference = {point.x, point.y, 0, 0};
    }
    if constexpr (kLogit == Logit::kGiven) {
      Storage::template read_numbers<kShare>(a.query, cell * samples + first_sample, weights);
    } else {
      Storage::unpack(__ldcs(Storage::piece(a.query, element)), query);
    }
    if constexpr (kLogit == Logit::kGiven) {
      float highest = kLowestLogit;
#pragma unroll
      for (int i = 0; i < kShare; ++i) highest = fmaxf(highest, weights[i]);
      highest = highest_of_lanes<kLanes>(highest, lanes);
#pragma unroll
      for (int i = 0; i < kShare; ++i) sum += weights[i] = power_of_two((weights[i] - highest) * kLog2E);
      sum = sum_over_lanes<kLanes>(sum, lanes);
    }
    const Frame frame = make_frame(a, maps[level], reference, points);
#pragma unroll
    for (int i = 0; i < kShare; ++i) {
      const float weight = kLogit == Logit::kGiven ? weights[i] : 1.0f;
      locate<Storage>(frame, offsets[i], weight, records + (first_sample + i) * kRecord);
    }
  } else {
    if (kLogit != Logit::kGiven && has_channels) Storage::unpack(__ldcs(Storage::piece(a.query, element)), query);
    float highest = kLowestLogit;
    if (kLogit == Logit::kGiven) {
      for (int i = lane; i < samples; i += lanes) {
        highest = fmaxf(highest, Storage::read_number(a.query, cell * samples + i));
      }
      highest = highest_of_lanes<kLanes>(highest, lanes);
    }
    for (int i = lane; i < samples; i += lanes) {
      const int level = i / points;
      const float* const box = a.reference_points + (int64_t{row} * levels + level) * (a.box_references ? 4 : 2);
      const Reference reference = {__ldg(box), __ldg(box + 1), a.box_references ? __ldg(box + 2) : 0,
                                   a.box_references ? __ldg(box + 3) : 0};
      float2 offset;
      Storage::template read_offsets<1>(a, cell * samples + i, &offset);
      float weight = 1.0f;
      if (kLogit == Logit::kGiven) {
        weight = power_of_two((Storage::read_number(a.query, cell * samples + i) - highest) * kLog2E);
        sum += weight;
      }
      locate<Storage>(make_frame(a, maps[level], reference, points), offset, weight, records + i * kRecord);
    }
    if (kLogit == Logit::kGiven) sum = sum_over_lanes<kLanes>(sum, lanes);
    if (samples % 2 && lane == 0) { /* outside: the last one's partner */
      const float no_weights[4] = {};
      Storage::write_record(records + samples * kRecord, 0, 0, no_weights);
    }
  }
  __syncwarp();
#pragma unroll
  for (int i = 0; i < kChannels; ++i) query[i] *= a.scale;

  const unsigned pitch = static_cast<unsigned>(a.num_heads * dim) * (kPieceBytes / kChannels);
  const int64_t first_element = *slice + first_channel; /* loaded, or some compilers compute it anew for every pair */
  const char* const value = reinterpret_cast<const char*>(Storage::piece(a.value, first_element));
  const char* const key =
      kLogit == Logit::kFromKey ? reinterpret_cast<const char*>(Storage::piece(a.key, first_element)) : value;

  float highest = kLowestLogit, limit = kLowestLogit; /* of a logit before what was summed is rescaled */
  const uint4 *const last = records + (samples - 1) * kRecord, *record = records;
#pragma unroll 1
  for (int left = samples; left > 0; left -= 2, record += 2 * kRecord) {
    typename Storage::Sample sample[2];
    Corners corners[2];
    float sampled[2][kChannels];
#pragma unroll
    for (int s = 0; s < 2; ++s) {
      sample[s] = Storage::read_record(record + s * kRecord);
      corners[s] = gather(key, pitch, sample[s].token, sample[s].steps);
    }
#pragma unroll
    for (int s = 0; s < 2; ++s) Storage::interpolate(corners[s], sample[s].weights, sampled[s]);
    if constexpr (kLogit == Logit::kGiven) {
#pragma unroll
      for (int s = 0; s < 2; ++s) {
        const bool inside = is_inside(sample[s].steps);
#pragma unroll
        for (int i = 0; i < kChannels; ++i) output[i] = inside ? output[i] + sampled[s][i] : output[i];
      }
    } else {
      float logit[2] = {};
#pragma unroll
      for (int s = 0; s < 2; ++s) {
#pragma unroll
        for (int i = 0; i < kChannels; ++i) logit[s] = fmaf(query[i], sampled[s][i], logit[s]);
        if (!has_channels || !is_inside(sample[s].steps)) logit[s] = 0;
        if constexpr (kLogit == Logit::kFromKey) { /* asked for when the key's registers are free */
          corners[s] = gather(value, pitch, sample[s].token, sample[s].steps);
        }
      }
#pragma unroll
      for (int s = 0; s < 2; ++s) {
        logit[s] = sum_over_lanes<kLanes>(logit[s], lanes);
        if (!kEven && s == 1 && record == last) logit[s] = -INFINITY;
      }
      const float higher = fmaxf(logit[0], logit[1]);
      const bool exceeds = higher > limit;
      if (__any_sync(kWholeWarp, exceeds)) { /* the warp together, by 2^0 where a cell's own did not */
        const float raised = exceeds ? higher : highest, kept = power_of_two(highest - raised);
        highest = raised;
        limit = raised + kSlack;
        sum *= kept;
#pragma unroll
        for (int i = 0; i < kChannels; ++i) output[i] *= kept;
      }
#pragma unroll
      for (int s = 0; s < 2; ++s) {
        const float weight = power_of_two(logit[s] - highest);
        const bool inside = is_inside(sample[s].steps);
        sum += weight;
        if constexpr (kLogit == Logit::kFromKey) {
          Storage::interpolate(corners[s], sample[s].weights, sampled[s]);
        }
#pragma unroll
        for (int i = 0; i < kChannels; ++i) {
          if (inside) output[i] = fmaf(weight, sampled[s][i], output[i]);
        }
      }
    }
  }

  if (in_range && has_channels) {
    const float scale = reciprocal(sum);
#pragma unroll
    for (int i = 0; i < kChannels; ++i) output[i] *= scale;
    __stwb(const_cast<uint4*>(Storage::piece(a.output, element)), Storage::pack(output));
  }
}

/* ---- the host's side ---------------------------------------------------------------------------------- */

template <class Storage, int kLanes, int kLevels, int kPoints>
cudaError_t launch_kernel(const Launch& launch, const Attention& a) {
  void (*const kernel)(Attention) = !a.key_aware ? attend<Storage, Logit::kGiven, kLanes, kLevels, kPoints>
                                    : a.key      ? attend<Storage, Logit::kFromKey, kLanes, kLevels, kPoints>
                                                 : attend<Storage, Logit::kFromValue, kLanes, kLevels, kPoints>;
  cudaLaunchConfig_t config = {};
  config.gridDim = launch.grid;
  config.blockDim = dim3(static_cast<unsigned>(launch.threads));
  config.dynamicSmemBytes = launch.shared_bytes;
  config.stream = launch.stream;
  return cudaLaunchKernelEx(&config, kernel, a);
}

/* The usual shapes, heads of 32 or 64 channels and four levels of four points, have kernels of their own. */
template <class Storage>
cudaError_t launch_kernel(const Launch& launch, const Attention& a) {
  constexpr int kLanes32 = 32 / Storage::kChannels, kLanes64 = 64 / Storage::kChannels;
  const bool usual = is_usual(a.num_levels, a.num_points);
  if (a.head_dim == 32) {
    return usual ? launch_kernel<Storage, kLanes32, 4, 4>(launch, a)
                 : launch_kernel<Storage, kLanes32, 0, 0>(launch, a);
  }
  if (a.head_dim == 64 && usual) return launch_kernel<Storage, kLanes64, 4, 4>(launch, a);
  return launch_kernel<Storage, 0, 0, 0>(launch, a);
}

}  // namespace kda

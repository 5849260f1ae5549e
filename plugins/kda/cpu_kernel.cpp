/* The CPU kernels: one source of GCC vector extensions, compiled once per instruction set (KDA_KERNEL, KDA_ISA,
 * KDA_LANES).  README.md has the measurements behind its choices. */
#include "cpu_kernel.h"
#include "cpu_vectors.h"

#if defined(__F16C__)
#include <immintrin.h>
#elif defined(__aarch64__)
#include <arm_neon.h>
#endif

namespace {

using kda::kMaxSamples;
using kda::Level;
using kda::Plan;

/* Queries between the prefetch of a row and its use: rows of one head lie M*D apart, out of the hardware's sight. */
constexpr int64_t kAhead = 6;

/* ---- storage types ---------------------------------------------------------------------------------- */

#if defined(__AVX512F__)
KDA_INLINE Floats half_to_float(const uint16_t* source) {
  return (Floats)_mm512_maskz_cvtph_ps(0xffff, _mm256_loadu_si256(reinterpret_cast<const __m256i*>(source)));
}
KDA_INLINE void float_to_half(uint16_t* target, Floats x) {
  _mm256_storeu_si256(reinterpret_cast<__m256i*>(target),
                      _mm512_maskz_cvtps_ph(0xffff, (__m512)x, _MM_FROUND_TO_NEAREST_INT));
}
#elif defined(__F16C__)
KDA_INLINE Floats half_to_float(const uint16_t* source) {
  return (Floats)_mm256_cvtph_ps(_mm_loadu_si128(reinterpret_cast<const __m128i*>(source)));
}
KDA_INLINE void float_to_half(uint16_t* target, Floats x) {
  _mm_storeu_si128(reinterpret_cast<__m128i*>(target), _mm256_cvtps_ph((__m256)x, _MM_FROUND_TO_NEAREST_INT));
}
#elif defined(__aarch64__)
KDA_INLINE Floats half_to_float(const uint16_t* source) {
  return (Floats)vcvt_f32_f16(vreinterpret_f16_u16(vld1_u16(source)));
}
KDA_INLINE void float_to_half(uint16_t* target, Floats x) {
  vst1_u16(target, vreinterpret_u16_f16(vcvt_f16_f32((float32x4_t)x)));
}
#else
KDA_INLINE Ints widen(const uint16_t* source) {
  Ints bits;
  for (int i = 0; i < kLanes; ++i) bits[i] = source[i];
  return bits;
}
KDA_INLINE Floats half_to_float(const uint16_t* source) {
  Ints half = widen(source);
  Ints magnitude = (half & 0x7fff) << 13;
  /* Multiplying by 2^112 rebiases the exponent, subnormals included; infinities and NaN keep an exponent of ones. */
  Floats finite = as_floats(magnitude) * 0x1p112f;
  Ints special = magnitude | 0x7f800000;
  Ints bits = magnitude >= (0x7c00 << 13) ? special : as_ints(finite);
  return as_floats(bits | (half & 0x8000) << 16);
}
KDA_INLINE void float_to_half(uint16_t* target, Floats x) {
  Ints bits = as_ints(x) & 0x7fffffff;
  Ints sign = (as_ints(x) >> 16) & 0x8000;
  /* Below 2^-14 the addition of 0.5 lets the float adder round to a multiple of 2^-24, the half subnormals' unit. */
  Ints subnormal = as_ints(as_floats(bits) + 0.5f) - 0x3f000000;
  Ints normal = (bits - (112 << 23) + 0xfff + ((bits >> 13) & 1)) >> 13;
  Ints half = bits < (113 << 23) ? subnormal : normal;
  half = bits >= 0x477ff000 ? splat(0x7c00) : half; /* 65520 and above round to infinity */
  half = bits > 0x7f800000 ? splat(0x7e00) : half;
  half |= sign;
  for (int i = 0; i < kLanes; ++i) target[i] = static_cast<uint16_t>(half[i]);
}
#endif

KDA_INLINE Floats bfloat_to_float(const uint16_t* source) {
  Ints bits;
  for (int i = 0; i < kLanes; ++i) bits[i] = source[i];
  return as_floats(bits << 16);
}
KDA_INLINE void float_to_bfloat(uint16_t* target, Floats x) {
  Ints bits = as_ints(x);
  Ints rounded = ((bits + 0x7fff + ((bits >> 16) & 1)) >> 16) & 0xffff;
  rounded = (bits & 0x7fffffff) > 0x7f800000 ? splat(0x7fc0) : rounded;
  for (int i = 0; i < kLanes; ++i) target[i] = static_cast<uint16_t>(rounded[i]);
}

template <Floats (*convert)(const uint16_t*)>
KDA_INLINE void to_floats(const uint16_t* source, int64_t count, float* target) {
  int64_t i = 0;
  for (; i + kLanes <= count; i += kLanes) store(target + i, convert(source + i));
  if (i < count) {
    uint16_t rest[kLanes] = {};
    __builtin_memcpy(rest, source + i, (count - i) * sizeof(uint16_t));
    Floats x = convert(rest);
    __builtin_memcpy(target + i, &x, (count - i) * sizeof(float));
  }
}

/* `count` elements of `dtype`, from the `offset`-th on. */
KDA_INLINE void read(const void* source, int32_t dtype, int64_t offset, int64_t count, float* target) {
  if (dtype == KDA_FLOAT32) {
    const float* floats = static_cast<const float*>(source) + offset;
    int64_t i = 0;
    for (; i + kLanes <= count; i += kLanes) store(target + i, load(floats + i));
    for (; i < count; ++i) target[i] = floats[i];
  } else if (dtype == KDA_FLOAT16) {
    to_floats<half_to_float>(static_cast<const uint16_t*>(source) + offset, count, target);
  } else {
    to_floats<bfloat_to_float>(static_cast<const uint16_t*>(source) + offset, count, target);
  }
}

/* The same elements in place where they are floats, else in `buffer`. */
KDA_INLINE const float* view(const void* source, int32_t dtype, int64_t offset, int64_t count, float* buffer) {
  if (dtype == KDA_FLOAT32) return static_cast<const float*>(source) + offset;
  read(source, dtype, offset, count, buffer);
  return buffer;
}

KDA_INLINE int64_t bytes_of(int32_t dtype) { return dtype == KDA_FLOAT32 ? 4 : 2; }

/* The first `count` (at most kLanes) lanes of `x`. */
KDA_INLINE void write(void* target, int32_t dtype, int64_t offset, int64_t count, Floats x) {
  if (dtype == KDA_FLOAT32) {
    if (count == kLanes) {
      store(static_cast<float*>(target) + offset, x);
    } else {
      __builtin_memcpy(static_cast<float*>(target) + offset, &x, count * sizeof(float));
    }
  } else {
    uint16_t packed[kLanes];
    if (dtype == KDA_FLOAT16) {
      float_to_half(packed, x);
    } else {
      float_to_bfloat(packed, x);
    }
    __builtin_memcpy(static_cast<uint16_t*>(target) + offset, packed, count * sizeof(uint16_t));
  }
}

/* ---- repack ----------------------------------------------------------------------------------------- */

void repack_tensor(const Plan* plan, const void* source, float* target, int64_t begin, int64_t end) {
  const kda_arguments* a = plan->arguments;
  const int64_t dim = a->head_dim, width = dim * a->num_heads, stride = plan->stride;
  int l = 0;
  for (int64_t row = begin; row < end; ++row) {
    while (l + 1 < a->num_levels && row >= plan->levels[l + 1].first_row) ++l;
    const Level* level = &plan->levels[l];
    const int64_t y = row - level->first_row - 2;
    const int64_t first = level->origin - 1 + y * level->pitch; /* workspace index of column -1 */
    const bool inside = y >= 0 && y < level->height;
    /* The last row of all carries one token more, column W of row H. */
    const int64_t zeros = inside ? 1 : level->pitch + (row == plan->rows - 1);
    for (int64_t head = 0; head < a->num_heads; ++head) {
      __builtin_memset(target + (head * plan->tokens + first) * stride, 0, zeros * stride * sizeof(float));
    }
    if (!inside) continue;
    const int64_t token = plan->item * a->num_tokens + level->first_token + y * level->width;
    if (a->dtype == KDA_FLOAT32 && dim == stride) {
      const float* from = static_cast<const float*>(source) + token * width;
      for (int64_t x = 0; x < level->width; ++x) {
        for (int64_t head = 0; head < a->num_heads; ++head, from += dim) {
          float* cell = target + (head * plan->tokens + first + 1 + x) * stride;
          for (int64_t i = 0; i < dim; i += kLanes) store(cell + i, load(from + i));
        }
      }
      continue;
    }
    for (int64_t x = 0; x < level->width; ++x) {
      for (int64_t head = 0; head < a->num_heads; ++head) {
        float* cell = target + (head * plan->tokens + first + 1 + x) * stride;
        read(source, a->dtype, (token + x) * width + head * dim, dim, cell);
        for (int64_t d = dim; d < stride; ++d) cell[d] = 0;
      }
    }
  }
}

void repack(const Plan* plan, int64_t begin, int64_t end) {
  const kda_arguments* a = plan->arguments;
  repack_tensor(plan, a->value, plan->value, begin, end);
  if (a->key_aware && a->key) repack_tensor(plan, a->key, plan->key, begin, end);
}

/* ---- sampling locations ------------------------------------------------------------------------------- */

/* The levels' constants, spread over the lanes: lane p belongs to level p / P. */
struct Lanes {
  alignas(64) float width[kMaxSamples];
  alignas(64) float height[kMaxSamples];
  /* In floats of the map: from a row to the next, and to pixel (0, 0). */
  alignas(64) int32_t pitch[kMaxSamples];
  alignas(64) int32_t origin[kMaxSamples];
  int32_t token; /* from a token to the next */
};

/* Samples that a (query, head) has at most; kFour: four levels of four points. */
template <bool kFour>
constexpr int kMost = kFour ? 16 : kMaxSamples;

/* Where the samples of one (query, head) read: floats from the map's start to the corners upper left, upper right,
 * lower left, lower right, and the corners' weights.  In the workspace the first is enough; in the value as it came, a
 * corner outside the map has -1. */
template <bool kFour>
struct Samples {
  alignas(64) int32_t corner[4][kMost<kFour>];
  alignas(64) float weight[4][kMost<kFour>];
};

KDA_INLINE void fill_lanes(const Plan* plan, Lanes* lanes) {
  const kda_arguments* a = plan->arguments;
  const int num_points = a->num_points;
  lanes->token = static_cast<int32_t>(plan->in_place ? a->num_heads * a->head_dim : plan->stride);
  for (int p = 0; p < kMaxSamples; ++p) {
    /* Lanes beyond the last point repeat the last level, so that they compute something harmless. */
    const int l = p / num_points < a->num_levels ? p / num_points : a->num_levels - 1;
    lanes->width[p] = static_cast<float>(plan->levels[l].width);
    lanes->height[p] = static_cast<float>(plan->levels[l].height);
    const Level* level = &plan->levels[l];
    lanes->pitch[p] = (plan->in_place ? level->width : level->pitch) * lanes->token;
    lanes->origin[p] = (plan->in_place ? static_cast<int32_t>(level->first_token) : level->origin) * lanes->token;
  }
}

/* A vector's worth of samples, from lane `p` on; x and y in pixels of their levels. */
template <bool kFour, bool kInPlace>
KDA_INLINE void locate(const Lanes* lanes, int32_t token, int p, Floats x, Floats y, Samples<kFour>* samples) {
  const Floats width = load(lanes->width + p), height = load(lanes->height + p);
  /* NaN fails the comparison and lies outside, like an infinity; what is left fits an integer. */
  const Ints inside = (x >= -1.0f) & (x < width) & (y >= -1.0f) & (y < height);
  x = inside ? x : splat(-1.0f);
  y = inside ? y : splat(-2.0f);
  const Ints column = floor_to_int(x), row = floor_to_int(y);
  const Floats right = x - __builtin_convertvector(column, Floats), left = 1.0f - right;
  const Floats lower = y - __builtin_convertvector(row, Floats), upper = 1.0f - lower;
  const Ints pitch = load(lanes->pitch + p);
  const Ints corner = load(lanes->origin + p) + row * pitch + column * token;
  if (kInPlace) {
    const Ints has_left = column >= 0, has_right = __builtin_convertvector(column + 1, Floats) < width;
    const Ints has_upper = row >= 0, has_lower = (__builtin_convertvector(row + 1, Floats) < height) & (row >= -1);
    store(samples->corner[0] + p, (has_upper & has_left) ? corner : splat(-1));
    store(samples->corner[1] + p, (has_upper & has_right) ? corner + token : splat(-1));
    store(samples->corner[2] + p, (has_lower & has_left) ? corner + pitch : splat(-1));
    store(samples->corner[3] + p, (has_lower & has_right) ? corner + pitch + token : splat(-1));
  } else {
    store(samples->corner[0] + p, corner);
  }
  store(samples->weight[0] + p, upper * left);
  store(samples->weight[1] + p, upper * right);
  store(samples->weight[2] + p, lower * left);
  store(samples->weight[3] + p, lower * right);
}

template <bool kFour, bool kInPlace>
KDA_INLINE void locate_samples(const kda_arguments* a, const Lanes* lanes, int32_t token, const float* reference,
                               const float* offset, Samples<kFour>* samples) {
  const int num_samples = kFour ? 16 : a->num_levels * a->num_points, width = a->reference_width;
  const Ints even = lane_numbers() * 2;
  const float box_scale = 0.5f / static_cast<float>(a->num_points);
  for (int p = 0; p < num_samples; p += kLanes) {
    const Floats first = load(offset + 2 * p), second = load(offset + 2 * p + kLanes);
    Floats x = __builtin_shuffle(first, second, even);
    Floats y = __builtin_shuffle(first, second, even + 1);
    Floats centre_x, centre_y, box_width = {}, box_height = {};
    if (kFour) {
      /* Four points a level: this vector's levels are neighbours in memory. */
      const Ints level = lane_numbers() >> 2;
      if (width == 4) {
        const Floats boxes = load(reference + p);
        centre_x = __builtin_shuffle(boxes, level * 4);
        centre_y = __builtin_shuffle(boxes, level * 4 + 1);
        box_width = __builtin_shuffle(boxes, level * 4 + 2);
        box_height = __builtin_shuffle(boxes, level * 4 + 3);
      } else {
        Floats centres = {};
        __builtin_memcpy(&centres, reference + p / 2, sizeof centres / 2);
        centre_x = __builtin_shuffle(centres, level * 2);
        centre_y = __builtin_shuffle(centres, level * 2 + 1);
      }
    } else {
      centre_x = centre_y = Floats{};
      for (int i = 0; i < kLanes && p + i < num_samples; ++i) {
        const float* box = reference + (p + i) / a->num_points * width;
        centre_x[i] = box[0];
        centre_y[i] = box[1];
        box_width[i] = width == 4 ? box[2] : 0;
        box_height[i] = width == 4 ? box[3] : 0;
      }
    }
    const Floats level_width = load(lanes->width + p), level_height = load(lanes->height + p);
    if (width == 4) {
      x *= box_width * level_width * box_scale;
      y *= box_height * level_height * box_scale;
    }
    x += centre_x * level_width - 0.5f;
    y += centre_y * level_height - 0.5f;
    locate<kFour, kInPlace>(lanes, token, p, x, y, samples);
  }
}

/* ---- attention ---------------------------------------------------------------------------------------- */

/* A vector of a sample: the four corners by their weights. */
template <bool kFour>
KDA_INLINE Floats interpolate(const float* const* corners, int64_t offset, const Samples<kFour>* samples, int p) {
  return load(corners[0] + offset) * samples->weight[0][p] + load(corners[1] + offset) * samples->weight[1][p] +
         load(corners[2] + offset) * samples->weight[2][p] + load(corners[3] + offset) * samples->weight[3][p];
}

/* A token of zeros, for the corners outside. */
alignas(64) constexpr float kZeros[64] = {};

/* Where sample `p` of a map reads; `token`, `pitch`: floats from a token and from a row to the next one. */
template <bool kFour, bool kInPlace>
KDA_INLINE void find_corners(const float* map, int32_t token, int64_t pitch, const Samples<kFour>* samples, int p,
                             const float** corners) {
  if (kInPlace) {
    for (int c = 0; c < 4; ++c) corners[c] = samples->corner[c][p] < 0 ? kZeros : map + samples->corner[c][p];
  } else {
    const uint32_t corner = static_cast<uint32_t>(samples->corner[0][p]);
    corners[0] = map + corner;
    corners[1] = map + corner + token;
    corners[2] = map + pitch + corner;
    corners[3] = map + pitch + corner + token;
  }
}

/* The first and the last cache line of a row that a later query will want. */
template <int kWrite>
KDA_INLINE void prefetch(const void* tensor, int64_t offset, int64_t bytes) {
  const uintptr_t row = reinterpret_cast<uintptr_t>(tensor) + offset;
  __builtin_prefetch(reinterpret_cast<const void*>(row), kWrite, 3);
  __builtin_prefetch(reinterpret_cast<const void*>(row + bytes - 1), kWrite, 3);
}

/* What is the same for all queries of a chunk, and the steps that a query takes.  kVectors: vectors in a token, or 0 to
 * ask the plan; kFour: four levels of four points; kShared: the key is the value and the samples are kept from the
 * logits to the output; kInPlace: the value is read as it came. */
template <int kVectors, bool kFour, bool kShared, bool kInPlace>
struct Attention {
  static_assert(kVectors > 0 || !kShared, "samples are kept in an array of fixed size");
  static constexpr int kKept = kShared ? kMost<kFour> * kVectors * kLanes : 1; /* floats of a query's kept samples */

  /* Constants where they can be, which loops are unrolled by. */
  KDA_INLINE int count_samples() const { return kFour ? 16 : a->num_levels * a->num_points; }
  KDA_INLINE int64_t count_vectors() const { return kVectors ? kVectors : plan->stride / kLanes; }
  KDA_INLINE int64_t stride() const { return kVectors ? kVectors * kLanes : plan->stride; }
  /* Floats from a token of a map to the next. */
  KDA_INLINE int32_t token() const { return static_cast<int32_t>(kInPlace ? num_heads * dim : stride()); }

  const Plan* const plan;
  const kda_arguments* const a = plan->arguments;
  const Lanes* const lanes;
  const int64_t num_heads = a->num_heads, dim = a->head_dim;
  /* Floats from row to row of a level. */
  const int64_t pitches[4] = {lanes->pitch[0], lanes->pitch[4], lanes->pitch[8], lanes->pitch[12]};
  const float* const values; /* the map of the chunk's head, or in place the first head's */
  const float* const keys;
  const float scale = 1.0f / __builtin_sqrtf(static_cast<float>(dim));
  /* Bytes of a (query, head). */
  const int64_t query_bytes = (a->key_aware ? dim : count_samples()) * bytes_of(a->dtype);
  const int64_t output_bytes = dim * bytes_of(a->dtype);
  const int64_t offset_bytes = 2 * count_samples() * bytes_of(a->offset_dtype);

  KDA_INLINE Attention(const Plan* plan_, const Lanes* lanes_, int64_t head)
      : plan(plan_),
        lanes(lanes_),
        values(kInPlace ? static_cast<const float*>(a->value) + plan->item * a->num_tokens * token()
                        : plan->value + head * plan->tokens * stride()),
        keys(kInPlace ? values : plan->key + head * plan->tokens * stride()) {}

  KDA_INLINE const float* map_of(const float* map, int64_t head) const { return kInPlace ? map + head * dim : map; }

  /* Where the corners of sample `p` lie in a map. */
  KDA_INLINE void find(const float* map, const Samples<kFour>* samples, int p, const float** corners) const {
    find_corners<kFour, kInPlace>(map, token(), kFour ? pitches[p / 4] : lanes->pitch[p], samples, p, corners);
  }

  /* Asks for the rows of a later query, which the hardware does not see coming. */
  KDA_INLINE void prefetch_rows(int64_t row, int64_t head) const {
    const int64_t cell = row * num_heads + head;
    prefetch<0>(a->sampling_offsets, cell * offset_bytes, offset_bytes);
    prefetch<0>(a->query, cell * query_bytes, query_bytes);
    prefetch<1>(a->output, cell * output_bytes, output_bytes);
  }

  /* Step 1: where the samples of a (query, head) read; the far ones are asked for. */
  KDA_INLINE void locate(int64_t row, int64_t head, Samples<kFour>* samples) const {
    const int num_samples = count_samples();
    const int64_t first = (row * num_heads + head) * num_samples * 2;
    const float* reference = a->reference_points + row * a->num_levels * a->reference_width;
    alignas(64) float buffer[2 * kMaxSamples + 2 * kLanes];
    const float* offset = buffer;
    if (kFour) {
      offset = view(a->sampling_offsets, a->offset_dtype, first, 2 * num_samples, buffer);
    } else {
      /* Whole vectors are read. */
      for (int i = 0; i < 2 * kLanes; i += kLanes) store(buffer + 2 * num_samples + i, Floats{});
      read(a->sampling_offsets, a->offset_dtype, first, 2 * num_samples, buffer);
    }
    locate_samples<kFour, kInPlace>(a, lanes, token(), reference, offset, samples);
    /* In place they come from anywhere in the value; in the workspace only the first level is too large for a near
     * cache. */
    const int num_far = kInPlace ? num_samples : kFour ? 4 : a->num_points;
    for (int p = 0; p < num_far; ++p) {
      const float* corners[4];
      find(map_of(keys, head), samples, p, corners);
      for (const float* corner : corners) {
        for (int64_t d = 0; d < stride(); d += 16) __builtin_prefetch(corner + d, 0, 3);
      }
    }
  }

  /* Step 2: the logits, <query, sampled key> / sqrt(D) or as given, into `weight`; shared samples into `kept`. */
  KDA_INLINE void score(int64_t row, int64_t head, const Samples<kFour>* samples, float* weight, float* kept) const {
    const int num_samples = count_samples();
    const int64_t cell = row * num_heads + head;
    if (!a->key_aware) {
      read(a->query, a->dtype, cell * num_samples, num_samples, weight);
    } else if constexpr (kVectors > 0) {
      score_fixed(cell, map_of(keys, head), samples, weight, kept);
    } else {
      score_any(cell, map_of(keys, head), samples, weight);
    }
  }

  /* For tokens of a fixed number of vectors: the query stays in registers. */
  KDA_INLINE void score_fixed(int64_t cell, const float* map, const Samples<kFour>* samples, float* weight,
                              float* kept) const {
    const int num_samples = count_samples();
    alignas(64) float query_buffer[kVectors * kLanes];
    const float* query = query_buffer;
    if (dim == stride()) {
      query = view(a->query, a->dtype, cell * dim, dim, query_buffer);
    } else {
      for (int v = 0; v < kVectors; ++v) store(query_buffer + v * kLanes, Floats{});
      read(a->query, a->dtype, cell * dim, dim, query_buffer);
    }
    Floats query_vectors[kVectors];
    for (int v = 0; v < kVectors; ++v) query_vectors[v] = load(query + v * kLanes);
    for (int first = 0; first < num_samples; first += kLanes) {
      Floats products[kLanes] = {};
#pragma GCC unroll 16
      for (int i = 0; i < kLanes; ++i) {
        const int p = first + i;
        if (!kFour && p >= num_samples) break;
        const float* corners[4];
        find(map, samples, p, corners);
#pragma GCC unroll 16
        for (int v = 0; v < kVectors; ++v) {
          const Floats sample = interpolate<kFour>(corners, v * kLanes, samples, p);
          if (kShared) store(kept + (p * kVectors + v) * kLanes, sample);
          products[i] = v == 0 ? query_vectors[0] * sample : products[i] + query_vectors[v] * sample;
        }
      }
      store(weight + first, reduce_rows<kLanes>(products, Sum()) * scale);
    }
  }

  /* For tokens of any size: a vector of the query at a time. */
  KDA_INLINE void score_any(int64_t cell, const float* map, const Samples<kFour>* samples, float* weight) const {
    const int num_samples = count_samples();
    const int64_t vectors = count_vectors();
    alignas(64) float query[kLanes];
    for (int first = 0; first < num_samples; first += kLanes) {
      Floats products[kLanes] = {};
      for (int64_t v = 0; v < vectors; ++v) {
        const int64_t rest = dim - v * kLanes < kLanes ? dim - v * kLanes : kLanes;
        store(query, Floats{});
        read(a->query, a->dtype, cell * dim + v * kLanes, rest, query);
        for (int i = 0; i < kLanes && first + i < num_samples; ++i) {
          const float* corners[4];
          find(map, samples, first + i, corners);
          products[i] += load(query) * interpolate<kFour>(corners, v * kLanes, samples, first + i);
        }
      }
      store(weight + first, reduce_rows<kLanes>(products, Sum()) * scale);
    }
  }

  /* Step 4, after the softmax: the output, the sum of the values by `weight`, times `factor`. */
  KDA_INLINE void sum(int64_t row, int64_t head, const Samples<kFour>* samples, const float* weight, const float* kept,
                      float factor) const {
    const int num_samples = count_samples();
    const int64_t vectors = count_vectors();
    const int64_t cell = row * num_heads + head;
    const float* map = map_of(values, head);
    /* Every weight is spread once for all the vectors; eight sums at a time hide the multiply-adds' latency. */
    constexpr int kTogether = kVectors == 0 ? 1 : kVectors < 8 ? kVectors : 8, kSums = 8 / kTogether;
    for (int64_t first = 0; first < vectors; first += kTogether) {
      Floats sums[kSums][kTogether] = {};
#pragma GCC unroll 16
      for (int q = 0; q < num_samples; q += kSums) {
#pragma GCC unroll 8
        for (int i = 0; i < kSums; ++i) {
          const int p = q + i;
          if (!kFour && p >= num_samples) break;
          const float* corners[4];
          if (!kShared) find(map, samples, p, corners);
#pragma GCC unroll 8
          for (int v = 0; v < kTogether; ++v) {
            sums[i][v] += weight[p] * (kShared ? load(kept + (p * vectors + first + v) * kLanes)
                                               : interpolate<kFour>(corners, (first + v) * kLanes, samples, p));
          }
        }
      }
#pragma GCC unroll 8
      for (int v = 0; v < kTogether; ++v) {
        for (int i = 1; i < kSums; ++i) sums[0][v] += sums[i][v];
        const int64_t done = (first + v) * kLanes, rest = dim - done < kLanes ? dim - done : kLanes;
        write(a->output, a->dtype, cell * dim + done, rest, sums[0][v] * factor);
      }
    }
  }
};

/* A chunk of queries, of one head in the workspace, of all heads in place.  Queries go in blocks, whose long chains of
 * dependent operations (the dot products' trees, the softmax) run side by side; before a block's samples are
 * interpolated, the next one's are located. */
template <int kVectors, bool kFour, bool kShared, bool kInPlace>
void attend_chunk(const Plan* plan, const Lanes* lanes, int64_t head, int64_t begin, int64_t end) {
  typedef Attention<kVectors, kFour, kShared, kInPlace> Steps;
  const Steps steps(plan, lanes, head);
  constexpr int kBlock = kInPlace ? 1 : 4;
  struct Block {
    Samples<kFour> samples[kBlock];
    int64_t row[kBlock], head[kBlock];
    int count;
  } blocks[2];
  Block *now = &blocks[0], *next = &blocks[1];
  alignas(64) float weight_array[kBlock][kMost<kFour>] = {};
  alignas(64) float kept_array[kBlock][Steps::kKept];
  float factors[kBlock];
  float (*weight)[kMost<kFour>] = weight_array, (*kept)[Steps::kKept] = kept_array;
  /* Opaque to the compiler, which would otherwise spread every weight from a register by two shuffles, where a load
   * from memory spreads it for nothing. */
  __asm__("" : "+r"(weight), "+r"(kept));

  const int64_t num_queries = steps.a->num_queries, first_row = plan->item * num_queries;
  int64_t query = begin;
  now->count = 0;
  do {
    /* Locate the next block. */
    for (next->count = 0; next->count < kBlock && query < end; ++next->count) {
      const int64_t row = first_row + (kInPlace ? query : plan->order[query]);
      if (!kInPlace) {
        steps.prefetch_rows(first_row + plan->order[query + kAhead < num_queries ? query + kAhead : query], head);
      }
      next->row[next->count] = row;
      next->head[next->count] = head;
      steps.locate(row, head, &next->samples[next->count]);
      if (kInPlace) head = head + 1 < steps.num_heads ? head + 1 : 0;
      query += !kInPlace || head == 0;
    }
    /* Attend this one. */
    for (int i = 0; i < now->count; ++i) steps.score(now->row[i], now->head[i], &now->samples[i], weight[i], kept[i]);
    softmax<kBlock>(weight, steps.count_samples(), factors); /* of a block that is not full, some rows for nothing */
    __asm__ volatile("" : : : "memory");
    for (int i = 0; i < now->count; ++i) {
      steps.sum(now->row[i], now->head[i], &now->samples[i], weight[i], kept[i], factors[i]);
    }
    Block* const done = now;
    now = next;
    next = done;
  } while (now->count);
}

typedef void (*AttendChunk)(const Plan* plan, const Lanes* lanes, int64_t head, int64_t begin, int64_t end);

template <int kVectors>
AttendChunk choose(const Plan* plan) {
  const kda_arguments* a = plan->arguments;
  const bool four = a->num_levels == 4 && a->num_points == 4;
  if constexpr (kVectors > 0) {
    if (plan->in_place) {
      return a->key_aware ? attend_chunk<kVectors, true, true, true> : attend_chunk<kVectors, true, false, true>;
    }
    if (a->key_aware && !a->key) {
      return four ? attend_chunk<kVectors, true, true, false> : attend_chunk<kVectors, false, true, false>;
    }
  }
  return four ? attend_chunk<kVectors, true, false, false> : attend_chunk<kVectors, false, false, false>;
}

void attend(const Plan* plan, int64_t begin, int64_t end) {
  const kda_arguments* a = plan->arguments;
  Lanes lanes;
  fill_lanes(plan, &lanes);
  const AttendChunk attend_chunk = plan->stride == 16   ? choose<16 / kLanes>(plan)
                                   : plan->stride == 32 ? choose<32 / kLanes>(plan)
                                   : plan->stride == 64 ? choose<64 / kLanes>(plan)
                                                        : choose<0>(plan);
  const int64_t heads_apart = plan->in_place ? 1 : a->num_heads; /* tasks that a chunk of queries makes */
  for (int64_t task = begin; task < end; ++task) {
    const int64_t head = task % heads_apart, first = task / heads_apart * plan->query_chunk,
                  last = first + plan->query_chunk;
    if (first < a->num_queries) attend_chunk(plan, &lanes, head, first, last < a->num_queries ? last : a->num_queries);
  }
}

}  // namespace

const kda::Kernel kda::KDA_KERNEL = {KDA_ISA, kLanes, repack, attend};

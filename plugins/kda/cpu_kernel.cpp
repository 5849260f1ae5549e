/* The CPU kernels: GCC vector extensions, compiled once per instruction set (KDA_KERNEL, KDA_ISA, KDA_LANES). */
#include "cpu_kernel.h"

#if defined(__F16C__)
#include <immintrin.h>
#elif defined(__aarch64__)
#include <arm_neon.h>
#endif

namespace {

using kda::Level;
using kda::Plan;
using kda::kMaxSamples;

constexpr int kLanes = KDA_LANES;

typedef float Floats __attribute__((vector_size(kLanes * 4)));
typedef int32_t Ints __attribute__((vector_size(kLanes * 4)));
typedef float LooseFloats __attribute__((vector_size(kLanes * 4), aligned(4)));

#define KDA_INLINE inline __attribute__((always_inline))

KDA_INLINE Floats load(const float *source) { return *reinterpret_cast<const LooseFloats *>(source); }
KDA_INLINE void store(float *target, Floats x) { *reinterpret_cast<LooseFloats *>(target) = x; }
KDA_INLINE Floats splat(float x) { return x - Floats{}; }
KDA_INLINE Ints splat(int32_t x) { return x - Ints{}; }
KDA_INLINE Floats as_floats(Ints x) { return reinterpret_cast<Floats>(x); }
KDA_INLINE Ints as_ints(Floats x) { return reinterpret_cast<Ints>(x); }

/* 0, 1, 2, ... */
KDA_INLINE Ints lane_numbers() {
  Ints lanes{};
  for (int i = 0; i < kLanes; ++i) lanes[i] = i;
  return lanes;
}

/* ---- storage types ---------------------------------------------------------------------------------- */

#if defined(__AVX512F__)
KDA_INLINE Floats half_to_float(const uint16_t *source) {
  return (Floats)_mm512_maskz_cvtph_ps(0xffff, _mm256_loadu_si256(reinterpret_cast<const __m256i *>(source)));
}
KDA_INLINE void float_to_half(uint16_t *target, Floats x) {
  _mm256_storeu_si256(reinterpret_cast<__m256i *>(target), _mm512_maskz_cvtps_ph(0xffff, (__m512)x, _MM_FROUND_TO_NEAREST_INT));
}
#elif defined(__F16C__)
KDA_INLINE Floats half_to_float(const uint16_t *source) {
  return (Floats)_mm256_cvtph_ps(_mm_loadu_si128(reinterpret_cast<const __m128i *>(source)));
}
KDA_INLINE void float_to_half(uint16_t *target, Floats x) {
  _mm_storeu_si128(reinterpret_cast<__m128i *>(target), _mm256_cvtps_ph((__m256)x, _MM_FROUND_TO_NEAREST_INT));
}
#elif defined(__aarch64__)
KDA_INLINE Floats half_to_float(const uint16_t *source) {
  return (Floats)vcvt_f32_f16(vreinterpret_f16_u16(vld1_u16(source)));
}
KDA_INLINE void float_to_half(uint16_t *target, Floats x) {
  vst1_u16(target, vreinterpret_u16_f16(vcvt_f16_f32((float32x4_t)x)));
}
#else
KDA_INLINE Ints widen(const uint16_t *source) {
  Ints bits;
  for (int i = 0; i < kLanes; ++i) bits[i] = source[i];
  return bits;
}
KDA_INLINE Floats half_to_float(const uint16_t *source) {
  Ints half = widen(source);
  Ints magnitude = (half & 0x7fff) << 13;
  /* Multiplying by 2^112 rebiases the exponent, subnormals included; infinities and NaN keep an exponent of ones. */
  Floats finite = as_floats(magnitude) * 0x1p112f;
  Ints special = magnitude | 0x7f800000;
  Ints bits = magnitude >= (0x7c00 << 13) ? special : as_ints(finite);
  return as_floats(bits | (half & 0x8000) << 16);
}
KDA_INLINE void float_to_half(uint16_t *target, Floats x) {
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

KDA_INLINE Floats bfloat_to_float(const uint16_t *source) {
  Ints bits;
  for (int i = 0; i < kLanes; ++i) bits[i] = source[i];
  return as_floats(bits << 16);
}
KDA_INLINE void float_to_bfloat(uint16_t *target, Floats x) {
  Ints bits = as_ints(x);
  Ints rounded = ((bits + 0x7fff + ((bits >> 16) & 1)) >> 16) & 0xffff;
  rounded = (bits & 0x7fffffff) > 0x7f800000 ? splat(0x7fc0) : rounded;
  for (int i = 0; i < kLanes; ++i) target[i] = static_cast<uint16_t>(rounded[i]);
}

template <Floats (*convert)(const uint16_t *)>
KDA_INLINE void to_floats(const uint16_t *source, int64_t count, float *target) {
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
KDA_INLINE void read(const void *source, int32_t dtype, int64_t offset, int64_t count, float *target) {
  if (dtype == KDA_FLOAT32) {
    __builtin_memcpy(target, static_cast<const float *>(source) + offset, count * sizeof(float));
  } else if (dtype == KDA_FLOAT16) {
    to_floats<half_to_float>(static_cast<const uint16_t *>(source) + offset, count, target);
  } else {
    to_floats<bfloat_to_float>(static_cast<const uint16_t *>(source) + offset, count, target);
  }
}

/* The first `count` (at most kLanes) lanes of `x`. */
KDA_INLINE void write(void *target, int32_t dtype, int64_t offset, int64_t count, Floats x) {
  if (dtype == KDA_FLOAT32) {
    if (count == kLanes) {
      store(static_cast<float *>(target) + offset, x);
    } else {
      __builtin_memcpy(static_cast<float *>(target) + offset, &x, count * sizeof(float));
    }
  } else {
    uint16_t packed[kLanes];
    if (dtype == KDA_FLOAT16) {
      float_to_half(packed, x);
    } else {
      float_to_bfloat(packed, x);
    }
    __builtin_memcpy(static_cast<uint16_t *>(target) + offset, packed, count * sizeof(uint16_t));
  }
}

/* ---- repack ----------------------------------------------------------------------------------------- */

void repack_tensor(const Plan *plan, const void *source, float *target, int64_t begin, int64_t end) {
  const kda_arguments *a = plan->arguments;
  const int64_t dim = a->head_dim, width = dim * a->num_heads, stride = plan->stride;
  int l = 0;
  for (int64_t row = begin; row < end; ++row) {
    while (l + 1 < a->num_levels && row >= plan->levels[l + 1].first_row) ++l;
    const Level *level = &plan->levels[l];
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
    for (int64_t x = 0; x < level->width; ++x) {
      for (int64_t head = 0; head < a->num_heads; ++head) {
        float *cell = target + (head * plan->tokens + first + 1 + x) * stride;
        read(source, a->dtype, (token + x) * width + head * dim, dim, cell);
        for (int64_t d = dim; d < stride; ++d) cell[d] = 0;
      }
    }
  }
}

void repack(const Plan *plan, int64_t begin, int64_t end) {
  const kda_arguments *a = plan->arguments;
  repack_tensor(plan, a->value, plan->value, begin, end);
  if (a->key_aware && a->key) repack_tensor(plan, a->key, plan->key, begin, end);
}

/* ---- sampling locations ------------------------------------------------------------------------------- */

/* The levels' constants, spread over the lanes: lane p belongs to level p / P. */
struct Lanes {
  alignas(64) float width[kMaxSamples];
  alignas(64) float height[kMaxSamples];
  alignas(64) int32_t pitch[kMaxSamples];
  alignas(64) int32_t origin[kMaxSamples];
};

/* Where the samples of one (query, head) read: the upper left corner's workspace index, and the weights of the corners
 * upper left, upper right, lower left, lower right. */
struct Samples {
  alignas(64) int32_t index[kMaxSamples];
  alignas(64) float weight[4][kMaxSamples];
};

KDA_INLINE void fill_lanes(const Plan *plan, Lanes *lanes) {
  const int num_points = plan->arguments->num_points;
  for (int p = 0; p < kMaxSamples; ++p) {
    /* Lanes beyond the last point repeat the last level, so that they compute something harmless. */
    const int l = p / num_points < plan->arguments->num_levels ? p / num_points : plan->arguments->num_levels - 1;
    lanes->width[p] = static_cast<float>(plan->levels[l].width);
    lanes->height[p] = static_cast<float>(plan->levels[l].height);
    lanes->pitch[p] = plan->levels[l].pitch;
    lanes->origin[p] = plan->levels[l].origin;
  }
}

/* Truncates towards minus infinity; |x| is below 2^23. */
KDA_INLINE Ints floor_to_int(Floats x) {
  Ints truncated = __builtin_convertvector(x, Ints);
  return truncated + (__builtin_convertvector(truncated, Floats) > x); /* true is -1 */
}

/* A vector's worth of samples, from lane `p` on; x and y in pixels of their levels. */
KDA_INLINE void locate(const Lanes *lanes, int p, Floats x, Floats y, Samples *samples) {
  const Floats width = load(lanes->width + p), height = load(lanes->height + p);
  const Ints pitch = as_ints(load(reinterpret_cast<const float *>(lanes->pitch + p)));
  const Ints origin = as_ints(load(reinterpret_cast<const float *>(lanes->origin + p)));
  /* NaN fails the comparison and lies outside, like an infinity; what is left fits an integer. */
  const Ints inside = (x >= -1.0f) & (x < width) & (y >= -1.0f) & (y < height);
  x = inside ? x : splat(-1.0f);
  y = inside ? y : splat(-2.0f);
  const Ints column = floor_to_int(x), row = floor_to_int(y);
  const Floats right = x - __builtin_convertvector(column, Floats), left = 1.0f - right;
  const Floats lower = y - __builtin_convertvector(row, Floats), upper = 1.0f - lower;
  const Ints index = origin + row * pitch + column;
  store(reinterpret_cast<float *>(samples->index + p), as_floats(index));
  store(samples->weight[0] + p, upper * left);
  store(samples->weight[1] + p, upper * right);
  store(samples->weight[2] + p, lower * left);
  store(samples->weight[3] + p, lower * right);
}

template <bool kFour>
KDA_INLINE void locate_samples(const kda_arguments *a, const Lanes *lanes, const float *reference, const float *offset,
                               Samples *samples) {
  const int num_samples = a->num_levels * a->num_points, width = a->reference_width;
  const Ints even = lane_numbers() * 2;
  const float box_scale = 0.5f / static_cast<float>(a->num_points);
  for (int p = 0; p < num_samples; p += kLanes) {
    const Floats first = load(offset + 2 * p), second = load(offset + 2 * p + kLanes);
    Floats x = __builtin_shuffle(first, second, even);
    Floats y = __builtin_shuffle(first, second, even + 1);
    Floats centre_x, centre_y, box_width = {}, box_height = {};
    if (kFour) {
      /* Four points a level: this vector's levels are neighbours in memory. */
      Floats references = {};
      __builtin_memcpy(&references, reference + p / 4 * width, kLanes / 4 * width * sizeof(float));
      const Ints level = (lane_numbers() >> 2) * width;
      centre_x = __builtin_shuffle(references, level);
      centre_y = __builtin_shuffle(references, level + 1);
      if (width == 4) {
        box_width = __builtin_shuffle(references, level + 2);
        box_height = __builtin_shuffle(references, level + 3);
      }
    } else {
      centre_x = centre_y = Floats{};
      for (int i = 0; i < kLanes && p + i < num_samples; ++i) {
        const float *box = reference + (p + i) / a->num_points * width;
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
    locate(lanes, p, centre_x * level_width - 0.5f + x, centre_y * level_height - 0.5f + y, samples);
  }
}

/* ---- attention ---------------------------------------------------------------------------------------- */

/* Step of a transpose-and-add tree: lanes whose number has bit `kBit` clear get a[i] + a[i + kBit], the others
 * b[i] + b[i - kBit]. */
template <int kBit>
KDA_INLINE Floats add_halves(Floats a, Floats b) {
  const Ints lanes = lane_numbers();
  const Floats straight = __builtin_shuffle(a, b, (lanes & kBit) == 0 ? lanes : lanes + kLanes);
  const Floats crossed = __builtin_shuffle(a, b, ((lanes & kBit) == 0 ? lanes : lanes + kLanes) ^ kBit);
  return straight + crossed;
}

template <int kCount>
KDA_INLINE void add_tree(Floats *rows) {
  for (int i = 0; i < kCount / 2; ++i) rows[i] = add_halves<kCount / 2>(rows[i], rows[i + kCount / 2]);
  if constexpr (kCount > 2) add_tree<kCount / 2>(rows);
}

/* Lane i of the result is the sum of rows[i]. */
KDA_INLINE Floats sum_rows(Floats *rows) {
  add_tree<kLanes>(rows);
  return rows[0];
}

template <int kBit = kLanes / 2>
KDA_INLINE Floats max_everywhere(Floats x) {
  if constexpr (kBit == 0) {
    return x;
  } else {
    const Floats other = __builtin_shuffle(x, lane_numbers() ^ kBit);
    return max_everywhere<kBit / 2>(x > other ? x : other);
  }
}

template <int kBit = kLanes / 2>
KDA_INLINE Floats sum_everywhere(Floats x) {
  if constexpr (kBit == 0) {
    return x;
  } else {
    return sum_everywhere<kBit / 2>(x + __builtin_shuffle(x, lane_numbers() ^ kBit));
  }
}

/* e^x for x <= 0, to 2 ulp; NaN stays NaN, and what would be subnormal is 0.  x = n ln 2 + r with |r| <= ln 2 / 2, and
 * a Taylor polynomial of degree 7 in r. */
KDA_INLINE Floats exp_negative(Floats x) {
  const float kRound = 0x1.8p23f; /* adding it rounds to an integer, left in the low bits of the mantissa */
  const Floats shifted = x * 1.44269504f + kRound;
  const Floats n = shifted - kRound;
  const Floats r = x - n * 0x1.62e4p-1f - n * 0x1.7f7d1cp-20f;
  Floats e = splat(1.0f / 5040);
  e = e * r + 1.0f / 720;
  e = e * r + 1.0f / 120;
  e = e * r + 1.0f / 24;
  e = e * r + 1.0f / 6;
  e = e * r + 0.5f;
  e = e * r + 1.0f;
  e = e * r + 1.0f;
  const Floats power = as_floats((as_ints(shifted) + 127) << 23);
  return x < -87.0f ? Floats{} : e * power;
}

/* Softmax over the first `count` of `logits`, in place; the lanes up to a whole vector become 0. */
KDA_INLINE void softmax(float *logits, int count) {
  const Floats low = splat(-__builtin_inff());
  Floats highest = low, sum = {};
  for (int p = 0; p < count; p += kLanes) {
    const Floats x = lane_numbers() + p < count ? load(logits + p) : low;
    store(logits + p, x);
    highest = x > highest ? x : highest;
  }
  highest = max_everywhere(highest);
  for (int p = 0; p < count; p += kLanes) {
    Floats e = exp_negative(load(logits + p) - highest);
    e = lane_numbers() + p < count ? e : Floats{};
    store(logits + p, e);
    sum += e;
  }
  const Floats scale = 1.0f / sum_everywhere(sum);
  for (int p = 0; p < count; p += kLanes) store(logits + p, load(logits + p) * scale);
}

/* Vector `v` of sample `p` of a map. */
KDA_INLINE Floats interpolate(const float *corner, int64_t pitch, int64_t stride, const Samples *samples, int p) {
  return load(corner) * samples->weight[0][p] + load(corner + stride) * samples->weight[1][p] +
         load(corner + pitch) * samples->weight[2][p] + load(corner + pitch + stride) * samples->weight[3][p];
}

/* One head's chunk of queries.  kVectors: vectors in a token, or 0 to ask the plan; kFour: four levels of four points;
 * kShared: the key is the value and the samples are kept from the logits to the output. */
template <int kVectors, bool kFour, bool kShared>
void attend_chunk(const Plan *plan, const Lanes *lanes, int64_t head, int64_t begin, int64_t end) {
  static_assert(kVectors > 0 || !kShared, "samples are kept in an array of fixed size");
  const kda_arguments *a = plan->arguments;
  const int num_levels = a->num_levels, num_points = a->num_points;
  const int num_samples = kFour ? 16 : num_levels * num_points;
  const int64_t dim = a->head_dim;
  const int64_t vectors = kVectors ? kVectors : plan->stride / kLanes, stride = vectors * kLanes;
  const float *value = plan->value + head * plan->tokens * stride;
  const float *key = plan->key + head * plan->tokens * stride;
  const float scale = 1.0f / __builtin_sqrtf(static_cast<float>(dim));

  for (int64_t q = begin; q < end; ++q) {
    const int64_t row = (plan->item * a->num_queries + q);
    const int64_t cell = row * a->num_heads + head;
    const float *reference = a->reference_points + row * num_levels * a->reference_width;

    Samples samples;
    alignas(64) float offset[2 * kMaxSamples + 2 * kLanes];
    read(a->sampling_offsets, a->offset_dtype, cell * num_samples * 2, num_samples * 2, offset);
    locate_samples<kFour>(a, lanes, reference, offset, &samples);

    alignas(64) float weight[kMaxSamples];
    alignas(64) float kept[kShared ? kMaxSamples * kVectors * kLanes : 1];
    if (a->key_aware) {
      alignas(64) float query[kVectors ? kVectors * kLanes : 1];
      if (kVectors) {
        for (int64_t d = dim; d < stride; ++d) query[d] = 0;
        read(a->query, a->dtype, cell * dim, dim, query);
      }
      for (int first = 0; first < num_samples; first += kLanes) {
        Floats products[kLanes];
        for (int i = 0; i < kLanes; ++i) {
          const int p = first + i;
          products[i] = Floats{};
          if (!kFour && p >= num_samples) continue;
          const float *corner = key + samples.index[p] * stride;
          const int64_t pitch = lanes->pitch[p] * stride;
          for (int64_t v = 0; v < vectors; ++v) {
            const Floats sample = interpolate(corner + v * kLanes, pitch, stride, &samples, p);
            if (kShared) store(kept + (p * vectors + v) * kLanes, sample);
            Floats q_v = {};
            if (kVectors) {
              q_v = load(query + v * kLanes);
            } else {
              alignas(64) float part[kLanes] = {};
              const int64_t rest = dim - v * kLanes < kLanes ? dim - v * kLanes : kLanes;
              read(a->query, a->dtype, cell * dim + v * kLanes, rest, part);
              q_v = load(part);
            }
            products[i] += q_v * sample;
          }
        }
        store(weight + first, sum_rows(products) * scale);
      }
    } else {
      read(a->query, a->dtype, cell * num_samples, num_samples, weight);
    }
    softmax(weight, num_samples);

    Floats output[kVectors ? kVectors : 1];
    for (int64_t v = 0; v < vectors; ++v) {
      Floats *sum = output + (kVectors ? v : 0);
      *sum = Floats{};
      for (int p = 0; p < num_samples; ++p) {
        const Floats sample =
            kShared ? load(kept + (p * vectors + v) * kLanes)
                    : interpolate(value + samples.index[p] * stride + v * kLanes, lanes->pitch[p] * stride, stride, &samples, p);
        *sum += weight[p] * sample;
      }
      const int64_t rest = dim - v * kLanes < kLanes ? dim - v * kLanes : kLanes;
      write(a->output, a->dtype, cell * dim + v * kLanes, rest, *sum);
    }
  }
}

template <int kVectors>
void attend_chunk_of(const Plan *plan, const Lanes *lanes, int64_t head, int64_t begin, int64_t end) {
  const kda_arguments *a = plan->arguments;
  const bool four = a->num_levels == 4 && a->num_points == 4;
  if constexpr (kVectors > 0) {
    if (a->key_aware && !a->key) {
      return four ? attend_chunk<kVectors, true, true>(plan, lanes, head, begin, end)
                  : attend_chunk<kVectors, false, true>(plan, lanes, head, begin, end);
    }
  }
  return four ? attend_chunk<kVectors, true, false>(plan, lanes, head, begin, end)
              : attend_chunk<kVectors, false, false>(plan, lanes, head, begin, end);
}

void attend(const Plan *plan, int64_t begin, int64_t end) {
  Lanes lanes;
  fill_lanes(plan, &lanes);
  for (int64_t task = begin; task < end; ++task) {
    const int64_t head = task / plan->num_chunks;
    const int64_t first = task % plan->num_chunks * plan->query_chunk;
    const int64_t all = plan->arguments->num_queries;
    const int64_t last = first + plan->query_chunk < all ? first + plan->query_chunk : all;
    switch (plan->stride) {
      case 16: attend_chunk_of<16 / kLanes>(plan, &lanes, head, first, last); break;
      case 32: attend_chunk_of<32 / kLanes>(plan, &lanes, head, first, last); break;
      case 64: attend_chunk_of<64 / kLanes>(plan, &lanes, head, first, last); break;
      default: attend_chunk_of<0>(plan, &lanes, head, first, last); break;
    }
  }
}

}  // namespace

const kda::Kernel kda::KDA_KERNEL = {KDA_ISA, kLanes, repack, attend};

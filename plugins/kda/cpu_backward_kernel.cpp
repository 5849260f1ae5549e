/* The CPU kernels of the backward pass, compiled once per instruction set (KDA_KERNEL, KDA_ISA, KDA_LANES).
 *
 * With weights a = softmax(logits), samples V and K of value and key, and g the gradient of the output:
 *
 *   d logit(s)  = a(s) (g V(s) - sum over t of a(t) g V(t))
 *   d query     = sum over s of d logit(s) K(s) / sqrt(D)
 *   d V(s)      = a(s) g
 *   d K(s)      = d logit(s) query / sqrt(D), added to d V(s) where the key is the value
 *   d corner    = sum over the samples it is a corner of, of its weight times d V(s)
 *   d pixel x   = d V(s) times the slope of V along x, + d K(s) times that of K
 */
#include "cpu_backward.h"
#include "cpu_vectors.h"

namespace {

using kda::backward::kMaxSamples;
using kda::backward::Level;
using kda::backward::Plan;
using kda::backward::Scratch;

/* Queries between the prefetch of a row and its use: rows of one head lie M*D apart, out of the hardware's sight. */
constexpr int64_t kAhead = 4;

/* The levels' constants, spread over the lanes: lane p belongs to level p / P. */
struct Lanes {
  alignas(64) float width[kMaxSamples];
  alignas(64) float height[kMaxSamples];
  alignas(64) int32_t pitch[kMaxSamples];  /* floats of a map from a row to the next */
  alignas(64) int32_t origin[kMaxSamples]; /* floats from the map's start to pixel (0, 0) */
  int32_t level[kMaxSamples];
};

/* Where the samples of a query read. */
struct Samples {
  alignas(64) int32_t corner[kMaxSamples]; /* floats from the map's start to the upper left corner */
  alignas(64) float right[kMaxSamples];    /* from the left corners' column, in pixels */
  alignas(64) float lower[kMaxSamples];    /* from the upper corners' row */
};

void fill_lanes(const Plan* plan, Lanes* lanes) {
  const kda_arguments* a = plan->arguments;
  for (int p = 0; p < kMaxSamples; ++p) {
    /* Lanes beyond the last point repeat the last level, so that they compute something harmless. */
    const int l = p / a->num_points < a->num_levels ? p / a->num_points : a->num_levels - 1;
    const Level* level = &plan->levels[l];
    lanes->width[p] = static_cast<float>(level->width);
    lanes->height[p] = static_cast<float>(level->height);
    lanes->pitch[p] = level->pitch * static_cast<int32_t>(plan->stride);
    lanes->origin[p] = level->origin * static_cast<int32_t>(plan->stride);
    lanes->level[p] = l;
  }
}

KDA_INLINE void copy(float* target, const float* source, int64_t count) {
  int64_t i = 0;
  for (; i + kLanes <= count; i += kLanes) store(target + i, load(source + i));
  for (; i < count; ++i) target[i] = source[i];
}

/* [N, S, M*D] -> the map of one head, border and padding zero. */
void pack(const Plan* plan, const void* source, int64_t item, int64_t head, float* map) {
  const kda_arguments* a = plan->arguments;
  const int64_t dim = a->head_dim, width = dim * a->num_heads;
  const float* from = static_cast<const float*>(source) + item * a->num_tokens * width + head * dim;
  __builtin_memset(map, 0, plan->tokens * plan->stride * sizeof(float));
  for (int l = 0; l < a->num_levels; ++l) {
    const Level* level = &plan->levels[l];
    for (int64_t y = 0; y < level->height; ++y) {
      float* row = map + (level->origin + y * level->pitch) * plan->stride;
      for (int64_t x = 0; x < level->width; ++x, from += width) copy(row + x * plan->stride, from, dim);
    }
  }
}

/* The way back. */
void unpack(const Plan* plan, const float* map, int64_t item, int64_t head, float* target) {
  const kda_arguments* a = plan->arguments;
  const int64_t dim = a->head_dim, width = dim * a->num_heads;
  float* to = target + item * a->num_tokens * width + head * dim;
  for (int l = 0; l < a->num_levels; ++l) {
    const Level* level = &plan->levels[l];
    for (int64_t y = 0; y < level->height; ++y) {
      const float* row = map + (level->origin + y * level->pitch) * plan->stride;
      for (int64_t x = 0; x < level->width; ++x, to += width) copy(to, row + x * plan->stride, dim);
    }
  }
}

/* `offset` may be read up to the next whole pair of vectors. */
template <int kSamples>
KDA_INLINE void locate(const kda_arguments* a, int32_t token, const Lanes* lanes, const float* reference,
                       const float* offset, Samples* samples) {
  const int num_samples = kSamples ? kSamples : a->num_levels * a->num_points, width = a->reference_width;
  const float unit = 0.5f / static_cast<float>(a->num_points);
  for (int p = 0; p < num_samples; p += kLanes) {
    const Floats first = load(offset + 2 * p), second = load(offset + 2 * p + kLanes);
    Floats x = __builtin_shuffle(first, second, lane_numbers() * 2);
    Floats y = __builtin_shuffle(first, second, lane_numbers() * 2 + 1);
    const Floats level_width = load(lanes->width + p), level_height = load(lanes->height + p);
    Floats centre_x = {}, centre_y = {};
    for (int i = 0; i < kLanes; ++i) {
      const float* box = reference + lanes->level[p + i] * width;
      centre_x[i] = box[0];
      centre_y[i] = box[1];
    }
    if (width == 4) {
      Floats box_width = {}, box_height = {};
      for (int i = 0; i < kLanes; ++i) {
        const float* box = reference + lanes->level[p + i] * width;
        box_width[i] = box[2];
        box_height[i] = box[3];
      }
      x *= box_width * level_width * unit;
      y *= box_height * level_height * unit;
    }
    x += centre_x * level_width - 0.5f;
    y += centre_y * level_height - 0.5f;
    /* NaN fails the comparison and lies outside, like an infinity; what is left fits an integer. */
    const Ints inside = (x >= -1.0f) & (x < level_width) & (y >= -1.0f) & (y < level_height);
    x = inside ? x : splat(-1.0f);
    y = inside ? y : splat(-2.0f);
    const Ints column = floor_to_int(x), row = floor_to_int(y);
    store(samples->corner + p, load(lanes->origin + p) + row * load(lanes->pitch + p) + column * token);
    store(samples->right + p, x - __builtin_convertvector(column, Floats));
    store(samples->lower + p, y - __builtin_convertvector(row, Floats));
  }
}

/* Every sample with its slopes, [samples, 3, vectors]. */
template <int kVectors>
KDA_INLINE void interpolate(const float* map, const Lanes* lanes, const Samples* samples, int num_samples,
                            int64_t vectors, float* kept) {
  if (kVectors) vectors = kVectors;
  for (int p = 0; p < num_samples; ++p, kept += 3 * vectors * kLanes) {
    const float *upper = map + samples->corner[p], *lower = upper + lanes->pitch[p];
    const float right = samples->right[p], down = samples->lower[p];
#pragma GCC unroll 8
    for (int64_t v = 0; v < vectors; ++v) {
      const int64_t d = v * kLanes;
      const Floats upper_left = load(upper + d), upper_slope = load(upper + vectors * kLanes + d) - upper_left;
      const Floats lower_left = load(lower + d), lower_slope = load(lower + vectors * kLanes + d) - lower_left;
      const Floats upper_sample = upper_left + right * upper_slope;
      const Floats slope = lower_left + right * lower_slope - upper_sample;
      store(kept + d, upper_sample + down * slope);
      store(kept + vectors * kLanes + d, upper_slope + down * (lower_slope - upper_slope));
      store(kept + 2 * vectors * kLanes + d, slope);
    }
  }
}

/* products[p] = <vector, sample p>; lanes behind the last sample become 0. */
template <int kVectors, int kSamples>
KDA_INLINE void multiply(const float* vector, const float* kept, int num_samples, int64_t vectors, float* products) {
  if (kVectors) vectors = kVectors;
  if (kSamples) num_samples = kSamples;
  for (int first = 0; first < num_samples; first += kLanes) {
    Floats rows[kLanes] = {};
#pragma GCC unroll 16
    for (int i = 0; i < kLanes; ++i) {
      if (first + i >= num_samples) break;
      const float* sample = kept + (first + i) * 3 * vectors * kLanes;
#pragma GCC unroll 8
      for (int64_t v = 0; v < vectors; ++v) {
        const Floats product = load(vector + v * kLanes) * load(sample + v * kLanes);
        rows[i] = v == 0 ? product : rows[i] + product;
      }
    }
    store(products + first, reduce_rows<kLanes>(rows, Sum()));
  }
}

/* The weights of a sample's corners. */
struct Corners {
  int32_t upper, lower; /* floats from the map's start to the left ones */
  float weight[4];
};

/* Adds a sample's gradient to its corners.  They are four different tokens: all may be loaded before one is stored. */
KDA_INLINE void scatter(float* map, const Corners* corners, int64_t token, int64_t d, Floats gradient) {
  float *upper = map + corners->upper + d, *lower = map + corners->lower + d;
  const Floats upper_left = load(upper) + corners->weight[0] * gradient;
  const Floats upper_right = load(upper + token) + corners->weight[1] * gradient;
  const Floats lower_left = load(lower) + corners->weight[2] * gradient;
  const Floats lower_right = load(lower + token) + corners->weight[3] * gradient;
  store(upper, upper_left);
  store(upper + token, upper_right);
  store(lower, lower_left);
  store(lower + token, lower_right);
}

enum class Key { kNone, kShared, kOwn };

/* kVectors: vectors in a token, or 0 to ask the plan; kSamples: levels x points, or 0. */
template <int kVectors, int kSamples, Key kKey>
void differentiate_head(const Plan* plan, int64_t item, int64_t head, const Scratch* scratch) {
  const kda_arguments* a = plan->arguments;
  const kda_gradients* gradients = plan->gradients;
  const int num_samples = kSamples ? kSamples : a->num_levels * a->num_points;
  const int64_t dim = a->head_dim;
  const int64_t vectors = kVectors ? kVectors : plan->stride / kLanes, stride = vectors * kLanes;
  const float scale = 1.0f / __builtin_sqrtf(static_cast<float>(dim));
  const float* offsets = static_cast<const float*>(a->sampling_offsets);
  const float* queries = static_cast<const float*>(a->query);
  Lanes lanes;
  fill_lanes(plan, &lanes);
  Samples samples;
  alignas(64) float offset_buffer[2 * kMaxSamples + 2 * kLanes] = {};
  alignas(64) float attention[kMaxSamples]; /* the logits, then their softmax */
  alignas(64) float products[kMaxSamples];  /* of the output's gradient and the samples */
  alignas(64) float logits[kMaxSamples];    /* gradients: of the logits, */
  alignas(64) float key_scale[kMaxSamples]; /* and of <query, key>, which is a logit times sqrt(D) */
  Floats along_x[kLanes], along_y[kLanes];

  /* A row of [N, Q, M*D] in whole vectors. */
  const auto padded = [&](const float* row, float* buffer) {
    if (dim == stride) return row;
    copy(buffer, row, dim);
    return static_cast<const float*>(buffer);
  };
  for (int64_t d = dim; d < stride; ++d) scratch->query[d] = scratch->output_gradient[d] = 0;
  pack(plan, a->value, item, head, scratch->value);
  __builtin_memset(scratch->value_gradient, 0, plan->tokens * stride * sizeof(float));
  if (kKey == Key::kOwn) {
    pack(plan, a->key, item, head, scratch->key);
    __builtin_memset(scratch->key_gradient, 0, plan->tokens * stride * sizeof(float));
  }

  for (int64_t q = 0; q < a->num_queries; ++q) {
    const int64_t row = item * a->num_queries + q, cell = row * a->num_heads + head;
    const int64_t ahead = cell + kAhead * a->num_heads;
    for (int64_t d = 0; d < dim; d += 16) {
      __builtin_prefetch(gradients->output + ahead * dim + d, 0, 3);
      if (kKey == Key::kNone) continue;
      __builtin_prefetch(queries + ahead * dim + d, 0, 3);
      __builtin_prefetch(gradients->query + ahead * dim + d, 1, 3);
    }
    for (int d = 0; d < 2 * num_samples; d += 16) {
      __builtin_prefetch(offsets + ahead * 2 * num_samples + d, 0, 3);
      __builtin_prefetch(gradients->sampling_offsets + ahead * 2 * num_samples + d, 1, 3);
    }

    const float* offset = offsets + cell * num_samples * 2;
    if (num_samples % kLanes != 0) {
      copy(offset_buffer, offset, 2 * num_samples);
      offset = offset_buffer;
    }
    const float* reference = a->reference_points + row * a->num_levels * a->reference_width;
    locate<kSamples>(a, static_cast<int32_t>(stride), &lanes, reference, offset, &samples);

    const float* g = padded(gradients->output + cell * dim, scratch->output_gradient);
    const float* query = g; /* of no use where there is no key */
    interpolate<kVectors>(scratch->value, &lanes, &samples, num_samples, vectors, scratch->value_samples);
    if (kKey == Key::kNone) {
      copy(attention, queries + cell * num_samples, num_samples);
    } else {
      query = padded(queries + cell * dim, scratch->query);
      if (kKey == Key::kOwn) {
        interpolate<kVectors>(scratch->key, &lanes, &samples, num_samples, vectors, scratch->key_samples);
      }
      multiply<kVectors, kSamples>(query, scratch->key_samples, num_samples, vectors, attention);
      for (int p = 0; p < num_samples; p += kLanes) store(attention + p, load(attention + p) * scale);
    }
    float factor;
    softmax<1>(&attention, num_samples, &factor);
    for (int p = 0; p < num_samples; p += kLanes) store(attention + p, load(attention + p) * factor);
    multiply<kVectors, kSamples>(g, scratch->value_samples, num_samples, vectors, products);
    Floats mean = {};
    for (int p = 0; p < num_samples; p += kLanes) mean += load(attention + p) * load(products + p);
    mean = reduce_rows<1>(&mean, Sum());
    for (int p = 0; p < num_samples; p += kLanes) {
      const Floats logit = load(attention + p) * (load(products + p) - mean);
      store(logits + p, logit);
      store(key_scale + p, logit * scale);
    }
    if (kKey == Key::kNone) copy(gradients->query + cell * num_samples, logits, num_samples);

    Floats query_array[kVectors ? kVectors : 1] = {};
    Floats* query_gradient = query_array;
    if (!kVectors) {
      query_gradient = reinterpret_cast<Floats*>(scratch->query_gradient);
      for (int64_t v = 0; v < vectors; ++v) query_gradient[v] = Floats{};
    }
    for (int first = 0; first < num_samples; first += kLanes) {
      for (int i = 0; i < kLanes; ++i) {
        const int p = first + i;
        along_x[i] = along_y[i] = Floats{};
        if (p >= num_samples) continue;
        const float right = samples.right[p], down = samples.lower[p];
        const Corners corners = {samples.corner[p],
                                 samples.corner[p] + lanes.pitch[p],
                                 {(1 - down) * (1 - right), (1 - down) * right, down * (1 - right), down * right}};
        const float *value = scratch->value_samples + p * 3 * stride, *key = scratch->key_samples + p * 3 * stride;
        Floats x = {}, y = {};
#pragma GCC unroll 8
        for (int64_t v = 0; v < vectors; ++v) {
          const int64_t d = v * kLanes;
          Floats sample = attention[p] * load(g + d);
          if (kKey != Key::kNone) {
            const Floats key_sample = key_scale[p] * load(query + d);
            query_gradient[v] += key_scale[p] * load(key + d);
            if (kKey == Key::kShared) {
              sample += key_sample;
            } else {
              scatter(scratch->key_gradient, &corners, stride, d, key_sample);
              x += key_sample * load(key + stride + d);
              y += key_sample * load(key + 2 * stride + d);
            }
          }
          scatter(scratch->value_gradient, &corners, stride, d, sample);
          x += sample * load(value + stride + d);
          y += sample * load(value + 2 * stride + d);
        }
        along_x[i] = x;
        along_y[i] = y;
      }
      const Floats x = reduce_rows<kLanes>(along_x, Sum()), y = reduce_rows<kLanes>(along_y, Sum());
      store(offset_buffer + 2 * first, __builtin_shuffle(x, y, (lane_numbers() >> 1) + (lane_numbers() & 1) * kLanes));
      store(offset_buffer + 2 * first + kLanes,
            __builtin_shuffle(x, y, (lane_numbers() >> 1) + kLanes / 2 + (lane_numbers() & 1) * kLanes));
    }
    copy(gradients->sampling_offsets + cell * num_samples * 2, offset_buffer, 2 * num_samples);
    if (kKey != Key::kNone) {
      float* target = gradients->query + cell * dim;
      for (int64_t v = 0; v < vectors; ++v) {
        const int64_t rest = dim - v * kLanes < kLanes ? dim - v * kLanes : kLanes;
        if (rest == kLanes) {
          store(target + v * kLanes, query_gradient[v]);
        } else {
          __builtin_memcpy(target + v * kLanes, &query_gradient[v], rest * sizeof(float));
        }
      }
    }
  }
  unpack(plan, scratch->value_gradient, item, head, gradients->value);
  if (kKey == Key::kOwn) unpack(plan, scratch->key_gradient, item, head, gradients->key);
}

template <Key kKey>
void choose(const Plan* plan, int64_t item, int64_t head, const Scratch* scratch) {
  const bool common = plan->stride == 32 && plan->arguments->num_levels * plan->arguments->num_points == 16;
  const auto differentiate = common ? differentiate_head<32 / kLanes, 16, kKey> : differentiate_head<0, 0, kKey>;
  differentiate(plan, item, head, scratch);
}

void differentiate(const Plan* plan, int64_t item, int64_t head, const Scratch* scratch) {
  const kda_arguments* a = plan->arguments;
  const auto chosen = !a->key_aware ? choose<Key::kNone> : a->key ? choose<Key::kOwn> : choose<Key::kShared>;
  chosen(plan, item, head, scratch);
}

}  // namespace

const kda::backward::Kernel kda::backward::KDA_KERNEL = {KDA_ISA, kLanes, differentiate};

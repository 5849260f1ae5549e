/* A seeded random attention problem in memory, and the operator's definition in double precision. */
#ifndef LITEDETR_TESTS_PROBLEM_H
#define LITEDETR_TESTS_PROBLEM_H

#include <math.h>
#include <stdint.h>
#include <string.h>

#include <random>
#include <string>
#include <vector>

#include "kda.h"

inline float half_to_float(uint16_t half) {
  const int exponent = half >> 10 & 31, mantissa = half & 1023;
  const double magnitude = exponent == 31 ? (mantissa ? NAN : INFINITY)
                           : exponent     ? ldexp(1024 + mantissa, exponent - 25)
                                          : ldexp(mantissa, -24);
  return static_cast<float>(half >> 15 ? -magnitude : magnitude);
}

inline uint16_t float_to_half(float x) {
  const uint16_t sign = signbit(x) ? 0x8000 : 0;
  if (isnan(x)) return sign | 0x7e00;
  const double magnitude = fabs(x);
  if (magnitude >= 65520) return sign | 0x7c00;
  if (magnitude == 0) return sign;
  int exponent = 0;
  frexp(magnitude, &exponent);
  const int unit = exponent < -13 ? -24 : exponent - 11; /* of the last place */
  /* nearbyint rounds to even; a carry out of the mantissa goes into the exponent, where it belongs. */
  const int steps = static_cast<int>(nearbyint(ldexp(magnitude, -unit)));
  return static_cast<uint16_t>(sign | (((unit + 24) << 10) + steps));
}

inline float bfloat_to_float(uint16_t x) {
  const uint32_t bits = uint32_t{x} << 16;
  float result;
  memcpy(&result, &bits, sizeof result);
  return result;
}

inline uint16_t float_to_bfloat(float x) {
  uint32_t bits;
  memcpy(&bits, &x, sizeof bits);
  if (isnan(x)) return static_cast<uint16_t>(bits >> 16 | 0x40);
  return static_cast<uint16_t>((bits + 0x7fff + (bits >> 16 & 1)) >> 16);
}

/* Numbers stored in one of the operator's dtypes. */
struct Tensor {
  int32_t dtype = KDA_FLOAT32;
  std::vector<float> floats;
  std::vector<uint16_t> words;

  Tensor() = default;
  Tensor(int32_t dtype_, size_t size) : dtype(dtype_) {
    if (dtype == KDA_FLOAT32) {
      floats.resize(size);
    } else {
      words.resize(size);
    }
  }
  size_t size() const { return dtype == KDA_FLOAT32 ? floats.size() : words.size(); }
  float get(size_t i) const {
    return dtype == KDA_FLOAT32   ? floats[i]
           : dtype == KDA_FLOAT16 ? half_to_float(words[i])
                                  : bfloat_to_float(words[i]);
  }
  void set(size_t i, float x) {
    if (dtype == KDA_FLOAT32) {
      floats[i] = x;
    } else {
      words[i] = dtype == KDA_FLOAT16 ? float_to_half(x) : float_to_bfloat(x);
    }
  }
  void* data() { return dtype == KDA_FLOAT32 ? static_cast<void*>(floats.data()) : words.data(); }
};

struct Shape {
  int64_t batch = 1, queries = 1;
  int32_t heads = 1, dim = 4, points = 1, reference_width = 2;
  std::vector<int64_t> levels = {1, 1}; /* height, width, height, width, ... */
  bool key_aware = true, own_key = false;
  int32_t dtype = KDA_FLOAT32, offset_dtype = KDA_FLOAT32;
  bool int32_shapes = false; /* how the operator is given the levels */
};

struct Problem {
  Shape shape;
  int64_t tokens = 0;
  int32_t levels = 0;
  Tensor query, key, value, offsets, output;
  std::vector<float> references;
  std::vector<int32_t> int32_levels;

  explicit Problem(const Shape& s) : shape(s), levels(static_cast<int32_t>(s.levels.size() / 2)) {
    for (int l = 0; l < levels; ++l) tokens += s.levels[2 * l] * s.levels[2 * l + 1];
    const int64_t width = int64_t{s.heads} * s.dim, samples = int64_t{s.heads} * levels * s.points;
    query = Tensor(s.dtype, s.batch * s.queries * (s.key_aware ? width : samples));
    value = Tensor(s.dtype, s.batch * tokens * width);
    if (s.own_key) key = Tensor(s.dtype, value.size());
    offsets = Tensor(s.offset_dtype, s.batch * s.queries * samples * 2);
    references.resize(s.batch * s.queries * levels * s.reference_width);
    output = Tensor(s.dtype, s.batch * s.queries * width);
  }

  static void fill(Tensor* tensor, float scale, std::mt19937* random) {
    std::normal_distribution<float> normal(0, scale);
    for (size_t i = 0; i < tensor->size(); ++i) tensor->set(i, normal(*random));
  }

  /* References spread a little beyond the map, and offsets of a few pixels (or box sizes): inside and outside occur. */
  void randomise(uint32_t seed) {
    std::mt19937 random(seed);
    fill(&query, 1, &random);
    fill(&key, 1, &random);
    fill(&value, 1, &random);
    fill(&offsets, 2, &random);
    std::uniform_real_distribution<float> place(-0.1f, 1.1f), side(0.0f, 0.5f);
    for (size_t i = 0; i < references.size(); ++i) {
      references[i] = shape.reference_width == 4 && i % 4 >= 2 ? side(random) : place(random);
    }
  }

  kda_arguments arguments() {
    kda_arguments a = {};
    a.batch = shape.batch;
    a.num_queries = shape.queries;
    a.num_tokens = tokens;
    a.num_heads = shape.heads;
    a.head_dim = shape.dim;
    a.num_levels = levels;
    a.num_points = shape.points;
    a.reference_width = shape.reference_width;
    a.key_aware = shape.key_aware;
    a.dtype = shape.dtype;
    a.offset_dtype = shape.offset_dtype;
    a.query = query.data();
    a.key = shape.own_key ? key.data() : nullptr;
    a.value = value.data();
    a.reference_points = references.data();
    a.sampling_offsets = offsets.data();
    a.int32_shapes = shape.int32_shapes;
    a.spatial_shapes = shape.levels.data();
    if (shape.int32_shapes) {
      int32_levels.assign(shape.levels.begin(), shape.levels.end());
      a.spatial_shapes = int32_levels.data();
    }
    a.output = output.data();
    return a;
  }

  kda_status run(const kda_executor* executor = nullptr) {
    const kda_arguments a = arguments();
    std::vector<char> workspace(kda_cpu_workspace_size(&a) + 64);
    char* aligned = workspace.data() + (64 - reinterpret_cast<uintptr_t>(workspace.data()) % 64) % 64;
    return kda_cpu_forward(&a, aligned, executor, nullptr, 0);
  }

  /* The definition in kda.h, word for word. */
  std::vector<double> expected() const {
    const Shape& s = shape;
    const int64_t samples = int64_t{levels} * s.points;
    std::vector<double> result(s.batch * s.queries * s.heads * s.dim);
    std::vector<double> keys(samples * s.dim), values(samples * s.dim), weights(samples);
    for (int64_t row = 0; row < s.batch * s.queries; ++row) {
      for (int h = 0; h < s.heads; ++h) {
        const int64_t cell = row * s.heads + h;
        int64_t first_token = row / s.queries * tokens;
        for (int l = 0; l < levels; ++l) {
          const int64_t height = s.levels[2 * l], width = s.levels[2 * l + 1];
          const float* reference = &references[(row * levels + l) * s.reference_width];
          for (int p = 0; p < s.points; ++p) {
            const int64_t sample = int64_t{l} * s.points + p;
            const double dx = offsets.get((cell * samples + sample) * 2);
            const double dy = offsets.get((cell * samples + sample) * 2 + 1);
            const bool box = s.reference_width == 4;
            const double x = box ? reference[0] + dx / s.points * reference[2] * 0.5 : reference[0] + dx / width;
            const double y = box ? reference[1] + dy / s.points * reference[3] * 0.5 : reference[1] + dy / height;
            for (int d = 0; d < s.dim; ++d) {
              const auto at = [&](const Tensor& map) {
                return bilinear(map, first_token, height, width, x * width - 0.5, y * height - 0.5, h * s.dim + d);
              };
              values[sample * s.dim + d] = at(value);
              keys[sample * s.dim + d] = s.own_key ? at(key) : values[sample * s.dim + d];
            }
          }
          first_token += height * width;
        }
        double highest = -INFINITY, sum = 0;
        for (int64_t i = 0; i < samples; ++i) {
          weights[i] = 0;
          for (int d = 0; d < s.dim && s.key_aware; ++d) {
            weights[i] += query.get(cell * s.dim + d) * keys[i * s.dim + d] / sqrt(s.dim);
          }
          if (!s.key_aware) weights[i] = query.get(cell * samples + i);
          highest = fmax(highest, weights[i]);
        }
        for (double& weight : weights) sum += weight = exp(weight - highest);
        for (int64_t i = 0; i < samples; ++i) {
          for (int d = 0; d < s.dim; ++d) result[cell * s.dim + d] += weights[i] / sum * values[i * s.dim + d];
        }
      }
    }
    return result;
  }

 private:
  double bilinear(const Tensor& map, int64_t first_token, int64_t height, int64_t width, double x, double y,
                  int64_t channel) const {
    double sum = 0;
    if (!(fabs(x) < 1e6 && fabs(y) < 1e6)) return 0; /* far outside, infinite or NaN */
    const int64_t x0 = static_cast<int64_t>(floor(x)), y0 = static_cast<int64_t>(floor(y));
    for (int64_t yy = y0; yy <= y0 + 1; ++yy) {
      for (int64_t xx = x0; xx <= x0 + 1; ++xx) {
        if (yy < 0 || yy >= height || xx < 0 || xx >= width) continue;
        const double weight = (1 - fabs(x - xx)) * (1 - fabs(y - yy));
        sum += weight * map.get((first_token + yy * width + xx) * shape.heads * shape.dim + channel);
      }
    }
    return sum;
  }
};

#endif /* LITEDETR_TESTS_PROBLEM_H */

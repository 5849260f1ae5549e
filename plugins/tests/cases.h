/* The cases that the operator of every device must get right, parametrised by how the device runs a problem. */
#ifndef LITEDETR_TESTS_CASES_H
#define LITEDETR_TESTS_CASES_H

#include "checks.h"

struct Device {
  const char* name; /* in messages */
  int dim_step, largest_dim;
  kda_status (*run)(Problem*);
};

inline void run(const Device& device, Problem* problem) {
  CHECK(device.run(problem) == KDA_OK, "%s: %s", device.name, describe(problem->shape).c_str());
}

inline void check_against_definition(const Device& device, Problem* problem) {
  run(device, problem);
  const std::vector<double> expected = problem->expected();
  const double allowed = tolerance(*problem);
  double worst = 0;
  for (size_t i = 0; i < expected.size(); ++i) {
    const double error = fabs(problem->output.get(i) - expected[i]);
    worst = error <= worst ? worst : error; /* keeps a NaN */
  }
  CHECK(worst <= allowed, "%s: error %g, allowed %g: %s", device.name, worst, allowed,
        describe(problem->shape).c_str());
}

/* A third of the rounds are of four levels of four points and heads of 32 or 64, which have kernels of their own. */
inline void test_sweep(const Device& device, int rounds) {
  const int32_t dtypes[] = {KDA_FLOAT32, KDA_FLOAT16, KDA_BFLOAT16};
  std::mt19937 random(1);
  const auto pick = [&](int low, int high) { return std::uniform_int_distribution<int>(low, high)(random); };
  for (int round = 0; round < rounds; ++round) {
    const bool usual = round % 3 == 0;
    Shape s;
    s.batch = pick(1, 3);
    s.queries = pick(1, 40);
    s.heads = pick(1, 4);
    s.dim = usual ? 32 * pick(1, 2) : device.dim_step * pick(1, device.largest_dim / device.dim_step);
    if (round % 5 == 1) s.dim = 32;
    s.points = usual ? 4 : pick(1, KDA_MAX_POINTS);
    s.reference_width = 2 * pick(1, 2);
    s.levels.clear();
    const int levels = usual ? 4 : pick(1, KDA_MAX_LEVELS);
    for (int i = 0; i < 2 * levels; ++i) s.levels.push_back(pick(0, 4) ? pick(2, 12) : 1);
    s.key_aware = pick(0, 3) != 0;
    s.own_key = s.key_aware && pick(0, 2) == 0;
    s.dtype = dtypes[pick(0, 2)];
    s.offset_dtype = pick(0, 1) ? s.dtype : KDA_FLOAT32;
    s.int32_shapes = round % 4 == 1;
    Problem problem(s);
    problem.randomise(round);
    check_against_definition(device, &problem);
  }
}

/* Several chunks of queries for each head, and maps as wide as those of real images. */
inline void test_wide_maps(const Device& device) {
  Shape s;
  s.queries = 150;
  s.heads = 2;
  s.dim = 32;
  s.points = 4;
  s.levels = {20, 167, 10, 84, 5, 42, 3, 21};
  for (int width = 2; width <= 4; width += 2) {
    s.reference_width = width;
    Problem problem(s);
    problem.randomise(7);
    check_against_definition(device, &problem);
  }
}

inline void test_most_samples(const Device& device) {
  for (int dim : {device.dim_step, device.largest_dim}) {
    for (bool key_aware : {false, true}) {
      Shape s;
      s.queries = 40;
      s.dim = dim;
      s.points = KDA_MAX_POINTS;
      s.levels = {4, 4, 3, 5, 2, 2, 1, 1, 1, 3, 2, 1, 5, 1, 2, 3};
      s.key_aware = key_aware;
      s.dtype = KDA_FLOAT16;
      Problem problem(s);
      problem.randomise(9);
      check_against_definition(device, &problem);
    }
  }
}

inline void test_empty(const Device& device) {
  for (bool no_batch : {false, true}) {
    Shape s;
    s.dim = 8;
    s.batch = no_batch ? 0 : 1;
    s.queries = no_batch ? 5 : 0;
    Problem problem(s);
    run(device, &problem);
  }
}

/* One head, one level, one point: the output is the sample itself, whatever the logit.  Sizes are powers of two, so
 * that coordinates are exact. */
inline Problem single_point(float pixel_x, float pixel_y, int64_t height, int64_t width, int32_t dim,
                            int32_t dtype = KDA_FLOAT32, bool key_aware = true) {
  Shape s;
  s.dim = dim;
  s.levels = {height, width};
  s.dtype = dtype;
  s.key_aware = key_aware;
  Problem problem(s);
  problem.randomise(3);
  problem.references = {0.5f / width, 0.5f / height}; /* pixel (0, 0) */
  problem.offsets.set(0, pixel_x);
  problem.offsets.set(1, pixel_y);
  return problem;
}

inline void test_borders(const Device& device) {
  for (int dim : {device.dim_step, 32}) {
    for (int64_t width : {1, 8}) {
      for (int64_t height : {1, 4}) {
        for (float y : {-2.0f, -1.0f, -0.5f, 0.0f, 0.25f, height - 1.0f, height - 0.5f, float(height), height + 3.0f}) {
          for (float x : {-2.0f, -1.0f, -0.5f, 0.0f, 0.75f, width - 1.0f, width - 0.5f, float(width), width + 3.0f}) {
            Problem problem = single_point(x, y, height, width, dim);
            check_against_definition(device, &problem);
          }
        }
      }
    }
  }
}

/* A token of NaN or Inf reaches exactly the samples that it is a corner of inside the map, zero weight included. */
inline void test_non_finite_values(const Device& device) {
  const int64_t height = 4, width = 8;
  for (int32_t dtype : {KDA_FLOAT32, KDA_FLOAT16}) {
    for (int64_t token : {int64_t{0}, width - 1, width + 3, (height - 1) * width, height * width - 1}) {
      const float poison = token % 2 ? NAN : INFINITY;
      const int64_t tx = token % width, ty = token / width;
      for (float y = ty - 2.5f; y <= ty + 2.5f; y += 0.5f) {
        for (float x = tx - 2.5f; x <= tx + 2.5f; x += 0.5f) {
          Problem problem = single_point(x, y, height, width, 32, dtype);
          const double allowed = tolerance(problem);
          for (int d = 0; d < 32; ++d) problem.value.set(token * 32 + d, poison);
          run(device, &problem);
          const bool touched = tx >= floorf(x) && tx <= floorf(x) + 1 && ty >= floorf(y) && ty <= floorf(y) + 1;
          const std::vector<double> expected = problem.expected();
          for (int d = 0; d < 32; ++d) {
            const float got = problem.output.get(d);
            /* A logit of Inf or NaN makes the softmax NaN, so every touched output is NaN. */
            CHECK(isnan(got) == touched, "%s: %g at (%g, %g), token %d", device.name, got, x, y, int(token));
            if (!touched) CHECK(fabs(got - expected[d]) <= allowed, "%s: %g, not %g", device.name, got, expected[d]);
          }
        }
      }
    }
  }
  /* Where the logits are given, channels do not meet. */
  Problem problem = single_point(2.5f, 1.5f, height, width, 32, KDA_FLOAT32, false);
  problem.value.set((2 * width + 3) * 32 + 5, INFINITY);
  run(device, &problem);
  for (int d = 0; d < 32; ++d) CHECK(isinf(problem.output.get(d)) == (d == 5), "%s: channel %d", device.name, d);
}

/* The same for the shapes that have kernels of their own, in all types and for all kinds of keys: many samples on and
 * around borders, at coordinates that are exact in every type, without and with a few numbers that are not finite. */
inline void test_usual_shapes(const Device& device) {
  uint32_t seed = 0;
  for (int32_t dtype : {KDA_FLOAT32, KDA_FLOAT16, KDA_BFLOAT16}) {
    for (int kind = 0; kind < 12; ++kind) {
      Shape s;
      s.batch = s.heads = 2;
      s.queries = 30;
      s.dim = kind % 2 ? 64 : 32;
      s.points = 4;
      s.reference_width = kind / 2 % 2 ? 4 : 2;
      s.key_aware = kind / 4 > 0;
      s.own_key = kind / 4 > 1;
      s.levels = {4, 8, 2, 4, 1, 2, 1, 1};
      s.dtype = dtype;
      s.offset_dtype = seed % 3 ? dtype : KDA_FLOAT32;
      Problem problem(s);
      problem.randomise(++seed);
      for (float& reference : problem.references) reference = roundf(reference * 8) / 8;
      for (size_t i = 0; i < problem.offsets.size(); ++i) {
        problem.offsets.set(i, roundf(problem.offsets.get(i) * 2) / 2);
      }
      check_against_definition(device, &problem);

      const double allowed = tolerance(problem);
      std::mt19937 random(seed);
      const float poisons[] = {NAN, INFINITY, -INFINITY};
      for (float poison : poisons) problem.value.set(random() % problem.value.size(), poison);
      for (float poison : poisons) {
        if (s.own_key) problem.key.set(random() % problem.key.size(), poison);
      }
      run(device, &problem);
      const std::vector<double> expected = problem.expected();
      for (size_t i = 0; i < expected.size(); ++i) {
        const double got = problem.output.get(i), want = expected[i];
        const bool same = isfinite(want) ? fabs(got - want) <= allowed : isnan(want) ? isnan(got) : got == want;
        CHECK(same, "%s: output %zu is %g, not %g: %s", device.name, i, got, want, describe(s).c_str());
      }
    }
  }
}

/* Locations far away, infinite or NaN lie outside: zero, and nothing is read out of bounds. */
inline void test_wild_locations(const Device& device) {
  for (float wild : {1e6f, 3e9f, 1e19f, 1e30f, 3e38f, INFINITY, NAN}) {
    for (float sign : {-1.0f, 1.0f}) {
      for (int where = 0; where < 4; ++where) {
        Problem problem = single_point(0, 0, 4, 8, 32);
        if (where < 2) {
          problem.offsets.set(where, sign * wild);
        } else {
          problem.references[where - 2] = sign * wild;
        }
        run(device, &problem);
        for (int d = 0; d < 32; ++d) CHECK(problem.output.get(d) == 0, "%s: %g", device.name, sign * wild);
      }
    }
  }
  /* Infinite boxes, as inverse sigmoids of invalid proposals make them, among four levels of four points. */
  Shape s;
  s.queries = 9;
  s.dim = 32;
  s.points = 4;
  s.reference_width = 4;
  s.levels = {8, 8, 4, 4, 2, 2, 1, 1};
  Problem problem(s);
  problem.randomise(5);
  for (size_t i = 0; i < problem.references.size(); ++i) {
    if (i % 3) problem.references[i] = i % 2 ? INFINITY : NAN;
  }
  run(device, &problem);
  for (size_t i = 0; i < problem.output.size(); ++i) {
    CHECK(isfinite(problem.output.get(i)), "%s: output %zu", device.name, i);
  }
}

/* A logit of minus infinity takes no part, unless all are; logits far apart do not overflow. */
inline void test_extreme_logits(const Device& device) {
  Shape s;
  s.dim = 32;
  s.points = 4;
  s.levels = {8, 8, 4, 4, 2, 2, 1, 1};
  s.key_aware = false;
  Problem problem(s);
  problem.randomise(11);
  for (int p = 0; p < 16; ++p) problem.query.set(p, p % 3 == 0 ? -INFINITY : p % 3 == 1 ? 3e38f : -3e38f);
  check_against_definition(device, &problem);
  for (int p = 0; p < 16; ++p) problem.query.set(p, -INFINITY);
  run(device, &problem);
  for (int d = 0; d < 32; ++d) CHECK(isnan(problem.output.get(d)), "%s: %g", device.name, problem.output.get(d));

  /* The same from the key: the tokens of the first level make logits of minus infinity. */
  s.key_aware = s.own_key = true;
  Problem keyed(s);
  keyed.randomise(12);
  for (int d = 0; d < 32; ++d) keyed.query.set(d, d == 0);
  for (int64_t token = 0; token < 64; ++token) keyed.key.set(token * 32, -INFINITY);
  for (float& reference : keyed.references) reference = 0.5f;
  for (size_t i = 0; i < keyed.offsets.size(); ++i) keyed.offsets.set(i, 0.25f);
  check_against_definition(device, &keyed);
}

inline void test_cases(const Device& device, int rounds) {
  test_sweep(device, rounds);
  test_wide_maps(device);
  test_most_samples(device);
  test_empty(device);
  test_borders(device);
  test_non_finite_values(device);
  test_usual_shapes(device);
  test_wild_locations(device);
  test_extreme_logits(device);
}

#endif /* LITEDETR_TESTS_CASES_H */

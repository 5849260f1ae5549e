/* What the tests of all devices share: counting failures, naming a problem, and how much rounding it may show. */
#ifndef LITEDETR_TESTS_CHECKS_H
#define LITEDETR_TESTS_CHECKS_H

#include <stdio.h>

#include <algorithm>

#include "problem.h"

inline int failures = 0;

#define CHECK(condition, ...)                                \
  do {                                                       \
    if (!(condition)) {                                      \
      ++failures;                                            \
      printf("%s:%d: %s: ", __FILE__, __LINE__, #condition); \
      printf(__VA_ARGS__);                                   \
      printf("\n");                                          \
    }                                                        \
  } while (0)

inline std::string describe(const Shape& s) {
  std::string text = "N " + std::to_string(s.batch) + " Q " + std::to_string(s.queries) + " M " +
                     std::to_string(s.heads) + " D " + std::to_string(s.dim) + " P " + std::to_string(s.points) +
                     " reference " + std::to_string(s.reference_width) + " dtype " + std::to_string(s.dtype) +
                     " offsets " + std::to_string(s.offset_dtype) + (s.key_aware ? " key-aware" : " plain") +
                     (s.own_key ? " own key" : "") + " levels";
  for (size_t l = 0; l < s.levels.size(); l += 2) {
    text += " " + std::to_string(s.levels[l]) + "x" + std::to_string(s.levels[l + 1]);
  }
  return text;
}

/* Half the spacing of `dtype` around 1. */
inline double rounding(int32_t dtype) {
  return dtype == KDA_FLOAT32 ? 0x1p-24 : dtype == KDA_FLOAT16 ? 0x1p-11 : 0x1p-8;
}

inline double largest_value(const Problem& problem) {
  double largest = 0;
  for (size_t i = 0; i < problem.value.size(); ++i) largest = fmax(largest, fabs(problem.value.get(i)));
  return largest;
}

/* What FP32 arithmetic may lose, in units of its rounding:
 *   coordinates   a pixel coordinate c rounds by a few times its own size, and moves a sample by that times the
 *                 difference of neighbours;
 *   logits        the dot product sums D products, and its error, times the spread of the values, reaches the output;
 *   softmax, sum  two more sums over the samples.
 * On top, the output rounds once to its own dtype. */
inline double tolerance(const Problem& problem) {
  int64_t side = 1;
  for (int64_t size : problem.shape.levels) side = std::max(side, size);
  const double samples = double(problem.levels) * problem.shape.points;
  const double logit_terms = problem.shape.key_aware ? problem.shape.dim + 8.0 * (side + 16) : 0;
  const double units = 8.0 * (side + 16) + logit_terms + 2 * samples;
  return largest_value(problem) * (units * rounding(KDA_FLOAT32) + rounding(problem.shape.dtype)) + 0x1p-25;
}

#endif /* LITEDETR_TESTS_CHECKS_H */

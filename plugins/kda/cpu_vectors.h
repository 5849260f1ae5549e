/* Arithmetic on vectors of KDA_LANES floats, in GCC vector extensions: for sources compiled once per instruction set.
 * Everything is inlined and local to its source, so that no copy of one instruction set can serve another. */
#ifndef LITEDETR_KDA_CPU_VECTORS_H
#define LITEDETR_KDA_CPU_VECTORS_H

#include <stdint.h>

namespace {

constexpr int kLanes = KDA_LANES;

typedef float Floats __attribute__((vector_size(kLanes * 4)));
typedef int32_t Ints __attribute__((vector_size(kLanes * 4)));
typedef float LooseFloats __attribute__((vector_size(kLanes * 4), aligned(4)));

#define KDA_INLINE inline __attribute__((always_inline))

KDA_INLINE Floats load(const float* source) { return *reinterpret_cast<const LooseFloats*>(source); }
KDA_INLINE void store(float* target, Floats x) { *reinterpret_cast<LooseFloats*>(target) = x; }
KDA_INLINE Floats splat(float x) { return x - Floats{}; }
KDA_INLINE Ints splat(int32_t x) { return x - Ints{}; }
KDA_INLINE Floats as_floats(Ints x) { return reinterpret_cast<Floats>(x); }
KDA_INLINE Ints as_ints(Floats x) { return reinterpret_cast<Ints>(x); }
KDA_INLINE Ints load(const int32_t* source) { return as_ints(load(reinterpret_cast<const float*>(source))); }
KDA_INLINE void store(int32_t* target, Ints x) { store(reinterpret_cast<float*>(target), as_floats(x)); }

/* 0, 1, 2, ... */
KDA_INLINE Ints lane_numbers() {
  Ints lanes{};
  for (int i = 0; i < kLanes; ++i) lanes[i] = i;
  return lanes;
}

/* Truncates towards minus infinity; |x| is below 2^23. */
KDA_INLINE Ints floor_to_int(Floats x) {
  Ints truncated = __builtin_convertvector(x, Ints);
  return truncated + (__builtin_convertvector(truncated, Floats) > x); /* true is -1 */
}

struct Sum {
  Floats operator()(Floats a, Floats b) const { return a + b; }
};
struct Maximum {
  Floats operator()(Floats a, Floats b) const { return a > b ? a : b; } /* b where one is NaN */
};

/* Reduces kRows vectors, each to one number: lane i of the result is that of rows[i % kRows].  `rows` is overwritten.
 *
 * Two rows at a time become one, of lanes from a and from b in turns of kStep, each reduced with the lane kStep from
 * it; what is left of every row in the last one is reduced in place.  However many rows there are, and whichever of
 * them a row is, its numbers are reduced in the same order. */
template <int kRows, typename Reduce, int kStep = 1>
KDA_INLINE Floats reduce_rows(Floats* rows, Reduce reduce) {
  if constexpr (kStep == kLanes) {
    return rows[0];
  } else {
    const Ints lanes = lane_numbers();
    if constexpr (kStep < kRows) {
      const Ints of_a = (lanes & kStep) == 0, crossed = (of_a ? lanes : lanes + kLanes) ^ kStep;
      for (int i = 0; i < kRows; i += 2 * kStep) {
        const Floats a = rows[i], b = rows[i + kStep];
        rows[i] = reduce(of_a ? a : b, __builtin_shuffle(a, b, crossed));
      }
    } else {
      rows[0] = reduce(rows[0], __builtin_shuffle(rows[0], lanes ^ kStep));
    }
    return reduce_rows<kRows, Reduce, 2 * kStep>(rows, reduce);
  }
}

/* e^x for x <= 0, within 2^-23; NaN stays NaN, and what would be subnormal is 0.  x = n ln 2 + r with |r| <= ln 2 / 2,
 * and a polynomial in r.  That ln 2 is rounded costs e^x a relative error of 2^-26 n, which where n is not small is one
 * of a small number. */
KDA_INLINE Floats exp_negative(Floats x) {
  const float kRound = 0x1.8p23f; /* adding it rounds to an integer, left in the low bits of the mantissa */
  const Floats shifted = x * 1.44269504f + kRound;
  const Floats r = x - (shifted - kRound) * 0.693147181f;
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

/* Softmax over the first `count` numbers of each of kRows arrays, in place but for the factor of each; the lanes behind
 * them become 0.  The rows' maxima and sums are found together. */
template <int kRows, int kLength>
KDA_INLINE void softmax(float (*logits)[kLength], int count, float* factors) {
  static_assert(kRows <= 4, "four sums are divided together");
  const auto lane_or = [&](const float* row, int p, Floats otherwise) {
    return count % kLanes == 0 ? load(row + p) : lane_numbers() + p < count ? load(row + p) : otherwise;
  };
  const Floats low = splat(-__builtin_inff());
  Floats rows[kRows];
  for (int i = 0; i < kRows; ++i) {
    rows[i] = lane_or(logits[i], 0, low);
    for (int p = kLanes; p < count; p += kLanes) rows[i] = Maximum()(lane_or(logits[i], p, low), rows[i]);
  }
  /* Numbers spread over a vector from memory, which takes no shuffle. */
  alignas(64) float highest[kLanes];
  store(highest, reduce_rows<kRows>(rows, Maximum()));
  for (int i = 0; i < kRows; ++i) {
    for (int p = 0; p < count; p += kLanes) {
      const Floats e = exp_negative(lane_or(logits[i], p, low) - highest[i]);
      store(logits[i] + p, e);
      rows[i] = p == 0 ? e : rows[i] + e;
    }
  }
  typedef float Four __attribute__((vector_size(16), aligned(4)));
  alignas(64) float sums[kLanes];
  store(sums, reduce_rows<kRows>(rows, Sum()));
  const Four inverse =
      1.0f / *reinterpret_cast<const Four*>(sums); /* dividing a whole vector takes four times as long */
  for (int i = 0; i < kRows; ++i) factors[i] = inverse[i];
}

}  // namespace

#endif /* LITEDETR_KDA_CPU_VECTORS_H */

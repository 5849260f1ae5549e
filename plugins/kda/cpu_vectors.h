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

KDA_INLINE Floats load(const float *source) { return *reinterpret_cast<const LooseFloats *>(source); }
KDA_INLINE void store(float *target, Floats x) { *reinterpret_cast<LooseFloats *>(target) = x; }
KDA_INLINE Floats splat(float x) { return x - Floats{}; }
KDA_INLINE Ints splat(int32_t x) { return x - Ints{}; }
KDA_INLINE Floats as_floats(Ints x) { return reinterpret_cast<Floats>(x); }
KDA_INLINE Ints as_ints(Floats x) { return reinterpret_cast<Ints>(x); }
KDA_INLINE Ints load(const int32_t *source) { return as_ints(load(reinterpret_cast<const float *>(source))); }
KDA_INLINE void store(int32_t *target, Ints x) { store(reinterpret_cast<float *>(target), as_floats(x)); }

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

/* Step of a transpose-and-add tree: lanes whose number has bit `kBit` clear get a[i] + a[i + kBit], the others
 * b[i] + b[i - kBit]. */
template <int kBit>
KDA_INLINE Floats add_halves(Floats a, Floats b) {
  const Ints lanes = lane_numbers();
  const Floats straight = (lanes & kBit) == 0 ? a : b;
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

/* Softmax over the first `count` of `logits`, in place but for the factor returned, the same in every lane; the lanes
 * behind them become 0. */
KDA_INLINE Floats softmax(float *logits, int count) {
  const auto lane_or = [&](int p, Floats otherwise) {
    return count % kLanes == 0 ? load(logits + p) : lane_numbers() + p < count ? load(logits + p) : otherwise;
  };
  const Floats low = splat(-__builtin_inff());
  Floats highest = lane_or(0, low), sum = {};
  for (int p = kLanes; p < count; p += kLanes) {
    const Floats x = lane_or(p, low);
    highest = x > highest ? x : highest;
  }
  highest = max_everywhere(highest);
  for (int p = 0; p < count; p += kLanes) {
    const Floats e = exp_negative(lane_or(p, low) - highest);
    store(logits + p, e);
    sum = p == 0 ? e : sum + e;
  }
  return 1.0f / sum_everywhere(sum);
}

}  // namespace

#endif /* LITEDETR_KDA_CPU_VECTORS_H */

/* The two ops as the adapters of every framework see them: names, inputs and the shapes that fit together.  Python has
 * the same in litedetr_deploy/ops/schema.py.  This file includes no header of any framework.
 */
#ifndef LITEDETR_OP_H
#define LITEDETR_OP_H

#include <cstdarg>
#include <cstddef>
#include <cstdint>
#include <cstdio>

#include "kda.h"

namespace litedetr {

constexpr int kOpVersion = 1;

/* Inputs, in order; MSDeformAttn has attention_logits in place of query, and no key. */
enum Input { kQuery, kValue, kReferencePoints, kSamplingOffsets, kSpatialShapes, kKey, kNumInputs };

inline const char* op_name(bool key_aware) { return key_aware ? "KeyAwareDeformAttn" : "MSDeformAttn"; }

inline const char* input_name(bool key_aware, size_t input) {
  constexpr const char* kNames[kNumInputs] = {"query",          "value", "reference_points", "sampling_offsets",
                                              "spatial_shapes", "key"};
  return input == kQuery && !key_aware ? "attention_logits" : kNames[input];
}

struct Shape {
  static constexpr size_t kMaxRank = 8;
  static constexpr int64_t kUnknown = -1; /* a size that is only known later; it fits any other */
  size_t rank = 0;
  int64_t sizes[kMaxRank] = {};

  struct Text {
    char characters[128];
  };
  Text text() const {
    Text text = {"["};
    int length = 1;
    for (size_t i = 0; i < rank && length < 100; ++i) {
      length += snprintf(text.characters + length, sizeof text.characters - length, i ? ", %lld" : "%lld",
                         static_cast<long long>(sizes[i]));
    }
    snprintf(text.characters + length, sizeof text.characters - length, "]");
    return text;
  }
  bool fits(const Shape& other) const {
    bool result = rank == other.rank;
    for (size_t i = 0; result && i < rank; ++i) {
      result = sizes[i] == other.sizes[i] || sizes[i] == kUnknown || other.sizes[i] == kUnknown;
    }
    return result;
  }
};

/* Where a check writes its sentence. */
struct Message {
  char characters[512] = "";

  __attribute__((format(printf, 2, 3))) void print(const char* format, ...) {
    va_list values;
    va_start(values, format);
    vsnprintf(characters, sizeof characters, format, values);
    va_end(values);
  }
};

/* Checks that the shapes of the inputs fit together and sets the sizes in `arguments`, which has key_aware, num_heads
 * and num_points already.  shapes[kKey] counts if own_key.  On failure `message` names the input, the shape that it has
 * and the shape that it should have. */
inline kda_status check_shapes(const Shape (&shapes)[kNumInputs], bool own_key, kda_arguments* arguments,
                               Message* message) {
  const bool key_aware = arguments->key_aware;
  const auto name = [&](size_t input) { return input_name(key_aware, input); };

  constexpr size_t kRanks[] = {3, 3, 4, 3, 2}; /* of the inputs before key, whose shape is that of value */
  for (size_t input = kQuery; input < kKey; ++input) {
    if (shapes[input].rank == kRanks[input]) continue;
    message->print("%s has shape %s; it should have %zu dimensions", name(input), shapes[input].text().characters,
                   kRanks[input]);
    return KDA_INVALID_ARGUMENT;
  }
  const int64_t batch = shapes[kValue].sizes[0], channels = shapes[kValue].sizes[2];
  const int64_t num_queries = shapes[kQuery].sizes[1];
  const int64_t num_levels = shapes[kSpatialShapes].sizes[0], width = shapes[kReferencePoints].sizes[3];
  if (channels != Shape::kUnknown && channels % arguments->num_heads != 0) {
    message->print("value has %lld channels; they should divide by the %d heads", static_cast<long long>(channels),
                   arguments->num_heads);
    return KDA_INVALID_ARGUMENT;
  }
  if (width != 2 && width != 4 && width != Shape::kUnknown) {
    message->print("reference_points has shape %s; the last size should be 2 or 4",
                   shapes[kReferencePoints].text().characters);
    return KDA_INVALID_ARGUMENT;
  }
  if (num_levels > KDA_MAX_LEVELS) {
    message->print("spatial_shapes has %lld levels; the kernels take at most %d", static_cast<long long>(num_levels),
                   KDA_MAX_LEVELS);
    return KDA_UNSUPPORTED;
  }
  const bool levels_known = num_levels != Shape::kUnknown;
  const int64_t samples =
      levels_known ? int64_t{arguments->num_heads} * num_levels * arguments->num_points : Shape::kUnknown;
  const Shape wanted[kNumInputs] = {
      {3, {batch, num_queries, key_aware ? channels : samples}},
      shapes[kValue],
      {4, {batch, num_queries, num_levels, width}},
      {3, {batch, num_queries, levels_known ? 2 * samples : Shape::kUnknown}},
      {2, {num_levels, 2}},
      shapes[kValue],
  };
  for (size_t input = kQuery; input < (own_key ? kNumInputs : kKey); ++input) {
    if (shapes[input].fits(wanted[input])) continue;
    message->print("%s has shape %s; it should be %s", name(input), shapes[input].text().characters,
                   wanted[input].text().characters);
    return KDA_INVALID_ARGUMENT;
  }

  arguments->batch = batch;
  arguments->num_queries = num_queries;
  arguments->num_tokens = shapes[kValue].sizes[1];
  arguments->head_dim = static_cast<int32_t>(channels / arguments->num_heads);
  arguments->num_levels = static_cast<int32_t>(num_levels);
  arguments->reference_width = static_cast<int32_t>(width);
  return KDA_OK;
}

}  // namespace litedetr

#endif /* LITEDETR_OP_H */

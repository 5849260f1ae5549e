/* The two ops as the adapters of every framework see them: names, inputs, attributes, and which shapes fit together.
 * Python has the same in litedetr_deploy/ops/schema.py; tests/ops/test_native_layout.py compares the two.  This file
 * includes no header of any framework.
 *
 * Who checks what:
 *   check_shapes, below      that the inputs' shapes fit together, in the framework's terms;
 *   kda_cpu_check and        every number, type and address that the kernels rely on, whoever calls them: attributes,
 *   kda_cuda_check           element types, limits, and on the CPU the values of spatial_shapes;
 *   an adapter               that its framework hands over what can be put into kda_arguments at all.  It asks these
 *                            two, first about what is known when a model is loaded, and passes their message on.
 */
#ifndef LITEDETR_OP_H
#define LITEDETR_OP_H

#include <cstdarg>
#include <cstddef>
#include <cstdint>
#include <cstdio>

#include "kda.h"

namespace litedetr {

constexpr const char* kDomain = "litedetr";
constexpr int kOpVersion = 1;

/* Inputs, in order; MSDeformAttn has attention_logits in place of query, and no key. */
enum Input { kQuery, kValue, kReferencePoints, kSamplingOffsets, kSpatialShapes, kKey, kNumInputs };

constexpr struct {
  const char* name;
  char type; /* T: what value is stored in; U: T or float; F: float; I: int64 */
  size_t rank;
} kInputs[kNumInputs] = {
    {"query", 'T', 3},          {"value", 'T', 3}, {"reference_points", 'F', 4}, {"sampling_offsets", 'U', 3},
    {"spatial_shapes", 'I', 2}, {"key", 'T', 3}};

constexpr struct {
  const char* name;
  int32_t kda_arguments::* value;
} kAttributes[] = {{"num_heads", &kda_arguments::num_heads}, {"num_points", &kda_arguments::num_points}};

inline const char* op_name(bool key_aware) { return key_aware ? "KeyAwareDeformAttn" : "MSDeformAttn"; }

inline const char* input_name(bool key_aware, size_t input) {
  return input == kQuery && !key_aware ? "attention_logits" : kInputs[input].name;
}

/* Arguments that all kernels take.  What an adapter does not know yet keeps these values while it asks kda_cpu_check or
 * kda_cuda_check about what it knows; the addresses are read for no more than the one level. */
inline kda_arguments smallest_arguments(bool key_aware) {
  alignas(256) static int64_t one[] = {1, 1};
  kda_arguments arguments = {};
  arguments.key_aware = key_aware;
  arguments.batch = arguments.num_queries = arguments.num_tokens = 1;
  arguments.num_heads = arguments.num_levels = arguments.num_points = 1;
  arguments.head_dim = 8;
  arguments.reference_width = 2;
  arguments.query = arguments.value = arguments.sampling_offsets = arguments.output = one;
  arguments.reference_points = reinterpret_cast<const float*>(one);
  arguments.spatial_shapes = one;
  return arguments;
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

/* Checks that the shapes of the inputs fit together and sets the sizes that are known in `arguments`, which has
 * key_aware, num_heads and num_points already.  shapes[kKey] counts if own_key.  On failure `message` names the input,
 * the shape that it has and the shape that it should have. */
inline kda_status check_shapes(const Shape (&shapes)[kNumInputs], bool own_key, kda_arguments* arguments,
                               Message* message) {
  const bool key_aware = arguments->key_aware;
  for (size_t input = kQuery; input < kKey; ++input) { /* key has the shape of value */
    if (shapes[input].rank == kInputs[input].rank) continue;
    message->print("%s has shape %s; it should have %zu dimensions", input_name(key_aware, input),
                   shapes[input].text().characters, kInputs[input].rank);
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
    message->print("%s has shape %s; it should be %s", input_name(key_aware, input), shapes[input].text().characters,
                   wanted[input].text().characters);
    return KDA_INVALID_ARGUMENT;
  }

  const auto set = [](auto* field, int64_t size) {
    if (size == Shape::kUnknown) return;
    *field = size > INT32_MAX && sizeof *field == 4 ? INT32_MAX : size; /* which no kernel takes */
  };
  set(&arguments->batch, batch);
  set(&arguments->num_queries, num_queries);
  set(&arguments->num_tokens, shapes[kValue].sizes[1]);
  set(&arguments->head_dim, channels == Shape::kUnknown ? channels : channels / arguments->num_heads);
  set(&arguments->num_levels, num_levels);
  set(&arguments->reference_width, width);
  return KDA_OK;
}

}  // namespace litedetr

#endif /* LITEDETR_OP_H */

#include "check.h"

#include <stdarg.h>
#include <stdio.h>

namespace kda {
namespace {

const char* dtype_name(int32_t dtype) {
  switch (dtype) {
    case KDA_FLOAT32: return "float32";
    case KDA_FLOAT16: return "float16";
    case KDA_BFLOAT16: return "bfloat16";
    default: return "unknown";
  }
}

}  // namespace

void print(char* message, size_t size, const char* format, ...) {
  if (!message || size == 0) return;
  va_list values;
  va_start(values, format);
  vsnprintf(message, size, format, values);
  va_end(values);
}

kda_status check_sizes(const kda_arguments* a, const char* kernels, int32_t dim_multiple, char* message,
                       size_t message_size) {
#define KDA_EXPECT(condition, status, ...)     \
  if (!(condition)) {                          \
    print(message, message_size, __VA_ARGS__); \
    return status;                             \
  }
#define KDA_REQUIRE(condition, ...) KDA_EXPECT(condition, KDA_INVALID_ARGUMENT, __VA_ARGS__)
#define KDA_SUPPORT(condition, ...) KDA_EXPECT(condition, KDA_UNSUPPORTED, __VA_ARGS__)
  KDA_REQUIRE(a, "arguments is NULL; it must point to a kda_arguments");
  KDA_REQUIRE(a->batch >= 0, "query has batch size %lld; it must be at least 0", (long long)a->batch);
  KDA_REQUIRE(a->num_queries >= 0, "query has %lld queries; it must have at least 0", (long long)a->num_queries);
  KDA_REQUIRE(a->num_tokens >= 1, "value has %lld tokens; it must have at least 1", (long long)a->num_tokens);
  KDA_SUPPORT(a->num_tokens <= kMaxTokens, "value has %lld tokens; the kernels take at most %lld",
              (long long)a->num_tokens, (long long)kMaxTokens);
  KDA_REQUIRE(a->num_heads >= 1, "num_heads is %d; it must be at least 1", a->num_heads);
  KDA_REQUIRE(a->head_dim >= 1, "head_dim is %d; it must be at least 1", a->head_dim);
  KDA_SUPPORT(a->head_dim % dim_multiple == 0, "head_dim is %d; the %s kernels take multiples of %d", a->head_dim,
              kernels, dim_multiple);
  KDA_REQUIRE(a->num_levels >= 1, "spatial_shapes has %d levels; it must have at least 1", a->num_levels);
  KDA_SUPPORT(a->num_levels <= KDA_MAX_LEVELS, "spatial_shapes has %d levels; the kernels take at most %d",
              a->num_levels, KDA_MAX_LEVELS);
  KDA_REQUIRE(a->num_points >= 1, "num_points is %d; it must be at least 1", a->num_points);
  KDA_SUPPORT(a->num_points <= KDA_MAX_POINTS, "num_points is %d; the kernels take at most %d", a->num_points,
              KDA_MAX_POINTS);
  KDA_REQUIRE(a->reference_width == 2 || a->reference_width == 4,
              "reference_points has a last dimension of %d; it must be 2 (x, y) or 4 (x, y, w, h)", a->reference_width);
  KDA_REQUIRE(a->dtype == KDA_FLOAT32 || a->dtype == KDA_FLOAT16 || a->dtype == KDA_BFLOAT16,
              "value has dtype %d; it must be 0 (float32), 1 (float16) or 2 (bfloat16)", a->dtype);
  KDA_REQUIRE(a->offset_dtype == a->dtype || a->offset_dtype == KDA_FLOAT32,
              "sampling_offsets is %s where value is %s; it must be float32 or the type of value: cast the offsets to "
              "float32, or export the model again",
              dtype_name(a->offset_dtype), dtype_name(a->dtype));
  KDA_REQUIRE(a->spatial_shapes, "spatial_shapes is NULL; it must point to [%d, 2] %s", a->num_levels,
              a->int32_shapes ? "int32" : "int64");
  if (a->batch > 0 && a->num_queries > 0) {
    KDA_REQUIRE(a->query, "%s is NULL; it must point to the tensor's data",
                a->key_aware ? "query" : "attention_logits");
    KDA_REQUIRE(a->value, "value is NULL; it must point to the tensor's data");
    KDA_REQUIRE(a->reference_points, "reference_points is NULL; it must point to the tensor's data");
    KDA_REQUIRE(a->sampling_offsets, "sampling_offsets is NULL; it must point to the tensor's data");
    KDA_REQUIRE(a->output, "output is NULL; it must point to the tensor's data");
  }
  return KDA_OK;
}

}  // namespace kda

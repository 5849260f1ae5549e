/* KeyAwareDeformAttn and MSDeformAttn as TensorRT plugins, from one source for TensorRT 10.3 to 11.x.
 *
 * This file checks fields, types and shapes and calls plugins/kda.  TensorRT loads it by its two entry points, at the
 * end (trtexec --dynamicPlugins, IPluginRegistry::loadLibrary); nothing registers itself, and nothing of libnvinfer is
 * linked: TensorRT is reached through the objects that it hands over.  Nothing here throws; what fails says why through
 * TensorRT's logger and returns a failing status.
 */
#include <NvInferRuntime.h>

#include <atomic>
#include <cstdarg>
#include <cstdint>
#include <cstdio>
#include <cstring>
#include <initializer_list>
#include <new>

#include "kda.h"
#include "../op.h"

#if NV_TENSORRT_MAJOR < 10 || (NV_TENSORRT_MAJOR == 10 && NV_TENSORRT_MINOR < 3)
#error "the TensorRT headers are older than 10.3"
#endif

namespace {

using namespace litedetr;

constexpr const char* kPluginVersion = "1"; /* kOpVersion, as TensorRT wants it */
static_assert(kOpVersion == 1, "kPluginVersion is the version of the ops");
constexpr const char* kPluginNamespace = "";

/* Grows when the fields that an engine stores change. */
constexpr int32_t kSerializationVersion = 1;

constexpr int32_t kSuccess = 0;
constexpr int32_t kFailure = 1;

/* ---- Errors --------------------------------------------------------------------------------------------------- */

/* Set by setLoggerFinder; belongs to TensorRT. */
std::atomic<nvinfer1::ILoggerFinder*> logger_finder{nullptr};

/* Logs "<plugin>: <message>".  TensorRT has no logger outside of its own calls; then the message goes to stderr. */
__attribute__((format(printf, 2, 3))) void log_error(const char* plugin, const char* format, ...) noexcept {
  char text[640];
  const int length = snprintf(text, sizeof text, "%s: ", plugin);
  va_list values;
  va_start(values, format);
  vsnprintf(text + length, sizeof text - length, format, values);
  va_end(values);

  nvinfer1::ILogger* logger = nullptr;
  if (nvinfer1::ILoggerFinder* finder = logger_finder.load()) {
    try {
      logger = finder->findLogger(); /* the only call here that is not declared noexcept */
    } catch (...) {
    }
  }
  if (logger) {
    logger->log(nvinfer1::ILogger::Severity::kERROR, text);
  } else {
    fprintf(stderr, "%s\n", text);
  }
}

/* ---- Types and shapes ----------------------------------------------------------------------------------------- */

/* T of the ops: what query, key, value and output are stored in. */
bool is_storage(nvinfer1::DataType type) {
  return type == nvinfer1::DataType::kFLOAT || type == nvinfer1::DataType::kHALF || type == nvinfer1::DataType::kBF16;
}

kda_dtype dtype_of(nvinfer1::DataType type) {
  switch (type) {
    case nvinfer1::DataType::kHALF: return KDA_FLOAT16;
    case nvinfer1::DataType::kBF16: return KDA_BFLOAT16;
    default: return KDA_FLOAT32;
  }
}

static_assert(nvinfer1::Dims::MAX_DIMS <= static_cast<int32_t>(Shape::kMaxRank), "a Shape holds any Dims");

/* TensorRT writes -1 for a size that depends on the profile, which is Shape::kUnknown. */
Shape shape_of(const nvinfer1::Dims& dims) {
  Shape shape;
  shape.rank = static_cast<size_t>(dims.nbDims > 0 ? dims.nbDims : 0);
  for (size_t i = 0; i < shape.rank; ++i) shape.sizes[i] = dims.d[i];
  return shape;
}

/* ---- The plugin ----------------------------------------------------------------------------------------------- */

class Plugin final : public nvinfer1::IPluginV3,
                     public nvinfer1::IPluginV3OneCore,
                     public nvinfer1::IPluginV3OneBuild,
                     public nvinfer1::IPluginV3OneRuntime {
 public:
  /* num_inputs: 5, 6 with a key, or 0 if not known yet. */
  Plugin(bool key_aware, int32_t num_heads, int32_t num_points, int32_t num_inputs) noexcept
      : key_aware_(key_aware), num_heads_(num_heads), num_points_(num_points), num_inputs_(num_inputs) {
    snprintf(timing_cache_id_, sizeof timing_cache_id_, "%s-%s num_heads=%d num_points=%d", name(), kPluginVersion,
             num_heads, num_points);
  }

  /* -- IPluginV3 */

  nvinfer1::IPluginCapability* getCapabilityInterface(nvinfer1::PluginCapabilityType type) noexcept override {
    switch (type) {
      case nvinfer1::PluginCapabilityType::kCORE: return static_cast<nvinfer1::IPluginV3OneCore*>(this);
      case nvinfer1::PluginCapabilityType::kBUILD: return static_cast<nvinfer1::IPluginV3OneBuild*>(this);
      case nvinfer1::PluginCapabilityType::kRUNTIME: return static_cast<nvinfer1::IPluginV3OneRuntime*>(this);
    }
    return nullptr;
  }

  nvinfer1::IPluginV3* clone() noexcept override {
    Plugin* copy = new (std::nothrow) Plugin(key_aware_, num_heads_, num_points_, num_inputs_);
    if (!copy) log_error(name(), "out of memory");
    return copy;
  }

  /* -- IPluginV3OneCore */

  const char* getPluginName() const noexcept override { return name(); }
  const char* getPluginVersion() const noexcept override { return kPluginVersion; }
  const char* getPluginNamespace() const noexcept override { return kPluginNamespace; }

  /* -- IPluginV3OneBuild */

  int32_t getNbOutputs() const noexcept override { return 1; }

  int32_t getOutputDataTypes(nvinfer1::DataType* output_types, int32_t num_outputs,
                             const nvinfer1::DataType* input_types, int32_t num_inputs) const noexcept override {
    if (!check_counts(num_inputs, num_outputs)) return kFailure;
    /* In a strongly typed network this is law, so a type that the kernels lack is refused here, where it can be named.
     * In a weakly typed one TensorRT asks with float for every floating-point type. */
    const nvinfer1::DataType type = input_types[kValue];
    if (!is_storage(type)) {
      log_error(name(), "value has the TensorRT type %d; it should be kFLOAT (0), kHALF (1) or kBF16 (7)",
                static_cast<int>(type));
      return kFailure;
    }
    output_types[0] = type;
    return kSuccess;
  }

  /* [N, Q, M*D]: N and Q of the first input, M*D of value. */
  int32_t getOutputShapes(const nvinfer1::DimsExprs* inputs, int32_t num_inputs, const nvinfer1::DimsExprs*, int32_t,
                          nvinfer1::DimsExprs* outputs, int32_t num_outputs,
                          nvinfer1::IExprBuilder&) noexcept override {
    if (!check_counts(num_inputs, num_outputs)) return kFailure;
    for (const Input input : {kQuery, kValue}) {
      if (inputs[input].nbDims == 3) continue;
      log_error(name(), "%s has %d dimensions; it should have 3", input_name(key_aware_, input), inputs[input].nbDims);
      return kFailure;
    }
    outputs[0].nbDims = 3;
    outputs[0].d[0] = inputs[kQuery].d[0];
    outputs[0].d[1] = inputs[kQuery].d[1];
    outputs[0].d[2] = inputs[kValue].d[2];
    return kSuccess;
  }

  bool supportsFormatCombination(int32_t position, const nvinfer1::DynamicPluginTensorDesc* tensors, int32_t num_inputs,
                                 int32_t num_outputs) noexcept override {
    if (!check_counts(num_inputs, num_outputs)) return false;
    /* Of `tensors` only those up to `position` are valid. */
    const nvinfer1::PluginTensorDesc& tensor = tensors[position].desc;
    if (tensor.format != nvinfer1::TensorFormat::kLINEAR) return false;
    const nvinfer1::DataType storage = tensors[kQuery].desc.type;
    switch (position) {
      case kQuery: return is_storage(storage);
      case kReferencePoints: return tensor.type == nvinfer1::DataType::kFLOAT;
      case kSamplingOffsets: return tensor.type == storage || tensor.type == nvinfer1::DataType::kFLOAT;
      case kSpatialShapes: return tensor.type == nvinfer1::DataType::kINT64;
      default: return tensor.type == storage; /* value, key, output */
    }
  }

  int32_t configurePlugin(const nvinfer1::DynamicPluginTensorDesc* inputs, int32_t num_inputs,
                          const nvinfer1::DynamicPluginTensorDesc*, int32_t num_outputs) noexcept override {
    if (!check_counts(num_inputs, num_outputs)) return kFailure;
    Shape shapes[kNumInputs];
    for (int32_t i = 0; i < num_inputs; ++i) shapes[i] = shape_of(inputs[i].desc.dims);
    num_inputs_ = num_inputs;
    kda_arguments arguments;
    return check(shapes, &arguments) ? kSuccess : kFailure;
  }

  /* There are no tactics: one kernel serves a combination of types and shapes.  What is left to time is the type, in
   * the weakly typed networks of TensorRT 10; the cache saves timing it again for each of a model's equal layers. */
  const char* getTimingCacheID() noexcept override { return timing_cache_id_; }

  /* -- IPluginV3OneRuntime */

  int32_t onShapeChange(const nvinfer1::PluginTensorDesc* inputs, int32_t num_inputs, const nvinfer1::PluginTensorDesc*,
                        int32_t num_outputs) noexcept override {
    if (!check_counts(num_inputs, num_outputs)) return kFailure;
    num_inputs_ = num_inputs;
    kda_arguments arguments;
    if (!read_inputs(inputs, &arguments)) return kFailure;
    /* What the kernels take is theirs to say.  They want addresses, which there are none of yet, and read none. */
    alignas(256) static char somewhere[256];
    arguments.query = arguments.value = arguments.sampling_offsets = arguments.output = somewhere;
    arguments.key = num_inputs_ == kNumInputs ? somewhere : nullptr;
    arguments.reference_points = reinterpret_cast<const float*>(somewhere);
    arguments.spatial_shapes = reinterpret_cast<const int64_t*>(somewhere);
    Message message;
    return report(kda_cuda_check(&arguments, message.characters, sizeof message.characters), message);
  }

  int32_t enqueue(const nvinfer1::PluginTensorDesc* input_descriptions, const nvinfer1::PluginTensorDesc*,
                  const void* const* inputs, void* const* outputs, void*, cudaStream_t stream) noexcept override {
    if (num_inputs_ == 0) {
      log_error(name(), "enqueue was called before onShapeChange");
      return kFailure;
    }
    kda_arguments arguments;
    if (!read_inputs(input_descriptions, &arguments)) return kFailure;
    arguments.query = inputs[kQuery];
    arguments.key = num_inputs_ == kNumInputs ? inputs[kKey] : nullptr;
    arguments.value = inputs[kValue];
    arguments.reference_points = static_cast<const float*>(inputs[kReferencePoints]);
    arguments.sampling_offsets = inputs[kSamplingOffsets];
    arguments.spatial_shapes = static_cast<const int64_t*>(inputs[kSpatialShapes]);
    arguments.output = outputs[0];
    Message message;
    return report(kda_cuda_forward(&arguments, stream, message.characters, sizeof message.characters), message);
  }

  /* Nothing is held per execution context. */
  nvinfer1::IPluginV3* attachToContext(nvinfer1::IPluginResourceContext*) noexcept override { return clone(); }

  const nvinfer1::PluginFieldCollection* getFieldsToSerialize() noexcept override {
    const auto field = [](const char* field_name, const int32_t* value) {
      return nvinfer1::PluginField(field_name, value, nvinfer1::PluginFieldType::kINT32, 1);
    };
    fields_[0] = field("serialization_version", &kSerializationVersion);
    fields_[1] = field("num_heads", &num_heads_);
    fields_[2] = field("num_points", &num_points_);
    fields_[3] = field("num_inputs", &num_inputs_);
    return &serialized_;
  }

 private:
  const char* name() const { return op_name(key_aware_); }

  bool check_counts(int32_t num_inputs, int32_t num_outputs) const {
    if (num_inputs != kKey && !(key_aware_ && num_inputs == kNumInputs)) {
      log_error(name(), "the node has %d inputs; it should have %s", num_inputs,
                key_aware_ ? "5, or 6 with a key" : "5");
      return false;
    }
    if (num_outputs != 1) {
      log_error(name(), "the node has %d outputs; it should have 1", num_outputs);
      return false;
    }
    return true;
  }

  int32_t report(kda_status status, const Message& message) const {
    if (status == KDA_OK) return kSuccess;
    log_error(name(), "%s", message.characters);
    return kFailure;
  }

  /* Checks the shapes and sets the sizes of the arguments. */
  bool check(const Shape (&shapes)[kNumInputs], kda_arguments* arguments) const {
    *arguments = {};
    arguments->key_aware = key_aware_;
    arguments->num_heads = num_heads_;
    arguments->num_points = num_points_;
    Message message;
    return report(check_shapes(shapes, num_inputs_ == kNumInputs, arguments, &message), message) == kSuccess;
  }

  /* Everything of the arguments but the addresses. */
  bool read_inputs(const nvinfer1::PluginTensorDesc* inputs, kda_arguments* arguments) const {
    Shape shapes[kNumInputs];
    for (int32_t i = 0; i < num_inputs_; ++i) shapes[i] = shape_of(inputs[i].dims);
    if (!check(shapes, arguments)) return false;
    arguments->dtype = dtype_of(inputs[kValue].type);
    arguments->offset_dtype = dtype_of(inputs[kSamplingOffsets].type);
    return true;
  }

  const bool key_aware_;
  const int32_t num_heads_;
  const int32_t num_points_;
  int32_t num_inputs_; /* enqueue is not told, and needs it to know whether there is a key */
  char timing_cache_id_[96];
  nvinfer1::PluginField fields_[4];
  const nvinfer1::PluginFieldCollection serialized_{4, fields_};
};

/* ---- The creators --------------------------------------------------------------------------------------------- */

class Creator final : public nvinfer1::IPluginCreatorV3One {
 public:
  explicit Creator(bool key_aware) : key_aware_(key_aware) {}

  const char* getPluginName() const noexcept override { return op_name(key_aware_); }
  const char* getPluginVersion() const noexcept override { return kPluginVersion; }
  const char* getPluginNamespace() const noexcept override { return kPluginNamespace; }

  /* The attributes that the ONNX parser passes on. */
  const nvinfer1::PluginFieldCollection* getFieldNames() noexcept override { return &announced_; }

  nvinfer1::IPluginV3* createPlugin(const char*, const nvinfer1::PluginFieldCollection* fields,
                                    nvinfer1::TensorRTPhase phase) noexcept override {
    if (!fields) {
      log_error(getPluginName(), "there are no fields; num_heads and num_points are needed");
      return nullptr;
    }
    int32_t version = 0, num_heads = 0, num_points = 0, num_inputs = 0;
    if (phase == nvinfer1::TensorRTPhase::kRUNTIME) {
      if (!read_field(*fields, "serialization_version", kSerializationVersion, kSerializationVersion, &version) ||
          !read_field(*fields, "num_inputs", 0, kNumInputs, &num_inputs)) {
        return nullptr;
      }
    }
    if (!read_field(*fields, "num_heads", 1, INT32_MAX, &num_heads) ||
        !read_field(*fields, "num_points", 1, KDA_MAX_POINTS, &num_points)) {
      return nullptr;
    }
    Plugin* plugin = new (std::nothrow) Plugin(key_aware_, num_heads, num_points, num_inputs);
    if (!plugin) log_error(getPluginName(), "out of memory");
    return plugin;
  }

 private:
  /* A field of one int32.  Others, such as the node's plugin_version and plugin_namespace, are let pass. */
  bool read_field(const nvinfer1::PluginFieldCollection& fields, const char* name, int32_t lowest, int32_t highest,
                  int32_t* value) const {
    for (int32_t i = 0; i < fields.nbFields; ++i) {
      const nvinfer1::PluginField& field = fields.fields[i];
      if (!field.name || strcmp(field.name, name) != 0) continue;
      if (field.type != nvinfer1::PluginFieldType::kINT32 || field.length != 1 || !field.data) {
        log_error(getPluginName(), "the field %s has the TensorRT type %d and %d values; it should be one kINT32 (5)",
                  name, static_cast<int>(field.type), field.data ? field.length : 0);
        return false;
      }
      memcpy(value, field.data, sizeof *value);
      if (*value >= lowest && *value <= highest) return true;
      if (highest == INT32_MAX) {
        log_error(getPluginName(), "the field %s is %d; it should be at least %d", name, *value, lowest);
      } else if (lowest == highest) {
        log_error(getPluginName(), "the field %s is %d; this library reads %d: build the engine again", name, *value,
                  lowest);
      } else {
        log_error(getPluginName(), "the field %s is %d; it should be %d to %d", name, *value, lowest, highest);
      }
      return false;
    }
    log_error(getPluginName(), "the field %s (one int32) is missing", name);
    return false;
  }

  const bool key_aware_;
  const nvinfer1::PluginField fields_[2] = {{"num_heads", nullptr, nvinfer1::PluginFieldType::kINT32, 1},
                                            {"num_points", nullptr, nvinfer1::PluginFieldType::kINT32, 1}};
  const nvinfer1::PluginFieldCollection announced_{2, fields_};
};

}  // namespace

/* ---- What TensorRT calls when it loads the library -------------------------------------------------------------- */

#define EXPORT extern "C" __attribute__((visibility("default")))

EXPORT nvinfer1::IPluginCreatorInterface* const* getCreators(int32_t& count) {
  static Creator key_aware(true), plain(false);
  static nvinfer1::IPluginCreatorInterface* const creators[] = {&key_aware, &plain};
  count = 2;
  return creators;
}

EXPORT void setLoggerFinder(nvinfer1::ILoggerFinder* finder) { logger_finder.store(finder); }

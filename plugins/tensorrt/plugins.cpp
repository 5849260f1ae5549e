/* KeyAwareDeformAttn and MSDeformAttn as TensorRT plugins, from one source for TensorRT 10.3 to 11.x.
 *
 * This file translates between TensorRT and plugins/kda; plugins/op.h describes the ops and says who checks what.
 * TensorRT loads it by its two entry points, at the end (trtexec --dynamicPlugins, IPluginRegistry::loadLibrary);
 * nothing registers itself (register.cpp does, in a library of its own), and nothing of libnvinfer is linked: TensorRT
 * is reached through the objects that it hands over.  Nothing here throws; what fails says why through TensorRT's
 * logger and returns a failing status.
 */
#include <NvInferRuntime.h>

#include <atomic>
#include <cstdarg>
#include <cstdint>
#include <cstdio>
#include <cstring>
#include <initializer_list>
#include <iterator>
#include <new>

#include "../op.h"
#include "kda.h"

#if NV_TENSORRT_MAJOR < 10 || (NV_TENSORRT_MAJOR == 10 && NV_TENSORRT_MINOR < 3)
#error "the TensorRT headers are older than 10.3"
#endif

namespace {

using namespace litedetr;

constexpr char kPluginVersion[] = {'0' + kOpVersion, 0};
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

/* Whether a tensor of kInputs[].type `input` can be of `type` where T is `storage`.  spatial_shapes is int64 in ONNX;
 * parsers and other tools make int32 of that. */
bool takes(char input, nvinfer1::DataType type, nvinfer1::DataType storage) {
  switch (input) {
    case 'F': return type == nvinfer1::DataType::kFLOAT;
    case 'I': return type == nvinfer1::DataType::kINT64 || type == nvinfer1::DataType::kINT32;
    case 'U': return type == storage || type == nvinfer1::DataType::kFLOAT;
    default: return type == storage && is_storage(storage);
  }
}

/* The same in words. */
const char* wanted_types(char input) {
  switch (input) {
    case 'F': return "float32";
    case 'I': return "int64 or int32";
    case 'U': return "float32 or the type of value";
    default: return "the type of value";
  }
}

const char* type_name(nvinfer1::DataType type) {
  constexpr const char* kNames[] = {"float32", "float16",  "int8",  "int32", "bool",   "uint8",
                                    "float8",  "bfloat16", "int64", "int4",  "float4", "e8m0"};
  const size_t index = static_cast<size_t>(type);
  return index < std::size(kNames) ? kNames[index] : "of a type that is newer than this library";
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
  /* arguments: with the attributes; num_inputs: 5, 6 with a key, or 0 if not known yet. */
  Plugin(const kda_arguments& arguments, int32_t num_inputs) noexcept
      : arguments_(arguments), key_aware_(arguments.key_aware), num_inputs_(num_inputs) {
    snprintf(timing_cache_id_, sizeof timing_cache_id_, "%s-%s num_heads=%d num_points=%d", name(), kPluginVersion,
             arguments.num_heads, arguments.num_points);
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
    Plugin* copy = new (std::nothrow) Plugin(arguments_, num_inputs_);
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
      log_error(name(), "value is %s; it must be float32, float16 or bfloat16", type_name(type));
      return kFailure;
    }
    for (int32_t i = 0; i < num_inputs; ++i) {
      if (takes(kInputs[i].type, input_types[i], type)) continue;
      log_error(name(), "%s is %s where value is %s; it must be %s: cast it, or export the model again",
                input_name(key_aware_, i), type_name(input_types[i]), type_name(type), wanted_types(kInputs[i].type));
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
    return takes(position < num_inputs ? kInputs[position].type : 'T', tensor.type, tensors[kQuery].desc.type);
  }

  int32_t configurePlugin(const nvinfer1::DynamicPluginTensorDesc* inputs, int32_t num_inputs,
                          const nvinfer1::DynamicPluginTensorDesc*, int32_t num_outputs) noexcept override {
    if (!check_counts(num_inputs, num_outputs)) return kFailure;
    num_inputs_ = num_inputs;
    kda_arguments arguments; /* the types are not settled yet in a weakly typed network */
    return read_shapes([&](int32_t i) -> auto& { return inputs[i].desc.dims; }, &arguments) && check(arguments)
               ? kSuccess
               : kFailure;
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
    return read_inputs(inputs, &arguments) && check(arguments) ? kSuccess : kFailure;
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
    arguments.spatial_shapes = inputs[kSpatialShapes];
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
    for (size_t i = 0; i < std::size(kAttributes); ++i) {
      fields_[1 + i] = field(kAttributes[i].name, &(arguments_.*kAttributes[i].value));
    }
    fields_[1 + std::size(kAttributes)] = field("num_inputs", &num_inputs_);
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

  bool check(const kda_arguments& arguments) const {
    Message message;
    return report(kda_cuda_check(&arguments, message.characters, sizeof message.characters), message) == kSuccess;
  }

  /* Everything of the arguments but types and addresses. */
  template <typename DimsOf>
  bool read_shapes(DimsOf dims_of, kda_arguments* arguments) const {
    Shape shapes[kNumInputs];
    for (int32_t i = 0; i < num_inputs_; ++i) shapes[i] = shape_of(dims_of(i));
    *arguments = arguments_;
    Message message;
    return report(check_shapes(shapes, num_inputs_ == kNumInputs, arguments, &message), message) == kSuccess;
  }

  /* Everything of the arguments but the addresses. */
  bool read_inputs(const nvinfer1::PluginTensorDesc* inputs, kda_arguments* arguments) const {
    if (!read_shapes([&](int32_t i) -> auto& { return inputs[i].dims; }, arguments)) return false;
    arguments->dtype = dtype_of(inputs[kValue].type);
    arguments->offset_dtype = dtype_of(inputs[kSamplingOffsets].type);
    arguments->int32_shapes = inputs[kSpatialShapes].type == nvinfer1::DataType::kINT32;
    return true;
  }

  const kda_arguments arguments_; /* of which the attributes are known */
  const bool key_aware_;
  int32_t num_inputs_; /* enqueue is not told, and needs it to know whether there is a key */
  char timing_cache_id_[96];
  nvinfer1::PluginField fields_[2 + std::size(kAttributes)];
  const nvinfer1::PluginFieldCollection serialized_{static_cast<int32_t>(std::size(fields_)), fields_};
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
    const auto read = [&](const char* field, int32_t* value) { return read_field(*fields, field, value); };
    int32_t num_inputs = 0;
    if (phase == nvinfer1::TensorRTPhase::kRUNTIME) {
      int32_t version = 0;
      if (!read("serialization_version", &version)) return nullptr;
      if (version != kSerializationVersion) {
        log_error(getPluginName(),
                  "the field serialization_version is %d; this library reads %d: build the engine again", version,
                  kSerializationVersion);
        return nullptr;
      }
      if (!read("num_inputs", &num_inputs)) return nullptr;
      if (num_inputs < 0 || num_inputs > kNumInputs) {
        log_error(getPluginName(), "the field num_inputs is %d; it should be 0 to %d", num_inputs, kNumInputs);
        return nullptr;
      }
    }
    kda_arguments arguments = smallest_arguments(key_aware_);
    for (const auto& attribute : kAttributes) {
      if (!read(attribute.name, &(arguments.*attribute.value))) return nullptr;
    }
    Message message;
    if (kda_cuda_check(&arguments, message.characters, sizeof message.characters) != KDA_OK) {
      log_error(getPluginName(), "%s", message.characters);
      return nullptr;
    }
    Plugin* plugin = new (std::nothrow) Plugin(arguments, num_inputs);
    if (!plugin) log_error(getPluginName(), "out of memory");
    return plugin;
  }

 private:
  /* A field of one int32.  Others, such as the node's plugin_version and plugin_namespace, are let pass. */
  bool read_field(const nvinfer1::PluginFieldCollection& fields, const char* name, int32_t* value) const {
    for (int32_t i = 0; i < fields.nbFields; ++i) {
      const nvinfer1::PluginField& field = fields.fields[i];
      if (!field.name || strcmp(field.name, name) != 0) continue;
      if (field.type == nvinfer1::PluginFieldType::kINT32 && field.length == 1 && field.data) {
        memcpy(value, field.data, sizeof *value);
        return true;
      }
      log_error(getPluginName(), "the field %s has the TensorRT type %d and %d values; it should be one kINT32 (5)",
                name, static_cast<int>(field.type), field.data ? field.length : 0);
      return false;
    }
    log_error(getPluginName(), "the field %s (one int32) is missing", name);
    return false;
  }

  const bool key_aware_;
  const nvinfer1::PluginField fields_[2] = {{kAttributes[0].name, nullptr, nvinfer1::PluginFieldType::kINT32, 1},
                                            {kAttributes[1].name, nullptr, nvinfer1::PluginFieldType::kINT32, 1}};
  const nvinfer1::PluginFieldCollection announced_{2, fields_};
};

}  // namespace

/* ---- What TensorRT calls when it loads the library -------------------------------------------------------------- */

#define EXPORT extern "C" __attribute__((visibility("default")))

EXPORT nvinfer1::IPluginCreatorInterface* const* getCreators(int32_t& count) {
  /* Never destroyed: a registry may ask a creator for its name while the program ends, after the destructors of this
   * library have run. */
  alignas(Creator) static char memory[2][sizeof(Creator)];
  static nvinfer1::IPluginCreatorInterface* const creators[] = {new (memory[0]) Creator(true),
                                                                new (memory[1]) Creator(false)};
  count = 2;
  return creators;
}

EXPORT void setLoggerFinder(nvinfer1::ILoggerFinder* finder) { logger_finder.store(finder); }

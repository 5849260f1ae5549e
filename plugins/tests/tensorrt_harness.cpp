/* Drives the TensorRT plugins as TensorRT does, without TensorRT:
 *
 *   tensorrt_harness LIBRARY [--emulated]
 *
 * Opens the library by its entry points, makes plugins through the creators for the build and for the run-time phase,
 * and calls every method that TensorRT calls.  Where there is a GPU, enqueue runs there.  --emulated: the library has
 * the kernels on cuda_emulation, and enqueue runs on the host. */
#include <NvInferRuntime.h>
#include <cuda_runtime_api.h>
#include <dlfcn.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>

#include <functional>
#include <initializer_list>
#include <memory>
#include <stdexcept>
#include <string>
#include <utility>
#include <vector>

#include "checks.h"

namespace {

using nvinfer1::DataType;
using nvinfer1::Dims;
using nvinfer1::TensorFormat;
using nvinfer1::TensorRTPhase;
using PluginPointer = std::unique_ptr<nvinfer1::IPluginV3>;

/* ---- What TensorRT brings along ------------------------------------------------------------------------------- */

struct RecordingLogger final : nvinfer1::ILogger {
  std::vector<std::string> messages;
  void log(Severity severity, const char* message) noexcept override {
    CHECK(severity == Severity::kERROR, "%s", message);
    messages.push_back(message);
  }
  /* The one message since the last call, or what is wrong with that. */
  std::string take() {
    const std::string message = messages.size() == 1 ? messages[0] : std::to_string(messages.size()) + " messages";
    messages.clear();
    return message;
  }
};
RecordingLogger logger;

struct RecordingFinder final : nvinfer1::ILoggerFinder {
  nvinfer1::ILogger* findLogger() override { return &logger; }
};

struct ThrowingFinder final : nvinfer1::ILoggerFinder {
  nvinfer1::ILogger* findLogger() override { throw std::runtime_error("no logger"); }
};

/* A size that is a symbol: what counts is which one it is. */
struct Size final : nvinfer1::IDimensionExpr {
  struct Implementation final : nvinfer1::apiv::VDimensionExpr {
    bool isConstant() const override { return false; }
    int64_t getConstantValue() const override { return INT64_MIN; }
    bool isSizeTensor() const override { return false; }
  } implementation;
  Size() { mImpl = &implementation; }
};

/* The output has the sizes of inputs, so nothing needs to be built. */
struct ExpressionBuilder final : nvinfer1::IExprBuilder {
  struct Implementation final : nvinfer1::apiv::VExprBuilder {
    using Expression = nvinfer1::IDimensionExpr;
    int calls = 0;
    const Expression* constant(int64_t) override { return ++calls, nullptr; }
    const Expression* operation(nvinfer1::DimensionOperation, const Expression&, const Expression&) override {
      return ++calls, nullptr;
    }
    const Expression* declareSizeTensor(int32_t, const Expression&, const Expression&) override {
      return ++calls, nullptr;
    }
  } implementation;
  ExpressionBuilder() { mImpl = &implementation; }
};

/* ---- Plugins and their tensors -------------------------------------------------------------------------------- */

struct Node {
  const char* op;
  int32_t num_inputs;
  bool key_aware() const { return strcmp(op, "KeyAwareDeformAttn") == 0; }
};
constexpr Node kNodes[] = {{"KeyAwareDeformAttn", 5}, {"KeyAwareDeformAttn", 6}, {"MSDeformAttn", 5}};

nvinfer1::IPluginCreatorV3One* find_creator(nvinfer1::IPluginCreatorInterface* const* creators, int32_t count,
                                            const char* op) {
  for (int32_t i = 0; i < count; ++i) {
    CHECK(strcmp(creators[i]->getInterfaceInfo().kind, "PLUGIN CREATOR_V3ONE") == 0, "%d", i);
    auto* creator = static_cast<nvinfer1::IPluginCreatorV3One*>(creators[i]);
    if (strcmp(creator->getPluginName(), op) == 0) return creator;
  }
  return nullptr;
}

struct Fields {
  std::vector<std::pair<std::string, int32_t>> values;
  std::vector<nvinfer1::PluginField> list;
  nvinfer1::PluginFieldCollection collection;

  const nvinfer1::PluginFieldCollection* get() {
    list.clear();
    for (const auto& [name, value] : values) {
      list.emplace_back(name.c_str(), &value, nvinfer1::PluginFieldType::kINT32, 1);
    }
    collection.nbFields = static_cast<int32_t>(list.size());
    collection.fields = list.data();
    return &collection;
  }
};

constexpr int32_t kHeads = 2, kPoints = 4;

PluginPointer make(nvinfer1::IPluginCreatorV3One* creator, Fields fields, TensorRTPhase phase) {
  return PluginPointer(creator->createPlugin("layer", fields.get(), phase));
}
PluginPointer make(nvinfer1::IPluginCreatorV3One* creator) {
  return make(creator, {{{"num_heads", kHeads}, {"num_points", kPoints}}, {}, {}}, TensorRTPhase::kBUILD);
}

/* What an engine keeps of a plugin. */
Fields serialize(nvinfer1::IPluginV3* plugin) {
  auto* runtime = static_cast<nvinfer1::IPluginV3OneRuntime*>(
      plugin->getCapabilityInterface(nvinfer1::PluginCapabilityType::kRUNTIME));
  const nvinfer1::PluginFieldCollection* collection = runtime->getFieldsToSerialize();
  Fields fields;
  for (int32_t i = 0; i < collection->nbFields; ++i) {
    const nvinfer1::PluginField& field = collection->fields[i];
    CHECK(field.type == nvinfer1::PluginFieldType::kINT32 && field.length == 1, "%s", field.name);
    fields.values.emplace_back(field.name, *static_cast<const int32_t*>(field.data));
  }
  return fields;
}

nvinfer1::IPluginV3OneBuild* build_part(const PluginPointer& plugin) {
  return static_cast<nvinfer1::IPluginV3OneBuild*>(
      plugin->getCapabilityInterface(nvinfer1::PluginCapabilityType::kBUILD));
}
nvinfer1::IPluginV3OneRuntime* runtime_part(const PluginPointer& plugin) {
  return static_cast<nvinfer1::IPluginV3OneRuntime*>(
      plugin->getCapabilityInterface(nvinfer1::PluginCapabilityType::kRUNTIME));
}

Dims dims(std::initializer_list<int64_t> sizes) {
  Dims result = {};
  for (const int64_t size : sizes) result.d[result.nbDims++] = size;
  return result;
}

/* N 2, Q 5, S 50, two heads of 8, three levels, four points; inputs, then the output. */
std::vector<Dims> good_shapes(const Node& node) {
  std::vector<Dims> shapes = {dims({2, 5, node.key_aware() ? 16 : 24}), dims({2, 50, 16}), dims({2, 5, 3, 2}),
                              dims({2, 5, 48}), dims({3, 2})};
  if (node.num_inputs == 6) shapes.push_back(dims({2, 50, 16}));
  shapes.push_back(dims({2, 5, 16}));
  return shapes;
}

/* The type of each tensor, when T is `storage`. */
std::vector<DataType> row(const Node& node, DataType storage, DataType offsets, DataType shapes = DataType::kINT64) {
  std::vector<DataType> types = {storage, storage, DataType::kFLOAT, offsets, shapes, storage};
  if (node.num_inputs == 6) types.push_back(storage);
  return types;
}

/* Every combination of types that the ops have. */
std::vector<std::vector<DataType>> legal_rows(const Node& node) {
  std::vector<std::vector<DataType>> rows;
  for (const DataType shapes : {DataType::kINT64, DataType::kINT32}) {
    rows.push_back(row(node, DataType::kFLOAT, DataType::kFLOAT, shapes));
    for (const DataType storage : {DataType::kHALF, DataType::kBF16}) {
      for (const DataType offsets : {storage, DataType::kFLOAT}) rows.push_back(row(node, storage, offsets, shapes));
    }
  }
  return rows;
}

nvinfer1::PluginTensorDesc describe(const Dims& shape, DataType type) {
  nvinfer1::PluginTensorDesc tensor = {};
  tensor.dims = shape;
  tensor.type = type;
  tensor.format = TensorFormat::kLINEAR;
  return tensor;
}

int32_t configure(const PluginPointer& plugin, const std::vector<Dims>& shapes) {
  std::vector<nvinfer1::DynamicPluginTensorDesc> tensors;
  for (const Dims& shape : shapes) tensors.push_back({describe(shape, DataType::kFLOAT), shape, shape, shape});
  const int32_t num_inputs = static_cast<int32_t>(shapes.size()) - 1;
  return build_part(plugin)->configurePlugin(tensors.data(), num_inputs, &tensors.back(), 1);
}

int32_t change_shape(const PluginPointer& plugin, const std::vector<Dims>& shapes, const std::vector<DataType>& types) {
  std::vector<nvinfer1::PluginTensorDesc> tensors;
  for (size_t i = 0; i < shapes.size(); ++i) tensors.push_back(describe(shapes[i], types[i]));
  const int32_t num_inputs = static_cast<int32_t>(shapes.size()) - 1;
  return runtime_part(plugin)->onShapeChange(tensors.data(), num_inputs, &tensors.back(), 1);
}

/* ---- Tests ---------------------------------------------------------------------------------------------------- */

void test_creator(nvinfer1::IPluginCreatorV3One* creator, const std::string& op) {
  CHECK(strcmp(creator->getPluginVersion(), "1") == 0, "%s", creator->getPluginVersion());
  CHECK(strcmp(creator->getPluginNamespace(), "") == 0, "%s", creator->getPluginNamespace());
  const nvinfer1::PluginFieldCollection* announced = creator->getFieldNames();
  CHECK(announced->nbFields == 2, "%d", announced->nbFields);
  CHECK(strcmp(announced->fields[0].name, "num_heads") == 0, "%s", announced->fields[0].name);
  CHECK(strcmp(announced->fields[1].name, "num_points") == 0, "%s", announced->fields[1].name);

  const auto refuses = [&](Fields fields, TensorRTPhase phase, const char* message) {
    CHECK(!make(creator, std::move(fields), phase), "%s", message);
    const std::string logged = logger.take();
    CHECK(logged == op + ": " + message, "logged '%s', expected '%s'", logged.c_str(), message);
  };
  constexpr TensorRTPhase kBuild = TensorRTPhase::kBUILD, kRuntime = TensorRTPhase::kRUNTIME;
  refuses({{{"num_points", 4}}, {}, {}}, kBuild, "the field num_heads (one int32) is missing");
  refuses({{{"num_heads", 8}}, {}, {}}, kBuild, "the field num_points (one int32) is missing");
  refuses({{{"num_heads", 0}, {"num_points", 4}}, {}, {}}, kBuild, "num_heads is 0; it must be at least 1");
  refuses({{{"num_heads", -8}, {"num_points", 4}}, {}, {}}, kBuild, "num_heads is -8; it must be at least 1");
  refuses({{{"num_heads", 8}, {"num_points", 9}}, {}, {}}, kBuild, "num_points is 9; the kernels take at most 8");
  refuses({{{"num_heads", 8}, {"num_points", 4}}, {}, {}}, kRuntime,
          "the field serialization_version (one int32) is missing");
  refuses({{{"serialization_version", 2}, {"num_heads", 8}, {"num_points", 4}, {"num_inputs", 5}}, {}, {}}, kRuntime,
          "the field serialization_version is 2; this library reads 1: build the engine again");
  refuses({{{"serialization_version", 1}, {"num_heads", 8}, {"num_points", 4}, {"num_inputs", 7}}, {}, {}}, kRuntime,
          "the field num_inputs is 7; it should be 0 to 6");
  CHECK(!creator->createPlugin("layer", nullptr, kBuild), "no fields");
  CHECK(logger.take() == op + ": there are no fields; num_heads and num_points are needed", "no fields");

  const int32_t numbers[2] = {4, 4};
  const int64_t wide = 4;
  const auto refuses_points = [&](nvinfer1::PluginField points, const char* message) {
    const int32_t heads = 8;
    const nvinfer1::PluginField list[] = {{"num_heads", &heads, nvinfer1::PluginFieldType::kINT32, 1}, points};
    const nvinfer1::PluginFieldCollection fields = {2, list};
    CHECK(!creator->createPlugin("layer", &fields, kBuild), "%s", message);
    const std::string logged = logger.take();
    CHECK(logged == op + ": " + message, "logged '%s', expected '%s'", logged.c_str(), message);
  };
  refuses_points({"num_points", &wide, nvinfer1::PluginFieldType::kINT64, 1},
                 "the field num_points has the TensorRT type 10 and 1 values; it should be one kINT32 (5)");
  refuses_points({"num_points", numbers, nvinfer1::PluginFieldType::kINT32, 2},
                 "the field num_points has the TensorRT type 5 and 2 values; it should be one kINT32 (5)");
  refuses_points({"num_points", nullptr, nvinfer1::PluginFieldType::kINT32, 1},
                 "the field num_points has the TensorRT type 5 and 0 values; it should be one kINT32 (5)");

  /* A caller may pass on all attributes of a node. */
  const nvinfer1::PluginField all[] = {{"plugin_version", "1", nvinfer1::PluginFieldType::kCHAR, 1},
                                       {"plugin_namespace", "", nvinfer1::PluginFieldType::kCHAR, 0},
                                       {"num_heads", numbers, nvinfer1::PluginFieldType::kINT32, 1},
                                       {"num_points", numbers, nvinfer1::PluginFieldType::kINT32, 1}};
  const nvinfer1::PluginFieldCollection fields = {4, all};
  CHECK(PluginPointer(creator->createPlugin("layer", &fields, kBuild)), "all attributes");
}

void test_formats(nvinfer1::IPluginCreatorV3One* creator, const Node& node) {
  const PluginPointer plugin = make(creator);
  nvinfer1::IPluginV3OneBuild* build = build_part(plugin);
  const std::vector<std::vector<DataType>> rows = legal_rows(node);
  const int32_t num_tensors = node.num_inputs + 1;
  int checked = 0;

  for (const std::vector<DataType>& prefix : rows) {
    for (int32_t position = 0; position < num_tensors; ++position) {
      for (int32_t type = 0; type < nvinfer1::EnumMax<DataType>(); ++type) {
        for (int32_t format = 0; format < nvinfer1::EnumMax<TensorFormat>(); ++format) {
          /* Supported: some row goes on from the types before this position with this type. */
          bool expected = false;
          for (const std::vector<DataType>& candidate : rows) {
            expected |= std::equal(prefix.begin(), prefix.begin() + position, candidate.begin()) &&
                        candidate[position] == static_cast<DataType>(type);
          }
          expected &= static_cast<TensorFormat>(format) == TensorFormat::kLINEAR;
          /* Nothing may depend on what comes after. */
          for (const DataType later : {DataType::kFLOAT, DataType::kINT8}) {
            std::vector<nvinfer1::DynamicPluginTensorDesc> tensors(num_tensors);
            for (int32_t i = 0; i < num_tensors; ++i) {
              tensors[i].desc = describe({}, i < position ? prefix[i] : later);
              if (i > position) tensors[i].desc.format = TensorFormat::kCHW32;
            }
            tensors[position].desc.type = static_cast<DataType>(type);
            tensors[position].desc.format = static_cast<TensorFormat>(format);
            const bool supported = build->supportsFormatCombination(position, tensors.data(), node.num_inputs, 1);
            CHECK(supported == expected, "%s with %d inputs, position %d, storage %d, type %d, format %d: %d", node.op,
                  node.num_inputs, position, static_cast<int>(prefix[0]), type, format, supported);
            ++checked;
          }
        }
      }
    }
  }
  printf("%s with %d inputs: %d combinations of types and formats\n", node.op, node.num_inputs, checked);

  /* All combinations, found as TensorRT finds them: one position after another. */
  size_t found = 0;
  std::vector<nvinfer1::DynamicPluginTensorDesc> tensors(num_tensors);
  const std::function<void(int32_t)> search = [&](int32_t position) {
    if (position == num_tensors) {
      ++found;
      return;
    }
    for (int32_t type = 0; type < nvinfer1::EnumMax<DataType>(); ++type) {
      tensors[position].desc = describe({}, static_cast<DataType>(type));
      if (build->supportsFormatCombination(position, tensors.data(), node.num_inputs, 1)) search(position + 1);
    }
  };
  search(0);
  CHECK(found == rows.size(), "%zu combinations instead of %zu", found, rows.size());
  CHECK(logger.messages.empty(), "%s", logger.take().c_str());

  for (const auto& [num_inputs, num_outputs] : {std::pair(4, 1), std::pair(7, 1), std::pair(node.num_inputs, 2)}) {
    CHECK(!build->supportsFormatCombination(0, tensors.data(), num_inputs, num_outputs), "%d inputs", num_inputs);
    CHECK(logger.take().find(num_outputs == 2 ? ": the node has 2 outputs; it should have 1" : ": the node has ") !=
              std::string::npos,
          "%d inputs", num_inputs);
  }
}

void test_output(nvinfer1::IPluginCreatorV3One* creator, const Node& node) {
  const PluginPointer plugin = make(creator);
  nvinfer1::IPluginV3OneBuild* build = build_part(plugin);
  CHECK(build->getNbOutputs() == 1, "%d", build->getNbOutputs());
  CHECK(build->getNbTactics() == 0, "%d", build->getNbTactics());
  CHECK(build->getWorkspaceSize(nullptr, node.num_inputs, nullptr, 1) == 0, "no workspace");

  for (const std::vector<DataType>& types : legal_rows(node)) {
    DataType output = DataType::kBOOL;
    CHECK(build->getOutputDataTypes(&output, 1, types.data(), node.num_inputs) == 0, "%s", node.op);
    CHECK(output == types[1], "type %d", static_cast<int>(output));
  }
  const std::vector<DataType> good = row(node, DataType::kHALF, DataType::kHALF);
  const auto refuses = [&](int32_t input, DataType type, const std::string& message) {
    std::vector<DataType> types = good;
    types[input] = type;
    DataType output;
    CHECK(build->getOutputDataTypes(&output, 1, types.data(), node.num_inputs) != 0, "%s", message.c_str());
    const std::string logged = logger.take();
    CHECK(logged == std::string(node.op) + ": " + message, "logged '%s', expected '%s'", logged.c_str(),
          message.c_str());
  };
  const std::string fix = ": cast it, or export the model again",
                    query = node.key_aware() ? "query" : "attention_logits";
  refuses(0, DataType::kFLOAT, query + " is float32 where value is float16; it must be the type of value" + fix);
  refuses(1, DataType::kBF16, query + " is float16 where value is bfloat16; it must be the type of value" + fix);
  refuses(1, DataType::kINT8, "value is int8; it must be float32, float16 or bfloat16");
  refuses(2, DataType::kHALF, "reference_points is float16 where value is float16; it must be float32" + fix);
  refuses(3, DataType::kBF16,
          "sampling_offsets is bfloat16 where value is float16; it must be float32 or the type of value" + fix);
  refuses(4, DataType::kFLOAT, "spatial_shapes is float32 where value is float16; it must be int64 or int32" + fix);
  if (node.num_inputs == 6) {
    refuses(5, DataType::kFLOAT, "key is float32 where value is float16; it must be the type of value" + fix);
  }

  Size sizes[6][4];
  std::vector<nvinfer1::DimsExprs> inputs(node.num_inputs);
  const std::vector<Dims> shapes = good_shapes(node);
  for (int32_t i = 0; i < node.num_inputs; ++i) {
    inputs[i].nbDims = shapes[i].nbDims;
    for (int32_t d = 0; d < shapes[i].nbDims; ++d) inputs[i].d[d] = &sizes[i][d];
  }
  ExpressionBuilder builder;
  nvinfer1::DimsExprs shape = {};
  CHECK(build->getOutputShapes(inputs.data(), node.num_inputs, nullptr, 0, &shape, 1, builder) == 0, "%s", node.op);
  CHECK(shape.nbDims == 3, "%d", shape.nbDims);
  CHECK(shape.d[0] == &sizes[0][0] && shape.d[1] == &sizes[0][1] && shape.d[2] == &sizes[1][2], "%s", node.op);
  CHECK(builder.implementation.calls == 0, "%d", builder.implementation.calls);

  inputs[0].nbDims = 4;
  CHECK(build->getOutputShapes(inputs.data(), node.num_inputs, nullptr, 0, &shape, 1, builder) != 0, "%s", node.op);
  const std::string logged = logger.take();
  CHECK(logged == std::string(node.op) + (node.key_aware() ? ": query" : ": attention_logits") +
                      " has 4 dimensions; it should have 3",
        "%s", logged.c_str());
}

void test_shapes(nvinfer1::IPluginCreatorV3One* creator, const Node& node) {
  const PluginPointer plugin = make(creator);
  const std::vector<DataType> types = row(node, DataType::kHALF, DataType::kFLOAT);
  const std::vector<Dims> good = good_shapes(node);
  CHECK(configure(plugin, good) == 0 && change_shape(plugin, good, types) == 0, "%s", logger.take().c_str());

  /* Sizes of the profile, in place of which TensorRT writes -1: batch, queries, tokens. */
  std::vector<Dims> dynamic = good;
  for (Dims& shape : dynamic) {
    if (shape.nbDims >= 3) shape.d[0] = shape.d[1] = -1;
  }
  CHECK(configure(plugin, dynamic) == 0, "%s", logger.take().c_str());
  std::vector<Dims> unknown = good;
  for (Dims& shape : unknown) std::fill_n(shape.d, shape.nbDims, -1);
  CHECK(configure(plugin, unknown) == 0, "%s", logger.take().c_str());
  dynamic[3].d[2] = 40;
  CHECK(configure(plugin, dynamic) != 0, "%s", node.op);
  std::string logged = logger.take();
  CHECK(logged == std::string(node.op) + ": sampling_offsets has shape [-1, -1, 40]; it should be [-1, -1, 48]", "%s",
        logged.c_str());

  std::vector<Dims> empty = good;
  for (Dims& shape : empty) {
    if (shape.nbDims >= 3) shape.d[0] = 0;
  }
  CHECK(configure(plugin, empty) == 0 && change_shape(plugin, empty, types) == 0, "%s", logger.take().c_str());

  const char* query = node.key_aware() ? "query" : "attention_logits";
  const std::string third = node.key_aware() ? "16" : "24";
  const auto refuses_all = [&](const std::vector<Dims>& shapes, const std::string& message) {
    for (const bool at_build : {true, false}) {
      CHECK((at_build ? configure(plugin, shapes) : change_shape(plugin, shapes, types)) != 0, "%s", message.c_str());
      const std::string text = logger.take();
      CHECK(text == std::string(node.op) + ": " + message, "logged '%s', expected '%s'", text.c_str(), message.c_str());
    }
  };
  const auto refuses = [&](size_t input, std::initializer_list<int64_t> sizes, const std::string& message) {
    std::vector<Dims> shapes = good;
    shapes[input] = dims(sizes);
    refuses_all(shapes, message);
  };
  refuses(0, {2, 5, 15}, query + (" has shape [2, 5, 15]; it should be [2, 5, " + third + "]"));
  refuses(0, {3, 5, node.key_aware() ? 16 : 24},
          query + (" has shape [3, 5, " + third + "]; it should be [2, 5, " + third + "]"));
  refuses(0, {2, 5}, query + std::string(" has shape [2, 5]; it should have 3 dimensions"));
  refuses(1, {2, 50, 15}, "value has 15 channels; they should divide by the 2 heads");
  refuses(2, {2, 5, 3, 3}, "reference_points has a last dimension of 3; it must be 2 (x, y) or 4 (x, y, w, h)");
  refuses(2, {2, 4, 3, 2}, "reference_points has shape [2, 4, 3, 2]; it should be [2, 5, 3, 2]");
  refuses(3, {2, 5, 46}, "sampling_offsets has shape [2, 5, 46]; it should be [2, 5, 48]");
  refuses(4, {3, 3}, "spatial_shapes has shape [3, 3]; it should be [3, 2]");
  if (node.num_inputs == 6) refuses(5, {2, 49, 16}, "key has shape [2, 49, 16]; it should be [2, 50, 16]");

  /* What only the kernels know: heads of 6 channels, and nine levels. */
  std::vector<Dims> narrow = good;
  if (node.key_aware()) narrow[0] = dims({2, 5, 12});
  for (const size_t i : {size_t{1}, good.size() - 1}) narrow[i].d[2] = 12;
  if (node.num_inputs == 6) narrow[5].d[2] = 12;
  refuses_all(narrow, "head_dim is 6; the CUDA kernels take multiples of 8");
  std::vector<Dims> deep = good;
  if (!node.key_aware()) deep[0] = dims({2, 5, 72});
  deep[2] = dims({2, 5, 9, 2}), deep[3] = dims({2, 5, 144}), deep[4] = dims({9, 2});
  refuses_all(deep, "spatial_shapes has 9 levels; the kernels take at most 8");
}

void test_serialization(nvinfer1::IPluginCreatorV3One* creator, const Node& node) {
  PluginPointer built = make(creator);
  for (const int32_t num_inputs : {0, node.num_inputs}) { /* before and after TensorRT configures it */
    if (num_inputs != 0) CHECK(configure(built, good_shapes(node)) == 0, "%s", logger.take().c_str());
    const Fields stored = serialize(built.get());
    const decltype(stored.values) expected = {
        {"serialization_version", 1}, {"num_heads", kHeads}, {"num_points", kPoints}, {"num_inputs", num_inputs}};
    CHECK(stored.values == expected, "%zu fields", stored.values.size());

    PluginPointer loaded = make(creator, stored, TensorRTPhase::kRUNTIME);
    PluginPointer cloned(loaded->clone());
    loaded.reset(); /* a clone stands on its own */
    PluginPointer attached(runtime_part(cloned)->attachToContext(nullptr));
    cloned.reset();
    CHECK(serialize(attached.get()).values == expected, "%s", node.op);
    auto* core = static_cast<nvinfer1::IPluginV3OneCore*>(
        attached->getCapabilityInterface(nvinfer1::PluginCapabilityType::kCORE));
    CHECK(strcmp(core->getPluginName(), node.op) == 0, "%s", core->getPluginName());
    CHECK(strcmp(core->getPluginVersion(), "1") == 0, "%s", core->getPluginVersion());
    CHECK(strcmp(core->getPluginNamespace(), "") == 0, "%s", core->getPluginNamespace());
    CHECK(strcmp(build_part(attached)->getTimingCacheID(), build_part(built)->getTimingCacheID()) == 0, "%s", node.op);
  }
  const PluginPointer other =
      make(creator, {{{"num_heads", 3}, {"num_points", kPoints}}, {}, {}}, TensorRTPhase::kBUILD);
  CHECK(strcmp(build_part(other)->getTimingCacheID(), build_part(built)->getTimingCacheID()) != 0, "%s", node.op);
}

void test_enqueue_order(nvinfer1::IPluginCreatorV3One* creator, const Node& node) {
  const PluginPointer plugin = make(creator);
  CHECK(runtime_part(plugin)->enqueue(nullptr, nullptr, nullptr, nullptr, nullptr, nullptr) != 0, "%s", node.op);
  const std::string logged = logger.take();
  CHECK(logged == std::string(node.op) + ": enqueue was called before onShapeChange", "%s", logged.c_str());
}

/* ---- enqueue -------------------------------------------------------------------------------------------------- */

bool emulated = false;

#define CUDA(call)                                                  \
  do {                                                              \
    const cudaError_t error_ = (call);                              \
    CHECK(error_ == cudaSuccess, "%s", cudaGetErrorString(error_)); \
  } while (0)

/* A tensor in the memory of the device, of exactly its size. */
class DeviceMemory {
 public:
  DeviceMemory(const void* source, size_t bytes) : bytes_(bytes) {
    if (emulated) {
      data = malloc(bytes);
      memcpy(data, source, bytes);
    } else {
      CUDA(cudaMalloc(&data, bytes));
      CUDA(cudaMemcpy(data, source, bytes, cudaMemcpyHostToDevice));
    }
  }
  explicit DeviceMemory(Tensor& tensor) : DeviceMemory(tensor.data(), bytes_of(tensor)) {}
  DeviceMemory(const DeviceMemory&) = delete;
  ~DeviceMemory() { emulated ? free(data) : void(cudaFree(data)); }

  void read(Tensor* tensor) const {
    if (emulated) {
      memcpy(tensor->data(), data, bytes_);
    } else {
      CUDA(cudaMemcpy(tensor->data(), data, bytes_, cudaMemcpyDeviceToHost));
    }
  }

  void* data = nullptr;

 private:
  static size_t bytes_of(const Tensor& tensor) { return tensor.size() * (tensor.dtype == KDA_FLOAT32 ? 4 : 2); }
  size_t bytes_;
};

/* On a stream, and captured in a CUDA graph, which is how trtexec runs by default since TensorRT 11. */
void test_enqueue(nvinfer1::IPluginCreatorV3One* creator, const Node& node, const std::vector<DataType>& types) {
  const auto kda_type = [](DataType type) {
    return type == DataType::kHALF ? KDA_FLOAT16 : type == DataType::kBF16 ? KDA_BFLOAT16 : KDA_FLOAT32;
  };
  Shape shape;
  shape.batch = 2, shape.queries = 5, shape.heads = kHeads, shape.dim = 8, shape.points = kPoints;
  shape.levels = {5, 6, 4, 4, 2, 2}; /* 50 tokens */
  shape.key_aware = node.key_aware(), shape.own_key = node.num_inputs == 6;
  shape.dtype = kda_type(types[0]), shape.offset_dtype = kda_type(types[3]);
  shape.int32_shapes = types[4] == DataType::kINT32;
  Problem problem(shape);
  problem.randomise(1);
  const std::vector<double> expected = problem.expected();

  const DeviceMemory query(problem.query), key(problem.key), value(problem.value), offsets(problem.offsets);
  const DeviceMemory references(problem.references.data(), problem.references.size() * sizeof(float));
  const DeviceMemory spatial_shapes(problem.arguments().spatial_shapes,
                                    shape.levels.size() * (shape.int32_shapes ? sizeof(int32_t) : sizeof(int64_t)));
  const DeviceMemory output(problem.output);
  const void* inputs[] = {query.data, value.data, references.data, offsets.data, spatial_shapes.data, key.data};
  void* outputs[] = {output.data};

  const std::vector<Dims> shapes = good_shapes(node);
  const PluginPointer built = make(creator);
  const PluginPointer plugin(runtime_part(built)->attachToContext(nullptr));
  CHECK(change_shape(plugin, shapes, types) == 0, "%s", logger.take().c_str());
  std::vector<nvinfer1::PluginTensorDesc> tensors;
  for (size_t i = 0; i < shapes.size(); ++i) tensors.push_back(describe(shapes[i], types[i]));
  cudaStream_t stream = nullptr;
  const auto enqueue = [&] {
    const int32_t status =
        runtime_part(plugin)->enqueue(tensors.data(), &tensors.back(), inputs, outputs, nullptr, stream);
    CHECK(status == 0, "%s", logger.take().c_str());
  };
  const auto check_output = [&](const char* how) {
    output.read(&problem.output);
    double worst = 0;
    for (size_t i = 0; i < expected.size(); ++i) {
      const double error = fabs(problem.output.get(i) - expected[i]);
      worst = error <= worst ? worst : error; /* keeps a NaN */
    }
    CHECK(worst <= tolerance(problem), "%s %s: error %g, allowed %g: %s", node.op, how, worst, tolerance(problem),
          describe(shape).c_str());
  };

  if (emulated) {
    enqueue();
    check_output("emulated");
    return;
  }
  CUDA(cudaStreamCreateWithFlags(&stream, cudaStreamNonBlocking));
  enqueue();
  CUDA(cudaStreamSynchronize(stream));
  check_output("on a stream");

  CUDA(cudaMemset(output.data, 0xff, problem.output.size() * sizeof(uint16_t)));
  cudaGraph_t graph = nullptr;
  cudaGraphExec_t executable = nullptr;
  CUDA(cudaStreamBeginCapture(stream, cudaStreamCaptureModeThreadLocal));
  enqueue();
  CUDA(cudaStreamEndCapture(stream, &graph));
  CUDA(cudaGraphInstantiateWithFlags(&executable, graph, 0));
  CUDA(cudaGraphLaunch(executable, stream));
  CUDA(cudaStreamSynchronize(stream));
  check_output("in a graph");
  cudaGraphExecDestroy(executable);
  cudaGraphDestroy(graph);
  cudaStreamDestroy(stream);
}

/* Without a GPU enqueue still has to come back, with a status and a message. */
void test_enqueue_fails(nvinfer1::IPluginCreatorV3One* creator, const Node& node) {
  const PluginPointer plugin = make(creator);
  const std::vector<Dims> shapes = good_shapes(node);
  const std::vector<DataType> types = row(node, DataType::kFLOAT, DataType::kFLOAT);
  CHECK(change_shape(plugin, shapes, types) == 0, "%s", logger.take().c_str());
  std::vector<nvinfer1::PluginTensorDesc> tensors;
  for (size_t i = 0; i < shapes.size(); ++i) tensors.push_back(describe(shapes[i], types[i]));
  alignas(256) char somewhere[256];
  const void* inputs[] = {somewhere, somewhere, somewhere, somewhere, somewhere, somewhere};
  void* outputs[] = {somewhere};
  CHECK(runtime_part(plugin)->enqueue(tensors.data(), &tensors.back(), inputs, outputs, nullptr, nullptr) != 0, "%s",
        node.op);
  const std::string logged = logger.take();
  CHECK(logged.rfind(std::string(node.op) + ": ", 0) == 0, "%s", logged.c_str());
}

}  // namespace

int main(int argc, char** argv) {
  emulated = argc == 3 && strcmp(argv[2], "--emulated") == 0;
  if (argc != 2 && !emulated) {
    fprintf(stderr, "usage: %s LIBRARY [--emulated]\n", argv[0]);
    return 2;
  }
  void* library = dlopen(argv[1], RTLD_NOW | RTLD_LOCAL);
  if (!library) {
    printf("%s\n", dlerror());
    return 1;
  }
  const auto get_creators =
      reinterpret_cast<nvinfer1::IPluginCreatorInterface* const* (*)(int32_t&)>(dlsym(library, "getCreators"));
  const auto set_logger_finder =
      reinterpret_cast<void (*)(nvinfer1::ILoggerFinder*)>(dlsym(library, "setLoggerFinder"));
  if (!get_creators || !set_logger_finder) {
    printf("%s has no getCreators or no setLoggerFinder\n", argv[1]);
    return 1;
  }
  printf("built with the headers of TensorRT %d.%d.%d\n", NV_TENSORRT_MAJOR, NV_TENSORRT_MINOR, NV_TENSORRT_PATCH);

  int32_t count = 0;
  nvinfer1::IPluginCreatorInterface* const* creators = get_creators(count);
  CHECK(count == 2, "%d creators", count);

  /* No exception of TensorRT's comes back to it through the plugins; this message goes to stderr. */
  ThrowingFinder throwing;
  set_logger_finder(&throwing);
  nvinfer1::IPluginCreatorV3One* plain = find_creator(creators, count, "MSDeformAttn");
  CHECK(plain && !plain->createPlugin("layer", nullptr, TensorRTPhase::kBUILD), "thrown");

  RecordingFinder finder;
  set_logger_finder(&finder);
  int devices = 0;
  const cudaError_t error = cudaGetDeviceCount(&devices);
  const bool enqueue_runs = emulated || (error == cudaSuccess && devices > 0);
  for (const Node& node : kNodes) {
    nvinfer1::IPluginCreatorV3One* creator = find_creator(creators, count, node.op);
    if (!creator) {
      printf("there is no creator of %s\n", node.op);
      return 1;
    }
    test_creator(creator, node.op);
    test_formats(creator, node);
    test_output(creator, node);
    test_shapes(creator, node);
    test_serialization(creator, node);
    test_enqueue_order(creator, node);
    if (enqueue_runs) {
      for (const std::vector<DataType>& types : legal_rows(node)) test_enqueue(creator, node, types);
    } else {
      test_enqueue_fails(creator, node);
    }
  }
  if (!enqueue_runs) {
    printf("enqueue on a GPU: skipped (%s)\n", error == cudaSuccess ? "no device" : cudaGetErrorString(error));
  }
  printf(failures ? "%d checks failed\n" : "all checks passed\n", failures);
  return failures != 0;
}

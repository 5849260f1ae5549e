/* KeyAwareDeformAttn and MSDeformAttn as OpenVINO operations, and their conversion from the ONNX domain litedetr.
 *
 * This file translates between OpenVINO and plugins/kda; plugins/op.h describes the ops and says who checks what.  The
 * CPU plugin runs an operation that it does not know by calling its evaluate, for any number of requests at once.
 */
#include <atomic>
#include <cstdint>
#include <cstdlib>
#include <memory>
#include <mutex>
#include <new>
#include <string>
#include <utility>
#include <vector>

#include "../op.h"
#include "kda.h"
#include "openvino/core/op_extension.hpp"
#include "openvino/core/parallel.hpp"
#include "openvino/frontend/onnx/extension/conversion.hpp"
#include "openvino/op/op.hpp"

namespace {

using namespace litedetr;

/* The operation set in OpenVINO's own files, whose operations have no version but that of their set. */
constexpr char kOpset[] = "litedetr1";
static_assert(kOpVersion == 1, "kOpset has the version in its name");

constexpr size_t kAlignment = 64;

/* ---- Small parts -------------------------------------------------------------------------------------------- */

kda_dtype dtype_of(ov::element::Type type) {
  if (type == ov::element::f16) return KDA_FLOAT16;
  if (type == ov::element::bf16) return KDA_BFLOAT16;
  return KDA_FLOAT32;
}

bool is_any_of(ov::element::Type type, std::initializer_list<ov::element::Type> types) {
  for (const auto& other : types) {
    if (type == other) return true;
  }
  return false;
}

Shape shape_of(const ov::PartialShape& partial, size_t rank_if_unknown) {
  Shape shape;
  shape.rank = partial.rank().is_static() ? partial.size() : rank_if_unknown;
  for (size_t i = 0; i < shape.rank && i < Shape::kMaxRank; ++i) {
    const bool known = partial.rank().is_static() && partial[i].is_static();
    shape.sizes[i] = known ? partial[i].get_length() : Shape::kUnknown;
  }
  return shape;
}

/* Scratch memory that ended calls leave for later ones: new memory would be cleared by the system, page by page, at
 * every call.  There are as many blocks as calls have run at once, each as large as the largest of them needed. */
class Scratch {
  struct Free {
    void operator()(void* data) const { std::free(data); }
  };
  struct Block {
    std::unique_ptr<void, Free> data;
    size_t size = 0;
  };

 public:
  class Lease {
   public:
    Lease(Scratch& scratch, size_t size) : scratch_(scratch), block_(scratch.take(size)) {}
    ~Lease() { scratch_.give_back(std::move(block_)); }
    Lease(const Lease&) = delete;
    Lease& operator=(const Lease&) = delete;
    void* data() const { return block_.data.get(); }

   private:
    Scratch& scratch_;
    Block block_;
  };

  /* One for all operations: a network's attentions run one after another.  It goes with the last of them. */
  static std::shared_ptr<Scratch> shared() {
    static std::mutex mutex;
    static std::weak_ptr<Scratch> existing;
    const std::lock_guard<std::mutex> lock(mutex);
    std::shared_ptr<Scratch> scratch = existing.lock();
    if (!scratch) existing = scratch = std::make_shared<Scratch>();
    return scratch;
  }

 private:
  Block take(size_t size) {
    Block block;
    {
      const std::lock_guard<std::mutex> lock(mutex_);
      if (!blocks_.empty()) {
        block = std::move(blocks_.back());
        blocks_.pop_back();
      }
    }
    if (block.size < size) {
      block = {}; /* before the larger one is there */
      size = (size + kAlignment - 1) / kAlignment * kAlignment;
      block.data.reset(std::aligned_alloc(kAlignment, size));
      if (!block.data) throw std::bad_alloc();
      block.size = size;
    }
    return block;
  }

  void give_back(Block block) {
    if (!block.data) return;
    const std::lock_guard<std::mutex> lock(mutex_);
    blocks_.push_back(std::move(block));
  }

  std::mutex mutex_;
  std::vector<Block> blocks_;
};

/* The threads of the request that evaluates, behind kda_executor.  Each takes the next task when it is done with one:
 * ov::parallel_for would divide them beforehand, and wait for the thread that was late.  The tasks are some 20 us each.
 */
void run_on_openvinos_threads(void*, int64_t count, kda_task task, void* state) {
  std::atomic<int64_t> next{0};
  const int64_t threads = parallel_get_max_threads();
  ov::parallel_nt(static_cast<int>(count < threads ? count : threads), [&](int, int) {
    for (int64_t i; (i = next.fetch_add(1, std::memory_order_relaxed)) < count;) task(i, i + 1, state);
  });
}

template <typename Half>
void to_float(const ov::Tensor& tensor, float* floats) {
  const Half* halves = static_cast<const Half*>(tensor.data());
  for (size_t i = 0; i < tensor.get_size(); ++i) floats[i] = halves[i];
}

/* ---- The operations ----------------------------------------------------------------------------------------- */

template <bool key_aware>
class DeformAttn : public ov::op::Op {
 public:
  OPENVINO_OP(op_name(key_aware), kOpset)

  DeformAttn() = default;
  DeformAttn(const ov::OutputVector& inputs, int64_t num_heads, int64_t num_points)
      : Op(inputs), attributes_{num_heads, num_points} {
    constructor_validate_and_infer_types();
  }

  std::shared_ptr<ov::Node> clone_with_new_inputs(const ov::OutputVector& inputs) const override {
    return std::make_shared<DeformAttn>(inputs, attributes_[0], attributes_[1]);
  }

  bool visit_attributes(ov::AttributeVisitor& visitor) override {
    for (size_t i = 0; i < kNumAttributes; ++i) visitor.on_attribute(kAttributes[i].name, attributes_[i]);
    return true;
  }

  /* A plugin may have changed the types of the ONNX file: the CPU's makes int32 of int64, and float32 or float16 of all
   * floats. */
  void validate_and_infer_types() override {
    const size_t num_inputs = get_input_size();
    expect(num_inputs == kKey || (key_aware && num_inputs == kNumInputs), "there are ", num_inputs,
           " inputs; there should be ", key_aware ? "5 or 6" : "5");
    const ov::element::Type type = get_input_element_type(kValue);
    for (size_t input = 0; input < num_inputs; ++input) check_type(input, type);

    kda_arguments arguments = known_arguments();
    arguments.dtype = dtype_of(type);
    arguments.offset_dtype = dtype_of(get_input_element_type(kSamplingOffsets));
    check_on_cpu(arguments);
    Shape shapes[kNumInputs];
    for (size_t input = 0; input < num_inputs; ++input) {
      shapes[input] = shape_of(get_input_partial_shape(input), kInputs[input].rank);
    }
    check(shapes, num_inputs, &arguments);
    kda_arguments sizes = known_arguments();
    sizes.head_dim = arguments.head_dim;
    sizes.reference_width = arguments.reference_width;
    check_on_cpu(sizes);

    ov::PartialShape output = ov::PartialShape::dynamic(3);
    const ov::PartialShape &query = get_input_partial_shape(kQuery), &value = get_input_partial_shape(kValue);
    if (query.rank().is_static()) output[1] = query[1];
    if (value.rank().is_static()) {
      output[0] = value[0];
      output[2] = value[2];
    }
    set_output_type(0, type, output);
  }

  bool has_evaluate() const override { return true; }

  bool evaluate(ov::TensorVector& outputs, const ov::TensorVector& inputs) const override {
    kda_arguments arguments = known_arguments();
    Shape shapes[kNumInputs];
    for (size_t input = 0; input < inputs.size(); ++input) {
      shapes[input] = shape_of(inputs[input].get_shape(), 0);
    }
    check(shapes, inputs.size(), &arguments);
    const size_t channels = inputs[kValue].get_shape()[2];
    outputs[0].set_shape({inputs[kValue].get_shape()[0], inputs[kQuery].get_shape()[1], channels});
    if (outputs[0].get_size() == 0) return true;

    const ov::Tensor &levels = inputs[kSpatialShapes], &references = inputs[kReferencePoints];
    arguments.dtype = dtype_of(inputs[kValue].get_element_type());
    arguments.offset_dtype = dtype_of(inputs[kSamplingOffsets].get_element_type());
    arguments.query = inputs[kQuery].data();
    arguments.key = inputs.size() > kKey ? inputs[kKey].data() : nullptr;
    arguments.value = inputs[kValue].data();
    arguments.sampling_offsets = inputs[kSamplingOffsets].data();
    arguments.output = outputs[0].data();
    int64_t sides[2 * KDA_MAX_LEVELS]; /* more levels are refused before they are read */
    if (levels.get_element_type() == ov::element::i64) {
      arguments.spatial_shapes = levels.data<const int64_t>();
    } else {
      const int32_t* given = levels.data<const int32_t>();
      for (size_t i = 0; i < levels.get_size() && i < 2 * KDA_MAX_LEVELS; ++i) sides[i] = given[i];
      arguments.spatial_shapes = sides;
    }
    check_on_cpu(arguments);

    size_t workspace = kda_cpu_workspace_size(&arguments);
    workspace = (workspace + kAlignment - 1) / kAlignment * kAlignment;
    const bool half_references = references.get_element_type() != ov::element::f32;
    const Scratch::Lease lease(*scratch_, workspace + half_references * references.get_size() * sizeof(float));
    if (half_references) {
      float* floats = reinterpret_cast<float*>(static_cast<char*>(lease.data()) + workspace);
      const bool half = references.get_element_type() == ov::element::f16;
      (half ? to_float<ov::float16> : to_float<ov::bfloat16>)(references, floats);
      arguments.reference_points = floats;
    } else {
      arguments.reference_points = references.data<const float>();
    }
    const kda_executor executor = {run_on_openvinos_threads, nullptr};
    Message message;
    const kda_status status =
        kda_cpu_forward(&arguments, lease.data(), &executor, message.characters, sizeof message.characters);
    expect(status == KDA_OK, message.characters);
    return true;
  }

 private:
  static constexpr size_t kNumAttributes = sizeof kAttributes / sizeof *kAttributes;

  /* "KeyAwareDeformAttn: <message>"; the plugin names the node. */
  template <typename... Parts>
  static void expect(bool condition, const Parts&... message) {
    if (!condition) OPENVINO_THROW(op_name(key_aware), ": ", message...);
  }

  void check_type(size_t input, ov::element::Type value_type) const {
    using namespace ov::element;
    const Type type = get_input_element_type(input);
    const char* wanted = nullptr;
    switch (kInputs[input].type) {
      case 'I': wanted = is_any_of(type, {i64, i32}) ? nullptr : "i64"; break;
      case 'T': wanted = type == value_type ? nullptr : "of the type of value"; break;
      default: break;
    }
    if (kInputs[input].type != 'I' && !is_any_of(type, {f32, f16, bf16})) wanted = "f32, f16 or bf16";
    expect(!wanted || type.is_dynamic() || (value_type.is_dynamic() && kInputs[input].type == 'T'),
           input_name(key_aware, input), " is ", type, "; it should be ", wanted ? wanted : "");
  }

  /* smallest_arguments with the attributes. */
  kda_arguments known_arguments() const {
    kda_arguments arguments = smallest_arguments(key_aware);
    for (size_t i = 0; i < kNumAttributes; ++i) {
      const int64_t number = attributes_[i];
      arguments.*kAttributes[i].value = static_cast<int32_t>(number);
      expect(static_cast<int32_t>(number) == number, "the attribute ", kAttributes[i].name, " is ", number,
             "; it should fit into 32 bits");
    }
    return arguments;
  }

  void check(const Shape (&shapes)[kNumInputs], size_t num_inputs, kda_arguments* arguments) const {
    for (size_t input = 0; input < num_inputs; ++input) {
      expect(shapes[input].rank <= Shape::kMaxRank, input_name(key_aware, input), " has ", shapes[input].rank,
             " dimensions");
    }
    Message message;
    expect(check_shapes(shapes, num_inputs > kKey, arguments, &message) == KDA_OK, message.characters);
  }

  void check_on_cpu(const kda_arguments& arguments) const {
    Message message;
    expect(kda_cpu_check(&arguments, message.characters, sizeof message.characters) == KDA_OK, message.characters);
  }

  int64_t attributes_[kNumAttributes] = {}; /* in the order of kAttributes */
  std::shared_ptr<Scratch> scratch_ = Scratch::shared();
};

/* ---- The conversion from ONNX ------------------------------------------------------------------------------- */

int64_t read_attribute(const ov::frontend::NodeContext& node, const char* op, const char* name) {
  const ov::Any attribute = node.get_attribute_as_any(name);
  if (!attribute.is<int64_t>()) OPENVINO_THROW(op, ": the attribute ", name, " (int) is missing");
  return attribute.as<int64_t>();
}

/* The front end takes a conversion for all versions of its domain, and does not tell it which one the model imports:
 * what is checked here is the version that the node carries for TensorRT. */
void check_version(const ov::frontend::NodeContext& node, const char* op) {
  const ov::Any version = node.get_attribute_as_any("plugin_version");
  if (version.empty() || version.as<std::string>() == std::to_string(kOpVersion)) return;
  OPENVINO_THROW(op, ": plugin_version is '", version.as<std::string>(), "'; this library has version ", kOpVersion,
                 " of the op: export the model again, or install the litedetr-deploy that made it");
}

template <bool key_aware>
ov::OutputVector convert(const ov::frontend::NodeContext& node) {
  const char* op = op_name(key_aware);
  check_version(node, op);
  ov::OutputVector inputs;
  for (size_t input = 0; input < node.get_input_size(); ++input) {
    const ov::Output<ov::Node> value = node.get_input(static_cast<int>(input));
    /* An optional input that is absent, "" in ONNX. */
    if (input == kKey && value.get_node()->get_type_name() == std::string("NullNode")) continue;
    /* Of the two types that are fixed; those of the rest depend on one another. */
    const char letter = input < kNumInputs ? kInputs[input].type : 'T';
    const ov::element::Type type = value.get_element_type();
    const ov::element::Type wanted = letter == 'F' ? ov::element::f32 : ov::element::i64;
    if ((letter == 'F' || letter == 'I') && type.is_static() && type != wanted) {
      OPENVINO_THROW(op, ": ", input_name(key_aware, input), " is ", type, "; it should be ", wanted);
    }
    inputs.push_back(value);
  }
  const int64_t num_heads = read_attribute(node, op, "num_heads");
  return {std::make_shared<DeformAttn<key_aware>>(inputs, num_heads, read_attribute(node, op, "num_points"))};
}

template <bool key_aware>
void add(std::vector<ov::Extension::Ptr>& extensions) {
  /* For OpenVINO's own files, a cache's too, and for ONNX. */
  extensions.push_back(std::make_shared<ov::OpExtension<DeformAttn<key_aware>>>());
  extensions.push_back(
      std::make_shared<ov::frontend::onnx::ConversionExtension>(op_name(key_aware), kDomain, convert<key_aware>));
}

}  // namespace

extern "C" __attribute__((visibility("default"))) void litedetr_create_extensions(
    std::vector<ov::Extension::Ptr>& extensions) {
  add<true>(extensions);
  add<false>(extensions);
}

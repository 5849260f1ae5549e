/* KeyAwareDeformAttn and MSDeformAttn (domain litedetr) as ONNX Runtime custom ops, for the CPU and for CUDA.
 *
 * This file translates between ONNX Runtime and plugins/kda; plugins/op.h describes the ops and says who checks what.
 * It is written against ONNX Runtime's C API, whose functions are reached through the table that the runtime hands
 * over, so nothing of ONNX Runtime is linked.  No exception leaves it.
 */
#include <onnxruntime_c_api.h>

#include <cstdarg>
#include <cstdint>
#include <cstdio>
#include <map>
#include <mutex>
#include <new>
#include <tuple>
#include <utility>

#include "../op.h"
#include "kda.h"

namespace {

using namespace litedetr;

/* The oldest API that has all that is used here (KernelInfoGetAllocator), so that older runtimes than the headers
 * load the library as well. */
constexpr uint32_t kApiVersion = 18;
static_assert(kApiVersion <= ORT_API_VERSION, "the ONNX Runtime headers are older than 1.18");

constexpr size_t kAlignment = 64;

#ifdef LITEDETR_HAS_CUDA
constexpr bool kHasCuda = true;
#else
constexpr bool kHasCuda = false;
#endif

/* One op for one provider and one combination of types; ONNX Runtime selects among ops of one name by the provider that
 * a node is given to and by the types of its inputs. */
struct Op : OrtCustomOp {
  const OrtApi* api;
  bool cuda;
  bool key_aware;
  ONNXTensorElementDataType type;
  ONNXTensorElementDataType offset_type;

  const char* name() const { return op_name(key_aware); }
  const char* input_name(size_t input) const { return litedetr::input_name(key_aware, input); }
  ONNXTensorElementDataType input_type(size_t input) const {
    switch (kInputs[input].type) {
      case 'F': return ONNX_TENSOR_ELEMENT_DATA_TYPE_FLOAT;
      case 'I': return ONNX_TENSOR_ELEMENT_DATA_TYPE_INT64;
      case 'U': return offset_type;
      default: return type;
    }
  }
};

/* ---- Small parts -------------------------------------------------------------------------------------------- */

#define RETURN_IF_ERROR(expression)                        \
  do {                                                     \
    if (OrtStatus* status_ = (expression)) return status_; \
  } while (0)

/* "KeyAwareDeformAttn: <message>" */
__attribute__((format(printf, 3, 4))) OrtStatus* error(const Op& op, OrtErrorCode code, const char* format, ...) {
  char message[600];
  const int length = snprintf(message, sizeof message, "%s: ", op.name());
  va_list values;
  va_start(values, format);
  vsnprintf(message + length, sizeof message - length, format, values);
  va_end(values);
  return op.api->CreateStatus(code, message);
}

kda_dtype dtype_of(ONNXTensorElementDataType type) {
  switch (type) {
    case ONNX_TENSOR_ELEMENT_DATA_TYPE_FLOAT16: return KDA_FLOAT16;
    case ONNX_TENSOR_ELEMENT_DATA_TYPE_BFLOAT16: return KDA_BFLOAT16;
    default: return KDA_FLOAT32;
  }
}

struct Tensor {
  void* data = nullptr;
  Shape shape;
};

OrtStatus* read_tensor(const Op& op, const OrtKernelContext* context, size_t input, Tensor* tensor) {
  const OrtApi& api = *op.api;
  const OrtValue* value = nullptr;
  RETURN_IF_ERROR(api.KernelContext_GetInput(context, input, &value));
  if (!value) return nullptr; /* an optional input that is absent */
  RETURN_IF_ERROR(api.GetTensorMutableData(const_cast<OrtValue*>(value), &tensor->data));
  OrtTensorTypeAndShapeInfo* info = nullptr;
  RETURN_IF_ERROR(api.GetTensorTypeAndShape(value, &info));
  OrtStatus* status = api.GetDimensionsCount(info, &tensor->shape.rank);
  if (!status && tensor->shape.rank > Shape::kMaxRank) {
    status = error(op, ORT_INVALID_ARGUMENT, "%s has %zu dimensions", op.input_name(input), tensor->shape.rank);
  }
  if (!status) status = api.GetDimensions(info, tensor->shape.sizes, tensor->shape.rank);
  api.ReleaseTensorTypeAndShapeInfo(info);
  return status;
}

OrtStatus* error_of(const Op& op, kda_status status, const Message& message) {
  const OrtErrorCode code = status == KDA_UNSUPPORTED        ? ORT_NOT_IMPLEMENTED
                            : status == KDA_INVALID_ARGUMENT ? ORT_INVALID_ARGUMENT
                                                             : ORT_FAIL;
  return error(op, code, "%s", message.characters);
}

/* ---- The kernel --------------------------------------------------------------------------------------------- */

struct Kernel {
  const Op* op;
  kda_arguments arguments; /* of which the types and attributes are known */
  OrtAllocator* allocator; /* ONNX Runtime's arena for the CPU; the CUDA kernels need no memory */
};

OrtStatus* read_attribute(const Op& op, const OrtKernelInfo* info, const char* name, int32_t* value) {
  int64_t number = 0;
  if (OrtStatus* status = op.api->KernelInfoGetAttribute_int64(info, name, &number)) {
    op.api->ReleaseStatus(status);
    return error(op, ORT_INVALID_ARGUMENT, "the attribute %s (int) is missing", name);
  }
  *value = static_cast<int32_t>(number);
  if (*value == number) return nullptr;
  return error(op, ORT_INVALID_ARGUMENT, "the attribute %s is %lld; it should fit into 32 bits", name,
               static_cast<long long>(number));
}

/* ONNX Runtime has one description of an op for all versions of its domain, and does not tell a custom op which one the
 * model imports: what is checked here is the version that the node carries for TensorRT.  (Python's create_session
 * reads the model's imports.) */
OrtStatus* check_version(const Op& op, const OrtKernelInfo* info) {
  char version[16] = "";
  size_t size = sizeof version;
  if (OrtStatus* status = op.api->KernelInfoGetAttribute_string(info, "plugin_version", version, &size)) {
    op.api->ReleaseStatus(status); /* there is none, or it is longer */
    if (size <= sizeof version) return nullptr;
  }
  if (size == 2 && version[0] == '0' + kOpVersion) return nullptr; /* 2: with the final zero */
  return error(op, ORT_NOT_IMPLEMENTED,
               "plugin_version is '%s'; this library has version %d of the op: export the model again, or install the "
               "litedetr-deploy that made it",
               version, kOpVersion);
}

OrtStatus* create_kernel(const OrtCustomOp* custom_op, const OrtApi*, const OrtKernelInfo* info, void** created) {
  const Op& op = *static_cast<const Op*>(custom_op);
  Kernel kernel = {&op, smallest_arguments(op.key_aware), nullptr};
  RETURN_IF_ERROR(check_version(op, info));
  kda_arguments* arguments = &kernel.arguments;
  for (const auto& attribute : kAttributes) {
    RETURN_IF_ERROR(read_attribute(op, info, attribute.name, &(arguments->*attribute.value)));
  }
  arguments->dtype = dtype_of(op.type);
  arguments->offset_dtype = dtype_of(op.offset_type);
  Message message;
  const auto check = op.cuda ? kda_cuda_check : kda_cpu_check;
  const kda_status status = check(arguments, message.characters, sizeof message.characters);
  if (status != KDA_OK) return error_of(op, status, message);
  if (!op.cuda) RETURN_IF_ERROR(op.api->KernelInfoGetAllocator(info, OrtMemTypeDefault, &kernel.allocator));
  *created = new (std::nothrow) Kernel(kernel);
  if (*created) return nullptr;
  if (kernel.allocator) op.api->ReleaseAllocator(kernel.allocator);
  return error(op, ORT_FAIL, "out of memory");
}

void destroy_kernel(void* pointer) {
  const Kernel* kernel = static_cast<const Kernel*>(pointer);
  if (kernel->allocator) kernel->op->api->ReleaseAllocator(kernel->allocator);
  delete kernel;
}

/* ONNX Runtime's own threads behind kda_executor. */
struct Threads {
  const OrtApi* api;
  const OrtKernelContext* context;
  kda_task task;
  void* state;

  static void run_index(void* self, size_t index) {
    const Threads* threads = static_cast<const Threads*>(self);
    threads->task(static_cast<int64_t>(index), static_cast<int64_t>(index) + 1, threads->state);
  }
  static void run(void* self, int64_t count, kda_task task, void* state) {
    Threads* threads = static_cast<Threads*>(self);
    threads->task = task;
    threads->state = state;
    /* 0: no batches fixed in advance; a thread that is done takes the next index.  The tasks are some 20 us each. */
    OrtStatus* status =
        threads->api->KernelContext_ParallelFor(threads->context, run_index, static_cast<size_t>(count), 0, threads);
    if (status) { /* it refuses before it starts */
      threads->api->ReleaseStatus(status);
      task(0, count, state);
    }
  }
};

/* Checks the inputs and makes the output.  The tensors are where the provider has them: in its device's memory. */
OrtStatus* read_arguments(const Kernel& kernel, OrtKernelContext* context, kda_arguments* arguments) {
  const Op& op = *kernel.op;
  const OrtApi& api = *op.api;
  size_t num_inputs = 0;
  RETURN_IF_ERROR(api.KernelContext_GetInputCount(context, &num_inputs));
  if (num_inputs > kNumInputs) num_inputs = kNumInputs;
  Tensor tensors[kNumInputs];
  Shape shapes[kNumInputs];
  for (size_t input = 0; input < num_inputs; ++input) {
    RETURN_IF_ERROR(read_tensor(op, context, input, &tensors[input]));
    shapes[input] = tensors[input].shape;
  }

  *arguments = kernel.arguments;
  Message message;
  const kda_status status = check_shapes(shapes, tensors[kKey].data, arguments, &message);
  if (status != KDA_OK) return error_of(op, status, message);
  arguments->query = tensors[kQuery].data;
  arguments->key = tensors[kKey].data;
  arguments->value = tensors[kValue].data;
  arguments->reference_points = static_cast<const float*>(tensors[kReferencePoints].data);
  arguments->sampling_offsets = tensors[kSamplingOffsets].data;
  arguments->spatial_shapes = static_cast<const int64_t*>(tensors[kSpatialShapes].data);

  const int64_t sizes[3] = {arguments->batch, arguments->num_queries, shapes[kValue].sizes[2]};
  OrtValue* output = nullptr;
  RETURN_IF_ERROR(api.KernelContext_GetOutput(context, 0, sizes, 3, &output));
  return api.GetTensorMutableData(output, &arguments->output);
}

OrtStatus* compute_cpu(void* pointer, OrtKernelContext* context) {
  const Kernel& kernel = *static_cast<const Kernel*>(pointer);
  const Op& op = *kernel.op;
  const OrtApi& api = *op.api;
  kda_arguments arguments;
  RETURN_IF_ERROR(read_arguments(kernel, context, &arguments));
  if (arguments.batch == 0 || arguments.num_queries == 0) return nullptr;

  Message message;
  kda_status status = kda_cpu_check(&arguments, message.characters, sizeof message.characters);
  if (status == KDA_OK) {
    void* scratch = nullptr;
    RETURN_IF_ERROR(api.AllocatorAlloc(kernel.allocator, kda_cpu_workspace_size(&arguments) + kAlignment, &scratch));
    const uintptr_t aligned = (reinterpret_cast<uintptr_t>(scratch) + kAlignment - 1) / kAlignment * kAlignment;
    Threads threads = {&api, context, nullptr, nullptr};
    const kda_executor executor = {Threads::run, &threads};
    status = kda_cpu_forward(&arguments, reinterpret_cast<void*>(aligned), &executor, message.characters,
                             sizeof message.characters);
    RETURN_IF_ERROR(api.AllocatorFree(kernel.allocator, scratch));
  }
  return status == KDA_OK ? nullptr : error_of(op, status, message);
}

OrtStatus* compute_cuda(void* pointer, OrtKernelContext* context) {
  const Kernel& kernel = *static_cast<const Kernel*>(pointer);
  const Op& op = *kernel.op;
  kda_arguments arguments;
  RETURN_IF_ERROR(read_arguments(kernel, context, &arguments));
  if (arguments.batch == 0 || arguments.num_queries == 0) return nullptr;

  void* stream = nullptr; /* the session's cudaStream_t */
  RETURN_IF_ERROR(op.api->KernelContext_GetGPUComputeStream(context, &stream));
  Message message;
  const kda_status status = kda_cuda_forward(&arguments, stream, message.characters, sizeof message.characters);
  return status == KDA_OK ? nullptr : error_of(op, status, message);
}

/* ---- The description ---------------------------------------------------------------------------------------- */

/* output [N, Q, M*D] has the Q of the first input, the rest of value and its type.  Sizes may be names.  ONNX Runtime
 * asks one op for all that share its name, so op.type is not the answer. */
OrtStatus* infer_shape(const OrtCustomOp* custom_op, OrtShapeInferContext* context) {
  const Op& op = *static_cast<const Op*>(custom_op);
  const OrtApi& api = *op.api;
  int64_t sizes[3];
  const char* names[3];
  ONNXTensorElementDataType type = ONNX_TENSOR_ELEMENT_DATA_TYPE_UNDEFINED;
  for (size_t input : {kQuery, kValue}) {
    OrtTensorTypeAndShapeInfo* info = nullptr; /* belongs to the context */
    RETURN_IF_ERROR(api.ShapeInferContext_GetInputTypeShape(context, input, &info));
    size_t rank = 0;
    RETURN_IF_ERROR(api.GetTensorElementType(info, &type));
    RETURN_IF_ERROR(api.GetDimensionsCount(info, &rank));
    if (rank != 3) return nullptr; /* not known yet; a wrong rank is reported when the op runs */
    int64_t input_sizes[3];
    const char* input_names[3];
    RETURN_IF_ERROR(api.GetDimensions(info, input_sizes, 3));
    RETURN_IF_ERROR(api.GetSymbolicDimensions(info, input_names, 3));
    for (int i : {0, 1, 2}) {
      if ((i == 1) != (input == kQuery)) continue;
      if (input_sizes[i] < 0 && !*input_names[i]) return nullptr; /* neither a number nor a name */
      sizes[i] = input_sizes[i];
      names[i] = input_names[i];
    }
  }
  OrtTensorTypeAndShapeInfo* output = nullptr;
  RETURN_IF_ERROR(api.CreateTensorTypeAndShapeInfo(&output));
  OrtStatus* status = api.SetTensorElementType(output, type);
  if (!status) status = api.SetDimensions(output, sizes, 3);
  if (!status) status = api.SetSymbolicDimensions(output, names, 3);
  if (!status) status = api.ShapeInferContext_SetOutputTypeShape(context, 0, output);
  api.ReleaseTensorTypeAndShapeInfo(output);
  return status;
}

Op make_op(const OrtApi* api, bool cuda, bool key_aware, ONNXTensorElementDataType type,
           ONNXTensorElementDataType offset_type) {
  Op op = {};
  op.api = api;
  op.cuda = cuda;
  op.key_aware = key_aware;
  op.type = type;
  op.offset_type = offset_type;
  op.version = kApiVersion;
  op.GetName = [](const OrtCustomOp* self) { return static_cast<const Op*>(self)->name(); };
  op.GetExecutionProviderType = [](const OrtCustomOp* self) {
    return static_cast<const Op*>(self)->cuda ? "CUDAExecutionProvider" : "CPUExecutionProvider";
  };
  op.GetInputTypeCount = [](const OrtCustomOp* self) -> size_t {
    return static_cast<const Op*>(self)->key_aware ? kNumInputs : kKey;
  };
  op.GetInputType = [](const OrtCustomOp* self, size_t input) {
    return static_cast<const Op*>(self)->input_type(input);
  };
  op.GetInputCharacteristic = [](const OrtCustomOp*, size_t input) {
    return input == kKey ? INPUT_OUTPUT_OPTIONAL : INPUT_OUTPUT_REQUIRED;
  };
  /* All in the provider's memory, spatial_shapes too: nothing is copied to the host. */
  op.GetInputMemoryType = [](const OrtCustomOp*, size_t) { return OrtMemTypeDefault; };
  op.GetOutputTypeCount = [](const OrtCustomOp*) -> size_t { return 1; };
  op.GetOutputType = [](const OrtCustomOp* self, size_t) { return static_cast<const Op*>(self)->type; };
  op.GetOutputCharacteristic = [](const OrtCustomOp*, size_t) { return INPUT_OUTPUT_REQUIRED; };
  op.GetVariadicInputMinArity = [](const OrtCustomOp*) { return 0; };
  op.GetVariadicInputHomogeneity = [](const OrtCustomOp*) { return 0; };
  op.GetVariadicOutputMinArity = [](const OrtCustomOp*) { return 0; };
  op.GetVariadicOutputHomogeneity = [](const OrtCustomOp*) { return 0; };
  op.GetStartVersion = [](const OrtCustomOp*) { return kOpVersion; };
  op.GetEndVersion = [](const OrtCustomOp*) { return kOpVersion; };
  op.InferOutputShapeFn = infer_shape;
  op.CreateKernelV2 = create_kernel;
  op.KernelComputeV2 = cuda ? compute_cuda : compute_cpu;
  op.KernelDestroy = destroy_kernel;
  return op;
}

/* The ops of one ONNX Runtime (a process may hold two) and the domain that lists them.  Sessions keep pointers to both,
 * so a registration lives as long as the process. */
struct Registration {
  Op ops[36];
  OrtCustomOpDomain* domain = nullptr;

  OrtStatus* fill(const OrtApi* api) {
    constexpr auto kFloat = ONNX_TENSOR_ELEMENT_DATA_TYPE_FLOAT;
    constexpr auto kHalf = ONNX_TENSOR_ELEMENT_DATA_TYPE_FLOAT16;
    constexpr auto kBfloat = ONNX_TENSOR_ELEMENT_DATA_TYPE_BFLOAT16;
    RETURN_IF_ERROR(api->CreateCustomOpDomain(kDomain, &domain));
    Op* op = ops;
    for (bool key_aware : {true, false}) {
      for (bool cuda : {false, true}) {
        /* A library without CUDA kernels leaves all nodes to the CPU; an ONNX Runtime without CUDA ignores these ops.
         */
        if (cuda && !kHasCuda) break;
        /* Those that do not go together too: create_kernel says so better than ONNX Runtime, which finds no kernel. */
        for (auto type : {kFloat, kHalf, kBfloat}) {
          for (auto offset_type : {kFloat, kHalf, kBfloat}) {
            *op = make_op(api, cuda, key_aware, type, offset_type);
            RETURN_IF_ERROR(api->CustomOpDomain_Add(domain, op++));
          }
        }
      }
    }
    return nullptr;
  }
};

OrtStatus* register_ops(OrtSessionOptions* options, const OrtApi* api) {
  static std::mutex mutex;
  static auto* registrations = new std::map<const OrtApi*, Registration>;
  const std::lock_guard<std::mutex> lock(mutex);
  auto found = registrations->find(api);
  if (found == registrations->end()) {
    found = registrations->emplace(std::piecewise_construct, std::forward_as_tuple(api), std::forward_as_tuple()).first;
    if (OrtStatus* status = found->second.fill(api)) {
      if (found->second.domain) api->ReleaseCustomOpDomain(found->second.domain);
      registrations->erase(found);
      return status;
    }
  }
  return api->AddCustomOpDomain(options, found->second.domain);
}

}  // namespace

/* What ONNX Runtime calls when a session's options name this library. */
extern "C" __attribute__((visibility("default"))) OrtStatus* ORT_API_CALL RegisterCustomOps(OrtSessionOptions* options,
                                                                                            const OrtApiBase* base) {
  const OrtApi* api = base->GetApi(kApiVersion);
  if (!api) {
    /* API 1 is in every release; it is enough to say what is wrong. */
    const OrtApi* oldest = base->GetApi(1);
    if (!oldest) return nullptr;
    char message[256];
    snprintf(message, sizeof message, "the litedetr custom ops need ONNX Runtime 1.%u or newer; this one is %s",
             kApiVersion, base->GetVersionString());
    return oldest->CreateStatus(ORT_NOT_IMPLEMENTED, message);
  }
  try {
    return register_ops(options, api);
  } catch (...) {
    return api->CreateStatus(ORT_FAIL, "out of memory while the litedetr custom ops were registered");
  }
}

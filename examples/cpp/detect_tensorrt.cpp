// Detects objects on images with an engine that `litedetr build` or trtexec made, in TensorRT 10.3 to 11.
#include <NvInfer.h>
#include <cuda_runtime_api.h>

#include <array>
#include <iterator>
#include <map>
#include <memory>
#include <tuple>
#include <utility>

#include "image.h"
#include "program.h"

namespace {

constexpr char kUsage[] =
    "usage: detect_tensorrt ENGINE IMAGE... [--plugin FILE] [--labels FILE] [--threshold T]\n"
    "  --plugin  liblitedetr_tensorrt.so, for an engine with the attention op; its path is printed by\n"
    "            python -c \"import litedetr_deploy as ld; print(ld.native.library('tensorrt'))\"\n"
    "  --labels  the name of each class, one a line\n";

// Keeps what TensorRT says last, for the message of what fails.
class Logger : public nvinfer1::ILogger {
 public:
  void log(Severity severity, const char* message) noexcept override {
    if (severity <= Severity::kERROR) last = message;
  }
  std::string last = "it does not say why";
};

void check(cudaError_t status, const char* what) {
  if (status != cudaSuccess) throw std::runtime_error(std::string(what) + " failed: " + cudaGetErrorString(status));
}

// Device memory that grows where a larger image comes.
class Buffer {
 public:
  Buffer() = default;
  Buffer(const Buffer&) = delete;
  ~Buffer() { cudaFree(data_); }
  void* of(size_t bytes) {
    if (bytes > bytes_) {
      cudaFree(std::exchange(data_, nullptr));
      bytes_ = 0;
      check(cudaMalloc(&data_, bytes), "cudaMalloc");
      bytes_ = bytes;
    }
    return data_;
  }

 private:
  void* data_ = nullptr;
  size_t bytes_ = 0;
};

std::string read(const std::string& path) {
  std::ifstream file(path, std::ios::binary);
  if (!file) throw std::runtime_error("the engine " + path + " does not exist or cannot be opened: check the path");
  return {std::istreambuf_iterator<char>(file), {}};
}

int detect(const Options& options) {
  const std::vector<std::string> names = read_labels(options.labels);
  const std::string plan = read(options.model);
  Logger logger;
  const std::unique_ptr<nvinfer1::IRuntime> runtime(nvinfer1::createInferRuntime(logger));
  if (!runtime) throw std::runtime_error("TensorRT does not start: " + logger.last);
  if (!options.library.empty() && !runtime->getPluginRegistry().loadLibrary(options.library.c_str()))
    throw std::runtime_error("the plugin library " + options.library + " cannot be loaded: " + logger.last);
  const std::unique_ptr<nvinfer1::ICudaEngine> engine(runtime->deserializeCudaEngine(plan.data(), plan.size()));
  if (!engine)
    throw std::runtime_error("the engine " + options.model + " cannot be loaded: " + logger.last +
                             ". An engine runs with the version of " +
                             "TensorRT and on the kind of GPU that it was built for" +
                             (options.library.empty() ? ", and one with the attention op needs --plugin" : ""));
  for (const char* name : {"images", "orig_target_sizes", "labels", "boxes", "scores"})
    if (engine->getTensorIOMode(name) == nvinfer1::TensorIOMode::kNONE)
      throw std::runtime_error(options.model + " is no detector that this program runs: it has no " + name);
  if (engine->getTensorDataType("labels") != nvinfer1::DataType::kINT64)
    throw std::runtime_error(options.model + " has labels that are no INT64: build it again with TensorRT 10 or newer");
  const std::unique_ptr<nvinfer1::IExecutionContext> context(engine->createExecutionContext());
  if (!context) throw std::runtime_error("no context for " + options.model + ": " + logger.last);
  cudaStream_t stream;
  check(cudaStreamCreate(&stream), "cudaStreamCreate");
  std::map<std::string, Buffer> buffers;
  const nvinfer1::Dims wanted = engine->getTensorShape("images");
  const auto give = [&](const char* name, const nvinfer1::Dims& shape, const void* data, size_t bytes) {
    if (!context->setInputShape(name, shape))
      throw std::runtime_error(std::string("the engine does not take ") + name + " of this size: " + logger.last);
    void* device = buffers[name].of(bytes);
    check(cudaMemcpyAsync(device, data, bytes, cudaMemcpyHostToDevice, stream), "the copy to the GPU");
    context->setTensorAddress(name, device);
  };
  const int status = run(options, [&](const std::string& path) {
    const Image image = read_image(path);
    auto [width, height] = official_size(image.width, image.height);
    if (wanted.d[2] > 0) height = int(wanted.d[2]), width = int(wanted.d[3]);  // else -1: any size of the profile
    const std::vector<float> pixels = model_input(image, width, height);
    const std::array<int64_t, 2> size{image.width, image.height};
    give("images", nvinfer1::Dims4(1, 3, height, width), pixels.data(), pixels.size() * sizeof(float));
    give("orig_target_sizes", nvinfer1::Dims2(1, 2), size.data(), sizeof size);
    const int64_t count = context->getTensorShape("labels").d[1];
    std::vector<int64_t> labels(count);
    std::vector<float> boxes(4 * count), scores(count);
    const std::array<std::tuple<const char*, void*, size_t>, 3> outputs{{
        {"labels", labels.data(), labels.size() * sizeof(int64_t)},
        {"boxes", boxes.data(), boxes.size() * sizeof(float)},
        {"scores", scores.data(), scores.size() * sizeof(float)},
    }};
    for (const auto& [name, host, bytes] : outputs) context->setTensorAddress(name, buffers[name].of(bytes));
    if (!context->enqueueV3(stream)) throw std::runtime_error("the engine does not run: " + logger.last);
    for (const auto& [name, host, bytes] : outputs)
      check(cudaMemcpyAsync(host, buffers[name].of(bytes), bytes, cudaMemcpyDeviceToHost, stream), "the copy back");
    check(cudaStreamSynchronize(stream), "the run");
    print(path, image.width, image.height, labels.data(), boxes.data(), scores.data(), count, options.threshold, names);
  });
  cudaStreamDestroy(stream);
  return status;
}

}  // namespace

int main(int count, char** arguments) { return start(count, arguments, "--plugin", false, kUsage, detect); }

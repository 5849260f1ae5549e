// Detects objects on images with a model that `litedetr export` made, in ONNX Runtime on the CPU.
#include <onnxruntime_cxx_api.h>

#include <array>

#include "image.h"
#include "program.h"

namespace {

constexpr char kUsage[] =
    "usage: detect_onnxruntime MODEL.onnx IMAGE... [--op-library FILE] [--labels FILE] [--threshold T] [--threads N]\n"
    "  --op-library  liblitedetr_onnxruntime.so, for a model with the attention op; its path is printed by\n"
    "                python -c \"import litedetr_deploy as ld; print(ld.native.library('onnxruntime'))\"\n"
    "  --labels      the name of each class, one a line\n";

Ort::Session open(const Options& options, Ort::Env& environment) {
  if (!std::ifstream(options.model))
    throw std::runtime_error("the model " + options.model + " does not exist or cannot be opened: check the path");
  Ort::SessionOptions session_options;
  if (options.threads) session_options.SetIntraOpNumThreads(options.threads);
  // What this optimiser makes takes longer on a CPU than the sums and norms that go in.
  session_options.AddConfigEntry("optimization.disable_specified_optimizers", "SkipLayerNormFusion");
  try {
    if (!options.library.empty()) session_options.RegisterCustomOpsLibrary(options.library.c_str());
  } catch (const Ort::Exception& error) {
    throw std::runtime_error("the op library " + options.library + " cannot be used by ONNX Runtime " +
                             OrtGetApiBase()->GetVersionString() + ": " + error.what() +
                             ". Give liblitedetr_onnxruntime.so of the release that exported the model");
  }
  try {
    return Ort::Session(environment, options.model.c_str(), session_options);
  } catch (const Ort::Exception& error) {
    const std::string why = error.what();
    const bool lacks_op = options.library.empty() && why.find("litedetr") != std::string::npos;
    throw std::runtime_error("the model " + options.model + " cannot be loaded: " + why +
                             (lacks_op ? ". It holds the attention op: give --op-library" : ""));
  }
}

void check(const Ort::Session& session, const std::string& model) {
  Ort::AllocatorWithDefaultOptions allocator;
  std::string inputs, outputs;
  for (size_t i = 0; i < session.GetInputCount(); ++i)
    inputs += std::string(" ") + session.GetInputNameAllocated(i, allocator).get();
  for (size_t i = 0; i < session.GetOutputCount(); ++i)
    outputs += std::string(" ") + session.GetOutputNameAllocated(i, allocator).get();
  if (inputs != " images orig_target_sizes" || outputs.rfind(" labels boxes scores", 0) != 0)
    throw std::runtime_error(model + " is no detector that this program runs: it takes" + inputs + " and gives" +
                             outputs + ". Wanted: images orig_target_sizes -> labels boxes scores; `litedetr export` " +
                             "without --outputs raw and --pixel-mask makes such a model");
}

int detect(const Options& options) {
  const std::vector<std::string> names = read_labels(options.labels);
  Ort::Env environment(ORT_LOGGING_LEVEL_FATAL, "detect");  // errors come as exceptions
  Ort::Session session = open(options, environment);
  check(session, options.model);
  const std::vector<int64_t> wanted = session.GetInputTypeInfo(0).GetTensorTypeAndShapeInfo().GetShape();
  const auto memory = Ort::MemoryInfo::CreateCpu(OrtArenaAllocator, OrtMemTypeDefault);
  return run(options, [&](const std::string& path) {
    const Image image = read_image(path);
    auto [width, height] = official_size(image.width, image.height);
    if (wanted[2] > 0) height = int(wanted[2]), width = int(wanted[3]);  // else -1: any size
    std::vector<float> pixels = model_input(image, width, height);
    const std::array<int64_t, 4> shape{1, 3, height, width};
    const std::array<int64_t, 2> size_shape{1, 2};
    std::array<int64_t, 2> size{image.width, image.height};
    const std::array<Ort::Value, 2> inputs{
        Ort::Value::CreateTensor<float>(memory, pixels.data(), pixels.size(), shape.data(), shape.size()),
        Ort::Value::CreateTensor<int64_t>(memory, size.data(), size.size(), size_shape.data(), size_shape.size())};
    const char* input_names[] = {"images", "orig_target_sizes"};
    const char* output_names[] = {"labels", "boxes", "scores"};
    const auto outputs = session.Run({}, input_names, inputs.data(), inputs.size(), output_names, 3);
    const int64_t count = outputs[0].GetTensorTypeAndShapeInfo().GetShape()[1];
    print(path, image.width, image.height, outputs[0].GetTensorData<int64_t>(), outputs[1].GetTensorData<float>(),
          outputs[2].GetTensorData<float>(), count, options.threshold, names);
  });
}

}  // namespace

int main(int count, char** arguments) { return start(count, arguments, "--op-library", true, kUsage, detect); }

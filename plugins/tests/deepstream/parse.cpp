// Calls the parser as nvinfer does, on tensors from standard input, and prints the objects:
//
//   parse WIDTH HEIGHT CLASSES THRESHOLD < tensors
//
// where each tensor is a line `name type rank sizes...` and its bytes.  Every buffer is as large as its tensor, so that
// AddressSanitizer sees what is read beside it.
#include <nvdsinfer_custom_impl.h>

#include <cstdio>
#include <cstdlib>
#include <deque>
#include <iostream>
#include <memory>
#include <sstream>
#include <string>

extern "C" bool NvDsInferParseLiteDetr(const std::vector<NvDsInferLayerInfo>&, const NvDsInferNetworkInfo&,
                                       const NvDsInferParseDetectionParams&,
                                       std::vector<NvDsInferObjectDetectionInfo>&);
extern "C" bool NvDsInferInitializeInputLayers(const std::vector<NvDsInferLayerInfo>&, const NvDsInferNetworkInfo&,
                                               unsigned int);

int main(int count, char** arguments) {
  if (count != 5) return 2;
  const NvDsInferNetworkInfo network{unsigned(std::atoi(arguments[1])), unsigned(std::atoi(arguments[2])), 3};
  NvDsInferParseDetectionParams wanted{};
  wanted.numClassesConfigured = unsigned(std::atoi(arguments[3]));
  wanted.perClassPreclusterThreshold.assign(wanted.numClassesConfigured, float(std::atof(arguments[4])));

  std::deque<std::string> names;
  std::deque<std::unique_ptr<char[]>> buffers;
  std::vector<NvDsInferLayerInfo> layers;
  for (std::string line; std::getline(std::cin, line);) {
    std::istringstream words(line);
    int type;
    NvDsInferLayerInfo layer{};
    words >> names.emplace_back() >> type >> layer.inferDims.numDims;
    size_t bytes = type == INT64 ? 8 : 4;
    for (unsigned i = 0; i < layer.inferDims.numDims; ++i) {
      words >> layer.inferDims.d[i];
      bytes *= layer.inferDims.d[i];
    }
    buffers.emplace_back(new char[bytes]);
    std::cin.read(buffers.back().get(), std::streamsize(bytes));
    layer.dataType = NvDsInferDataType(type);
    layer.layerName = names.back().c_str();
    layer.buffer = buffers.back().get();
    layers.push_back(layer);
  }

  if (layers.size() == 1 && names[0] == "orig_target_sizes") {  // of two frames
    std::unique_ptr<int64_t[]> sizes(new int64_t[4]);
    layers[0].buffer = sizes.get();
    if (!NvDsInferInitializeInputLayers(layers, network, 2)) return 1;
    for (int i = 0; i < 4; ++i) std::printf("%lld ", static_cast<long long>(sizes[i]));
    return 0;
  }
  std::vector<NvDsInferObjectDetectionInfo> objects(3);  // of the frame before
  if (!NvDsInferParseLiteDetr(layers, network, wanted, objects)) return 1;
  for (const auto& object : objects)
    std::printf("%u %.9g %.9g %.9g %.9g %.9g\n", object.classId, object.detectionConfidence, object.left, object.top,
                object.left + object.width, object.top + object.height);
  return 0;
}

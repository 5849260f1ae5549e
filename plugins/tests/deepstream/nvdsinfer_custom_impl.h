// As much of DeepStream's interface as the parser uses, declared anew from its documentation (6.0 to 8.0), for the
// tests: the SDK itself is not needed for them.
#pragma once

#include <vector>

enum NvDsInferDataType { FLOAT = 0, HALF = 1, INT8 = 2, INT32 = 3, INT64 = 4 };

struct NvDsInferDims {
  unsigned int numDims;
  unsigned int d[8];
  unsigned int numElements;
};

struct NvDsInferLayerInfo {
  NvDsInferDataType dataType;
  union {
    NvDsInferDims inferDims;
    NvDsInferDims dims;
  };
  int bindingIndex;
  const char* layerName;
  void* buffer;
  int isInput;
};

struct NvDsInferNetworkInfo {
  unsigned int width, height, channels;
};

struct NvDsInferParseDetectionParams {
  unsigned int numClassesConfigured;
  std::vector<float> perClassPreclusterThreshold, perClassPostclusterThreshold;
  std::vector<float>& perClassThreshold = perClassPreclusterThreshold;
};

struct NvDsInferObjectDetectionInfo {
  unsigned int classId;
  float left, top, width, height, detectionConfidence;
};

typedef bool (*NvDsInferParseCustomFunc)(const std::vector<NvDsInferLayerInfo>&, const NvDsInferNetworkInfo&,
                                         const NvDsInferParseDetectionParams&,
                                         std::vector<NvDsInferObjectDetectionInfo>&);
#define CHECK_CUSTOM_PARSE_FUNC_PROTOTYPE(function) \
  [[maybe_unused]] static NvDsInferParseCustomFunc const check_##function = function
